"""Text files -> a stream of sentences and document ends, in constant memory.

Files are checked once, before any work (UTF-8, no NUL bytes, some text), and cut into pieces of about PIECE_BYTES; a piece
is read by `sentences`, which yields each sentence as `str` and `None` where a document ends, so that a document of any size
streams through.
"""
from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.config import check

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


def expand(paths: list[str], name: str) -> list[Path]:
    """Files that `paths` (files, folders, globs) mean: absolute, sorted, each once; `name` is the option for messages."""
    files, problems = set(), []
    for entry in paths:
        found = _files_of(Path(entry).expanduser())
        if not found:
            found = [file for match in glob.glob(str(Path(entry).expanduser()), recursive=True) for file in _files_of(Path(match))]
        if not found:
            reason = "is a folder without files" if Path(entry).is_dir() else "no such file or folder, and no file matches it as a glob"
            problems.append(f"{name} {entry}: {reason}")
        files.update(Path(os.path.abspath(file)) for file in found)
    check(problems)
    return sorted(files)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
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
        index.parent.mkdir(parents=True, exist_ok=True)
        temporary = index.with_name(f"{index.name}.{os.getpid()}")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(index)
    return sources


def _read_index(index: Path | None) -> dict[str, dict]:
    try:
        known = json.loads(index.read_text(encoding="utf-8")) if index else {}
        return {path: asdict(Source(**entry)) for path, entry in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
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
                    if line_ends and (text_format == "lines" or (from_line_start and not part.strip())):
                        break
                    from_line_start = line_ends
                cuts.append(handle.tell())
    if cuts[-1] < size:
        cuts.append(size)
    return [Span(str(file), start, end) for start, end in zip(cuts, cuts[1:])]


def sentences(piece: list[Span], text_format: str) -> Iterator[str | None]:
    """The sentences of a piece, stripped and never empty; None after the last sentence of each document."""
    for span in piece:
        open_document, blank = False, True
        for text, line_ends in _lines(span):
            text = text.strip()
            if text:
                yield text
                open_document, blank = True, False
            ends = line_ends and (text_format == "lines" or (text_format == "sentences" and blank))
            if ends and open_document:
                yield None
                open_document = False
            blank = blank or line_ends
        if open_document:
            yield None


def _lines(span: Span) -> Iterator[tuple[str, bool]]:
    """(text, whether the line ends here): a line in one part, or in several where it is longer than MAX_LINE_BYTES."""
    with open(span.path, "rb") as handle:
        handle.seek(span.start)
        if span.start == 0 and handle.read(3) != codecs.BOM_UTF8:
            handle.seek(0)
        rest = b""
        while handle.tell() < span.end:
            raw = rest + handle.readline(MAX_LINE_BYTES)
            rest = b""
            ends = raw.endswith(b"\n") or handle.tell() >= span.end
            if not ends:
                cut = max(raw.rfind(b" "), raw.rfind(b"\t")) + 1
                if cut == 0:  # no white space: between two characters
                    cut = len(raw) - next(back for back in range(1, 5) if raw[-back] & 0xC0 != 0x80)
                raw, rest = raw[:cut], raw[cut:]
            yield raw.decode("utf-8"), ends


def read_all(sources: list[Source], text_format: str) -> Iterator[str]:
    """Every sentence of the files, for training a tokenizer."""
    for source in sources:
        yield from (text for text in sentences([Span(source.path, 0, source.size)], text_format) if text is not None)


def content_key(sources: list[Source], *more: object) -> str:
    """16 hexadecimal digits that name this content, in this order, and `more`."""
    return hashlib.sha256(json.dumps([[source.sha256 for source in sources], *more]).encode()).hexdigest()[:16]
