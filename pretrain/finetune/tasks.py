"""What differs between the tasks: how rows are read, encoded, scored, written and compared.

`TASKS` has one object per --task. The run, the loop, prediction and experiments are the same for
all. An experiment compares outcomes: a small array of numbers for each test row, from which a
`Metric` computes a score.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.config import ColumnOptions
from pretrain.data.sentences import Sentence
from pretrain.data.tables import no_column
from pretrain.errors import UserError, counted
from pretrain.finetune import scores
from pretrain.finetune.dataset import (
    LabeledDataset,
    LabeledRows,
    Row,
    check_one_kind,
    classes_of,
    is_label,
    label_of,
    number_of,
    read_texts,
    refuse_rows,
    wrong_cell,
)
from pretrain.finetune.entities import (
    KEYS,
    Entities,
    decode,
    entities_of,
    entity_field,
    labels_of,
    read_documents,
    tags_of,
)
from pretrain.finetune.scores import FOUND, GIVEN, RIGHT, EntityTally, NumberTally, Tally
from pretrain.finetune.windows import TaggedDataset, TaggedText

SHOWN_CLASSES = 20
FEW_ROWS = 10  # below this number, one class for all rows means nothing

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # weights, outcomes -> float64 [draws]


@dataclass(frozen=True)
class Metric:
    """A score and its words in a report."""

    title: str
    meaning: str  # sentences
    score: Score


class Classification:
    """One of several classes for a row. An outcome counts the labels of a row: [3, classes]."""

    name = "classification"
    auto_class, pipeline = "AutoModelForSequenceClassification", "text-classification"
    pipeline_options = ""  # that make its predictions match ours
    dataset, tally = LabeledDataset, Tally
    documents = staticmethod(read_texts)  # the rows of files, labeled or not
    value_of = staticmethod(label_of)  # the label in a cell
    has_classes = True  # a row has one of them
    when_long = "cut"  # what happens to texts that are too long
    predictions = "test_predictions.csv"
    curves = ("eval/accuracy", "eval/macro_f1")
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
    by_label = "Which classes?"  # heading of the scores of each label
    label_name, support, support_key = "class", "test rows", "rows"

    def read(
        self, paths: Sequence[str], options: ColumnOptions, classes: list[str] | None = None
    ) -> LabeledRows:
        """The labeled rows of files, in order; `classes` are those of the training rows, None while
        reading these.

        UserError lists every row without text or label, or with a label that cannot be used."""
        texts, labels, wheres, problems = [], [], [], []
        for row in self.documents(paths, options, problems):
            where, record, row_texts = row
            field = self.label_field(record, options)
            if field is None:
                problems.append(str(no_column(record, where, options.label_field, "label")))
                break  # the next rows would only repeat it
            if expected := self.expected(record[field], classes):
                problems.append(wrong_cell(where, field, record[field], expected))
                continue
            try:
                labels.append(self.label(row, options))
            except UserError as error:
                problems.append(str(error))
                continue
            texts.append(row_texts)
            wheres.append(where)
        refuse_rows(problems, len(labels))
        classes = self.find_classes(labels, wheres, " ".join(paths), classes)
        return LabeledRows(texts, labels, classes)

    def label_field(self, record: dict, options: ColumnOptions) -> str | None:
        """The column of the labels; None if there is none."""
        return options.label_field if options.label_field in record else None

    def expected(self, value: object, classes: list[str] | None) -> str | None:
        """What a cell of labels must have; None if it does."""
        if classes and label_of(value) not in classes:
            return f"a label of the training rows, such as {', '.join(classes[:20])}"
        return None if is_label(value) else "a name or a whole number"

    def find_classes(
        self, labels: list, wheres: list[str], source: str, known: list[str] | None
    ) -> list[str]:
        """The `classes` of LabeledRows for labels and the places of their rows: those that are
        `known`, if any. UserError if a model cannot learn them, or is not for them."""
        if known:
            return known
        check_one_kind(labels, wheres, source)
        return classes_of(labels, source)

    def strata(self, rows: LabeledRows) -> list[str]:
        """The groups that a label budget takes rows from in proportion: one for each row."""
        return rows.labels if self.has_classes else [""] * len(rows.labels)

    def label(self, row: Row, options: ColumnOptions, classes: list[str] | None = None) -> object:
        """The label of a row, which may be missing, or none of the model's `classes`. UserError if
        its entities do not fit its text."""
        return self.value_of(row[1].get(options.label_field))

    def columns(self, classes: list[str]) -> list[str]:
        """The names of the cells that a prediction adds to a row."""
        return ["predicted_label", *(f"probability_{label}" for label in classes)]

    def cells(self, dataset: LabeledDataset, outputs: np.ndarray) -> Iterator[dict]:
        """For each row, the cells that a prediction adds, from `outputs` of `predict`."""
        classes = dataset.rows.classes
        names = self.columns(classes)
        for row in outputs:
            numbers = [round(float(probability), 6) for probability in row]
            yield dict(zip(names, [classes[int(row.argmax())], *numbers]))

    def label_cells(self, rows: LabeledRows) -> Iterator[dict]:
        """For each row, its label as written beside its prediction."""
        return ({"label": label} for label in rows.labels)

    def counts(self, dataset: LabeledDataset) -> list[str]:
        """Numbers of rows by class, to print."""
        classes = dataset.rows.classes
        numbers = np.bincount(dataset.labels, minlength=len(classes))
        named = zip(classes[:SHOWN_CLASSES], numbers)
        return [f"{label} {count:,}" for label, count in named]

    def warning(self, predicted: Sequence[int], classes: list[str], scores: dict) -> str | None:
        """What is wrong with a model that predicted each class this often, with these scores ({}:
        unknown); None if nothing is."""
        only = classes[int(np.argmax(predicted))]
        is_only = max(predicted) == sum(predicted) >= FEW_ROWS
        return f"the model chooses {only} for every row" if is_only else None

    def names(self, classes: list[str]) -> list[str]:
        """The labels that a model knows."""
        return classes

    def describe(self, names: list[str]) -> str:
        """What is predicted, from the names of the labels."""
        return f"{len(names)} classes"

    def truth(self, rows: LabeledRows) -> list:
        """What is right for each row: the number of its class, or its number."""
        return rows.numbers.tolist()

    def texts(self, rows: LabeledRows) -> list[list[Sentence]]:
        """The texts of each row as a document to pretrain on."""
        return [[(part, ()) for part in parts] for parts in rows.texts]

    def predicted(self, cells: Iterable[dict], names: list[str]) -> list:
        """What was predicted for each row, comparable with `truth` and in a form that JSON keeps;
        `cells` as in the file of predictions."""
        return [names.index(row["predicted_label"]) for row in cells]

    def outcomes(self, truth: list, predicted: list, names: list[str]) -> np.ndarray:
        """float32 [rows, 3, classes]: the outcome of each row, as `metrics` take it."""
        rows, counts = np.arange(len(truth)), np.zeros((len(truth), 3, len(names)), np.float32)
        counts[rows, GIVEN, truth] = 1
        counts[rows, FOUND, predicted] = 1
        counts[:, RIGHT] = counts[:, GIVEN] * counts[:, FOUND]
        return counts


class Regression(Classification):
    """A number for a row. An outcome is the true and the predicted one: [2]."""

    name, tally, has_classes = "regression", NumberTally, False
    value_of = staticmethod(number_of)  # NaN if there is none
    curves = ("eval/pearson", "eval/spearman")
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

    def expected(self, value: object, classes: list[str] | None) -> str | None:
        """A number."""
        return "a number" if math.isnan(number_of(value)) else None

    def find_classes(
        self, labels: list, wheres: list[str], source: str, known: list[str] | None
    ) -> list[str]:
        """[]; UserError if all numbers are equal."""
        if len(set(labels)) < 2:
            found = f"{labels[0]:g} is the only number in {counted(len(labels), 'row')}"
            raise UserError(f"{source}: {found}; expected two or more")
        return []

    def cells(self, dataset: LabeledDataset, outputs: np.ndarray) -> Iterator[dict]:
        """For each row, the number, in the fewest digits that no other float32 has."""
        return ({"predicted_label": float(str(number))} for number in outputs)

    def counts(self, dataset: LabeledDataset) -> list[str]:
        """The range of the numbers, to print."""
        low, high, mean = dataset.labels.min(), dataset.labels.max(), dataset.labels.mean()
        return [f"numbers from {low:g} to {high:g}, {mean:.4g} on average"]

    def warning(self, predicted: Sequence[int], classes: list[str], scores: dict) -> str | None:
        """That a constant would have a smaller squared error."""
        is_worse = scores.get("r2", 0.0) < 0
        return "the model is worse than predicting the mean of the rows" if is_worse else None

    def describe(self, names: list[str]) -> str:
        """A number: it has no labels to count."""
        return "a number for each row"

    def predicted(self, cells: Iterable[dict], names: list[str]) -> list:
        """The predicted numbers."""
        return [float(row["predicted_label"]) for row in cells]

    def outcomes(self, truth: list, predicted: list, names: list[str]) -> np.ndarray:
        """float64 [rows, 2]."""
        return np.stack([truth, predicted], axis=1).astype(np.float64)


class EntityRecognition(Classification):
    """Labeled spans in a text. An outcome counts those of a text: [3, labels]."""

    name = "ner"
    auto_class, pipeline = "AutoModelForTokenClassification", "token-classification"
    pipeline_options = ', aggregation_strategy="first"'
    dataset, tally = TaggedDataset, EntityTally
    documents = staticmethod(read_documents)  # of tables and CoNLL files
    names = staticmethod(labels_of)  # in its tags
    label_field = staticmethod(entity_field)  # it has several usual names
    has_classes = False
    when_long = "read in overlapping windows"
    predictions = "test_predictions.jsonl"
    curves = ("eval/precision", "eval/recall", "eval/f1")
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
    label_name, support, support_key = "type", "test entities", "entities"

    def expected(self, value: object, classes: list[str] | None) -> str | None:
        """None: `label` checks the cells."""

    def find_classes(
        self, labels: list, wheres: list[str], source: str, known: list[str] | None
    ) -> list[str]:
        """The tags; UserError without entities, or if one has a label that is not `known`."""
        found = sorted({label for entities in labels for *_, label in entities})
        if not found:
            raise UserError(f"{source}: no entities; expected tags such as B-PER, or spans")
        if known and (unknown := sorted(set(found) - set(labels_of(known)))):
            problem = f"{', '.join(unknown)} not among the labels of the training rows"
            expected = f"expected those, such as {', '.join(labels_of(known)[:20])}"
            raise UserError(f"{source}: {problem}; {expected}")
        return known or tags_of(found)

    def label(
        self, row: Row, options: ColumnOptions, classes: list[str] | None = None
    ) -> Entities | None:
        """The entities of a row. None if the row has no column for them, or if `classes` lack one
        of their labels."""
        where, record, (text, *_) = row
        entities = entities_of(record, text, where, options)
        if classes is None:
            return entities
        found, known = {label for *_, label in entities or ()}, set(labels_of(classes))
        return entities if found <= known else None

    def columns(self, classes: list[str]) -> list[str]:
        """A list of entities."""
        return ["predicted_entities"]

    def cells(self, dataset: TaggedDataset, outputs: np.ndarray) -> Iterator[dict]:
        """For each row, the entities with label, text and score."""
        labels: list[TaggedText] = dataset.labels
        bounds = np.cumsum([len(text.words) for text in labels])[:-1]
        for text, shares in zip(labels, np.split(outputs, bounds)):
            entities = []
            for *span, score in decode(shares, text.words, dataset.rows.classes):
                shown = {"text": text.text[span[0] : span[1]], "score": round(score, 6)}
                entities.append(dict(zip(KEYS, span)) | shown)
            yield {"predicted_entities": entities}

    def label_cells(self, rows: LabeledRows) -> Iterator[dict]:
        """For each row, its text and entities."""
        for (text, *_), entities in zip(rows.texts, rows.labels):
            yield {"text": text, "entities": [dict(zip(KEYS, entity)) for entity in entities]}

    def counts(self, dataset: TaggedDataset) -> list[str]:
        """Numbers of entities by label, to print."""
        found = [label for entities in dataset.rows.labels for *_, label in entities]
        named = labels_of(dataset.rows.classes)[:SHOWN_CLASSES]
        return [f"{label} {found.count(label):,}" for label in named]

    def warning(self, predicted: Sequence[int], classes: list[str], scores: dict) -> str | None:
        """That it finds nothing, as in a run that needs more steps."""
        return None if sum(predicted) else "the model finds no entities"

    def describe(self, names: list[str]) -> str:
        """How many types of entities."""
        return f"entities of {counted(len(names), 'type')}"

    def truth(self, rows: LabeledRows) -> list:
        """The entities of each row."""
        return rows.labels

    def texts(self, rows: LabeledRows) -> list[list[Sentence]]:
        """The text of each row, with its entities for --masking entity."""
        documents = []
        for (text, *_), entities in zip(rows.texts, rows.labels):
            documents.append([(text, tuple(entity[:2] for entity in entities))])
        return documents

    def predicted(self, cells: Iterable[dict], names: list[str]) -> list:
        """A list of [start, end, label] for each row, as found by a model."""
        rows = (row["predicted_entities"] for row in cells)
        return [[[entity[key] for key in KEYS] for entity in entities] for entities in rows]

    def outcomes(self, truth: list, predicted: list, names: list[str]) -> np.ndarray:
        """float32 [rows, 3, labels]."""
        pairs = zip(truth, predicted)
        counts = [scores.count_entities(given, found, names) for given, found in pairs]
        return np.array(counts, np.float32)


TASKS: dict[str, Classification] = {
    task.name: task for task in (Classification(), EntityRecognition(), Regression())
}
