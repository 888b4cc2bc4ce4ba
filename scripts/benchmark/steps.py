"""Training steps: both sides, alternating; variants of our side; and a profile of one step."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from statistics import mean, median

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.profiler import ProfilerActivity

from pretrain.build import build
from pretrain.config import Config
from pretrain.runtime.distributed import wrap
from pretrain.runtime.memory import FULL, trial_seconds
from pretrain.runtime.nan_guard import NanGuard
from pretrain.runtime.optim import make_optimizers, peak_flops
from pretrain.train import train_step
from scripts.benchmark.clock import PACE, Clock, begin_clock, end_clock
from scripts.benchmark.peer import describe
from scripts.benchmark.processes import Process, ProcessError
from scripts.benchmark.rows import blocks, same_examples

WARM_UP_BLOCKS = 2  # per side; the first one compiles
MIN_BLOCKS = 3  # timed blocks per side
PEER_MEMORY = 2  # upper bound of the peer's memory over ours; 1.3 to 1.7 were measured
SHOWN_KERNELS = 30
DATA_WAIT_GOAL = 0.02  # share of time, at most


@dataclass(frozen=True)
class Variant:
    """Changes to a run with the given options."""

    name: str = ""
    micro_batch: int = 1  # factor for --micro-batch-size
    batch: int = 1  # factor for --batch-size
    options: dict = field(default_factory=dict)
    mode: str | None = None  # of torch.compile
    in_group: bool = False  # in a process group of one process
    bf16_weights: bool = False  # gathered by FSDP2 in bf16
    needs_gpu: bool = False  # for torch.compile, or for autocast with bf16 weights


SHARDED = {"compile": "off", "shard": True}
VARIANTS = (  # those that may take longest are last
    Variant("as it is"),
    Variant("micro-batch twice as large", micro_batch=2, batch=2),
    Variant("two micro-batches a step", batch=2),
    Variant("compile off", options={"compile": "off"}, needs_gpu=True),
    Variant("FSDP2, one process", options=SHARDED, in_group=True),
    Variant("FSDP2, bf16", options=SHARDED, in_group=True, bf16_weights=True, needs_gpu=True),
    Variant("DDP, one process", in_group=True),
    Variant("compile mode reduce-overhead", mode="reduce-overhead", needs_gpu=True),
    Variant("compile mode max-autotune", mode="max-autotune-no-cudagraphs", needs_gpu=True),
)
GROUP = 3  # variants that warm up together, which is mostly compiling


class Ours:
    """Our side: each `step` is one optimizer step, as in `train`."""

    def __init__(self, run):
        self.run, self.device, config = run, run.device, run.config
        self.model = wrap(run.model.train(), run.compile)
        self.optimizers = make_optimizers(run.model, config)
        scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
        rates = (config.learning_rate, config.max_grad_norm)
        self.settings = (scaler, run.autocast(), *rates, run.device)
        self.guard, self.wait_seconds = NanGuard(), 0.0

    def step(self) -> tuple[int, float]:
        """(real tokens, floating-point operations) of one step; a GPU may not have finished it."""
        begin = time.perf_counter()
        batches = next(self.run.data)  # the micro-batches of a step
        self.wait_seconds += time.perf_counter() - begin
        result = train_step(self.model, batches, self.optimizers, *self.settings)
        # Reads the flag of the previous step, so the host is at most one step ahead.
        self.guard.observe(result.finite, self.run.data.step)
        return sum(batch.num_tokens for batch in batches), self.run.flops(batches)

    def facts(self) -> dict:
        """Facts added to each block. The matrix rate is measured each time, since others may use
        the machine for a while."""
        matrix_flops = peak_flops(self.device, self.run.precision)
        return {"matrix_flops": matrix_flops, "micro_batch_size": self.run.micro_batch_size}

    def describe_peer(self, rows_of: Callable, num_steps: int) -> dict:
        """The peer on the same text, and whether the GPU is too small for both sides at once,
        judged by the peak of one eager step of ours."""
        run, is_tight = self.run, False
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            batch = run.phases[0].fullest_batch().to(self.device)
            trial_seconds(run.model, batch, run.autocast())
            peak = torch.cuda.max_memory_allocated(self.device)
            total = torch.cuda.get_device_properties(self.device).total_memory
            is_tight = (1 + PEER_MEMORY) * peak > 0.9 * total
        peer = describe(run, rows_of(run, num_steps * run.config.batch_size))
        facts = {"micro_batch_size": run.micro_batch_size, "precision": run.precision}
        return {"peer": peer, "is_tight": is_tight, "facts": facts}

    def profile(self, num_steps: int) -> dict:
        """Operators or kernels of one step, and shares of idle time and of waiting for data."""
        for _ in range(2):  # the first one may compile
            self.step()
        self.wait_seconds, begin = 0.0, begin_clock(self.device)
        tokens = sum(self.step()[0] for _ in range(num_steps))
        seconds = end_clock(self.device, begin)["seconds"]
        wait_share = self.wait_seconds / seconds
        step_seconds, kernels = self._kernels()
        if self.device.type == "cuda":  # the profiler slows the host, not the kernels
            step_seconds = seconds / num_steps
        busy_seconds = sum(took for took, _ in kernels.values())
        slowest = sorted(kernels.items(), key=lambda item: -item[1][0])
        return {
            "tokens_per_second": {"ours": tokens / seconds},
            "data_wait": {"ours": wait_share, "goal": DATA_WAIT_GOAL},
            "idle": {"ours": max(0.0, 1 - busy_seconds / step_seconds)},
            "step_ms": {"ours": 1000 * step_seconds},
            "kernels_ms": {"ours": 1000 * busy_seconds},
            "kernels": [
                {"share": took / step_seconds, "ms": 1000 * took, "count": count, "name": name}
                for name, (took, count) in slowest[:SHOWN_KERNELS]
            ],
        }

    def _kernels(self) -> tuple[float, dict[str, tuple[float, int]]]:
        """(seconds of a profiled step, {kernel or operator: (seconds, count)})."""
        kind = self.device.type.upper()
        with torch.profiler.profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
            begin = begin_clock(self.device)
            self.step()
            seconds = end_clock(self.device, begin)["seconds"]
        kernels = {}
        for event in profiler.key_averages():
            # Annotated ranges, as in the optimizer, contain kernels that are counted already.
            if event.device_type.name == kind and not event.is_user_annotation:
                on_gpu = kind == "CUDA"
                took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                kernels[event.key] = (took / 1e6, event.count)
        return seconds, kernels


def serve(turns: Connection, options: dict, variant: Variant = Variant()) -> None:
    """Our side in a separate process: trains in turns and answers calls of methods of `Ours`."""
    if variant.in_group:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if variant.bf16_weights:  # `sharding.place` has no option for it
        policy = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        fsdp.fully_shard = partial(fsdp.fully_shard, mp_policy=policy)
    options = options | variant.options
    options["batch_size"] *= variant.batch
    options["micro_batch_size"] *= variant.micro_batch
    run = build(Config(**options))
    if variant.name:  # a variant that does not compile must fail
        torch._dynamo.config.suppress_errors = False
    ours = Ours(run)
    if variant.mode:
        ours.model = torch.compile(run.model, dynamic=False, mode=variant.mode)
    clock = Clock(turns, ours.device, PACE[ours.device.type], ours)
    while True:
        clock.end_step(*ours.step())


def take_turns(sides: dict[str, Process], order: list[str]) -> Iterator[tuple[dict, dict]]:
    """Run blocks in `order`; after each, yield all blocks and failures so far, by side.

    A side that fails is stopped, and the others are still measured."""
    measured, failed = {side: [] for side in sides}, {}
    for side in order:
        if side in failed:
            continue
        try:
            measured[side].append(sides[side].ask())
        except ProcessError as error:
            failed[side] = str(error)
            sides[side].stop()
        yield measured, failed


def figures_of(blocks: list[dict], timed_steps: int, same_work: list[dict]) -> dict[str, float]:
    """Medians of the timed blocks of a side, the share of the matrix rate (from blocks of ours that
    do the `same_work`), and figures of the GPU and torch.compile. {} during warm-up."""
    warm_up, timed = blocks[:WARM_UP_BLOCKS], blocks[WARM_UP_BLOCKS:]
    if not timed:
        return {}
    rate = median(block["tokens"] / block["seconds"] for block in timed)
    figures = {
        "tokens_per_second": rate,
        "step_seconds": median(block["seconds"] for block in timed) / timed_steps,
        "steps": len(timed) * timed_steps,
    }
    if same_work:
        flops = [block["flops"] / block["tokens"] for block in same_work]
        matrix_flops = max(block["matrix_flops"] for block in same_work)
        figures["share_of_matrix_rate"] = rate * mean(flops) / matrix_flops
    if timed[-1]["peak_bytes"]:
        figures["peak_gib"] = max(block["peak_bytes"] for block in timed) / 2**30
        figures["first_step_seconds"] = blocks[0]["untimed_seconds"]
    if timed[-1]["graphs"]:
        for name in ("graphs", "graph_breaks"):
            figures[f"{name}_in_warm_up"] = warm_up[-1][name]
            figures[f"{name}_while_timed"] = timed[-1][name] - warm_up[-1][name]
    return figures


def measure_train(bench) -> Iterator[dict]:
    """Real tokens/s of both sides on the same pairs. Our side keeps running for `profile`."""
    return measure_both(bench, same_examples)


def measure_blocks(bench) -> Iterator[dict]:
    """Real tokens/s of MLM alone, and of the peer on blocks without padding."""
    return measure_both(bench, blocks, objective="mlm")


def measure_profile(bench) -> Iterator[dict]:
    """`Ours.profile`, without the peer."""
    ours = Process.running.get("ours") or Process(bench.folder, "ours", serve, bench.run_options())
    yield ours.ask("profile", PACE[bench.device_type].steady)


def measure_both(bench, rows_of: Callable, **changed: object) -> Iterator[dict]:
    """Both sides on rows of `rows_of`. If one runs out of memory, both halve the micro-batch."""
    pace, size = PACE[bench.device_type], bench.options.micro_batch_size
    num_blocks = WARM_UP_BLOCKS + max(MIN_BLOCKS, -(-bench.options.steps // pace.timed))
    num_steps = num_blocks * (pace.untimed + pace.timed)
    too_large = []  # micro-batches
    while True:
        options = bench.run_options(**changed, micro_batch_size=size)
        ours = Process(bench.folder, "ours", serve, options)
        given = ours.ask("describe_peer", rows_of, num_steps)
        if given["facts"]["micro_batch_size"] < size:
            too_large.append({"micro_batch_size": size, "failed": "ours: out of memory"})
        size = given["facts"]["micro_batch_size"]
        train = given["peer"].train_in_turns
        peer = Process(bench.folder, "peer", train, str(bench.folder), num_steps, pace, {})
        peer.patience = pace.patience
        order = ["ours", "peer"] * num_blocks
        if given["is_tight"]:
            order.sort()
        else:
            peer.send()  # to warm up at the same time as ours
        for measured, failed in take_turns({"ours": ours, "peer": peer}, order):
            found = {**given["facts"], "rows": too_large, "failed": failed}
            same_work = measured["ours"] if rows_of is same_examples else []
            for side, side_blocks in measured.items():
                for name, value in figures_of(side_blocks, pace.timed, same_work).items():
                    found.setdefault(name, {})[side] = value
            yield found
        peer.stop()
        reasons = "; ".join(f"{side}: {reason}" for side, reason in failed.items())
        is_full = any(words in reasons for words in (*FULL, "OutOfMemoryError", "MemoryError"))
        if not is_full or size % 2:
            return
        ours.stop()
        too_large.append({"micro_batch_size": size, "failed": reasons})
        size //= 2


def measure_variants(bench) -> Iterator[dict]:
    """A row per variant, with its figures or its error; all end within --minutes."""
    pace = PACE[bench.device_type]
    deadline = time.monotonic() + 60 * bench.options.minutes
    rows = {variant.name: {"variant": variant.name} for variant in VARIANTS}
    for first in range(0, len(VARIANTS), GROUP):
        sides = {}
        for variant in VARIANTS[first : first + GROUP]:
            if time.monotonic() > deadline:
                rows[variant.name]["error"] = "no time left"
                continue
            if variant.needs_gpu and bench.device_type == "cpu":
                rows[variant.name]["needs"] = "a GPU"
                continue
            process = Process(bench.folder, variant.name, serve, bench.run_options(), variant)
            process.deadline = deadline
            process.send()
            sides[variant.name] = process
        for measured, failed in take_turns(sides, list(sides) * (WARM_UP_BLOCKS + MIN_BLOCKS)):
            for name, side_blocks in measured.items():
                rows[name] |= figures_of(side_blocks, pace.timed, side_blocks)
                if side_blocks:
                    rows[name]["micro_batch_size"] = side_blocks[-1]["micro_batch_size"]
                if name in failed:
                    rows[name]["error"] = failed[name]
            yield {"rows": list(rows.values())}
        Process.stop_all()
