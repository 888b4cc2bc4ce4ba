"""Processes of one side alone, from their start: seconds to the first step, and peak memory."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

from scripts.benchmark.peer import describe
from scripts.benchmark.processes import Process, ProcessError, start_script, training_rows
from scripts.benchmark.rows import same_examples

STEPS = 3  # then a checkpoint is written; a resumed process makes one more
POLL_SECONDS = 0.01
RESUME_GOAL = 5.0  # seconds


def measure_start(bench, found: dict) -> None:
    """Both sides in turns, with their text prepared: seconds to the end of the first step, from
    nothing and from a checkpoint; peak memory of the former, until it has saved."""
    repeats, values = 1 if bench.options.quick else 3, {}
    found["failed"] = {}
    for number, is_resumed in product(range(repeats), (False, True)):
        folder = bench.folder / str(number)
        folder.mkdir(exist_ok=True)
        for side, measure in (("ours", our_run), ("peer", peer_run)):
            if side in found["failed"]:
                continue
            try:
                seconds, peak = measure(bench, folder, is_resumed)
            except ProcessError as error:
                found["failed"][side] = str(error)
                continue
            name = "seconds_to_resume" if is_resumed else "seconds_to_first_step"
            values.setdefault((name, side), []).append(seconds)
            if not is_resumed:
                values.setdefault(("peak_gib", side), []).append(peak / 2**30)
    for (name, side), kept in values.items():
        found.setdefault(name, {"goal": RESUME_GOAL} if name == "seconds_to_resume" else {})
        found[name][side] = median(kept)


def our_run(bench, folder: Path, is_resumed: bool) -> tuple[float, int]:
    """(seconds to the first step, peak bytes) of pretrain.py, from its start or from --resume."""
    output, first = folder / "ours", STEPS + 1 if is_resumed else 1
    options = bench.run_options(
        output=str(output),
        resume=is_resumed,
        micro_batch_size=bench.run.micro_batch_size,
        max_steps=STEPS + is_resumed,
        save_every=str(STEPS),
        log_every=1,
    )
    process = start_script(folder, "pretrain", "pretrain", options)
    seconds, peak = watch(process, lambda: first in training_rows(output))
    if bench.device_type == "cuda":
        peak = max(row["memory/peak_bytes"] for row in training_rows(output).values())
    return seconds, peak


def peer_run(bench, folder: Path, is_resumed: bool) -> tuple[float, int]:
    """The same of a Trainer, from its start or from `resume_from_checkpoint`."""
    steps = STEPS + is_resumed
    peer = describe(bench.run, same_examples(bench.run, (STEPS + 1) * bench.options.batch_size))
    more = {"resume": is_resumed, "save_strategy": "steps", "save_steps": steps}
    call = partial(peer.run_in_turns, **more)
    process = Process(folder / "peer.log", call, str(folder / "peer"), steps, 0, 1)
    for _ in range(steps):
        process.send()  # so that it never waits
    seconds, peak = watch(process, process.turns.poll)
    if bench.device_type == "cuda":
        blocks = [process.turns.recv() for _ in range(1 if is_resumed else steps)]
        peak = max(block["peak_bytes"] for block in blocks)
    return seconds, peak


def watch(process: Process, is_done: Callable[[], bool]) -> tuple[float, int]:
    """(seconds until `is_done`, peak of private memory until the end); ProcessError if it fails."""
    seconds, peak, is_running = 0.0, 0, True
    with process:
        while is_running:
            is_running, peak = process.is_running(), max(peak, private_bytes(process.process.pid))
            if not seconds and is_done():
                seconds = time.perf_counter() - process.begin
            time.sleep(POLL_SECONDS)
        if process.process.exitcode or not seconds:
            raise process.failure()
    return seconds, peak


def private_bytes(pid: int) -> int:
    """Memory of a process that no file backs, RssAnon of Linux; 0 on other systems."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        found = re.search(r"RssAnon:\s+(\d+)", status)  # none when it has ended
        return 1024 * int(found[1]) if found else 0
    return 0
