"""The contract between data and model: `Batch` goes in, `Loss` comes out.

T tokens of N sequences lie end to end, without padding; M of the tokens are masked. T, N and M may
be filled up, so that a GPU sees fixed shapes and a CPU few different ones: with dummy sequences at
the end (first of [PAD], then empty ones) and with labels of IGNORED.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # label that no loss counts, as in torch's cross_entropy


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of packed sequences and their labels."""

    input_ids: Tensor  # int64 [T]
    token_type_ids: Tensor  # int64 [T]; 0 in [CLS] A [SEP], 1 in B [SEP]
    position_ids: Tensor  # int64 [T]; restarts at 0 in each sequence
    cu_seqlens: Tensor  # int32 [N + 1]; sequence n is tokens cu_seqlens[n]:cu_seqlens[n + 1]
    # int64 [M]: places in T of masked tokens or, for entities, of tagged ones, in ascending order,
    # then zeros. None: there are none
    masked_positions: Tensor | None = None
    # By loss: [M] (one label per masked position) or [N] (one per sequence), int64.
    # "mlm": ids [M]; "nsp": 0 is next, 1 is random; "sop": 0 is in order, 1 is swapped;
    # "label": a class [N], a number [N] (float32), or a tag [M].
    labels: dict[str, Tensor]
    # By loss: what its sum is divided by, the number of real labels or the sum of their weights.
    counts: dict[str, float]
    lengths: tuple[int, ...]  # of the N sequences, on the host
    max_length: int  # upper bound of `lengths`, the same for all batches of a phase
    num_tokens: int  # real ones
    num_sequences: int  # real ones
    shortfall: int = 0  # tokens that the mask budget allowed but no unit could use

    @property
    def denominators(self) -> dict[str, float]:
        """What a term of the loss may be divided by: `counts`, and real tokens and sequences."""
        return {**self.counts, "tokens": self.num_tokens, "sequences": self.num_sequences}

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory do not block."""
        changed = _convert(vars(self), Tensor, lambda tensor: tensor.to(device, non_blocking=True))
        return replace(self, **changed)

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; the DataLoader calls this."""
        return replace(self, **_convert(vars(self), Tensor, Tensor.pin_memory))

    # Tensors are pickled as arrays. torch would pass each as a shared-memory file through a socket,
    # which takes longer than making the batch and fails where TMPDIR is long.
    def __getstate__(self) -> dict:
        return _convert(vars(self), Tensor, Tensor.numpy)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(_convert(state, np.ndarray, torch.from_numpy))


@dataclass(frozen=True)
class Loss:
    """One term of the training loss: a sum over a batch, never a mean.

    The update minimizes weight x (sums of all micro-batches and processes) / (their counts)."""

    sum: Tensor  # float32 scalar, with gradient
    # Scalar: the number of correct predictions, or the sum of their weights. None: no accuracy.
    num_correct: Tensor | None = None
    weight: float = 1.0
    count: str = ""  # the name in Batch.denominators of its denominator; "": its own name


def _convert(values: dict, kind: type, change: Callable) -> dict:
    """`values` with `change` applied to each of `kind`, also in dictionaries inside."""
    converted = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = _convert(value, kind, change)
        converted[name] = change(value) if isinstance(value, kind) else value
    return converted
