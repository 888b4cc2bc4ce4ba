"""Text files, from the paths that a user gives: found, checked once, identified by their bytes."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.errors import UserError, check
from pretrain.files import key_of, write_json

SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")  # mark a folder of save_to_disk


@dataclass(frozen=True)
class Source:
    """A text file as it was when it was checked; `sha256` is that of its bytes."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def expand(paths: Iterable[str]) -> list[str]:
    """The files that `paths` (files, folders, globs) name: absolute, sorted, each once.

    hub:NAME stays as it is, and a folder of save_to_disk is one entry."""
    files, problems = set(), []
    for path in paths:
        if path.startswith("hub:"):
            files.add(path)
            continue
        given = Path(path).expanduser()
        matches = [given] if given.exists() else map(Path, glob.glob(str(given), recursive=True))
        found = [os.path.abspath(file) for match in matches for file in files_of(match)]
        if not found:
            reason = "a folder without files" if given.is_dir() else "no such file, folder or glob"
            problems.append(f"{path}: {reason}; expected text")
        files.update(found)
    check(problems)
    return sorted(files)


def files_of(path: Path) -> list[Path]:
    """A file itself, or the files in a folder that are not hidden."""
    if path.is_file() or any((path / name).is_file() for name in SAVED_DATASET):
        return [path]
    shown = [
        file
        for file in path.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    return [file for file in shown if file.is_file()]


def check_files(files: Iterable[Path], index: Path | None = None) -> list[Source]:
    """Read every file once; a UserError names all that are empty, blank, binary or not UTF-8.

    `index` is a JSON file of earlier results: a file is not read again if its path, size and mtime
    are unchanged."""
    known = _read_index(index) if index else {}
    sources, problems = [], []
    for file in files:
        try:
            sources.append(_check_file(file, known.get(str(file))))
            known[str(file)] = sources[-1]
        except UserError as error:
            problems.append(str(error))
    check(problems)
    if index:
        write_json(index, {path: asdict(source) for path, source in known.items()})
    return sources


def _read_index(index: Path) -> dict[str, Source]:
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
        return {path: Source(**entry) for path, entry in known.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # the index only saves time


def _check_file(file: Path, earlier: Source | None) -> Source:
    try:
        status = file.stat()
        if earlier and (earlier.size, earlier.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return earlier
        sha256 = _scan(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if earlier and earlier.sha256 != sha256:
        print(f"{file} has changed since it was last read")
    return Source(str(file), status.st_size, status.st_mtime_ns, sha256)


def _scan(file: Path) -> str:
    """SHA-256 of a file of UTF-8 text; UserError if it is anything else, or blank."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    offset, is_blank, chunk = 0, True, None
    with file.open("rb") as handle:
        while chunk != b"":
            chunk = handle.read(1 << 20)
            digest.update(chunk)
            if b"\0" in chunk:
                problem = f"a NUL byte at offset {offset + chunk.index(0)}: binary or UTF-16"
                raise UserError(f"{file}: {problem}; expected UTF-8 text")
            pending = len(decoder.getstate()[0])  # bytes of a character that the chunk cuts
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place = offset - pending + error.start
                problem = f"{file}: not UTF-8 at byte offset {place} ({error.reason})"
                raise UserError(f"{problem}; to convert: iconv -f LATIN1 -t UTF-8") from error
            is_blank = is_blank and not text.replace("\ufeff", "").strip()
            offset += len(chunk)
    if is_blank:
        raise UserError(f"{file}: {'only white space' if offset else 'empty'}; expected text")
    return digest.hexdigest()


def read_lines(path: str) -> list[str]:
    """The lines of a small UTF-8 file, stripped."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as UTF-8 text ({reason})") from error
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def content_key(sources: list[Source], *more: object) -> str:
    """16 hexadecimal digits that identify this content, in this order, and `more`."""
    return key_of([[source.sha256 for source in sources], *more])
