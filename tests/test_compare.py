"""Two models on the same masks: losses of sequences equal the stock model's, documents and
intervals slow forms; evaluate.py compares on several texts at once and refuses what cannot be
compared."""

import json

import numpy as np
import pytest
import torch
from conftest import arguments_of, make_documents, refusal, save, write_documents
from packed_reference import MAX_LENGTH, pad, small_model, small_stock, stock_class

from pretrain import compare
from pretrain.commands import evaluate as command
from pretrain.data import tokenizer as tokenizers
from pretrain.evaluate import evaluate, make_validation_set
from pretrain.runtime.optim import autocast

CPU = torch.device("cpu")
PRECISION = autocast(CPU, "fp32")


@pytest.fixture(scope="module")
def validation(corpus, vocabulary):
    return make_validation_set(corpus, "random", MAX_LENGTH, 8, vocabulary, 9000)


def changed(model, share):
    """A copy of the model with other biases in its MLM head."""
    other = small_model(model.config.vocab_size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        bias = other.cls.predictions.bias
        bias += share * torch.randn(bias.shape, generator=generator)
    return other


def test_losses_of_sequences_equal_the_stock_model(corpus, vocabulary, tmp_path):
    validation = make_validation_set(corpus, "random", MAX_LENGTH, 8, vocabulary, 3000, True)
    model = small_model(vocabulary.size, hidden_dropout_prob=0.3)
    sums, counts = compare.sequence_losses(model, validation, PRECISION)
    assert model.training
    model.save_pretrained(tmp_path)
    stock = stock_class("bert", "ForPreTraining").from_pretrained(tmp_path).eval()
    expected = []
    for batch in validation.batches:
        inputs = pad(batch)
        labels = inputs.pop("labels")
        inputs.pop("next_sentence_label")
        with torch.no_grad():
            logits = stock(**inputs).prediction_logits.double()
        for row, of_row in zip(logits, labels):
            places = of_row >= 0
            losses = -row[places].log_softmax(-1).gather(1, of_row[places, None])
            expected.append((losses.sum().item(), int(places.sum())))
    np.testing.assert_allclose(np.stack([sums, counts], axis=1), expected, rtol=1e-4)
    perplexity = evaluate(model, validation, PRECISION)["perplexity"]
    assert np.exp(sums.sum() / counts.sum()) == pytest.approx(perplexity, rel=1e-5)


def test_each_sequence_belongs_to_the_document_that_it_begins_in(corpus, vocabulary):
    validation = make_validation_set(corpus, None, MAX_LENGTH, 8, vocabulary, 9000)
    shard = corpus.select(9000)
    starts = shard.sentences[shard.documents]
    texts = [shard.ids[a:b].tolist() for a, b in zip(starts, starts[1:])]
    number = 0
    for batch in validation.batches:
        inputs = pad(batch)
        whole = torch.where(inputs["labels"] >= 0, inputs["labels"], inputs["input_ids"])
        for row, length in zip(whole, batch.lengths[: batch.num_sequences]):
            document = texts[validation.documents[number]]
            part = row[1 : length - 1].tolist()
            found = (document[at : at + len(part)] == part for at in range(len(document)))
            assert any(found)
            number += 1
    assert number == len(validation.documents)


def test_a_change_and_its_interval_equal_a_slow_bootstrap(validation, vocabulary):
    before = small_model(vocabulary.size)
    models = (before, changed(before, 0.1))
    change = compare.compare(*models, validation, PRECISION)
    sides = [compare.sequence_losses(each, validation, PRECISION) for each in models]
    (old, counts), (new, _) = sides
    assert change.difference == pytest.approx((new - old).sum() / counts.sum())
    scores = [evaluate(each, validation, PRECISION) for each in models]
    perplexities = [of_model["perplexity"] for of_model in scores]
    assert (change.before, change.after) == pytest.approx(perplexities, rel=1e-4)
    numbers = np.unique(validation.documents)
    assert change.drawn == f"{len(numbers)} documents" and len(numbers) >= compare.MIN_DOCUMENTS
    rng, means = np.random.default_rng(5), []
    for _ in range(1000):
        drawn = rng.choice(numbers, len(numbers))
        members = np.concatenate([np.flatnonzero(validation.documents == n) for n in drawn])
        means.append((new - old)[members].sum() / counts[members].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    width = high - low
    assert (change.low, change.high) == pytest.approx((low, high), abs=0.2 * width)


def test_few_documents_are_drawn_by_sequence(validation, vocabulary, monkeypatch):
    monkeypatch.setattr(compare, "MIN_DOCUMENTS", 1000)
    models = small_model(vocabulary.size), changed(small_model(vocabulary.size), 0.1)
    change = compare.compare(*models, validation, PRECISION)
    assert change.drawn == f"{len(validation.documents)} sequences"
    assert change.low < change.difference < change.high


# The command.


@pytest.fixture(scope="module")
def place(text_file, tiny_tokenizer, vocabulary, tmp_path_factory):
    """Two models of one vocabulary, one of another, four without some or all heads, and texts, one
    with "=" in its name."""
    folder = tmp_path_factory.mktemp("compare")
    model = small_model(vocabulary.size)
    other = tokenizers.train(lambda: iter(["bank river money"]), 100)
    save(folder / "other", small_model(len(other)), other)
    models = {
        "one": model,
        "two": changed(model, 2.0),
        "distil": small_stock("distilbert", "ForMaskedLM", vocabulary.size),
        "modern": small_stock("modernbert", "ForMaskedLM", vocabulary.size),
        "mlm-only": small_stock("bert", "ForMaskedLM", vocabulary.size),
        "no-head": small_stock("bert", "Model", vocabulary.size),
    }
    for name, saved in models.items():
        save(folder / name, saved, tiny_tokenizer)
    for name in ("a.txt", "b=c.txt"):
        write_documents(folder / name, make_documents(8, len(name)))
    return folder


@pytest.fixture
def options(place, cache, monkeypatch):
    """Options of evaluate.py in `place`, with those of a line."""
    monkeypatch.chdir(place)
    return lambda line: arguments_of(f"{line} --max-length 64 --precision fp32 --cache", [cache])


@pytest.fixture
def evaluated(options, capsys):
    """A function that runs evaluate.py and returns (what it printed, the numbers)."""

    def run(line):
        command.main(options(line))
        told = capsys.readouterr().out
        return told, json.loads(told.splitlines()[-1])

    return run


def test_several_texts_are_evaluated_as_each_alone(evaluated, text_file):
    _, alone = evaluated("--model one --input a.txt b=c.txt")
    _, first = evaluated("--model one --input a.txt")
    _, second = evaluated("--model one --input b=c.txt")
    assert alone["perplexity"] not in (first["perplexity"], second["perplexity"])
    _, named = evaluated("--model one --input x=a.txt y=b=c.txt both=a.txt both=b=c.txt")
    assert named == {"x": first, "y": second, "both": alone}


def test_a_baseline_is_compared_on_the_same_masks(evaluated):
    told, found = evaluated("--model two --baseline one --input x=a.txt y=b=c.txt")
    _, before = evaluated("--model one --input x=a.txt y=b=c.txt")
    assert len([line for line in told.splitlines() if " from one to two: " in line]) == 2
    for name, numbers in found.items():
        assert numbers["baseline_perplexity"] == pytest.approx(before[name]["perplexity"], rel=1e-4)
        logs = np.log([numbers["perplexity"], before[name]["perplexity"]])
        assert numbers["log_perplexity_difference"] == pytest.approx(logs[0] - logs[1], rel=1e-3)
        assert 0 < numbers["difference_low"] < numbers["difference_high"]
    _, same = evaluated("--model one --baseline one --input a.txt")
    assert same["log_perplexity_difference"] == same["difference_high"] == 0


@pytest.mark.parametrize(
    "models", ["--model one --baseline modern", "--model distil --baseline one", "--model mlm-only"]
)
def test_a_family_without_nsp_head_is_compared_by_mlm_alone(evaluated, models):
    """A head with random weights would give numbers, too."""
    _, found = evaluated(f"{models} --input a.txt")
    _, expected = evaluated(f"{models} --input a.txt --objective mlm")
    assert found == expected and "nsp_loss" not in found


PAIRS, MLM = "--input a.txt --objective mlm+nsp", "--objective mlm"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (f"--model one --baseline modern {PAIRS}", "--baseline modern --objective mlm+nsp: "),
        (f"--model modern --baseline one {PAIRS}", "--model modern --objective mlm+nsp: "),
        (f"--model mlm-only {PAIRS}", "--model mlm-only --objective mlm+nsp: "),
        (f"--model one --baseline other --input a.txt {MLM}", "--baseline other: "),
        (f"--model one --input x=a.txt a.txt {MLM}", "--input a.txt: "),
        (
            f"--model one --baseline no-head --input a.txt {MLM}",
            "--baseline no-head: has no MLM head",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(line, shown, options, capsys):
    refusal(command.main, options(line), capsys, shown)
