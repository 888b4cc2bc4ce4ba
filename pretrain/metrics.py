"""Everything that is logged: sums of losses on the device, means, speed.

Nothing here waits for the device except `LossTotals.read` and `Meter.flush`.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pretrain.batch import Batch, Loss
from pretrain.runtime.distributed import World, all_reduce
from pretrain.runtime.sharding import whole
from pretrain.schema import TEXT, number, values_of

MAX_LOG_PERPLEXITY = 700.0  # exp of more overflows
SUMMED = ("sums", "num_correct", "counts")  # of `LossTotals`
# What `Meter` sums between two logged steps.
SUMS = ("tokens", "slots", "sequences", "masked", "shortfall", "flops", "wait_seconds", "seconds")
NUMBERS = values_of(number(-1e305, 1e305), "numbers by name")  # in a saved state
TEXTS = values_of(TEXT, "text by name")


@dataclass
class LossTotals:
    """Sums of loss terms and of their counts over batches; float64 scalars or numbers."""

    sums: dict[str, Tensor | float] = field(default_factory=dict)
    num_correct: dict[str, Tensor | float] = field(default_factory=dict)
    counts: dict[str, Tensor | float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)  # by term
    denominators: dict[str, str] = field(default_factory=dict)  # by term: a name in `counts`

    @classmethod
    def of(cls, losses: dict[str, Loss], counts: dict[str, float]) -> LossTotals:
        """The totals of one batch; KeyError for a term whose count is not in `counts`."""
        correct = {name: loss.num_correct for name, loss in losses.items()}
        denominators = {name: loss.count or name for name, loss in losses.items()}
        for name, count in denominators.items():
            if count not in counts:
                known = ", ".join(counts)
                raise KeyError(f"loss term {name!r}: no count {count!r} among {known}")
        return cls(
            {name: loss.sum.detach().double() for name, loss in losses.items()},
            {name: number.double() for name, number in correct.items() if number is not None},
            {name: float(count) for name, count in counts.items()},
            {name: loss.weight for name, loss in losses.items()},
            denominators,
        )

    def __iadd__(self, other: LossTotals) -> LossTotals:
        for group in SUMMED:
            mine = vars(self)[group]
            for name, value in vars(other)[group].items():
                mine[name] = mine.get(name, 0.0) + value
        self.weights.update(other.weights)
        self.denominators.update(other.denominators)
        return self

    def _mapped(self, change: Callable[[Tensor | float], Tensor | float]) -> LossTotals:
        """These totals with `change` applied to each, in the same order on all processes."""
        mapped = {}
        for group in SUMMED:
            numbers = vars(self)[group]
            mapped[group] = {name: change(numbers[name]) for name in sorted(numbers)}
        return replace(self, **mapped)

    def where(self, keep: Tensor | bool) -> LossTotals:
        """These totals if `keep`, else zeros, even where they are not finite."""
        keep = torch.as_tensor(keep)
        zero = torch.zeros((), dtype=torch.float64, device=keep.device)  # a copy would wait
        return self._mapped(lambda value: torch.where(keep, value, zero))

    def read(self, device: torch.device) -> LossTotals:
        """As numbers, summed over all processes, which must have the same terms."""
        groups = [vars(self)[group] for group in SUMMED]
        values = [group[name] for group in groups for name in sorted(group)]
        numbers = iter(_read_over_ranks(values, device))
        return self._mapped(lambda _: next(numbers))

    def means(self) -> dict[str, float]:
        """loss, NAME_loss, NAME_accuracy and perplexity, as named in the logs, of totals that
        `read` returned; nothing for a term with a count of 0."""
        counts = {name: self.counts[count] for name, count in self.denominators.items()}
        means = {name: self.sums[name] / count for name, count in counts.items() if count}
        numbers = {}
        for name, mean in means.items():
            prefix = "" if name == "label" else f"{name}_"  # the only term of fine-tuning
            numbers[f"{prefix}loss"] = mean
            if name in self.num_correct:
                numbers[f"{prefix}accuracy"] = self.num_correct[name] / counts[name]
        if means:
            numbers["loss"] = sum(self.weights[name] * mean for name, mean in means.items())
        if "mlm" in means:
            numbers["perplexity"] = math.exp(min(means["mlm"], MAX_LOG_PERPLEXITY))
        return numbers


def _read_over_ranks(values: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """Scalars as numbers, summed over all processes. Waits for the device once."""
    if not values:
        return []
    tensors = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    return all_reduce(torch.stack(tensors).cpu()).tolist()


class Meter:
    """Sums since the last logged step, and totals of the run.

    Time counts from the start of `waiting` to the end of `add`, without evaluation and saving.
    State is summed over the processes; the main one gets it all on load."""

    state_form = {
        "losses": dict.fromkeys((*SUMMED, "weights"), NUMBERS) | {"denominators": TEXTS},
        **dict.fromkeys(("sums", "totals", "last_means"), NUMBERS),
    }

    def __init__(self, device: torch.device, world: World, peak_flops: float):
        self.device, self.world = device, world
        self.peak_flops = peak_flops * world.size  # FLOP/s of all devices
        self.losses = LossTotals()
        self.sums: Counter = Counter()  # of SUMS; of this process, since the last logged step
        self.totals: Counter = Counter()  # of all processes, up to the last logged step
        self.last_means: dict[str, float] = {}
        self._logged: dict[str, Tensor | float] = {}
        self._tick = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps the fetch of a step's data: starts the clock and records the wait."""
        self._tick = begin = time.perf_counter()
        yield
        self.sums["wait_seconds"] += (time.perf_counter() - begin) / self.world.size

    def add(self, losses: LossTotals, logged: dict, batches: Sequence[Batch], flops: float) -> None:
        """Add an update: its losses, numbers to log, data and FLOPs. Of the numbers, `flush` logs
        those of the last update, whole if they are sharded: all processes must add the same."""
        self.losses += losses
        self._logged = logged
        for batch in batches:
            self.sums["tokens"] += batch.num_tokens
            self.sums["slots"] += len(batch.input_ids)
            self.sums["sequences"] += batch.num_sequences
            self.sums["masked"] += batch.counts.get("mlm", 0)
            self.sums["shortfall"] += batch.shortfall
        self.sums["flops"] += flops
        self._count_seconds()

    def flush(self) -> dict[str, float]:
        """The numbers of the steps since the last flush. Waits for the device."""
        logged = {
            name: float(whole(value.detach()) if isinstance(value, Tensor) else value)
            for name, value in self._logged.items()
        }
        self.last_means = self.losses.read(self.device).means()
        self._count_seconds()  # includes the wait for the device, so that the speed is right
        sums = self._read_sums()
        self.totals.update(sums)  # adds
        self.losses, self.sums = LossTotals(), Counter()
        seconds = max(sums["seconds"], 1e-9)
        return {
            **{f"train/{name}": value for name, value in self.last_means.items()},
            "speed/tokens_per_second": sums["tokens"] / seconds,
            "speed/mfu": sums["flops"] / seconds / self.peak_flops,
            "speed/data_wait": sums["wait_seconds"] / seconds,
            "speed/padding": 1 - sums["tokens"] / sums["slots"],
            **logged,
            "memory/peak_bytes": peak_memory_bytes(self.device),
        }

    def summary(self) -> dict[str, float]:
        """The totals of the run so far, with the means of the last logged steps."""
        totals = Counter(self.totals)
        totals.update(self._read_sums())
        seconds = max(totals["seconds"], 1e-9)
        return {
            "real_tokens": int(totals["tokens"]),
            "seconds": seconds,
            "sequences_per_second": totals["sequences"] / seconds,
            "tokens_per_second": totals["tokens"] / seconds,
            "mask_shortfall": totals["shortfall"] / max(1.0, totals["masked"]),
            **{f"train_{name}": value for name, value in self.last_means.items()},
        }

    def state_dict(self) -> dict:
        """Everything so far, summed over all processes, which must call this together."""
        return {
            "losses": vars(self.losses.read(self.device)),
            "sums": self._read_sums(),
            "totals": dict(self.totals),
            "last_means": self.last_means,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the result of `state_dict`."""
        losses = LossTotals(**state["losses"])
        self.losses = losses if self.world.is_main else losses.where(False)
        self.sums = Counter(state["sums"] if self.world.is_main else {})
        self.totals, self.last_means = Counter(state["totals"]), state["last_means"]

    def _count_seconds(self) -> None:
        """Add the time since the last call or fetch; summed over processes, it is their mean."""
        now = time.perf_counter()
        self.sums["seconds"] += (now - self._tick) / self.world.size
        self._tick = now

    def _read_sums(self) -> dict[str, float]:
        return dict(zip(SUMS, _read_over_ranks([self.sums[name] for name in SUMS], "cpu")))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
