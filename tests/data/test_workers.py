"""Worker processes end with the run, however it ends. Each run here is a separate process."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

import pytest
from conftest import ROOT, ten_steps
from data_reference import contents

from pretrain.data.collate import Collator
from pretrain.data.loader import DataPosition, PretrainingDataset, TrainData
from pretrain.data.masking import Masking
from pretrain.data.pairs import Task

# Forks a process for each line: a fault, the pipe for its stderr, the arguments of pretrain.py. It
# exits as a script does. What takes long, to import libraries, is done once.
SERVER = """
import gc, json, multiprocessing, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch.utils.benchmark
import torch.utils.tensorboard
from transformers import BertForPreTraining
from pretrain.cli import run_command
from pretrain.commands.pretrain import main
from pretrain.data import prepare
from pretrain.model import loading
from pretrain.runtime import monitor
gc.freeze()

def fail(*given):
    raise RuntimeError("nobody expects this")

def kill(*given):
    os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    fault, pipe, argv = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.setsid()
os.dup2(os.open(os.devnull, os.O_RDWR), 1)
os.dup2(os.open(pipe, os.O_WRONLY), 2)
from pretrain import train  # here: its workers end with the process that imports it
from pretrain.data import loader
exec(fault)
code = run_command(main, argv)
for worker in multiprocessing.active_children():
    worker.join(30)
sys.exit("workers are left" if multiprocessing.active_children() else code)
"""
STEP_FAILS = "train.train_step = fail"
WORKER_FAILS = """
def fail_in_worker(collator, examples, collate=loader.Collator.__call__):
    return fail() if multiprocessing.parent_process() else collate(collator, examples)
loader.Collator.__call__ = fail_in_worker
"""
START_FAILS = """
start = multiprocessing.process.BaseProcess.start
def second_fails(process):
    if multiprocessing.active_children():
        time.sleep(0.3)  # the first is at work
        fail()
    start(process)
multiprocessing.process.BaseProcess.start = second_fails
"""


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER, str(ROOT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) as process:
        yield process
        process.kill()


@pytest.fixture
def run(server, text_file, cache, tmp_path):
    """(exit code, stderr) of a run with workers, after the last of its processes has ended."""

    def start(fault, workers=2, more=()):
        pipe = str(tmp_path / "stderr")
        os.mkfifo(pipe)
        options = [*ten_steps(text_file, cache, 4), "--output", tmp_path / "run", *more]
        argv = [str(part) for part in (*options, "--workers", workers)]
        print(json.dumps([fault, pipe, argv]), file=server.stdin, flush=True)
        # Every process of the run holds the pipe open.
        told = subprocess.run(["timeout", "60", "cat", pipe], capture_output=True, text=True)
        with suppress(ProcessLookupError):
            os.killpg(int(server.stdout.readline()), signal.SIGKILL)
        assert told.returncode == 0, "a process of the run is left"
        return int(server.stdout.readline()), told.stdout

    return start


@pytest.mark.parametrize(
    "fault", [STEP_FAILS, WORKER_FAILS, START_FAILS], ids=["step", "worker", "start"]
)
def test_an_unexpected_error_ends_the_process(run, fault):
    """A process that waits for its workers never exits."""
    code, told = run(fault)
    assert code == 1 and "Traceback" in told and "RuntimeError: nobody expects this" in told, told
    assert "is killed by signal" not in told and "workers are left" not in told


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_no_worker_outlives_a_killed_run(run, method):
    """They would wait forever to write to a pipe that nobody reads."""
    filled = ("--max-length", 512, "--batch-size", 32, "--micro-batch-size", 32)
    fault = f"multiprocessing.set_start_method({method!r}); train.train_step = kill"
    code, told = run(fault, workers=1, more=filled)
    assert code == -signal.SIGKILL, told


def test_workers_outlive_the_thread_that_started_them(corpus, vocabulary):
    """The thread that reads the first batch starts them and is their parent to Linux."""
    task = Task("random", 64, 4, 0.15, 11)
    dataset, collator = PretrainingDataset(corpus, task), Collator(task, vocabulary, Masking())
    data = TrainData([(dataset, collator)], (), 1, workers=2)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(next, data).result()
    read += [batch for batches in islice(data, 30) for batch in batches]
    for batch, position in zip(read, dataset.positions(DataPosition(0, 0, 0))):
        assert contents(batch) == contents(collator(dataset[position]))
