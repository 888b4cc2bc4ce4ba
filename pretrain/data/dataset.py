"""The custom Dataset: a data position -> the examples of one micro-batch; and the sampler that walks the positions.

A micro-batch is a pure function of its position (epoch, place in the epoch's order of shards, micro-batch in the shard), so
a checkpoint saves three numbers, and 1, 2 or 8 processes, with or without workers, train on the same batches.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain.batch import Batch
from pretrain.command import UserError
from pretrain.data.collate import Collator, Examples
from pretrain.data.corpus import Corpus
from pretrain.data.draws import derive, key
from pretrain.data.planning import Plan, Task, make_plan
from pretrain.data.workers import begin_worker, worker_context

SHARD_ORDER, EXAMPLES = 0, 1  # streams of random numbers
SILENCE_SECONDS = 300  # after which a worker process is taken for stuck


class DataPosition(NamedTuple):
    """A micro-batch: of an epoch, of the shard at a place in the epoch's order, by number."""

    epoch: int
    place: int
    micro_batch: int
    mask_rate: float | None = None  # at which it is masked, where the run has a schedule; it does not decide which text it is


class PretrainingDataset(Dataset):
    """Micro-batches of `source` under `task`, by data position."""

    def __init__(self, source: Corpus, task: Task):
        self.source, self.task = source, task
        self._plans: dict[tuple[int, int], Plan] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_plans": {}}

    def shard_at(self, epoch: int, place: int) -> int:
        """The shard at a place in the epoch's order."""
        keys = derive(key(self.task.seed, epoch, SHARD_ORDER), np.arange(self.source.num_shards))
        return int(np.argsort(keys, kind="stable")[place])

    def plan(self, epoch: int, place: int) -> Plan:
        """Plan of the shard at a place; the last two stay in memory."""
        if (epoch, place) not in self._plans:
            shard = self.shard_at(epoch, place)
            while len(self._plans) >= 2:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch, place] = make_plan(self.source.shard(shard), self.source.documents(shard), self.task,
                                                  key(self.task.seed, epoch, EXAMPLES, shard))
        return self._plans[epoch, place]

    def __getitems__(self, positions: list[DataPosition]) -> Examples:
        """Examples of the one micro-batch in `positions`; the DataLoader hands them to the collate function."""
        (position,) = positions
        plan = self.plan(position.epoch, position.place)
        shard = self.source.shard(self.shard_at(position.epoch, position.place))
        first, last = plan.bounds[position.micro_batch: position.micro_batch + 2]
        return Examples(shard, plan.take(slice(first, last)), position.mask_rate)

    def fullest(self) -> DataPosition:
        """The micro-batch of most tokens in the first epoch's first shard: as full as they come."""
        plan = self.plan(0, 0)
        return DataPosition(0, 0, int(np.argmax(np.add.reduceat(plan.lengths, plan.bounds[:-1]))))

    def positions(self, start: DataPosition, end_epoch: int | None = None) -> Iterator[DataPosition]:
        """Positions from `start` on, without end or up to the beginning of `end_epoch`."""
        epoch, place, first, _ = start
        while epoch != end_epoch:
            while place < self.source.num_shards:
                for micro_batch in range(first, self.plan(epoch, place).num_micro_batches):
                    yield DataPosition(epoch, place, micro_batch)
                place, first = place + 1, 0
            epoch, place = epoch + 1, 0

    def advance(self, position: DataPosition, count: int) -> DataPosition:
        """The position `count` micro-batches after `position`."""
        return next(islice(self.positions(position), count, None))

    def next_whole_shard(self, position: DataPosition) -> DataPosition:
        """The beginning of the first shard from `position` on from which no micro-batch has been taken. It does not depend on the task,
        as micro-batches do: from there another task goes on through the epoch."""
        return self.advance(DataPosition(position.epoch, position.place + (position.micro_batch > 0), 0), 0)


class MicroBatchSampler(Sampler):
    """Every `world_size`-th position from `start` on, the first being number `rank`: what one process trains on.

    `mask_rate` tells the rate of the micro-batches by their number from `start` on; None: the task's."""

    def __init__(self, dataset: PretrainingDataset, start: DataPosition, rank: int = 0, world_size: int = 1,
                 end_epoch: int | None = None, mask_rate: Callable[[int], float] | None = None):
        self.dataset, self.start, self.rank, self.world_size, self.end_epoch = dataset, start, rank, world_size, end_epoch
        self.mask_rate = mask_rate or (lambda number: None)

    def __iter__(self) -> Iterator[list[DataPosition]]:
        numbered = enumerate(self.dataset.positions(self.start, self.end_epoch))
        for number, position in islice(numbered, self.rank, None, self.world_size):
            yield [position._replace(mask_rate=self.mask_rate(number))]


def make_loader(dataset: PretrainingDataset, collator: Collator, sampler: MicroBatchSampler, workers: int = 0,
                pin_memory: bool = False) -> Iterator[Batch]:
    """Batches through a DataLoader. Its own generator keeps it from drawing from the global stream, on which dropout depends.

    UserError where a worker process has found damage, in one line."""
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, num_workers=workers, pin_memory=pin_memory,
                        generator=torch.Generator(), prefetch_factor=4 if workers else None,
                        worker_init_fn=begin_worker if workers else None, timeout=SILENCE_SECONDS if workers else 0,
                        multiprocessing_context=worker_context() if workers else None)
    try:
        yield from loader
    except UserError as error:  # of a worker: with its traceback, the message last
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
