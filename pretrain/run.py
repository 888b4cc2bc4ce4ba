"""`Run`, which holds everything that `train` needs, and its subclass for pretraining.

pretrain/build.py makes a `PretrainingRun` from options, pretrain/finetune/build.py the run for
fine-tuning. The loop asks a run for scores, model folders and numbers to log.
"""

import math
import platform
import shutil
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pretrain import recipe
from pretrain.batch import Batch
from pretrain.card import hub_datasets
from pretrain.cli import command
from pretrain.config import EPOCHS, Config, counted_length, typed
from pretrain.data.collate import Collator
from pretrain.data.loader import PretrainingDataset, TrainData
from pretrain.data.mixture import Mixture
from pretrain.evaluate import ValidationSet, evaluate, sample_predictions
from pretrain.files import lock, write_json, write_text
from pretrain.model.packed import PackedModel, count_flops
from pretrain.resume import portable_options
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import World, gather
from pretrain.runtime.monitor import PRETRAINING_CHARTS, Monitor
from pretrain.runtime.optim import AUTOCAST, autocast
from pretrain.runtime.sharding import whole_weights
from pretrain.schema import (
    AUTO,
    FLAG,
    FLOAT,
    TEXT,
    either,
    integer,
    one_of,
    optional,
    values_of,
)

WORST = (-math.inf, -math.inf)
SAME_PERPLEXITY = 1e-3  # smaller relative differences do not decide which model to use
FEW_TOKENS = 50_000  # for a useful model
# See `PretrainingRun.has_turned`: a share of the run, evaluations, nats.
EARLY, MIN_RISES, MIN_EXCESS = 0.2, 3, 0.05
SAVED_FORM = {  # of training_state.json, see `Run.saved_values`
    "options": {"epochs": either(AUTO, EPOCHS), "max_steps": integer(), "precision": TEXT},
    "step": integer(),
    "finished": FLAG,
    "micro_batch_size": integer(1),
    "total_steps": integer(1),
    "threads": integer(1, 1024),
    "processes": integer(1, 1 << 20),
    "precision": one_of(*AUTOCAST),
}
PRETRAINING_FORM = SAVED_FORM | {
    "recipe": recipe.FORM,
    "steps_per_epoch": integer(1),
    "similar_words": optional(TEXT),  # hash of the table
    "corpus": TEXT,  # fingerprint of the training text
    "corpus_folders": values_of(TEXT, "folders by text"),  # named as in `text_paths`
    "text": optional(values_of(TEXT, "keys by text")),  # the `text_key` of each
}


@dataclass(kw_only=True)
class Run:
    """Everything that `train` needs, already checked. Derived numbers are computed once and saved.

    Subclasses define how to validate, what to export and what to do at the end."""

    asked: Config  # as the user gave it, with "auto" in some options
    config: Config  # with numbers in place of "auto"
    world: World
    device: torch.device
    precision: str  # "bf16", "fp16" or "fp32"
    output: Path
    tokenizer: PreTrainedTokenizerBase
    model: PackedModel
    data: TrainData
    micro_batch_size: int  # in sequences of `counted_length`
    phase_ends: list[int]  # the last step of each phase; the final one is the run's last step
    eval_every: int  # steps
    save_every: int  # steps; 0: only when the run stops early
    data_facts: dict  # identify the data and its order; saved for resuming
    compile: bool = False
    checkpoint: Path | None = None  # to resume from
    saved: dict = field(default_factory=dict)  # plain values of the checkpoint
    replaced: Path | None = None  # the run to --overwrite, kept until this one has a checkpoint
    quiet: bool = False  # no progress bar, no printed numbers

    time_limit = "--max-minutes"  # for messages
    evaluates_first = True  # before step 1
    score = ("perplexity", "loss")  # selects the best model; the second breaks ties
    higher_is_better = False  # for the first score; the second is always a loss
    scores_form = values_of(FLOAT, "numbers by name")  # the form of saved scores
    charts = PRETRAINING_CHARTS
    has_fixed_shapes = True  # of micro-batches, so torch.compile makes one graph per phase
    results = ("final",)  # only a finished run has these

    @property
    def is_extended(self) -> bool:
        """Whether this resumed run ends at a different step than planned before."""
        return bool(self.saved) and self.total_steps != self.saved["total_steps"]

    @property
    def total_steps(self) -> int:
        return self.phase_ends[-1]

    @property
    def error_labels(self) -> dict[str, str]:
        """The options to name when memory is full or a worker dies; see `memory.explained`."""
        return {
            "micro_batch": f"--micro-batch-size {self.micro_batch_size}",
            "workers": "--workers",
        }

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    def sort_key(self, scores: dict) -> tuple[float, float]:
        """Greater for better scores; the least for {} and for scores that are not finite."""
        if not scores:
            return WORST
        first, second = (scores[name] for name in self.score)
        key = (first if self.higher_is_better else -first, -second)
        return key if all(map(math.isfinite, key)) else WORST

    def phase_at(self, step: int) -> int:
        """Index of the phase of `step`, which counts from 1; step 0 belongs to the first phase."""
        return min(bisect_left(self.phase_ends, step), len(self.phase_ends) - 1)

    def is_comparable(self, step: int) -> bool:
        """Whether scores at `step` are comparable with final ones: only in the last phase."""
        return self.phase_at(step) == len(self.phase_ends) - 1

    def logged(self, scores: dict) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in scores.items()}

    def rebuild_command(self, step: int, position: object) -> str:
        """The command that shows the data of a step; "" if there is none."""
        return ""

    def flops(self, batches: Sequence[Batch]) -> float:
        return sum(count_flops(self.model, batch) for batch in batches)

    def open_monitor(self, step: int, evaluated: bool) -> Monitor:
        """Open the log of the run, which continues after `step`."""
        return Monitor(
            self.output,
            step,
            self.total_steps,
            asdict(self.config),
            evaluated=evaluated,
            active=self.world.is_main,
            charts=self.charts,
            score=f"eval/{self.score[0]}",
            quiet=self.quiet,
        )

    def open_output(self) -> None:
        """Create the run folder, under a free name without --output; --overwrite moves an old run
        aside. Call once all is checked."""
        if self.world.is_main:
            if not self.config.output:
                self.output = ckpt.new_folder(self.output)
                lock(self.output)
            results = [*ckpt.checkpoints(self.output), *map(self.output.joinpath, self.results)]
            has_result = any(path.exists() for path in results)
            self.replaced = ckpt.make_output(self.output, self.config.overwrite, has_result)
            if self.checkpoint:
                ckpt.set_aside_after(self.output, ckpt.step_of(self.checkpoint))
            options = portable_options(self.asked)
            for name in ("output", "resume", "overwrite"):  # of this launch only
                del options[name]
            write_json(self.output / "config.json", options)
        self.output = gather(self.output)[0]

    def write_model(self, name: str, state, weights: dict[str, Tensor] | None = None) -> None:
        """Write the model folder `name`, by default with the model's own weights. All processes
        must call this together."""
        if weights is None:
            weights = whole_weights(self.model)
        if self.world.is_main:
            folder = self.output / name
            ckpt.write_folder(folder, lambda partial: self.export(partial, weights, state))

    def remove_replaced(self) -> None:
        """Delete the run that this one replaces. Call once this one has a checkpoint."""
        if self.replaced:
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.replaced = None

    def saved_values(self) -> dict:
        """Plain values to save in a checkpoint; see SAVED_FORM."""
        return {
            "options": portable_options(self.asked),
            "micro_batch_size": self.micro_batch_size,
            "precision": self.precision,
            "total_steps": self.total_steps,
            "threads": torch.get_num_threads(),
            "processes": self.world.size,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            **self.data_facts,
        }

    # For subclasses to implement or extend.

    def validate(self, step: int, stop: Callable[[], int], monitor: Monitor) -> dict | None:
        """Scores on the validation set; {} without one, None if `stop` (a signal) cut it short."""
        raise NotImplementedError

    def export(self, folder: Path, weights: dict[str, Tensor], state) -> None:
        """Write a model folder that opens with transformers."""
        raise NotImplementedError

    def keep_best(self, state) -> None:
        self.write_model("best", state)

    def best_problem(self, step: int) -> str | None:
        """What is wrong with `best/`, the model of `step`, when a run resumes; None if it is intact
        or could be written again, from the checkpoint of that step."""
        best, source = self.output / "best", self.output / f"checkpoint-{step}"
        problem = ckpt.problem_of(best, needed=())
        if problem and source.is_dir() and not ckpt.problem_of(source):
            print(f"{problem}: written again from {source}")
            ckpt.write_copy(source, best)
            return None
        return problem

    def state_dict(self) -> dict[str, Tensor]:
        """The run's own tensors, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""

    def finish(self, state) -> None:
        self.write_model("final", state)

    def complete_summary(self, state, summary: dict) -> None:
        """Add scores to the summary."""

    def notes(self, state) -> list[str]:
        """What a user should know about a finished run besides its numbers."""
        if state.step >= self.total_steps:
            return []
        score, evaluations = self.score[0].replace("_", " "), state.evaluations_without_gain
        reason = f"no better {score} since step {state.best_step:,} ({evaluations} evaluations)"
        stopped = f"stopped early, at step {state.step:,} of {self.total_steps:,}"
        if self.config.patience == AUTO:
            reason = f"the validation loss rose {state.rises} times in a row; --patience 0 goes on"
        return [f"{typed(self.config, 'patience')}: {stopped}; {reason}"]

    def clean_up(self) -> None:  # once the summary of a finished run is written
        self.remove_replaced()


@dataclass(frozen=True)
class Phase:
    """The data of one sequence length; a run without --phases has one phase."""

    dataset: PretrainingDataset | Mixture
    collator: Collator
    validation: ValidationSet | None
    eval_batch_size: int  # sequences in a micro-batch of the validation set
    others: dict[str, ValidationSet] = field(default_factory=dict)  # of the mixture's other texts

    @property
    def max_length(self) -> int:
        return self.dataset.task.max_length

    def fullest_batch(self) -> Batch:
        """With as many masks as at the start or the end of the run, whichever is more."""
        ends = [
            part[part.fullest()._replace(progress=progress)]
            for part in self.dataset.parts
            for progress in (0.0, 1.0)
        ]
        return max(map(self.collator, ends), key=lambda batch: batch.counts["mlm"])


@dataclass(kw_only=True)
class PretrainingRun(Run):
    """Pretraining: validation perplexity selects `best/`; the last model is `final/`."""

    phases: list[Phase]
    situation: recipe.Situation  # what the recipe depends on
    trial_seconds: float | None  # for the fullest micro-batch; None: not measured, as on resume
    added_tokens: dict[str, int] = field(default_factory=dict)  # occurrences in the training text
    passes: tuple[float, ...] = ()  # over each text of a mixture; (): no mixture, or not counted

    @property
    def charts(self) -> dict:
        """Also a chart of the perplexity on each text of a mixture."""
        names = [f"eval_{name}/perplexity" for name in self.phases[-1].others]
        if not names:
            return PRETRAINING_CHARTS
        by_text = {"held-out, by text": ["Multiline", ["eval/perplexity", *names]]}
        return {"perplexity": PRETRAINING_CHARTS["perplexity"] | by_text}

    def logged(self, scores: dict) -> dict[str, float]:
        """`scores` under their names in the log: eval/NAME or, for the other texts of a mixture,
        eval_TEXT/NAME."""
        return {
            f"eval_{name}" if "/" in name else f"eval/{name}": value
            for name, value in scores.items()
        }

    def rebuild_command(self, step: int, position: object) -> str:
        """The command that shows the micro-batches of a step and saves them to a file."""
        size, config = self.micro_batch_size, self.config
        num_sampled = config.batch_size // size
        arguments = ["--config", self.output / "config.json", "--position", *str(position).split()]
        arguments += ["--mask-rate", *config.mask_rate] if config.entity_fill != "none" else []
        if config.phases:
            size = size * counted_length(config) // self.phases[0].max_length
            arguments += ["--phases", *config.phases, "--phase", self.phase_at(step) + 1]
        arguments += ["--micro-batch-size", size, "--sampled", num_sampled]
        arguments += ["--save", "batch.pt"]
        return command("show_masks", *arguments)

    def validate(self, step: int, stop: Callable[[], int], monitor: Monitor) -> dict | None:
        """Scores from `evaluate`, and those on the other texts of a mixture as TEXT/NAME; sample
        predictions go to TensorBoard."""
        phase = self.phases[self.phase_at(step)]
        if phase.validation is None:
            return {}
        model, device, precision = self.model, self.device, self.autocast()
        scores: dict[str, float] = {}
        for name, validation in {"": phase.validation, **phase.others}.items():
            found = evaluate(model, validation, device, precision, self.world, stop)
            if found is None:
                return None
            scores |= {f"{name}/{key}" if name else key: value for key, value in found.items()}
        samples = sample_predictions(model, phase.validation, self.tokenizer, device, precision)
        monitor.log(step, {"held-out predictions": samples})
        return scores

    def export(self, folder: Path, weights: dict[str, Tensor], state) -> None:
        """Write model, tokenizer, model card, and facts that scripts/evaluate.py reads."""
        config = self.config
        phase = self.phases[state.evaluated_in if state.scores else self.phase_at(state.step)]
        facts = {
            "objective": config.objective,
            "max_length": phase.max_length,
            "phases": list(config.phases),
            "masking": config.masking,
            "mask_rate": list(config.mask_rate),
            "started_from": config.model,
            "language": None if config.split_sentences == AUTO else config.split_sentences,
            "datasets": list(hub_datasets(config.train)),
            "eval_tokens": config.eval_tokens,
            "eval_batch_size": phase.eval_batch_size,
            "batch_size": config.batch_size,
            "total_steps": self.total_steps,
            "learning_rate": config.learning_rate,
            "precision": self.precision,
            "corpus": self.data_facts["corpus"],
            "step": state.step,
            "held_out_step": state.evaluated_at if state.scores else 0,
            "held_out": state.scores,
        }
        facts["mix"] = list(config.mix)
        optional = ("phases", "language", "datasets", "mix")
        facts = {name: value for name, value in facts.items() if value or name not in optional}
        ckpt.write_model(folder, self.model, self.tokenizer, facts, weights)

    def has_result(self) -> bool:
        """Whether the run is finished and `final/` is its model. All processes must call this."""
        final, has_final = self.output / "final", False
        if self.world.is_main and self.saved.get("finished") and not self.is_extended:
            folders = [final, self.output / "best"] if self.phases[-1].validation else [final]
            is_whole = not any(ckpt.problem_of(folder, needed=()) for folder in folders)
            step = ckpt.step_of(self.checkpoint)
            has_final = is_whole and ckpt.read_facts(final).get("step") == step
        return gather(has_final)[0]

    def has_turned(self, state) -> bool:
        """Whether the model clearly overfits: its loss rises from evaluation to evaluation and is
        far above the lowest. Early in a run, a rise proves nothing: with a high learning rate, the
        loss of a good model rises before it falls."""
        is_early = state.step < EARLY * self.total_steps
        if is_early or state.rises < MIN_RISES or not state.best_scores:
            return False
        return state.scores["mlm_loss"] - state.best_scores["mlm_loss"] >= MIN_EXCESS

    def recommended(self, state) -> Path:
        """The folder to use: `final/`, unless an earlier model is clearly better, or the model of
        the start is better at all."""
        last, best = self.sort_key(state.scores), self.sort_key(state.best_scores)
        allowed = abs(best[0]) * SAME_PERPLEXITY if state.best_step else 0.0
        return self.output / ("final" if last >= best or last[0] >= best[0] - allowed else "best")

    def notes(self, state) -> list[str]:
        """Also which folder to use instead of `final/`, or that nothing can tell."""
        found, folder = super().notes(state), self.recommended(state)
        if not state.scores:
            expected = "expected --valid PATHS or --valid-fraction above 0"
            problem = "no validation text, so the run cannot tell whether training helped"
            found.append(f"{problem}; {expected}")
        elif folder.name != "final":
            last, lowest = (scores["perplexity"] for scores in (state.scores, state.best_scores))
            reason = "the perplexity has risen since"
            if state.best_step == 0:
                reason = "training did not improve the starting model"
            numbers = f"validation perplexity {lowest:.4g}, in final/ {last:.4g}"
            found.append(f"use {folder}, of step {state.best_step:,}: {numbers}; {reason}")
        return found

    def complete_summary(self, state, summary: dict) -> None:
        """Add the last and the best scores, and the folder to use."""
        summary |= {f"eval_{name}": value for name, value in state.scores.items()}
        if state.best_scores:
            summary["best_perplexity"] = state.best_scores["perplexity"]
            summary["best_step"] = state.best_step
        if state.is_finished(self):
            summary["use"] = str(self.recommended(state))

    def open_output(self) -> None:
        """Create the run folder and list the added tokens in it."""
        super().open_output()
        if self.added_tokens and self.world.is_main:
            lines = [f"{token}\t{count}\n" for token, count in self.added_tokens.items()]
            write_text(self.output / "added_tokens.tsv", "".join(lines))


def print_plan(run: PretrainingRun) -> None:
    """Print every derived number, before training starts."""
    config, world, settings = run.config, run.world, run.model.config
    steps, epoch = run.total_steps, run.data_facts["steps_per_epoch"]
    weights = sum(weight.numel() for weight in run.model.parameters())
    length, size = counted_length(config), run.micro_batch_size
    accumulation = config.batch_size // size // world.size
    processes = f"{world.size} process{'es' if world.size > 1 else ''}"
    micro_batches = f"{accumulation} micro-batch{'es' if accumulation > 1 else ''}"
    print(
        f"model: {settings.num_hidden_layers}x{settings.hidden_size}, {weights / 1e6:.1f} M "
        f"weights, vocabulary {settings.vocab_size:,}, on {run.device} in {run.precision}, "
        f"attention by {run.model.attention}{', compiled' if run.compile else ''}\n"
        f"step: {config.batch_size} x {length} = {config.batch_size * length:,} tokens, in "
        f"{micro_batches} of {size} x {length} on each of {processes}\n"
        f"run: {steps:,} steps, {steps / epoch:.1f} epochs of {epoch:,} steps; evaluation every "
        f"{run.eval_every:,}, checkpoint every {run.save_every:,}; {run.output}"
    )
    if not run.saved:
        print(recipe.explain(run.asked, config, run.situation, steps))
    if run.passes:
        shares = [
            f"{weight / sum(config.mix):.1%} {path} (read {count:.3g} times)"
            for path, weight, count in zip(config.train, config.mix, run.passes)
        ]
        print(f"mix: {', '.join(shares)}; epochs are passes over the first text")
    if run.situation.text_tokens < FEW_TOKENS:
        ways = "more text"
        if run.situation.start == recipe.SCRATCH:
            ways = "more text, or a pretrained --model,"
        problem = f"only {run.situation.text_tokens:,} tokens; expect a weak model"
        print(f"{typed(config, 'train')}: {problem}: {ways} helps most")
    if run.trial_seconds:
        minutes = steps * accumulation * run.trial_seconds / 60
        shown = f"{minutes:.2g} minutes" if minutes < 99.5 else f"{minutes / 60:,.1f} hours"
        print(f"time: about {shown} on this machine, without evaluations")
    if not config.phases:
        return
    tokens = run.phases[0].dataset.task.token_limit
    starts = [1, *(end + 1 for end in run.phase_ends)]
    for index, phase in enumerate(run.phases):
        print(
            f"phase {index + 1}: steps {starts[index]:,} to {run.phase_ends[index]:,}, sequences "
            f"of {phase.max_length} tokens, {tokens / phase.max_length:.4g} per micro-batch"
        )
