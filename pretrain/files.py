"""Files that are whole or absent, their hashes, JSON of a known form, and the tables in them.

A form is what JSON from elsewhere must be before it is used: (test of a value, what is needed), {key: form}, where a missing key holds
None, or [form of each item].
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import starmap
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

from pretrain.command import UserError, first_line

TEXT = (lambda value: type(value) is str, "text")
FILE_NAMES = (lambda value: type(value) is dict and all(map(FILE_NAME[0], value.values())), "an object that names files of this folder")
FILE_NAME = (lambda value: type(value) is str and re.fullmatch(r"\w[\w.-]{0,99}", value, re.ASCII), "a plain file name")


def integer(low: int, high: int, or_none: bool = False) -> tuple[Callable[[object], bool], str]:
    """The form of a whole number within low..high."""
    return lambda value: or_none and value is None or type(value) is int and low <= value <= high, f"a whole number within {low}..{high}"


def real(low: float, high: float) -> tuple[Callable[[object], bool], str]:
    """The form of a number within low..high that may be left out."""
    return lambda value: value is None or type(value) in (int, float) and low <= value <= high, f"a number within {low:g}..{high:g}"


_held: dict[str, TextIO] = {}  # locks of this process, by folder; a run's until the process ends


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or a folder beside `path`, which gets its name once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8 in place of what is in `path`, at once."""
    write_aside(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    """`content` in place of what is in `path`, at once."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def read_json(path: Path, form: object = MappingProxyType({}), needed: str = "") -> dict:
    """The object in a JSON file; UserError where it cannot be read or is not of `form`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); needed is {needed}") from error
    if problem := misfit(content, form):
        raise UserError(f"{path}: {problem}")
    return content


def misfit(value: object, form: object, place: str = "") -> str | None:
    """Where `value` departs from `form`, and what is needed there; None where it does not."""
    kind = type(form) if type(form) in (list, tuple) else dict
    if kind is tuple:
        shown = value if isinstance(value, (str, int, float)) else "none" if value is None else f"of type {type(value).__name__}"
        return None if form[0](value) else f"{place} is {str(shown)[:60]}, needed is {form[1]}"
    if not isinstance(value, kind):
        return f"{place or 'the content'} is of type {type(value).__name__}, needed is {'an array' if kind is list else 'an object'}"
    parts = ([(item, form[0], f"{place}[{index}]") for index, item in enumerate(value)] if kind is list else
             [(value.get(key), inner, f"{place}.{key}".lstrip(".")) for key, inner in form.items()])
    return next(filter(None, starmap(misfit, parts)), None)


def hold(folder: Path, wait: bool = False) -> None:
    """Hold `folder` against other processes until this one ends, or `let_go`. One that comes later waits, or gets a UserError.

    A POSIX record lock on a file beside the folder: it ends with the process, however that ends, and forked workers have no part
    in it. Where the file system knows no locks, there is none."""
    folder = Path(os.path.realpath(folder))  # whatever link leads to it
    if str(folder) in _held:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.lock")
    # Inside where the folder alone is writable, a volume mounted into a container, say.
    handle = (beside if beside.exists() or os.access(folder.parent, os.W_OK) else folder / ".lock").open("a+")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            handle.seek(0)
            other = handle.read().strip()
            handle.close()
            raise UserError(f"{folder}: another process{other and f' ({other})'} is at work in it; needed is to wait, to stop it, or "
                            "another folder") from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(f"{folder}: the file system has no locks, so nothing keeps a second process out")
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}")
    handle.flush()
    _held[str(folder)] = handle


def let_go(folder: Path) -> None:
    """The counterpart of `hold`."""
    handle = _held.pop(os.path.realpath(folder), None)
    if handle:
        handle.close()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """`hold` while something is made in `folder`; a second process that makes the same waits. A full or read-only disk is told."""
    try:
        hold(folder, wait=True)
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); needed is room and the right to write") from error
    finally:
        let_go(folder)


def model_folder(name: str) -> str:
    """The model in the folder of a run: `final`, else `best`; any other name as it is."""
    return next((str(Path(name, part)) for part in ("final", "best") if Path(name, part).is_dir()), name)


def markdown_table(header: list[object], rows: Iterable[list[object]]) -> str:
    """A table in Markdown; a bar in a cell stays one."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def key_of(content: object) -> str:
    """16 hexadecimal digits that name `content`, which JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def sync(path: Path) -> None:
    """Have the file or the entries of the folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # so that what is read back comes from the disk
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
