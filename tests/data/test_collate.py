"""Collating: the packed batch against examples built one by one (for its flags see the masks of
examples in test_masking.py); a rate that changes only masks; and filling to fixed shapes, which
changes nothing real."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_reference import (
    CLS,
    PAD,
    PAIRS,
    SEP,
    SPECIAL,
    VOCABULARY,
    contents,
    example_of,
    examples_of,
    make_shard,
    micro_batches,
    pair_labels,
    plan_of,
    replaced,
    restored,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED, Batch
from pretrain.data.collate import Collator
from pretrain.data.corpus import Shard
from pretrain.data.masking import Masking, read_similar
from pretrain.data.pairs import Task

SIMILAR = read_similar(
    [f"{word}\t{5 + word % 17}\t{30 + word % 10}" for word in range(5, 40)],
    lambda text: [int(text)],
)
MASKINGS = {
    "token": Masking(),
    "word": Masking("word"),
    "span": Masking("span"),
    "entity": Masking("entity"),
    "word, similar": Masking("word", similar=SIMILAR),
    "entity, all, similar": Masking(
        "entity", entity_probability=1.0, entity_budget=1.0, similar=SIMILAR
    ),
}
NAMES = st.sampled_from(sorted(MASKINGS))
TASKS = st.builds(
    Task,
    pairs=st.sampled_from(PAIRS),
    max_length=st.integers(8, 48),
    micro_batch_size=st.integers(1, 6),
    mask_rate=st.sampled_from([0.05, 0.15, 0.4, 0.8]),
    seed=st.integers(0, 99),
    counted_length=st.none() | st.integers(8, 120),
).filter(lambda task: task.token_limit >= task.max_length)
SHARDS = st.builds(
    make_shard,
    documents=st.integers(1, 12),
    sentences=st.integers(1, 12),
    longest=st.sampled_from([1, 6, 30]),
    seed=st.integers(0, 99),
)
TASK = Task("random", 32, 4, 0.15, 0)


def collator_of(task: Task, options=Masking(), *filling) -> Collator:
    """Masks at the rate that the task is planned for."""
    return Collator(task, VOCABULARY, replace(options, mask_rate=(task.mask_rate,)), *filling)


def batches_of(shard: Shard, task: Task, options=Masking(), fill=False, **more) -> list[Batch]:
    return micro_batches(shard, plan_of(shard, task), collator_of(task, options, fill), **more)


def budget_of(text: list[int], rate: float) -> int:
    can = sum(not SPECIAL[token] for token in text)
    return min(can, max(1, math.floor(rate * can + 0.5)))


# ---------------------------------------------------------------- packing


@settings(max_examples=40, deadline=None)
@given(shard=SHARDS, task=TASKS, name=NAMES, fill=st.booleans())
def test_batches_against_examples_built_one_by_one(shard, task, name, fill):
    plan, number = plan_of(shard, task), 0
    for batch in batches_of(shard, task, MASKINGS[name], fill):
        assert batch.counts == {
            loss: int((labels != IGNORED).sum()) for loss, labels in batch.labels.items()
        }
        num_tokens = num_masked = shortfall = 0
        for place in range(batch.num_sequences):
            example, row = example_of(batch, place), plan.take(slice(number, number + 1))
            a = shard.ids[row.a_start[0] : row.a_start[0] + row.a_length[0]].tolist()
            b = shard.ids[row.b_start[0] : row.b_start[0] + row.b_length[0]].tolist()
            text = [CLS, *a, SEP, *b, SEP] if b else [CLS, *a, SEP]
            labels = dict(zip(example["masked"], example["labels"]))
            assert list((dict(enumerate(example["ids"])) | labels).values()) == text
            assert example["types"] == [0] * (len(a) + 2) + [1] * (len(text) - len(a) - 2)
            assert example["positions"] == list(range(len(text)))
            assert example["pair"] == row.label[0]
            assert not SPECIAL[example["labels"]].any()
            assert example["masked"] == sorted(set(example["masked"]))
            assert len(text) <= task.max_length == batch.max_length
            budget, masked = budget_of(text, task.mask_rate), len(example["masked"])
            assert masked == budget if name == "token" else (masked > 0) == (budget > 0)
            number, num_tokens = number + 1, num_tokens + len(text)
            num_masked, shortfall = num_masked + masked, shortfall + max(0, budget - masked)
        assert (batch.num_tokens, batch.shortfall) == (num_tokens, shortfall)
        for entry, value in (vars(batch) | batch.labels).items():
            kind = torch.int32 if entry == "cu_seqlens" else torch.int64
            assert not isinstance(value, torch.Tensor) or value.dtype == kind, entry
        assert batch.counts["mlm"] == num_masked
        assert sum(batch.lengths) == len(batch.input_ids) == batch.cu_seqlens[-1]
        assert list(batch.lengths) == batch.cu_seqlens.diff().tolist()
    assert number == len(plan.keys)


# ---------------------------------------------------------------- rates


@settings(max_examples=25, deadline=None)
@given(shard=SHARDS, task=TASKS, name=NAMES, fill=st.booleans(), share=st.floats(0.05, 1))
def test_another_rate_changes_only_masks(shard, task, name, fill, share):
    """Masks equal those of a task with that rate. At a lower rate, masked tokens are a subset, with
    the same replacements."""
    plan, rates = plan_of(shard, task), (task.mask_rate, share * task.mask_rate)
    options = replace(MASKINGS[name], mask_rate=rates)
    collator = Collator(task, VOCABULARY, options, fill)
    high, low = (micro_batches(shard, plan, collator, progress=done) for done in (0.0, 1.0))
    same = batches_of(shard, task, MASKINGS[name], fill)
    assert list(map(contents, same)) == list(map(contents, high))
    rate = options.rate(1.0)
    assert rate == pytest.approx(rates[1])
    collator = collator_of(replace(task, mask_rate=rate), MASKINGS[name])
    for one, other, alone in zip(high, low, micro_batches(shard, plan, collator, plan.bounds)):
        assert restored(one) == restored(other) and other.shortfall == alone.shortfall
        assert examples_of([other]) == examples_of([alone])
        assert masks_removed(one) == masks_removed(other)
        if name == "token":
            assert replaced(other).items() <= replaced(one).items()
            assert not fill or len(one.masked_positions) == len(other.masked_positions)


def masks_removed(batch: Batch) -> dict:
    """The contents that do not depend on masks."""
    decided = {"input_ids", "masked_positions", "labels of mlm", "counts", "shortfall"}
    return {name: part for name, part in contents(batch).items() if name not in decided}


# ---------------------------------------------------------------- filling


@settings(max_examples=40, deadline=None)
@given(SHARDS, TASKS, NAMES, st.booleans(), st.sampled_from([2, 32, 100]))
def test_filling_adds_only_what_is_ignored(shard, task, name, fill, multiple):
    plan = plan_of(shard, task)
    exact = micro_batches(shard, plan, collator_of(task, MASKINGS[name]))
    collator = collator_of(task, MASKINGS[name], fill, multiple)
    filled = micro_batches(shard, plan, collator)
    for real, batch in zip(exact, filled, strict=True):
        for part in ("counts", "num_tokens", "num_sequences", "shortfall", "max_length"):
            assert getattr(real, part) == getattr(batch, part)
        tokens, sequences, masked = len(real.input_ids), real.num_sequences, real.counts["mlm"]
        assert_extended(batch.input_ids, real.input_ids, PAD)
        assert_extended(batch.token_type_ids, real.token_type_ids, 0)
        assert_extended(pair_labels(batch), pair_labels(real), IGNORED)
        assert_extended(batch.labels["mlm"], real.labels["mlm"], IGNORED)
        assert_extended(batch.masked_positions, real.masked_positions, 0)
        assert batch.position_ids.tolist() == [p for size in batch.lengths for p in range(size)]
        assert batch.cu_seqlens.tolist() == np.cumsum([0, *batch.lengths]).tolist()
        assert batch.lengths[:sequences] == real.lengths
        assert max(batch.lengths) <= task.max_length
        covering = [length for length in batch.lengths[sequences:] if length]
        assert len(covering) == math.ceil(sum(covering) / task.max_length)  # as few as can be
        assert not any(batch.lengths[sequences + len(covering) :])
        assert len(batch.token_type_ids) == len(batch.input_ids)
        assert len(batch.masked_positions) == len(batch.labels["mlm"])
        assert len(pair_labels(batch)) == len(batch.lengths)
        # The smallest size serves text whose sequences are full.
        is_tight = len(batch.lengths) < 2 * (sequences + len(covering))
        assert is_tight or not fill or len(batch.lengths) == min(sizes_of(task))
        if not fill:
            assert len(batch.input_ids) - tokens == -tokens % multiple
            assert len(batch.masked_positions) - masked == -masked % (multiple // 2)
    if fill and name == "token":  # others may exceed the budget of a sequence
        filled += micro_batches(shard, plan_of(shard, task, 1), collator)  # of the next epoch
        assert {len(batch.input_ids) for batch in filled} <= {task.token_limit}
        assert len({len(batch.masked_positions) for batch in filled}) <= 1
        assert {len(batch.lengths) for batch in filled} <= sizes_of(task)


def assert_extended(filled: torch.Tensor, real: torch.Tensor, value: int) -> None:
    assert torch.equal(filled[: len(real)], real) and (filled[len(real) :] == value).all()


def sizes_of(task: Task) -> set[int]:
    """The possible numbers of sequences in a filled micro-batch."""
    return {factor * task.slots for factor in (2, 4, 8)}


def test_entities_beyond_the_rate_have_few_sizes():
    """The masks range over hundreds of tokens, the filled sizes over steps of an eighth of the
    limit, in blocks of 64."""
    shard, task = make_shard(200, 30, 20), Task(None, 64, 128, 0.15, 0)
    assert task.masked_limit // 8 // 64 * 64 == 128
    plan = plan_of(shard, task)
    bounds = [*range(0, len(plan.keys), 29), len(plan.keys)]
    batches = batches_of(shard, task, MASKINGS["entity, all, similar"], True)
    batches += batches_of(shard, task, Masking(), True, bounds=bounds)
    counts = [batch.counts["mlm"] for batch in batches]
    assert max(counts) > task.masked_limit + 500 and min(counts) < task.masked_limit - 500
    for batch, count in zip(batches, counts):
        assert len(batch.masked_positions) == 128 * math.ceil(max(count, task.masked_limit) / 128)
