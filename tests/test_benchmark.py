"""benchmark.py: both sides do the same work, every part tells its figures, a side or a cell that fails is told in its place, and a sweep
ends in time."""
import io
import json
import pickle
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import SIZES, refusal, script

from pretrain.benchmark import alone, data, limits, steps, sweep, table
from pretrain.benchmark.peer import describe
from pretrain.benchmark.rows import blocks, same_examples
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
    return ["--train", str(text_file), "--model", "tiny", *SIZES, "--vocab-size", "120", "--max-length", "32", "--batch-size", "4",
            "--micro-batch-size", "2", "--steps", "1", "--device", "cpu", "--cache", str(cache)]


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
        ids, number, real = batch.input_ids.clone(), batch.counts["mlm"], batch.num_sequences  # what follows is filling
        ids[batch.masked_positions[:number]] = batch.masked_lm_labels[:number]
        ours += list(zip(ids.split(batch.lengths), batch.token_type_ids.split(batch.lengths)))[:real]
        labels += batch.next_sentence_label[:real].tolist()
        if len(ours) >= 50:
            break
    assert len(rows) == 50
    for row, (ids, types), label in zip(rows, ours, labels):
        assert row.keys() == PAIRS and (row["input_ids"], row["token_type_ids"]) == (ids.tolist(), types.tolist())
        assert row["next_sentence_label"] == label


def test_its_collator_masks_ordinary_tokens_and_keeps_the_rest(run):
    rows, peer = same_examples(run, 200), describe(run, same_examples(run, 200))
    batch = transformers.DataCollatorForLanguageModeling(run.tokenizer, **peer.masks)([rows[number] for number in range(200)])
    longest = np.diff(rows.offsets).max()
    assert batch["input_ids"].shape == (200, longest) and batch["next_sentence_label"].tolist() == rows.labels.tolist()
    assert batch["attention_mask"].sum() == rows.offsets[-1] == np.diff(rows.offsets).sum()
    masked = batch["labels"] != -100
    original = torch.where(masked, batch["labels"], batch["input_ids"])
    assert original[batch["attention_mask"] == 1].tolist() == rows.ids[:rows.offsets[-1]].tolist()
    assert not run.collator.vocabulary.is_special[batch["labels"][masked]].any()
    assert 0.12 < masked.sum() / (~rows.is_special[:rows.offsets[-1]]).sum() < 0.18


def test_blocks_are_the_documents_end_to_end(run):
    rows, shard, vocabulary = blocks(run, 40), run.dataset.source.shard(0), run.collator.vocabulary
    assert len(rows) == 40 and {len(rows[number]["input_ids"]) for number in range(40)} == {32}
    expected = []
    for first, last in zip(shard.documents, shard.documents[1:]):
        expected += [vocabulary.cls_id, *shard.ids[shard.sentences[first]:shard.sentences[last]].tolist(), vocabulary.sep_id]
    assert rows.ids.tolist() == (expected * 40)[:40 * 32]
    assert isinstance(describe(run, rows).make_model(), transformers.BertForMaskedLM)


# The parts.

def test_every_part_tells_its_figures(arguments, tmp_path, capsys):
    parts = [part for part in BENCHMARK.PARTS if part != "start"]
    report, shown = report_of([*arguments, "--parts", *parts, "--json", tmp_path / "report.json"], capsys)
    assert report == json.loads((tmp_path / "report.json").read_text())
    for part in ("prepare", "train", "blocks"):
        sides = report[part]["tokens_per_second"]
        assert sides.keys() == {"ours", "peer", "ratio"} and min(sides.values()) > 0 and f"{sides['ours'] / sides['peer']:.3g}" in shown
    for part in ("data_token", "data_word", "data_span", "loader_0_workers", "loader_1_workers", "loader_2_workers", "profile"):
        assert report[part]["tokens_per_second"]["ours"] > 0
    assert 0 < report["train"]["share_of_matrix_rate"]["ours"] < 1 and report["train"]["failed"] == report["blocks"]["failed"] == {}
    assert 0 <= report["profile"]["data_wait"]["ours"] < 1 and 0 <= report["profile"]["idle"]["ours"] < 1
    assert len(report["profile"]["kernels"]) == steps.SHOWN_KERNELS and 0 < sum(report["profile"]["kernels"].values()) < 1.01
    assert report["largest"]["sequences"] == {"ours": 4, "peer": 4, "ratio": 1.0}
    assert max(figure["ours"] for figure in report["numerics"].values()) < 0.02
    assert not list((tmp_path / "temporary").iterdir())


def test_what_a_gpu_adds_is_told(capsys):
    table.print_report({"train": {"peak_gib": {"ours": 2.0, "peer": 3.0, "ratio": 2 / 3}, "failed": {}, "compiled": {
        "ours while it is timed": {"graphs": 0, "graph_breaks": 0}, "peer while it warms up": {"graphs": 4, "graph_breaks": 1}}},
        "profile": {"waits_for_device": 2, "kernels": {"gemm": 0.5}}, "cells": {"a cell": {"command": "python", "failed": "no room"}}})
    told = capsys.readouterr().out
    for line in ("0.667", "compiled by ours while it is timed: 0 graphs, 0 graph breaks",
                 "compiled by peer while it warms up: 4 graphs, 1 graph breaks",
                 "waits for the device in a step: 2", " 50.0% gemm", "failed: no room"):
        assert line in told


@pytest.mark.parametrize("side", ["ours", "peer"])
def test_a_side_that_fails_is_told_and_the_other_is_measured(side, arguments, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no room. Ask for advice")

    monkeypatch.setattr(*((steps, "train_step", fail) if side == "ours" else (steps, "PEER_CODE", "raise RuntimeError('no room')")))
    report, shown = report_of([*arguments, "--parts", "train"], capsys)
    message = "RuntimeError: no room" if side == "ours" else "UserError: the process ended with 1: RuntimeError: no room"
    assert report["train"]["failed"] == {side: message} and f"{side} failed: {message}" in shown
    assert report["train"]["tokens_per_second"].keys() == {"ours", "peer"} - {side}
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 33, 500, 1024, 5000])
def test_the_largest_size_is_found(limit):
    tried = []
    found = limits.largest(lambda size: tried.append(size) or size <= limit, cap=1024)
    assert max(tried) <= 1024 and found <= limit and found >= min(limit, 1024) * (1 - 1 / limits.EXACTNESS) - 1


def test_what_does_not_fit_is_no_error_but_other_errors_are():
    def attempt(run, size):
        raise torch.OutOfMemoryError("CUDA out of memory") if size > 4 else ValueError("another")

    run = SimpleNamespace(device=torch.device("cpu"))
    assert not limits.fits(attempt, run, 8)
    with pytest.raises(ValueError, match="another"):
        limits.fits(attempt, run, 4)


# Processes of their own.

def in_place(command, log, given=None, environment=None):
    """What `alone.start` starts, run to its end in this process."""
    environment and Path(environment["TMPDIR"]).mkdir(exist_ok=True)
    with redirect_stdout(log.open("w") if environment else io.StringIO()):
        if given:
            call, values = pickle.loads(given.read_bytes())
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
    code = ("import pathlib, time; kept = bytearray(1 << 26); pathlib.Path({!r}).touch(); time.sleep(0.2); print('told'); "
            "raise SystemExit({})")
    begin = time.perf_counter()
    seconds, peak = alone.watch(alone.start(["-c", code.format(str(mark), 0)], log), begin, mark.is_file, log)
    assert 0 < seconds < time.perf_counter() - begin - 0.1 and peak > 1 << 26
    with pytest.raises(UserError, match="the process ended with 3: told"):
        alone.watch(alone.start(["-c", code.format(str(mark), 3)], log), begin, mark.is_file, log)


# Sweeps.

def test_a_sweep_measures_its_cells_and_tells_the_best(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "start", in_place)
    monkeypatch.setattr(sweep, "MICRO_BATCH_TOKENS", {"cpu": (64, 32)})
    monkeypatch.setattr(alone, "start", in_place)
    report, shown = report_of([*arguments, "--models", "tiny", "--lengths", "32", "--json", tmp_path / "report.json"], capsys)
    assert list(report["cells"]) == [f"tiny 32 x {size}: {parts}" for size, parts in (
        (2, "train profile"), (1, "numerics"), (1, "largest"), (1, "train"), (2, "start"))]
    assert not any("failed" in cell for cell in report["cells"].values()) and report["left_out"] == []
    rates = {cell["micro_batch_size"]: cell["train"]["tokens_per_second"] for cell in report["cells"].values() if "train" in cell}
    for side in ("ours", "peer"):
        assert report["best"]["tiny 32"][side]["tokens_per_second"] == max(rates[size][side] for size in (1, 2))
    assert f"{report['best']['tiny 32']['ours']['tokens_per_second']:,.0f}" in shown and ", cores " in shown
    assert report == json.loads((tmp_path / "report.json").read_text()) and not list((tmp_path / "temporary").iterdir())


def test_a_cell_that_fails_or_hangs_is_told_and_the_sweep_goes_on(arguments, tmp_path, monkeypatch, capsys):
    real, ends = alone.start, iter(["raise SystemExit('no compiler')", "import time; time.sleep(60)"])
    monkeypatch.setattr(sweep, "start", lambda command, log, environment: real(["-c", next(ends)], log))
    begin = time.perf_counter()
    report, shown = report_of([*arguments, "--models", "tiny", "--lengths", "16", "32", "--minutes", "0.02"], capsys)
    assert time.perf_counter() - begin < 10 and len(report["left_out"]) == 8 - 2
    assert [cell["failed"] for cell in report["cells"].values()] == ["no compiler", "no time left"]
    assert "failed: no compiler" in shown and "left out, no time: tiny 16" in shown


def test_bad_input_is_told_in_one_message(arguments, text_file, capsys):
    for argv, message in (
            (["--models", "huge"], "--models huge: needed is a size (tiny, mini, small, medium, base, large) or a folder"),
            (["--models", "tiny", "--lengths", "4"], "--max-length 4: needed is 8 to 65536 tokens"),
            (["--minutes", "0"], "--minutes 0.0: needed is a number above 0"), (["--jobs", "0"], "--jobs 0: needed is a whole number"),
            (["--steps", "0"], "--steps 0: needed is a whole number of at least 1"),
            (["--parts", "speed"], "--parts: invalid choice: 'speed'"),
            (["--json", text_file / "report.json"], f"{text_file}")):
        assert refusal(BENCHMARK.main, [*arguments, *argv], capsys).startswith(message)
