"""Optimizer steps of both sides, in turns in one process, and what one of ours consists of."""
from __future__ import annotations

import contextlib
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity
from transformers import TrainerCallback

from pretrain.benchmark.peer import Rows, describe
from pretrain.benchmark.rows import same_examples
from pretrain.command import first_line
from pretrain.data.dataset import DataPosition, MicroBatchSampler, make_loader
from pretrain.model.bert import count_flops
from pretrain.runtime.optim import FiniteWatch, autocast, make_optimizer, peak_flops
from pretrain.train import train_step

BLOCK_STEPS = {"cpu": 1, "cuda": 8}  # a side's steps in a row: a GPU queues the next while it computes, as in a run
MIN_BLOCKS = 3  # timed of each side
STEADY_STEPS = {"cpu": 2, "cuda": 32}  # in a row and alone, so that no batch was prepared in another side's time
MATRIX_REPEATS = 5
SHOWN_KERNELS = 10
DATA_WAIT_GOAL = 0.02  # of the time at most


class Ours:
    """Our side: each `step` is an optimizer step as `train` makes it."""

    def __init__(self, run):
        config, self.run, self.model = run.config, run, run.model.train()
        self.trained = torch.compile(self.model) if run.compile else self.model
        self.optimizer = make_optimizer(self.model, config.learning_rate, config.weight_decay, config.adam_betas, config.adam_epsilon)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
        sampler = MicroBatchSampler(run.dataset, DataPosition(0, 0, 0))
        self.loader = make_loader(run.dataset, run.collator, sampler, config.workers, pin_memory=run.device.type == "cuda")
        self.watch, self.wait_seconds = FiniteWatch(), 0.0

    def step(self) -> tuple[int, float]:
        """Real tokens and floating-point operations of one step; on a GPU it has been queued, not awaited."""
        run, config, tick = self.run, self.run.config, time.perf_counter()
        batches = [next(self.loader) for _ in range(config.batch_size // config.micro_batch_size)]
        self.wait_seconds += time.perf_counter() - tick
        result = train_step(self.trained, self.model.loss_weights, batches, self.optimizer, self.scaler,
                            autocast(run.device, run.precision), config.learning_rate, config.max_grad_norm, run.device)
        self.watch.observe(result.finite)  # of the step before: so the host is one step ahead, not more
        return sum(batch.num_tokens for batch in batches), sum(count_flops(self.model, batch) for batch in batches)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled_so_far() -> Counter:
    """What torch.compile has done in this process: graphs that it made, and places where it had to leave one."""
    return Counter(graphs=counters["stats"]["unique_graphs"], graph_breaks=sum(counters["graph_break"].values()))


class Turns:
    """Blocks of steps of both sides; each notes (tokens, FLOP, seconds, peak bytes without what the other side holds)."""

    def __init__(self, ours: Ours, rows: Rows, block: int, warm_up: int, before_timing: Callable[[], None]):
        self.ours, self.device, self.warm_up, self.before_timing = ours, ours.run.device, warm_up, before_timing
        self.block, self.ends, self.taken = block, rows.offsets[::block * ours.run.config.batch_size], 0
        self.blocks, self.failed = {"ours": [], "peer": []}, {}
        self.held = {"ours": self.memory()[0], "peer": 0}  # between the blocks of a side
        self.compiled = {"warm_up": Counter(), "timed": Counter()}  # of our side

    def memory(self) -> tuple[int, int]:
        """(bytes in use, most since the block began) of a GPU; both 0 elsewhere."""
        if self.device.type != "cuda":
            return 0, 0
        return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)

    def begin(self) -> None:
        """Start the clock."""
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.start = time.perf_counter()

    def close(self, side: str, other: str, tokens: int, flops: float) -> None:
        """End a block of `side`."""
        synchronize(self.device)
        seconds, (in_use, peak) = time.perf_counter() - self.start, self.memory()
        self.blocks[side].append((tokens, flops, seconds, peak - self.held[other]))
        self.held[side] = in_use - self.held[other]

    def peer_is_done(self) -> None:
        """The peer has made its block; our turn."""
        self.close("peer", "ours", int(self.ends[self.taken + 1] - self.ends[self.taken]), 0.0)
        self.our_block()

    def our_block(self) -> None:
        """A block of ours, where it has not failed; then the clock starts again for whoever is next."""
        before = compiled_so_far()
        if "ours" not in self.failed:
            with self.keeping_errors("ours"):
                self.begin()
                tokens, flops = map(sum, zip(*(self.ours.step() for _ in range(self.block))))
                self.close("ours", "peer", tokens, flops)
        self.compiled["warm_up" if self.taken < self.warm_up else "timed"] += compiled_so_far() - before
        self.taken += 1
        if self.taken == self.warm_up:
            self.before_timing()
        self.begin()

    @contextlib.contextmanager
    def keeping_errors(self, side: str) -> Iterator[None]:
        """An error of one side is told in its place, and the other is measured all the same."""
        try:
            yield
        except Exception as error:  # of every kind: compilers and drivers raise their own
            self.failed[side] = first_line(error)
            traceback.print_exc()


def take_turns(ours: Ours, make_rows: Callable[[object, int], Rows], steps: int, warm_up: int,
               before_timing: Callable[[], None] = lambda: None) -> dict:
    """Real tokens/s of both sides over rows of `make_rows`, in turns; where they do the same work also their share of the device's
    matrix rate, on a GPU their peak memory, and what torch.compile did to ours."""
    run, block = ours.run, BLOCK_STEPS[ours.run.device.type]
    count, before = warm_up + max(MIN_BLOCKS, -(-steps // block)), compiled_so_far()
    rows = make_rows(run, count * block * run.config.batch_size)
    turns = Turns(ours, rows, block, warm_up, before_timing)

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, arguments, state, control, **_) -> None:
            turns.begin()

        def on_step_end(self, arguments, state, control, **_) -> None:
            if state.global_step % block == 0:
                turns.peer_is_done()

    matrix_rates = [peak_flops(run.device, run.precision) for _ in range(MATRIX_REPEATS)]  # before and after: what others took shows
    with tempfile.TemporaryDirectory() as folder, turns.keeping_errors("peer"):
        describe(run, rows).make_trainer(folder, count * block, TakeTurns()).train()
    while turns.taken < count:
        turns.our_block()
    matrix_rate = max(*matrix_rates, *(peak_flops(run.device, run.precision) for _ in range(MATRIX_REPEATS)))
    timed = {side: blocks[warm_up:] for side, blocks in turns.blocks.items() if len(blocks) > warm_up}
    rates = {side: median(tokens / seconds for tokens, _, seconds, _ in blocks) for side, blocks in timed.items()}
    result = {"tokens_per_second": rates, "steps": (count - warm_up) * block, "failed": turns.failed,
              "micro_batch_size": run.config.micro_batch_size,  # which may have been halved to fit
              "step_seconds": {side: median(seconds for _, _, seconds, _ in blocks) / block for side, blocks in timed.items()}}
    if make_rows is same_examples and "ours" in timed:
        flops_a_token = sum(flops for _, flops, _, _ in timed["ours"]) / sum(tokens for tokens, _, _, _ in timed["ours"])
        result |= {"matrix_flops": matrix_rate,
                   "share_of_matrix_rate": {side: rate * flops_a_token / matrix_rate for side, rate in rates.items()}}
    if run.device.type == "cuda":
        result["peak_gib"] = {side: max(peak for *_, peak in blocks) / 2**30 for side, blocks in timed.items()}
    if run.compile:
        theirs = compiled_so_far() - before - turns.compiled["warm_up"] - turns.compiled["timed"]
        result["compiled"] = {who: {name: what[name] for name in ("graphs", "graph_breaks")} for who, what in (
            ("ours while it warms up", turns.compiled["warm_up"]), ("ours while it is timed", turns.compiled["timed"]), ("peer", theirs))}
    return result


def measure_profile(ours: Ours, before_timing: Callable[[], None] = lambda: None) -> dict:
    """What one of our steps consists of, and what is left while nothing is computed; the share of the time that waits for data; the
    waits for the device (none is wanted in a step that is not logged)."""
    device, steps = ours.run.device, STEADY_STEPS[ours.run.device.type]
    is_cuda = device.type == "cuda"
    for _ in range(2):  # the first may compile
        ours.step()
    synchronize(device)
    before_timing()
    ours.wait_seconds, begin = 0.0, time.perf_counter()
    tokens = sum(ours.step()[0] for _ in range(steps))
    synchronize(device)
    seconds = time.perf_counter() - begin
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        ours.step()
        synchronize(device)
        profiled = time.perf_counter() - begin
    wall = seconds / steps if is_cuda else profiled  # the profiler slows the host, not the kernels
    # Ranges that the program names itself, such as the optimizer's step, hold kernels that are counted already.
    times = Counter({event.key: (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e6
                     for event in profiler.key_averages()
                     if event.device_type.name == device.type.upper() and not event.is_user_annotation})
    return {"tokens_per_second": {"ours": tokens / seconds}, "data_wait": {"ours": ours.wait_seconds / seconds, "goal": DATA_WAIT_GOAL},
            "idle": {"ours": max(0.0, 1 - sum(times.values()) / wall)}, "waits_for_device": count_waits(ours),
            "kernels": {name: took / wall for name, took in times.most_common(SHOWN_KERNELS)}}


def count_waits(ours: Ours) -> int:
    """Places in one step where the host waits for a GPU."""
    if ours.run.device.type != "cuda":
        return 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in told)
