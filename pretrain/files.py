"""Files that are whole or absent, their hashes, and the tables in them."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from pretrain.command import UserError

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


def hold(folder: Path, wait: bool = False) -> None:
    """Hold `folder` against other processes until this one ends, or `let_go`. One that comes later waits, or gets a UserError.

    A POSIX record lock on a file beside the folder: it ends with the process, however that ends, and forked workers have no part
    in it. Where the file system knows no locks, there is none."""
    key = os.path.abspath(folder)
    if key in _held:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    handle = folder.with_name(f".{folder.name}.lock").open("a+")
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
    _held[key] = handle


def let_go(folder: Path) -> None:
    """The counterpart of `hold`."""
    handle = _held.pop(os.path.abspath(folder), None)
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
