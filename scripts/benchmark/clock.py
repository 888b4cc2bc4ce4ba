"""The clock that times both sides. Like the peer, it imports nothing from `pretrain`."""

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch._dynamo.utils import counters


@dataclass(frozen=True)
class Pace:
    """How the sides take turns on a type of device; numbers of steps."""

    timed: int  # in a row, for each side: a GPU queues the next step while it computes, as in a run
    untimed: int  # before the timed ones: after a turn, a side has freed its cached memory
    steady: int  # by our side alone, so no batch was prepared during the peer's turn
    patience: float  # seconds for a block of the peer; the first one compiles


PACE = {"cpu": Pace(1, 0, 2, 1800), "cuda": Pace(8, 1, 32, 90)}


def begin_clock(device: torch.device) -> float:
    """The time, once the device is idle; resets its peak memory."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter()


def end_clock(device: torch.device, begin: float) -> dict[str, float]:
    """Seconds since `begin`, peak memory of a GPU, and the work of torch.compile so far.

    Frees cached GPU memory for the other side."""
    peak = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    seconds = time.perf_counter() - begin
    torch.cuda.empty_cache()  # a no-op on a CPU
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def answer_calls(turns: Connection, side: object) -> None:
    """Answer calls of methods of `side` until a message names none."""
    while message := turns.recv():
        method, *values = message
        turns.send(getattr(side, method)(*values))


class Clock:
    """Times the steps of a side in blocks; before each block the side waits for its turn."""

    def __init__(self, turns: Connection, device: torch.device, pace: Pace, side: object = None):
        self.turns, self.device, self.pace, self.side = turns, device, pace, side
        self._wait()

    def _wait(self) -> None:
        answer_calls(self.turns, self.side)
        self.steps: list[tuple[int, float]] = []
        self.first_begin = self.begin = begin_clock(self.device)

    def end_step(self, tokens: int, flops: float = 0.0) -> None:
        """Must be called after each step, with its real tokens and floating-point operations."""
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
