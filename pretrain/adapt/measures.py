"""What an experiment compares, for each task: the outcome of each test row, and scores of rows.

A prediction of finetune.py becomes an outcome, a small array of numbers. A score (see
pretrain/finetune/scores.py) is a function of outcomes and of weights, which say how often a
resample has each row. `MEASURES` has one object per --task.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mode

import numpy as np

from pretrain.data.sentences import Sentence
from pretrain.finetune import scores
from pretrain.finetune.dataset import LabeledRows
from pretrain.finetune.entities import KEYS
from pretrain.finetune.scores import FOUND, GIVEN, RIGHT

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # weights, outcomes -> float64 [draws]


@dataclass(frozen=True)
class Metric:
    """A score and its words in a report."""

    title: str
    meaning: str  # sentences
    score: Score


class Classification:
    """One of several classes for a row. An outcome counts the labels of a row: [3, classes]."""

    metrics = {
        "macro_f1": Metric(
            "macro F1",
            "F1 combines recall (the share of a class's rows that are found) and precision (the "
            "share of predictions of a class that are right); macro F1 is the mean over classes.",
            scores.macro_f1,
        ),
        "accuracy": Metric(
            "accuracy",
            "Accuracy is the share of test rows that are classified correctly.",
            scores.accuracy,
        ),
        "matthews": Metric(
            "Matthews correlation",
            "The Matthews correlation of the true and the predicted classes is 1 if all are right, "
            "and 0 on average for guesses.",
            scores.matthews,
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
        return [mode(truth)] * len(truth)

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
            scores.micro_f1,
        ),
        "macro_f1": Metric(
            "macro F1",
            "An entity is right if its first and last character and its type are. F1 combines "
            "recall (the share of a type's entities that are found) and precision (the share of "
            "those found that are right); macro F1 is the mean over types.",
            scores.macro_f1,
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
        documents = []
        for (text, *_), entities in zip(rows.texts, rows.labels):
            documents.append([(text, tuple(entity[:2] for entity in entities))])
        return documents

    def predicted(self, cells: Iterable[dict], names: list[str]) -> list:
        """A list of [start, end, label] for each row, as found by a model."""
        rows = (row["predicted_entities"] for row in cells)
        return [[[entity[key] for key in KEYS] for entity in entities] for entities in rows]

    def guess(self, truth: list) -> list | None:
        """None: a model that finds nothing scores 0."""

    def outcomes(self, truth: list, predicted: list, names: list[str]) -> np.ndarray:
        """float32 [rows, 3, labels]."""
        counts = []
        for of_row in zip(truth, predicted):
            given, found = (set(map(tuple, entities)) for entities in of_row)
            counts.append(scores.count_entities(given, found, names))
        return np.array(counts, np.float32)


class Regression(Classification):
    """A number for a row. An outcome is the true and the predicted one: [2]."""

    metrics = {
        "pearson": Metric(
            "Pearson correlation",
            "Pearson's correlation of the true and the predicted numbers is 1 if they lie on a "
            "rising line, and 0 if they are unrelated.",
            scores.pearson,
        ),
        "spearman": Metric(
            "Spearman correlation",
            "Spearman's correlation is 1 if the predicted numbers have the order of the true ones, "
            "and 0 if the two orders are unrelated.",
            scores.spearman,
        ),
        "correlation": Metric(
            "mean correlation",
            "The score is the mean of Pearson's correlation (do the predicted numbers and the true "
            "ones lie on a line?) and Spearman's (do they have the same order?).",
            scores.mean_correlation,
        ),
    }
    by_label = ""

    def describe(self, names: list[str]) -> str:
        """A number: it has no labels to count."""
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
