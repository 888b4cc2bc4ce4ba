"""Text pieces -> shards of a corpus: tokenized in batches, in constant memory, restartable by piece.

A piece of text makes one shard, whatever else is prepared; the manifest is written last and the folder then gets its name.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pretrain.command import UserError
from pretrain.data import reading, spreading
from pretrain.data.corpus import ARRAYS, COUNTS, ENTITY_START, FORMAT_VERSION, WORD_START, Corpus, Shard, concatenate, is_corpus, seal
from pretrain.data.marking import Markup, mark
from pretrain.data.tokenizer import Vocabulary, describe, without_limits
from pretrain.files import exclusive, sha256_of, sync, write_json

BATCH_CHARACTERS = 1 << 20  # text that goes to the tokenizer at once


@dataclass(frozen=True)
class _Recipe:
    """What the shard of a piece follows from, beside the piece, and the folder that it is written to."""

    folder: Path
    text_format: str
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    markup: Markup


def prepare(sources: list[reading.Source], text_format: str, tokenizer: PreTrainedTokenizerBase, folder: Path,
            piece_bytes: int = reading.PIECE_BYTES, markup: Markup = Markup(), workers: int | None = None,
            ray: str | None = None) -> Corpus:
    """Write the corpus of `sources` into `folder`, or open it where it is there: the same bytes whoever makes them. Restarts by piece.

    `workers` processes share the pieces (0 or 1: this one; None: by the cores and the text), or the Ray cluster at the address `ray`.
    Each holds a batch of text and the arrays of one shard. Raises UserError where the text holds no token."""
    if is_corpus(folder):
        return Corpus(folder)
    vocabulary = describe(tokenizer)
    partial = folder.absolute().with_name(f"{folder.name}.partial")  # a cluster's processes have other working folders
    with exclusive(partial):
        if is_corpus(folder):  # another process has written it while this one waited
            return Corpus(folder)
        partial.mkdir(exist_ok=True)
        _discard_other_work(partial, reading.content_key(sources, text_format, vocabulary.fingerprint, piece_bytes, FORMAT_VERSION,
                                                         markup.key))
        pieces = reading.cut_into_pieces([Path(source.path) for source in sources], text_format, piece_bytes)
        # The markup anew: what it has built to find terms with cannot be sent.
        recipe = _Recipe(partial, text_format, without_limits(tokenizer), vocabulary, replace(markup))
        entries = _join_small(partial, [entry for entry in _write_pieces(recipe, pieces, workers, ray) if entry["documents"]])
        if not entries:
            raise UserError(f"{sources[0].path}: the tokenizer finds no token in the text; needed is text in its script")
        tokenizer.save_pretrained(partial / "tokenizer")
        files = [{"name": path.name} | _describe_file(path) for path in sorted((partial / "tokenizer").iterdir())]
        write_json(partial / "corpus.json", seal(_describe_corpus(entries, sources, text_format, vocabulary)
                                                 | {"words_by": markup.words, "tokenizer_files": files}))
        _give_name(partial, folder, entries)
    return Corpus(folder)


def _write_pieces(recipe: _Recipe, pieces: list[list[reading.Span]], workers: int | None, ray: str | None) -> list[dict]:
    """The entries of all pieces, in order."""
    sizes = [sum(span.end - span.start for span in piece) for piece in pieces]
    if workers is None:  # one process has the cores for tokenizing alone: enough for less than two whole pieces
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, sum(sizes) // reading.PIECE_BYTES)
    workers = min(workers, len(pieces))
    tasks = [(f"shard-{number:05d}", piece) for number, piece in enumerate(pieces)]
    entries: list[dict] = [{}] * len(pieces)
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="preparing", disable=None) as bar:
        if ray:
            results = spreading.on_cluster(_write_piece, recipe, tasks, ray)
        elif workers > 1:
            results = spreading.in_processes(_write_piece, recipe, tasks, workers)
        else:
            results = ((number, _write_piece(recipe, *task, bar.update)) for number, task in enumerate(tasks))
        finished = 0
        with closing(results):  # else an interruption here would leave the workers at work
            for number, entries[number] in results:
                finished += sizes[number]
                bar.update(finished - bar.n)
    return entries


def _give_name(partial: Path, folder: Path, entries: list[dict]) -> None:
    """Make the finished corpus `folder`. Synced first: after a power cut it is whole or absent."""
    for path in partial.rglob("*"):
        sync(path)
    kept = {"tokenizer", "corpus.json", *(f"{entry['name']}.{array}.npy" for entry in entries for array in ARRAYS)}
    for leftover in partial.iterdir():  # of interruptions, too
        if leftover.name not in kept:
            leftover.unlink()
    sync(partial)
    if folder.exists():  # without corpus.json and shards: somebody has begun to remove it
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.absolute().parent)


def _discard_other_work(folder: Path, key: str) -> None:
    """Remove what an interrupted preparation of other text, or with another tokenizer, has left in `folder`."""
    mark = folder / "content.key"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != key:
        for leftover in sorted(folder.iterdir()):  # content.key before the pieces
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        mark.write_text(key, encoding="utf-8")


def _describe_corpus(entries: list[dict], sources: list[reading.Source], text_format: str, vocabulary: Vocabulary) -> dict:
    smallest = sorted({value for entry in entries for value in entry.pop("smallest_hashes")})[:2]
    counts = {name: sum(entry[name] for entry in entries) for name in COUNTS}
    content = json.dumps([[array["sha256"] for array in entry["arrays"].values()] for entry in entries])
    return {"format_version": FORMAT_VERSION, **counts, "fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
            "tokenizer": vocabulary.fingerprint, "vocab_size": vocabulary.size, "text_format": text_format, "smallest_hashes": smallest,
            "sources": [vars(source) for source in sources], "shards": entries}


def _write_piece(recipe: _Recipe, name: str, piece: list[reading.Span], advance: Callable[[int], object] = int) -> dict:
    """Write the shard of one piece and return its entry of `corpus.json`; a piece that is written already is kept, if it is whole.

    `advance` is told the bytes of text as they are done."""
    folder, vocabulary = recipe.folder, recipe.vocabulary
    done = folder / f"{name}.piece.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or torn by a power cut
        entry = json.loads(done.read_text(encoding="utf-8"))
        if entry["arrays"] == _seals(folder, name):
            return entry
    dtype = np.uint16 if vocabulary.size <= 1 << 16 else np.uint32
    offsets, all_ids, all_flags = _Offsets(), [np.zeros(0, dtype)], [np.zeros(0, np.uint8)]
    for batch, found, by_character, encodings in _ahead(_encoded(recipe, piece)):
        pieces = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        ids = np.fromiter(chain.from_iterable(pieces), dtype, int(lengths.sum()))
        starts = None if vocabulary.starts_word is None else vocabulary.starts_word[ids]
        all_flags.append(mark(found, encodings, starts, recipe.markup.words) if by_character else starts.astype(np.uint8) * WORD_START)
        all_ids.append(ids)
        offsets.append(batch, lengths)
        advance(len("\n".join(text for text, _ in found).encode()))
    arrays = {"ids": np.concatenate(all_ids), "flags": np.concatenate(all_flags), **offsets.arrays()}
    entry = _write_shard(folder, name, Shard(**arrays), int((arrays["ids"] == vocabulary.unknown_id).sum()))
    write_json(done, entry)
    return entry


def _encoded(recipe: _Recipe, piece: list[reading.Span]) -> Iterator[tuple]:
    """(sentences and document ends, sentences with their marks, whether characters matter, encodings) of each batch of a piece."""
    tokenizer, vocabulary, markup = recipe.tokenizer, recipe.vocabulary, recipe.markup
    stream = reading.sentences(piece, recipe.text_format, markup.cut)
    for batch in _batches(_spaced(stream) if vocabulary.needs_space else stream):
        marked = [item and (item[0], markup.find(*item)) for item in batch] if markup.lexicon else batch
        found = [item for item in marked if item is not None]
        # Where characters do not matter, the encoder need not keep track of them: a third faster.
        by_character = vocabulary.starts_word is None or markup.words != "tokenizer" or any(spans for _, spans in found)
        encode = tokenizer.encode_batch if by_character else tokenizer.encode_batch_fast
        yield batch, found, by_character, encode([text for text, _ in found], add_special_tokens=False)


def _ahead(stream: Iterator[tuple]) -> Iterator[tuple]:
    """`stream`, each item made in a thread while the one before is used: the tokenizer works without Python's lock."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, stream, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, stream, None)
            yield item


def _spaced(stream: Iterable[reading.Sentence | None]) -> Iterator[reading.Sentence | None]:
    """Each sentence but a document's first after a space, as in running text: byte-level tokenizers tell the two apart."""
    first = True
    for item in stream:
        yield item if item is None or first else (f" {item[0]}", tuple((start + 1, end + 1) for start, end in item[1]))
        first = item is None


class _Offsets:
    """Collects where sentences and documents end, and a hash of each document's text.

    A sentence or a document without a token is none."""

    def __init__(self):
        self.sentences, self.num_tokens, self.num_sentences = [np.zeros(1, np.int64)], 0, 0
        self.documents, self.hashes, self.hasher = [0], [], hashlib.blake2b(digest_size=8)

    def append(self, batch: list[reading.Sentence | None], lengths: np.ndarray) -> None:
        """Add sentences and document ends (None); `lengths` int64 holds the tokens of each sentence."""
        counts = self.num_sentences + np.concatenate([[0], np.cumsum(lengths > 0)])  # with a token, up to each sentence
        self.sentences.append(self.num_tokens + np.cumsum(lengths)[lengths > 0])
        self.num_tokens, self.num_sentences = self.num_tokens + int(lengths.sum()), int(counts[-1])
        texts, number = [], 0
        for item in [*batch, ()]:
            if item:
                texts.append(item[0])
                continue
            self.hasher.update("".join("".join(texts).split()).encode())  # the same however sentences are cut
            number, texts = number + len(texts), []
            if item is None:
                if counts[number] > self.documents[-1]:
                    self.documents.append(int(counts[number]))
                    self.hashes.append(int.from_bytes(self.hasher.digest(), "little"))
                self.hasher = hashlib.blake2b(digest_size=8)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"sentences": np.concatenate(self.sentences), "documents": np.array(self.documents, np.int64),
                "hashes": np.array(self.hashes, np.uint64)}


def _write_shard(folder: Path, name: str, shard: Shard, num_unknown: int) -> dict:
    """Write the arrays of a shard and return its entry of `corpus.json`."""
    for array in ARRAYS:
        np.save(folder / f"{name}.{array}.npy", getattr(shard, array), allow_pickle=False)
    return {"name": name, "documents": len(shard.hashes), "sentences": len(shard.sentences) - 1, "tokens": len(shard.ids),
            "unknown_tokens": num_unknown, "words": int((shard.flags & WORD_START > 0).sum()),
            "entities": int((shard.flags & ENTITY_START > 0).sum()), "smallest_hashes": np.unique(shard.hashes)[:2].tolist(),
            "arrays": _seals(folder, name)}


def _seals(folder: Path, name: str) -> dict[str, dict]:
    """Size and hash of each array of a shard, as they are on disk."""
    return {array: _describe_file(folder / f"{name}.{array}.npy") for array in ARRAYS}


def _describe_file(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


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
        replacement = _write_shard(folder, f"{pair[0]['name']}-joined", joined, sum(entry["unknown_tokens"] for entry in pair))
        for entry in pair:  # first: a restart must not take the removed shards for written
            (folder / f"{entry['name'].removesuffix('-joined')}.piece.json").unlink(missing_ok=True)
        for entry in pair:
            for array in ARRAYS:
                (folder / f"{entry['name']}.{array}.npy").unlink()
        entries[first: first + 2] = [replacement]
        position = first
    return entries


def _batches(stream: Iterable[reading.Sentence | None]) -> Iterator[list[reading.Sentence | None]]:
    batch, characters = [], 0
    for item in stream:
        batch.append(item)
        characters += len(item[0]) if item else 0
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
