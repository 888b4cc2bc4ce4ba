"""scripts/gpu_check.sh on a CPU, with tiny sizes: every part reports its figures, and a part that
fails does not stop the next one."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts.benchmark import command as benchmark
from scripts.benchmark import steps

pytest.importorskip("accelerate", reason="the peer needs it")
pytest.importorskip("matplotlib", reason="fine-tuning needs it")
PARTS = {
    "first": ["tests", "attention", "train-16", "fp16"],
    "second": ["variants", "use", "large-16"],
}
# Notes what it is to measure, and leaves the report that an earlier measure left in kept/.
NOTES = """#!/bin/sh
if [ "$2" = scripts.benchmark.report ]; then exec {python} "$@"; fi
if [ "$2" = pytest ]; then echo "9 skipped in 1 s"; exit; fi
echo "$*" >> {folder}/noted
while [ "$1" != --json ]; do shift; done
cp {folder}/kept/$(basename "$2") "$2" || exit 0
"""


def make_python(folder, script):
    """A Python that is a shell script."""
    python = folder / "python"
    python.write_text(script.format(python=sys.executable, folder=folder))
    python.chmod(0o755)
    return python


def start(command, folder, **environment):
    """Start a command of the check, in its own folder."""
    variables = {
        "PYTHON": sys.executable,
        "OUT": folder / "out",
        "GPU_CHECK_SCRATCH": folder / "scratch",
        "GPU_CHECK_SIZE": "tiny",
        "GPU_CHECK_LENGTHS": "16",
        **environment,
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), command],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def check(text_file, tmp_path, monkeypatch):
    """Measure the parts of a command in this process, since imports would take most of the time.

    Returns the reports by part, and the printed summary. `second` runs fp16 first, for `use`."""
    monkeypatch.setattr(steps, "MIN_BLOCKS", 1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    python, kept, reports = make_python(tmp_path, NOTES), tmp_path / "kept", {}

    def check(command):
        variables = {"PYTHON": python, "GPU_CHECK_TRAIN": text_file}
        start(command, tmp_path, **variables).communicate()
        for line in (tmp_path / "noted").read_text().splitlines():
            assert benchmark.main(line.split()[1:]) == 0
        (tmp_path / "out").rename(kept)
        process = start(command, tmp_path, **variables)
        printed = process.communicate()[0]
        assert process.returncode == 0 and "FAILED" not in printed
        headings = re.findall(r"^== (.*): exit code 0, \d+ s$", printed, re.MULTILINE)
        assert headings == PARTS[command]
        for path in (tmp_path / "out").glob("*.json"):
            reports[path.stem] = json.loads(path.read_text())
        return reports, printed

    return check


def assert_trained(train):
    assert train["failed"] == {} and train["micro_batch_size"] == 8
    assert train["tokens_per_second"].keys() == {"ours", "peer", "ratio"}
    assert min(train["tokens_per_second"].values()) > 0
    assert 0 < train["share_of_matrix_rate"]["ours"] < 1


def test_the_first_command(check):
    reports, printed = check("first")
    assert "9 skipped in" in printed
    assert reports["attention"]["attention"]["needs"].startswith("a GPU")
    assert_trained(reports["train-16"]["train"])
    profile = reports["train-16"]["profile"]
    assert profile["tokens_per_second"]["ours"] > 0
    assert 0 <= profile["data_wait"]["ours"] < 1 and 0 <= profile["idle"]["ours"] < 1
    assert 0 < sum(kernel["share"] for kernel in profile["kernels"]) < 1.01
    fp16 = reports["fp16"]["fp16"]
    assert fp16["failed"] == {} and fp16["skipped_steps"] == 0
    losses = [row["loss"] for row in fp16["losses"]]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_the_second_command(check, monkeypatch):
    monkeypatch.setattr(steps, "VARIANTS", steps.VARIANTS[:5:2])
    reports, printed = check("second")
    assert "variant as it is" in printed
    rows = reports["variants"]["variants"]["rows"]
    assert len(rows) == 3 and all(row["tokens_per_second"] > 0 for row in rows), rows
    use = reports["use"]["use"]
    scores = [use["finetune"]["result"]["test_macro_f1"], use["predict"]["result"]["macro_f1"]]
    assert use["failed"] == {} and min(scores) > 0.9
    assert use["evaluate"]["result"]["perplexity"] > 1
    assert use["fill_mask"]["exit_code"] == 0
    assert_trained(reports["large-16"]["train"])


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    """Every part of this Python fails; the summary says so, with the code of each."""
    fails = '#!/bin/sh\n[ "$1" = scripts/benchmark.py ] && exit 3\nexec {python} "$@"\n'
    process = start("second", tmp_path, PYTHON=make_python(tmp_path, fails))
    printed = process.communicate()[0]
    failures = re.findall(r"^== (.*): exit code 3, \d+ s\nleft no result$", printed, re.MULTILINE)
    assert process.returncode == 1 and failures == ["variants", "fp16", "use", "large-16"]
