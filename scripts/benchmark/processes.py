"""Processes that the benchmark starts: sides that take turns, and commands of this project."""

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
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from pretrain.errors import UserError, first_line
from pretrain.files import write_json
from pretrain.signals import signal_on_parent_exit

SCRIPTS = Path(__file__).resolve().parents[1]
STOP_SECONDS = 5.0  # for a killed process to end
LOG_LINES = 30  # of a failed command, in the report


class ProcessError(Exception):
    """A process ended too early, or did not answer."""


class Process:
    """Runs `call(turns, *values)` in a new session that ends with this process. Output goes to a
    log. The call waits for a message with `turns.recv()` and answers with `turns.send`."""

    # A fork starts fast, and is as good as a new Python because this process never computes. But a
    # process that has queried a GPU cannot be forked, and start-up times need a new Python.
    method = "fork"  # "spawn": a new Python
    running: dict[str, Process] = {}  # by name
    patience: float | None = None  # seconds for an answer
    deadline: float | None = None  # of time.monotonic(), for all answers, instead

    def __init__(self, folder: Path, name: str, call: Callable, *values: object, method: str = ""):
        self.log = folder / f"{name}.log"
        self.log.touch()
        self.begin = time.perf_counter()
        self.is_working = False
        # multiprocessing removes what a killed process leaves; no need for a warning.
        os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
        context = multiprocessing.get_context(method or self.method)
        self.turns, child_end = context.Pipe()
        self.process = context.Process(target=_call, args=(self.log, child_end, call, values))
        self.process.start()
        self.is_running = self.process.is_alive
        child_end.close()
        self.running[name] = self

    def send(self, *message: object) -> None:
        """Start a turn."""
        self.is_working = True
        with contextlib.suppress(OSError):  # it has ended; `ask` reports that
            self.turns.send(message)

    def ask(self, *message: object) -> object:
        """The answer of a turn; starts one unless `send` did. ProcessError if none comes."""
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
            self.process.join()
            raise ProcessError(self.end()) from error
        self.is_working = False
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> str:
        """How the process ended, and the last line of its output."""
        code = self.process.exitcode
        how = "did not end" if code is None else f"ended with {code}"
        return f"{how}: {self.tail()}"

    def tail(self, lines: int = 1) -> str:
        """The last lines of its output."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return "\n".join(text.strip().splitlines()[-lines:]) or "no output"

    def stop(self) -> None:
        """Kill it and its children. A stop signal would make a run save first."""
        self.running.pop(self.log.stem, None)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # if it has no session yet
        self.process.join(STOP_SECONDS)

    @classmethod
    def stop_all(cls) -> None:
        """Stop every process that still runs."""
        for process in list(cls.running.values()):
            process.stop()


class Command(Process):
    """`python scripts/SCRIPT.py` with `options` from a file, and `more` arguments."""

    def __init__(self, folder: Path, script: str, options: dict, *more: str, name: str = "", **how):
        name = name or script
        path = folder / f"{name}.json"
        write_json(path, options)
        super().__init__(folder, name, _run_script, script, ["--config", str(path), *more], **how)

    def outcome(self) -> dict:
        """Exit code (None: still running), seconds so far, and the JSON on its last line or, if it
        failed, the end of its log."""
        code = self.process.exitcode
        found = {"exit_code": code, "seconds": time.perf_counter() - self.begin}
        if code != 0:
            return found | {"log": self.tail(LOG_LINES)}
        with contextlib.suppress(ValueError):
            found["result"] = json.loads(self.tail())
        return found


def _call(log: Path, turns: Connection, call: Callable, values: tuple) -> None:
    os.setsid()
    signal_on_parent_exit(signal.SIGKILL)
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    try:
        call(turns, *values)
    except Exception as error:  # sent, as the log may end with output of other libraries
        traceback.print_exc()
        is_known = isinstance(error, UserError)
        turns.send(error if is_known else ProcessError(first_line(error)))
        sys.exit(1)


def _run_script(turns: None, name: str, arguments: list[str]) -> None:
    sys.argv = [str(SCRIPTS / f"{name}.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def send_rows(turns: Connection, rows: Callable[..., Iterator], *values: object) -> None:
    """Send each of `rows(*values)` in turn, then None."""
    for row in rows(*values):
        turns.recv()
        turns.send(row)
    turns.send(None)


def training_rows(output: Path) -> dict[int, dict]:
    """Training rows that a run has logged, by step; skips a line that is still being written."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row for row in rows if "train/loss" in row}
