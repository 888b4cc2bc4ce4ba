"""Cross-entropy by rows against torch's over all scores at once, alone and with another term."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED, Loss
from pretrain.model import cpu_kernels
from pretrain.model.losses import cross_entropy

MANY = (70, 1000)  # scores: by rows


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    classes=st.integers(2, 50),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([0.0, 1.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    at_once=st.sampled_from([1, 100, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_loss_gradient_and_right_answers(rows, classes, ignored, scale, dtype, at_once, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator)
    logits = logits.to(dtype).requires_grad_()  # with ties, in bf16 and at scale 0
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "MANY_SCORES", 0)
        patch.setattr(cpu_kernels, "ROW_SCORES", at_once)
        term = cross_entropy(logits, labels)
        assert "Rowwise" in type(term.sum.grad_fn).__name__
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="sum")
    assert term.sum.dtype == torch.float32
    assert term.num_correct == (logits.argmax(-1) == labels).sum()
    torch.testing.assert_close(term.sum.double(), expected, rtol=1e-5, atol=1e-4)
    (found,) = torch.autograd.grad(term.sum * 3.0, logits)
    (wanted,) = torch.autograd.grad(expected * 3.0, exact)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=3 * tolerance)


@pytest.mark.parametrize("shape", [(50, 3), MANY])
def test_labels_and_correct_predictions_count_by_the_weights_of_their_classes(shape):
    logits, weights = torch.randn(shape), 0.5 + torch.rand(shape[1])
    labels = torch.where(torch.rand(shape[0]) < 0.5, logits.argmax(-1), 1)
    labels[::5] = IGNORED
    term = cross_entropy(logits, labels, class_weights=weights)
    expected = F.cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(term.sum, expected)
    right = [int(label) for row, label in zip(logits, labels) if row.argmax() == label]
    torch.testing.assert_close(term.num_correct, sum(weights[label] for label in right))


def test_a_second_backward_pass_is_refused():
    """The gradient is scaled in place, so it is wrong after the first pass."""
    logits = torch.randn(MANY, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(70, dtype=torch.int64)).sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# A term of one's own.


def z_loss(logits, labels):
    squares = logits.float().logsumexp(-1) ** 2
    return Loss((squares * (labels != IGNORED)).sum(), weight=1e-2, count="mlm")


@pytest.mark.parametrize("order", [1, -1])  # whichever term is first in the sum
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_extra_term_does_not_change_the_cross_entropy(dtype, is_compiled, order):
    """Compiled, both passes are one graph; inductor would spend 15 seconds on compiling C++."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(MANY)).to(dtype).requires_grad_()
    labels = torch.randint(1000, (70,))
    labels[::5] = IGNORED
    exact = logits.detach().double().requires_grad_()
    squares = exact[labels != IGNORED].logsumexp(-1) ** 2
    expected = F.cross_entropy(exact, labels, ignore_index=IGNORED) + 1e-2 * squares.sum() / 56
    (wanted,) = torch.autograd.grad(expected, exact)

    def losses(logits):
        return [cross_entropy(logits, labels), z_loss(logits, labels)]

    torch._dynamo.reset()
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    terms = compiled(logits) if is_compiled else losses(logits)
    assert [type(term.num_correct) for term in terms] == [torch.Tensor, type(None)]
    total = sum(term.sum * term.weight / 56 for term in terms[::order])
    (found,) = torch.autograd.grad(total, logits)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.double(), wanted, atol=1e-3 * tolerance, rtol=tolerance)
