"""Shared by the tests that read and prepare text."""

from collections.abc import Callable, Iterable
from pathlib import Path

import conftest
import pytest

from pretrain.data.sources import Source, check_files
from pretrain.errors import UserError


def refused(function: Callable, *arguments, **named) -> str:
    """The message of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)
    return str(caught.value)


def grouped(stream: Iterable) -> list[list]:
    """The documents of a stream of sentences; each must have an end."""
    documents, document = [], []
    for item in stream:
        if item is None:
            documents.append(document)
            document = []
        else:
            document.append(item)
    assert document == [], "a document without an end"
    return documents


def texts(documents: list[list]) -> list[list[str]]:
    """Documents of sentences without their entities."""
    return [[sentence for sentence, _ in document] for document in documents]


def write_documents(path: Path, documents: list[list[str]]) -> list[Source]:
    """The documents in a file, checked."""
    path.parent.mkdir(exist_ok=True)
    return check_files([conftest.write_documents(path, documents)])


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
