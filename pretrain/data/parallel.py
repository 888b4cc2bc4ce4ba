"""Run a function over many tasks, in worker processes on this machine or on a Ray cluster.

`function(shared, *task)` must be a pure module-level function with a small result. Both ways yield
(task number, result) as results arrive, and end all workers after an error.
"""

import errno
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pretrain.errors import UserError, first_line, require
from pretrain.signals import blocked

ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false"}  # in a worker, which has one core
ADVICE = "finished pieces are kept, and the same command resumes"


class WorkersFailed(UserError):
    """Worker processes did not start, or one was killed; fewer may work."""


def choose_workers(workers: int | None, sizes: Sequence[int], worthwhile: int) -> int:
    """Number of processes for pieces of `sizes`; by default one per core and `worthwhile` bytes."""
    if workers is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        workers = min(cores, sum(sizes) // worthwhile)
    return max(1, min(workers, len(sizes)))


def in_processes(
    function: Callable, shared: object, tasks: Sequence[tuple], workers: int
) -> Generator[tuple[int, Any], None, None]:
    """Run in `workers` processes; close the iterator (contextlib.closing) to end them at once."""
    # A forked process would lack the threads of the tokenizer.
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    try:
        with blocked():  # multiprocessing starts a helper process here
            pool = ProcessPoolExecutor(workers, context, _start_worker, (lifeline,))
    except OSError as error:
        problem = f"{workers} workers: cannot start ({error})"
        raise WorkersFailed(f"{problem}; expected a writable /dev/shm") from error
    with pool:
        try:
            submitted = _submit(pool, function, shared, tasks)
            numbers = {future: number for number, future in enumerate(submitted)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BaseException as error:
            held.close()
            if isinstance(error, BrokenProcessPool):
                problem = "a worker process was killed, perhaps because memory ran out"
                raise WorkersFailed(f"{problem}; expected more memory ({ADVICE})") from error
            raise


def _submit(
    pool: ProcessPoolExecutor, function: Callable, shared: object, tasks: Sequence[tuple]
) -> list[Future]:
    """Submit all tasks, which also starts the workers.

    If one is killed meanwhile, the pool closes its pipes while others still start: their
    descriptors are then closed (OSError) or already belong to other files (ValueError).
    """
    try:
        with blocked():
            return [pool.submit(function, shared, *task) for task in tasks]
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) not in (None, errno.EBADF, errno.EPIPE):
            raise  # too many open files or processes, for example
        raise BrokenProcessPool(str(error)) from error


def _start_worker(lifeline: Connection) -> None:
    """End this process when the other end is closed, even by SIGKILL of the parent."""
    os.environ.update(ENVIRONMENT)
    threading.Thread(target=lambda: (lifeline.poll(None), os._exit(1)), daemon=True).start()


def connect(address: str) -> None:
    """Connect to the Ray cluster at `address` ("local" starts one here), and send it this package.

    UserError if it does not answer."""
    ray = require("ray", address)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    environment = {"py_modules": [str(Path(__file__).parents[1])], "env_vars": ENVIRONMENT}
    try:
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), 10).close()
        ray.init(address, runtime_env=environment, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"{address}: no answer from a cluster ({first_line(error)})"
        raise UserError(f"{problem}; expected the address of a cluster, or local") from error


def on_cluster(
    function: Callable, shared: object, tasks: Sequence[tuple]
) -> Generator[tuple[int, Any], None, None]:
    """Run on the cluster that `connect` has opened; disconnects at the end."""
    ray = require("ray", "a cluster")
    try:
        run, sent = ray.remote(function), ray.put(shared)
        numbers = {run.remote(sent, *task): number for number, task in enumerate(tasks)}
        while numbers:
            for done in ray.wait(list(numbers))[0]:
                yield numbers.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise UserError(f"the Ray cluster failed ({first_line(error)}); {ADVICE}") from error
    finally:
        ray.shutdown()
