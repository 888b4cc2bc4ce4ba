"""Pretraining text without the test texts of the task."""

import json
from bisect import bisect_left
from itertools import chain
from pathlib import Path

from pretrain.data.sentences import Sentence, as_record, documents
from pretrain.files import write_aside
from pretrain.inputs import TextFiles


def write_cleaned(
    text: TextFiles, test_texts: list[tuple[str, ...]], more: list[list[Sentence]], target: Path
) -> dict[str, int]:
    """Write the documents of `text` and those in `more`, without copies of `test_texts`.

    Writes the JSON lines that pretrain/data/formats.py reads, with one document in memory. Returns
    the numbers of documents written, copies removed, and documents in `more`."""
    copies = sorted({_squeeze(part) for parts in test_texts for part in parts})
    counts = {"documents": 0, "removed": 0, "task_texts": len(more)}

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as out:
            for document in chain(documents(text.sentences()), more):
                kept, removed = without_copies(document, copies)
                counts["removed"] += removed
                if kept:
                    counts["documents"] += 1
                    out.write(json.dumps(as_record(kept), ensure_ascii=False) + "\n")

    write_aside(target, write)
    return counts


def _squeeze(text: str) -> str:
    """A text without white space: texts are copies if these are equal."""
    return "".join(text.split())


def without_copies(sentences: list[Sentence], copies: list[str]) -> tuple[list[Sentence], int]:
    """(remaining sentences of a document, number of copies removed).

    A copy is the longest run of whole sentences that equals one of `copies`. These are squeezed and
    sorted, so a run is extended only while one of them starts with it."""
    squeezed = [_squeeze(text) for text, _ in sentences]
    kept, num_removed, start = [], 0, 0
    while start < len(sentences):
        run, end = "", start
        for position in range(start, len(sentences)):
            run += squeezed[position]
            nearest = bisect_left(copies, run)
            if nearest == len(copies) or not copies[nearest].startswith(run):
                break
            if copies[nearest] == run:
                end = position + 1
        if end > start:
            num_removed += 1
            start = end
        else:
            kept.append(sentences[start])
            start += 1
    return kept, num_removed
