"""Files that are whole or absent, locks on folders, hashes, JSON and Markdown."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from pretrain.errors import UserError, first_line
from pretrain.schema import Form, misfit

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from a file system without locks
CODE_FIELDS = ("auto_map", "custom_pipelines")  # name code, which is not copied with a model
_held: dict[Path, TextIO] = {}  # by folder: the locks of this process


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or folder next to `path`, then rename it to `path`."""
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
    """Replace the content of `path` with `text` in UTF-8, atomically."""
    write_aside(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def as_json(content: object, **options: object) -> str:
    """`content` in strict JSON, which has no NaN and no infinity: these become null. `options` are
    those of json.dumps."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def write_json(path: Path, content: dict) -> None:
    """Replace the content of `path` with `content`, atomically."""
    write_text(path, as_json(content, indent=1, ensure_ascii=False))


def file_problem(path: str | Path) -> str | None:
    """Why `path` is not a regular file. A pipe or a device could be read without end."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISREG(mode):
        return None
    return "is a folder" if stat.S_ISDIR(mode) else "is a pipe or a device"


def read_text(path: str | Path, expected: str) -> str:
    """The text of a regular file in UTF-8; UserError if there is none."""
    problem = file_problem(path)
    try:
        text = "" if problem else Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte offset {error.start}"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        raise UserError(f"{path}: {problem}; expected {expected}")
    return text


def read_json(path: Path, form: Form | None = None, expected: str = "a JSON object") -> dict:
    """The object in a JSON file; UserError if it cannot be read or does not have the form."""
    text = read_text(path, expected)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"cannot be read ({first_line(error)}); expected {expected}"
        raise UserError(f"{path}: {problem}") from error
    if problem := misfit(content, form or {}):
        raise UserError(f"{path}: {problem}")
    return content


def lock(folder: Path, wait: bool = False) -> None:
    """Lock `folder` until `unlock` or the end of this process; others wait or get a UserError.

    A POSIX record lock on a file next to the folder: it ends with the process, and forked workers
    do not inherit it (they would inherit flock, which the filelock package uses)."""
    folder = Path(os.path.realpath(folder))  # links to one folder share its lock
    if folder in _held:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    if not path.exists() and not os.access(folder.parent, os.W_OK):
        path = folder / ".lock"  # a volume mounted into a container, for example
    handle = path.open("a+")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError) as error:
        handle.seek(0)
        owner = handle.read().strip()
        handle.close()
        problem = f"another process ({owner}) is using it; wait, stop it, or use another folder"
        raise UserError(f"{folder}: {problem}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{folder}: its file system has no locks; do not start a second process in it")
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}")
    handle.flush()
    _held[folder] = handle


def unlock(folder: Path) -> None:
    """Release the lock that `lock` took."""
    handle = _held.pop(Path(os.path.realpath(folder)), None)
    if handle:
        handle.close()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock `folder` inside the block; UserError for a full or read-only disk."""
    try:
        lock(folder, wait=True)
        yield
    except OSError as error:
        problem = f"cannot be written ({error}); expected free space and permission to write"
        raise UserError(f"{folder}: {problem}") from error
    finally:
        unlock(folder)


def is_path(name: str) -> bool:
    """Whether `name` can only be a path: a name on the hub has at most one slash, inside."""
    begins, ends = name.startswith(("/", "./", "../", "~")), name.endswith(("/", ".txt", ".json"))
    return begins or ends or name in (".", "..") or name.count("/") > 1


def model_folder(name: str) -> str:
    """The folder of a model, or of a run's model: `final`, else `best`. A hub name is returned as
    it is. UserError for a path that does not exist, or for a folder with pipes or devices."""
    path = os.path.expanduser(name)
    if is_path(name) and not os.path.exists(path):
        raise UserError(f"{name}: does not exist; expected a folder or a hub name")
    for part in ("final", "best"):
        if os.path.isdir(os.path.join(path, part)):
            path = os.path.join(path, part)
            break
    if os.path.isdir(path):
        check_regular(Path(path))
    return path if os.path.exists(path) else name


def check_regular(folder: Path) -> None:
    """UserError if a library that reads `folder` could meet a pipe or a device, and wait."""
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is a pipe or a device; expected regular files and folders")


def markdown_table(header: list[object], rows: Iterable[list[object]]) -> str:
    """A table in Markdown; pipes in cells are escaped."""
    lines = []
    for row in [header, *rows]:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def key_of(content: object) -> str:
    """16 hexadecimal digits that identify `content`, a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # so that the next read comes from disk
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
