"""How far is one text from another, and from a tokenizer: vocabulary overlap, pieces per word, the words that break most.

Overlap as in "Don't Stop Pretraining" (Gururangan et al. 2020): the share of their most frequent words, stop words left out, that two
texts have in common. A text is read once, into counts of its words; memory grows with the distinct words alone, up to a bound.
"""
from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np
import regex  # comes with transformers
from transformers import PreTrainedTokenizerBase

from pretrain.command import UserError, require
from pretrain.data import tokenizer as tokenizers
from pretrain.data.marking import HAN_CLASS
from pretrain.data.reading import read_lines
from pretrain.text import TextFiles

# A Chinese character, else letters and digits in a row; a mark alone is none.
WORD = regex.compile(rf"{HAN_CLASS}|[\p{{L}}\p{{N}}--{HAN_CLASS}][\p{{L}}\p{{N}}\p{{M}}--{HAN_CLASS}]*", regex.V1)
SEGMENTED_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*")
MAX_DISTINCT = 2_000_000  # counted words; beyond, the rarer half is dropped
MIN_COUNT = 5  # of a candidate token
CHINESE_STOP_WORDS = """的 了 在 是 我 有 和 就 不 人 都 一 一个 上 也 很 到 说 要 去 你 会 着 没有 看 自己 这 那 他 她 它 我们 你们
    他们 这个 那个 与 及 而 或 被 把 对 对于 从 以 为 因为 所以 但 但是 如果 还 还是 又 并 等 中 个 之 其 于 由 比 让 使 能 可以 得 地 吧
    吗 呢 啊 什么 怎么 年 月 日 时 后 前 里 下 大 小 多 更 最 已 已经 将 可 来 么 们"""


def count_words(text: TextFiles) -> Counter[str]:
    """How often each word occurs, as it is written; numbers are none. Chinese words are told as the text's markup says: by rjieba, by
    spaces, or each character is one."""
    counts: Counter[str] = Counter()
    if text.markup.words == "jieba":
        jieba = require("rjieba", "Chinese words")

        def words_of(sentence: str) -> list[str]:
            return [word for word in jieba.cut(sentence) if SEGMENTED_WORD.fullmatch(word)]
    else:
        words_of = (SEGMENTED_WORD if text.markup.words == "spaces" else WORD).findall
    for item in text.sentences():
        if item:
            counts.update(words_of(unicodedata.normalize("NFC", item[0])))
            if len(counts) > MAX_DISTINCT:
                counts = Counter(dict(counts.most_common(MAX_DISTINCT // 2)))
    return Counter({word: count for word, count in counts.items() if not word.isnumeric()})


def stop_words(name: str) -> set[str]:
    """Words that overlap leaves out: of scikit-learn's English list and a short Chinese one ("auto"), of a file, or none ("none")."""
    if name == "none":
        return set()
    if name != "auto":
        return {word.lower() for word in read_lines(name, "--stop-words")}
    return set(require("sklearn.feature_extraction.text", "stop words").ENGLISH_STOP_WORDS) | {*CHINESE_STOP_WORDS.split()}


def frequent_words(counts: Counter[str], left_out: set[str]) -> list[str]:
    """Words in lower case, the most frequent first, ties in order of the alphabet."""
    lower: Counter[str] = Counter()
    for word, count in counts.items():
        lower[word.lower()] += count
    return [word for word in sorted(lower, key=lambda word: (-lower[word], word)) if word not in left_out and len(word) > word.isascii()]


def overlap(ranked: dict[str, list[str]], top: int) -> tuple[np.ndarray, int]:
    """(shares float64 [texts, texts] within 0..1, words compared): what the first `top` words of two texts have in common. Where a
    text has fewer, so many are taken of every text: the shares then compare."""
    num_words = min([top, *map(len, ranked.values())])
    if not num_words:
        raise UserError(f"{next(name for name, words in ranked.items() if not words)}: holds nothing but stop words; needed is text")
    chosen = [set(words[:num_words]) for words in ranked.values()]
    return np.array([[len(one & other) / num_words for other in chosen] for one in chosen]), num_words


@dataclass(frozen=True)
class Fragmentation:
    """How a tokenizer breaks the words of a text."""

    pieces_per_word: float
    unknown_share: float  # of the words: those of which it does not know a piece
    broken: list[tuple[str, int, int]]  # (word as the tokenizer reads it, count, pieces), by count x pieces


def fragmentation(counts: Counter[str], tokenizer: PreTrainedTokenizerBase, left_out: set[str] = frozenset()) -> Fragmentation:
    """Pieces per word and unknown share over all words; and those that occur MIN_COUNT times and break, or are unknown, without
    the stop words `left_out`."""
    backend, vocabulary = tokenizers.without_limits(tokenizer), tokenizers.describe(tokenizer)
    normalizes = vocabulary.starts_word is not None and backend.normalizer is not None
    read: Counter[str] = Counter()
    for word, count in counts.items():  # the normalizer may set Chinese characters apart by spaces
        read[backend.normalizer.normalize_str(word).replace(" ", "") if normalizes else word] += count
    words = [word for word in read if word]
    spaced = [" " * vocabulary.needs_space + word for word in words]
    encodings, entries = tokenizers.encode_together(backend, spaced, add_special_tokens=False), tokenizer.get_vocab()
    num_words = num_pieces = num_unknown = 0
    broken = []
    for word, encoding in zip(words, encodings):
        count, pieces, unknown = read[word], len(encoding.ids), vocabulary.unknown_id in encoding.ids
        num_words, num_pieces, num_unknown = num_words + count, num_pieces + count * pieces, num_unknown + count * unknown
        if count >= MIN_COUNT and (pieces > 1 or unknown) and word.lower() not in left_out and word not in entries:
            broken.append((word, count, pieces))
    broken.sort(key=lambda entry: (-entry[1] * entry[2], entry[0]))
    return Fragmentation(num_pieces / max(1, num_words), num_unknown / max(1, num_words), broken)
