"""The update: how a step is cut into micro-batches does not matter, masked counts that differ are weighed rightly, a step that is not
finite changes nothing, clipping and rates are those asked for, and any model that returns sums and counts trains."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from packed_reference import assert_close, cut, gradients, make_batches, pad, small_model
from torch import nn
from transformers import BertForPreTraining as Stock

from pretrain import train
from pretrain.batch import IGNORED, Output
from pretrain.runtime.optim import autocast, make_optimizer
from pretrain.train import train_step

CPU = torch.device("cpu")
RATE, EPSILON, BETAS = 1e-3, 1e-6, [0.9, 0.999]
SPLITS = {"1x32": [32], "2x16": [16, 16], "4x8": [8] * 4, "uneven": [1, 20, 3, 8]}


@pytest.fixture(scope="module")
def sequences(corpus, vocabulary):
    """The same 32 sequences, masks included, in several cuts."""
    cuts = {name: cut(corpus, vocabulary, sizes) for name, sizes in SPLITS.items()}
    for batches in cuts.values():
        for name in ("input_ids", "masked_lm_labels", "next_sentence_label"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), getattr(cuts["1x32"][0], name))
    return cuts


@pytest.fixture
def model(vocabulary):
    return small_model(vocabulary.size)


def optimizer_of(model, weight_decay=0.01):
    return make_optimizer(model, RATE, weight_decay, BETAS, EPSILON)


def step(model, batches, optimizer=None, *, scaler=None, rate=RATE, max_grad_norm=1.0, loss_weights=None, precision="fp32"):
    """One update with the defaults of the tests."""
    return train_step(model, loss_weights or model.loss_weights, batches, optimizer or optimizer_of(model),
                      scaler or torch.amp.GradScaler("cpu", enabled=False), autocast(CPU, precision), rate, max_grad_norm, CPU)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def state_of(model, optimizer):
    """Weights and everything that the optimizer keeps."""
    return weights_of(model) | {f"{number}.{name}": value.clone() for number, weight in enumerate(model.parameters())
                                for name, value in optimizer.state[weight].items()}


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


class Poisoned(nn.Module):
    """The model, its MLM loss multiplied by `factor` in the micro-batch `number` of all that it sees."""

    def __init__(self, model, number, factor):
        super().__init__()
        self.model, self.number, self.factor, self.seen = model, number, factor, -1

    def forward(self, batch):
        output, self.seen = self.model(batch), self.seen + 1
        if self.seen != self.number:
            return output
        return Output({**output.loss_sums, "mlm": output.loss_sums["mlm"] * self.factor}, output.num_correct)


# Micro-batches.

@pytest.mark.parametrize("split", list(SPLITS)[1:])
def test_the_update_does_not_depend_on_how_the_step_is_cut(split, sequences, model):
    other = copy.deepcopy(model)
    before = weights_of(model)
    whole, parts = step(model, sequences["1x32"]), step(other, sequences[split])
    assert_close(weights_of(other), weights_of(model), atol=1e-6, rtol=0.0)
    assert largest_difference(before, weights_of(model)) > 0.5 * RATE
    torch.testing.assert_close(parts.grad_norm, whole.grad_norm, rtol=1e-5, atol=0.0)
    assert_close(parts.sums, whole.sums, atol=1e-4)
    assert parts.finite and parts.sums["mlm_count"] == sequences["1x32"][0].counts["mlm"]


def test_a_mean_of_means_would_be_seen(sequences, model):
    """The usual form, a mean in each micro-batch divided by their number, differs by far more than the test above allows."""
    batches, naive = sequences["4x8"], copy.deepcopy(model)
    assert len({batch.counts["mlm"] for batch in batches}) > 1, "masked counts differ"
    optimizer = optimizer_of(naive)
    for batch in batches:
        output = naive(batch)
        (sum(output.loss_sums[name] / batch.counts[name] for name in output.loss_sums) / len(batches)).backward()
    nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
    optimizer.step()
    step(model, batches)
    assert largest_difference(weights_of(model), weights_of(naive)) > 1e-4


def test_the_update_equals_one_with_the_stock_model_padded(sequences, model, tmp_path):
    model.save_pretrained(tmp_path)
    stock = Stock.from_pretrained(tmp_path).train()
    result = step(model, sequences["4x8"])
    optimizer = optimizer_of(stock)
    stock(**pad(sequences["1x32"][0])).loss.backward()
    assert nn.utils.clip_grad_norm_(stock.parameters(), 1.0).item() == pytest.approx(result.grad_norm.item(), rel=1e-5)
    optimizer.step()
    # Adam divides a gradient by its own size plus epsilon: where it is near nothing, rounding shows.
    assert_close(weights_of(model), weights_of(stock), atol=1e-5, rtol=0.0)


def test_weights_of_losses_multiply_their_means(sequences, model):
    twin = copy.deepcopy(model)
    result = step(model, sequences["2x16"], loss_weights={"mlm": 1.0, "nsp": 0.25}, max_grad_norm=0.0)
    output, counts = twin(sequences["1x32"][0]), sequences["1x32"][0].counts
    (output.loss_sums["mlm"] / counts["mlm"] + 0.25 * output.loss_sums["nsp"] / counts["nsp"]).backward()
    norm = torch.stack([gradient.norm() for gradient in gradients(twin).values()]).norm()
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)


def test_a_step_without_a_single_pair_is_finite(sequences, model):
    (batch,) = sequences["1x32"]
    alone = replace(batch, next_sentence_label=torch.full_like(batch.next_sentence_label, IGNORED),
                    counts={"mlm": batch.counts["mlm"], "nsp": 0})
    result = step(model, [alone])
    assert result.finite and result.sums["nsp_loss"] == result.sums["nsp_count"] == 0
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_sums_are_those_of_the_micro_batches(sequences, model):
    expected = [copy.deepcopy(model)(batch) for batch in sequences["4x8"]]
    result = step(model, sequences["4x8"])
    for name in ("mlm", "nsp"):
        assert result.sums[f"{name}_loss"].item() == pytest.approx(sum(output.loss_sums[name].item() for output in expected), rel=1e-6)
        assert result.sums[f"{name}_correct"] == sum(output.num_correct[name] for output in expected)
        assert result.sums[f"{name}_count"] == sum(batch.counts[name] for batch in sequences["4x8"])
    assert all(weight.grad is None for weight in model.parameters())


def test_filled_micro_batches_give_the_update_of_exact_ones(corpus, vocabulary, model):
    other = copy.deepcopy(model)
    step(model, make_batches(corpus, vocabulary, count=2))
    step(other, make_batches(corpus, vocabulary, count=2, fill=True))
    assert_close(weights_of(other), weights_of(model), atol=1e-6, rtol=0.0)


# Gradient norm, rate, scaler.

@pytest.mark.parametrize("limit", [0.05, 1e6, 0.0], ids=["clipped", "within", "off"])
def test_the_norm_is_told_before_clipping_and_clipping_scales(limit, sequences, model):
    optimizer = optimizer_of(model)
    result = step(model, sequences["2x16"], optimizer, max_grad_norm=limit)
    free = step(small_model(model.config.vocab_size), sequences["2x16"], max_grad_norm=0.0)
    assert result.grad_norm == free.grad_norm > 0.1
    # After one step the first moment is (1 - beta) x the gradient that was used.
    used = torch.stack([optimizer.state[weight]["exp_avg"].norm() for weight in model.parameters()]).norm() / (1 - BETAS[0])
    assert used.item() == pytest.approx(0.05 if limit == 0.05 else result.grad_norm.item(), rel=1e-4)


def test_the_rate_of_the_step_is_used(sequences, model):
    double, before = copy.deepcopy(model), weights_of(model)
    optimizer = optimizer_of(model, weight_decay=0.0)
    step(model, sequences["1x32"], optimizer, rate=1e-4)
    step(double, sequences["1x32"], optimizer_of(double, weight_decay=0.0), rate=2e-4)
    for name, weight in weights_of(double).items():
        torch.testing.assert_close(weight - before[name], 2 * (weights_of(model)[name] - before[name]), atol=1e-6, rtol=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4] * 2


def test_a_gradient_scaler_gives_the_same_update(sequences, model):
    scaled, scaler = copy.deepcopy(model), torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    optimizers = optimizer_of(model), optimizer_of(scaled)
    for number in range(2):
        plain = step(model, sequences["4x8"], optimizers[0])
        result = step(scaled, sequences["4x8"], optimizers[1], scaler=scaler)
        torch.testing.assert_close(result.grad_norm, plain.grad_norm, rtol=1e-5, atol=0.0)
        assert scaler.get_scale() == 2.0**12 * (2 if number else 1), "it grows after growth_interval good steps"
        assert_close(result.sums, plain.sums, atol=1e-4)
        assert_close(weights_of(scaled), weights_of(model), atol=1e-6, rtol=0.0)


def test_bfloat16_is_near_float32(sequences, model):
    other = copy.deepcopy(model)
    exact, rounded = step(model, sequences["2x16"]), step(other, sequences["2x16"], precision="bf16")
    assert rounded.grad_norm.item() == pytest.approx(exact.grad_norm.item(), rel=0.05)
    assert rounded.grad_norm != exact.grad_norm and {weight.dtype for weight in other.parameters()} == {torch.float32}


# Steps that are not finite.

@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("number", range(4))
def test_a_micro_batch_that_is_not_finite_changes_nothing(number, factor, sequences, model):
    optimizer, twin = optimizer_of(model), copy.deepcopy(model)
    step(model, sequences["4x8"], optimizer)
    before = state_of(model, optimizer)
    result = step(Poisoned(model, number, factor), sequences["4x8"], optimizer, loss_weights=model.loss_weights)
    assert not result.finite and not torch.isfinite(result.grad_norm)
    assert result.sums.keys() == {f"{name}_{kind}" for name in ("mlm", "nsp") for kind in ("loss", "correct", "count")}
    assert all(value == 0 for value in result.sums.values())
    assert_close(state_of(model, optimizer), before, atol=0.0, rtol=0.0)
    assert all(weight.grad is None for weight in model.parameters())

    step(model, sequences["2x16"], optimizer)  # training goes on as if the step had never been
    other = optimizer_of(twin)
    for batches in (sequences["4x8"], sequences["2x16"]):
        step(twin, batches, other)
    assert_close(state_of(model, optimizer), state_of(twin, other), atol=0.0, rtol=0.0)


def test_a_step_that_is_not_finite_lowers_the_scale(sequences, model):
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    step(model, sequences["2x16"], optimizer, scaler=scaler)
    before = state_of(model, optimizer)
    result = step(Poisoned(model, 1, math.inf), sequences["2x16"], optimizer, scaler=scaler, loss_weights=model.loss_weights)
    assert not result.finite and scaler.get_scale() == 512.0
    assert_close(state_of(model, optimizer), before, atol=0.0, rtol=0.0)
    assert step(model, sequences["2x16"], optimizer, scaler=scaler).finite


# Any model.

class SegmentModel(nn.Module):
    """No BERT: tells the segment of each token from its position, by logistic regression."""

    loss_weights = {"segment": 1.0}

    def __init__(self):
        super().__init__()
        self.scores = nn.Embedding(64, 1)
        nn.init.zeros_(self.scores.weight)

    def forward(self, batch):
        scores, labels = self.scores(batch.position_ids)[:, 0], batch.token_type_ids
        loss = nn.functional.binary_cross_entropy_with_logits(scores, labels.float(), reduction="sum")
        return Output({"segment": loss}, {"segment": ((scores > 0) == labels.bool()).sum()})


def test_another_model_with_another_loss_trains(sequences):
    batches = [replace(batch, counts={"segment": batch.num_tokens}) for batch in sequences["4x8"]]
    model = SegmentModel()
    optimizer = optimizer_of(model, weight_decay=0.0)
    means = []
    for _ in range(30):
        result = step(model, batches, optimizer, rate=0.1)
        assert result.sums.keys() == {"segment_loss", "segment_correct", "segment_count"}
        means.append((result.sums["segment_loss"] / result.sums["segment_count"]).item())
    assert means[0] == pytest.approx(math.log(2)) and means[-1] < 0.8 * means[0]
    assert result.sums["segment_correct"] > 0.7 * result.sums["segment_count"]


def test_a_process_without_any_of_a_loss_adds_nothing_to_its_count(sequences, monkeypatch):
    """Counts are summed as they are: with 0 pairs here and 5 on another process, the step has 5, whatever a division by 0 needs."""
    monkeypatch.setattr(train, "sum_counts", lambda counts: {name: count + 5 for name, count in counts.items()})
    model = SegmentModel()
    batch = replace(sequences["1x32"][0], counts={"segment": 0})
    model(batch).loss_sums["segment"].backward()
    expected = model.scores.weight.grad.norm() / 5
    model.zero_grad()
    assert step(model, [batch]).grad_norm.item() == pytest.approx(expected.item(), rel=1e-5)
