"""Plans: segment pairs against BERT's own loop over one document and one sentence at a time, with
the same draws; truncation against popping one token after the other; micro-batches against a greedy
loop; shares of labels and lengths; and an order that does not repeat from epoch to epoch."""

import math

import numpy as np
import pytest
from data_reference import PAIRS, everything, plan_of, random_lengths, shard_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED
from pretrain.data import pairs as planning
from pretrain.data.corpus import Shard
from pretrain.data.hash_rng import derive, integers, key, uniform
from pretrain.data.pairs import Plan, Task, make_plan, plan_pairs, plan_windows

SEGMENTS = ("a_start", "a_length", "b_start", "b_length")


def task(pairs="random", max_length=32, micro_batch_size=4, mask_rate=0.15, counted_length=None):
    return Task(pairs, max_length, micro_batch_size, mask_rate, 0, counted_length)


def rows_of(plan: Plan, *more: str) -> list[tuple]:
    """The examples, as (a_start, a_length, b_start, b_length, ...)."""
    return list(zip(*(getattr(plan, name).tolist() for name in (*SEGMENTS, *more))))


# ---------------------------------------------------------------- pairs, slowly


def slow_sentences(shard: Shard, max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """(sentences, document of each), as lists of tokens; one above max_tokens in pieces of half."""
    pieces, owners = [], []
    for document in range(len(shard.hashes)):
        for sentence in range(shard.documents[document], shard.documents[document + 1]):
            tokens = list(range(shard.sentences[sentence], shard.sentences[sentence + 1]))
            cuts = [0, len(tokens)]
            if len(tokens) > max_tokens:
                count = math.ceil(2 * len(tokens) / max_tokens)
                cuts[1:1] = [number * max_tokens // 2 for number in range(1, count)]
            pieces += [tokens[cut:next_cut] for cut, next_cut in zip(cuts, cuts[1:])]
            owners += [document] * (len(cuts) - 1)
    return pieces, owners


def slow_lanes(pieces: list[list[int]], places: list[int], lane_tokens: int) -> list[list[int]]:
    """`places` of one document, in lanes: each begins with the first sentence at or after a
    multiple of lane_tokens."""
    lanes, filled = [[]], 0
    for place in places:
        if filled >= len(lanes) * lane_tokens:
            lanes += [[] for _ in range(filled // lane_tokens - len(lanes) + 1)]
        lanes[-1].append(place)
        filled += len(pieces[place])
    return [lane for lane in lanes if lane]


def slow_truncate(a: list[int], b: list[int], max_tokens: int, draw: np.uint64) -> None:
    """BERT's truncate_seq_pair, but each side is cut only at one end, drawn once."""
    coins = int(derive(draw, np.uint64(3)))
    while len(a) + len(b) > max_tokens:
        side, at_front = (a, coins & 1) if len(a) > len(b) else (b, coins & 2)
        if at_front:
            del side[0]
        else:
            side.pop()


def slow_pairs(shard: Shard, documents: np.ndarray, task: Task, plan_key: np.uint64) -> list[tuple]:
    """create_instances_from_document of BERT's create_pretraining_data.py, for each document, with
    the draws of the plan."""
    pieces, owners = slow_sentences(shard, task.max_tokens)
    places = [
        [place for place, owner in enumerate(owners) if owner == document] for document in documents
    ]
    rows = []
    for index in range(len(documents)):
        for lane in slow_lanes(pieces, places[index], planning.LANE_SEQUENCES * task.max_length):
            lane_key, step, i = derive(plan_key, np.uint64(lane[0])), 0, 0
            while i < len(lane):
                draw = derive(lane_key, np.uint64(step))
                target = task.max_tokens
                if uniform(derive(draw, np.uint64(0))) < 0.1:
                    target = 2 + int(integers(derive(draw, np.uint64(1)), task.max_tokens - 1))
                chunk, length = [], 0
                while i < len(lane) and length < target:
                    chunk.append(pieces[lane[i]])
                    length += len(chunk[-1])
                    i += 1
                a_end = 1
                if len(chunk) > 1:
                    a_end += int(integers(derive(draw, np.uint64(2)), len(chunk) - 1))
                a = [token for sentence in chunk[:a_end] for token in sentence]
                b, label = [], IGNORED
                may_be_random = task.pairs == "random" and len(documents) > 1
                if may_be_random and (len(chunk) == 1 or int(draw) >> 63):
                    label = 1
                    other = int(integers(derive(draw, np.uint64(4)), len(documents) - 1))
                    other += other >= index
                    start = int(integers(derive(draw, np.uint64(5)), len(places[other])))
                    for place in places[other][start:]:
                        b += pieces[place]
                        if len(b) >= target - len(a):
                            break
                    i -= len(chunk) - a_end  # the sentences that a random B displaces go back
                elif len(chunk) > 1:
                    b, label = [token for sentence in chunk[a_end:] for token in sentence], 0
                slow_truncate(a, b, task.max_tokens, draw)
                is_swapped = uniform(derive(draw, np.uint64(4))) < 0.5
                if task.pairs == "swapped" and label == 0 and is_swapped:
                    a, b, label = b, a, 1
                rows.append((int(draw), a, b, label))
                step += 1
    return rows


def assert_equal_to_slow(shard: Shard, documents: np.ndarray, task: Task, seed: int) -> None:
    plan = plan_pairs(shard, documents, task, key(seed))
    rows = slow_pairs(shard, documents, task, key(seed))
    found = {
        draw: (list(range(a, a + a_length)), list(range(b, b + b_length)), label)
        for a, a_length, b, b_length, label, draw in rows_of(plan, "label", "keys")
    }
    assert len(plan.keys) == len(rows) == len(found)  # every example has a key of its own
    assert found == {draw: (a, b, label) for draw, a, b, label in rows}


LENGTHS = st.integers(1, 12) | st.sampled_from([1, 2, 20, 50])
DOCUMENTS = st.lists(st.lists(LENGTHS, min_size=1, max_size=12), min_size=1, max_size=5)
SHARDS = DOCUMENTS.map(shard_of)
PAIR_TASKS = st.builds(
    task, pairs=st.sampled_from(["random", "swapped"]), max_length=st.integers(8, 40)
)


def some_documents(data, shard: Shard) -> np.ndarray:
    chosen = st.sets(st.sampled_from(range(len(shard.hashes))), min_size=1)
    return np.array(sorted(data.draw(chosen)))


@settings(max_examples=100, deadline=None)
@given(SHARDS, PAIR_TASKS, st.integers(0, 2**64 - 1), st.sampled_from([1, 2, 128]), st.data())
def test_pairs_equal_the_slow_loop(shard, task, seed, lane_sequences, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "LANE_SEQUENCES", lane_sequences)
        assert_equal_to_slow(shard, some_documents(data, shard), task, seed)


@pytest.mark.parametrize("pairs", ["random", "swapped"])
def test_pairs_of_a_larger_shard_equal_the_slow_loop(pairs):
    shard = shard_of(random_lengths(60, 40, 60))
    assert_equal_to_slow(shard, np.flatnonzero(np.arange(60) % 3), task(pairs, 128), 5)


# ---------------------------------------------------------------- pairs, properties


@pytest.mark.parametrize("pairs, slack", [("random", 0.03), ("swapped", 0)])
def test_half_of_the_pairs_of_long_documents_have_label_1(pairs, slack):
    """Within 5 standard errors. A short target may leave one sentence, whose B is always random."""
    shard = shard_of(random_lengths(60, 600, 8))
    labels = plan_pairs(shard, everything(shard), task(pairs, 64), key(2)).label
    labels = labels[labels != IGNORED]
    assert len(labels) > 1000
    assert abs((labels == 1).mean() - 0.5) < 2.5 / math.sqrt(len(labels)) + slack


def test_a_tenth_of_the_targets_are_short():
    shard = shard_of([[1] * 20_000, [1]])
    plan = plan_pairs(shard, everything(shard), task("swapped"), key(2))
    short = (plan.a_length + plan.b_length < 29).mean()
    assert abs(short - 0.1 * 27 / 28) < 5 * math.sqrt(0.09 / len(plan.keys))


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_shard_without_chosen_documents_has_an_empty_plan(pairs):
    """All documents of a shard may be in the validation set."""
    plan = make_plan(shard_of([[3, 4], [5]]), np.zeros(0, np.int64), task(pairs), key(1))
    assert plan.num_micro_batches == 0 and len(plan.keys) == 0


@pytest.mark.parametrize("pairs", PAIRS)
def test_each_epoch_has_different_examples(pairs):
    shard = shard_of(random_lengths(20, 30, 9))
    first, second, again = (plan_of(shard, task(pairs), epoch) for epoch in (0, 1, 0))
    segments = set(rows_of(first))
    assert len(segments & set(rows_of(second))) < 0.4 * len(segments)
    assert not set(first.keys.tolist()) & set(second.keys.tolist())
    assert rows_of(again, "label", "keys") == rows_of(first, "label", "keys")
    assert again.bounds == first.bounds


@pytest.mark.parametrize("pairs", PAIRS)
def test_the_plan_is_shuffled(pairs):
    """The examples of `plan_pairs` in another order, in which documents do not follow one another.
    Nor do labels: sorted by the keys, whose bits have decided them, all 0 would come first."""
    shard = shard_of(random_lengths(400, 80, 9))
    make = plan_pairs if pairs else plan_windows
    in_order = make(shard, everything(shard), task(pairs, 64), key(0, 4))
    plan = plan_of(shard, task(pairs, 64), epoch=4)
    rows = rows_of(plan, "label", "keys")
    assert sorted(rows) == sorted(rows_of(in_order, "label", "keys"))
    assert plan.bounds[0] == 0 and plan.bounds[-1] == len(rows)
    numbers, bound = np.arange(len(rows)), 5 / math.sqrt(len(rows))
    assert abs(np.corrcoef(plan.a_start, numbers)[0, 1]) < bound
    assert abs(np.corrcoef(plan.a_start[1:], plan.a_start[:-1])[0, 1]) < bound
    if pairs:
        label = plan.label[plan.label != IGNORED]
        count, share = len(label), label.mean()
        assert count > 1000
        assert abs(np.corrcoef(label, np.arange(count))[0, 1]) < 5 / math.sqrt(count)
        runs, expected = 1 + (np.diff(label) != 0).sum(), 1 + 2 * count * share * (1 - share)
        assert abs(runs - expected) < 5 * (expected - 1) / math.sqrt(count)  # Wald and Wolfowitz


# ---------------------------------------------------------------- windows


@settings(max_examples=60, deadline=None)
@given(SHARDS, st.integers(8, 40), st.integers(0, 1000), st.data())
def test_windows_cover_each_document_once_and_in_order(shard, max_length, seed, data):
    chosen = some_documents(data, shard)
    plan = plan_windows(shard, chosen, task(None, max_length), key(seed))
    expected = []
    for document in chosen.tolist():
        start, end = shard.sentences[shard.documents[document : document + 2]].tolist()
        cut = start + 1 + int(integers(derive(key(seed), np.uint64(document)), max_length - 2))
        while start < end:
            expected.append((start, min(cut, end) - start, 0, 0))
            start, cut = min(cut, end), cut + max_length - 2
    found = rows_of(plan)
    assert [(start, length, 0, b_length) for start, length, _, b_length in found] == expected
    assert (plan.label == IGNORED).all() and len(set(plan.keys.tolist())) == len(expected)


# ---------------------------------------------------------------- truncation


def plan_with(a_length, b_length, keys) -> Plan:
    """Examples whose A starts at token 0, and B at token 10,000."""
    a_length, b_length = np.array(a_length, np.int64), np.array(b_length, np.int64)
    zeros = np.zeros(len(a_length), np.int64)
    return Plan(zeros, a_length, zeros + 10_000, b_length, zeros, np.array(keys, np.uint64))


SIZES = st.tuples(st.integers(1, 90), st.integers(0, 90), st.integers(0, 2**64 - 1))


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(SIZES, min_size=1, max_size=8), max_tokens=st.integers(4, 60))
def test_truncation_is_token_by_token(pairs, max_tokens):
    found = rows_of(planning.truncate(plan_with(*zip(*pairs)), max_tokens))
    for (a_start, a_length, b_start, b_length), (a_size, b_size, draw) in zip(found, pairs):
        a, b = list(range(a_size)), list(range(10_000, 10_000 + b_size))
        slow_truncate(a, b, max_tokens, np.uint64(draw))
        assert list(range(a_start, a_start + a_length)) == a
        assert list(range(b_start, b_start + b_length)) == b


# ---------------------------------------------------------------- micro-batches

TASKS = st.builds(
    task,
    pairs=st.sampled_from(PAIRS),
    max_length=st.integers(8, 40),
    micro_batch_size=st.integers(1, 5),
    mask_rate=st.sampled_from([0.01, 0.15, 0.4, 0.8]),
    counted_length=st.none() | st.integers(8, 100),
).filter(lambda task: task.token_limit >= task.max_length)


@settings(max_examples=100, deadline=None)
@given(task=TASKS, data=st.data())
def test_micro_batches_equal_a_greedy_loop(task, data):
    size = st.integers(1, task.max_tokens) | st.integers(1, 3) | st.just(task.max_tokens)
    sizes = data.draw(st.lists(size, max_size=60))
    has_b = [bool(task.pairs) and size > 1 and data.draw(st.booleans()) for size in sizes]
    plan = plan_with([size - pair for size, pair in zip(sizes, has_b)], has_b, [0] * len(sizes))
    limit = task.micro_batch_size * (task.counted_length or task.max_length)
    full = math.ceil(limit / task.max_length)
    limits = (limit, 4 * full, int(task.mask_rate * limit) + full)
    expected, used = [0], (0, 0, 0)
    for index, (size, pair) in enumerate(zip(sizes, has_b)):
        need = (size + 2 + pair, 1, min(size, max(1, math.floor(task.mask_rate * size + 0.5))))
        assert need[0] <= task.max_length
        filled = tuple(map(sum, zip(used, need)))
        if any(one > other for one, other in zip(filled, limits)):
            expected.append(index)
            filled = need
        used = filled
    expected += [len(sizes)] if sizes else []
    assert planning.micro_batch_bounds(plan, task) == tuple(expected)
