"""A sweep over models, lengths and micro-batches before a deadline: cells in order of importance, one after the other, each a process of
its own, so that one that fails or hangs takes nothing with it."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.benchmark.processes import ROOT, last_lines, start, stop
from pretrain.command import as_command
from pretrain.files import read_json

# Sizes that are tried, the likely best first.
MICRO_BATCH_TOKENS = {"cuda": (1 << 15, 1 << 16, 1 << 14), "cpu": (1 << 9, 1 << 10)}
POLL_SECONDS = 0.5
LOG_LINES = 60  # of a cell that failed


@dataclass(frozen=True)
class Cell:
    """A benchmark of one model and length."""

    model: str
    max_length: int
    parts: tuple[str, ...]
    micro_batch_size: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.max_length} x {self.micro_batch_size}: {' '.join(self.parts)}"


def plan(models: list[str], lengths: list[int], tokens: tuple[int, ...]) -> list[Cell]:
    """Cells, the most important first: speed and profile of each pair, limits, other micro-batches, the start."""
    pairs = [(model, length) for model in models for length in lengths]

    def cells(parts: str, size: int, chosen: list[tuple[str, int]] = pairs) -> list[Cell]:
        return [
            Cell(model, length, tuple(parts.split()), max(1, size // length))
            for model, length in chosen
        ]

    planned = cells("train profile", tokens[0]) + cells("numerics", tokens[-1], pairs[:1])
    planned += cells("largest", tokens[-1])
    for size in tokens[1:]:
        planned += cells("train", size)
    return planned + cells("start", tokens[0], pairs[:1])


def run_sweep(options, cells: list[Cell], minutes: float, note: Callable[[dict], None]) -> None:
    """Measure all cells. `note` gets the report as it grows; what a cell has measured before it failed or time was over is kept, and
    cells that would not end in time are left out."""
    measured, left_out, longest, end = {}, [], {}, time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(cells):
            begin = time.monotonic()
            if begin + longest.get(cell.parts, 0.0) >= end:
                left_out.append(cell.name)
                note({"left_out": left_out})
                continue

            def note_cell(found: dict, cell: Cell = cell) -> None:
                measured[cell.name] = found
                note({"cells": measured, "best": best(measured), "left_out": left_out})

            run_cell(options, cell, Path(folder, str(number)), end, note_cell)
            seconds = time.monotonic() - begin
            longest[cell.parts] = max(longest.get(cell.parts, 0.0), seconds)
            print(f"{cell.name}: {seconds:.0f} s")


def run_cell(options, cell: Cell, folder: Path, end: float, note: Callable[[dict], None]) -> None:
    """Run a cell and note what it has measured so far, with its command; the last time with what has failed. `end` is on the
    monotonic clock."""
    folder.mkdir()
    report, log = folder / "report.json", folder / "log"
    chosen = dataclasses.replace(
        options,
        model=cell.model,
        max_length=cell.max_length,
        parts=list(cell.parts),
        micro_batch_size=cell.micro_batch_size,
        batch_size=cell.micro_batch_size,
        models=[],
        quick=False,
        json=None,
    )
    command = as_command("benchmark", chosen)
    _, name, *flags = [*shlex.split(command), "--json", str(report)]
    # Temporary files of a cell that is stopped lie in the folder that is removed at the end; compiled kernels are kept.
    environment = {"TMPDIR": str(folder)} | kernel_caches(Path(options.cache))
    process = start([str(ROOT / name), *flags], log, environment=environment)
    code = None
    try:
        while time.monotonic() < end and process.poll() is None:
            note(found(cell, report, log, command))
            time.sleep(POLL_SECONDS)
        code = process.poll()
    finally:
        stop(process, signal.SIGTERM, signal.SIGKILL)  # it stops what it has started
        note(found(cell, report, log, command, code))


def kernel_caches(cache: Path) -> dict[str, str]:
    """Environment in which compiled kernels are kept in `cache`, unless they are already kept elsewhere."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {
        name: os.environ.get(name, str(cache.absolute() / folder)) for name, folder in names.items()
    }


def found(cell: Cell, report: Path, log: Path, command: str, code: int | None = 0) -> dict:
    """What a cell has measured, and of one that did not end well, with `code`, the end of its log."""
    measured = {"command": command, **dataclasses.asdict(cell)} | (
        read_json(report) if report.is_file() else {}
    )
    measured.pop("options", None)  # the command says them
    if code != 0:
        measured["failed"] = "no time left" if code is None else last_lines(log)
    if code != 0 or any(part.get("failed") for part in measured.values() if isinstance(part, dict)):
        measured["log"] = last_lines(log, LOG_LINES)
    return measured


def best(cells: dict[str, dict]) -> dict[str, dict]:
    """For each model and length the fastest micro-batch of each side, as its cell has told it."""
    found: dict[str, dict] = {}
    for cell in cells.values():
        train = cell.get("train", {})
        rates = train.get("tokens_per_second", {})
        for side, rate in ((side, rates[side]) for side in ("ours", "peer") if side in rates):
            chosen = found.setdefault(f"{cell['model']} {cell['max_length']}", {}).setdefault(
                side, {}
            )
            if rate > chosen.get("tokens_per_second", 0.0):
                chosen["tokens_per_second"] = rate
                chosen["micro_batch_size"] = train["micro_batch_size"]
                chosen["share_of_matrix_rate"] = train.get("share_of_matrix_rate", {}).get(side)
    return found
