"""Predicted labels and probabilities of texts, in order.

Rows stream: a file of any size is read, predicted and written in chunks.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pretrain.config import ColumnOptions
from pretrain.data.tokenizer import characters_of, in_groups
from pretrain.errors import UserError, check
from pretrain.files import as_json
from pretrain.finetune.dataset import LabeledDataset, LabeledRows, Row, label_of, read_texts
from pretrain.finetune.heads import PackedClassifier

CHUNK = 1024  # rows


@torch.no_grad()
def predict(
    model: PackedClassifier, dataset: LabeledDataset, batch_size: int, precision, stop=lambda: 0
) -> np.ndarray | None:
    """float32 [rows, classes]: probabilities, in the order of the dataset; None if `stop` (a
    signal) cut it short. `precision` is an autocast context."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    logits = []
    with precision:
        for batch in dataset.micro_batches(range(len(dataset)), batch_size):
            if stop():
                break
            batch = batch.to(device)
            logits.append(model.label_logits(model.encode(batch), batch))
    model.train(was_training)
    if sum(map(len, logits)) < len(dataset):
        return None
    return torch.cat(logits).softmax(-1).cpu().numpy()


def new_cells(probabilities: np.ndarray, classes: list[str]) -> dict[str, object]:
    """The cells that a prediction adds to a row, from its probabilities [classes]."""
    cells = {"predicted_label": classes[int(probabilities.argmax())]}
    for label, probability in zip(classes, probabilities):
        cells[f"probability_{label}"] = round(float(probability), 6)
    return cells


def check_rows(paths: Sequence[str], options: ColumnOptions, classes: list[str]) -> None:
    """UserError lists the rows without text, and new columns that a row already has."""
    problems, taken, added = [], {}, new_cells(np.zeros(len(classes)), classes)
    for where, record, _ in read_texts(paths, options, problems):
        for name in sorted(added.keys() & record.keys()):
            taken.setdefault(name, f"{where}: column {name!r} exists; expected another name")
    problems += taken.values()
    check(problems)


def size_of(row: Row) -> int:
    """The characters of a row's texts."""
    return characters_of(row[2])


def predict_rows(
    rows: Iterable[Row], label_field: str, classes: list[str], predict_chunk: Callable
) -> Iterator[dict]:
    """The records with their `new_cells`. `predict_chunk`: LabeledRows -> [rows, classes]."""
    for chunk in in_groups(rows, size_of, CHUNK):
        labels = [label_of(record.get(label_field)) for _, record, _ in chunk]
        texts = [text for *_, text in chunk]
        probabilities = predict_chunk(LabeledRows(texts, labels, classes))
        for (_, record, _), row in zip(chunk, probabilities):
            yield record | new_cells(row, classes)


def write_rows(path: Path, rows: Iterable[dict], as_csv: bool) -> None:
    """Write `rows` as CSV, with the columns of the first row, or as JSON lines."""
    # JSON may hold half a surrogate pair: \ud800 stays as it is.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as out:
        if not as_csv:
            out.writelines(f"{_as_json(row)}\n" for row in rows)
            return
        for number, row in enumerate(rows, start=1):
            if number == 1:
                writer = csv.DictWriter(out, list(row))
                writer.writeheader()
            cells = dict(row)
            for name, value in row.items():
                if isinstance(value, (list, dict)):
                    cells[name] = _as_json(value)
            try:
                writer.writerow(cells)
            except ValueError as error:
                problem = f"row {number} has different columns from the first"
                raise UserError(f"{problem} ({error}); expected .jsonl") from error


def _as_json(value: object) -> str:
    return as_json(value, ensure_ascii=False, default=str)
