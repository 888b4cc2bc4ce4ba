"""scripts/slurm.sbatch with stand-ins for SLURM's commands and for torchrun: the signal before the
time limit reaches the processes of a run, and the job goes back into the queue."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

# As torchrun does: a code other than 0 becomes 1, SIGTERM is passed on, SIGUSR1 has no handler.
TORCHRUN = """
import pathlib, signal, subprocess, sys
pathlib.Path("arguments").write_text("\\n".join(sys.argv[1:]))
worker = subprocess.Popen([sys.executable, "worker.py"])
signal.signal(signal.SIGTERM, lambda number, frame: worker.send_signal(number))
sys.exit(worker.wait() != 0)
"""
WORKER = """
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path("saved").write_text(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready").touch()
time.sleep(float(pathlib.Path("seconds").read_text()))
sys.exit(int(pathlib.Path("code").read_text()))
"""


@pytest.fixture
def job(tmp_path):
    """Start a job whose process ends with `code` after `seconds`, unless a signal stops it first.
    srun passes signals on to its tasks: here it becomes the only one."""
    files = {
        "srun": '#!/bin/sh\nexec "$@"\n',
        "scontrol": '#!/bin/sh\n[ "$1" = show ] && echo node1 || echo "$*" > requeued\n',
        "torchrun": f"#!{sys.executable}\n{TORCHRUN}",
        "worker.py": WORKER,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(code, seconds):
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "seconds").write_text(str(seconds))
        variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "70123"}
        variables |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        command = ["bash", ROOT / "scripts" / "slurm.sbatch", "--output", "runs/a b"]
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | variables)
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.02)
        return process

    return start


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 1)])
def test_a_job_saves_and_is_requeued_unless_it_is_cancelled(number, code, job, tmp_path):
    process = job(code=0, seconds=60)
    process.send_signal(number)
    assert process.wait(20) == code
    assert (tmp_path / "saved").read_text() == str(int(number))
    texts = [path.read_text() for path in tmp_path.glob("requeued")]
    assert texts == ["requeue 70123\n"] * (number == signal.SIGUSR1)


def test_a_run_that_ends_by_itself_ends_the_job(job, tmp_path):
    process = job(code=2, seconds=0)
    assert process.wait(20) == 1
    assert not (tmp_path / "requeued").exists()
    arguments = (tmp_path / "arguments").read_text().split("\n")
    assert {"--nnodes=2", "--rdzv-id=70123", "--rdzv-endpoint=node1:20123"} <= {*arguments}
    assert arguments[-5:] == ["-m", "pretrain", "--resume", "--output", "runs/a b"]
