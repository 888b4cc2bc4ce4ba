"""`PretrainingRun`: a run on masked tokens and pairs, with its phases, its plan and its verdict."""

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pretrain import plots, recipe
from pretrain.batch import Batch
from pretrain.card import PICTURE, hub_datasets
from pretrain.cli import command
from pretrain.config import counted_length, typed
from pretrain.data.collate import Collator
from pretrain.data.loader import PretrainingDataset
from pretrain.data.mixture import Mixture
from pretrain.errors import UserError, counted, first_line
from pretrain.evaluate import ValidationSet, evaluate, sample_predictions
from pretrain.files import read_json, write_text
from pretrain.run import FINISHED, SAVED_FORM, Run
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import gather
from pretrain.runtime.monitor import PRETRAINING_CHARTS, Monitor
from pretrain.schema import AUTO, TEXT, integer, optional, values_of

SAME_PERPLEXITY = 1e-3  # smaller relative differences do not decide which model to use
MIN_DRAWN = 10  # evaluations for a curve in the model card
FEW_TOKENS = 50_000  # for a useful model
# See `PretrainingRun.has_turned`: a share of the run, evaluations, nats.
EARLY, MIN_RISES, MIN_EXCESS = 0.2, 3, 0.05
PRETRAINING_FORM = SAVED_FORM | {
    "recipe": recipe.FORM,
    "steps_per_epoch": integer(1),
    "similar_words": optional(TEXT),  # hash of the table
    "corpus": TEXT,  # fingerprint of the training text
    "valid_corpus": optional(TEXT),  # of --valid
    "corpus_folders": values_of(TEXT, "folders by text"),  # named as in `text_paths`
    "text": optional(values_of(TEXT, "keys by text")),  # the `text_key` of each
}


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
        """The largest micro-batch, with as many masks as at the start or the end of the run,
        whichever has more."""
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
        model, context = self.model, self.autocast()
        scores: dict[str, float] = {}
        for name, validation in {"": phase.validation, **phase.others}.items():
            found = evaluate(model, validation, context, self.world, stop)
            if found is None:
                return None
            prefix = f"{name}/" if name else ""
            scores |= {prefix + key: value for key, value in found.items()}
        samples = sample_predictions(model, phase.validation, self.tokenizer, context)
        monitor.log(step, {"held-out predictions": samples})
        return scores

    def export(self, folder: Path, weights: dict[str, Tensor], state) -> None:
        """Write model, tokenizer, model card, and facts that scripts/evaluate.py reads."""
        config = self.config
        phase = self.phases[state.evaluated_in if state.scores else self.phase_at(state.step)]
        facts = recipe.values_of(config) | {
            "max_length": phase.max_length,
            "objective": config.objective,
            "nsp_weight": config.nsp_weight,
            "masking": config.masking,
            "started_from": config.model,
            "language": None if config.split_sentences == AUTO else config.split_sentences,
            "datasets": hub_datasets(config.train),
            "mix": list(config.mix),
            "eval_tokens": config.eval_tokens,
            "eval_batch_size": phase.eval_batch_size,
            "total_steps": self.total_steps,
            "precision": self.precision,
            "corpus": self.data_facts["corpus"],
            "step": state.step,
            "held_out_step": state.evaluated_at if state.scores else 0,
            "held_out": state.scores,
        }
        optional = ("phases", "language", "datasets", "mix")
        facts = {name: value for name, value in facts.items() if value or name not in optional}
        if state.is_finished(self):
            self.draw_curve(folder / PICTURE)
        ckpt.write_model(folder, self.model, self.tokenizer, facts, weights)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each finite number `name` in the log."""
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [(row["step"], row[name]) for row in rows if row.get(name) is not None]

    def draw_curve(self, path: Path) -> None:
        """Draw the validation perplexity of the run, a curve for each length, if matplotlib is
        installed and there are enough evaluations."""
        if importlib.util.find_spec("matplotlib") is None:
            return
        try:
            points: dict[str, list[tuple[int, float]]] = {}
            for step, perplexity in self.curve("eval/perplexity"):
                name = f"sequences of {self.phases[self.phase_at(step)].max_length} tokens"
                points.setdefault(name, []).append((step, perplexity))
            if sum(map(len, points.values())) >= MIN_DRAWN:
                curves = {name: (*zip(*found), None) for name, found in points.items()}
                title = "Validation perplexity while pretraining: lower is better"
                labels = ("optimizer step", "perplexity (logarithmic)")
                guess = self.phases[-1].validation.unigram_perplexity
                plots.curves(path, title, labels, curves, {"guessing by frequency": guess}, "y")
        except Exception as error:  # a picture is not worth a finished run
            print(f"{path.name}: not drawn ({first_line(error)})")

    def has_result(self) -> bool:
        """Whether the run is finished and `final/` is its model. All processes must call this."""
        final, has_final, summary = self.output / "final", False, {}
        if self.world.is_main and self.saved.get("finished") and not self.is_extended:
            folders = [final, self.output / "best"] if self.phases[-1].validation else [final]
            is_whole = not any(ckpt.problem_of(folder, needed=()) for folder in folders)
            step = ckpt.step_of(self.checkpoint)
            with contextlib.suppress(UserError):
                summary = read_json(self.output / "summary.json")  # written last
            has_summary = (summary.get("state"), summary.get("steps")) == (FINISHED, step)
            is_current = ckpt.read_facts(final).get("step") == step and has_summary
            # --patience ended the run, and has changed since.
            has_changed = self.saved["options"].get("patience") != self.asked.patience
            has_final = is_whole and is_current and not (step < self.total_steps and has_changed)
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
        """The folder to use: `final/`, unless an earlier model is better by more than
        SAME_PERPLEXITY, or the starting model is better by any amount."""
        last, best = self.sort_key(state.scores), self.sort_key(state.best_scores)
        allowed = abs(best[0]) * SAME_PERPLEXITY if state.best_step else 0.0
        is_good = last >= best or last[0] >= best[0] - allowed
        return self.output / ("final" if is_good else "best")

    def notes(self, state) -> list[str]:
        """Also which folder to use instead of `final/`, or that there is no validation text to tell
        by, and whether the model to use is no better than guessing."""
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
        scores = state.scores if folder.name == "final" else state.best_scores
        guessing = scores.get("unigram_perplexity", math.inf)
        if scores and not scores["perplexity"] < guessing:
            numbers = f"perplexity {scores['perplexity']:.4g}; guessing: {guessing:.4g}"
            problem = f"{folder} is no better than guessing by token frequency ({numbers})"
            ways = "more steps (--epochs or --max-steps), more text, or a lower --learning-rate"
            found.append(f"{problem}; expected {ways}")
        return found

    def complete_summary(self, state, summary: dict) -> None:
        """Add the last and the best scores, the values that were chosen, and the folder to use."""
        summary["recipe"] = recipe.values_of(self.config)
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
    processes = counted(world.size, "process")
    micro_batches = counted(accumulation, "micro-batch")
    print(
        f"model: {settings.num_hidden_layers}x{settings.hidden_size}, {weights / 1e6:.1f} M "
        f"weights, vocabulary {settings.vocab_size:,}, on {run.device} in {run.precision}, "
        f"attention by {run.model.attention}{', compiled' if run.compile else ''}"
    )
    print(
        f"step: {config.batch_size} x {length} = {config.batch_size * length:,} tokens, in "
        f"{micro_batches} of {size} x {length} on each of {processes}"
    )
    print(
        f"run: {counted(steps, 'step')}, {steps / epoch:.1f} epochs of {counted(epoch, 'step')}; "
        f"evaluation every {run.eval_every:,}, checkpoint every {run.save_every:,}; {run.output}"
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
    for phase in run.phases:
        if phase.validation:
            at_length = f" at {phase.max_length} tokens" if config.phases else ""
            print(f"validation{at_length}: {phase.validation}")
    if run.trial_seconds:
        minutes = steps * accumulation * run.trial_seconds / 60
        if minutes < 1:
            shown = counted(math.ceil(minutes * 60), "second")
        elif minutes < 99.5:
            shown = f"{minutes:.2g} minutes"
        else:
            shown = f"{minutes / 60:,.1f} hours"
        print(f"time: about {shown} on this machine, without evaluations")
    if not config.phases:
        return
    tokens = run.phases[0].dataset.task.token_limit
    begin = 1
    for number, (phase, end) in enumerate(zip(run.phases, run.phase_ends), start=1):
        print(
            f"phase {number}: steps {begin:,} to {end:,}, sequences of {phase.max_length} tokens, "
            f"{tokens / phase.max_length:.4g} per micro-batch"
        )
        begin = end + 1
