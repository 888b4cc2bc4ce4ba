"""Tagged tokens (CoNLL: a token and its tag on each line) -> sentences and their entities.

Tags are BIO, BIOES or BMES. Tokens are words, characters, or characters numbered within a word.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice
from pathlib import Path

from pretrain.data.spans import Entity
from pretrain.errors import UserError

BLANK_TOKEN = re.compile(r"\s[\t ]\S+")  # a white-space token and its tag
# A character, which may be several code points such as an emoji, and its position in a word.
NUMBERED = re.compile(r"(\w\W*|\W+)(\d+)")
MAX_STRAY_SHARE = 0.02  # of the entities of a file
SAMPLED_TOKENS = 2000  # from which the way to join tokens is detected
# Prefixes of tags that begin an entity, continue it, and leave it open.
BEGIN, CONTINUE, OPEN = ("B", "S"), ("I", "M", "E"), ("B", "I", "M")

TAGGED_LINE = re.compile(r"\S+[\t ](?:.*[\t ])?(O|[BIESM][-_]\S+)")
MIN_TAGGED_SHARE = 0.9  # of the lines of a text that looks tagged

Row = tuple[int, str, str]  # line, token, tag
Tagged = tuple[str, tuple[Entity, ...]]  # text, its entities in order


def looks_tagged(sample: str) -> bool:
    """Whether nearly all lines of a text end in a tag, and some tag begins an entity."""
    lines = [line for line in map(str.strip, sample.split("\n")) if line]
    tags = [found[1] for found in map(TAGGED_LINE.fullmatch, lines) if found]
    return len(tags) > MIN_TAGGED_SHARE * len(lines) and set(tags) != {"O"}


def read_entities(path: Path, encoding: str = "utf-8-sig") -> Iterator[list[Tagged]]:
    """Documents of a file. A blank line ends a document, or a sentence if the file has -DOCSTART-.

    A few I- tags without a B- before them are read as B-; UserError if there are more."""
    separator = _separator(path, encoding)
    strays: list[tuple[int, str]] = []  # (line, tag) of I- tags without a B-
    document: list[Tagged] = []
    num_entities, has_documents = 0, None
    for rows, starts_document in _blocks(path, encoding):
        has_documents = starts_document if has_documents is None else has_documents
        if document and (starts_document or not has_documents):
            yield document
            document = []
        document.append(_sentence(rows, separator, path, strays))
        num_entities += len(document[-1][1])
    if document:
        yield document
    if strays:
        line, tag = strays[0]
        problem = f"{path}, line {line}: the tag {tag} continues an entity that did not begin"
        share = f"{len(strays)} of {num_entities} in the file"
        if len(strays) > MAX_STRAY_SHARE * num_entities:
            raise UserError(f"{problem} ({share}); expected B- at the first token of each entity")
        _say_once(f"{problem} ({share}): read as B-")


@cache
def _say_once(notice: str) -> None:
    """Print a notice about a file; each run of an experiment reads the same files."""
    print(notice)


def _blocks(path: Path, encoding: str) -> Iterator[tuple[list[Row], bool]]:
    """(rows up to a blank line, whether they start a document)."""
    rows, starts_document = [], False
    with path.open(encoding=encoding, newline="\n") as handle:
        for number, line in enumerate(chain(handle, [""]), start=1):
            line = line.rstrip()
            is_start = line.startswith("-DOCSTART-")
            if line.strip() and not is_start:
                fields = line.split("\t" if "\t" in line else " ")
                token = " " if BLANK_TOKEN.fullmatch(line) else fields[0].strip()
                if len(fields) < 2 or not token:
                    problem = f"{path}, line {number}: {line[:40]!r}"
                    raise UserError(f"{problem}; expected a token, a tab or space, and its tag")
                rows.append((number, token, fields[-1].lstrip()))
                continue
            if rows:
                yield rows, starts_document
                rows, starts_document = [], False
            starts_document = starts_document or is_start


def _separator(path: Path, encoding: str) -> str | None:
    """What joins the tokens of a file: " ", "", or None if the tokens are numbered characters."""
    rows = chain.from_iterable(rows for rows, _ in _blocks(path, encoding))
    tokens = [token for _, token, _ in islice(rows, SAMPLED_TOKENS)]
    if sum(bool(NUMBERED.fullmatch(token)) for token in tokens) > 0.98 * len(tokens):
        shown = f"tokens such as {tokens[0]!r} are a character and its position in a word"
        _say_once(f"{path}: {shown}; words are joined with spaces")
        return None
    return "" if sum(len(token) == 1 for token in tokens) > 0.9 * len(tokens) else " "


def _sentence(
    rows: list[Row], separator: str | None, path: Path, strays: list[tuple[int, str]]
) -> Tagged:
    """The tokens of a sentence, joined; I- tags without a B- are added to `strays`."""
    spans: list[Entity] = []
    text, open_type = "", None
    for line, token, tag in rows:
        gap = separator
        if gap is None:
            numbered = NUMBERED.fullmatch(token)
            token, place = numbered.groups() if numbered else (token, "0")
            gap = " " if place == "0" else ""
        if text:
            text += gap
        prefix, kind = [*re.split("[-_]", tag, maxsplit=1), ""][:2]
        end = len(text) + len(token)
        if prefix in CONTINUE and open_type == kind:
            spans[-1] = (spans[-1][0], end, kind)
        elif prefix in BEGIN + CONTINUE:
            spans.append((len(text), end, kind))
            if prefix in CONTINUE:
                strays.append((line, tag))
        elif tag != "O":
            problem = f"{path}, line {line}: unknown tag {tag!r}"
            raise UserError(f"{problem}; expected O, or B, I, M, E or S with -TYPE")
        open_type = kind if prefix in OPEN else None
        text += token
    return text, tuple(spans)
