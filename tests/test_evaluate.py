"""Held-out numbers equal a slow computation with the stock model, whatever the micro-batch size; evaluating draws no random number and
leaves the model as it was; sample predictions show the right tokens."""
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from packed_reference import MAX_LENGTH, pad, small_model
from transformers import BertForPreTraining as Stock

from pretrain.batch import IGNORED
from pretrain.config import OBJECTIVES
from pretrain.evaluate import HeldOut, add_up, evaluate, make_held_out, read_sums, sample_predictions, summarize, unigram_perplexity
from pretrain.runtime.optim import autocast

CPU = torch.device("cpu")
ALL = 1_000_000  # more tokens than there are


@pytest.fixture(scope="module")
def sides(corpus):
    """(training, held-out) text."""
    return corpus.split(0.3)


def run(model, held_out, **more):
    return evaluate(model, held_out, CPU, autocast(CPU, "fp32"), **more)


def stock_numbers(model, batches, folder):
    """The slow form: the stock class on padded rows, one sequence at a time, sums in Python."""
    model.save_pretrained(folder)
    stock = Stock.from_pretrained(folder).eval()
    losses, right, counts = ({"mlm": 0.0, "nsp": 0.0} for _ in range(3))
    for batch in batches:
        inputs = pad(batch)
        for row in range(batch.num_sequences):
            one = {name: value[row:row + 1] for name, value in inputs.items()}
            with torch.no_grad():
                output = stock(**{name: one[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
            scored = {"mlm": (output.prediction_logits[0], one["labels"][0]), "nsp": (output.seq_relationship_logits,
                                                                                   one["next_sentence_label"])}
            for name, (logits, labels) in scored.items():
                for scores, label in zip(logits.double(), labels.tolist()):
                    if label != IGNORED:
                        losses[name] -= scores.log_softmax(-1)[label].item()
                        right[name] += scores.argmax().item() == label
                        counts[name] += 1
    return {name: losses[name] / max(1, counts[name]) for name in losses}, {name: right[name] / max(1, counts[name]) for name in right}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_numbers_equal_the_stock_model_padded(objective, sides, vocabulary, tmp_path):
    model = small_model(vocabulary.size, objective, hidden_dropout_prob=0.3)
    if objective != "mlm":
        model.set_objective(objective, nsp_weight=0.5)
    held_out = make_held_out(sides[1], objective, MAX_LENGTH, 4, vocabulary, ALL)
    assert len(held_out.batches) > 3
    numbers, (losses, accuracies) = run(model, held_out), stock_numbers(model, held_out.batches, tmp_path)
    names = ["mlm"] if objective == "mlm" else ["mlm", "nsp"]
    assert numbers.keys() == {"loss", "perplexity", *(f"{name}_{kind}" for name in names for kind in ("loss", "accuracy"))}
    for name in names:
        assert numbers[f"{name}_loss"] == pytest.approx(losses[name], rel=1e-5)
        assert numbers[f"{name}_accuracy"] == pytest.approx(accuracies[name], rel=1e-9)
    assert numbers["loss"] == pytest.approx(losses["mlm"] + (0 if objective == "mlm" else 0.5 * losses["nsp"]), rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(math.exp(losses["mlm"]), rel=1e-4)


@pytest.mark.parametrize("max_tokens", [ALL, 2000], ids=["all", "a part"])
@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_numbers_do_not_depend_on_the_micro_batch_size(objective, max_tokens, sides, vocabulary):
    model = small_model(vocabulary.size, objective)
    found = [make_held_out(sides[1], objective, MAX_LENGTH, size, vocabulary, max_tokens, training=sides[0]) for size in (1, 5, 32)]
    expected = run(model, found[-1])
    assert len({len(held_out.batches) for held_out in found}) == 3
    for held_out in found[:-1]:
        assert run(model, held_out) == pytest.approx(expected, rel=1e-5)


def test_filled_batches_give_the_same_numbers(sides, vocabulary):
    model = small_model(vocabulary.size)
    exact, filled = (make_held_out(sides[1], "mlm+nsp", MAX_LENGTH, 8, vocabulary, ALL, fill, sides[0]) for fill in (False, True))
    assert len(filled.batches[-1].input_ids) > len(exact.batches[-1].input_ids)
    assert run(model, filled) == pytest.approx(run(model, exact), rel=1e-5)


def test_at_most_max_tokens_are_read(sides, vocabulary):
    for max_tokens in (1000, 2000, 3000):
        held_out = make_held_out(sides[1], "mlm+nsp", MAX_LENGTH, 8, vocabulary, max_tokens)
        read = sum(batch.num_tokens for batch in held_out.batches)
        assert max_tokens - MAX_LENGTH < read <= max_tokens


def test_held_out_batches_are_made_of_held_out_text_alone(sides, vocabulary):
    """Each sequence, its masks undone, is found in the held-out documents and the random B too."""
    batches = make_held_out(sides[1], "mlm+nsp", MAX_LENGTH, 8, vocabulary, ALL).batches
    shard = sides[1].select(ALL)
    documents = [" ".join(map(str, shard.ids[shard.sentences[first]:shard.sentences[last]].tolist())) + " "
                 for first, last in zip(shard.documents[:-1], shard.documents[1:])]
    for batch in batches:
        ids = batch.input_ids.clone()
        ids[batch.masked_positions] = batch.masked_lm_labels
        for sequence in ids.split(batch.lengths):
            for segment in " ".join(map(str, sequence.tolist()[1:])).split(f" {vocabulary.sep_id}")[:-1]:
                assert any(f"{segment.strip()} " in document for document in documents)


def test_evaluation_draws_no_random_number_and_leaves_the_model_as_it_was(sides, vocabulary):
    model = small_model(vocabulary.size, hidden_dropout_prob=0.5)
    held_out = make_held_out(sides[1], "mlm+nsp", MAX_LENGTH, 8, vocabulary, 2000, training=sides[0])
    for training in (True, False):
        model.train(training)
        state, weights = torch.get_rng_state(), [weight.clone() for weight in model.parameters()]
        assert run(model, held_out) == run(model, held_out), "dropout is off"
        assert model.training is training and model.bert.embeddings.dropout.training is training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(old, new) and new.grad is None for old, new in zip(weights, model.parameters()))


def test_making_held_out_batches_draws_nothing_and_gives_the_same_twice(sides, vocabulary):
    state = torch.get_rng_state()
    first, second = (make_held_out(sides[1], "mlm+nsp", MAX_LENGTH, 8, vocabulary, 2000).batches for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(first, second, strict=True))


def test_unigram_perplexity_equals_a_slow_count(corpus, sides, vocabulary):
    training, held_out = sides
    batches = make_held_out(held_out, "mlm+nsp", MAX_LENGTH, 8, vocabulary, ALL).batches
    shard = corpus.shard(0)
    seen = Counter(range(vocabulary.size))  # one for each entry
    for document in training.documents(0).tolist():
        first, last = shard.documents[document:document + 2]
        seen.update(shard.ids[shard.sentences[first]:shard.sentences[last]].tolist())
    assert vocabulary.size < sum(seen.values()) < vocabulary.size + len(shard.ids)
    labels = [label for batch in batches for label in batch.masked_lm_labels.tolist()]
    expected = math.exp(-sum(math.log(seen[label] / sum(seen.values())) for label in labels) / len(labels))
    assert unigram_perplexity(training, batches, vocabulary.size) == pytest.approx(expected, rel=1e-9)
    both = make_held_out(held_out, "mlm+nsp", MAX_LENGTH, 8, vocabulary, ALL, training=training)
    assert both.unigram_perplexity == pytest.approx(expected, rel=1e-9)
    assert run(small_model(vocabulary.size), both)["unigram_perplexity"] == both.unigram_perplexity


def test_summarize():
    sums = {"mlm_loss": 30.0, "nsp_loss": 4.0, "mlm_correct": 2, "nsp_correct": 6, "mlm_count": 10, "nsp_count": 8}
    assert summarize(sums, {"mlm": 1.0, "nsp": 0.5}) == {
        "loss": 3.25, "mlm_loss": 3.0, "mlm_accuracy": 0.2, "nsp_loss": 0.5, "nsp_accuracy": 0.75, "perplexity": pytest.approx(math.e**3)}
    huge = summarize({"mlm_loss": 1e6, "mlm_correct": 0, "mlm_count": 1}, {"mlm": 1.0})
    assert huge["mlm_loss"] == 1e6 and math.isfinite(huge["perplexity"])
    nothing = summarize({**sums, "nsp_count": 0}, {"mlm": 1.0, "nsp": 0.5})  # text without pairs, or a step that was skipped
    assert nothing["loss"] == 3.0 and "nsp_loss" not in nothing and "nsp_accuracy" not in nothing
    assert summarize({"mlm_loss": 0.0, "mlm_correct": 0, "mlm_count": 0}, {"mlm": 1.0}) == {}


def test_sums_of_outputs(sides, vocabulary):
    model, batches = small_model(vocabulary.size), make_held_out(sides[1], "mlm+nsp", MAX_LENGTH, 4, vocabulary, ALL).batches[:3]
    outputs, total = [model(batch) for batch in batches], {}
    for output in outputs:
        total = add_up(total, output)
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in total.values())
    sums = read_sums({**total, "tokens": 7.0}, torch.device("cpu"))
    assert sums["tokens"] == 7.0
    for name in ("mlm", "nsp"):
        assert sums[f"{name}_loss"] == pytest.approx(sum(output.loss_sums[name].item() for output in outputs), rel=1e-12)
        assert sums[f"{name}_correct"] == sum(output.num_correct[name].item() for output in outputs)


def parse(markdown):
    """[(text, [(place, read, right, predicted)])] of sample_predictions."""
    parts = re.split(r"\n\n", markdown)
    samples = []
    for text, table in zip(parts[::2], parts[1::2], strict=True):
        head, rule, *rows = table.split("\n")
        assert (head, rule) == ("| place | read | right | predicted |", "|---|---|---|---|")
        samples.append((text, [tuple(re.split(r" (?<!\\)\| ", row[2:-2])) for row in rows]))
    return samples


@pytest.mark.parametrize("fill", [False, True], ids=["exact", "filled"])
@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_sample_predictions_hold_the_right_tokens(objective, fill, sides, vocabulary, tiny_tokenizer, tmp_path):
    model = small_model(vocabulary.size, objective, hidden_dropout_prob=0.5)
    held_out = make_held_out(sides[1], objective, MAX_LENGTH, 8, vocabulary, ALL, fill)
    state = torch.get_rng_state()
    samples = parse(sample_predictions(model, held_out, tiny_tokenizer, CPU, autocast(CPU, "fp32"), num_sequences=3, top=2))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.save_pretrained(tmp_path)
    batch = held_out.batches[0]
    inputs = pad(batch)
    with torch.no_grad():
        logits = Stock.from_pretrained(tmp_path).eval()(**{name: inputs[name] for name in ("input_ids", "attention_mask",
                                                                                           "token_type_ids")}).prediction_logits
    name_of = {number: entry for entry, number in tiny_tokenizer.get_vocab().items()}
    assert len(samples) == 3
    for row, (text, rows) in enumerate(samples):
        ids, labels = inputs["input_ids"][row].tolist()[:batch.lengths[row]], inputs["labels"][row].tolist()
        masked = [place for place, label in enumerate(labels) if label != IGNORED]
        tokens = [f"**{name_of[number]}**" if place in masked else name_of[number] for place, number in enumerate(ids)]
        assert text == " ".join(tokens).replace(" ##", "")
        best = logits[row].softmax(-1).topk(2)
        assert rows == [(str(place), name_of[ids[place]], name_of[labels[place]], ", ".join(
            f"{name_of[number]} {share:.2f}" for number, share in zip(best.indices[place].tolist(), best.values[place].tolist())))
            for place in masked]


def test_sample_predictions_escape_what_markdown_reads_as_a_column(sides, vocabulary, tiny_tokenizer):
    held_out = make_held_out(sides[1], "mlm", MAX_LENGTH, 8, vocabulary, ALL)
    label = int(held_out.batches[0].masked_lm_labels[0])

    class Renamed:
        """The tokenizer, one entry of which is a bar."""

        def convert_ids_to_tokens(self, ids):
            names = tiny_tokenizer.convert_ids_to_tokens(ids)
            if isinstance(ids, int):
                return "|" if ids == label else names
            return ["|" if number == label else name for number, name in zip(ids, names)]

    samples = parse(sample_predictions(small_model(vocabulary.size, "mlm"), held_out, Renamed(), CPU, autocast(CPU, "fp32")))
    assert all(len(row) == 4 for _, rows in samples for row in rows)
    assert samples[0][1][0][2] == "\\|"


def test_sample_predictions_of_fewer_sequences_than_wanted(sides, vocabulary, tiny_tokenizer):
    held_out = make_held_out(sides[1], "mlm", MAX_LENGTH, 1, vocabulary, ALL)
    one = HeldOut([replace(held_out.batches[0])])
    samples = parse(sample_predictions(small_model(vocabulary.size, "mlm"), one, tiny_tokenizer, CPU, autocast(CPU, "fp32"), 9))
    assert len(samples) == one.batches[0].num_sequences < 9
