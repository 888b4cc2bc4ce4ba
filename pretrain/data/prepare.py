"""Pieces of text -> shards of a corpus, in constant memory; an interrupted preparation resumes.

One piece makes one shard, whichever process prepares it. The manifest is written last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pretrain.data import corpus as corpora
from pretrain.data import parallel
from pretrain.data.annotate import Markup, mark
from pretrain.data.corpus import ENTITY_START, WORD_START, Corpus, Shard, array_paths, is_corpus
from pretrain.data.sentences import PIECE_BYTES, Span, Stream, cut_into_pieces, in_groups, sentences
from pretrain.data.sources import Source, content_key
from pretrain.data.tokenizer import Vocabulary, describe, encode_together, without_limits
from pretrain.errors import UserError
from pretrain.files import exclusive, sha256_of, sums_of, sync, write_json

BATCH_CHARACTERS = 1 << 20  # of text in a call of the tokenizer


@dataclass(frozen=True)
class _Job:
    """What determines the shard of a piece, and where it is written."""

    folder: Path
    text_format: str
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    markup: Markup


def prepare(
    sources: list[Source],
    text_format: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    piece_bytes: int = PIECE_BYTES,
    markup: Markup = Markup(),
    workers: int | None = None,
    on_cluster: bool = False,
    replace_damaged: bool = False,
) -> Corpus:
    """Write the corpus of `sources` into `folder`, or open it if it exists. Resumes by piece.

    `workers` processes share the pieces (0 or 1: this one; None: chosen by cores and size), or the
    connected Ray cluster does. UserError if the text has no token, or if the corpus is damaged and
    `replace_damaged` is not set."""
    if not (replace_damaged and corpora.damage_of(folder)) and is_corpus(folder):
        return Corpus(folder)
    vocabulary = describe(tokenizer)
    # Absolute: processes on a cluster have other working folders.
    partial = folder.absolute().with_name(f"{folder.name}.partial")
    with exclusive(partial):
        damage = corpora.damage_of(folder) if replace_damaged else None
        if damage:
            print(f"{damage}; preparing the corpus again")
        elif is_corpus(folder):  # another process wrote it while this one waited
            if not replace_damaged:  # its name says nothing about its content
                raise UserError(f"{folder}: another process wrote it; expected another name")
            return Corpus(folder)
        roles = tokenizer.special_tokens_map
        settings = [vocabulary.fingerprint, piece_bytes, corpora.FORMAT_VERSION, markup.key, roles]
        _start_folder(partial, content_key(sources, text_format, *settings))
        files = [Path(source.path) for source in sources]
        pieces = cut_into_pieces(files, text_format, piece_bytes)
        # A fresh copy: once a markup has matched terms, it cannot be pickled.
        engine = without_limits(tokenizer)
        job = _Job(partial, text_format, engine, vocabulary, replace(markup))
        entries = _write_pieces(job, pieces, workers, on_cluster)
        entries = _join_small(job, [entry for entry in entries if entry["documents"]])
        if not entries:
            problem = f"{sources[0].path}: the tokenizer finds no token in this text"
            raise UserError(f"{problem}; expected text in a script that it knows")
        _check_unchanged(sources, partial)
        tokenizer.save_pretrained(partial / "tokenizer")
        _write_manifest(job, sources, entries)
        _finish_folder(partial, folder, entries)
    return Corpus(folder)


def _write_manifest(job: _Job, sources: list[Source], entries: list[dict]) -> None:
    smallest = {value for entry in entries for value in entry.pop("smallest_hashes")}
    hashes = [[array["sha256"] for array in entry["arrays"].values()] for entry in entries]
    tokenizer_files = sums_of(job.folder / "tokenizer").items()
    manifest = {
        "format_version": corpora.FORMAT_VERSION,
        **{name: sum(entry[name] for entry in entries) for name in corpora.COUNTS},
        "fingerprint": hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16],
        "tokenizer": job.vocabulary.fingerprint,
        "vocab_size": job.vocabulary.size,
        "smallest_hashes": sorted(smallest)[:2],
        "shards": entries,
        "tokenizer_files": [{"name": name, **sums} for name, sums in tokenizer_files],
        "text_format": job.text_format,
        "words_by": job.markup.words,
        "sources": [vars(source) for source in sources],
    }
    write_json(job.folder / "corpus.json", corpora.seal(manifest))


def _check_unchanged(sources: list[Source], partial: Path) -> None:
    """UserError if a file was edited since it was checked. Its pieces are then of no use."""
    for source in sources:
        status = os.stat(source.path)
        if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
            (partial / "content.key").unlink(missing_ok=True)
            problem = "changed while it was being prepared"
            raise UserError(f"{source.path}: {problem}; run the same command again")


def _start_folder(folder: Path, key: str) -> None:
    """Create the folder; remove what an interrupted preparation of other text left there."""
    folder.mkdir(exist_ok=True)
    label = folder / "content.key"
    if not label.is_file() or label.read_text(encoding="utf-8") != key:
        for leftover in sorted(folder.iterdir()):  # content.key before the pieces
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        label.write_text(key, encoding="utf-8")


def _finish_folder(partial: Path, folder: Path, entries: list[dict]) -> None:
    """Rename the corpus, after a sync: a power failure leaves it complete or absent."""
    kept = {partial / "corpus.json"}
    for entry in entries:
        kept.update(array_paths(partial, entry["name"]).values())
    for path in partial.rglob("*"):  # takes long; if it is interrupted, finished pieces are kept
        sync(path)
    for path in partial.iterdir():  # joined shards, piece notes, and leftovers of interruptions
        if path.is_file() and path not in kept:
            path.unlink()
    sync(partial)
    if folder.exists():  # without manifest and shards: a removal was interrupted
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.absolute().parent)


def _write_pieces(
    job: _Job, pieces: list[list[Span]], workers: int | None, on_cluster: bool
) -> list[dict]:
    sizes = [sum(span.end - span.start for span in piece) for piece in pieces]
    tasks = [(f"shard-{number:05d}", piece) for number, piece in enumerate(pieces)]
    # A single process tokenizes on all cores: for less than two full pieces it is as fast.
    workers = parallel.choose_workers(workers, sizes, PIECE_BYTES)
    entries: list[dict] = [{}] * len(pieces)
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="preparing", disable=None) as bar:
        if on_cluster:
            results = parallel.on_cluster(_write_piece, job, tasks)
        elif workers > 1:
            results = parallel.in_processes(_write_piece, job, tasks, workers)
        else:
            results = ((n, _write_piece(job, *task, bar.update)) for n, task in enumerate(tasks))
        finished = 0
        with closing(results):  # otherwise workers would outlive an interruption
            for number, entry in results:
                entries[number] = entry
                finished += sizes[number]
                bar.update(finished - bar.n)
    return entries


def _write_piece(
    job: _Job, name: str, piece: list[Span], advance: Callable[[int], object] = int
) -> dict:
    """Write the shard of a piece, unless it is complete; returns its entry in `corpus.json`.

    `advance` gets the number of bytes done."""
    note = job.folder / f"{name}.piece.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # absent, or torn by a power failure
        entry = json.loads(note.read_text(encoding="utf-8"))
        if entry["arrays"] == _describe_arrays(job.folder, name):
            return entry
    entry = _write_shard(job, name, _make_shard(job, piece, advance))
    write_json(note, entry)
    return entry


def _make_shard(job: _Job, piece: list[Span], advance: Callable[[int], object]) -> Shard:
    """The shard of a piece, without sentences and documents that have no token."""
    vocabulary, num_sentences = job.vocabulary, 0
    id_type = np.uint16 if vocabulary.size <= 1 << 16 else np.uint32
    parts = [(np.zeros(0, id_type), np.zeros(0, np.uint8), np.zeros(0, np.int64))]
    ends, hashes, hasher = [0], [], hashlib.blake2b(digest_size=8)  # of the open document
    for batch, marked, by_character, encodings in _ahead(_encode(job, piece)):
        pieces = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        ids = np.fromiter(chain.from_iterable(pieces), id_type, int(lengths.sum()))
        starts_word = None if vocabulary.starts_word is None else vocabulary.starts_word[ids]
        if by_character:
            flags = mark(marked, encodings, starts_word, job.markup.words)
        else:
            assert starts_word is not None, "such a tokenizer is read by character"
            flags = starts_word.astype(np.uint8) * WORD_START
        parts.append((ids, flags, lengths))
        for item in batch:
            if item is None:
                ends.append(num_sentences)
                hashes.append(int.from_bytes(hasher.digest(), "little"))
                hasher = hashlib.blake2b(digest_size=8)
            else:  # without white space: the same however sentences are split
                num_sentences += 1
                hasher.update("".join(item[0].split()).encode())
        advance(len("\n".join(text for text, _ in marked).encode()))
    ids, flags, lengths = map(np.concatenate, zip(*parts))
    sentences = np.append(0, np.cumsum(lengths)[lengths > 0])
    filled = np.append(0, np.cumsum(lengths > 0))  # number of sentences with a token so far
    # A document without a token ends where the one before it does, so np.unique drops it.
    documents, places = np.unique(filled[ends], return_index=True)
    return Shard(ids, flags, sentences, documents, np.array(hashes, np.uint64)[places[1:] - 1])


def _encode(job: _Job, piece: list[Span]) -> Iterator[tuple]:
    """(batch, its sentences with entities, whether characters matter, encodings).

    A batch is a list of sentences, with None where a document ends."""
    tokenizer, vocabulary, markup = job.tokenizer, job.vocabulary, job.markup
    stream = sentences(piece, job.text_format, markup.cut)
    stream = _spaced(stream) if vocabulary.needs_space else stream
    for batch in in_groups(stream, lambda item: len(item[0]) if item else 0, BATCH_CHARACTERS):
        marked = [item for item in batch if item is not None]
        if markup.lexicon:
            marked = [(text, markup.find(text, spans)) for text, spans in marked]
        # If characters do not matter, the encoder does not track offsets, which is a third faster.
        has_words = vocabulary.starts_word is not None and markup.words == "tokenizer"
        by_character = not has_words or any(spans for _, spans in marked)
        texts = [text for text, _ in marked]
        encodings = encode_together(tokenizer, texts, by_character, add_special_tokens=False)
        yield batch, marked, by_character, list(encodings)


def _ahead(stream: Iterator[tuple]) -> Iterator[tuple]:
    """Make the next item in a thread; the tokenizer releases the GIL."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, stream, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, stream, None)
            yield item


def _spaced(stream: Stream) -> Stream:
    """Put a space before all but the first sentence of a document: byte-level tokens include it."""
    is_first = True
    for item in stream:
        if item is not None and not is_first:
            text, spans = item
            item = f" {text}", tuple((start + 1, end + 1) for start, end in spans)
        yield item
        is_first = item is None


def _write_shard(job: _Job, name: str, shard: Shard) -> dict:
    """Write a shard; returns its entry in `corpus.json`."""
    for array, path in array_paths(job.folder, name).items():
        np.save(path, getattr(shard, array), allow_pickle=False)
    return {
        "name": name,
        "documents": len(shard.hashes),
        "sentences": len(shard.sentences) - 1,
        "tokens": len(shard.ids),
        "unknown_tokens": int((shard.ids == job.vocabulary.unknown_id).sum()),
        "words": int((shard.flags & WORD_START > 0).sum()),
        "entities": int((shard.flags & ENTITY_START > 0).sum()),
        "smallest_hashes": np.unique(shard.hashes)[:2].tolist(),
        "arrays": _describe_arrays(job.folder, name),
    }


def _describe_arrays(folder: Path, name: str) -> dict[str, dict]:
    return {
        array: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for array, path in array_paths(folder, name).items()
    }


def _join_small(job: _Job, entries: list[dict]) -> list[dict]:
    """Join each shard of one document to a neighbor: random pairs need a second document."""

    def is_small(group: list[dict]) -> bool:
        return sum(entry["documents"] for entry in group) < 2

    groups: list[list[dict]] = []
    for entry in entries:
        if groups and is_small(groups[-1]):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    if len(groups) > 1 and is_small(groups[-1]):
        last = groups.pop()
        groups[-1] += last
    return [group[0] if len(group) == 1 else _join(job, group) for group in groups]


def _join(job: _Job, group: list[dict]) -> dict:
    paths = [array_paths(job.folder, entry["name"]).values() for entry in group]
    shards = [Shard(*map(np.load, arrays)) for arrays in paths]
    return _write_shard(job, f"{group[0]['name']}-joined", corpora.concatenate(shards))
