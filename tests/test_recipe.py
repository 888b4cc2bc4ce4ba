"""What "auto" stands for in the options of a run, and which folder a run recommends."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
from conftest import (
    arguments_of,
    assert_same,
    assert_same_run,
    interrupted_copy,
    make_documents,
    pretrain_into,
    refusal,
    refused,
    resume,
    rows,
    summary_of,
    write_documents,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pretrain import recipe
from pretrain.cli import parse
from pretrain.commands import pretrain
from pretrain.config import Config, counted_length, longest, min_micro_batch_size, phase_lengths
from pretrain.files import model_folder, read_json
from pretrain.recipe import CONTINUED, FRESH_HEAD, SCRATCH, Situation, resolve

STARTS = st.sampled_from((SCRATCH, FRESH_HEAD, CONTINUED))
SITUATIONS = st.builds(
    Situation,
    text_tokens=st.integers(100, 10**11),
    width=st.sampled_from((128, 256, 384, 768, 1024)),
    start=STARTS,
    dropout=st.just(0.1),
)
GIVEN = {
    "optimizer": st.sampled_from(("adamw", "muon")),
    "epochs": st.floats(0.01, 1000),
    "max_steps": st.integers(1, 10**7),
    "mask_rate": st.sampled_from(((0.15,), (0.4, 0.2))),
    "learning_rate": st.floats(1e-9, 1),
    "warmup": st.one_of(st.floats(0, 0.9), st.integers(1, 1000).map(float)),
    "schedule": st.sampled_from(("linear", "cosine", "constant", "wsd")),
    "dropout": st.floats(0, 0.9),
    "max_length": st.integers(8, 4096),
    "entity_fill": st.sampled_from(("word", "none")),
    "recipe": st.sampled_from(("auto", "classic")),
}
OPTIONS = st.fixed_dictionaries({}, optional=GIVEN)
SIZES = st.one_of(
    st.just({}),
    st.integers(1, 500).map(lambda size: {"batch_size": size}),
    st.integers(1, 64).map(lambda size: {"micro_batch_size": size}),
    st.tuples(st.integers(1, 64), st.integers(1, 16)).map(
        lambda pair: {"micro_batch_size": pair[0], "batch_size": pair[0] * pair[1]}
    ),
)


@given(SITUATIONS, OPTIONS, SIZES)
def test_given_values_stay_and_the_rest_is_chosen(situation, options, sizes):
    asked = Config(**options, **sizes)
    config = resolve(asked, {}, situation)
    for name, value in options.items():
        assert getattr(config, name) == value
    values = recipe.values_of(config)
    assert not set(recipe.UNSET) & {value for name, value in values.items() if name != "phases"}
    assert config.micro_batch_size == asked.micro_batch_size
    assert config.batch_size % (config.micro_batch_size or 1) == 0
    assert config.batch_size % min_micro_batch_size(config) == 0
    lengths = phase_lengths(config)
    assert math.isclose(sum(share for _, share in lengths), 1)
    assert longest(config) == longest(asked) <= config.batch_size * counted_length(config)
    if "batch_size" in sizes:
        assert (config.batch_size, counted_length(config)) == (asked.batch_size, longest(asked))


@given(SITUATIONS, OPTIONS, SIZES)
def test_a_resumed_run_keeps_its_values(situation, options, sizes):
    """They come from the checkpoint, as JSON, even if another version would choose others."""
    asked = Config(**options, **sizes)
    config = resolve(asked, {}, situation)
    values = recipe.values_of(replace(config, warmup=7.0))
    saved = {"recipe": json.loads(json.dumps(values))}
    resumed = resolve(asked, saved, replace(situation, text_tokens=5, start=CONTINUED))
    assert recipe.values_of(resumed) == values
    longer = resolve(replace(asked, epochs=1e4), saved, situation)
    assert recipe.values_of(longer) == values | {"epochs": 1e4}


@given(SITUATIONS, st.integers(2, 1000))
def test_more_text_means_larger_steps_and_fewer_epochs(situation, times):
    less = resolve(Config(), {}, situation)
    tokens = situation.text_tokens * times
    more = resolve(Config(), {}, replace(situation, text_tokens=tokens))
    assert more.epochs <= less.epochs and more.epochs * times >= less.epochs
    tokens_of = [config.batch_size * counted_length(config) for config in (less, more)]
    assert tokens_of[0] <= tokens_of[1] <= 256 * 128
    assert tokens_of[0] >= 1024 or situation.text_tokens < 10_000
    if tokens > 10**9:
        assert tokens_of[1] == 256 * 128


@pytest.mark.parametrize("tokens", [10**9, 10**11])
def test_the_rate_of_a_long_run_of_bert_base_is_near_that_of_the_paper(tokens):
    config = resolve(Config(optimizer="adamw"), {}, Situation(tokens, 768, SCRATCH, dropout=0.1))
    assert 0.8e-4 < config.learning_rate < 1.2e-4


def test_a_run_of_few_steps_from_scratch_has_a_lower_rate():
    """Otherwise it ends worse than guessing by frequency; a checkpoint takes the full rate."""
    for start in (SCRATCH, CONTINUED):
        situation = Situation(10**5, 128, start, dropout=0.1)
        configs = [Config(max_steps=steps) for steps in (20, 60, 200, 400, 800)]
        rates = [resolve(config, {}, situation).learning_rate for config in configs]
        assert rates[2] == rates[3] > rates[4]
        expected = [0.1, 0.3] if start == SCRATCH else [1, 1]
        assert [rate / rates[2] for rate in rates[:2]] == pytest.approx(expected)


def test_little_text_has_a_lower_rate_from_scratch():
    """At equal steps, down to a limit; AdamW takes the full rate."""
    for optimizer in ("muon", "adamw"):
        config = Config(optimizer=optimizer, max_steps=1000)
        rates = [
            resolve(config, {}, Situation(tokens, 256, SCRATCH, dropout=0.1)).learning_rate
            for tokens in (10**4, 10**5, 500_000, 1_600_000, 10**8)
        ]
        shares = [rate / rates[-1] for rate in rates]
        expected = [0.7, 0.7, 0.7925, 1, 1] if optimizer == "muon" else [1] * 5
        assert shares == pytest.approx(expected, rel=1e-3)


def test_text_that_is_repeated_often_has_a_lower_rate_from_a_checkpoint():
    """At equal steps; from scratch, all text has the full rate."""
    config, num_tokens = Config(optimizer="adamw", batch_size=8, max_steps=1000), 1000 * 8 * 128
    for start in (SCRATCH, FRESH_HEAD, CONTINUED):
        rates = [
            resolve(config, {}, Situation(num_tokens // epochs, 256, start, 0.1)).learning_rate
            for epochs in (1, 15, 30, 60)
        ]
        shares = [rate / rates[0] for rate in rates]
        expected = [1] * 4 if start == SCRATCH else [1, 1, 0.5**0.5, 0.5]
        assert shares == pytest.approx(expected, rel=0.01)


def test_an_optimizer_without_an_automatic_rate_needs_a_given_one():
    situation = Situation(10**5, 128, SCRATCH, dropout=0.1)
    given = Config(optimizer="lion", learning_rate=3e-4)
    assert resolve(given, {}, situation).learning_rate == 3e-4
    refused(resolve, Config(optimizer="lion"), {}, situation, names="lion")


def test_classic_is_the_recipe_of_bert():
    situation = Situation(10**6, 768, SCRATCH, dropout=0.1)
    config = resolve(Config(recipe="classic"), {}, situation)
    assert (config.optimizer, config.batch_size, config.learning_rate) == ("adamw", 256, 1e-4)
    assert (config.mask_rate, config.dropout, config.phases) == ((0.15,), 0.1, ())
    assert (config.epochs, config.warmup, config.schedule) == (40, 0.01, "linear")


# Runs.


@pytest.fixture(scope="module")
def to_continue(text_file, cache):
    """Ten steps that learn, at one length, without the options that a recipe chooses."""
    times = "--max-steps 10 --eval-every 4 --save-every 5 --log-every 3 --eval-tokens 600"
    files = ["--train", text_file, "--cache", cache]
    return arguments_of(files, times, "--precision fp32 --max-length 32")


@pytest.fixture(scope="module")
def arguments(to_continue):
    """The same from scratch."""
    sizes = "--config-override num_hidden_layers=1 num_attention_heads=2"
    return arguments_of(to_continue, "--model tiny --vocab-size 120", sizes)


def test_the_run_saves_what_was_chosen_and_what_was_asked(finished):
    options = read_json(finished / "config.json")
    assert options["learning_rate"] == options["batch_size"] == "auto"
    state = read_json(finished / "checkpoint-10" / "training_state.json")
    assert state["options"]["learning_rate"] == "auto"
    for name in ("summary.json", "final/pretraining.json"):
        found = read_json(finished / name)
        found = found.get("recipe", found)
        assert all(found[name] == state["recipe"][name] for name in ("learning_rate", "warmup"))
    card = (finished / "final" / "README.md").read_text(encoding="utf-8")
    assert f"| learning rate | {state['recipe']['learning_rate']:.4g} |" in card
    assert f"| mask rate | {' '.join(map(str, state['recipe']['mask_rate']))} |" in card
    peak = max(row.get("optim/learning_rate", 0) for row in rows(finished))
    assert 0 < peak <= state["recipe"]["learning_rate"]


def test_a_resumed_run_is_the_uninterrupted_one(finished, output):
    resume(interrupted_copy(finished, output, 5))
    assert_same_run(finished, output)


@pytest.mark.parametrize("has_text", [True, False])
def test_a_model_that_gets_worse_is_not_recommended(
    finished, to_continue, output, has_text, capsys
):
    """At a rate of 1, ten steps ruin it; without validation text nobody knows."""
    more = ["--model", finished / "final", "--learning-rate", 1, "--valid-fraction", 0.05]
    pretrain_into(output, to_continue, more if has_text else [*more[:-1], 0])
    summary = summary_of(output)
    (note,) = summary["notes"]
    assert note in capsys.readouterr().out
    if has_text:
        assert summary["use"] == str(output / "best") and str(output / "best") in note
        assert summary["best_step"] == 0
        models = (finished / "final", output / "best")
        assert_same(*(load_file(folder / "model.safetensors") for folder in models))
    else:
        assert summary["use"] == str(output / "final")
    assert model_folder(str(output)) == summary["use"]  # for a later --model with the run's folder


@pytest.mark.parametrize("rate", [1e-30, 3.0])
def test_a_model_that_is_no_better_than_guessing_is_reported(
    finished, arguments, output, rate, capsys
):
    """One that learned nothing, and one that was ruined; not one that learned."""
    learned = summary_of(finished)
    assert learned["eval_perplexity"] < learned["eval_unigram_perplexity"]
    assert "notes" not in learned
    pretrain_into(output, arguments, "--learning-rate", [rate])
    summary = summary_of(output)
    assert summary["eval_perplexity"] >= summary["eval_unigram_perplexity"]
    note = summary["notes"][-1]
    assert note.startswith(f"{summary['use']} ") and note in capsys.readouterr().out
    assert "--learning-rate" in note and "--max-steps" in note


def test_a_run_that_overfits_stops_and_recommends_its_best_model(
    arguments, output, tmp_path, capsys
):
    """Three sentences in many orders, and other text to validate on."""
    orders = list(itertools.permutations(make_documents(1, seed=1)[0][:3]))
    documents = [[*order, str(number)] for number, order in enumerate(orders * 4)]
    text = write_documents(tmp_path / "few.txt", documents)
    other = write_documents(tmp_path / "other.txt", make_documents(20, seed=2))
    files = ["--train", text, "--valid", other]
    pretrain_into(output, arguments, files, "--max-steps 100 --learning-rate 3e-3")
    summary = summary_of(output)
    assert summary["steps"] < 100 and summary["state"] == "finished"
    assert summary["use"] == str(output / "best") and summary["best_step"] < summary["steps"]
    stopped, recommended, _ = summary["notes"]
    assert "--patience auto" in stopped and str(output / "best") in recommended
    capsys.readouterr()
    resume(output)
    assert f"use {output / 'best'}" in capsys.readouterr().out
    assert summary_of(output) == summary


def test_little_text_is_reported(arguments, output, capsys):
    pretrain_into(output, arguments, "--max-steps 1")
    lines = capsys.readouterr().out.splitlines()
    (trained_on,) = re.findall(r", for ([\d,]+) tokens of text", "\n".join(lines))
    assert any(line.startswith("--train") and f"only {trained_on} tokens" in line for line in lines)


@pytest.mark.parametrize("option", ["--epochs", "--learning-rate", "--batch-size", "--dropout"])
def test_another_word_than_auto_is_refused(option, arguments, output, capsys):
    argv = [*arguments, "--output", output, option, "automatic"]
    assert refusal(pretrain.main, argv, capsys).startswith(f"{option}: ")


@pytest.mark.parametrize("option", ["--mask-rate", "--phases"])
def test_auto_is_accepted_where_it_is_the_default(option, arguments, output, tmp_path, capsys):
    """On the command line, over a value in a file, and in a file."""
    field = option[2:].replace("-", "_")
    (tmp_path / "given.json").write_text('{"mask_rate": [0.2], "max_length": 64}')
    (tmp_path / "auto.json").write_text(json.dumps({field: "auto"}))
    for words in (["given.json", option, "auto"], ["auto.json"]):
        config = parse([f"--config={tmp_path / words[0]}", *words[1:]], Config, "")
        assert getattr(config, field) == ()
    argv = [*arguments, "--output", output, option, "auto", "0.5"]
    assert refusal(pretrain.main, argv, capsys).startswith(f"{option}: auto 0.5")
