"""Summed cross-entropy and the number of right answers; over a vocabulary on CPU without a float32 copy of all scores."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.batch import IGNORED

SCORES = 1 << 20  # at once: 4 MB of float32, which the cache holds
MANY_SCORES = 1 << 16  # from which on it pays


def summed_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [M, classes], labels int64 [M], some IGNORED -> (sum of the losses in float32, number of right answers)."""
    by_rows = logits.device.type == "cpu" and logits.numel() >= MANY_SCORES and logits.dtype != torch.float64
    if by_rows and class_weights is None and not torch.compiler.is_compiling():
        return _ByRows.apply(logits, labels)
    loss = F.cross_entropy(logits.float(), labels, class_weights, ignore_index=IGNORED, reduction="sum")
    return loss, (logits.detach().argmax(-1) == labels).sum()


class _ByRows(torch.autograd.Function):
    """A few rows at a time, each read once: loss, right answers, and the gradient in the type of the scores."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss, num_correct = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        size = max(1, SCORES // logits.shape[1])
        for scores, label, part in zip(logits.split(size), labels.split(size), (logits if gradient is None else gradient).split(size)):
            scores, counted = scores.float(), label != IGNORED
            target = torch.where(counted, label, 0)[:, None]
            of_target, top, probabilities = scores.gather(1, target)[:, 0], scores.amax(-1), scores.softmax(-1)
            loss += ((top - probabilities.amax(-1).log() - of_target) * counted).sum()
            candidates = ((of_target == top) & counted).nonzero()[:, 0]  # argmax of all rows takes longer than the softmax
            num_correct += (scores[candidates].argmax(-1) == label[candidates]).sum()
            if gradient is not None:
                probabilities.scatter_add_(1, target, torch.full(target.shape, -1.0))
                part.copy_(probabilities if counted.all() else probabilities * counted[:, None])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(num_correct)
        return loss.float(), num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_loss), None  # in place: this is as large as the scores
