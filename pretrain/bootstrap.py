"""Is a difference between two models more than chance?

Encoders are compared by their mean scores over test rows and seeds, language models by their mean
losses over documents. The 95 % interval of the difference comes from a paired bootstrap: each draw
uses the same rows and seeds, or documents, for both (Efron and Tibshirani 1993, chapter 13).
"""

from collections.abc import Iterator

import numpy as np

DRAWS, DRAWN_TOGETHER = 10_000, 200
BOUNDS = (0.025, 0.975)  # of the interval


def _draw_counts(rng: np.random.Generator, num_rows: int) -> Iterator[np.ndarray]:
    """float32 [DRAWN_TOGETHER, rows], DRAWS rows in all: how often each draw has each row."""
    for _ in range(DRAWS // DRAWN_TOGETHER):
        rows = rng.integers(0, num_rows, (DRAWN_TOGETHER, num_rows))
        counts = np.stack([np.bincount(draw, minlength=num_rows) for draw in rows])
        yield counts.astype(np.float32)


def scores_of(
    weights: np.ndarray, truth: np.ndarray, predictions: np.ndarray, metric: str
) -> np.ndarray:
    """float [draws, seeds]: the metric when test row n counts `weights[draw, n]` times.

    `truth` is int [rows], `predictions` int [seeds, rows]."""
    if metric == "accuracy":
        num_right = weights @ (predictions == truth).T.astype(np.float32)
        return num_right / weights.sum(1, keepdims=True)
    is_class = np.eye(max(truth.max(), predictions.max()) + 1, dtype=np.float32)
    num_true = weights @ is_class[truth]  # [draws, classes]
    scores = []
    for predicted in predictions:
        num_right = weights @ (is_class[truth] * (predicted == truth)[:, None])
        total = num_true + weights @ is_class[predicted]
        f1 = np.full_like(total, np.nan)  # a class that never occurs is left out of the mean
        np.divide(2 * num_right, total, out=f1, where=total > 0)
        scores.append(np.nanmean(f1, axis=1))
    return np.stack(scores, axis=1)


def bootstrap(
    truth: np.ndarray, left: np.ndarray, right: np.ndarray, metric: str, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of mean score of `right` minus mean score of `left`, both int [seeds, rows]."""
    rng = np.random.default_rng(seed)
    num_seeds, num_rows = left.shape
    differences = []
    for weights in _draw_counts(rng, num_rows):
        gains = scores_of(weights, truth, right, metric) - scores_of(weights, truth, left, metric)
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), DRAWN_TOGETHER)
        differences.append((gains * (seeds / num_seeds)).sum(1))
    low, high = np.quantile(np.concatenate(differences), BOUNDS)
    return float(low), float(high)


def interval_of_mean(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of sums.sum() / counts.sum(), both float64 [groups], by drawing groups."""
    rng, means = np.random.default_rng(seed), []
    for weights in _draw_counts(rng, len(sums)):
        means.append((weights @ sums) / (weights @ counts))
    low, high = np.quantile(np.concatenate(means), BOUNDS)
    return float(low), float(high)
