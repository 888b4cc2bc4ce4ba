"""Labeled texts: rows of tables -> checked texts and labels -> packed batches.

A row has one or two texts and a label: a name or a whole number in classification, where classes
are sorted by number or alphabetically; any number in regression. For entities see entities.py.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from pretrain.batch import IGNORED, Batch
from pretrain.config import TASK_METRICS, ColumnOptions
from pretrain.data.hash_rng import derive, key
from pretrain.data.tables import choose_field, no_column, open_tables, path_of
from pretrain.data.tokenizer import encode_together, without_limits
from pretrain.errors import UserError, check, counted
from pretrain.inputs import check_vocabulary
from pretrain.schema import SHOWN_CHARACTERS

MAX_CLASSES = 1000
SAMPLED_ROWS = 1000  # to show what is unknown to the tokenizer
MAX_CHARACTERS = 1 << 20  # of a text that are tokenized: far more than fit in an example
WHOLE_NUMBER = re.compile(r"[+-]?\d+", re.ASCII)
FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", re.ASCII)

Row = tuple[str, dict, tuple[str, ...]]  # file and line, record, its one or two texts
Example = tuple[np.ndarray, np.ndarray, float]  # token ids, token types, number of the label


@dataclass(frozen=True)
class LabeledRows:
    """Texts of one or two parts each, their labels, and the labels that a model chooses from.

    A label is a class, a number, or the entities of a text (None if they are unknown)."""

    texts: list[tuple[str, ...]]
    labels: list
    classes: list[str]  # [] in regression; tags such as B-PER for entities

    @property
    def numbers(self) -> np.ndarray:
        """int64 [rows]: the class of each row, IGNORED if unknown. Without classes, float64: the
        labels themselves, NaN if unknown."""
        if not self.classes:
            return np.array(self.labels, np.float64)
        places = {label: number for number, label in enumerate(self.classes)}
        return np.array([places.get(label, IGNORED) for label in self.labels], np.int64)


def choose_columns(record: dict, where: str, options: ColumnOptions) -> tuple[str, ...]:
    """The columns of the one or two texts, from a file's first row; UserError if it lacks one."""
    pair = options.text_pair_field
    rest = {name: record[name] for name in record if name not in (options.label_field, pair)}
    columns = (options.text_field or choose_field(rest, where), *([pair] if pair else []))
    for column, field in zip(columns, ("text", "text pair")):
        if column not in record:
            raise no_column(record, where, column, field)
    return columns


def read_texts(paths: Sequence[str], options: ColumnOptions, problems: list[str]) -> Iterator[Row]:
    """The rows of tables, in order; a row without text is reported in `problems` instead.

    UserError if there are no rows, or if the first one of a file lacks a column."""
    path, columns = "", ()
    for where, record in open_tables(paths, options.encoding):
        if path_of(where) != path:
            try:
                path, columns = path_of(where), choose_columns(record, where, options)
            except UserError as error:
                check([*problems, str(error)])
        texts = []
        for column in columns:
            text = record.get(column)
            if isinstance(text, str) and text.strip():
                texts.append(_as_unicode(text))
            else:
                problems.append(wrong_cell(where, column, text, "text"))
        if len(texts) == len(columns):
            yield where, record, tuple(texts)
    if not columns:
        raise UserError(f"{' '.join(paths)}: no rows; expected rows after a header")


def _as_unicode(text: str) -> str:
    """`text` with "?" for each half of a surrogate pair, which JSON may hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def label_of(value: object) -> str:
    """The label in a cell, "" if the cell is blank."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else _as_unicode(str(value).strip())


def is_label(value: object) -> bool:
    """Whether a cell has a name or a whole number."""
    label = label_of(value)
    return bool(label) and isinstance(value, (str, int)) and not FRACTION.fullmatch(label)


def wrong_cell(where: str, column: str, value: object, expected: str) -> str:
    """What is wrong with a cell."""
    shown = label_of(value)[:SHOWN_CHARACTERS]
    return f"{where}: column {column} has {shown!r}; expected {expected}"


def refuse_rows(problems: list[str], num_good: int) -> None:
    """Raise the `problems` of rows; if no row is good, the first, and what may explain them all."""
    if num_good or len(problems) < 2:
        check(problems)
    else:
        tasks = ", ".join(TASK_METRICS)
        why = f"no row is usable: is it the right column, and the right task ({tasks})?"
        raise UserError(f"{problems[0]} ({why})")


def check_one_kind(labels: list[str], wheres: list[str], source: str) -> None:
    """UserError if some labels are names and others whole numbers: a mix is a mistake."""
    kinds = {}
    for label, where in zip(labels, wheres):
        kind = "whole number" if WHOLE_NUMBER.fullmatch(label) else "name"
        kinds.setdefault(kind, f"the {kind} {label!r} ({where})")
    if len(kinds) > 1:
        mixed = " with ".join(kinds.values())
        raise UserError(f"{source}: the labels mix {mixed}; expected one kind")


def classes_of(labels: list[str], source: str) -> list[str]:
    """The sorted labels; UserError if there is only one, or if there are too many for the rows."""
    classes, num_rows = sorted(set(labels)), len(labels)
    if all(map(WHOLE_NUMBER.fullmatch, classes)):
        classes.sort(key=int)
    first = f"{source}: {classes[0]!r}"
    if len(classes) < 2:
        found = f"{first} is the only label in {counted(num_rows, 'row')}"
        raise UserError(f"{found}; expected two or more")
    if len(classes) > min(MAX_CLASSES, num_rows / 2 + 1):
        expected = f"at most {MAX_CLASSES}, with several rows each (is it the right label field?)"
        found = f"{first} and others are {len(classes):,} labels in {num_rows:,} rows"
        raise UserError(f"{found}; expected {expected}")
    return classes


def number_of(value: object) -> float:
    """The finite number in a cell, NaN if there is none."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def budget_rows(labels: list[str], budget: int, seed: int) -> np.ndarray:
    """int64 [budget]: rows to train on, drawn by `seed`, with every class in proportion and at
    least once. A smaller budget takes the first rows of a larger one."""
    _, number = np.unique(labels, return_inverse=True)
    shuffled = np.argsort(derive(key(seed), np.arange(len(labels))), kind="stable")
    rank = np.empty(len(labels))  # of a row within its class, as a share of the class
    for label in range(number.max() + 1):
        rows = shuffled[number[shuffled] == label]
        rank[rows] = np.arange(len(rows)) / len(rows)
    return shuffled[np.argsort(rank[shuffled], kind="stable")][:budget]


class EncodedRows:
    """`rows` as token ids in pieces of at most `max_length` tokens, and micro-batches of them."""

    is_predicted: slice | np.ndarray = slice(None)  # which outputs become predictions
    class_weights: np.ndarray | None = None  # float64 [classes], in the loss

    def __init__(self, rows: LabeledRows, tokenizer: PreTrainedTokenizerBase):
        self.rows, self.tokenizer = rows, tokenizer
        self.max_length = tokenizer.model_max_length
        self.examples: list[tuple] = []  # uint32 ids, uint8 type ids and what a subclass adds
        self.num_cut = 0  # texts that exceed `max_length`

    def check_tokens(self, name: str) -> None:
        """`check_vocabulary` for these rows; `name` is an option and its value."""
        ids = np.concatenate([example[0] for example in self.examples])
        unknown_share = float((ids == self.tokenizer.unk_token_id).sum() / max(1, len(ids)))
        sample = "\n".join(chain.from_iterable(self.rows.texts[:SAMPLED_ROWS]))
        check_vocabulary(name, unknown_share, self.tokenizer, sample)

    def __len__(self) -> int:
        return len(self.examples)

    def micro_batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """The examples `rows`, packed in micro-batches of `size`."""
        for start in range(0, len(rows), size):
            yield self.pack([self.examples[row] for row in rows[start : start + size]])

    def pack(self, examples: Sequence[tuple]) -> Batch:
        """A micro-batch of these examples."""
        raise NotImplementedError


def arrays_of(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """(ids, type ids) of a text."""
    return np.array(encoding.ids, np.uint32), np.array(encoding.type_ids, np.uint8)


class LabeledDataset(EncodedRows):
    """Rows as token ids, cut to the tokenizer's `model_max_length`.

    `labels`: the `numbers` of the rows."""

    def __init__(self, rows: LabeledRows, tokenizer: PreTrainedTokenizerBase):
        super().__init__(rows, tokenizer)
        backend = without_limits(tokenizer)
        backend.enable_truncation(self.max_length, direction=tokenizer.truncation_side)
        self.labels = rows.numbers
        cuts_left = tokenizer.truncation_side == "left"
        part = slice(-MAX_CHARACTERS, None) if cuts_left else slice(MAX_CHARACTERS)
        parts = ([text[part] for text in texts] for texts in rows.texts)
        inputs = [tuple(texts) if len(texts) == 2 else texts[0] for texts in parts]
        for label, encoding in zip(self.labels, encode_together(backend, inputs)):
            self.examples.append((*arrays_of(encoding), label))
            self.num_cut += bool(encoding.overflowing)

    def pack(self, examples: Sequence[Example]) -> Batch:
        return pack(examples, self.max_length, self.class_weights)


def pack(
    examples: Sequence[Example], max_length: int, class_weights: np.ndarray | None = None
) -> Batch:
    """The examples, end to end. The loss is divided by the sum of the weights of the labels."""
    ids, type_ids, labels = zip(*examples)
    lengths, labels = np.array([len(part) for part in ids]), np.array(labels)
    ends = np.cumsum(lengths)
    if labels.dtype.kind == "f":
        labels = labels.astype(np.float32)
    known = labels[is_known(labels)]
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


def is_known(labels: np.ndarray) -> np.ndarray:
    """bool [labels]: which classes are not IGNORED, which numbers are not NaN."""
    return ~np.isnan(labels) if labels.dtype.kind == "f" else labels != IGNORED


@lru_cache(maxsize=1)  # most steps are in the same epoch as the previous one
def _order_of(epoch: int, num_rows: int, seed: int) -> list[int]:
    keys = derive(key(seed, epoch), np.arange(num_rows))
    return np.argsort(keys, kind="stable").tolist()


@dataclass
class LabeledSteps:
    """Iterator over optimizer steps: each item is a list of micro-batches.

    The examples of a step are a pure function of seed and step number. Every epoch has its own
    order; its last step takes the remaining examples."""

    dataset: EncodedRows
    batch_size: int  # in examples: rows, or windows of rows
    micro_batch_size: int
    seed: int
    pin_memory: bool = False
    step: int = 0  # steps handed out

    position = None  # data position in messages: the step number is enough

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __next__(self) -> list[Batch]:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order, start = _order_of(epoch, len(self.dataset), self.seed), place * self.batch_size
        rows = order[start : start + self.batch_size]
        batches = list(self.dataset.micro_batches(rows, self.micro_batch_size))
        self.step += 1
        return [batch.pin_memory() for batch in batches] if self.pin_memory else batches

    def logged(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
