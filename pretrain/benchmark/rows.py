"""What the peer trains on: the very pairs of a run, without masks, or the blocks that run_mlm.py cuts the same text into."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from pretrain.benchmark.peer import Rows
from pretrain.data.collate import pack
from pretrain.data.dataset import DataPosition


def same_examples(run, number: int) -> Rows:
    """The first `number` examples of the run, in order."""
    vocabulary, has_labels = run.collator.vocabulary, "nsp" in run.model.loss_weights
    packs, labels, found = [], [], 0
    for position in run.dataset.positions(DataPosition(0, 0, 0)):
        examples = run.dataset.__getitems__([position])
        packs.append(pack(examples, vocabulary))
        labels.append(examples.plan.label)
        found += len(examples.plan.label)
        if found >= number:
            break
    ids, types = (
        np.concatenate([getattr(packed, name) for packed in packs])
        for name in ("ids", "token_type_ids")
    )
    offsets = np.concatenate(
        [[0], np.cumsum(np.concatenate([packed.lengths for packed in packs]))]
    )[: number + 1]
    return Rows(
        ids,
        types,
        vocabulary.is_special[ids],
        offsets,
        np.concatenate(labels)[:number] if has_labels else None,
    )


def blocks(run, number: int) -> Rows:
    """Documents, each between [CLS] and [SEP], laid end to end and cut into `number` blocks of max_length: nothing is padding."""
    width, vocabulary = run.dataset.task.max_length, run.collator.vocabulary
    documents, parts, found = _documents(run.dataset.source), [], 0
    while found < number * width:
        ids = next(documents)
        parts += [[vocabulary.cls_id], ids, [vocabulary.sep_id]]
        found += len(ids) + 2
    stream = np.concatenate(parts)[: number * width].astype(np.int64)
    return Rows(
        stream,
        np.zeros_like(stream),
        vocabulary.is_special[stream],
        np.arange(number + 1) * width,
        None,
    )


def _documents(corpus) -> Iterator[np.ndarray]:
    """Token ids of each document of the corpus, again and again."""
    for index in (number % corpus.num_shards for number in count()):
        shard = corpus.shard(index)
        for document in corpus.documents(index):
            first, last = shard.sentences[shard.documents[[document, document + 1]]]
            yield shard.ids[first:last]
