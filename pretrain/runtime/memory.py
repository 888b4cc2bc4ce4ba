"""Failures that a run cannot fix, as one-line errors, and a trial of its largest micro-batch."""

import contextlib
import gc
import time
from collections.abc import Iterator

import torch
from torch import nn

from pretrain.batch import Batch
from pretrain.errors import UserError, first_line
from pretrain.runtime.distributed import is_lost_peer, is_sharded

MAX_TRIAL_SECONDS = 2.0  # a slower first pass on a CPU is not repeated
FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # of the host, CUDA, cuBLAS


@contextlib.contextmanager
def explained(micro_batch: str = "micro-batch", workers: str = "workers") -> Iterator[None]:
    """Turn full memory, a lost worker and a lost process into a UserError. The arguments name what
    the user can lower, as an option with its value."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason, text = first_line(error), str(error)
        if is_full(error):
            advice = "start a new run with a smaller one, or turn on gradient checkpointing"
            problem = f"{micro_batch}: memory is full ({reason}); {advice}"
        # A worker hung or died; a signal handler reports that at any line. Errors raised in a
        # worker say "Caught".
        elif "DataLoader" in text and "Caught " not in text:
            resources = "more free memory or open files (ulimit -n), a writable /dev/shm"
            expected = f"{resources}, or {workers} 0"
            problem = f"{workers}: {reason}; expected {expected}"
        elif is_lost_peer(error):
            problem = f"another process of this run died ({reason}); resume the run"
        else:
            raise
        raise UserError(f"{problem}. Saved checkpoints are intact") from error


def is_full(error: BaseException) -> bool:
    """Whether `error` means that memory is full; torch has no error class for host memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)


def trial_seconds(model: nn.Module, batch: Batch, context: torch.autocast) -> float | None:
    """Seconds for forward and backward of `batch`; None if they do not fit in memory next to
    gradients and two optimizer states per weight, as in AdamW: what a step needs from its second
    micro-batch on."""
    was_training, seconds = model.training, None
    try:
        model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        states = [torch.zeros_like(weight) for weight in weights * 2]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        # Twice: the first pass is slow, and what cuBLAS allocates in it stays allocated.
        for _ in range(2):
            begin = time.perf_counter()
            with context:
                loss = sum(loss.sum for loss in model(batch).values())
            loss.backward()
            loss.item()  # waits for a GPU
            duration = time.perf_counter() - begin
            if duration > MAX_TRIAL_SECONDS and not loss.is_cuda and not is_sharded(model):
                break
        seconds = duration
        del loss, states
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
    model.train(was_training)
    model.zero_grad(set_to_none=True)
    gc.collect()  # an error may keep tensors alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return seconds
