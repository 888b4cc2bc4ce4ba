"""Stops a run early, on a signal or at the time limit: its step is finished and saved first."""

import contextlib
import os
import signal
import time
import types

from pretrain.runtime.distributed import any_rank, max_over_ranks


class StopFlag:
    """Notes stop signals inside `with handled(flag.note)`; a second SIGINT kills the process.
    `max_minutes` (0: no limit) counts from construction; `limit` is its name in `reason`."""

    signal = 0  # that all processes agreed on in `signaled`; 0: none

    def __init__(self, max_minutes: float = 0.0, limit: str = "the time limit"):
        self._seconds, self._limit, self._begin = max_minutes * 60, limit, time.monotonic()
        self._num_calls, self._is_out_of_time = 0, False
        self._received = 0  # by this process, at any moment

    def note(self, number: int, frame: types.FrameType | None) -> None:
        """The handler of stop signals."""
        self._received = self._received or number
        message = f"\n{signal.Signals(number).name}: finishing and saving this step, then stopping"
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            message += "; press Ctrl-C again to stop at once"
        with contextlib.suppress(OSError):  # stderr may be closed. No print: this may be in one
            os.write(2, f"{message}\n".encode())

    def signaled(self) -> int:
        """The signal that any process received, or 0. All processes call this together."""
        self.signal = self.signal or max_over_ranks(self._received)
        return self.signal

    def agreed(self) -> bool:
        """Whether all processes stop now; the loop calls this before each step. The first call
        ignores the time limit, so a run that is restarted repeatedly advances."""
        self._num_calls += 1
        if not self.signaled() and self._seconds and self._num_calls > 1:
            self._is_out_of_time = any_rank(time.monotonic() - self._begin >= self._seconds)
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """The name of the signal or of the time limit; empty if the run continues."""
        if self.signal:
            return signal.Signals(self.signal).name
        return self._limit if self._is_out_of_time else ""
