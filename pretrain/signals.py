"""The signals that end a run."""

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# SIGHUP: the terminal was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class Interrupted(KeyboardInterrupt):
    """Signal `number` ended the command: exit code 128 + `number`."""

    def __init__(self, number: int, message: str = "interrupted by"):
        super().__init__(f"{message} {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Let `handler` handle stop signals inside, except a SIGHUP that is ignored, as under nohup.
    Does nothing outside the main thread, which alone may set handlers."""
    before = {}
    is_main = threading.current_thread() is threading.main_thread()
    for number in STOP_SIGNALS if is_main else ():
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Block stop signals inside. Processes started there inherit this: their parent handles signals
    to the whole group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """For worker processes: the parent handles signals to the whole group, then ends them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def signal_on_parent_exit(number: int) -> bool:
    """Ask the kernel to send `number` to this process when the thread that started it ends.

    Returns whether it will: only on Linux."""
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number) == 0
