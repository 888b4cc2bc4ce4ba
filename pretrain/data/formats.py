"""Every format but plain UTF-8 text -> JSON lines in the cache, a document a line; the rest of the data wing reads only that.

    {"text": "its lines are its sentences", "entities": [[start, end], ...]}     offsets in characters of `text`

JSONL, CSV and TSV, tagged tokens (CoNLL), and by `datasets` Parquet, Arrow, folders of save_to_disk and hub data sets, each of
them and plain text compressed, too. All checks of fields, spans and tags are made here, and name file and line.
"""
from __future__ import annotations

import glob
import json
import shutil
import zipfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from pretrain.command import UserError, first_line, require
from pretrain.config import PLAIN_FORMATS, TextOptions
from pretrain.data import reading
from pretrain.data.tables import UTF8_FORMATS, choose_field, format_of, read_rows
from pretrain.data.tagged import read_tagged
from pretrain.files import key_of, write_aside

COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"}
CODECS = {".zst": "zstandard", ".lz4": "lz4"}  # packages of those that Python does not have
SPAN_KEYS = (("start", "end"), ("start_offset", "end_offset"), ("start_pos", "end_pos"), ("begin", "end"))
VERSION = 1  # of what this module writes


def open_files(paths: list[str], name: str, options: TextOptions, read_entities: bool) -> tuple[list[Path], str]:
    """(plain files, their format) that `paths` mean, "jsonl" being that of converted text; `name` is the option for messages.

    Plain text stays where it is, unless some of it is compressed, a table, or cut by --max-documents. UserError for what cannot
    be read; nothing is left half-written."""
    cache, origin = Path(options.cache), {}
    for entry in reading.expand(paths, name):
        origin |= {member: entry for member in (_unpack(entry, cache) if Path(entry).suffix.lower() in COMPRESSED else [entry])}
    try:
        return _open_files(list(origin), name, options, read_entities)
    except UserError as error:  # tells of files as the user has them
        message = str(error)
        for member, entry in origin.items():
            message = message.replace(member, entry if member == entry else f"{entry} ({Path(member).name})")
        raise UserError(message) from error


def _open_files(entries: list[str], name: str, options: TextOptions, read_entities: bool) -> tuple[list[Path], str]:
    """`open_files` for what is unpacked."""
    inputs, cache = [(entry, format_of(entry, options.format)) for entry in entries], Path(options.cache)
    plain = [Path(entry) for entry, kind in inputs if kind == "plain"]
    text_format = options.format if options.format in PLAIN_FORMATS else ""
    reading.check_files([Path(entry) for entry, kind in inputs if kind in UTF8_FORMATS], name, cache / "sources.json")
    if plain and not text_format:
        text_format, why = reading.detect_format(plain)
        print(f"{name}: read as --format {text_format} ({why})")
    if len(plain) == len(inputs) and not options.max_documents:
        return plain, text_format
    inputs = [(entry, text_format if kind == "plain" else kind) for entry, kind in inputs]
    entity_field = (options.entity_field or "entities") if read_entities else None
    required = read_entities and options.entity_field is not None
    key = key_of([VERSION, [(entry, kind, _states(entry)) for entry, kind in inputs], options.text_field, entity_field, required,
                  options.max_documents])
    target = cache / f"converted-{key}.jsonl"
    if not target.is_file():
        kinds = ", ".join(sorted({kind for _, kind in inputs}))
        print(f"{name}: converting {kinds} into {target}{' (remove it to ask the hub again)' if 'hub' in kinds else ''}")
        write_aside(target, lambda partial: _convert(inputs, options, entity_field, required, name, partial))
    return [target], "jsonl"


def _states(entry: str) -> list[tuple]:
    """What changes when an input does; nothing for the hub."""
    path = Path(entry)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _unpack(entry: str, cache: Path) -> list[str]:
    """The files in a compressed file, unpacked into the cache."""
    path, suffix = Path(entry), Path(entry).suffix.lower()
    folder = cache / "unpacked" / key_of(_states(entry))
    if suffix in CODECS:
        require(CODECS[suffix], entry)
    import fsspec  # comes with torch; knows a codec whose package is there

    def unpack(partial: Path) -> None:
        partial.mkdir()
        if suffix == ".zip":
            zipfile.ZipFile(path).extractall(partial)
            return
        with fsspec.open(glob.escape(entry), "rb", compression="infer") as packed, (partial / path.stem).open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)

    if Path(path.stem).suffix == ".tar":
        raise UserError(f"{entry}: is an archive; needed are its files (tar -xf), or a .zip")
    if not folder.is_dir():
        try:
            write_aside(folder, unpack)
        except Exception as error:  # each codec has its own
            if not folder.is_dir():  # another process may have been faster
                raise UserError(f"{entry}: cannot be unpacked ({first_line(error)}); needed is a whole {suffix} file") from error
    files = sorted(map(str, reading.files_of(folder)))
    if not files:
        raise UserError(f"{entry}: holds no file; needed is one with text")
    return files


def _convert(inputs: list[tuple[str, str]], options: TextOptions, entity_field: str | None, required: bool, name: str,
             target: Path) -> None:
    """Write the documents of `inputs` to `target`."""
    num_documents = num_empty = num_entities = 0

    def documents() -> Iterator[tuple[str, list]]:
        for entry, kind in inputs:
            if kind in PLAIN_FORMATS:
                yield from _plain(Path(entry), kind)
            elif kind == "conll":
                yield from read_tagged(Path(entry))
            else:
                yield from _records(entry, kind, options.text_field, entity_field, required)

    with target.open("w", encoding="utf-8") as out:
        for text, spans in documents():
            if not text.strip():
                num_empty += 1
                continue
            if num_documents == options.max_documents > 0:
                break
            num_documents, num_entities = num_documents + 1, num_entities + len(spans)
            out.write(json.dumps({"text": text, "entities": spans} if spans else {"text": text}, ensure_ascii=False) + "\n")
    shown = ", ".join(entry for entry, _ in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
    if not num_documents:
        raise UserError(f"{name} {shown}: holds no text; needed is a document at least")
    if required and not num_entities:
        raise UserError(f"--entity-field {entity_field}: {shown} holds no span in it; needed is a column with some")
    print(f"{name}: {num_documents:,} documents" + (f" with {num_entities:,} entities" if num_entities else "")
          + (f"; {num_empty:,} without text are left out" if num_empty else ""))


def _plain(path: Path, text_format: str) -> Iterator[tuple[str, list]]:
    stream = reading.sentences([reading.Span(str(path), 0, path.stat().st_size)], text_format)
    for is_end, items in groupby(stream, key=lambda item: item is None):
        if not is_end:
            yield "\n".join(text for text, _ in items), []


def _records(entry: str, kind: str, text_field: str | None, entity_field: str | None, required: bool) -> Iterator[tuple[str, list]]:
    """(text, spans) of each record of a file, a saved data set or one of the hub."""
    for where, record in read_rows(entry, kind):
        if text_field is None:
            text_field = choose_field(record, where)
        missing = [field for field in (text_field, entity_field if required else None) if field is not None and field not in record]
        if missing:
            raise UserError(f"{where}: has no column {missing[0]!r}, it has {', '.join(map(str, record))}; needed is one of these as "
                            f"--{'text' if missing[0] == text_field else 'entity'}-field")
        text = record[text_field]
        if isinstance(text, list) and all(isinstance(line, str) for line in text):
            text = "\n".join(text)
        elif text is not None and not isinstance(text, str):
            raise UserError(f"{where}: the column {text_field} holds {str(text)[:40]!r}, needed is text")
        text = (text or "").encode("utf-8", "replace").decode("utf-8")  # JSON may hold half of a surrogate pair
        yield text, _spans(record.get(entity_field), text, where) if entity_field else []


def _spans(value: object, text: str, where: str) -> list[tuple[int, int]]:
    """The entities of a record, sorted: lists of [start, end, ...], or mappings; offsets in characters of `text`."""
    if isinstance(value, str):  # a cell of a table
        try:
            value = json.loads(value or "[]")
        except ValueError:
            raise UserError(f"{where}: the spans {value[:40]!r} are no JSON; needed is [[start, end], ...]") from None
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):  # a list by its columns
        value = [dict(zip(value, row)) for row in zip(*value.values())]
    if value is None:
        return []
    spans = sorted({_span(span, where) for span in value} if isinstance(value, list) else {_span(value, where)})
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            raise UserError(f"{where}: the span [{start}, {end}] is out of range; needed is 0 <= start < end <= {len(text)}, the "
                            "characters of the text")
    for (start, end), (next_start, next_end) in zip(spans, spans[1:]):
        if next_start < end:
            raise UserError(f"{where}: the spans [{start}, {end}] and [{next_start}, {next_end}] overlap; needed are spans that do not")
    return spans


def _span(span: object, where: str) -> tuple[int, int]:
    ends = next(([span[key] for key in keys] for keys in SPAN_KEYS if set(keys) <= set(span)), []) if isinstance(span, dict) else span
    if not isinstance(ends, (list, tuple)) or len(ends) < 2 or not all(type(end) is int for end in ends[:2]):
        raise UserError(f"{where}: {str(span)[:60]!r} is no span; needed is [start, end, ...] or {{\"start\": 0, \"end\": 4}}, in "
                        "characters")
    return ends[0], ends[1]
