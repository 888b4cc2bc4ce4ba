"""Rows of JSONL, CSV and TSV files, and of everything that the package `datasets` reads."""

import csv
import glob
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from pretrain.config import RECORD_FORMATS
from pretrain.data.sources import check_files, expand
from pretrain.errors import UserError, check, refusing, require
from pretrain.files import check_regular

ALIASES = {"ndjson": "jsonl", "json": "jsonl", "bio": "conll", "bmes": "conll", "bioes": "conll"}
TABLES = ("csv", "tsv", "jsonl", "parquet", "arrow")
UTF8_FORMATS = {"plain", "jsonl", "csv", "tsv", "conll"}
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


def open_tables(paths: Iterable[str]) -> Iterator[tuple[str, dict]]:
    """(file and line, record) of each row of the tables that `paths` name, in order.

    UserError before the first row if a file has another format, or is not UTF-8."""
    entries = [entry for path in paths for entry in expand([path])]
    others = [entry for entry in entries if format_of(entry) not in TABLES]
    check([f"{entry}: not a table; expected {', '.join(TABLES)}" for entry in others])
    check_files(Path(entry) for entry in entries if format_of(entry) in UTF8_FORMATS)
    return chain.from_iterable(read_rows(entry, format_of(entry)) for entry in entries)


def read_rows(entry: str, kind: str) -> Iterator[tuple[str, dict]]:
    """(file and line, record) of each row of `entry`, an input of format `kind`."""
    unit = "line" if kind in UTF8_FORMATS else "row"
    if kind == "jsonl":
        rows = _json_rows(entry)
    elif kind in ("csv", "tsv"):
        rows = _delimited_rows(entry, kind)
    else:
        rows = enumerate(_dataset_rows(entry, kind), start=1)
    for number, record in rows:
        yield f"{entry}, {unit} {number}", record


def choose_field(record: dict, where: str) -> str:
    """The column of the text: "text", or the only column of words."""
    if "text" in record:
        return "text"
    texts = [field for field, value in record.items() if isinstance(value, str)]
    texts = [field for field in texts if not re.fullmatch(r"[\d.,+-]*", record[field])]
    if len(texts) != 1:
        raise no_column(record, where, "text", "text")
    return texts[0]


def no_column(record: dict, where: str, name: str, field: str) -> UserError:
    """The error for a record without the column `name`; `field` is text, label or the like."""
    columns = ", ".join(map(str, record))
    return UserError(f"{where}: no column {name!r}; expected the {field} field among {columns}")


def _json_rows(path: str) -> Iterator[tuple[int, dict]]:
    """The objects of a file, numbered: one per line, or the items of one array."""
    expected = "expected one object per line, or one array"
    with open(path, encoding="utf-8-sig", newline="\n") as handle:
        is_array = handle.read(1 << 10).lstrip().startswith("[")
        handle.seek(0)
        for number, line in enumerate([handle.read()] if is_array else handle, start=1):
            with refusing(f"{path}, line {number}: not JSON", expected):
                content = json.loads(line) if line.strip() else []
            items = content if isinstance(content, list) else [content]
            for item, record in enumerate(items, start=1):
                if not isinstance(record, dict):
                    raise UserError(f"{path}, line {number}: {str(record)[:40]!r}; {expected}")
                yield item if is_array else number, record


def _delimited_rows(path: str, kind: str) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV or TSV file, by its header."""
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, strict=True, **_dialect(path, kind))
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
            raise UserError(f"{problem}; expected quotes that close, doubled inside") from error


def _dialect(path: str, kind: str) -> dict:
    """Arguments for csv.reader. Spreadsheets in much of Europe write semicolons. Many TSV files are
    not quoted: a quote that spans a tab or never closes is then an ordinary character."""
    with open(path, encoding="utf-8-sig", newline="") as handle:
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
    with refusing(f"{entry}: cannot be read as {kind}", "expected complete files, or a known name"):
        if kind == "saved":
            check_regular(Path(entry))
            table = datasets.load_from_disk(entry)
            table = table["train"] if isinstance(table, dict) else table
        elif kind == "hub":
            name, config, split, *more = entry.removeprefix("hub:").split(":") + ["", "", ""]
            if not name or any(more):
                raise UserError(f"{entry}: not the name of a data set; expected {HUB_FORMS}")
            split = split or "train"
            table = datasets.load_dataset(name, config or None, split=split, streaming=True)
        else:
            file = glob.escape(entry)
            table = datasets.load_dataset(kind, data_files=file, split="train", streaming=True)
        yield from table
