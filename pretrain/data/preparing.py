"""Text pieces -> shards of a corpus: tokenized in batches, in constant memory, restartable by piece.

A piece of text makes one shard, whatever else is prepared; the manifest is written last and the folder then gets its name.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pretrain.config import UserError
from pretrain.data import reading
from pretrain.data.corpus import ARRAYS, FORMAT_VERSION, WORD_START, Corpus, Shard, concatenate, is_corpus, sha256_of
from pretrain.data.tokenizer import Vocabulary, describe

BATCH_CHARACTERS = 1 << 20  # text that goes to the tokenizer at once


def prepare(sources: list[reading.Source], text_format: str, tokenizer: PreTrainedTokenizerBase, folder: Path,
            piece_bytes: int = reading.PIECE_BYTES) -> Corpus:
    """Write the corpus of `sources` into `folder`, or open it where it is there. Restarts by piece.

    Memory is bounded by a batch of text and the offsets of one shard. Raises UserError where the text holds no token."""
    if is_corpus(folder):
        return Corpus(folder)
    vocabulary = describe(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    partial = folder.with_name(f"{folder.name}.partial")
    with exclusive(partial):
        if is_corpus(folder):  # another process has written it while this one waited
            return Corpus(folder)
        partial.mkdir(exist_ok=True)
        _discard_other_work(partial, reading.content_key(sources, text_format, vocabulary.fingerprint, piece_bytes, FORMAT_VERSION))
        pieces = reading.cut_into_pieces([Path(source.path) for source in sources], text_format, piece_bytes)
        total = sum(source.size for source in sources)
        entries = []
        with tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=None) as bar:
            for number, piece in enumerate(pieces):
                entries.append(_write_piece(partial, f"shard-{number:05d}", piece, text_format, backend, vocabulary, bar))
        entries = _join_small(partial, [entry for entry in entries if entry["documents"]])
        if not entries:
            raise UserError(f"{sources[0].path}: the tokenizer finds no token in the text; needed is text in its script")
        tokenizer.save_pretrained(partial / "tokenizer")
        _write_json(partial / "corpus.json", _describe_corpus(entries, sources, text_format, vocabulary))
        for leftover in [*partial.glob("*.piece.json"), partial / "content.key"]:
            leftover.unlink()
        partial.rename(folder)
    return Corpus(folder)


def _discard_other_work(folder: Path, key: str) -> None:
    """Remove what an interrupted preparation of other text, or with another tokenizer, has left in `folder`."""
    mark = folder / "content.key"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != key:
        for leftover in sorted(folder.iterdir()):  # content.key before the pieces
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        mark.write_text(key, encoding="utf-8")


def _describe_corpus(entries: list[dict], sources: list[reading.Source], text_format: str, vocabulary: Vocabulary) -> dict:
    smallest = sorted({value for entry in entries for value in entry.pop("smallest_hashes")})[:2]
    counts = {name: sum(entry[name] for entry in entries) for name in ("documents", "sentences", "tokens", "unknown_tokens")}
    content = json.dumps([[array["sha256"] for array in entry["arrays"].values()] for entry in entries])
    return {"format_version": FORMAT_VERSION, **counts, "fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
            "tokenizer": vocabulary.fingerprint, "text_format": text_format, "smallest_hashes": smallest,
            "sources": [vars(source) for source in sources], "shards": entries}


def _write_piece(folder: Path, name: str, piece: list[reading.Span], text_format: str, tokenizer: Tokenizer,
                 vocabulary: Vocabulary, bar: tqdm) -> dict:
    """Write the shard of one piece and return its entry of `corpus.json`; a piece that is written already is kept."""
    done = folder / f"{name}.piece.json"
    if done.is_file():
        bar.update(sum(span.end - span.start for span in piece))
        return json.loads(done.read_text(encoding="utf-8"))
    offsets, num_unknown = _Offsets(), 0
    dtype = np.uint16 if vocabulary.size <= 1 << 16 else np.uint32
    with _NpyWriter(folder / f"{name}.ids.npy", dtype) as ids_file, _NpyWriter(folder / f"{name}.flags.npy", np.uint8) as flags_file:
        for batch in _batches(reading.sentences(piece, text_format)):
            texts = [text for text in batch if text is not None]
            encodings = [encoding.ids for encoding in
                         tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
            lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
            ids = np.fromiter(chain.from_iterable(encodings), dtype, int(lengths.sum()))
            ids_file.append(ids)
            flags_file.append(vocabulary.starts_word[ids].astype(np.uint8) * WORD_START)
            num_unknown += int((ids == vocabulary.unknown_id).sum())
            offsets.append(batch, lengths)
            bar.update(sum(len(text.encode()) + 1 for text in texts))
    arrays = offsets.arrays()
    for array_name, array in arrays.items():
        np.save(folder / f"{name}.{array_name}.npy", array, allow_pickle=False)
    entry = _entry(folder, name, ids_file.length, num_unknown, **arrays)
    _write_json(done, entry)
    return entry


class _Offsets:
    """Collects where sentences and documents end, and a hash of each document's text.

    A sentence or a document without a token is none."""

    def __init__(self):
        self.sentences, self.num_tokens, self.num_sentences = [np.zeros(1, np.int64)], 0, 0
        self.documents, self.hashes, self.hasher = [0], [], hashlib.blake2b(digest_size=8)

    def append(self, batch: list[str | None], lengths: np.ndarray) -> None:
        """Add sentences and document ends (None); `lengths` int64 holds the tokens of each sentence."""
        self.sentences.append(self.num_tokens + np.cumsum(lengths)[lengths > 0])
        self.num_tokens += int(lengths.sum())
        remaining = iter(lengths.tolist())
        for text in batch:
            if text is not None:
                self.hasher.update(text.encode() + b"\n")
                self.num_sentences += next(remaining) > 0
                continue
            if self.num_sentences > self.documents[-1]:
                self.documents.append(self.num_sentences)
                self.hashes.append(int.from_bytes(self.hasher.digest(), "little"))
            self.hasher = hashlib.blake2b(digest_size=8)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"sentences": np.concatenate(self.sentences), "documents": np.array(self.documents, np.int64),
                "hashes": np.array(self.hashes, np.uint64)}


def _entry(folder: Path, name: str, num_tokens: int, num_unknown: int, sentences: np.ndarray, documents: np.ndarray,
           hashes: np.ndarray) -> dict:
    files = {array: folder / f"{name}.{array}.npy" for array in ARRAYS}
    return {"name": name, "documents": len(hashes), "sentences": len(sentences) - 1, "tokens": num_tokens,
            "unknown_tokens": num_unknown, "smallest_hashes": np.unique(hashes)[:2].tolist(),
            "arrays": {array: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for array, path in files.items()}}


def _join_small(folder: Path, entries: list[dict]) -> list[dict]:
    """Join each shard of fewer than two documents to its neighbour: a random next sentence needs another document."""
    position = 0
    while len(entries) > 1 and position < len(entries):
        if entries[position]["documents"] >= 2:
            position += 1
            continue
        first = min(position, len(entries) - 2)
        pair = entries[first: first + 2]
        joined = concatenate([Shard(**{name: np.load(folder / f"{entry['name']}.{name}.npy", allow_pickle=False) for name in ARRAYS})
                              for entry in pair])
        name = f"{pair[0]['name']}-joined"
        for array in ARRAYS:
            np.save(folder / f"{name}.{array}.npy", getattr(joined, array), allow_pickle=False)
        for entry in pair:  # first: a restart must not take the removed shards for written
            (folder / f"{entry['name'].removesuffix('-joined')}.piece.json").unlink(missing_ok=True)
        for entry in pair:
            for array in ARRAYS:
                (folder / f"{entry['name']}.{array}.npy").unlink()
        entries[first: first + 2] = [_entry(folder, name, len(joined.ids), sum(entry["unknown_tokens"] for entry in pair),
                                            joined.sentences, joined.documents, joined.hashes)]
        position = first
    return entries


def _batches(stream: Iterable[str | None]) -> Iterator[list[str | None]]:
    batch, characters = [], 0
    for item in stream:
        batch.append(item)
        characters += len(item) if item else 0
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _NpyWriter:
    """Appends to a one-dimensional `.npy` whose length is known at the end: numpy pads headers so that it fits in place."""

    def __init__(self, path: Path, dtype: type):
        self.path, self.dtype, self.length = path, np.dtype(dtype), 0

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(self.handle, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False,
                                                           "shape": (self.length,)})

    def __enter__(self) -> _NpyWriter:
        self.handle = self.path.open("wb")
        self._write_header()
        self.header_bytes = self.handle.tell()
        return self

    def append(self, array: np.ndarray) -> None:
        self.length += len(array)
        self.handle.write(array.tobytes())

    def __exit__(self, *exception: object) -> None:
        self.handle.seek(0)
        self._write_header()
        assert self.handle.tell() == self.header_bytes, (self.handle.tell(), self.header_bytes)
        self.handle.close()


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` against a second process that prepares the same (it waits); a full or read-only disk is told."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); needed is room and the right to write") from error
