"""Files that are whole or absent, their hashes, and the tables in them."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path


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


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
