"""Optimizers, the schedule of the learning rate, and precision."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from pretrain.config import OptimizationOptions
from pretrain.errors import UserError
from pretrain.runtime.muon import Muon

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
READ_FOUND_INF = (torch.optim.Adam, torch.optim.AdamW, Muon)
WSD_DECAY_SHARE = 0.1  # of the run, at its end
# FLOP/s of dense matrices in bf16 or fp16, from datasheets; the longest name that fits counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def make_optimizers(model: nn.Module, options: OptimizationOptions) -> list[torch.optim.Optimizer]:
    """The optimizers of --optimizer. "adamw": AdamW for all; "muon": Muon for the encoder's
    matrices and AdamW for the rest (embeddings, norms, biases, heads).

    Decay is on matrices only, as in BERT. Any torch optimizer without a closure works here, and any
    number of them. A parameter group may have a "rate_scale", by which `train_step` multiplies the
    learning rate."""
    rate, decay = options.learning_rate, options.weight_decay
    matrices, rest = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_of_muon = options.optimizer == "muon" and ".encoder." in name and weight.ndim == 2
            (matrices if is_of_muon else rest).append(weight)
    groups = [
        {"params": [weight for weight in rest if weight.ndim >= 2], "weight_decay": decay},
        {"params": [weight for weight in rest if weight.ndim < 2], "weight_decay": 0.0},
    ]
    betas, epsilon = tuple(options.adam_betas), options.adam_epsilon
    optimizers = [torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)]
    if matrices:
        is_fast = choose_precision("auto", matrices[0].device) == "bf16"
        dtype = torch.bfloat16 if is_fast else torch.float32
        optimizers.append(Muon(matrices, rate, decay, dtype=dtype))
    return optimizers


def groups_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[dict]:
    """The parameter groups of all optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` if `finite` (bool scalar on the device), else nothing.

    Fused Adam and AdamW and our Muon read `found_inf` on the device; for any other optimizer the
    host waits here, once a step. Fused SGD reads it too, but a first step leaves garbage behind."""
    is_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
    if is_on_device and type(optimizer) in READ_FOUND_INF:
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif bool(finite):
        optimizer.step()


def check_state(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise some error if an optimizer cannot use the state that it was given: a skipped step,
    which changes nothing, shows that."""
    for optimizer in optimizers:
        weights = list(optimizer.state)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        if weights:
            step_if(torch.tensor(False, device=weights[0].device), optimizer)
        optimizer.zero_grad(set_to_none=True)


def make_schedule(
    schedule: str, peak: float, warmup: float, total_steps: int
) -> Callable[[int], float]:
    """Learning rate by update (1 is the first), a pure function; above 0 in every step of the run.

    `warmup` is a share of the run if below 1, else a number of steps."""
    warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    decay_steps = max(1, round(WSD_DECAY_SHARE * total_steps))

    def rate(step: int) -> float:
        if step <= warmup_steps:
            return peak * step / warmup_steps
        left = max(0, total_steps + 1 - step)  # 1 in the last step
        share = left / max(1, total_steps + 1 - max(1, warmup_steps))
        factors = {
            "linear": share,
            "cosine": 0.5 * (1 - math.cos(math.pi * share)),
            "constant": 1.0,
            "wsd": min(1.0, left / decay_steps),
        }
        return peak * factors[schedule]

    return rate


def choose_precision(precision: str, device: torch.device) -> str:
    """The precision for `precision`: "auto" becomes bf16 where the device multiplies it fast.

    UserError for a precision that the device cannot train in."""
    if device.type == "cuda":
        has_bf16, without = torch.cuda.get_device_capability(device) >= (8, 0), "fp16"
        name, missing = torch.cuda.get_device_name(device), "" if has_bf16 else "bf16"
    else:
        units = torch.cpu.get_capabilities()
        has_bf16, without = units.get("avx512_bf16") or units.get("amx_bf16"), "fp32"
        name, missing = "the CPU", "fp16"
    if precision == missing:
        others = [other for other in AUTOCAST if other != missing]
        raise UserError(f"{precision}: not supported by {name}; expected {' or '.join(others)}")
    if precision == "auto":
        return "bf16" if has_bf16 else without
    return precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context of a precision; a no-op for fp32."""
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of the device's matrix units: from the datasheet of a known GPU, else measured."""
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name)]
        if known:
            return PEAK_FLOPS[max(known, key=len)]
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=AUTOCAST[precision])
    timer = Timer("left @ left", globals={"left": left}, num_threads=torch.get_num_threads())
    return 2.0 * size**3 / min(timer.blocked_autorange(min_run_time=0.05).times)
