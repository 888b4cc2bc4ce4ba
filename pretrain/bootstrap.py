"""Is a difference between two models more than chance?

Encoders are compared by their mean scores over test rows and seeds, language models by their mean
losses over documents. The 95% interval of the difference comes from a paired bootstrap: each draw
uses the same rows and seeds, or documents, for both (Efron and Tibshirani 1993, chapter 13).
"""

from collections.abc import Callable, Iterator

import numpy as np

DRAWS, DRAWN_TOGETHER = 10_000, 200
BOUNDS = (0.025, 0.975)  # of the interval


def _draw_counts(rng: np.random.Generator, num_rows: int) -> Iterator[np.ndarray]:
    """Blocks of DRAWN_TOGETHER draws, DRAWS in all: float32 [draws, rows], how often each draw has
    each row."""
    for _ in range(DRAWS // DRAWN_TOGETHER):
        rows = rng.integers(0, num_rows, (DRAWN_TOGETHER, num_rows))
        counts = np.stack([np.bincount(draw, minlength=num_rows) for draw in rows])
        yield counts.astype(np.float32)


def bootstrap(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    left: np.ndarray,
    right: np.ndarray,
    seed: int = 0,
) -> tuple[float, float]:
    """95% interval of the mean score of `right` minus that of `left`, over rows and seeds.

    `left` and `right` are [seeds, rows, ...]: what is known of each row. `score(weights, rows)`
    is float [draws], the score when row n of `rows` counts `weights[draw, n]` times."""
    rng = np.random.default_rng(seed)
    num_seeds, num_rows = left.shape[:2]
    differences = []
    for weights in _draw_counts(rng, num_rows):
        pairs = zip(left, right, strict=True)
        gains = [score(weights, after) - score(weights, before) for before, after in pairs]
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), DRAWN_TOGETHER)
        differences.append((np.stack(gains, axis=1) * (seeds / num_seeds)).sum(1))
    return tuple(np.quantile(np.concatenate(differences), BOUNDS).tolist())


def interval_of_mean(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """95% interval of sums.sum() / counts.sum(), both float64 [groups], by drawing groups."""
    rng, means = np.random.default_rng(0), []
    for weights in _draw_counts(rng, len(sums)):
        means.append((weights @ sums) / (weights @ counts))
    return tuple(np.quantile(np.concatenate(means), BOUNDS).tolist())
