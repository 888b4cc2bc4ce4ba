"""Every format except plain UTF-8 text -> JSON lines in the cache; nothing else is read later.

    {"text": "one sentence per line", "entities": [[start, end], ...]}   offsets in characters

Reads tables, saved data sets and the hub (pretrain/data/tables.py), tagged tokens, and compressed
files. Columns, spans and tags are checked here; messages name the file and line.
"""

import codecs
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from pretrain.config import PLAIN_FORMATS, UTF8, TextOptions
from pretrain.data.conll import read_entities
from pretrain.data.sentences import (
    Span,
    as_record,
    cut_into_pieces,
    detect_format,
    documents,
    sentences,
)
from pretrain.data.sources import CHUNK_BYTES, Source, check_files, expand, files_of, states_of
from pretrain.data.spans import check_spans, read_spans
from pretrain.data.tables import TEXT_FORMATS, choose_field, format_of, no_column, read_rows
from pretrain.errors import UserError, counted, refusing, require
from pretrain.files import exclusive, key_of, read_json, remove, sha256_of, write_aside, write_json

COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"}
CODECS = {".zst": "zstandard", ".lz4": "lz4"}  # packages for what Python cannot read
VERSION = 1  # of the converted files
ENTITIES = "entities"  # the column of entities, if there is one
SEAL = ".seal.json"  # in a folder of the cache: bytes, mtime in ns and SHA-256 of each file

Opened = tuple[list[Source], str]  # text files, their format


class _Columns(NamedTuple):
    text: str | None  # None: `choose_field` finds it
    entities: str | None  # None: not read
    needs_entities: bool  # every record must have that column


def open_files(
    paths: tuple[str, ...],
    options: TextOptions,
    with_entities: bool,
    may_lack_entities: bool = False,
) -> Opened:
    """(text files that `paths` name, their format); "jsonl" is the format of converted text.
    Records must have the column of entities that the user named, unless they `may_lack_entities`.

    Plain text is read in place unless it is compressed, mixed with tables, or limited by
    max_documents. UserError if a file cannot be read; nothing is left half-written."""
    given_as: dict[str, str] = {}  # file -> entry that the user named
    for entry in expand(paths):
        is_packed = Path(entry).suffix.lower() in COMPRESSED
        files = _unpack(entry, Path(options.cache)) if is_packed else [entry]
        given_as |= dict.fromkeys(files, entry)
    try:
        copies = _as_utf8(list(given_as), options)
        given_as = {copies.get(file, file): entry for file, entry in given_as.items()}
        return _open_unpacked(list(given_as), options, with_entities, may_lack_entities)
    except UserError as error:  # unpacked files go by the name that the user gave
        message = str(error)
        for file, entry in given_as.items():
            if file != entry:
                message = message.replace(file, f"{entry} ({Path(file).name})")
        raise type(error)(message) from error


def _open_unpacked(
    entries: list[str], options: TextOptions, with_entities: bool, may_lack_entities: bool
) -> Opened:
    cache, index = Path(options.cache), Path(options.cache) / "sources.json"
    kinds = {entry: format_of(entry, options.format) for entry in entries}
    texts = [entry for entry, kind in kinds.items() if kind in TEXT_FORMATS]
    sources = check_files(map(Path, texts), index)
    plain = [Path(entry) for entry, kind in kinds.items() if kind == "plain"]
    text_format = options.format if options.format in PLAIN_FORMATS else ""
    if plain and not text_format:
        text_format, why = detect_format(plain)
        print(f"{_shown(plain)}: read as {text_format} ({why})")
    if plain and options.text_field:
        print(f"{_shown(plain)}: plain text has no columns; the text field has no effect")
    cut_into_pieces(plain, text_format)  # UserError for a document that is too long
    if len(plain) == len(entries) and not options.max_documents:
        return sources, text_format
    inputs = [(entry, text_format if kind == "plain" else kind) for entry, kind in kinds.items()]
    entities = (options.entity_field or ENTITIES) if with_entities else None
    is_named = with_entities and options.entity_field is not None
    columns = _Columns(options.text_field, entities, is_named and not may_lack_entities)
    states = [(entry, kind, states_of(entry)) for entry, kind in inputs]
    key = key_of([VERSION, states, *columns, options.max_documents])
    folder = cache / f"converted-{key}"

    def convert(partial: Path) -> None:
        print(f"{_shown(entries)}: converting into {folder} (remove it to convert again)")
        _convert(inputs, columns, options.max_documents, partial / "text.jsonl")

    _keep(folder, convert)
    return check_files([folder / "text.jsonl"], index), "jsonl"


def _shown(entries: list) -> str:
    return ", ".join(map(str, entries[:3])) + (", ..." if len(entries) > 3 else "")


def _unpack(entry: str, cache: Path) -> list[str]:
    """The files of a compressed file, unpacked into the cache."""
    path, suffix = Path(entry), Path(entry).suffix.lower()
    if Path(path.stem).suffix == ".tar":
        raise UserError(f"{entry}: is a tar archive; expected its files (tar -xf), or a .zip")
    if suffix in CODECS:
        require(CODECS[suffix], entry)
    import fsspec  # comes with torch, and finds the codec

    def unpack(folder: Path) -> None:
        room = shutil.disk_usage(folder).free // 2
        problem = f"{entry}: unpacks to more than {room:,} bytes, half of the free space of {cache}"
        too_large = UserError(f"{problem}; expected a smaller file, or more space")
        if suffix == ".zip":
            archive = zipfile.ZipFile(path)
            if sum(member.file_size for member in archive.infolist()) > room:
                raise too_large
            archive.extractall(folder)
            return
        # fsspec.open would expand patterns and split at "::", as in the names of some files.
        packed = fsspec.filesystem("file").open(path.absolute(), compression="infer")
        with packed as source, (folder / path.stem).open("wb") as target:
            while part := source.read(CHUNK_BYTES):
                target.write(part)
                if target.tell() > room:
                    raise too_large

    folder = cache / "unpacked" / key_of(states_of(entry))
    with refusing(f"{entry}: cannot be unpacked", f"expected a whole {suffix} file"):
        _keep(folder, unpack)
    files = sorted(map(str, files_of(folder)))
    if not files:
        raise UserError(f"{entry}: contains no files; expected text")
    return files


def _as_utf8(files: list[str], options: TextOptions) -> dict[str, str]:
    """File -> its copy in UTF-8 in the cache, for each file in another encoding."""
    if codecs.lookup(options.encoding).name == UTF8:  # it has other spellings
        return {}
    texts = [file for file in files if format_of(file, options.format) in TEXT_FORMATS]
    sources = check_files(map(Path, texts), encoding=options.encoding)
    others = [source for source in sources if source.encoding != UTF8]
    if not others:
        print(f"{_shown(files)}: read as UTF-8, not as {options.encoding}")
    return {source.path: _copy_as_utf8(source, Path(options.cache)) for source in others}


def _copy_as_utf8(source: Source, cache: Path) -> str:
    path = Path(source.path)

    def write(folder: Path) -> None:
        copy = folder / path.name
        with (
            path.open(encoding=source.encoding, newline="") as text,
            copy.open("w", encoding=UTF8, newline="") as out,
        ):
            shutil.copyfileobj(text, out, CHUNK_BYTES)

    folder = cache / "utf-8" / key_of([states_of(source.path), source.encoding])
    _keep(folder, write)
    return str(folder / path.name)


def _keep(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder in the cache, unless it is there and intact."""

    def write_sealed(partial: Path) -> None:
        partial.mkdir()
        write(partial)
        facts = {}
        for path in files_of(partial):
            status = path.stat()
            name = str(path.relative_to(partial))
            facts[name] = [status.st_size, status.st_mtime_ns, sha256_of(path)]
        write_json(partial / SEAL, facts)

    if _is_intact(folder):
        return
    with exclusive(folder):
        if not _is_intact(folder):  # else another process was faster
            if folder.exists():
                print(f"{folder}: is damaged; making it again")
                remove(folder)
            write_aside(folder, write_sealed)


def _is_intact(folder: Path) -> bool:
    """Whether a folder of `_keep` is there and unchanged. A file is only read if its time is not
    the one that was noted, as in a copy of the cache."""
    found = {str(path.relative_to(folder)): path for path in files_of(folder)}
    try:
        facts = read_json(folder / SEAL)
        if found.keys() != facts.keys():
            return False
        for name, (size, mtime_ns, digest) in facts.items():
            status = found[name].stat()
            is_same = status.st_mtime_ns == mtime_ns or sha256_of(found[name]) == digest
            if status.st_size != size or not is_same:
                return False
    except (ValueError, TypeError):  # the seal itself is damaged
        return False
    return True


def _convert(inputs: list[tuple[str, str]], columns: _Columns, limit: int, target: Path) -> None:
    """Write the documents of `inputs` to `target`, one JSON record per line."""
    num_documents = num_blank = num_entities = 0
    records = chain.from_iterable(_records(entry, kind, columns) for entry, kind in inputs)
    with target.open("w", encoding="utf-8") as out:
        for record in records:
            if not record["text"].strip():
                num_blank += 1
                continue
            if num_documents == limit > 0:
                break
            num_documents += 1
            num_entities += len(record.get("entities", ()))
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    shown = _shown([entry for entry, _ in inputs])
    if not num_documents:
        raise UserError(f"{shown}: has no text; expected at least one document")
    if columns.needs_entities and not num_entities:
        raise UserError(f"{shown}: no entities in {columns.entities!r}; expected some spans")
    marked = f" with {counted(num_entities, 'entity')}" if num_entities else ""
    skipped = f"; skipped {num_blank:,} without text" if num_blank else ""
    print(f"{shown}: {counted(num_documents, 'document')}{marked}{skipped}")


def _records(entry: str, kind: str, columns: _Columns) -> Iterator[dict]:
    """The documents of an input, in the form of `as_record`."""
    if kind == "conll":
        return map(as_record, read_entities(Path(entry)))
    if kind in PLAIN_FORMATS:
        span = Span(entry, 0, Path(entry).stat().st_size)
        return map(as_record, documents(sentences([span], kind)))
    return _rows(entry, kind, columns)


def _rows(entry: str, kind: str, columns: _Columns) -> Iterator[dict]:
    """Text and spans of each row of a table, a saved data set, or a data set on the hub."""
    field, entities = columns.text, columns.entities
    is_trusted = columns.needs_entities or entities != ENTITIES  # the user named the column
    for where, row in read_rows(entry, kind):
        field = field or choose_field(row, where)
        if field not in row:
            raise no_column(row, where, field, "text")
        if columns.needs_entities and columns.entities not in row:
            raise no_column(row, where, columns.entities, "entity")
        text = row[field]
        if isinstance(text, list) and all(isinstance(line, str) for line in text):
            text = "\n".join(text)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: {field} is {str(text)[:40]!r}; expected text")
        # JSON may hold half a surrogate pair.
        text = (text or "").encode("utf-8", "replace").decode()
        spans = []
        if entities:
            try:
                found = read_spans(row.get(entities), where)
                spans = sorted({(start, end) for start, end, _ in found})
                check_spans(spans, text, where)
            except UserError as error:
                if is_trusted:
                    raise
                print(f"{error}; so the column {entities} is not read")
                entities, spans = None, []
            is_trusted = is_trusted or bool(spans)  # it has had spans, so it is no other column
        yield {"text": text, "entities": spans} if spans else {"text": text}
