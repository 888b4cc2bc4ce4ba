"""Data positions: micro-batches are a pure function of (epoch, place, micro-batch). The steps of
`TrainData` against a loop over positions: 1, 2 or 4 processes, with or without workers, through
phases and under a schedule of mask rates, see the same batches; a run resumed at any step sees the
rest of them; a worker is sent neither plans nor text."""

import gc
import json
import multiprocessing
import pickle
import shutil
from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest
import torch
from conftest import refused, write_documents
from data_reference import contents, take_steps

from pretrain import plan
from pretrain.config import Config
from pretrain.data.collate import Collator
from pretrain.data.corpus import Corpus
from pretrain.data.loader import DataPosition, PretrainingDataset, TrainData
from pretrain.data.masking import Masking
from pretrain.data.pairs import Task
from pretrain.data.prepare import prepare
from pretrain.data.sources import check_files
from pretrain.schema import misfit

START = DataPosition(0, 0, 0)
TASK = Task("random", 64, 4, 0.15, 11)
LONG = Task("random", 128, 4, 0.15, 11, counted_length=64)  # of the second phase
STEPS, ENDS, MICRO_BATCHES = 20, (4, 14, 20), 8  # the third phase is the first one again


@pytest.fixture
def dataset(source) -> PretrainingDataset:
    return PretrainingDataset(Corpus(source.folder), TASK)


@pytest.fixture(scope="module")
def collator(vocabulary) -> Collator:
    return Collator(TASK, vocabulary, Masking("word", mask_rate=(rate_of(0), rate_of(STEPS - 1))))


@pytest.fixture(scope="module")
def uninterrupted(source) -> list[DataPosition]:
    """Two epochs of positions, the slow way: each plan's micro-batches in turn."""
    dataset = PretrainingDataset(Corpus(source.folder), TASK)
    return [
        DataPosition(epoch, place, micro_batch)
        for epoch in range(2)
        for place in range(source.num_shards)
        for micro_batch in range(dataset.plan(epoch, place).num_micro_batches)
    ]


# ---------------------------------------------------------------- positions


def test_positions_walk_every_micro_batch(dataset, uninterrupted):
    assert list(dataset.positions(START, 2)) == uninterrupted
    assert len(set(uninterrupted)) == len(uninterrupted)
    found = list(islice(dataset.positions(START), len(uninterrupted) + 5))  # without end
    assert found[:-5] == uninterrupted and {position.epoch for position in found[-5:]} == {2}
    assert found[-5] == DataPosition(2, 0, 0)
    for number in range(0, len(uninterrupted), 29):
        assert list(dataset.positions(uninterrupted[number], 2)) == uninterrupted[number:]


@pytest.fixture(scope="module")
def uneven(documents, tiny_tokenizer, tmp_path_factory):
    """A corpus of shards that are in turn large and small: the ends of files."""
    folder = tmp_path_factory.mktemp("uneven")
    write_documents(folder / "0.txt", documents[:2])
    for number in range(1, 5):
        write_documents(folder / f"{number}.txt", documents[2:26])
    files = check_files(sorted(folder.glob("*.txt")))
    size = round(0.9 * files[1].size)
    return prepare(files, "sentences", tiny_tokenizer, folder / "corpus", piece_bytes=size)


def test_an_epoch_is_counted_by_the_sizes_of_the_shards(uneven):
    counts = set()
    for seed in range(4):
        dataset = PretrainingDataset(uneven, replace(TASK, seed=seed, counted_length=64))
        config = Config(batch_size=TASK.micro_batch_size, max_length=TASK.max_length)
        steps = plan.count_epoch(dataset, config).steps
        places = range(uneven.num_shards)
        whole = sum(dataset.plan(0, place).num_micro_batches for place in places)
        assert steps == pytest.approx(whole, rel=0.25)
        counts.add(steps)
    assert max(counts) <= 1.25 * min(counts)


def test_an_epoch_has_as_many_steps_whatever_the_size_of_a_micro_batch(source):
    """The device and the number of processes decide that size."""
    config = Config(batch_size=32, max_length=TASK.max_length)
    tasks = [replace(TASK, counted_length=64, micro_batch_size=size) for size in (2, 8, 16, 32)]
    datasets = [PretrainingDataset(source, task) for task in tasks]
    steps = {plan.count_epoch(dataset, config).steps for dataset in datasets}
    places = range(plan.COUNTED_SHARDS)
    counts = [sum(each.plan(0, n).num_micro_batches for n in places) for each in datasets]
    assert len(steps) == 1
    assert len({count * task.micro_batch_size for count, task in zip(counts, tasks)}) > 1


def test_what_stands_for_the_text_is_not_a_tiny_shard(uneven, source):
    sizes = [entry["tokens"] for entry in uneven.info["shards"]]
    assert 3 * sizes[0] < sizes[uneven.largest] == max(sizes)
    size = uneven.info["vocab_size"]
    counts = 1.0 + np.bincount(uneven.tokens(uneven.largest), minlength=size)
    np.testing.assert_allclose(uneven.unigram_shares(size), counts / counts.sum())
    for seed in range(6):
        dataset = PretrainingDataset(uneven, replace(TASK, seed=seed))
        assert dataset.shard_at(0, dataset.fullest().place) == uneven.largest


def test_the_fullest_micro_batch_is_in_the_next_shard_with_text(source):
    """A small validation set has none in most shards."""
    dataset = PretrainingDataset(source.split(0.0001)[1], TASK)
    first = next(dataset.positions(START._replace(place=dataset.place_of_largest)))
    places = [position for position in dataset.positions(START, 1) if position[:2] == first[:2]]
    sizes = [dataset[position].plan.lengths.sum() for position in places]
    assert dataset.fullest() == places[np.argmax(sizes)]
    assert any(not dataset.plan(0, place).num_micro_batches for place in range(source.num_shards))


def test_every_epoch_reads_all_shards_in_its_own_order(dataset, source):
    places = range(source.num_shards)
    orders = [[dataset.shard_at(epoch, place) for place in places] for epoch in range(5)]
    assert all(sorted(order) == list(places) for order in orders)
    assert len(set(map(tuple, orders))) > 1


def hashes_read(dataset: PretrainingDataset, epoch: int) -> set[int]:
    """Hashes of the documents that A and B come from in an epoch."""
    found = set()
    for position in dataset.positions(DataPosition(epoch, 0, 0), epoch + 1):
        examples = dataset[position]
        edges, plan = examples.shard.sentences[examples.shard.documents], examples.plan
        starts = np.append(plan.a_start, plan.b_start[plan.b_length > 0])
        documents = np.searchsorted(edges, starts, side="right") - 1
        found |= set(examples.shard.hashes[documents].tolist())
    return found


def hashes_of(source: Corpus) -> set[int]:
    shards = range(source.num_shards)
    parts = [source.shard(index).hashes[source.documents(index)] for index in shards]
    return set(np.concatenate(parts).tolist())


def test_an_epoch_reads_every_document(source, documents):
    dataset = PretrainingDataset(source, TASK)
    assert hashes_read(dataset, 0) == hashes_read(dataset, 1) == hashes_of(source)
    assert len(hashes_of(source)) == len(documents)


def test_a_part_of_the_corpus_gives_only_its_documents(source):
    training, validation = source.split(0.3)
    assert hashes_read(PretrainingDataset(validation, TASK), 0) == hashes_of(validation)
    assert not hashes_of(validation) & hashes_of(training)


def test_no_two_examples_share_a_key(dataset, source):
    """Across shards, epochs and seeds: equal keys would give equal pairs and masks."""
    datasets = [dataset, PretrainingDataset(source, Task("random", 64, 4, 0.15, 12))]
    places = product(datasets, range(2), range(source.num_shards))
    keys = np.concatenate([made.plan(epoch, place).keys for made, epoch, place in places])
    assert len(np.unique(keys)) == len(keys) > 1000


# ---------------------------------------------------------------- optimizer steps


def rate_of(step: int) -> float:
    return TASK.mask_rate - 0.005 * step


def train_data(source, collator, **more) -> TrainData:
    """The data of a new process: phases of the task, then LONG, then the task again."""
    phases = []
    for task in (TASK, LONG, TASK):
        made = Collator(task, collator.vocabulary, collator.masking)
        phases.append((PretrainingDataset(Corpus(source.folder), task), made))
    return TrainData(phases, ENDS, MICRO_BATCHES, total_steps=STEPS, **more)


@pytest.fixture(scope="module")
def steps(source, collator) -> list[tuple[int, DataPosition, list[dict]]]:
    """(phase, first position, contents of the micro-batches) of each step, the slow way: one
    micro-batch at a time, from the list of all positions of each phase."""
    phases, found = train_data(source, collator).phases, []
    walks = [list(dataset.positions(START, 3)) for dataset, _ in phases]
    phase = index = 0
    for step in range(STEPS):
        dataset, collate = phases[phase]
        if step in ENDS:  # from the first shard that is still unread
            epoch, place, micro_batch, _ = walks[phase][index]
            phase += 1
            dataset, collate = phases[phase]
            beginning = (epoch, place + (micro_batch > 0), 0)
            index = next(i for i, position in enumerate(walks[phase]) if position >= beginning)
        positions = walks[phase][index : index + MICRO_BATCHES]
        positions = [position._replace(progress=step / (STEPS - 1)) for position in positions]
        batches = [contents(collate(dataset[position])) for position in positions]
        found.append((phase, positions[0], batches))
        index += MICRO_BATCHES
    assert [phase for phase, *_ in found] == [0] * 4 + [1] * 10 + [2] * 6
    assert {position.epoch for _, position, _ in found} == {0, 1}
    assert any(position.micro_batch for _, position, _ in found)
    return found


@pytest.mark.parametrize("rank, world_size, workers", [(0, 1, 0), (0, 2, 0), (3, 4, 0), (1, 2, 2)])
def test_steps_equal_the_slow_loop(source, collator, steps, rank, world_size, workers):
    """Rank r of n reads micro-batches r, r + n ... of each step."""
    more = {"rank": rank, "world_size": world_size, "workers": workers}
    found = take_steps(train_data(source, collator, **more), STEPS)
    assert found == [batches[rank::world_size] for *_, batches in steps]


def resumed(source, collator, state: dict, **more) -> TrainData:
    data = train_data(source, collator, **more)
    data.load_state_dict(json.loads(json.dumps(state)))  # as a checkpoint keeps it
    return data


@pytest.mark.parametrize("step", [3, 4, 14])
def test_a_resumed_run_reads_the_remaining_steps(source, collator, steps, step):
    """With the same or another number of processes."""
    data = train_data(source, collator, rank=1, world_size=2)
    take_steps(data, step)
    state = data.state_dict()
    assert misfit(state, data.state_form) is None and state["step"] == step
    rest = [batches for *_, batches in steps[step:]]
    assert take_steps(resumed(source, collator, state), STEPS)[: len(rest)] == rest
    half = resumed(source, collator, state, rank=1, world_size=2, workers=step % 2)
    assert take_steps(half, len(rest)) == [batches[1::2] for batches in rest]
    take_steps(data, len(rest))
    assert half.state_dict() == data.state_dict()


def test_facts_about_the_last_step(source, collator, steps, capsys):
    """Step, phase, the position that rebuilds its data, and what the log shows. One line on stderr
    says where the length changes."""
    data = train_data(source, collator, rank=0)
    assert (data.step, data.phase) == (0, 0)
    for number, (phase, position, batches) in enumerate(steps):
        next(data)
        assert (data.step, data.phase, data.position) == (number + 1, phase, position)
        length = (64, 128, 64)[phase]
        expected = {"optim/mask_rate": pytest.approx(rate_of(number)), "train/max_length": length}
        assert data.logged() == expected
        dataset, collate = data.phases[phase]
        assert contents(collate(dataset[data.position])) == batches[0]
    told = capsys.readouterr().err
    assert [line.split(":")[0] for line in told.splitlines()] == ["step 5", "step 15"]
    state = data.state_dict()
    after = resumed(source, collator, state)
    assert (after.step, after.phase) == (STEPS, 2)
    take_steps(train_data(source, collator, rank=1, world_size=2), STEPS)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- processes and memory


def test_the_workers_of_a_phase_end_with_it(source, collator):
    data = train_data(source, collator, workers=2)
    take_steps(data, ENDS[0] + 1)
    assert len(multiprocessing.active_children()) == 2
    del data
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_streams_are_left_alone(source, collator, workers):
    """Dropout draws from them; if the loader did too, a resumed run would differ."""
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take_steps(train_data(source, collator, workers=workers), ENDS[0] + 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_one_message(source, collator, tmp_path, workers):
    """Even from a worker, whose errors come with a traceback."""
    copy = Corpus(shutil.copytree(source.folder, tmp_path / "corpus"))
    paths = sorted(copy.folder.glob("*.ids.npy"))
    for path in paths:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    data = train_data(copy, collator, workers=workers)
    message = refused(next, data)
    assert "\n" not in message and message.split(": ")[0] in map(str, paths)
    del data
    gc.collect()  # here, not in a worker process of another test


def test_a_pickled_dataset_holds_neither_plans_nor_text(source, collator, dataset, uninterrupted):
    fresh = len(pickle.dumps(dataset))
    before = contents(collator(dataset[uninterrupted[5]]))
    dataset[uninterrupted[-1]]
    raw = pickle.dumps(dataset)
    assert len(raw) <= fresh + 100 and b"memmap" not in raw and b"ndarray" not in raw
    assert contents(collator(pickle.loads(raw)[uninterrupted[5]])) == before
