"""scripts/gpu_check.sh on a CPU, with tiny sizes: every part reports its figures, and a part that
fails does not stop the next one."""

import json
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
    "second": ["variants", "use", "large-16"],  # and fp16, unless the first has left its model
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


def run_check(command, folder, **environment):
    """A command of the check, in its own folder."""
    variables = {
        "PYTHON": sys.executable,
        "OUT": folder / "out",
        "GPU_CHECK_SCRATCH": folder / "scratch",
        "GPU_CHECK_SIZE": "tiny",
        "GPU_CHECK_LENGTHS": "16",
        **environment,
    }
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), command],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def reports(text_file, tmp_path, monkeypatch):
    """The reports of both commands, by part, measured in this process: imports would take most of
    the time."""
    monkeypatch.setattr(steps, "MIN_BLOCKS", 1)
    monkeypatch.setattr(steps, "VARIANTS", steps.VARIANTS[:5:4])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    found = {}
    for command, parts in PARTS.items():
        folder = tmp_path / command
        folder.mkdir()
        variables = {"PYTHON": make_python(folder, NOTES), "GPU_CHECK_TRAIN": text_file}
        variables["GPU_CHECK_SCRATCH"] = tmp_path / "scratch"
        run_check(command, folder, **variables)
        for line in (folder / "noted").read_text().splitlines():
            assert benchmark.main(line.split()[1:]) == 0
        (folder / "out").rename(folder / "kept")
        ended = run_check(command, folder, **variables)
        assert ended.returncode == 0 and "FAILED" not in ended.stdout
        headings = re.findall(r"^== (.*): exit code 0, \d+ s$", ended.stdout, re.MULTILINE)
        assert headings == parts
        for path in (folder / "out").glob("*.json"):
            found[path.stem] = json.loads(path.read_text())
    return found


def assert_trained(train):
    assert train["failed"] == {} and train["micro_batch_size"] == 8
    assert train["tokens_per_second"].keys() == {"ours", "peer", "ratio"}
    assert min(train["tokens_per_second"].values()) > 0
    assert 0 < train["share_of_matrix_rate"]["ours"] < 1


def test_every_part_reports_its_figures(reports):
    assert reports["attention"]["attention"]["needs"].startswith("a GPU")
    for name in ("train-16", "large-16"):
        assert_trained(reports[name]["train"])
    profile = reports["train-16"]["profile"]
    assert profile["tokens_per_second"]["ours"] > 0
    assert 0 <= profile["data_wait"]["ours"] < 1 and 0 <= profile["idle"]["ours"] < 1
    assert 0 < sum(kernel["share"] for kernel in profile["kernels"]) < 1.01
    fp16, use = reports["fp16"]["fp16"], reports["use"]["use"]
    assert fp16["failed"] == use["failed"] == {} and fp16["skipped_steps"] == 0
    rows = reports["variants"]["variants"]["rows"]
    assert len(rows) == 2 and all(row["tokens_per_second"] > 0 for row in rows), rows
    scores = [use["finetune"]["result"]["test_macro_f1"], use["predict"]["result"]["macro_f1"]]
    assert min(scores) > 0.9 and use["evaluate"]["result"]["perplexity"] > 1
    assert use["fill_mask"]["exit_code"] == 0


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    """Every part of this Python fails; the summary says so, with the code of each."""
    fails = '#!/bin/sh\n[ "$1" = scripts/benchmark.py ] && exit 3\nexec {python} "$@"\n'
    ended = run_check("second", tmp_path, PYTHON=make_python(tmp_path, fails))
    pattern = r"^== (.*): exit code 3, \d+ s\nleft no result$"
    failures = re.findall(pattern, ended.stdout, re.MULTILINE)
    assert ended.returncode == 1 and failures == ["variants", "fp16", "use", "large-16"]
