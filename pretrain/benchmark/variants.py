"""Our training step in the ways that only a GPU can decide between, each in a process of its own. A few warm up at the same time, since
most of that is compiling, and are then timed one after the other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pretrain.benchmark.processes import TurnProcess, answer, wait_for_turn
from pretrain.command import UserError

AT_ONCE = 3  # that warm up: on a GPU of 80 GB there is room for BERT-base
TIMED_BLOCKS = 3
LATER_SECONDS = 25.0  # left for each later group
SECONDS_TO_TIME = 3.0  # one of them


@dataclass(frozen=True)
class Variant:
    """What differs from a run with the options as they are."""

    name: str
    micro_batch: int = 1  # times the option
    batch: int = 1  # likewise
    is_compiled: bool = True  # where the options say so
    mode: str | None = None  # of torch.compile
    parallel: str | None = None  # "ddp", "fsdp" or "fsdp bf16"

    @property
    def needs_gpu(self) -> bool:
        """On a CPU nothing is compiled, and its autocast leaves weights of LayerNorm in bf16."""
        return self.mode is not None or not (self.is_compiled or self.parallel == "fsdp")

    @property
    def is_sharded(self) -> bool:
        return self.parallel in ("fsdp", "fsdp bf16")


# In groups of AT_ONCE: what compiles longest together, what needs no compiler last.
VARIANTS = (
    Variant("as it is"),
    Variant("micro-batch twice as large", micro_batch=2, batch=2),
    Variant("DDP, one process", parallel="ddp"),
    Variant("two micro-batches a step", batch=2),
    Variant("compile mode reduce-overhead", mode="reduce-overhead"),
    Variant("compile mode max-autotune-no-cudagraphs", mode="max-autotune-no-cudagraphs"),
    Variant("compile off", is_compiled=False),
    Variant("FSDP2, one process", is_compiled=False, parallel="fsdp"),
    Variant("FSDP2, one process, bf16 policy", is_compiled=False, parallel="fsdp bf16"),
)


def measure_variants(
    values: dict, seconds: float, has_gpu: bool, note: Callable[[dict], None]
) -> None:
    """Measure all variants of the run with the options `values` in `seconds`; an error in place of one
    that fails or takes too long. `note` gets the rows as they grow."""
    chosen = [variant for variant in VARIANTS if has_gpu or not variant.needs_gpu]
    rows = {variant.name: {"error": "no time left"} for variant in chosen}
    rows |= {variant.name: {"needs": "a GPU"} for variant in VARIANTS if variant not in chosen}
    groups = [chosen[first : first + AT_ONCE] for first in range(0, len(chosen), AT_ONCE)]
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for number, group in enumerate(groups):
            later = len(groups) - number - 1
            deadline = max(end - later * LATER_SECONDS, time.monotonic() + LATER_SECONDS)
            if deadline <= end:
                measure_group(values, group, deadline, Path(folder), rows)
                note({"rows": [{"variant": name, **row} for name, row in rows.items()]})


def measure_group(
    values: dict, group: list[Variant], deadline: float, folder: Path, rows: dict[str, dict]
) -> None:
    """Let the variants of a group warm up at the same time and measure them in turns, into `rows`."""
    processes = {}
    try:
        for variant in group:
            name = variant.name.replace(" ", "-")
            processes[variant.name] = TurnProcess(run_variant, (variant, values), folder, name)
            processes[variant.name].send()
        for name, process in processes.items():
            left = deadline - SECONDS_TO_TIME * len(group) - time.monotonic()
            rows[name] = answer_of(process, max(1.0, left))
        for name, process in processes.items():
            if "error" not in rows[name]:
                rows[name] |= answer_of(process, 10 * SECONDS_TO_TIME)
                process.stop()
    finally:
        for process in processes.values():
            process.stop()


def answer_of(process: TurnProcess, seconds: float) -> dict:
    """The answer of a process, or its error, with which it ends."""
    try:
        return process.receive(seconds)
    except UserError as error:
        process.stop()
        return {"error": str(error)}


def run_variant(channel: object, variant: Variant, values: dict) -> None:
    """In a process of its own: warm up and answer, wait for the turn, measure and answer."""
    wait_for_turn()
    import torch
    import torch.distributed as dist

    from pretrain import setup
    from pretrain.benchmark.steps import Ours, release_memory
    from pretrain.config import Config
    from pretrain.runtime.optim import peak_flops

    if variant.parallel:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    values["batch_size"] *= variant.batch
    values["micro_batch_size"] *= variant.micro_batch
    if not variant.is_compiled:
        values["compile"] = "off"
    run = setup.build(Config(**values))
    if variant.is_sharded:
        shard(run.model, run.device, bf16="bf16" in variant.parallel)
    # A variant that does not compile is not measured as one that does.
    torch._dynamo.config.suppress_errors = False
    ours = Ours(run)
    if variant.mode:
        ours.trained = torch.compile(run.model, dynamic=False, mode=variant.mode)
    begin = time.perf_counter()
    ours.step()
    compiled_seconds = time.perf_counter() - begin
    ours.block()
    release_memory()
    warm = {"micro_batch_size": run.config.micro_batch_size, "first_step_seconds": compiled_seconds}
    answer(channel, warm)
    wait_for_turn()
    blocks = [ours.block() for _ in range(TIMED_BLOCKS)]
    rate = median(block["tokens"] / block["seconds"] for block in blocks)
    flops = sum(block["flops"] for block in blocks) / sum(block["tokens"] for block in blocks)
    measured = {
        "tokens_per_second": rate,
        "share_of_matrix_rate": rate * flops / peak_flops(run.device, run.precision),
        "peak_gib": max(block["peak_bytes"] for block in blocks) / 2**30,
    }
    answer(channel, measured)
    wait_for_turn()  # until it is stopped: what follows would take the device's time


def shard(model, device, bf16: bool) -> None:
    """FSDP2 over the one process, as `place` does it; with `bf16`, weights are gathered and gradients computed in bf16."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if bf16
        else MixedPrecisionPolicy()
    )
    mesh = init_device_mesh(device.type, (1,))
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
