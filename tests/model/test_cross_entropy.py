"""The summed cross-entropy by rows against torch's over all scores at once."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED
from pretrain.model import cross_entropy
from pretrain.model.cross_entropy import summed_cross_entropy


def reference(logits, labels):
    """torch's loss in float64 and its gradient."""
    exact = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="sum")
    return loss, torch.autograd.grad(loss * 3.0, exact)[0], (logits.argmax(-1) == labels).sum()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), classes=st.integers(2, 50), ignored=st.sampled_from([0.0, 0.3, 1.0]),
       scale=st.sampled_from([0.0, 1.0, 300.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_loss_gradient_and_right_answers(rows, classes, ignored, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, classes, generator=generator)).to(dtype).requires_grad_()  # with ties, in bf16 and at scale 0
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "MANY_SCORES", 0)
        loss, num_correct = summed_cross_entropy(logits, labels)
    expected, gradient, expected_correct = reference(logits, labels)
    assert loss.dtype == torch.float32 and num_correct == expected_correct
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    (found,) = torch.autograd.grad(loss * 3.0, logits)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), gradient, rtol=tolerance, atol=3 * tolerance)


def test_many_scores_go_by_rows_and_few_or_weighted_ones_do_not():
    many, few = torch.randn(70, 1000, requires_grad=True), torch.randn(70, 2, requires_grad=True)
    labels = torch.zeros(70, dtype=torch.int64)
    assert "ByRows" in type(summed_cross_entropy(many, labels)[0].grad_fn).__name__
    assert "ByRows" not in type(summed_cross_entropy(few, labels)[0].grad_fn).__name__
    weighted, _ = summed_cross_entropy(many, labels, torch.full((1000,), 2.0))
    assert weighted.item() == pytest.approx(2 * summed_cross_entropy(many, labels)[0].item(), rel=1e-5)


def test_a_label_beyond_the_vocabulary_is_refused():
    for label in (-1, 1000):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            summed_cross_entropy(torch.randn(70, 1000), torch.full((70,), label))


def test_double_precision_stays_double():
    logits, labels = torch.randn(70, 1000, dtype=torch.float64, requires_grad=True), torch.arange(70)
    assert "ByRows" not in type(summed_cross_entropy(logits, labels)[0].grad_fn).__name__


def test_a_second_backward_pass_is_refused():
    """The gradient is scaled in place: what is kept after the first pass is no longer that of the loss."""
    logits = torch.randn(70, 1000, requires_grad=True)
    loss, _ = summed_cross_entropy(logits, torch.zeros(70, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
