"""Worker processes of the DataLoader: they leave signals to their parent, and none outlives it.

A signal to the whole group, as a terminal or a job scheduler sends it, is the parent's to answer:
it finishes the step and saves, and needs its workers for that. So they ignore SIGTERM, with which
the DataLoader and multiprocessing would end them before waiting: here they are killed instead.
"""

from __future__ import annotations

import copy
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import weakref
from multiprocessing.context import BaseContext

from pretrain.command import ignore_stop_signals, signal_at_parents_end


class Worker(multiprocessing.Process):
    """A process that is killed by `terminate`, and when this process exits."""

    def start(self) -> None:
        """Start the process; it is remembered as long as something refers to it."""
        self.by_main_thread = threading.current_thread() is threading.main_thread()
        super().start()
        _started.add(self)

    def terminate(self) -> None:
        """Kill the process."""
        self.kill()


_started: weakref.WeakSet[Worker] = weakref.WeakSet()


def _kill_started() -> None:
    """Some are left at exit if an iterator is still referenced, by a traceback for example."""
    if _started:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler would raise here
    for worker in _started:
        worker.kill()


# Not atexit: this runs before multiprocessing waits, whatever was imported first, and only in this
# process.
multiprocessing.util.Finalize(None, _kill_started, exitpriority=0)


def worker_context() -> BaseContext:
    """A multiprocessing context that starts `Worker`s, by the start method of this process."""
    context = copy.copy(multiprocessing.get_context())
    context.Process = Worker
    return context


def begin_worker(number: int = 0) -> None:
    """Called by the DataLoader in a worker, before its work: the worker ends when its parent does.

    To the kernel the parent is the thread that forked, so it is asked only where that is the main
    thread, which lasts. Under forkserver it is the server, not the process that uses the worker."""
    ignore_stop_signals()
    parent, worker = multiprocessing.parent_process(), multiprocessing.current_process()
    is_killed = worker.by_main_thread and signal_at_parents_end(signal.SIGKILL)
    if not is_killed or os.getppid() != parent.pid:  # another's child, or an orphan already
        # With code 0: to the DataLoader any other is a failure, also while it ends its workers.
        threading.Thread(target=lambda: (parent.join(), os._exit(0)), daemon=True).start()
