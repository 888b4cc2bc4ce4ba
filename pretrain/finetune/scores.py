"""Scores of predictions: of classes, of entities, and of numbers.

Each tally counts predictions in `add` and computes `scores` from its counts: "loss" and others that
are single numbers, tables by class, and the confusion matrix. If an output was not finite, nothing
follows from it, and all scores are NaN. `num_scored` rows had a label, `num_unlabeled` had none.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pretrain.finetune.dataset import is_known
from pretrain.finetune.entities import decode, labels_of
from pretrain.finetune.windows import TaggedText

NAMES = ("precision", "recall", "f1")
FEW_ROWS = 10  # below this number, one class for all rows means nothing
SMALLEST = 1e-30  # probability, so that its logarithm is finite


class Tally:
    """Of classes."""

    def __init__(self, classes: list[str]):
        self.classes = classes
        self.confusion = np.zeros((len(classes), len(classes)), np.int64)  # a row per true class
        self.loss_sum = 0.0
        self.predicted = np.zeros(len(classes), np.int64)  # rows by predicted class
        self.num_unlabeled = 0

    @property
    def num_scored(self) -> int:
        return int(self.confusion.sum())

    def add(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Count `labels` int64 [rows], IGNORED if unknown, and `probabilities` [rows, classes]."""
        known, best = is_known(labels), probabilities.argmax(-1)
        self.predicted += np.bincount(best, minlength=len(self.classes))
        self.num_unlabeled += int((~known).sum())
        labels, probabilities = labels[known], probabilities[known]
        np.add.at(self.confusion, (labels, best[known]), 1)
        of_label = probabilities[np.arange(len(labels)), labels]
        self.loss_sum -= float(np.log(np.maximum(of_label, SMALLEST)).sum())

    def scores(self) -> dict:
        """Loss, accuracy, Matthews correlation, macro averages over the classes that occur or are
        predicted, the scores of each class (0 if a ratio has no rows), and the confusion matrix."""
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
            "matthews": _matthews(self.confusion) if is_finite else math.nan,
            **{f"macro_{name}": float(score[present].mean()) for name, score in by_class.items()},
            "classes": classes,
            "confusion": self.confusion.tolist(),
        }


def _matthews(confusion: np.ndarray) -> float:
    """The correlation of true and predicted classes; 0 if one of them is constant (Gorodkin 2004,
    "Comparing two K-category assignments by a K-category correlation coefficient")."""
    rows, predicted = (confusion.sum(axis).astype(float) for axis in (1, 0))
    total = rows.sum()
    covariance = np.trace(confusion) * total - rows @ predicted
    scale = math.sqrt((total**2 - rows @ rows) * (total**2 - predicted @ predicted))
    return float(covariance / scale) if scale else 0.0


class EntityTally:
    """Of entities: one is right if its characters and its label are."""

    def __init__(self, tags: list[str]):
        self.tags = tags
        self.right: Counter[str] = Counter()  # by label, as the next two
        self.given: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.loss_sum, self.num_words = 0.0, 0
        self.predicted = [0]  # number of entities found, in all rows
        self.num_scored = self.num_unlabeled = 0

    def add(self, labels: Sequence[TaggedText], probabilities: np.ndarray) -> None:
        """Count texts and `probabilities` [words of all texts, tags]."""
        start = 0
        for text in labels:
            shares, start = probabilities[start : start + len(text.words)], start + len(text.words)
            found = {entity[:3] for entity in decode(shares, text.words, self.tags)}
            self.predicted[0] += len(found)
            if text.entities is None:
                self.num_unlabeled += 1
                continue
            self.num_scored += 1
            given = set(text.entities)
            groups = ((self.right, found & given), (self.given, given), (self.found, found))
            for counter, entities in groups:
                counter.update(label for *_, label in entities)
            of_tag = shares[np.arange(len(text.tags)), text.tags]
            self.loss_sum -= float(np.log(np.maximum(of_tag, SMALLEST)).sum())
            self.num_words += len(text.tags)

    def scores(self) -> dict:
        """Loss per word; precision, recall and F1 over all entities; mean F1 of the labels that
        occur or are found; the scores of each label. A ratio without entities is 0."""
        is_finite = math.isfinite(self.loss_sum)
        classes = {}
        for label in labels_of(self.tags):
            numbers = (counter[label] for counter in (self.right, self.given, self.found))
            classes[label] = _ratios(*numbers, is_finite)
        counters = (self.right, self.given, self.found)
        total = _ratios(*(counter.total() for counter in counters), is_finite)
        f1 = [row["f1"] for row in classes.values() if row["entities"] + row["found"]]
        return {
            "loss": self.loss_sum / max(1, self.num_words),
            **total,
            "macro_f1": float(np.mean(f1)) if f1 else 0.0 * self.loss_sum,  # NaN if the loss is
            "classes": classes,
        }


def _ratios(right: int, given: int, found: int, is_finite: bool) -> dict[str, float | int]:
    counts = {"precision": found, "recall": given, "f1": (given + found) / 2}
    share = right if is_finite else math.nan
    ratios = {name: float(share / max(1, count)) for name, count in counts.items()}
    return ratios | {"entities": given, "found": found}


class NumberTally:
    """Of numbers, in regression."""

    predicted = ()

    def __init__(self, classes: Sequence[str] = ()):
        self.labels: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        self.num_scored = self.num_unlabeled = 0

    def add(self, labels: np.ndarray, outputs: np.ndarray) -> None:
        """Count `labels` float64 [rows], NaN if unknown, and `outputs` [rows]."""
        known = is_known(labels)
        self.num_scored += int(known.sum())
        self.num_unlabeled += int((~known).sum())
        self.labels.append(labels[known])
        self.outputs.append(outputs[known].astype(np.float64))

    def scores(self) -> dict:
        """Mean squared error, the correlations of Pearson and Spearman, their mean, and R2: the
        share of the variance that is explained, 0 or less if the mean would do as well."""
        labels, outputs = np.concatenate(self.labels), np.concatenate(self.outputs)
        with np.errstate(invalid="ignore"):  # NaN follows from infinity, too
            pearson = _correlation(labels, outputs)
        spearman = _correlation(_ranks(labels), _ranks(outputs))
        loss, variance = float(np.square(labels - outputs).mean()), float(labels.var())
        return {
            "loss": loss,
            "pearson": pearson,
            "spearman": spearman if math.isfinite(pearson) else math.nan,
            "correlation": (pearson + spearman) / 2,
            "r2": 1 - loss / variance if variance else 0.0 * loss,  # NaN if the loss is
        }


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's; 0 if one of them is constant."""
    left, right = left - left.mean(), right - right.mean()
    scale = math.sqrt(left @ left) * math.sqrt(right @ right)
    return float(left @ right / scale) if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """float64: the place of each value in order; equal ones share the mean of their places."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[number]


def only_class(predicted: Sequence[int], classes: list[str]) -> str | None:
    """The class that every prediction has, from their numbers by class; None if there are several
    classes, or fewer than FEW_ROWS predictions."""
    is_only = max(predicted) == sum(predicted) >= FEW_ROWS
    return classes[int(np.argmax(predicted))] if is_only else None


def numbers_of(scores: dict, prefix: str = "") -> dict[str, float]:
    """The scores that are single numbers."""
    return {f"{prefix}{name}": x for name, x in scores.items() if isinstance(x, float)}


def predicted_of(scores: dict) -> list[int]:
    """How often each class was predicted, or how many entities of each label were found."""
    if "confusion" in scores:
        return np.sum(scores["confusion"], axis=0).tolist()
    return [row["found"] for row in scores.get("classes", {}).values()]


def score_table(scores: dict) -> str:
    """The scores as text, one line per class or label, or the numbers alone."""
    if "classes" not in scores:
        return ", ".join(f"{name} {value:.3f}" for name, value in numbers_of(scores).items())
    count = "rows" if "confusion" in scores else "entities"
    rows = dict(scores["classes"])
    if count == "rows":
        mean = {name: scores[f"macro_{name}"] for name in NAMES}
        rows["mean of the classes"] = mean | {"rows": sum(row["rows"] for row in rows.values())}
        last = f"accuracy {scores['accuracy']:.3f}, Matthews correlation {scores['matthews']:.3f}"
    else:
        rows["all entities"] = scores
        last = f"mean F1 of the labels {scores['macro_f1']:.3f}"
    width = max(map(len, rows)) + 2
    lines = [f"{'':{width}}{'precision':>10}{'recall':>10}{'F1':>10}{count:>10}"]
    for label, row in rows.items():
        numbers = "".join(f"{row[name]:10.3f}" for name in NAMES)
        lines.append(f"{label:{width}}{numbers}{row[count]:10,}")
    return "\n".join([*lines, last])
