"""Collate: the examples of one micro-batch -> a packed, masked Batch; a pure function."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import IGNORED, Batch
from pretrain.data.corpus import ENTITY_INSIDE, WORD_START, Shard
from pretrain.data.hash_rng import derive
from pretrain.data.masking import Masking, Packed, draw_masks, fill_in
from pretrain.data.pairs import Plan, Task, count_up
from pretrain.data.tokenizer import Vocabulary

MASKS = 7  # stream of random numbers; the plan of an example uses streams 0 to 6


@dataclass(frozen=True)
class Examples:
    """The planned examples of a micro-batch and the shard that they point to."""

    shard: Shard
    plan: Plan
    progress: float = 0.0  # of the run, 0 to 1


def pack(examples: Examples, vocabulary: Vocabulary) -> Packed:
    """[CLS] A [SEP], or [CLS] A [SEP] B [SEP], of each example."""
    plan, shard, progress = examples.plan, examples.shard, examples.progress
    lengths = plan.lengths
    sequence, position_ids = count_up(lengths)
    token_type_ids = (position_ids > plan.a_length[sequence] + 1).astype(np.int64)
    # Where each token lies in the shard. [CLS] and [SEP] read any token and are overwritten.
    a_offset, b_offset = plan.a_start - 1, plan.b_start - plan.a_length - 2
    source = np.where(token_type_ids, b_offset[sequence], a_offset[sequence]) + position_ids
    source = np.minimum(np.maximum(source, 0), len(shard.ids) - 1)
    ids, flags = shard.ids[source].astype(np.int64), shard.flags[source]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    first_separators = (starts + plan.a_length + 1)[plan.b_length > 0]
    ids[starts] = vocabulary.cls_id
    ids[ends - 1] = ids[first_separators] = vocabulary.sep_id
    flags[starts] = flags[ends - 1] = flags[first_separators] = WORD_START
    # A word or entity that a segment cuts into begins at the segment: ENTITY_INSIDE becomes
    # ENTITY_START, the bit below it.
    begins = np.concatenate([starts, first_separators]) + 1
    inside = flags[begins] & ENTITY_INSIDE
    flags[begins] = WORD_START | (flags[begins] - inside) | (inside >> 1)
    maskable = ~vocabulary.is_special[ids]
    keys = derive(derive(plan.keys, MASKS)[sequence], position_ids)
    return Packed(
        ids, flags, maskable, sequence, position_ids, token_type_ids, keys, lengths, progress
    )


@dataclass(frozen=True)
class Collator:
    """Packs, masks and fills a micro-batch: with `fill` to fixed shapes, so one compiled graph
    serves all; else tokens to a multiple of `multiple`, masked positions to a multiple of half of
    it, because matrix products on a CPU cache code and memory for each shape."""

    task: Task
    vocabulary: Vocabulary
    masking: Masking
    fill: bool = False
    multiple: int = 1  # 1: no filling

    def __call__(self, examples: Examples) -> Batch:
        """The Batch of `examples`."""
        packed = pack(examples, self.vocabulary)
        budget = self.masking.budget(packed)
        masked, leader = draw_masks(packed, budget, self.masking)
        missed = budget - packed.count(masked) if self.masking.fills_budget else 0
        by_mask, by_sequence = self.labels(examples, packed, masked)
        dummies, num_masks = self._filling(packed.lengths, len(masked))
        lengths = np.append(packed.lengths, dummies)
        num_tokens, num_sequences = lengths.sum(), len(lengths)
        ids = packed.ids.copy()
        ids[masked] = fill_in(packed, masked, leader, self.masking, self.vocabulary)
        labels = {name: _extend(array, num_masks, IGNORED) for name, array in by_mask.items()}
        for name, array in by_sequence.items():
            labels[name] = _extend(array, num_sequences, IGNORED)
        return Batch(
            input_ids=_extend(ids, num_tokens, self.vocabulary.pad_id),
            token_type_ids=_extend(packed.token_type_ids, num_tokens, 0),
            position_ids=torch.from_numpy(np.append(packed.position_ids, count_up(dummies)[1])),
            masked_positions=_extend(masked, num_masks, 0),
            cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)),
            labels=labels,
            counts={name: int((label != IGNORED).sum()) for name, label in labels.items()},
            lengths=tuple(lengths.tolist()),
            max_length=self.task.max_length,
            num_tokens=len(ids),
            num_sequences=len(packed.lengths),
            shortfall=int(np.maximum(0, missed).sum()),
        )

    def labels(self, examples: Examples, packed: Packed, masked: np.ndarray) -> tuple[dict, dict]:
        """Labels of each loss, {name: int64}: per masked position, and per sequence.

        IGNORED labels do not count. Add your own here: filling and counting follow."""
        by_mask = {"mlm": packed.ids[masked]}  # [M]
        name = "sop" if self.task.pairs == "swapped" else "nsp"
        by_sequence = {name: examples.plan.label}  # [N]
        return by_mask, by_sequence

    def _filling(self, lengths: np.ndarray, num_masked: int) -> tuple[np.ndarray, int]:
        """(lengths of dummy sequences, number of masked positions after filling)."""
        task = self.task
        if not self.fill:
            half = max(1, self.multiple // 2)
            return self._cover(-int(lengths.sum()) % self.multiple), -(-num_masked // half) * half
        # Tokens beyond the last offset get NaN gradients from the kernel (pytorch #176793), so
        # dummies of [PAD] cover the tail. Empty ones follow, so that the number of sequences takes
        # few values: each one costs a compiled graph.
        tail = self._cover(task.token_limit - int(lengths.sum()))
        num_sequences = 2 * task.slots
        while num_sequences < len(lengths) + len(tail):
            num_sequences *= 2
        empty = np.zeros(num_sequences - len(lengths) - len(tail), np.int64)
        # Entities may exceed the mask rate, and a word its budget: then take the next size.
        size = max(64, task.masked_limit // 8 // 64 * 64)
        return np.append(tail, empty), -(-max(task.masked_limit, num_masked) // size) * size

    def _cover(self, tail: int) -> np.ndarray:
        """int64: lengths of the fewest sequences with `tail` tokens in all."""
        full, rest = divmod(tail, self.task.max_length)
        return np.array([self.task.max_length] * full + [rest] * (rest > 0), np.int64)


def _extend(array: np.ndarray, size: int, value: int) -> Tensor:
    """`array`, filled with `value` up to `size`."""
    return torch.from_numpy(np.append(array, np.full(size - len(array), value, array.dtype)))
