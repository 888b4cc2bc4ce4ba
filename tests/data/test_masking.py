"""Masks: the vectorised choice of units against the greedy loop of its docstring; units of words against a loop over tokens; the
shares of 80/10/10; what is never masked or drawn; budgets; and that an example's masks are the same when asked again,
others in each epoch, and tell nothing about its label, its place in the epoch or its segments."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED
from pretrain.data.collate import Collator, Examples
from pretrain.data.corpus import WORD_START, Shard
from pretrain.data.draws import derive, key
from pretrain.data.masking import choose, replace, unit_starts
from pretrain.data.planning import Task, make_plan
from pretrain.data.tokenizer import Vocabulary

PAD, UNKNOWN, CLS, SEP, MASK = range(5)
SIZE = 60  # of the vocabulary; ids from 40 on are "##" pieces, and id 50 is a special token amid the others


def make_vocabulary() -> Vocabulary:
    is_special = np.isin(np.arange(SIZE), [PAD, UNKNOWN, CLS, SEP, MASK, 50])
    return Vocabulary(SIZE, PAD, CLS, SEP, MASK, UNKNOWN, is_special, np.arange(SIZE) < 40,
                      np.flatnonzero(~is_special).astype(np.uint32), "0" * 16)


VOCABULARY = make_vocabulary()


def make_shard(documents: int = 80, sentences: int = 40, longest: int = 12, specials: bool = True) -> Shard:
    source = np.random.default_rng(1)
    counts = source.integers(1, sentences + 1, documents)
    lengths = source.integers(1, longest + 1, counts.sum())
    ids = source.choice([1, 50, *range(5, 50), *range(51, 60)] if specials else range(5, 50), lengths.sum()).astype(np.uint16)
    return Shard(ids, VOCABULARY.starts_word[ids] * np.uint8(WORD_START), np.cumsum([0, *lengths]), np.cumsum([0, *counts]),
                 np.arange(documents, dtype=np.uint64))


def masked_examples(shard: Shard, task: Task, masking: str = "token", epoch: int = 0, split=(0.8, 0.1, 0.1)) -> list[dict]:
    """Every example of an epoch in the plan's order: its plan, text, masked places (from its [CLS] on) and what stands there."""
    plan = make_plan(shard, np.arange(len(shard.hashes)), task, key(0, epoch))
    batch = Collator(task, VOCABULARY, masking, list(split))(Examples(shard, plan))  # all in one
    ids, masked = batch.input_ids.numpy().copy(), batch.masked_positions.numpy()
    replaced = ids[masked]
    ids[masked] = batch.masked_lm_labels.numpy()
    offsets = batch.cu_seqlens.numpy()
    cuts = np.searchsorted(masked, offsets)
    return [{"key": int(plan.keys[n]), "label": int(plan.label[n]), "plan": plan.take(slice(n, n + 1)), "text": ids[start:end],
             "masked": masked[cuts[n]:cuts[n + 1]] - start, "replaced": replaced[cuts[n]:cuts[n + 1]]}
            for n, (start, end) in enumerate(zip(offsets, offsets[1:]))]


# ---------------------------------------------------------------- the choice of units

def slow_choose(units: list[tuple[int, list[int]]], budget: int) -> set[int]:
    """The docstring of `choose` for one sequence: units as (key, tokens)."""
    taken: set[int] = set()
    left = budget
    for _, tokens in sorted(units, key=lambda unit: unit[0]):  # stable: ties in the order of the text
        if len(tokens) <= left:
            taken.update(tokens)
            left -= len(tokens)
    if not taken and units and budget > 0:
        smallest = min(len(tokens) for _, tokens in units)
        taken.update(next(tokens for _, tokens in sorted(units, key=lambda unit: unit[0]) if len(tokens) == smallest))
    return taken


UNIT = st.tuples(st.integers(0, 5), st.integers(0, 6) | st.integers(0, 2**40 - 1), st.integers(0, 2))  # size, key, specials after it
SEQUENCE = st.tuples(st.integers(0, 2), st.lists(UNIT, max_size=8), st.integers(0, 20))  # specials at first, units, budget


@settings(max_examples=300, deadline=None)
@given(sequences=st.lists(SEQUENCE, min_size=1, max_size=5), low_bits=st.integers(0, 2**24 - 1))
def test_choice_is_that_of_the_greedy_loop(sequences, low_bits):
    starts, maskable, sequence, keys, expected = [], [], [], [], set()
    for number, (specials, units, budget) in enumerate(sequences):
        rows, tokens_of = [(False, False, 0)] * specials, []
        for size, unit_key, gap in units:
            first = len(starts) + len(rows)
            rows += [(place == 0, True, unit_key << 24) for place in range(size)] + [(False, False, 0)] * gap
            if size:
                tokens_of.append((unit_key, list(range(first, first + size))))
        for start, can, draw in rows:
            starts.append(start)
            maskable.append(can)
            keys.append(draw | low_bits)
            sequence.append(number)
        expected |= slow_choose(tokens_of, budget)
    found = choose(np.array(starts, bool), np.array(maskable, bool), np.array(sequence, np.int64), np.array(keys, np.uint64),
                   np.array([budget for _, _, budget in sequences], np.int64))
    assert set(np.flatnonzero(found).tolist()) == expected


def test_choice_by_hand():
    """Keys 0 to 4 for units of 2, 3, 1, 2, 1 tokens; the budget of 4 takes the first, passes the second, takes the third and
    the last."""
    sizes = [2, 3, 1, 2, 1]
    starts = np.concatenate([[True] + [False] * (size - 1) for size in sizes])
    keys = (np.repeat(np.arange(5), sizes) << 24).astype(np.uint64)
    found = choose(starts, np.ones(9, bool), np.zeros(9, np.int64), keys, np.array([4]))
    assert np.flatnonzero(found).tolist() == [0, 1, 5, 8]
    # A budget of one token, and no unit so small: the smallest is taken, of two the one with the lower key.
    found = choose(starts[:5], np.ones(5, bool), np.zeros(5, np.int64), keys[:5][::-1].copy(), np.array([1]))
    assert np.flatnonzero(found).tolist() == [0, 1]


@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_units_against_a_loop(tokens):
    flags = np.array([int(start) for start, _ in tokens], np.uint8) * np.uint8(WORD_START)
    maskable = np.array([can for _, can in tokens], bool)
    expected, before = [], False
    for start, can in tokens:
        expected.append(can and (start or not before))
        before = can
    if tokens:
        assert unit_starts("word", flags, maskable).tolist() == expected
        assert unit_starts("token", flags, maskable).tolist() == maskable.tolist()


def test_choice_is_uniform_over_tokens():
    """Every place is as probable as every other."""
    num, size, budget = 6000, 20, 3
    sequence = np.repeat(np.arange(num), size)
    ones = np.ones(num * size, bool)
    found = choose(ones, ones, sequence, derive(key(9), np.arange(num * size)), np.full(num, budget)).reshape(num, size)
    assert (found.sum(1) == budget).all()
    assert np.abs(found.mean(0) - 0.15).max() < 5 * math.sqrt(0.15 * 0.85 / num)


# ---------------------------------------------------------------- replacements

def test_shares_of_replacements():
    keys = derive(key(3), np.arange(60_000))
    ids = np.full(60_000, 7)
    found = replace(ids, keys, [0.8, 0.1, 0.1], VOCABULARY)
    ordinary = len(VOCABULARY.ordinary_ids)
    for share, expected in (((found == MASK).mean(), 0.8), ((found == 7).mean(), 0.1 + 0.1 / ordinary),
                            (((found != MASK) & (found != 7)).mean(), 0.1 - 0.1 / ordinary)):
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 60_000)
    assert found.dtype == np.int64


@pytest.mark.parametrize("split", [[0.0, 1.0, 0.0], [0.8, 0.1, 0.1]])
def test_random_ids_are_ordinary_and_uniform(split):
    """Also where only a tenth is drawn: which ones are drawn must not say what is drawn."""
    ids = np.zeros(60_000, np.int64)  # [PAD]: never drawn, so that what is drawn can be told from what stays
    found = replace(ids, derive(key(3), np.arange(60_000)), split, VOCABULARY)
    counts = np.bincount(found[(found != PAD) & (found != MASK)], minlength=SIZE)
    assert not counts[VOCABULARY.is_special].any()
    expected = 60_000 * split[1] / len(VOCABULARY.ordinary_ids)
    assert np.abs(counts[VOCABULARY.ordinary_ids] - expected).max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("split, check", [([1.0, 0.0, 0.0], lambda ids, found: (found == MASK).all()),
                                          ([0.0, 0.0, 1.0], lambda ids, found: (found == ids).all())])
def test_one_kind_of_replacement(split, check):
    ids = np.random.default_rng(0).choice(VOCABULARY.ordinary_ids, 5000).astype(np.int64)
    assert check(ids, replace(ids, derive(key(3), np.arange(5000)), split, VOCABULARY))


# ---------------------------------------------------------------- masks of examples

def words_of(text: np.ndarray) -> list[list[int]]:
    """Places of the words of a sequence: maximal runs of ordinary tokens, cut before each that begins a word."""
    words: list[list[int]] = []
    before = False
    for place, token in enumerate(text.tolist()):
        if not VOCABULARY.is_special[token]:
            if VOCABULARY.starts_word[token] or not before:
                words.append([])
            words[-1].append(place)
        before = not VOCABULARY.is_special[token]
    return words


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
@pytest.mark.parametrize("masking", ["token", "word"])
def test_masks_of_examples(objective, masking):
    """Whole units, no special token, and the budget; below it only where no unit is left that fits."""
    task = Task(objective, 48, 4, 0.15, 0)
    examples = masked_examples(make_shard(), task, masking)
    assert len(examples) > 200
    multiple = 0
    for example in examples:
        text, masked = example["text"], set(example["masked"].tolist())
        assert not VOCABULARY.is_special[text[example["masked"]]].any()
        units = words_of(text) if masking == "word" else [[place] for word in words_of(text) for place in word]
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
    assert (multiple > 100) == (masking == "word")


def test_a_sequence_of_one_long_word_is_masked_whole():
    ids = np.array([5, 41, 42, 43, 44, 45, 6, 46, 47, 48, 49, 51, 52], np.uint16)  # two words, six and seven tokens
    shard = Shard(ids, VOCABULARY.starts_word[ids] * np.uint8(WORD_START), np.array([0, 13]), np.array([0, 1]), np.zeros(1, np.uint64))
    for epoch in range(20):
        for example in masked_examples(shard, Task("mlm", 32, 1, 0.15, 0), "word", epoch):
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
              for example in masked_examples(shard, task, "token", epoch)} for epoch in (0, 0, 1)]
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
