"""A function over many tasks: in worker processes of this machine, or on a cluster by Ray.

`function(shared, *task)` must be pure, of a module and quick to send, its results small: so who runs a task, where and in which
order changes nothing. Every way yields (number of the task, result) as they come, and ends all workers at an error.
"""
from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pretrain.command import UserError, first_line, require

ALONE = {"TOKENIZERS_PARALLELISM": "false"}  # in a worker: the cores are shared out already
KEPT = "finished pieces are kept, the same command goes on"


def in_processes(function: Callable, shared: object, tasks: Sequence[tuple], workers: int) -> Iterator[tuple[int, Any]]:
    """Close the iterator (contextlib.closing) to end the workers at once; UserError where one was killed."""
    context = multiprocessing.get_context("spawn")  # a forked process would lack the threads that the tokenizer has started
    lifeline, held = context.Pipe(duplex=False)
    with ProcessPoolExecutor(workers, context, _start_worker, (lifeline,)) as pool:
        # Ctrl-C reaches the whole group of processes; workers inherit the mask and leave it to this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            try:
                numbers = {pool.submit(function, shared, *task): number for number, task in enumerate(tasks)}
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BaseException as error:
            held.close()
            # Killed while the others are started: the pool has closed its pipes already.
            if isinstance(error, BrokenProcessPool) or isinstance(error, OSError) and "handle is closed" in str(error):
                raise UserError(f"a worker process was killed, perhaps as memory ran out; needed is room for {workers} at once, or fewer "
                                f"(prepare.py --workers); {KEPT}") from error
            raise


def _start_worker(lifeline: Connection) -> None:
    """End this process as soon as nobody holds the other end: closed, or killed in whatever way."""
    os.environ.update(ALONE)
    threading.Thread(target=lambda: (lifeline.poll(None), os._exit(1)), daemon=True).start()


def on_cluster(function: Callable, shared: object, tasks: Sequence[tuple], address: str) -> Iterator[tuple[int, Any]]:
    """By Ray, on the cluster at `address` ("local": one on this machine for the while), which gets this package sent; UserError
    where there is none, or it fails."""
    ray = require("ray", "--ray")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), 10).close()  # Ray would try for minutes
        ray.init(address, runtime_env={"py_modules": [str(Path(__file__).parents[1])], "env_vars": ALONE}, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no cluster answers ({first_line(error)}); needed is the address of one, or local") from error
    try:
        run, sent = ray.remote(function), ray.put(shared)
        numbers = {run.remote(sent, *task): number for number, task in enumerate(tasks)}
        while numbers:
            for done in ray.wait(list(numbers))[0]:
                yield numbers.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise UserError(f"--ray {address}: {first_line(error)}; {KEPT}") from error
    finally:
        ray.shutdown()
