"""`Run`, which holds everything that `train` needs.

pretrain/build.py makes its subclass for pretraining (pretrain/pretraining.py) from options,
pretrain/finetune/build.py the one for fine-tuning. The loop asks a run for scores, model folders
and numbers to log.
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

from pretrain.batch import Batch
from pretrain.config import EPOCHS, Config, typed
from pretrain.data.loader import TrainData
from pretrain.errors import counted
from pretrain.files import lock, write_json
from pretrain.model.packed import PackedModel, count_flops
from pretrain.resume import portable_options
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import World, gather
from pretrain.runtime.monitor import PRETRAINING_CHARTS, Monitor
from pretrain.runtime.optim import AUTOCAST, autocast
from pretrain.runtime.sharding import whole_weights
from pretrain.schema import AUTO, FLAG, FLOAT, TEXT, either, integer, one_of, values_of

FINISHED = "finished"  # the state in the summary of a run that is done
WORST = (-math.inf, -math.inf)
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
    def error_labels(self) -> tuple[str, str]:
        """The options to name when memory is full or a worker dies; see `memory.explained`."""
        return f"--micro-batch-size {self.micro_batch_size}", "--workers"

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    def sort_key(self, scores: dict) -> tuple[float, float]:
        """Higher for better scores; lowest for {} and for scores that are not finite."""
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

    def repair_best(self, step: int) -> str | None:
        """Repair `best/`, the model of `step`, when a run resumes: if necessary, write it again
        from the checkpoint of that step. Returns what is still wrong with it, or None.

        After a kill, it may hold the model of a later step, which is evaluated again only if the
        options (--eval-every) are the same."""
        best, source = self.output / "best", self.output / f"checkpoint-{step}"
        problem = ckpt.problem_of(best, needed=())
        is_later = not problem and ckpt.read_facts(best).get("step") != step
        if (problem or is_later) and source.is_dir() and not ckpt.problem_of(source):
            print(f"{problem or best}: written again from {source}")
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
        score = self.score[0].replace("_", " ")
        evaluations = counted(state.evaluations_without_gain, "evaluation")
        reason = f"no better {score} since step {state.best_step:,} ({evaluations})"
        stopped = f"stopped early, at step {state.step:,} of {self.total_steps:,}"
        if self.config.patience == AUTO:
            reason = f"the validation loss rose {state.rises} times in a row"
            reason += "; --patience 0 turns this off"
        return [f"{typed(self.config, 'patience')}: {stopped}; {reason}"]

    def clean_up(self) -> None:  # once the summary of a finished run is written
        self.remove_replaced()
