"""Rows of JSONL, CSV and TSV files, and of everything that the package `datasets` reads."""

import csv
import glob
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import TextIO

from pretrain.config import RECORD_FORMATS, UTF8
from pretrain.data.sources import CHUNK_BYTES, MAX_CHARACTERS, check_files, expand, too_long
from pretrain.errors import UserError, check, refusing, require
from pretrain.files import check_regular, read_json

ALIASES = {"ndjson": "jsonl", "json": "jsonl", "bio": "conll", "bmes": "conll", "bioes": "conll"}
TABLES = ("csv", "tsv", "jsonl", "parquet", "arrow")
TEXT_FORMATS = {"plain", "jsonl", "csv", "tsv", "conll"}  # the others have no encoding
SPLIT = "train"  # is read, unless another one is named
PARQUET_BATCH = 1000  # rows in memory
MAX_NAME, SHOWN_NAMES = 20, 20  # characters of a column, columns in a message
SENTENCE = re.compile(r"[\s，。！？；]")  # in a long name of a column: the file has no header
HUB_FORMS = "hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT"


def format_of(entry: str, wanted: str = "auto") -> str:
    """The format of an input: one of RECORD_FORMATS, "plain", "hub" or "saved"."""
    if entry.startswith("hub:"):
        return "hub"
    if Path(entry).is_dir():
        return "saved"
    suffix = Path(entry).suffix.lower().removeprefix(".")
    kind = ALIASES.get(suffix, suffix) if wanted == "auto" else wanted
    return kind if kind in RECORD_FORMATS else "plain"


def splits_of(entry: str) -> list[str]:
    """The parts of a saved DatasetDict, of which SPLIT is read; [] for any other input."""
    with suppress(UserError):  # another input, or damaged (reported where it is read)
        return list(map(str, read_json(Path(entry) / "dataset_dict.json").get("splits", [])))
    return []


def open_tables(paths: Iterable[str], encoding: str = UTF8) -> Iterator[tuple[str, dict]]:
    """(file and line, record) of each row of the tables that `paths` name, in order.

    UserError before the first row if a file has another format, or is not UTF-8 or `encoding`."""
    entries = [entry for path in paths for entry in expand([path])]
    others = [entry for entry in entries if format_of(entry) not in TABLES]
    check([f"{entry}: not a table; {_table_for(entry)}" for entry in others])
    texts = [Path(entry) for entry in entries if format_of(entry) in TEXT_FORMATS]
    found = {source.path: source.encoding for source in check_files(texts, encoding=encoding)}
    tables = (read_rows(entry, format_of(entry), found.get(entry, UTF8)) for entry in entries)
    return chain.from_iterable(tables)


def _table_for(entry: str) -> str:
    """What was expected in place of a file that is not a table."""
    expected = f"expected {', '.join(TABLES)}"
    if format_of(entry) == "conll":
        expected += '; a CoNLL file has entities, which need the option "task" ner'
    elif Path(entry).suffix.lower() == ".txt":
        expected += "; rename it to .tsv if tabs separate its columns"
    return expected


def read_rows(entry: str, kind: str, encoding: str = UTF8) -> Iterator[tuple[str, dict]]:
    """(file and line, record) of each row of `entry`, an input of format `kind`."""
    unit = "line" if kind in TEXT_FORMATS else "row"
    encoding = "utf-8-sig" if encoding == UTF8 else encoding
    if kind == "jsonl":
        rows = _json_rows(entry, encoding)
    elif kind in ("csv", "tsv"):
        rows = _delimited_rows(entry, kind, encoding)
    else:
        rows = enumerate(_dataset_rows(entry, kind), start=1)
    for number, record in rows:
        where = f"{entry}, {unit} {number}"
        for name, value in record.items():
            if isinstance(value, str) and len(value) > MAX_CHARACTERS:
                raise too_long(f"{where}: column {name}")
        yield where, record


def choose_field(record: dict, where: str) -> str:
    """The column of the text: "text", or the only column that may hold words, as far as this record
    tells: an empty cell may in other records."""
    if "text" in record:
        return "text"
    texts = [field for field, value in record.items() if value is None or isinstance(value, str)]
    texts = [field for field in texts if not re.fullmatch(r"[\d.,+-]+", record[field] or "")]
    has_header = format_of(path_of(where)) in ("csv", "tsv")
    if len(texts) != 1 or (has_header and len(texts[0]) > MAX_NAME and SENTENCE.search(texts[0])):
        raise no_column(record, where, "text", "text")
    return texts[0]


def path_of(where: str) -> str:
    """The file in a place that `read_rows` names."""
    return where.rpartition(", ")[0]


def no_column(record: dict, where: str, name: str | None, field: str) -> UserError:
    """The error for a record without the column `name`; `field` is text, label or the like."""
    names = [str(column) for column in record]
    shown = [name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..." for name in names]
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    columns = f"{', '.join(shown[:SHOWN_NAMES])}{more}"
    path = path_of(where)
    header = ""
    if format_of(path) in ("csv", "tsv"):
        where, header = f"{path}, line 1", " in the header" + " (is it missing?)" * (shown != names)
    expected = f'the option "{field.replace(" ", "_")}_field" with one of {columns}'
    return UserError(f"{where}: no column {name!r}{header}; expected {expected}")


def _json_rows(path: str, encoding: str) -> Iterator[tuple[int, dict]]:
    """The objects of a file, numbered: one per line, or the items of one array."""
    expected = "expected one object per line, or one array"
    with open(path, encoding=encoding, newline="\n") as handle:
        is_array = handle.read(1 << 10).lstrip().startswith("[")
        handle.seek(0)
        values = _array_items(handle) if is_array else map(_line_items, handle)
        for number in count(start=1):
            with refusing(f"{path}, line {number}: not JSON", expected):
                items = next(values, None)
            if items is None:
                return
            for record in items:
                if not isinstance(record, dict):
                    raise UserError(f"{path}, line {number}: {str(record)[:40]!r}; {expected}")
                yield number, record


def _line_items(line: str) -> list:
    """The objects in a line of JSON: none if it is blank, several in an array."""
    content = json.loads(line) if line.strip() else []
    return content if isinstance(content, list) else [content]


def _array_items(handle: TextIO) -> Iterator[list]:
    """Each item of a JSON array, in a list; keeps one item and a chunk of text in memory."""
    decode, place = json.JSONDecoder().raw_decode, 0
    text = handle.read(CHUNK_BYTES).partition("[")[2]
    separator = re.compile(r"\s*")
    while True:
        try:
            begin = separator.match(text, place).end()  # type: ignore[union-attr] # None: see below
            item, place = decode(text, begin)
        except (ValueError, AttributeError) as error:  # the item or the comma is not complete
            if end := re.compile(r"\s*\]").match(text, place):
                if (text[end.end() :] + handle.read(CHUNK_BYTES)).strip():
                    raise ValueError("text after the array") from error
                return
            text, place = text[place:], 0
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"no whole object in {len(text):,} characters") from error
            more = handle.read(max(CHUNK_BYTES, len(text)))  # doubling keeps the time linear
            if not more:
                raise ValueError("the array does not end, or has no comma") from error
            text += more
        else:
            separator = re.compile(r"\s*,\s*")
            yield [item]


def _delimited_rows(path: str, kind: str, encoding: str) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV or TSV file, by its header."""
    csv.field_size_limit(MAX_CHARACTERS)
    with open(path, encoding=encoding, newline="") as handle:
        reader = csv.DictReader(handle, strict=True, **_dialect(path, kind, encoding))
        try:
            header = reader.fieldnames or []
            if len(set(header)) < len(header):
                shown = ", ".join(header)
                raise UserError(f"{path}, line 1: columns {shown}; expected unique names")
            for row in reader:
                if None in row or None in row.values():  # too many or too few fields
                    expected = f"expected {len(header)} fields, as in the header"
                    raise UserError(f"{path}, line {reader.line_num}: bad row; {expected}")
                yield reader.line_num, row
        except csv.Error as error:
            problem = f"{path}, line {reader.reader.line_num}: not {kind.upper()} ({error})"
            expected = f"quotes that close, doubled inside, and up to {MAX_CHARACTERS:,} characters"
            raise UserError(f"{problem}; expected {expected}") from error


def _dialect(path: str, kind: str, encoding: str) -> dict:
    """Arguments for csv.reader. Spreadsheets in much of Europe write semicolons. Many TSV files are
    not quoted: a quote that spans a tab or never closes is then an ordinary character."""
    with open(path, encoding=encoding, newline="") as handle:
        if kind == "csv":
            header = handle.readline()
            return {"delimiter": ";" if ";" in header and "," not in header else ","}
        try:
            rows = csv.reader(handle, delimiter="\t", strict=True)
            is_quoted = not any("\t" in field for row in rows for field in row)
        except csv.Error:
            is_quoted = False
    return {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE}


def _dataset_rows(entry: str, kind: str) -> Iterator[dict]:
    """Rows that `datasets` reads, streamed so that nothing is copied."""
    datasets = require("datasets", entry)
    version = datasets.__version__
    if int(version.split(".")[0]) < 4:  # older versions run code that comes with a data set
        expected = "expected version 4 or later: pip install -U datasets"
        raise UserError(f"{entry}: the package datasets has version {version}; {expected}")
    with refusing(f"{entry}: cannot be read as {kind}", "expected complete files, or a known name"):
        if kind == "saved":
            check_regular(Path(entry))
            table = datasets.load_from_disk(entry)
            if isinstance(table, dict):
                if SPLIT not in table:
                    found = f"has no split {SPLIT}, but {', '.join(table)}"
                    raise UserError(f"{entry}: {found}; expected {entry}/{next(iter(table))}")
                table = table[SPLIT]
        elif kind == "hub":
            name, config, split, *more = entry.removeprefix("hub:").split(":") + ["", "", ""]
            if not name or any(more):
                raise UserError(f"{entry}: not the name of a data set; expected {HUB_FORMS}")
            split = split or SPLIT
            table = datasets.load_dataset(name, config or None, split=split, streaming=True)
        else:
            more = {"data_files": glob.escape(entry), "split": "train", "streaming": True}
            if kind == "parquet":  # by default as large as a group of rows, which fails at 0 rows
                more["batch_size"] = PARQUET_BATCH
            table = datasets.load_dataset(kind, **more)
        yield from table
