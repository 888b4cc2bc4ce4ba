"""Optimizers, schedule, precision: rates equal closed forms, decay is on matrices only, non-finite
steps change nothing, and unsupported precisions are refused."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import fail, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import small_model, small_packed
from torch import nn

from pretrain.config import OptimizationOptions
from pretrain.runtime import optim
from pretrain.runtime.muon import Muon
from pretrain.runtime.optim import groups_of, make_optimizers, make_schedule, step_if

SCHEDULES = ("linear", "cosine", "constant", "wsd")
BETAS = (0.8, 0.95)
OPTIONS = OptimizationOptions(learning_rate=0.01, weight_decay=0.1, adam_betas=BETAS)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def rates(schedule, warmup, total, peak=1.0):
    rate = make_schedule(schedule, peak, warmup, total)
    return [rate(step) for step in range(1, total + 1)]


# Schedules.


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 300),
    warmup=st.one_of(st.just(0.0), st.floats(0, 0.99), st.integers(1, 400).map(float)),
)
def test_every_rate_is_above_zero_and_at_most_the_peak(schedule, total, warmup):
    found = rates(schedule, warmup, total, peak=3e-4)
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in found)
    assert found == rates(schedule, warmup, total, peak=3e-4), "a pure function of the step"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup, steps", [(0.06, 6), (10.0, 10), (0.0, 1)])
def test_warmup_rises_in_equal_steps_to_the_peak(schedule, warmup, steps):
    found = rates(schedule, warmup, 100, peak=2.0)
    assert found[:steps] == pytest.approx([2.0 * step / steps for step in range(1, steps + 1)])
    assert schedule in ("constant", "wsd") or found[steps] < 2.0


@pytest.mark.parametrize("warmup", [0, 20])
def test_linear_and_cosine(warmup):
    """From 1 in step 20 (or 1) down to 0 in step 101, which never comes."""
    first = max(1, warmup)
    left = [(101 - step) / (101 - first) for step in range(first, 101)]
    assert rates("linear", float(warmup), 100)[first - 1 :] == pytest.approx(left)
    cosine = [0.5 * (1 + math.cos(math.pi * (1 - share))) for share in left]
    found = rates("cosine", float(warmup), 100)[first - 1 :]
    assert found == pytest.approx(cosine) and 0 < found[-1] < 0.001
    assert all(before > after for before, after in zip(found, found[1:]))


def test_constant_and_wsd():
    """The latter falls to 0 over the last tenth."""
    assert rates("constant", 0.1, 40)[4:] == [1.0] * 36
    found = rates("wsd", 20.0, 200)
    assert found[19:181] == [1.0] * 162
    assert found[180:] == pytest.approx([left / 20 for left in range(20, 0, -1)])


# Optimizers.


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_groups_of_a_model(name, vocabulary):
    """Decay on matrices only, no frozen weight, none twice; Muon has the encoder's matrices."""
    model = small_model(vocabulary.size, "mlm")
    optimizers = make_optimizers(model, replace(OPTIONS, optimizer=name, learning_rate=1e-3))
    assert len(optimizers) == {"adamw": 1, "muon": 2}[name]
    groups = groups_of(optimizers)
    adamw = optimizers[0].defaults
    assert (adamw["betas"], adamw["eps"]) == (BETAS, OPTIONS.adam_epsilon)
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay), "no weight twice"
    of_muon = set()
    if name == "muon":
        assert isinstance(optimizers[1], Muon)
        of_muon = {id(weight) for weight in optimizers[1].param_groups[0]["params"]}
    for key, weight in model.named_parameters():
        if key.startswith(("bert.pooler", "cls.seq_relationship")):
            assert id(weight) not in decay, key
            continue
        is_plain = "LayerNorm" in key or key.endswith("bias")
        assert decay[id(weight)] == (0.0 if is_plain else 0.1), key
        in_encoder = key.startswith("bert.encoder.") and not is_plain
        assert (id(weight) in of_muon) == (in_encoder and name == "muon"), key


def test_muon_takes_stacked_matrices_one_by_one(vocabulary):
    model = small_packed("modernbert", vocabulary.size)
    _, optimizer = make_optimizers(model, replace(OPTIONS, optimizer="muon", learning_rate=1e-3))
    names = {weight: name for name, weight in model.named_parameters()}
    found = {
        group["stacked"]: {names[weight].split("layers.")[1][2:] for weight in group["params"]}
        for group in optimizer.param_groups
    }
    assert found == {
        1: {"attn.Wo.weight", "mlp.Wo.weight"},
        2: {"mlp.Wi.weight"},
        3: {"attn.Wqkv.weight"},
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2 * 4


OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
    "muon": lambda weights: Muon(weights, lr=0.01),
    "torch's muon": lambda weights: torch.optim.Muon(weights, lr=0.01),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
    "fused sgd": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_non_finite_step_changes_nothing(name):
    """The first or a later step: weights and optimizer state equal those of a run without it."""

    def train(values):
        weight = nn.Parameter(torch.ones(3, 2))
        optimizer = OPTIMIZERS[name]([weight])
        for value in values:
            weight.grad = torch.ones(3, 2)
            weight.grad[1, 1] = value
            step_if(torch.tensor(math.isfinite(value)), optimizer)
        return [weight.detach(), *optimizer.state[weight].values()]

    expected = train([1.0, 2.0])
    for values in ([math.nan, 1.0, 2.0], [1.0, math.inf, 2.0, math.nan]):
        assert all(map(torch.equal, train(values), expected)), values
    assert not any(map(torch.equal, train([1.0]), expected))


# Precision.


def test_precision_on_cpu(monkeypatch):
    for name, expected in (("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert optim.choose_precision("auto", CPU) == expected
        for asked in ("bf16", "fp32"):  # fast or not
            assert optim.choose_precision(asked, CPU) == asked
    refused(optim.choose_precision, "fp16", CPU, names="fp16: ")


def test_precision_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    for found, expected in (((8, 0), "bf16"), ((7, 5), "fp16")):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device=None, found=found: found
        )
        assert optim.choose_precision("auto", GPU) == expected
        for asked in ("fp16", "fp32"):
            assert optim.choose_precision(asked, GPU) == asked
    refused(optim.choose_precision, "bf16", GPU, names="bf16: ")


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_products_in_the_precision(precision, dtype):
    with optim.autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    "name, peak", [("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", None)]
)
def test_gpu_peak_is_from_the_datasheet_or_measured(name, peak, monkeypatch):
    """Never from a GPU with a similar name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch, "randn", fail(InterruptedError))  # a measurement needs a GPU
    if peak is None:
        with pytest.raises(InterruptedError):
            optim.peak_flops(GPU, "bf16")
    else:
        assert optim.peak_flops(GPU, "bf16") == peak
