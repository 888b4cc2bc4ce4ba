"""Optimizer, schedule, precision, and the watch over steps that are not finite."""
from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from pretrain.command import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_SKIPPED_IN_A_ROW = 20
WSD_DECAY_SHARE = 0.1  # of the run, at its end
# Dense matrix rates in bf16 or fp16 without sparsity, FLOP/s, from NVIDIA's datasheets; the longest name that fits is used.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10": 125e12, "A40": 149.7e12, "L40S": 362e12,
              "L4": 121e12, "V100": 125e12, "T4": 65e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12}


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float, betas: list[float],
                   epsilon: float) -> torch.optim.AdamW:
    """Fused AdamW; decay on matrices only, as in BERT: LayerNorm weights and biases have none."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": weight_decay},
              {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=tuple(betas), eps=epsilon, fused=True)


def make_schedule(schedule: str, peak: float, warmup: float, total_steps: int) -> Callable[[int], float]:
    """Learning rate of update `step` (1 is the first), a pure function; above 0 for every step of the run.

    `warmup` is a share of the run if below 1, else steps."""
    warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    decay_steps = max(1, round(WSD_DECAY_SHARE * total_steps))

    def rate(step: int) -> float:
        if step <= warmup_steps:
            return peak * step / warmup_steps
        left = max(0, total_steps + 1 - step)  # 1 in the last step
        share = left / max(1, total_steps + 1 - max(1, warmup_steps))
        return peak * {"linear": share, "cosine": 0.5 * (1 - math.cos(math.pi * share)), "constant": 1.0,
                       "wsd": min(1.0, left / decay_steps)}[schedule]

    return rate


def choose_precision(precision: str, device: torch.device) -> str:
    """"bf16", "fp16" or "fp32" for --precision; auto takes bf16 where the device multiplies it fast. UserError for what the
    device cannot do."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if precision == "bf16" and not has_bf16:
            raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} does not compute it; needed is fp16 or fp32")
        return precision if precision != "auto" else "bf16" if has_bf16 else "fp16"
    if precision == "fp16":
        raise UserError("--precision fp16: the CPU has no fp16 training; needed is bf16 or fp32")
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return precision if precision != "auto" else "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context of a precision; a no-op for fp32."""
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that the device's matrix units can do: from the datasheet of a known GPU, else measured in a moment."""
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name)]
        if known:
            return PEAK_FLOPS[max(known, key=len)]
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=AUTOCAST[precision])
    timer = Timer("left @ left", globals={"left": left}, num_threads=torch.get_num_threads())
    return 2.0 * size**3 / min(timer.blocked_autorange(min_run_time=0.05).times)


class FiniteWatch:
    """Reads the finite flag of a step one step later, when the device has long computed it, so that nothing waits.

    The optimizer has already passed over the step; here it is counted and told, and a run that only skips is stopped.
    `rebuild` gives a command that rebuilds the data of a step, from what `observe` was told of it and the step."""

    def __init__(self, skipped: int = 0, in_a_row: int = 0, rebuild: Callable[[object, int], str] | None = None):
        self.skipped, self.in_a_row, self.rebuild = skipped, in_a_row, rebuild
        self._pending: tuple[Callable[[], bool], int, object] | None = None
        self._scale = math.inf

    def observe(self, finite: Tensor | None, step: int = 0, data: object = None) -> str | None:
        """Remember the flag (bool scalar) of this step; a message about the previous one if it was not finite."""
        pending, self._pending = self._pending, None if finite is None else (_on_its_way(finite), step, data)
        if pending is None or pending[0]():
            self.in_a_row = 0 if pending else self.in_a_row
            return None
        _, step, data = pending
        self.skipped += 1
        self.in_a_row += 1
        where = f"at step {step}" + (f", data position {data}" if data is not None else "")
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            way = self.rebuild and f". Its data: {self.rebuild(data, step)}"
            raise UserError(f"the gradients of {self.in_a_row} steps in a row were not finite, last {where}; the weights are those before "
                            f"them. A new run with a lower --learning-rate, or --precision fp32, may help{way or ''}")
        return f"gradients not finite {where}: the step changed nothing"

    def observe_scale(self, scaler: torch.amp.GradScaler) -> str | None:
        """A message where the scale of fp16 gradients has fallen below 1, once each time; waits for the device."""
        before, self._scale = self._scale, scaler.get_scale()
        if not self._scale < 1 <= before:
            return None
        return (f"the scale of the fp16 gradients has fallen to {self._scale:g}: they overflow without it, and vanish; --precision bf16 or "
                "fp32, or a lower --learning-rate, may help")


def _on_its_way(flag: Tensor) -> Callable[[], bool]:
    """What reads `flag` later: from a GPU it is copied now, so that reading waits for what came before it alone."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copy, done = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()
    return lambda: done.synchronize() or bool(copy)
