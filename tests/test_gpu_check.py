"""scripts/gpu_check.sh: on a CPU, with tiny sizes, every part leaves its figures; a part that fails or has no time stops nothing."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytest.importorskip("accelerate", reason="the peer needs it")
pytest.importorskip("sklearn", reason="fine-tuning needs it")
pytest.importorskip("matplotlib", reason="fine-tuning needs it")


def start(command, folder, **environment):
    """A command of the check, in a folder of its own."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    variables = {
        "PYTHON": sys.executable,
        "OUT": folder / "out",
        "GPU_CHECK_SCRATCH": folder / "scratch",
        "GPU_CHECK_SIZE": "tiny",
        "GPU_CHECK_LENGTHS": "16",
        "OMP_NUM_THREADS": "1",
    }
    variables = {name: str(value) for name, value in (variables | environment).items()}
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), command],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def reports(text_file, tmp_path_factory):
    """What both commands print, and their reports by the name of the part; the second finds the first's model."""
    folder, printed, files = tmp_path_factory.mktemp("check"), {}, {}
    for command in ("first", "second"):
        scratch = folder / "scratch"
        process = start(
            command, folder / command, GPU_CHECK_TRAIN=text_file, GPU_CHECK_SCRATCH=scratch
        )
        printed[command] = process.communicate()[0]
        assert process.returncode == 0, printed[command]
        written = list((folder / command / "out").iterdir())
        assert len(written) <= 8
        files |= {path.name: path for path in written}
    assert {"log-first.txt", "log-second.txt"} <= files.keys()
    found = {
        name.removesuffix(".json"): json.loads(path.read_text())
        for name, path in files.items()
        if name.endswith(".json")
    }
    return printed, found


def test_each_part_leaves_a_report_and_a_line_of_the_summary(reports):
    printed, found = reports
    parts = {
        "first": ["tests", "attention", "train-16", "resume", "numerics", "fp16"],
        "second": ["variants", "use", "large-16"],
    }
    assert found.keys() == {name for names in parts.values() for name in names}
    for command, names in parts.items():
        summary = printed[command].partition("exit code")[2].splitlines()
        lines = {line.split()[0]: line.split()[1:3] for line in summary[1:-1]}
        assert list(lines) == names
        assert all(code == "0" and int(seconds) < 120 for code, seconds in lines.values()), printed[
            command
        ]
        assert "FAILED" not in printed[command]


def test_training_and_numerics_have_their_figures(reports):
    _, found = reports
    for name in ("train-16", "large-16"):
        train = found[name]["train"]
        assert train["failed"] == {} and train["micro_batch_size"] == 8
        assert min(train["tokens_per_second"].values()) > 0
        assert train["tokens_per_second"].keys() == {"ours", "peer", "ratio"}
    profile = found["train-16"]["profile"]
    assert profile["kernels"] and {"name", "ms", "count", "share"} == profile["kernels"][0].keys()
    assert 0 <= profile["idle"]["ours"] < 1 and profile["waits_for_device"] == 0
    assert max(figure["ours"] for figure in found["numerics"]["numerics"].values()) < 0.02


def test_a_killed_run_goes_on_with_the_same_losses(reports):
    _, found = reports
    resume = found["resume"]["resume"]
    assert resume["failed"] == [] and resume["resumed_from"] >= 3
    assert [row["step"] for row in resume["rows"]] == list(range(1, 10))
    assert all(row["loss"] == row["loss_resumed"] for row in resume["rows"])
    assert resume["largest_relative_difference"] == {"before": 0.0, "after": 0.0}


def test_losses_of_half_precision_and_scores_of_use(reports):
    _, found = reports
    fp16, use = found["fp16"]["fp16"], found["use"]["use"]
    assert (
        fp16["failed"] == [] and fp16["skipped_steps"] == 0 and fp16["precision"] == "fp32"
    )  # a CPU has no fp16
    assert all(math.isfinite(row["loss"]) for row in fp16["rows"])
    assert fp16["rows"][-1]["loss"] < fp16["rows"][0]["loss"]
    assert use["failed"] == [] and min(use["macro_f1"].values()) > 0.9
    assert [
        use[name]["exit_code"] for name in ("finetune", "predict", "evaluate", "fill_mask")
    ] == [0] * 4
    assert use["evaluate"]["result"]["perplexity"] > 1


def test_what_a_cpu_cannot_do_is_told(reports):
    _, found = reports
    assert found["attention"]["attention"]["needs"].startswith("a GPU")
    rows = {row["variant"]: row for row in found["variants"]["variants"]["rows"]}
    assert sum(row.get("needs") == "a GPU" for row in rows.values()) == 4
    for name in (
        "as it is",
        "micro-batch twice as large",
        "two micro-batches a step",
        "DDP, one process",
    ):
        assert rows[name]["tokens_per_second"] > 0, rows[name]
    assert rows["micro-batch twice as large"]["micro_batch_size"] == 16


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    """Every part of this Python fails; the summary says so, with the code of each."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = scripts/benchmark.py ] && exit 3\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    process = start("second", tmp_path, PYTHON=python)
    printed = process.communicate()[0]
    assert process.returncode == 1
    for name in ("variants", "fp16", "use", "large-16"):
        assert f"no {name}.json" in next(
            line for line in printed.splitlines() if line.startswith(f"{name} ")
        )
    assert printed.count(" 3 ") == 4


def test_parts_without_time_are_left_out(tmp_path):
    printed = start("first", tmp_path, GPU_CHECK_LIMIT=20).communicate()[0]
    assert printed.count("left out, no time") == 6
    assert "s of 20" in printed


def test_an_unknown_command_is_refused(tmp_path):
    process = start("third", tmp_path)
    assert "expected one command" in process.communicate()[0] and process.returncode == 2


def test_a_signal_ends_the_check_and_what_it_runs(tmp_path):
    process, log = start("first", tmp_path), tmp_path / "out" / "log-first.txt"
    while not (log.is_file() and "== tests" in log.read_text()):
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert left.stdout == ""


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    process = start("first", tmp_path, OUT=tmp_path / "file" / "out")
    assert "error: OUT=" in process.communicate()[0] and process.returncode == 2
