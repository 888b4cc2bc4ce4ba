"""Sides for tests/test_benchmark.py, without its imports: their processes start faster."""

import sys
import time
from pathlib import Path

from scripts.benchmark.processes import Process


def count_up(turns):
    """Answers every turn with its number."""
    print("this goes to the log")
    number = 0
    while turns.recv():
        number += 1
        turns.send(number)


def fail(turns):
    """Fails in the second turn."""
    turns.send(turns.recv())
    turns.recv()
    raise RuntimeError("no luck. Ask for advice")


def sleep(turns, folder):
    """Starts a process of its own, tells its number, and never answers."""
    child = Process(Path(folder, "child.log"), idle)
    Path(folder, "pid").write_text(str(child.process.pid))
    time.sleep(60)


def idle(turns):
    """Does nothing for a minute."""
    time.sleep(60)


def take_memory(turns, mark, code):
    """64 MiB; after a while `mark` is there; ends with `code`."""
    kept = bytearray(1 << 26)
    Path(mark).touch()
    time.sleep(0.3)
    print(f"{len(kept)} bytes", flush=True)
    sys.exit(code)


class HungryRows(list):
    """Rows for whose micro-batches the peer has no memory."""

    def __getitem__(self, index):
        if isinstance(index, int):
            raise MemoryError("too large")
        return super().__getitem__(index)


def hungry_rows(run, number):
    """The pairs of a run; too large for the peer unless a micro-batch is one sequence."""
    from scripts.benchmark.rows import same_examples

    rows = same_examples(run, number)
    return HungryRows(rows) if run.micro_batch_size > 1 else rows
