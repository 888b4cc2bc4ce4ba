"""--phases: each phase reads what a run of its length would, and no text twice in an epoch; scores
equal evaluate.py at the phase's length; bad phases are refused. test_mix.py
interrupts a run with phases."""

import dataclasses
import shutil

import pytest
from conftest import (
    SHORT_RUN,
    SIZES,
    arguments_of,
    assert_same,
    built,
    evaluated,
    leaves,
    observed_run,
    refusal,
    refused,
    resume,
    rows,
    scores_of,
    summary_of,
)

from pretrain import build, plan
from pretrain.commands import show_masks
from pretrain.commands.pretrain import main
from pretrain.data.collate import Collator
from pretrain.data.loader import DataPosition, PretrainingDataset
from pretrain.data.masking import Masking
from pretrain.data.pairs import Task
from pretrain.data.tokenizer import describe, load
from pretrain.runtime import checkpoint as ckpt

SWITCH = 6  # steps of the first phase of `finished`


@pytest.fixture(scope="module")
def arguments(source, cache):
    """Options of ten steps with dropout, accumulation and NSP. The second phase's length does not
    divide the tokens of a micro-batch."""
    files = ["--train", source.folder, "--cache", cache]
    return arguments_of(files, SHORT_RUN, SIZES, "--micro-batch-size 8 --phases 32:0.6 80:0.4")


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    return observed_run(tmp_path_factory.mktemp("phases") / "finished", arguments)


def position_after(output, step):
    """The data position of a run after a step."""
    return DataPosition(*ckpt.read_states(output / f"checkpoint-{step}")["data"]["position"])


# What is read.


def test_micro_batches_equal_a_run_of_that_length(finished, source):
    """From the first shard that the previous phase has not begun. 256 tokens are 8 sequences of
    32, or 3.2 of 80."""
    output = finished.output
    before, after = position_after(output, SWITCH), position_after(output, SWITCH + 2)
    assert before.micro_batch > 0 and after[:2] > before[:2]
    second_start = DataPosition(before.epoch, before.place + 1, 0)
    training, vocabulary = source.split(0.05)[0], describe(load(str(output / "final")))
    for length, first, steps in (
        (32, DataPosition(0, 0, 0), finished.steps[:SWITCH]),
        (80, second_start, finished.steps[SWITCH:]),
    ):
        task = Task("random", length, 256, 0.15, 0, counted_length=1)  # counted in tokens
        dataset = PretrainingDataset(training, task)
        collator = Collator(task, vocabulary, Masking(), multiple=plan.SHAPE_MULTIPLE)
        found = [batch for batches in steps for batch in batches]
        for batch, position in zip(found, dataset.positions(first)):
            expected = collator(dataset[position])
            assert_same(leaves(dataclasses.asdict(batch)), leaves(dataclasses.asdict(expected)))
            assert batch.max_length == length and batch.num_tokens <= 256
            assert max(batch.lengths) <= length
    assert max(max(batch.lengths[: batch.num_sequences]) for batch in found) > 32


# Resumed.


def test_more_steps_move_the_phases(finished, output, steps_seen):
    """At step 10 the run was in its second phase. Of 20 steps, the first phase has 12, so two of
    its steps come next."""
    shutil.copytree(finished.output, output)
    resume(output, "--max-steps 20 --save-every 11 --eval-every 7")
    lengths = [{batch.max_length for batch in batches} for batches in steps_seen]
    assert lengths == [{32}] * 2 + [{80}] * 8
    facts = ckpt.read_facts(output / "checkpoint-11")  # the scores are still those of step 10
    assert (facts["held_out_step"], facts["max_length"]) == (10, 80)
    logged = {row["step"]: row for row in rows(output)}
    assert facts["held_out"]["perplexity"] == logged[10]["eval/perplexity"]
    lengths = {step: row.get("train/max_length") for step, row in logged.items() if step > 10}
    assert lengths == {12: 32, 14: None, 15: 80, 18: 80, 20: 80}


# Numbers.


def test_scores_are_at_the_length_of_the_phase(finished, source, capsys):
    logged = {row["step"]: row for row in rows(finished.output)}
    lengths = {step: row.get("train/max_length") for step, row in logged.items()}
    assert lengths == {0: None, 1: 32, 3: 32, 4: None, 6: 32, 8: None, 9: 80, 10: 80}
    for name, step in (("checkpoint-4", 4), ("final", 10)):
        found = evaluated(finished.output / name, source.folder, capsys)
        assert found == scores_of(logged[step]) and "nsp_accuracy" in found
    summary = summary_of(finished.output)
    best = summary["best_step"]
    assert best >= 8
    found = evaluated(finished.output / "best", source.folder, capsys)
    assert found == scores_of(logged[best])
    assert 0.6 * 10 * 16 * 32 < summary["real_tokens"] <= 10 * 16 * 32


# Shapes.


def test_memory_is_tried_for_each_phase(arguments, output, monkeypatch):
    tried = []

    def fits(model, batch, context):
        tried.append(batch.max_length)
        return 0.1 if batch.max_length == 32 or batch.num_tokens <= 128 else None

    monkeypatch.setattr(build, "trial_seconds", fits)
    run = built(output, arguments)
    assert tried == [32, 80] * 2 and run.micro_batch_size == 4
    # None fits; and 2 x 32 tokens have no room for a sequence of 128.
    monkeypatch.setattr(build, "trial_seconds", lambda *more: None)
    more = {"begins": "--micro-batch-size 4: ", "names": "(--phases)"}
    refused(built, output, arguments, "--phases 32:0.5 128:0.5", **more)


def test_a_model_from_scratch_has_positions_for_the_longest_phase(arguments, output):
    run = built(output, arguments, "--phases 64:0.5 600:0.5 --micro-batch-size 16")
    assert run.model.config.max_position_embeddings == 600


# Refused.


@pytest.mark.parametrize(
    ("more", "beginning"),
    [
        ("--phases 32:0.96 64:0.04", "--phases 32:0.96 64:0.04: "),  # no step of ten
        ("max_position_embeddings=512 --phases 64:.5 600:.5", "--phases 600: "),
    ],
)
def test_phases_that_do_not_fit_the_run_are_refused(arguments, output, more, beginning, capsys):
    command = arguments_of(arguments, "--micro-batch-size 16", SIZES, more, ["--output", output])
    refusal(main, command, capsys, beginning, output)


def test_a_length_in_place_of_phases_is_refused_on_resume(finished, capsys):
    command = ["--resume", "--output", finished.output, "--max-length", 32]
    assert "--phases 32:0.6" in refusal(main, command, capsys, "--max-length 32: ")


def test_a_missing_phase_cannot_be_shown(capsys):
    argv = arguments_of("--phases 32:0.5 64:0.5 --phase 3")
    assert refusal(show_masks.main, argv, capsys).startswith("--phase 3: ")
