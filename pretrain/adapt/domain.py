"""How much texts differ, and how well a tokenizer fits them: shared words, pieces per word.

Overlap as in "Don't Stop Pretraining" (Gururangan et al. 2020): the share of the most frequent
words, without stop words, that two texts have in common. A text is read once, into word counts, so
memory grows only with the number of distinct words, up to a bound.
"""

import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import regex  # comes with transformers
from transformers import PreTrainedTokenizerBase

from pretrain import plots
from pretrain.config import TextOptions
from pretrain.data import tokenizer as tokenizers
from pretrain.data.annotate import HAN_CLASS
from pretrain.data.sources import read_lines
from pretrain.errors import UserError, require
from pretrain.files import markdown_table
from pretrain.inputs import TextFiles, check_text

# A Chinese character, or a run of letters and digits with their marks.
WORD = regex.compile(
    rf"{HAN_CLASS}|[\p{{L}}\p{{N}}--{HAN_CLASS}][\p{{L}}\p{{N}}\p{{M}}--{HAN_CLASS}]*", regex.V1
)
SEGMENTED_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*")
MAX_DISTINCT = 2_000_000  # words to count; above this, the rarer half is dropped
SPACE = "▁"  # a token of SentencePiece
MIN_COUNT = 5  # occurrences of a candidate token
CHINESE_STOP_WORDS = """的 了 在 是 我 有 和 就 不 人 都 一 一个 上 也 很 到 说 要 去 你 会 着
    没有 看 自己 这 那 他 她 它 我们 你们 他们 这个 那个 与 及 而 或 被 把 对 对于 从 以 为 因为
    所以 但 但是 如果 还 还是 又 并 等 中 个 之 其 于 由 比 让 使 能 可以 得 地 吧 吗 呢 啊 什么
    怎么 年 月 日 时 后 前 里 下 大 小 多 更 最 已 已经 将 可 来 么 们"""


def check_raw_text(
    paths: tuple[str, ...], option: str, options: TextOptions, masking: str = "word"
) -> TextFiles:
    """The checked text of `paths`; UserError for a prepared corpus, which no longer has words."""
    text = check_text(paths, option, options, masking)
    if text.is_corpus:
        raise UserError(f"{text.name}: already a prepared corpus; expected text")
    return text


def count_words(text: TextFiles) -> Counter[str]:
    """Number of occurrences of each word as written, without numbers.

    The text's markup decides how Chinese is split: by rjieba, at spaces, or into characters."""
    words_of = SEGMENTED_WORD.findall if text.markup.words == "spaces" else WORD.findall
    if text.markup.words == "jieba":
        jieba = require("rjieba", "Chinese words")

        def words_of(sentence: str) -> list[str]:
            return list(filter(SEGMENTED_WORD.fullmatch, jieba.cut(sentence)))

    counts: Counter[str] = Counter()
    for item in text.sentences():
        if item:
            counts.update(words_of(unicodedata.normalize("NFC", item[0])))
            if len(counts) > MAX_DISTINCT:
                counts = Counter(dict(counts.most_common(MAX_DISTINCT // 2)))
    return Counter({word: count for word, count in counts.items() if not word.isnumeric()})


def stop_words(name: str) -> set[str]:
    """Words to ignore: English and Chinese ones ("auto"), none ("none"), or the lines of a file."""
    if name == "auto":
        english = require("sklearn.feature_extraction.text", "stop words").ENGLISH_STOP_WORDS
        return {*english, *CHINESE_STOP_WORDS.split()}
    return set() if name == "none" else {word.lower() for word in read_lines(name)}


def frequent_words(counts: Counter[str], ignored: set[str]) -> list[str]:
    """Lower-case words, most frequent first, then A to Z; of two letters or more if ASCII."""
    lower: Counter[str] = Counter()
    for word, count in counts.items():
        lower[word.lower()] += count
    kept = {word for word in lower if len(word) > 1 or not word.isascii()} - ignored
    return sorted(kept, key=lambda word: (-lower[word], word))


def overlap(ranked: dict[str, list[str]], top: int) -> tuple[dict[str, dict[str, float]], int]:
    """({text: {text: share in 0..1}}, number of words compared).

    Compares the first `top` words of all texts; if any text has fewer, as many words as it has."""
    for name, words in ranked.items():
        if not words:
            raise UserError(f"{name}: has only stop words; expected text")
    num_words = min([top, *map(len, ranked.values())])
    chosen = {name: set(words[:num_words]) for name, words in ranked.items()}
    shares = {}
    for one, words in chosen.items():
        shares[one] = {other: len(words & chosen[other]) / num_words for other in chosen}
    return shares, num_words


def draw_overlap(path: Path, facts: dict, names: list[str]) -> str:
    """Table of shared words in Markdown; also drawn to `path`. `facts` come from `compare`."""
    shares = [list(row.values()) for row in facts["overlap"].values()]
    plots.overlap(path, names, np.array(shares), facts["words_compared"])
    rows = [[name, *map("{:.0%}".format, row)] for name, row in zip(names, shares)]
    return markdown_table(["", *names], rows)


def fragmentation(
    counts: Counter[str], tokenizer: PreTrainedTokenizerBase, ignored: set[str]
) -> tuple[dict[str, float], list[tuple[str, int, int]]]:
    """(pieces per word and share of unknown words, words that are split or unknown).

    The latter are (normalized word, count, pieces), by descending count x pieces, without rare
    (MIN_COUNT) and `ignored` words."""
    backend, vocabulary = tokenizers.without_limits(tokenizer), tokenizers.describe(tokenizer)
    normalizer = backend.normalizer if vocabulary.starts_word is not None else None
    read: Counter[str] = Counter()
    for word, count in counts.items():
        if normalizer is not None:  # it may put spaces around Chinese characters
            word = normalizer.normalize_str(word).replace(" ", "")
        read[word] += count
    read.pop("", None)
    in_text = []  # words as they are in running text; there is no space before Chinese ones
    for word in read:
        has_space = vocabulary.needs_space and not tokenizers.is_unspaced(word[0])
        in_text.append(f" {word}" if has_space else word)
    encodings = tokenizers.encode_together(backend, in_text, add_special_tokens=False)
    entries, broken = tokenizer.get_vocab(), []
    num_pieces = num_unknown = 0
    for (word, count), encoding in zip(read.items(), encodings):
        pieces, is_unknown = len(encoding.ids), vocabulary.unknown_id in encoding.ids
        if tokenizers.is_unspaced(word[0]) and encoding.ids[:1] == [entries.get(SPACE)]:
            pieces -= 1
        num_pieces += count * pieces
        num_unknown += count * is_unknown
        is_candidate = count >= MIN_COUNT and word not in entries and word.lower() not in ignored
        if is_candidate and (pieces > 1 or is_unknown):
            broken.append((word, count, pieces))
    broken.sort(key=lambda entry: (-entry[1] * entry[2], entry[0]))
    num_words = max(1, read.total())
    shares = {"pieces_per_word": num_pieces / num_words, "unknown_share": num_unknown / num_words}
    return shares, broken


def compare(
    texts: dict[str, TextFiles],
    tokenizer: PreTrainedTokenizerBase | None,
    top: int,
    ignored: set[str],
) -> tuple[dict, dict[str, list[tuple[str, int, int]]]]:
    """(facts in the form of domain.json, the words of each text that the tokenizer splits).

    Compares the `top` most frequent words that are not `ignored`."""
    counts = {name: count_words(text) for name, text in texts.items()}
    ranked = {name: frequent_words(counter, ignored) for name, counter in counts.items()}
    shares, num_words = overlap(ranked, top)
    facts, broken = {}, {}
    for name, counter in counts.items():
        facts[name] = {"words": counter.total(), "distinct_words": len(counter)}
        if tokenizer:
            pieces, broken[name] = fragmentation(counter, tokenizer, ignored)
            facts[name] |= pieces
    return {"words_compared": num_words, "overlap": shares, "texts": facts}, broken
