"""Entities in text: labeled spans of characters -> checked rows; spans <-> tags of words.

Input is CoNLL (a token and its BIO, BIOES or BMES tag per line; a blank line ends a row) or a table
with a text and a list of spans. A model predicts BIO tags for the words of its tokenizer.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path

import numpy as np

from pretrain.config import UTF8, ColumnOptions
from pretrain.data.conll import looks_tagged, read_entities
from pretrain.data.sources import check_files, expand
from pretrain.data.spans import Entity, check_spans, read_spans
from pretrain.data.tables import TABLES, format_of
from pretrain.errors import UserError
from pretrain.finetune.dataset import Row, label_of, read_texts

OUTSIDE = "O"
SAMPLED_CHARACTERS = 1 << 16  # to see whether a file has tags
KEYS = ("start", "end", "label")  # of an entity in a file
FIELDS = ("entities", "spans", "labels", "label")  # columns of spans, unless one is named
Entities = tuple[Entity, ...]  # of a text, in order, without overlap


# From files to rows.


def read_documents(
    paths: Sequence[str], options: ColumnOptions, problems: list[str]
) -> Iterator[Row]:
    """The rows of tables and of CoNLL files, in order; what is wrong with a row of a table goes to
    `problems`. The record of a CoNLL sentence has its text and entities."""
    entries = [entry for path in paths for entry in expand([path])]
    for is_table, group in groupby(entries, lambda entry: format_of(entry) in TABLES):
        if is_table:
            yield from read_texts(list(group), options, problems)
        else:
            for source in check_files(map(Path, group), encoding=options.encoding):
                encoding = "utf-8-sig" if source.encoding == UTF8 else source.encoding
                yield from _sentences(Path(source.path), encoding)


def _sentences(path: Path, encoding: str) -> Iterator[Row]:
    """The sentences of a CoNLL file."""
    number = 0
    try:
        for text, entities in chain.from_iterable(read_entities(path, encoding)):
            number += 1
            spans = [dict(zip(KEYS, entity)) for entity in entities]
            yield f"{path}, sentence {number}", {"text": text, "entities": spans}, (text,)
        if not number:
            raise UserError(f"{path}: no rows; expected a token and its tag on each line")
    except UserError as error:
        with path.open(encoding=encoding, errors="replace") as handle:
            if looks_tagged(handle.read(SAMPLED_CHARACTERS)):
                raise
        way = "for plain text, use a table, such as .jsonl with the columns text and, to train"
        raise UserError(f"{error}; {way} or score, entities") from error


def entity_field(record: dict, options: ColumnOptions) -> str | None:
    """The column of the entities; None if there is none."""
    named = options.label_field
    names = FIELDS if named == ColumnOptions.label_field else (named,)
    return next((name for name in names if name in record), None)


def entities_of(record: dict, text: str, where: str, options: ColumnOptions) -> Entities | None:
    """The entities of a record, without white space at their ends; None if it has no column for
    them. UserError if they overlap, lie outside the text, or have no label."""
    name = entity_field(record, options)
    if name is None:
        return None
    try:
        found = sorted(read_spans(record[name], f"{where}: column {name}"))
    except UserError as error:
        way = 'or the option "label_field" with the column of the entities, if there is one'
        raise UserError(f"{error}, {way}") from error
    check_spans(found, text, where)
    entities = []
    for start, end, label in found:
        inside, shown = text[start:end], f"{where}: the span [{start}, {end}]"
        if not label:
            raise UserError(f"{shown} has no label; expected one, such as PER")
        if inside.isspace():
            raise UserError(f"{shown} holds only white space; expected other characters")
        start += len(inside) - len(inside.lstrip())
        end -= len(inside) - len(inside.rstrip())
        entities.append((start, end, label_of(label)))
    return tuple(entities)


# Tags.


def tags_of(labels: Sequence[str]) -> list[str]:
    """BIO tags of labels: O, then B- and I- of each."""
    return [OUTSIDE, *(f"{prefix}-{label}" for label in labels for prefix in "BI")]


def labels_of(tags: Sequence[str]) -> list[str]:
    """The labels in tags, sorted."""
    return sorted({_split(tag)[1] for tag in tags} - {""})


def _split(tag: str) -> tuple[bool, str]:
    """(whether a tag begins an entity, its label), as a pipeline of transformers reads it."""
    if tag == OUTSIDE:
        return False, ""
    return tag.startswith("B-"), tag[2:] if tag.startswith(("B-", "I-")) else tag


def tag_words(entities: Entities, words: np.ndarray, tags: Sequence[str]) -> tuple[np.ndarray, int]:
    """(int64 [words]: a tag for each word, number of entities that are not made of whole words).

    `words`: int64 [words, 2], the first character of each and the end. An entity takes every word
    that it touches and that no entity before it has taken."""
    numbers = {tag: number for number, tag in enumerate(tags)}
    tagged, taken, num_snapped = np.full(len(words), numbers[OUTSIDE]), 0, 0
    for start, end, label in entities:
        first = max(taken, int(np.searchsorted(words[:, 1], start, "right")))
        taken = max(first, int(np.searchsorted(words[:, 0], end, "left")))
        touched = words[first:taken]
        tagged[first:taken] = numbers[f"I-{label}"]
        tagged[first : min(first + 1, taken)] = numbers[f"B-{label}"]
        is_exact = len(touched) and (touched[0, 0], touched[-1, 1]) == (start, end)
        num_snapped += not is_exact
    return tagged, num_snapped


def decode(
    probabilities: np.ndarray, words: np.ndarray, tags: Sequence[str]
) -> list[tuple[int, int, str, float]]:
    """(start, end, label, score) of each entity, from probabilities [words, tags]; the score is the
    mean probability of its tags.

    As in seqeval and the pipelines of transformers, B- begins an entity, and so does I- unless an
    entity with that label is open."""
    best, found = probabilities.argmax(-1), []
    split = [_split(tag) for tag in tags]
    for place in np.flatnonzero(np.array([bool(label) for _, label in split])[best]):
        begins, label = split[best[place]]
        if begins or not found or found[-1][1:] != [place, label]:
            found.append([place, place, label])
        found[-1][1] = place + 1
    entities = []
    for first, end, label in found:
        score = float(probabilities[first:end].max(-1).mean())
        entities.append((int(words[first, 0]), int(words[end - 1, 1]), label, score))
    return entities
