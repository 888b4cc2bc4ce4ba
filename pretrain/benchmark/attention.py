"""A probe of attention on a GPU: one layer's kernel over a packed micro-batch, with the ways there are to lay it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.command import first_line
from pretrain.model.attention import KERNELS, packed_varlen

HEADS, WIDTH = 12, 64  # of BERT-base
REPEATS, WARM_UP = 30, 3
SLOTS = 5  # dummy and real sequences that a micro-batch may have for each one of full length
SHORT_SHARE = 0.1  # of the sequences aim at a shorter length, as in a run


def draw_lengths(tokens: int, max_length: int) -> list[int]:
    """Lengths of real sequences that fill a micro-batch, 0.85 of `max_length` in the mean."""
    source, lengths = np.random.default_rng(0), []
    while True:
        lowest = 5 if source.random() < SHORT_SHARE else int(0.8 * max_length)
        length = int(source.integers(lowest, max_length + 1))
        if sum(lengths) + length > tokens:
            return lengths
        lengths.append(length)


def layouts(tokens: int, max_length: int) -> dict[str, list[int]]:
    """Lengths of the sequences of a micro-batch, by the way in which its tail is covered."""
    real, slots = draw_lengths(tokens, max_length), SLOTS * tokens // max_length
    tail = tokens - sum(real)
    few = [max_length] * (tail // max_length) + [tail % max_length] * (tail % max_length > 0)
    free = slots - len(real)
    spread = (
        tail + tokens // max_length
    )  # today's micro-batch is longer, so that each dummy has a token
    ones = [spread // free + (number < spread % free) for number in range(free)]
    filled = real + few
    return {
        "real sequences alone": real,
        "few dummies": filled,
        f"few dummies, {slots // 2} sequences with empty ones": filled
        + [0] * (slots // 2 - len(filled)),
        f"few dummies, {slots} sequences with empty ones": filled + [0] * (slots - len(filled)),
        f"{slots} sequences, a token in each dummy": real + ones,
    }


def measure_attention(
    device: torch.device, max_lengths: list[int], tokens: int, note: Callable[[dict], None]
) -> None:
    """Milliseconds, forward and with backward, and peak MiB of both, of each variant at each length; an error in place of a variant
    that fails. `note` gets the rows as they grow."""
    found = {"torch": torch.__version__, "tokens": tokens, "rows": []}
    if device.type != "cuda":
        note(found | {"needs": "a GPU: there is no variable-length kernel elsewhere"})
        return
    found["cudnn"] = torch.backends.cudnn.version()
    for max_length in max_lengths:
        for labels, make in variants(device, tokens, max_length):
            row = {"max_length": max_length, **labels}
            try:
                row |= measure(*make())
            except Exception as error:  # of every kind: a backend may refuse, compilers and drivers raise their own
                row["error"] = first_line(error)
            found["rows"].append(row)
        note(found)


def variants(
    device: torch.device, tokens: int, max_length: int
) -> Iterator[tuple[dict, Callable[[], tuple]]]:
    """(labels, what makes function and inputs) of each variant; the likely default first."""
    for kernel in KERNELS:
        for layout, lengths in layouts(tokens, max_length).items():
            labels = {"kernel": kernel, "layout": layout}
            yield labels, partial(packed, device, lengths, max_length, kernel)
    real = draw_lengths(tokens, max_length)
    for has_mask in (False, True):
        labels = {
            "kernel": "scaled_dot_product_attention",
            "layout": f"padded, {'with' if has_mask else 'without'} mask",
        }
        yield labels, partial(padded, device, real, max_length, has_mask)


def packed(device: torch.device, lengths: list[int], max_length: int, kernel: str) -> tuple:
    """(function, inputs) of a packed micro-batch, as our layers call it."""
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    qkv = random((sum(lengths), 3, HEADS, WIDTH), device)  # [T, 3, H, D]
    return lambda given: packed_varlen(given, offsets, max_length, kernel), [qkv]


def padded(device: torch.device, lengths: list[int], max_length: int, has_mask: bool) -> tuple:
    """(function, inputs) of the reference: a batch of padded sequences."""
    inputs = [random((len(lengths), HEADS, max_length, WIDTH), device) for _ in range(3)]
    mask = None
    if has_mask:
        mask = (torch.arange(max_length) < torch.tensor(lengths)[:, None])[:, None, None].to(device)
    return lambda *given: F.scaled_dot_product_attention(*given, attn_mask=mask), inputs


def random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A bf16 leaf."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()


def measure(attend: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """Medians in milliseconds, and peak memory of forward and backward beyond the inputs."""
    with torch.no_grad():
        grad = torch.randn_like(attend(*inputs))

    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)

    def both() -> None:
        torch.autograd.grad(attend(*inputs), inputs, grad)

    forward_ms, both_ms = milliseconds(forward), milliseconds(both)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    return {"forward_ms": forward_ms, "forward_and_backward_ms": both_ms, "peak_mib": peak / 2**20}


def milliseconds(call: Callable[[], None]) -> float:
    """Median of a few calls on the GPU, after some that warm up."""
    times = []
    for number in range(WARM_UP + REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        if number >= WARM_UP:
            times.append((begin, end))
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in times)
