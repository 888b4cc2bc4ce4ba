"""BERT's activation, x times the normal distribution's share below x, with few operations in a compiled graph.

CUDA's erf takes more time than reading and writing the numbers. Formula 7.1.26 of Abramowitz and Stegun (1964) is within 1.5e-7 of
it, which neither bf16 nor fp16 can show, and shares its exponential with the derivative.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ERF_SLOPE = 0.3275911
ERF_FACTORS = (
    1.061405429,
    -1.453152027,
    1.421413741,
    -0.284496736,
    0.254829592,
)  # highest power first


class Gelu(nn.Module):
    """Takes the place of transformers' GELUActivation."""

    def __init__(self, stock: nn.Module):
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        """As F.gelu."""
        reduced = input.dtype in (torch.bfloat16, torch.float16)
        return _Gelu.apply(input) if reduced and torch.compiler.is_compiling() else F.gelu(input)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        share, _ = _normal(input.float(), torch.zeros_like(input, dtype=torch.float32))
        return (input.float() * share).to(input.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        # A zero of the gradient: what depends on it is computed here, and not kept by the forward pass, as the compiler would have it.
        share, density = _normal(input.float(), 0 * grad.float())
        return (grad.float() * (share + input.float() * density)).to(input.dtype)


def _normal(x: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """(share below x, density at x) of the normal distribution, float32; `zero` is where the sum begins."""
    bell = torch.exp(-0.5 * x * x)
    t = 1 / (1 + ERF_SLOPE * math.sqrt(0.5) * x.abs())
    polynomial = zero
    for factor in ERF_FACTORS:
        polynomial = (polynomial + factor) * t
    beyond = 0.5 * polynomial * bell  # the share beyond |x|
    return torch.where(x > 0, 1 - beyond, beyond), bell / math.sqrt(2 * math.pi)
