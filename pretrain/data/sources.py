"""Text files: found from paths, checked once, identified by their bytes."""

import codecs
import glob
import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError, check, refusing
from pretrain.files import exclusive, file_problem, key_of, read_json, read_text, write_json

SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")  # in a folder of save_to_disk


@dataclass(frozen=True)
class Source:
    """A text file at the time of its check; `sha256` is the hash of its bytes."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def expand(paths: Iterable[str]) -> list[str]:
    """The files that `paths` (files, folders, globs) name: absolute, sorted, each once.

    hub:NAME is kept as is, and a folder of save_to_disk is one entry."""
    files, problems = set(), []
    for path in paths:
        if path.startswith("hub:"):
            files.add(path)
            continue
        given = Path(path).expanduser()
        matches = [given] if given.exists() else map(Path, glob.glob(str(given), recursive=True))
        found = [os.path.abspath(file) for match in matches for file in files_of(match)]
        if not found:
            problem = "no files" if given.is_dir() or not given.exists() else file_problem(given)
            problems.append(f"{path}: {problem}; expected a file, a folder with files, or a glob")
        files.update(found)
    check(problems)
    return sorted(files)


def files_of(path: Path) -> list[Path]:
    """A file itself, or all files in a folder that are not hidden."""
    if path.is_file() or any((path / name).is_file() for name in SAVED_DATASET):
        return [path]
    shown = [file for file in path.rglob("*") if "/." not in f"/{file.relative_to(path)}"]
    return [file for file in shown if file.is_file()]


def check_files(files: Iterable[Path], index: Path | None = None) -> list[Source]:
    """Read every file once; a UserError names all that are empty, blank, binary or not UTF-8.

    `index` is a JSON file of earlier results: a file with the same path, size and mtime is not
    read again."""
    before, known, sources, problems = {}, {}, [], []
    if index:
        with suppress(UserError, TypeError):  # it may be missing or damaged: it only saves time
            before = read_json(index)
            known = {path: Source(**entry) for path, entry in before.items()}
    for file in files:
        try:
            sources.append(_check_file(file, known.get(str(file))))
            known[str(file)] = sources[-1]
        except UserError as error:
            problems.append(str(error))
    check(problems)
    content = {path: vars(source) for path, source in known.items()}
    if index and content != before:
        with suppress(UserError), exclusive(index):  # the cache may be read-only
            write_json(index, content)
    return sources


def _check_file(file: Path, earlier: Source | None) -> Source:
    with refusing(f"{file}: cannot be read", "expected a text file"):
        status = file.stat()
        if earlier and (earlier.size, earlier.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return earlier
        sha256 = _scan(file)
    if earlier and earlier.sha256 != sha256:
        print(f"{file}: has changed since it was last read")
    return Source(str(file), status.st_size, status.st_mtime_ns, sha256)


def _scan(file: Path) -> str:
    """SHA-256 of a UTF-8 text file; UserError if it is anything else, or blank."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    offset, is_blank, chunk = 0, True, None
    with file.open("rb") as handle:
        while chunk != b"":
            chunk = handle.read(1 << 20)
            digest.update(chunk)
            if b"\0" in chunk:
                problem = f"NUL byte at offset {offset + chunk.index(0)}: binary or UTF-16"
                raise UserError(f"{file}: {problem}; expected UTF-8 text")
            start = offset - len(decoder.getstate()[0])  # a character may span two chunks
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                problem = f"{file}: not UTF-8 at byte offset {start + error.start}"
                raise UserError(f"{problem}; to convert: iconv -f LATIN1 -t UTF-8") from error
            is_blank = is_blank and not text.replace("\ufeff", "").strip()
            offset += len(chunk)
    if is_blank:
        raise UserError(f"{file}: empty or only white space; expected text")
    return digest.hexdigest()


def read_lines(path: str) -> list[str]:
    """The lines of a small UTF-8 file, stripped."""
    text = read_text(path, "UTF-8 text")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def states_of(entry: str) -> list[tuple]:
    """(path, size, mtime) of each file of an input; [] for the hub."""
    path = Path(entry)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def content_key(sources: list[Source], *more: object) -> str:
    """16 hexadecimal digits that identify the content of `sources`, in order, and `more`."""
    return key_of([[source.sha256 for source in sources], *more])
