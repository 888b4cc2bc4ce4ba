"""Predictions for texts, in order: labels and probabilities, entities, or numbers."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pretrain.config import UTF8, ColumnOptions
from pretrain.errors import UserError, check
from pretrain.evaluate import evaluation_mode
from pretrain.files import as_json
from pretrain.finetune.dataset import EncodedRows
from pretrain.finetune.heads import PackedClassifier
from pretrain.finetune.tasks import Classification


@torch.no_grad()
def predict(
    model: PackedClassifier,
    dataset: EncodedRows,
    batch_size: int,
    context: torch.autocast,
    stop=lambda: 0,
) -> np.ndarray | None:
    """float32, in the order of the dataset: probabilities [rows, classes] or [words, tags], or
    numbers [rows]; None if `stop` (a signal) cut it short."""
    logits = []
    with evaluation_mode(model), context:
        for batch in dataset.micro_batches(range(len(dataset)), batch_size):
            if stop():
                return None
            batch = batch.to(model.device)
            logits.append(model.label_logits(model.encode(batch), batch))
    return model.outputs(torch.cat(logits)).cpu().numpy()[dataset.is_predicted]


def check_rows(
    paths: Sequence[str],
    options: ColumnOptions,
    task: Classification,
    classes: list[str],
    as_csv: bool = False,
) -> None:
    """UserError lists the rows that cannot be read, the columns that predictions would replace and,
    for CSV output, the first row with a column that row 1 lacks."""
    problems, taken, added = [], {}, set(task.columns(classes))
    columns: set[str] = set()
    for row in task.documents(paths, options, problems):
        where, record, _ = row
        try:
            task.label(row, options)
        except UserError as error:
            problems.append(str(error))
        columns = columns or set(record)
        if as_csv and (others := sorted(record.keys() - columns)):
            shown = ", ".join(others)
            problems.append(f"{where}: column {shown} is not in the first row; expected .jsonl")
            as_csv = False  # the next rows would only repeat it
        for name in sorted(added & record.keys()):
            taken.setdefault(name, f"{where}: column {name!r} exists; expected another name")
    problems += taken.values()
    check(problems)


def write_rows(path: Path, rows: Iterable[dict], as_csv: bool, encoding: str = UTF8) -> None:
    """Write `rows` as CSV, with the columns of the first row, or as JSON lines. For CSV, no later
    row may have other columns: callers check that."""
    # JSON may hold half a surrogate pair: \ud800 stays as it is.
    with path.open("w", encoding=encoding, errors="backslashreplace", newline="") as out:
        if not as_csv:
            out.writelines(f"{_as_json(row)}\n" for row in rows)
            return
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(out, list(row))
                writer.writeheader()
            cells = dict(row)
            for name, value in row.items():
                if isinstance(value, (list, dict)):
                    cells[name] = _as_json(value)
            writer.writerow(cells)


def read_predictions(path: Path) -> Iterator[dict]:
    """The rows of a file that `write_rows` wrote; the cells of CSV are text."""
    with path.open(encoding="utf-8-sig", newline="") as rows:
        yield from csv.DictReader(rows) if path.suffix == ".csv" else map(json.loads, rows)


def _as_json(value: object) -> str:
    return as_json(value, ensure_ascii=False, default=str)
