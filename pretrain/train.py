"""THE loop: `train_step` is one optimizer update, `train` is a run. Plain PyTorch, to be edited.

What flows in is a `Run` (pretrain/setup.py): a model that returns summed losses, a dataset of micro-batches, held-out batches,
and the derived numbers. To change the objective, change the model's `score` and `Batch.counts`; to change what is
masked, pretrain/data/masking.py; to change the update, this file.
"""
from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.command import Interrupted, UserError, first_line
from pretrain.data.dataset import MicroBatchSampler, make_loader
from pretrain.evaluate import add_up, evaluate, sample_predictions, summarize
from pretrain.files import write_json
from pretrain.model.bert import count_flops
from pretrain.parts import Phase
from pretrain.progress import Progress, Window, speed
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import (
    any_rank,
    gather,
    gradient_sync,
    load_averages,
    sum_counts,
    wait_for_all,
    whole,
    whole_averages,
    whole_weights,
    wrap,
)
from pretrain.runtime.faults import explained
from pretrain.runtime.monitor import Monitor, peak_memory_bytes
from pretrain.runtime.optim import FiniteWatch, autocast, make_optimizer, make_schedule, peak_flops
from pretrain.runtime.signals import StopSignals
from pretrain.setup import Run, describe_run

FINISHED = "finished"  # the state of a run that has no step left


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
    global_counts = sum_counts(counts)
    scale = {name: weight * world_size / global_counts[name] for name, weight in loss_weights.items()}  # DDP averages over processes
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
    grad_norm = whole(nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
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
    """Train from the start or from `run.checkpoint` to the end; returns the summary, which is also in summary.json.

    A signal ends it after the step: the run is saved, and `Interrupted` raised."""
    with StopSignals() as signals, explained(run.config.micro_batch_size):
        summary = _train(run, signals)
    if summary["state"] != FINISHED and signals.number:
        saved = f"step {summary['steps']:,} of {run.total_steps:,} is saved" if summary["steps"] else "before the first step"
        raise Interrupted(signals.number, f"{saved}; stopped by")
    return summary


def _train(run: Run, signals: StopSignals) -> dict[str, float | str]:
    config, model, device, world = run.config, run.model, run.device, run.world
    trained = wrap(model, run.compile)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay, config.adam_betas, config.adam_epsilon)
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
    context = autocast(device, run.precision)
    learning_rate = make_schedule(config.schedule, config.learning_rate, config.warmup, run.total_steps)
    micro_batches = config.batch_size // config.micro_batch_size
    progress = Progress.restored(run.state.get("progress"))
    window = Window.restored(progress.window, device, world.is_main)
    watch = FiniteWatch(progress.skipped, progress.skipped_in_a_row, run.rebuild)
    monitor = Monitor(run.output, progress.step + progress.is_logged, run.total_steps, asdict(config), active=world.is_main)
    progress.finished = run.is_finished  # which may have been given more steps
    first_step, resumed_at = progress.step, (progress.step, progress.is_logged)
    phase = loader = None
    peak = peak_flops(device, run.precision)
    begin = time.monotonic()
    model.train()
    if run.checkpoint:  # random states last: nothing may draw between here and the first step
        restore(run, optimizer, scaler)
    while True:
        step, stop = progress.step, signals.agreed()
        if not progress.is_logged and not stop:
            is_last = step >= run.total_steps
            if is_last or step % run.every(config.eval_every) == 0:
                held_out = hold_out(run, progress, context, monitor, signals)
                stop = signals.number if held_out is None else 0
                is_last |= 0 < config.patience <= progress.evaluations_without_gain
                progress.row |= held_out or {}
            if not stop:
                if config.phases and progress.row:
                    progress.row["train/max_length"] = run.phase_at(step - 1).max_length
                monitor.log(step, progress.row)
                progress.row, progress.is_logged, progress.finished = {}, True, is_last
        # At least one step first, so that a run restarted again and again goes on.
        out_of_time = step > first_step and config.max_minutes > 0 and any_rank(time.monotonic() - begin >= config.max_minutes * 60)
        ends = progress.finished or stop or out_of_time
        if step and (step, progress.is_logged) != resumed_at and (ends or step % run.every(config.save_every) == 0):
            monitor.say(watch.observe(None))
            progress.skipped, progress.skipped_in_a_row = watch.skipped, watch.in_a_row
            save(run, progress, window, optimizer, scaler, monitor)
        if ends:
            break

        tick = time.perf_counter()
        if (wanted := run.phase_at(step)) is not phase:  # at the start, and where the length changes; the workers of the old loader end
            phase = wanted
            loader = open_phase(run, phase, progress, monitor)
        batches = [next(loader) for _ in range(micro_batches // world.size)]
        window.add_seconds("wait_seconds", time.perf_counter() - tick, world.size)
        rate = learning_rate(step + 1)
        result = train_step(trained, model.loss_weights, batches, optimizer, scaler, context, rate, config.max_grad_norm, device,
                            world.size)
        position = progress.position._replace(mask_rate=run.mask_rate(step))
        monitor.say(watch.observe(result.finite, step + 1, tuple(position)))
        progress.step, progress.position, progress.is_logged = step + 1, phase.dataset.advance(progress.position, micro_batches), False
        window.add(result.sums, batches, sum(count_flops(model, batch) for batch in batches))
        logged = progress.step in (1, *run.phase_ends) or progress.step % config.log_every == 0
        grad_norm = float(result.grad_norm) if logged else None  # waits for the device, so that the clock is right
        window.add_seconds("seconds", time.perf_counter() - tick, world.size)
        if logged:
            sums = window.read(device)
            means = summarize(sums, model.loss_weights)
            progress.row = {f"train/{name}": value for name, value in means.items()} | speed(sums, peak * world.size) | {
                "optim/learning_rate": rate, "optim/grad_norm": grad_norm, "memory/peak_bytes": peak_memory_bytes(device)}
            if position.mask_rate is not None:
                progress.row["optim/mask_rate"] = position.mask_rate
            if scaler.is_enabled():
                progress.row["optim/loss_scale"] = scaler.get_scale()
                monitor.say(watch.observe_scale(scaler))
            progress.add_window(sums, means)
            window = Window({}, {})
        monitor.advance()
    progress.add_window(window.read(device), progress.last_train)
    return finish(run, progress, monitor, signals.number)


def open_phase(run: Run, phase: Phase, progress: Progress, monitor: Monitor) -> Iterator[Batch]:
    """Batches of `phase` from the next step on. The shards of an epoch come in one order, whatever the length, but a position within
    one means nothing at another length: what is left of it is passed over, so that no text comes twice in an epoch."""
    config, step = run.config, progress.step
    if phase.number != progress.phase:
        progress.phase, progress.position = phase.number, phase.dataset.next_whole_shard(progress.position)
        monitor.say(f"step {step + 1}: from here on sequences of {phase.max_length} tokens, from data position {tuple(progress.position)}")
    micro_batches = config.batch_size // config.micro_batch_size
    sampler = MicroBatchSampler(phase.dataset, progress.position, run.world.rank, run.world.size,
                                mask_rate=lambda number: run.mask_rate(step + number // micro_batches))
    return make_loader(phase.dataset, phase.collator, sampler, config.workers, pin_memory=run.device.type == "cuda")


def hold_out(run: Run, progress: Progress, context: torch.autocast, monitor: Monitor, signals: StopSignals) -> dict[str, float] | None:
    """Evaluate on the held-out batches of the phase, show sample predictions, keep `best/`; the numbers under their names, {} without
    held-out text, None where a signal has come."""
    phase = run.phase_at(progress.step - 1)
    if not phase.held_out:
        return {}
    numbers = evaluate(run.model, phase.held_out, run.device, context, run.world, signals.agreed)
    if numbers is None:
        return None
    progress.last_eval, progress.last_eval_step, progress.last_eval_phase = numbers, progress.step, phase.number
    monitor.text(progress.step, "held-out predictions", sample_predictions(run.model, phase.held_out, run.tokenizer, run.device, context))
    perplexity = numbers["perplexity"]
    is_last = phase is run.phases[-1]  # perplexities at different lengths do not compare
    if is_last and perplexity < (math.inf if progress.best_perplexity is None else progress.best_perplexity):
        progress.best_perplexity, progress.best_step, progress.evaluations_without_gain = perplexity, progress.step, 0
        weights = whole_weights(run.model)
        if run.world.is_main:
            ckpt.write_folder(run.output / "best", lambda folder: export(run, progress, folder, weights))
    elif is_last:
        progress.evaluations_without_gain += 1
    return {f"eval/{name}": value for name, value in numbers.items()}


def export(run: Run, progress: Progress, folder: Path, weights: dict[str, Tensor]) -> None:
    """Model with `weights`, tokenizer, model card and facts into `folder`; it opens with transformers as it is."""
    phase = run.phases[: progress.last_eval_phase + 1][-1] if progress.last_eval else run.phase_at(progress.step - 1)
    facts = {**describe_run(run, phase), "step": progress.step, "held_out_step": progress.last_eval_step, "held_out": progress.last_eval}
    ckpt.write_model(folder, run.model, run.tokenizer, facts, weights)


def save(run: Run, progress: Progress, window: Window, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
         monitor: Monitor) -> None:
    """Checkpoint of the present step: model folder and training state; older ones beyond --keep are removed."""
    progress.window = window.read(run.device)
    states = gather(ckpt.random_states(run.device))
    weights, averages = whole_weights(run.model), whole_averages(run.model, optimizer)
    monitor.flush()

    def write(folder: Path) -> None:
        export(run, progress, folder, weights)
        ckpt.write_state(folder, {"optimizer": averages, "scaler": scaler.state_dict(), "random_states": states},
                         {**run.saved_values(), "progress": asdict(progress)})

    if run.world.is_main:
        ckpt.write_folder(run.output / f"checkpoint-{progress.step}", write)
        ckpt.prune(run.output, run.config.keep)
        run.remove_replaced()
    wait_for_all()


def restore(run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Optimizer, scaler and random states of `run.checkpoint`."""
    tensors = ckpt.read_tensors(run.checkpoint)
    try:
        load_averages(run.model, optimizer, tensors["optimizer"])
        if scaler.is_enabled() and tensors["scaler"]:
            scaler.load_state_dict(tensors["scaler"])
        states = tensors["random_states"]
        if len(states) == run.world.size:
            ckpt.set_random_states(states[run.world.rank], run.device)
        else:  # dropout goes on from fresh seeds
            torch.manual_seed(run.config.seed + run.world.rank + run.state["progress"]["step"] * 1_000_003)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{run.checkpoint / ckpt.STATE_TENSORS}: does not fit the model ({first_line(error)})") from error


def finish(run: Run, progress: Progress, monitor: Monitor, signal_number: int) -> dict[str, float | str]:
    """Write `final/` if the run is at its end, and the summary."""
    weights = whole_weights(run.model) if progress.finished else {}
    if progress.finished and run.world.is_main:
        ckpt.write_folder(run.output / "final", lambda folder: export(run, progress, folder, weights))
    totals = progress.totals
    seconds = max(totals.get("seconds", 0.0), 1e-9)
    reason = signal.Signals(signal_number).name if signal_number else "--max-minutes"
    summary = {"state": FINISHED if progress.finished else f"stopped by {reason}, --resume goes on", "steps": progress.step,
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
