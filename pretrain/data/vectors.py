"""Word vectors in text form (word2vec, fastText, GloVe) -> the nearest words of each word."""

import re
from pathlib import Path

import numpy as np

from pretrain.errors import UserError, counted, refusing

BLOCK_SCORES = 1 << 24  # cosines in memory at a time
MAX_LINE = 1 << 20  # characters


def read_vectors(path: str, max_words: int) -> tuple[list[str], np.ndarray]:
    """(words, float32 [words, width] of length 1) of the first `max_words` lines `word v1 v2 ...`.

    Skips a first line with the two sizes, vectors of length 0 and repeated words. UserError names
    the file and line of anything else."""
    vectors: dict[str, np.ndarray] = {}
    width = 0
    with (
        refusing(f"{path}: cannot be read", "expected UTF-8 text"),
        Path(path).open(encoding="utf-8", newline="\n") as handle,
    ):
        lines = iter(lambda: handle.readline(MAX_LINE), "")
        for number, line in enumerate(lines, start=1):
            fields = re.split("[ \t]", line.strip(" \t\r\n"))
            if number == 1 and len(fields) == 2:
                continue
            width = width or len(fields) - 1
            word, numbers = " ".join(fields[:-width]), fields[-width:]  # some words have spaces
            where, expected = f"{path}, line {number}", f"expected a word and {width} numbers"
            with refusing(f"{where}: {line[:40]!r}", expected):
                vector = np.array(numbers, np.float32)
            length = np.linalg.norm(vector)
            if not word or not 0 < len(vector) == width or not np.isfinite(length):
                raise UserError(f"{where}: {line[:40]!r}; {expected}")
            if length > 0:
                vectors.setdefault(word, vector / length)
            if len(vectors) == max_words:
                break
    if len(vectors) < 2:
        found = f"{counted(len(vectors), 'word')} with a vector"
        raise UserError(f"{path}: {found}; expected at least two")
    return list(vectors), np.stack(list(vectors.values()))


def nearest(vectors: np.ndarray, count: int) -> np.ndarray:
    """int64 [words, count]: the words of highest cosine to each word, without itself, best first.

    `vectors`, float32 [words, width], have length 1."""
    num_words = len(vectors)
    size, found = max(1, BLOCK_SCORES // num_words), []
    for start in range(0, num_words, size):
        scores = vectors[start : start + size] @ vectors.T  # [block, words]
        rows = np.arange(len(scores))
        scores[rows, start + rows] = -np.inf
        best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
        found.append(np.take_along_axis(best, order, 1))
    return np.concatenate(found)
