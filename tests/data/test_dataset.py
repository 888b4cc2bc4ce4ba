"""Data positions: micro-batches are a pure function of (epoch, place, micro-batch), so that 1, 2 or 3 processes see the same
batches as one, workers change nothing, and a run that starts again at a saved position sees the rest of the uninterrupted
sequence; a schedule of mask rates follows the number of the micro-batch and changes masks alone; and a worker is sent neither
plans nor text."""
import pickle
from collections.abc import Callable
from dataclasses import fields
from itertools import islice

import numpy as np
import pytest
import torch

from pretrain.batch import IGNORED, Batch
from pretrain.data import reading
from pretrain.data.collate import Collator
from pretrain.data.corpus import Corpus
from pretrain.data.dataset import DataPosition, MicroBatchSampler, PretrainingDataset, make_loader
from pretrain.data.masking import Masking
from pretrain.data.planning import Task
from pretrain.data.preparing import prepare

START = DataPosition(0, 0, 0)
TASK = Task("mlm+nsp", 64, 4, 0.15, 11)


@pytest.fixture(scope="module")
def source(text_file, tiny_tokenizer, tmp_path_factory) -> Corpus:
    """More shards than a process keeps open."""
    sources = reading.check_files([text_file], "--train")
    made = prepare(sources, "sentences", tiny_tokenizer, tmp_path_factory.mktemp("dataset") / "corpus", piece_bytes=12_000)
    assert made.num_shards > 5
    return made


@pytest.fixture()
def dataset(source) -> PretrainingDataset:
    return PretrainingDataset(Corpus(source.folder), TASK)


@pytest.fixture(scope="module")
def collator(vocabulary) -> Collator:
    return Collator(TASK, vocabulary, Masking("word"))


@pytest.fixture(scope="module")
def uninterrupted(source) -> list[DataPosition]:
    """Two epochs of positions, the slow way: each plan's micro-batches in turn."""
    dataset = PretrainingDataset(Corpus(source.folder), TASK)
    return [DataPosition(epoch, place, micro_batch) for epoch in range(2) for place in range(source.num_shards)
            for micro_batch in range(dataset.plan(epoch, place).num_micro_batches)]


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in ((getattr(one, entry.name), getattr(other, entry.name)) for entry in fields(Batch)))


def batches(source, collator, start: DataPosition = START, rank: int = 0, world_size: int = 1, workers: int = 0,
            end_epoch: int = 2, mask_rate: Callable[[int], float] | None = None) -> list[Batch]:
    """What a process started anew reads."""
    dataset = PretrainingDataset(Corpus(source.folder), TASK)
    return list(make_loader(dataset, collator, MicroBatchSampler(dataset, start, rank, world_size, end_epoch, mask_rate), workers))


@pytest.fixture(scope="module")
def reference(source, collator) -> list[Batch]:
    return batches(source, collator)


# ---------------------------------------------------------------- positions

def test_positions_walk_every_micro_batch(dataset, uninterrupted):
    assert list(dataset.positions(START, 2)) == uninterrupted
    assert list(dataset.positions(START, 0)) == []
    assert len(set(uninterrupted)) == len(uninterrupted) and uninterrupted[-1].epoch == 1


def test_positions_go_on_without_end(dataset, uninterrupted):
    found = list(islice(dataset.positions(START), len(uninterrupted) + 5))
    assert found[:-5] == uninterrupted and {position.epoch for position in found[-5:]} == {2}


def test_positions_start_anywhere(dataset, uninterrupted):
    for number in range(0, len(uninterrupted), 7):
        assert list(dataset.positions(uninterrupted[number], 2)) == uninterrupted[number:]


def test_advance_counts_positions(dataset, uninterrupted):
    for first in (0, 3, len(uninterrupted) // 2):
        for count in (0, 1, 2, 5, 40, len(uninterrupted) - first - 1):
            assert dataset.advance(uninterrupted[first], count) == uninterrupted[first + count]
    halfway = dataset.advance(START, 17)
    assert dataset.advance(halfway, 30) == dataset.advance(START, 47)
    assert dataset.advance(START, len(uninterrupted)) == DataPosition(2, 0, 0)  # the end of an epoch is the start of the next


def test_every_epoch_reads_every_shard_in_an_order_of_its_own(dataset, source):
    orders = [[dataset.shard_at(epoch, place) for place in range(source.num_shards)] for epoch in range(5)]
    assert all(sorted(order) == list(range(source.num_shards)) for order in orders)
    assert len(set(map(tuple, orders))) > 1
    other = PretrainingDataset(source, Task("mlm+nsp", 64, 4, 0.15, 12))
    assert orders != [[other.shard_at(epoch, place) for place in range(source.num_shards)] for epoch in range(5)]


def test_an_epoch_reads_every_document(source, collator, reference, documents):
    """Every document gives an A in every epoch, so that none is skipped by a walk that ends too soon."""
    dataset = PretrainingDataset(source, TASK)
    seen = [set(), set()]
    for position in dataset.positions(START, 2):
        examples = dataset.__getitems__([position])
        shard = dataset.shard_at(position.epoch, position.place)
        edges = examples.shard.sentences[examples.shard.documents]
        found = np.searchsorted(edges, examples.plan.a_start, side="right") - 1
        seen[position.epoch] |= {(shard, document) for document in found.tolist()}
    assert len(seen[0]) == len(seen[1]) == len(documents)


def test_a_part_of_the_corpus_gives_only_its_documents(source, collator):
    training, held_out = source.split(0.3)
    ids = [np.concatenate([side.shard(index).hashes[side.documents(index)] for index in range(side.num_shards)])
           for side in (training, held_out)]
    dataset, found = PretrainingDataset(held_out, TASK), set()
    for position in dataset.positions(START, 1):
        examples = dataset.__getitems__([position])
        edges = examples.shard.sentences[examples.shard.documents]
        pairs = examples.plan.b_length > 0
        for starts in (examples.plan.a_start, examples.plan.b_start[pairs]):
            found |= set(examples.shard.hashes[np.searchsorted(edges, starts, side="right") - 1].tolist())
    assert found == set(ids[1].tolist()) and not found & set(ids[0].tolist())


# ---------------------------------------------------------------- batches

def test_batches_are_a_function_of_the_position(source, collator, uninterrupted, reference):
    """Asked in any order, by processes started anew."""
    order = np.random.default_rng(0).permutation(len(uninterrupted))[:25]
    dataset = PretrainingDataset(Corpus(source.folder), TASK)
    for number in order:
        assert equal(collator(dataset.__getitems__([uninterrupted[number]])), reference[number])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_interleaved_are_one_process(source, collator, reference, world_size):
    parts = [batches(source, collator, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sum(map(len, parts)) == len(reference)
    for number, batch in enumerate(reference):
        assert equal(parts[number % world_size][number // world_size], batch)


@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_change_nothing(source, collator, reference, world_size):
    found = batches(source, collator, rank=world_size - 1, world_size=world_size, workers=2)
    expected = reference[world_size - 1:: world_size]
    assert len(found) == len(expected) and all(equal(one, other) for one, other in zip(found, expected))


@pytest.mark.parametrize("where", ["in a shard", "first of a shard", "last of a shard", "last of an epoch", "first of an epoch"])
def test_a_saved_position_gives_the_tail(source, collator, uninterrupted, reference, where):
    ends = [number for number, (one, other) in enumerate(zip(uninterrupted, uninterrupted[1:])) if one.place != other.place]
    epoch_end = max(number for number, position in enumerate(uninterrupted) if position.epoch == 0)
    number = {"in a shard": ends[1] - 2, "first of a shard": ends[1] + 1, "last of a shard": ends[1], "last of an epoch": epoch_end,
              "first of an epoch": epoch_end + 1}[where]
    saved = DataPosition(*tuple(uninterrupted[number]))  # a checkpoint keeps three numbers
    found = batches(source, collator, saved)
    assert len(found) == len(reference) - number and all(equal(one, other) for one, other in zip(found, reference[number:]))


def test_ranks_of_a_saved_position(source, collator, uninterrupted, reference):
    """Rank r of 2 takes every second micro-batch from the saved one on, whatever its number was in the epoch."""
    parts = [batches(source, collator, uninterrupted[13], rank, 2) for rank in range(2)]
    expected = reference[13:]
    assert all(equal(parts[number % 2][number // 2], batch) for number, batch in enumerate(expected))


def test_epochs_differ(reference, uninterrupted):
    first = {batch.input_ids.numpy().tobytes() for batch, position in zip(reference, uninterrupted) if position.epoch == 0}
    second = {batch.input_ids.numpy().tobytes() for batch, position in zip(reference, uninterrupted) if position.epoch == 1}
    assert not first & second


def test_no_two_examples_share_a_key(dataset, source):
    """Neither of two shards nor of two epochs or seeds: equal keys would be equal pairs and masks."""
    datasets = [dataset, PretrainingDataset(source, Task("mlm+nsp", 64, 4, 0.15, 12))]
    keys = np.concatenate([made.plan(epoch, place).keys for made in datasets for epoch in range(2) for place in range(source.num_shards)])
    assert len(np.unique(keys)) == len(keys) > 1000


def test_the_loader_leaves_the_global_random_numbers_alone(source, collator):
    """Dropout draws from them: a loader that did would make a resumed run differ."""
    dataset = PretrainingDataset(source, TASK)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = make_loader(dataset, collator, MicroBatchSampler(dataset, START, end_epoch=1))
    assert sum(1 for _ in loader) > 10
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)


# ---------------------------------------------------------------- a schedule of mask rates

def rate_of(number: int) -> float:
    """Falls from the task's rate, for every third micro-batch."""
    return TASK.mask_rate - 0.003 * min(number // 3, 40)


@pytest.fixture(scope="module")
def scheduled(source, collator) -> list[Batch]:
    return batches(source, collator, mask_rate=rate_of)


def restored(batch: Batch) -> torch.Tensor:
    """Its text, without masks."""
    return batch.input_ids.index_copy(0, batch.masked_positions, batch.masked_lm_labels)


def test_a_schedule_changes_masks_alone(scheduled, reference):
    """The same text, pairs and micro-batches; fewer of their tokens are masked."""
    assert len(scheduled) == len(reference) > 60
    for number, (one, other) in enumerate(zip(scheduled, reference)):
        assert torch.equal(restored(one), restored(other))
        for name in ("token_type_ids", "position_ids", "cu_seqlens", "next_sentence_label", "lengths", "num_tokens", "num_sequences"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert equal(one, other) if number < 3 else one.counts["mlm"] <= other.counts["mlm"]
    assert sum(batch.counts["mlm"] for batch in scheduled) < 0.8 * sum(batch.counts["mlm"] for batch in reference)


def test_a_scheduled_micro_batch_is_masked_at_its_rate(source, vocabulary):
    """Single tokens: exactly the rounded share of each sequence, and some of those at the task's rate, with the same in place."""
    collator = Collator(TASK, vocabulary, Masking())
    low, high = (batches(source, collator, end_epoch=1, mask_rate=mask_rate) for mask_rate in (rate_of, None))
    for number, (batch, full) in enumerate(zip(low, high)):
        maskable = ~torch.from_numpy(vocabulary.is_special)[restored(batch)]
        owner = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
        counts = torch.bincount(owner[maskable], minlength=len(batch.lengths)).tolist()
        budget = [min(count, max(1, int(rate_of(number) * count + 0.5))) for count in counts]
        assert torch.bincount(owner[batch.masked_positions], minlength=len(batch.lengths)).tolist() == budget
        shown = [dict(zip(part.masked_positions.tolist(), part.input_ids[part.masked_positions].tolist())) for part in (batch, full)]
        assert shown[0].items() <= shown[1].items()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_see_the_same_rates(dataset, source, collator, scheduled, world_size):
    parts = [batches(source, collator, rank=rank, world_size=world_size, mask_rate=rate_of) for rank in range(world_size)]
    assert sum(map(len, parts)) == len(scheduled)
    for number, batch in enumerate(scheduled):
        assert equal(parts[number % world_size][number // world_size], batch)
    for rank in range(world_size):
        rates = [position.mask_rate for (position,) in MicroBatchSampler(dataset, START, rank, world_size, 2, rate_of)]
        assert rates == [rate_of(number) for number in range(rank, len(scheduled), world_size)]


def test_workers_see_the_same_rates(source, collator, scheduled):
    found = batches(source, collator, rank=1, world_size=2, workers=2, mask_rate=rate_of)
    assert len(found) == len(scheduled[1::2]) and all(equal(one, other) for one, other in zip(found, scheduled[1::2]))


@pytest.mark.parametrize("first", [1, 13, 50])
def test_a_schedule_goes_on_from_a_saved_position(source, collator, uninterrupted, scheduled, first):
    """The resumed run counts from its start on, so that its schedule is told where it stands."""
    found = batches(source, collator, uninterrupted[first], mask_rate=lambda number: rate_of(first + number))
    assert len(found) == len(scheduled) - first and all(equal(one, other) for one, other in zip(found, scheduled[first:]))


def test_a_rate_is_no_part_of_the_place(dataset, source, uninterrupted, collator, reference):
    """Positions carry none of their own, and go on from one that does without it; the task's rate is what none means."""
    assert DataPosition(1, 2, 3).mask_rate is None and all(position.mask_rate is None for position in uninterrupted)
    rated = uninterrupted[9]._replace(mask_rate=0.05)
    assert list(dataset.positions(rated, 2)) == uninterrupted[9:] and dataset.advance(rated, 4) == uninterrupted[13]
    assert equal(collator(dataset.__getitems__([rated._replace(mask_rate=TASK.mask_rate)])), reference[9])
    assert dataset.__getitems__([rated]).mask_rate == 0.05
    assert (collator(dataset.__getitems__([rated])).masked_lm_labels != IGNORED).sum() < reference[9].counts["mlm"]
    (position,) = next(iter(MicroBatchSampler(dataset, rated)))
    assert position == uninterrupted[9]


# ---------------------------------------------------------------- processes and memory

def test_a_pickled_dataset_holds_neither_plans_nor_text(source, collator, uninterrupted, reference):
    dataset = PretrainingDataset(Corpus(source.folder), TASK)
    fresh = len(pickle.dumps(dataset))
    for number in (0, len(uninterrupted) - 1):
        dataset.__getitems__([uninterrupted[number]])
    assert dataset._plans and dataset.source._open
    raw = pickle.dumps(dataset)
    assert len(raw) <= fresh + 100 and b"memmap" not in raw and b"ndarray" not in raw
    restored = pickle.loads(raw)
    assert restored._plans == {} and equal(collator(restored.__getitems__([uninterrupted[5]])), reference[5])
    assert dataset._plans  # and the dataset itself keeps what it has


def test_two_plans_stay_in_memory(dataset, source, monkeypatch):
    for place in (*range(source.num_shards), 0):
        dataset.plan(0, place)
        assert len(dataset._plans) <= 2
    plan = dataset.plan(0, 0)
    assert dataset.plan(0, 0) is plan


def test_a_batch_travels_between_processes_as_it_is(dataset, collator):
    batch = collator(dataset.__getitems__([START]))
    sent = pickle.loads(pickle.dumps(batch))
    assert type(sent) is Batch
    for entry in fields(Batch):
        ours, theirs = getattr(sent, entry.name), getattr(batch, entry.name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype if isinstance(theirs, torch.Tensor) else ours == theirs
