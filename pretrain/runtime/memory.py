"""Failures that a run cannot fix, as one-line errors, and a trial of its largest step."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import nn

from pretrain.batch import Batch
from pretrain.errors import UserError, first_line
from pretrain.runtime.distributed import is_lost_peer

FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # of the host, CUDA, cuBLAS


@contextlib.contextmanager
def explained(micro_batch: str = "micro-batch", workers: str = "workers") -> Iterator[None]:
    """Turn full memory, a lost worker and a lost process into a UserError.

    The arguments name what the user can lower, as an option and its value."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        advice = _advice(error, micro_batch, workers)
        if advice is None:
            raise
        raise UserError(f"{advice}. Saved checkpoints are intact") from error


def _advice(error: Exception, micro_batch: str, workers: str) -> str | None:
    reason = first_line(error)
    if is_full(error):
        return (
            f"{micro_batch}: memory is full ({reason}); start a new run with a smaller one, or "
            "turn on gradient checkpointing"
        )
    # A worker that hangs, or died: a signal handler reports that wherever the process is. Not an
    # error raised in a worker.
    if "DataLoader" in str(error) and "Caught " not in str(error):
        return f"{workers}: {reason}; free memory, open more files (ulimit -n) or use fewer workers"
    if is_lost_peer(error):
        return f"another process of this run is gone ({reason}); resume the run"
    return None


def is_full(error: BaseException) -> bool:
    """Whether `error` means that memory is full; torch has no class for that of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)


def micro_batch_fits(model: nn.Module, batch: Batch, context: torch.autocast) -> bool:
    """Whether the memory holds what a step needs at once, from its second micro-batch on: `batch`
    forward and backward beside gradients and two optimizer states a weight.

    AdamW has two, Muon one, so for that this asks for a little more. Nothing stays."""
    was_training = model.training
    fits = True
    try:
        model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        states = [torch.zeros_like(weight) for weight in weights for _ in range(2)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        # Twice on a GPU: what cuBLAS allocates in the first backward pass stays allocated.
        for _ in range(2 if weights[0].device.type == "cuda" else 1):
            with context:
                loss = sum(loss.sum for loss in model(batch).values())
            loss.backward()
        del loss, states
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        fits = False
    model.train(was_training)
    model.zero_grad(set_to_none=True)
    if not fits:  # frees what the error kept alive
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits
