"""Validation numbers equal a slow computation with the stock model, whatever the micro-batch size;
evaluating draws no random number and leaves the model as it was; sample predictions are right."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch
from packed_reference import MAX_LENGTH, pad, small_model
from transformers import BertForPreTraining as Stock

from pretrain.batch import IGNORED
from pretrain.config import OBJECTIVES
from pretrain.evaluate import evaluate, make_validation_set, sample_predictions, unigram_perplexity
from pretrain.runtime.optim import autocast

CPU = torch.device("cpu")
ALL = 1_000_000  # more tokens than there are
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(scope="module")
def sides(corpus):
    """(training, validation) text."""
    return corpus.split(0.3)


@pytest.fixture
def make(sides, vocabulary):
    """A function that makes a validation set of the text."""

    def made(objective="mlm+nsp", size=8, max_tokens=ALL, fill=False, training=None):
        shape = (OBJECTIVES[objective], MAX_LENGTH, size, vocabulary, max_tokens)
        return make_validation_set(sides[1], *shape, fill, training)

    return made


def run(model, validation):
    return evaluate(model, validation, autocast(CPU, "fp32"))


def stock_numbers(model, batches, folder, pairs):
    """(mean losses, accuracies) in the slow form: the stock class on padded rows, one sequence at a
    time, sums in Python. The loss of the pairs is called `pairs`."""
    model.save_pretrained(folder)
    stock = Stock.from_pretrained(folder).eval()
    losses, right, counts = ({"mlm": 0.0, pairs: 0.0} for _ in range(3))
    for batch in batches:
        inputs = pad(batch)
        for row in range(batch.num_sequences):
            with torch.no_grad():
                output = stock(**{name: inputs[name][row : row + 1] for name in INPUTS})
            scored = {
                "mlm": (output.prediction_logits[0], inputs["labels"][row]),
                pairs: (output.seq_relationship_logits, inputs["next_sentence_label"][[row]]),
            }
            for name, (logits, labels) in scored.items():
                for scores, label in zip(logits.double(), labels.tolist()):
                    if label != IGNORED:
                        losses[name] -= scores.log_softmax(-1)[label].item()
                        right[name] += scores.argmax().item() == label
                        counts[name] += 1
    mean_losses = {name: losses[name] / max(1, counts[name]) for name in counts}
    return mean_losses, {name: right[name] / max(1, counts[name]) for name in counts}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_numbers_equal_the_stock_model_padded(objective, make, vocabulary, tmp_path):
    model = small_model(vocabulary.size, objective, hidden_dropout_prob=0.3)
    names, weights = objective.split("+"), {"mlm": 1.0, "nsp": 0.5, "sop": 0.5}
    if OBJECTIVES[objective]:
        model.use_pairs(0.5)
    validation = make(objective, size=4)
    assert len(validation.batches) > 3
    numbers = run(model, validation)
    losses, accuracies = stock_numbers(model, validation.batches, tmp_path, [*names, "nsp"][1])
    kinds = {f"{name}_{kind}" for name in names for kind in ("loss", "accuracy")}
    assert numbers.keys() == {"loss", "perplexity"} | kinds
    for name in names:
        assert numbers[f"{name}_loss"] == pytest.approx(losses[name], rel=1e-5)
        assert numbers[f"{name}_accuracy"] == pytest.approx(accuracies[name], rel=1e-9)
    total = sum(weights[name] * losses[name] for name in names)
    assert numbers["loss"] == pytest.approx(total, rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(math.exp(losses["mlm"]), rel=1e-4)


@pytest.mark.parametrize(("objective", "max_tokens"), [("mlm+nsp", 2000), ("mlm", ALL)])
def test_numbers_do_not_depend_on_the_micro_batch_size(
    objective, max_tokens, make, sides, vocabulary
):
    """Nor on whether batches are filled."""
    model, training = small_model(vocabulary.size, objective), sides[0]
    exact = [make(objective, size, max_tokens, training=training) for size in (1, 5, 32)]
    filled = make(objective, 32, max_tokens, fill=True, training=training)
    assert len({len(validation.batches) for validation in exact}) == 3
    assert len(filled.batches[-1].input_ids) > len(exact[-1].batches[-1].input_ids)
    expected = run(model, filled)
    for validation in exact:
        assert run(model, validation) == pytest.approx(expected, rel=1e-5)


def test_at_most_max_tokens_are_read(make):
    read = sum(batch.num_tokens for batch in make(max_tokens=2000).batches)
    assert 2000 - MAX_LENGTH < read <= 2000


def test_batches_hold_only_validation_text(make, sides, vocabulary):
    """Each segment without its masks is a part of one document, a random B included."""
    shard, segments = sides[1].select(ALL), []
    bounds = shard.sentences[shard.documents].tolist()
    documents = [shard.ids[start:end].tolist() for start, end in itertools.pairwise(bounds)]
    texts = [f" {' '.join(map(str, ids))} " for ids in documents]
    for batch in make().batches:
        ids = batch.input_ids.index_copy(0, batch.masked_positions, batch.labels["mlm"])
        for sequence in ids.split(batch.lengths):
            shown = f" {' '.join(map(str, sequence.tolist()[1:]))} "
            segments += shown.split(f" {vocabulary.sep_id} ")[:-1]
    assert len(segments) > 100
    for segment in segments:
        assert any(f" {segment.strip()} " in text for text in texts)


def test_evaluation_draws_no_random_number_and_leaves_the_model_as_it_was(make, vocabulary):
    model = small_model(vocabulary.size, hidden_dropout_prob=0.5)
    state, weights = torch.get_rng_state(), [weight.clone() for weight in model.parameters()]
    one, other = make(max_tokens=2000), make(max_tokens=2000)
    assert run(model, one) == run(model, other), "dropout is off, and the batches are the same"
    assert model.training and model.bert.embeddings.dropout.training
    assert torch.equal(torch.get_rng_state(), state)
    for old, new in zip(weights, model.parameters()):
        assert torch.equal(old, new) and new.grad is None


def test_a_stop_ends_the_evaluation(make, vocabulary):
    model, calls = small_model(vocabulary.size), iter([0, 0, 15])
    validation = make(size=1)
    context = autocast(CPU, "fp32")
    assert evaluate(model, validation, context, stop=lambda: next(calls)) is None
    assert model.training


def test_unigram_perplexity_equals_a_slow_count(corpus, make, sides, vocabulary):
    training = sides[0]
    shard = corpus.shard(0)
    seen = Counter(range(vocabulary.size))  # one for each entry
    for document in training.documents(0).tolist():
        first, last = shard.documents[document : document + 2]
        seen.update(shard.ids[shard.sentences[first] : shard.sentences[last]].tolist())
    total = sum(seen.values())
    assert vocabulary.size < total < vocabulary.size + len(shard.ids)
    validation = make(training=training)
    labels = [label for batch in validation.batches for label in batch.labels["mlm"].tolist()]
    expected = math.exp(-sum(math.log(seen[label] / total) for label in labels) / len(labels))
    found = unigram_perplexity(training, validation.batches, vocabulary.size)
    assert found == pytest.approx(expected, rel=1e-9)
    assert validation.unigram_perplexity == found
    assert run(small_model(vocabulary.size), validation)["unigram_perplexity"] == found


@pytest.mark.parametrize("name", ["nsp", "sop"])
def test_a_validation_set_tells_the_better_guess(name, make):
    validation = make(f"mlm+{name}", size=4)
    labels = [label for batch in validation.batches for label in batch.labels[name].tolist()]
    counts = Counter(label for label in labels if label != IGNORED)
    label, count = counts.most_common(1)[0]
    kinds = {"nsp": ("next", "random"), "sop": ("in order", "swapped")}[name]
    assert str(validation).endswith(f"{count / counts.total():.1%} of the pairs {kinds[label]}")


# Sample predictions.


def samples_of(model, validation, tokenizer):
    """[(text, [(place, read, right, predicted)])] of sample_predictions."""
    text = sample_predictions(model, validation, tokenizer, autocast(CPU, "fp32"))
    parts, samples = text.split("\n\n"), []
    for text, table in zip(parts[::2], parts[1::2], strict=True):
        head, rule, *rows = table.split("\n")
        assert (head, rule) == ("| position | input | label | predicted |", "|---|---|---|---|")
        samples.append((text, [re.split(r" (?<!\\)\| ", row[2:-2]) for row in rows]))
    return samples


def test_sample_predictions_equal_the_stock_model(make, vocabulary, tiny_tokenizer, tmp_path):
    model = small_model(vocabulary.size, hidden_dropout_prob=0.5)
    validation, state = make(fill=True), torch.get_rng_state()
    samples = samples_of(model, validation, tiny_tokenizer)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.save_pretrained(tmp_path)
    batch = validation.batches[0]
    inputs = pad(batch)
    with torch.no_grad():
        stock = Stock.from_pretrained(tmp_path).eval()
        logits = stock(**{name: inputs[name] for name in INPUTS}).prediction_logits
    name = tiny_tokenizer.convert_ids_to_tokens
    assert len(samples) == 4
    for row, (text, rows) in enumerate(samples):
        ids = inputs["input_ids"][row].tolist()[: batch.lengths[row]]
        labels = inputs["labels"][row].tolist()
        masked = [place for place, label in enumerate(labels) if label != IGNORED]
        tokens = name(ids)
        best = logits[row].softmax(-1).topk(3)
        expected = []
        for place in masked:
            guesses = zip(name(best.indices[place].tolist()), best.values[place].tolist())
            shown = ", ".join(f"{token} {share:.2f}" for token, share in guesses)
            expected.append([str(place), tokens[place], name(labels[place]), shown])
        assert rows == expected
        for place in masked:
            tokens[place] = f"**{tokens[place]}**"
        assert text == " ".join(tokens).replace(" ##", "")
