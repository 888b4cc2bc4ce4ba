"""Muon equals torch's."""

import pytest
import torch
from torch import nn

from pretrain.runtime import muon
from pretrain.runtime.muon import Muon

SHAPES = [(16, 16), (24, 16), (16, 24), (16, 16), (24, 16)]
RATE, DECAY = 0.01, 0.1


def make_weights():
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def take_steps(weights, optimizer):
    """Take five steps with gradients that depend only on the step."""
    for number in range(5):
        torch.manual_seed(100 + number)
        for weight in weights:
            weight.grad = torch.randn(weight.shape)
        optimizer.step()


@pytest.mark.parametrize(
    "dtype, tolerance, max_elements",
    [(torch.bfloat16, 1e-6, 1), (torch.bfloat16, 1e-6, 1 << 20), (torch.float32, 2e-3, 1 << 20)],
)
def test_muon_equals_torchs(dtype, tolerance, max_elements, monkeypatch):
    """torch's orthogonalizes in bf16, one matrix at a time."""
    monkeypatch.setattr(muon, "MAX_ELEMENTS", max_elements)
    ours, theirs = make_weights(), make_weights()
    take_steps(ours, Muon(ours, RATE, DECAY, momentum=0.9, dtype=dtype))
    settings = {"momentum": 0.9, "weight_decay": DECAY, "adjust_lr_fn": "match_rms_adamw"}
    take_steps(theirs, torch.optim.Muon(theirs, RATE, **settings))
    for left, right, start in zip(ours, theirs, make_weights()):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=0.0)
        assert (left - start).abs().max() > 100 * tolerance or dtype == torch.float32


def test_stacked_matrices_equal_separate_ones():
    """Three in one weight, as the queries, keys and values of some models."""
    separate = [nn.Parameter(torch.randn(16, 12)) for _ in range(6)]
    stacks = [separate[:3], separate[3:]]
    stacked = [nn.Parameter(torch.cat(parts).detach()) for parts in stacks]
    of_stacks = Muon([{"params": stacked, "stacked": 3}], RATE, DECAY)
    optimizers = [Muon(separate, RATE, DECAY), of_stacks]
    for number in range(4):
        torch.manual_seed(number)
        for parts, weight in zip(stacks, stacked):
            weight.grad = torch.randn(weight.shape)
            for part, gradient in zip(parts, weight.grad.chunk(3)):
                part.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for parts, weight in zip(stacks, stacked):
        torch.testing.assert_close(torch.cat(parts), weight, atol=1e-6, rtol=0.0)


def test_a_weight_without_gradient_is_left_alone():
    weights = make_weights()
    optimizer = Muon(weights, RATE, DECAY)
    before = weights[0].detach().clone()
    take_steps(weights[1:], optimizer)
    assert torch.equal(weights[0], before) and weights[0] not in optimizer.state
