"""Which attention kernel is the fastest? One layer on a GPU over a packed micro-batch."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from pretrain.errors import first_line
from pretrain.model.attention import KERNELS, packed_varlen

HEADS, WIDTH = 12, 64  # of BERT-base
TOKENS, MAX_LENGTHS = 1 << 15, (128, 512)
SLOTS = 2  # sequences, including dummies, per full-length sequence of a filled micro-batch
SHORT_SHARE = 0.1  # of sequences that get a shorter target length, as in a run
TIMED_SECONDS = 0.2


def measure_attention(bench) -> Iterator[dict]:
    """Milliseconds (forward, forward and backward) and peak memory of each kernel at each length,
    or its error."""
    if bench.device_type == "cpu":
        yield {"needs": "a GPU, for variable-length kernels"}
        return
    rows, versions = [], {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    for max_length in MAX_LENGTHS:
        for kernel, layout, attend, inputs in _variants(max_length):
            row = {"max_length": max_length, "kernel": kernel, "layout": layout}
            try:
                row |= _measure(attend, inputs)
            except Exception as error:  # backends and compilers raise errors of any class
                row["error"] = first_line(error)
            rows.append(row)
            yield {"tokens": TOKENS, **versions, "rows": rows}


def _variants(max_length: int) -> Iterator[tuple[str, str, Callable[..., Tensor], list[Tensor]]]:
    """(kernel, layout, function, its inputs): packed, as our layers call it, then padded."""
    real = _draw_lengths(max_length)
    # As in a filled micro-batch: dummies cover the tail, empty ones follow.
    full, rest = divmod(TOKENS - sum(real), max_length)
    filled = [*real, *[max_length] * full, rest]
    filled += [0] * (SLOTS * TOKENS // max_length - len(filled))
    layouts = {"real sequences alone": real, "filled, as in a run": filled}
    for kernel in KERNELS:
        for layout, lengths in layouts.items():
            ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
            attend = partial(packed_varlen, cu_seqlens=ends, max_length=max_length, kernel=kernel)
            yield kernel, layout, attend, [_draw(sum(lengths), 3, HEADS, WIDTH)]
    is_real = torch.arange(max_length) < torch.tensor(real)[:, None]
    masks = {"padded, without mask": None, "padded, with mask": is_real[:, None, None].cuda()}
    for layout, mask in masks.items():
        attend = partial(F.scaled_dot_product_attention, attn_mask=mask)
        yield "sdpa", layout, attend, [_draw(len(real), HEADS, max_length, WIDTH) for _ in range(3)]


def _draw_lengths(max_length: int) -> list[int]:
    """Lengths of real sequences that fill a micro-batch, 0.85 of `max_length` on average."""
    generator, lengths = np.random.default_rng(0), []
    while True:
        lowest = 5 if generator.random() < SHORT_SHARE else int(0.8 * max_length)
        length = int(generator.integers(lowest, max_length + 1))
        if sum(lengths) + length > TOKENS:
            return lengths
        lengths.append(length)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def _measure(attend: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """Median milliseconds after a warm-up, and peak memory beyond the inputs."""
    with torch.no_grad():
        grad = torch.randn_like(attend(*inputs))
    scope = {"grad": torch.autograd.grad, "attend": attend, "inputs": inputs, "direction": grad}
    both = Timer("grad(attend(*inputs), inputs, direction)", globals=scope)
    both_ms = 1000 * both.blocked_autorange(min_run_time=TIMED_SECONDS).median
    with torch.no_grad():
        forward = Timer("attend(*inputs)", globals=scope)
        forward_ms = 1000 * forward.blocked_autorange(min_run_time=TIMED_SECONDS).median
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both.timeit(1)
    peak = torch.cuda.max_memory_allocated() - before
    return {"forward_ms": forward_ms, "forward_and_backward_ms": both_ms, "peak_mib": peak / 2**20}
