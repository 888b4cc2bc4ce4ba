"""Collate: the examples of one micro-batch -> a packed, masked Batch. All vectorised numpy; a pure function."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pretrain.batch import IGNORED, Batch
from pretrain.data.corpus import ENTITY_INSIDE, WORD_START, Shard
from pretrain.data.draws import derive
from pretrain.data.masking import Masking, draw_masks, replace
from pretrain.data.planning import Plan, Task
from pretrain.data.tokenizer import Vocabulary

MASKS = np.uint64(7)  # stream of random numbers of an example; the plan draws from those below


@dataclass(frozen=True)
class Examples:
    """What `PretrainingDataset.__getitems__` gives: the planned examples of a micro-batch and the text that they point to."""

    shard: Shard
    plan: Plan
    mask_rate: float | None = None  # None: the task's


@dataclass(frozen=True)
class Packed:
    """Examples laid end to end: T tokens of N sequences."""

    ids: np.ndarray  # int64 [T]
    flags: np.ndarray  # uint8 [T], as a corpus's; [CLS] and [SEP] are words of their own
    sequence: np.ndarray  # int64 [T]
    position_ids: np.ndarray  # int64 [T]
    token_type_ids: np.ndarray  # int64 [T]
    lengths: np.ndarray  # int64 [N]


def pack(examples: Examples, vocabulary: Vocabulary) -> Packed:
    """[CLS] A [SEP], or [CLS] A [SEP] B [SEP], of each example."""
    plan, shard = examples.plan, examples.shard
    has_b = plan.b_length > 0
    lengths = 2 + has_b + plan.a_length + plan.b_length
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position_ids = np.arange(offsets[-1]) - offsets[sequence]
    token_type_ids = (position_ids > plan.a_length[sequence] + 1).astype(np.int64)
    # Where each token lies in the shard; the places of [CLS] and [SEP] read something and are overwritten.
    source = np.where(token_type_ids, (plan.b_start - plan.a_length - 2)[sequence], (plan.a_start - 1)[sequence]) + position_ids
    source = np.minimum(np.maximum(source, 0), len(shard.ids) - 1)
    ids, flags = shard.ids[source].astype(np.int64), shard.flags[source]
    first_separators = (offsets[:-1] + plan.a_length + 1)[has_b]
    separators = np.concatenate([offsets[1:] - 1, first_separators])
    ids[offsets[:-1]], ids[separators] = vocabulary.cls_id, vocabulary.sep_id
    flags[offsets[:-1]] = flags[separators] = WORD_START
    # What is cut at the beginning of a segment begins there: ENTITY_INSIDE becomes ENTITY_START, the bit below it.
    begins = np.concatenate([offsets[:-1], first_separators]) + 1
    flags[begins] = WORD_START | (flags[begins] & ~np.uint8(ENTITY_INSIDE)) | ((flags[begins] & ENTITY_INSIDE) >> 1)
    return Packed(ids, flags, sequence, position_ids, token_type_ids, lengths)


@dataclass(frozen=True)
class Drawn:
    """A packed micro-batch and its draw: M of T tokens are masked."""

    packed: Packed
    masked: np.ndarray  # int64 [M]
    keys: np.ndarray  # uint64 [T]
    leader: np.ndarray  # int64 [T], see `draw_masks`
    budget: np.ndarray  # int64 [N]


@dataclass(frozen=True)
class Collator:
    """Packs, masks and, with `fill`, fills a micro-batch to the fixed shapes that one compiled graph serves; else its tokens to a
    multiple of `multiple`, its masked positions to one of half of that. Few shapes suit a CPU, too: matrix products keep code for each,
    and memory that is freed fits again."""

    task: Task
    vocabulary: Vocabulary
    masking: Masking
    fill: bool = False
    multiple: int = 1  # 1: as they are

    def draw(self, examples: Examples) -> Drawn:
        """The examples packed, and what the draw decides for them."""
        packed = pack(examples, self.vocabulary)
        maskable = ~self.vocabulary.is_special[packed.ids]
        keys = derive(derive(examples.plan.keys, MASKS)[packed.sequence], packed.position_ids)
        budget = self.task.budget(np.bincount(packed.sequence[maskable], minlength=len(packed.lengths)), examples.mask_rate)
        chosen, leader = draw_masks(self.masking, packed.flags, maskable, packed.sequence, keys, budget)
        return Drawn(packed, np.flatnonzero(chosen), keys, leader, budget)

    def __call__(self, examples: Examples) -> Batch:
        """The Batch of `examples`."""
        plan, drawn = examples.plan, self.draw(examples)
        packed, masked, budget = drawn.packed, drawn.masked, drawn.budget
        ids, lengths = packed.ids, packed.lengths
        labels = ids[masked]
        num_masked = np.bincount(packed.sequence[masked], minlength=len(lengths))
        ids[masked] = replace(ids, masked, drawn.keys, drawn.leader, self.masking, self.vocabulary)
        arrays = {"input_ids": ids, "token_type_ids": packed.token_type_ids, "position_ids": packed.position_ids, "lengths": lengths,
                  "masked_positions": masked, "masked_lm_labels": labels, "next_sentence_label": plan.label}
        filled_to = self._limits if self.fill else self._multiples
        arrays = self._fill(arrays, *filled_to(lengths, len(masked)))
        lengths = arrays.pop("lengths")
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return Batch(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()},
                     cu_seqlens=torch.from_numpy(cu_seqlens), lengths=tuple(lengths.tolist()), max_length=self.task.max_length,
                     counts={"mlm": len(masked), "nsp": int((plan.label != IGNORED).sum())}, num_tokens=len(ids),
                     num_sequences=len(plan.label), shortfall=int(np.maximum(0, budget - num_masked).sum()))

    def _limits(self, lengths: np.ndarray, num_masked: int) -> tuple[np.ndarray, int]:
        """(lengths of dummy sequences, slots of masked positions) up to the limits of the task.

        The attention kernel wants every token inside a sequence (tokens beyond the last offset give NaN gradients, pytorch #176793):
        dummies of [PAD] cover the tail. Empty dummies follow; the kernel returns at once for them."""
        task = self.task
        tail = self._cover(task.token_limit - int(lengths.sum()))
        # Of few sizes, since each costs a compiled graph: text of full sequences needs a little more than `slots`.
        sequences = 2 * task.slots
        while sequences < len(lengths) + len(tail):
            sequences *= 2
        empty = np.zeros(sequences - len(lengths) - len(tail), np.int64)
        # Entities may go beyond the rate, and a word above its budget is taken all the same: then the next of few sizes.
        size = max(64, task.masked_limit // 8 // 64 * 64)
        return np.concatenate([tail, empty]), -(-max(task.masked_limit, num_masked) // size) * size

    def _multiples(self, lengths: np.ndarray, num_masked: int) -> tuple[np.ndarray, int]:
        """The same up to the next multiples."""
        half = max(1, self.multiple // 2)
        return self._cover(-int(lengths.sum()) % self.multiple), -(-num_masked // half) * half

    def _cover(self, tail: int) -> np.ndarray:
        """int64: lengths of the fewest sequences that cover `tail` tokens."""
        full, rest = divmod(tail, self.task.max_length)
        return np.array([self.task.max_length] * full + [rest] * (rest > 0), np.int64)

    def _fill(self, arrays: dict[str, np.ndarray], dummy_lengths: np.ndarray, masked_slots: int) -> dict[str, np.ndarray]:
        """The arrays with dummy sequences of [PAD] and with ignored labels at their ends."""
        tail, dummies, free = dummy_lengths.sum(), len(dummy_lengths), masked_slots - len(arrays["masked_positions"])
        offsets = np.cumsum(dummy_lengths) - dummy_lengths
        filling = {"input_ids": np.full(tail, self.vocabulary.pad_id), "token_type_ids": np.zeros(tail, np.int64),
                   "position_ids": np.arange(tail) - np.repeat(offsets, dummy_lengths), "lengths": dummy_lengths,
                   "masked_positions": np.zeros(free, np.int64), "masked_lm_labels": np.full(free, IGNORED),
                   "next_sentence_label": np.full(dummies, IGNORED)}
        return {name: np.concatenate([array, filling[name]]) for name, array in arrays.items()}
