"""Everything that is logged: sums of losses on the device, means, speed.

Nothing here waits for the device except `LossTotals.read` and `Meter.flush`.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.batch import Batch, Loss
from pretrain.runtime.distributed import World, sum_over_ranks
from pretrain.schema import FLOAT, TEXT, number, values_of

MAX_LOG_PERPLEXITY = 700.0  # exp of more overflows
MAX_SUM = 1e30  # in a saved state


@dataclass
class LossTotals:
    """Sums of the terms of a loss over batches, and of their counts; float64 scalars or numbers."""

    sums: dict[str, Tensor | float] = field(default_factory=dict)
    num_correct: dict[str, Tensor | float] = field(default_factory=dict)
    counts: dict[str, Tensor | float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)  # by term
    denominators: dict[str, str] = field(default_factory=dict)  # by term: a name in `counts`

    @classmethod
    def of(cls, losses: dict[str, Loss], counts: dict[str, float]) -> LossTotals:
        """The totals of one batch."""
        return cls(
            {name: loss.sum.detach().double() for name, loss in losses.items()},
            {
                name: loss.num_correct.double()
                for name, loss in losses.items()
                if loss.num_correct is not None
            },
            {name: float(count) for name, count in counts.items()},
            {name: loss.weight for name, loss in losses.items()},
            {name: loss.count or name for name, loss in losses.items()},
        )

    def __add__(self, other: LossTotals) -> LossTotals:
        return LossTotals(
            _add(self.sums, other.sums),
            _add(self.num_correct, other.num_correct),
            _add(self.counts, other.counts),
            self.weights | other.weights,
            self.denominators | other.denominators,
        )

    def where(self, keep: Tensor | bool) -> LossTotals:
        """These totals if `keep`, zeros otherwise, also for those that are not finite.

        Numbers are made on the device: copying them there would wait for it."""
        keep = torch.as_tensor(keep)

        def kept(part: Tensor | float) -> Tensor:
            if not isinstance(part, Tensor):
                part = torch.full((), part, dtype=torch.float64, device=keep.device)
            return torch.where(keep, part.double(), torch.zeros_like(part, dtype=torch.float64))

        parts = {
            name: {key: kept(part) for key, part in getattr(self, name).items()}
            for name in ("sums", "num_correct", "counts")
        }
        return LossTotals(**parts, weights=self.weights, denominators=self.denominators)

    def read(self, device: torch.device) -> LossTotals:
        """As numbers, summed over all processes, each of which has the same terms."""
        groups = ("sums", "num_correct", "counts")
        flat = {
            (group, key): value for group in groups for key, value in getattr(self, group).items()
        }
        numbers = read_over_ranks([flat[key] for key in sorted(flat)], device)
        read: dict[str, dict[str, float]] = {group: {} for group in groups}
        for (group, key), value in zip(sorted(flat), numbers):
            read[group][key] = value
        return LossTotals(**read, weights=self.weights, denominators=self.denominators)

    def means(self) -> dict[str, float]:
        """Of totals that are numbers: loss, NAME_loss, NAME_accuracy and perplexity, under the
        names of TensorBoard and metrics.jsonl; nothing for a term whose count is 0."""
        counts = {name: self.counts.get(count, 0.0) for name, count in self.denominators.items()}
        means = {name: self.sums[name] / count for name, count in counts.items() if count}
        numbers = {}
        for name, mean in means.items():
            prefix = "" if name == "label" else f"{name}_"  # the one term of classification
            numbers[f"{prefix}loss"] = mean
            if name in self.num_correct:
                numbers[f"{prefix}accuracy"] = self.num_correct[name] / counts[name]
        if means:
            numbers["loss"] = sum(self.weights[name] * mean for name, mean in means.items())
        if "mlm" in means:
            numbers["perplexity"] = math.exp(min(means["mlm"], MAX_LOG_PERPLEXITY))
        return numbers


def _add(left: dict, right: dict) -> dict:
    return left | {name: left.get(name, 0.0) + value for name, value in right.items()}


def read_over_ranks(values: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """Scalars as numbers, summed over all processes. Waits for the device once."""
    if not values:
        return []
    tensors = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    return sum_over_ranks(torch.stack(tensors).cpu()).tolist()


class Meter:
    """Sums since the last logged step, and totals of the run.

    Time counts from the start of `waiting` to the end of `add`: evaluation and saving do not.
    `state_dict` sums over the processes; `load_state_dict` gives the sums to the first one.
    """

    state_form = {
        "losses": {
            **dict.fromkeys(("sums", "num_correct", "counts"), values_of(FLOAT, "numbers by name")),
            "weights": values_of(number(-MAX_SUM, MAX_SUM), "numbers by name"),
            "denominators": values_of(TEXT, "text by name"),
        },
        "sums": values_of(number(0, MAX_SUM), "numbers by name"),
        "totals": values_of(number(0, MAX_SUM), "numbers by name"),
        "last_means": values_of(FLOAT, "numbers by name"),
    }

    def __init__(self, device: torch.device, world: World, peak_flops: float):
        self.device, self.world = device, world
        self.peak_flops = peak_flops * world.size  # FLOP/s of all devices
        self.losses = LossTotals()
        self.sums: dict[str, float] = {}  # of this process, since the last logged step
        self.totals: dict[str, float] = {}  # of all processes, up to the last logged step
        self.last_means: dict[str, float] = {}
        self._logged: dict[str, Tensor | float] = {}
        self._tick = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetch of a step's data: the clock starts, and the wait for data is noted."""
        self._tick = begin = time.perf_counter()
        yield
        self._count("wait_seconds", (time.perf_counter() - begin) / self.world.size)

    def add(
        self,
        losses: LossTotals,
        logged: dict[str, Tensor | float],
        batches: Sequence[Batch],
        flops: float,
    ) -> None:
        """One update: its losses, the numbers to log as they are, its data, its operations."""
        self.losses = self.losses + losses
        self._logged = logged
        self._count("tokens", sum(batch.num_tokens for batch in batches))
        self._count("slots", sum(len(batch.input_ids) for batch in batches))
        self._count("sequences", sum(batch.num_sequences for batch in batches))
        self._count("masked", sum(batch.counts.get("mlm", 0) for batch in batches))
        self._count("shortfall", sum(batch.shortfall for batch in batches))
        self._count("flops", flops)
        self._count_seconds()

    def flush(self) -> dict[str, float]:
        """The numbers of the steps since the last flush. Waits for the device."""
        logged = {name: float(value) for name, value in self._logged.items()}
        means = self.losses.read(self.device).means()
        self._count_seconds()  # with the wait for the device, so that the speed is right
        sums = self._read_sums()
        seconds = max(sums["seconds"], 1e-9)
        self._add_to_totals(sums, means)
        self.losses, self.sums = LossTotals(), {}
        return {
            **{f"train/{name}": value for name, value in means.items()},
            "speed/tokens_per_second": sums["tokens"] / seconds,
            "speed/mfu": sums["flops"] / seconds / self.peak_flops,
            "speed/data_wait": sums["wait_seconds"] / seconds,
            "speed/padding": 1 - sums["tokens"] / sums["slots"],
            **logged,
            "memory/peak_bytes": peak_memory_bytes(self.device),
        }

    def summary(self) -> dict[str, float]:
        """The totals of the run up to now, with the means of the last logged steps."""
        sums = self._read_sums()
        totals = _add(self.totals, sums)
        seconds = max(totals.get("seconds", 0.0), 1e-9)
        return {
            "real_tokens": int(totals.get("tokens", 0)),
            "seconds": seconds,
            "sequences_per_second": totals.get("sequences", 0.0) / seconds,
            "tokens_per_second": totals.get("tokens", 0.0) / seconds,
            "mask_shortfall": totals.get("shortfall", 0.0) / max(1.0, totals.get("masked", 0.0)),
            **{f"train_{name}": value for name, value in self.last_means.items()},
        }

    def state_dict(self) -> dict:
        """Everything since the start, summed over all processes, which call this together."""
        losses = self.losses.read(self.device)
        return {
            "losses": vars(losses),
            "sums": self._read_sums(),
            "totals": dict(self.totals),
            "last_means": dict(self.last_means),
        }

    def load_state_dict(self, state: dict) -> None:
        """The counterpart of `state_dict`."""
        losses = LossTotals(**state["losses"])
        self.losses = losses if self.world.is_main else losses.where(False)
        self.sums = dict(state["sums"]) if self.world.is_main else dict.fromkeys(state["sums"], 0.0)
        self.totals, self.last_means = dict(state["totals"]), dict(state["last_means"])

    def _count(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def _count_seconds(self) -> None:
        """Time since the last call or the start of the fetch; the sum over processes is a mean."""
        now = time.perf_counter()
        self._count("seconds", (now - self._tick) / self.world.size)
        self._tick = now

    def _read_sums(self) -> dict[str, float]:
        names = sorted(self.sums)
        return dict(zip(names, read_over_ranks([self.sums[name] for name in names], "cpu")))

    def _add_to_totals(self, sums: dict[str, float], means: dict[str, float]) -> None:
        self.totals, self.last_means = _add(self.totals, sums), means


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that was in use: of the GPU by torch, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
