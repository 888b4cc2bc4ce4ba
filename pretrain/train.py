"""The training loop, in plain PyTorch: `train_step` is one optimizer update, `train` is a run.

The input is a `Run` (pretrain/run.py): a model that returns summed losses, an iterator over the
micro-batches of each step, a validation function. Pretraining and fine-tuning share this file.

To change the loss, edit `losses` of the model; masks, pretrain/data/masking.py; optimizers,
pretrain/runtime/optim.py; the update itself, this file.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.errors import UserError, first_line
from pretrain.files import write_json
from pretrain.metrics import LossTotals, Meter
from pretrain.run import FINISHED, Run
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import gather, gradient_sync, sum_counts, wait_for_all, wrap
from pretrain.runtime.memory import explained
from pretrain.runtime.monitor import Monitor
from pretrain.runtime.nan_guard import NanGuard
from pretrain.runtime.optim import (
    check_state,
    groups_of,
    make_optimizers,
    make_schedule,
    peak_flops,
    step_if,
)
from pretrain.runtime.sharding import OptimizerState, RandomState, whole, whole_weights
from pretrain.runtime.stop import StopFlag
from pretrain.schema import AUTO, integer, misfit
from pretrain.signals import Interrupted, handled


@dataclass(frozen=True)
class StepResult:
    """The result of an update, still on the device: nothing has waited for it."""

    losses: LossTotals  # of this process; zeros if the step was not finite
    finite: Tensor  # bool scalar; False: the step changed nothing
    logged: dict[str, Tensor | float]  # numbers to log; add yours in `train_step`


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
    learning_rate: float,
    max_grad_norm: float,
    device: torch.device,
    world_size: int = 1,
) -> StepResult:
    """One update from this process's micro-batches; `max_grad_norm` 0 turns clipping off. `model`
    may be wrapped in DDP.

    Losses are sums, divided once by the counts of the whole step (all micro-batches and processes):
    a mean of means would give more weight to tokens of micro-batches with few masks."""
    names = batches[0].denominators
    counts = sum_counts({name: sum(b.denominators[name] for b in batches) for name in names})
    totals = LossTotals()
    for number, batch in enumerate(batches):
        with gradient_sync(model, last=number == len(batches) - 1):
            with autocast:
                losses = model(batch.to(device))
                # `world_size` undoes DDP's averaging of gradients over processes.
                loss = sum(
                    term.sum * (term.weight * world_size / counts[term.count or name])
                    for name, term in losses.items()
                )
            # Times 1, or NaN if the loss is not finite: gradients show that to all processes.
            loss = loss * (1 + 0 * loss.detach())
            scaler.scale(loss).backward()
        totals += LossTotals.of(losses, batch.denominators)

    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    weights = [weight for group in groups_of(optimizers) for weight in group["params"]]
    grad_norm = whole(nn.utils.clip_grad_norm_(weights, max_grad_norm or math.inf))
    finite = torch.isfinite(grad_norm)
    logged = {"optim/learning_rate": learning_rate, "optim/grad_norm": grad_norm}
    for group in groups_of(optimizers):
        group["lr"] = learning_rate * group.get("rate_scale", 1.0)
    for optimizer in optimizers:
        step_if(finite, optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return StepResult(totals.where(finite), finite, logged)


@dataclass
class TrainState:
    """Progress of a run. Other state lives with its owner; see `parts` in `train`."""

    step: int = 0  # optimizer updates done
    evaluated_at: int = -1  # the last step that was evaluated
    evaluated_in: int = 0  # the phase of that step at the time; extending a run moves the phases
    scores: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best_scores: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    evaluations_without_gain: int = 0
    rises: int = 0  # evaluations in a row with worse scores than the one before

    def record(self, step: int, scores: dict[str, float], run: Run) -> bool:
        """Record an evaluation. Returns whether it is the best so far in the last phase."""
        was_in_last_phase = self.evaluated_in == len(run.phase_ends) - 1
        before = self.scores if was_in_last_phase else {}
        self.scores, self.evaluated_at, self.evaluated_in = scores, step, run.phase_at(step)
        if not scores or not run.is_comparable(step):
            return False
        is_worse = run.sort_key(scores) < run.sort_key(before)
        self.rises = self.rises + 1 if is_worse else 0
        if run.sort_key(scores) <= run.sort_key(self.best_scores):
            self.evaluations_without_gain += 1
            return False
        self.best_scores, self.best_step, self.evaluations_without_gain = scores, step, 0
        return True

    def is_finished(self, run: Run) -> bool:
        """Whether the last step, or the one where --patience ran out, is done and evaluated."""
        is_last = self.step >= run.total_steps or self.is_out_of_patience(run)
        return is_last and self.evaluated_at == self.step

    def is_out_of_patience(self, run: Run) -> bool:
        """Whether --patience ran out; "auto": whether the model clearly overfits."""
        if run.config.patience != AUTO:
            return 0 < run.config.patience <= self.evaluations_without_gain
        return self.evaluations_without_gain > 0 and run.has_turned(self)

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    @staticmethod
    def form(run: Run) -> dict:
        return {
            "step": integer(),
            "best_step": integer(),
            "evaluations_without_gain": integer(),
            "rises": integer(),
            "evaluated_at": integer(-1),
            "evaluated_in": integer(0, len(run.phase_ends) - 1),
            "scores": run.scores_form,
            "best_scores": run.scores_form,
        }


def train(run: Run) -> dict:
    """Train to the end, from the start or from `run.checkpoint`, and return the summary.

    On a signal, finishes and saves the current step, then raises `Interrupted`."""
    config, device, world = run.config, run.device, run.world
    model = wrap(run.model, run.compile, run.has_fixed_shapes)
    optimizers = make_optimizers(run.model, config)
    learning_rate = make_schedule(
        config.schedule, config.learning_rate, config.warmup, run.total_steps
    )
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
    autocast, max_norm = run.autocast(), config.max_grad_norm

    state = TrainState(evaluated_at=-1 if run.evaluates_first else 0)
    meter = Meter(device, world, peak_flops(device, run.precision))
    guard = NanGuard(rebuild=run.rebuild_command)
    parts = {
        "run": run,
        "train": state,
        "data": run.data,
        "optimizer": OptimizerState(run.model, optimizers),
        "scaler": scaler,
        "guard": guard,
        "meter": meter,
        # Last: nothing may draw random numbers between restoring this and the first step.
        "random": RandomState(device, world),
    }
    if run.checkpoint:
        restore(run, state, parts)
    saved_at = (state.step, state.evaluated_at)
    monitor = run.open_monitor(state.step, evaluated=state.evaluated_at == state.step)
    guard.report = monitor.say
    run.model.train()
    stop = StopFlag(config.max_minutes, run.time_limit)
    with handled(stop.note), explained(*run.error_labels):
        while True:
            step = state.step
            evaluate_now = step >= run.total_steps or step % run.eval_every == 0
            if evaluate_now and state.evaluated_at != step:
                scores = run.validate(step, stop.signaled, monitor)
                if scores is not None:  # not cut short by a signal
                    monitor.log(step, run.logged(scores))
                    if state.record(step, scores, run):
                        run.keep_best(state)
            finished = state.is_finished(run)
            stopping = not finished and stop.agreed()
            save_now = stopping or (run.save_every and (finished or step % run.save_every == 0))
            if step and save_now and saved_at != (step, state.evaluated_at):
                monitor.flush()
                save_checkpoint(run, state, parts)
                saved_at = (step, state.evaluated_at)
            if finished or stopping:
                break

            with meter.waiting():
                batches = next(run.data)  # the micro-batches of this process
            rate = learning_rate(step + 1)
            result = train_step(
                model, batches, optimizers, scaler, autocast, rate, max_norm, device, world.size
            )
            state.step += 1
            guard.observe(result.finite, state.step, run.data.position)
            meter.add(result.losses, result.logged, batches, run.flops(batches))
            monitor.advance()
            if state.step in (1, *run.phase_ends) or state.step % config.log_every == 0:
                scale = {"optim/loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}
                monitor.log(state.step, meter.flush() | run.data.logged() | scale)
        # Inside the `with`: a signal must not keep a finished run from writing its result.
        return conclude(run, state, meter, guard, monitor, stop)


def save_checkpoint(run: Run, state: TrainState, parts: dict) -> None:
    """Write a checkpoint of the current step and delete old ones beyond --keep.

    All processes must call this together: some parts are gathered."""
    states = {name: part.state_dict() for name, part in parts.items()}
    weights = whole_weights(run.model)

    def write(folder: Path) -> None:
        run.export(folder, weights, state)
        values = run.saved_values() | {"step": state.step, "finished": state.is_finished(run)}
        ckpt.write_state(folder, states, values)

    if run.world.is_main:
        ckpt.write_folder(run.output / f"checkpoint-{state.step}", write)
        ckpt.prune(run.output, run.config.keep)
        run.remove_replaced()
    wait_for_all()


def restore(run: Run, state: TrainState, parts: dict) -> None:
    """Load every part from `run.checkpoint`; UserError if one does not fit."""
    states = ckpt.read_states(run.checkpoint)
    forms = {name: getattr(part, "state_form", {}) for name, part in parts.items()}
    problem = misfit(states, forms | {"train": TrainState.form(run)})
    if problem:
        raise UserError(f"{run.checkpoint}: {problem}")
    try:
        for name, part in parts.items():
            if states[name]:  # the scaler's is empty without fp16
                part.load_state_dict(states[name])
        check_state(parts["optimizer"].optimizers)
        if state.best_scores:
            run.sort_key(state.best_scores)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        problem = f"does not fit the model and the options ({first_line(error)})"
        raise UserError(f"{run.checkpoint}: {problem}") from error
    if run.is_extended:
        state.evaluations_without_gain = state.rises = 0
    is_wanted = state.best_scores and run.world.is_main
    damage = gather(run.repair_best(state.best_step) if is_wanted else None)[0]
    if damage and state.is_finished(run):
        print(f"{damage}, and no checkpoint has its weights, so it stays as it is")
    elif damage:
        print(f"{damage}: the next evaluation rewrites best/")
        state.best_scores = {}


def conclude(
    run: Run, state: TrainState, meter: Meter, guard: NanGuard, monitor: Monitor, stop: StopFlag
) -> dict:
    """Write `final/` if the run is finished; write and return the summary."""
    finished = state.is_finished(run)
    outcome = FINISHED if finished else f"stopped by {stop.reason}; resume to continue"
    skipped = guard.state_dict()["skipped"]
    summary = {"state": outcome, "steps": state.step, **meter.summary(), "skipped_steps": skipped}
    if finished:
        guard.check_enough(state.step)
        run.finish(state)
    run.complete_summary(state, summary)
    if finished and (notes := run.notes(state)):
        summary["notes"] = notes
    monitor.close(run.logged(state.scores) or {"train/loss": math.nan})
    if run.world.is_main:
        write_json(run.output / "summary.json", summary)
        if finished:
            run.clean_up()
    wait_for_all()
    if stop.signal and not finished:
        saved = f"saved step {state.step:,} of {run.total_steps:,}"
        done = saved if state.step else "nothing to save before the first step"
        raise Interrupted(stop.signal, f"{done}; stopped by")
    return summary
