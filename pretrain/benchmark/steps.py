"""Optimizer steps of both sides, in turns, and what one of ours consists of."""
from __future__ import annotations

import contextlib
import json
import pickle
import signal
import subprocess
import sys
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

from pretrain.benchmark.alone import PEER_CODE, ROOT, stop, told_last
from pretrain.benchmark.peer import COMPILED, Peer, Rows, begin_block, compiled_so_far, describe, end_block, synchronize
from pretrain.benchmark.rows import same_examples
from pretrain.command import UserError, first_line
from pretrain.data.dataset import DataPosition, MicroBatchSampler, make_loader
from pretrain.model.bert import count_flops
from pretrain.runtime.distributed import wrap
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
        self.trained = wrap(self.model, run.compile)
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


class PeerProcess:
    """The peer in a process of its own, as its users run it: with memory and threads that no setting of ours reaches."""

    def __init__(self, peer: Peer, steps: int, block: int, folder: str):
        self.log = Path(folder, "peer.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", PEER_CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            cwd=ROOT, start_new_session=True)
        with contextlib.suppress(BrokenPipeError):  # it has failed already: the first block tells
            pickle.dump((peer.run_in_turns, (folder, steps, block)), self.process.stdin)

    def take_block(self) -> dict:
        """Let it make a block of steps; what it tells of it. UserError where it has failed."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the process ended with {self.process.wait()}: {told_last(self.log)}")
        return json.loads(line)


class Turns:
    """Blocks of steps of both sides; of each block its tokens, FLOP, seconds and, on a GPU, peak memory."""

    def __init__(self, ours: Ours, rows: Rows, block: int):
        self.ours, self.device, self.block = ours, ours.run.device, block
        self.ends = rows.offsets[::block * ours.run.config.batch_size]
        self.blocks: dict[str, list[dict]] = {"ours": [], "peer": []}
        self.failed: dict[str, str] = {}

    def take(self, peer: PeerProcess) -> None:
        """A block of each side that has not failed. An error of one is told in its place, and the other is measured all the same."""
        for side, make in (("peer", lambda: self.peer_block(peer)), ("ours", self.our_block)):
            if side not in self.failed:
                try:
                    self.blocks[side].append(make())
                except Exception as error:  # of every kind: compilers and drivers raise their own
                    self.failed[side] = first_line(error)
                    traceback.print_exc()

    def peer_block(self, peer: PeerProcess) -> dict:
        """The peer's block; its tokens are those of its rows."""
        number = len(self.blocks["peer"])
        return peer.take_block() | {"tokens": int(self.ends[number + 1] - self.ends[number])}

    def our_block(self) -> dict:
        """A block of ours."""
        before, begin = compiled_so_far(), begin_block(self.device)
        tokens, flops = map(sum, zip(*(self.ours.step() for _ in range(self.block))))
        return {"tokens": tokens, "flops": flops, **end_block(self.device, begin), **(compiled_so_far() - before)}


def take_turns(ours: Ours, make_rows: Callable[[object, int], Rows], steps: int, warm_up: int,
               before_timing: Callable[[], None] = lambda: None) -> dict:
    """Real tokens/s of both sides over rows of `make_rows`, in turns; where they do the same work also their share of the device's
    matrix rate, on a GPU their peak memory and what torch.compile did."""
    run, block = ours.run, BLOCK_STEPS[ours.run.device.type]
    count = warm_up + max(MIN_BLOCKS, -(-steps // block))
    rows = make_rows(run, count * block * run.config.batch_size)
    turns = Turns(ours, rows, block)
    matrix_rates = [peak_flops(run.device, run.precision) for _ in range(MATRIX_REPEATS)]  # before and after: what others took shows
    with tempfile.TemporaryDirectory() as folder:
        peer = PeerProcess(describe(run, rows), count * block, block, folder)
        try:
            for number in range(count):
                if number == warm_up:
                    before_timing()
                turns.take(peer)
        finally:
            stop(peer.process, signal.SIGKILL)
    matrix_rate = max(*matrix_rates, *(peak_flops(run.device, run.precision) for _ in range(MATRIX_REPEATS)))
    timed = {side: blocks[warm_up:] for side, blocks in turns.blocks.items() if len(blocks) > warm_up}
    rates = {side: median(each["tokens"] / each["seconds"] for each in blocks) for side, blocks in timed.items()}
    result = {"tokens_per_second": rates, "steps": (count - warm_up) * block, "failed": turns.failed,
              "micro_batch_size": run.config.micro_batch_size,  # which may have been halved to fit
              "step_seconds": {side: median(each["seconds"] for each in blocks) / block for side, blocks in timed.items()}}
    if make_rows is same_examples and "ours" in timed:
        flops_a_token = sum(each["flops"] for each in timed["ours"]) / sum(each["tokens"] for each in timed["ours"])
        result |= {"matrix_flops": matrix_rate,
                   "share_of_matrix_rate": {side: rate * flops_a_token / matrix_rate for side, rate in rates.items()}}
    if run.device.type == "cuda":
        result["peak_gib"] = {side: max(each["peak_bytes"] for each in blocks) / 2**30 for side, blocks in timed.items()}
    if run.compile:
        result["compiled"] = {f"{side} while it {when}": {name: sum(each.get(name, 0) for each in blocks) for name in COMPILED}
                              for side in turns.blocks for when, blocks in (("warms up", turns.blocks[side][:warm_up]),
                                                                            ("is timed", timed.get(side, [])))}
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
