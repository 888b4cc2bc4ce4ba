"""Texts of any length -> overlapping windows of tokens that a model can read.

Only the first token of a word has a tag (Devlin et al. 2019, section 5.3). Each window with that
token trains it; the window where it has the most context predicts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pretrain.batch import IGNORED, Batch
from pretrain.data.tokenizer import encode_together, is_unspaced, without_limits
from pretrain.finetune.dataset import EncodedRows, LabeledRows, arrays_of, is_known, pack
from pretrain.finetune.entities import Entities, tag_words

OVERLAP = 4  # windows share a quarter of their tokens


@dataclass(frozen=True)
class TaggedText:
    """A text, its words as the tokenizer sees them, and their tags."""

    text: str
    words: np.ndarray  # int64 [words, 2]: the first character of each and the end
    tags: np.ndarray  # int64 [words]; IGNORED if unknown
    entities: Entities | None  # as given, whatever the words; None: unknown


class TaggedDataset(EncodedRows):
    """Rows as windows of token ids; an example is a window.

    `labels`: a TaggedText for each row. `is_predicted`: bool [first tokens in all windows], True
    once for each word, in the order of the words of all rows."""

    def __init__(self, rows: LabeledRows, tokenizer: PreTrainedTokenizerBase):
        super().__init__(rows, tokenizer)
        backend = without_limits(tokenizer)
        room = self.max_length - backend.num_special_tokens_to_add(False)
        texts = [text for text, *_ in rows.texts]
        self.labels: list[TaggedText] = []
        self.num_snapped = 0
        is_predicted = []
        encodings = encode_together(backend, texts, with_offsets=True)
        for text, entities, encoding in zip(texts, rows.labels, encodings):
            is_special = encoding.special_tokens_mask
            before = is_special.index(0) if 0 in is_special else 0
            after = before + is_special.count(0)
            offsets, numbers = encoding.offsets[before:after], encoding.word_ids[before:after]
            words, first = find_words(text, offsets, numbers)
            tags = np.full(len(words), IGNORED)
            if entities is not None:
                tags, num_snapped = tag_words(entities, words, rows.classes)
                self.num_snapped += num_snapped
            self.labels.append(TaggedText(text, words, tags, entities))
            windows = cut_into_windows(len(offsets), room)
            self.num_cut += len(windows) > 1
            ids, types = arrays_of(encoding)
            for start, end, low, high in windows:
                kept = np.r_[:before, before + start : before + end, after : len(ids)]
                inside = slice(*np.searchsorted(first, (start, end)))
                places = first[inside]
                where = before - start + places
                self.examples.append((ids[kept], types[kept], where, tags[inside]))
                is_predicted.append((low <= places) & (places < high))
        self.is_predicted = np.concatenate(is_predicted)

    def pack(self, windows: Sequence[tuple]) -> Batch:
        """`windows` hold ids, types, places of tagged tokens, and their tags."""
        batch = pack([(ids, types, IGNORED) for ids, types, *_ in windows], self.max_length)
        begins = batch.cu_seqlens[:-1].tolist()
        places = np.concatenate([begin + window[2] for begin, window in zip(begins, windows)])
        tags = np.concatenate([window[3] for window in windows])
        return replace(
            batch,
            masked_positions=torch.from_numpy(places),
            labels={"label": torch.from_numpy(tags)},
            counts={"label": float(is_known(tags).sum())},
        )


def cut_into_windows(num_tokens: int, room: int) -> list[tuple[int, int, int, int]]:
    """(start, end, first, last) of each window of at most `room` of a text's tokens: what it reads,
    [start, end), and what it predicts, [first, last). Each token is predicted once, in order.

    A token of two windows is as far from the end of the first as from the start of the second, or
    nearer to one of them: the other predicts it. No token is in three, as OVERLAP is above 2."""
    step = room - room // OVERLAP
    starts = range(0, max(1, num_tokens - room + step), step)
    ends = [min(start + room, num_tokens) for start in starts]
    middles = [(end + start + 1) // 2 for end, start in zip(ends, starts[1:])]
    return list(zip(starts, ends, [0, *middles], [*middles, num_tokens]))


def find_words(
    text: str, offsets: list[tuple[int, int]], numbers: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(words int64 [words, 2], int64 [words]: the place of the first token of each), from the
    characters of each token and the number of its word.

    A word is what the tokenizer splits into pieces. In Chinese and Japanese each token is one:
    SentencePiece knows no words there. Tokens of white space belong to none."""
    words, first, previous = [], [], None
    for place, ((start, end), number) in enumerate(zip(offsets, numbers)):
        while start < end and text[start].isspace():  # SentencePiece keeps it with the word
            start += 1
        if start == end:
            continue
        # Several tokens may share one character, as in byte-level BPE.
        is_apart = not words or start >= words[-1][1]
        is_unspaced_here = any(map(is_unspaced, text[max(0, start - 1) : start + 1]))
        if is_apart and (number != previous or is_unspaced_here):
            words.append([start, end])
            first.append(place)
        words[-1][1] = max(words[-1][1], end)
        previous = number
    return np.array(words, np.int64).reshape(-1, 2), np.array(first, np.int64)
