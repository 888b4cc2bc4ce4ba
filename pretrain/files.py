"""Files that are whole or absent, locks on folders, hashes, JSON and Markdown."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from pretrain.errors import NotWritable, UserError, os_error, refusing, what_it_takes
from pretrain.schema import Form, misfit

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from a file system without locks
CODE_FIELDS = ("auto_map", "custom_pipelines")  # name code, which is not copied with a model
CHECKSUMS = "checksums.json"  # in a folder of runtime/checkpoint.py: `sums_of` its files
_held: dict[Path, TextIO] = {}  # by folder: the locks of this process


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or folder next to `path`, then rename it to `path`. If several
    processes may write it, call this inside `exclusive`, which removes what killed ones left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process number: in each container it is 1.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        if error.errno:  # else it is about the input, such as gzip's
            error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        remove(partial)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` with `text` in UTF-8, atomically, also if power fails."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")
        sync(partial)

    write_aside(path, write)


def as_json(content: object, **options: Any) -> str:
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
    """Why `path` is not a regular file, None if it is. Reading a pipe or a device may never end."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISREG(mode):
        return None
    return "is a folder" if stat.S_ISDIR(mode) else "is a pipe or a device"


def read_text(path: str | Path, expected: str, convert: str = "") -> str:
    """The text of a regular file in UTF-8; UserError if there is none. `convert` says how to get
    UTF-8 from other text."""
    problem = file_problem(path)
    if problem:
        raise UserError(f"{path}: {problem}; expected {expected}")
    with refusing(f"{path}: cannot be read", f"expected {expected}"):
        content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte offset {error.start}"
        raise UserError(f"{path}: {problem}; expected {expected}{convert}") from error


def read_json(path: Path, form: Form | None = None, expected: str = "a JSON object") -> dict:
    """The object in a JSON file; UserError if it cannot be read or does not have the form."""
    text = read_text(path, expected)
    with refusing(f"{path}: cannot be read", f"expected {expected}"):
        content = json.loads(text)
    if problem := misfit(content, form or {}):
        raise UserError(f"{path}: {problem}")
    return content


def lock(folder: Path, wait: bool = False) -> bool:
    """Lock `folder` until `unlock` or the end of this process; others wait or get a UserError.
    False if the file system has no locks.

    A POSIX record lock on a file next to the folder: it ends with the process, and forked workers
    do not inherit it (they would inherit flock, which the filelock package uses)."""
    check_writable(folder)
    folder = Path(os.path.realpath(folder))  # links to one folder share its lock
    if folder in _held:
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    if not path.exists() and not os.access(folder.parent, os.W_OK) and folder.is_dir():
        path = folder / ".lock"  # a volume mounted into a container, for example
    handle = path.open("a+")
    try:
        has_locks = _acquire(handle, folder, wait)
    except BaseException:
        handle.close()
        raise
    if not _is_open(path, handle):  # its last owner removed it while this process waited
        handle.close()
        return lock(folder, wait)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}")
    handle.flush()
    _held[folder] = handle
    return has_locks


def _acquire(handle: TextIO, folder: Path, wait: bool) -> bool:
    """Lock the open file of `folder`; False if its file system has no locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            print(f"{folder}: its file system has no locks; do not start a second process in it")
            return False
        if not isinstance(error, (BlockingIOError, PermissionError)):
            raise
        handle.seek(0)
        owner = handle.read().strip()
        if not wait:
            problem = f"another process ({owner}) is using it"
            expected = "wait, stop it, or use another folder"
            raise UserError(f"{folder}: {problem}; {expected}") from error
        print(f"{folder}: waiting for another process ({owner})")
        fcntl.lockf(handle, fcntl.LOCK_EX)
    return True


def _is_open(path: Path, handle: TextIO) -> bool:
    """Whether `handle` is open on the file that is now at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False


def unlock(folder: Path) -> None:
    """Release the lock that `lock` took, and remove its file."""
    handle = _held.pop(Path(os.path.realpath(folder)), None)
    if handle:
        with contextlib.suppress(OSError):  # the folder may have been moved away
            if _is_open(Path(handle.name), handle):
                os.unlink(handle.name)
        handle.close()


@contextlib.contextmanager
def locks_released() -> Iterator[None]:
    """Release the locks that are taken inside and not released there."""
    before = set(_held)
    try:
        yield
    finally:
        for folder in _held.keys() - before:
            unlock(folder)


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[None]:
    """Lock `path`, a file or folder, inside the block, and remove what killed processes left of it.
    UserError if the disk is full or read-only."""
    try:
        if lock(path, wait):
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????.partial"):
                remove(leftover)
        yield
    except UserError:
        raise
    except Exception as error:
        reason = os_error(error)
        if reason is None or reason.errno is None:  # such as gzip's about damaged input
            raise
        where, problem = reason.filename or path, reason.strerror or reason
        raise UserError(f"{where}: {problem}; {what_it_takes(reason)}") from error
    finally:
        unlock(path)


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted writes and removals left in `folder`; no other process may use it."""
    for suffix in ("partial", "removed", "previous"):
        for leftover in folder.glob(f".*.{suffix}"):
            remove(leftover)


def check_writable(path: str | Path) -> None:
    """UserError unless a file or folder can be created at `path` or, if it exists, changed. If only
    permission is missing, the error is NotWritable."""
    if not Path(os.path.realpath(path)).name:
        raise UserError(f"{path}: is the root of the file system; expected another folder")
    base = Path(path)
    while not os.path.exists(base):
        base = base.parent
    if base != Path(path) and not os.path.isdir(base):
        raise UserError(f"{path}: {base} is a file; expected a folder")
    if not os.access(base, os.W_OK):
        raise NotWritable(f"{path}: no permission to write to {base}; expected another folder")


def model_folder(name: str) -> str:
    """The folder of a model, or of a run's model: the one that its summary recommends, else
    `final`, else `best`. A hub name is returned as it is. UserError for a folder with pipes or
    devices."""
    path, recommended = os.path.expanduser(name), ""
    with contextlib.suppress(UserError, KeyError, TypeError):
        recommended = Path(read_json(Path(path, "summary.json"))["use"]).name
    for part in (recommended, "final", "best"):
        folder = os.path.join(path, part)
        if part in ("final", "best") and os.path.isdir(folder):
            path = folder
            break
    if os.path.isdir(path):
        check_regular(Path(path))
    return path if os.path.exists(path) else name


def check_regular(folder: Path) -> None:
    """UserError for a pipe or a device in `folder`: a library that reads it would wait."""
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


def sums_of(folder: Path, ignored: tuple[str, ...] = (CHECKSUMS,)) -> dict[str, dict]:
    """Size and hash of each file in `folder` whose name does not end in one of `ignored`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path in paths if not path.name.endswith(ignored)]
    with ThreadPoolExecutor() as pool:  # resuming waits for this
        hashes = list(pool.map(sha256_of, paths))
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes)
    }


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
