"""What an experiment compares, for each task: the outcome of each test row, and scores of rows.

A prediction of finetune.py becomes an outcome, a small array of numbers. A score is a function of
outcomes and of weights, which say how often a resample has each row; each equals the score with the
same name in pretrain/finetune/scores.py on the repeated rows. `MEASURES` has one object per --task.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pretrain.data.sentences import Sentence
from pretrain.finetune.dataset import LabeledRows
from pretrain.finetune.entities import KEYS

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # weights, outcomes -> float64 [draws]
RIGHT, GIVEN, FOUND = range(3)  # counts of a row, by label: correct, true and predicted


@dataclass(frozen=True)
class Metric:
    """A score and its words in a report."""

    title: str
    meaning: str  # sentences
    score: Score


# Scores of counts. `weights` are float32 [draws, rows], `counts` float32 [rows, 3, labels].


def _sums(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float64 [3, draws, labels]: the counts of all rows. Exact below 2**24."""
    sums = weights @ counts.reshape(len(counts), -1)
    return sums.reshape(len(weights), 3, -1).swapaxes(0, 1).astype(np.float64)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part` / `whole`, 0 where `whole` is."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


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
    """The correlation of true and predicted classes."""
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


# The tasks.


class Classification:
    """One of several classes for a row. An outcome counts the labels of a row: [3, classes]."""

    metrics = {
        "macro_f1": Metric(
            "macro F1",
            "F1 combines recall (the share of a class's rows that are found) and precision (the "
            "share of predictions of a class that are right); macro F1 is the mean over classes.",
            macro_f1,
        ),
        "accuracy": Metric(
            "accuracy",
            "Accuracy is the share of test rows that are classified correctly.",
            accuracy,
        ),
        "matthews": Metric(
            "Matthews correlation",
            "The Matthews correlation of the true and the predicted classes is 1 if all are right, "
            "and 0 on average for guesses.",
            matthews,
        ),
    }
    by_label = "Which classes?"  # heading of the scores of each label; "" if there are none
    label, support, support_key = "class", "test rows", "rows"

    def describe(self, names: list[str]) -> str:
        """What is predicted, from the names of the labels."""
        return f"{len(names)} classes"

    def truth(self, rows: LabeledRows) -> list:
        """What is right for each row, in a form that JSON keeps."""
        return rows.numbers.tolist()

    def documents(self, rows: LabeledRows) -> list[list[Sentence]]:
        """The texts of each row as a document to pretrain on."""
        return [[(part, ()) for part in parts] for parts in rows.texts]

    def predicted(self, cells: Iterable[dict], names: list[str]) -> list:
        """What was predicted for each row, in the form of `truth`; `cells` as in the file of
        predictions."""
        return [names.index(row["predicted_label"]) for row in cells]

    def guess(self, truth: list) -> list | None:
        """Predictions of the most frequent label for every row; None if such a guess scores 0."""
        ((most, _),) = Counter(truth).most_common(1)
        return [most] * len(truth)

    def outcomes(self, truth: list, predicted: list, names: list[str]) -> np.ndarray:
        """float32 [rows, 3, classes]: the outcome of each row, as `metrics` take it."""
        rows, counts = np.arange(len(truth)), np.zeros((len(truth), 3, len(names)), np.float32)
        counts[rows, GIVEN, truth] = 1
        counts[rows, FOUND, predicted] = 1
        counts[:, RIGHT] = counts[:, GIVEN] * counts[:, FOUND]
        return counts


class EntityRecognition(Classification):
    """Entities in a text. An outcome counts those of a text: [3, labels]."""

    metrics = {
        "f1": Metric(
            "entity F1",
            "An entity is right if its first and last character and its type are. F1 combines "
            "recall (the share of the entities that are found) and precision (the share of those "
            "found that are right), over the entities of all test rows.",
            micro_f1,
        ),
        "macro_f1": Metric(
            "macro F1",
            "An entity is right if its first and last character and its type are. F1 combines "
            "recall (the share of a type's entities that are found) and precision (the share of "
            "those found that are right); macro F1 is the mean over types.",
            macro_f1,
        ),
    }
    by_label = "Entities per type before and after"
    label, support, support_key = "type", "test entities", "entities"

    def describe(self, names: list[str]) -> str:
        """How many types of entities."""
        return f"entities of {len(names)} type{'' if len(names) == 1 else 's'}"

    def truth(self, rows: LabeledRows) -> list:
        """A list of [start, end, label] for each row."""
        return [list(map(list, entities)) for entities in rows.labels]

    def documents(self, rows: LabeledRows) -> list[list[Sentence]]:
        """The text of each row, with its entities for --masking entity."""
        pairs = zip(rows.texts, rows.labels)
        spans = (tuple((start, end) for start, end, _ in entities) for _, entities in pairs)
        return [[(text, of_text)] for (text, *_), of_text in zip(rows.texts, spans)]

    def predicted(self, cells: Iterable[dict], names: list[str]) -> list:
        """The same of what was found."""
        rows = (row["predicted_entities"] for row in cells)
        return [[[entity[key] for key in KEYS] for entity in entities] for entities in rows]

    def guess(self, truth: list) -> list | None:
        """None: a model that finds nothing scores 0."""

    def outcomes(self, truth: list, predicted: list, names: list[str]) -> np.ndarray:
        """float32 [rows, 3, labels]."""
        places = {name: place for place, name in enumerate(names)}
        counts = np.zeros((len(truth), 3, len(names)), np.float32)
        for row, of_row in enumerate(zip(truth, predicted)):
            given, found = (set(map(tuple, entities)) for entities in of_row)
            for kind, entities in ((RIGHT, given & found), (GIVEN, given), (FOUND, found)):
                for *_, label in entities:
                    counts[row, kind, places[label]] += 1
        return counts


class Regression(Classification):
    """A number for a row. An outcome is the true and the predicted one: [2]."""

    metrics = {
        "pearson": Metric(
            "Pearson correlation",
            "Pearson's correlation of the true and the predicted numbers is 1 if they lie on a "
            "rising line, and 0 if they are unrelated.",
            pearson,
        ),
        "spearman": Metric(
            "Spearman correlation",
            "Spearman's correlation is 1 if the predicted numbers have the order of the true ones, "
            "and 0 if the two orders are unrelated.",
            spearman,
        ),
        "correlation": Metric(
            "mean correlation",
            "The score is the mean of Pearson's correlation (do the predicted numbers and the true "
            "ones lie on a line?) and Spearman's (do they have the same order?).",
            mean_correlation,
        ),
    }
    by_label = ""

    def describe(self, names: list[str]) -> str:
        """There is nothing to count."""
        return "a number for each row"

    def truth(self, rows: LabeledRows) -> list:
        """The numbers."""
        return rows.labels

    def predicted(self, cells: Iterable[dict], names: list[str]) -> list:
        """The predicted numbers."""
        return [float(row["predicted_label"]) for row in cells]

    def guess(self, truth: list) -> list | None:
        """None: the correlation with a constant is 0."""

    def outcomes(self, truth: list, predicted: list, names: list[str]) -> np.ndarray:
        """float64 [rows, 2]."""
        return np.stack([truth, predicted], axis=1).astype(np.float64)


MEASURES: dict[str, Classification] = {
    "classification": Classification(),
    "ner": EntityRecognition(),
    "regression": Regression(),
}
