"""Summed cross-entropy and the number of right answers; over a vocabulary on CPU without a float32 copy of all scores."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import IGNORED

ROWS = 32  # at once: 4 MB of float32 for a vocabulary of 30,522, which the cache holds
MANY_SCORES = 1 << 16  # from which on it pays


def summed_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [M, classes], labels int64 [M], some IGNORED -> (sum of the losses in float32, number of right answers)."""
    if logits.device.type == "cpu" and logits.numel() >= MANY_SCORES and class_weights is None and not torch.compiler.is_compiling():
        return _ByRows.apply(logits, labels)
    loss = F.cross_entropy(logits.float(), labels, class_weights, ignore_index=IGNORED, reduction="sum")
    return loss, (logits.detach().argmax(-1) == labels).sum()


class _ByRows(torch.autograd.Function):
    """A few rows at a time, each read once: loss, right answers, and the gradient in the type of the scores."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss, num_correct = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        for start in range(0, len(labels), ROWS):
            scores, label = logits[start: start + ROWS].float(), labels[start: start + ROWS]
            counted, own = label != IGNORED, (torch.arange(len(label)), label.clamp(min=0))
            top, shares = scores.amax(-1), scores.softmax(-1)
            loss += ((top - shares.amax(-1).log() - scores[own]) * counted).sum()
            candidates = ((scores[own] == top) & counted).nonzero()[:, 0]  # argmax of all rows takes longer than the softmax
            num_correct += (scores[candidates].argmax(-1) == label[candidates]).sum()
            if gradient is not None:
                shares[own] -= 1.0
                gradient[start: start + ROWS] = shares * counted[:, None] if not counted.all() else shares
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(num_correct)
        return loss.float(), num_correct

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_loss), None  # in place: this is as large as the scores
