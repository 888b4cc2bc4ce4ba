"""--mix: the batches of a run have its shares; interrupted anywhere, with workers, equals
uninterrupted; two processes equal one; each text has its scores; bad shares are refused."""

import re
import shlex

import numpy as np
import pytest
import torch
from conftest import (
    SHORT_RUN,
    SIZES,
    arguments_of,
    assert_same_run,
    at,
    built,
    evaluated,
    make_documents,
    observed_run,
    pretrain_into,
    refusal,
    resume,
    rows,
    scores_of,
    send,
    summary_of,
    write_documents,
    write_rows,
)
from test_faults import KILL, NO_DROPOUT, assert_close_runs, start

from pretrain import plan, train
from pretrain.commands import show_masks
from pretrain.commands.pretrain import main
from pretrain.corpora import text_names
from pretrain.files import read_json
from pretrain.runtime import checkpoint as ckpt

MIX = "--mix 3 1 --phases 32:0.6 48:0.4 --micro-batch-size 4 --nsp-weight 0.5"
OTHER = "eval_general_notes"


@pytest.fixture(scope="module")
def texts(text_file, tmp_path_factory):
    """The paths of two texts; the second has its own words, and is small."""
    path = tmp_path_factory.mktemp("mix") / "general notes.v1.txt"
    return [text_file, write_documents(path, make_documents(12, seed=9))]


@pytest.fixture(scope="module")
def arguments(texts, cache):
    """Options of ten steps of four micro-batches, in two phases, with dropout and NSP."""
    files = ["--train", *texts, "--cache", cache]
    return arguments_of(files, SHORT_RUN, SIZES, "--vocab-size 120", MIX)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    return observed_run(tmp_path_factory.mktemp("mix") / "finished", arguments)


# What is read.


def test_batches_are_those_of_the_texts_in_their_shares(finished, arguments, tmp_path):
    """Each micro-batch equals one that the text alone gives, and three in four tokens are from the
    first text, up to one micro-batch."""
    run = built(tmp_path / "run", arguments)
    names = ["eval/perplexity", f"{OTHER}/perplexity"]
    assert run.charts["perplexity"]["held-out, by text"] == ["Multiline", names]
    assert len(finished.steps) == 10 and {len(batches) for batches in finished.steps} == {4}
    drawn = np.zeros(2)
    for step, batches in enumerate(finished.steps):
        number = int(step >= 6)
        phase = run.phases[number]
        if step in (0, 6):  # with one shard, a new length begins the next pass
            parts = phase.dataset.parts
            walks = [part.positions(part.start._replace(epoch=number)) for part in parts]
        for batch in batches:
            number = int(drawn[0] > 3 * drawn[1])
            position = next(walks[number])._replace(progress=step / 9)
            expected = phase.collator(phase.dataset.parts[number][position])
            assert torch.equal(batch.input_ids, expected.input_ids)
            drawn[number] += batch.num_tokens
    assert abs(drawn[0] / drawn.sum() - 0.75) < 0.03


def test_the_first_text_decides_steps_and_recipe(arguments, tmp_path):
    """An epoch is a pass over it, so it has a third more steps than the text alone."""
    run = built(tmp_path / "run", arguments, "--epochs 1 --max-steps 0")
    parts = run.phases[0].dataset.parts
    sizes = []
    for part in parts:
        walk = list(part.positions(part.start, 1))
        sizes.append((sum(map(part.count_tokens, walk)), len(walk)))
    (tokens, count), (others, other_count) = sizes
    passes = tokens / 3 / others
    assert run.passes == pytest.approx((1.0, passes))
    assert run.total_steps == round((count + passes * other_count) / 4)
    alone = sum(len(parts[0].source.tokens(index)) for index in range(parts[0].source.num_shards))
    assert run.situation.text_tokens == round(alone / 0.75)


def test_a_prepared_corpus_is_a_text_of_a_mixture(finished, texts, cache, output):
    """Its tokenizer is that of the run."""
    state = read_json(finished.output / "checkpoint-10" / "training_state.json")
    files = ["--train", texts[0], state["corpus_folders"]["train-2"], "--cache", cache]
    run = built(output, files, SHORT_RUN, SIZES, MIX, "--format sentences")
    run.tokenizer.save_pretrained(output)
    own, other = output / "tokenizer.json", finished.output / "final" / "tokenizer.json"
    assert own.read_text() == other.read_text()


def test_each_name_is_used_once():
    entries = ["a/en_web.txt", "b/en_web.txt", "hub:some/set:train", "data/*.parquet", "./***"]
    assert text_names(entries) == ["en_web", "en_web_2", "set_train", "text_4", "text_5"]
    assert len(set(text_names(["a_3.txt", "a.txt", "b/a.txt"]))) == 3


# Interrupted, and with several processes.


def test_killed_then_resumed(finished, arguments, output):
    """In the first phase, in the first step of the second one, with workers, and later in it."""
    for call, workers in ((3, 0), (5, 2), (3, 2)):
        kill = at(train, "train_step", call, send(KILL))
        more = f"--resume --workers {workers}"
        start(output, arguments, more, fault=kill, ends_with=-KILL)
    assert [ckpt.step_of(folder) for folder in ckpt.checkpoints(output)] == [8, 6, 4, 2]
    resume(output, arguments)
    assert_same_run(finished.output, output)


def test_two_processes_equal_one(arguments, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for output, count in ((one, 1), (two, 2)):
        start(output, arguments, "--max-steps 5", NO_DROPOUT, count=count)
    assert_close_runs(one, two, "adamw")


def test_only_the_first_text_must_have_entities(cache, tmp_path, output):
    marked = write_rows(tmp_path / "a.jsonl", [{"text": "river bank .", "spans": [[0, 5]]}] * 40)
    other = write_rows(tmp_path / "b.jsonl", [{"text": "other words ."}] * 40)
    files = ["--train", marked, other, "--cache", cache, "--entity-field", "spans"]
    task = "--mix 1 1 --masking entity --objective mlm --max-length 16 --valid-fraction 0"
    short = "--max-steps 2 --batch-size 8 --vocab-size 100 --model tiny"
    pretrain_into(output, files, SIZES, task, short)


# Numbers.


def test_each_text_has_its_scores(finished, texts, cache, capsys):
    """They equal those of evaluate.py; the first text's decide."""
    last = rows(finished.output)[-1]
    for group, path in (("eval", texts[0]), (OTHER, texts[1])):
        found = evaluated(finished.output / "final", path, capsys, ["--cache", cache])
        assert found == scores_of(last, group)
    summary = summary_of(finished.output)
    with_scores = [row for row in rows(finished.output) if "eval/perplexity" in row]
    in_last_phase = [row["eval/perplexity"] for row in with_scores if row["step"] > 6]
    assert summary["best_perplexity"] == min(in_last_phase)
    name = OTHER.removeprefix("eval_")
    assert summary[f"eval_{name}/perplexity"] == last[f"{OTHER}/perplexity"]
    facts = read_json(finished.output / "final" / "pretraining.json")
    assert facts["mix"] == [3, 1] and f"{name}/perplexity" in facts["held_out"]


def test_show_masks_repeats_the_data_of_a_step(finished, arguments, tmp_path, monkeypatch):
    step, run = 8, built(finished.output, arguments, "--resume")
    state = ckpt.read_states(finished.output / f"checkpoint-{step}")["data"]
    position = run.phases[0].dataset.position_of(state["position"])
    python, script, *argv = shlex.split(run.rebuild_command(step + 1, position))
    assert (python, script) == ("python", "scripts/show_masks.py")
    assert argv[argv.index("--phase") + 1] == "2"
    monkeypatch.chdir(tmp_path)
    show_masks.main(argv)
    shown = torch.load("batch.pt")
    assert len(shown) == 4
    for left, right in zip(shown, finished.steps[step]):
        assert torch.equal(left["input_ids"], right.input_ids)


# Refused.


def test_a_text_without_documents_to_hold_out_is_refused_by_name(texts, output, tmp_path, capsys):
    """Each text has its own validation split, which --valid replaces only for the first."""
    few = write_documents(tmp_path / "few.txt", make_documents(2, seed=4) * 10)
    files = ["--train", texts[0], few, "--mix", 3, 1, "--cache", tmp_path, "--output", output]
    argv = arguments_of(files, SHORT_RUN, SIZES, "--vocab-size 120 --format sentences")
    told = refusal(main, argv, capsys, f"--train {few}: ", output)
    assert "--valid-fraction 0" in told and "--valid PATHS" not in told


def test_a_first_text_that_is_smaller_than_its_share_of_a_step_is_refused(
    texts, output, tmp_path, capsys
):
    """The message has a batch size that works."""
    few = write_documents(tmp_path / "few.txt", make_documents(6, seed=4))
    files = ["--train", few, texts[0], "--mix", 3, 1, "--cache", tmp_path, "--output", output]
    sizes = "--vocab-size 120 --max-length 64 --valid-fraction 0 --max-steps 1"
    command = arguments_of(files, SHORT_RUN, SIZES, sizes)
    argv = [*command, "--batch-size", "4096"]
    told = refusal(main, argv, capsys, "--batch-size 4096: ", output)
    advice = re.search(r"--batch-size (\d+) --micro-batch-size (\d+)", told)[0]
    built(output, command, advice)


def test_a_text_that_would_be_read_absurdly_often_is_refused(
    arguments, output, capsys, monkeypatch
):
    monkeypatch.setattr(plan, "MAX_PASSES", 5)
    command = arguments_of(arguments, "--max-steps 5000", ["--output", output])
    refusal(main, command, capsys, "--mix 3.0 1.0: ", output)


def test_other_shares_are_refused_on_resume(finished, capsys):
    argv = arguments_of("--resume --output", [finished.output], "--mix 1.0 3.0")
    assert "--mix 3.0 1.0" in refusal(main, argv, capsys, "--mix 1.0 3.0: ")


@pytest.mark.parametrize("position", ["0 0 1", "0 0 0 0 0 99 0 0"])
def test_a_position_of_other_data_is_refused(texts, cache, position, capsys):
    command = ["--train", *texts, "--mix", 3, 1, "--vocab-size", 120, "--cache", cache]
    told = refusal(show_masks.main, arguments_of(command, f"--position {position}"), capsys)
    assert told.replace(".0", "").startswith(f"--position {position}: ") and "\n" not in told
