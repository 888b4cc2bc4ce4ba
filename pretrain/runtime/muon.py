"""Muon (Jordan et al. 2024): momentum SGD with an orthogonalized update of each matrix.

The update of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, but it handles matrices of one
shape together, supports sharded weights and skips non-finite steps without a host wait.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretrain.runtime.sharding import part_like, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration
ITERATIONS = 5
EPSILON = 1e-7
ADAMW_RMS = 0.2  # of an update, so that one learning rate serves both (arXiv 2502.16982)
MAX_ELEMENTS = 1 << 26  # of the matrices handled together; bounds the memory


class Muon(torch.optim.Optimizer):
    """For matrices [rows, columns], orthogonalized in `dtype`; decay is decoupled, as in AdamW. If
    the caller sets `found_inf` (float scalar) to 1, a step changes nothing. A weight of a group
    with "stacked" is that many matrices, one above the other."""

    _step_supports_amp_scaling = True  # as in torch's fused optimizers: reads found_inf
    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable, lr: float, weight_decay=0.0, momentum=0.95, dtype=torch.bfloat16
    ):
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, settings | {"stacked": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update; weights without a gradient stay as they are."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                count = max(1, MAX_ELEMENTS // shape.numel())
                for start in range(0, len(weights), count):
                    self._update(weights[start : start + count], group)

    def _update(self, weights: list[nn.Parameter], group: dict) -> None:
        found_inf = torch.zeros((), device=weights[0].device)
        is_finite = (found_inf if self.found_inf is None else self.found_inf) == 0
        directions = []
        for weight in weights:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            buffer = state["momentum_buffer"]
            gradient = torch.where(is_finite, weight.grad, buffer)  # leaves the buffer unchanged
            buffer.lerp_(gradient, 1 - group["momentum"])
            directions.append(whole(gradient.lerp(buffer, group["momentum"])))  # Nesterov
        together = torch.stack(directions).to(self.dtype)  # [weights, rows, columns]
        matrices = together.flatten(0, 1).unflatten(0, (len(weights) * group["stacked"], -1))
        rate = is_finite * group["lr"]
        scale = rate * ADAMW_RMS * math.sqrt(max(matrices.shape[1:]))
        updates = orthogonalized(matrices).reshape(together.shape).float() * scale
        for weight, update in zip(weights, updates):
            weight.mul_(1 - rate * group["weight_decay"])
            weight.sub_(part_like(weight, update))


def orthogonalized(matrices: Tensor) -> Tensor:
    """[count, rows, columns] -> for each, about U V' of its singular value decomposition U S V'.
    Newton-Schulz steps x <- a x + (b x x' + c (x x')^2) x bring S between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x.mT if is_tall else x
