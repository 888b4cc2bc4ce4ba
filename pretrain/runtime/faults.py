"""Faults that a run cannot mend, told in a line: memory that is full, a process that is gone. And a trial of what needs most
memory, before the first step."""
from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import nn

from pretrain.batch import PackedBatch
from pretrain.command import UserError, first_line
from pretrain.runtime.distributed import is_lost_peer

FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # of the host, CUDA, cuBLAS


@contextlib.contextmanager
def explained(micro_batch_size: int) -> Iterator[None]:
    """Faults inside become a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_full(error):
            raise UserError(f"--micro-batch-size {micro_batch_size}: memory is full ({first_line(error)}); needed is a smaller one, in a "
                            "new run, or --gradient-checkpointing; checkpoints are whole") from error
        # A worker that is stuck; or dead, which a signal handler reports, wherever the process is. Not an error raised in one.
        if "DataLoader" in str(error) and "Caught " not in str(error):
            raise UserError(f"--workers: {first_line(error)}; needed is more memory, more open files (ulimit -n), or fewer "
                            "workers; checkpoints are whole") from error
        if is_lost_peer(error):
            raise UserError(f"another process of this run has gone ({first_line(error)}); --resume goes on from the newest checkpoint"
                            ) from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether `error` tells that memory is full; torch has no class of its own for that of the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in FULL))


def micro_batch_fits(model: nn.Module, batch: PackedBatch, context: torch.autocast) -> bool:
    """Run `batch` forward and backward beside gradients and the optimizer's two averages, and discard it all: what a step needs at
    once, from its second micro-batch on."""
    was_training = model.training
    try:
        model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        averages = [torch.zeros_like(weight) for weight in weights for _ in range(2)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        # Twice: what cuBLAS allocates in the first backward pass is there in every forward pass after it.
        for _ in range(2):
            with context:
                loss = sum(model(batch).loss_sums.values())
            loss.backward()
            if next(model.parameters()).device.type == "cpu":
                break
        del loss, averages
        fits = True
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        fits = False
    model.train(was_training)
    model.zero_grad(set_to_none=True)
    if not fits:  # what the error has kept alive
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits
