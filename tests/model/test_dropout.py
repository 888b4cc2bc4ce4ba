"""Dropout on CPU: shares, mean, gradient and random state, against what torch's own promises."""
import pytest
import torch
from packed_reference import small_model
from torch import nn

from pretrain.model.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_zeros_and_mean(p, dtype):
    torch.manual_seed(3)
    dropped = Dropout(p)(torch.ones(1000, 1001, dtype=dtype))
    assert (dropped == 0).double().mean() == pytest.approx(p, abs=4e-3)
    assert dropped.double().mean() == pytest.approx(1, abs=4 * (p / (1 - p) / 1_001_000) ** 0.5 + 2**-16 / (1 - p)), "no bias in bf16"
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}


def test_zeros_are_independent_of_one_another():
    torch.manual_seed(3)
    kept = (Dropout(0.5)(torch.ones(1 << 20)) > 0).double() - 0.5
    for shift in (1, 2, 3, 4, 1024):
        assert abs((kept[shift:] * kept[:-shift]).mean()) < 0.25 * 5 / (1 << 10)


def test_gradient_is_that_of_what_was_kept():
    torch.manual_seed(3)
    numbers = torch.randn(33, 7, requires_grad=True)
    dropped = Dropout(0.3)(numbers)
    dropped.sum().backward()
    torch.testing.assert_close(numbers.grad * numbers, dropped)


def test_double_precision_is_torchs():
    torch.manual_seed(3)
    assert 0.4 < (Dropout(0.5)(torch.ones(1000, dtype=torch.float64)) == 0).double().mean() < 0.6


def test_torchs_generator_decides():
    numbers, drop = torch.ones(64, 64), Dropout(0.5)
    torch.manual_seed(3)
    first, state, second = drop(numbers), torch.get_rng_state(), drop(numbers)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(drop(numbers), second)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_and_everything_is_dropped(p):
    assert torch.equal(Dropout(p)(torch.ones(5)), torch.full((5,), 1.0 - p))


def test_evaluation_drops_nothing_and_draws_nothing():
    numbers, state = torch.randn(9), torch.get_rng_state()
    assert torch.equal(Dropout(0.5).eval()(numbers), numbers) and torch.equal(torch.get_rng_state(), state)


def test_every_dropout_of_a_model_is_replaced(vocabulary):
    kinds = {type(module) for module in small_model(vocabulary.size, hidden_dropout_prob=0.1).modules() if isinstance(module, nn.Dropout)}
    assert kinds == {Dropout}
