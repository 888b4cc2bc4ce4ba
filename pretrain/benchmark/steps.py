"""Optimizer steps of both sides, in turns, and what one of ours consists of."""

from __future__ import annotations

import gc
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity

from pretrain.benchmark.peer import (
    COMPILED,
    Rows,
    begin_block,
    compiled_so_far,
    describe,
    end_block,
    synchronize,
)
from pretrain.benchmark.processes import TurnProcess
from pretrain.benchmark.rows import same_examples
from pretrain.command import UserError, first_line
from pretrain.data.dataset import DataPosition, MicroBatchSampler, make_loader
from pretrain.model.bert import count_flops
from pretrain.runtime.distributed import wrap
from pretrain.runtime.faults import FULL, micro_batch_fits
from pretrain.runtime.optim import FiniteWatch, autocast, make_optimizer, peak_flops
from pretrain.train import train_step

BLOCK_STEPS = {
    "cpu": 1,
    "cuda": 8,
}  # a side's steps in a row: a GPU queues the next while it computes, as in a run
UNTIMED_STEPS = {
    "cpu": 0,
    "cuda": 1,
}  # before them: between blocks a side gives its free memory back to the GPU
ANSWER_SECONDS = {"cpu": 1800, "cuda": 90}  # for a block of the peer; the first compiles
PEER_MEMORY = 2  # times ours that the peer may need: 1.3 to 1.7 were measured
MIN_BLOCKS = 3  # timed of each side
STEADY_STEPS = {
    "cpu": 2,
    "cuda": 32,
}  # in a row and alone, so that no batch was prepared in another side's time
MATRIX_REPEATS = 5
SHOWN_KERNELS = 30
DATA_WAIT_GOAL = 0.02  # of the time at most


class Ours:
    """Our side: each `step` is an optimizer step as `train` makes it."""

    def __init__(self, run):
        config, self.run, self.model = run.config, run, run.model.train()
        self.trained = wrap(self.model, run.compile)
        self.optimizer = make_optimizer(
            self.model,
            config.learning_rate,
            config.weight_decay,
            config.adam_betas,
            config.adam_epsilon,
        )
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
        sampler = MicroBatchSampler(run.dataset, DataPosition(0, 0, 0))
        self.loader = make_loader(
            run.dataset, run.collator, sampler, config.workers, pin_memory=run.device.type == "cuda"
        )
        self.watch, self.wait_seconds = FiniteWatch(), 0.0

    def step(self) -> tuple[int, float]:
        """Real tokens and floating-point operations of one step; on a GPU it has been queued, not awaited."""
        run, config, tick = self.run, self.run.config, time.perf_counter()
        batches = [next(self.loader) for _ in range(config.batch_size // config.micro_batch_size)]
        self.wait_seconds += time.perf_counter() - tick
        result = train_step(
            self.trained,
            self.model.loss_weights,
            batches,
            self.optimizer,
            self.scaler,
            autocast(run.device, run.precision),
            config.learning_rate,
            config.max_grad_norm,
            run.device,
        )
        self.watch.observe(
            result.finite
        )  # of the step before: so the host is one step ahead, not more
        tokens = sum(batch.num_tokens for batch in batches)
        return tokens, sum(count_flops(self.model, batch) for batch in batches)

    def block(self) -> dict:
        """A block of steps: tokens, FLOP, seconds, peak memory on a GPU, and what torch.compile did."""
        device = self.run.device
        compiled, block_begin = compiled_so_far(), begin_block(device)
        for _ in range(UNTIMED_STEPS[device.type]):
            self.step()
        begin = begin_block(device)
        tokens, flops = map(sum, zip(*(self.step() for _ in range(BLOCK_STEPS[device.type]))))
        taken = end_block(device, begin) | {"untimed_seconds": begin - block_begin}
        return {"tokens": tokens, "flops": flops, **taken, **(compiled_so_far() - compiled)}


class Turns:
    """Blocks of steps of both sides, with what `Ours.block` tells of each."""

    def __init__(self, ours: Ours, rows: Rows, count: int, folder: str):
        run, device = ours.run, ours.run.device
        self.ours, self.seconds = ours, ANSWER_SECONDS[device.type]
        self.timed_steps, self.untimed_steps = BLOCK_STEPS[device.type], UNTIMED_STEPS[device.type]
        self.ends = rows.offsets[:: run.config.batch_size]  # of the peer's steps
        self.blocks: dict[str, list[dict]] = {"ours": [], "peer": []}
        self.failed: dict[str, str] = {}
        steps = count * (self.untimed_steps + self.timed_steps)
        given = (folder, steps, self.timed_steps, self.untimed_steps)
        self.peer = TurnProcess(describe(run, rows).run_in_turns, given, Path(folder), "peer")

    def take(self, sides: tuple[str, ...], side_by_side: bool = False) -> None:
        """A block of each of `sides` that has not failed; with `side_by_side` the peer runs while ours does, to warm up. An error of
        one is reported in its place, and the other is still measured."""
        if side_by_side:
            self.peer.send()
        for side in sides:
            if side not in self.failed:
                try:
                    self.blocks[side].append(
                        self.ours.block() if side == "ours" else self.peer_block()
                    )
                except Exception as error:  # of every kind: compilers and drivers raise their own
                    traceback.print_exc()
                    is_told = isinstance(error, UserError)  # by the peer's process
                    self.failed[side] = str(error) if is_told else first_line(error)
                    if side == "peer":
                        self.peer.stop()
        if "ours" in self.failed:
            release_memory()

    def peer_block(self) -> dict:
        """The peer's block; its tokens are those of its rows."""
        first = (
            len(self.blocks["peer"]) * (self.untimed_steps + self.timed_steps) + self.untimed_steps
        )
        tokens = int(self.ends[first + self.timed_steps] - self.ends[first])
        return self.peer.receive(self.seconds) | {"tokens": tokens}


def release_memory() -> None:
    """Give what no tensor uses back to the GPU; errors and circles may have kept tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_short_of_memory(failure: str) -> bool:
    """Whether a side that failed with this message had too little memory."""
    return any(words in failure for words in (*FULL, "OutOfMemoryError", "MemoryError"))


def peak_of_trial(run) -> int:
    """Most bytes of a GPU in use in an eager step of ours."""
    batch = run.collator(run.dataset.__getitems__([run.dataset.fullest()])).to(run.device)
    torch.cuda.reset_peak_memory_stats(run.device)
    micro_batch_fits(run.model, batch, autocast(run.device, run.precision))
    return torch.cuda.max_memory_allocated(run.device)


def has_room_for_both(run) -> bool:
    """Whether both sides find room on the GPU at once."""
    total = torch.cuda.get_device_properties(run.device).total_memory
    return (1 + PEER_MEMORY) * peak_of_trial(run) < 0.9 * total


def measure_training(
    run,
    build_with: Callable[[int], object],
    make_rows: Callable[[object, int], Rows],
    steps: int,
    warm_up: int,
    note: Callable[[dict], None],
) -> Ours:
    """`take_turns` with the largest micro-batch, up to the run's, for which both sides have room: where one has not, both take half.
    `build_with` gives the run with another micro-batch; `note` gets the result as it grows. Returns our side."""
    before = {}
    while True:
        micro = run.config.micro_batch_size
        facts = {"micro_batch_size": micro, "smaller_because": {}}
        if micro < run.asked_micro_batch_size:
            facts["smaller_because"]["ours"] = f"no room for {run.asked_micro_batch_size}"
        facts["smaller_because"] |= {
            side: failure
            for result in before.values()
            for side, failure in result["failed"].items()
        }
        if before:
            facts["larger"] = before
        ours = Ours(run)
        result = take_turns(
            ours, make_rows, steps, warm_up, lambda part, facts=facts: note(part | facts)
        )
        is_too_large = any(map(is_short_of_memory, result["failed"].values()))
        if not is_too_large or micro % 2:
            return ours
        before[micro] = {name: result[name] for name in ("tokens_per_second", "failed")}
        del ours, run
        release_memory()
        run = build_with(micro // 2)


def take_turns(
    ours: Ours,
    make_rows: Callable[[object, int], Rows],
    steps: int,
    warm_up: int,
    note: Callable[[dict], None],
) -> dict:
    """Real tokens/s of both sides over rows of `make_rows`, in turns; `note` gets the result after each."""
    run, block = ours.run, BLOCK_STEPS[ours.run.device.type]
    count = warm_up + max(MIN_BLOCKS, -(-steps // block))
    rows = make_rows(run, count * (block + UNTIMED_STEPS[run.device.type]) * run.config.batch_size)
    # Before and after: what others took of the machine shows.
    matrix_rates = [peak_flops(run.device, run.precision) for _ in range(MATRIX_REPEATS)]
    order, is_together = [("ours", "peer")] * count, False
    if run.compile and run.device.type == "cuda":
        is_together = has_room_for_both(run)
        if (
            not is_together
        ):  # to compile one after the other takes long: ours may be all that there is time for
            order = [("ours",)] * count + [("peer",)] * count
    with tempfile.TemporaryDirectory() as folder:
        turns = Turns(ours, rows, count, folder)
        try:
            for number, sides in enumerate(order):
                turns.take(sides, side_by_side=is_together and number == 0)
                note(summarize(turns, warm_up, make_rows is same_examples, max(matrix_rates)))
        finally:
            turns.peer.stop()
    matrix_rates += [peak_flops(run.device, run.precision) for _ in range(MATRIX_REPEATS)]
    result = summarize(turns, warm_up, make_rows is same_examples, max(matrix_rates))
    note(result)
    return result


def summarize(turns: Turns, warm_up: int, same_work: bool, matrix_rate: float) -> dict:
    """Medians of the timed blocks; where both sides do the same work, also their share of the device's matrix rate; on a GPU their
    peak memory and what torch.compile did."""
    run = turns.ours.run
    timed = {
        side: blocks[warm_up:] for side, blocks in turns.blocks.items() if len(blocks) > warm_up
    }
    rates = {
        side: median(each["tokens"] / each["seconds"] for each in blocks)
        for side, blocks in timed.items()
    }
    steps = {
        side: median(each["seconds"] for each in blocks) / turns.timed_steps
        for side, blocks in timed.items()
    }
    result = {
        "tokens_per_second": rates,
        "step_seconds": steps,
        "steps": {side: len(blocks) * turns.timed_steps for side, blocks in timed.items()},
        "failed": turns.failed,
    }
    if same_work and "ours" in timed:
        flops = sum(each["flops"] for each in timed["ours"]) / sum(
            each["tokens"] for each in timed["ours"]
        )
        shares = {side: rate * flops / matrix_rate for side, rate in rates.items()}
        result |= {"matrix_flops": matrix_rate, "share_of_matrix_rate": shares}
    if run.device.type == "cuda":
        peaks = {side: max(each["peak_bytes"] for each in blocks) for side, blocks in timed.items()}
        result["peak_gib"] = {side: peak / 2**30 for side, peak in peaks.items()}
        first = {
            side: blocks[0]["untimed_seconds"] for side, blocks in turns.blocks.items() if blocks
        }
        result["first_step_seconds"] = first
    if run.compile:
        result["compiled"] = {
            f"{side} while it {when}": {
                name: sum(each.get(name, 0) for each in blocks) for name in COMPILED
            }
            for side in turns.blocks
            for when, blocks in (
                ("warms up", turns.blocks[side][:warm_up]),
                ("is timed", timed.get(side, [])),
            )
        }
    return result


def measure_profile(ours: Ours) -> dict:
    """What one of our steps consists of, and what is left while nothing is computed; the share of the time that waits for data; the
    waits for the device (none is wanted in a step that is not logged)."""
    device, steps = ours.run.device, STEADY_STEPS[ours.run.device.type]
    is_cuda = device.type == "cuda"
    for _ in range(2):  # the first may compile
        ours.step()
    synchronize(device)
    ours.wait_seconds, begin = 0.0, time.perf_counter()
    tokens = sum(ours.step()[0] for _ in range(steps))
    synchronize(device)
    seconds = time.perf_counter() - begin
    waited = ours.wait_seconds
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        begin = time.perf_counter()
        ours.step()
        synchronize(device)
        profiled = time.perf_counter() - begin
    wall = seconds / steps if is_cuda else profiled  # the profiler slows the host, not the kernels
    times, counts = Counter(), Counter()
    for event in profiler.key_averages():
        # Ranges that the program names itself, such as the optimizer's step, hold kernels that are counted already.
        if event.device_type.name == device.type.upper() and not event.is_user_annotation:
            times[event.key] += (
                event.self_device_time_total if is_cuda else event.self_cpu_time_total
            ) / 1e6
            counts[event.key] += event.count
    waits = find_waits(ours)
    return {
        "tokens_per_second": {"ours": tokens / seconds},
        "data_wait": {"ours": waited / seconds, "goal": DATA_WAIT_GOAL},
        "idle": {"ours": max(0.0, 1 - sum(times.values()) / wall)},
        "step_ms": {"ours": 1000 * wall},
        "kernels_ms": {"ours": 1000 * sum(times.values())},
        "waits_for_device": len(waits),
        "waits": waits,
        "kernels": [
            {"name": name, "ms": 1000 * took, "count": counts[name], "share": took / wall}
            for name, took in times.most_common(SHOWN_KERNELS)
        ],
    }


def find_waits(ours: Ours) -> list[str]:
    """Places in one step where the host waits for a GPU."""
    if ours.run.device.type != "cuda":
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "called a synchroniz" in str(warning.message)]
    return [f"{warning.filename}:{warning.lineno}" for warning in waits]
