"""Masks: the vectorised draw of every strategy against a loop over the units of one sequence after the other, and what stands in
place of the masked against a loop over the masked words; the shares of 80/10/10, of chosen entities and of span lengths; similar
words; what is never masked or drawn; budgets; and that an example's masks are the same when asked again, others in each epoch,
and tell nothing about its label, its place in the epoch or its segments."""
import math
from dataclasses import replace as changed
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED
from pretrain.data.collate import MASKS, Collator, Examples
from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START, Shard
from pretrain.data.draws import derive, integers, key, uniform
from pretrain.data.masking import Masking, draw_masks, read_similar, replace, span_starts, take
from pretrain.data.planning import Task, make_plan
from pretrain.data.tokenizer import Vocabulary
from pretrain.parts import make_masking

PAD, UNKNOWN, CLS, SEP, MASK = range(5)
SPLIT, RANDOM_ID, SPAN_LENGTH, ENTITY_CHOICE, SIMILAR_WORD = (np.uint64(stream) for stream in range(1, 6))
SIZE = 60  # of the vocabulary; ids from 40 on are "##" pieces, and id 50 is a special token amid the others


def make_vocabulary() -> Vocabulary:
    is_special = np.isin(np.arange(SIZE), [PAD, UNKNOWN, CLS, SEP, MASK, 50])
    return Vocabulary(SIZE, PAD, CLS, SEP, MASK, UNKNOWN, is_special, np.arange(SIZE) < 40,
                      np.flatnonzero(~is_special).astype(np.uint32), "0" * 16)


VOCABULARY = make_vocabulary()


def to_ids(text: str) -> list[int]:
    """In place of a tokenizer: words are written as their ids."""
    return [int(number) for number in text.split()]


# Words of ids 5 and 6 in full, some of ids 40 and 41; other words have no similar one.
TABLE = {(5,): [(6,), (7,), (8,)], (6,): [(5,)], (5, 40): [(6, 41), (9, 42)], (5, 41): [(6, 40)], (5, 6): [(8, 8), (9, 9), (7, 7)],
         (5, 40, 41): [(8, 41, 42)], (41,): [(5,)]}
LINES = ["\t".join(" ".join(map(str, entry)) for entry in (word, *others)) for word, others in TABLE.items()]
SIMILAR = read_similar(LINES, to_ids)
OPTIONS = {"token": Masking(), "word": Masking("word"), "span": Masking("span"), "entity": Masking("entity"),
           "entity, tokens": Masking("entity", entity_fill="token"), "entity, all": Masking("entity", (0.2, 0.5, 0.3), 1.0, 1.0),
           "word, similar": Masking("word", similar=SIMILAR), "span, similar": Masking("span", similar=SIMILAR),
           "entity, similar": Masking("entity", (0.8, 0.1, 0.1), 0.7, 0.5, similar=SIMILAR),
           "entity, tokens, similar": Masking("entity", (0.8, 0.1, 0.1), 0.7, 0.5, "token", SIMILAR)}


def mark_entities(lengths: np.ndarray, source: np.random.Generator) -> np.ndarray:
    """uint8 flags of entities of 1 to 4 tokens in sentences of `lengths`; about a third of the tokens."""
    flags = np.zeros(lengths.sum(), np.uint8)
    for start, end in zip(np.cumsum([0, *lengths]), np.cumsum(lengths)):
        while start < end:
            size = min(int(source.integers(1, 5)), end - start)
            if source.random() < 0.35:
                flags[start: start + size] = ENTITY_INSIDE
                flags[start] = ENTITY_START
            start += size
    return flags


def make_shard(documents: int = 80, sentences: int = 40, longest: int = 12, specials: bool = True, entities: bool = False) -> Shard:
    source = np.random.default_rng(1)
    counts = source.integers(1, sentences + 1, documents)
    lengths = source.integers(1, longest + 1, counts.sum())
    ids = source.choice([1, 50, *range(5, 50), *range(51, 60)] if specials else range(5, 50), lengths.sum()).astype(np.uint16)
    flags = VOCABULARY.starts_word[ids] * np.uint8(WORD_START)
    if entities:
        ids = np.where(source.random(len(ids)) < 0.5, ids, source.choice([5, 6, 40, 41], len(ids))).astype(np.uint16)
        flags = VOCABULARY.starts_word[ids] * np.uint8(WORD_START) | mark_entities(lengths, source)
    return Shard(ids, flags, np.cumsum([0, *lengths]), np.cumsum([0, *counts]), np.arange(documents, dtype=np.uint64))


def masked_examples(shard: Shard, task: Task, options: Masking = Masking(), epoch: int = 0) -> list[dict]:
    """Every example of an epoch in the plan's order: its plan, text, masked places (from its [CLS] on) and what stands there."""
    plan = make_plan(shard, np.arange(len(shard.hashes)), task, key(0, epoch))
    batch = Collator(task, VOCABULARY, options)(Examples(shard, plan))  # all in one
    ids, masked = batch.input_ids.numpy().copy(), batch.masked_positions.numpy()
    replaced = ids[masked]
    ids[masked] = batch.masked_lm_labels.numpy()
    offsets = batch.cu_seqlens.numpy()
    cuts = np.searchsorted(masked, offsets)
    return [{"key": int(plan.keys[n]), "label": int(plan.label[n]), "plan": plan.take(slice(n, n + 1)), "text": ids[start:end],
             "masked": masked[cuts[n]:cuts[n + 1]] - start, "replaced": replaced[cuts[n]:cuts[n + 1]]}
            for n, (start, end) in enumerate(zip(offsets, offsets[1:]))]


# ---------------------------------------------------------------- the draw, slowly

def cut(starts: list[bool]) -> list[list[int]]:
    """Places of units, each from a start to the next."""
    units: list[list[int]] = []
    for place, start in enumerate(starts):
        if start:
            units.append([])
        units[-1].append(place)
    return units


def slow_take(units: list[list[int]], free: set[int], keys: np.ndarray, budget: int, late: set[int] = frozenset(),
              at_least_one: bool = False) -> list[list[int]]:
    """What is taken of one sequence: units in the order of their keys (39 bits; ties in the order of the text) that fit."""
    units = [unit for unit in units if free & set(unit)]
    units.sort(key=lambda unit: (unit[0] in late, int(keys[unit[0]]) >> 25))
    taken, left = [], budget
    for unit in units:
        if len(free & set(unit)) <= left:
            taken.append(unit)
            left -= len(free & set(unit))
    if at_least_one and not taken and units and budget > 0:
        taken.append(min(units, key=lambda unit: len(free & set(unit))))
    return taken


def slow_spans(words: list[list[int]], free: set[int], keys: np.ndarray) -> list[list[int]]:
    """Words with a token in `free`, joined in runs of random length; the others alone."""
    shares = [0.2 * 0.8 ** length for length in range(10)]
    spans, left = [], 0
    for word in words:
        if not free & set(word):
            left = 0
            spans.append(list(word))
        elif left:
            left -= 1
            spans[-1] += word
        else:
            draw = uniform(derive(keys[word[0]], SPAN_LENGTH)) * sum(shares)
            left = next((length for length in range(10) if draw < sum(shares[:length + 1])), 9)
            spans.append(list(word))
    return spans


def slow_masks(options: Masking, flags: list[int], maskable: list[bool], keys: np.ndarray, budget: int) -> dict[int, int]:
    """Masked places of one sequence -> the place whose key decides what becomes of each."""
    free, masked = {place for place, can in enumerate(maskable) if can}, {}
    words = cut([flag & WORD_START for flag in flags])
    word_of = {place: word[0] for word in words for place in word}
    in_entity = {place for place, flag in enumerate(flags) if options.masking == "entity" and flag & (ENTITY_START | ENTITY_INSIDE)}
    if options.masking == "span":
        for unit in slow_take(slow_spans(words, free, keys), free, keys, budget):
            masked |= {place: word_of[place] if options.similar else unit[0] for place in free & set(unit)}
    if options.masking == "entity":
        chosen = [unit for unit in cut([not flag & ENTITY_INSIDE for flag in flags])
                  if unit[0] in in_entity and uniform(derive(keys[unit[0]], ENTITY_CHOICE)) < options.entity_probability]
        for unit in slow_take(chosen, free, keys, math.floor(options.entity_budget * len(free) + 1e-9)):
            masked |= {place: unit[0] for place in free & set(unit)}
    by_token = options.masking == "token" or options.masking == "entity" and options.entity_fill == "token"
    filled = slow_take([[place] for place in range(len(flags))] if by_token else words, free - set(masked), keys,
                       budget - len(masked), in_entity, not masked)
    for place in {place for unit in filled for place in unit} & free - set(masked):
        masked[place] = word_of[place] if options.similar and not by_token else place
    return masked


def slow_replace(ids: np.ndarray, masks: dict[int, int], keys: np.ndarray, options: Masking) -> list[int]:
    """What stands in the masked places in order."""
    found = []
    for leader, places in groupby(sorted(masks), key=masks.get):
        places = list(places)
        draw, kept = float(uniform(derive(keys[leader], SPLIT))), [int(ids[place]) for place in places]
        shown = [int(VOCABULARY.ordinary_ids[integers(derive(keys[place], RANDOM_ID), len(VOCABULARY.ordinary_ids))]) for place in places]
        if draw < options.mask_split[0]:
            if not options.similar:
                shown = [MASK] * len(places)
            elif tuple(kept) in TABLE:
                choices = TABLE[tuple(kept)]
                shown = list(choices[int(integers(derive(keys[leader], SIMILAR_WORD), len(choices)))])
        elif draw >= options.mask_split[0] + options.mask_split[1]:
            shown = kept
        found += shown
    return found


@st.composite
def texts(draw) -> tuple[np.ndarray, ...]:
    """(ids, flags, maskable, sequence, keys, budget) of a few sequences; entities and words overlap in any way."""
    rows, budget = [], []
    for number in range(draw(st.integers(1, 4))):
        budget.append(draw(st.integers(0, 15)))
        rows.append((CLS, WORD_START, False, number, draw(KEY)))
        for word_start, entity, kind, token_key in draw(st.lists(TOKEN, max_size=14)):
            after_separator, before = rows[-1][0] in (CLS, SEP), rows[-1][1] & (ENTITY_START | ENTITY_INSIDE)
            if kind == SEP:
                rows.append((SEP, WORD_START, False, number, token_key))
                continue
            if entity == ENTITY_INSIDE and not before:
                entity = ENTITY_START
            rows.append((kind, (WORD_START * (word_start or after_separator)) | entity, kind != UNKNOWN, number, token_key))
    kinds = (np.int64, np.uint8, bool, np.int64, np.uint64)
    return (*(np.array(column, kind) for column, kind in zip(zip(*rows), kinds)), np.array(budget, np.int64))


KEY = st.integers(0, 2**64 - 1) | st.integers(0, 3).map(lambda number: number << 25)
TOKEN = st.tuples(st.booleans(), st.sampled_from([0, 0, ENTITY_START, ENTITY_INSIDE, ENTITY_INSIDE]),
                  st.sampled_from([5, 5, 5, 6, 40, 41, 20, UNKNOWN, SEP]), KEY)


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=120, deadline=None)
@given(text=texts())
def test_the_draw_is_that_of_the_slow_loop(name, text):
    options, (ids, flags, maskable, sequence, keys, budget) = OPTIONS[name], text
    if options.masking != "entity":
        flags = flags & WORD_START  # that entities change nothing else is another test's
    expected = {}
    for number in range(len(budget)):
        places = np.flatnonzero(sequence == number)
        found = slow_masks(options, flags[places].tolist(), maskable[places].tolist(), keys[places], int(budget[number]))
        expected |= {int(places[0]) + place: int(places[0]) + leader for place, leader in found.items()}
    masked, leader = draw_masks(options, flags, maskable, sequence, keys, budget)
    assert np.flatnonzero(masked).tolist() == sorted(expected) and not masked[~maskable].any()
    assert {place: int(leader[place]) for place in expected} == expected
    replaced = replace(ids, np.flatnonzero(masked), keys, leader, options, VOCABULARY)
    assert replaced.tolist() == slow_replace(ids, expected, keys, options) and replaced.dtype == np.int64


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if options.masking != "entity"])
@settings(max_examples=40, deadline=None)
@given(text=texts())
def test_entities_of_a_corpus_change_no_other_strategy(name, text):
    """A corpus may be prepared with a lexicon and masked in another way."""
    ids, flags, *rest = text
    shown = []
    for given_flags in (flags, flags & WORD_START):
        masked, leader = draw_masks(OPTIONS[name], given_flags, *rest)
        shown.append((masked.tolist(), leader[masked].tolist(),
                      replace(ids, np.flatnonzero(masked), rest[2], leader, OPTIONS[name], VOCABULARY).tolist()))
    assert shown[0] == shown[1]


# ---------------------------------------------------------------- the choice of units

UNIT = st.tuples(st.integers(0, 5), st.integers(0, 6) | st.integers(0, 2**39 - 1), st.integers(0, 2))  # size, key, specials after it
SEQUENCE = st.tuples(st.integers(1, 2), st.lists(UNIT, max_size=8), st.integers(-2, 20), st.booleans())  # specials, units, budget, lonely


@settings(max_examples=250, deadline=None)
@given(sequences=st.lists(SEQUENCE, min_size=1, max_size=5), low_bits=st.integers(0, 2**25 - 1), data=st.data())
def test_choice_is_that_of_the_greedy_loop(sequences, low_bits, data):
    starts, free, sequence, keys, expected, begins = [], [], [], [], set(), []
    for number, (specials, units, _, _) in enumerate(sequences):
        begins.append(len(starts))
        for size, unit_key, gap in [(0, 0, specials), *units]:
            starts += [place == 0 for place in range(size)] + [True] * gap
            free += [True] * size + [False] * gap
            keys += [unit_key << 25 | low_bits] * (size + gap)
            sequence += [number] * (size + gap)
    late = set(data.draw(st.sets(st.integers(0, len(starts) - 1))))
    keys = np.array(keys, np.uint64)
    for begin, end, (_, _, budget, lonely) in zip(begins, [*begins[1:], len(starts)], sequences):
        units = [[begin + place for place in unit] for unit in cut(starts[begin:end])]
        taken = slow_take(units, {place for place in range(begin, end) if free[place]}, keys, budget, late, lonely)
        expected |= {place for unit in taken for place in unit}
    found = take(np.array(starts), np.array(free), np.array(sequence), keys, np.array([row[2] for row in sequences]),
                 np.isin(np.arange(len(starts)), sorted(late)), np.array([row[3] for row in sequences]))
    assert set(np.flatnonzero(found).tolist()) == expected


def test_choice_by_hand():
    """Keys 0 to 4 for units of 2, 3, 1, 2, 1 tokens; the budget of 4 takes the first, passes the second, takes the third and
    the last."""
    sizes = [2, 3, 1, 2, 1]
    starts = np.concatenate([[True] + [False] * (size - 1) for size in sizes])
    keys = (np.repeat(np.arange(5), sizes) << 25).astype(np.uint64)
    found = take(starts, np.ones(9, bool), np.zeros(9, np.int64), keys, np.array([4]))
    assert np.flatnonzero(found).tolist() == [0, 1, 5, 8]
    # The first two come late: the third, fourth and last fill the budget.
    found = take(starts, np.ones(9, bool), np.zeros(9, np.int64), keys, np.array([4]), late=np.arange(9) < 5)
    assert np.flatnonzero(found).tolist() == [5, 6, 7, 8]
    # A budget of one token, and no unit so small: the smallest is taken, of two the one with the lower key; or none is.
    found = take(starts[:5], np.ones(5, bool), np.zeros(5, np.int64), keys[:5][::-1].copy(), np.array([1]), None, np.array([True]))
    assert np.flatnonzero(found).tolist() == [0, 1]
    assert not take(starts[:5], np.ones(5, bool), np.zeros(5, np.int64), keys[:5], np.array([1])).any()


def uniform_text(num: int, size: int) -> tuple[np.ndarray, ...]:
    """(maskable, sequence, keys) of `num` sequences of `size` tokens, all of them maskable."""
    return np.ones(num * size, bool), np.repeat(np.arange(num), size), derive(key(9), np.arange(num * size))


@pytest.mark.parametrize("masking", ["token", "word"])
def test_choice_is_uniform_over_tokens(masking):
    """Every place is as probable as every other."""
    num, size, budget = 6000, 20, 3
    found, _ = draw_masks(Masking(masking), np.ones(num * size, np.uint8), *uniform_text(num, size), np.full(num, budget))
    found = found.reshape(num, size)
    assert (found.sum(1) == budget).all()
    assert np.abs(found.mean(0) - 0.15).max() < 5 * math.sqrt(0.15 * 0.85 / num)


@settings(max_examples=60, deadline=None)
@given(text=texts(), data=st.data())
def test_tokens_masked_at_a_lower_rate_are_masked_at_a_higher_one(text, data):
    _, flags, maskable, sequence, keys, budget = text
    low, _ = draw_masks(Masking(), flags, maskable, sequence, keys, np.array([data.draw(st.integers(0, size)) for size in budget.tolist()]))
    high, _ = draw_masks(Masking(), flags, maskable, sequence, keys, budget)
    assert not (low & ~high).any()


# ---------------------------------------------------------------- spans

@settings(max_examples=80, deadline=None)
@given(text=texts())
def test_spans_are_those_of_the_loop_over_words(text):
    _, flags, maskable, _, keys, _ = text
    spans = slow_spans(cut((flags & WORD_START).tolist()), set(np.flatnonzero(maskable).tolist()), keys)
    starts = span_starts((flags & WORD_START).astype(bool), maskable, keys)
    assert np.flatnonzero(starts).tolist() == [span[0] for span in spans]


def test_lengths_of_spans():
    """Geometric, truncated at ten words; words of one to three tokens."""
    num = 200_000
    words = np.random.default_rng(2).random(num) < 0.6
    words[0] = True
    starts = span_starts(words, np.ones(num, bool), derive(key(4), np.arange(num)))
    lengths = np.diff(np.flatnonzero(starts[words]))
    expected = np.array([0.2 * 0.8 ** place for place in range(10)])
    expected /= expected.sum()
    counts = np.bincount(lengths, minlength=11)[1:]
    assert len(counts) == 10 and not (starts & ~words).any()
    assert np.abs(counts - len(lengths) * expected).max() < 5 * math.sqrt(len(lengths) * expected.max())
    assert abs(lengths.mean() - 3.797) < 5 * lengths.std() / math.sqrt(len(lengths)) and abs(expected @ np.arange(1, 11) - 3.797) < 0.001


def test_spans_are_masked_whole_until_words_fill():
    """Words of one token, so that spans and words reach every budget; most of what is masked lies in runs."""
    num, size, budget = 2000, 60, 12
    maskable, sequence, keys = uniform_text(num, size)
    maskable[::size] = False  # [CLS]
    options, ones = Masking("span"), np.ones(num * size, np.uint8)
    masked, leader = draw_masks(options, ones, maskable, sequence, keys, np.full(num, budget))
    assert (masked.reshape(num, size).sum(1) == budget).all()
    by_word, _ = draw_masks(Masking("word"), ones, maskable, sequence, keys, np.full(num, budget))
    runs = [np.count_nonzero(np.diff(np.pad(found.reshape(num, size), ((0, 0), (1, 0))).astype(int)) == 1) for found in (masked, by_word)]
    assert runs[0] < 0.5 * runs[1]
    sizes = np.bincount(leader[masked])
    assert sizes.max() == 10 and abs(sizes[sizes > 0].mean() - 3) < 0.5


# ---------------------------------------------------------------- entities

def entity_text(num: int = 1500, size: int = 40, seed: int = 5) -> tuple[np.ndarray, ...]:
    """(flags, maskable, sequence, keys) of sequences of single-token words, about a third of them in entities."""
    flags = mark_entities(np.full(num, size), np.random.default_rng(seed)) | np.uint8(WORD_START)
    return flags, *uniform_text(num, size)


def entities_of(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first token, size) of each entity."""
    first = np.flatnonzero(flags & ENTITY_START)
    in_entity = flags & (ENTITY_START | ENTITY_INSIDE) > 0
    number = np.cumsum(flags & ENTITY_START > 0) - 1
    return first, np.bincount(number[in_entity])


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.7, 1.0])
def test_share_of_chosen_entities(probability):
    """Without a cap, and a budget of one token that entities use up, each entity is masked with its probability, and whole."""
    flags, maskable, sequence, keys = entity_text()
    masked, _ = draw_masks(Masking("entity", entity_probability=probability, entity_budget=1.0), flags, maskable, sequence, keys,
                           np.ones(1500, np.int64))
    first, sizes = entities_of(flags)
    is_masked = masked[first]
    number, in_entity = np.cumsum(flags & ENTITY_START > 0) - 1, flags & (ENTITY_START | ENTITY_INSIDE) > 0
    assert np.array_equal(masked[in_entity], is_masked[number[in_entity]]), "an entity is masked in part"
    assert abs(is_masked.mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / len(first))
    for size in range(1, 5):
        share = is_masked[sizes == size].mean()
        assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / (sizes == size).sum())
    nothing_chosen = np.bincount(sequence[masked & in_entity], minlength=1500) == 0
    assert np.array_equal(np.bincount(sequence[masked & ~in_entity], minlength=1500), nothing_chosen.astype(int))


@pytest.mark.parametrize("entity_budget", [0.0, 0.1, 0.25])
def test_entities_keep_to_their_budget(entity_budget):
    """No entity fits any more, and none in the first places is preferred; words outside entities fill up to the rate."""
    num, size = 1500, 40
    flags, maskable, sequence, keys = entity_text(num, size)
    cap = math.floor(entity_budget * size + 1e-9)
    masked, _ = draw_masks(Masking("entity", entity_probability=1.0, entity_budget=entity_budget), flags, maskable, sequence, keys,
                           np.full(num, 12))
    in_entity = flags & (ENTITY_START | ENTITY_INSIDE) > 0
    used = np.bincount(sequence[masked & in_entity], minlength=num)
    first, sizes = entities_of(flags)
    outside = np.bincount(sequence[~in_entity], minlength=num)
    filled = outside >= 12  # so that no word of an entity is needed
    assert filled.mean() > 0.95 and (used[filled] <= cap).all() and (masked.reshape(num, size).sum(1) == 12).all()
    left = (cap - used)[sequence[first]]
    assert not (filled[sequence[first]] & ~masked[first] & (sizes <= left)).any(), "an entity that fits is left"
    if cap:
        for chosen_size in (1, 4):
            of_size = sizes == chosen_size
            early = of_size & (first % size < size // 2)
            share = masked[first[of_size]].mean()
            assert abs(masked[first[early]].mean() - share) < 5 * math.sqrt(share * (1 - share) / early.sum())
    else:
        assert not masked[in_entity & filled[sequence]].any()


@pytest.mark.parametrize("fill", ["word", "token"])
def test_what_fills_lies_outside_entities_first(fill):
    num, size = 400, 40
    flags, maskable, sequence, keys = entity_text(num, size)
    in_entity = (flags & (ENTITY_START | ENTITY_INSIDE) > 0).reshape(num, size)
    for budget in (4, 20, 35):
        masked, _ = draw_masks(Masking("entity", entity_probability=0.0, entity_fill=fill), flags, maskable, sequence, keys,
                               np.full(num, budget))
        masked = masked.reshape(num, size)
        assert (masked.sum(1) == budget).all()
        assert np.array_equal((masked & in_entity).sum(1), np.maximum(0, budget - (~in_entity).sum(1)))


def test_entities_may_go_beyond_the_rate():
    flags, maskable, sequence, keys = entity_text(300, 40)
    masked, _ = draw_masks(Masking("entity", entity_probability=1.0, entity_budget=1.0), flags, maskable, sequence, keys, np.full(300, 3))
    in_entity = flags & (ENTITY_START | ENTITY_INSIDE) > 0
    has_entity = np.bincount(sequence[in_entity], minlength=300) >= 3
    assert has_entity.mean() > 0.9 and np.array_equal(masked[has_entity[sequence]], in_entity[has_entity[sequence]])


# ---------------------------------------------------------------- replacements

ONES = np.arange(60_000)  # masked places, each its own leader


def test_shares_of_replacements():
    keys = derive(key(3), ONES)
    found = replace(np.full(60_000, 7), ONES, keys, ONES, Masking(), VOCABULARY)
    ordinary = len(VOCABULARY.ordinary_ids)
    for share, expected in (((found == MASK).mean(), 0.8), ((found == 7).mean(), 0.1 + 0.1 / ordinary),
                            (((found != MASK) & (found != 7)).mean(), 0.1 - 0.1 / ordinary)):
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 60_000)
    assert found.dtype == np.int64


@pytest.mark.parametrize("split", [(0.0, 1.0, 0.0), (0.8, 0.1, 0.1)])
def test_random_ids_are_ordinary_and_uniform(split):
    """Also where only a tenth is drawn: which ones are drawn must not say what is drawn."""
    ids = np.zeros(60_000, np.int64)  # [PAD]: never drawn, so that what is drawn can be told from what stays
    found = replace(ids, ONES, derive(key(3), ONES), ONES, Masking(mask_split=split), VOCABULARY)
    counts = np.bincount(found[(found != PAD) & (found != MASK)], minlength=SIZE)
    assert not counts[VOCABULARY.is_special].any()
    expected = 60_000 * split[1] / len(VOCABULARY.ordinary_ids)
    assert np.abs(counts[VOCABULARY.ordinary_ids] - expected).max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("split, check", [((1.0, 0.0, 0.0), lambda ids, found: (found == MASK).all()),
                                          ((0.0, 0.0, 1.0), lambda ids, found: (found == ids).all())])
def test_one_kind_of_replacement(split, check):
    ids = np.random.default_rng(0).choice(VOCABULARY.ordinary_ids, 5000).astype(np.int64)
    assert check(ids, replace(ids, ONES[:5000], derive(key(3), ONES[:5000]), ONES[:5000], Masking(mask_split=split), VOCABULARY))


def kinds_of(ids: np.ndarray, masked: np.ndarray, replaced: np.ndarray) -> np.ndarray:
    """0 for [MASK], 1 for a random token, 2 for the token itself, of each masked place; ids that are never drawn."""
    assert not np.isin(ids[masked], VOCABULARY.ordinary_ids).any()
    return np.where(replaced == MASK, 0, np.where(replaced == ids[masked], 2, 1))


def shares_hold(kinds: np.ndarray, split: tuple[float, ...] = (0.8, 0.1, 0.1)) -> bool:
    return all(abs((kinds == kind).mean() - share) < 5 * math.sqrt(share * (1 - share) / len(kinds)) for kind, share in enumerate(split))


@pytest.mark.parametrize("name", ["token", "word", "span", "entity", "entity, tokens"])
def test_what_is_drawn_together(name):
    """One draw for a span or an entity; one for each token of what fills, and of token and word masks."""
    flags, maskable, sequence, keys = entity_text(2000, 40)
    flags[1::2] &= ~np.uint8(WORD_START)  # words of two tokens
    flags[::40] |= WORD_START
    options = changed(OPTIONS[name], entity_probability=0.6, entity_budget=0.3)
    masked, leader = draw_masks(options, flags, maskable, sequence, keys, np.full(2000, 14))
    ids, masked = np.zeros(len(flags), np.int64), np.flatnonzero(masked)
    kinds = kinds_of(ids, masked, replace(ids, masked, keys, leader, options, VOCABULARY))
    units, first, counts = np.unique(leader[masked], return_index=True, return_counts=True)
    number = np.repeat(np.arange(len(units)), counts)
    assert np.array_equal(kinds, kinds[first][number]) and shares_hold(kinds[first])
    together = kinds[:-1][np.diff(masked) == 1] == kinds[1:][np.diff(masked) == 1]  # neighbours
    if options.masking in ("token", "word"):
        assert counts.max() == 1 and abs(together.mean() - 0.66) < 5 * math.sqrt(0.66 * 0.34 / len(together))
    else:
        assert shares_hold(kinds[first[counts > 1]]) and (counts > 1).sum() > 2000 and together.mean() > 0.75
    random = replace(ids, masked, keys, leader, options, VOCABULARY)[kinds == 1]
    counts = np.bincount(random, minlength=SIZE)[VOCABULARY.ordinary_ids]
    assert counts.sum() == len(random) and np.abs(counts - len(random) / 54).max() < 5 * math.sqrt(len(random) / 54)


# ---------------------------------------------------------------- similar words

def words_in_turn(words: list[list[int]], num: int) -> tuple[np.ndarray, ...]:
    """(ids, flags, maskable, sequence, keys, budget): each sequence is one of `words` in turn, masked whole."""
    chosen = [words[number % len(words)] for number in range(num)]
    sizes = [len(word) for word in chosen]
    flags = np.concatenate([[WORD_START] + [0] * (size - 1) for size in sizes]).astype(np.uint8)
    total = sum(sizes)
    return (np.concatenate(chosen), flags, np.ones(total, bool), np.repeat(np.arange(num), sizes), derive(key(8), np.arange(total)),
            np.array(sizes))


def replaced_words(words: list[list[int]], num: int, options: Masking) -> list[list[int]]:
    ids, flags, maskable, sequence, keys, budget = words_in_turn(words, num)
    masked, leader = draw_masks(options, flags, maskable, sequence, keys, budget)
    assert masked.all()
    return np.split(replace(ids, np.flatnonzero(masked), keys, leader, options, VOCABULARY), np.cumsum(budget)[:-1])


@pytest.mark.parametrize("word", [(5,), (5, 40), (5, 6)])
def test_similar_words_stand_where_a_mask_would(word):
    """Eight tenths are words of the table, all alike; a tenth is random; a tenth stays. One draw for a word."""
    num, choices = 12_000, TABLE[word]
    found = [tuple(row.tolist()) for row in replaced_words([list(word)], num, Masking("word", similar=SIMILAR))]
    assert all(len(row) == len(word) and MASK not in row for row in found)
    random_word = 54.0 ** -len(word)  # by chance a random word is one of the table, or the word itself
    for other, share in [*((choice, 0.8 / len(choices)) for choice in choices), (word, 0.1)]:
        expected = share + 0.1 * random_word
        assert abs(found.count(other) / num - expected) < 5 * math.sqrt(expected / num)


def test_words_without_similar_ones_become_random_tokens():
    """Also a word that is only the beginning of one in the table, or holds the same tokens in another order."""
    num, words = 15_000, [[20, 40], [5, 42], [40, 5], [7], [5, 40, 41, 41]]
    found = replaced_words(words, num, Masking("word", similar=SIMILAR))
    stays = np.array([row.tolist() == words[number % 5] for number, row in enumerate(found)])
    for size in (2, 4):
        kept = stays[[len(row) == size for row in found]]
        assert abs(kept.mean() - 0.1 - 0.9 / 54 ** size) < 5 * math.sqrt(0.09 / len(kept))
    drawn = np.concatenate([row for row, same in zip(found, stays) if not same and len(row) > 2])  # of the word that is no short chance
    counts = np.bincount(drawn, minlength=SIZE)
    assert not counts[VOCABULARY.is_special].any()
    assert np.abs(counts[VOCABULARY.ordinary_ids] - len(drawn) / 54).max() < 5 * math.sqrt(len(drawn) / 54)


def test_a_split_without_masks_shows_no_similar_word():
    """The first share alone is similar."""
    for split, expected in (((1.0, 0.0, 0.0), [6, 41]), ((0.0, 0.0, 1.0), [5, 40])):
        similar = read_similar(["5 40\t6 41"], to_ids)
        found = replaced_words([[5, 40]], 200, Masking("word", split, similar=similar))
        assert all(row.tolist() == expected for row in found)


def test_an_entity_has_a_similar_one():
    """An entity of several words stands for a row of the table; its words have rows of their own that are not used."""
    flags = np.tile(np.array([WORD_START | ENTITY_START, WORD_START | ENTITY_INSIDE], np.uint8), 500)
    options = Masking("entity", (1.0, 0.0, 0.0), 1.0, 1.0, similar=SIMILAR)
    keys, sequence = derive(key(8), np.arange(1000)), np.repeat(np.arange(500), 2)
    masked, leader = draw_masks(options, flags, np.ones(1000, bool), sequence, keys, np.ones(500, np.int64))
    found = replace(np.tile([5, 6], 500), np.flatnonzero(masked), keys, leader, options, VOCABULARY).reshape(500, 2)
    assert {tuple(row) for row in found.tolist()} == set(TABLE[5, 6])


def test_a_table_holds_what_its_lines_say():
    lines = ["5 40\t6 41\t 9 42 \n", "7\t8\r\n", "6\t5\t5\t6\t8 8\t9"]
    table = read_similar(lines, to_ids)
    rows = sorted((size, count, table.ids[start: start + size * count].tolist())
                  for size, count, start in zip(table.sizes.tolist(), table.counts.tolist(), table.starts.tolist()))
    assert rows == [(1, 1, [8]), (1, 3, [5, 5, 9]), (2, 2, [6, 41, 9, 42])]
    assert table.hashes.dtype == np.uint64 and (np.diff(table.hashes.astype(object)) > 0).all() and len(table.ids) == 8


@pytest.mark.parametrize("line", ["", "   ", "\t", "\t5", "5", "5\t", "5\t5", "5\t6 7", "5 6\t6\t7 8 9\t", "5\t\t\t", " 5 \t 5 "])
def test_a_line_without_a_similar_word_is_none(line):
    assert read_similar([line], to_ids) is None and read_similar([], to_ids) is None
    table = read_similar([line, "8\t9", line], to_ids)
    assert (table.sizes.tolist(), table.counts.tolist(), table.ids.tolist()) == ([1], [1], [9])


def test_the_table_of_a_run_holds_no_special_token(tiny_tokenizer, tmp_path):
    """Neither what the tokenizer does not know nor what it takes for one of its own: it would be drawn in place of words."""
    (tmp_path / "similar.tsv").write_text("a\t\u2603\t[MASK]\tb\n\u2603\tb\nb\t[SEP]\tc\n[MASK]\tc\n", encoding="utf-8")
    config = SimpleNamespace(**vars(OPTIONS["word, similar"]) | {"replace": "similar", "similar": str(tmp_path / "similar.tsv")})
    table = make_masking(config, tiny_tokenizer).similar
    assert set(tiny_tokenizer.convert_ids_to_tokens(table.ids.tolist())) == {"b", "c"}


def test_the_lines_of_a_word_add_up():
    assert read_similar(["5\t6", "5\t7\t8\t6", "5\t5"], to_ids).ids.tolist() == [6, 7, 8]


@settings(max_examples=60, deadline=None)
@given(rows=st.dictionaries(st.lists(st.integers(5, 9), min_size=1, max_size=3).map(tuple), st.lists(
    st.lists(st.integers(5, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4), min_size=1, max_size=8))
def test_every_word_of_a_table_is_found(rows):
    table = read_similar(["\t".join(" ".join(map(str, entry)) for entry in (word, *others)) for word, others in rows.items()], to_ids)
    for word in [(5,), (9, 9), *rows]:
        choices = {other for other in rows.get(word, []) if len(other) == len(word) and other != word}
        if table is not None and choices:
            found = replaced_words([list(word)], 60, Masking("word", (1.0, 0.0, 0.0), similar=table))
            assert {tuple(row.tolist()) for row in found} == choices


# ---------------------------------------------------------------- masks of examples

def words_of(text: np.ndarray) -> list[list[int]]:
    """Places of the words of a sequence: its ordinary tokens, cut before each token that begins a word or a segment."""
    words: list[list[int]] = []
    for place, token in enumerate(text.tolist()):
        if VOCABULARY.starts_word[token] or text[place - 1] in (CLS, SEP):
            words.append([])
        if not VOCABULARY.is_special[token]:
            words[-1].append(place)
    return [word for word in words if word]


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop", "mlm"])
@pytest.mark.parametrize("name", OPTIONS)
def test_masks_of_examples_are_those_of_the_slow_loop(objective, name):
    """Sequences built token by token from the corpus: an entity that is cut off at the beginning of a segment begins there."""
    task, shard, options, cut_off = Task(objective, 48, 4, 0.15, 0), ENTITY_SHARD, OPTIONS[name], 0
    if options.masking != "entity":
        shard = changed(shard, flags=shard.flags & WORD_START)
    examples = masked_examples(shard, task, options)
    assert len(examples) > 20
    for example in examples:
        (a, a_length, b, b_length), flags = (int(getattr(example["plan"], field)[0]) for field in (
            "a_start", "a_length", "b_start", "b_length")), [WORD_START]
        for start, length in ((a, a_length), (b, b_length)):
            segment = shard.flags[start: start + length].tolist()
            if segment:
                cut_off += bool(segment[0] & ENTITY_INSIDE)
                is_entity = segment[0] & (ENTITY_START | ENTITY_INSIDE)
                flags += [WORD_START | (ENTITY_START if is_entity else 0), *segment[1:], WORD_START]
        text, maskable = example["text"], [not VOCABULARY.is_special[token] for token in example["text"]]
        keys = derive(derive(np.uint64(example["key"]), MASKS), np.arange(len(text)))
        budget = min(max(1, math.floor(0.15 * sum(maskable) + 0.5)), sum(maskable))
        expected = slow_masks(options, flags, maskable, keys, budget)
        assert example["masked"].tolist() == sorted(expected)
        assert example["replaced"].tolist() == slow_replace(text, expected, keys, options)
    assert cut_off > 2 or options.masking != "entity"


ENTITY_SHARD = make_shard(documents=12, sentences=8, longest=40, entities=True)


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
@pytest.mark.parametrize("masking", ["token", "word", "span"])
def test_masks_of_examples(objective, masking):
    """Whole units, no special token, and the budget; below it only where no unit is left that fits."""
    task = Task(objective, 48, 4, 0.15, 0)
    examples = masked_examples(make_shard(), task, Masking(masking))
    assert len(examples) > 200
    multiple = 0
    for example in examples:
        text, masked = example["text"], set(example["masked"].tolist())
        assert not VOCABULARY.is_special[text[example["masked"]]].any()
        units = [[place] for word in words_of(text) for place in word] if masking == "token" else words_of(text)
        inside = [set(unit) & masked for unit in units]
        assert all(not part or part == set(unit) for part, unit in zip(inside, units)), "a unit is masked in part"
        maskable = sum(map(len, units))
        budget = min(max(1, math.floor(0.15 * maskable + 0.5)), maskable)
        left = [len(unit) for part, unit in zip(inside, units) if not part]
        if len(masked) > budget:  # one unit, the smallest of all
            assert len(masked) == min(map(len, units))
        else:
            assert all(size > budget - len(masked) for size in left) or len(masked) == budget
        multiple += any(len(part) > 1 for part in inside)
    assert (multiple > 100) == (masking != "token")


def test_a_sequence_of_one_long_word_is_masked_whole():
    ids = np.array([5, 41, 42, 43, 44, 45, 6, 46, 47, 48, 49, 51, 52], np.uint16)  # two words, six and seven tokens
    shard = Shard(ids, VOCABULARY.starts_word[ids] * np.uint8(WORD_START), np.array([0, 13]), np.array([0, 1]), np.zeros(1, np.uint64))
    for epoch in range(20):
        for example in masked_examples(shard, Task("mlm", 32, 1, 0.15, 0), Masking("word"), epoch):
            words = words_of(example["text"])
            assert example["masked"].tolist() in words and len(example["masked"]) == min(map(len, words))


def test_a_sequence_of_specials_has_no_mask():
    ids = np.array([UNKNOWN, 50, UNKNOWN, UNKNOWN, 50, 50], np.uint16)
    shard = Shard(ids, np.ones(6, np.uint8), np.array([0, 3, 6]), np.array([0, 1, 2]), np.arange(2, dtype=np.uint64))
    examples = masked_examples(shard, Task("mlm+nsp", 16, 1, 0.15, 0))
    assert [len(example["masked"]) for example in examples] == [0, 0]


def test_shares_of_examples_by_rate():
    shard = make_shard(specials=False)
    for rate in (0.15, 0.4):
        examples = masked_examples(shard, Task("mlm", 64, 4, rate, 0))
        masked = sum(len(example["masked"]) for example in examples)
        assert abs(masked / len(shard.ids) - rate) < 0.01
        kinds = np.concatenate([np.where(example["replaced"] == MASK, 0, np.where(
            example["replaced"] == example["text"][example["masked"]], 2, 1)) for example in examples])
        assert np.abs(np.bincount(kinds) / masked - [0.8, 0.1, 0.1]).max() < 5 * 0.4 / math.sqrt(masked) + 0.1 / 40


def test_masks_are_the_same_when_asked_again_and_others_in_each_epoch():
    """Under plain MLM of short documents the sequences are the same in every epoch; their masks are not."""
    shard, task = make_shard(documents=60, sentences=2, longest=12), Task("mlm", 64, 4, 0.3, 0)
    shown = [{example["text"].tobytes(): (example["masked"].tolist(), example["replaced"].tolist())
              for example in masked_examples(shard, task, Masking(), epoch)} for epoch in (0, 0, 1)]
    assert shown[0] == shown[1]
    common = [text for text in shown[0].keys() & shown[2].keys() if len(shown[0][text][0]) > 2]
    assert len(common) > 15
    assert sum(shown[0][text][0] == shown[2][text][0] for text in common) < len(common) / 4


@pytest.fixture(scope="module")
def many_pairs() -> dict[str, list[dict]]:
    shard = make_shard(400, 60, 12, specials=False)
    return {objective: masked_examples(shard, Task(objective, 64, 4, 0.15, 0)) for objective in ("mlm+nsp", "mlm+sop")}


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
@pytest.mark.parametrize("what", ["label", "order", "a_start", "a_length", "b_start"])
def test_masks_tell_nothing_else(many_pairs, objective, what):
    """Masks, labels, order and segments come from one key: an example of which place 4 is masked must be swapped, first or long
    no more often than any other."""
    examples = [example for example in many_pairs[objective] if example["label"] != IGNORED]
    assert len(examples) > 1400
    values = np.array([number if what == "order" else getattr(example["plan"], what)[0] for number, example in enumerate(examples)], float)
    values = (values - values.mean()) / values.std()
    for place in range(1, 9):
        can = np.array([len(example["text"]) > 30 and not VOCABULARY.is_special[example["text"][place]] for example in examples])
        is_masked = can & np.array([place in example["masked"] for example in examples])
        assert is_masked.sum() > 100
        difference = values[is_masked].mean() - values[can].mean()
        assert abs(difference) < 5 / math.sqrt(is_masked.sum()), f"place {place} is masked where {what} differs by {difference:.2f} sd"
