"""One path for 1 and N processes: torchrun's variables are read here alone, and at one process everything is a no-op."""
from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
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

from pretrain.command import STOP_SIGNALS, UserError, signal_at_parents_end

SILENCE = timedelta(minutes=30)  # after which a process is taken for lost; one that dies is noticed at once
PREPARATION = timedelta(days=1)  # the first process prepares the text while the others wait
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
MAX_GRAPHS = 64
NEW_PORT = "port of this start"  # key in torchrun's store


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
    _keep_freed_memory()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    if size > 1 and not dist.is_initialized():
        # What processes agree on is on the host, by gloo, so that no agreement waits for a GPU; NCCL moves gradients and weights.
        signal_at_parents_end(signal.SIGTERM)  # where torchrun is killed its processes would go on alone
        meeting = {"store": _fresh_store(), "rank": int(os.environ["RANK"]), "world_size": size} if os.environ.get(
            "TORCHELASTIC_USE_AGENT_STORE") == "True" else {}
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=SILENCE, **meeting)
    world = World(int(os.environ.get("RANK", 0)), size)
    if not world.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process speaks; errors still go to stderr
    return world, chosen


def _fresh_store() -> dist.TCPStore:
    """Where the processes of this start meet. torchrun's own store outlives its restarts, so that some would read the addresses of
    processes that are gone (pytorch #135712): here it only tells the port of a new one."""
    host, kept = os.environ["MASTER_ADDR"], dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if os.environ["RANK"] == "0":
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        kept.set(NEW_PORT, str(store.port))
    while os.environ["RANK"] != "0":
        port = int(kept.get(NEW_PORT))
        with contextlib.suppress(dist.DistError):  # nobody listens at the port of an earlier start
            store = dist.TCPStore(host, port, timeout=timedelta(seconds=3), wait_for_workers=False)
            break
    store.set_timeout(SILENCE)
    return store


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensors. It would hand every block above its threshold, which moves between 128 KB
    and 32 MB, back to the kernel, which clears its pages each time anew: a third of a training step on CPU. No-op elsewhere."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


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


def is_lost_peer(error: Exception) -> bool:
    """Whether `error` tells that another process has gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor`, on the CPU, summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_counts(counts: dict[str, float]) -> dict[str, float]:
    """`counts` summed over all processes, 1 for 0."""
    whole = sum_over_ranks(torch.tensor(list(counts.values()), dtype=torch.float64)).tolist()
    return {name: count or 1.0 for name, count in zip(counts, whole)}


def max_over_ranks(number: int) -> int:
    """The largest `number` of all processes."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any process."""
    return max_over_ranks(int(flag)) > 0


def wait_for_all() -> None:
    """Return once every process is here."""
    max_over_ranks(0)


@contextlib.contextmanager
def main_first(world: World) -> Iterator[None]:
    """The first process does what is inside before the others do: they find on disk what it has written."""
    if world.size == 1:
        yield
        return
    if not world.is_main:
        dist.barrier(_patient())
    yield
    if world.is_main:  # not where it has failed: its end ends the others
        dist.barrier(_patient())


@functools.cache
def _patient() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PREPARATION)


def gather(value: object) -> list:
    """`value` of every process, in rank order; tensors in it are on the CPU."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def place(model: nn.Module, device: torch.device, shard: bool) -> nn.Module:
    """`model` on `device`; with `shard` each process holds a part of every weight (FSDP2), a layer being put together when it is
    computed."""
    if not shard or not dist.is_initialized():
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh  # a second to import
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "encode")  # what sample predictions call beside forward
    return model


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(weight, "full_tensor") for weight in model.parameters())


def wrap(model: nn.Module, compiled: bool) -> nn.Module:
    """`model`, compiled if asked for, its gradients summed over the processes by DDP where there are several.

    A graph has fixed shapes, so that each phase gets one of its own: by default the second would make one of any shape, slower for all.
    Many phases, or masks beyond the rate, would pass torch's limit of 8 graphs, and the rest of the run would not be compiled."""
    if compiled:
        _start_compilers()
        torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    trained = torch.compile(model, dynamic=False) if compiled else model
    if not dist.is_initialized() or _is_sharded(model):
        return trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for buffers that never change
        return DistributedDataParallel(trained, broadcast_buffers=False, gradient_as_bucket_view=True)


def _start_compilers() -> None:
    """Start torch's compile workers so that what stops a run does not reach them.

    A signal to the whole group would end them, and the run, which finishes its step, would wait for them forever. Without Triton, in a
    CPU build of torch, there are none."""
    if importlib.util.find_spec("triton") is None:
        return
    from torch._inductor.async_compile import AsyncCompile  # a second to import

    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # processes that are started inherit this
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def gradient_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Context of a micro-batch: gradients travel in the last one of a step only. Those of a sharded model travel each time: no
    process has room for whole ones."""
    return contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, put together: all processes call this in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """State dict of `model`; of a sharded one put together on the CPU of the first process, the others get nothing."""
    weights = model.state_dict()
    if not _is_sharded(model):
        return weights
    weights = _on_first({"": weights})[""]
    return weights | {name: weights[same] for name, same in model.all_tied_weights_keys.items() if weights}  # one tensor again, not two


def whole_averages(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """State of `optimizer` by the names of the weights, put together likewise: it fits any number of processes, sharded or not."""
    state = {name: optimizer.state[weight] for name, weight in model.named_parameters() if weight in optimizer.state}
    return _on_first(state) if _is_sharded(model) else state


def _on_first(groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    kept: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            together = whole(tensor)
            if dist.get_rank() == 0:
                kept[group][name] = together.cpu()
    return kept


def load_averages(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]) -> None:
    """The counterpart of `whole_averages`, in the same place; ValueError where the state is of other weights."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    wrong = sorted(weights.keys() ^ state.keys()) or [name for name, weight in weights.items() if any(
        state[name][part].shape != weight.shape for part in ("exp_avg", "exp_avg_sq"))]
    if wrong:
        raise ValueError(f"{', '.join(wrong[:3])}: not as in the model")
    names, numbered = {weight: name for name, weight in weights.items()}, {}
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        numbered[len(numbered)] = {part: _like(weight, tensor) for part, tensor in state[names[weight]].items()}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _like(weight: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a whole `tensor`, where `weight` is sharded."""
    if not hasattr(weight, "full_tensor") or not tensor.ndim:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
