"""Tagged tokens (CoNLL: a token and its tag a line) -> text and the spans of its entities.

Tags are BIO, BIOES or BMES. Tokens are words, characters, or characters with a digit: their place in their word.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from pretrain.command import UserError

NUMBERED = r"(.)(\d+)"  # a character and its place in its word
MAX_STRAY_SHARE = 0.02  # of a file's entities
SAMPLED_TOKENS = 2000  # of a tagged file, to tell how its tokens are to be joined


def read_tagged(path: Path) -> Iterator[tuple[str, list]]:
    """Documents of a file of tagged tokens. Blank lines end a document; where lines of -DOCSTART- do, they end a sentence.

    Annotators slip: a few tags I- with nothing before them are read as B-; UserError where there are more."""
    join, strays, num_entities = _joining(path), [], 0
    blocks: list[tuple[str, list]] = []
    has_documents = None
    for rows, starts_document in _blocks(path):
        has_documents = starts_document if has_documents is None else has_documents
        if blocks and (starts_document or not has_documents):
            yield _joined(blocks)
            blocks = []
        if rows:
            blocks.append(_sentence(rows, join, path, strays))
            num_entities += len(blocks[-1][1])
    if blocks:
        yield _joined(blocks)
    if strays:
        told = (f"{path}, line {strays[0][0]}: the tag {strays[0][1]} goes on with what does not begin before it, as {len(strays)} of "
                f"{num_entities} do in the file")
        if len(strays) > MAX_STRAY_SHARE * num_entities:
            raise UserError(f"{told}; needed is B- at the first token of each entity (B, I, O, or B, M, E, S, O)")
        print(f"{told}: read as the first token of an entity")


def _blocks(path: Path) -> Iterator[tuple[list[tuple[int, str, str]], bool]]:
    """((line, token, tag) of lines up to a blank one, whether a document starts here)."""
    rows: list[tuple[int, str, str]] = []
    starts_document = False
    with path.open(encoding="utf-8-sig", newline="\n") as handle:
        for number, line in enumerate(handle, start=1):
            line = line.rstrip("\r\n")
            fields = line.split("\t") if "\t" in line else line.split(" ")
            if line.strip() and not line.startswith("-DOCSTART-"):
                if len(fields) < 2 or not fields[0].strip():
                    raise UserError(f"{path}, line {number}: holds {line[:40]!r}; needed is a token and, after a tab or a space, "
                                    "its tag")
                rows.append((number, fields[0].strip(), fields[-1].strip()))
                continue
            if rows:
                yield rows, starts_document
                rows, starts_document = [], False
            starts_document |= bool(line.strip())
    if rows:
        yield rows, starts_document


def _joining(path: Path) -> str:
    """How tokens of a file make text: "digits" (a character and its place in its word), "characters" or "words"."""
    tokens = [token for rows, _ in islice(_blocks(path), SAMPLED_TOKENS) for _, token, _ in rows][:SAMPLED_TOKENS]
    digits = sum(bool(re.fullmatch(NUMBERED, token)) for token in tokens)
    if digits > 0.98 * len(tokens):
        print(f"{path}: tokens such as {tokens[0]!r} are read as a character and its place in its word; text is joined word by word")
        return "digits"
    return "characters" if sum(len(token) == 1 for token in tokens) > 0.9 * len(tokens) else "words"


def _sentence(rows: list[tuple[int, str, str]], join: str, path: Path, strays: list[tuple[int, str]]) -> tuple[str, list]:
    """(text, spans) of the tokens of a sentence; tags are B- I- O, with E- and S- or M- too. Tags without a beginning join `strays`."""
    text, spans, open_type = "", [], None
    for number, token, tag in rows:
        if join == "digits":
            token, place = numbered.groups() if (numbered := re.fullmatch(NUMBERED, token)) else (token, "0")
            text += " " * (place == "0" and bool(text))
        elif join == "words":
            text += " " * bool(text)
        place, _, kind = tag.replace("_", "-", 1).partition("-")
        if place in ("I", "M", "E") and open_type == kind:
            spans[-1] = (spans[-1][0], len(text) + len(token))
        elif place in ("B", "S", "I", "M", "E"):
            spans.append((len(text), len(text) + len(token)))
            strays += [(number, tag)] * (place not in ("B", "S"))
        elif tag != "O":
            raise UserError(f"{path}, line {number}: the tag {tag!r} is unknown; needed is O, or B, I, M, E, S with -TYPE")
        open_type = kind if place in ("B", "I", "M") else None
        text += token
    return text, spans


def _joined(blocks: Iterable[tuple[str, list]]) -> tuple[str, list]:
    text, spans = "", []
    for sentence, entities in blocks:
        text += "\n" * bool(text)
        spans += [(len(text) + start, len(text) + end) for start, end in entities]
        text += sentence
    return text, spans
