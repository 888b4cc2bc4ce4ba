"""Collate: the examples of one micro-batch -> a packed, masked Batch. All vectorised numpy; a pure function."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pretrain.batch import IGNORED, Batch
from pretrain.data.corpus import Shard
from pretrain.data.draws import derive
from pretrain.data.masking import choose, replace, unit_starts
from pretrain.data.planning import Plan, Task
from pretrain.data.tokenizer import Vocabulary

DUMMY_SLOTS = 1  # for each sequence of a micro-batch, so that dummies can cover any tail (see `_fill`)


@dataclass(frozen=True)
class Examples:
    """What `PretrainingDataset.__getitems__` gives: the planned examples of a micro-batch and the text that they point to."""

    shard: Shard
    plan: Plan


@dataclass(frozen=True)
class Collator:
    """Packs, masks and, with `fill`, fills a micro-batch to the fixed shapes that one compiled graph serves."""

    task: Task
    vocabulary: Vocabulary
    masking: str
    mask_split: list[float]
    fill: bool = False

    def __call__(self, examples: Examples) -> Batch:
        """The Batch of `examples`."""
        plan, vocabulary = examples.plan, self.vocabulary
        has_b = plan.b_length > 0
        lengths = 2 + has_b + plan.a_length + plan.b_length  # int64 [N]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        sequence = np.repeat(np.arange(len(lengths)), lengths)  # int64 [T]
        position_ids = np.arange(offsets[-1]) - offsets[sequence]
        token_type_ids = (position_ids > plan.a_length[sequence] + 1).astype(np.int64)
        # Where each token lies in the shard; the places of [CLS] and [SEP] read something and are overwritten.
        source = np.where(token_type_ids, (plan.b_start - plan.a_length - 2)[sequence], (plan.a_start - 1)[sequence]) + position_ids
        source = np.minimum(np.maximum(source, 0), len(examples.shard.ids) - 1)
        ids = examples.shard.ids[source].astype(np.int64)
        separators = np.concatenate([offsets[1:] - 1, (offsets[:-1] + plan.a_length + 1)[has_b]])
        ids[offsets[:-1]] = vocabulary.cls_id
        ids[separators] = vocabulary.sep_id

        maskable = ~vocabulary.is_special[ids]
        keys = derive(derive(plan.keys, np.uint64(7))[sequence], position_ids)
        starts = unit_starts(self.masking, examples.shard.flags[source], maskable)
        budget = self.task.budget(np.bincount(sequence[maskable], minlength=len(lengths)))
        masked = np.flatnonzero(choose(starts, maskable, sequence, keys, budget))
        labels = ids[masked]
        ids[masked] = replace(labels, keys[masked], self.mask_split, vocabulary)
        arrays = {"input_ids": ids, "token_type_ids": token_type_ids, "position_ids": position_ids, "lengths": lengths,
                  "masked_positions": masked, "masked_lm_labels": labels, "next_sentence_label": plan.label}
        if self.fill:
            arrays = self._fill(arrays)
        lengths = arrays.pop("lengths")
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return Batch(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()},
                     cu_seqlens=torch.from_numpy(cu_seqlens), lengths=tuple(lengths.tolist()), max_length=self.task.max_length,
                     counts={"mlm": len(masked), "nsp": int((plan.label != IGNORED).sum())}, num_tokens=int(offsets[-1]),
                     num_sequences=len(plan.label), shortfall=max(0, int(budget.sum()) - len(masked)))

    def _fill(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays at the size of the limits. The attention kernel wants every token inside a sequence (tokens beyond the
        last offset give NaN gradients, pytorch #176793), so dummy sequences of at least one [PAD] cover the tail: one for
        each free slot, and one slot more for each full sequence, so that they can always reach the end."""
        task, lengths = self.task, arrays["lengths"]
        slots = task.sequence_limit + DUMMY_SLOTS * task.micro_batch_size
        tail, dummies = task.token_limit + slots - int(lengths.sum()), slots - len(lengths)
        dummy_lengths = tail // dummies + (np.arange(dummies) < tail % dummies)
        assert dummy_lengths.min() >= 1 and dummy_lengths.max() <= task.max_length, (tail, dummies)
        num_masked = len(arrays["masked_positions"])
        # A word above its sequence's budget is taken all the same; the rare micro-batch that overflows has the next size.
        masked_slots = -(-max(task.masked_limit, num_masked) // 64) * 64
        offsets = np.cumsum(dummy_lengths) - dummy_lengths
        filling = {"input_ids": np.full(tail, self.vocabulary.pad_id), "token_type_ids": np.zeros(tail, np.int64),
                   "position_ids": np.arange(tail) - np.repeat(offsets, dummy_lengths), "lengths": dummy_lengths,
                   "masked_positions": np.zeros(masked_slots - num_masked, np.int64),
                   "masked_lm_labels": np.full(masked_slots - num_masked, IGNORED),
                   "next_sentence_label": np.full(dummies, IGNORED)}
        return {name: np.concatenate([array, filling[name]]) for name, array in arrays.items()}
