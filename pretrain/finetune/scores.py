"""Scores of predictions: of classes, of entities, and of numbers.

A score such as `macro_f1` is a function of weights, which say how often each row counts (see
pretrain/bootstrap.py), and of what is known of each row.

Each tally counts predictions in `add` and computes `scores` from its counts: "loss" and others that
are single numbers, tables by class, and the confusion matrix. If an output was not finite, nothing
follows from it, and all scores are NaN. `num_scored` rows had a label, `num_unlabeled` had none.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from pretrain.finetune.dataset import is_known
from pretrain.finetune.entities import decode, labels_of
from pretrain.finetune.windows import TaggedText

NAMES = ("precision", "recall", "f1")
SMALLEST = 1e-30  # probability, so that its logarithm is finite
RIGHT, GIVEN, FOUND = range(3)  # counts by label: correct, true and predicted


# Scores of counts. `weights` are float32 [draws, rows], `counts` float32 [rows, 3, labels].


def _sums(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float64 [3, draws, labels]: the counts of all rows. Exact below 2**24."""
    sums = weights @ counts.reshape(len(counts), -1)
    return sums.reshape(len(weights), 3, -1).swapaxes(0, 1).astype(np.float64)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part` / `whole`, 0 where `whole` is, NaN where one of them is."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def accuracy(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The share of the labels that are right."""
    right, given, _ = _sums(weights, counts.sum(2))
    return _ratio(right, given)[:, 0]


def micro_f1(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """F1 over all labels together."""
    right, given, found = _sums(weights, counts.sum(2))
    return _ratio(2 * right, given + found)[:, 0]


def macro_f1(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean F1 of the labels that occur or are predicted."""
    right, given, found = _sums(weights, counts)
    total = given + found
    return _ratio(_ratio(2 * right, total).sum(1), (total > 0).sum(1))


def matthews(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The correlation of true and predicted classes; 0 if one of them is constant (Gorodkin 2004,
    "Comparing two K-category assignments by a K-category correlation coefficient")."""
    right, given, found = _sums(weights, counts)
    total = given.sum(1)
    covariance = right.sum(1) * total - (given * found).sum(1)
    spreads = [total**2 - np.square(classes).sum(1) for classes in (given, found)]
    return _ratio(covariance, np.sqrt(spreads[0] * spreads[1]))


# Scores of numbers. `weights` are float32 [draws, rows], `pairs` float64 [rows, 2]: the true number
# and the predicted one.


def pearson(weights: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Pearson's correlation."""
    return _correlation(weights, *pairs.T)


def spearman(weights: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Spearman's correlation: Pearson's of the ranks."""
    return _correlation(weights, *(_ranks(weights, numbers) for numbers in pairs.T))


def mean_correlation(weights: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The mean of Pearson's and Spearman's correlation."""
    return (pearson(weights, pairs) + spearman(weights, pairs)) / 2


def _correlation(weights: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of two arrays [rows] or [draws, rows]; 0 in a draw where one of them is constant."""
    left, right = _centered(weights, left), _centered(weights, right)
    scale = np.sqrt((weights * left**2).sum(1) * (weights * right**2).sum(1))
    return _ratio((weights * left * right).sum(1), scale)


def _centered(weights: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """float64 [draws, rows]: `numbers` minus their mean; exactly 0 where a draw has them equal."""
    numbers, over_rows = np.broadcast_to(numbers, weights.shape), {"axis": 1, "keepdims": True}
    numbers = numbers - np.max(numbers, where=weights > 0, initial=-np.inf, **over_rows)
    return numbers - (weights * numbers).sum(**over_rows) / weights.sum(**over_rows)


def _ranks(weights: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """float64 [draws, rows]: the place of each number in the order of a draw; equal ones share the
    mean of their places."""
    order = np.argsort(numbers)
    _, starts, group = np.unique(numbers[order], return_index=True, return_inverse=True)
    counts = np.add.reduceat(weights[:, order].astype(np.float64), starts, axis=1)
    places = np.cumsum(counts, axis=1) - (counts - 1) / 2
    ranks = np.empty(weights.shape)
    ranks[:, order] = places[:, group]
    return ranks


# Tallies.


def _ratios(right: np.ndarray, given: np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 from counts by label; 0 if there is nothing to count."""
    counts = {"precision": found, "recall": given, "f1": (given + found) / 2}
    return {name: right / np.maximum(count, 1) for name, count in counts.items()}


def _as_rows(columns: dict[str, np.ndarray]) -> list[dict[str, float | int]]:
    """The numbers of each label, by name."""
    numbers = (column.tolist() for column in columns.values())
    return [dict(zip(columns, row)) for row in zip(*numbers)]


class Tally:
    """Counts and scores of predicted classes."""

    def __init__(self, classes: list[str]):
        self.classes = classes
        self.confusion = np.zeros((len(classes), len(classes)), np.int64)  # a row per true class
        self.loss_sum = 0.0
        self.predicted = np.zeros(len(classes), np.int64)  # rows by predicted class
        self.num_scored = self.num_unlabeled = 0

    def add(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Count `labels` int64 [rows], IGNORED if unknown, and `probabilities` [rows, classes]."""
        known, best = is_known(labels), probabilities.argmax(-1)
        self.predicted += np.bincount(best, minlength=len(self.classes))
        self.num_scored += int(known.sum())
        self.num_unlabeled += int((~known).sum())
        labels, probabilities = labels[known], probabilities[known]
        np.add.at(self.confusion, (labels, best[known]), 1)
        of_label = probabilities[np.arange(len(labels)), labels]
        self.loss_sum -= float(np.log(np.maximum(of_label, SMALLEST)).sum())

    def scores(self) -> dict:
        """Loss, accuracy, Matthews correlation, macro averages over the classes that occur or are
        predicted, the scores of each class (0 if a ratio has no rows), and the confusion matrix."""
        right = np.diag(self.confusion)
        rows, predicted = self.confusion.sum(1), self.confusion.sum(0)
        counts = np.stack([right, rows, predicted])[None]  # as of a single row
        correlation = float(matthews(np.ones((1, 1)), counts)[0])
        if not math.isfinite(self.loss_sum):
            right, correlation = np.full(len(rows), np.nan), math.nan
        ratios = _ratios(right, rows, predicted)
        present = rows + predicted > 0
        return {
            "loss": float(self.loss_sum / rows.sum()),
            "accuracy": float(right.sum() / rows.sum()),
            "matthews": correlation,
            **{f"macro_{name}": float(ratio[present].mean()) for name, ratio in ratios.items()},
            "classes": dict(zip(self.classes, _as_rows(ratios | {"rows": rows}))),
            "confusion": self.confusion.tolist(),
        }


def count_entities(
    given: Iterable[Sequence], found: Iterable[Sequence], labels: list[str]
) -> np.ndarray:
    """int64 [3, labels]: numbers of right, given and found entities."""
    given, found = set(map(tuple, given)), set(map(tuple, found))
    counts = np.zeros((3, len(labels)), np.int64)
    for kind, entities in ((RIGHT, given & found), (GIVEN, given), (FOUND, found)):
        for *_, label in entities:
            counts[kind, labels.index(label)] += 1
    return counts


class EntityTally:
    """Counts and scores of predicted entities: one is right if its characters and its label are."""

    def __init__(self, tags: list[str]):
        self.tags, self.labels = tags, labels_of(tags)
        self.counts = count_entities((), (), self.labels)
        self.loss_sum, self.num_words = 0.0, 0
        self.predicted = [0]  # number of entities found, in all rows
        self.num_scored = self.num_unlabeled = 0

    def add(self, labels: Sequence[TaggedText], probabilities: np.ndarray) -> None:
        """Count texts and `probabilities` [words of all texts, tags]."""
        start = 0
        for text in labels:
            shares, start = probabilities[start : start + len(text.words)], start + len(text.words)
            found = [entity[:3] for entity in decode(shares, text.words, self.tags)]
            self.predicted[0] += len(found)
            if text.entities is None:
                self.num_unlabeled += 1
                continue
            self.num_scored += 1
            self.counts += count_entities(text.entities, found, self.labels)
            of_tag = shares[np.arange(len(text.tags)), text.tags]
            self.loss_sum -= float(np.log(np.maximum(of_tag, SMALLEST)).sum())
            self.num_words += len(text.tags)

    def scores(self) -> dict:
        """Loss per word; precision, recall and F1 over all entities; mean F1 of the labels that
        occur or are found; the scores of each label. A ratio without entities is 0."""
        right, given, found = np.column_stack([self.counts, self.counts.sum(1)])
        if not math.isfinite(self.loss_sum):
            right = np.full(len(right), np.nan)
        ratios = _ratios(right, given, found)
        *classes, total = _as_rows(ratios | {"entities": given, "found": found})
        f1 = [row["f1"] for row in classes if row["entities"] + row["found"]]
        return {
            "loss": self.loss_sum / max(1, self.num_words),
            **total,
            "macro_f1": float(np.mean(f1)) if f1 else 0.0 * self.loss_sum,  # NaN if the loss is
            "classes": dict(zip(self.labels, classes)),
        }


class NumberTally:
    """Scores of predicted numbers, in regression."""

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
        once, pairs = np.ones((1, len(labels))), np.stack([labels, outputs], axis=1)
        with np.errstate(invalid="ignore"):  # NaN follows from infinity, too
            linear, ranked = (float(score(once, pairs)[0]) for score in (pearson, spearman))
        loss, variance = float(np.square(labels - outputs).mean()), float(labels.var())
        return {
            "loss": loss,
            "pearson": linear,
            "spearman": ranked if math.isfinite(linear) else math.nan,
            "correlation": (linear + ranked) / 2,
            "r2": 1 - loss / variance if variance else 0.0 * loss,  # NaN if the loss is
        }


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
