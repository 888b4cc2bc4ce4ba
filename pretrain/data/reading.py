"""Text files -> a stream of sentences and document ends, in constant memory.

Files are checked once, before any work (UTF-8, no NUL bytes, some text), and cut into pieces of about PIECE_BYTES; a piece
is read by `sentences`, which yields each sentence with its entities and `None` where a document ends, so that a document of any
size streams through.
"""
from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.command import UserError, check
from pretrain.files import key_of, write_json

SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")  # in a folder that `datasets` has saved
PIECE_BYTES = 64 << 20  # one piece becomes one shard of the corpus
MAX_LINE_BYTES = 1 << 20  # a longer line is read in parts, cut at white space where there is some


@dataclass(frozen=True)
class Source:
    """A text file as it was when it was read; `sha256` is of its bytes."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; begins and ends at document boundaries."""

    path: str
    start: int
    end: int


Sentence = tuple[str, tuple[tuple[int, int], ...]]  # text, and (start, end) of its entities in characters
Cut = Callable[[str], list[str]]


def expand(paths: list[str], name: str) -> list[str]:
    """Files that `paths` (files, folders, globs) mean: absolute, sorted, each once; `name` is the option for messages.

    hub:NAME stays as it is, and a folder of save_to_disk is one entry."""
    files, problems = set(), []
    for entry in paths:
        if entry.startswith("hub:"):
            files.add(entry)
            continue
        found = files_of(Path(entry).expanduser())
        if not found:
            found = [file for match in glob.glob(str(Path(entry).expanduser()), recursive=True) for file in files_of(Path(match))]
        if not found:
            reason = "is a folder without files" if Path(entry).is_dir() else "no such file or folder, and no file matches it as a glob"
            problems.append(f"{name} {entry}: {reason}")
        files.update(os.path.abspath(file) for file in found)
    check(problems)
    return sorted(files)


def files_of(path: Path) -> list[Path]:
    """A file itself, and the files in a folder that no dot hides."""
    if path.is_file() or any((path / mark).is_file() for mark in SAVED_DATASET):
        return [path]
    return [file for file in path.rglob("*") if file.is_file() and not any(
        part.startswith(".") for part in file.relative_to(path).parts)]


def check_files(files: list[Path], name: str, index: Path | None = None) -> list[Source]:
    """Read every file once and raise a UserError that names each one that is empty, blank, binary or not UTF-8.

    `index` is a JSON file of earlier results: a file whose path, size and mtime agree with it is not read again."""
    known = _read_index(index)
    sources, problems = [], []
    for file in files:
        try:
            status = file.stat()
            earlier = known.get(str(file))
            if earlier and (earlier["size"], earlier["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
                sources.append(Source(**earlier))
                continue
            digest, problem = _scan(file)
        except OSError as error:
            problems.append(f"{name} {file}: cannot be read ({error.strerror})")
            continue
        if problem:
            problems.append(f"{name} {file}: {problem}")
            continue
        sources.append(Source(str(file), status.st_size, status.st_mtime_ns, digest))
        if earlier and earlier["sha256"] != digest:
            print(f"{file} has changed since it was prepared: preparing it again")
        known[str(file)] = asdict(sources[-1])
    check(problems)
    if index is not None:
        write_json(index, known)
    return sources


def _read_index(index: Path | None) -> dict[str, dict]:
    try:
        known = json.loads(index.read_text(encoding="utf-8")) if index else {}
        return {path: asdict(Source(**entry)) for path, entry in known.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # it only saves time


def _scan(file: Path) -> tuple[str, str | None]:
    """(SHA-256, problem or None) of a file."""
    digest, decoder, offset, blank = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0, True
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
            if b"\0" in chunk:
                return "", (f"is binary or UTF-16 (a NUL byte at byte offset {offset + chunk.index(0)}); "
                            "needed is UTF-8 text")
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return "", _not_utf8(offset - pending + error.start, error.reason)
            blank = blank and not text.replace("\ufeff", "").strip()
            offset += len(chunk)
    if decoder.getstate()[0]:
        return "", _not_utf8(offset - len(decoder.getstate()[0]), "the last character is cut short")
    if offset == 0:
        return "", "is empty"
    return digest.hexdigest(), "holds only white space" if blank else None


def _not_utf8(offset: int, reason: str) -> str:
    return f"is not UTF-8 at byte offset {offset} ({reason}); needed is UTF-8 text (iconv -f LATIN1 -t UTF-8 converts)"


def detect_format(files: list[Path]) -> tuple[str, str]:
    """(format, why) of the text, from the first 256 KiB of up to 16 files spread over the list."""
    sample = files[:: max(1, len(files) // 16)][:16]
    group_sizes, num_lines = [], 0
    for file in sample:
        with file.open("rb") as handle:
            lines = handle.read(1 << 18).decode("utf-8", errors="replace").lstrip("\ufeff").strip().split("\n")
        group_sizes.append(0)
        for line in lines:
            if line.strip():
                group_sizes[-1] += 1
                num_lines += 1
            elif group_sizes[-1]:
                group_sizes.append(0)
    if len(group_sizes) > len(sample) and num_lines > len(group_sizes):
        return "sentences", f"blank lines separate groups of {num_lines / len(group_sizes):.1f} lines on average"
    if len(files) > 1 and sum(file.stat().st_size for file in files) / len(files) < 1 << 17:
        return "text", f"{len(files):,} small files without groups of lines: each is taken for a document"
    return "lines", "no groups of lines separated by blank lines: each line is taken for a document"


def cut_into_pieces(files: list[Path], text_format: str, piece_bytes: int = PIECE_BYTES) -> list[list[Span]]:
    """The files, in order, as pieces of about `piece_bytes`: small files are grouped, large ones cut at document ends."""
    pieces: list[list[Span]] = [[]]
    filled = 0
    for file in files:
        for span in _cut_file(file, text_format, piece_bytes):
            if filled and filled + span.end - span.start > piece_bytes:
                pieces.append([])
                filled = 0
            pieces[-1].append(span)
            filled += span.end - span.start
    return pieces


def _cut_file(file: Path, text_format: str, piece_bytes: int) -> list[Span]:
    size, cuts = file.stat().st_size, [0]
    if text_format != "text":
        with file.open("rb") as handle:
            while cuts[-1] + piece_bytes < size:
                handle.seek(cuts[-1] + piece_bytes)
                from_line_start = False
                for part in iter(lambda: handle.readline(MAX_LINE_BYTES), b""):
                    line_ends = part.endswith(b"\n")
                    if line_ends and (text_format in ("lines", "jsonl") or (from_line_start and not part.strip())):
                        break
                    from_line_start = line_ends
                cuts.append(handle.tell())
    if cuts[-1] < size:
        cuts.append(size)
    return [Span(os.path.abspath(file), start, end) for start, end in zip(cuts, cuts[1:])]


def sentences(piece: list[Span], text_format: str, cut: Cut | None = None) -> Iterator[Sentence | None]:
    """The sentences of a piece, stripped and never empty, with their entities; None after the last one of each document.

    `cut` divides a line into sentences: parts that make the line when they are joined."""
    for span in piece:
        if text_format == "jsonl":
            for record in _records(span):
                yield from _cut_document(record["text"], record.get("entities", ()), cut)
                yield None
            continue
        open_document, blank = False, True
        for text, line_ends in _lines(span):
            for part in cut(text) if cut else (text,):
                part = part.strip()
                if part:
                    yield part, ()
                    open_document, blank = True, False
            ends = line_ends and (text_format == "lines" or (text_format == "sentences" and blank))
            if ends and open_document:
                yield None
                open_document = False
            blank = blank or line_ends
        if open_document:
            yield None


def _records(span: Span) -> Iterator[dict]:
    """Documents as pretrain/data/formats.py writes them."""
    with open(span.path, "rb") as handle:
        handle.seek(span.start)
        while handle.tell() < span.end:
            yield json.loads(handle.readline())


def _cut_document(text: str, entities: list[list[int]], cut: Cut | None) -> Iterator[Sentence]:
    """Sentences of a text: its lines, and their parts under `cut`. An end inside an entity is none."""
    ends, place = [], 0
    for line in text.split("\n"):
        for part in (cut(line) if cut else ()) or (line,):
            place += len(part)
            ends.append(place)
        place += 1  # the line feed
    assert ends[-1] == len(text), (ends[-1], len(text))
    first = begin = 0
    for end in ends:
        last = bisect_left(entities, end, lo=first, key=lambda span: span[1])  # the first that is not over before `end`
        if last < len(entities) and entities[last][0] < end < entities[last][1]:
            continue
        last += last < len(entities) and entities[last][1] == end
        sentence = text[begin:end].strip()
        offset = begin + len(text[begin:end]) - len(text[begin:end].lstrip())
        if sentence:
            spans = ((max(start - offset, 0), min(stop - offset, len(sentence))) for start, stop in entities[first:last])
            yield sentence, tuple(span for span in spans if span[0] < span[1])  # one of blanks alone is none
        first, begin = last, end


def _lines(span: Span) -> Iterator[tuple[str, bool]]:
    """(text, whether the line ends here): a line in one part, or in several where it is longer than MAX_LINE_BYTES."""
    with open(span.path, "rb") as handle:
        handle.seek(span.start)
        if span.start == 0 and handle.read(3) != codecs.BOM_UTF8:
            handle.seek(0)
        rest, place = b"", handle.tell()  # counted from here on: to ask takes longer than to read a line
        while place < span.end:
            part = handle.readline(MAX_LINE_BYTES)
            raw, rest, place = rest + part, b"", place + len(part)
            ends = raw.endswith(b"\n") or place >= span.end
            if not ends:
                cut = max(raw.rfind(b" "), raw.rfind(b"\t")) + 1
                if cut == 0:  # no white space: between two characters
                    cut = len(raw) - next(back for back in range(1, 5) if raw[-back] & 0xC0 != 0x80)
                raw, rest = raw[:cut], raw[cut:]
            yield raw.decode("utf-8"), ends


def read_lines(path: str, name: str) -> list[str]:
    """The lines of a small UTF-8 file, stripped; `name` is the option for messages."""
    try:
        return [line.strip() for line in Path(path).read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} {path}: cannot be read as UTF-8 text ({reason})") from error


def content_key(sources: list[Source], *more: object) -> str:
    """16 hexadecimal digits that name this content, in this order, and `more`."""
    return key_of([[source.sha256 for source in sources], *more])
