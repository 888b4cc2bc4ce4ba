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
    refused,
    resume,
    summary_of,
    write_documents,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pretrain import recipe
from pretrain.cli import parse
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


def test_the_rate_of_a_long_run_of_bert_base_is_near_that_of_the_paper():
    config = resolve(Config(optimizer="adamw"), {}, Situation(10**9, 768, SCRATCH, dropout=0.1))
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


@pytest.mark.parametrize(
    ("start", "optimizer", "tokens", "share"),
    [
        (SCRATCH, "muon", 10**4, 0.7),
        (SCRATCH, "muon", 500_000, 0.7925),
        (SCRATCH, "muon", 1_600_000, 1),
        (SCRATCH, "adamw", 10**4, 1),
        (CONTINUED, "adamw", 2**20 // 15, 1),
        (FRESH_HEAD, "adamw", 2**20 // 30, 0.5**0.5),
        (CONTINUED, "adamw", 2**20 // 60, 0.5),
    ],
)
def test_little_text_has_a_lower_rate(start, optimizer, tokens, share):
    """At 2**20 tokens of training: from scratch with Muon, or if it is repeated often from a
    checkpoint."""
    config = Config(optimizer=optimizer, batch_size=8, max_steps=1024)
    rates = [
        resolve(config, {}, Situation(number, 256, start, dropout=0.1)).learning_rate
        for number in (tokens, 10**8)
    ]
    assert rates[0] / rates[1] == pytest.approx(share, rel=0.01)


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


def test_a_resumed_run_is_the_uninterrupted_one(finished, output):
    resume(interrupted_copy(finished, output, 5))
    assert_same_run(finished, output)


def test_a_model_that_gets_worse_is_not_recommended(finished, to_continue, output, capsys):
    """At a rate of 1, ten steps ruin it."""
    model, best = finished / "final", output / "best"
    pretrain_into(output, to_continue, ["--model", model, "--learning-rate", 1])
    summary = summary_of(output)
    (note,) = summary["notes"]
    assert note in capsys.readouterr().out
    assert summary["use"] == str(best) and str(best) in note and summary["best_step"] == 0
    assert_same(*(load_file(folder / "model.safetensors") for folder in (model, best)))
    assert model_folder(str(output)) == summary["use"]  # for a later --model with the run's folder


def test_a_model_that_is_no_better_than_guessing_is_reported(finished, arguments, output, capsys):
    """One that was ruined; not one that learned."""
    learned = summary_of(finished)
    assert learned["eval_perplexity"] < learned["eval_unigram_perplexity"]
    assert "notes" not in learned
    pretrain_into(output, arguments, "--learning-rate 3.0")
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
    pretrain_into(output, arguments, "--max-steps 1 --valid-fraction 0")
    assert summary_of(output)["use"] == str(output / "final")  # nobody knows whether it is better
    lines = capsys.readouterr().out.splitlines()
    (trained_on,) = re.findall(r", for ([\d,]+) tokens of text", "\n".join(lines))
    assert any(line.startswith("--train") and f"only {trained_on} tokens" in line for line in lines)


def test_another_word_than_auto_is_refused():
    refused(parse, ["--epochs", "automatic"], Config, "", begins="--epochs: ")


@pytest.mark.parametrize("option", ["--mask-rate", "--phases"])
def test_auto_is_accepted_where_it_is_the_default(option, tmp_path):
    """On the command line, over a value in a file, and in a file."""
    field = option[2:].replace("-", "_")
    (tmp_path / "given.json").write_text('{"mask_rate": [0.2], "max_length": 64}')
    (tmp_path / "auto.json").write_text(json.dumps({field: "auto"}))
    for words in (["given.json", option, "auto"], ["auto.json"]):
        config = parse([f"--config={tmp_path / words[0]}", *words[1:]], Config, "")
        assert getattr(config, field) == ()
    refused(parse, [option, "auto", "0.5"], Config, "", begins=f"{option}: auto 0.5")
