"""benchmark.py: both sides do the same work, every part reports its figures, and a side that fails
is reported in its place."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import SIZES, refusal

from pretrain.cli import parse
from pretrain.data.loader import DataPosition
from scripts.benchmark import clock, command, data, quality, report, start, steps
from scripts.benchmark.peer import describe
from scripts.benchmark.processes import Process, ProcessError, send_rows
from scripts.benchmark.rows import blocks, same_examples

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
PAIRS = {"input_ids", "token_type_ids", "special_tokens_mask", "next_sentence_label"}
SMALL = "--model tiny --max-length 32 --batch-size 4 --micro-batch-size 2 --vocab-size 120"


@pytest.fixture(autouse=True)
def short_measures(monkeypatch):
    """Short measurements."""
    monkeypatch.setattr(data, "SAMPLE_CHARACTERS", 1 << 14)
    monkeypatch.setattr(data, "LOADER_SECONDS", 0.02)
    monkeypatch.setattr(steps, "MIN_BLOCKS", 1)
    monkeypatch.setattr(start, "METHOD", "fork")  # starts at once
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    yield
    Process.stop_all()


@pytest.fixture(scope="module")
def arguments(text_file, cache):
    paths = f"--steps 1 --device cpu --train {text_file} --cache {cache}"
    return [*SMALL.split(), *paths.split(), *SIZES]


def bench(arguments, folder):
    return command.Bench(parse(arguments, command.BenchmarkOptions, ""), folder, "cpu")


@pytest.fixture(scope="module")
def run(arguments):
    return bench(arguments, Path()).make_run()


# The peer's work.


def test_the_peer_trains_on_the_very_same_pairs(run):
    rows, phase = same_examples(run, 50), run.phases[0]
    ours, labels = [], []
    positions = phase.dataset.positions(DataPosition(0, 0, 0))
    while len(ours) < 50:
        batch = phase.collator(phase.dataset[next(positions)])
        number, real = batch.counts["mlm"], batch.num_sequences  # what follows is filling
        ids = batch.input_ids.clone()
        ids[batch.masked_positions[:number]] = batch.labels["mlm"][:number]
        types = batch.token_type_ids.split(batch.lengths)
        ours += list(zip(ids.split(batch.lengths), types))[:real]
        labels += batch.labels["nsp"][:real].tolist()
    assert len(rows) == 50
    for row, (ids, types), label in zip(rows, ours, labels):
        assert row.keys() == PAIRS and row["next_sentence_label"] == label
        assert (row["input_ids"], row["token_type_ids"]) == (ids.tolist(), types.tolist())


def test_the_peers_collator_masks_only_ordinary_tokens(run):
    rows, is_special = same_examples(run, 200), run.phases[0].collator.vocabulary.is_special
    masks = describe(run, rows).masks
    batch = transformers.DataCollatorForLanguageModeling(run.tokenizer, **masks)(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].shape == (200, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["next_sentence_label"].tolist() == [row["next_sentence_label"] for row in rows]
    masked, real = batch["labels"] != -100, batch["attention_mask"] == 1
    original = torch.where(masked, batch["labels"], batch["input_ids"])[real]
    assert original.tolist() == [token for row in rows for token in row["input_ids"]]
    assert not is_special[batch["labels"][masked]].any()
    assert 0.12 < masked.sum() / (~is_special[original]).sum() < 0.18


def test_blocks_are_the_documents_end_to_end(run):
    phase = run.phases[0]
    rows, shard = blocks(run, 40), phase.dataset.source.shard(0)
    vocabulary, expected = phase.collator.vocabulary, []
    for first, last in zip(shard.documents, shard.documents[1:]):
        ids = shard.ids[shard.sentences[first] : shard.sentences[last]].tolist()
        expected += [vocabulary.cls_id, *ids, vocabulary.sep_id]
    assert {len(row["input_ids"]) for row in rows} == {32} and len(rows) == 40
    assert [token for row in rows for token in row["input_ids"]] == (expected * 40)[: 40 * 32]
    assert isinstance(describe(run, rows).make_model(), transformers.BertForMaskedLM)


def test_untimed_steps_come_before_the_timed_ones(run, tmp_path, monkeypatch):
    """On both sides, the tokens of a block are the ones of its timed steps."""
    rows, answers = same_examples(run, 6 * 4), []
    lengths = torch.tensor([len(row["input_ids"]) for row in rows]).view(6, 4).sum(1)
    turns = SimpleNamespace(recv=lambda: (), send=answers.append)
    pace = clock.Pace(timed=2, untimed=1, steady=1, patience=1)
    describe(run, rows).train_in_turns(turns, str(tmp_path), 6, pace, {})
    ours = steps.Ours(run)
    timer, counted = clock.Clock(turns, run.device, pace, ours), []
    for _ in range(6):
        counted.append(ours.step())
        timer.end_step(*counted[-1])
    tokens = [block["tokens"] for block in answers]
    assert tokens[:2] == [lengths[1:3].sum(), lengths[4:].sum()]
    expected = [sum(of) for of in zip(*counted[1:3])], [sum(of) for of in zip(*counted[4:])]
    assert [[block["tokens"], block["flops"]] for block in answers[2:]] == list(expected)
    assert all(block["matrix_flops"] > 0 for block in answers[2:])


# The parts. tests/test_gpu_check.py measures the others.


def test_parts_report_their_figures(arguments, tmp_path, capsys):
    path = tmp_path / "report.json"
    parts = ["--parts", "prepare", "data", "blocks", "start", "--quick", "--steps", "1"]
    capsys.readouterr()
    assert command.main([*arguments, *parts, "--json", str(path)]) == 0
    table, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    found = json.loads(last)
    assert found == json.loads(path.read_text())
    assert all(values["failed"] == {} for values in found.values() if "failed" in values)
    for part in ("prepare", "blocks"):
        sides = found[part]["tokens_per_second"]
        assert min(sides["ours"], sides["peer"]) > 0
        assert sides["ratio"] == sides["ours"] / sides["peer"]
        assert f"{sides['ratio']:.4g}" in table
    figures = ("token_masks", "word_masks", "span_masks", "0_workers", "1_workers", "2_workers")
    assert all(found["data"][name]["ours"] > 0 for name in figures)
    assert found["data"]["token_masks"]["goal"] == data.CORE_GOAL
    assert found["data"]["word_masks"]["peer"] == found["data"]["token_masks"]["ours"]
    for name in ("seconds_to_first_step", "seconds_to_resume", "peak_gib"):
        assert min(found["start"][name]["ours"], found["start"][name]["peer"]) > 0
    assert found["start"]["seconds_to_resume"]["goal"] == start.RESUME_GOAL
    assert torch.__version__.startswith(found["machine"]["torch"]) and ", cores " in table


def test_a_report_is_printed(capsys):
    train = {"peak_gib": {"ours": 2.0, "peer": 3.0}, "micro_batch_size": 8}
    train |= {"rows": [{"failed": "peer: no memory"}], "failed": {"peer": "no luck"}}
    found = {"train": train, "profile": {"kernels": [{"share": 0.5, "name": "gemm"}], "graphs": 2}}
    report.add_ratios(found)
    report.print_report(found)
    printed = capsys.readouterr().out
    expected = ("train, peak gib", "0.6667", "micro batch size 8", "failed peer: no memory")
    expected += ("train FAILED, peer: no luck", "share 0.5, name gemm", "graphs 2")
    assert all(text in printed for text in expected)
    report.print_report(found, brief=True)
    printed = capsys.readouterr().out
    assert "peer: no memory" in printed and "gemm" not in printed


def test_quality_compares_both_sides_on_the_same_masks(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "MAX_STEPS", 20)
    ours_gets = quality.our_options
    short = {"max_steps": 20, "save_every": "10"}
    monkeypatch.setattr(quality, "our_options", lambda *values: ours_gets(*values) | short)
    given = [*arguments, "--old-rates", "1e-5", "1e-2", "--minutes", "60"]
    measured, found = bench(given, tmp_path), {}
    for values in quality.measure_quality(measured):
        found.update(values)
    Process.stop_all()
    assert found["failed"] == {} and found["rows"] == sorted(found["rows"], key=rank)
    ours, slow, fast = ([row for row in found["rows"] if rank(row) == n] for n in range(3))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    scores = {row["step"]: row.get("eval/perplexity") for row in map(json.loads, lines)}
    assert [point["step"] for point in ours] == [10, 20]
    for point in ours:
        assert point["perplexity"] == pytest.approx(scores[point["step"]])
    for points in (slow, fast):
        assert [point["step"] for point in points] == list(range(2, 21, 2))
        assert {point["num_steps"] for point in points} == {20}
    best = fast[-1]["perplexity"]
    assert best < slow[-1]["perplexity"] and best < fast[0]["perplexity"]
    assert found["last_perplexity"] == {"ours": ours[-1]["perplexity"], "peer": best}
    assert f"({best:,.1f})" in found["result"] and found["unigram_perplexity"] > 1

    referee = quality.Referee(measured.run_options(valid_fraction=0.05))
    for folder, points in (("run/final", ours), ("old-0.01", fast)):
        score = referee.score(tmp_path / folder)["perplexity"]
        assert score == pytest.approx(points[-1]["perplexity"], rel=1e-3)
    phase, peer = referee.run.phases[0], referee.old_recipe()
    positions = phase.dataset.positions(DataPosition(0, 0, 0), end_epoch=1)
    assert len(peer.rows) == sum(len(phase.dataset[place].plan.label) for place in positions)
    assert peer.masks == {"mlm_probability": 0.15} and "learning_rate" not in peer.arguments


def rank(point):
    return ["ours", "old recipe at 1e-05", "old recipe at 0.01"].index(point["side"])


def test_quality_ends_if_our_run_fails(arguments, monkeypatch, capsys):
    monkeypatch.setattr(quality, "our_options", lambda *_: {"model": "nowhere"})
    capsys.readouterr()
    command.main([*arguments, "--parts", "quality"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["quality"]
    assert found["failed"].keys() == {"ours"} and "rows" not in found
    assert "--model nowhere" in found["ours"]["log"]


def test_pretrain_gets_only_what_the_benchmark_was_given(arguments, text_file, cache):
    given = [*arguments, "--mask-rate", "0.2", "--batch-size", "8"]
    options = parse(given, command.BenchmarkOptions, "")
    found = quality.our_options(options, Path("run"))
    expected = {"model": "tiny", "max_length": 32, "vocab_size": 120, "mask_rate": (0.2,)}
    expected |= {"device": "cpu", "train": (str(text_file),), "cache": str(cache)}
    expected |= {"max_minutes": 7.5, "output": "run", "keep": quality.MAX_STEPS}
    expected["config_override"] = tuple(SIZES[1:])
    assert found == expected


@pytest.mark.parametrize(
    ("perplexities", "minutes", "result"),
    [
        ([600, 500, 300], 2, "(500.0) after 2 minutes: 5 times as fast"),
        ([600, 550, 499], 3, "(500.0) after 3 minutes: 3.33 times as fast"),
        ([600], None, "does not reach"),
    ],
)
def test_ours_is_compared_with_the_best_old_run(perplexities, minutes, result):
    ours = [
        {"side": "ours", "minutes": step, "step": step, "perplexity": perplexity}
        for step, perplexity in enumerate(perplexities, start=1)
    ]
    old_runs = [
        [{"minutes": 9, "perplexity": 700}],
        [{"minutes": 5, "perplexity": 400}, {"minutes": 10, "perplexity": 500}],
    ]
    found = quality.compare(ours, [*old_runs, []])
    assert result in found["result"] and len(found["rows"]) == len(ours) + 3
    assert found.get("minutes_to_its_last", {"ours": None})["ours"] == minutes
    assert "result" not in quality.compare([], old_runs) | quality.compare(ours, [[]])


class HungryRows(list):
    """Rows for which the peer runs out of memory in large micro-batches."""

    def __getitem__(self, index):
        if isinstance(index, int):
            raise MemoryError("too large")
        return super().__getitem__(index)


def hungry_rows(run, number):
    rows = same_examples(run, number)
    return HungryRows(rows) if run.micro_batch_size > 1 else rows


def test_both_sides_halve_if_one_runs_out_of_memory(arguments, tmp_path):
    *_, found = steps.measure_both(bench(arguments, tmp_path), hungry_rows)
    assert found["micro_batch_size"] == 1 and found["failed"] == {}
    assert found["tokens_per_second"].keys() == {"ours", "peer"}
    (row,) = found["rows"]
    assert row["micro_batch_size"] == 2 and "peer: MemoryError: too large" in row["failed"]


# Processes.


def count_up(turns):
    print("this goes to the log")
    for number in range(1, 9):
        turns.recv()
        turns.send(number)


def fail(turns):
    turns.send(turns.recv())
    turns.recv()
    raise RuntimeError("no luck. Ask for advice")


def sleep(turns, folder):
    child = Process(folder, "child", lambda turns: time.sleep(60))
    (folder / "pid").write_text(str(child.process.pid))
    time.sleep(60)


def take_memory(turns, mark, code):
    kept = bytearray(1 << 26)  # 64 MiB
    mark.touch()
    time.sleep(0.3)
    print(f"{len(kept)} bytes", flush=True)
    sys.exit(code)


def test_sides_take_turns_and_one_that_fails_or_hangs_is_reported(tmp_path):
    sides = {side.__name__: Process(tmp_path, side.__name__, side) for side in (count_up, fail)}
    slow = sides["slow"] = Process(tmp_path, "slow", sleep, tmp_path)
    slow.patience = 1
    *_, (taken, failed) = steps.take_turns(sides, list(sides) * 3)
    assert taken == {"count_up": [1, 2, 3], "fail": [()], "slow": []}
    assert failed["fail"] == "RuntimeError: no luck" and "no answer" in failed["slow"]
    assert not slow.is_running() and not sides["fail"].is_running()
    assert "this goes to the log" in sides["count_up"].log.read_text()
    with pytest.raises(ProcessError, match="ended with"):
        slow.ask()


def test_a_new_python_takes_turns(tmp_path):
    process = Process(tmp_path, "new", send_rows, range, 3, method="spawn")
    assert list(iter(process.ask, None)) == [0, 1, 2]


def test_figures_are_medians_without_the_warm_up():
    block = {"tokens": 6, "flops": 60, "matrix_flops": 100, "peak_bytes": 2**30}
    block |= {"untimed_seconds": 30, "graphs": 2, "graph_breaks": 1}
    taken = [block | {"seconds": seconds} for seconds in (9, 9, 1, 3, 2)]
    figures = steps.figures_of(taken, 2, taken)
    assert figures["tokens_per_second"] == 3 and figures["step_seconds"] == 1
    assert figures["steps"] == 6 and figures["share_of_matrix_rate"] == pytest.approx(0.3)
    assert figures["peak_gib"] == 1 and figures["first_step_seconds"] == 30
    assert (figures["graphs_in_warm_up"], figures["graphs_while_timed"]) == (2, 0)


def test_a_process_is_watched_to_its_end(tmp_path):
    mark = tmp_path / "mark"
    process = Process(tmp_path, "good", take_memory, mark, 0)
    seconds, peak = start.watch(process, mark.is_file)
    assert 0 < seconds < time.perf_counter() - process.begin - 0.2 and peak > 1 << 26
    process = Process(tmp_path, "bad", take_memory, mark, 3)
    with pytest.raises(ProcessError, match="ended with 3: 67108864 bytes"):
        start.watch(process, mark.is_file)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_process_dies_with_its_parent(tmp_path):
    parent, pid = Process(tmp_path, "parent", sleep, tmp_path), tmp_path / "pid"
    end = time.monotonic() + 20
    while not (pid.is_file() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    status = Path("/proc", pid.read_text(), "status")
    time.sleep(0.5)  # so that it has asked for its end
    os.kill(parent.process.pid, signal.SIGKILL)
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)


# Checks of scripts/gpu_check.sh, which tests/test_gpu_check.py runs; and bad input.


def test_a_check_whose_command_fails_is_reported(arguments, capsys):
    capsys.readouterr()
    assert command.main([*arguments, "--parts", "fp16", "--model", "nowhere"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["fp16"]
    assert found["failed"].keys() == {"run"} and "ended with 2" in found["failed"]["run"]
    assert found["run"]["exit_code"] == 2 and "--model nowhere" in found["run"]["log"]
    assert found["losses"] == []


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--parts", "speed"], "--parts"),
        (["--max-length", "4"], "--max-length 4"),
        (["--phases", "32:0.5", "64:0.5"], "--phases"),
        (["--json", "TEXT/report.json"], "TEXT"),
        (["--train", "nowhere", "--parts", "train"], "--train nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_message(argv, value, arguments, text_file, capsys):
    argv = [part.replace("TEXT", str(text_file)) for part in argv]
    message = refusal(command.main, [*arguments, *argv], capsys)
    assert message.startswith(value.replace("TEXT", str(text_file)))
