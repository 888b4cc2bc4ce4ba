"""Masks: one draw over units for every strategy.

A strategy says where units begin (tokens, words, spans, entities); units get random keys and are taken in key order within
the budget of their sequence; units that do not fit are passed over, and smaller ones fill what is left. Of what is taken,
shares become [MASK] (or a similar word), a random ordinary token, or stay: drawn for each token as in BERT (Devlin et al.
2019), for each unit where units are spans (Joshi et al. 2020), entities or similar words (MacBERT, Cui et al. 2020).

T tokens of N sequences, M of them masked. `flags` are those of a corpus, but that [CLS] and [SEP] start words of their own.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START
from pretrain.data.draws import derive, integers, uniform
from pretrain.data.tokenizer import Vocabulary

SPAN_SHARE, MAX_SPAN = 0.2, 10  # of the geometric distribution of a span's words; its mean is then 3.8
SPAN_LENGTHS = np.cumsum(SPAN_SHARE * (1 - SPAN_SHARE) ** np.arange(MAX_SPAN)) / (1 - (1 - SPAN_SHARE) ** MAX_SPAN)
# Streams of random numbers, of a token or of the first token of a unit.
SPLIT, RANDOM_ID, SPAN_LENGTH, ENTITY_CHOICE, SIMILAR_WORD = (np.uint64(number) for number in range(1, 6))


@dataclass(frozen=True)
class SimilarWords:
    """Words to put for others of as many tokens. A word is looked up by a hash of its ids."""

    hashes: np.ndarray  # uint64 [words], ascending
    sizes: np.ndarray  # int64 [words]: tokens of each
    counts: np.ndarray  # int64 [words]: choices for each
    starts: np.ndarray  # int64 [words]: of the first choice in `ids`; choices follow one another
    ids: np.ndarray  # int64


@dataclass(frozen=True)
class Masking:
    """Options of the draw; the names are those of the command line."""

    masking: str = "token"
    mask_split: tuple[float, ...] = (0.8, 0.1, 0.1)
    entity_probability: float = 0.5
    entity_budget: float = 0.2
    entity_fill: str = "word"
    similar: SimilarWords | None = None


def draw_masks(options: Masking, flags: np.ndarray, maskable: np.ndarray, sequence: np.ndarray, keys: np.ndarray,
               budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(masked bool [T], leader int64 [T]: the token whose key decides what becomes of each).

    flags: uint8 [T]; maskable: bool [T]; sequence: int64 [T], ascending; keys: uint64 [T]; budget: int64 [N].
    A first pass takes spans, or entities that are chosen, within their own budget; a second one words or tokens, those
    outside entities first. A sequence of which nothing fits takes its smallest unit."""
    words = (flags & WORD_START).astype(bool)
    masked, leader = np.zeros(len(flags), bool), np.arange(len(flags))
    # A corpus may bring entities that the strategy does not ask for.
    in_entity = (flags & (ENTITY_START | ENTITY_INSIDE)).astype(bool) & (options.masking == "entity")
    if options.masking == "span":
        starts = span_starts(words, maskable, keys)
        leader = _first_of_unit(starts)
        masked = take(starts, maskable, sequence, keys, budget)
    elif options.masking == "entity":
        starts = ~(flags & ENTITY_INSIDE).astype(bool)
        leader = _first_of_unit(starts)
        chosen = in_entity & (uniform(derive(keys, ENTITY_CHOICE)) < options.entity_probability)[leader]
        cap = np.floor(options.entity_budget * np.bincount(sequence[maskable], minlength=len(budget)) + 1e-9).astype(np.int64)
        masked = take(starts, maskable & chosen, sequence, keys, cap)
    num_masked = np.bincount(sequence[masked], minlength=len(budget))
    by_token = options.masking == "token" or options.masking == "entity" and options.entity_fill == "token"
    starts = np.ones(len(flags), bool) if by_token else words
    filled = take(starts, maskable & ~masked, sequence, keys, budget - num_masked,
                  late=in_entity if options.masking == "entity" else None, at_least_one=num_masked == 0)
    by_unit = masked if options.similar is None else masked & in_entity  # a similar word stands for a word, or for an entity
    other = np.arange(len(flags)) if by_token or options.similar is None else _first_of_unit(words)
    return masked | filled, np.where(by_unit, leader, other)


def _first_of_unit(starts: np.ndarray) -> np.ndarray:
    return np.flatnonzero(starts)[np.cumsum(starts) - 1]


def take(starts: np.ndarray, free: np.ndarray, sequence: np.ndarray, keys: np.ndarray, budget: np.ndarray,
         late: np.ndarray | None = None, at_least_one: np.ndarray | None = None) -> np.ndarray:
    """bool [T]: the tokens that one pass takes.

    starts: bool [T], where units begin, the first token among them; free: bool [T], what may be taken of them; keys: uint64
    [T], read where a unit starts; budget: int64 [N]; late: bool [T], units that start there come after the others. For each
    sequence, in words: for unit in sorted(units, key): if unit.size <= budget: take it, budget -= unit.size.
    Sequences in `at_least_one`, bool [N], take their smallest unit where all exceed the budget."""
    first = np.flatnonzero(starts)
    unit = np.cumsum(starts) - 1  # [T]
    sizes = np.bincount(unit[free], minlength=len(first))
    owner = sequence[first]
    # Sorting sequence number + random fraction is several times faster than a lexsort; 39 bits of key are kept.
    ranks = (owner.astype(np.uint64) << np.uint64(40)) | (keys[first] >> np.uint64(25))
    if late is not None:
        ranks |= late[first].astype(np.uint64) << np.uint64(39)
    gap, taken = np.maximum(budget, 0), np.zeros(len(first), bool)
    candidates = np.flatnonzero((sizes > 0) & (sizes <= gap[owner]))
    candidates = candidates[np.argsort(ranks[candidates], kind="stable")]
    while len(candidates):
        who, size = owner[candidates], sizes[candidates]
        filled = np.cumsum(size)
        starts_sequence = np.flatnonzero(np.concatenate([[True], who[1:] != who[:-1]]))
        base = np.zeros(len(budget), np.int64)
        base[who[starts_sequence]] = filled[starts_sequence] - size[starts_sequence]
        fits = filled - base[who] <= gap[who]  # a prefix of each sequence's candidates
        taken[candidates[fits]] = True
        gap -= np.bincount(who[fits], weights=size[fits], minlength=len(budget)).astype(np.int64)
        candidates = candidates[~fits]
        candidates = candidates[sizes[candidates] <= gap[owner[candidates]]]  # a gap only shrinks: the rest never fits
    if at_least_one is not None:
        for lonely in np.flatnonzero(at_least_one & (gap == budget) & (budget > 0)):
            units = np.flatnonzero((owner == lonely) & (sizes > 0))
            units = units[np.argsort(ranks[units], kind="stable")]
            taken[units[np.argsort(sizes[units], kind="stable")[:1]]] = True
    return taken[unit] & free


def span_starts(words: np.ndarray, maskable: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [T]: where spans begin that cover the text, one after the other, each of a random number of words.

    In words, for each segment: place = 0; while place < number of words: a span begins; place += its length. All at once: the
    places that one, two, four ... steps reach, which takes as many rounds as the logarithm of the longest segment."""
    first = np.flatnonzero(words)
    is_text = np.bincount(np.cumsum(words) - 1, weights=maskable, minlength=len(first)) > 0  # [CLS], [SEP] and unknown words are not
    lengths = 1 + np.searchsorted(SPAN_LENGTHS[:-1], uniform(derive(keys[first], SPAN_LENGTH)), side="right")
    places = np.arange(len(first) + 1)
    begins = ~is_text | np.concatenate([[True], ~is_text[:-1]])
    ends = np.append(np.flatnonzero(begins), len(first))
    segment_end = ends[np.cumsum(begins)]
    reached, step = np.append(begins, True), np.append(np.minimum(places[:-1] + lengths, segment_end), len(first))
    while True:
        before = np.count_nonzero(reached)
        reached[step[reached]] = True
        if np.count_nonzero(reached) == before:
            break
        step = step[step]
    starts = np.zeros(len(words), bool)
    starts[first[reached[:-1]]] = True
    return starts


def replace(ids: np.ndarray, masked: np.ndarray, keys: np.ndarray, leader: np.ndarray, options: Masking,
            vocabulary: Vocabulary) -> np.ndarray:
    """int64 [M]: what stands in place of `ids` [T] at the places `masked` [M]; keys uint64 [T]; leader int64 [T] as drawn."""
    kept = ids[masked]
    draw, split = uniform(derive(keys[leader[masked]], SPLIT)), options.mask_split
    choice = integers(derive(keys[masked], RANDOM_ID), len(vocabulary.ordinary_ids))
    random_ids = vocabulary.ordinary_ids[choice].astype(np.int64)
    shown = vocabulary.mask_id if options.similar is None else similar_ids(kept, masked, keys, leader, options.similar, random_ids)
    return np.where(draw < split[0], shown, np.where(draw < split[0] + split[1], random_ids, kept)).astype(np.int64)


def similar_ids(ids: np.ndarray, masked: np.ndarray, keys: np.ndarray, leader: np.ndarray, table: SimilarWords,
                otherwise: np.ndarray) -> np.ndarray:
    """int64 [M]: for each masked word (tokens of one leader) a similar one, `otherwise` where the table has none."""
    if not len(masked):
        return otherwise
    leaders = leader[masked]
    begins = np.flatnonzero(np.concatenate([[True], leaders[1:] != leaders[:-1]]))
    sizes = np.diff(np.append(begins, len(masked)))
    place = np.arange(len(masked)) - np.repeat(begins, sizes)  # in the word
    hashes = np.add.reduceat(derive(ids.astype(np.uint64), place), begins)
    row = np.minimum(np.searchsorted(table.hashes, hashes), len(table.hashes) - 1)
    known = (table.hashes[row] == hashes) & (table.sizes[row] == sizes)
    choice = integers(derive(keys[leaders[begins]], SIMILAR_WORD), table.counts[row])
    source = np.repeat(table.starts[row] + choice * table.sizes[row], sizes) + place
    known = np.repeat(known, sizes)
    return np.where(known, table.ids[np.where(known, source, 0)], otherwise)


def read_similar(lines: Iterable[str], encode: Callable[[str], list[int]]) -> SimilarWords | None:
    """The table of lines "word<TAB>similar<TAB>similar..."; of the similar words, those of as many tokens count. None where
    there is none."""
    rows = {}
    for line in lines:
        word, *others = (encode(part.strip()) for part in line.split("\t"))
        choices = [other for other in others if len(other) == len(word) and other != word]
        if word and choices:
            name = int(np.add.reduce(derive(np.array(word, np.uint64), np.arange(len(word)))))
            kept = rows.setdefault(name, (len(word), []))[1]  # a word may have several lines
            kept += [choice for choice in choices if choice not in kept]
    if not rows:
        return None
    hashes = sorted(rows)
    sizes, counts = (np.array(column) for column in zip(*((rows[row][0], len(rows[row][1])) for row in hashes)))
    return SimilarWords(np.array(hashes, np.uint64), sizes, counts, np.cumsum(sizes * counts) - sizes * counts,
                        np.array([number for row in hashes for choice in rows[row][1] for number in choice]))
