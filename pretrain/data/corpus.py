"""Corpus on disk: memory-mapped token ids in plain `.npy` shards, written by pretrain/data/preparing.py.

A folder with `corpus.json` (counts, sizes and hashes of the shards, fingerprints of tokenizer and text), `tokenizer/` and,
for each piece of text, five arrays:
    ids         uint16 (uint32 for vocabularies above 65,536)  [tokens]
    flags       uint8   [tokens]         bit 0: the token starts a word; 1: an entity; 2: it goes on with one
    sentences   int64   [sentences + 1]  token offsets
    documents   int64   [documents + 1]  sentence offsets
    hashes      uint64  [documents]      of a document's text: held-out text is chosen by it
Everything is written to a temporary name and renamed, so that a half-written corpus is never read.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from pretrain.command import UserError
from pretrain.data.tokenizer import load
from pretrain.files import sha256_of

FORMAT_VERSION = 2
WORD_START, ENTITY_START, ENTITY_INSIDE = 1, 2, 4  # bits of `flags`
ARRAYS = ("ids", "flags", "sentences", "documents", "hashes")
HASH_RANGE = 2**64
FEW_DOCUMENTS = 4  # two sides of two
OPEN_SHARDS = 4  # that a process keeps mapped


@dataclass(frozen=True)
class Shard:
    """Arrays of one shard as the module's head describes them; memory-mapped, or in memory for a selection."""

    ids: np.ndarray
    flags: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    hashes: np.ndarray

    @property
    def document_tokens(self) -> np.ndarray:
        """int64 [documents]: tokens of each document."""
        return np.diff(self.sentences[self.documents])


@dataclass(frozen=True)
class Part:
    """Which text of a corpus is meant: documents whose hash lies in [low, high); or, with `tail`, of each document the last
    share `tail` of its sentences (`is_tail`) or what comes before."""

    low: int = 0
    high: int = HASH_RANGE
    tail: float = 0.0
    is_tail: bool = False


class Corpus:
    """A corpus folder, opened for reading; `part` restricts it.

    Sizes are checked here, the hash of a shard when a process first opens it. Small enough to pickle: shards are mapped
    lazily in each process."""

    def __init__(self, folder: str | Path, part: Part = Part(), verified: set[int] | None = None):
        self.folder, self.part = Path(folder), part
        self.info = _read_info(self.folder)
        self._open: dict[int, Shard] = {}
        self._verified = set() if verified is None else verified  # shared by the parts of a corpus
        try:
            self._check_sizes()
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self.folder / 'corpus.json'}: is garbled ({type(error).__name__}: {error}); remove the folder and the "
                            "corpus is prepared again") from error

    def _check_sizes(self) -> None:
        for entry in self.info["shards"]:
            for name, array in entry["arrays"].items():
                path = self._path(entry, name)
                size = path.stat().st_size if path.is_file() else None
                if size != array["bytes"]:
                    raise UserError(f"{path}: {'is missing' if size is None else f'has {size} bytes'}, needed are {array['bytes']}; "
                                    f"remove {self.folder} and the corpus is prepared again")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}, "_verified": set()}

    def _path(self, entry: dict, name: str) -> Path:
        return self.folder / f"{entry['name']}.{name}.npy"

    @property
    def num_shards(self) -> int:
        return len(self.info["shards"])

    @property
    def fingerprint(self) -> str:
        return self.info["fingerprint"]

    def shard(self, index: int) -> Shard:
        """Shard `index`, mapped, and verified when this process first reads it."""
        if index not in self._verified:
            entry = self.info["shards"][index]
            for name, array in entry["arrays"].items():
                path = self._path(entry, name)
                if sha256_of(path) != array["sha256"]:
                    raise UserError(f"{path}: its content has changed since it was written; remove {self.folder} and the corpus "
                                    "is prepared again")
            self._verified.add(index)
        return self._map(index)

    def _map(self, index: int) -> Shard:
        """Shard `index`, mapped but not verified: enough to count. The last few stay open."""
        if index not in self._open:
            entry = self.info["shards"][index]
            # As plain arrays over the map: indexing a np.memmap costs 40 us more each time.
            arrays = {name: np.asarray(np.load(self._path(entry, name), mmap_mode="r", allow_pickle=False)) for name in ARRAYS}
            while len(self._open) >= OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            shard = Shard(**arrays)
            self._open[index] = _split_tails(shard, self.part.tail) if self.part.tail else shard
        return self._open[index]

    def documents(self, index: int) -> np.ndarray:
        """int64: the documents of shard `index` that belong to the part."""
        shard, part = self._map(index), self.part
        if part.tail:
            halves = np.arange(int(part.is_tail), len(shard.hashes), 2)
            return halves[shard.document_tokens[halves] > 0]
        if (part.low, part.high) == (0, HASH_RANGE):
            return np.arange(len(shard.hashes))
        return np.flatnonzero((shard.hashes >= np.uint64(part.low)) & (shard.hashes <= np.uint64(part.high - 1)))

    def tokens(self, index: int) -> np.ndarray:
        """The ids of those documents, one after the other; a copy."""
        shard = self.shard(index)
        belongs = np.zeros(len(shard.hashes), bool)
        belongs[self.documents(index)] = True
        return shard.ids[np.repeat(belongs, shard.document_tokens)]

    def count(self, at_most: int | None = None) -> int:
        """Documents in the part; stops counting at `at_most`."""
        found = 0
        for index in range(self.num_shards):
            found += len(self.documents(index))
            if at_most is not None and found >= at_most:
                break
        return found

    def split(self, fraction: float) -> tuple[Corpus, Corpus]:
        """(training, held-out): about `fraction` of the documents are held out, two distinct ones at least.

        Copies of a document share its hash and so stay on one side, whatever the seed and the order of files. Of fewer than
        FEW_DOCUMENTS, which that would use up, the last sentences of each are held out instead."""
        if self.info["documents"] < FEW_DOCUMENTS:
            return self._part(tail=fraction), self._part(tail=fraction, is_tail=True)
        bound = max(int(fraction * HASH_RANGE), *(value + 1 for value in self.info["smallest_hashes"]))
        return self._part(low=bound), self._part(high=bound)

    def _part(self, **bounds: float) -> Corpus:
        return Corpus(self.folder, Part(**bounds), self._verified)

    def select(self, max_tokens: int) -> Shard:
        """The documents of lowest hash, in that order, until they hold `max_tokens`, two at least; as one shard in memory."""
        places = [self.documents(index) for index in range(self.num_shards)]
        hashes, tokens = [], []
        for index, chosen in enumerate(places):
            hashes.append(self._map(index).hashes[chosen])
            tokens.append(self._map(index).document_tokens[chosen])
        order = np.argsort(np.concatenate(hashes), kind="stable")
        before = np.cumsum(np.concatenate(tokens)[order]) - np.concatenate(tokens)[order]
        order = order[:max(2, int(np.searchsorted(before, max_tokens)))]
        owners = np.repeat(np.arange(self.num_shards), [len(chosen) for chosen in places])
        parts: list[Shard | None] = [None] * len(order)
        for rank in np.argsort(order, kind="stable").tolist():  # shard by shard, so that each is opened once
            parts[rank] = _document(self.shard(int(owners[order[rank]])), int(np.concatenate(places)[order[rank]]))
        return concatenate(parts)


def _split_tails(shard: Shard, share: float) -> Shard:
    """The shard with each document as two: its beginning, and the last `share` of its sentences, at least one of several."""
    first, last = shard.documents[:-1], shard.documents[1:]
    cut = last - np.where(last - first > 1, np.maximum(1, np.round((last - first) * share)), 0).astype(np.int64)
    return Shard(shard.ids, shard.flags, shard.sentences, np.append(np.stack([first, cut], 1).ravel(), last[-1]),
                 np.repeat(shard.hashes, 2))


def _document(shard: Shard, place: int) -> Shard:
    first, last = shard.documents[place: place + 2]
    sentences = np.asarray(shard.sentences[first: last + 1])
    tokens = slice(sentences[0], sentences[-1])
    return Shard(np.asarray(shard.ids[tokens]), np.asarray(shard.flags[tokens]), sentences - sentences[0],
                 np.array([0, last - first]), shard.hashes[place: place + 1])


def concatenate(parts: list[Shard]) -> Shard:
    """One shard in memory with the documents of `parts` in order."""
    def offsets(arrays: list[np.ndarray]) -> np.ndarray:
        bases = np.cumsum([0] + [array[-1] for array in arrays])
        return np.concatenate([[0], *(array[1:] + base for array, base in zip(arrays, bases))]).astype(np.int64)

    return Shard(np.concatenate([part.ids for part in parts]), np.concatenate([part.flags for part in parts]),
                 offsets([part.sentences for part in parts]), offsets([part.documents for part in parts]),
                 np.concatenate([part.hashes for part in parts]))


def is_corpus(path: str | Path) -> bool:
    """Whether `path` is the folder of a prepared corpus."""
    return (Path(path) / "corpus.json").is_file()


def open_corpus(folder: str | Path, fingerprint: str, name: str) -> Corpus:
    """Corpus of `folder` that was made with the tokenizer of `fingerprint`; UserError otherwise."""
    corpus = Corpus(folder)
    if corpus.info["tokenizer"] != fingerprint:
        raise UserError(f"{name} {folder}: was prepared with the tokenizer {corpus.info['tokenizer']}, the one in use is {fingerprint}; "
                        f"give --tokenizer {Path(folder) / 'tokenizer'}, or the text itself to prepare it anew")
    return corpus


def _read_info(folder: Path) -> dict:
    path = folder / "corpus.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        complete = all(key in info for key in ("format_version", "shards", "tokenizer", "fingerprint", "smallest_hashes"))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); needed is a folder written by scripts/prepare.py") from error
    if not complete or info["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: is no corpus of format {FORMAT_VERSION}; remove the folder and the corpus is prepared again")
    return info


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a corpus was prepared with."""
    return load(str(Path(folder) / "tokenizer"))
