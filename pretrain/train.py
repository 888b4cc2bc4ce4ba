"""THE loop: `train_step` is one optimizer update, `train` is a run. Plain PyTorch, to be edited.

What flows in is a `Run` (pretrain/setup.py): a model that returns summed losses, a dataset of micro-batches, held-out batches,
and the derived numbers. To change the objective, change the model's `score` and `Batch.counts`; to change what is
masked, pretrain/data/masking.py; to change the update, this file.
"""
from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.data.dataset import DataPosition, MicroBatchSampler, make_loader
from pretrain.evaluate import add_up, evaluate, read_sums, sample_predictions, summarize
from pretrain.files import write_json
from pretrain.model.bert import count_flops
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import any_rank, gather, gradient_sync, sum_counts, wait_for_all, wrap
from pretrain.runtime.monitor import Monitor, peak_memory_bytes
from pretrain.runtime.optim import FiniteWatch, autocast, make_optimizer, make_schedule, peak_flops
from pretrain.setup import Run, describe_run


@dataclass(frozen=True)
class StepResult:
    """What an update leaves for the log, all on the device: nothing here has been waited for."""

    sums: dict[str, Tensor]  # of this process: NAME_loss, NAME_correct, NAME_count; zeros if the step was not finite
    grad_norm: Tensor  # before clipping
    finite: Tensor  # bool; where it does not hold, the step has changed nothing


def train_step(model: nn.Module, loss_weights: dict[str, float], batches: Sequence[Batch], optimizer: torch.optim.Optimizer,
               scaler: torch.amp.GradScaler, context: torch.autocast, learning_rate: float, max_grad_norm: float,
               device: torch.device, world_size: int = 1) -> StepResult:
    """One update from the micro-batches of this process.

    Losses are sums divided once by the counts of the whole step, over all micro-batches and processes: a mean of means would
    weigh a token by how many others its micro-batch happens to mask. Every loss: sum / count x weight."""
    counts = {name: sum(batch.counts[name] for batch in batches) for name in loss_weights}
    whole = sum_counts(counts, device)
    scale = {name: weight * world_size / whole[name] for name, weight in loss_weights.items()}  # DDP averages over processes
    total: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        with gradient_sync(model, last=number == len(batches) - 1):
            with context:
                output = model(batch.to(device))
                loss = sum(output.loss_sums[name] * scale[name] for name in loss_weights)
            scaler.scale(loss).backward()
        total = add_up(total, output)

    scaler.unscale_(optimizer)
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    finite = torch.isfinite(grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.found_inf = (~finite).float()  # fused AdamW passes over the whole step where this is 1, without a wait
    optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    sums = {key: torch.where(finite, value, 0.0) for key, value in total.items()}
    return StepResult(sums | {f"{name}_count": finite.double() * count for name, count in counts.items()}, grad_norm, finite)


def train(run: Run) -> dict[str, float | str]:
    """Train from the start or from `run.checkpoint` to the end; returns the summary, which is also in summary.json."""
    config, model, device, world = run.config, run.model, run.device, run.world
    trained = wrap(torch.compile(model) if run.compile else model)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay, config.adam_betas, config.adam_epsilon)
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
    context = autocast(device, run.precision)
    learning_rate = make_schedule(config.schedule, config.learning_rate, config.warmup, run.total_steps)
    micro_batches = config.batch_size // config.micro_batch_size
    progress = Progress(**run.state["progress"]) if run.checkpoint else Progress()
    window = Window.restored(progress.window, device, world.is_main)
    watch = FiniteWatch(progress.skipped)
    handled_step = progress.step if run.checkpoint else -1  # evaluated, logged and saved before the run was resumed
    monitor = Monitor(run.output, handled_step + 1, run.total_steps, asdict(config), active=world.is_main)
    first_step = progress.step
    sampler = MicroBatchSampler(run.dataset, progress.position, world.rank, world.size,
                                mask_rate=lambda number: run.mask_rate(first_step + number // micro_batches))
    loader = iter(make_loader(run.dataset, run.collator, sampler, config.workers, pin_memory=device.type == "cuda"))
    peak = peak_flops(device, run.precision)
    begin, numbers, out_of_time = time.monotonic(), {}, False
    model.train()
    if run.checkpoint:  # random states last: nothing may draw between here and the first step
        restore(run, optimizer, scaler)
    while True:
        step = progress.step
        finished = step >= run.total_steps or (step == handled_step and run.is_finished)
        if step != handled_step:
            if finished or step % run.every(config.eval_every) == 0:
                numbers |= hold_out(run, progress, context, monitor)
                finished |= 0 < config.patience <= progress.evaluations_without_gain
            if numbers:
                monitor.log(step, numbers)
            # At least one step first, so that a run restarted again and again goes on.
            out_of_time = step > 0 and config.max_minutes > 0 and any_rank(time.monotonic() - begin >= config.max_minutes * 60)
            if step and (finished or out_of_time or step % run.every(config.save_every) == 0):
                monitor.say(watch.observe(None))
                progress.skipped, progress.finished = watch.skipped, finished
                save(run, progress, window, optimizer, scaler, monitor)
        if finished or out_of_time:
            break

        tick = time.perf_counter()
        batches = [next(loader) for _ in range(micro_batches // world.size)]
        window.add_seconds("wait_seconds", time.perf_counter() - tick, world.size)
        rate = learning_rate(step + 1)
        result = train_step(trained, model.loss_weights, batches, optimizer, scaler, context, rate, config.max_grad_norm, device,
                            world.size)
        monitor.say(watch.observe(result.finite, f"at step {step + 1}, data position {tuple(progress.position[:3])}"))
        progress.step, progress.position = step + 1, run.dataset.advance(progress.position, micro_batches)
        window.add(result, batches, sum(count_flops(model, batch) for batch in batches))
        logged = progress.step in (1, run.total_steps) or progress.step % config.log_every == 0
        grad_norm = float(result.grad_norm) if logged else None  # waits for the device, so that the clock is right
        window.add_seconds("seconds", time.perf_counter() - tick, world.size)
        numbers = {}
        if logged:
            sums = window.read(device)
            means = summarize(sums, model.loss_weights)
            numbers = {f"train/{name}": value for name, value in means.items()} | speed(sums, peak * world.size) | {
                "optim/learning_rate": rate, "optim/grad_norm": grad_norm, "memory/peak_bytes": peak_memory_bytes(device)}
            if run.mask_rate(step) is not None:
                numbers["optim/mask_rate"] = run.mask_rate(step)
            progress.add_window(sums, means)
            window = Window({}, {})
        monitor.advance()
    progress.add_window(window.read(device), progress.last_train)
    return finish(run, progress, monitor, finished)


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint needs beside weights, optimizer and random states."""

    step: int = 0  # optimizer updates done
    position: DataPosition = DataPosition(0, 0, 0)  # of the next micro-batch
    totals: dict[str, float] = field(default_factory=dict)  # real tokens, sequences, seconds of training; to the last logged step
    skipped: int = 0  # steps that were not finite
    best_perplexity: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    last_train: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    last_eval_step: int = 0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last logged step
    finished: bool = False

    def __post_init__(self):
        self.position = DataPosition(*self.position)

    def add_window(self, sums: dict[str, float], numbers: dict[str, float]) -> None:
        """Take over the sums and the means of a window."""
        for name in ("tokens", "sequences", "seconds", "masked", "shortfall"):
            self.totals[name] = self.totals.get(name, 0.0) + sums.get(name, 0.0)
        self.last_train = numbers


@dataclass
class Window:
    """Sums since the last logged step, of this process: losses on the device, the rest on the host."""

    device_sums: dict[str, Tensor]
    host_sums: dict[str, float]

    @classmethod
    def restored(cls, saved: dict[str, float], device: torch.device, is_main: bool) -> Window:
        """The window that a checkpoint has kept; the first process holds it, the others hold zeros."""
        kept = {name: value if is_main else 0.0 for name, value in saved.items()}
        on_device = [name for name in kept if name.endswith(("_loss", "_correct", "_count"))]
        return cls({name: torch.tensor(kept.pop(name), dtype=torch.float64, device=device) for name in on_device}, kept)

    def add(self, result: StepResult, batches: Sequence[Batch], flops: float) -> None:
        """One update."""
        host = {"tokens": sum(batch.num_tokens for batch in batches), "slots": sum(len(batch.input_ids) for batch in batches),
                "sequences": sum(batch.num_sequences for batch in batches), "flops": flops,
                "masked": sum(batch.counts.get("mlm", 0) for batch in batches), "shortfall": sum(batch.shortfall for batch in batches)}
        for name, value in host.items():
            self.host_sums[name] = self.host_sums.get(name, 0.0) + value
        self.device_sums = {name: self.device_sums.get(name, 0.0) + value for name, value in result.sums.items()}

    def add_seconds(self, name: str, seconds: float, world_size: int) -> None:
        """Time spent; the sum over the processes is their mean."""
        self.host_sums[name] = self.host_sums.get(name, 0.0) + seconds / world_size

    def read(self, device: torch.device) -> dict[str, float]:
        """The sums over all processes; waits for the device."""
        return read_sums({**self.device_sums, **self.host_sums}, device)


def speed(sums: dict[str, float], peak: float) -> dict[str, float]:
    """The numbers under `speed/`; `peak` is the matrix rate of all devices in FLOP/s."""
    seconds = max(sums["seconds"], 1e-9)
    return {"speed/tokens_per_second": sums["tokens"] / seconds, "speed/mfu": sums["flops"] / seconds / peak,
            "speed/data_wait": sums["wait_seconds"] / seconds, "speed/padding": 1 - sums["tokens"] / sums["slots"]}


def hold_out(run: Run, progress: Progress, context: torch.autocast, monitor: Monitor) -> dict[str, float]:
    """Evaluate on the held-out batches, show sample predictions, keep `best/`; the numbers under their names, {} without
    held-out text."""
    if not run.held_out:
        return {}
    progress.last_eval = evaluate(run.model, run.held_out, run.device, context, run.world)
    progress.last_eval_step = progress.step
    if monitor.active:
        samples = sample_predictions(run.model, run.held_out, run.tokenizer, run.device, context)
        monitor.text(progress.step, "held-out predictions", samples)
    perplexity = progress.last_eval["perplexity"]
    if progress.best_perplexity is None or perplexity < progress.best_perplexity:
        progress.best_perplexity, progress.best_step, progress.evaluations_without_gain = perplexity, progress.step, 0
        if run.world.is_main:
            ckpt.write_folder(run.output / "best", lambda folder: export(run, progress, folder))
    else:
        progress.evaluations_without_gain += 1
    return {f"eval/{name}": value for name, value in progress.last_eval.items()}


def export(run: Run, progress: Progress, folder) -> None:
    """Model, tokenizer, model card and facts into `folder`; it opens with transformers as it is."""
    facts = {**describe_run(run), "step": progress.step, "held_out_step": progress.last_eval_step, "held_out": progress.last_eval}
    ckpt.write_model(folder, run.model, run.tokenizer, facts)


def save(run: Run, progress: Progress, window: Window, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
         monitor: Monitor) -> None:
    """Checkpoint of the present step: model folder and training state; older ones beyond --keep are removed."""
    progress.window = window.read(run.device)
    states = gather(ckpt.random_states(run.device))
    monitor.flush()

    def write(folder) -> None:
        export(run, progress, folder)
        ckpt.write_state(folder, {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "random_states": states},
                         {**run.saved_values(), "progress": asdict(progress)})

    if run.world.is_main:
        ckpt.write_folder(run.output / f"checkpoint-{progress.step}", write)
        ckpt.prune(run.output, run.config.keep)
        run.remove_replaced()
    wait_for_all()


def restore(run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Optimizer, scaler and random states of `run.checkpoint`."""
    tensors = ckpt.read_tensors(run.checkpoint)
    optimizer.load_state_dict(tensors["optimizer"])
    if scaler.is_enabled() and tensors["scaler"]:
        scaler.load_state_dict(tensors["scaler"])
    states = tensors["random_states"]
    if len(states) == run.world.size:  # on another number of processes dropout goes on from fresh seeds
        ckpt.set_random_states(states[run.world.rank], run.device)


def finish(run: Run, progress: Progress, monitor: Monitor, finished: bool) -> dict[str, float | str]:
    """Write `final/` if the run is at its end, and the summary."""
    if finished and run.world.is_main:
        ckpt.write_folder(run.output / "final", lambda folder: export(run, progress, folder))
    totals = progress.totals
    seconds = max(totals.get("seconds", 0.0), 1e-9)
    summary = {"state": "finished" if finished else "stopped by --max-minutes, --resume goes on", "steps": progress.step,
               "real_tokens": int(totals.get("tokens", 0)), "seconds": seconds,
               "sequences_per_second": totals.get("sequences", 0.0) / seconds, "tokens_per_second": totals.get("tokens", 0.0) / seconds,
               "skipped_steps": progress.skipped, "mask_shortfall": totals.get("shortfall", 0.0) / max(1.0, totals.get("masked", 0.0))}
    summary |= {f"train_{name}": value for name, value in progress.last_train.items()}
    summary |= {f"eval_{name}": value for name, value in progress.last_eval.items()}
    if progress.best_perplexity is not None:
        summary |= {"best_perplexity": progress.best_perplexity, "best_step": progress.best_step}
    monitor.close({f"eval/{name}": value for name, value in progress.last_eval.items()} or {"train/loss": math.nan})
    if run.world.is_main:
        write_json(run.output / "summary.json", summary)
    wait_for_all()
    return summary
