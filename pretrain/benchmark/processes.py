"""Processes that the benchmark starts: commands of this project, and calls of its own that work in turns."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from pretrain.command import UserError, first_line

ROOT = Path(__file__).resolve().parent.parent.parent
STOP_SECONDS = 5.0  # after which a process that was asked to stop is killed
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
CALL = "import pickle, sys; call, given = pickle.load(open(sys.argv[1], 'rb')); call(*given)"
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def start(
    command: list[str],
    log: Path,
    environment: dict[str, str] = MappingProxyType({}),
    **pipes: int,
) -> subprocess.Popen:
    """A Python process in a group of its own that writes its output to `log`, and dies with this process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    with log.open("w") as out:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, **pipes}
        return subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent if LIBC else None,
            **streams,
        )


def _die_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def as_command(call: Callable, arguments: tuple, path: Path) -> list[str]:
    """The command that calls `call` with `arguments`, which travel in the file `path`."""
    path.write_bytes(pickle.dumps((call, arguments)))
    return ["-c", CALL, str(path)]


def stop(process: subprocess.Popen, *signals: int) -> None:
    """End a process and what it has started, by one signal after the other."""
    for number in signals:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)


def last_lines(log: Path, lines: int = 1) -> str:
    """The last lines that a process has written."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return "\n".join(text.splitlines()[-lines:]) or "no output"


class TurnProcess:
    """A call in a process of its own. It works when it gets a line, and answers with a line of JSON: `call` gets the stream of its
    answers and `arguments`."""

    def __init__(self, call: Callable, arguments: tuple, folder: Path, name: str):
        self.log = folder / f"{name}.log"
        command = as_command(_work_in_turns, (call, arguments), folder / f"{name}.pickle")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = start(command, self.log, **pipes)
        self.is_working = False

    def send(self) -> None:
        """Let it begin its next piece of work."""
        self.is_working = True
        with contextlib.suppress(BrokenPipeError):  # it has failed already, as `receive` tells
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def receive(self, seconds: float) -> dict:
        """Its answer. UserError where it fails, or takes more than `seconds`."""
        if not self.is_working:
            self.send()
        is_ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not is_ready:
            raise UserError(f"no answer after {seconds:.0f} s: {last_lines(self.log)}")
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the process ended with {self.process.wait()}: {last_lines(self.log)}")
        self.is_working = False
        reply = json.loads(line)
        if "failed" in reply:
            raise UserError(reply["failed"])
        return reply

    def stop(self) -> None:
        """End it at once."""
        stop(self.process, signal.SIGKILL)


def answer(channel: object, values: dict) -> None:
    """In the process of a turn: write one answer to `channel`."""
    print(json.dumps(values), file=channel, flush=True)


def wait_for_turn() -> None:
    """In the process of a turn: wait until it may go on; ends the process where the other side has gone."""
    if not sys.stdin.buffer.readline():
        sys.exit("the benchmark has gone")


def _work_in_turns(call: Callable, arguments: tuple) -> None:
    sys.stdout, channel = sys.stderr, sys.stdout  # whatever else is printed goes to the log
    try:
        call(channel, *arguments)
    except Exception as error:  # of every kind; the log may end with what others have said since
        traceback.print_exc()
        answer(channel, {"failed": first_line(error)})
        sys.exit(1)
