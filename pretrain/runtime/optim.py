"""Optimizers, the schedule of the learning rate, and precision."""

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pretrain.config import OptimizationOptions
from pretrain.errors import UserError
from pretrain.runtime.muon import Muon

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
READ_FOUND_INF = (torch.optim.Adam, torch.optim.AdamW, Muon)
MEASURED_SECONDS = 0.05  # of all calls together, at least; the fastest one counts
WSD_DECAY_SHARE = 0.1  # of the run, at its end
# TFLOP/s of dense matrices in bf16 or fp16, from datasheets; the longest matching name counts.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A10": 125, "A40": 149.7}
PEAK_TFLOPS |= {"L40S": 362, "L4": 121, "V100": 125, "T4": 65, "RTX 4090": 165.2, "RTX 3090": 71}


def make_optimizers(model: nn.Module, options: OptimizationOptions) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the encoder's matrices and AdamW for the rest. Only matrices decay, as in
    BERT. Any torch optimizers without a closure work here. `train_step` multiplies the learning
    rate of a group by its "rate_scale", if it has one."""
    rate, decay = options.learning_rate, options.weight_decay
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = defaultdict(list)  # of the encoder, by how many are stacked in one weight
    if options.optimizer == "muon":
        of_layers = set(model.layers.parameters())
        names = [name for name in trained if trained[name] in of_layers and trained[name].ndim == 2]
        for name in names:
            # Queries, keys and values are separate maps, and separate weights in BERT. Stacked in
            # one weight (ModernBERT's Wqkv), they would share the singular values of one update.
            stacked = [count for end, count in model.stacked.items() if name.endswith(end)]
            matrices[max(stacked, default=1)].append(trained.pop(name))
    tables = [weight for weight in trained.values() if weight.ndim >= 2]
    others = [weight for weight in trained.values() if weight.ndim < 2]
    groups = [{"params": tables, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    betas, epsilon = tuple(options.adam_betas), options.adam_epsilon
    optimizers = [torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)]
    if matrices:
        stacks = [{"params": weights, "stacked": count} for count, weights in matrices.items()]
        is_fast = choose_precision("auto", model.device) == "bf16"
        dtype = torch.bfloat16 if is_fast else torch.float32
        optimizers.append(Muon(stacks, rate, decay, dtype=dtype))
    return optimizers


def groups_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[dict]:
    """The parameter groups of all optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` if `finite` (bool scalar on the device), else nothing. Fused Adam and
    AdamW and our Muon read `found_inf` on the device. For others the host waits here once per step,
    also for fused SGD, where a skipped first step leaves garbage behind."""
    is_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
    if is_on_device and type(optimizer) in READ_FOUND_INF:
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif bool(finite):
        optimizer.step()


def check_state(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise an error if an optimizer cannot use its loaded state: take a step without effect. One
    that does not skip steps on the device is not checked."""
    for optimizer in optimizers:
        for weight in optimizer.state:
            weight.grad = torch.zeros_like(weight)
        if optimizer.state:
            step_if(torch.tensor(False, device=weight.device), optimizer)
        optimizer.zero_grad(set_to_none=True)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of the warm-up, which is a share of the run if below 1, else a number of steps."""
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def make_schedule(
    schedule: str, peak: float, warmup: float, total_steps: int
) -> Callable[[int], float]:
    """The learning rate by update (1 is the first), above 0 in every step of the run."""
    num_warmup = warmup_steps(warmup, total_steps)
    decay_steps = max(1, round(WSD_DECAY_SHARE * total_steps))

    def rate(step: int) -> float:
        if step <= num_warmup:
            return peak * step / num_warmup
        left = max(0, total_steps + 1 - step)  # 1 in the last step
        share = left / max(1, total_steps + 1 - max(1, num_warmup))
        factors = {
            "linear": share,
            "cosine": 0.5 * (1 - math.cos(math.pi * share)),
            "constant": 1.0,
            "wsd": min(1.0, left / decay_steps),
        }
        return peak * factors[schedule]

    rate(total_steps + 1)  # an unknown name fails here, not after the warm-up
    return rate


def choose_precision(precision: str, device: torch.device) -> str:
    """`precision`, or for "auto" bf16 where the device is fast at it. UserError for a precision
    that the device cannot train in."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        fitting = ["bf16", "fp16", "fp32"] if has_bf16 else ["fp16", "fp32"]
    else:
        name, units = "the CPU", torch.cpu.get_capabilities()
        is_fast = units.get("avx512_bf16") or units.get("amx_bf16")
        fitting = ["bf16", "fp32"] if is_fast else ["fp32", "bf16"]
    if precision == "auto":
        return fitting[0]
    if precision not in fitting:
        raise UserError(f"{precision}: not supported by {name}; expected {' or '.join(fitting)}")
    return precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision; a no-op for fp32."""
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")


def overflow_advice(precision: str) -> str:
    """What was expected if a model with finite weights has outputs that are not finite."""
    return "another model" if precision == "fp32" else "fp32, or another model"


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of the device's matrix units: from the datasheet of a known GPU, else measured."""
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
        if known:
            return PEAK_TFLOPS[max(known, key=len)] * 1e12
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=AUTOCAST[precision])
    return 2.0 * size**3 / best_seconds(lambda: left @ left, device)


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The time of the fastest of several calls of `work`, including the wait for the device.

    torch's Timer is not used: its import warns if nvcc is installed and there is no GPU."""
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < MEASURED_SECONDS:
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
