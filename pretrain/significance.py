"""Is a difference of scores more than chance?

The difference of two encoders is their mean score over the seeds, one less the other; its 95 % interval is that of a paired bootstrap
over the test rows and the seeds: the same are drawn for both encoders (Efron and Tibshirani 1993, chapter 13).
"""
from __future__ import annotations

import numpy as np

DRAWS, DRAWN_TOGETHER = 10_000, 200


def scores_of(weights: np.ndarray, truth: np.ndarray, predictions: np.ndarray, num_classes: int, metric: str) -> np.ndarray:
    """float [draws, seeds]: the metric when row n of the test counts `weights[d, n]` times; truth int [n], predictions int [seeds, n]."""
    if metric == "accuracy":
        return weights @ (predictions == truth).T.astype(np.float32) / weights.sum(1, keepdims=True)
    is_class = np.eye(num_classes, dtype=np.float32)
    of_truth = weights @ is_class[truth]
    scores = []
    for predicted in predictions:
        hits = weights @ (is_class[truth] * (predicted == truth)[:, None])
        either = of_truth + weights @ is_class[predicted]
        f1 = np.divide(2 * hits, either, out=np.full_like(hits, np.nan), where=either > 0)  # a class that is nowhere is left out
        scores.append(np.nanmean(f1, axis=1))
    return np.stack(scores, axis=1)


def bootstrap(truth: np.ndarray, left: np.ndarray, right: np.ndarray, num_classes: int, metric: str, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean score of `right` less that of `left`, int [seeds, n] both."""
    draw, num_rows, num_seeds, differences = np.random.default_rng(seed), len(truth), len(left), []
    for _ in range(DRAWS // DRAWN_TOGETHER):
        rows = draw.integers(0, num_rows, (DRAWN_TOGETHER, num_rows)) + num_rows * np.arange(DRAWN_TOGETHER)[:, None]
        weights = np.bincount(rows.ravel(), minlength=DRAWN_TOGETHER * num_rows).reshape(DRAWN_TOGETHER, num_rows).astype(np.float32)
        before, after = (scores_of(weights, truth, predictions, num_classes, metric) for predictions in (left, right))
        seeds = draw.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), DRAWN_TOGETHER) / num_seeds
        differences.append(((after - before) * seeds).sum(1))
    low, high = np.quantile(np.concatenate(differences), [0.025, 0.975])
    return float(low), float(high)


def differences_of(truth: np.ndarray, predictions: dict[str, dict[str, np.ndarray]], scores: dict[str, dict[str, list[float]]],
                   num_classes: int, metric: str, left: str) -> dict[str, tuple[float, float, float]]:
    """Budget -> (difference adapted less `left`, low, high)."""
    return {budget: (float(np.mean(scores["adapted"][budget]) - np.mean(scores[left][budget])),
                     *bootstrap(truth, predictions[left][budget], predictions["adapted"][budget], num_classes, metric))
            for budget in scores["adapted"]}
