"""Text classification on a pretrained encoder: from options to a `FinetuningRun` for `train`.

Labeled rows flow in. What comes out is a folder: the best model in `final/`, which opens with
AutoModelForSequenceClassification, its scores, its predictions for the test rows, and a picture of
the confusion matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pretrain import plots
from pretrain.build import decide_precision, enable_gradient_checkpointing
from pretrain.config import FinetuneOptions, validate
from pretrain.data import tokenizer as tokenizers
from pretrain.errors import UserError, check, option_named, require
from pretrain.files import key_of
from pretrain.finetune.dataset import (
    LabeledDataset,
    LabeledRows,
    LabeledSteps,
    budget_rows,
    classes_of,
    read_labeled,
)
from pretrain.finetune.heads import (
    PackedClassifier,
    check_token_types,
    check_tokenizer,
    load_classifier,
)
from pretrain.finetune.predict import new_cells, predict, write_rows
from pretrain.finetune.scores import Tally, numbers_of
from pretrain.model.attention import choose_attention
from pretrain.plan import steps_between
from pretrain.run import SAVED_FORM, Run, find_checkpoint, resumed_values, run_folder
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import start
from pretrain.runtime.monitor import Monitor
from pretrain.runtime.optim import autocast
from pretrain.schema import TEXT

MAX_LENGTH = 512  # tokens, unless --max-length is given
MAX_CURVES = 30  # of single classes
CHARTS = {
    "scores": {
        "held-out accuracy and F1": ["Multiline", ["eval/accuracy", "eval/macro_f1"]],
        "loss, training and held-out": ["Multiline", ["train/loss", "eval/loss"]],
    }
}
FINETUNING_FORM = SAVED_FORM | {"rows": TEXT}  # of training_state.json


@dataclass(kw_only=True)
class FinetuningRun(Run):
    """Fine-tuning: the model of the best evaluation becomes `final/`.

    Until then its weights are in memory, and in every checkpoint beside those of the step."""

    classes: list[str]
    rows: dict[str, LabeledRows]  # train, valid and, if given, test
    rows_key: str  # what identifies them
    datasets: dict[str, LabeledDataset]  # likewise
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # on the CPU
    test_scores: dict = field(default_factory=dict)

    evaluates_first = False
    higher_is_better = True
    scores_form = {}  # some are nested
    charts = CHARTS
    has_fixed_shapes = False
    results = ("final", "confusion.png")

    @property
    def score(self) -> tuple[str, str]:
        """The metric, then the loss."""
        return self.config.metric, "loss"

    def validate(
        self, step: int, precision: torch.autocast, stop: Callable[[], int], monitor: Monitor
    ) -> dict | None:
        """Scores on the validation rows, as `Tally.scores`."""
        size = self.micro_batch_size
        probabilities = predict(self.model, self.datasets["valid"], size, precision, stop)
        return None if probabilities is None else self.scores_of("valid", probabilities)

    def scores_of(self, name: str, probabilities: np.ndarray) -> dict:
        """Scores of predictions for the rows `name`."""
        tally = Tally(self.classes)
        tally.add(self.datasets[name].labels, probabilities)
        return tally.scores()

    def logged(self, scores: dict) -> dict[str, float]:
        """The numbers, and the F1 of the first classes."""
        numbers = {f"eval/{name}": value for name, value in numbers_of(scores).items()}
        for label, of in list(scores.get("classes", {}).items())[:MAX_CURVES]:
            numbers[f"eval_f1/{label}"] = of["f1"]
        return numbers

    def keep_best(self, state) -> None:
        """Copy the weights."""
        weights = self.model.state_dict()
        self.best_weights = {name: of.to("cpu", copy=True) for name, of in weights.items()}

    def best_problem(self) -> str | None:
        """None: the weights are part of the checkpoint."""

    def state_dict(self) -> dict[str, Tensor]:
        """The best weights so far."""
        return self.best_weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the best weights, for the checkpoint will be removed."""
        weights = self.model.state_dict()
        self.best_weights = {name: state[name].clone().view_as(of) for name, of in weights.items()}

    def saved_values(self) -> dict:
        """Those of every run, and what identifies the rows."""
        return super().saved_values() | {"rows": self.rows_key}

    def finish(self, state, summary: dict) -> None:
        """Score the best model on the test rows; write predictions, picture and model."""
        self.model.load_state_dict(self.best_weights)
        state.scores = scores = state.best_scores  # those of `final/`
        name = "validation"
        if "test" in self.datasets:
            name, precision = "test", autocast(self.device, self.precision)
            dataset, labels = self.datasets["test"], self.rows["test"].labels
            probabilities = predict(self.model, dataset, self.micro_batch_size, precision)
            self.test_scores = scores = self.scores_of("test", probabilities)
            cells = (new_cells(of_row, self.classes) for of_row in probabilities)
            predictions = ({"label": label} | of_row for label, of_row in zip(labels, cells))
            write_rows(self.output / "test_predictions.csv", predictions, as_csv=True)
        title = f"Predictions for the {name} rows of each class"
        matrix = {"": scores["confusion"]}
        plots.confusion(self.output / "confusion.png", title, matrix, self.classes)
        if self.config.save_model:
            super().finish(state, summary)

    def complete_summary(self, state, summary: dict) -> None:
        """The best scores, and those of the test rows."""
        summary.pop("mask_shortfall", None)
        summary["train_rows"] = len(self.datasets["train"])
        if state.best_scores:
            summary |= {"best_step": state.best_step, "valid": state.best_scores}
        if self.test_scores:
            summary["test"] = self.test_scores

    def clean_up(self) -> None:
        """Checkpoints have no use beside the result."""
        super().clean_up()
        ckpt.prune(self.output, keep=0)

    def export(self, folder: Path, weights: dict[str, Tensor], state) -> None:
        """Model, tokenizer and model card."""
        ckpt.check_finite(weights)
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        family = self.model.config.model_type
        facts = {
            "started from": self.config.model,
            "classes": ", ".join(self.classes),
            "training rows": len(self.datasets["train"]),
            "tokens of an example": self.tokenizer.model_max_length,
            "step of the best model": state.best_step,
            "seed": self.config.seed,
        }
        for name, scores in {"valid": state.best_scores, "test": self.test_scores}.items():
            for key, value in numbers_of(scores).items():
                facts[f"{name} {key.replace('_', ' ')}"] = f"{value:.4f}"
        title = f"{family}, fine-tuned to choose one of {len(self.classes)} classes"
        pipeline = '`pipeline("text-classification")`'
        opens_with = f"`AutoModelForSequenceClassification` and {pipeline} of transformers."
        rows = [[name, value] for name, value in facts.items()]
        card = ckpt.model_card("text-classification", [family], title, opens_with, rows)
        (folder / "README.md").write_text(card, encoding="utf-8")


def build(options: FinetuneOptions, keep_head: bool = True, quiet: bool = False) -> FinetuningRun:
    """Check everything, read the rows, load the model; UserError names what does not fit.

    A head for the same classes is kept only with `keep_head`; `quiet` prints nothing."""
    check(validate(options))
    require("matplotlib", "the picture of the confusion matrix")
    with option_named("--device"):
        world, device = start(options.device, alone="fine-tuning")
    output = run_folder(options.output, "finetune-")
    checkpoint = find_checkpoint(output, options)
    saved = resumed_values(checkpoint, FINETUNING_FORM, options, world)
    precision = decide_precision(options, saved, device)

    rows, classes = read_rows(options)
    rows_key = key_of({name: [of.texts, of.labels] for name, of in rows.items()})
    if saved and saved["rows"] != rows_key:
        raise UserError(
            f"--train {' '.join(options.train)}: the rows have changed since the run started; "
            "restore the files, or start a new run"
        )
    torch.manual_seed(options.seed)
    source, keep_head = str(checkpoint or options.model), keep_head or bool(checkpoint)
    tokenizer, model = load_model(source, options, device, precision, classes, keep_head)
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    datasets = {}
    for name, of in rows.items():
        labels = np.array([classes.index(label) for label in of.labels])
        datasets[name] = LabeledDataset(of.texts, tokenizer, labels)
    train = datasets["train"]
    if not quiet:
        print_rows(rows, datasets, classes)

    if options.class_weights == "balanced":
        train.class_weights = len(train) / (len(classes) * np.bincount(train.labels))
        model.class_weights = torch.from_numpy(train.class_weights).float().to(device)
    size = options.micro_batch_size or options.batch_size
    on_gpu = device.type == "cuda"
    data = LabeledSteps(train, options.batch_size, size, options.seed, pin_memory=on_gpu)
    epoch = data.steps_per_epoch
    total_steps = options.max_steps or max(1, round(options.epochs * epoch))
    torch.manual_seed(options.seed)  # for dropout, whatever the head drew
    return FinetuningRun(
        config=options,
        world=world,
        device=device,
        precision=precision,
        output=output,
        tokenizer=tokenizer,
        model=model,
        data=data,
        micro_batch_size=size,
        total_steps=total_steps,
        eval_every=steps_between(options.eval_every, epoch, auto=epoch),
        save_every=steps_between(options.save_every, epoch, auto=0),
        compile=options.compile == "on",
        checkpoint=checkpoint,
        is_extended=bool(saved) and total_steps != saved["total_steps"],
        quiet=quiet,
        classes=classes,
        rows=rows,
        rows_key=rows_key,
        datasets=datasets,
    )


def load_model(
    name: str,
    options,  # of finetune.py or predict.py
    device: torch.device,
    precision: str,
    classes: list[str] | None = None,
    keep_head: bool = True,
) -> tuple[PreTrainedTokenizerBase, PackedClassifier]:
    """(tokenizer, classifier as by `load_classifier`), checked, on the device.

    The tokenizer's `model_max_length` is that of the options, where a pipeline cuts as well."""
    with option_named("--model"):
        tokenizer = tokenizers.load(name)
        model = load_classifier(name, classes, keep_head)
        check_tokenizer(model, name, max(tokenizer.get_vocab().values()) + 1)
    limit = MAX_LENGTH if classes else int(tokenizer.model_max_length)
    tokenizer.model_max_length = options.max_length or min(limit, model.max_length)
    with option_named("--max-length"):
        check(model.length_problems(tokenizer.model_max_length))
    if options.text_pair_field:
        _, type_ids, _ = LabeledDataset([("a", "a")], tokenizer).examples[0]
        with option_named("--text-pair-field"):
            check_token_types(model, options.text_pair_field, int(type_ids.max()) + 1)
    model.attention = choose_attention(device, precision)
    return tokenizer, model.to(device)


def read_rows(options: FinetuneOptions) -> tuple[dict[str, LabeledRows], list[str]]:
    """(rows by option, classes in order)."""
    with option_named("--train"):
        train = read_labeled(options.train, options)
        with option_named(f"{' '.join(options.train)}:"):
            classes = classes_of(train.labels)
    rows = {"train": train}
    for name in ("valid", "test"):
        paths = getattr(options, name)
        if paths:
            with option_named(f"--{name}"):
                rows[name] = read_labeled(paths, options, classes)
    budget = options.label_budget
    if budget:
        if not len(classes) <= budget <= len(train.labels):
            raise UserError(
                f"--label-budget {budget}: expected {len(classes)}, a row of each class, to "
                f"{len(train.labels)}, the rows of --train"
            )
        chosen = budget_rows(train.labels, budget, options.seed).tolist()
        texts = [train.texts[row] for row in chosen]
        rows["train"] = LabeledRows(texts, [train.labels[row] for row in chosen])
    return rows, classes


def print_rows(
    rows: dict[str, LabeledRows], datasets: dict[str, LabeledDataset], classes: list[str]
) -> None:
    """Print the rows of each class, how many are cut, and how many texts are also trained on."""
    seen = set(rows["train"].texts)
    for name, dataset in datasets.items():
        counts = np.bincount(dataset.labels, minlength=len(classes))
        facts = [f"{len(dataset):,} rows"]
        facts += [f"{label} {count:,}" for label, count in zip(classes[:20], counts)]
        repeated = sum(text in seen for text in rows[name].texts)
        if name != "train" and repeated:
            facts.append(f"{repeated:,} texts are also in --train")
        if dataset.num_cut:
            facts.append(f"{dataset.num_cut:,} exceed {dataset.max_length} tokens and are cut")
        print(f"--{name}: {', '.join(facts)}")


def print_plan(run: FinetuningRun) -> None:
    """Every derived number, before training starts."""
    settings, length = run.model.config, run.tokenizer.model_max_length
    print(
        f"model: {settings.model_type} {settings.num_hidden_layers}x{settings.hidden_size} on "
        f"{run.device} in {run.precision}, at most {length} tokens an example"
    )
    print(
        f"run: {run.total_steps:,} steps of {run.config.batch_size} examples, evaluation every "
        f"{run.eval_every:,}; {run.output}"
    )
