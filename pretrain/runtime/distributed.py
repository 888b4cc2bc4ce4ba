"""One path for 1 and N processes: torchrun's variables are read here alone, and at one process everything is a no-op."""
from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.command import UserError

PREPARATION = timedelta(days=1)  # the first process prepares the text while the others wait
M_TOP_PAD = -2  # of glibc's malloc.h; any value set by hand turns the growing threshold off


@dataclass(frozen=True)
class World:
    """Where this process stands among those that torchrun started."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, checkpoints and messages."""
        return self.rank == 0


def start(device: str, alone: str = "") -> tuple[World, torch.device]:
    """(world, device) of this process; `device` is auto, cpu, cuda or cuda:N. Joins the process group under torchrun; what runs
    `alone` is refused there."""
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if alone and size > 1:
        raise UserError(f"{size} processes: {alone} runs in one; needed is a start without torchrun")
    chosen = _choose_device(device, local_rank if size > 1 else None)
    _keep_memory_flat()
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PREPARATION)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    world = World(int(os.environ.get("RANK", 0)), size)
    if not world.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process speaks; errors still go to stderr
    return world, chosen


def _keep_memory_flat() -> None:
    """Stop glibc from raising the size up to which freed memory is kept: the tensors of packed batches differ in size from step
    to step, and the process grew from 1.1 to 1.8 GB within 120 steps. No-op elsewhere."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_TOP_PAD, 64 << 20)


def _choose_device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: unknown; needed is auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: is not supported; needed is cpu or cuda")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: this torch ({torch.__version__}) sees no CUDA GPU; needed is a GPU and a CUDA build of torch, "
                        "or --device cpu")
    index = local_rank if local_rank is not None else device.index or 0
    if index >= torch.cuda.device_count():
        raise UserError(f"--device cuda:{index}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device("cuda", index)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor` summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_counts(counts: dict[str, int], device: torch.device) -> dict[str, float | Tensor]:
    """`counts` summed over all processes, 1 for 0; at one process they stay on the host: no copy to the device to wait for."""
    if not dist.is_initialized():
        return {name: count or 1 for name, count in counts.items()}
    whole = sum_over_ranks(torch.tensor(list(counts.values()), dtype=torch.float32, device=device))
    return dict(zip(counts, torch.where(whole > 0, whole, 1.0)))


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any process."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=_device())) > 0) if dist.is_initialized() else flag


def wait_for_all() -> None:
    """Return once every process is here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first(world: World) -> Iterator[None]:
    """The first process does what is inside before the others do: they find on disk what it has written."""
    if not world.is_main:
        wait_for_all()
    try:
        yield
    finally:
        if world.is_main:
            wait_for_all()


def gather(value: object) -> list:
    """`value` of every process, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def wrap(model: nn.Module) -> nn.Module:
    """`model`, its gradients summed over the processes by DDP where there are several."""
    return DistributedDataParallel(model, broadcast_buffers=False) if dist.is_initialized() else model


def gradient_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Context of a micro-batch: gradients travel in the last one of a step only."""
    return contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
