"""Labels and probabilities of texts by a classifier, in order, and how good they are.

Rows stream: a file of any size is read, predicted and written a chunk at a time.
"""
from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from pretrain.batch import IGNORED
from pretrain.command import UserError, require
from pretrain.data.labelled import LabelledCollator, LabelledDataset, label_of
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


def score(labels: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> dict:
    """Scores of predictions: loss, accuracy, mean precision, recall and F1 of the classes (those that occur or are predicted), the same
    for each class, and the confusion matrix, a row for each true class; `labels` int64 [texts]."""
    metrics = require("sklearn.metrics", "scores")
    predicted, present = probabilities.argmax(-1), np.union1d(labels, probabilities.argmax(-1))
    columns = metrics.precision_recall_fscore_support(labels, predicted, labels=range(len(classes)), zero_division=0)
    names = ("precision", "recall", "f1")
    return {"loss": float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-30)).mean()),
            "accuracy": float(metrics.accuracy_score(labels, predicted)),
            **{f"macro_{name}": float(column[present].mean()) for name, column in zip(names, columns)},
            "classes": {label: {**{name: float(column[number]) for name, column in zip(names, columns)}, "rows": int(columns[3][number])}
                        for number, label in enumerate(classes)},
            "confusion": metrics.confusion_matrix(labels, predicted, labels=range(len(classes))).tolist()}


def table_of(scores: dict) -> str:
    """The scores as text, a line for each class."""
    width = max(len(label) for label in [*scores["classes"], "mean of the classes"]) + 2
    lines = [f"{'':{width}}{'precision':>10}{'recall':>10}{'F1':>10}{'rows':>8}"]
    for label, of in scores["classes"].items():
        lines.append(f"{label:{width}}{of['precision']:10.3f}{of['recall']:10.3f}{of['f1']:10.3f}{of['rows']:8,}")
    lines.append(f"{'mean of the classes':{width}}" + "".join(f"{scores[f'macro_{name}']:10.3f}" for name in ("precision", "recall", "f1"))
                 + f"{sum(of['rows'] for of in scores['classes'].values()):8,}")
    return "\n".join([*lines, f"accuracy {scores['accuracy']:.3f}"])


def predict_rows(rows: Iterable[tuple[str, dict]], texts_of: Callable[[str, dict], tuple[str, ...]], label_field: str | None,
                 model: PackedClassifier, tokenizer: PreTrainedTokenizerBase, collator: LabelledCollator, device: torch.device,
                 autocast: torch.autocast, known: list[tuple[int, np.ndarray]], left_out: Counter) -> Iterator[dict]:
    """Each (where, row) with its `predicted_label` and a `probability_LABEL` for each class.

    Fills `known` with (label, probabilities) of the rows whose `label_field` holds a label of the model, and counts the others in
    `left_out` by what they hold."""
    classes, rows = list(model.config.id2label.values()), iter(rows)
    new_columns = ["predicted_label", *(f"probability_{label}" for label in classes)]
    while chunk := list(islice(rows, CHUNK)):
        texts = [texts_of(where, record) for where, record in chunk]
        dataset = LabelledDataset(texts, tokenizer, collator.max_length)
        for (where, record), shares in zip(chunk, predict(model, dataset, collator, device, autocast)):
            taken = [column for column in new_columns if column in record]
            if taken:
                raise UserError(f"{where}: has a column {taken[0]!r} already; needed is a file without it")
            if label_field is not None:
                try:
                    label = label_of(record.get(label_field))
                except ValueError:
                    label = str(record[label_field])
                known.append((classes.index(label), shares)) if label in classes else left_out.update([label])
            yield record | dict(zip(new_columns, [classes[int(shares.argmax())], *(round(float(share), 6) for share in shares)]))


def write_rows(path: Path, rows: Iterable[dict], as_csv: bool) -> int:
    """Write `rows` to `path` as CSV, by the columns of the first, or as JSON lines; how many they are."""
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
                raise UserError(f"--output {path}: row {number} has the columns {', '.join(row)}, the first has "
                                f"{', '.join(writer.fieldnames)}; needed is .jsonl for rows that differ")
            writer.writerow({name: json.dumps(cell, ensure_ascii=False, default=str) if isinstance(cell, (list, dict)) else cell
                             for name, cell in row.items()})
    return number


def known_labels(known: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(labels int64 [rows], probabilities [rows, classes]) of what `predict_rows` has filled."""
    labels, shares = zip(*known)
    assert IGNORED not in labels
    return np.array(labels), np.stack(shares)
