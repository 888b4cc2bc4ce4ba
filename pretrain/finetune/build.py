"""Fine-tuning of a pretrained encoder: from options to a `FinetuningRun` for `train`.

Labeled rows flow in. A run folder comes out: the best model in `final/`, which opens with an Auto
class of transformers, its scores, its predictions for the test rows and, for classes, a plot of the
confusion matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pretrain import plots
from pretrain.card import results, write_card
from pretrain.config import TASK_METRICS, FinetuneOptions, as_folder, typed
from pretrain.data import tokenizer as tokenizers
from pretrain.errors import UserError, check, counted, option_named, require
from pretrain.files import key_of, write_text
from pretrain.finetune.dataset import LabeledDataset, LabeledRows, LabeledSteps, budget_rows
from pretrain.finetune.entities import labels_of, tags_of
from pretrain.finetune.heads import PackedClassifier, load_classifier, task_of
from pretrain.finetune.predict import predict, write_rows
from pretrain.finetune.scores import numbers_of, predicted_of, score_table
from pretrain.finetune.tasks import TASKS, Classification
from pretrain.finetune.windows import TaggedDataset
from pretrain.model.attention import choose_attention
from pretrain.model_setup import decide_precision, enable_gradient_checkpointing
from pretrain.plan import report_ineffective, steps_between
from pretrain.preflight import validate
from pretrain.resume import resume_point, run_folder
from pretrain.run import SAVED_FORM, Run
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import start
from pretrain.runtime.monitor import Monitor
from pretrain.runtime.optim import overflow_advice
from pretrain.schema import AUTO, TEXT

MAX_LENGTH = 512  # tokens, unless --max-length is given
PUBLISHED = {  # in the hub's index of models
    "accuracy": "accuracy",
    "f1": "f1",
    "macro_f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
MAX_CURVES = 30  # classes whose F1 is logged
FINETUNING_FORM = SAVED_FORM | {"rows": TEXT}  # of training_state.json


@dataclass(kw_only=True)
class FinetuningRun(Run):
    """Fine-tuning: the model of the best evaluation becomes `final/`.

    Until then its weights are kept in memory and in every checkpoint."""

    classes: list[str]  # as in LabeledRows
    datasets: dict[str, LabeledDataset | TaggedDataset]  # train, valid and, if given, test
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # on the CPU
    test_scores: dict = field(default_factory=dict)  # {} also if they are not finite

    evaluates_first = False
    higher_is_better = True
    scores_form = {}  # some are nested
    has_fixed_shapes = False
    results = ("final", "confusion.png", "scores.txt")

    @property
    def task(self) -> Classification:
        return TASKS[self.config.task]

    @property
    def charts(self) -> dict:
        return {
            "scores": {
                "held-out scores": ["Multiline", [*self.task.curves]],
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
        """(outputs, scores) of the rows `name`; (None, None) if `stop` cut it short."""
        dataset, size = self.datasets[name], self.micro_batch_size
        outputs = predict(self.model, dataset, size, self.autocast(), stop)
        if outputs is None:
            return None, None
        tally = self.task.tally(self.classes)
        tally.add(dataset.labels, outputs)
        return outputs, tally.scores()

    def logged(self, scores: dict) -> dict[str, float]:
        """The scores that are numbers, and the F1 of the first classes."""
        classes = list(scores.get("classes", {}).items())[:MAX_CURVES]
        f1 = {f"eval_f1/{label}": class_scores["f1"] for label, class_scores in classes}
        return numbers_of(scores, "eval/") | f1

    def keep_best(self, state) -> None:
        self.load_state_dict(self.model.state_dict())

    def repair_best(self, step: int) -> str | None:
        """None: the best weights are part of the checkpoint."""

    def state_dict(self) -> dict[str, Tensor]:
        return self.best_weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Keep a copy of `state` as the best weights: the model trains on, and the checkpoint that
        they are mapped from may be removed."""
        for name, weight in self.model.state_dict().items():
            self.best_weights[name] = state[name].to("cpu", copy=True).view_as(weight)

    def finish(self, state) -> None:
        """Score the best model on the test rows; write predictions, plot or scores, and model.
        UserError if no evaluation had finite scores."""
        if not self.best_weights:
            problem = "the model's outputs were not finite in any evaluation"
            expected = f"a lower --learning-rate, {overflow_advice(self.precision)}"
            raise UserError(f"{typed(self.config, 'valid')}: {problem}; expected {expected}")
        self.model.load_state_dict(self.best_weights)
        state.scores = scores = state.best_scores  # the scores of `final/`
        name = "validation"
        if dataset := self.datasets.get("test"):
            outputs, found = self.score_rows("test")
            if math.isfinite(found["loss"]):
                name, scores = "test", found
                self.test_scores = found
                labels = self.task.label_cells(dataset.rows)
                predicted = self.task.cells(dataset, outputs)
                path = self.output / self.task.predictions
                rows = (label | cells for label, cells in zip(labels, predicted))
                write_rows(path, rows, path.suffix == ".csv")
        if "confusion" in scores:
            title = f"Predictions for the {name} rows of each class"
            matrices = {"": scores["confusion"]}
            plots.confusion(self.output / "confusion.png", title, matrices, self.classes)
        else:
            write_text(self.output / "scores.txt", f"{name} rows\n{score_table(scores)}\n")
        if self.config.save_model:
            super().finish(state)

    def notes(self, state) -> list[str]:
        """Also says if the last step was the best, if all rows get the same prediction, and if
        there are no test scores."""
        found, options = super().notes(state), self.config
        score = state.best_scores[self.score[0]]
        if state.best_step == self.total_steps and score < 1:
            length = typed(options, "max_steps" if options.max_steps else "epochs")
            found.append(f"{length}: the last step was the best; a longer run may score higher")
        for name, scores in (("valid", state.best_scores), ("test", self.test_scores)):
            counts = predicted_of(scores)
            warning = self.task.warning(counts, self.classes, scores) if scores else None
            found += [f"--{name}: {warning}"] if warning else []
        if "test" in self.datasets and not self.test_scores:
            problem = f"the outputs in {self.precision} are not finite, so there are no scores"
            found.append(f"{typed(options, 'test')}: {problem}")
        return found

    def complete_summary(self, state, summary: dict) -> None:
        """Add the best validation scores and the test scores."""
        summary.pop("mask_shortfall", None)
        summary["train_rows"] = len(self.datasets["train"].rows.texts)
        if state.best_scores:
            summary |= {"best_step": state.best_step, "valid": state.best_scores}
        if self.test_scores:
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
        names = self.task.names(self.classes)
        facts = [
            ["started from", self.config.model],
            *([["classes", ", ".join(names)]] if names else []),
            ["training rows", len(self.datasets["train"].rows.texts)],
            ["tokens per example", self.tokenizer.model_max_length],
            ["step of the best model", state.best_step],
            ["seed", self.config.seed],
        ]
        numbers = numbers_of(state.best_scores, "valid ") | numbers_of(self.test_scores, "test ")
        facts += [[name.replace("_", " "), f"{value:.4f}"] for name, value in numbers.items()]
        task, family = self.task, self.model.config.model_type
        scores = results(task.pipeline, "validation rows", state.best_scores, PUBLISHED)
        scores += results(task.pipeline, "test rows", self.test_scores, PUBLISHED)
        way = f'`pipeline("{task.pipeline}"{task.pipeline_options})`'
        write_card(
            folder,
            task.pipeline,
            title=f"{family}, fine-tuned to predict {task.describe(names)}",
            opens_with=f"`{task.auto_class}` and {way} of transformers.",
            rows=facts,
            tags=[family],
            started_from=as_folder(self.config.model),
            scores=scores,
        )


def build(options: FinetuneOptions, keep_head: bool = True, quiet: bool = False) -> FinetuningRun:
    """Check everything, read the rows, load the model; UserError names what is wrong.

    With `keep_head`, a head for the same classes is kept; with `quiet`, nothing is printed."""
    check(validate(options))
    task = TASKS[options.task]
    if task.name == "classification":
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
    tokenizer, model = load_model(source, options, device, precision, classes, keep_head, task.name)
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    datasets = {name: task.dataset(part, tokenizer) for name, part in rows.items()}
    train = datasets["train"]
    if options.class_weights == "balanced":
        train.class_weights = len(train) / (len(classes) * np.bincount(train.labels))
        model.class_weights = torch.from_numpy(train.class_weights).float().to(device)
    size = options.micro_batch_size or options.batch_size
    on_gpu = device.type == "cuda"
    data = LabeledSteps(train, options.batch_size, size, options.seed, pin_memory=on_gpu)
    epoch = data.steps_per_epoch
    total_steps = options.max_steps or max(1, round(options.epochs * epoch))
    metric = TASK_METRICS[options.task][0] if options.metric == AUTO else options.metric
    torch.manual_seed(options.seed)  # for dropout, independent of the draws for the head
    run = FinetuningRun(
        asked=options,
        config=replace(options, metric=metric),
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
        datasets=datasets,
    )
    if not quiet:
        for name, dataset in () if saved else datasets.items():
            dataset.check_tokens(typed(options, name))
        report_ineffective(options, total_steps, world)
        print_rows(run)
    return run


def load_model(
    name: str,
    options,
    device: torch.device,
    precision: str,
    classes: list[str] | None = None,
    keep_head: bool = True,
    task: str | None = None,
) -> tuple[PreTrainedTokenizerBase, PackedClassifier]:
    """(tokenizer, model of `load_classifier`), checked; `options` of finetune.py or predict.py.

    The tokenizer's `model_max_length` is set, so that a pipeline cuts at the same length."""
    with option_named("--model"):
        tokenizer = tokenizers.load(name)
        model = load_classifier(name, classes, keep_head, task)
    tags = list(model.config.id2label.values())
    if task_of(model.config) == "ner" and set(tags) != set(tags_of(labels_of(tags))):
        problem = f"has the tags {', '.join(tags[:20])}"
        raise UserError(f"--model {name}: {problem}; expected O, B- and I-")
    num_ids, size = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
    if num_ids > size:
        problem = f"the model has vectors for {size:,} of {num_ids:,} tokens"
        raise UserError(f"--model {name}: {problem}; expected the model's own tokenizer")
    limit = MAX_LENGTH if classes is not None else int(tokenizer.model_max_length)
    tokenizer.model_max_length = options.max_length or min(limit, model.max_length)
    with option_named("--max-length"):
        check(model.length_problems(tokenizer.model_max_length))
    pair = options.text_pair_field
    if pair and task_of(model.config) == "ner":
        problem = "entities are in one text; expected no second one"
        raise UserError(f"--text-pair-field {pair}: {problem}")
    if pair:
        types = set(tokenizers.without_limits(tokenizer).encode("a", "a").type_ids)
        # A family without token types tells two texts apart by [SEP] alone.
        if max(types) >= getattr(model.config, "type_vocab_size", len(types)):
            problem = f"the model lacks the {len(types)} token types that tell two texts apart"
            raise UserError(f"--text-pair-field {pair}: {problem}; expected another model")
    model.attention = choose_attention(device, precision)
    return tokenizer, model.to(device)


def budget_range(task: Classification, rows: LabeledRows) -> tuple[range, str]:
    """The label budgets that the training rows allow, and the same in words."""
    least, most = len(set(task.strata(rows))), len(rows.labels)
    first = f"{least} (one row per class)" if task.has_classes else f"{least}"
    return range(least, most + 1), f"{first} to {most} (all rows of --train)"


def read_rows(options: FinetuneOptions) -> dict[str, LabeledRows]:
    """The rows of each option; the rows of --train are limited by --label-budget."""
    rows, classes, task = {}, None, TASKS[options.task]
    for name in ("train", "valid", "test"):
        if paths := getattr(options, name):
            with option_named(f"--{name}"):
                rows[name] = task.read(paths, options, classes)
            classes = rows["train"].classes
    train, budget = rows["train"], options.label_budget
    if not budget:
        return rows
    allowed, expected = budget_range(task, train)
    if budget not in allowed:
        raise UserError(f"--label-budget {budget}: expected {expected}")
    chosen = budget_rows(task.strata(train), budget, options.seed).tolist()
    texts = [train.texts[row] for row in chosen]
    labels = [train.labels[row] for row in chosen]
    return rows | {"train": LabeledRows(texts, labels, classes)}


def print_rows(run: FinetuningRun) -> None:
    """Print the rows per class, how many are cut, how many entities begin or end inside a word, and
    how many texts are also in --train."""
    seen, task = set(run.datasets["train"].rows.texts), run.task
    for name, dataset in run.datasets.items():
        texts = dataset.rows.texts
        facts = [counted(len(texts), "row"), *task.counts(dataset)]
        if dataset.num_cut:
            facts.append(f"{dataset.num_cut:,} over {dataset.max_length} tokens, {task.when_long}")
        print(f"--{name}: {', '.join(facts)}")
        if snapped := getattr(dataset, "num_snapped", 0):
            found = f"{typed(run.config, name)}: {counted(snapped, 'entity')} not of whole words"
            print(f"{found}: tags belong to whole words, so no prediction can match")
        repeated = sum(text in seen for text in texts)
        if name != "train" and repeated:
            found = f"{typed(run.config, name)}: {repeated:,} of {counted(len(texts), 'text')}"
            print(f"{found} also in --train, so scores will look too good; expected other rows")


def print_plan(run: FinetuningRun) -> None:
    """Print every derived number, before training starts."""
    settings, length = run.model.config, run.tokenizer.model_max_length
    size = f"{settings.model_type} {settings.num_hidden_layers}x{settings.hidden_size}"
    print(f"model: {size} on {run.device} in {run.precision}, at most {length} tokens per example")
    steps = f"{counted(run.total_steps, 'step')} of {counted(run.config.batch_size, 'example')}"
    print(f"run: {steps}, evaluation every {run.eval_every:,}; {run.output}")
