"""Optimizer, schedule, precision: rates against closed forms, decay on matrices only, a step that is not finite changes nothing and is
told one step later, and what a device cannot do is refused."""
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import small_model
from torch import nn

from pretrain.command import UserError
from pretrain.runtime import optim
from pretrain.runtime.optim import FiniteWatch, make_optimizer, make_schedule

SCHEDULES = ("linear", "cosine", "constant", "wsd")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def rates(schedule, warmup, total, peak=1.0):
    rate = make_schedule(schedule, peak, warmup, total)
    return [rate(step) for step in range(1, total + 1)]


# Schedules.

@settings(max_examples=60, deadline=None)
@given(schedule=st.sampled_from(SCHEDULES), total=st.integers(1, 300),
       warmup=st.one_of(st.just(0.0), st.floats(0, 0.99), st.integers(1, 400).map(float)))
def test_every_rate_is_above_zero_and_at_most_the_peak(schedule, total, warmup):
    found = rates(schedule, warmup, total, peak=3e-4)
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in found)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup, steps", [(0.06, 6), (0.25, 25), (10.0, 10), (1.0, 1)], ids=["share", "quarter", "steps", "one step"])
def test_warmup_rises_in_equal_steps_to_the_peak(schedule, warmup, steps):
    found = rates(schedule, warmup, 100, peak=2.0)
    assert found[:steps] == pytest.approx([2.0 * step / steps for step in range(1, steps + 1)])
    assert schedule in ("constant", "wsd") or found[steps] < 2.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_rate_is_the_peak(schedule):
    assert rates(schedule, 0.0, 50, peak=2.0)[0] == pytest.approx(2.0)


@pytest.mark.parametrize("warmup", [0, 20])
def test_linear(warmup):
    found = rates("linear", float(warmup), 100)
    # From 1 in step 20 (or 1) down to 0 in step 101, which never comes.
    first = max(1, warmup)
    assert found[first - 1:] == pytest.approx([(101 - step) / (101 - first) for step in range(first, 101)])
    assert found[-1] == pytest.approx(1 / (101 - first))


@pytest.mark.parametrize("warmup", [0, 20])
def test_cosine(warmup):
    found = rates("cosine", float(warmup), 100)
    first = max(1, warmup)
    expected = [0.5 * (1 + math.cos(math.pi * (step - first) / (101 - first))) for step in range(first, 101)]
    assert found[first - 1:] == pytest.approx(expected)
    assert all(before > after for before, after in zip(found[first - 1:], found[first:]))
    assert 0 < found[-1] < 0.001


def test_wsd_is_constant_then_linear_over_the_last_tenth():
    found = rates("wsd", 20.0, 200)
    assert found[19:181] == [1.0] * 162
    assert found[180:] == pytest.approx([left / 20 for left in range(20, 0, -1)])


def test_constant():
    assert rates("constant", 0.1, 40)[4:] == [1.0] * 36


def test_a_schedule_is_a_pure_function_of_the_step():
    rate = make_schedule("cosine", 1e-3, 0.1, 1000)
    assert [rate(step) for step in (900, 5, 900)] == [make_schedule("cosine", 1e-3, 0.1, 1000)(step) for step in (900, 5, 900)]


# Optimizer.

def test_decay_is_on_matrices_only_and_frozen_weights_are_left_out(vocabulary):
    model = small_model(vocabulary.size, "mlm")
    optimizer = make_optimizer(model, 1e-3, 0.1, [0.9, 0.98], 1e-6)
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay), "no weight twice"
    for name, weight in model.named_parameters():
        if name.startswith(("bert.pooler", "cls.seq_relationship")):
            assert id(weight) not in decay, name
        else:
            assert decay[id(weight)] == (0.0 if "LayerNorm" in name or name.endswith("bias") else 0.1), name


def test_update_equals_adamw_by_hand():
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(layer, 0.01, 0.1, [0.8, 0.95], 1e-6)
    expected = {name: weight.detach().clone().double() for name, weight in layer.named_parameters()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in expected.items()} for _ in range(2))
    for step in range(1, 4):
        for name, weight in layer.named_parameters():
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            gradient = weight.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient ** 2
            expected[name] *= 1 - 0.01 * (0.1 if name == "weight" else 0.0)
            expected[name] -= 0.01 * first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-6)
        optimizer.step()
    for name, weight in layer.named_parameters():
        torch.testing.assert_close(weight.detach().double(), expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_found_inf_keeps_weights_and_optimizer_state(poison):
    """What train_step relies on: fused AdamW passes over the whole step where `found_inf` is 1."""
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(layer, 0.01, 0.1, [0.9, 0.999], 1e-6)

    def step(found_inf, value):
        for weight in layer.parameters():
            weight.grad = torch.ones_like(weight)
        layer.bias.grad[0] = value
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        state = [value.clone() for entry in optimizer.state.values() for value in (entry["exp_avg"], entry["exp_avg_sq"], entry["step"])]
        return [weight.detach().clone() for weight in layer.parameters()] + state

    before, after = step(0.0, 1.0), step(1.0, poison)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    later = step(0.0, 1.0)  # and the optimizer goes on
    assert not any(torch.equal(old, new) for old, new in zip(after, later, strict=True))


# Precision.

def test_precision_on_cpu(monkeypatch):
    for capabilities, expected in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert optim.choose_precision("auto", CPU) == expected
    assert [optim.choose_precision(name, CPU) for name in ("bf16", "fp32")] == ["bf16", "fp32"]  # asked for is taken, fast or not
    with pytest.raises(UserError, match="--precision fp16: the CPU has no fp16 training; needed is bf16 or fp32"):
        optim.choose_precision("fp16", CPU)


def test_precision_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    for capability, expected in (((8, 0), "bf16"), ((7, 5), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert optim.choose_precision("auto", GPU) == expected
        assert [optim.choose_precision(name, GPU) for name in ("fp16", "fp32")] == ["fp16", "fp32"]
    with pytest.raises(UserError, match="--precision bf16: Tesla T4 does not compute it; needed is fp16 or fp32"):
        optim.choose_precision("bf16", GPU)


@pytest.mark.parametrize("precision, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_products_in_the_precision(precision, expected):
    left = torch.ones(2, 2)
    with optim.autocast(CPU, precision):
        assert (left @ left).dtype == expected
    assert (left @ left).dtype == torch.float32


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
    ("NVIDIA L4", 121), ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA GeForce RTX 4090", 165.2)])
def test_peak_of_a_known_gpu_is_that_of_its_datasheet(name, teraflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert optim.peak_flops(GPU, "bf16") == teraflops * 1e12


class Measured(Exception):
    """Stands for the measurement, which needs a GPU."""


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA L40", "NVIDIA T400", "Some new GPU"])
def test_peak_of_an_unknown_gpu_is_measured_and_not_that_of_a_similar_name(name, monkeypatch):
    def measure(*_, **__):
        raise Measured

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch, "randn", measure)
    with pytest.raises(Measured):
        optim.peak_flops(GPU, "bf16")


def test_peak_of_a_cpu_is_operations_over_the_best_time(monkeypatch):
    measured = SimpleNamespace(blocked_autorange=lambda min_run_time: SimpleNamespace(times=[0.5, 0.25, 0.5]))
    monkeypatch.setattr(optim, "Timer", lambda *_, **__: measured)
    assert optim.peak_flops(CPU, "fp32") == 2 * 1024**3 / 0.25


# The watch over steps that are not finite.

def test_a_step_that_is_not_finite_is_told_one_step_later():
    watch, good, bad = FiniteWatch(), torch.tensor(True), torch.tensor(False)
    assert watch.observe(good, 1) is None
    assert watch.observe(bad, 2) is None, "its flag may not be there yet"
    assert watch.observe(good, 3) == "gradients not finite at step 2: the step changed nothing"
    assert watch.observe(bad, 4) is None
    assert watch.observe(None) == "gradients not finite at step 4: the step changed nothing"  # before a checkpoint
    assert watch.observe(None) is None, "nothing is told twice"
    assert watch.skipped == 2


def test_the_count_goes_on_from_a_checkpoint():
    watch = FiniteWatch(skipped=5)
    watch.observe(torch.tensor(False), 9)
    watch.observe(None)
    assert watch.skipped == 6


def test_a_run_that_only_skips_is_stopped():
    watch, bad = FiniteWatch(), torch.tensor(False)
    for step in range(1, optim.MAX_SKIPPED_IN_A_ROW):
        watch.observe(bad, step)
    watch.observe(torch.tensor(True), 20)  # one good step: the row begins anew
    for step in range(21, 21 + optim.MAX_SKIPPED_IN_A_ROW):
        watch.observe(bad, step)
    assert watch.in_a_row == optim.MAX_SKIPPED_IN_A_ROW - 1
    with pytest.raises(UserError, match=rf"the gradients of {optim.MAX_SKIPPED_IN_A_ROW} steps in a row were not finite, last at step 40; "
                                        r".*A new run with a lower --learning-rate, or --precision fp32, may help"):
        watch.observe(bad, 41)
    assert watch.skipped == 2 * optim.MAX_SKIPPED_IN_A_ROW - 1
