"""Labels and probabilities of texts by a classifier, in order, and how good they are.

Rows stream: a file of any size is read, predicted and written a chunk at a time.
"""
from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from pretrain.batch import IGNORED
from pretrain.command import UserError, check, require
from pretrain.data.labelled import LabelledCollator, LabelledDataset, label_of, text_of
from pretrain.model.classifier import PackedClassifier

CHUNK = 1024  # rows


@torch.no_grad()
def predict(model: PackedClassifier, dataset: LabelledDataset, collator: LabelledCollator, device: torch.device,
            autocast: torch.autocast) -> np.ndarray:
    """float32 [texts, classes]: probabilities, in the order of the dataset."""
    was_training = model.training
    model.eval()
    logits = []
    with autocast:
        for (batch,) in DataLoader(dataset, batch_size=collator.micro_batch_size, collate_fn=collator, generator=torch.Generator()):
            batch = batch.to(device)
            logits.append(model.label_logits(model.encode(batch), batch))
    model.train(was_training)
    return torch.cat(logits).softmax(-1).cpu().numpy()


class Tally:
    """What scores are made of: the confusion matrix int64 [classes, classes], a row for each true class, the sum of the losses, and how
    many rows had no label."""

    def __init__(self, classes: list[str]):
        self.classes, self.confusion, self.loss_sum, self.left_out = classes, np.zeros((len(classes), len(classes)), np.int64), 0.0, 0

    def add(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Count rows: `labels` int64 [texts], IGNORED where there is none, `probabilities` [texts, classes]."""
        known = labels != IGNORED
        self.left_out += int((~known).sum())
        labels, probabilities = labels[known], probabilities[known]
        np.add.at(self.confusion, (labels, probabilities.argmax(-1)), 1)
        self.loss_sum -= float(np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-30)).sum())

    def scores(self) -> dict:
        """Loss, accuracy, mean precision, recall and F1 of the classes (those that occur or are predicted), the same for each class,
        and the confusion matrix."""
        metrics, number = require("sklearn.metrics", "scores"), np.arange(len(self.classes))
        true, predicted = np.repeat(number, len(number)), np.tile(number, len(number))
        rows, columns = self.confusion.sum(1), metrics.precision_recall_fscore_support(
            true, predicted, labels=number, sample_weight=self.confusion.ravel(), zero_division=0)
        present, names = (rows > 0) | (self.confusion.sum(0) > 0), ("precision", "recall", "f1")
        return {"loss": self.loss_sum / rows.sum(), "accuracy": float(np.trace(self.confusion) / rows.sum()),
                **{f"macro_{name}": float(column[present].mean()) for name, column in zip(names, columns)},
                "classes": {label: {**{name: float(column[place]) for name, column in zip(names, columns)}, "rows": int(rows[place])}
                            for place, label in enumerate(self.classes)},
                "confusion": self.confusion.tolist()}


def table_of(scores: dict) -> str:
    """The scores as text, a line for each class."""
    width = max(len(label) for label in [*scores["classes"], "mean of the classes"]) + 2
    lines = [f"{'':{width}}{'precision':>10}{'recall':>10}{'F1':>10}{'rows':>8}"]
    for label, of in scores["classes"].items():
        lines.append(f"{label:{width}}{of['precision']:10.3f}{of['recall']:10.3f}{of['f1']:10.3f}{of['rows']:8,}")
    lines.append(f"{'mean of the classes':{width}}" + "".join(f"{scores[f'macro_{name}']:10.3f}" for name in ("precision", "recall", "f1"))
                 + f"{sum(of['rows'] for of in scores['classes'].values()):8,}")
    return "\n".join([*lines, f"accuracy {scores['accuracy']:.3f}"])


def new_columns(classes: list[str]) -> list[str]:
    """The columns that predictions add to a row."""
    return ["predicted_label", *(f"probability_{label}" for label in classes)]


def predict_rows(rows: Iterable[tuple[str, dict]], columns: tuple[str, ...], label_field: str,
                 predict_chunk: Callable[[list[tuple[str, ...]]], np.ndarray], tally: Tally) -> Iterator[dict]:
    """Each (where, row) with its `predicted_label` and a `probability_LABEL` for each class, as `predict_chunk` tells for texts.

    Rows whose `label_field` holds a label of the model are scored in `tally`."""
    classes, rows = tally.classes, iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        probabilities = predict_chunk([text_of(record, columns, where) for where, record in chunk])
        tally.add(np.array([class_of(record.get(label_field), classes) for _, record in chunk]), probabilities)
        for (_, record), shares in zip(chunk, probabilities):
            cells = [classes[int(shares.argmax())], *(round(float(share), 6) for share in shares)]
            yield record | dict(zip(new_columns(classes), cells))


def check_rows(rows: Iterable[tuple[str, dict]], columns: tuple[str, ...], new: list[str]) -> None:
    """UserError that tells each row without text, and each of the columns `new` that is there already; reads all rows."""
    problems, taken = [], set()
    for where, record in rows:
        again = [column for column in new if column in record and column not in taken]
        taken.update(again)
        problems += [f"{where}: has a column {column!r} already; needed is a file without it" for column in again]
        try:
            text_of(record, columns, where)
        except UserError as error:
            problems.append(str(error))
    check(problems)


def class_of(value: object, classes: list[str]) -> int:
    """Number of the class that a cell names, IGNORED where it names none."""
    try:
        label = label_of(value)
    except ValueError:
        label = None
    return classes.index(label) if label in classes else IGNORED


def write_rows(path: Path, rows: Iterable[dict], as_csv: bool, name: str = "") -> int:
    """Write `rows` to `path` as CSV, by the columns of the first, or as JSON lines; how many they are. `name` is for messages."""
    number = 0
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = None
        for number, row in enumerate(rows, start=1):
            if not as_csv:
                out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                continue
            if writer is None:
                writer = csv.DictWriter(out, list(row))
                writer.writeheader()
            if not row.keys() <= set(writer.fieldnames):
                raise UserError(f"--output {name or path}: row {number} has the columns {', '.join(row)}, the first has "
                                f"{', '.join(writer.fieldnames)}; needed is .jsonl for rows that differ")
            writer.writerow({name: json.dumps(cell, ensure_ascii=False, default=str) if isinstance(cell, (list, dict)) else cell
                             for name, cell in row.items()})
    return number
