"""Collating: the packed batch and its flags against examples built one by one ([CLS] A [SEP] B [SEP]); the labels put back give the
text; masks that do not depend on what else is in the micro-batch; a rate that changes masks alone; and filling to fixed shapes,
which changes nothing that is real."""
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED, Batch
from pretrain.data.collate import Collator, Examples, pack
from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START, Shard
from pretrain.data.draws import key
from pretrain.data.masking import Masking, read_similar
from pretrain.data.planning import Plan, Task, make_plan
from pretrain.data.tokenizer import Vocabulary

PAD, UNKNOWN, CLS, SEP, MASK = range(5)
SIZE = 200  # of the vocabulary; ids from 150 on are "##" pieces
VOCABULARY = Vocabulary(SIZE, PAD, CLS, SEP, MASK, UNKNOWN, np.arange(SIZE) < 5, np.arange(SIZE) < 150,
                        np.arange(5, SIZE, dtype=np.uint32), "0" * 16)
SIMILAR = read_similar([f"{word}\t{5 + word % 17}\t{30 + word % 13}" for word in range(5, 150)], lambda text: [int(text)])
MASKINGS = {"token": Masking(), "word": Masking("word"), "span": Masking("span"), "entity": Masking("entity"),
            "entity, tokens": Masking("entity", entity_fill="token"), "word, similar": Masking("word", similar=SIMILAR),
            "entity, all, similar": Masking("entity", entity_probability=1.0, entity_budget=1.0, similar=SIMILAR)}


def make_shard(documents: int = 40, sentences: int = 30, longest: int = 12, seed: int = 1) -> Shard:
    source = np.random.default_rng(seed)
    counts = source.integers(1, sentences + 1, documents)
    lengths = source.integers(1, longest + 1, counts.sum())
    ids = source.choice([UNKNOWN, *range(5, SIZE)], lengths.sum()).astype(np.uint16)
    flags = VOCABULARY.starts_word[ids] * np.uint8(WORD_START)
    entity = source.choice([0, ENTITY_START, ENTITY_INSIDE], len(ids), p=[0.6, 0.2, 0.2]).astype(np.uint8)
    begins = np.append(True, entity[:-1] == 0)
    begins[np.cumsum(lengths)[:-1]] = True
    entity[(entity == ENTITY_INSIDE) & begins] = ENTITY_START
    return Shard(ids, flags | entity, np.cumsum([0, *lengths]), np.cumsum([0, *counts]), np.arange(documents, dtype=np.uint64))


def plan_of(shard: Shard, task: Task) -> Plan:
    return make_plan(shard, np.arange(len(shard.hashes)), task, key(task.seed))


def micro_batches(shard: Shard, plan: Plan, collator: Collator, bounds=None, mask_rate=None) -> list[Batch]:
    bounds = bounds or plan.bounds
    return [collator(Examples(shard, plan.take(slice(start, end)), mask_rate)) for start, end in zip(bounds, bounds[1:])]


def example_of(batch: Batch, number: int) -> dict:
    """What a batch holds of sequence `number`, as lists; masked places from its [CLS] on."""
    start, end = batch.cu_seqlens[number: number + 2].tolist()
    inside = (batch.masked_positions >= start) & (batch.masked_positions < end) & (batch.masked_lm_labels != IGNORED)
    return {"ids": batch.input_ids[start:end].tolist(), "types": batch.token_type_ids[start:end].tolist(),
            "positions": batch.position_ids[start:end].tolist(), "masked": (batch.masked_positions[inside] - start).tolist(),
            "labels": batch.masked_lm_labels[inside].tolist(), "next": batch.next_sentence_label[number].item()}


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in ((getattr(one, entry.name), getattr(other, entry.name)) for entry in fields(Batch)))


TASKS = st.builds(Task, objective=st.sampled_from(["mlm+nsp", "mlm+sop", "mlm"]), max_length=st.integers(8, 48),
                  micro_batch_size=st.integers(1, 6), mask_rate=st.sampled_from([0.05, 0.15, 0.4, 0.8]), seed=st.integers(0, 99),
                  counted_length=st.none() | st.integers(8, 120)).filter(lambda task: task.token_limit >= task.max_length)
SHARDS = st.builds(make_shard, documents=st.integers(1, 12), sentences=st.integers(1, 12), longest=st.sampled_from([1, 6, 30]),
                   seed=st.integers(0, 99))


# ---------------------------------------------------------------- packing

@settings(max_examples=60, deadline=None)
@given(shard=SHARDS, task=TASKS, masking=st.sampled_from(sorted(MASKINGS)), fill=st.booleans())
def test_batches_against_examples_built_one_by_one(shard, task, masking, fill):
    plan = plan_of(shard, task)
    batches = micro_batches(shard, plan, Collator(task, VOCABULARY, MASKINGS[masking], fill))
    number = 0
    for batch in batches:
        assert batch.counts == {"mlm": int((batch.masked_lm_labels != IGNORED).sum()),
                                "nsp": int((batch.next_sentence_label != IGNORED).sum())}
        real_tokens = shortfall = 0
        for place in range(batch.num_sequences):
            example, row = example_of(batch, place), plan.take(slice(number, number + 1))
            a = shard.ids[row.a_start[0]: row.a_start[0] + row.a_length[0]].tolist()
            b = shard.ids[row.b_start[0]: row.b_start[0] + row.b_length[0]].tolist()
            text = [CLS, *a, SEP, *b, SEP] if b else [CLS, *a, SEP]
            restored = list(example["ids"])
            for position, label in zip(example["masked"], example["labels"]):
                restored[position] = label
            assert restored == text
            assert example["types"] == [0] * (len(a) + 2) + [1] * (len(text) - len(a) - 2)
            assert example["positions"] == list(range(len(text)))
            assert example["next"] == row.label[0]
            assert not {CLS, SEP, PAD, UNKNOWN} & set(example["labels"]) and example["masked"] == sorted(set(example["masked"]))
            assert len(text) <= task.max_length == batch.max_length
            can = sum(token not in (CLS, SEP, UNKNOWN) for token in text)
            budget = min(can, max(1, math.floor(task.mask_rate * can + 0.5)))
            assert len(example["masked"]) == budget if masking == "token" else (len(example["masked"]) > 0) == (can > 0)
            shortfall += max(0, budget - len(example["masked"]))
            number, real_tokens = number + 1, real_tokens + len(text)
        assert batch.shortfall == shortfall
        assert batch.num_tokens == real_tokens and sum(batch.lengths) == len(batch.input_ids) == batch.cu_seqlens[-1]
        assert list(batch.lengths) == batch.cu_seqlens.diff().tolist()
        assert batch.counts["mlm"] == sum(len(example_of(batch, place)["masked"]) for place in range(batch.num_sequences))
    assert number == len(plan.keys)


def test_one_example_by_hand():
    """Every draw stays itself (split 0, 0, 1), so that the batch shows the layout alone."""
    ids = np.arange(10, 30, dtype=np.uint16)
    shard = Shard(ids, np.ones(20, np.uint8), np.array([0, 10, 20]), np.array([0, 1, 2]), np.arange(2, dtype=np.uint64))
    plan = Plan(np.array([3, 12]), np.array([2, 3]), np.array([15, 0]), np.array([1, 0]), np.array([1, IGNORED]),
                np.array([7, 8], np.uint64))
    batch = Collator(Task("mlm+nsp", 16, 1, 0.15, 0), VOCABULARY, Masking(mask_split=(0.0, 0.0, 1.0)))(Examples(shard, plan))
    assert batch.input_ids.tolist() == [CLS, 13, 14, SEP, 25, SEP, CLS, 22, 23, 24, SEP]
    assert batch.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 6, 11] and batch.lengths == (6, 5)
    assert batch.next_sentence_label.tolist() == [1, IGNORED] and batch.counts == {"mlm": 2, "nsp": 1}
    assert (batch.num_tokens, batch.num_sequences, batch.max_length, batch.shortfall) == (11, 2, 16, 0)


def test_types_of_the_arrays():
    shard, task = make_shard(), Task("mlm+nsp", 32, 4, 0.15, 0)
    for fill in (False, True):
        batch = micro_batches(shard, plan_of(shard, task), Collator(task, VOCABULARY, Masking(), fill))[0]
        for entry in fields(Batch):
            value = getattr(batch, entry.name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == (torch.int32 if entry.name == "cu_seqlens" else torch.int64) and value.is_contiguous()


@pytest.mark.parametrize("masking", ["token", "word"])
def test_shortfall_is_what_the_budgets_leave(masking):
    """Two words of three tokens and a budget of four leave one token open; single tokens leave none."""
    ids = np.array([5, 150, 151, 6, 152, 153], np.uint16)
    shard = Shard(ids, VOCABULARY.starts_word[ids] * np.uint8(WORD_START), np.array([0, 6]), np.array([0, 1]), np.zeros(1, np.uint64))
    one, nothing = np.array([6]), np.zeros(1, np.int64)
    plan = Plan(nothing, one, nothing, nothing, np.array([IGNORED]), np.array([3], np.uint64))
    batch = Collator(Task("mlm", 16, 1, 0.66, 0), VOCABULARY, MASKINGS[masking])(Examples(shard, plan))
    assert (batch.counts["mlm"], batch.shortfall) == ((3, 1) if masking == "word" else (4, 0))


# ---------------------------------------------------------------- flags

@settings(max_examples=40, deadline=None)
@given(shard=SHARDS, task=TASKS)
def test_flags_are_those_of_the_corpus_but_at_the_beginning_of_segments(shard, task):
    """A word or an entity that is cut off there begins there; [CLS] and [SEP] are words outside entities."""
    plan, expected = plan_of(shard, task), []
    packed = pack(Examples(shard, plan), VOCABULARY)
    for a_start, a_length, b_start, b_length in zip(plan.a_start, plan.a_length, plan.b_start, plan.b_length):
        expected.append(WORD_START)
        for start, length in ((a_start, a_length), (b_start, b_length)):
            for place in range(start, start + length):
                is_entity = shard.flags[place] & (ENTITY_START | ENTITY_INSIDE) > 0
                expected.append(WORD_START | ENTITY_START * is_entity if place == start else int(shard.flags[place]))
            expected += [WORD_START] * int(length > 0)
    assert packed.flags.tolist() == expected and packed.flags.dtype == np.uint8
    assert np.array_equal(packed.lengths, plan.lengths) and np.array_equal(np.bincount(packed.sequence), plan.lengths)


def test_an_entity_cut_off_at_the_beginning_of_a_segment_is_one_of_its_own():
    """Of an entity of six tokens the last four are A and the first two B: each is masked whole or not, the two apart."""
    flags = np.array([WORD_START | ENTITY_START] + [ENTITY_INSIDE] * 5 + [WORD_START] * 4, np.uint8)
    shard = Shard(np.arange(10, 20, dtype=np.uint16), flags, np.array([0, 10]), np.array([0, 1]), np.zeros(1, np.uint64))
    num = 2000
    plan = Plan(*(np.full(num, value) for value in (2, 8, 0, 2, 0)), keys=np.arange(num, dtype=np.uint64) + key(3))
    options = Masking("entity", (1.0, 0.0, 0.0), 0.5, 1.0)
    batch = Collator(Task("mlm+sop", 16, 1, 0.01, 0), VOCABULARY, options)(Examples(shard, plan))
    shown = batch.input_ids.numpy().reshape(num, 13) == MASK
    a, b = shown[:, 1:5], shown[:, 10:12]
    assert np.array_equal(a.all(1), a.any(1)) and np.array_equal(b.all(1), b.any(1))
    for first in (False, True):
        for second in (False, True):
            assert abs((a[:, 0] == first)[b[:, 0] == second].mean() - 0.5) < 5 * 0.5 / math.sqrt(num / 2)
    neither = ~a[:, 0] & ~b[:, 0]
    assert (shown[:, 5:9].sum(1) == neither).all()  # the one token that the rate asks for


# ---------------------------------------------------------------- masks and packing

@settings(max_examples=40, deadline=None)
@given(shard=SHARDS, task=TASKS, masking=st.sampled_from(sorted(MASKINGS)), fill=st.booleans(), data=st.data())
def test_masks_do_not_depend_on_the_rest_of_the_micro_batch(shard, task, masking, fill, data):
    """The same examples, packed in micro-batches cut elsewhere, in another order, of another size."""
    plan = plan_of(shard, task)
    order = np.array(data.draw(st.permutations(range(len(plan.keys)))))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(order) - 1)), max_size=6))) if len(order) > 1 else []
    other_plan, bounds = plan.take(order), [0, *cuts, len(order)]
    shown = []
    for batches, used in ((micro_batches(shard, plan, Collator(task, VOCABULARY, MASKINGS[masking], fill)), plan),
                          (micro_batches(shard, other_plan, Collator(task, VOCABULARY, MASKINGS[masking]), bounds), other_plan)):
        examples = [example_of(batch, place) for batch in batches for place in range(batch.num_sequences)]
        assert len(examples) == len(used.keys)
        shown.append(dict(zip(used.keys.tolist(), examples)))
    assert shown[0] == shown[1]


def test_micro_batch_size_changes_the_packing_only():
    shard = make_shard()
    shown = []
    for size in (2, 7):
        task = Task("mlm+nsp", 32, size, 0.15, 5)
        plan = plan_of(shard, task)
        batches = micro_batches(shard, plan, Collator(task, VOCABULARY, Masking("word")))
        shown.append(dict(zip(plan.keys.tolist(), (example_of(batch, place) for batch in batches for place in range(batch.num_sequences)))))
        assert len(batches) > 10
    assert shown[0] == shown[1] and len(shown[0]) > 100


def test_collating_again_gives_the_same_batch():
    shard, task = make_shard(), Task("mlm+nsp", 32, 4, 0.15, 0)
    plan, collator = plan_of(shard, task), Collator(task, VOCABULARY, Masking("word"), True)
    torch.manual_seed(0)
    np.random.seed(0)
    once = micro_batches(shard, plan, collator)
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(equal(one, other) for one, other in zip(once, micro_batches(shard, plan, collator)))


@settings(max_examples=40, deadline=None)
@given(shard=SHARDS, task=TASKS, masking=st.sampled_from(sorted(MASKINGS)), fill=st.booleans(), share=st.floats(0.05, 1))
def test_another_rate_changes_masks_alone(shard, task, masking, fill, share):
    """And at a lower rate single tokens are some of those at a higher one, with the same in their place."""
    plan, collator, rate = plan_of(shard, task), Collator(task, VOCABULARY, MASKINGS[masking], fill), share * task.mask_rate
    same, high, low = (micro_batches(shard, plan, collator, None, mask_rate) for mask_rate in (task.mask_rate, None, rate))
    assert all(equal(one, other) for one, other in zip(same, high))
    by_itself = micro_batches(shard, plan, Collator(Task(task.objective, task.max_length, task.micro_batch_size, rate, task.seed),
                                                    VOCABULARY, MASKINGS[masking]), plan.bounds)
    for one, other, alone in zip(high, low, by_itself):
        ids, placed = [], []
        for batch in (one, other):
            real = batch.masked_lm_labels != IGNORED
            placed.append(dict(zip(batch.masked_positions[real].tolist(), batch.input_ids[batch.masked_positions[real]].tolist())))
            ids.append(batch.input_ids.index_copy(0, batch.masked_positions[real], batch.masked_lm_labels[real]))
        assert torch.equal(*ids)
        for name in ("token_type_ids", "position_ids", "cu_seqlens", "next_sentence_label", "lengths", "num_tokens", "num_sequences"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert one.counts["nsp"] == other.counts["nsp"]
        for number in range(other.num_sequences):
            assert example_of(other, number) == example_of(alone, number)
        assert other.shortfall == alone.shortfall
        if masking == "token":
            assert placed[1].items() <= placed[0].items() and (not fill or one.masked_positions.shape == other.masked_positions.shape)


# ---------------------------------------------------------------- filling

@settings(max_examples=60, deadline=None)
@given(shard=SHARDS, task=TASKS, masking=st.sampled_from(sorted(MASKINGS)), fill=st.booleans(), multiple=st.sampled_from([2, 32, 100]))
def test_filling_adds_only_what_is_ignored(shard, task, masking, fill, multiple):
    plan = plan_of(shard, task)
    exact = micro_batches(shard, plan, Collator(task, VOCABULARY, MASKINGS[masking]))
    filled = micro_batches(shard, plan, Collator(task, VOCABULARY, MASKINGS[masking], fill, multiple))
    for real, batch in zip(exact, filled):
        for name in ("counts", "num_tokens", "num_sequences", "shortfall", "max_length"):
            assert getattr(real, name) == getattr(batch, name)
        tokens, sequences, masked = len(real.input_ids), real.num_sequences, real.counts["mlm"]
        for name in ("input_ids", "token_type_ids", "position_ids"):
            assert torch.equal(getattr(batch, name)[:tokens], getattr(real, name))
        assert torch.equal(batch.cu_seqlens[:sequences + 1], real.cu_seqlens) and batch.lengths[:sequences] == real.lengths
        assert torch.equal(batch.next_sentence_label[:sequences], real.next_sentence_label)
        assert torch.equal(batch.masked_positions[:masked], real.masked_positions)
        assert torch.equal(batch.masked_lm_labels[:masked], real.masked_lm_labels)
        assert (batch.input_ids[tokens:] == PAD).all() and (batch.token_type_ids[tokens:] == 0).all()
        assert (batch.next_sentence_label[sequences:] == IGNORED).all() and (batch.masked_lm_labels[masked:] == IGNORED).all()
        assert (batch.masked_positions < len(batch.input_ids)).all()
        assert batch.cu_seqlens[-1] == len(batch.input_ids) == sum(batch.lengths)
        assert max(batch.lengths) <= task.max_length
        covering = [length for length in batch.lengths[sequences:] if length]
        assert len(covering) == -(-sum(covering) // task.max_length)  # as few as can be; after them those without a token
        assert not any(batch.lengths[sequences + len(covering):])
        expected = [position for length in batch.lengths for position in range(length)]
        assert batch.position_ids.tolist() == expected
        assert fill or (len(batch.input_ids) - tokens == -tokens % multiple
                        and len(batch.masked_positions) - masked == -masked % (multiple // 2))
    if fill and masking == "token":  # a word above its sequence's budget, or entities beyond the rate, may overflow
        assert {len(batch.input_ids) for batch in filled} <= {task.token_limit}
        assert len({len(batch.masked_positions) for batch in filled}) <= 1
        assert {len(batch.lengths) for batch in filled} <= sizes_of(task)


def sizes_of(task):
    """Numbers of sequences that a filled micro-batch may have."""
    return {factor * task.slots for factor in (2, 4, 8)}


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop", "mlm"])
@pytest.mark.parametrize("longest", [1, 12])
def test_shapes_are_few_through_epochs(objective, longest):
    """They differ in the number of sequences alone, by factors of two; the last micro-batch of an epoch, with a few sequences, has those
    of a full one. The smallest size serves text whose sequences are full."""
    shard, task = make_shard(longest=longest), Task(objective, 64, 4, 0.15, 0)
    shapes, sizes, few = set(), set(), 0
    for epoch in range(3):
        plan = make_plan(shard, np.arange(len(shard.hashes)), task, key(0, epoch))
        batches = micro_batches(shard, plan, Collator(task, VOCABULARY, Masking(), True))
        names = ["input_ids", "token_type_ids", "position_ids", "masked_positions", "masked_lm_labels"]
        shapes |= {tuple(len(getattr(batch, name)) for name in names) for batch in batches}
        sizes |= {len(batch.lengths) for batch in batches}
        few += batches[-1].num_tokens < 200
        for batch in batches:
            assert len(batch.lengths) == len(batch.cu_seqlens) - 1 == len(batch.next_sentence_label)
            used = sum(length > 0 for length in batch.lengths)
            assert len(batch.lengths) < 2 * used or len(batch.lengths) == min(sizes_of(task))
    assert len(shapes) == 1 and sizes <= sizes_of(task) and few


def test_a_micro_batch_that_overflows_has_the_next_size():
    """Words of 8 tokens against budgets of 1: each sequence masks a word, eight times what the limit counts on."""
    ids = np.concatenate([[5], np.full(7, 150)] * 64).astype(np.uint16)
    shard = Shard(ids, VOCABULARY.starts_word[ids] * np.uint8(WORD_START), np.arange(0, 513, 8), np.arange(65),
                  np.arange(64, dtype=np.uint64))
    task = Task("mlm", 10, 16, 0.05, 0)
    plan = make_plan(shard, np.arange(64), task, key(0))
    batches = micro_batches(shard, plan, Collator(task, VOCABULARY, Masking("word"), True))
    assert max(batch.counts["mlm"] for batch in batches) > 64 > task.masked_limit
    for batch in batches:
        assert len(batch.masked_positions) == 64 * max(1, math.ceil(batch.counts["mlm"] / 64))


def test_entities_beyond_the_rate_have_few_sizes():
    """What is masked ranges over hundreds of tokens, the filled size over steps of an eighth of the limit, in blocks of 64."""
    shard, task = make_shard(documents=200, longest=20), Task("mlm", 64, 128, 0.15, 0)
    assert task.masked_limit // 8 // 64 * 64 == 128
    plan = plan_of(shard, task)
    bounds = [*range(0, len(plan.keys), 29), len(plan.keys)]
    batches = micro_batches(shard, plan, Collator(task, VOCABULARY, MASKINGS["entity, all, similar"], True), plan.bounds)
    batches += micro_batches(shard, plan, Collator(task, VOCABULARY, Masking(), True), bounds)
    counts = [batch.counts["mlm"] for batch in batches]
    assert max(counts) > task.masked_limit + 500 and min(counts) < task.masked_limit - 500
    for batch, count in zip(batches, counts):
        assert len(batch.masked_positions) == 128 * math.ceil(max(count, task.masked_limit) / 128)


def test_limits_hold_in_every_batch():
    shard = make_shard(longest=20)
    for objective in ("mlm+nsp", "mlm"):
        task = Task(objective, 32, 4, 0.15, 0)
        for batch in micro_batches(shard, plan_of(shard, task), Collator(task, VOCABULARY, Masking())):
            assert batch.num_tokens <= task.token_limit and batch.num_sequences <= task.sequence_limit
            assert batch.counts["mlm"] <= task.masked_limit
