"""One path for one process and for many: with one, every helper is a no-op. torchrun's variables
are read here and nowhere else."""

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
from pretrain.signals import STOP_SIGNALS, signal_at_parents_end

SILENCE = timedelta(minutes=30)  # then a process counts as lost; one that dies is noticed at once
PREPARATION = timedelta(days=1)  # the main process prepares the text while the others wait
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
MAX_GRAPHS = 64  # torch stops compiling after 8
NEW_PORT = "port of this start"  # key in torchrun's store


@dataclass(frozen=True)
class World:
    """The place of this process among those that torchrun started."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:  # it writes logs, checkpoints and messages
        return self.rank == 0


def start(device: str, alone: str = "") -> tuple[World, torch.device]:
    """(world, device) of this process, which joins the others if torchrun started it. `device` is
    auto, cpu, cuda or cuda:N. `alone` names work that one process must do."""
    world = World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if alone and world.size > 1:
        raise UserError(f"{device}: {alone} runs in one process; start it without torchrun")
    chosen = _choose_device(device, world)
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
        signal_at_parents_end(signal.SIGTERM)  # a killed torchrun must not leave processes behind
        meeting = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            meeting = {"store": _fresh_store(world), "rank": world.rank, "world_size": world.size}
        # Agreements are made on the host, by gloo: none waits for a GPU. NCCL moves gradients.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=SILENCE, **meeting)
    if not world.is_main:  # one process prints; errors still go to stderr
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
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
    """Where the processes of this start meet. torchrun's store outlives its restarts, and some
    would read the addresses of dead processes (pytorch #135712): it only holds the new port."""
    host = os.environ["MASTER_ADDR"]
    torchruns = dist.TCPStore(host, int(os.environ["MASTER_PORT"]))
    if world.is_main:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        torchruns.set(NEW_PORT, str(store.port))
    while not world.is_main:
        port = int(torchruns.get(NEW_PORT))
        with contextlib.suppress(dist.DistError):  # nobody listens at the port of an earlier start
            store = dist.TCPStore(host, port, timeout=timedelta(seconds=3), wait_for_workers=False)
            break
    store.set_timeout(SILENCE)
    return store


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: Exception) -> bool:
    """Whether `error` means that another process is gone."""
    is_of_network = isinstance(error, dist.DistError) or re.search("gloo|Connection", str(error))
    return dist.is_initialized() and bool(is_of_network)


def all_reduce(tensor: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """`tensor`, on the CPU, summed (or another operation) over all processes in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def sum_counts(counts: dict[str, float]) -> dict[str, float]:
    """`counts` summed over all processes; infinity instead of 0: what is divided by it, a term
    without any label in this step, changes nothing."""
    sums = all_reduce(torch.tensor(list(counts.values()), dtype=torch.float64)).tolist()
    return {name: count or math.inf for name, count in zip(counts, sums)}


def max_over_ranks(number: int) -> int:
    """The largest `number` of all processes."""
    return int(all_reduce(torch.tensor(number), dist.ReduceOp.MAX))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any process."""
    return max_over_ranks(int(flag)) > 0


def wait_for_all() -> None:
    """Return once every process is here."""
    max_over_ranks(0)


@contextlib.contextmanager
def main_first(world: World) -> Iterator[None]:
    """The main process runs the block first: the others find what it wrote to disk."""
    if not world.is_main:
        dist.barrier(_patient_group())
    yield
    if world.is_main and world.size > 1:  # not if the block failed: that ends the others, too
        dist.barrier(_patient_group())


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PREPARATION)


def gather(value: object) -> list:
    """`value` of every process in rank order; tensors in it are on the CPU."""
    values: list = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has only a part of the weights."""
    return any(hasattr(weight, "full_tensor") for weight in model.parameters())


def wrap(model: nn.Module, compiled: bool, has_fixed_shapes: bool = True) -> nn.Module:
    """`model`, compiled if asked, in DDP if there are several processes and each has all weights.
    Each phase gets a graph of its own fixed shapes; torch would make the second one for any shape,
    slower for all."""
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
    """Start torch's compile workers with stop signals blocked: one to the whole group would end
    them, and the run, which finishes its step, would wait for them forever."""
    if importlib.util.find_spec("triton") is None:  # a CPU build of torch has none
        return
    from torch._inductor.async_compile import AsyncCompile  # takes a second

    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit this
    AsyncCompile.warm_pool()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def gradient_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Context of a micro-batch: DDP sums gradients in the last one of a step only. Sharded ones
    travel each time, since no process has room for whole ones."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
