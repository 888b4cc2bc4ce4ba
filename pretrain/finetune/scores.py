"""Scores of predictions: loss, accuracy, precision, recall, F1, and the confusion matrix."""

import math
from collections.abc import Sequence

import numpy as np

from pretrain.batch import IGNORED

NAMES = ("precision", "recall", "f1")
FEW_ROWS = 10  # below this number, one class for all rows means nothing
SMALLEST = 1e-30  # probability, so that its logarithm is finite


class Tally:
    """Counts predictions in `add`, and computes `scores` from the counts."""

    def __init__(self, classes: list[str]):
        self.classes = classes
        self.confusion = np.zeros((len(classes), len(classes)), np.int64)  # a row per true class
        self.loss_sum = 0.0
        self.predicted = np.zeros(len(classes), np.int64)  # rows by predicted class
        self.unlabeled = 0  # rows without a known label, not scored

    def add(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Count `labels` int64 [rows], IGNORED if unknown, and `probabilities` [rows, classes]."""
        known, best = labels != IGNORED, probabilities.argmax(-1)
        self.predicted += np.bincount(best, minlength=len(self.classes))
        self.unlabeled += int((~known).sum())
        labels, probabilities = labels[known], probabilities[known]
        np.add.at(self.confusion, (labels, best[known]), 1)
        of_label = probabilities[np.arange(len(labels)), labels]
        self.loss_sum -= float(np.log(np.maximum(of_label, SMALLEST)).sum())

    def scores(self) -> dict:
        """Loss, accuracy, macro averages over the classes that occur or are predicted, the scores
        of each class (0 if a ratio has no rows), and the confusion matrix. If a probability was
        NaN, no label follows from it, and all scores are NaN."""
        is_finite = math.isfinite(self.loss_sum)
        right = np.diag(self.confusion) if is_finite else np.full(len(self.classes), np.nan)
        rows, predicted = self.confusion.sum(1), self.confusion.sum(0)
        counts = {"precision": predicted, "recall": rows, "f1": (rows + predicted) / 2}
        by_class = {name: right / np.maximum(count, 1) for name, count in counts.items()}
        present = rows + predicted > 0
        classes = {}
        for number, label in enumerate(self.classes):
            classes[label] = {name: float(score[number]) for name, score in by_class.items()}
            classes[label]["rows"] = int(rows[number])
        return {
            "loss": float(self.loss_sum / rows.sum()),
            "accuracy": float(right.sum() / rows.sum()),
            **{f"macro_{name}": float(score[present].mean()) for name, score in by_class.items()},
            "classes": classes,
            "confusion": self.confusion.tolist(),
        }


def only_class(predicted: Sequence[int], classes: list[str]) -> str | None:
    """The class that every prediction has, from their numbers by class; None if there are several
    classes, or fewer than FEW_ROWS predictions."""
    is_only = max(predicted) == sum(predicted) >= FEW_ROWS
    return classes[int(np.argmax(predicted))] if is_only else None


def numbers_of(scores: dict, prefix: str = "") -> dict[str, float]:
    """The scores that are single numbers."""
    return {f"{prefix}{name}": x for name, x in scores.items() if isinstance(x, float)}


def score_table(scores: dict) -> str:
    """The scores as text, one line per class."""
    total = sum(row["rows"] for row in scores["classes"].values())
    mean = {name: scores[f"macro_{name}"] for name in NAMES} | {"rows": total}
    rows = scores["classes"] | {"mean of the classes": mean}
    width = max(map(len, rows)) + 2
    lines = [f"{'':{width}}{'precision':>10}{'recall':>10}{'F1':>10}{'rows':>8}"]
    for label, row in rows.items():
        numbers = "".join(f"{row[name]:10.3f}" for name in NAMES)
        lines.append(f"{label:{width}}{numbers}{row['rows']:8,}")
    return "\n".join([*lines, f"accuracy {scores['accuracy']:.3f}"])
