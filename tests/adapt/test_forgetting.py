"""adapt.py --general: a rate that is twenty times too high is flagged as forgetting and a gentle
one is not, with the encoder's own MLM head and with a head that is trained on the frozen
encoder. With --replay, part of the general text is trained on, and the rest is measured."""

import json
import random

import pytest
from conftest import (
    ENDINGS,
    SIZES,
    STEMS,
    make_documents,
    pretrain_into,
    read_rows,
    refusal,
    rows,
    save,
    script,
    write_documents,
    write_rows,
)
from transformers import BertModel

from pretrain import bootstrap, plots
from pretrain.adapt import forgetting, report
from pretrain.compare import Change
from pretrain.data import tokenizer as tokenizers

pytest.importorskip("sklearn")
ADAPT = script("adapt").main
FINE = "--max-steps 1 --batch-size 4 --max-length 32 --precision fp32"
GENTLE = 5e-4


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Skips plots; test_report.py tests them."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(bootstrap, "DRAWS", 400)
        context.setattr(forgetting, "HEAD_STEPS", 60)
        for name in ("overlap", "curves", "confusion"):
            context.setattr(plots, name, lambda path, *_: path.write_bytes(path.name.encode()))
        yield


def topical(seed, count=60):
    """Documents whose sentences have one stem each, unlike those of `make_documents`. An encoder
    that reads the context soon guesses it."""
    source, documents = random.Random(seed), make_documents(count, seed)

    def sentence(length):
        stem = source.choice(STEMS.split())
        return " ".join(stem + ending for ending in source.choices(ENDINGS, k=length))

    return [[sentence(len(line.split())) for line in document] for document in documents]


@pytest.fixture(scope="module")
def place(documents, cache, tmp_path_factory):
    """An encoder that knows general text, the same without its heads, and texts of a domain."""
    folder = tmp_path_factory.mktemp("forgetting")
    write_documents(folder / "general.txt", topical(1))
    write_documents(folder / "held-out.txt", topical(2))
    write_documents(folder / "text.txt", documents[:20])
    for name, start in (("train", 0), ("valid", 20), ("test", 30)):
        lines = [{"text": f"river water {n}", "label": n % 2} for n in range(start, start + 10)]
        write_rows(folder / f"{name}.csv", lines)
    options = "--model tiny --vocab-size 120 --objective mlm --max-length 32 --precision fp32"
    more = "--max-steps 120 --batch-size 16 --learning-rate 1e-2 --eval-every 120 --eval-tokens 900"
    files = ["--train", folder / "general.txt", "--cache", cache]
    model = pretrain_into(folder / "model", files, SIZES, options, more) / "final"
    save(folder / "headless", BertModel.from_pretrained(model), tokenizers.load(str(model)))
    return folder


def argv_of(place, cache, output, model, rate, *more):
    """The command line of an experiment with this learning rate."""
    pretrain = "--objective mlm --max-length 32 --max-steps 10 --batch-size 16 --precision fp32"
    pretrain += f" --learning-rate {rate} --eval-tokens 9000 --cache {cache}"
    argv = ["--model", place / model, "--text", place / "text.txt", "--output", output]
    for name in ("train", "valid", "test"):
        argv += [f"--{name}", place / f"{name}.csv"]
    argv += ["--general", place / "held-out.txt", "--seeds", 1, "--pretrain", pretrain]
    return [*map(str, [*argv, *more]), "--finetune", FINE]


def adapt(place, cache, output, model, rate, *more):
    """The change on general text, and the report, of an experiment with this learning rate."""
    ADAPT(argv_of(place, cache, output, model, rate, *more))
    (path,) = output.glob("parts/forgetting.*.json")
    return json.loads(path.read_text()), (output / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "model, rate, said",
    [
        ("model", GENTLE, "It did not forget"),
        ("model", 20 * GENTLE, "It forgot"),
        ("headless", 20 * GENTLE, "It forgot"),
    ],
)
def test_a_rate_twenty_times_too_high_is_flagged(model, rate, said, place, cache, tmp_path):
    change, text = adapt(place, cache, tmp_path / "out", model, rate)
    assert change["trains_head"] == (model == "headless")
    shown = text.partition("Did it forget general text?")[2]
    assert f"by its frequency | {change['unigram']:,.2f} |" in shown
    assert f"{said} general text" in text
    if rate == GENTLE:
        assert change["high"] <= forgetting.MARGIN
    else:
        assert change["low"] > forgetting.MARGIN


def test_replayed_text_is_measured_where_it_was_held_out(place, cache, tmp_path, capsys):
    """As in the mixture's own log."""
    output = tmp_path / "out"
    general = tmp_path / "general.txt"  # with a copy of a test row
    general.write_text((place / "held-out.txt").read_text() + "river  water 31\n\nriver .\n")
    more = ["--general", general, "--replay", 0.4, "--control", place / "general.txt"]
    change, text = adapt(place, cache, output, "model", 5 * GENTLE, *more)
    for name, own in (("adapted", "text"), ("control", "control")):
        config = json.loads((output / name / "config.json").read_text())
        assert config["train"] == [str(output / f"{of}.jsonl") for of in (own, "general")]
        assert config["mix"] == [0.6, 0.4]
    evaluated = [row for row in rows(output / "adapted") if "eval/perplexity" in row]
    logged = [row["eval_general/perplexity"] for row in evaluated]
    assert [change["before"], change["after"]] == pytest.approx([logged[0], logged[-1]], rel=1e-4)
    texts = [row["text"] for row in read_rows(output / "general.jsonl")]
    assert len(texts) == 61 and texts[-1] == "river ."
    assert "the general text | 61 | 1 |" in text
    assert f"the {change['held_out']:.0%} that was not replayed" in text
    # The general text decides the result: it can no longer be replaced.
    more += ["--general", place / "general.txt"]
    other = argv_of(place, cache, output, "model", 5 * GENTLE, *more)
    assert refusal(ADAPT, other, capsys).startswith(f"--output {output}: ")


def test_a_fresh_head_is_trained_on_what_was_replayed(place, cache, tmp_path):
    """Of six documents, two are held out, whatever --valid-fraction says."""
    documents = [[document[0]] * 4 for document in topical(3, 6)]
    general = write_documents(tmp_path / "general.txt", documents)
    more = ["--replay", 0.4, "--general", general]
    change, text = adapt(place, cache, tmp_path / "out", "headless", GENTLE, *more)
    assert change["trains_head"] and 0.1 < change["held_out"] < 0.7
    assert "It did not forget general text" in text


def test_general_text_too_small_to_split_is_refused_before_training(place, cache, tmp_path, capsys):
    """It would leave nothing to train a head on, or nothing to predict."""
    output, documents = tmp_path / "out", [document[:1] for document in topical(3, 3)]
    general = write_documents(tmp_path / "general.txt", documents)
    argv = argv_of(place, cache, output, "headless", GENTLE, "--general", general)
    assert refusal(ADAPT, argv, capsys).startswith(f"--general {general}: ")
    assert not list(output.glob("*/checkpoint-*")) and not (output / "adapted").exists()


def test_replay_needs_general_text_of_which_some_is_held_out(place, cache, tmp_path, capsys):
    argv = argv_of(place, cache, tmp_path / "out", "model", GENTLE, "--replay", 0.4)
    number = argv.index("--general")
    lacking = argv[:number] + argv[number + 2 :]
    assert refusal(ADAPT, lacking, capsys).startswith("--replay 0.4: ")
    assert refusal(ADAPT, [*argv, "--replay", "1"], capsys).startswith("--replay 1")
    pretrain = f"{argv[argv.index('--pretrain') + 1]} --valid-fraction 0"
    begins = f'--pretrain "{pretrain}": --valid-fraction 0'
    refusal(ADAPT, [*argv, "--pretrain", pretrain], capsys, begins, tmp_path / "out")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.06, 0.09, " It forgot "),
        (0.01, 0.05, " It did not forget "),
        (0.01, 0.09, " It may have forgotten "),
    ],
)
def test_the_sentence_says_what_the_interval_says(low, high, said):
    change = Change(30.0, 32.0, (low + high) / 2, low, high, "60 documents")
    text = report.forgotten(vars(change))
    assert text.startswith(said) and f"{low:+.3f} to {high:+.3f} over 60 documents" in text
    assert report.forgotten({}) == "" and "not finite" in report.forgotten({"after": None})
