"""Batch: the one contract between data and model.

T tokens of N sequences are laid end to end, without padding; M of them are predicted (`Batch`), or each sequence has a label
(`LabelledBatch`). Where a device wants fixed shapes, T, N and M are filled up: dummy sequences at the end, first of [PAD] and then of no
token at all, and labels of IGNORED, which no loss counts.
"""
from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # label that no loss counts, as in torch's cross_entropy


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Sequences of tokens, whatever is asked of them."""

    input_ids: Tensor  # int64 [T]
    token_type_ids: Tensor  # int64 [T]; 0 in [CLS] A [SEP], 1 in B [SEP]
    position_ids: Tensor  # int64 [T]; restarts at 0 in each sequence
    cu_seqlens: Tensor  # int32 [N + 1]; sequence n is tokens cu_seqlens[n]:cu_seqlens[n + 1]; the last is T
    lengths: tuple[int, ...]  # of the N sequences, for the host
    max_length: int  # bound of `lengths`, the same for each batch of a phase
    counts: dict[str, float]  # what each loss is divided by: "mlm" masked tokens, "nsp" pairs, "label" examples or their weights
    num_tokens: int  # real ones, without filling
    num_sequences: int  # real ones
    shortfall: int = 0  # masked tokens that a budget allowed and no unit could fill

    def _map(self, change) -> PackedBatch:
        tensors = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(self, **{name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)})

    def __getstate__(self) -> dict:
        """For a pipe between processes: as arrays. torch sends each tensor as a file in shared memory through a socket, which takes
        longer than to make the batch, and fails where the path of TMPDIR is long."""
        return {name: value.numpy() if isinstance(value, Tensor) and value.device.type == "cpu" else value
                for name, value in vars(self).items()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update({name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in state.items()})

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on `device`; the copy does not block where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory; the DataLoader calls this."""
        return self._map(Tensor.pin_memory)


@dataclass(frozen=True, kw_only=True)
class Batch(PackedBatch):
    """For pretraining."""

    masked_positions: Tensor  # int64 [M]; places in T
    masked_lm_labels: Tensor  # int64 [M]; the ids that stood there
    next_sentence_label: Tensor  # int64 [N]; 0 is next (or in order), 1 is random (or swapped), IGNORED where there is no pair


@dataclass(frozen=True, kw_only=True)
class LabelledBatch(PackedBatch):
    """For classification."""

    label: Tensor  # int64 [N]; IGNORED where there is none


@dataclass(frozen=True)
class Output:
    """What a model returns for a batch: sums, never means; names are those of `Batch.counts`."""

    loss_sums: dict[str, Tensor]  # float32 scalars
    num_correct: dict[str, Tensor]  # int64 scalars
