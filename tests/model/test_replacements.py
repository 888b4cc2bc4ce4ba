"""What takes the place of stock modules computes the same: LayerNorm, GELU and the decoder of an aligned vocabulary; and nothing of
the stock kind is left in a model."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from packed_reference import small_model
from torch import nn
from transformers.activations import GELUActivation

from pretrain.model.cross_entropy import summed_cross_entropy
from pretrain.model.gelu import Gelu
from pretrain.model.heads import aligned_linear
from pretrain.model.layer_norm import LayerNorm
from pretrain.model.packed import REPLACED


def relative_error(found, wanted):
    return (torch.linalg.norm(found.double() - wanted) / torch.linalg.norm(wanted)).item()


def test_every_stock_module_of_a_model_is_replaced(vocabulary):
    kinds = {type(module) for module in small_model(vocabulary.size).modules()}
    assert not kinds & set(REPLACED) and set(REPLACED.values()) <= kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_has_float32_statistics_and_the_precision_of_autocast(dtype):
    torch.manual_seed(0)
    stock = nn.LayerNorm(96)
    nn.init.normal_(stock.weight)
    nn.init.normal_(stock.bias)
    ours = LayerNorm(stock)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gelu_of_a_compiled_graph_is_as_near_as_the_stock_one(dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    numbers = torch.cat([torch.linspace(-12, 12, 4801), 3 * torch.randn(4000)])
    direction = torch.randn(len(numbers)).to(dtype)

    def run(activation, of_type):
        values = numbers.to(dtype).to(of_type).requires_grad_()
        activated = activation(values)
        return activated, *torch.autograd.grad(activated, values, direction.to(of_type))

    compiled = torch.compile(Gelu(GELUActivation()), backend="eager")
    ours, stock, exact = run(compiled, dtype), run(F.gelu, dtype), run(F.gelu, torch.float64)
    for found, other, wanted in zip(ours, stock, exact):
        assert found.dtype == dtype
        assert relative_error(found, wanted) <= 1.05 * relative_error(other, wanted)


@pytest.mark.parametrize("classes, multiple", [(122, 64), (128, 64), (10, 8), (7, 8)])
def test_an_aligned_vocabulary_changes_no_loss_and_no_gradient(classes, multiple):
    torch.manual_seed(0)
    linear, hidden = nn.Linear(16, classes), torch.randn(9, 16, requires_grad=True)
    labels = torch.randint(classes, (9,))
    results = []
    for scores in (aligned_linear(hidden, linear, multiple), linear(hidden)):
        loss, num_correct = summed_cross_entropy(scores, labels)
        gradients = torch.autograd.grad(loss, (hidden, linear.weight, linear.bias))
        results.append((loss, num_correct, *gradients))
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted)
    scores = aligned_linear(hidden, linear, multiple)
    assert scores.shape == (9, classes) and scores.stride(0) % multiple == 0
