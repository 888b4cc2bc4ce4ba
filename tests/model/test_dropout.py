"""Dropout on CPU and in a compiled graph: shares, mean, independence, gradient and random state, against what torch's own promises."""
import pytest
import torch
import torch._dynamo
from torch import nn

from pretrain.model import dropout
from pretrain.model.dropout import Dropout

WAYS = ["eager", "compiled"]


def make(p, way="eager"):
    """A dropout module; the graph of a compiled one runs as it was traced."""
    torch._dynamo.reset()
    module = Dropout(nn.Dropout(p))
    return module if way == "eager" else torch.compile(module, backend="eager")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_zeros_and_mean(p, dtype, way):
    torch.manual_seed(3)
    dropped = make(p, way)(torch.ones(1000, 1001, dtype=dtype))
    assert (dropped == 0).double().mean() == pytest.approx(p, abs=4e-3)
    kept = torch.tensor(1 / (1 - p), dtype=dtype).item()
    assert set(dropped.unique().tolist()) == {0.0, kept}
    if way == "eager":
        deviation = 4 * (p / (1 - p) / 1_001_000) ** 0.5 + 2**-16 / (1 - p)
        assert dropped.double().mean() == pytest.approx(1, abs=deviation), "no bias in bf16"


def z_score(zeros, p):
    """Deviations by which the number of zeros differs from what independent ones have."""
    return (zeros.double().mean() - p) / (p * (1 - p) / zeros.numel()) ** 0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_zeros_are_independent_of_one_another(p, way):
    """At any distance, in any column, and from one call to the next."""
    torch.manual_seed(3)
    drop, width = make(p, way), 768
    zeros = drop(torch.ones(1000 * width)) == 0
    for shift in (1, 2, 3, 4, 64, width, 4 * width, 1 << 16):
        assert abs(z_score(zeros[shift:] & zeros[:-shift], p * p)) < 5
    by_column = zeros.view(-1, width).double().sum(0)
    spread = ((by_column - 1000 * p) ** 2 / (1000 * p * (1 - p))).sum()
    assert abs(spread - width) < 5 * (2 * width) ** 0.5
    for _ in range(5):
        again = drop(torch.ones(1000 * width)) == 0
        assert abs(z_score(zeros & again, p * p)) < 5


def test_the_hash_mixes_both_seeds_well():
    """Seeds that differ in one place or in one bit give zeros that have nothing to do with one another."""
    places, numbers, p = torch.arange(1 << 20, dtype=torch.int32), torch.ones(1 << 20), 0.1

    def zeros(first, second):
        bits = places + torch.tensor(first, dtype=torch.int32)
        return dropout.drop_by_hash(numbers, bits, torch.tensor(second, dtype=torch.int32), p) == 0

    for first, second in ((0, 0), (-5, 12345), (1 << 30, -(1 << 31))):
        same = zeros(first, second)
        assert abs(z_score(same, p)) < 5
        for other in (1, 2, 1 << 8, 1 << 16, 1 << 29):
            assert abs(z_score(same & zeros(first + other, second), p * p)) < 5
            assert abs(z_score(same & zeros(first, second + other), p * p)) < 5


@pytest.mark.parametrize("way", WAYS)
def test_gradient_is_that_of_what_was_kept(way):
    torch.manual_seed(3)
    numbers = torch.randn(33, 7, requires_grad=True)
    dropped = make(0.3, way)(numbers)
    dropped.sum().backward()
    torch.testing.assert_close(numbers.grad * numbers, dropped)


def test_double_precision_is_torchs():
    torch.manual_seed(3)
    assert 0.4 < (make(0.5)(torch.ones(1000, dtype=torch.float64)) == 0).double().mean() < 0.6


@pytest.mark.parametrize("way", WAYS)
def test_torchs_generator_decides(way):
    numbers, drop = torch.ones(64, 64), make(0.5, way)
    torch.manual_seed(3)
    first, state, second = drop(numbers), torch.get_rng_state(), drop(numbers)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(drop(numbers), second)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_and_everything_is_dropped(p):
    assert torch.equal(make(p)(torch.ones(5)), torch.full((5,), 1.0 - p))


def test_evaluation_drops_nothing_and_draws_nothing():
    numbers, state = torch.randn(9), torch.get_rng_state()
    assert torch.equal(make(0.5).eval()(numbers), numbers) and torch.equal(torch.get_rng_state(), state)
