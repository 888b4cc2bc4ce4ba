"""Rows of tables: JSONL, CSV and TSV, and by `datasets` Parquet, Arrow, folders of save_to_disk and hub data sets."""
from __future__ import annotations

import codecs
import csv
import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pretrain.command import UserError, check, first_line, require
from pretrain.config import RECORD_FORMATS
from pretrain.data import reading

FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
                    ".arrow": "arrow", ".conll": "conll", ".bio": "conll", ".bmes": "conll", ".bioes": "conll"}
UTF8_FORMATS = {"plain", "jsonl", "csv", "tsv", "conll"}
TABLES = ("csv", "tsv", "jsonl", "parquet", "arrow")


def format_of(entry: str, wanted: str) -> str:
    """The format of an input: of RECORD_FORMATS, "plain", "hub" or "saved"."""
    path = Path(entry)
    if entry.startswith("hub:"):
        return "hub"
    if path.is_dir():
        return "saved"
    told = FORMAT_OF_SUFFIX.get(path.suffix.lower(), "plain")
    return told if wanted == "auto" else wanted if wanted in RECORD_FORMATS else "plain"


def open_tables(paths: list[str], name: str) -> Iterator[tuple[str, dict]]:
    """(file and line, record) of each row of the CSV, TSV, JSONL, Parquet or Arrow files that `paths` mean, in order; UserError
    before the first row where one is of another format or no UTF-8."""
    inputs = [(entry, format_of(entry, "auto")) for path in paths for entry in reading.expand([path], name)]
    check([f"{name} {entry}: needed is a table of rows: {', '.join(TABLES)}" for entry, kind in inputs if kind not in TABLES])
    reading.check_files([Path(entry) for entry, kind in inputs if kind in UTF8_FORMATS], name)
    return (row for entry, kind in inputs for row in read_rows(entry, kind))


def read_rows(entry: str, kind: str) -> Iterator[tuple[str, dict]]:
    """(file and line, record) of each row of an input of a format."""
    rows = _json_lines(Path(entry)) if kind == "jsonl" else (_delimited if kind in ("csv", "tsv") else _table)(entry, kind)
    row_name = "line" if kind in ("jsonl", "csv", "tsv") else "row"
    yield from ((f"{entry}, {row_name} {number}", record) for number, record in rows)


def choose_field(record: dict, where: str) -> str:
    """The column that holds the text: "text", or the only one that holds words."""
    texts = [field for field, value in record.items() if isinstance(value, str) and not re.fullmatch(r"[\d.,+-]*", value)]
    if "text" in record or len(texts) == 1:
        return "text" if "text" in record else texts[0]
    raise UserError(f"{where}: has no column 'text', it has {', '.join(map(str, record))}; needed is --text-field with one of these")


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Objects of a file, one a line; or of one array, which is read as a whole and numbered by item."""
    with path.open("rb") as handle:
        is_array = handle.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        handle.seek(0)
        for number, line in enumerate([handle.read()] if is_array else handle, start=1):
            try:
                content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")) if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: is no JSON ({error}); needed is an object a line, or one array") from error
            for item, record in enumerate(content if isinstance(content, list) else [content], start=1):
                if not isinstance(record, dict):
                    raise UserError(f"{path}, line {number}: holds {str(record)[:40]!r}, needed is an object a line, or one array")
                yield item if is_array else number, record


def _delimiter(path: str) -> str:
    """";" where the header of a CSV has no comma, as spreadsheets write it in half of Europe."""
    with open(path, encoding="utf-8-sig") as handle:
        header = handle.readline()
    return ";" if ";" in header and "," not in header else ","


def _delimited(path: str, kind: str) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV or TSV file by its header. A TSV in which quotes are no quoting ones is read as it stands: where they do not
    match, or would join lines that are rows of their own."""
    csv.field_size_limit(1 << 30)
    settings = {"delimiter": _delimiter(path) if kind == "csv" else "\t", "strict": True}
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            if kind == "tsv":
                try:
                    joins = any(set("\t\n") & set(field) for row in csv.reader(handle, **settings) for field in row)
                    handle.seek(0)
                    tabs = {line.count("\t") for line in handle if line.strip()}
                    stray = joins and len(tabs) == 1 and tabs != {0}
                except csv.Error:
                    stray = True
                if stray:
                    settings["quoting"] = csv.QUOTE_NONE
                handle.seek(0)
            reader = csv.reader(handle, **settings)
            header = next(reader, [])
            twice = [field for place, field in enumerate(header) if field in header[:place]]
            if twice:
                raise UserError(f"{path}, line 1: has the column {twice[0]!r} twice; needed are names that differ")
            for row in reader:
                if len(row) not in (0, len(header)):
                    raise UserError(f"{path}, line {reader.line_num}: has {len(row)} fields, the header has {len(header)}; needed is "
                                    f"{'a comma' if kind == 'csv' else 'a tab'} between fields")
                if row:
                    yield reader.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise UserError(f"{path}: is no {kind.upper()} ({error}); needed are quotes that close, and are doubled inside") from error


def _table(entry: str, kind: str) -> Iterator[tuple[int, dict]]:
    """Rows of what `datasets` reads; streamed, so that nothing is copied."""
    datasets = require("datasets", entry)
    try:
        if kind == "saved":
            table = datasets.load_from_disk(entry)
            table = table["train"] if isinstance(table, dict) else table
        elif kind == "hub":
            dataset, config, split, *more = entry.removeprefix("hub:").split(":") + ["", "", ""]
            if not dataset or any(more):
                raise ValueError("needed is hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
            table = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        else:
            table = datasets.load_dataset(kind, data_files=[glob.escape(entry)], split="train", streaming=True)
        yield from enumerate(table, start=1)
    except Exception as error:  # of many kinds, from the hub's to Arrow's
        raise UserError(f"{entry}: cannot be read as {kind} ({first_line(error)})") from error
