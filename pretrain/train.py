"""THE loop: `train_step` is one optimizer update, `train` is a run. Plain PyTorch, to be edited.

What flows in is a `Run` (pretrain/setup.py): a model that returns summed losses, a dataset of micro-batches, held-out batches,
and the derived numbers. To change the objective, change the model's `forward` and `Batch.counts`; to change what is
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
from pretrain.evaluate import add_up, evaluate, sample_predictions, summarize
from pretrain.model.bert import count_flops
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import any_rank, gather, gradient_sync, sum_counts, sum_over_ranks, wait_for_all, wrap
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
    window = Window.fresh(device, progress.window if world.is_main else {})
    watch = FiniteWatch(progress.skipped)
    handled_step = progress.step if run.checkpoint else -1  # evaluated, logged and saved before the run was resumed
    monitor = Monitor(run.output, handled_step + 1, run.total_steps, asdict(config), active=world.is_main)
    sampler = MicroBatchSampler(run.dataset, progress.position, world.rank, world.size)
    loader = iter(make_loader(run.dataset, run.collator, sampler, config.workers, pin_memory=device.type == "cuda"))
    peak = peak_flops(device, run.precision)
    begin, numbers, out_of_time = time.monotonic(), {}, False
    model.train()
    if run.checkpoint:  # random states last: nothing may draw between here and the first step
        restore(run, optimizer, scaler)
    while True:
        step = progress.step
        finished = step >= run.total_steps
        if step != handled_step:
            if finished or step % run.eval_every == 0:
                numbers |= hold_out(run, progress, context, monitor)
                finished |= 0 < config.patience <= progress.evaluations_without_gain
            if numbers:
                monitor.log(step, numbers)
            # At least one step first, so that a run restarted again and again goes on.
            out_of_time = step > 0 and any_rank(0 < config.max_minutes * 60 <= time.monotonic() - begin)
            if step and (finished or out_of_time or step % run.save_every == 0):
                watch_message(watch.observe(None), monitor)
                progress.skipped, progress.finished = watch.skipped, finished
                save(run, progress, window, optimizer, scaler, monitor)
        if finished or out_of_time:
            break

        tick = time.perf_counter()
        batches = [next(loader) for _ in range(micro_batches // world.size)]
        window.wait_seconds += time.perf_counter() - tick
        rate = learning_rate(step + 1)
        result = train_step(trained, model.loss_weights, batches, optimizer, scaler, context, rate, config.max_grad_norm, device,
                            world.size)
        watch_message(watch.observe(result.finite, f"at step {step + 1}, data position {tuple(progress.position)}"), monitor)
        progress.step, progress.position = step + 1, run.dataset.advance(progress.position, micro_batches)
        window.add(result, batches, sum(count_flops(model, batch) for batch in batches))
        numbers = {}
        if progress.step in (1, run.total_steps) or progress.step % config.log_every == 0:
            numbers = {**window.read(model.loss_weights, tick, peak * world.size), "optim/learning_rate": rate,
                       "optim/grad_norm": float(result.grad_norm), "memory/peak_bytes": peak_memory_bytes(device)}
            progress.add_window(window)
            window = Window.fresh(device)
        else:
            window.seconds += time.perf_counter() - tick
        monitor.advance()
    return finish(run, progress, window, monitor, finished)


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint needs beside weights, optimizer and random states."""

    step: int = 0  # optimizer updates done
    position: DataPosition = DataPosition(0, 0, 0)  # of the next micro-batch
    num_tokens: float = 0.0  # real ones, up to the last logged step
    num_sequences: float = 0.0
    seconds: float = 0.0  # of training, without evaluations and saving
    skipped: int = 0  # steps that were not finite
    best_perplexity: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    last_train: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    window: dict[str, float] = field(default_factory=dict)  # sums since the last logged step
    finished: bool = False

    def __post_init__(self):
        self.position = DataPosition(*self.position)

    def add_window(self, window: Window) -> None:
        """Take over the totals of a window that has been read."""
        self.num_tokens += window.num_tokens
        self.num_sequences += window.num_sequences
        self.seconds += window.seconds
        self.last_train = window.numbers


@dataclass
class Window:
    """Sums since the last logged step; the losses stay on the device until they are read."""

    total: dict[str, Tensor]
    known: dict[str, float] = field(default_factory=dict)  # what the host knows: tokens, slots, sequences, flops
    seconds: float = 0.0
    wait_seconds: float = 0.0
    num_tokens: float = 0.0  # of all processes, once read
    num_sequences: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)

    @classmethod
    def fresh(cls, device: torch.device, sums: dict[str, float] | None = None) -> Window:
        """Empty, or with the sums that a checkpoint has kept."""
        return cls({key: torch.tensor(value, dtype=torch.float64, device=device) for key, value in (sums or {}).items()})

    def add(self, result: StepResult, batches: Sequence[Batch], flops: float) -> None:
        """One update."""
        known = {"tokens": sum(batch.num_tokens for batch in batches), "slots": sum(len(batch.input_ids) for batch in batches),
                 "sequences": sum(batch.num_sequences for batch in batches), "flops": flops}
        self.known = {key: self.known.get(key, 0.0) + value for key, value in known.items()}
        self.total = {key: self.total.get(key, 0.0) + value for key, value in result.sums.items()}

    def sums(self) -> dict[str, float]:
        """The sums over all processes; waits for the device."""
        total = self.total | {key: torch.tensor(value, dtype=torch.float64) for key, value in self.known.items()}
        if not total:
            return {}
        keys = sorted(total)
        device = next(iter(self.total.values())).device
        return dict(zip(keys, sum_over_ranks(torch.stack([total[key].to(device) for key in keys])).tolist()))

    def read(self, loss_weights: dict[str, float], tick: float, peak: float) -> dict[str, float]:
        """The window's numbers; waits for the device, and ends the window's clock, the last step having begun at `tick`."""
        sums = self.sums()
        parts = [{name: sums[f"{name}_{kind}"] for name in loss_weights} for kind in ("loss", "correct", "count")]
        self.numbers = summarize(*parts, loss_weights)
        self.num_tokens, self.num_sequences = sums["tokens"], sums["sequences"]
        self.seconds += time.perf_counter() - tick
        speed = {"tokens_per_second": sums["tokens"] / self.seconds, "mfu": sums["flops"] / self.seconds / peak,
                 "data_wait": self.wait_seconds / self.seconds, "padding": 1 - sums["tokens"] / sums["slots"]}
        return {f"train/{name}": value for name, value in self.numbers.items()} | {
            f"speed/{name}": value for name, value in speed.items()}


def watch_message(message: str | None, monitor: Monitor) -> None:
    """Tell what the watch over finite steps has seen, if anything."""
    if message:
        monitor.say(message)


def hold_out(run: Run, progress: Progress, context: torch.autocast, monitor: Monitor) -> dict[str, float]:
    """Evaluate on the held-out batches, show sample predictions, keep `best/`; the numbers under their names, {} without
    held-out text."""
    if not run.held_out:
        return {}
    progress.last_eval = evaluate(run.model, run.held_out, run.device, context, run.world)
    if monitor.active:
        samples = sample_predictions(run.model, run.held_out, run.tokenizer, run.device, context)
        monitor.text(progress.step, "held-out predictions", samples)
    perplexity = progress.last_eval["perplexity"]
    if progress.best_perplexity is None or perplexity < progress.best_perplexity:
        progress.best_perplexity, progress.best_step, progress.evaluations_without_gain = perplexity, progress.step, 0
        if progress.step and run.world.is_main:
            ckpt.write_folder(run.output / "best", lambda folder: export(run, progress, folder))
    else:
        progress.evaluations_without_gain += 1
    return {f"eval/{name}": value for name, value in progress.last_eval.items()}


def export(run: Run, progress: Progress, folder) -> None:
    """Model, tokenizer, model card and facts into `folder`; it opens with transformers as it is."""
    facts = {**describe_run(run), "step": progress.step, "held_out": progress.last_eval}
    ckpt.write_model(folder, run.model, run.tokenizer, facts)


def save(run: Run, progress: Progress, window: Window, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
         monitor: Monitor) -> None:
    """Checkpoint of the present step: model folder and training state; older ones beyond --keep are removed."""
    progress.window = window.sums()
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


def finish(run: Run, progress: Progress, window: Window, monitor: Monitor, finished: bool) -> dict[str, float | str]:
    """Write `final/` if the run is at its end, and the summary."""
    if window.total:
        window.num_tokens, window.num_sequences = (window.sums()[key] for key in ("tokens", "sequences"))
        window.numbers = progress.last_train
        progress.add_window(window)
    if finished and run.world.is_main:
        ckpt.write_folder(run.output / "final", lambda folder: export(run, progress, folder))
    summary = {"state": "finished" if finished else "stopped by --max-minutes, --resume goes on", "steps": progress.step,
               "real_tokens": progress.num_tokens, "seconds": round(progress.seconds, 3),
               "sequences_per_second": progress.num_sequences / max(progress.seconds, 1e-9),
               "tokens_per_second": progress.num_tokens / max(progress.seconds, 1e-9), "skipped_steps": progress.skipped}
    summary |= {f"train_{name}": value for name, value in progress.last_train.items()}
    summary |= {f"eval_{name}": value for name, value in progress.last_eval.items()}
    if progress.best_perplexity is not None:
        summary |= {"best_perplexity": progress.best_perplexity, "best_step": progress.best_step}
    monitor.close({f"eval/{name}": value for name, value in progress.last_eval.items()} or {"train/loss": math.nan})
    if run.world.is_main:
        ckpt.write_json(run.output / "summary.json", summary)
    wait_for_all()
    return summary
