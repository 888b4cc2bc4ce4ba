"""scripts/gpu_check.sh: on a CPU, with tiny sizes, every part leaves its figures; a part that fails
or has no time stops nothing."""

import json
import math
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytest.importorskip("accelerate", reason="the peer needs it")
pytest.importorskip("sklearn", reason="fine-tuning needs it")
pytest.importorskip("matplotlib", reason="fine-tuning needs it")
PARTS = {
    "first": ["tests", "attention", "train-16", "resume", "numerics", "fp16"],
    "second": ["variants", "use", "large-16"],
}


def start(command, folder, **environment):
    """A command of the check, in a folder of its own."""
    variables = {
        "PYTHON": sys.executable,
        "OUT": folder / "out",
        "GPU_CHECK_SCRATCH": folder / "scratch",
        "GPU_CHECK_SIZE": "tiny",
        "GPU_CHECK_LENGTHS": "16",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), command],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def check(text_file, tmp_path_factory):
    """What both commands print, and the reports by part; the second finds the first one's model."""
    folder, printed, reports = tmp_path_factory.mktemp("check"), {}, {}
    for command, parts in PARTS.items():
        out, scratch = folder / command, folder / "scratch"
        process = start(
            command, folder, OUT=out, GPU_CHECK_SCRATCH=scratch, GPU_CHECK_TRAIN=text_file
        )
        printed[command] = process.communicate()[0]
        assert process.returncode == 0, printed[command]
        written = {f"{part}.json" for part in parts if part != "tests"}
        written |= {"tests.txt"} if command == "first" else set()
        assert {path.name for path in out.iterdir()} == written | {f"log-{command}.txt"}
        for path in out.glob("*.json"):
            reports |= json.loads(path.read_text()) | {path.stem: json.loads(path.read_text())}
    return printed, reports


def test_each_part_has_its_lines_in_the_summary(check):
    printed, _ = check
    for command, parts in PARTS.items():
        headings = [line for line in printed[command].splitlines() if "exit code" in line]
        assert [line.split()[1] for line in headings] == [f"{part}:" for part in parts]
        assert all(" code 0, " in line for line in headings) and "FAILED" not in printed[command]
    assert "skipped in" in printed["first"]  # the tests that need a GPU
    assert "resumed from 3" in printed["first"] and "variant as it is" in printed["second"]


def test_training_and_numerics_have_their_figures(check):
    _, reports = check
    for name in ("train-16", "large-16"):
        train = reports[name]["train"]
        assert train["failed"] == {} and train["micro_batch_size"] == 8
        assert train["tokens_per_second"].keys() == {"ours", "peer", "ratio"}
        assert min(train["tokens_per_second"].values()) > 0
    profile = reports["train-16"]["profile"]
    assert {"name", "ms", "count", "share"} == profile["kernels"][0].keys()
    assert 0 <= profile["idle"]["ours"] < 1 and profile["waits_for_device"] == 0
    for name in ("loss_difference", "grad_norm_difference"):
        assert reports["numerics"]["numerics"][name]["ours"] < 0.02


def test_a_killed_run_continues_with_the_same_losses(check):
    resume = check[1]["resume"]["resume"]
    assert resume["failed"] == {} and resume["resumed_from"] >= 3
    assert [row["step"] for row in resume["losses"]] == list(range(1, 10))
    assert all(row["loss"] == row["loss_resumed"] for row in resume["losses"])
    assert resume["difference_before"] == resume["difference_after"] == 0


def test_losses_of_half_precision_and_scores_of_use(check):
    fp16, use = check[1]["fp16"]["fp16"], check[1]["use"]["use"]
    assert fp16["failed"] == {} and fp16["skipped_steps"] == 0
    assert fp16["precision"] == "fp32"  # a CPU has no fp16
    losses = [row["loss"] for row in fp16["losses"]]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert use["failed"] == {}
    scores = [use["finetune"]["result"]["test_macro_f1"], use["predict"]["result"]["macro_f1"]]
    assert min(scores) > 0.9 and use["evaluate"]["result"]["perplexity"] > 1
    commands = ("finetune", "predict", "evaluate", "fill_mask")
    assert [use[name]["exit_code"] for name in commands] == [0] * 4


def test_what_a_cpu_cannot_do_is_reported(check):
    attention, variants = check[1]["attention"]["attention"], check[1]["variants"]["variants"]
    assert attention["needs"].startswith("a GPU")
    rows = {row["variant"]: row for row in variants["rows"]}
    assert sum(row.get("needs") == "a GPU" for row in rows.values()) == 4
    measured = [row for row in rows.values() if "needs" not in row]
    assert len(measured) == 5 and all(row["tokens_per_second"] > 0 for row in measured), measured
    assert rows["micro-batch twice as large"]["micro_batch_size"] == 16


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    """Every part of this Python fails; the summary says so, with the code of each."""
    python = tmp_path / "python"
    fails = '[ "$1" = scripts/benchmark.py ] && exit 3'
    python.write_text(f'#!/bin/sh\n{fails}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    process = start("second", tmp_path, PYTHON=python)
    printed = process.communicate()[0]
    failures = re.findall(r"^== (.*): exit code 3, \d+ s\nleft no result$", printed, re.MULTILINE)
    assert process.returncode == 1 and failures == ["variants", "fp16", "use", "large-16"]


def test_parts_without_time_are_left_out(tmp_path):
    printed = start("first", tmp_path, GPU_CHECK_LIMIT=20).communicate()[0]
    assert printed.count("left out, no time") == 6 and "s of 20" in printed


def test_bad_input_is_refused(tmp_path):
    (tmp_path / "file").touch()
    unknown, no_folder = start("third", tmp_path), start("first", tmp_path, OUT=tmp_path / "file")
    assert "expected one command" in unknown.communicate()[0] and unknown.returncode == 2
    assert "error: OUT=" in no_folder.communicate()[0] and no_folder.returncode == 2


def test_a_signal_ends_the_check_and_what_it_runs(tmp_path):
    process, log = start("first", tmp_path), tmp_path / "out" / "log-first.txt"
    while not (log.is_file() and "== tests" in log.read_text()):
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert left.stdout == ""
