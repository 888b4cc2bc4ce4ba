"""Text files -> pieces of about PIECE_BYTES -> a stream of sentences, in constant memory.

A stream yields each sentence with its entities, and None where a document ends, so a document may
be of any size."""

import codecs
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar, cast

from pretrain.data.sources import MAX_CHARACTERS, too_long

PIECE_BYTES = 64 << 20  # one piece becomes one shard of the corpus
# A longer line is read in parts, cut at white space if possible: the tokenizer needs a hundred
# times the size of its text.
MAX_LINE_BYTES = 1 << 20
SAMPLED_FILES, SAMPLED_BYTES = 16, 1 << 18  # to detect the format
SMALL_FILE_BYTES = 1 << 17
UNUSUAL = 10  # times as many lines as usual, in a document that may be several

Sentence = tuple[str, tuple[tuple[int, int], ...]]  # text, (start, end) of entities in characters
Stream = Iterator[Sentence | None]  # None ends a document
Cut = Callable[[str], list[str]]  # splits a line into sentences; joined, they are the line
Item = TypeVar("Item")


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; starts and ends at document boundaries."""

    path: str
    start: int
    end: int


def detect_format(files: list[Path]) -> tuple[str, str]:
    """(format, reason) of plain text files, detected from the beginnings of some of them."""
    sample = files[:: max(1, len(files) // SAMPLED_FILES)][:SAMPLED_FILES]
    num_groups = num_lines = most_lines = 0
    longest = sample[0]  # of the files that are read whole and have no blank lines inside
    for file in sample:
        with file.open("rb") as handle:
            text = handle.read(SAMPLED_BYTES).decode("utf-8", errors="replace")
        lines = [line.strip() for line in text.lstrip("\ufeff").strip().split("\n")]
        filled, groups = sum(map(bool, lines)), [is_filled for is_filled, _ in groupby(lines, bool)]
        num_lines += filled
        num_groups += sum(groups)
        is_whole = file.stat().st_size <= SAMPLED_BYTES
        if is_whole and len(groups) == 1 and filled > most_lines:
            longest, most_lines = file, filled
    if num_groups > len(sample) and num_lines > num_groups:
        average = num_lines / num_groups
        reason = f"blank lines separate groups of {average:.1f} lines on average"
        if most_lines > UNUSUAL * average:
            reason += f"; but {longest.name} has none, so all of it is one document"
        return "sentences", reason
    num_bytes = sum(file.stat().st_size for file in files)
    if len(files) > 1 and num_bytes / len(files) < SMALL_FILE_BYTES:
        return "text", f"{len(files):,} small files without groups of lines: each is a document"
    return "lines", "no groups of lines separated by blank lines: each line is a document"


def cut_into_pieces(
    files: list[Path], text_format: str, piece_bytes: int = PIECE_BYTES
) -> list[list[Span]]:
    """Pieces of the files, in order: small files are grouped, large ones cut between documents."""
    spans = (span for file in files for span in _cut_file(file, text_format, piece_bytes))
    return list(in_groups(spans, lambda span: span.end - span.start, piece_bytes))


def in_groups(
    items: Iterable[Item], size_of: Callable[[Item], int], limit: int, at_most: int | None = None
) -> Iterator[list[Item]]:
    """Lists of the items, in order: each has at most `at_most` items and a total size of at most
    `limit`; a larger item is alone."""
    group: list[Item] = []
    filled = 0
    for item in items:
        size = size_of(item)
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group.append(item)
        filled += size
        if len(group) == at_most:  # not once the next item is read: that may take long
            yield group
            group, filled = [], 0
    if group:
        yield group


def _cut_file(file: Path, text_format: str, piece_bytes: int) -> list[Span]:
    size, cuts = file.stat().st_size, [0]
    with file.open("rb") as handle:
        while text_format != "text" and cuts[-1] + piece_bytes < size:
            handle.seek(cuts[-1] + piece_bytes)
            from_line_start = False
            for part in iter(lambda: handle.readline(MAX_LINE_BYTES), b""):
                line_ends = part.endswith(b"\n")
                is_blank_line = from_line_start and not part.strip()
                if line_ends and (is_blank_line or text_format in ("lines", "jsonl")):
                    break
                from_line_start = line_ends
            cuts.append(handle.tell())
    if cuts[-1] < size:
        cuts.append(size)
    for start, end in zip(cuts, cuts[1:]):
        if end - start > piece_bytes + MAX_CHARACTERS:
            raise too_long(f"{file}: document after byte {start:,}, read as {text_format}")
    return [Span(os.path.abspath(file), start, end) for start, end in zip(cuts, cuts[1:])]


def sentences(piece: list[Span], text_format: str, cut: Cut | None = None) -> Stream:
    """The sentences of a piece, stripped and never empty; None after the last one of a document.

    The format is one of plain text, or "jsonl": one record of `as_record` per line."""
    for span in piece:
        if text_format != "jsonl":
            yield from _sentences_of_lines(span, text_format, cut)
            continue
        with open(span.path, "rb") as handle:
            handle.seek(span.start)
            while handle.tell() < span.end:
                record = json.loads(handle.readline())
                yield from _cut_record(record["text"], record.get("entities", ()), cut)
                yield None


def documents(stream: Stream) -> Iterator[list[Sentence]]:
    """The documents of a stream of sentences, one in memory at a time."""
    for is_end, items in groupby(stream, key=lambda item: item is None):
        if not is_end:
            yield cast(list[Sentence], list(items))


def as_record(sentences: Sequence[tuple[str, Sequence[tuple]]]) -> dict:
    """A document as JSON: {"text": sentences as lines, "entities": [start, end] in characters}."""
    entities, offset = [], 0
    for text, spans in sentences:
        entities += [(offset + start, offset + end) for start, end, *_ in spans]
        offset += len(text) + 1
    record = {"text": "\n".join(text for text, _ in sentences)}
    return record | {"entities": entities} if entities else record


def _sentences_of_lines(span: Span, text_format: str, cut: Cut | None) -> Stream:
    is_open, is_blank = False, True  # the document so far, the line so far
    for text, line_ends in _lines(span):
        for part in cut(text) if cut else (text,):
            part = part.strip()
            if part:
                yield part, ()
                is_open, is_blank = True, False
        ends = text_format == "lines" or (text_format == "sentences" and is_blank)
        if line_ends and ends and is_open:
            yield None
            is_open = False
        is_blank = is_blank or line_ends
    if is_open:
        yield None


def _lines(span: Span) -> Iterator[tuple[str, bool]]:
    """(text, whether its line ends); a line above MAX_LINE_BYTES comes in several parts."""
    with open(span.path, "rb") as handle:
        handle.seek(span.start)
        if span.start == 0 and handle.read(3) != codecs.BOM_UTF8:
            handle.seek(0)
        rest = b""
        place = handle.tell()  # then counted: tell() takes longer than reading a line
        while place < span.end:
            part = handle.readline(MAX_LINE_BYTES)
            if not part:  # the file has become shorter, which `prepare` reports
                return
            raw, rest, place = rest + part, b"", place + len(part)
            ends = raw.endswith(b"\n") or place >= span.end
            if not ends:
                cut = max(raw.rfind(b" "), raw.rfind(b"\t")) + 1
                if cut == 0:  # no white space: cut between two characters
                    cut = len(raw) - next(back for back in range(1, 5) if raw[-back] & 0xC0 != 0x80)
                raw, rest = raw[:cut], raw[cut:]
            yield raw.decode("utf-8"), ends


def _cut_record(text: str, entities: list[list[int]], cut: Cut | None) -> Iterator[Sentence]:
    """Sentences of a text: its lines, or their parts under `cut`; none ends inside an entity."""
    ends, place = [], 0
    for line in text.split("\n"):
        for short in _short_parts(line):
            for part in (cut(short) if cut else ()) or (short,):
                place += len(part)
                ends.append(place)
        place += 1  # the line feed
    assert ends[-1] == len(text), (ends[-1], len(text))
    first = begin = 0
    for end in ends:
        last = bisect_right(entities, end, lo=first, key=lambda span: span[1])  # ends by `end`
        if last < len(entities) and entities[last][0] < end:
            continue
        part = text[begin:end]
        sentence, offset = part.strip(), begin + len(part) - len(part.lstrip())
        spans = []
        for start, stop in entities[first:last]:
            span = max(start - offset, 0), min(stop - offset, len(sentence))
            if span[0] < span[1]:  # drops entities of only white space
                spans.append(span)
        if sentence:
            yield sentence, tuple(spans)
        first, begin = last, end


def _short_parts(line: str) -> Iterator[str]:
    """A line in parts of at most MAX_LINE_BYTES characters, cut at white space if possible."""
    start = 0
    while len(line) - start > MAX_LINE_BYTES:
        limit = start + MAX_LINE_BYTES
        end = max(line.rfind(" ", start, limit), line.rfind("\t", start, limit)) + 1 or limit
        yield line[start:end]
        start = end
    yield line[start:]
