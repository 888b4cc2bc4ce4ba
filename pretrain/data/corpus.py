"""Corpus on disk: memory-mapped token ids in `.npy` shards, written by pretrain/data/prepare.py.

A folder with `corpus.json` (counts, sizes and hashes of all files, fingerprints of tokenizer and
text), `tokenizer/` and, for each piece of text, five arrays:
    ids        uint16 [tokens]         uint32 for vocabularies above 65,536
    flags      uint8  [tokens]         bit 0: starts a word; 1: starts an entity; 2: inside one
    sentences  int64  [sentences + 1]  token offsets
    documents  int64  [documents + 1]  sentence offsets
    hashes     uint64 [documents]      of the text, by which validation documents are chosen
The folder is written under another name and renamed, so a half-written corpus is never read.
Nothing in it is trusted: it may be damaged, or come from someone else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from pretrain.data.tokenizer import MAX_IDS, Vocabulary, load
from pretrain.errors import UserError, refusing
from pretrain.files import key_of, read_json, sha256_of
from pretrain.schema import FILE_NAME, TEXT, Form, integer, misfit

FORMAT_VERSION = 3
WORD_START, ENTITY_START, ENTITY_INSIDE = 1, 2, 4  # bits of `flags`
LAYOUT = {  # type (None: depends on the vocabulary), what is counted, extra items
    "ids": (None, "tokens", 0),
    "flags": (np.uint8, "tokens", 0),
    "sentences": (np.int64, "sentences", 1),
    "documents": (np.int64, "documents", 1),
    "hashes": (np.uint64, "documents", 0),
}
ARRAYS = tuple(LAYOUT)
HASH_RANGE = 2**64
ADVICE = "remove the folder and prepare the corpus again"
FEW_DOCUMENTS = 4  # with fewer, training and validation cannot both have two
OPEN_SHARDS = 4  # kept mapped by a process

# Counted in a shard and in a corpus; the first three are at least 1.
COUNTS = ("documents", "sentences", "tokens", "unknown_tokens", "words", "entities")
_COUNTS = {name: integer(int(name in COUNTS[:3])) for name in COUNTS}
_FILE: dict[str, Form] = {"bytes": integer(), "sha256": TEXT}
_FORM: dict[str, Form] = {
    **_COUNTS,
    "words": integer(1),
    "vocab_size": integer(1, MAX_IDS),
    **dict.fromkeys(("fingerprint", "tokenizer", "words_by"), TEXT),
    "smallest_hashes": [integer(0, HASH_RANGE - 2)],
    "tokenizer_files": [{"name": FILE_NAME, **_FILE}],
    "shards": [{"name": FILE_NAME, "arrays": {name: _FILE for name in ARRAYS}, **_COUNTS}],
}


@dataclass(frozen=True)
class Shard:
    """The arrays of a shard, described at the top of this module; mapped or in memory."""

    ids: np.ndarray
    flags: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    hashes: np.ndarray

    @property
    def document_tokens(self) -> np.ndarray:  # int64 [documents]
        return np.diff(self.sentences[self.documents])


def array_paths(folder: Path, shard: str) -> dict[str, Path]:
    """The file of each array of a shard."""
    return {array: folder / f"{shard}.{array}.npy" for array in ARRAYS}


class Corpus:
    """A corpus folder, open for reading, or a part of it (see `split`).

    The manifest and file sizes are checked here, hashes and content of a shard when a process
    first reads it. A pickled corpus is small: each process maps its own shards."""

    # The part: documents whose hash lies in [low, high). With `tail`, the last `tail` of each
    # document's sentences (if `is_tail`), or the rest.
    low, high, tail, is_tail = 0, HASH_RANGE, 0.0, False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.info = _read_manifest(self.folder)
        self.fingerprint: str = self.info["fingerprint"]
        self.num_shards = len(self.info["shards"])
        self._open: dict[int, Shard] = {}
        self._verified: set[int] = set()  # shared by the parts of a corpus
        files = self._tokenizer_files()
        for index in range(self.num_shards):
            files += self._files(index).values()
        for path, file in files:
            size = path.stat().st_size if path.is_file() else -1
            if size != file["bytes"]:
                found = "is missing" if size < 0 else f"has {size:,} bytes"
                raise UserError(f"{path}: {found}; expected {file['bytes']:,} bytes; {ADVICE}")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}, "_verified": set()}

    def _files(self, index: int) -> dict[str, tuple[Path, dict]]:
        """(path, size and hash) of each array of a shard."""
        entry = self.info["shards"][index]
        paths = array_paths(self.folder, entry["name"])
        return {array: (path, entry["arrays"][array]) for array, path in paths.items()}

    def _tokenizer_files(self) -> list[tuple[Path, dict]]:
        files = self.info["tokenizer_files"]
        return [(self.folder / "tokenizer" / file["name"], file) for file in files]

    def shard(self, index: int) -> Shard:
        """Shard `index`, mapped; verified when this process first reads it."""
        if index not in self._verified:
            files = self._files(index)
            _check_hashes(files.values())
            shard = self._map(index)
            _check_offsets(files["sentences"][0], shard.sentences, len(shard.ids))
            if shard.ids.max() >= self.info["vocab_size"]:
                raise UserError(f"{files['ids'][0]}: an id beyond the vocabulary; {ADVICE}")
            self._verified.add(index)
        return self._map(index)

    def _map(self, index: int) -> Shard:
        """Shard `index`, mapped but not verified, for counting. The last few stay open."""
        if index not in self._open:
            entry, files = self.info["shards"][index], self._files(index)
            id_type = np.uint16 if self.info["vocab_size"] <= 1 << 16 else np.uint32
            arrays = {
                name: _map_array(files[name][0], kind or id_type, entry[counted] + more)
                for name, (kind, counted, more) in LAYOUT.items()
            }
            shard = Shard(**arrays)
            if index not in self._verified:
                _check_offsets(files["documents"][0], shard.documents, len(shard.sentences) - 1)
            if len(self._open) == OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            self._open[index] = _split_tails(shard, self.tail) if self.tail else shard
        return self._open[index]

    def documents(self, index: int) -> np.ndarray:
        """int64: the documents of shard `index` that belong to this part."""
        shard = self._map(index)
        if self.tail:
            halves = np.arange(int(self.is_tail), len(shard.hashes), 2)
            return halves[shard.document_tokens[halves] > 0]
        above = shard.hashes >= np.uint64(self.low)
        return np.flatnonzero(above & (shard.hashes <= np.uint64(self.high - 1)))

    def tokens(self, index: int) -> np.ndarray:
        """The ids of this part's documents in shard `index`, end to end; a copy."""
        shard = self.shard(index)
        belongs = np.isin(np.arange(len(shard.hashes)), self.documents(index))
        return shard.ids[np.repeat(belongs, shard.document_tokens)]

    @property
    def largest(self) -> int:
        """The shard with the most tokens, which stands for the others: the first may be tiny."""
        sizes = [entry["tokens"] for entry in self.info["shards"]]
        return sizes.index(max(sizes))

    def unigram_shares(self, vocab_size: int) -> np.ndarray:
        """float64 [vocab_size]: the share of each token in the largest shard. A token counts once
        more than it occurs, so that none is impossible."""
        counts = 1.0 + np.bincount(self.tokens(self.largest), minlength=vocab_size)
        return counts / counts.sum()

    def count_tokens(self) -> int:
        """Number of tokens in this part."""
        return sum(
            int(self._map(index).document_tokens[self.documents(index)].sum())
            for index in range(self.num_shards)
        )

    def count(self, at_most: int | None = None) -> int:
        """Number of documents in this part; stops counting at `at_most`."""
        found = 0
        for index in range(self.num_shards):
            if at_most is None or found < at_most:
                found += len(self.documents(index))
        return found

    def count_shared(self, other: Corpus) -> int:
        """Number of documents of this part whose text is also in `other`, by hash."""
        shards = range(self.num_shards)
        own = np.concatenate([self._map(n).hashes[self.documents(n)] for n in shards])
        is_shared = np.zeros(len(own), bool)
        for index in range(other.num_shards):
            is_shared |= np.isin(own, other._map(index).hashes)
        return int(is_shared.sum())

    def split(self, fraction: float) -> tuple[Corpus, Corpus]:
        """(training, validation): validation gets about `fraction` of the documents, at least two.

        Copies of a document share a hash, so they stay on one side, whatever the seed or file
        order. With fewer than FEW_DOCUMENTS, validation gets the last sentences of each."""
        if self.info["documents"] < FEW_DOCUMENTS:
            return self._part(tail=fraction), self._part(tail=fraction, is_tail=True)
        least = [value + 1 for value in self.info["smallest_hashes"]]
        bound = max([int(fraction * HASH_RANGE), *least])
        return self._part(low=bound), self._part(high=bound)

    def _part(self, **bounds: float) -> Corpus:
        part = copy.copy(self)  # opens its own shards
        vars(part).update(bounds, _verified=self._verified)
        return part

    def select(self, max_tokens: int) -> Shard:
        """The documents of lowest hash, up to `max_tokens` but at least two, in memory."""
        columns = []  # per document: hash, tokens, place, shard
        for index in range(self.num_shards):
            shard, places = self._map(index), self.documents(index)
            owners = np.full(len(places), index)
            columns.append((shard.hashes[places], shard.document_tokens[places], places, owners))
        hashes, tokens, places, owners = map(np.concatenate, zip(*columns))
        order = np.argsort(hashes, kind="stable")
        before = np.cumsum(tokens[order]) - tokens[order]
        order = order[: max(2, int(np.searchsorted(before, max_tokens)))]
        parts: dict[int, Shard] = {}
        for rank in np.argsort(owners[order], kind="stable").tolist():  # opens each shard once
            document = order[rank]
            parts[rank] = _document(self.shard(int(owners[document])), int(places[document]))
        return concatenate([parts[rank] for rank in range(len(order))])


def _check_hashes(files: Iterable[tuple[Path, dict]]) -> None:
    for path, file in files:
        if sha256_of(path) != file["sha256"]:
            raise UserError(f"{path}: has changed since it was written; {ADVICE}")


def _check_offsets(path: Path, offsets: np.ndarray, end: int) -> None:
    if offsets[0] != 0 or offsets[-1] != end or not (offsets[1:] > offsets[:-1]).all():
        raise UserError(f"{path}: offsets do not rise from 0 to {end}; {ADVICE}")


def _map_array(path: Path, kind: type, length: int) -> np.ndarray:
    expected = f"expected {length:,} numbers of type {kind.__name__}; {ADVICE}"
    with refusing(f"{path}: cannot be read", expected):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.memmap) or (array.dtype, array.shape) != (kind, (length,)):
        raise UserError(f"{path}: another type or length; {expected}")
    return np.asarray(array)  # indexing an np.memmap costs 40 us more each time


def _split_tails(shard: Shard, share: float) -> Shard:
    """Each document as two: its beginning and its last sentences (none of a single sentence)."""
    first, last = shard.documents[:-1], shard.documents[1:]
    tails = np.maximum(1, np.round((last - first) * share)).astype(np.int64)
    cut = last - np.where(last - first > 1, tails, 0)
    documents = np.append(np.stack([first, cut], 1).ravel(), last[-1])
    return replace(shard, documents=documents, hashes=np.repeat(shard.hashes, 2))


def _document(shard: Shard, place: int) -> Shard:
    first, last = shard.documents[place : place + 2]
    sentences = shard.sentences[first : last + 1]
    tokens = slice(sentences[0], sentences[-1])
    columns = (shard.ids[tokens], shard.flags[tokens], sentences - sentences[0])
    return Shard(*columns, np.array([0, last - first]), shard.hashes[place : place + 1])


def concatenate(parts: list[Shard]) -> Shard:
    """One shard in memory with the documents of `parts` in order."""
    arrays = {name: [getattr(part, name) for part in parts] for name in ARRAYS}
    for name in ("sentences", "documents"):
        bases = np.cumsum([0] + [offsets[-1] for offsets in arrays[name]])
        moved = [offsets[1:] + base for offsets, base in zip(arrays[name], bases)]
        arrays[name] = [np.zeros(1, np.int64), *moved]
    return Shard(**{name: np.concatenate(values) for name, values in arrays.items()})


def is_corpus(path: str | Path) -> bool:
    """Whether `path` is a corpus folder; UserError if only its manifest is missing."""
    manifest = Path(path) / "corpus.json"
    if not manifest.is_file() and any(manifest.parent.glob("shard-*.ids.npy")):
        raise UserError(f"{manifest}: missing, but there are shards of a corpus; {ADVICE}")
    return manifest.is_file()


def damage_of(folder: Path) -> str | None:
    """What is damaged in the corpus `folder`, found from its manifest and one shard; None if
    nothing is, or if there is no corpus."""
    try:
        if is_corpus(folder):
            Corpus(folder).shard(0)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # unreadable for now, not damaged
            raise
        return str(error).removesuffix(f"; {ADVICE}")
    return None


def open_corpus(folder: str | Path, vocabulary: Vocabulary) -> Corpus:
    """The corpus in `folder`; UserError unless it was prepared with this tokenizer."""
    corpus = Corpus(folder)
    own = f"{corpus.info['tokenizer']} ({corpus.info['vocab_size']:,} ids)"
    given = f"{vocabulary.fingerprint} ({vocabulary.size:,} ids)"
    if own != given:
        expected = f"expected the tokenizer in {corpus.folder / 'tokenizer'}, or the text itself"
        raise UserError(f"{folder}: prepared with the tokenizer {own}, not {given}; {expected}")
    return corpus


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a corpus was prepared with, verified."""
    corpus = Corpus(folder)
    _check_hashes(corpus._tokenizer_files())
    return load(str(corpus.folder / "tokenizer"))


def seal(info: dict) -> dict:
    """The manifest `info` with a checksum of its content."""
    content = {key: value for key, value in info.items() if key != "checksum"}
    return content | {"checksum": key_of(content)}


def _read_manifest(folder: Path) -> dict:
    path = folder / "corpus.json"
    info = read_json(path, expected=f"a prepared corpus; {ADVICE}")
    if info.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a corpus of format {FORMAT_VERSION}; {ADVICE}")
    with refusing(f"{path}: cannot be read", ADVICE):
        is_sealed = info == seal(info)
    problem = misfit(info, _FORM) if is_sealed else "its checksum does not match its content"
    if not problem:
        for name in COUNTS:
            if info[name] != sum(entry[name] for entry in info["shards"]):
                problem = f"{name} is not the sum over the shards"
    if problem:
        raise UserError(f"{path}: {problem}; {ADVICE}")
    return info
