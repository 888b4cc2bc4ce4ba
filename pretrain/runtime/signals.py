"""Signals that end a run: noted while it trains, so that the step is finished and saved, and agreed on by all processes."""
from __future__ import annotations

import contextlib
import os
import signal
import threading
import types

from pretrain.command import STOP_SIGNALS
from pretrain.runtime.distributed import max_over_ranks


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 inside a `with`; a second SIGINT ends the process at once, as SIGKILL would."""

    number = 0  # of the first signal; 0: none

    def __enter__(self) -> StopSignals:
        is_main_thread = threading.current_thread() is threading.main_thread()  # others cannot take signals
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS if is_main_thread}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        again = "; once more stops at once" if number == signal.SIGINT else ""
        with contextlib.suppress(OSError):  # nobody may read there any more; not print: the signal may have come in the middle of one
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this step, which is saved{again}\n".encode())

    def agreed(self) -> int:
        """The signal that any process has received, 0 for none: the same number on all, which call this together."""
        self.number = max_over_ranks(self.number)
        return self.number

