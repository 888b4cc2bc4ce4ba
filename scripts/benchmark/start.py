"""Seconds from the start of a process to its first step, and peak memory, of one side at a time."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median

from scripts.benchmark.clock import PACE
from scripts.benchmark.processes import Command, Process, ProcessError, training_rows
from scripts.benchmark.rows import same_examples
from scripts.benchmark.steps import serve

METHOD = "spawn"  # a new Python
STEPS = 3  # until a checkpoint; a resumed process runs one more
POLL_SECONDS = 0.01
RESUME_GOAL = 5.0  # seconds


def measure_start(bench) -> Iterator[dict]:
    """Both sides, alternating, on prepared text: seconds to the end of the first step, from scratch
    and from a checkpoint; peak memory from scratch until the checkpoint is saved."""
    ours = Process(bench.folder, "ours", serve, bench.run_options())
    given = ours.ask("describe_peer", same_examples, STEPS + 1)
    ours.stop()
    names = ("seconds_to_first_step", "seconds_to_resume", "peak_gib")
    failed, values = {}, {name: {"ours": [], "peer": []} for name in names}
    repeats, sides = 1 if bench.options.quick else 3, {"ours": _our_run, "peer": _peer_run}
    for number, is_resumed, side in product(range(repeats), (False, True), sides):
        if side in failed:
            continue
        folder = bench.folder / str(number)
        folder.mkdir(exist_ok=True)
        try:
            seconds, peak = sides[side](bench, folder, given, is_resumed)
        except ProcessError as error:
            failed[side] = str(error)
            continue
        values[names[is_resumed]][side].append(seconds)
        if not is_resumed:
            values["peak_gib"][side].append(peak / 2**30)
    values["seconds_to_resume"]["goal"] = [RESUME_GOAL]
    for name, by_side in values.items():
        medians = {side: median(measured) for side, measured in by_side.items() if measured}
        yield {name: medians, "failed": failed}


def _our_run(bench, folder: Path, given: dict, is_resumed: bool) -> tuple[float, int]:
    """(seconds to the first step, peak bytes) of pretrain.py, from scratch or with --resume."""
    output, first = folder / "ours", STEPS + 1 if is_resumed else 1
    changed = {"output": str(output), "resume": is_resumed, "max_steps": STEPS + is_resumed}
    changed |= {"save_every": str(STEPS), "log_every": 1, **given["facts"]}
    process = Command(folder, "pretrain", bench.run_options(**changed), method=METHOD)
    seconds, peak = watch(process, lambda: first in training_rows(output))
    if bench.device_type == "cuda":
        peak = max(row["memory/peak_bytes"] for row in training_rows(output).values())
    return seconds, peak


def _peer_run(bench, folder: Path, given: dict, is_resumed: bool) -> tuple[float, int]:
    """The same for a Trainer, from scratch or with `resume_from_checkpoint`."""
    steps, pace = STEPS + is_resumed, PACE["cpu"]  # a block is one step
    more = {"resume": is_resumed, "save_strategy": "steps", "save_steps": steps}
    values = (given["peer"].train_in_turns, str(folder / "peer"), steps, pace, more)
    process = Process(folder, "peer", *values, method=METHOD)
    for _ in range(steps + 1):
        process.send()  # in advance, so it never waits
    seconds, peak = watch(process, process.turns.poll)
    if bench.device_type == "cuda":
        blocks = [process.turns.recv() for _ in range(1 if is_resumed else steps)]
        peak = max(block["peak_bytes"] for block in blocks)
    return seconds, peak


def watch(process: Process, is_done: Callable[[], bool]) -> tuple[float, int]:
    """(seconds until `is_done`, peak private memory until the end); ProcessError if it fails."""
    seconds, peak, is_running = 0.0, 0, True
    while is_running:
        is_running, peak = process.is_running(), max(peak, _private_bytes(process.process.pid))
        if not seconds and is_done():
            seconds = time.perf_counter() - process.begin
        time.sleep(POLL_SECONDS)
    process.stop()
    if process.process.exitcode or not seconds:
        raise ProcessError(process.end())
    return seconds, peak


def _private_bytes(pid: int) -> int:
    """Memory of a process that is not backed by files (RssAnon); 0 if not on Linux."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        found = re.search(r"RssAnon:\s+(\d+)", status)  # missing once it has ended
        return 1024 * int(found[1]) if found else 0
    return 0
