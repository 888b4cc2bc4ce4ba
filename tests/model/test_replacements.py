"""Replacements of stock modules compute the same: dropout (shares, mean, independence, gradient and
random state), LayerNorm, GELU and the decoder of an aligned vocabulary."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from packed_reference import FAMILIES, small_packed
from torch import nn

from pretrain.model.losses import cross_entropy
from pretrain.model.replacements import (
    REPLACEMENTS,
    Dropout,
    Gelu,
    LayerNorm,
    aligned_linear,
)


def relative_error(found, wanted):
    return (torch.linalg.norm(found.double() - wanted) / torch.linalg.norm(wanted)).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stock_module_of_a_model_is_replaced(family, vocabulary):
    kinds = {type(module) for module in small_packed(family, vocabulary.size).modules()}
    assert not kinds & set(REPLACEMENTS)
    assert set(REPLACEMENTS.values()) <= kinds


# Dropout.

BOTH_WAYS = pytest.mark.parametrize("way", ["eager", "compiled"])


def make(p, way="eager"):
    """A dropout module; if compiled, its graph runs as traced."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    module = Dropout(p)
    return module if way == "eager" else torch.compile(module, backend="eager")


def z_score(zeros, p):
    """Standard deviations between the number of zeros and the expected number if independent."""
    return (zeros.double().mean() - p) / (p * (1 - p) / zeros.numel()) ** 0.5


@BOTH_WAYS
@pytest.mark.parametrize("p, dtype", [(0.1, torch.float32), (0.9, torch.bfloat16)])
def test_share_of_zeros_and_mean(p, dtype, way):
    dropped = make(p, way)(torch.ones(1000, 1001, dtype=dtype))
    assert (dropped == 0).double().mean() == pytest.approx(p, abs=4e-3)
    kept = torch.tensor(1 / (1 - p), dtype=dtype).item()
    assert set(dropped.unique().tolist()) == {0.0, kept}
    if way == "eager":
        deviation = 4 * (p / (1 - p) / 1_001_000) ** 0.5 + 2**-16 / (1 - p)
        assert dropped.double().mean() == pytest.approx(1, abs=deviation), "no bias in bf16"


@BOTH_WAYS
def test_zeros_are_independent_of_one_another(way):
    """At any distance, in any column, and from one call to the next."""
    p, width = 0.1, 768
    drop = make(p, way)
    zeros = drop(torch.ones(1000 * width)) == 0
    for shift in (1, 2, 3, 4, 64, width, 4 * width, 1 << 16):
        assert abs(z_score(zeros[shift:] & zeros[:-shift], p * p)) < 5
    by_column = zeros.view(-1, width).double().sum(0)
    spread = ((by_column - 1000 * p) ** 2 / (1000 * p * (1 - p))).sum()
    assert abs(spread - width) < 5 * (2 * width) ** 0.5
    for _ in range(5):
        again = drop(torch.ones(1000 * width)) == 0
        assert abs(z_score(zeros & again, p * p)) < 5


@BOTH_WAYS
def test_dropout_follows_torchs_generator_and_has_the_right_gradient(way):
    drop, numbers = make(0.3, way), torch.randn(64, 64, requires_grad=True)
    first, state, second = drop(numbers), torch.get_rng_state(), drop(numbers)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(drop(numbers), second)
    second.sum().backward()
    torch.testing.assert_close(numbers.grad * numbers, second)


def test_dropout_drops_and_draws_nothing_in_evaluation():
    numbers, drop, state = torch.randn(9), make(0.5).eval(), torch.get_rng_state()
    assert torch.equal(drop(numbers), numbers)
    assert torch.equal(torch.get_rng_state(), state)


# LayerNorm, GELU, decoder.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_has_float32_statistics_and_the_precision_of_autocast(dtype):
    torch.manual_seed(0)
    stock = nn.LayerNorm(96)
    nn.init.normal_(stock.weight)
    nn.init.normal_(stock.bias)
    ours = LayerNorm(96)
    ours.load_state_dict(stock.state_dict())
    hidden = (100 + torch.randn(50, 96)).to(dtype).requires_grad_()
    direction = torch.randn(50, 96)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(hidden)
    assert found.dtype == torch.bfloat16
    gradients = torch.autograd.grad(found, (hidden, *ours.parameters()), direction.bfloat16())
    exact = hidden.detach().double().requires_grad_()
    weights = [weight.detach().double().requires_grad_() for weight in (stock.weight, stock.bias)]
    expected = F.layer_norm(exact, (96,), *weights, stock.eps)
    assert relative_error(found, expected) < 4e-3
    wanted = torch.autograd.grad(expected, (exact, *weights), direction.double())
    assert all(relative_error(*pair) < 6e-3 for pair in zip(gradients, wanted))
    plain = hidden.detach().float()
    assert torch.equal(ours(plain), stock(plain)), "without autocast it is the stock one"


def test_compiled_gelu_is_as_accurate_as_the_stock_one():
    torch._dynamo.reset()
    torch.manual_seed(0)
    numbers = torch.cat([torch.linspace(-12, 12, 4801), 3 * torch.randn(4000)])
    dtype = torch.bfloat16
    direction = torch.randn(len(numbers)).to(dtype)

    def run(activation, of_type):
        values = numbers.to(dtype).to(of_type).requires_grad_()
        activated = activation(values)
        return activated, *torch.autograd.grad(activated, values, direction.to(of_type))

    compiled = torch.compile(Gelu(), backend="eager")
    ours, stock, exact = run(compiled, dtype), run(F.gelu, dtype), run(F.gelu, torch.float64)
    for found, other, wanted in zip(ours, stock, exact):
        assert found.dtype == dtype
        assert relative_error(found, wanted) <= 1.05 * relative_error(other, wanted)


@pytest.mark.parametrize("classes, multiple", [(122, 64), (128, 64), (7, 8)])
def test_an_aligned_vocabulary_changes_no_loss_and_no_gradient(classes, multiple):
    torch.manual_seed(0)
    linear, hidden = nn.Linear(16, classes), torch.randn(9, 16, requires_grad=True)
    labels = torch.randint(classes, (9,))
    results = []
    for scores in (aligned_linear(hidden, linear, multiple), linear(hidden)):
        term = cross_entropy(scores, labels)
        gradients = torch.autograd.grad(term.sum, (hidden, linear.weight, linear.bias))
        results.append((scores, term.sum, term.num_correct, *gradients))
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted)
    assert results[0][0].stride(0) % multiple == 0
