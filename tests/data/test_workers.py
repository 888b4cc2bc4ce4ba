"""Worker processes end with the run, however it ends. Each run here is a process of its own."""

import os
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

import pytest
import torch
from conftest import ROOT, ten_steps
from data_reference import contents

from pretrain.cli import run_command
from pretrain.data.collate import Collator
from pretrain.data.loader import DataPosition, PretrainingDataset, TrainData
from pretrain.data.masking import Masking
from pretrain.data.pairs import Task

START = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pretrain import train
from pretrain.cli import run_command
from pretrain.commands.pretrain import main
from pretrain.data import loader

def fail(*given):
    raise RuntimeError("nobody expects this")

def kill(*given):
    os.kill(os.getpid(), signal.SIGKILL)
"""
BY_COMMAND = """
code = run_command(main, sys.argv[2:])
for worker in multiprocessing.active_children():
    worker.join(30)
sys.exit("workers are left" if multiprocessing.active_children() else code)
"""
BY_CALL = "main(sys.argv[2:])"  # the interpreter shows the error

STEP_FAILS = "train.train_step = fail"
DATA_FAILS = """
def first_of(dataset, start, end_epoch=None):  # a worker has work already
    yield start
    fail()
loader.PretrainingDataset.positions = first_of
"""
WORKER_FAILS = """
def fail_in_worker(collator, examples, collate=loader.Collator.__call__):
    return fail() if multiprocessing.parent_process() else collate(collator, examples)
loader.Collator.__call__ = fail_in_worker
"""
START_FAILS = """
start = multiprocessing.process.BaseProcess.start
def second_fails(process):
    if multiprocessing.active_children():
        time.sleep(1)  # the first is at work
        fail()
    start(process)
multiprocessing.process.BaseProcess.start = second_fails
"""
WORKER_IS_STUCK = """
loader.SILENCE_SECONDS = 1
def stuck(collator, examples, collate=loader.Collator.__call__):
    time.sleep(3600 if multiprocessing.parent_process() else 0)
    return collate(collator, examples)
loader.Collator.__call__ = stuck
"""


@pytest.fixture
def run(text_file, cache, tmp_path):
    """(exit code, stderr) of a run with workers, after the last of its processes has ended."""

    def start(*code, workers=2, more=()):
        options = [*ten_steps(text_file, cache, 4), "--output", tmp_path, "--workers", workers]
        command = [sys.executable, "-c", "\n".join([START, *code]), ROOT, *options, *more]
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            told = process.communicate(timeout=90)[1]  # every process holds stderr open
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, told

    return start


@pytest.mark.parametrize(
    "fault, way",
    [
        (STEP_FAILS, BY_COMMAND),
        (STEP_FAILS, BY_CALL),
        (DATA_FAILS, BY_COMMAND),
        (WORKER_FAILS, BY_COMMAND),
        (START_FAILS, BY_COMMAND),
    ],
    ids=["step", "step-call", "data", "worker", "start"],
)
def test_an_error_that_nobody_expects_ends_the_process(run, fault, way):
    """A process that waits for its workers never exits."""
    code, told = run(fault, way)
    assert code == 1 and "Traceback" in told and "RuntimeError: nobody expects this" in told, told
    assert "is killed by signal" not in told and "workers are left" not in told


def test_an_error_that_was_shown_keeps_nothing_alive(capsys):
    """Its traceback refers to the frames, and here a frame refers back to it."""
    held = []

    def main(argv):
        data = torch.zeros(1)
        held.append(weakref.ref(data))
        error = RuntimeError("nobody expects this")
        raise error

    assert run_command(main, []) == 1
    assert held[0]() is None
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and told.endswith("RuntimeError: nobody expects this\n")


def test_a_worker_that_is_stuck_does_not_hold_up_the_end(run):
    code, told = run(WORKER_IS_STUCK, BY_COMMAND, workers=1)
    assert code == 2 and "DataLoader timed out" in told and "Traceback" not in told, told


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_no_worker_outlives_a_killed_run(run, method):
    """They would wait forever for room in a pipe that nobody reads."""
    filled = ("--max-length", 512, "--batch-size", 32, "--micro-batch-size", 32)
    begin = f"multiprocessing.set_start_method({method!r})"
    code, told = run(begin, "train.train_step = kill", BY_COMMAND, more=filled)
    assert code == -signal.SIGKILL, told


def test_workers_outlive_the_thread_that_started_them(corpus, vocabulary):
    """The thread that reads the first batch starts them; to Linux, it is their parent."""
    task = Task("random", 64, 4, 0.15, 11)
    dataset, collator = PretrainingDataset(corpus, task), Collator(task, vocabulary, Masking())
    data = TrainData([(dataset, collator)], (), 1, workers=2)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(next, data).result()
    read += [batch for batches in islice(data, 30) for batch in batches]
    for batch, position in zip(read, dataset.positions(DataPosition(0, 0, 0))):
        assert contents(batch) == contents(collator(dataset[position]))
