"""Worker processes end with the run, however it ends. Each run here is a process of its own."""

import os
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from itertools import islice

import pytest
import torch
from conftest import ROOT, ten_steps

from pretrain.command import run_command
from pretrain.data.collate import Collator
from pretrain.data.dataset import DataPosition, MicroBatchSampler, PretrainingDataset, make_loader
from pretrain.data.masking import Masking
from pretrain.data.planning import Task

START = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from conftest import script
from pretrain import setup, train
from pretrain.command import run_command
from pretrain.data import dataset

def fail(*given):
    raise RuntimeError("nobody expects this")

def kill(*given):
    os.kill(os.getpid(), signal.SIGKILL)
"""
BY_COMMAND = """
code = run_command(script("pretrain").main, sys.argv[2:])
for worker in multiprocessing.active_children():
    worker.join(30)
sys.exit("workers are left" if multiprocessing.active_children() else code)
"""
BY_CALL = "script('pretrain').main(sys.argv[2:])"  # the error is the interpreter's to show

STEP_FAILS = "train.train_step = fail"
DATA_FAILS = """
def first_of(sampler):  # a worker has work already
    yield [sampler.start]
    fail()
dataset.MicroBatchSampler.__iter__ = first_of
"""
WORKER_FAILS = "dataset.Collator.__call__ = fail"
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
dataset.SILENCE_SECONDS = 1
collate = setup.Collator.__call__
def stuck(self, examples):
    time.sleep(3600 if multiprocessing.parent_process() else 0)
    return collate(self, examples)
setup.Collator.__call__ = stuck
"""


@pytest.fixture
def run(text_file, cache, tmp_path):
    """(exit code, stderr) of a run with workers, after the last of its processes has ended."""

    def start(*code, workers=2, more=()):
        options = [
            *ten_steps(text_file, cache, 4),
            "--output",
            tmp_path,
            "--workers",
            workers,
            *more,
        ]
        command = [sys.executable, "-c", "\n".join([START, *code]), ROOT / "tests", *options]
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
        pytest.param(STEP_FAILS, BY_COMMAND, id="step"),
        pytest.param(STEP_FAILS, BY_CALL, id="step-call"),
        pytest.param(DATA_FAILS, BY_COMMAND, id="data"),
        pytest.param(WORKER_FAILS, BY_COMMAND, id="worker"),
        pytest.param(START_FAILS, BY_COMMAND, id="start"),
    ],
)
def test_an_error_that_nobody_expects_ends_the_process(run, fault, way):
    """A process that waits for its workers would never exit."""
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
    task = Task("mlm+nsp", 64, 4, 0.15, 11)
    dataset = PretrainingDataset(corpus, task)
    sampler = MicroBatchSampler(dataset, DataPosition(0, 0, 0))
    expected, loader = (
        make_loader(dataset, Collator(task, vocabulary, Masking()), sampler, workers)
        for workers in (0, 2)
    )
    with ThreadPoolExecutor() as pool:
        read = [pool.submit(next, loader).result()]
    read += islice(loader, 30)
    for one, other in zip(read, islice(expected, 31), strict=True):
        assert all(
            torch.equal(getattr(one, part.name), getattr(other, part.name))
            for part in fields(one)
            if isinstance(getattr(one, part.name), torch.Tensor)
        )
