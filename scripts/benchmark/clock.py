"""The one loop that times both sides. Like the peer, it imports nothing of ours."""

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch._dynamo.utils import counters


@dataclass(frozen=True)
class Pace:
    """How the sides take turns on a kind of device, in steps."""

    timed: int  # of a side in a row: a GPU queues the next one while it computes, as in a run
    untimed: int  # before them: between its blocks a side gives its free memory back to the GPU
    steady: int  # of ours alone, so that no batch was prepared in the other side's time
    patience: float  # seconds for a block of the peer; the first one compiles


PACE = {"cpu": Pace(1, 0, 2, 1800), "cuda": Pace(8, 1, 32, 90)}


def begin_clock(device: torch.device) -> float:
    """The time, once the device is idle; its peak memory counts from here on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter()


def end_clock(device: torch.device, begin: float) -> dict[str, float]:
    """Seconds since `begin`, peak memory of a GPU, and what torch.compile did so far.

    Memory that no tensor uses goes back to the GPU, for the other side."""
    peak = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    seconds = time.perf_counter() - begin
    torch.cuda.empty_cache()  # nothing on a CPU
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


class Clock:
    """Times the steps of a side in blocks; each block is a turn, which the side waits for."""

    def __init__(self, turns: Connection, device: torch.device, pace: Pace, side: object = None):
        self.turns, self.device, self.pace, self.side = turns, device, pace, side
        self._wait()

    def _wait(self) -> None:
        """Until the next turn, answer with methods of the side."""
        while message := self.turns.recv():
            method, *values = message
            self.turns.send(getattr(self.side, method)(*values))
        self.steps: list[tuple[int, float]] = []
        self.first_begin = self.begin = begin_clock(self.device)

    def end_step(self, tokens: int, flops: float = 0.0) -> None:
        """Call this after each step, with its real tokens and floating-point operations."""
        untimed = self.pace.untimed
        self.steps.append((tokens, flops))
        if len(self.steps) == untimed:
            self.begin = begin_clock(self.device)
        if len(self.steps) == untimed + self.pace.timed:
            tokens, flops = map(sum, zip(*self.steps[untimed:]))
            block = end_clock(self.device, self.begin) | {"tokens": tokens, "flops": flops}
            block["untimed_seconds"] = self.begin - self.first_begin
            self.turns.send(block | (self.side.facts() if self.side else {}))
            self._wait()
