"""GELU, x times the standard normal CDF, with few operations in a compiled graph.

CUDA's erf takes more time than reading and writing the numbers. Formula 7.1.26 of Abramowitz and Stegun (1964), with an absolute
error of 1.5e-7, shares its exponential with the derivative.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ERF_SLOPE = 0.3275911
# Highest power first.
ERF_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


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
        cdf, _ = _cdf_and_pdf(input.float(), torch.zeros_like(input, dtype=torch.float32))
        return (input.float() * cdf).to(input.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        # This zero depends on the gradient, so the compiler recomputes the polynomial instead of saving it.
        cdf, pdf = _cdf_and_pdf(input.float(), 0 * grad.float())
        return (grad.float() * (cdf + input.float() * pdf)).to(input.dtype)


def _cdf_and_pdf(x: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """CDF and PDF of the standard normal distribution at x, float32; the polynomial starts from `zero`."""
    bell = torch.exp(-0.5 * x * x)
    t = 1 / (1 + ERF_SLOPE * math.sqrt(0.5) * x.abs())
    polynomial = zero
    for coefficient in ERF_COEFFICIENTS:
        polynomial = (polynomial + coefficient) * t
    tail = 0.5 * polynomial * bell  # the probability beyond |x|
    return torch.where(x > 0, 1 - tail, tail), bell / math.sqrt(2 * math.pi)
