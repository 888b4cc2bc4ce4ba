"""Processes of one side alone, from their start: seconds to the first step, also of a resumed run, and peak memory."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from pretrain.benchmark.peer import FIRST_STEP, describe
from pretrain.benchmark.processes import ROOT, as_command, last_lines, start, stop
from pretrain.benchmark.rows import same_examples
from pretrain.command import UserError
from pretrain.files import write_json
from pretrain.setup import saved_options

STEPS = 3  # then a checkpoint is written; a resumed process makes one more
POLL_SECONDS = 0.01
RESUME_GOAL = 5.0  # seconds


def private_bytes(process: subprocess.Popen) -> int:
    """Memory of a process that no file backs; 0 where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])
    return 0


def watch(
    process: subprocess.Popen, begin: float, is_done: Callable[[], bool], log: Path
) -> tuple[float, int]:
    """(seconds from `begin` to the first step, peak of private memory until the end) of a process; UserError where it fails."""
    seconds, peak, goes_on = 0.0, 0, True
    try:
        while goes_on:
            goes_on, peak = process.poll() is None, max(peak, private_bytes(process))
            if not seconds and is_done():
                seconds = time.perf_counter() - begin
            time.sleep(POLL_SECONDS)
    finally:
        stop(process, signal.SIGKILL)  # it would save first; what it writes is thrown away
    if process.returncode or not seconds:
        raise UserError(f"the process ended with {process.returncode}: {last_lines(log)}")
    return seconds, peak


def run_ours(run, folder: Path, resume: bool) -> tuple[float, int]:
    """(seconds, peak bytes) of `scripts/pretrain.py`, from its start or from --resume."""
    output, options, wanted = folder / "ours", folder / "options.json", STEPS + resume
    write_json(
        options,
        saved_options(run.config)
        | {
            "valid": [],
            "valid_fraction": 0.0,
            "output": str(output),
            "resume": resume,
            "max_steps": wanted,
            "save_every": str(STEPS),
            "log_every": 1,
        },
    )
    first, rows = STEPS + 1 if resume else 1, output / "metrics.jsonl"

    def logged() -> list[dict]:
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True) if rows.is_file() else []
        return [
            row
            for line in lines
            if line.endswith("\n")
            and "train/loss" in (row := json.loads(line))
            and row["step"] >= first
        ]

    begin, log = time.perf_counter(), folder / "ours.log"
    seconds, peak = watch(
        start([str(ROOT / "scripts" / "pretrain.py"), "--config", str(options)], log),
        begin,
        logged,
        log,
    )
    return seconds, int(logged()[-1]["memory/peak_bytes"]) if run.device.type == "cuda" else peak


def run_peer(run, folder: Path, resume: bool) -> tuple[float, int]:
    """The same of a Trainer: from its start, or from `resume_from_checkpoint`."""
    output, told, given = folder / "peer", folder / "peer" / FIRST_STEP, folder / "peer.pickle"
    told.unlink(missing_ok=True)
    peer = describe(run, same_examples(run, (STEPS + 1) * run.config.batch_size))
    command = as_command(peer.run_alone, (str(output), STEPS + resume, resume), given)
    begin, log = time.perf_counter(), folder / "peer.log"
    seconds, peak = watch(start(command, log), begin, told.is_file, log)
    return seconds, int(told.read_text(encoding="utf-8")) if run.device.type == "cuda" else peak


def measure_start(run, repeats: int) -> dict:
    """Seconds from the start of a process to the end of its first step, from nothing and from a checkpoint, and peak memory: both sides in
    turns, each with its text prepared."""
    kept, failed = {what: {"ours": [], "peer": []} for what in ("start", "resume", "memory")}, {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for resume in (False, True):
                for side, measure in (("ours", run_ours), ("peer", run_peer)):
                    if side in failed:
                        continue
                    try:
                        seconds, peak = measure(run, Path(folder), resume)
                    except UserError as error:
                        failed[side] = str(error)
                        continue
                    kept["resume" if resume else "start"][side].append(seconds)
                    kept["memory"][side] += [] if resume else [peak / 2**30]
    medians = {
        what: {side: median(values) for side, values in sides.items() if values}
        for what, sides in kept.items()
    }
    medians["resume"]["goal"] = RESUME_GOAL
    return {
        "start": {"seconds_to_first_step": medians["start"], "failed": failed},
        "resume": {"seconds_to_first_step": medians["resume"]},
        "memory": {"peak_gib": medians["memory"]},
    }
