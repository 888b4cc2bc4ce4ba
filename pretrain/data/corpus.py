"""Corpus on disk: memory-mapped token ids in plain `.npy` shards, written by pretrain/data/preparing.py.

A folder with `corpus.json` (counts, sizes and hashes of all files, fingerprints of tokenizer and text), `tokenizer/` and,
for each piece of text, five arrays:
    ids         uint16 (uint32 for vocabularies above 65,536)  [tokens]
    flags       uint8   [tokens]         bit 0: the token starts a word; 1: an entity; 2: it goes on with one
    sentences   int64   [sentences + 1]  token offsets
    documents   int64   [documents + 1]  sentence offsets
    hashes      uint64  [documents]      of a document's text: held-out text is chosen by it
Everything is written to a temporary name and renamed, so that a half-written corpus is never read. Nothing in it is trusted: it may be
damaged, or made by somebody else.
"""
from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from pretrain.command import UserError, refusing
from pretrain.data.tokenizer import Vocabulary, load
from pretrain.files import FILE_NAME, TEXT, integer, key_of, misfit, read_json, sha256_of

FORMAT_VERSION = 3
WORD_START, ENTITY_START, ENTITY_INSIDE = 1, 2, 4  # bits of `flags`
LAYOUT = {"ids": (None, "tokens", 0), "flags": (np.uint8, "tokens", 0), "sentences": (np.int64, "sentences", 1),
          "documents": (np.int64, "documents", 1), "hashes": (np.uint64, "documents", 0)}  # type, what is counted, and one more
ARRAYS = tuple(LAYOUT)
COUNTS = ("documents", "sentences", "tokens", "unknown_tokens", "words", "entities")  # of a shard, and of a corpus
HASH_RANGE = 2**64
AGAIN = "remove the folder and the corpus is prepared again"
FEW_DOCUMENTS = 4  # two sides of two
OPEN_SHARDS = 4  # that a process keeps mapped

_FILE = {"bytes": integer(0, 2**63), "sha256": TEXT}
_COUNTS = {name: integer(int(COUNTS.index(name) < 3), 2**63) for name in COUNTS}
_FORM = _COUNTS | {"words": integer(1, 2**63), "vocab_size": integer(1, 1 << 24), "fingerprint": TEXT, "tokenizer": TEXT, "words_by": TEXT,
                   "smallest_hashes": [integer(0, HASH_RANGE - 2)], "tokenizer_files": [_FILE | {"name": FILE_NAME}],
                   "shards": [_COUNTS | {"name": FILE_NAME, "arrays": dict.fromkeys(ARRAYS, _FILE)}]}


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

    The manifest and all sizes are checked here, a shard's hashes and content when a process first opens it. Small enough to pickle:
    shards are mapped lazily in each process."""

    def __init__(self, folder: str | Path, part: Part = Part()):
        self.folder, self.part = Path(folder), part
        self.info = _read_info(self.folder)
        self._open: dict[int, Shard] = {}
        self._verified: set[int] = set()  # shared by the parts of a corpus
        for path, file in [*self.tokenizer_files, *(item for index in range(self.num_shards) for item in self._files(index).values())]:
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                raise UserError(f"{path}: {'is missing' if size is None else f'has {size} bytes'}, needed are {file['bytes']}; "
                                f"remove {self.folder} and the corpus is prepared again")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}, "_verified": set()}

    def _files(self, index: int) -> dict[str, tuple[Path, dict]]:
        entry = self.info["shards"][index]
        return {name: (self.folder / f"{entry['name']}.{name}.npy", entry["arrays"][name]) for name in ARRAYS}

    @property
    def tokenizer_files(self) -> list[tuple[Path, dict]]:
        return [(self.folder / "tokenizer" / file["name"], file) for file in self.info["tokenizer_files"]]

    def check_hashes(self, files: Iterable[tuple[Path, dict]]) -> None:
        """UserError where one of `files` is not as it was written."""
        for path, file in files:
            if sha256_of(path) != file["sha256"]:
                raise UserError(f"{path}: its content has changed since it was written; remove {self.folder} and the corpus is "
                                "prepared again")

    @property
    def num_shards(self) -> int:
        return len(self.info["shards"])

    @property
    def fingerprint(self) -> str:
        return self.info["fingerprint"]

    def shard(self, index: int) -> Shard:
        """Shard `index`, mapped, and verified when this process first reads it."""
        if index not in self._verified:
            files = self._files(index)
            self.check_hashes(files.values())
            shard = self._map(index)
            _check_offsets(files["sentences"][0], shard.sentences, len(shard.ids))
            if (highest := shard.ids.max()) >= self.info["vocab_size"]:
                raise UserError(f"{files['ids'][0]}: holds the id {highest}, the vocabulary has {self.info['vocab_size']} ids; {AGAIN}")
            self._verified.add(index)
        return self._map(index)

    def _map(self, index: int) -> Shard:
        """Shard `index`, mapped but not verified: enough to count. The last few stay open."""
        if index not in self._open:
            entry, files, arrays = self.info["shards"][index], self._files(index), {}
            for name, (kind, of, more) in LAYOUT.items():
                path, kind = files[name][0], kind or (np.uint16 if self.info["vocab_size"] <= 1 << 16 else np.uint32)
                with refusing(f"{path}: is no array of numbers", AGAIN):
                    array = np.load(path, mmap_mode="r", allow_pickle=False)
                if not isinstance(array, np.memmap) or (array.dtype, array.shape) != (kind, (entry[of] + more,)):
                    raise UserError(f"{path}: holds no {entry[of] + more:,} numbers of type {kind.__name__}, as corpus.json says; {AGAIN}")
                arrays[name] = np.asarray(array)  # a plain array over the map: indexing a np.memmap costs 40 us more each time
            while len(self._open) >= OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            shard = Shard(**arrays)
            if index not in self._verified:
                _check_offsets(files["documents"][0], shard.documents, len(shard.sentences) - 1)
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
        bound = max([int(fraction * HASH_RANGE), *(value + 1 for value in self.info["smallest_hashes"])])
        return self._part(low=bound), self._part(high=bound)

    def _part(self, **bounds: float) -> Corpus:
        part = copy.copy(self)  # opens its shards itself
        part.part, part._verified = Part(**bounds), self._verified
        return part

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


def _check_offsets(path: Path, offsets: np.ndarray, end: int) -> None:
    if offsets[0] != 0 or offsets[-1] != end or not (offsets[1:] > offsets[:-1]).all():
        raise UserError(f"{path}: its offsets do not rise from 0 to {end}; {AGAIN}")


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
    """Whether `path` is the folder of a prepared corpus; UserError where it has been one."""
    manifest = Path(path) / "corpus.json"
    if not manifest.is_file() and any(manifest.parent.glob("shard-*.ids.npy")):
        raise UserError(f"{manifest}: is missing, beside shards of a corpus; {AGAIN}")
    return manifest.is_file()


def open_corpus(folder: str | Path, vocabulary: Vocabulary, name: str) -> Corpus:
    """Corpus of `folder` that was made with the tokenizer of `vocabulary`; UserError otherwise."""
    corpus = Corpus(folder)
    made, used = ((corpus.info["tokenizer"], corpus.info["vocab_size"]), (vocabulary.fingerprint, vocabulary.size))
    if made != used:
        raise UserError(f"{name} {folder}: was prepared with the tokenizer {made[0]} ({made[1]:,} ids), the one in use is {used[0]} "
                        f"({used[1]:,} ids); give --tokenizer {Path(folder) / 'tokenizer'}, or the text itself to prepare it anew")
    return corpus


def seal(info: dict) -> dict:
    """The manifest `info` with a checksum of its content."""
    content = {key: value for key, value in info.items() if key != "checksum"}
    return {**content, "checksum": key_of(content)}


def _read_info(folder: Path) -> dict:
    path = folder / "corpus.json"
    info = read_json(path, {}, f"a folder written by scripts/prepare.py; {AGAIN}")
    if info.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: is no corpus of format {FORMAT_VERSION}; {AGAIN}")
    with refusing(f"{path}: cannot be read", AGAIN):
        is_sealed = info == seal(info)
    problem = misfit(info, _FORM) if is_sealed else "its checksum does not fit its content"
    if not problem and any(info[name] != sum(entry[name] for entry in info["shards"]) for name in COUNTS):
        problem = "its counts are not those of its shards"
    if problem:
        raise UserError(f"{path}: {problem}; {AGAIN}")
    return info


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a corpus was prepared with, verified."""
    corpus = Corpus(folder)
    corpus.check_hashes(corpus.tokenizer_files)
    return load(str(corpus.folder / "tokenizer"))
