"""Whether a micro-batch fits the device's memory, tried before the first step, and telling errors that mean it does not."""
from __future__ import annotations

import gc

import torch
from torch import nn

from pretrain.batch import PackedBatch


def is_full(error: BaseException) -> bool:
    """Whether `error` tells that memory is full; torch has no class of its own for that of the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error)))


def micro_batch_fits(model: nn.Module, batch: PackedBatch, context: torch.autocast) -> bool:
    """Run `batch` forward and backward beside the optimizer's two averages, and discard it all: what a step needs at once."""
    was_training = model.training
    try:
        model.train()
        with context:
            loss = sum(model(batch).loss_sums.values())
        loss.backward()
        averages = [torch.zeros_like(weight) for weight in model.parameters() if weight.requires_grad for _ in range(2)]
        del loss, averages
        fits = True
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        fits = False
    model.train(was_training)
    model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits
