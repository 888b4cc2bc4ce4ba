"""Labelled texts for classification: rows of a table -> checked texts and labels -> a Dataset of packed batches.

A row has one text or two and a label; labels are names or whole numbers, and their order is that of the numbers or of the alphabet.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from pretrain.batch import IGNORED, LabelledBatch
from pretrain.command import UserError, check
from pretrain.config import ColumnOptions
from pretrain.data.draws import derive, key
from pretrain.data.tables import choose_field, open_tables
from pretrain.data.tokenizer import encode_together, without_limits

MAX_CLASSES = 1000
FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Labelled:
    """Texts, each of one or two parts, and their labels."""

    texts: list[tuple[str, ...]]
    labels: list[str]


def choose_columns(record: dict, where: str, options: ColumnOptions) -> tuple[str, ...]:
    """The columns of the text or the two texts, told from a first row; UserError where the row lacks one."""
    rest = {name: value for name, value in record.items() if name not in (options.label_field, options.text_pair_field)}
    columns = (options.text_field or choose_field(rest, where),) + ((options.text_pair_field,) if options.text_pair_field else ())
    for column, option in zip(columns, ("text", "text-pair")):
        if column not in record:
            raise UserError(f"{where}: has no column {column!r}, it has {', '.join(map(str, record))}; needed is one of these as "
                            f"--{option}-field")
    return columns


def text_of(record: dict, columns: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The text or the two texts of a row; UserError where one is missing or blank."""
    missing = [column for column in columns if column not in record]
    if missing:
        raise UserError(f"{where}: has no column {missing[0]!r}, it has {', '.join(map(str, record))}; needed are those of the first row")
    texts = tuple(record[column] for column in columns)
    for column, text in zip(columns, texts):
        if not isinstance(text, str) or not text.strip():
            held = repr(str(text)[:40]) if text and not isinstance(text, str) else "no text"
            raise UserError(f"{where}: the column {column} holds {held}; needed is text")
    return tuple(text.encode("utf-8", "replace").decode("utf-8") for text in texts)  # JSON may hold half of a surrogate pair


def label_of(value: object) -> str | None:
    """The label in a cell: a name, or a whole number; None where there is none. ValueError for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value).strip() if isinstance(value, (str, int)) else ""
    if not text and value is not None and not isinstance(value, str) or re.fullmatch(FRACTION, text):
        raise ValueError(f"holds {str(value)[:40]!r}")
    return text or None


def _is_number(label: str) -> bool:
    return re.fullmatch(r"-?\d+", label, re.ASCII) is not None


def read_labelled(paths: list[str], name: str, options: ColumnOptions, classes: list[str] | None = None) -> Labelled:
    """The rows of files, in order; UserError tells every row without a text or a label, and labels that are not in `classes` (of
    --train, where given) or are numbers here and names there."""
    texts, labels, problems, kinds, columns = [], [], [], {}, None
    for where, record in open_tables(paths, name):
        try:
            columns = columns or choose_columns(record, where, options)
            if options.label_field not in record:
                raise UserError(f"{where}: has no column {options.label_field!r}, it has {', '.join(map(str, record))}; needed is one of "
                                "these as --label-field")
            text, label = text_of(record, columns, where), label_of(record[options.label_field])
        except UserError as error:
            problems.append(f"{name} {error}")
            if columns is None or options.label_field not in record:
                break  # every other row would tell the same
            continue
        except ValueError as error:
            problems.append(f"{name} {where}: the column {options.label_field} {error}; needed is a name or a whole number")
            continue
        if label is None:
            problems.append(f"{name} {where}: has no label; needed is a name or a whole number in the column {options.label_field}")
        elif classes is not None and label not in classes:
            problems.append(f"{name} {where}: the label {label!r} does not occur in --train; there are {', '.join(classes[:20])}")
        else:
            texts.append(text)
            labels.append(label)
            kind = "boolean" if isinstance(record[options.label_field], bool) else "whole number" if _is_number(label) else "name"
            kinds.setdefault(kind, f"the {kind} {label!r} ({where})")
    if len(kinds) > 1 and classes is None:
        problems.append(f"{name}: the column {options.label_field} mixes {' with '.join(kinds.values())}; needed is one kind")
    check(problems)
    if not texts:
        raise UserError(f"{name} {' '.join(paths)}: holds no row; needed are rows of a text and a label")
    return Labelled(texts, labels)


def classes_of(labelled: Labelled, name: str, paths: list[str]) -> list[str]:
    """The labels, in order; UserError where there is one alone, or nearly as many as rows."""
    classes = sorted(set(labelled.labels), key=lambda label: (int(label), label) if _is_number(label) else label)
    shown, num_rows = f"{name} {' '.join(paths)}", len(labelled.labels)
    if len(classes) < 2:
        raise UserError(f"{shown}: all {num_rows:,} rows have the label {classes[0]!r}; needed are two classes at least")
    if len(classes) > min(MAX_CLASSES, num_rows / 2 + 1):
        raise UserError(f"{shown}: {len(classes):,} different labels in {num_rows:,} rows, such as {classes[0]!r}; needed are classes, at "
                        f"most {MAX_CLASSES}, with several rows each (is --label-field right?)")
    return classes


def budget_rows(labels: list[str], budget: int, seed: int) -> np.ndarray:
    """int64 [budget]: rows to train on, a draw of `seed` with the classes in proportion, one of each at least; a smaller budget's
    rows are the first of a larger one's."""
    _, number = np.unique(labels, return_inverse=True)
    shuffled = np.argsort(derive(key(seed), np.arange(len(labels))), kind="stable")
    rank = np.empty(len(labels))  # of a row within its class, as a share of the class
    for label in range(number.max() + 1):
        rows = shuffled[number[shuffled] == label]
        rank[rows] = np.arange(len(rows)) / len(rows)
    return shuffled[np.argsort(rank[shuffled], kind="stable")][:budget]


class LabelledDataset(Dataset):
    """Texts as token ids, cut to `max_length`; `labels` int64 [texts], IGNORED where there is none."""

    def __init__(self, texts: list[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, max_length: int, labels: np.ndarray | None = None):
        backend = without_limits(tokenizer)
        backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
        self.labels = np.full(len(texts), IGNORED) if labels is None else labels
        ids, type_ids, lengths, self.num_cut = [], [], [], 0
        for encoding in encode_together(backend, [text if len(text) == 2 else text[0] for text in texts]):
            ids.append(np.array(encoding.ids, np.uint32))
            type_ids.append(np.array(encoding.type_ids, np.uint8))
            lengths.append(len(encoding.ids))
            self.num_cut += bool(encoding.overflowing)
        self.ids, self.type_ids = np.concatenate(ids), np.concatenate(type_ids)
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(ids, token types, label) of a text."""
        place = slice(self.starts[index], self.ends[index])
        return self.ids[place], self.type_ids[place], self.labels[index]


class StepSampler(Sampler):
    """The examples of each step: every epoch in an order of its own, its last step with what is left."""

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in count():
            order = np.argsort(derive(key(self.seed, epoch), np.arange(self.num_examples)), kind="stable").tolist()
            yield from (order[start: start + self.batch_size] for start in range(0, self.num_examples, self.batch_size))


@dataclass(frozen=True)
class LabelledCollator:
    """Packs the examples of a step into micro-batches. `class_weights` float64 [classes]; what a loss is divided by is their sum."""

    max_length: int
    micro_batch_size: int
    class_weights: np.ndarray | None = None

    def __call__(self, examples: list[tuple[np.ndarray, np.ndarray, int]]) -> list[LabelledBatch]:
        """Micro-batches of at most `micro_batch_size` examples."""
        return [self.pack(examples[start: start + self.micro_batch_size]) for start in range(0, len(examples), self.micro_batch_size)]

    def pack(self, examples: list[tuple[np.ndarray, np.ndarray, int]]) -> LabelledBatch:
        """The examples end to end."""
        ids, type_ids, labels = zip(*examples)
        lengths, labels = np.array([len(part) for part in ids]), np.array(labels, np.int64)
        ends = np.cumsum(lengths)
        known = labels[labels != IGNORED]
        return LabelledBatch(
            input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
            token_type_ids=torch.from_numpy(np.concatenate(type_ids).astype(np.int64)),
            position_ids=torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)),
            cu_seqlens=torch.from_numpy(np.append(0, ends).astype(np.int32)), lengths=tuple(lengths.tolist()), max_length=self.max_length,
            label=torch.from_numpy(labels), num_tokens=int(ends[-1]), num_sequences=len(lengths),
            counts={"label": float(len(known) if self.class_weights is None else self.class_weights[known].sum())})
