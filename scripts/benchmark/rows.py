"""Training rows of the peer: the same pairs as a run, before masking, or blocks as in run_mlm.py.

A row holds lists of numbers, as in a tokenized data set."""

from collections.abc import Iterator
from itertools import count

import numpy as np

from pretrain.data.collate import pack
from pretrain.data.corpus import Corpus
from pretrain.data.loader import DataPosition
from pretrain.data.tokenizer import Vocabulary


def _row(ids: np.ndarray, token_types: np.ndarray, vocabulary: Vocabulary) -> dict:
    return {
        "input_ids": ids.tolist(),
        "token_type_ids": token_types.tolist(),
        "special_tokens_mask": vocabulary.is_special[ids].tolist(),
    }


def same_examples(run, number: int | None = None) -> list[dict]:
    """The first `number` examples of the run, in order (None: those of one epoch)."""
    dataset = run.phases[0].dataset
    vocabulary = run.phases[0].collator.vocabulary
    rows = []
    for position in dataset.positions(DataPosition(0, 0, 0), end_epoch=None if number else 1):
        examples = dataset[position]
        packed = pack(examples, vocabulary)
        ends = np.cumsum(packed.lengths)[:-1]
        sequences = zip(np.split(packed.ids, ends), np.split(packed.token_type_ids, ends))
        for (ids, token_types), label in zip(sequences, examples.plan.label.tolist()):
            labels = {"next_sentence_label": label} if dataset.task.pairs else {}
            rows.append(_row(ids, token_types, vocabulary) | labels)
        if number and len(rows) >= number:
            break
    return rows[:number]


def blocks(run, number: int) -> list[dict]:
    """Documents, each between [CLS] and [SEP], end to end and cut into `number` blocks of
    max_length, without padding."""
    width, vocabulary = run.phases[0].max_length, run.phases[0].collator.vocabulary
    documents, parts, num_tokens = _documents(run.phases[0].dataset.source), [], 0
    while num_tokens < number * width:
        parts += [[vocabulary.cls_id], next(documents), [vocabulary.sep_id]]
        num_tokens += len(parts[-2]) + 2
    ids = np.concatenate(parts)[: number * width].astype(np.int64)
    token_types = np.zeros(width, np.int64)
    return [_row(block, token_types, vocabulary) for block in ids.reshape(number, width)]


def _documents(corpus: Corpus) -> Iterator[np.ndarray]:
    """Token ids of each document of the corpus, endlessly."""
    for number in count():
        index = number % corpus.num_shards
        shard = corpus.shard(index)
        for document in corpus.documents(index):
            first, last = shard.sentences[shard.documents[[document, document + 1]]]
            yield shard.ids[first:last]
