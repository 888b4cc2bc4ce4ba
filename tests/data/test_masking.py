"""Masks: the vectorized draw of every strategy against a loop over the units of one sequence after
the other, and what replaces the masked tokens against a loop over words; the shares of 80/10/10, of
chosen entities and of span lengths; similar words; budgets; what is never masked or drawn; and that
an example's masks are the same when drawn again, others in each epoch, and say nothing about its
label, its place in the epoch or its segments."""

import math
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from data_reference import (
    CLS,
    MASK,
    ORDINARY,
    PAD,
    SEP,
    SIZE,
    SPECIAL,
    STARTS_WORD,
    UNKNOWN,
    VOCABULARY,
    examples_of,
    make_shard,
    mark_entities,
    micro_batches,
    plan_of,
    shard_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED
from pretrain.data import masking
from pretrain.data.collate import MASKS, Collator
from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START, Shard
from pretrain.data.hash_rng import derive, integers, key, uniform
from pretrain.data.masking import Masking, Packed, Units, draw_masks, fill_in, read_similar
from pretrain.data.pairs import Task

SPLIT, RANDOM_ID, SPAN_LENGTH, ENTITY_CHOICE, SIMILAR_WORD = range(1, 6)
IN_ENTITY = ENTITY_START | ENTITY_INSIDE


def to_ids(text: str) -> list[int]:
    """Replaces a tokenizer: words are written as their ids."""
    return [int(number) for number in text.split()]


# Words of ids 5 and 6 in full, some of ids 40 and 41; other words have no similar one.
TABLE = {
    (5,): [(6,), (7,), (8,)],
    (6,): [(5,)],
    (5, 40): [(6, 41), (9, 42)],
    (5, 41): [(6, 40)],
    (5, 6): [(8, 8), (9, 9), (7, 7)],
    (5, 40, 41): [(8, 41, 42)],
    (41,): [(5,)],
}


def line_of(word, others) -> str:
    return "\t".join(" ".join(map(str, entry)) for entry in (word, *others))


SIMILAR = read_similar([line_of(word, others) for word, others in TABLE.items()], to_ids)
OPTIONS = {
    "token": Masking(),
    "word": Masking("word"),
    "span": Masking("span"),
    "entity": Masking("entity"),
    "entity, tokens": Masking("entity", entity_fill="token"),
    "entity, alone, similar": Masking("entity", (0.8, 0.1, 0.1), 0.7, 0.5, "none", SIMILAR),
    "entity, all": Masking("entity", (0.2, 0.5, 0.3), 1.0, 1.0),
    "word, similar": Masking("word", similar=SIMILAR),
    "span, similar": Masking("span", similar=SIMILAR),
    "entity, similar": Masking("entity", (0.8, 0.1, 0.1), 0.7, 0.5, similar=SIMILAR),
}


def packed_of(flags, sequence, keys, maskable=True, ids=PAD) -> Packed:
    """A text of maskable tokens with one id, unless arguments say otherwise."""
    flags, zeros = np.array(flags, np.uint8), np.zeros(len(flags), np.int64)
    return Packed(
        ids=zeros + ids,
        flags=flags,
        maskable=np.zeros(len(flags), bool) | maskable,
        sequence=np.array(sequence, np.int64),
        position_ids=zeros,
        token_type_ids=zeros,
        keys=np.array(keys, np.uint64),
        lengths=np.bincount(np.array(sequence, np.int64)),
    )


def uniform_text(num: int, size: int, entities=0) -> Packed:
    """`num` sequences of `size` maskable one-token words; `entities`: more flags."""
    flags = np.full(num * size, WORD_START) | entities
    keys = derive(key(9), np.arange(num * size))
    return packed_of(flags, np.repeat(np.arange(num), size), keys)


# ---------------------------------------------------------------- the draw, slowly


def cut(starts) -> list[list[int]]:
    """Places of units, each from a start to the next."""
    units: list[list[int]] = []
    for place, start in enumerate(starts):
        if start:
            units.append([])
        units[-1].append(place)
    return units


def slow_take(units, free: set[int], keys, budget: int, late=frozenset(), needs_one=False):
    """What is taken of one sequence: units that fit, in the order of their keys (39 bits; ties in
    the order of the text)."""
    units = [unit for unit in units if free & set(unit)]
    units.sort(key=lambda unit: (unit[0] in late, int(keys[unit[0]]) >> 25))
    taken, left = [], budget
    for unit in units:
        if len(free & set(unit)) <= left:
            taken.append(unit)
            left -= len(free & set(unit))
    if needs_one and not taken and units and budget > 0:
        taken.append(min(units, key=lambda unit: len(free & set(unit))))
    return taken


def slow_spans(words: list[list[int]], free: set[int], keys) -> list[list[int]]:
    """Words with a token in `free`, joined in runs of random length; the others alone."""
    shares = [0.2 * 0.8**length for length in range(10)]
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
            left = next((length for length in range(10) if draw < sum(shares[: length + 1])), 9)
            spans.append(list(word))
    return spans


def slow_masks(options: Masking, flags, maskable, keys, budget: int) -> dict[int, int]:
    """Masked places of one sequence -> the place whose key decides how each is replaced."""
    free, masked = {place for place, can in enumerate(maskable) if can}, {}
    words = cut([flag & WORD_START for flag in flags])
    word_of = {place: word[0] for word in words for place in word}
    in_entity = set()
    if options.masking == "span":
        for unit in slow_take(slow_spans(words, free, keys), free, keys, budget):
            leaders = word_of if options.similar else dict.fromkeys(unit, unit[0])
            masked |= {place: leaders[place] for place in free & set(unit)}
    if options.masking == "entity":
        in_entity = {place for place, flag in enumerate(flags) if flag & IN_ENTITY}
        chosen = [
            unit
            for unit in cut([not flag & ENTITY_INSIDE for flag in flags])
            if unit[0] in in_entity
            and uniform(derive(keys[unit[0]], ENTITY_CHOICE)) < options.entity_probability
        ]
        cap = math.floor(options.entity_budget * len(free) + 1e-9)
        for unit in slow_take(chosen, free, keys, cap):
            masked |= {place: unit[0] for place in free & set(unit)}
    if options.masking == "entity" and options.entity_fill == "none":
        return masked
    by_token = options.masking == "token"
    by_token |= options.masking == "entity" and options.entity_fill == "token"
    units = [[place] for place in range(len(flags))] if by_token else words
    left = free - set(masked)
    filled = slow_take(units, left, keys, budget - len(masked), in_entity, not masked)
    for place in {place for unit in filled for place in unit} & left:
        masked[place] = word_of[place] if options.similar and not by_token else place
    return masked


def slow_fill(ids, masks: dict[int, int], keys, options: Masking) -> list[int]:
    """What replaces the masked places, in order."""
    found = []
    for leader, places in groupby(sorted(masks), key=masks.get):
        places = list(places)
        draw, kept = float(uniform(derive(keys[leader], SPLIT))), [int(ids[p]) for p in places]
        choices = [int(integers(derive(keys[p], RANDOM_ID), len(ORDINARY))) for p in places]
        shown = [int(ORDINARY[choice]) for choice in choices]
        if draw < options.mask_split[0]:
            if not options.similar:
                shown = [MASK] * len(places)
            elif tuple(kept) in TABLE:
                rows = TABLE[tuple(kept)]
                shown = list(rows[int(integers(derive(keys[leader], SIMILAR_WORD), len(rows)))])
        elif draw >= options.mask_split[0] + options.mask_split[1]:
            shown = kept
        found += shown
    return found


KEY = st.integers(0, 2**64 - 1) | st.integers(0, 3).map(lambda number: number << 25)
TOKEN = st.tuples(
    st.booleans(),
    st.sampled_from([0, 0, ENTITY_START, ENTITY_INSIDE, ENTITY_INSIDE]),
    st.sampled_from([5, 5, 5, 6, 40, 41, 20, UNKNOWN, SEP]),
    KEY,
)


@st.composite
def texts(draw) -> tuple[Packed, np.ndarray]:
    """(text, budget) of a few sequences; entities and words overlap in any way."""
    rows, budget = [], []
    for number in range(draw(st.integers(1, 4))):
        budget.append(draw(st.integers(0, 15)))
        rows.append((WORD_START, number, draw(KEY), False, CLS))
        for starts_word, entity, token, token_key in draw(st.lists(TOKEN, max_size=14)):
            flag_before, *_, before = rows[-1]
            if entity == ENTITY_INSIDE and not flag_before & IN_ENTITY:
                entity = ENTITY_START
            flag = WORD_START * (starts_word or before in (CLS, SEP)) | entity
            flag, can = (WORD_START, False) if token == SEP else (flag, token != UNKNOWN)
            rows.append((flag, number, token_key, can, token))
    return packed_of(*zip(*rows)), np.array(budget)


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=80, deadline=None)
@given(text=texts())
def test_the_draw_equals_the_slow_loop(name, text):
    """Marked entities affect only the entity strategy: a corpus may be prepared with a lexicon and
    masked in another way."""
    options, (packed, budget) = OPTIONS[name], text
    flags = packed.flags if options.masking == "entity" else packed.flags & np.uint8(WORD_START)
    expected = {}
    for number in range(len(budget)):
        places = np.flatnonzero(packed.sequence == number)
        part = (flags[places].tolist(), packed.maskable[places], packed.keys[places])
        found = slow_masks(options, *part, int(budget[number]))
        expected |= {places[0] + place: places[0] + leader for place, leader in found.items()}
    masked, leader = draw_masks(packed, budget, options)
    assert masked.tolist() == sorted(expected) and packed.maskable[masked].all()
    assert dict(zip(masked.tolist(), leader[masked].tolist())) == expected
    shown = fill_in(packed, masked, leader, options, VOCABULARY)
    assert shown.tolist() == slow_fill(packed.ids, expected, packed.keys, options)
    assert shown.dtype == np.int64


# ---------------------------------------------------------------- strategies


def test_a_strategy_is_a_function_and_a_name(monkeypatch):
    """Pairs of words as units: half of them become [MASK], half stay."""

    def by_word_pair(packed, options):
        number = np.cumsum(packed.word_starts)
        first = number[packed.position_ids == 0][packed.sequence]
        starts = packed.word_starts & ((number - first) % 2 == 0)
        return [Units(starts, shared_draws=starts)]

    monkeypatch.setitem(masking.STRATEGIES, "word-pair", by_word_pair)
    options, shown = Masking("word-pair", (0.5, 0.0, 0.5)), []
    for example in planned_examples(make_shard(specials=False), TASK, options):
        words = cut(word_starts(example["text"]))
        for pair in cut(number % 2 == 0 for number in range(len(words))):
            places = {place for number in pair for place in words[number]}
            places = {place for place in places if not SPECIAL[example["text"][place]]}
            hit = places & set(example["masked"])
            kinds = {example["ids"][place] == MASK for place in hit}
            assert hit in (set(), places) and len(kinds) < 2
            shown += kinds
    assert 0.4 < np.mean(shown) < 0.6 and len(shown) > 500


def test_choice_is_uniform_over_tokens():
    """All places are equally probable."""
    num, size = 6000, 20
    places, _ = draw_masks(uniform_text(num, size), np.full(num, 3), Masking())
    shares = np.bincount(places % size) / num
    assert len(places) == 3 * num
    assert np.abs(shares - 0.15).max() < 5 * math.sqrt(0.15 * 0.85 / num)


def test_lengths_of_spans():
    """Geometric, truncated at ten words; words of one to three tokens."""
    num = 200_000
    words = np.random.default_rng(2).random(num) < 0.6
    words[0] = True
    starts = masking.span_starts(words, np.ones(num, bool), derive(key(4), np.arange(num)))
    lengths = np.diff(np.flatnonzero(starts[words]))
    expected = np.array([0.2 * 0.8**place for place in range(10)])
    expected /= expected.sum()
    counts, total = np.bincount(lengths, minlength=11)[1:], len(lengths)
    assert len(counts) == 10 and not (starts & ~words).any()
    assert np.abs(counts - total * expected).max() < 5 * math.sqrt(total * expected.max())
    assert abs(expected @ np.arange(1, 11) - 3.797) < 0.001
    assert abs(lengths.mean() - 3.797) < 5 * lengths.std() / math.sqrt(total)


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_share_of_chosen_entities(probability):
    """Each entity is masked with its probability, and whole. A third of the words are in one."""
    num, size = 1500, 40
    packed = uniform_text(num, size, mark_entities([size] * num, np.random.default_rng(5)))
    options = Masking("entity", entity_probability=probability, entity_budget=1.0)
    masked = np.zeros(num * size, bool)
    masked[draw_masks(packed, np.ones(num, int), options)[0]] = True
    hit = masked[packed.flags & ENTITY_START > 0]
    number = np.cumsum(packed.flags & ENTITY_START > 0)[packed.in_entity] - 1
    assert np.array_equal(masked[packed.in_entity], hit[number]), "an entity is masked in part"
    deviation = math.sqrt(probability * (1 - probability) / len(hit))
    assert abs(hit.mean() - probability) <= 5 * deviation


# ---------------------------------------------------------------- replacements


@pytest.mark.parametrize("split", [(0.8, 0.1, 0.1), (0, 1.0, 0)])
def test_shares_of_replacements(split):
    """Whether a token is replaced at random is independent of its replacement."""
    packed, places = uniform_text(1, 60_000), np.arange(60_000)  # of [PAD], which is never drawn
    shown = fill_in(packed, places, places, Masking(mask_split=split), VOCABULARY)
    random = shown[(shown != MASK) & (shown != PAD)]
    found = ((shown == MASK).mean(), len(random) / len(shown), (shown == PAD).mean())
    for share, expected in zip(found, split):
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / len(shown))
    counts, expected = np.bincount(random, minlength=SIZE), len(random) / len(ORDINARY)
    assert not counts[SPECIAL].any()
    assert np.abs(counts[ORDINARY] - expected).max() <= 5 * math.sqrt(expected)


# ---------------------------------------------------------------- similar words


def replacements(word: tuple[int, ...], num: int, options: Masking) -> list[tuple[int, ...]]:
    """What replaces a word in `num` sequences, of it alone."""
    size = len(word)
    flags = np.tile([WORD_START] + [0] * (size - 1), num)
    keys = derive(key(8), np.arange(num * size))
    packed = packed_of(flags, np.repeat(np.arange(num), size), keys, ids=np.tile(word, num))
    masked, leader = draw_masks(packed, np.full(num, size), options)
    assert len(masked) == len(flags)
    shown = fill_in(packed, masked, leader, options, VOCABULARY)
    return list(map(tuple, shown.reshape(num, size).tolist()))


def test_the_words_with_a_similar_one():
    """Words of one sequence each, one by one in the table."""
    words = [(5,), (7,), (6,), (5, 40), (5, 42), (6, 5), (5, 6), (5, 40, 41), (5, 41, 40)]
    flags = [flag for word in words for flag in [WORD_START] + [0] * (len(word) - 1)]
    sequence = np.zeros(len(flags), int)
    packed = packed_of(flags, sequence, derive(key(8), sequence), ids=np.concatenate(words))
    expected = [bool(TABLE.get(word)) for word in words]
    assert masking.has_similar(packed, SIMILAR).tolist() == expected
    assert True in expected and False in expected


@pytest.mark.parametrize("word", [(5,), (5, 6)])
def test_similar_words_replace_masks(word):
    """80% are words of the table, equally often; 10% are random; 10% stay. One draw per
    word."""
    num, choices = 12_000, TABLE[word]
    found = replacements(word, num, Masking("word", similar=SIMILAR))
    assert all(len(row) == len(word) and MASK not in row for row in found)
    by_chance = 0.1 * 54.0 ** -len(word)  # a random word is one of the table, or the word itself
    for other, share in [*((choice, 0.8 / len(choices)) for choice in choices), (word, 0.1)]:
        expected = share + by_chance
        assert abs(found.count(other) / num - expected) < 5 * math.sqrt(expected / num)


def rows_of(table) -> list[tuple[int, list[int]]]:
    """(tokens of the word, ids of its choices) of each row, sorted."""
    columns = zip(table.sizes.tolist(), table.counts.tolist(), table.starts.tolist())
    return sorted((n, table.ids[start : start + n * count].tolist()) for n, count, start in columns)


def test_a_table_equals_its_lines():
    table = read_similar(["5 40\t6 41\t 9 42 \n", "7\t8\r\n", "6\t5\t5\t6\t8 8\t9"], to_ids)
    assert rows_of(table) == [(1, [5, 5, 9]), (1, [8]), (2, [6, 41, 9, 42])]
    assert table.hashes.dtype == np.uint64 and (np.diff(table.hashes.astype(object)) > 0).all()
    several_lines = read_similar(["5\t6", "5\t7\t8\t6", "5\t5"], to_ids)
    assert rows_of(several_lines) == [(1, [6, 7, 8])]
    empty = ["", "\t", "\t5", "5", "5\t", "5\t5", "5\t6 7"]  # without a similar word
    assert read_similar(empty, to_ids) is None
    assert rows_of(read_similar([*empty, "8\t9", *empty], to_ids)) == [(1, [9])]


WORD = st.lists(st.integers(5, 9), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(WORD, st.lists(WORD, min_size=1, max_size=4), min_size=1, max_size=8))
def test_every_word_of_a_table_is_found(rows):
    table = read_similar([line_of(word, others) for word, others in rows.items()], to_ids)
    options = Masking("word", (1.0, 0.0, 0.0), similar=table)
    for word, others in rows.items():
        choices = {other for other in others if len(other) == len(word) and other != word}
        if choices:
            assert set(replacements(word, 60, options)) == choices


# ---------------------------------------------------------------- masks of examples

TASK = Task("random", 48, 4, 0.15, 0)


def text_of(example: dict) -> list[int]:
    text = list(example["ids"])
    for place, label in zip(example["masked"], example["labels"]):
        text[place] = label
    return text


def planned_examples(shard: Shard, task: Task, options=Masking(), epoch: int = 0) -> list[dict]:
    """Every example of an epoch in the plan's order, with its text and its part of the plan."""
    plan = plan_of(shard, task, epoch)
    examples = examples_of(micro_batches(shard, plan, Collator(task, VOCABULARY, options)))
    for number, example in enumerate(examples):
        example["text"] = text_of(example)
        example["plan"] = plan.take(slice(number, number + 1))
    assert len(examples) == len(plan.keys)
    return examples


def word_starts(text: list[int]) -> list[bool]:
    """Where a token begins a word or a segment."""
    return [STARTS_WORD[token] or text[place - 1] in (CLS, SEP) for place, token in enumerate(text)]


@pytest.mark.parametrize("name", OPTIONS)
def test_masks_of_examples_equal_the_slow_loop(name):
    """Sequences built token by token from the corpus. An entity or a word that is cut off at the
    beginning of a segment begins there."""
    shard, options, cut_off = make_shard(16, 8, 40), OPTIONS[name], 0
    if options.masking != "entity":
        shard = replace(shard, flags=shard.flags & np.uint8(WORD_START))
    examples = planned_examples(shard, TASK, options)
    assert len(examples) > 20
    for example in examples:
        text, plan, flags = example["text"], example["plan"], [WORD_START]
        for start, length in ((plan.a_start, plan.a_length), (plan.b_start, plan.b_length)):
            segment = shard.flags[start[0] : start[0] + length[0]].tolist()
            if segment:
                cut_off += bool(segment[0] & ENTITY_INSIDE)
                segment[0] = WORD_START | ENTITY_START * bool(segment[0] & IN_ENTITY)
                flags += [*segment, WORD_START]
        maskable = [not SPECIAL[token] for token in text]
        keys = derive(derive(plan.keys, MASKS), np.arange(len(text)))
        budget = min(max(1, math.floor(0.15 * sum(maskable) + 0.5)), sum(maskable))
        expected = slow_masks(options, flags, maskable, keys, budget)
        assert example["masked"] == sorted(expected)
        shown = [example["ids"][place] for place in example["masked"]]
        assert shown == slow_fill(text, expected, keys, options)
    assert cut_off > 2 or options.masking != "entity"


def test_a_sequence_of_specials_has_no_mask():
    shard = shard_of([[3], [3]], [UNKNOWN, 50, UNKNOWN, UNKNOWN, 50, 50])
    examples = planned_examples(shard, Task("random", 16, 1, 0.15, 0))
    assert [len(example["masked"]) for example in examples] == [0, 0]


def test_masks_are_repeatable_and_differ_between_epochs():
    """Without pairs, short documents make the same sequences in every epoch, not the same masks."""
    shard, task = make_shard(60, 2, 12), Task(None, 64, 4, 0.3, 0)
    shown = []
    for epoch in (0, 0, 1):
        examples = planned_examples(shard, task, Masking(mask_rate=(0.3,)), epoch)
        shown.append({tuple(example["text"]): example for example in examples})
    masks = [{text: example["masked"] for text, example in epoch.items()} for epoch in shown]
    assert masks[0] == masks[1]
    assert all(shown[0][text]["ids"] == shown[1][text]["ids"] for text in shown[0])
    common = [text for text in masks[0].keys() & masks[2].keys() if len(masks[0][text]) > 2]
    assert len(common) > 15
    assert sum(masks[0][text] == masks[2][text] for text in common) < len(common) / 4


@pytest.mark.parametrize("pairs", ["random", "swapped"])
def test_masks_are_independent_of_other_draws(pairs):
    """Masks, labels, order and segments come from one key: an example whose place 4 is masked must
    be swapped, first or long no more often than any other."""
    examples = planned_examples(make_shard(400, 60, specials=False), Task(pairs, 64, 4, 0.15, 0))
    examples = [each for each in examples if each["pair"] != IGNORED and len(each["text"]) > 30]
    for place in range(1, 9):
        can = [each for each in examples if not SPECIAL[each["text"][place]]]
        is_masked = np.array([place in each["masked"] for each in can])
        assert is_masked.sum() > 100
        drawn = {"order": np.arange(len(can), dtype=float)}
        for name in ("label", "a_start", "a_length", "b_start"):
            drawn[name] = np.array([getattr(each["plan"], name)[0] for each in can], float)
        for name, values in drawn.items():
            difference = abs(values[is_masked].mean() - values.mean()) / values.std()
            assert difference < 5 / math.sqrt(is_masked.sum()), (place, name, difference)
