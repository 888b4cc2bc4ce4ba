"""Text classification on a pretrained encoder: from options to a `FinetuningRun` for `train`.

Labeled rows flow in. A run folder comes out: the best model in `final/`, which opens with
AutoModelForSequenceClassification, its scores, its predictions for the test rows, and a plot of the
confusion matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pretrain import plots
from pretrain.build import decide_precision, enable_gradient_checkpointing
from pretrain.config import FinetuneOptions, typed
from pretrain.data import tokenizer as tokenizers
from pretrain.errors import UserError, check, option_named, require
from pretrain.files import key_of
from pretrain.finetune.dataset import (
    LabeledDataset,
    LabeledRows,
    LabeledSteps,
    budget_rows,
    read_labeled,
)
from pretrain.finetune.heads import PackedClassifier, load_classifier
from pretrain.finetune.predict import new_cells, predict, write_rows
from pretrain.finetune.scores import Tally, numbers_of, only_class
from pretrain.inputs import check_vocabulary
from pretrain.model.attention import choose_attention
from pretrain.plan import report_ineffective, steps_between
from pretrain.preflight import validate
from pretrain.resume import resume_point, run_folder
from pretrain.run import SAVED_FORM, Run
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import start
from pretrain.runtime.monitor import Monitor
from pretrain.runtime.optim import overflow_advice
from pretrain.schema import TEXT

MAX_LENGTH = 512  # tokens, unless --max-length is given
SAMPLED_ROWS = 1000  # to show what is unknown to the tokenizer
MAX_CURVES = 30  # classes whose F1 is logged
FINETUNING_FORM = SAVED_FORM | {"rows": TEXT}  # of training_state.json


@dataclass(kw_only=True)
class FinetuningRun(Run):
    """Fine-tuning: the model of the best evaluation becomes `final/`.

    Until then its weights are kept in memory and in every checkpoint."""

    classes: list[str]
    rows: dict[str, LabeledRows]  # train, valid and, if given, test
    datasets: dict[str, LabeledDataset]  # with the same keys
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # on the CPU
    test_scores: dict = field(default_factory=dict)

    evaluates_first = False
    higher_is_better = True
    scores_form = {}  # some are nested
    has_fixed_shapes = False
    results = ("final", "confusion.png")
    charts = {
        "scores": {
            "held-out accuracy and F1": ["Multiline", ["eval/accuracy", "eval/macro_f1"]],
            "loss, training and held-out": ["Multiline", ["train/loss", "eval/loss"]],
        }
    }

    @property
    def score(self) -> tuple[str, str]:
        return self.config.metric, "loss"

    def validate(self, step: int, stop: Callable[[], int], monitor: Monitor) -> dict | None:
        """Scores on the validation rows, as returned by `Tally.scores`."""
        return self.score_rows("valid", stop)[1]

    def score_rows(self, name: str, stop=lambda: 0) -> tuple[np.ndarray | None, dict | None]:
        """(probabilities, scores) of the rows `name`; (None, None) if `stop` cut it short."""
        dataset, size = self.datasets[name], self.micro_batch_size
        probabilities = predict(self.model, dataset, size, self.autocast(), stop)
        if probabilities is None:
            return None, None
        tally = Tally(self.classes)
        tally.add(dataset.labels, probabilities)
        return probabilities, tally.scores()

    def logged(self, scores: dict) -> dict[str, float]:
        """The scores that are numbers, and the F1 of the first classes."""
        classes = list(scores.get("classes", {}).items())[:MAX_CURVES]
        f1 = {f"eval_f1/{label}": class_scores["f1"] for label, class_scores in classes}
        return numbers_of(scores, "eval/") | f1

    def keep_best(self, state) -> None:
        self.load_state_dict(self.model.state_dict())

    def best_problem(self, step: int) -> str | None:
        """None: the best weights are part of the checkpoint."""

    def state_dict(self) -> dict[str, Tensor]:
        return self.best_weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Keep a copy of the weights: training continues, and checkpoints are removed."""
        for name, weight in self.model.state_dict().items():
            self.best_weights[name] = state[name].to("cpu", copy=True).view_as(weight)

    def finish(self, state) -> None:
        """Score the best model on the test rows; write predictions, plot and model. UserError if no
        evaluation had finite scores."""
        if not self.best_weights:
            problem = "the model's outputs were not finite in any evaluation"
            expected = f"a lower --learning-rate, {overflow_advice(self.precision)}"
            raise UserError(f"{typed(self.config, 'valid')}: {problem}; expected {expected}")
        self.model.load_state_dict(self.best_weights)
        state.scores = scores = state.best_scores  # the scores of `final/`
        name, classes = "validation", self.classes
        if "test" in self.datasets:
            probabilities, self.test_scores = self.score_rows("test")
        if self.has_test_scores():
            name, scores = "test", self.test_scores
            rows = zip(self.rows["test"].labels, probabilities)
            cells = ({"label": label} | new_cells(row, classes) for label, row in rows)
            write_rows(self.output / "test_predictions.csv", cells, as_csv=True)
        title = f"Predictions for the {name} rows of each class"
        plots.confusion(self.output / "confusion.png", title, {"": scores["confusion"]}, classes)
        if self.config.save_model:
            super().finish(state)

    def has_test_scores(self) -> bool:
        """Whether there are test rows, and outputs for them that are finite."""
        return math.isfinite(self.test_scores.get("loss", math.nan))

    def notes(self, state) -> list[str]:
        """Also says if the last step was the best, if one class is chosen for all rows, and if
        there are no test scores."""
        found, options = super().notes(state), self.config
        score = state.best_scores[self.score[0]]
        if state.best_step == self.total_steps and score < 1:
            length = typed(options, "max_steps" if options.max_steps else "epochs")
            found.append(f"{length}: the last step was the best; a longer run may score higher")
        for name, scores in (("valid", state.best_scores), ("test", self.test_scores)):
            if scores and (only := only_class(np.sum(scores["confusion"], axis=0), self.classes)):
                found.append(f"--{name}: the model chooses {only} for every row")
        if "test" in self.datasets and not self.has_test_scores():
            problem = f"the outputs in {self.precision} are not finite, so there are no scores"
            found.append(f"{typed(options, 'test')}: {problem}")
        return found

    def complete_summary(self, state, summary: dict) -> None:
        """Add the best validation scores and the test scores."""
        summary.pop("mask_shortfall", None)
        summary["train_rows"] = len(self.datasets["train"])
        if state.best_scores:
            summary |= {"best_step": state.best_step, "valid": state.best_scores}
        if self.has_test_scores():
            summary["test"] = self.test_scores

    def clean_up(self) -> None:
        """Remove all checkpoints: the result replaces them."""
        super().clean_up()
        ckpt.prune(self.output, keep=0)

    def export(self, folder: Path, weights: dict[str, Tensor], state) -> None:
        """Model, tokenizer and model card."""
        ckpt.check_finite(weights)
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        facts = [
            ["started from", self.config.model],
            ["classes", ", ".join(self.classes)],
            ["training rows", len(self.datasets["train"])],
            ["tokens per example", self.tokenizer.model_max_length],
            ["step of the best model", state.best_step],
            ["seed", self.config.seed],
        ]
        numbers = numbers_of(state.best_scores, "valid ") | numbers_of(self.test_scores, "test ")
        facts += [[name.replace("_", " "), f"{value:.4f}"] for name, value in numbers.items()]
        task, family = "text-classification", self.model.config.model_type
        title = f"{family}, fine-tuned to choose one of {len(self.classes)} classes"
        opens_with = f'`AutoModelForSequenceClassification` and `pipeline("{task}")` of'
        card = ckpt.model_card(task, [family], title, f"{opens_with} transformers.", facts)
        (folder / "README.md").write_text(card, encoding="utf-8")


def build(options: FinetuneOptions, keep_head: bool = True, quiet: bool = False) -> FinetuningRun:
    """Check everything, read the rows, load the model; UserError names what is wrong.

    With `keep_head`, a head for the same classes is kept; with `quiet`, nothing is printed."""
    check(validate(options))
    require("matplotlib", "the plot of the confusion matrix")
    with option_named("--device"):
        world, device = start(options.device, alone="fine-tuning")
    output = run_folder(options.output, "finetune-")
    checkpoint, saved = resume_point(output, options, FINETUNING_FORM, world)
    precision = decide_precision(options, saved, device)

    rows = read_rows(options)
    classes = rows["train"].classes
    rows_key = key_of({name: [part.texts, part.labels] for name, part in rows.items()})
    if saved and saved["rows"] != rows_key:
        problem = "the rows have changed since the run started"
        expected = "expected the same files, or a new run"
        raise UserError(f"{typed(options, 'train')}: {problem}; {expected}")
    torch.manual_seed(options.seed)
    source = str(checkpoint or options.model)
    keep_head |= bool(checkpoint)
    tokenizer, model = load_model(source, options, device, precision, classes, keep_head)
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    datasets = {name: LabeledDataset(part, tokenizer) for name, part in rows.items()}
    for name, dataset in () if saved or quiet else datasets.items():
        check_tokens(typed(options, name), dataset, tokenizer, rows[name].texts)
    train = datasets["train"]
    if options.class_weights == "balanced":
        train.class_weights = len(train) / (len(classes) * np.bincount(train.labels))
        model.class_weights = torch.from_numpy(train.class_weights).float().to(device)
    size = options.micro_batch_size or options.batch_size
    on_gpu = device.type == "cuda"
    data = LabeledSteps(train, options.batch_size, size, options.seed, pin_memory=on_gpu)
    epoch = data.steps_per_epoch
    total_steps = options.max_steps or max(1, round(options.epochs * epoch))
    if not quiet:
        report_ineffective(options, total_steps, world)
    torch.manual_seed(options.seed)  # for dropout, independent of the draws for the head
    run = FinetuningRun(
        asked=options,
        config=options,
        world=world,
        device=device,
        precision=precision,
        output=output,
        tokenizer=tokenizer,
        model=model,
        data=data,
        micro_batch_size=size,
        phase_ends=[total_steps],
        eval_every=steps_between(options.eval_every, epoch, auto=epoch),
        save_every=steps_between(options.save_every, epoch, auto=0),
        compile=options.compile == "on",
        checkpoint=checkpoint,
        saved=saved,
        data_facts={"rows": rows_key},
        quiet=quiet,
        classes=classes,
        rows=rows,
        datasets=datasets,
    )
    if not quiet:
        print_rows(run)
    return run


def load_model(
    name: str, options, device: torch.device, precision: str, classes=None, keep_head: bool = True
) -> tuple[PreTrainedTokenizerBase, PackedClassifier]:
    """(tokenizer, model of `load_classifier`), checked; `options` of finetune.py or predict.py.

    The tokenizer's `model_max_length` is set, so that a pipeline cuts at the same length."""
    with option_named("--model"):
        tokenizer = tokenizers.load(name)
        model = load_classifier(name, classes, keep_head)
    num_ids, size = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
    if num_ids > size:
        problem = f"the model has vectors for {size:,} of {num_ids:,} tokens"
        raise UserError(f"--model {name}: {problem}; expected the model's own tokenizer")
    limit = MAX_LENGTH if classes else int(tokenizer.model_max_length)
    tokenizer.model_max_length = options.max_length or min(limit, model.max_length)
    with option_named("--max-length"):
        check(model.length_problems(tokenizer.model_max_length))
    pair = options.text_pair_field
    if pair:
        types = set(tokenizers.without_limits(tokenizer).encode("a", "a").type_ids)
        if max(types) >= model.config.type_vocab_size:
            problem = f"the model lacks the {len(types)} token types that tell two texts apart"
            raise UserError(f"--text-pair-field {pair}: {problem}; expected another model")
    model.attention = choose_attention(device, precision)
    return tokenizer, model.to(device)


def read_rows(options: FinetuneOptions) -> dict[str, LabeledRows]:
    """The rows of each option; the rows of --train are limited by --label-budget."""
    rows, classes = {}, None
    for name in ("train", "valid", "test"):
        if paths := getattr(options, name):
            with option_named(f"--{name}"):
                rows[name] = read_labeled(paths, options, classes)
            classes = rows["train"].classes
    train, budget = rows["train"], options.label_budget
    if not budget:
        return rows
    least, most = len(classes), len(train.labels)
    if not least <= budget <= most:
        expected = f"{least} (one row per class) to {most} (all rows of --train)"
        raise UserError(f"--label-budget {budget}: expected {expected}")
    chosen = budget_rows(train.labels, budget, options.seed).tolist()
    texts = [train.texts[row] for row in chosen]
    labels = [train.labels[row] for row in chosen]
    return rows | {"train": LabeledRows(texts, labels, classes)}


def check_tokens(
    name: str,
    dataset: LabeledDataset,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[tuple[str, ...]],
) -> None:
    """`check_vocabulary` for rows with `texts`; `name` is an option and its value."""
    sample = "\n".join(chain.from_iterable(texts[:SAMPLED_ROWS]))
    check_vocabulary(name, dataset.unknown_share, tokenizer, sample)


def print_rows(run: FinetuningRun) -> None:
    """Print the rows per class, how many are cut, and how many texts are also in --train."""
    seen = set(run.rows["train"].texts)
    for name, dataset in run.datasets.items():
        counts = np.bincount(dataset.labels, minlength=len(run.classes))
        facts = [f"{len(dataset):,} rows"]
        facts += [f"{label} {count:,}" for label, count in zip(run.classes[:20], counts)]
        if dataset.num_cut:
            facts.append(f"{dataset.num_cut:,} exceed {dataset.max_length} tokens and are cut")
        print(f"--{name}: {', '.join(facts)}")
        repeated = sum(text in seen for text in run.rows[name].texts)
        if name != "train" and repeated:
            found = f"{typed(run.config, name)}: {repeated:,} of {len(dataset):,} texts"
            print(f"{found} are also in --train, so scores will look too good; expected other rows")


def print_plan(run: FinetuningRun) -> None:
    """Print every derived number, before training starts."""
    settings, length = run.model.config, run.tokenizer.model_max_length
    size = f"{settings.model_type} {settings.num_hidden_layers}x{settings.hidden_size}"
    print(f"model: {size} on {run.device} in {run.precision}, at most {length} tokens per example")
    steps = f"{run.total_steps:,} steps of {run.config.batch_size} examples"
    print(f"run: {steps}, evaluation every {run.eval_every:,}; {run.output}")
