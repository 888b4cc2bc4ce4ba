"""benchmark.py: both sides do the same work, every part reports its figures, and a side that fails
is reported in its place."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import SIZES, refusal

from pretrain.cli import parse
from pretrain.data.loader import DataPosition
from pretrain.files import read_json
from scripts.benchmark import clock, command, data, quality, start, steps
from scripts.benchmark.peer import describe
from scripts.benchmark.processes import Process, ProcessError, send_rows
from scripts.benchmark.rows import blocks, same_examples

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
PAIRS = {"input_ids", "token_type_ids", "special_tokens_mask", "next_sentence_label"}
SMALL = "--model tiny --max-length 32 --batch-size 4 --micro-batch-size 2 --vocab-size 120"


@pytest.fixture(autouse=True)
def short_measures(monkeypatch):
    """Short measurements."""
    monkeypatch.setattr(command.Bench, "repeats", 1)
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
    masked = batch["labels"][batch["labels"] != -100]
    ids = torch.tensor([token for row in rows for token in row["input_ids"]])
    assert not is_special[masked].any()
    assert 0.12 < len(masked) / (~is_special[ids]).sum() < 0.18


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
    for name in ("seconds_to_first_step", "seconds_to_resume", "peak_gib"):
        assert min(found["start"][name]["ours"], found["start"][name]["peer"]) > 0


def test_ours_is_compared_with_the_best_old_run():
    ours = [
        {"side": "ours", "minutes": step, "perplexity": perplexity}
        for step, perplexity in enumerate([600, 500, 300], start=1)
    ]
    best = [{"minutes": 5, "perplexity": 400}, {"minutes": 10, "perplexity": 500}]
    old_runs = [[{"minutes": 9, "perplexity": 700}], best, []]
    reached, missed = (quality.compare(points, old_runs) for points in (ours, ours[:1]))
    assert reached["result"].endswith("(500.0) after 2 minutes: 5 times as fast")
    assert "does not reach" in missed["result"]
    assert "result" not in quality.compare([], old_runs) | quality.compare(ours, [[]])


def test_quality_compares_both_sides_on_the_same_masks(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "MAX_STEPS", 20)
    monkeypatch.setattr(quality, "SNAPSHOTS", 2)
    ours_gets = quality.our_options
    short = {"max_steps": 20, "save_every": "10"}
    monkeypatch.setattr(quality, "our_options", lambda *values: ours_gets(*values) | short)
    given = [*arguments, "--old-rates", "1e-2", "--minutes", "60"]
    measured, found = bench(given, tmp_path), {}
    for values in quality.measure_quality(measured):
        found.update(values)
    Process.stop_all()
    assert found["failed"] == {}
    options = read_json(tmp_path / "ours.json")
    assert options["max_length"] == 32 and "batch_size" not in options
    ours, old = found["rows"][:2], found["rows"][2:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    scores = {row["step"]: row.get("eval/perplexity") for row in map(json.loads, lines)}
    assert [point["step"] for point in ours] == [10, 20]
    for point in ours:
        assert point["perplexity"] == pytest.approx(scores[point["step"]])
    assert [point["step"] for point in old] == [10, 20]
    last = {"ours": ours[-1]["perplexity"], "peer": old[-1]["perplexity"]}
    assert found["last_perplexity"] == last and last["peer"] < old[0]["perplexity"]

    referee = quality.Referee(measured.run_options(valid_fraction=0.05))
    for folder, side in (("run/final", "ours"), ("old-0.01", "peer")):
        score = referee.score(tmp_path / folder)["perplexity"]
        assert score == pytest.approx(last[side], rel=1e-3)
    phase, peer = referee.run.phases[0], referee.old_recipe()
    positions = phase.dataset.positions(DataPosition(0, 0, 0), end_epoch=1)
    assert len(peer.rows) == sum(len(phase.dataset[place].plan.label) for place in positions)
    assert peer.masks == {"mlm_probability": 0.15} and "learning_rate" not in peer.arguments


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


def sleep(turns):
    time.sleep(60)


def test_sides_take_turns_and_one_that_fails_or_hangs_is_reported(tmp_path):
    sides = {side.__name__: Process(tmp_path, side.__name__, side) for side in (count_up, fail)}
    slow = sides["slow"] = Process(tmp_path, "slow", sleep)
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
        (["--phases", "32:0.5", "64:0.5"], "--phases"),
        (["--json", "TEXT/report.json"], "TEXT"),
        (["--train", "nowhere", "--parts", "train"], "--train nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_message(argv, value, arguments, text_file, capsys):
    argv = [part.replace("TEXT", str(text_file)) for part in argv]
    message = refusal(command.main, [*arguments, *argv], capsys)
    assert message.startswith(value.replace("TEXT", str(text_file)))
