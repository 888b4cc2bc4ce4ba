"""Worker processes of the DataLoader: they leave signals to their parent and never outlive it.

A terminal or job scheduler signals the whole process group. The parent then finishes its step,
which needs the workers, and saves. So workers ignore stop signals, and since the DataLoader and
multiprocessing end workers by SIGTERM, they are killed instead.
"""

import copy
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from multiprocessing.context import BaseContext
from typing import Any

from pretrain.signals import ignore_stop_signals, signal_on_parent_exit


class Worker(multiprocessing.Process):
    """A process that is killed by `terminate`, and when its parent exits."""

    terminate = multiprocessing.Process.kill

    def start(self) -> None:
        """Start the process."""
        self.by_main_thread = threading.current_thread() is threading.main_thread()
        super().start()


def _kill_workers() -> None:
    """At exit, some remain if, for example, a traceback still refers to their iterator."""
    workers = [child for child in multiprocessing.active_children() if isinstance(child, Worker)]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler would raise here
    for worker in workers:
        worker.kill()


# Not atexit: this runs before multiprocessing waits for its processes, in this process alone.
multiprocessing.util.Finalize(None, _kill_workers, exitpriority=0)


def worker_context() -> BaseContext:
    """A multiprocessing context that starts `Worker`s with the start method of this process."""
    context: Any = copy.copy(multiprocessing.get_context())
    context.Process = Worker
    return context


def begin_worker(number: int = 0) -> None:
    """The DataLoader's worker_init_fn: the worker ends when its parent does."""
    # To the kernel, the parent is the thread that forked, so its signal is used only if that is the
    # main thread, which lasts. Under forkserver the kernel's parent is the server.
    ignore_stop_signals()
    parent: Any = multiprocessing.parent_process()
    worker: Any = multiprocessing.current_process()  # a Worker
    is_killed = worker.by_main_thread and signal_on_parent_exit(signal.SIGKILL)
    if not is_killed or os.getppid() != parent.pid:  # forkserver's child, or already an orphan
        # Exit code 0: to the DataLoader any other is a failure, even while it ends its workers.
        threading.Thread(target=lambda: (parent.join(), os._exit(0)), daemon=True).start()
