"""Plans: segment pairs against BERT's own loop over one document and one sentence at a time, with the same draws; truncation
against popping one token after the other; micro-batches against a greedy loop; and what must hold of every plan: pairs fit,
a random B is of another document, nothing is lost, and neither order nor windows repeat from epoch to epoch."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED
from pretrain.data import planning
from pretrain.data.corpus import Shard
from pretrain.data.draws import derive, integers, key, uniform
from pretrain.data.planning import Plan, Task, make_plan, micro_batch_bounds, plan_pairs, plan_windows, truncate_pairs

ARRAYS = ("a_start", "a_length", "b_start", "b_length", "label", "keys")


def make_shard(documents: list[list[int]]) -> Shard:
    """A shard whose documents have sentences of these lengths; token t has the id t."""
    sentences = np.cumsum([0] + [length for document in documents for length in document]).astype(np.int64)
    return Shard(np.arange(sentences[-1], dtype=np.uint32), np.zeros(sentences[-1], np.uint8), sentences,
                 np.cumsum([0] + [len(document) for document in documents]).astype(np.int64),
                 np.arange(len(documents), dtype=np.uint64))


def random_documents(count: int, sentences: int, longest: int, seed: int = 3) -> list[list[int]]:
    source = np.random.default_rng(seed)
    return [source.integers(1, longest + 1, source.integers(1, sentences + 1)).tolist() for _ in range(count)]


def task(objective: str = "mlm+nsp", max_length: int = 32, micro_batch_size: int = 4, mask_rate: float = 0.15, seed: int = 0,
         counted_length: int | None = None) -> Task:
    return Task(objective, max_length, micro_batch_size, mask_rate, seed, counted_length)


def everything(shard: Shard) -> np.ndarray:
    return np.arange(len(shard.hashes))


def document_of(shard: Shard, tokens: np.ndarray) -> np.ndarray:
    """int64: the document that each of `tokens`, places in the shard, lies in."""
    return np.searchsorted(shard.sentences[shard.documents], tokens, side="right") - 1


def same(one: Plan, other: Plan) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def uncut(*arguments):
    """In place of truncate_pairs: the pairs as they are."""
    return arguments[:4]


# ---------------------------------------------------------------- pairs, slowly

def slow_edges(shard: Shard, max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """(sentences, document of each): sentences as lists of tokens; one above max_tokens in pieces of half of it."""
    pieces, owners = [], []
    for document in range(len(shard.hashes)):
        for sentence in range(shard.documents[document], shard.documents[document + 1]):
            tokens = list(range(shard.sentences[sentence], shard.sentences[sentence + 1]))
            cuts = [0, len(tokens)]
            if len(tokens) > max_tokens:
                cuts[1:1] = [number * max_tokens // 2 for number in range(1, math.ceil(2 * len(tokens) / max_tokens))]
            pieces += [tokens[cut: next_cut] for cut, next_cut in zip(cuts, cuts[1:])]
            owners += [document] * (len(cuts) - 1)
    return pieces, owners


def slow_lanes(pieces: list[list[int]], places: list[int], lane_tokens: int) -> list[list[int]]:
    """`places` of one document, in lanes: a lane begins with the first sentence at or after each multiple of lane_tokens."""
    lanes, filled = [[]], 0
    for place in places:
        if filled >= len(lanes) * lane_tokens:
            lanes += [[] for _ in range(filled // lane_tokens - len(lanes) + 1)]
        lanes[-1].append(place)
        filled += len(pieces[place])
    return [lane for lane in lanes if lane]


def slow_truncate(a: list[int], b: list[int], max_tokens: int, draw: np.uint64) -> None:
    """truncate_seq_pair of BERT, but that each side loses its tokens at one end only, drawn once."""
    coins = int(derive(draw, np.uint64(3)))
    while len(a) + len(b) > max_tokens:
        side, at_front = (a, coins & 1) if len(a) > len(b) else (b, coins & 2)
        if at_front:
            del side[0]
        else:
            side.pop()


def slow_pairs(shard: Shard, documents: np.ndarray, task: Task, plan_key: np.uint64) -> list[tuple]:
    """create_instances_from_document of BERT's create_pretraining_data.py, for each document, with the draws of the plan."""
    pieces, owners = slow_edges(shard, task.max_tokens)
    places = [[place for place, owner in enumerate(owners) if owner == document] for document in documents]
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
                a_end = 1 if len(chunk) == 1 else 1 + int(integers(derive(draw, np.uint64(2)), len(chunk) - 1))
                a = [token for sentence in chunk[:a_end] for token in sentence]
                b, label = [], IGNORED
                may_be_random = task.objective == "mlm+nsp" and len(documents) > 1
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
                if task.objective == "mlm+sop" and label == 0 and uniform(derive(draw, np.uint64(4))) < 0.5:
                    a, b, label = b, a, 1
                rows.append((int(draw), a, b, label))
                step += 1
    return rows


def assert_equal_to_slow(shard: Shard, documents: np.ndarray, task: Task, plan_key: np.uint64) -> None:
    plan, rows = plan_pairs(shard, documents, task, plan_key), slow_pairs(shard, documents, task, plan_key)
    assert len(plan.keys) == len(rows)
    found = {}
    for draw, a_start, a_length, b_start, b_length, label in zip(
            *(getattr(plan, name).tolist() for name in ("keys", "a_start", "a_length", "b_start", "b_length", "label"))):
        found[draw] = (list(range(a_start, a_start + a_length)), list(range(b_start, b_start + b_length)), label)
    assert len(found) == len(rows)  # every example has a key of its own
    assert found == {draw: (a, b, label) for draw, a, b, label in rows}


LENGTHS = st.integers(1, 12) | st.sampled_from([1, 2, 20, 50])
SHARDS = st.lists(st.lists(LENGTHS, min_size=1, max_size=12), min_size=1, max_size=5).map(make_shard)
PAIR_TASKS = st.builds(task, objective=st.sampled_from(["mlm+nsp", "mlm+sop"]), max_length=st.integers(8, 40))


@settings(max_examples=150, deadline=None)
@given(shard=SHARDS, task=PAIR_TASKS, seed=st.integers(0, 2**64 - 1), lane_sequences=st.sampled_from([1, 2, 128]), data=st.data())
def test_pairs_are_those_of_the_slow_loop(shard, task, seed, lane_sequences, data):
    chosen = data.draw(st.lists(st.sampled_from(range(len(shard.hashes))), min_size=1, unique=True).map(sorted))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "LANE_SEQUENCES", lane_sequences)
        assert_equal_to_slow(shard, np.array(chosen), task, key(seed))


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
@pytest.mark.parametrize("max_length", [32, 128])
def test_pairs_of_a_larger_shard_are_those_of_the_slow_loop(objective, max_length):
    shard = make_shard(random_documents(60, 40, 60))
    assert_equal_to_slow(shard, np.flatnonzero(np.arange(60) % 3), task(objective, max_length), key(5))


# ---------------------------------------------------------------- pairs, what must hold

@settings(max_examples=60, deadline=None)
@given(shard=SHARDS, task=PAIR_TASKS, seed=st.integers(0, 1000), data=st.data())
def test_every_pair_fits_and_is_what_its_label_says(shard, task, seed, data):
    chosen = np.array(data.draw(st.lists(st.sampled_from(range(len(shard.hashes))), min_size=1, unique=True).map(sorted)))
    plan = plan_pairs(shard, chosen, task, key(seed))
    a_first, a_last = document_of(shard, plan.a_start), document_of(shard, plan.a_start + plan.a_length - 1)
    assert (plan.a_length >= 1).all() and (plan.a_length + plan.b_length <= task.max_tokens).all()
    assert (a_first == a_last).all() and np.isin(a_first, chosen).all()
    pairs = plan.b_length > 0
    assert (pairs == (plan.label != IGNORED)).all() and np.isin(plan.label, (0, 1, IGNORED)).all()
    plan, a_first = plan.take(pairs), a_first[pairs]
    b_first, b_last = document_of(shard, plan.b_start), document_of(shard, plan.b_start + plan.b_length - 1)
    assert (b_first == b_last).all() and np.isin(b_first, chosen).all()
    if task.objective == "mlm+nsp":
        assert ((b_first != a_first) == (plan.label == 1)).all()
    else:
        assert (b_first == a_first).all()
    in_order = plan.b_start >= plan.a_start + plan.a_length
    if task.objective == "mlm+sop":
        assert (in_order == (plan.label == 0)).all()
    else:
        assert in_order[plan.label == 0].all()


@settings(max_examples=60, deadline=None)
@given(shard=SHARDS, task=PAIR_TASKS, seed=st.integers(0, 1000), lane_sequences=st.sampled_from([1, 128]))
def test_before_truncation_no_token_is_lost(shard, task, seed, lane_sequences):
    """A, and B where it is no stranger, tile every document in order; a true B begins where A ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "truncate_pairs", uncut)
        patch.setattr(planning, "LANE_SEQUENCES", lane_sequences)
        plan = plan_pairs(shard, everything(shard), task, key(seed))
    own = plan.label != 1 if task.objective == "mlm+nsp" else np.ones(len(plan.label), bool)
    swapped = (plan.label == 1) & own
    first = np.where(swapped, plan.b_start, plan.a_start)
    length = plan.a_length + np.where(own, plan.b_length, 0)
    joint = np.where(swapped, plan.b_start + plan.b_length == plan.a_start, plan.a_start + plan.a_length == plan.b_start)
    assert joint[own & (plan.b_length > 0)].all()
    order = np.argsort(first)
    assert np.array_equal(first[order], np.cumsum(np.append(0, length[order]))[:-1]) and length.sum() == len(shard.ids)


def test_where_nothing_is_truncated_no_token_is_lost():
    """Sentences of one token reach every target exactly."""
    shard = make_shard([[1] * 300, [1] * 7, [1] * 41])
    plan = plan_pairs(shard, everything(shard), task(), key(1))
    seen = np.zeros(len(shard.ids), int)
    own_b = plan.take(plan.label == 0)
    for token, count in [*zip(plan.a_start, plan.a_length), *zip(own_b.b_start, own_b.b_length)]:
        seen[token: token + count] += 1
    assert (seen == 1).all()


def test_a_true_next_follows_directly_unless_it_was_cut():
    shard = make_shard(random_documents(200, 20, 9))
    plan = plan_pairs(shard, everything(shard), task(max_length=64), key(1))
    whole = plan.take((plan.label == 0) & (plan.a_length + plan.b_length < 61))
    assert len(whole.keys) > 100 and np.array_equal(whole.a_start + whole.a_length, whole.b_start)


@pytest.mark.parametrize("max_length", [8, 16, 23])
def test_a_long_sentence_is_planned_in_pieces(max_length):
    """No piece is above half of the target, so that two make a pair, and none is cut away before truncation."""
    shard, half = make_shard([[100], [3, 250, 4], [2, 2]]), (max_length - 3 + 1) // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "truncate_pairs", uncut)
        plans = [plan_pairs(shard, everything(shard), task("mlm+sop", max_length), key(seed)) for seed in range(30)]
    starts = sorted({start for plan in plans for start in plan.a_start.tolist() + plan.b_start[plan.b_length > 0].tolist()})
    for begin, end in ((0, 100), (103, 353)):
        inside = [start for start in starts if begin <= start < end] + [end]
        assert inside[0] == begin and max(np.diff(inside)) <= half
    covered = np.zeros(len(shard.ids), int)
    for token, count in [*zip(plans[0].a_start, plans[0].a_length), *zip(plans[0].b_start, plans[0].b_length)]:
        covered[token: token + count] += 1
    assert (covered == 1).all()


def test_half_of_the_pairs_of_long_documents_are_random():
    shard = make_shard(random_documents(60, 600, 8))
    plan = plan_pairs(shard, everything(shard), task(max_length=64), key(2))
    assert len(plan.label) > 1000
    # 5 standard errors; a short target may leave a chunk of one sentence, whose B is always random
    assert abs((plan.label == 1).mean() - 0.5) < 2.5 / math.sqrt(len(plan.label)) + 0.03
    assert (plan.label != IGNORED).all()


def test_half_of_the_orders_are_swapped():
    shard = make_shard(random_documents(60, 600, 8))
    plan = plan_pairs(shard, everything(shard), task("mlm+sop", 64), key(2))
    assert abs((plan.label[plan.label != IGNORED] == 1).mean() - 0.5) < 2.5 / math.sqrt((plan.label != IGNORED).sum())


def test_a_tenth_of_the_targets_are_short():
    shard = make_shard([[1] * 20_000, [1]])
    plan = plan_pairs(shard, everything(shard), task("mlm+sop", 32), key(2))
    short = (plan.a_length + plan.b_length < 29).mean()
    assert abs(short - 0.1 * 27 / 28) < 5 * math.sqrt(0.09 / len(plan.keys))


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop", "mlm"])
def test_each_epoch_has_examples_of_its_own(objective):
    shard = make_shard(random_documents(20, 30, 9))
    plans = [make_plan(shard, everything(shard), task(objective), key(0, epoch)) for epoch in (0, 1)]
    segments = [set(zip(*(getattr(plan, name).tolist() for name in ARRAYS[:4]))) for plan in plans]
    assert len(segments[0] & segments[1]) < 0.4 * len(segments[0])
    assert not set(plans[0].keys.tolist()) & set(plans[1].keys.tolist())
    again = make_plan(shard, everything(shard), task(objective), key(0, 0))
    assert same(again, plans[0]) and again.bounds == plans[0].bounds


def test_one_document_has_no_random_pair():
    shard = make_shard([[5] * 200, [5] * 10])
    plan = plan_pairs(shard, np.array([0]), task(), key(1))
    assert set(plan.label.tolist()) <= {0, IGNORED} and (plan.label == 0).sum() > 10
    assert (plan.a_start < 1000).all() and (plan.b_start[plan.label == 0] < 1000).all()


@pytest.mark.parametrize("objective, label", [("mlm+nsp", 1), ("mlm+sop", IGNORED)])
def test_chunks_of_one_sentence(objective, label):
    """NSP: always a random B, as in BERT. SOP: a sequence without a pair."""
    shard = make_shard([[7]] * 50)
    plan = plan_pairs(shard, everything(shard), task(objective), key(1))
    assert len(plan.label) == 50 and (plan.label == label).all() and ((plan.b_length > 0) == (label == 1)).all()


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop", "mlm"])
def test_a_shard_without_chosen_documents_has_an_empty_plan(objective):
    """All documents of a shard may be held out."""
    plan = make_plan(make_shard([[3, 4], [5]]), np.zeros(0, np.int64), task(objective), key(1))
    assert plan.num_micro_batches == 0 and len(plan.keys) == 0


# ---------------------------------------------------------------- order

@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_labels_do_not_follow_the_order(objective):
    """A plan sorted by the keys, whose bits have decided the labels, would give one label for half an epoch."""
    shard = make_shard(random_documents(400, 80, 9))
    plan = make_plan(shard, everything(shard), task(objective, 64), key(4))
    label = plan.label[plan.label != IGNORED]
    count = len(label)
    assert count > 1000
    assert abs(np.corrcoef(label, np.arange(count))[0, 1]) < 5 / math.sqrt(count)
    share = label.mean()
    runs, expected = 1 + (np.diff(label) != 0).sum(), 1 + 2 * count * share * (1 - share)
    assert abs(runs - expected) < 5 * (expected - 1) / math.sqrt(count)  # Wald and Wolfowitz


def test_the_order_mixes_the_documents():
    shard = make_shard(random_documents(400, 80, 9))
    for objective in ("mlm+nsp", "mlm+sop", "mlm"):
        plan = make_plan(shard, everything(shard), task(objective, 64), key(4))
        bound = 5 / math.sqrt(len(plan.keys))
        assert abs(np.corrcoef(plan.a_start, np.arange(len(plan.keys)))[0, 1]) < bound
        assert abs(np.corrcoef(plan.a_start[1:], plan.a_start[:-1])[0, 1]) < bound


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop", "mlm"])
def test_the_shuffled_plan_is_the_plan(objective):
    shard = make_shard(random_documents(30, 30, 9))
    make = plan_windows if objective == "mlm" else plan_pairs
    plan, shuffled = make(shard, everything(shard), task(objective), key(4)), make_plan(shard, everything(shard), task(objective), key(4))
    assert same(plan.take(np.argsort(plan.keys)), shuffled.take(np.argsort(shuffled.keys))) and not same(plan, shuffled)
    assert shuffled.bounds[0] == 0 and shuffled.bounds[-1] == len(plan.keys)


# ---------------------------------------------------------------- windows

@settings(max_examples=100, deadline=None)
@given(shard=SHARDS, max_length=st.integers(8, 40), seed=st.integers(0, 1000), data=st.data())
def test_windows_cover_each_document_once_and_in_order(shard, max_length, seed, data):
    chosen = np.array(data.draw(st.lists(st.sampled_from(range(len(shard.hashes))), min_size=1, unique=True).map(sorted)))
    plan = plan_windows(shard, chosen, task("mlm", max_length), key(seed))
    expected = []
    for document in chosen.tolist():
        start, end = shard.sentences[shard.documents[document: document + 2]].tolist()
        cut = start + 1 + int(integers(derive(key(seed), np.uint64(document)), max_length - 2))
        while start < end:
            expected.append((start, min(cut, end) - start))
            start, cut = min(cut, end), cut + max_length - 2
    assert list(zip(plan.a_start.tolist(), plan.a_length.tolist())) == expected
    assert not plan.b_length.any() and (plan.label == IGNORED).all() and len(set(plan.keys.tolist())) == len(expected)


def test_the_first_cut_is_drawn_again_each_epoch():
    shard = make_shard([[400]])
    first = [plan_windows(shard, everything(shard), task("mlm", 32), key(0, epoch)).a_length[0] for epoch in range(200)]
    assert min(first) == 1 and max(first) == 30 and len(set(first)) > 25


# ---------------------------------------------------------------- truncation, micro-batches, budget

@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 90), st.integers(0, 2**64 - 1)), min_size=1, max_size=8),
       max_tokens=st.integers(4, 60))
def test_truncation_is_token_by_token(pairs, max_tokens):
    a_length, b_length, keys = (np.array(column, kind) for column, kind in zip(zip(*pairs), (np.int64, np.int64, np.uint64)))
    a_start, b_start = np.arange(len(pairs)) * 100, np.arange(len(pairs)) * 100 + 10_000
    found = truncate_pairs(a_start, a_length, b_start, b_length, max_tokens, keys)
    for row, (a_size, b_size, draw) in enumerate(pairs):
        a = list(range(a_start[row], a_start[row] + a_size))
        b = list(range(b_start[row], b_start[row] + b_size))
        slow_truncate(a, b, max_tokens, np.uint64(draw))
        assert (found[0][row], found[1][row], found[3][row]) == (a[0], len(a), len(b))
        assert not b or found[2][row] == b[0]


def test_both_ends_are_cut():
    ones = np.full(1000, 50)
    a_start, _, b_start, _ = truncate_pairs(0 * ones, ones, 0 * ones, ones, 30, np.arange(1000, dtype=np.uint64) + key(1))
    for start in (a_start, b_start):
        assert set(start.tolist()) == {0, 35} and 420 < (start == 0).sum() < 580
    assert 420 < (a_start == b_start).sum() < 580  # the sides draw apart


TASKS = st.builds(task, objective=st.sampled_from(["mlm+nsp", "mlm+sop", "mlm"]), max_length=st.integers(8, 40),
                  micro_batch_size=st.integers(1, 5), mask_rate=st.sampled_from([0.01, 0.15, 0.4, 0.8]),
                  counted_length=st.none() | st.integers(8, 100)).filter(lambda task: task.token_limit >= task.max_length)


@settings(max_examples=150, deadline=None)
@given(task=TASKS, data=st.data())
def test_micro_batches_are_those_of_a_greedy_loop(task, data):
    sizes = data.draw(st.lists(st.integers(1, task.max_tokens) | st.integers(1, 3) | st.just(task.max_tokens), max_size=60))
    has_b = [task.objective != "mlm" and size > 1 and data.draw(st.booleans()) for size in sizes]
    nothing = np.zeros(len(sizes), np.int64)
    a_length = np.array(sizes, np.int64) - np.array(has_b, np.int64)
    plan = Plan(nothing, a_length, nothing, np.array(has_b, np.int64), nothing, nothing.astype(np.uint64))
    limit = task.micro_batch_size * (task.max_length if task.counted_length is None else task.counted_length)
    expected, tokens, sequences, masked, full = [0], 0, 0, 0, math.ceil(limit / task.max_length)
    for index, (size, pair) in enumerate(zip(sizes, has_b)):
        need = (size + 2 + pair, 1, min(size, max(1, math.floor(task.mask_rate * size + 0.5))))
        assert need[0] <= task.max_length
        if tokens + need[0] > limit or sequences + 1 > 4 * full or masked + need[2] > int(task.mask_rate * limit) + full:
            expected.append(index)
            tokens = sequences = masked = 0
        tokens, sequences, masked = tokens + need[0], sequences + need[1], masked + need[2]
    assert micro_batch_bounds(plan, task) == tuple(expected + [len(sizes)] if sizes else [0])


def test_each_limit_closes_a_micro_batch():
    """Full sequences fill the tokens, tiny ones the sequences, and ones that round up the masks."""
    def bounds(size: int, mask_rate: float) -> tuple[int, ...]:
        nothing = np.zeros(40, np.int64)
        return micro_batch_bounds(Plan(nothing, nothing + size, nothing, nothing, nothing, nothing.astype(np.uint64)),
                                  task("mlm", 32, 4, mask_rate))

    assert set(np.diff(bounds(30, 0.15))) == {4}
    assert set(np.diff(bounds(1, 0.8))) == {16, 8} and set(np.diff(bounds(1, 0.15))) == {16, 8}
    assert set(np.diff(bounds(10, 0.01))) == {5}  # one mask each: int(0.01 x 128) + 4


def test_budget_against_rounding():
    for rate in (0.01, 0.15, 0.3, 0.8):
        found = task(mask_rate=rate).budget(np.arange(600))
        assert found.tolist() == [0] + [max(1, math.floor(rate * count + 0.5)) for count in range(1, 600)]


def test_budget_of_a_rate_below_the_tasks():
    """The rate that is given counts; micro-batches are planned for the task's, within whose limit every lower one stays."""
    counts = np.arange(600)
    for rate in (0.01, 0.15, 0.3, 0.8):
        found = task(mask_rate=0.8).budget(counts, rate)
        assert np.array_equal(found, task(mask_rate=rate).budget(counts)) and found.dtype == np.int64
        assert (found <= task(mask_rate=0.8).budget(counts)).all()
    shard = make_shard(random_documents(100, 30, 9))
    for objective in ("mlm+nsp", "mlm+sop", "mlm"):
        planned = task(objective, 32, 8, 0.4)
        plan = make_plan(shard, everything(shard), planned, key(4))
        masks = planned.budget(plan.a_length + plan.b_length, 0.1)
        assert max(masks[start:end].sum() for start, end in zip(plan.bounds, plan.bounds[1:])) <= planned.masked_limit
        assert masks.sum() < 0.35 * planned.budget(plan.a_length + plan.b_length).sum()
