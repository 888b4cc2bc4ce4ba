"""Compare two models on the same masks of the same text, such as one before and after training: how
much did the loss at masked tokens change, and is that more than chance?

The difference of log-perplexities is one of mean losses. Its interval draws documents, because
tokens of one document are alike.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pretrain.batch import IGNORED
from pretrain.bootstrap import interval_of_mean
from pretrain.errors import counted
from pretrain.evaluate import ValidationSet, evaluation_mode
from pretrain.metrics import MAX_LOG_PERPLEXITY
from pretrain.model.packed import PackedModel

MIN_DOCUMENTS = 20  # with fewer (books, for example), an interval draws sequences instead


@dataclass(frozen=True)
class Change:
    """Two perplexities, and the log-perplexity after minus the one before, in nats, with its 95%
    interval. A difference of 0.05 is a perplexity about 5% higher."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    drawn: str  # what the interval draws

    def __str__(self) -> str:
        interval = f"95% interval {self.low:+.4f} to {self.high:+.4f} over {self.drawn}"
        change = f"log-perplexity {self.difference:+.4f} ({interval})"
        return f"perplexity {self.before:,.4g} before, {self.after:,.4g} after, {change}"


@torch.no_grad()
def sequence_losses(
    model: PackedModel, validation: ValidationSet, context: torch.autocast
) -> tuple[np.ndarray, np.ndarray]:
    """(summed MLM loss, number of masked tokens) of each sequence, float64 [sequences]."""
    sums, counts = [], []
    with evaluation_mode(model), context:
        for batch in validation.batches:
            on_device = batch.to(model.device)
            logits = model.masked_lm_logits(model.encode(on_device), on_device)
            labels = on_device.labels["mlm"]
            losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
            is_real = (labels != IGNORED).cpu().numpy()
            masked = batch.masked_positions.numpy()[is_real]
            owner = np.searchsorted(batch.cu_seqlens.numpy(), masked, side="right") - 1
            weights = losses.double().cpu().numpy()[is_real]
            sums.append(np.bincount(owner, weights, batch.num_sequences))
            counts.append(np.bincount(owner, minlength=batch.num_sequences))
    return np.concatenate(sums), np.concatenate(counts).astype(np.float64)


def compare(
    before: PackedModel, after: PackedModel, validation: ValidationSet, context: torch.autocast
) -> Change:
    """The change from one model to the other, which have the same vocabulary."""
    old, counts = sequence_losses(before, validation, context)
    new, _ = sequence_losses(after, validation, context)
    _, groups = np.unique(validation.documents, return_inverse=True)
    drawn = counted(groups.max() + 1, "document")
    if groups.max() + 1 < MIN_DOCUMENTS:
        groups, drawn = np.arange(len(counts)), counted(len(counts), "sequence")
    by_group = [np.bincount(groups, values) for values in (new - old, counts)]
    total = counts.sum()
    means = [float(losses.sum() / total) for losses in (old, new)]
    perplexities = np.exp(np.minimum(means, MAX_LOG_PERPLEXITY))
    low, high = interval_of_mean(*by_group)
    return Change(*map(float, perplexities), means[1] - means[0], low, high, drawn)
