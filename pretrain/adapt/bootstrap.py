"""Is a difference between scores more than chance?

Two encoders are compared by their mean scores over the seeds. The 95 % interval of the difference
comes from a paired bootstrap over test rows and seeds: each draw uses the same rows and seeds for
both encoders (Efron and Tibshirani 1993, chapter 13).
"""

import numpy as np

DRAWS, DRAWN_TOGETHER = 10_000, 200


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
    for _ in range(DRAWS // DRAWN_TOGETHER):
        rows = rng.integers(0, num_rows, (DRAWN_TOGETHER, num_rows))
        counts = np.stack([np.bincount(draw, minlength=num_rows) for draw in rows])
        weights = counts.astype(np.float32)
        gains = scores_of(weights, truth, right, metric) - scores_of(weights, truth, left, metric)
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), DRAWN_TOGETHER)
        differences.append((gains * (seeds / num_seeds)).sum(1))
    low, high = np.quantile(np.concatenate(differences), [0.025, 0.975])
    return float(low), float(high)
