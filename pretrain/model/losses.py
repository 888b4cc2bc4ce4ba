"""Summed cross-entropy with the number of correct predictions, and summed squared errors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import IGNORED, Loss
from pretrain.model.cpu_kernels import RowwiseCrossEntropy, are_rows_faster


def cross_entropy(
    logits: Tensor, labels: Tensor, weight: float = 1.0, class_weights: Tensor | None = None
) -> Loss:
    """logits [M, classes], labels int64 [M], some IGNORED -> the sum in float32, or float64 if the
    logits are. `weight` is the weight of this term in the training loss. With `class_weights`
    float [classes], each label counts by its weight, in the accuracy, too."""
    if class_weights is None and are_rows_faster(logits):
        loss, num_correct = RowwiseCrossEntropy.apply(logits, labels)
    else:
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(scores, labels, class_weights, ignore_index=IGNORED, reduction="sum")
        is_right = logits.detach().argmax(-1) == labels
        if class_weights is not None:
            is_right = is_right * class_weights[labels.clamp(min=0)]
        num_correct = is_right.sum()
    return Loss(loss, num_correct, weight)


def squared_error(outputs: Tensor, labels: Tensor) -> Loss:
    """outputs and labels [N] -> the sum in float32."""
    return Loss((outputs.float() - labels).square().sum())
