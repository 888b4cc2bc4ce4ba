"""Texts of any length -> overlapping windows of tokens that a model can read.

Only the first token of a word has a tag (Devlin et al. 2019, section 5.3). Each window with that
token trains it; the window where it has the most context predicts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from pretrain.batch import IGNORED, Batch
from pretrain.data.tokenizer import encode_together, is_unspaced, without_limits
from pretrain.finetune.dataset import EncodedRows, LabeledRows, is_known, pack
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

    class_weights = None

    def __init__(self, rows: LabeledRows, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        backend = without_limits(tokenizer)
        room = self.max_length - backend.num_special_tokens_to_add(False)
        step = room - room // OVERLAP
        backend.enable_truncation(self.max_length, stride=room - step)
        texts = [text for text, *_ in rows.texts]
        self.labels: list[TaggedText] = []
        self.num_snapped = 0
        is_predicted = []
        encodings = encode_together(backend, texts, with_offsets=True)
        for text, entities, encoding in zip(texts, rows.labels, encodings):
            windows = [encoding, *encoding.overflowing]
            owned = assign_tokens(windows, step)
            words, is_first = find_words(text, *_tokens(windows, owned))
            tags = np.full(len(words), IGNORED)
            if entities is not None:
                tags, num_snapped = tag_words(entities, words, rows.classes)
                self.num_snapped += num_snapped
            self.labels.append(TaggedText(text, words, tags, entities))
            self.num_cut += len(windows) > 1
            word_of = np.cumsum(is_first) - 1
            for number, (window, places) in enumerate(zip(windows, owned)):
                content = _content(window)
                tokens = slice(number * step, number * step + len(content))
                first = is_first[tokens]
                self.add(window, content[first], tags[word_of[tokens][first]])
                is_predicted.append(np.isin(content[first], places))
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


def assign_tokens(windows: Sequence[Encoding], step: int) -> list[np.ndarray]:
    """int64 [owned tokens] of each window: the places of the tokens that it predicts, so that each
    token of the text is predicted once, in order. A window starts `step` tokens after the previous.

    A token of two windows is as far from the end of the first as from the start of the second, or
    nearer to one of them: the other predicts it. No token is in three, as OVERLAP is above 2."""
    content = [_content(window) for window in windows]
    starts = step * np.arange(len(windows))
    ends = starts + [len(places) for places in content]
    middles = (ends[:-1] + starts[1:] + 1) // 2
    bounds = [0, *middles.tolist(), int(ends[-1])]
    ranges = zip(content, starts, bounds, bounds[1:])
    return [places[low - start : high - start] for places, start, low, high in ranges]


def _content(window: Encoding) -> np.ndarray:
    """int64 [tokens]: the places of the tokens that are not special."""
    return np.flatnonzero(~np.array(window.special_tokens_mask, bool))


def _tokens(windows: Sequence[Encoding], owned: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64 [tokens, 2], number of its word for each) of the tokens of a text."""
    offsets, numbers = [], []
    for window, places in zip(windows, owned):
        offsets.append(np.array(window.offsets, np.int64).reshape(-1, 2)[places])
        numbers.append(np.array(window.word_ids)[places].astype(np.int64))
    return np.concatenate(offsets), np.concatenate(numbers)


def find_words(
    text: str, offsets: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(words int64 [words, 2], bool [tokens]: which tokens are the first of a word).

    A word is what the tokenizer splits into pieces. In Chinese and Japanese each token is one:
    SentencePiece knows no words there. Tokens of white space belong to none."""
    words, is_first, previous = [], np.zeros(len(offsets), bool), None
    for place, ((start, end), number) in enumerate(zip(offsets.tolist(), numbers.tolist())):
        while start < end and text[start].isspace():  # SentencePiece keeps it with the word
            start += 1
        if start == end:
            continue
        # Several tokens may share one character, as in byte-level BPE.
        is_apart = not words or start >= words[-1][1]
        is_unspaced_here = any(map(is_unspaced, text[max(0, start - 1) : start + 1]))
        if is_apart and (number != previous or is_unspaced_here):
            words.append([start, end])
            is_first[place] = True
        words[-1][1] = max(words[-1][1], end)
        previous = number
    return np.array(words, np.int64).reshape(-1, 2), is_first
