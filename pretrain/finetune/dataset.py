"""Labeled texts for classification: rows of tables -> checked texts and labels -> packed batches.

A row has one text or two, and a label: a name or a whole number. Classes are in the order of the
numbers or of the alphabet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pretrain.batch import IGNORED, Batch
from pretrain.config import ColumnOptions
from pretrain.data.hash_rng import derive, key
from pretrain.data.tables import choose_field, no_column, open_tables
from pretrain.data.tokenizer import encode_together, without_limits
from pretrain.errors import UserError, check
from pretrain.schema import SHOWN_CHARACTERS

MAX_CLASSES = 1000
WHOLE_NUMBER = re.compile(r"-?\d+", re.ASCII)
FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", re.ASCII)

Example = tuple[np.ndarray, np.ndarray, int]  # token ids, token types, label


@dataclass(frozen=True)
class LabeledRows:
    """Texts, each of one or two parts, and their labels."""

    texts: list[tuple[str, ...]]
    labels: list[str]


def choose_columns(record: dict, where: str, options: ColumnOptions) -> tuple[str, ...]:
    """The columns of the text or the two texts, by the first row; UserError if it lacks one."""
    others = (options.label_field, options.text_pair_field)
    rest = {name: value for name, value in record.items() if name not in others}
    columns = {"text": options.text_field or choose_field(rest, where)}
    if options.text_pair_field:
        columns["text pair"] = options.text_pair_field
    for field, column in columns.items():
        if column not in record:
            raise no_column(record, where, column, field)
    return tuple(columns.values())


def text_problems(record: dict, columns: tuple[str, ...], where: str) -> list[str]:
    """What is wrong with the texts of a row: one that is missing or blank."""
    problems = []
    for column in columns:
        value = record.get(column)
        if not isinstance(value, str) or not value.strip():
            found = repr(str(value)[:SHOWN_CHARACTERS]) if value else "nothing"
            problems.append(f"{where}: column {column} has {found}; expected text")
    return problems


def text_of(record: dict, columns: tuple[str, ...]) -> tuple[str, ...]:
    """The text or the two texts of a row without problems. JSON may have half a surrogate pair."""
    return tuple(record[column].encode("utf-8", "replace").decode("utf-8") for column in columns)


def label_of(value: object) -> str:
    """The label in a cell, "" if it is blank."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value).strip()


def label_problems(value: object, subject: str, classes: list[str] | None) -> list[str]:
    """What is wrong with the label in a cell: a name or a whole number, of `classes` if given."""
    label, expected = label_of(value), "a name or a whole number"
    if not isinstance(value, (str, int, type(None))) or FRACTION.fullmatch(label):
        return [f"{subject} {label[:SHOWN_CHARACTERS]!r}; expected {expected}"]
    if not label:
        return [f"{subject} no label; expected {expected}"]
    if classes is not None and label not in classes:
        known = ", ".join(classes[:20])
        return [f"{subject} {label!r}; expected a label of the training rows, such as {known}"]
    return []


def _kind_of(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    return "whole number" if WHOLE_NUMBER.fullmatch(label_of(value)) else "name"


def read_labeled(
    paths: Iterable[str], options: ColumnOptions, classes: list[str] | None = None
) -> LabeledRows:
    """The rows of files, in order.

    UserError lists every row without a text or a label, or with a label that is not in `classes`.
    Without `classes`, labels must be of one kind: some names and some numbers are a mistake."""
    rows, problems, kinds = LabeledRows([], []), [], {}
    columns, field = None, options.label_field
    for where, record in open_tables(paths):
        columns = columns or choose_columns(record, where, options)
        if field not in record:
            problems.append(str(no_column(record, where, field, "label")))
            break  # in the next rows as well
        found = text_problems(record, columns, where)
        found += label_problems(record[field], f"{where}: column {field} has", classes)
        problems += found
        if not found:
            rows.texts.append(text_of(record, columns))
            rows.labels.append(label_of(record[field]))
            kind = _kind_of(record[field])
            kinds.setdefault(kind, f"the {kind} {rows.labels[-1]!r} ({where})")
    if len(kinds) > 1 and classes is None:
        mixed = " with ".join(kinds.values())
        problems.append(f"{' '.join(paths)}: column {field} mixes {mixed}; expected one kind")
    check(problems)
    if not rows.labels:
        raise UserError(f"{' '.join(paths)}: no rows; expected rows of a text and a label")
    return rows


def classes_of(labels: list[str]) -> list[str]:
    """The labels in order; UserError if there is only one, or nearly as many as rows."""
    classes = sorted(set(labels))
    if all(map(WHOLE_NUMBER.fullmatch, classes)):
        classes.sort(key=int)
    if len(classes) < 2:
        raise UserError(f"{classes[0]!r} is the label of all {len(labels):,} rows; expected two")
    if len(classes) > min(MAX_CLASSES, len(labels) / 2 + 1):
        raise UserError(
            f"{classes[0]!r} and others: {len(classes):,} labels in {len(labels):,} rows; expected "
            f"at most {MAX_CLASSES}, with several rows each (is it the right label field?)"
        )
    return classes


def budget_rows(labels: list[str], budget: int, seed: int) -> np.ndarray:
    """int64 [budget]: rows to train on, drawn by `seed`, each class in proportion and at least one
    of it. The rows of a smaller budget are the first of a larger one."""
    _, number = np.unique(labels, return_inverse=True)
    shuffled = np.argsort(derive(key(seed), np.arange(len(labels))), kind="stable")
    rank = np.empty(len(labels))  # of a row within its class, as a share of the class
    for label in range(number.max() + 1):
        rows = shuffled[number[shuffled] == label]
        rank[rows] = np.arange(len(rows)) / len(rows)
    return shuffled[np.argsort(rank[shuffled], kind="stable")][:budget]


class LabeledDataset:
    """Texts as token ids, cut to the tokenizer's `model_max_length`.

    `labels`: int64 [texts], IGNORED if unknown. `class_weights`: float64 [classes], in the loss."""

    def __init__(
        self,
        texts: list[tuple[str, ...]],
        tokenizer: PreTrainedTokenizerBase,
        labels: np.ndarray | None = None,
    ):
        backend = without_limits(tokenizer)
        self.max_length = tokenizer.model_max_length
        backend.enable_truncation(self.max_length, direction=tokenizer.truncation_side)
        self.class_weights: np.ndarray | None = None
        self.labels = np.full(len(texts), IGNORED) if labels is None else labels
        self.num_cut = 0
        self.examples: list[Example] = []
        inputs = [text if len(text) == 2 else text[0] for text in texts]
        for label, encoding in zip(self.labels, encode_together(backend, inputs)):
            ids, type_ids = np.array(encoding.ids, np.uint32), np.array(encoding.type_ids, np.uint8)
            self.examples.append((ids, type_ids, label))
            self.num_cut += bool(encoding.overflowing)

    def __len__(self) -> int:
        return len(self.examples)

    def micro_batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """The rows, packed by `size`."""
        for start in range(0, len(rows), size):
            examples = [self.examples[row] for row in rows[start : start + size]]
            yield pack(examples, self.max_length, self.class_weights)


def pack(
    examples: Sequence[Example], max_length: int, class_weights: np.ndarray | None = None
) -> Batch:
    """The examples end to end. Their loss is divided by the sum of the weights of their labels."""
    ids, type_ids, labels = zip(*examples)
    lengths, labels = np.array([len(part) for part in ids]), np.array(labels, np.int64)
    ends = np.cumsum(lengths)
    known = labels[labels != IGNORED]
    count = len(known) if class_weights is None else class_weights[known].sum()
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        token_type_ids=torch.from_numpy(np.concatenate(type_ids).astype(np.int64)),
        position_ids=torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)),
        cu_seqlens=torch.from_numpy(np.append(0, ends).astype(np.int32)),
        lengths=tuple(lengths.tolist()),
        max_length=max_length,
        labels={"label": torch.from_numpy(labels)},
        num_tokens=int(ends[-1]),
        num_sequences=len(lengths),
        counts={"label": float(count)},
    )


class LabeledSteps:
    """Iterator over optimizer steps: each item is a list of micro-batches.

    The rows of a step are a pure function of the seed and the number of the step. Every epoch has
    an order of its own; its last step takes what is left."""

    position = None  # of the data, in a message: the number of the step says it

    def __init__(
        self,
        dataset: LabeledDataset,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        pin_memory: bool = False,
    ):
        self.dataset, self.seed, self.pin_memory = dataset, seed, pin_memory
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.steps_per_epoch = -(-len(dataset) // batch_size)
        self.step = 0  # steps handed out
        self._epoch, self._order = -1, []

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step, from 0 on."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            keys = derive(key(self.seed, epoch), np.arange(len(self.dataset)))
            self._epoch, self._order = epoch, np.argsort(keys, kind="stable").tolist()
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def __next__(self) -> list[Batch]:
        rows = self.rows_of(self.step)
        batches = list(self.dataset.micro_batches(rows, self.micro_batch_size))
        self.step += 1
        return [batch.pin_memory() for batch in batches] if self.pin_memory else batches

    def logged(self) -> dict[str, float]:
        """What the log shows of the last step."""
        return {}

    def state_dict(self) -> dict[str, int]:
        """A plain value."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The counterpart of `state_dict`."""
        self.step = state["step"]
