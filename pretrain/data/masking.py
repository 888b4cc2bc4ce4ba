"""Masks: one draw for all strategies.

A strategy cuts the text into units; they are taken in random order (or one of its own) within the
budget of their sequence. A unit that does not fit is skipped, and smaller ones fill the rest. A
masked token becomes [MASK] (or a similar word), becomes a random ordinary token, or stays. This is
drawn per token as in BERT (Devlin et al. 2019), but once per span (Joshi et al. 2020), entity, or
similar word (MacBERT, Cui et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START
from pretrain.data.hash_rng import derive, integers, uniform
from pretrain.data.pairs import count_up, mask_budget
from pretrain.data.tokenizer import Vocabulary

SPAN_SHARE, MAX_SPAN = 0.2, 10  # geometric distribution of words per span: the mean is 3.8
SPAN_LENGTHS = np.cumsum(SPAN_SHARE * (1 - SPAN_SHARE) ** np.arange(MAX_SPAN))
SPAN_LENGTHS /= 1 - (1 - SPAN_SHARE) ** MAX_SPAN

# Streams of random numbers of a token's key; a unit uses the key of its first token.
SPLIT, RANDOM_ID, SPAN_LENGTH, ENTITY_CHOICE, SIMILAR_WORD = range(1, 6)


@dataclass(frozen=True)
class SimilarWords:
    """Words that may replace others with as many tokens. A word is found by a hash of its ids."""

    hashes: np.ndarray  # uint64 [words], ascending
    sizes: np.ndarray  # int64 [words]: tokens of each
    counts: np.ndarray  # int64 [words]: choices for each
    starts: np.ndarray  # int64 [words]: where the choices of each start in `ids`
    ids: np.ndarray  # int64: choices, end to end


@dataclass(frozen=True)
class Masking:
    """Options of the draw: a field takes the value of the option with its name, if there is one."""

    masking: str = "token"
    mask_split: tuple[float, ...] = (0.8, 0.1, 0.1)
    entity_probability: float = 0.5
    entity_budget: float = 0.2
    entity_fill: str = "word"
    similar: SimilarWords | None = None
    mask_rate: tuple[float, ...] = (0.15,)  # at the first step of the run, and at the last

    def budget(self, packed: Packed) -> np.ndarray:
        """int64 [N]: how many tokens of each sequence to mask."""
        return mask_budget(packed.count(packed.maskable), self.rate(packed.progress))

    def rate(self, progress: float) -> float:
        """The share to mask after that share of the run."""
        first, last = self.mask_rate[0], self.mask_rate[-1]
        return first + (last - first) * progress

    def logged(self, progress: float) -> dict[str, float]:
        """Numbers to log that change over the run."""
        is_constant = self.mask_rate[0] == self.mask_rate[-1]
        return {} if is_constant else {"optim/mask_rate": self.rate(progress)}

    @property
    def fills_budget(self) -> bool:
        """Whether the mask rate decides how much is masked."""
        return self.masking != "entity" or self.entity_fill != "none"


@dataclass(frozen=True)
class Packed:
    """Examples laid end to end: T tokens of N sequences."""

    ids: np.ndarray  # int64 [T]
    flags: np.ndarray  # uint8 [T], as in a corpus; [CLS] and [SEP] each start a word
    maskable: np.ndarray  # bool [T]; False for special tokens
    sequence: np.ndarray  # int64 [T], ascending
    position_ids: np.ndarray  # int64 [T]
    token_type_ids: np.ndarray  # int64 [T]
    keys: np.ndarray  # uint64 [T]: for each token's random numbers
    lengths: np.ndarray  # int64 [N]
    progress: float = 0.0  # share of the run that is done, 0 to 1

    @property
    def word_starts(self) -> np.ndarray:  # bool [T]
        return (self.flags & WORD_START).astype(bool)

    @property
    def entity_starts(self) -> np.ndarray:  # bool [T]; also all tokens outside entities
        return ~(self.flags & ENTITY_INSIDE).astype(bool)

    @property
    def in_entity(self) -> np.ndarray:  # bool [T]
        return (self.flags & (ENTITY_START | ENTITY_INSIDE)).astype(bool)

    def count(self, chosen: np.ndarray) -> np.ndarray:
        """int64 [N]: `chosen` tokens per sequence; given as bool [T] or, faster, as places."""
        return np.bincount(self.sequence[chosen], minlength=len(self.lengths))


@dataclass(frozen=True)
class Units:
    """One way to cut a text, and how its units are taken."""

    starts: np.ndarray  # bool [T]: where units begin; the first token is one
    # bool [T]: where runs begin that share one 80/10/10 draw; None: each token has its own.
    shared_draws: np.ndarray | None = None
    eligible: np.ndarray | bool = True  # bool [T]: tokens that may be taken
    budget: np.ndarray | None = None  # int64 [N]; None: the rest of the sequence's budget
    # uint64 [T]: units are taken in the order of their first tokens' numbers, of which the upper 40
    # bits count; None: in random order. Nonnegative floats sort like their bits: pass float64
    # numbers as `.view(np.uint64)`.
    order: np.ndarray | None = None


# A strategy returns the units of each pass in turn; the last pass fills the budget. A unit must not
# cross into the next sequence. To add one, write it here, and name it in STRATEGIES and in MASKING
# of pretrain/config.py.


def by_token(packed: Packed, options: Masking) -> list[Units]:
    """Single tokens."""
    return [Units(np.ones(len(packed.ids), bool))]


def by_word(packed: Packed, options: Masking) -> list[Units]:
    """Whole words. A similar word replaces all tokens of a word."""
    words = packed.word_starts
    return [Units(words, shared_draws=words if options.similar else None)]


def by_span(packed: Packed, options: Masking) -> list[Units]:
    """Spans of a random number of words, then words."""
    (words,) = by_word(packed, options)
    spans = span_starts(words.starts, packed.maskable, packed.keys)
    return [Units(spans, shared_draws=words.starts if options.similar else spans), words]


def by_entity(packed: Packed, options: Masking) -> list[Units]:
    """Random entities within their own budget; then, unless they are masked alone, words or tokens,
    outside entities first."""
    entities, in_entity = packed.entity_starts, packed.in_entity
    is_chosen = uniform(derive(packed.keys, ENTITY_CHOICE)) < options.entity_probability
    eligible = in_entity & is_chosen[first_of_unit(entities)]
    budget = np.floor(options.entity_budget * packed.count(packed.maskable) + 1e-9)
    whole = Units(entities, shared_draws=entities, eligible=eligible, budget=budget.astype(int))
    if not options.fills_budget:
        return [whole]
    (rest,) = (by_token if options.entity_fill == "token" else by_word)(packed, options)
    outside_first = (packed.keys >> np.uint64(1)) | (in_entity.astype(np.uint64) << np.uint64(63))
    return [whole, replace(rest, order=outside_first)]


STRATEGIES = {"token": by_token, "word": by_word, "span": by_span, "entity": by_entity}


def draw_masks(packed: Packed, budget: np.ndarray, options: Masking) -> tuple[np.ndarray, ...]:
    """(masked places int64 [M], leader int64 [T]: the token whose key decides how to replace each).

    budget: int64 [N]. A sequence in which no unit fits takes its smallest one. If entities are
    masked alone, a sequence may have no mask."""
    free, leader = packed.maskable.copy(), np.arange(len(packed.ids))
    masked = np.zeros(0, np.int64)
    passes = STRATEGIES[options.masking](packed, options)
    for units in passes:
        num_masked = packed.count(masked)
        left = budget - num_masked if units.budget is None else units.budget
        fills_rest = units is passes[-1] and units.budget is None
        needs_one = fills_rest & (num_masked == 0)
        taken = take(packed, units, free & units.eligible, left, needs_one)
        if units.shared_draws is not None:
            leader[taken] = first_of_unit(units.shared_draws)[taken]
        free[taken] = False
        masked = np.concatenate([masked, taken])
    return np.flatnonzero(packed.maskable & ~free), leader


def first_of_unit(starts: np.ndarray) -> np.ndarray:
    """int64 [T]: the first token of each token's unit."""
    return np.flatnonzero(starts)[np.cumsum(starts) - 1]


def take(
    packed: Packed, units: Units, free: np.ndarray, budget: np.ndarray, needs_one: np.ndarray
) -> np.ndarray:
    """int64: the `free` tokens (bool [T]) of the units that one pass takes. In each sequence,
    for unit in sorted(units, key=first token's order): if size <= budget: take, budget -= size.
    Where `needs_one`, bool [N], the smallest unit is taken if all exceed the budget."""
    first = np.flatnonzero(units.starts)
    unit = np.cumsum(units.starts) - 1  # [T]
    sizes = np.bincount(unit[free], minlength=len(first))
    owner = packed.sequence[first]
    order = packed.keys >> np.uint64(1) if units.order is None else units.order
    # Sorting sequence number + order is much faster than a lexsort; it keeps 40 bits of the order.
    ranks = (owner.astype(np.uint64) << np.uint64(40)) | (order[first] >> np.uint64(24))
    gap, taken = np.maximum(budget, 0), np.zeros(len(first), bool)
    candidates = np.flatnonzero((sizes > 0) & (sizes <= gap[owner]))
    candidates = candidates[np.argsort(ranks[candidates], kind="stable")]
    while len(candidates):
        sequence, size = owner[candidates], sizes[candidates]
        filled = np.cumsum(size)
        begins = np.flatnonzero(np.append(True, sequence[1:] != sequence[:-1]))
        base = np.zeros(len(budget), np.int64)
        base[sequence[begins]] = filled[begins] - size[begins]
        fits = filled - base[sequence] <= gap[sequence]  # a prefix of each sequence's candidates
        taken[candidates[fits]] = True
        used = np.bincount(sequence[fits], weights=size[fits], minlength=len(budget))
        gap -= used.astype(np.int64)
        candidates = candidates[~fits]
        # The gap only shrinks, so what exceeds it now never fits.
        candidates = candidates[sizes[candidates] <= gap[owner[candidates]]]
    for empty in np.flatnonzero(needs_one & (gap == budget) & (budget > 0)):
        members = np.flatnonzero((owner == empty) & (sizes > 0))
        taken[members[np.lexsort((ranks[members], sizes[members]))[:1]]] = True
    return np.flatnonzero(taken[unit] & free)


def span_starts(words: np.ndarray, maskable: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [T]: where spans begin, each of a random number of words; together they cover the text.

    For each segment: place = 0; while place < number of words: begin a span; place += its length.
    All segments at once, by doubling: the places reached in 1, 2, 4 ... steps."""
    first = np.flatnonzero(words)
    is_text = np.logical_or.reduceat(maskable, first)  # [CLS], [SEP], unknown words end segments
    draw = uniform(derive(keys[first], SPAN_LENGTH))
    lengths = 1 + np.searchsorted(SPAN_LENGTHS[:-1], draw, side="right")
    begins = ~is_text | np.append(True, ~is_text[:-1])
    ends = np.append(np.flatnonzero(begins), len(first))
    next_place = np.minimum(np.arange(len(first)) + lengths, ends[np.cumsum(begins)])
    reached, step = np.append(begins, True), np.append(next_place, len(first))
    count = 0
    while np.count_nonzero(reached) > count:
        count = np.count_nonzero(reached)
        reached[step[reached]] = True
        step = step[step]
    starts = np.zeros(len(words), bool)
    starts[first[reached[:-1]]] = True
    return starts


def fill_in(
    packed: Packed, masked: np.ndarray, leader: np.ndarray, options: Masking, vocabulary: Vocabulary
) -> np.ndarray:
    """int64 [M]: what the model reads at the places `masked`; both arrays are from `draw_masks`."""
    kept, keys, split = packed.ids[masked], packed.keys[masked], options.mask_split
    choice = integers(derive(keys, RANDOM_ID), len(vocabulary.ordinary_ids))
    random_ids = vocabulary.ordinary_ids[choice].astype(np.int64)
    shown = vocabulary.mask_id
    if options.similar:
        similar = similar_ids(packed, masked, leader, options.similar)
        shown = np.where(similar >= 0, similar, random_ids)
    draw = uniform(derive(packed.keys[leader[masked]], SPLIT))
    changed = np.where(draw < split[0], shown, random_ids)
    return np.where(draw < split[0] + split[1], changed, kept)


def similar_ids(
    packed: Packed, masked: np.ndarray, leader: np.ndarray, table: SimilarWords
) -> np.ndarray:
    """int64 [M]: tokens of a similar word for each masked word (one per leader), or -1."""
    if not len(masked):
        return masked
    leaders = leader[masked]
    begins = np.flatnonzero(np.append(True, leaders[1:] != leaders[:-1]))
    sizes = np.diff(np.append(begins, len(masked)))
    word, place = count_up(sizes)  # [M]: the word of each token, and the place in it
    hashes = np.add.reduceat(derive(packed.ids[masked].astype(np.uint64), place), begins)
    row = np.minimum(np.searchsorted(table.hashes, hashes), len(table.hashes) - 1)
    known = ((table.hashes[row] == hashes) & (table.sizes[row] == sizes))[word]
    choice = integers(derive(packed.keys[leaders[begins]], SIMILAR_WORD), table.counts[row])
    source = (table.starts[row] + choice * table.sizes[row])[word] + place
    return np.where(known, table.ids[np.where(known, source, 0)], -1)


def has_similar(packed: Packed, table: SimilarWords) -> np.ndarray:
    """bool [words that can be masked]: which of them the table can replace."""
    places = np.flatnonzero(packed.maskable)
    leader = first_of_unit(packed.word_starts)
    is_first = np.diff(leader[places], prepend=-1) > 0
    return similar_ids(packed, places, leader, table)[is_first] >= 0


def read_similar(lines: Iterable[str], encode: Callable[[str], list[int]]) -> SimilarWords | None:
    """Table from lines "word<TAB>similar<TAB>similar..."; similar words with another number of
    tokens are ignored. None if nothing is left."""
    table: dict[tuple[int, ...], list[list[int]]] = {}
    for line in lines:
        word, *others = (encode(part.strip()) for part in line.split("\t"))
        choices = [other for other in others if len(other) == len(word) and other != word]
        known = table.setdefault(tuple(word), [])  # a word may have several lines
        known += [choice for choice in choices if choice not in known]
    rows = []
    for word, choices in table.items():
        if word and choices:
            hashed = np.add.reduce(derive(np.array(word, np.uint64), np.arange(len(word))))
            rows.append((int(hashed), len(word), len(choices), sum(choices, [])))
    if not rows:
        return None
    hashes, sizes, counts, ids = zip(*sorted(rows))
    lengths = np.multiply(sizes, counts)
    columns = (np.array(sizes), np.array(counts), np.cumsum(lengths) - lengths)
    return SimilarWords(np.array(hashes, np.uint64), *columns, np.concatenate(ids))
