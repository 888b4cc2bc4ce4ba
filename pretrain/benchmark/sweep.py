"""A sweep over models, lengths and micro-batches before a deadline: cells in order of importance, each a process of its own, so that one
that fails or hangs takes nothing with it. Cells of a group compile side by side and are timed one after the other."""
from __future__ import annotations

import dataclasses
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.benchmark.alone import ROOT, start, stop, told_last
from pretrain.command import as_command
from pretrain.files import read_json

MICRO_BATCH_TOKENS = {"cuda": (1 << 15, 1 << 16, 1 << 14), "cpu": (1 << 9, 1 << 10)}  # that are tried, the likely best first
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


def plan(models: list[str], lengths: list[int], tokens: tuple[int, ...], jobs: int) -> list[list[Cell]]:
    """Groups of cells, the most important first: speed and profile of each pair, limits, other micro-batches, the start."""
    pairs = [(model, length) for model in models for length in lengths]

    def cells(parts: str, size: int, chosen: list[tuple[str, int]] = pairs) -> list[Cell]:
        return [Cell(model, length, tuple(parts.split()), max(1, size // length)) for model, length in chosen]

    def grouped(row: list[Cell], at_once: int) -> list[list[Cell]]:
        return [row[first:first + at_once] for first in range(0, len(row), at_once)]

    groups = grouped(cells("train profile", tokens[0]), jobs)
    groups += grouped(cells("numerics", tokens[-1], pairs[:1]) + cells("largest", tokens[-1]), 1)  # memory is for one alone
    for size in tokens[1:]:
        groups += grouped(cells("train", size), jobs)
    return groups + [cells("start", tokens[0], pairs[:1])]


def run_sweep(options, groups: list[list[Cell]], minutes: float, note: Callable[[dict], None]) -> None:
    """Measure all cells. `note` gets the report as it grows; what a cell has measured before it failed or time was over is kept, and
    cells that would not end in time are left out."""
    cells, left_out, longest, end = {}, [], {}, time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        for number, group in enumerate(groups):
            begin, parts = time.monotonic(), group[0].parts
            if begin + longest.get(parts, 0.0) >= end:
                left_out += [cell.name for cell in group]
            else:
                for found in run_group(options, group, Path(folder, str(number)), end):
                    cells |= found
                    note({"cells": cells, "best": best(cells)})
                longest[parts] = max(longest.get(parts, 0.0), time.monotonic() - begin)
                print(f"{', '.join(cell.name for cell in group)}: {time.monotonic() - begin:.0f} s")
            note({"left_out": left_out})


def run_group(options, group: list[Cell], folder: Path, end: float) -> Iterator[dict[str, dict]]:
    """What each cell of a group has measured so far, by name, with its command; the last time with what has failed. `end` is on the
    monotonic clock."""
    folder.mkdir()
    running = {}
    try:
        for number, cell in enumerate(group):
            told, log = folder / f"{number}.json", folder / f"{number}.log"
            chosen = dataclasses.replace(
                options, model=cell.model, max_length=cell.max_length, parts=list(cell.parts), micro_batch_size=cell.micro_batch_size,
                batch_size=cell.micro_batch_size, models=[], quick=False, json=None)
            command = as_command("benchmark", chosen)
            _, name, *flags = [*shlex.split(command), "--json", str(told), "--lock", str(folder / "lock")]
            # Temporary files of whatever is stopped lie in the folder that is removed at the end; so do compiled kernels.
            process = start([str(ROOT / name), *flags], log, environment={"TMPDIR": str(folder.parent)})
            running[cell] = (process, told, log, command)
        while time.monotonic() < end and any(process.poll() is None for process, *_ in running.values()):
            yield {cell.name: found(cell, *files) for cell, (_, *files) in running.items()}
            time.sleep(POLL_SECONDS)
    finally:
        codes = {cell: process.poll() for cell, (process, *_) in running.items()}
        for process, *_ in running.values():
            stop(process, signal.SIGTERM, signal.SIGKILL)  # it stops what it has started
    yield {cell.name: found(cell, *files, codes[cell]) for cell, (_, *files) in running.items()}


def found(cell: Cell, told: Path, log: Path, command: str, code: int | None = 0) -> dict:
    """What a cell has measured, and of one that did not end well, with `code`, the end of its log."""
    measured = {"command": command, **dataclasses.asdict(cell)} | (read_json(told) if told.is_file() else {})
    measured.pop("options", None)  # the command says them
    if code != 0:
        measured["failed"] = "no time left" if code is None else told_last(log)
    if code != 0 or any(part.get("failed") for part in measured.values() if isinstance(part, dict)):
        measured["log"] = told_last(log, LOG_LINES)
    return measured


def best(cells: dict[str, dict]) -> dict[str, dict]:
    """For each model and length the fastest micro-batch of each side, as its cell has told it."""
    found: dict[str, dict] = {}
    for cell in cells.values():
        train = cell.get("train", {})
        for side, rate in train.get("tokens_per_second", {}).items():
            chosen = found.setdefault(f"{cell['model']} {cell['max_length']}", {}).setdefault(side, {})
            if rate > chosen.get("tokens_per_second", 0.0):
                share = train.get("share_of_matrix_rate", {}).get(side)
                chosen |= {"tokens_per_second": rate, "micro_batch_size": train["micro_batch_size"], "share_of_matrix_rate": share}
    return found
