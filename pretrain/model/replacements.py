"""Faster versions of stock modules, with the same results.

Besides matrix products, a GPU mostly reads and writes hidden states. In a compiled graph, dropout
and GELU here only add cheap arithmetic, which the backward pass repeats.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from pretrain.model.cpu_kernels import DROPOUT_BITS, dropout_factors

MIN_INT, MAX_INT = -(1 << 31), (1 << 31) - 1  # int32
HASH_SUMMANDS = (-0x61C88647, -0x7A143595)
ERF_SLOPE = 0.3275911
ERF_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
ALIGNMENT = 64  # scores; a GPU's products are fast at multiples of this


class Dropout(nn.Dropout):
    """Fast dropout; on CPU, torch's takes 13% of a step of a small encoder."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` with a share p of zeros; the others are scaled up."""
        if self.training and 0 < self.p < 1:
            if torch.compiler.is_compiling():
                return _HashedDropout.apply(input, self.p)
            if input.device.type == "cpu" and input.element_size() in DROPOUT_BITS:
                return input * dropout_factors(input, self.p)
        return F.dropout(input, self.p, self.training)


class _HashedDropout(torch.autograd.Function):
    """Dropout by a hash of an element's index and two seeds. The backward pass repeats the hash
    instead of reading a mask. The hash takes a quarter of the operations of torch's generator,
    which is slower than reading and writing the tensor."""

    @staticmethod
    def forward(ctx, input: Tensor, p: float) -> Tensor:
        seeds = torch.randint(MIN_INT, MAX_INT, (2,), device=input.device, dtype=torch.int32)
        ctx.save_for_backward(seeds)
        ctx.p = p
        places = torch.arange(input.numel(), device=input.device, dtype=torch.int32)
        return drop_by_hash(input, places + seeds[0], seeds[1], p)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (seeds,) = ctx.saved_tensors
        places = torch.arange(grad.numel(), device=grad.device, dtype=torch.int32)
        # Operands swapped on purpose: given the same expression, the compiler saves the mask.
        return drop_by_hash(grad, seeds[0] + places, seeds[1], ctx.p), None


def drop_by_hash(input: Tensor, bits: Tensor, seed: Tensor, p: float) -> Tensor:
    """`input` scaled up, with zeros where the hash of `bits` (int32) is in the lowest share p."""
    # Sums and products wrap around. The compiler would save the results of bitwise operations.
    for shift, summand in ((16, HASH_SUMMANDS[0]), (15, seed), (16, HASH_SUMMANDS[1])):
        bits = bits * (bits + bits + 1) + summand
        bits = bits + (bits >> shift)
    threshold = min(round(p * (1 << 32)) + MIN_INT, MAX_INT)
    return torch.where(bits.view(input.shape) >= threshold, input, 0) * (1 / (1 - p))


class Gelu(GELUActivation):
    """x times the standard normal CDF, by formula 7.1.26 of Abramowitz and Stegun (1964). It is
    accurate to 1.5e-7 and shares its exponential with the derivative. CUDA's erf is slower than
    reading and writing x."""

    def forward(self, input: Tensor) -> Tensor:
        """Same as F.gelu."""
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
        # This zero depends on the gradient, so the compiler recomputes the polynomial.
        cdf, pdf = _cdf_and_pdf(input.float(), 0 * grad.float())
        return (grad.float() * (cdf + input.float() * pdf)).to(input.dtype)


def _cdf_and_pdf(x: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """CDF and PDF of the standard normal distribution, float32; the polynomial starts at `zero`."""
    bell = torch.exp(-0.5 * x * x)
    t = 1 / (1 + ERF_SLOPE * math.sqrt(0.5) * x.abs())
    polynomial = zero
    for coefficient in ERF_COEFFICIENTS:  # of the highest power first
        polynomial = (polynomial + coefficient) * t
    tail = 0.5 * polynomial * bell  # the probability beyond |x|
    return torch.where(x > 0, 1 - tail, tail), bell / math.sqrt(2 * math.pi)


class LayerNorm(nn.LayerNorm):
    """Computes statistics in float32 and returns the precision of autocast. Stock autocast returns
    float32, so that hidden states take twice the memory traffic."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., width] in any precision -> [..., width]; without autocast, same as stock."""
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(input)
        # From float32: a CPU would sum the gradients of the weights in the precision of `input`.
        return super().forward(input.float()).to(torch.get_autocast_dtype(device))


def aligned_linear(hidden: Tensor, linear: nn.Linear, multiple: int = ALIGNMENT) -> Tensor:
    """[M, width] -> [M, classes]: `linear`, as a view whose rows begin at multiples of `multiple`.
    Few vocabularies have such a size, and a GPU takes three times as long for rows that do not
    begin at multiples of 16 bytes."""
    missing = -linear.out_features % multiple
    weight = linear.weight.to(hidden.dtype)  # as autocast would, but before the copy
    bias = linear.bias
    if bias is not None:
        bias = F.pad(bias.to(hidden.dtype), (0, missing))
    scores = F.linear(hidden, F.pad(weight, (0, 0, 0, missing)), bias)
    return scores[:, : linear.out_features]


# A stock module becomes its subclass, and keeps its weights.
REPLACEMENTS = {nn.Dropout: Dropout, nn.LayerNorm: LayerNorm, GELUActivation: Gelu}
