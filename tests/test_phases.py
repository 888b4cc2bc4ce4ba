"""--phases: one phase is a run of its length; each phase reads what a run of its length would, no text twice in an epoch; interrupted
anywhere equals uninterrupted; numbers are those of scripts/evaluate.py at the phase's length; what does not fit is refused."""
import dataclasses
import json
import multiprocessing
import os
import shlex
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import SIZES, assert_same_run, in_processes, interrupted_copy, refusal, rows, script
from packed_reference import dense_attention, small_model
from torch._dynamo.testing import CompileCounter

from pretrain import adapt, parts, phases, setup, train
from pretrain.batch import Batch
from pretrain.command import parse
from pretrain.config import Config, validate
from pretrain.data.collate import Collator
from pretrain.data.dataset import DataPosition, PretrainingDataset
from pretrain.data.masking import Masking
from pretrain.data.planning import Task
from pretrain.data.preparing import prepare
from pretrain.data.reading import check_files
from pretrain.model import attention
from pretrain.model.attention import VARLEN
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime import distributed

PRETRAIN, EVALUATE, SHOW_MASKS, BENCHMARK = script("pretrain"), script("evaluate"), script("show_masks"), script("benchmark")
SWITCH = 6  # steps of the first phase of `finished`


@pytest.fixture(scope="module")
def source(text_file, tiny_tokenizer, tmp_path_factory):
    """A corpus of several shards."""
    return prepare(check_files([text_file], "--train"), "sentences", tiny_tokenizer, tmp_path_factory.mktemp("phases") / "corpus",
                   piece_bytes=20_000)


@pytest.fixture(scope="module")
def arguments(source, cache):
    """Options of ten steps with dropout, accumulation and NSP; the second phase's length does not divide the tokens of a micro-batch."""
    assert source.num_shards > 3
    return ["--train", str(source.folder), "--model", "tiny", *SIZES, "--batch-size", "16", "--micro-batch-size", "8", "--max-steps", "10",
            "--save-every", "2", "--eval-every", "4", "--log-every", "3", "--keep", "9", "--eval-tokens", "600", "--cache", str(cache),
            "--learning-rate", "1e-3", "--precision", "fp32", "--phases", "32:0.6", "80:0.4"]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The uninterrupted run, and the micro-batches of its steps."""
    output, seen, original = tmp_path_factory.mktemp("phases") / "finished", [], train.train_step

    def observed(model, loss_weights, batches, *more):
        seen.append(batches)
        return original(model, loss_weights, batches, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "train_step", observed)
        PRETRAIN.main([*arguments, "--output", str(output)])
    return SimpleNamespace(output=output, steps=seen)


def position_after(output, step):
    return DataPosition(*json.loads((output / f"checkpoint-{step}" / ckpt.STATE_JSON).read_text())["progress"]["position"])


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in ((getattr(one, entry.name), getattr(other, entry.name)) for entry in dataclasses.fields(Batch)))


def evaluated(folder, source, capsys):
    EVALUATE.main(["--model", str(folder), "--input", str(source.folder), "--valid-fraction", "0.05", "--precision", "fp32"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def held_out_of(row):
    return {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/") and "unigram" not in name}


# What is read.

def test_one_phase_is_a_run_of_its_length(arguments, tmp_path):
    for name, more in (("phases", ["--phases", "32:1"]), ("length", ["--max-length", "32"])):
        PRETRAIN.main([*arguments[:-3], *more, "--output", str(tmp_path / name)])
    log = tmp_path / "phases" / "metrics.jsonl"
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(row.pop("train/max_length") == 32 for row in logged)
    log.write_text("".join(json.dumps(row) + "\n" for row in logged))
    assert_same_run(tmp_path / "phases", tmp_path / "length")


def test_micro_batches_are_those_of_a_run_of_the_length_with_the_same_tokens(finished, source):
    """From the first shard on that the phase before has not begun: 256 tokens are 8 sequences of 32, or 3.2 of 80."""
    before, after = position_after(finished.output, SWITCH), position_after(finished.output, SWITCH + 2)
    assert before.micro_batch > 0 and (after.epoch, after.place) > (before.epoch, before.place)
    for length, start, steps in ((32, DataPosition(0, 0, 0), finished.steps[:SWITCH]),
                                 (80, DataPosition(before.epoch, before.place + 1, 0), finished.steps[SWITCH:])):
        task = Task("mlm+nsp", length, 256, 0.15, 0, counted_length=1)  # counted in tokens
        dataset = PretrainingDataset(source.split(0.05)[0], task)
        collator = Collator(task, setup.tokenizers.describe(setup.tokenizers.load(str(finished.output / "final"))), Masking(),
                             multiple=parts.SHAPE_MULTIPLE)
        found = [batch for batches in steps for batch in batches]
        for batch, position in zip(found, dataset.positions(start)):
            assert equal(batch, collator(dataset.__getitems__([position]))) and batch.max_length == length
            assert batch.num_tokens <= 256 and max(batch.lengths) <= length
    assert max(max(batch.lengths[:batch.num_sequences]) for batch in found) > 32


def test_a_shard_that_is_not_begun_is_not_passed_over(source):
    dataset, last = PretrainingDataset(source, Task("mlm", 32, 8, 0.15, 0)), source.num_shards - 1
    for position, expected in (((0, 0, 0), (0, 0, 0)), ((0, 1, 0), (0, 1, 0)), ((0, 1, 1), (0, 2, 0)), ((2, last, 5), (3, 0, 0))):
        assert dataset.next_whole_shard(DataPosition(*position)) == DataPosition(*expected)


def test_the_workers_of_a_phase_end_with_it(arguments, tmp_path, monkeypatch, finished):
    original, running = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *more: running.append(len(multiprocessing.active_children())) or original(*more))
    PRETRAIN.main([*arguments, "--workers", "2", "--output", str(tmp_path / "run")])
    assert running == [2] * 10
    assert_same_run(finished.output, tmp_path / "run")


def test_two_processes_read_the_same(arguments, tmp_path):
    options = [*arguments, *SIZES, "hidden_dropout_prob=0"]
    PRETRAIN.main([*options, "--output", str(tmp_path / "one")])
    ended = in_processes(tmp_path, PRETRAIN.main, [*options, "--output", tmp_path / "two"], count=2)
    assert [code for code, _ in ended] == [0, 0] and ended[0][1].count("from here on sequences of 80 tokens") == 1
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_the_mask_rate_goes_on_from_phase_to_phase(arguments, tmp_path, steps_seen):
    PRETRAIN.main([*arguments, "--mask-rate", "0.2", "0.6", "--output", str(tmp_path / "run")])
    assert len(steps_seen) == 10
    for step, batches in enumerate(steps_seen):
        ordinary = sum(batch.num_tokens - 2 * batch.num_sequences - int((batch.next_sentence_label >= 0).sum()) for batch in batches)
        assert sum(batch.counts["mlm"] for batch in batches) / ordinary == pytest.approx(0.2 + 0.4 * step / 9, abs=0.02), step
    interrupted_copy(tmp_path / "run", tmp_path / "parts", SWITCH)
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "parts"), "--workers", "2"])
    assert_same_run(tmp_path / "run", tmp_path / "parts")


# Interrupted.

@pytest.mark.parametrize(("step", "workers"), [(2, "2"), (SWITCH, "0"), (SWITCH, "2"), (8, "0")])
def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, step, workers):
    interrupted_copy(finished.output, tmp_path / "run", step)
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run"), "--workers", workers])
    assert_same_run(finished.output, tmp_path / "run")


@pytest.mark.parametrize("call", [3, SWITCH + 1, SWITCH + 2])
def test_killed_then_resumed(finished, arguments, tmp_path, monkeypatch, call):
    original, seen = train.train_step, []

    def deadly(*more):
        seen.append(None)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*more)

    command = [*arguments, "--resume", "--output", str(tmp_path / "run")]
    (code, _), = in_processes(tmp_path, PRETRAIN.main, command, prepare=lambda rank: monkeypatch.setattr(train, "train_step", deadly))
    assert code == -signal.SIGKILL
    PRETRAIN.main(command)
    assert_same_run(finished.output, tmp_path / "run")


def test_more_steps_move_the_phases(finished, tmp_path, steps_seen, capsys):
    """At step 10 the run was in its second phase; of 20 steps the first has 12: it goes on with two steps of that."""
    shutil.copytree(finished.output, tmp_path / "run")
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run"), "--max-steps", "20", "--save-every", "11", "--eval-every", "7"])
    assert [{batch.max_length for batch in batches} for batches in steps_seen] == [{32}] * 2 + [{80}] * 8
    told = capsys.readouterr().err
    assert "step 11: from here on sequences of 32 tokens" in told and "step 13: from here on sequences of 80 tokens" in told
    facts = ckpt.read_facts(tmp_path / "run" / "checkpoint-11")
    assert (facts["held_out_step"], facts["max_length"]) == (10, 80), "the numbers are still those of step 10"
    assert {row["step"]: row["train/max_length"] for row in rows(tmp_path / "run") if row["step"] > 10} == {
        12: 32, 14: 80, 15: 80, 18: 80, 20: 80}


def test_a_checkpoint_of_before_there_were_phases_goes_on(arguments, tmp_path):
    PRETRAIN.main([*arguments[:-3], "--max-length", "32", "--output", str(tmp_path / "new")])
    interrupted_copy(tmp_path / "new", tmp_path / "old", 4)
    state = tmp_path / "old" / "checkpoint-4" / ckpt.STATE_JSON
    content = json.loads(state.read_text())
    for name in ("phase", "last_eval_phase"):
        del content["progress"][name]
    del content["options"]["phases"]
    state.write_text(json.dumps(content))
    sums = json.loads((state.parent / ckpt.CHECKSUMS).read_text())
    sums[state.name] = {"bytes": state.stat().st_size, "sha256": setup.sha256_of(state)}
    (state.parent / ckpt.CHECKSUMS).write_text(json.dumps(sums))
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "old")])
    assert_same_run(tmp_path / "new", tmp_path / "old")


# Numbers.

def test_numbers_are_those_of_the_phase(finished, source, capsys):
    logged = {row["step"]: row for row in rows(finished.output)}
    assert {step: row["train/max_length"] for step, row in logged.items()} == {0: 32, 1: 32, 3: 32, 4: 32, 6: 32, 8: 80, 9: 80, 10: 80}
    for name, step in (("checkpoint-4", 4), ("checkpoint-8", 8), ("final", 10)):
        numbers = evaluated(finished.output / name, source, capsys)
        assert numbers == held_out_of(logged[step]) == {name: numbers[name] for name in held_out_of(logged[step])}
    summary = json.loads((finished.output / "summary.json").read_text())
    assert evaluated(finished.output / "best", source, capsys) == held_out_of(logged[summary["best_step"]]) and summary["best_step"] >= 8
    assert 0.6 * 10 * 16 * 32 < summary["real_tokens"] <= 10 * 16 * 32


@pytest.mark.parametrize("lengths", [("32", "80"), ("80", "32")])
def test_patience_and_best_are_those_of_the_last_phase(arguments, tmp_path, lengths):
    """Nothing is learnt: in the last phase the first evaluation is the best, and two more end the run, whatever came before."""
    more = ["--micro-batch-size", "16", "--eval-every", "1", "--patience", "2", "--learning-rate", "1e-30", "--phases"]
    PRETRAIN.main([*arguments[:-3], *more, f"{lengths[0]}:0.6", f"{lengths[1]}:0.4", "--output", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["best_step"], summary["steps"]) == (SWITCH + 1, SWITCH + 3)
    assert ckpt.read_facts(tmp_path / "run" / "best")["max_length"] == int(lengths[1])


def test_the_experiment_compares_at_the_last_length(finished, arguments, tmp_path, monkeypatch):
    """The encoder before training is evaluated again: the run has done so at the first length."""
    config = parse([*arguments, "--resume", "--output", str(finished.output)], Config, "")
    monkeypatch.setattr(adapt, "config_of", lambda experiment, name: config)
    result = adapt.held_out(SimpleNamespace(output=tmp_path, texts={}))
    PRETRAIN.main([*arguments[:-3], "--max-length", "80", "--max-steps", "1", "--output", str(tmp_path / "run")])
    assert result["before"] == pytest.approx(rows(tmp_path / "run")[0]["eval/perplexity"], rel=1e-5)
    assert [step for step, _ in result["curve"]] == [0, 8, 10] and result["after"] == rows(finished.output)[-1]["eval/perplexity"]


# Shapes.

def test_each_phase_has_one_graph(corpus, vocabulary, monkeypatch):
    """Three lengths, each seen twice: by default the second would make one graph of any shape, and the third would have none."""
    monkeypatch.setattr(attention, "packed_varlen", lambda qkv, cu_seqlens, *_: dense_attention(qkv, cu_seqlens))
    torch._dynamo.reset()
    counter, compile_with, batches = CompileCounter(), torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda *more, **options: compile_with(*more, backend=counter, **options))
    model = small_model(vocabulary.size)
    model.attention = VARLEN
    compiled = distributed.wrap(model, True)
    for length in (16, 24, 40):
        task = Task("mlm+nsp", length, 8, 0.15, 0, counted_length=16)
        dataset, collator = PretrainingDataset(corpus, task), Collator(task, vocabulary, Masking(), fill=True)
        batches += [collator(dataset.__getitems__([DataPosition(0, 0, number)])) for number in range(2)]
    for batch in [*batches, *batches]:
        compiled(batch)
    assert counter.frame_count == 3
    torch._dynamo.reset()


def test_the_trial_is_of_each_phase(arguments, tmp_path, monkeypatch):
    tried = []

    def fits(model, batch, context):
        tried.append((batch.max_length, batch.num_tokens))
        return batch.max_length == 32 or batch.num_tokens <= 128

    monkeypatch.setattr(setup, "micro_batch_fits", fits)
    run = setup.build(parse([*arguments, "--output", str(tmp_path / "run")], Config, ""))
    assert [length for length, _ in tried] == [32, 80] * 2 and run.config.micro_batch_size == 4 == run.asked_micro_batch_size / 2
    monkeypatch.setattr(setup, "micro_batch_fits", lambda *more: False)  # and 2 x 32 tokens hold no sequence of 128
    config = parse([*arguments, "--phases", "32:0.5", "128:0.5", "--output", str(tmp_path / "run")], Config, "")
    with pytest.raises(ValueError, match=r"--micro-batch-size 4: .* or shorter sequences \(--phases\)"):
        setup.build(config)


# Other commands.

@pytest.mark.parametrize(("step", "number"), [(2, "1"), (8, "2")])
def test_the_data_of_a_step_is_shown_again(finished, step, number, tmp_path, monkeypatch, capsys):
    config = json.loads((finished.output / "config.json").read_text())
    run = setup.build(parse(["--output", str(finished.output), "--resume"], Config, "", defaults=config))
    words = shlex.split(run.rebuild(position_after(finished.output, step), step + 1))
    assert words[:2] == ["python", "scripts/show_masks.py"] and words[words.index("--phase") + 1] == number
    monkeypatch.chdir(tmp_path)
    SHOW_MASKS.main(words[2:])
    shown = torch.load("batch.pt")
    assert len(shown) == 2 and all(torch.equal(one["input_ids"], other.input_ids) for one, other in zip(shown, finished.steps[step]))


def test_the_embedded_text_takes_phases(tmp_path, documents, monkeypatch):
    monkeypatch.setattr("pretrain.embedded._documents", lambda: documents)
    monkeypatch.setattr("pretrain.embedded.MIN_STEPS", 2)
    monkeypatch.setattr("pretrain.embedded.MAX_STEPS", 2)
    more = ["--vocab-size", "120", "--phases", "32:0.5", "48:0.5"]
    PRETRAIN.main(["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "run"), *more])
    assert [row["train/max_length"] for row in rows(tmp_path / "run")] == [32, 32, 48]


def test_what_is_planned_is_told(arguments, tmp_path, capsys):
    setup.print_plan(setup.build(parse([*arguments, "--output", str(tmp_path / "run")], Config, "")))
    told = capsys.readouterr().out
    assert "phase 1: steps 1 to 6, sequences of 32 tokens, 8 of them fill a micro-batch" in told
    assert "phase 2: steps 7 to 10, sequences of 80 tokens, 3.2 of them fill a micro-batch" in told
    assert "mlm+nsp at 32 tokens:" in told and "mlm+nsp at 80 tokens:" in told


# Refused.

FORM = "needed is LENGTH:SHARE for each phase, such as 128:0.9 512:0.1 (in quotes where YAML has it)"
BAD = [
    *((["--phases", wrong], f"--phases {wrong}: {FORM}") for wrong in ("128", "128:x", "x:1", "128:0.5:0.5", "1.5:1", ":", "7680.9")),
    (["--phases", "7:1"], "--phases 7:1: needed are lengths of 8 to 65536 tokens"),
    (["--phases", "64:.5", "65537:.5"], "--phases 64:.5 65537:.5: needed are lengths of 8 to 65536 tokens"),
    *((["--phases", f"64:{one}", f"128:{two}"], f"--phases 64:{one} 128:{two}: needed are shares above 0 that sum to 1")
      for one, two in ((0.9, 0.2), (1, 0), (1.5, -0.5), ("nan", 1), ("inf", 1), (0.9, 0.099))),
    (["--phases", "64:1", "--max-length", "128"], "--phases 64:1 --max-length 128: exclude each other; needed is one of the two"),
    (["--phases", "64:.9", "384:.1", "--micro-batch-size", "4"],
     "--micro-batch-size 4: is 256 tokens, less than a sequence of 384; needed is at least 6 with --phases 64:.9 384:.1"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_what_is_wrong_with_phases_is_told_alone(more, message):
    assert validate(parse(more, Config, "")) == [message]


@pytest.mark.parametrize("more", [["128:0.9", "512:0.1"], ["512:0.5", "8:0.5"], ["64:0.3333333", "128:0.3333333", "256:0.3333334"]])
def test_what_is_right_is_taken(more):
    config = parse(["--phases", *more], Config, "")
    assert validate(config) == []
    assert [(str(length), str(share)) for length, share in phases.lengths_and_shares(config)] == [tuple(row.split(":")) for row in more]
    ends = phases.phase_ends(config, 1000)
    assert ends[-1] == 1000 and ends[0] in (900, 500, 333)


def test_without_phases_there_is_one():
    assert phases.lengths_and_shares(Config()) == [(128, 1.0)] and phases.phase_ends(Config(), 7) == [7]


@pytest.mark.parametrize(("more", "message"), [
    (["--phases", "32:0.96", "64:0.04"],
     "--phases 32:0.96 64:0.04: of 10 steps they have 10, 0; needed is one at least for each, by other shares or more steps"),
    (["--phases", "64:0.5", "600:0.5", "--micro-batch-size", "16", *SIZES, "max_position_embeddings=512"],
     "--phases 600: the model has 512 positions; needed is at most that")])
def test_phases_that_do_not_fit_the_run_are_refused(arguments, tmp_path, more, message, capsys):
    assert refusal(PRETRAIN.main, [*arguments, *more, "--output", tmp_path / "run"], capsys).startswith(message)
    assert not (tmp_path / "run").exists()


def test_other_phases_are_refused_on_resume(finished, capsys):
    started = "the run was started with ['32:0.6', '80:0.4']"
    for more, message in ((["--phases", "32:0.5", "80:0.5"], f"--phases ['32:0.5', '80:0.5']: {started}"),
                          (["--max-length", "32"], f"--phases []: {started}")):
        assert message in refusal(PRETRAIN.main, ["--resume", "--output", finished.output, *more], capsys)


def test_what_is_typed_takes_the_place_of_what_a_file_says(tmp_path):
    for in_file, typed in (({"max_length": 64}, ["--phases", "32:1"]), ({"phases": ["32:1"]}, ["--max-length", "64"])):
        (tmp_path / "options.json").write_text(json.dumps(in_file | {"seed": 3}))
        config = parse(["--config", str(tmp_path / "options.json"), *typed], Config, "")
        assert validate(config) == [] and config.seed == 3
        assert (config.max_length, config.phases) == ((None, ["32:1"]) if typed[0] == "--phases" else (64, []))


def test_a_model_from_scratch_has_positions_for_the_longest_phase(arguments, tmp_path):
    more = ["--phases", "64:0.5", "600:0.5", "--micro-batch-size", "16", "--max-steps", "2", "--save-every", "5"]
    PRETRAIN.main([*arguments, *more, "--output", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_text())["max_position_embeddings"] == 600


def test_commands_of_one_length_refuse_phases(capsys):
    for number in ("0", "3"):
        told = refusal(SHOW_MASKS.main, ["--phases", "32:0.5", "64:0.5", "--phase", number], capsys)
        assert told.startswith(f"--phase {number}: needed is a whole number of 1 to 2")
    assert refusal(SHOW_MASKS.main, ["--phase", "2"], capsys).startswith("--phase 2: needed is a whole number of 1 to 1")
    assert refusal(BENCHMARK.main, ["--phases", "32:1"], capsys) == "--phases: a measurement has one length; needed is --max-length"
