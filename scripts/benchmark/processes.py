"""Processes that the benchmark starts: commands of this project, and sides that take turns."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from pretrain.errors import UserError, first_line
from pretrain.files import write_json
from pretrain.signals import signal_at_parents_end

SCRIPTS = Path(__file__).resolve().parents[1]
STOP_SECONDS = 5.0  # that a killed process may take to end
LOG_LINES = 30  # in the report, of a command that failed


class ProcessError(Exception):
    """A process ended too early, or did not answer."""


class Process:
    """`call(turns, *values)` in a session of its own, which dies with this process. Its output goes
    to `log`.

    A side that takes turns waits for a message with `turns.recv()`, and `turns.send` answers it."""

    patience: float | None = None  # seconds for an answer
    deadline: float | None = None  # of time.monotonic(), for all answers, instead

    def __init__(self, log: Path, call: Callable, *values: object):
        self.log, self.begin, self.is_working = log, time.perf_counter(), False
        log.touch()
        # What it leaves when it is killed, multiprocessing removes; it need not warn.
        os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
        context = multiprocessing.get_context("spawn")  # a fresh Python, as a command has
        self.turns, theirs = context.Pipe()
        self.process = context.Process(target=_call, args=(str(log), theirs, call, values))
        self.process.start()
        theirs.close()

    def send(self, *message: object) -> None:
        """Let it begin a turn."""
        self.is_working = True
        with contextlib.suppress(OSError):  # it is gone, as `ask` reports
            self.turns.send(message)

    def ask(self, *message: object) -> object:
        """The answer of a turn, which begins now unless it did; ProcessError if there is none."""
        if not self.is_working:
            self.send(*message)
        seconds = self.patience
        if self.deadline is not None:
            seconds = max(0.0, self.deadline - time.monotonic())
        if not self.turns.poll(seconds):
            raise ProcessError(f"no answer after {seconds:.0f} s: {self.tail()}")
        try:
            answer = self.turns.recv()
        except (EOFError, OSError) as error:
            raise self.failure() from error
        self.is_working = False
        if isinstance(answer, Exception):
            raise answer
        return answer

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.is_alive()

    def wait(self) -> None:
        """Return once it has ended."""
        self.process.join()

    def failure(self) -> ProcessError:
        """Why it ended."""
        self.process.join()
        return ProcessError(f"it ended with {self.process.exitcode}: {self.tail()}")

    def outcome(self) -> dict:
        """Exit code (None: it still runs), seconds until now, and the JSON of its last line or, of
        one that failed, the end of its log."""
        code = self.process.exitcode
        found = {"exit_code": code, "seconds": time.perf_counter() - self.begin}
        if code != 0:
            return found | {"log": self.tail(LOG_LINES)}
        with contextlib.suppress(ValueError):
            found["result"] = json.loads(self.tail())
        return found

    def tail(self, lines: int = 1) -> str:
        """The end of its output."""
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        return "\n".join(text.splitlines()[-lines:]) or "no output"

    def stop(self) -> None:
        """Kill it and what it started. A stop signal would make a run save first."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # if it has no session yet
        self.process.join(STOP_SECONDS)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _call(log: str, turns: Connection, call: Callable, values: tuple) -> None:
    os.setsid()
    signal_at_parents_end(signal.SIGKILL)
    output = os.open(log, os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        call(turns, *values)
    except Exception as error:  # the log may end with what other libraries printed since
        traceback.print_exc()
        is_known = isinstance(error, UserError)
        turns.send(error if is_known else ProcessError(first_line(error)))
        sys.exit(1)


def run_script(turns: None, name: str, arguments: list[str]) -> None:
    """`python scripts/NAME.py ARGUMENTS`, in this process."""
    sys.argv = [str(SCRIPTS / f"{name}.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start_script(folder: Path, name: str, script: str, options: dict, *arguments: str) -> Process:
    """A command of this project with `options`; its files in `folder` are named NAME."""
    path = folder / f"{name}.json"
    write_json(path, options)
    return Process(folder / f"{name}.log", run_script, script, ["--config", str(path), *arguments])


def training_rows(output: Path) -> dict[int, dict]:
    """What a run has logged of its training, by step; a line that is being written is left out."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row for row in rows if "train/loss" in row}
