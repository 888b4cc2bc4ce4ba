"""What `train` runs on: `Run`, its subclass for pretraining, and what a resumed run keeps.

pretrain/build.py makes a `PretrainingRun` from options, pretrain/finetune/build.py one for
fine-tuning. The loop asks a run for scores, model folders and numbers, and decides the rest.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pretrain.batch import Batch
from pretrain.config import MODEL_SIZES, Config, may_change, phase_ends, typed
from pretrain.data.collate import Collator
from pretrain.data.loader import PretrainingDataset, TrainData
from pretrain.errors import UserError, check, option_named
from pretrain.evaluate import ValidationSet, evaluate, sample_predictions
from pretrain.files import write_json, write_text
from pretrain.model.packed import PackedModel, count_flops
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import World, gather, wait_for_all
from pretrain.runtime.monitor import PRETRAINING_CHARTS, Monitor
from pretrain.runtime.optim import AUTOCAST
from pretrain.runtime.sharding import whole_weights
from pretrain.schema import FLAG, FLOAT, TEXT, integer, number, one_of, optional, values_of

PATH_OPTIONS = {"train", "valid", "test", "lexicon", "similar", "add_tokens", "cache"}
SAVED_FORM = {  # of training_state.json, see `Run.saved_values`
    "options": {"epochs": number(0, above=True), "max_steps": integer(), "precision": TEXT},
    "step": integer(),
    "finished": FLAG,
    "micro_batch_size": integer(1),
    "total_steps": integer(1),
    "threads": integer(1, 1024),
    "processes": integer(1, 1 << 20),
    "precision": one_of(*AUTOCAST),
}
PRETRAINING_FORM = SAVED_FORM | {
    "steps_per_epoch": integer(1),
    "similar_words": optional(TEXT),
    "corpus": TEXT,
    "corpus_folders": {"train": optional(TEXT), "valid": optional(TEXT)},
}


@dataclass(kw_only=True)
class Run:
    """Everything that `train` needs, checked. Derived numbers are decided once, and saved.

    Subclasses say how to validate, what to export, and what to do at the end."""

    config: Config
    world: World
    device: torch.device
    precision: str  # "bf16", "fp16" or "fp32"
    output: Path
    tokenizer: PreTrainedTokenizerBase
    model: PackedModel
    data: TrainData
    micro_batch_size: int  # sequences, of the first phase's length
    total_steps: int
    eval_every: int  # steps
    save_every: int  # steps; 0: only when the run is stopped
    compile: bool = False
    checkpoint: Path | None = None  # to resume from
    is_extended: bool = False  # a resumed run whose end was moved
    replaced: Path | None = None  # the old run under --overwrite, until this one has a checkpoint
    quiet: bool = False  # without progress bar and lines of numbers

    time_limit = "--max-minutes"  # the option, for messages
    evaluates_first = True  # before step 1
    score = ("perplexity", "loss")  # of the best model: by the first, then by the second
    higher_is_better = False  # of the first; the second is always a loss
    scores_form = values_of(FLOAT, "numbers by name")  # of `validate`, in a saved state
    charts = PRETRAINING_CHARTS
    has_fixed_shapes = True  # of micro-batches: torch.compile makes one graph for a phase
    results = ("final",)  # what only a finished run leaves

    @property
    def phase_ends(self) -> list[int]:
        """Steps after which the phases end; the last is `total_steps`."""
        return [self.total_steps]

    @property
    def blame(self) -> dict[str, str]:
        """The options to name if memory is full or a worker dies, see `memory.explained`."""
        return {"micro_batch": "--micro-batch-size", "workers": "--workers"}

    def rank(self, scores: dict) -> tuple[float, float]:
        """Of two evaluations, the better one has the greater rank."""
        first, second = (scores[name] for name in self.score)
        return (first if self.higher_is_better else -first, -second)

    def phase_at(self, step: int) -> int:
        """Index of the phase of `step`, counted from 1; 0 belongs to the first."""
        return min(bisect_left(self.phase_ends, step), len(self.phase_ends) - 1)

    def is_comparable(self, step: int) -> bool:
        """Whether scores at `step` compare with those at the end of the run: in the last phase."""
        return self.phase_at(step) == len(self.phase_ends) - 1

    def logged(self, scores: dict) -> dict[str, float]:
        """The scores under their names in the log."""
        return {f"eval/{name}": value for name, value in scores.items()}

    def rebuild_command(self, step: int, position: object) -> str:
        """A command that shows the data of a step; "" if there is none."""
        return ""

    def flops(self, batches: Sequence[Batch]) -> float:
        """Floating-point operations of a step, for the log."""
        return sum(count_flops(self.model, batch) for batch in batches)

    def open_monitor(self, step: int, evaluated: bool) -> Monitor:
        """The log of the run, from `step` on."""
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
        """Make the run folder; call it once everything is checked. --overwrite moves an old run
        aside."""
        if self.world.is_main:
            try:
                self._write_output()
            except OSError as error:
                raise UserError(
                    f"--output {self.output}: cannot be written ({error.strerror}); "
                    "expected a folder with room and write permission"
                ) from error
        wait_for_all()

    def _write_output(self) -> None:
        results = [*ckpt.checkpoints(self.output), *map(self.output.joinpath, self.results)]
        has_result = any(path.exists() for path in results)
        self.replaced = ckpt.make_output(self.output, self.config.overwrite, has_result)
        if self.checkpoint:
            ckpt.set_aside_after(self.output, ckpt.step_of(self.checkpoint))
        options = portable_options(self.config)
        for name in ("output", "resume", "overwrite"):  # of this start, not of a run like it
            del options[name]
        write_json(self.output / "config.json", options)

    def remove_replaced(self) -> None:
        """Remove the run that this one replaces; call it once this one has a checkpoint."""
        if self.replaced:
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.replaced = None

    # What a subclass provides.

    def validate(
        self,
        step: int,
        precision: torch.autocast,
        stop: Callable[[], int],
        monitor: Monitor,
    ) -> dict | None:
        """Scores on the validation set: {} without one, None if `stop` (a signal) cut it short."""
        raise NotImplementedError

    def export(self, folder: Path, weights: dict[str, Tensor], state) -> None:
        """Write a model folder that opens with transformers."""
        raise NotImplementedError

    def keep_best(self, state) -> None:
        """Write `best/`; all processes call this together."""
        weights = whole_weights(self.model)
        if self.world.is_main:
            best = self.output / "best"
            ckpt.write_folder(best, lambda folder: self.export(folder, weights, state))

    def best_problem(self) -> str | None:
        """What is wrong with the best model that a resumed run finds."""
        return ckpt.problem_of(self.output / "best", needed=())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps of the run itself."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The counterpart of `state_dict`."""

    def saved_values(self) -> dict:
        """Plain values that a checkpoint keeps of the run; of SAVED_FORM."""
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        return {
            "options": portable_options(self.config),
            "micro_batch_size": self.micro_batch_size,
            "precision": self.precision,
            "total_steps": self.total_steps,
            "threads": torch.get_num_threads(),
            "processes": self.world.size,
            "versions": versions,
        }

    def finish(self, state, summary: dict) -> None:
        """Write `final/`; all processes call this together."""
        weights = whole_weights(self.model)
        if self.world.is_main:
            final = self.output / "final"
            ckpt.write_folder(final, lambda folder: self.export(folder, weights, state))

    def complete_summary(self, state, summary: dict) -> None:
        """Add scores to the summary."""

    def clean_up(self) -> None:
        """Remove what a finished run no longer needs, once its summary is written."""
        self.remove_replaced()


@dataclass(frozen=True)
class Phase:
    """What is read while sequences have one length; a run without --phases has one phase."""

    dataset: PretrainingDataset
    collator: Collator
    validation: ValidationSet | None
    eval_batch_size: int  # sequences in a micro-batch of the validation set

    @property
    def max_length(self) -> int:
        """Tokens in a sequence."""
        return self.dataset.task.max_length

    def fullest_batch(self) -> Batch:
        """The micro-batch with the most tokens, as full as they come."""
        return self.collator(self.dataset[self.dataset.fullest()])


@dataclass(kw_only=True)
class PretrainingRun(Run):
    """Pretraining: perplexity on validation text decides `best/`, the last model is `final/`."""

    phases: list[Phase]
    steps_per_epoch: int
    corpus_folders: dict[str, str]  # "train" and "valid", if that is a corpus of its own
    similar_words: str | None = None  # hash of the table, which a resumed run reads again
    added_tokens: dict[str, int] = field(default_factory=dict)  # occurrences in the training text
    is_finished: bool = False  # the run to resume has no step left

    @property
    def blame(self) -> dict[str, str]:
        """The options to name if memory is full or a worker dies, see `memory.explained`."""
        return super().blame | {"micro_batch": f"--micro-batch-size {self.micro_batch_size}"}

    @property
    def phase_ends(self) -> list[int]:
        """Steps after which the phases end."""
        return phase_ends(self.config, self.total_steps)

    def rebuild_command(self, step: int, position: Sequence) -> str:
        """The command that shows the micro-batches of a step again, and keeps them in a file."""
        config = self.config
        arguments = ["--config", str(self.output / "config.json"), "--position"]
        arguments += [str(number) for number in position if number is not None]
        if config.phases:
            arguments += ["--phase", str(self.phase_at(step) + 1)]
        size = self.micro_batch_size
        arguments += ["--micro-batch-size", str(size), "--sampled", str(config.batch_size // size)]
        arguments += ["--save", "batch.pt"]
        return shlex.join(["python", "scripts/show_masks.py", *arguments])

    def validate(
        self,
        step: int,
        precision: torch.autocast,
        stop: Callable[[], int],
        monitor: Monitor,
    ) -> dict[str, float] | None:
        """Perplexity and accuracies, as `evaluate`; sample predictions go to TensorBoard."""
        validation = self.phases[self.phase_at(step)].validation
        if validation is None:
            return {}
        scores = evaluate(self.model, validation, self.device, precision, self.world, stop)
        if scores is not None:
            samples = sample_predictions(
                self.model, validation, self.tokenizer, self.device, precision
            )
            monitor.log(step, {"held-out predictions": samples})
        return scores

    def export(self, folder: Path, weights: dict[str, Tensor], state) -> None:
        """Model, tokenizer, model card and facts; opens with transformers."""
        phase = state.evaluated_in if state.scores else self.phase_at(state.step)
        facts = {
            **describe_run(self, self.phases[phase]),
            "step": state.step,
            "held_out_step": state.evaluated_at if state.scores else 0,
            "held_out": state.scores,
        }
        ckpt.write_model(folder, self.model, self.tokenizer, facts, weights)

    def saved_values(self) -> dict:
        """Those of every run, and what identifies the data; of PRETRAINING_FORM."""
        return super().saved_values() | {
            "steps_per_epoch": self.steps_per_epoch,
            "similar_words": self.similar_words,
            "corpus_folders": self.corpus_folders,
            "corpus": self.phases[0].dataset.source.fingerprint,
        }

    def has_result(self) -> bool:
        """Whether the run is finished and `final/` is its model; all processes call this."""
        return gather(self.is_finished and self.world.is_main and self._has_final())[0]

    def _has_final(self) -> bool:
        final = self.output / "final"
        is_whole = ckpt.problem_of(final, needed=()) is None
        return is_whole and ckpt.read_facts(final).get("step") == ckpt.step_of(self.checkpoint)

    def complete_summary(self, state, summary: dict) -> None:
        """The last and the best scores."""
        summary |= {f"eval_{name}": value for name, value in state.scores.items()}
        if state.best_scores:
            summary["best_perplexity"] = state.best_scores["perplexity"]
            summary["best_step"] = state.best_step

    def _write_output(self) -> None:
        super()._write_output()
        if self.added_tokens:
            lines = [f"{token}\t{count}\n" for token, count in self.added_tokens.items()]
            write_text(self.output / "added_tokens.tsv", "".join(lines))


def run_folder(output: str | None, prefix: str = "") -> Path:
    """The folder of --output; runs/DATE-TIME by default."""
    if not output:
        return Path(f"runs/{prefix}{datetime.datetime.now():%Y%m%d-%H%M%S}")
    return Path(os.path.abspath(output)) if output in (".", "..") else Path(output)


def find_checkpoint(output: Path, config) -> Path | None:
    """The checkpoint to resume from. UserError if the folder holds something, and neither --resume
    nor --overwrite is given."""
    ways = "a new folder, --resume to continue its run, or --overwrite to replace it"
    with option_named("--output"):
        ckpt.check_output(output, config.overwrite, None if config.resume else ways)
    if not config.resume:
        return None
    for previous in output.glob(".*.previous"):  # moved aside by a save that was interrupted
        ckpt.put_back(previous.with_name(previous.name[1:].removesuffix(".previous")))
    with option_named("--resume --output"):
        return ckpt.newest_good(output)


def portable_options(config) -> dict:
    """The options as a run keeps them: plain values, with paths that hold in any folder."""
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
    }
    for name in options.keys() & PATH_OPTIONS:
        value = options[name]
        if isinstance(value, list):
            options[name] = [_absolute(path) for path in value]
        elif value:
            options[name] = _absolute(value)
    for name in options.keys() & {"model", "tokenizer"}:  # a folder, or a size or a hub name
        value = options[name]
        if value and value not in MODEL_SIZES and Path(value).exists():
            options[name] = _absolute(value)
    return options


def _absolute(path: str) -> str:
    return path if path.startswith("hub:") else os.path.abspath(os.path.expanduser(path))


def resumed_values(checkpoint: Path | None, form: dict, config, world: World) -> dict:
    """The plain values of the run to resume, {} without one; UserError if an option has changed.

    Threads become as many as the run had: they split sums, so another number gives other bits."""
    if not checkpoint:
        return {}
    with option_named("--resume"):
        saved = ckpt.read_values(checkpoint, form)
    check(changed_options(config, saved))
    if saved["processes"] == world.size:
        torch.set_num_threads(saved["threads"])
    return saved


def changed_options(config, saved: dict) -> list[str]:
    """Problems: options that a resumed run may not change, with both values."""
    before, problems = saved["options"], []
    for name, new in portable_options(config).items():
        is_same = name not in before or before[name] == new
        is_same |= name == "micro_batch_size" and new == saved["micro_batch_size"]
        if not is_same and name not in may_change(type(config)):
            old = before[name]
            old = " ".join(map(str, old)) if isinstance(old, list) else old
            problems.append(
                f"{typed(config, name)}: the run started with {old}, which a resume cannot "
                "change; omit the option, or start a run in another --output"
            )
    return problems


def describe_run(run: PretrainingRun, phase: Phase) -> dict:
    """Facts of a run, for its model card and for scripts/evaluate.py; `phase` was evaluated."""
    config = run.config
    phases = {"phases": list(config.phases)} if config.phases else {}
    return {
        "objective": config.objective,
        "max_length": phase.max_length,
        **phases,
        "masking": config.masking,
        "mask_rate": list(config.mask_rate),
        "started_from": config.model,
        "eval_tokens": config.eval_tokens,
        "eval_batch_size": phase.eval_batch_size,
        "batch_size": config.batch_size,
        "total_steps": run.total_steps,
        "learning_rate": config.learning_rate,
        "precision": run.precision,
        "corpus": phase.dataset.source.fingerprint,
    }


def print_plan(run: PretrainingRun) -> None:
    """Every derived number, before training starts."""
    config, world, settings = run.config, run.world, run.model.config
    weights = sum(weight.numel() for weight in run.model.parameters())
    length, size = run.phases[0].max_length, run.micro_batch_size
    accumulation = config.batch_size // size // world.size
    processes = f"{world.size} process{'es' if world.size > 1 else ''}"
    print(
        f"model: {settings.num_hidden_layers}x{settings.hidden_size}, {weights / 1e6:.1f} M "
        f"weights, vocabulary {settings.vocab_size:,}, on {run.device} in {run.precision}, "
        f"attention by {run.model.attention}{', compiled' if run.compile else ''}"
    )
    print(
        f"step: {config.batch_size} x {length} = {config.batch_size * length:,} tokens, in "
        f"{accumulation} micro-batches of {size} x {length} on each of {processes}"
    )
    print(
        f"run: {run.total_steps:,} steps, {run.total_steps / run.steps_per_epoch:.1f} epochs of "
        f"{run.steps_per_epoch:,} steps; evaluation every {run.eval_every:,}, checkpoint every "
        f"{run.save_every:,}; {run.output}"
    )
    if not config.phases:
        return
    tokens, begin = run.phases[0].dataset.task.token_limit, 0
    for index, (phase, end) in enumerate(zip(run.phases, run.phase_ends), start=1):
        print(
            f"phase {index}: steps {begin + 1:,} to {end:,}, sequences of {phase.max_length} "
            f"tokens, {tokens / phase.max_length:.4g} of them fill a micro-batch"
        )
        begin = end
