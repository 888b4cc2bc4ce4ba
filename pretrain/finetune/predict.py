"""Labels and probabilities of texts, in order.

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

from pretrain.batch import IGNORED
from pretrain.config import ColumnOptions
from pretrain.data.tables import open_tables
from pretrain.errors import UserError, check, refusing
from pretrain.finetune.dataset import (
    LabeledDataset,
    choose_columns,
    label_of,
    text_of,
    text_problems,
)
from pretrain.finetune.heads import PackedClassifier
from pretrain.finetune.scores import Tally

CHUNK = 1024  # rows


@torch.no_grad()
def predict(
    model: PackedClassifier,
    dataset: LabeledDataset,
    batch_size: int,
    precision: torch.autocast,
    stop: Callable[[], int] = lambda: 0,
) -> np.ndarray | None:
    """float32 [texts, classes]: probabilities, in the order of the dataset; None if `stop` (a
    signal) cut it short."""
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


def new_columns(classes: list[str]) -> list[str]:
    """The columns that predictions add to a row."""
    return ["predicted_label", *(f"probability_{label}" for label in classes)]


def new_cells(probabilities: np.ndarray, classes: list[str]) -> dict[str, object]:
    """The cells of `new_columns`, from the probabilities [classes] of a row."""
    label = classes[int(probabilities.argmax())]
    cells = [label, *(round(float(probability), 6) for probability in probabilities)]
    return dict(zip(new_columns(classes), cells))


def check_rows(paths: Iterable[str], options: ColumnOptions, new: list[str]) -> tuple[str, ...]:
    """Read all rows; the columns of their text.

    UserError lists each row without text, and each column of `new` that is there already."""
    columns, problems, taken = (), [], set()
    for where, record in open_tables(paths):
        columns = columns or choose_columns(record, where, options)
        repeated = [name for name in new if name in record and name not in taken]
        taken.update(repeated)
        problems += [f"{where}: has a column {name!r}; expected none" for name in repeated]
        problems += text_problems(record, columns, where)
    check(problems)
    if not columns:
        raise UserError(f"{' '.join(paths)}: no rows; expected rows of text")
    return columns


def predict_rows(
    rows: Iterable[tuple[str, dict]],
    columns: tuple[str, ...],
    label_field: str,
    predict_chunk: Callable[[list[tuple[str, ...]]], np.ndarray],
    tally: Tally,
) -> Iterator[dict]:
    """Each row with the cells of `new_columns`; `predict_chunk` gives probabilities for texts.

    Rows whose `label_field` has a label of the model are scored in `tally`."""
    classes, records = tally.classes, (record for _, record in rows)
    while chunk := list(islice(records, CHUNK)):
        probabilities = predict_chunk([text_of(record, columns) for record in chunk])
        labels = [label_of(record.get(label_field)) for record in chunk]
        known = [classes.index(label) if label in classes else IGNORED for label in labels]
        tally.add(np.array(known), probabilities)
        for record, of_row in zip(chunk, probabilities):
            yield record | new_cells(of_row, classes)


def write_rows(path: Path, rows: Iterable[dict], as_csv: bool) -> None:
    """Write `rows` as CSV, with the columns of the first, or as JSON lines."""
    writer = None
    with path.open("w", encoding="utf-8", newline="") as out:
        for number, row in enumerate(rows, start=1):
            if not as_csv:
                out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                continue
            if writer is None:
                writer = csv.DictWriter(out, list(row))
                writer.writeheader()
            with refusing(f"row {number} has other columns than the first", "expected .jsonl"):
                writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: object) -> object:
    is_nested = isinstance(value, (list, dict))
    return json.dumps(value, ensure_ascii=False, default=str) if is_nested else value
