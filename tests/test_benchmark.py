"""benchmark.py: both sides do the same work, every part tells its figures, a side or a cell that fails is told in its place, and a sweep
ends in time."""

import io
import json
import pickle
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import SIZES, refusal, script

from pretrain.benchmark import alone, data, limits, processes, runs, steps, sweep, table
from pretrain.benchmark.peer import describe
from pretrain.benchmark.rows import blocks, same_examples
from pretrain.benchmark.text import write_full_text
from pretrain.command import UserError
from pretrain.data.dataset import DataPosition

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
BENCHMARK, PRETRAIN = script("benchmark"), script("pretrain")
PAIRS = {"input_ids", "token_type_ids", "special_tokens_mask", "next_sentence_label"}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Short measures, and temporary files where the test sees what stays."""
    monkeypatch.setattr(data, "SAMPLE_BYTES", 1 << 14)
    monkeypatch.setattr(data, "LOADER_SECONDS", 0.02)
    monkeypatch.setattr(BENCHMARK, "REPEATS", 1)
    monkeypatch.setattr(steps, "MIN_BLOCKS", 1)
    monkeypatch.setattr(steps, "MATRIX_REPEATS", 1)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def arguments(text_file, cache):
    return [
        "--train",
        str(text_file),
        "--model",
        "tiny",
        *SIZES,
        "--vocab-size",
        "120",
        "--max-length",
        "32",
        "--batch-size",
        "4",
        "--micro-batch-size",
        "2",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--cache",
        str(cache),
    ]


@pytest.fixture
def run(arguments):
    return BENCHMARK.build(BENCHMARK.parse(arguments, BENCHMARK.BenchmarkOptions, ""))


def report_of(arguments, capsys):
    capsys.readouterr()
    BENCHMARK.main([str(part) for part in arguments])
    table, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    return json.loads(last), table


# The peer's work.


def test_the_peer_trains_on_the_very_same_pairs(run):
    rows = same_examples(run, 50)
    ours, labels = [], []
    for position in run.dataset.positions(DataPosition(0, 0, 0)):
        batch = run.collator(run.dataset.__getitems__([position]))
        ids, number, real = (
            batch.input_ids.clone(),
            batch.counts["mlm"],
            batch.num_sequences,
        )  # what follows is filling
        ids[batch.masked_positions[:number]] = batch.masked_lm_labels[:number]
        ours += list(zip(ids.split(batch.lengths), batch.token_type_ids.split(batch.lengths)))[
            :real
        ]
        labels += batch.next_sentence_label[:real].tolist()
        if len(ours) >= 50:
            break
    assert len(rows) == 50
    for row, (ids, types), label in zip(rows, ours, labels):
        assert row.keys() == PAIRS and (row["input_ids"], row["token_type_ids"]) == (
            ids.tolist(),
            types.tolist(),
        )
        assert row["next_sentence_label"] == label


def test_its_collator_masks_ordinary_tokens_and_keeps_the_rest(run):
    rows, peer = same_examples(run, 200), describe(run, same_examples(run, 200))
    batch = transformers.DataCollatorForLanguageModeling(run.tokenizer, **peer.masks)(
        [rows[number] for number in range(200)]
    )
    longest = np.diff(rows.offsets).max()
    assert (
        batch["input_ids"].shape == (200, longest)
        and batch["next_sentence_label"].tolist() == rows.labels.tolist()
    )
    assert batch["attention_mask"].sum() == rows.offsets[-1] == np.diff(rows.offsets).sum()
    masked = batch["labels"] != -100
    original = torch.where(masked, batch["labels"], batch["input_ids"])
    assert original[batch["attention_mask"] == 1].tolist() == rows.ids[: rows.offsets[-1]].tolist()
    assert not run.collator.vocabulary.is_special[batch["labels"][masked]].any()
    assert 0.12 < masked.sum() / (~rows.is_special[: rows.offsets[-1]]).sum() < 0.18


def test_blocks_are_the_documents_end_to_end(run):
    rows, shard, vocabulary = blocks(run, 40), run.dataset.source.shard(0), run.collator.vocabulary
    assert len(rows) == 40 and {len(rows[number]["input_ids"]) for number in range(40)} == {32}
    expected = []
    for first, last in zip(shard.documents, shard.documents[1:]):
        expected += [
            vocabulary.cls_id,
            *shard.ids[shard.sentences[first] : shard.sentences[last]].tolist(),
            vocabulary.sep_id,
        ]
    assert rows.ids.tolist() == (expected * 40)[: 40 * 32]
    assert isinstance(describe(run, rows).make_model(), transformers.BertForMaskedLM)


# The parts.


def test_every_part_tells_its_figures(arguments, tmp_path, capsys):
    parts = [part for part in BENCHMARK.PARTS if part != "start"]
    report, shown = report_of(
        [*arguments, "--parts", *parts, "--json", tmp_path / "report.json"], capsys
    )
    assert report == json.loads((tmp_path / "report.json").read_text())
    for part in ("prepare", "train", "blocks"):
        sides = report[part]["tokens_per_second"]
        assert (
            sides.keys() == {"ours", "peer", "ratio"}
            and min(sides.values()) > 0
            and f"{sides['ours'] / sides['peer']:.3g}" in shown
        )
    for part in (
        "data_token",
        "data_word",
        "data_span",
        "loader_0_workers",
        "loader_1_workers",
        "loader_2_workers",
        "profile",
    ):
        assert report[part]["tokens_per_second"]["ours"] > 0
    assert (
        0 < report["train"]["share_of_matrix_rate"]["ours"] < 1
        and report["train"]["failed"] == report["blocks"]["failed"] == {}
    )
    assert (
        0 <= report["profile"]["data_wait"]["ours"] < 1
        and 0 <= report["profile"]["idle"]["ours"] < 1
    )
    kernels = report["profile"]["kernels"]
    assert (
        len(kernels) == steps.SHOWN_KERNELS
        and 0 < sum(kernel["share"] for kernel in kernels) < 1.01
    )
    assert all(kernel["count"] > 0 for kernel in kernels)
    assert sum(kernel["ms"] for kernel in kernels) <= 1.01 * report["profile"]["kernels_ms"]["ours"]
    assert report["largest"]["sequences"] == {"ours": 4, "peer": 4, "ratio": 1.0}
    assert max(figure["ours"] for figure in report["numerics"].values()) < 0.02
    assert not list((tmp_path / "temporary").iterdir())


def test_what_a_gpu_adds_is_told(capsys):
    table.print_report(
        {
            "train": {
                "peak_gib": {"ours": 2.0, "peer": 3.0, "ratio": 2 / 3},
                "failed": {},
                "compiled": {
                    "ours while it is timed": {"graphs": 0, "graph_breaks": 0},
                    "peer while it warms up": {"graphs": 4, "graph_breaks": 1},
                },
            },
            "profile": {
                "waits_for_device": 2,
                "kernels": [{"name": "gemm", "ms": 2.5, "count": 3, "share": 0.5}],
            },
            "cells": {"a cell": {"command": "python", "failed": "no room"}},
        }
    )
    told = capsys.readouterr().out
    for line in (
        "0.667",
        "compiled by ours while it is timed: 0 graphs, 0 graph breaks",
        "compiled by peer while it warms up: 4 graphs, 1 graph breaks",
        "waits for the device in a step: 2",
        " 50.0%    2.500 ms     3 x gemm",
        "failed: no room",
    ):
        assert line in told


@pytest.mark.parametrize("side", ["ours", "peer"])
def test_a_side_that_fails_is_told_and_the_other_is_measured(
    side, arguments, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise RuntimeError("no luck. Ask for advice")

    if side == "ours":
        monkeypatch.setattr(steps, "train_step", fail)
    else:
        monkeypatch.setattr(processes, "CALL", "raise RuntimeError('no luck')")
    report, shown = report_of([*arguments, "--parts", "train"], capsys)
    message = (
        "RuntimeError: no luck"
        if side == "ours"
        else "the process ended with 1: RuntimeError: no luck"
    )
    assert report["train"]["failed"] == {side: message}
    assert f"{side} failed: {message}" in shown
    assert report["train"]["tokens_per_second"].keys() == {"ours", "peer"} - {side}
    assert not list((tmp_path / "temporary").iterdir())


def test_a_peer_that_hangs_is_told_and_ours_is_measured(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "CALL", "import time; time.sleep(60)")
    monkeypatch.setattr(steps, "ANSWER_SECONDS", {"cpu": 0.1})
    begin = time.perf_counter()
    report, _ = report_of([*arguments, "--parts", "train"], capsys)
    assert time.perf_counter() - begin < 30
    assert "no answer after" in report["train"]["failed"]["peer"]
    assert report["train"]["tokens_per_second"].keys() == {"ours"}


def test_a_peer_without_room_makes_both_sides_take_half(arguments, monkeypatch, capsys):
    """And again, until it fits; what ours did with the larger one is kept."""
    code = (
        "import pickle, sys\n"
        "call, given = pickle.load(open(sys.argv[1], 'rb'))\n"
        "if given[0].__self__.arguments['per_device_train_batch_size'] > 1: raise MemoryError('too large')\n"
        "call(*given)\n"
    )
    monkeypatch.setattr(processes, "CALL", code)
    report, shown = report_of([*arguments, "--micro-batch-size", "4", "--parts", "train"], capsys)
    train = report["train"]
    assert train["micro_batch_size"] == 1 and train["failed"] == {}
    assert train["tokens_per_second"].keys() == {"ours", "peer", "ratio"}
    assert train["larger"].keys() == {"4", "2"}
    assert all(result["tokens_per_second"]["ours"] > 0 for result in train["larger"].values())
    assert "MemoryError: too large" in train["smaller_because"]["peer"]
    assert "micro-batches of 1 for both sides: peer: the process ended with 1: MemoryError" in shown


def test_untimed_steps_come_before_the_timed_ones(arguments, run, tmp_path, monkeypatch):
    """The rows of both are counted: the peer's tokens are those of its timed steps."""
    monkeypatch.setattr(steps, "UNTIMED_STEPS", {"cpu": 1})
    monkeypatch.setattr(steps, "BLOCK_STEPS", {"cpu": 2})
    ours, results = steps.Ours(run), []
    real, counted = ours.step, []
    monkeypatch.setattr(ours, "step", lambda: counted.append(real()) or counted[-1])
    made = []

    def rows_of(run, number):
        made.append(same_examples(run, number))
        return made[0]

    turns = []
    summarize = steps.summarize
    monkeypatch.setattr(
        steps, "summarize", lambda given, *more: turns.append(given) or summarize(given, *more)
    )
    steps.take_turns(ours, rows_of, 2, 1, results.append)
    assert (
        results[-1]["failed"] == {} and len(counted) == 2 * 3
    )  # one block that warms up, one that is timed
    lengths = np.diff(made[0].offsets).reshape(6, run.config.batch_size).sum(1)
    assert [block["tokens"] for block in turns[-1].blocks["peer"]] == [
        lengths[1:3].sum(),
        lengths[4:].sum(),
    ]
    ours_tokens = [tokens for tokens, _ in counted]
    assert [block["tokens"] for block in turns[-1].blocks["ours"]] == [
        sum(ours_tokens[1:3]),
        sum(ours_tokens[4:]),
    ]


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 33, 500, 1024, 5000])
def test_the_largest_size_is_found(limit):
    tried = []
    found = limits.largest(lambda size: tried.append(size) or size <= limit, cap=1024)
    assert (
        max(tried) <= 1024
        and found <= limit
        and found >= min(limit, 1024) * (1 - 1 / limits.EXACTNESS) - 1
    )


def test_what_does_not_fit_is_no_error_but_other_errors_are():
    def attempt(run, size):
        raise torch.OutOfMemoryError("CUDA out of memory") if size > 4 else ValueError("another")

    run = SimpleNamespace(device=torch.device("cpu"))
    assert not limits.fits(attempt, run, 8)
    with pytest.raises(ValueError, match="another"):
        limits.fits(attempt, run, 4)


# Processes of their own.


def in_place(command, log, environment=None):
    """What `processes.start` starts, run to its end in this process."""
    with redirect_stdout(log.open("w") if environment else io.StringIO()):
        if command[0] == "-c":
            call, values = pickle.loads(Path(command[-1]).read_bytes())
            call(*values)
        else:
            (PRETRAIN if command[0].endswith("pretrain.py") else BENCHMARK).main(command[1:])
    return SimpleNamespace(pid=1 << 30, returncode=0, poll=lambda: 0)


def test_starts_and_resumes_of_both_sides_are_measured(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alone, "start", in_place)
    report, _ = report_of([*arguments, "--parts", "start", "--quick"], capsys)
    assert report["start"]["failed"] == {}
    for part in ("start", "resume"):
        sides = report[part]["seconds_to_first_step"]
        assert sides["ours"] > 0 and sides["peer"] > 0
    assert report["resume"]["seconds_to_first_step"]["goal"] == alone.RESUME_GOAL
    assert not list((tmp_path / "temporary").iterdir())


def test_a_process_is_watched_to_its_end(tmp_path):
    log, mark = tmp_path / "log", tmp_path / "mark"
    code = (
        "import pathlib, time; kept = bytearray(1 << 26); pathlib.Path({!r}).touch(); time.sleep(0.2); print('told'); "
        "raise SystemExit({})"
    )
    begin = time.perf_counter()
    seconds, peak = alone.watch(
        processes.start(["-c", code.format(str(mark), 0)], log), begin, mark.is_file, log
    )
    assert 0 < seconds < time.perf_counter() - begin - 0.1 and peak > 1 << 26
    with pytest.raises(UserError, match="the process ended with 3: told"):
        alone.watch(
            processes.start(["-c", code.format(str(mark), 3)], log), begin, mark.is_file, log
        )


# Sweeps.


def test_a_sweep_measures_its_cells_and_tells_the_best(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "start", in_place)
    monkeypatch.setattr(sweep, "MICRO_BATCH_TOKENS", {"cpu": (64, 32)})
    monkeypatch.setattr(alone, "start", in_place)
    report, shown = report_of(
        [*arguments, "--models", "tiny", "--lengths", "32", "--json", tmp_path / "report.json"],
        capsys,
    )
    assert list(report["cells"]) == [
        f"tiny 32 x {size}: {parts}"
        for size, parts in (
            (2, "train profile"),
            (1, "numerics"),
            (1, "largest"),
            (1, "train"),
            (2, "start"),
        )
    ]
    assert (
        not any("failed" in cell for cell in report["cells"].values()) and report["left_out"] == []
    )
    rates = {
        cell["micro_batch_size"]: cell["train"]["tokens_per_second"]
        for cell in report["cells"].values()
        if "train" in cell
    }
    for side in ("ours", "peer"):
        assert report["best"]["tiny 32"][side]["tokens_per_second"] == max(
            rates[size][side] for size in (1, 2)
        )
    assert (
        f"{report['best']['tiny 32']['ours']['tokens_per_second']:,.0f}" in shown
        and ", cores " in shown
    )
    assert report == json.loads((tmp_path / "report.json").read_text()) and not list(
        (tmp_path / "temporary").iterdir()
    )


def test_a_cell_that_fails_or_hangs_is_told_and_the_sweep_goes_on(
    arguments, tmp_path, monkeypatch, capsys
):
    real, ends = (
        processes.start,
        iter(["raise SystemExit('no compiler')", "import time; time.sleep(60)"]),
    )
    monkeypatch.setattr(
        sweep, "start", lambda command, log, environment: real(["-c", next(ends)], log)
    )
    begin = time.perf_counter()
    report, shown = report_of(
        [*arguments, "--models", "tiny", "--lengths", "16", "32", "--minutes", "0.02"], capsys
    )
    assert time.perf_counter() - begin < 10
    assert len(report["left_out"]) == 8 - 2
    assert [cell["failed"] for cell in report["cells"].values()] == ["no compiler", "no time left"]
    assert "failed: no compiler" in shown and "left out, no time: tiny 16" in shown


def test_cells_run_one_at_a_time_and_keep_compiled_kernels(arguments, cache, monkeypatch, capsys):
    running, kept = [], []

    def begin(command, log, environment):
        assert not any(process.poll() is None for process in running)
        kept.append(
            {name: environment[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        )
        running.append(processes.start(["-c", "import time; time.sleep(0.1)"], log))
        return running[-1]

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(sweep, "start", begin)
    report_of([*arguments, "--models", "tiny", "--lengths", "16", "32"], capsys)
    assert len(running) == 8
    assert all(folders == kept[0] for folders in kept)
    assert all(Path(folder).parent == cache for folder in kept[0].values())


# Processes that work in turns.


def repeat_turns(told, answers):
    """Answers a list, one for each turn; run in a process of its own by the test below."""
    print("this goes to the log")
    for value in answers:
        processes.wait_for_turn()
        processes.answer(told, {"value": value})
    raise ValueError("nothing left")


def test_a_process_works_in_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    process = processes.TurnProcess(repeat_turns, ([1, 2],), tmp_path, "turns")
    try:
        assert process.receive(60) == {"value": 1}
        process.send()
        assert process.receive(60) == {"value": 2}
        with pytest.raises(UserError, match="^ValueError: nothing left"):
            process.receive(60)
    finally:
        process.stop()
    assert "this goes to the log" in process.log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_process_dies_with_the_one_that_started_it(tmp_path):
    code = (
        "from pathlib import Path; import sys, time; from pretrain.benchmark.processes import start\n"
        "child = start(['-c', 'import time; time.sleep(60)'], Path(sys.argv[1]))\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    log = tmp_path / "log"
    parent = processes.start(["-c", code, str(tmp_path / "child")], log)
    end = time.monotonic() + 20
    while not log.read_text().strip() and time.monotonic() < end:
        time.sleep(0.02)
    child = int(log.read_text())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    while (
        Path(f"/proc/{child}/status").exists()
        and "State:\tZ" not in Path(f"/proc/{child}/status").read_text()
    ):
        assert time.monotonic() < end
        time.sleep(0.02)


# The text of a GPU, and the checks of scripts/gpu_check.sh (tests/test_gpu_check.py runs them).


def test_the_full_text_has_new_words_of_the_same_lengths(tmp_path, monkeypatch):
    sentences = ["The river is Quick, x2.", "Return the model."]
    monkeypatch.setattr(
        "pretrain.embedded.write_text",
        lambda cache: (cache / "a.txt").write_text("\n".join(sentences) + "\n") and cache / "a.txt",
    )
    path = write_full_text(tmp_path)
    first, *others = path.read_text().strip().split("\n\n")
    assert first.split("\n") == sentences and len(others) == 2
    for other in others:
        assert [len(word) for word in other.split()] == [len(word) for word in first.split()]
        assert other.lower() != first.lower() and other[0].isupper() and "2." in other
    before = path.read_text()
    path.unlink()
    assert write_full_text(tmp_path).read_text() == before


def test_losses_of_a_resumed_run_are_compared():
    def compared(after, resumed_from=2):
        told = {
            "resumed_from": resumed_from,
            "whole": {"exit_code": 0},
            "resumed": {"exit_code": 0},
        }
        return runs.compare(told, {1: 4.0, 2: 3.0, 3: 2.0}, {1: 4.04, 2: 3.0, 3: 9.0}, after)

    found = compared({1: 4.04, 2: 3.0, 3: 2.02})
    assert (
        found["rows"][0] == {"step": 1, "loss": 4.0, "loss_resumed": 4.04}
        and found["rows"][2]["loss_resumed"] == 2.02
    )
    assert (
        found["largest_relative_difference"] == pytest.approx({"before": 0.01, "after": 0.01})
        and found["failed"] == []
    )
    assert "differ by 10.00%" in compared({3: 2.2})["failed"][0]
    assert compared({})["failed"] and compared({3: 2.0}, resumed_from=0)["failed"]


def test_bad_input_is_told_in_one_message(arguments, text_file, capsys):
    for argv, message in (
        (
            ["--models", "huge"],
            "--models huge: needed is a size (tiny, mini, small, medium, base, large) or a folder",
        ),
        (["--models", "tiny", "--lengths", "4"], "--max-length 4: needed is 8 to 65536 tokens"),
        (["--minutes", "0"], "--minutes 0.0: needed is a number above 0"),
        (["--steps", "0"], "--steps 0: needed is a whole number of at least 1"),
        (["--parts", "speed"], "--parts: invalid choice: 'speed'"),
        (["--json", text_file / "report.json"], f"{text_file}"),
    ):
        assert refusal(BENCHMARK.main, [*arguments, *argv], capsys).startswith(message)
