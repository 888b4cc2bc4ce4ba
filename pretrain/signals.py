"""The signals that end a run."""

import ctypes
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class Interrupted(KeyboardInterrupt):
    """Signal `number` ended the command: exit code 128 + `number`."""

    def __init__(self, number: int, message: str = "interrupted by"):
        super().__init__(f"{message} {signal.Signals(number).name}")
        self.number = number


def ignore_stop_signals() -> None:
    """For worker processes: the parent handles signals to the whole group, then ends them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def signal_on_parent_exit(number: int) -> bool:
    """Ask the kernel to send `number` to this process when the thread that started it ends.

    Returns whether it will: only on Linux."""
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number) == 0
