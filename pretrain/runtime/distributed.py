"""One path for one process and for many: with one, every helper is a no-op.

torchrun's environment variables are read only here."""

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
import platform
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.errors import UserError
from pretrain.signals import blocked, signal_on_parent_exit

TIMEOUT = timedelta(minutes=30)  # for a process that hangs; one that dies is noticed at once
PREPARATION_TIMEOUT = timedelta(days=1)  # the main process prepares text while the others wait
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
MAX_GRAPHS = 64  # by default torch stops compiling after 8
NEW_PORT = "port of this launch"  # key in torchrun's store


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:  # writes logs, checkpoints and messages
        return self.rank == 0


def start(device: str, alone: str = "") -> tuple[World, torch.device]:
    """(world, device) of this process, which joins the others if torchrun started it. `device` is
    auto, cpu, cuda or cuda:N. `alone` names work that must run in one process."""
    rank = int(os.environ.get("RANK", 0))
    world = World(rank, int(os.environ.get("WORLD_SIZE", 1)))
    if alone and world.size > 1:
        raise UserError(f"{device}: {alone} runs in one process; start it without torchrun")
    chosen = _choose_device(device, world)
    # oneDNN keeps a kernel for each shape of a product, some MB each: with its own limit of 1024,
    # predictions for rows of many lengths took over 3 GB, and no less time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if platform.libc_ver()[0] == "glibc":
        # Keep freed memory for the next tensors. glibc would give large blocks back to the kernel,
        # which clears their pages each time: a third of a training step on CPU.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    if world.size > 1 and not dist.is_initialized():
        signal_on_parent_exit(signal.SIGTERM)  # a killed torchrun must not leave processes behind
        arguments = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            arguments = {"store": _fresh_store(world), "rank": world.rank, "world_size": world.size}
        # Small messages go through gloo on the host, so none waits for a GPU; gradients, NCCL.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, **arguments)
    if not world.is_main:  # one process prints; errors still go to stderr
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    return world, chosen


def _choose_device(name: str, world: World) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", name):
        raise UserError(f"{name}: unknown; expected auto, cpu, cuda or cuda:N")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not num_gpus):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if world.size > 1:
        index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= num_gpus:
        found = f"torch {torch.__version__} sees {num_gpus} GPUs"
        raise UserError(f"{name}: {found}; expected a GPU and a CUDA build of torch, or cpu")
    return torch.device("cuda", index)


def _fresh_store(world: World) -> dist.TCPStore:
    """A store for this launch. torchrun's own outlives restarts, so processes could read addresses
    of dead ones there (pytorch #135712); it is used only to pass on the port of the new one."""
    host = os.environ["MASTER_ADDR"]
    torchrun_store = dist.TCPStore(host, int(os.environ["MASTER_PORT"]))
    if world.is_main:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        torchrun_store.set(NEW_PORT, str(store.port))
    while not world.is_main:
        port = int(torchrun_store.get(NEW_PORT))
        with contextlib.suppress(dist.DistError):  # the port of an earlier launch is closed
            store = dist.TCPStore(host, port, timeout=timedelta(seconds=3), wait_for_workers=False)
            break
    store.set_timeout(TIMEOUT)
    return store


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: Exception) -> bool:
    """Whether `error` means that another process died."""
    is_network = isinstance(error, dist.DistError) or re.search("gloo|Connection", str(error))
    return dist.is_initialized() and bool(is_network)


def all_reduce(tensor: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """`tensor`, on the CPU, reduced in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def sum_counts(counts: dict[str, float]) -> dict[str, float]:
    """`counts` summed over all processes, as denominators: infinity instead of 0, so that a term
    without any label in this step changes nothing."""
    sums = all_reduce(torch.tensor(list(counts.values()), dtype=torch.float64)).tolist()
    return {name: count or math.inf for name, count in zip(counts, sums)}


def max_over_ranks(number: int) -> int:
    """The largest `number` of all processes."""
    return int(all_reduce(torch.tensor(number), dist.ReduceOp.MAX))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any process."""
    return max_over_ranks(int(flag)) > 0


def wait_for_all() -> None:
    """Return once every process has called this."""
    max_over_ranks(0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block first; the others then find what it wrote to disk."""
    rank = dist.get_rank() if dist.is_initialized() else None  # None: alone
    if rank:
        dist.barrier(_patient_group())
    yield
    if rank == 0:  # not if the block failed, which ends the others, too
        dist.barrier(_patient_group())


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)


def gather(value: object) -> list:
    """`value` of every process, in rank order; tensors in it must be on the CPU."""
    values: list = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has only a part of the weights."""
    return any(hasattr(weight, "full_tensor") for weight in model.parameters())


def wrap(model: nn.Module, compiled: bool, has_fixed_shapes: bool = True) -> nn.Module:
    """`model`, compiled on request, in DDP if there are several processes and it is not sharded.
    Each phase gets a graph for its fixed shapes; torch's second graph would be dynamic and slow."""
    trained = model
    if compiled:
        _start_compilers()
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        trained = torch.compile(model, dynamic=False if has_fixed_shapes else None)
    if not dist.is_initialized() or is_sharded(model):
        return trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renamed broadcast_buffers
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(trained, **options)


def _start_compilers() -> None:
    """Start torch's compile workers with stop signals blocked. A signal to the whole group would
    end them, and the run would wait for them forever while it finishes its step."""
    if importlib.util.find_spec("triton") is None:  # a CPU build of torch has none
        return
    from torch._inductor.async_compile import AsyncCompile  # slow to import

    with blocked():
        AsyncCompile.warm_pool()


def gradient_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Context of a micro-batch: DDP sums gradients only in the last one of a step. Sharded
    gradients are summed every time, since no process has room for whole ones."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
