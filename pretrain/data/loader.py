"""The Dataset (data position -> examples of a micro-batch), and the iterator over optimizer steps,
which owns the step, position and phase of the data.

A micro-batch is a pure function of its position. So a checkpoint saves three numbers (the progress
follows from its step), and 1, 2 or 8 processes, with or without workers, train on the same batches.
Several texts in given shares are a `Mixture` (pretrain/data/mixture.py) with longer positions.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pretrain.batch import Batch
from pretrain.data.collate import Collator, Examples
from pretrain.data.corpus import Corpus
from pretrain.data.hash_rng import derive, key
from pretrain.data.pairs import Plan, Task, make_plan
from pretrain.data.workers import begin_worker, worker_context
from pretrain.errors import UserError
from pretrain.schema import integer

SHARD_ORDER, EXAMPLES = 0, 1  # streams of random numbers
SILENCE_SECONDS = 300  # until a silent worker process counts as stuck


class DataPosition(NamedTuple):
    """The position of a micro-batch; `place` is a shard's place in the order of the epoch."""

    epoch: int
    place: int
    micro_batch: int
    progress: float = 0.0  # share of the run that is done, 0 to 1; only masks may depend on it

    @property
    def places(self) -> tuple[DataPosition, ...]:  # a position in a mixture has several
        return (self,)

    @property
    def numbers(self) -> tuple[int, ...]:
        """All but the progress; `PretrainingDataset.position_of` reads them."""
        return self[:3]

    def __str__(self) -> str:  # the form that show_masks.py takes
        return " ".join(map(str, self))


class PretrainingDataset(Dataset):
    """Micro-batches of `source` under `task`, by data position."""

    start = DataPosition(0, 0, 0)
    shares = (1.0,)  # of the tokens, by part

    def __init__(self, source: Corpus, task: Task):
        self.source, self.task = source, task
        self._plans: dict[tuple[int, int], Plan] = {}

    @property
    def parts(self) -> tuple[PretrainingDataset, ...]:  # a mixture has several
        return (self,)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_plans": {}}

    def shard_at(self, epoch: int, place: int) -> int:
        """The shard at a place in the epoch's order."""
        return int(_shard_order(self.task.seed, epoch, self.source.num_shards)[place])

    def plan(self, epoch: int, place: int) -> Plan:
        """Plan of the shard at a place; the last two plans stay in memory."""
        if (epoch, place) not in self._plans:
            if len(self._plans) >= 2:
                del self._plans[next(iter(self._plans))]
            index = self.shard_at(epoch, place)
            shard, documents = self.source.shard(index), self.source.documents(index)
            plan_key = key(self.task.seed, epoch, EXAMPLES, index)
            self._plans[epoch, place] = make_plan(shard, documents, self.task, plan_key)
        return self._plans[epoch, place]

    def __getitem__(self, position: DataPosition) -> Examples:
        """Examples of the micro-batch at `position`."""
        plan = self.plan(position.epoch, position.place)
        shard = self.source.shard(self.shard_at(position.epoch, position.place))
        first, last = plan.bounds[position.micro_batch : position.micro_batch + 2]
        return Examples(shard, plan.take(slice(first, last)), position.progress)

    def position_of(self, numbers: Sequence[int]) -> DataPosition:
        """The position with these `numbers`; ValueError if they are not three."""
        epoch, place, micro_batch = numbers
        return DataPosition(epoch, place, micro_batch)

    def count_tokens(self, position: DataPosition) -> int:
        """Tokens of the micro-batch at `position`, [CLS] and [SEP] included."""
        return int(self[position].plan.lengths.sum())

    @property
    def place_of_largest(self) -> int:
        """The place of the corpus's largest shard in the first epoch."""
        order = _shard_order(self.task.seed, 0, self.source.num_shards)
        return int(np.flatnonzero(order == self.source.largest)[0])

    def fullest(self) -> DataPosition:
        """The micro-batch with the most tokens, in the largest shard or, if that has none, in the
        next one that has any."""
        epoch, place, *_ = next(self.positions(self.start._replace(place=self.place_of_largest)))
        plan = self.plan(epoch, place)
        num_tokens = np.add.reduceat(plan.lengths, plan.bounds[:-1])
        return DataPosition(epoch, place, int(np.argmax(num_tokens)))

    def positions(
        self, start: DataPosition, end_epoch: int | None = None
    ) -> Iterator[DataPosition]:
        """Positions from `start` on, endless or up to the beginning of `end_epoch`."""
        epoch, place, first, _ = start
        while epoch != end_epoch:
            while place < self.source.num_shards:
                for micro_batch in range(first, self.plan(epoch, place).num_micro_batches):
                    yield DataPosition(epoch, place, micro_batch)
                place, first = place + 1, 0
            epoch, place = epoch + 1, 0

    def next_shards(self, position: DataPosition) -> DataPosition:
        """The beginning of the next shard, or `position` itself if it begins one."""
        whole = DataPosition(position.epoch, position.place + (position.micro_batch > 0), 0)
        return next(self.positions(whole))  # of the next epoch if that was the last shard


def progress_at(step: int, total_steps: float) -> float:
    """Share of a run that is done: 0 at its first step, which is step 0, and 1 at its last."""
    return min(1.0, step / max(1, total_steps - 1))


@lru_cache(maxsize=4)  # each micro-batch asks, and a large corpus has 50,000 shards
def _shard_order(seed: int, epoch: int, num_shards: int) -> np.ndarray:
    keys = derive(key(seed, epoch, SHARD_ORDER), np.arange(num_shards))
    return np.argsort(keys, kind="stable")


@dataclass(eq=False)
class TrainData(Iterator[list[Batch]]):
    """Iterator over optimizer steps: each item is a list of this process's micro-batches.

    UserError if a shard is damaged, even if a worker process finds it."""

    phases: Sequence[tuple[PretrainingDataset, Collator]]  # or a Mixture in each phase
    phase_ends: Sequence[int]  # the last step of each phase; ignored for the last phase
    micro_batches: int  # in a step, over all processes
    rank: int = 0
    world_size: int = 1
    total_steps: float = math.inf  # of the run; without an end, progress stays at 0
    workers: int = 0
    pin_memory: bool = False

    state_form = {"step": integer(), "phase": integer(), "position": [integer()]}

    def __post_init__(self):
        dataset, _ = self.phases[0]
        self.load_state_dict({"step": 0, "phase": 0, "position": dataset.start.numbers})

    def state_dict(self) -> dict:
        """Plain values: steps handed out, phase of the last one, position of the next one."""
        return {"step": self.step, "phase": self.phase, "position": list(self._next.numbers)}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the step of `state`."""
        self.step = state["step"]  # steps handed out
        self.phase = state["phase"]  # of the last of them
        dataset, _ = self.phases[0]  # all phases have the same texts
        self._next = dataset.position_of(state["position"])  # the next step's first micro-batch
        self.position = self._next  # of the last step's
        self._loader: Iterator[Batch] | None = None

    def __next__(self) -> list[Batch]:
        phase = min(bisect_right(self.phase_ends, self.step), len(self.phases) - 1)
        if phase != self.phase:
            self._begin_phase(phase)
        if self._loader is None:
            self._loader = self._open()
        try:
            batches = list(islice(self._loader, self.micro_batches // self.world_size))
        except UserError as error:  # from a worker: the message follows a traceback
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
        self.position = self._next._replace(progress=progress_at(self.step, self.total_steps))
        dataset, _ = self.phases[phase]
        self._next = next(islice(dataset.positions(self._next), self.micro_batches, None))
        self.step += 1
        return batches

    def logged(self) -> dict[str, float]:
        """Numbers to log for the last step."""
        dataset, collator = self.phases[self.phase]
        numbers = collator.masking.logged(self.position.progress)
        if len(self.phases) > 1:
            numbers["train/max_length"] = dataset.task.max_length
        return numbers

    def _begin_phase(self, phase: int) -> None:
        """Skip the rest of the current shard, of each text. All phases read the shards in the same
        order, but a position inside a shard depends on the length, and no text may be read twice.
        """
        dataset, _ = self.phases[phase]
        self.phase, self._loader = phase, None  # ends the old loader's workers
        self._next = dataset.next_shards(self._next)
        if self.rank == 0:
            length = dataset.task.max_length
            change = f"from here on, sequences of {length} tokens"
            tqdm.write(f"step {self.step + 1:,}: {change}", file=sys.stderr)

    def _open(self) -> Iterator[Batch]:
        """Batches of this process from the next step on. They hold no reference to this object, so
        the workers end when it is deleted."""
        dataset, collator = self.phases[self.phase]
        step, total_steps, micro_batches = self.step, self.total_steps, self.micro_batches
        numbered = enumerate(dataset.positions(self._next))
        positions = (
            position._replace(progress=progress_at(step + number // micro_batches, total_steps))
            for number, position in islice(numbered, self.rank, None, self.world_size)
        )
        options: dict[str, Any] = {}
        if self.workers:
            options = {"num_workers": self.workers, "prefetch_factor": 4}
            options |= {"timeout": SILENCE_SECONDS, "worker_init_fn": begin_worker}
            options["multiprocessing_context"] = worker_context()
        loader = DataLoader(
            dataset,
            batch_size=None,  # an item is a micro-batch
            sampler=positions,
            collate_fn=collator,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # the global one is for dropout
            **options,
        )
        try:
            return iter(loader)
        except OSError as error:
            raise RuntimeError(f"DataLoader cannot start a process: {error}") from error
