"""Dropout that is fast on CPU, where torch draws one number after the other: 13 % of a step of a small encoder."""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = {2: np.uint16, 4: np.uint32}  # by bytes of a number
SUMMANDS = (-0x61C88647, -0x7A143595)  # of the hash


class Dropout(nn.Dropout):
    """`nn.Dropout`. On CPU the random bits come from numpy, seeded by torch's generator; in a compiled graph, from a hash."""

    def __init__(self, stock: nn.Dropout):
        super().__init__(stock.p)

    def forward(self, input: Tensor) -> Tensor:
        """`input` with numbers set to 0 and the others scaled, so that the mean stays."""
        if not self.training or not 0 < self.p < 1:
            return F.dropout(input, self.p, self.training)
        if torch.compiler.is_compiling():
            return _Hashed.apply(input, self.p)
        if input.device.type == "cpu" and input.element_size() in BITS:
            return input * _factors(input, self.p)
        return F.dropout(input, self.p, self.training)


class _Hashed(torch.autograd.Function):
    """Dropout of a compiled graph: a hash of an element's index and two seeds decides whether it is kept.

    The backward pass recomputes the hash instead of reading a mask. It takes a quarter of the operations of torch's own generator, which
    needs more time than reading and writing the numbers."""

    @staticmethod
    def forward(ctx, input: Tensor, p: float) -> Tensor:
        seeds = torch.randint(-(1 << 31), (1 << 31) - 1, (2,), device=input.device, dtype=torch.int32)
        ctx.save_for_backward(seeds)
        ctx.p = p
        places = torch.arange(input.numel(), device=input.device, dtype=torch.int32)
        return drop_by_hash(input, places + seeds[0], seeds[1], p)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (seeds,) = ctx.saved_tensors
        places = torch.arange(grad.numel(), device=grad.device, dtype=torch.int32)
        # Operands swapped on purpose: otherwise the compiler sees the same expression and saves the mask.
        return drop_by_hash(grad, seeds[0] + places, seeds[1], ctx.p), None


def drop_by_hash(input: Tensor, bits: Tensor, seed: Tensor, p: float) -> Tensor:
    """`input` with the elements set to 0 whose `bits` (int32), mixed, are among the lowest share `p`; the others are scaled."""
    # Sums and products wrap around. No bitwise operations: the compiler would save their results instead of recomputing them.
    for shift, summand in ((16, SUMMANDS[0]), (15, seed), (16, SUMMANDS[1])):
        bits = bits * (bits + bits + 1) + summand
        bits = bits + (bits >> shift)
    threshold = min(round(p * (1 << 32)) - (1 << 31), (1 << 31) - 1)
    return torch.where(bits.view(input.shape) >= threshold, input, 0) * (1 / (1 - p))


def _factors(like: Tensor, p: float) -> Tensor:
    """0 or 1 / (1 - p) for each number of `like`, in its type: the share of zeros is moved by what rounding has done to the factor,
    0.0986 instead of 0.1 in bf16."""
    scale = torch.tensor(1 / (1 - p), dtype=like.dtype)
    kind = BITS[like.element_size()]
    pattern = scale.view(getattr(torch, kind.__name__)).numpy()
    random = np.random.Generator(np.random.SFC64(int(torch.randint(1 << 62, ()))))
    bits = random.integers(1 << 64, size=-(-like.numel() // 4), dtype=np.uint64).view(np.uint16)[:like.numel()]
    factors = (bits < round(65536 / float(scale))).astype(kind) * pattern
    return torch.from_numpy(factors).view(like.dtype).view(like.shape)
