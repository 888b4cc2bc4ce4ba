"""Text files: found from paths, checked once, identified by their bytes."""

import codecs
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import UTF8
from pretrain.errors import UserError, check, refusing
from pretrain.files import exclusive, key_of, read_json, read_text, write_json

SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")  # in a folder of save_to_disk
MAX_CHARACTERS = 64 << 20  # of a line, a cell or a document: readers hold a whole one in memory
SEVEN_BIT = ("iso2022", "hz", "utf-7")  # encodings that write any text in ASCII
CHUNK_BYTES = 1 << 20
CP1252 = "cp1252"  # by far the most frequent one of those in Latin script
RARE = ["cp775", "hp_roman8", "mac_latin2", *(f"iso8859_{part}" for part in (3, 4, 10, 13, 14, 16))]
MAX_LIKELY, NEAR = 4, 0.1  # encodings that a message names, their distance from the likeliest
MAX_WORD = 20  # characters of a word in a message
MAX_DAMAGE = 0.1  # bad bytes per non-ASCII character in damaged UTF-8; above: another encoding


@dataclass(frozen=True)
class Source:
    """A text file at the time of its check; `sha256` is the hash of its bytes."""

    path: str
    size: int
    mtime_ns: int
    sha256: str
    encoding: str = UTF8


def expand(paths: Iterable[str]) -> list[str]:
    """The files that `paths` (files, folders, globs) name: absolute, each once. Those of a path are
    sorted, so that their order stays the same if a folder is moved.

    hub:NAME is kept as is, and a folder of save_to_disk is one entry."""
    files: dict[str, None] = {}  # in order
    problems = []
    for path in paths:
        if path.startswith("hub:"):
            files[path] = None
            continue
        given = Path(os.path.expanduser(path))
        is_there = os.path.exists(given)
        matches = [given] if is_there else map(Path, glob.glob(str(given), recursive=True))
        found = [os.path.abspath(file) for match in matches for file in files_of(match)]
        if not found:
            problems.append(f"{path}: no files; expected a file, a folder with files, or a glob")
        for file in found:
            if (name := file.encode("utf-8", "backslashreplace").decode()) != file:
                problems.append(f"{name}: the name is not UTF-8; expected another name")
        files |= dict.fromkeys(sorted(found))
    check(problems)
    return list(files)


def by_name(entries: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{name: paths} of NAME=PATH entries, or {"": entries} of plain paths, which may contain "=" if
    they exist. UserError for a mixture of both."""
    paths: dict[str, list[str]] = {}
    for entry in entries:
        name, found, path = entry.partition("=")
        has_name = name and found and "/" not in name and not os.path.exists(entry)
        given = os.path.expanduser(path) if has_name else entry
        paths.setdefault(name if has_name else "", []).append(given)
    if "" in paths and len(paths) > 1:
        raise UserError(f"{paths[''][0]}: has no name; expected NAME=PATH for all, or for none")
    return {name: tuple(of_name) for name, of_name in paths.items()}


def files_of(path: Path) -> list[Path]:
    """A file itself, or all files in a folder that are not hidden, including those in linked
    folders. An entry without a readable target counts as a file: whoever reads it names it.

    UserError for a folder that cannot be read."""
    is_saved = any(os.path.isfile(path / name) for name in SAVED_DATASET)
    if is_saved or os.path.isfile(path) or not os.path.exists(path):
        return [path]
    files, visited = [], set()
    for folder, subfolders, names in os.walk(path, onerror=_fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # behind a link to a folder above it, for example
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        shown = [Path(folder, name) for name in names if not name.startswith(".")]
        files += [file for file in shown if os.path.isfile(file) or not os.path.exists(file)]
    return files


def _fail(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):  # no folder: no files
        problem = f"{error.filename}: cannot be read ({error.strerror})"
        raise UserError(f"{problem}; expected permission, or a glob without it") from error


def check_files(
    files: Iterable[Path], index: Path | None = None, encoding: str = UTF8
) -> list[Source]:
    """Read every file once; a UserError names all that are empty, blank or binary, have a line that
    is too long, or are neither UTF-8 nor in `encoding`.

    `index` is a JSON file of earlier results for UTF-8: a file with the same path, size and mtime
    is not read again."""
    before, known, sources, problems = {}, {}, [], []
    if index:
        with suppress(UserError, TypeError):  # it may be missing or damaged: it only saves time
            before = read_json(index)
            known = {path: Source(**entry) for path, entry in before.items()}
    for file in files:
        try:
            sources.append(_check_file(file, known.get(str(file)), codecs.lookup(encoding).name))
            known[str(file)] = sources[-1]
        except UserError as error:
            problems.append(str(error))
    check(problems)
    content = {path: vars(source) for path, source in known.items()}
    if index and content != before:
        with suppress(UserError), exclusive(index):  # the cache may be read-only
            write_json(index, content)
    return sources


def _check_file(file: Path, earlier: Source | None, encoding: str) -> Source:
    with refusing(f"{file}: cannot be read", "expected a text file"):
        status = file.stat()
        if earlier and (earlier.size, earlier.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return earlier
        sha256, found = _scan(file, encoding)
    if earlier and earlier.sha256 != sha256:
        print(f"{file}: has changed since it was last read")
    return Source(str(file), status.st_size, status.st_mtime_ns, sha256, found)


def _scan(file: Path, encoding: str) -> tuple[str, str]:
    """(SHA-256, encoding) of a text file: UTF-8 wherever that decodes it, else `encoding`.

    Text in another encoding is almost never valid UTF-8, but most encodings decode UTF-8 to
    garbage."""
    if encoding != UTF8:
        with suppress(UserError):
            sha256, is_ascii = _decode(file, UTF8)
            if not (is_ascii and encoding.startswith(SEVEN_BIT)):
                return sha256, UTF8
    return _decode(file, encoding)[0], encoding


def _decode(file: Path, encoding: str) -> tuple[str, bool]:
    """(SHA-256, whether it is ASCII) of a text file; UserError for anything else."""
    digest, is_blank, is_ascii, is_array = hashlib.sha256(), True, True, False
    num_lines = line_characters = 0
    for chunk, text in _chunks(file, encoding):
        digest.update(chunk)
        if is_blank:
            beginning = text.replace("\ufeff", "").lstrip()
            is_blank, is_array = not beginning, beginning.startswith("[")
        is_ascii = is_ascii and text.isascii()
        line_end = text.find("\n")
        line_characters += line_end if line_end >= 0 else len(text)
        if line_characters > MAX_CHARACTERS and not is_array:  # JSON arrays are read by item
            raise too_long(f"{file}, line {num_lines + 1}")
        if line_end >= 0:
            num_lines += text.count("\n")
            line_characters = len(text) - text.rfind("\n") - 1
    if is_blank:
        raise UserError(f"{file}: empty or only white space; expected text")
    return digest.hexdigest(), is_ascii


def _chunks(file: Path, encoding: str) -> Iterator[tuple[bytes, str]]:
    """(bytes, text) of each chunk of a file; UserError if it is not text in `encoding`."""
    decoder, offset, chunk = codecs.getincrementaldecoder(encoding)(), 0, None
    with file.open("rb") as handle:
        while chunk != b"":
            chunk = handle.read(CHUNK_BYTES)
            start = offset - len(decoder.getstate()[0])  # a character may span two chunks
            bad = -1
            try:
                text = decoder.decode(chunk, final=not chunk)
                if "\0" in text:
                    bad = len(text.partition("\0")[0].encode(encoding))
            except UnicodeError as error:
                bad = getattr(error, "start", 0)  # UTF-16 without its mark has none
            if bad >= 0:
                problem = f"binary or not {encoding.upper()}, at byte offset {start + bad}"
                raise UserError(f"{file}: {problem}; {_expected(chunk, encoding)}")
            yield chunk, text
            offset += len(chunk)


def too_long(where: str) -> UserError:
    """The error for a line, a cell or a document above MAX_CHARACTERS."""
    expected = f"expected at most {MAX_CHARACTERS:,} characters: cut it into several"
    return UserError(f"{where}: too long; {expected}")


def _expected(chunk: bytes, encoding: str) -> str:
    """What to do about a file that is not in `encoding`, from some of its bytes."""
    readable = chunk.decode(UTF8, errors="replace")
    num_bad = readable.count("\ufffd")
    if 0 < num_bad < MAX_DAMAGE * sum(not character.isascii() for character in readable):
        return "expected intact UTF-8; to drop bad bytes: iconv -c -f UTF-8 -t UTF-8"
    likely = likely_encodings(chunk)
    likely.pop(encoding, None)
    if not likely:
        return 'expected UTF-8, or the option "encoding" with the encoding of the file'
    if encoding != UTF8:  # the option is for all files
        shown = ", ".join(likely)
        return f'expected UTF-8, or the option "encoding" with one for all other files: {shown}?'
    shown = " or ".join(f"{name} (it reads {word!r})" for name, word in likely.items())
    return f'expected UTF-8, or the option "encoding" {shown}; this is a guess'


def likely_encodings(sample: bytes) -> dict[str, str]:
    """Encoding -> a word as read in it, for the encodings that some bytes of a text may have,
    likely ones first: in Latin script, many read the same bytes as letters. {}: none is likely."""
    try:
        from charset_normalizer import from_bytes
    except ImportError:  # an old installation: the message is then less specific
        return {}
    end = len(sample)  # of the last whole character
    if b"\0" in sample:
        end -= end % 2
    elif b"\n" in sample:
        end = sample.rindex(b"\n")
    matches = list(from_bytes(sample[:end], cp_exclusion=RARE))
    found = []  # texts that two encodings read alike are one match
    for match in matches:
        distance = max(match.chaos - matches[0].chaos, matches[0].coherence - match.coherence, 0.0)
        if distance < NEAR:
            is_common = CP1252 in match.could_be_from_charset
            name = CP1252 if is_common else match.encoding
            found.append((distance, not is_common, name, str(match).split()))
    found = sorted(found)[:MAX_LIKELY]
    rows = list(zip(*(words for *_, words in found)))  # each word, as read in each encoding
    telling = [row for row in rows if len(set(row)) == len(row) > 1]
    telling = telling or [row for row in rows if not row[0].isascii()] or rows
    words = telling[0] if telling else ()
    return {name.replace("_", "-"): word[:MAX_WORD] for (_, _, name, _), word in zip(found, words)}


def read_lines(path: str) -> list[str]:
    """The lines of a small UTF-8 file, stripped."""
    convert = 'iconv -f ENCODING -t UTF-8 converts it; the option "encoding" is for other text'
    text = read_text(path, "UTF-8 text", f" ({convert})")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def states_of(entry: str) -> list[tuple]:
    """(path, size, mtime) of each file of an input; [] for the hub."""
    path = Path(entry)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def content_key(sources: list[Source], *more: object) -> str:
    """16 hexadecimal digits that identify the content of `sources`, in order, and `more`."""
    return key_of([[source.sha256 for source in sources], *more])
