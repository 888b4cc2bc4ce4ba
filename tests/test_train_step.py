"""The update: how a step is cut into micro-batches does not matter, counts that differ are weighted
rightly, a non-finite step changes nothing whatever the optimizer, and any model that returns sums
trains."""

import copy
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from packed_reference import assert_close, cut, gradients, pad, small_model
from torch import nn
from transformers import BertForPreTraining as Stock

from pretrain import train
from pretrain.batch import IGNORED, Loss
from pretrain.config import Config
from pretrain.run import Run
from pretrain.runtime.optim import autocast, make_optimizers
from pretrain.train import TrainState, train_step

CPU = torch.device("cpu")
RATE = 1e-3
SPLITS = {"1x32": [32], "2x16": [16, 16], "4x8": [8] * 4, "uneven": [1, 20, 3, 8]}


@pytest.fixture(scope="module")
def sequences(corpus, vocabulary):
    """The same 32 sequences, masks included, in several cuts."""
    return {name: cut(corpus, vocabulary, sizes) for name, sizes in SPLITS.items()}


@pytest.fixture
def model(vocabulary):
    return small_model(vocabulary.size)


def adamw(model, **options):
    """The optimizers of the default options (one AdamW), or of other options."""
    return make_optimizers(model, replace(Config(), learning_rate=RATE, **options))


def muon(model):
    return adamw(model, optimizer="muon")


class SignSGD(torch.optim.Optimizer):
    """An optimizer as a user writes it; it counts its steps on the host."""

    def __init__(self, params):
        super().__init__(params, {"lr": RATE})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["steps"] = self.state[weight].get("steps", 0) + 1
                weight -= group["lr"] * weight.grad.sign()


OPTIMIZERS = {
    "adamw": adamw,
    "muon": muon,
    "a user's": lambda model: [SignSGD(model.parameters())],
}


def step(model, batches, optimizers=None, scaler=None, rate=RATE, max_grad_norm=1.0):
    """One update in float32 with the defaults of the tests."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    made = (optimizers or adamw(model), scaler, autocast(CPU, "fp32"))
    return train_step(model, batches, *made, rate, max_grad_norm, CPU)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def state_of(model, optimizers):
    """Weights and the state of all optimizers."""
    state = weights_of(model)
    for optimizer in optimizers:
        for number, weight in enumerate(model.parameters()):
            for name, value in optimizer.state.get(weight, {}).items():
                state[f"{number}.{name}"] = torch.as_tensor(value).clone()
    return state


def norm_of(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


class Poisoned(nn.Module):
    """The model, with its MLM loss multiplied by `factor` in micro-batch `number`. With
    `logged_only` the model learns from another, finite term."""

    def __init__(self, model, number, factor, logged_only=False):
        super().__init__()
        self.model, self.number, self.factor, self.seen = model, number, factor, -1
        self.logged_only = logged_only

    def forward(self, batch):
        losses = self.model(batch)
        self.seen += 1
        if self.logged_only:
            losses["learned"] = Loss(losses["mlm"].sum, count="mlm")
            losses["mlm"] = replace(losses["mlm"], sum=losses["mlm"].sum.detach(), weight=0.0)
        if self.seen == self.number:
            losses["mlm"] = replace(losses["mlm"], sum=losses["mlm"].sum * self.factor)
        return losses


# Micro-batches.


def test_the_update_does_not_depend_on_how_the_step_is_cut(sequences, model):
    other, before = copy.deepcopy(model), weights_of(model)
    whole, parts = step(model, sequences["1x32"]), step(other, sequences["uneven"])
    assert_close(weights_of(other), weights_of(model), atol=1e-6, rtol=0.0)
    moved = [(new - before[name]).abs().max() for name, new in weights_of(model).items()]
    assert max(moved) > 0.5 * RATE
    norms = [result.logged["optim/grad_norm"] for result in (parts, whole)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0.0)
    assert_close(parts.losses.sums, whole.losses.sums, atol=1e-4)
    assert parts.finite and parts.losses.counts == sequences["1x32"][0].denominators
    assert parts.losses.num_correct == whole.losses.num_correct
    assert all(weight.grad is None for weight in model.parameters())


def test_the_update_equals_one_with_the_stock_model_padded(sequences, model, tmp_path):
    model.save_pretrained(tmp_path)
    stock = Stock.from_pretrained(tmp_path).train()
    result = step(model, sequences["4x8"])
    (optimizer,) = adamw(stock)
    stock(**pad(sequences["1x32"][0])).loss.backward()
    norm = nn.utils.clip_grad_norm_(stock.parameters(), 1.0).item()
    assert norm == pytest.approx(result.logged["optim/grad_norm"].item(), rel=1e-5)
    optimizer.step()
    # Adam divides a gradient by its own size plus epsilon: where it is tiny, rounding shows.
    assert_close(weights_of(model), weights_of(stock), atol=1e-5, rtol=0.0)


def test_weights_of_losses_multiply_their_means(sequences, model):
    twin = copy.deepcopy(model)
    model.use_pairs(0.25)
    result = step(model, sequences["2x16"], max_grad_norm=0.0)
    losses, counts = twin(sequences["1x32"][0]), sequences["1x32"][0].counts
    means = {name: loss.sum / counts[name] for name, loss in losses.items()}
    (means["mlm"] + 0.25 * means["nsp"]).backward()
    norm = norm_of(gradients(twin).values())
    assert result.logged["optim/grad_norm"].item() == pytest.approx(norm, rel=1e-5)


def test_a_step_without_a_single_pair_is_finite(sequences, model):
    (batch,) = sequences["1x32"]
    labels = batch.labels | {"nsp": torch.full_like(batch.labels["nsp"], IGNORED)}
    result = step(model, [replace(batch, labels=labels, counts=batch.counts | {"nsp": 0})])
    assert result.finite and result.losses.sums["nsp"] == result.losses.counts["nsp"] == 0
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


# Gradient norm, rates, scaler.


@pytest.mark.parametrize("limit", [0.05, 1e6], ids=["clipped", "within"])
def test_the_norm_is_reported_before_clipping_and_clipping_scales(limit, sequences, model):
    (optimizer,) = adamw(model)
    norm = step(model, sequences["2x16"], [optimizer], max_grad_norm=limit).logged
    free = small_model(model.config.vocab_size)
    unclipped = step(free, sequences["2x16"], max_grad_norm=0.0).logged
    assert norm["optim/grad_norm"] == unclipped["optim/grad_norm"] > 0.1
    # After one step the first moment is (1 - beta) x the gradient that was used.
    moments = [optimizer.state[weight]["exp_avg"] for weight in model.parameters()]
    expected = 0.05 if limit == 0.05 else norm["optim/grad_norm"].item()
    assert norm_of(moments) / (1 - Config().adam_betas[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("make", [adamw, muon], ids=["adamw", "muon"])
def test_the_rate_of_the_step_and_the_scale_of_a_group_are_used(make, sequences, model):
    """Twice the rate, or twice the group's "rate_scale", moves the weights twice as far."""
    before, moved = weights_of(model), []
    for rate, scale in ((1e-4, 1.0), (2e-4, 1.0), (1e-4, 2.0)):
        copied = copy.deepcopy(model)
        optimizers = make(copied)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["rate_scale"], group["weight_decay"] = scale, 0.0
        step(copied, sequences["1x32"], optimizers, rate=rate)
        after = weights_of(copied)
        moved.append({name: after[name] - before[name] for name in before})
    assert {group["lr"] for group in optimizers[0].param_groups} == {2e-4}
    for name, once in moved[0].items():
        torch.testing.assert_close(moved[1][name], 2 * once, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(moved[2][name], moved[1][name], atol=0.0, rtol=0.0)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_gradient_scaler_gives_the_same_update_and_lowers_its_scale(make, sequences, model):
    """It grows after two good steps."""
    scaled = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    optimizers = make(model), make(scaled)
    for number in range(2):
        plain = step(model, sequences["4x8"], optimizers[0])
        result = step(scaled, sequences["4x8"], optimizers[1], scaler)
        norms = [one.logged["optim/grad_norm"] for one in (result, plain)]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0.0)
        assert scaler.get_scale() == 2.0 ** (12 + number)
        assert_close(result.losses.sums, plain.losses.sums, atol=1e-4)
        assert_close(weights_of(scaled), weights_of(model), atol=1e-6, rtol=0.0)
    before = state_of(scaled, optimizers[1])
    result = step(Poisoned(scaled, 1, math.inf), sequences["4x8"], optimizers[1], scaler)
    assert not result.finite and scaler.get_scale() == 2.0**12
    assert_close(state_of(scaled, optimizers[1]), before, atol=0.0, rtol=0.0)


# Non-finite steps.


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("poison", [(3, math.nan), (1, math.inf, True)], ids=str)
def test_a_non_finite_micro_batch_changes_nothing(poison, make, sequences, model):
    optimizers, twin = make(model), copy.deepcopy(model)
    step(model, sequences["4x8"], optimizers)
    before = state_of(model, optimizers)
    result = step(Poisoned(model, *poison), sequences["4x8"], optimizers)
    assert not result.finite and not torch.isfinite(result.logged["optim/grad_norm"])
    for part in ("sums", "num_correct", "counts"):
        assert all(value == 0 for value in getattr(result.losses, part).values())
    assert_close(state_of(model, optimizers), before, atol=0.0, rtol=0.0)
    assert all(weight.grad is None for weight in model.parameters())

    step(model, sequences["2x16"], optimizers)  # training continues as if it had never been
    others = make(twin)
    for batches in (sequences["4x8"], sequences["2x16"]):
        step(twin, batches, others)
    assert_close(state_of(model, optimizers), state_of(twin, others), atol=0.0, rtol=0.0)


# Any model.


class Places(nn.Embedding):
    """Not a BERT: an embedding of positions, with a loss of its own."""

    def forward(self, batch):
        return {"place": Loss(super().forward(batch.position_ids).sum(), count="nsp")}


def test_a_process_without_labels_adds_nothing_to_the_count(sequences, monkeypatch):
    """With 0 pairs here and 5 on another process, the step has 5."""
    monkeypatch.setattr(
        train, "sum_counts", lambda counts: {name: count + 5 for name, count in counts.items()}
    )
    model, batch = Places(64, 1), replace(sequences["1x32"][0], counts={"nsp": 0})
    model(batch)["place"].sum.backward()
    expected = model.weight.grad.norm().item() / 5
    model.zero_grad()
    norm = step(model, [batch]).logged["optim/grad_norm"]
    assert norm.item() == pytest.approx(expected, rel=1e-5)


# The best evaluation.


@pytest.mark.parametrize("higher_is_better, best", [(False, 50.0), (True, 90.0)])
def test_scores_that_are_no_numbers_are_never_the_best(higher_is_better, best):
    run = SimpleNamespace(score=("score", "loss"), higher_is_better=higher_is_better)
    run.phase_at, run.is_comparable, run.phase_ends = lambda step: 0, lambda step: True, [9]
    run.sort_key = partial(Run.sort_key, run)
    state = TrainState()
    for step, score in enumerate([math.nan, 60.0, best, math.nan, 70.0]):
        is_best = state.record(step, {"score": score, "loss": 1.0}, run)
        assert is_best == (step in (1, 2)), step
    assert state.best_scores["score"] == best and state.evaluations_without_gain == 2


def test_a_loss_at_another_length_does_not_count_as_a_rise():
    """Nor as the best one: step 3 is the first of the last phase."""
    run = SimpleNamespace(score=("loss", "loss"), higher_is_better=False, phase_ends=[2, 9])
    run.phase_at = lambda step: int(step > 2)
    run.is_comparable, run.sort_key = partial(Run.is_comparable, run), partial(Run.sort_key, run)
    state, rises, best = TrainState(), [], []
    for step, loss in enumerate([3.0, 1.0, 4.0, 5.0, 6.0, 5.0], start=1):
        best.append(state.record(step, {"loss": loss}, run))
        rises.append(state.rises)
    assert rises == [0, 0, 0, 1, 2, 0]
    assert best == [False, False, True, False, False, False]
    assert state.evaluations_without_gain == 3
