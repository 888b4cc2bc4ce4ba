"""Text classification on a pretrained encoder: the same `train_step` as in pretraining, evaluation, early stopping, the best model.

What flows in is the options (pretrain/config.py: FinetuneOptions); what flows out is a folder: `final/`, which opens with
AutoModelForSequenceClassification, scores, the confusion matrix as a picture, and the test rows' predictions.
"""
from __future__ import annotations

import datetime
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from pretrain import pictures
from pretrain.command import check, require
from pretrain.config import FinetuneOptions, interval, validate
from pretrain.data import tokenizer as tokenizers
from pretrain.data.labelled import Labelled, LabelledCollator, LabelledDataset, StepSampler, budget_rows, classes_of, read_labelled
from pretrain.files import write_json
from pretrain.model.attention import choose_attention
from pretrain.model.classifier import PackedClassifier, check_tokenizer, load_classifier
from pretrain.predict import Tally, new_columns, predict, write_rows
from pretrain.progress import Window
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import start
from pretrain.runtime.monitor import Monitor, peak_memory_bytes
from pretrain.runtime.optim import FiniteWatch, autocast, choose_precision, make_optimizer, make_schedule
from pretrain.setup import saved_options
from pretrain.train import train_step

MAX_LENGTH = 512  # tokens, where --max-length is not given
MAX_CURVES = 30  # of single classes
CHARTS = {"scores": {"held-out accuracy and F1": ["Multiline", ["eval/accuracy", "eval/macro_f1"]],
                     "loss, training and held-out": ["Multiline", ["train/loss", "eval/loss"]]}}


@dataclass
class Task:
    """All that `finetune` needs, checked."""

    options: FinetuneOptions
    device: torch.device
    precision: str
    output: Path
    tokenizer: PreTrainedTokenizerBase
    model: PackedClassifier
    collator: LabelledCollator
    classes: list[str]
    rows: dict[str, Labelled]  # train, valid and, where there are some, test
    datasets: dict[str, LabelledDataset]
    total_steps: int
    eval_every: int


def build(options: FinetuneOptions, tell: Callable[[str], None] = print, keep_head: bool = True) -> Task:
    """Read and check everything, load the model; UserError tells what does not fit, `tell` what the user may want to know. A head of
    the same classes is kept only with `keep_head`."""
    needed = {"model": "an encoder to start from", "train": "labelled rows", "valid": "labelled rows to choose the best model by"}
    check([f"--{name}: needed is {what}" for name, what in needed.items() if not getattr(options, name)] + validate(options))
    require("sklearn.metrics", "scores")
    require("matplotlib", "the picture of the confusion matrix")
    _, device = start(options.device, alone="fine-tuning")
    output = Path(options.output or f"runs/finetune-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    ckpt.check_output(output, options.overwrite or is_unfinished(output))
    precision = choose_precision(options.precision, device)
    rows, classes = read_rows(options, tell)
    tokenizer = tokenizers.load(options.model, option="--model")
    torch.manual_seed(options.seed)
    model = load_classifier(options.model, classes, keep_head)
    model.attention = choose_attention(device, precision)
    max_length = min(MAX_LENGTH, model.max_length) if options.max_length is None else options.max_length
    check(model.problems_of("mlm", max_length))
    datasets = {}
    for name, labelled in rows.items():
        labels = np.array([classes.index(label) for label in labelled.labels])
        datasets[name] = dataset = LabelledDataset(labelled.texts, tokenizer, max_length, labels)
        if dataset.num_cut:
            tell(f"--{name}: {dataset.num_cut:,} of {len(dataset):,} rows are longer than {max_length} tokens and are cut")
    check_tokenizer(model, options.model, max(tokenizer.get_vocab().values()) + 1, int(datasets["train"].type_ids.max()) + 1)
    weights = None
    if options.class_weights == "balanced":
        weights = len(datasets["train"]) / (len(classes) * np.bincount(datasets["train"].labels, minlength=len(classes)))
        model.class_weights = {"label": torch.tensor(weights, dtype=torch.float32, device=device)}
    steps_per_epoch = math.ceil(len(datasets["train"]) / options.batch_size)
    total_steps = options.max_steps or max(1, round(options.epochs * steps_per_epoch))
    every = interval(options.eval_every)
    if options.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    torch.manual_seed(options.seed)  # dropout, whatever the head has drawn
    return Task(options, device, precision, output, tokenizer, model.to(device),
                LabelledCollator(max_length, options.micro_batch_size or options.batch_size, weights), classes, rows, datasets, total_steps,
                every if isinstance(every, int) else steps_per_epoch)


def is_unfinished(output: Path) -> bool:
    """Whether a folder holds what an interrupted fine-tuning has left: no model, no scores, nothing to go on from."""
    config = output / "config.json"
    has_result = any((output / name).exists() for name in ("summary.json", "final"))
    return config.is_file() and not has_result and '"label_field"' in config.read_text(encoding="utf-8", errors="replace")


def read_rows(options: FinetuneOptions, tell: Callable[[str], None] = print) -> tuple[dict[str, Labelled], list[str]]:
    """(rows by option, classes in order); tells of test rows that are trained on."""
    rows = {"train": read_labelled(options.train, "--train", options)}
    classes = classes_of(rows["train"], "--train", options.train)
    for name in ("valid", "test"):
        if getattr(options, name):
            rows[name] = read_labelled(getattr(options, name), f"--{name}", options, classes)
    budget, train = options.label_budget, rows["train"]
    if budget:
        check(check_budget(budget, len(train.labels), len(classes), "--label-budget"))
        chosen = budget_rows(train.labels, budget, options.seed).tolist()
        rows["train"] = Labelled([train.texts[row] for row in chosen], [train.labels[row] for row in chosen])
    for name, labelled in rows.items():
        seen = set(rows["train"].texts)
        again = sum(text in seen for text in labelled.texts) if name != "train" else 0
        if again:
            tell(f"--{name}: {again:,} of {len(labelled.texts):,} texts are texts of --train, too")
    return rows, classes


def check_budget(budget: int, num_rows: int, num_classes: int, option: str) -> list[str]:
    """Problems of a label budget."""
    fits = num_classes <= budget <= num_rows
    return [] if fits else [f"{option} {budget}: needed is at least {num_classes}, a row of each class, and at most {num_rows}, the rows "
                            "of --train"]


def describe(task: Task) -> str:
    """Every derived number, before training starts."""
    options, config = task.options, task.model.config
    counts = [np.bincount(dataset.labels, minlength=len(task.classes)) for dataset in task.datasets.values()]
    rows = [f"--{name}: {len(dataset):,} rows, " + ", ".join(f"{label} {count:,}" for label, count in zip(task.classes[:20], of))
            for (name, dataset), of in zip(task.datasets.items(), counts)]
    return "\n".join([*rows, f"model: {config.model_type} {config.num_hidden_layers}x{config.hidden_size} on {task.device} in "
                      f"{task.precision}, at most {task.collator.max_length} tokens an example", f"run: {task.total_steps:,} steps of "
                      f"{options.batch_size} examples, evaluation every {task.eval_every:,}; {task.output}"])


@dataclass
class Best:
    """The best evaluation so far, and the weights of then, on the CPU."""

    scores: dict | None = None
    step: int = 0
    weights: dict[str, Tensor] | None = None
    evaluations_without_gain: int = 0

    def update(self, scores: dict, metric: str, step: int, model: PackedClassifier) -> None:
        """Take over `scores` if they are better: by the metric, then by the loss."""
        self.evaluations_without_gain += 1
        if self.scores is None or (scores[metric], -scores["loss"]) > (self.scores[metric], -self.scores["loss"]):
            weights = {name: weight.detach().to("cpu", copy=True) for name, weight in model.state_dict().items()}
            self.scores, self.step, self.weights, self.evaluations_without_gain = scores, step, weights, 0


def finetune(task: Task, quiet: bool = False) -> dict:
    """Train, keep the best model, score it; returns the summary, which is also in summary.json, the last file that is written."""
    options, model, device = task.options, task.model, task.device
    replaced = ckpt.make_output(task.output, options.overwrite or is_unfinished(task.output), (task.output / "summary.json").is_file())
    write_json(task.output / "config.json", {name: value for name, value in saved_options(options).items()
                                             if name not in ("output", "overwrite")})  # of this start, not of a run like it
    trained = torch.compile(model) if options.compile == "on" else model
    optimizer = make_optimizer(model, options.learning_rate, options.weight_decay, options.adam_betas, options.adam_epsilon)
    scaler = torch.amp.GradScaler(device.type, enabled=task.precision == "fp16")
    context = autocast(device, task.precision)
    learning_rate = make_schedule(options.schedule, options.learning_rate, options.warmup, task.total_steps)
    monitor = Monitor(task.output, 0, task.total_steps, asdict(options), charts=CHARTS, score=f"eval/{options.metric}", quiet=quiet)
    watch, best, window, begin = FiniteWatch(), Best(), Window({}, {}), time.monotonic()
    dataset = task.datasets["train"]
    steps = iter(DataLoader(dataset, batch_sampler=StepSampler(len(dataset), options.batch_size, options.seed), collate_fn=task.collator,
                            pin_memory=device.type == "cuda", generator=torch.Generator()))
    step = 0
    model.train()
    while step < task.total_steps and not 0 < options.patience <= best.evaluations_without_gain:
        tick = time.perf_counter()
        batches = next(steps)
        rate = learning_rate(step + 1)
        result = train_step(trained, model.loss_weights, batches, optimizer, scaler, context, rate, options.max_grad_norm, device)
        step += 1
        monitor.say(watch.observe(result.finite, step))
        window.add(result.sums, batches, flops=0.0)
        window.add_seconds("seconds", time.perf_counter() - tick, 1)
        numbers = {}
        if step in (1, task.total_steps) or step % options.log_every == 0:
            numbers = means(window.read(device)) | {"optim/learning_rate": rate, "optim/grad_norm": float(result.grad_norm),
                                                    "memory/peak_bytes": peak_memory_bytes(device)}
            window = Window({}, {})
        if step == task.total_steps or step % task.eval_every == 0:
            scores = evaluate(task, "valid", context)
            best.update(scores, options.metric, step, model)
            numbers |= flat("eval", scores)
        if numbers:
            monitor.log(step, numbers)
        monitor.advance()
    monitor.say(watch.observe(None))
    model.load_state_dict(best.weights)
    summary = {"steps": step, "best_step": best.step, "seconds": time.monotonic() - begin, "skipped_steps": watch.skipped,
               "train_rows": len(dataset), "valid": best.scores}
    finish(task, summary, context)
    monitor.close({f"eval/{options.metric}": best.scores[options.metric]})
    write_json(task.output / "summary.json", summary)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    return summary


def means(sums: dict[str, float]) -> dict[str, float]:
    """The numbers of a window under their names in TensorBoard."""
    return {"train/loss": sums["label_loss"] / (sums["label_count"] or 1.0), "train/accuracy": sums["label_correct"] / sums["sequences"],
            "speed/tokens_per_second": sums["tokens"] / sums["seconds"]}


def evaluate(task: Task, name: str, context: torch.autocast) -> dict:
    """Scores on the rows of an option."""
    return score(task, name, predict(task.model, task.datasets[name], task.collator, task.device, context))


def score(task: Task, name: str, probabilities: np.ndarray) -> dict:
    """Scores of predictions for the rows of an option."""
    tally = Tally(task.classes)
    tally.add(task.datasets[name].labels, probabilities)
    return tally.scores()


def flat(prefix: str, scores: dict) -> dict[str, float]:
    """The numbers of `score` under their names in TensorBoard."""
    numbers = {f"{prefix}/{name}": value for name, value in scores.items() if isinstance(value, float)}
    return numbers | {f"{prefix}_f1/{label}": of["f1"] for label, of in list(scores["classes"].items())[:MAX_CURVES]}


def finish(task: Task, summary: dict, context: torch.autocast) -> None:
    """Score the best model on the test rows, write predictions, picture and model; the scores go into `summary`."""
    name = "valid"
    if "test" in task.datasets:
        name, shares = "test", predict(task.model, task.datasets["test"], task.collator, task.device, context)
        summary["test"] = score(task, "test", shares)
        write_rows(task.output / "test_predictions.csv", prediction_rows(task, shares), as_csv=True)
    shown = {"valid": "held-out rows", "test": "test rows"}[name]
    title = f"What became of the {shown} of each class"
    pictures.confusion(task.output / "confusion.png", title, {"": summary[name]["confusion"]}, task.classes)
    if task.options.save_model:
        task.tokenizer.model_max_length = task.collator.max_length  # where a pipeline cuts, too
        ckpt.write_folder(task.output / "final", lambda folder: write_classifier(folder, task, summary))


def prediction_rows(task: Task, shares: np.ndarray) -> Iterator[dict]:
    """Rows of test_predictions.csv."""
    for label, row in zip(task.rows["test"].labels, shares):
        cells = [task.classes[int(row.argmax())], *(round(float(share), 6) for share in row)]
        yield {"label": label, **dict(zip(new_columns(task.classes), cells))}


def write_classifier(folder: Path, task: Task, summary: dict) -> None:
    """Model, tokenizer and model card."""
    task.model.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    family, options = task.model.config.model_type, task.options
    rows = [["started from", options.model], ["classes", ", ".join(task.classes)], ["training rows", summary["train_rows"]],
            ["tokens of an example", task.collator.max_length], ["step of the best model", summary["best_step"]], ["seed", options.seed]]
    rows += [[f"{part} {name.replace('_', ' ')}", f"{value:.4f}"] for part in ("valid", "test") if part in summary
             for name, value in summary[part].items() if isinstance(value, float)]
    (folder / "README.md").write_text(ckpt.model_card(
        "text-classification", [family], f"{family} that tells {len(task.classes)} classes", "`AutoModelForSequenceClassification` and "
        "`pipeline(\"text-classification\")` of transformers.", rows), encoding="utf-8")
