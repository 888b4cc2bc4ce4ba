"""Text to pretrain on, without the texts that the task is tested on."""
from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from pretrain.data.reading import Sentence
from pretrain.files import write_aside
from pretrain.text import TextFiles


def write_cleaned(text: TextFiles, test_texts: list[tuple[str, ...]], more: list[tuple[str, ...]], target: Path) -> dict[str, int]:
    """Write the documents of `text`, and a document for each of `more`, without exact copies of `test_texts`, to `target` as JSON lines
    (pretrain/data/formats.py); counts of documents, of copies removed and of `more`. One document is in memory at a time."""
    copies = sorted({squeeze(part) for parts in test_texts for part in parts})
    counts = {"documents": 0, "removed": 0, "task_texts": len(more)}

    def documents() -> Iterator[list[Sentence]]:
        for is_end, items in groupby(text.sentences(), key=lambda item: item is None):
            if not is_end:
                yield list(items)
        yield from ([(part, ()) for part in parts] for parts in more)

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as out:
            for document in documents():
                kept, removed = without_copies(document, copies)
                counts["removed"] += removed
                if kept:
                    counts["documents"] += 1
                    out.write(json.dumps(as_record(kept), ensure_ascii=False) + "\n")

    write_aside(target, write)
    return counts


def squeeze(text: str) -> str:
    """A text without its white space, by which copies are told."""
    return "".join(text.split())


def without_copies(sentences: list[Sentence], copies: list[str]) -> tuple[list[Sentence], int]:
    """(what is left of a document, copies removed): a sentence, or several in a row, that make a text of `copies`, which are squeezed
    and sorted: as soon as none of them begins so, no more sentences are joined."""
    squeezed, kept, removed, place = [squeeze(text) for text, _ in sentences], [], 0, 0
    while place < len(sentences):
        joined, end = "", place
        for last in range(place, len(sentences)):
            joined += squeezed[last]
            found = bisect_left(copies, joined)
            if found == len(copies) or not copies[found].startswith(joined):
                break
            end = last + 1 if copies[found] == joined else end
        if end == place:
            kept.append(sentences[place])
        removed, place = removed + (end > place), max(end, place + 1)
    return kept, removed


def as_record(sentences: list[Sentence]) -> dict:
    """A document as pretrain/data/formats.py reads it: its sentences are lines, its entities offsets in the whole."""
    entities, start = [], 0
    for text, spans in sentences:
        entities += [[start + begin, start + end] for begin, end in spans]
        start += len(text) + 1
    record = {"text": "\n".join(text for text, _ in sentences)}
    return record | {"entities": entities} if entities else record
