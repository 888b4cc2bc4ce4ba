"""Handmade vocabulary, shards and plans for the tests of pairs, masks and batches; and files."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import conftest
import numpy as np
import torch

from pretrain.batch import IGNORED, Batch
from pretrain.data.collate import Collator, Examples
from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START, Shard
from pretrain.data.hash_rng import key
from pretrain.data.loader import TrainData
from pretrain.data.pairs import Plan, Task, make_plan
from pretrain.data.sources import Source, check_files
from pretrain.data.tokenizer import Vocabulary

PAIRS = ["random", "swapped", None]
PAD, UNKNOWN, CLS, SEP, MASK = range(5)
SIZE = 60  # of the vocabulary; ids from 40 on are "##" pieces, except 50, a special token
SPECIAL = np.isin(np.arange(SIZE), [PAD, UNKNOWN, CLS, SEP, MASK, 50])
ORDINARY = np.flatnonzero(~SPECIAL).astype(np.uint32)
STARTS_WORD = np.arange(SIZE) < 40
VOCABULARY = Vocabulary(
    SIZE, PAD, CLS, SEP, MASK, UNKNOWN, SPECIAL, STARTS_WORD, ORDINARY, fingerprint="0" * 16
)


def shard_of(documents: list[list[int]], ids=None, flags=None) -> Shard:
    """A shard with documents of sentences of these lengths; without `ids`, token t has id t."""
    lengths = [length for document in documents for length in document]
    sentences = np.cumsum([0, *lengths])
    ids = np.arange(sentences[-1], dtype=np.uint32) if ids is None else np.array(ids, np.uint16)
    if flags is None:
        flags = STARTS_WORD[ids % SIZE] * np.uint8(WORD_START)
    counts = [len(document) for document in documents]
    hashes = np.arange(len(documents), dtype=np.uint64)
    return Shard(ids, flags, sentences, np.cumsum([0, *counts]), hashes)


def random_lengths(documents: int, sentences: int, longest: int, seed: int = 3) -> list[list[int]]:
    source = np.random.default_rng(seed)
    counts = source.integers(1, sentences + 1, documents)
    return [source.integers(1, longest + 1, count).tolist() for count in counts]


def make_shard(documents=80, sentences=40, longest=12, seed=1, specials=True) -> Shard:
    """Random tokens, half of them from a few ids; about a third in entities."""
    source = np.random.default_rng(seed)
    lengths = random_lengths(documents, sentences, longest, seed)
    count = sum(map(sum, lengths))
    kinds = [UNKNOWN, 50, *ORDINARY] if specials else range(5, 50)
    is_any = source.random(count) < 0.5
    ids = np.where(is_any, source.choice(kinds, count), source.choice([5, 6, 40, 41], count))
    flags = STARTS_WORD[ids] * np.uint8(WORD_START)
    return shard_of(lengths, ids, flags | mark_entities(sum(lengths, []), source))


def mark_entities(lengths: list[int], source: np.random.Generator) -> np.ndarray:
    """uint8 flags of entities of 1 to 4 tokens in sentences of `lengths`."""
    flags = np.zeros(sum(lengths), np.uint8)
    for start, end in zip(np.cumsum([0, *lengths]), np.cumsum(lengths)):
        while start < end:
            size = min(int(source.integers(1, 5)), end - start)
            if source.random() < 0.35:
                flags[start : start + size] = ENTITY_INSIDE
                flags[start] = ENTITY_START
            start += size
    return flags


def everything(shard: Shard) -> np.ndarray:
    """All documents of the shard."""
    return np.arange(len(shard.hashes))


def plan_of(shard: Shard, task: Task, epoch: int = 0) -> Plan:
    return make_plan(shard, everything(shard), task, key(task.seed, epoch))


def micro_batches(
    shard: Shard, plan: Plan, collator: Collator, bounds=None, progress=0.0
) -> list[Batch]:
    bounds = bounds or plan.bounds
    return [
        collator(Examples(shard, plan.take(slice(start, end)), progress))
        for start, end in zip(bounds, bounds[1:])
    ]


def contents(batch: Batch) -> dict:
    """Everything in a batch, as lists: batches are equal if their contents are."""
    parts = {**vars(batch), **{f"labels of {name}": part for name, part in batch.labels.items()}}
    del parts["labels"]
    return {
        name: (part.dtype, part.tolist()) if isinstance(part, torch.Tensor) else part
        for name, part in parts.items()
    }


def take_steps(data: TrainData, count: int) -> list[list[dict]]:
    """The contents of the micro-batches of the next steps."""
    return [[contents(batch) for batch in batches] for batches in islice(data, count)]


def pair_labels(batch: Batch) -> torch.Tensor:
    """int64 [sequences]: the labels of the pairs, "nsp" or "sop"."""
    (name,) = batch.labels.keys() - {"mlm"}
    return batch.labels[name]


def example_of(batch: Batch, number: int) -> dict:
    """Sequence `number` of a batch, as lists; masked places count from its [CLS]."""
    start, end = batch.cu_seqlens[number : number + 2].tolist()
    places, labels = batch.masked_positions, batch.labels["mlm"]
    inside = (places >= start) & (places < end) & (labels != IGNORED)
    return {
        "ids": batch.input_ids[start:end].tolist(),
        "types": batch.token_type_ids[start:end].tolist(),
        "positions": batch.position_ids[start:end].tolist(),
        "masked": (places[inside] - start).tolist(),
        "labels": labels[inside].tolist(),
        "pair": pair_labels(batch)[number].item(),
    }


def examples_of(batches: list[Batch]) -> list[dict]:
    return [example_of(batch, number) for batch in batches for number in range(batch.num_sequences)]


def restored(batch: Batch) -> list[int]:
    """The text of a batch, without its masks."""
    real = batch.labels["mlm"] != IGNORED
    places, labels = batch.masked_positions[real], batch.labels["mlm"][real]
    return batch.input_ids.index_copy(0, places, labels).tolist()


def replaced(batch: Batch) -> dict[int, int]:
    """Masked places -> what the model reads there."""
    places = batch.masked_positions[batch.labels["mlm"] != IGNORED]
    return dict(zip(places.tolist(), batch.input_ids[places].tolist()))


def grouped(stream: Iterable) -> list[list]:
    """The documents of a stream of sentences; each must have an end."""
    documents, document = [], []
    for item in stream:
        if item is None:
            documents.append(document)
            document = []
        else:
            document.append(item)
    assert document == [], "a document without an end"
    return documents


def texts(documents: list[list]) -> list[list[str]]:
    """Documents of sentences without their entities."""
    return [[sentence for sentence, _ in document] for document in documents]


def write_documents(path: Path, documents: list[list[str]]) -> list[Source]:
    """The documents in a file, checked."""
    path.parent.mkdir(exist_ok=True)
    return check_files([conftest.write_documents(path, documents)])
