"""LayerNorm whose statistics are in float32 and whose result is in the precision of autocast.

Autocast computes LayerNorm in float32 and leaves the result there. The residual stream would then be read and written in float32,
doubling the memory traffic that, after the matrix products, dominates a step on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Takes over the weights of a stock LayerNorm, under their names."""

    def __init__(self, stock: nn.LayerNorm):
        super().__init__(stock.normalized_shape, stock.eps)
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, input: Tensor) -> Tensor:
        """[..., width] in any precision -> [..., width], in that of autocast where it is on."""
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(input)
        # In float32 from here on: a CPU would add up the gradients of the weights in the precision of `input`.
        return super().forward(input.float()).to(torch.get_autocast_dtype(device))
