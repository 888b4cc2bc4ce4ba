"""What differs between the tasks: how rows are read, encoded, scored and written.

`TASKS` has one object per --task. The run, the loop and prediction are the same for all.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from pretrain.config import ColumnOptions
from pretrain.errors import UserError, counted
from pretrain.finetune.dataset import (
    LabeledDataset,
    LabeledRows,
    Row,
    label_of,
    number_of,
    read_labeled,
    read_numbers,
    read_texts,
)
from pretrain.finetune.entities import (
    KEYS,
    Entities,
    decode,
    entities_of,
    labels_of,
    read_documents,
    read_tagged_rows,
)
from pretrain.finetune.scores import EntityTally, NumberTally, Tally
from pretrain.finetune.windows import TaggedDataset, TaggedText

SHOWN_CLASSES = 20
FEW_ROWS = 10  # below this number, one class for all rows means nothing


class Classification:
    """One of several classes for a row."""

    name = "classification"
    auto_class, pipeline = "AutoModelForSequenceClassification", "text-classification"
    pipeline_options = ""  # that make its predictions match ours
    dataset, tally = LabeledDataset, Tally
    read = staticmethod(read_labeled)  # the labeled rows of files
    documents = staticmethod(read_texts)  # the rows of files, labeled or not
    has_classes = True  # a row has one of them
    when_long = "cut"  # what happens to texts that are too long
    predictions = "test_predictions.csv"
    curves = ("eval/accuracy", "eval/macro_f1")

    def strata(self, rows: LabeledRows) -> list[str]:
        """The groups that a label budget takes rows from in proportion: one for each row."""
        return rows.labels if self.has_classes else [""] * len(rows.labels)

    def label(self, row: Row, options: ColumnOptions, classes: list[str]) -> object:
        """The label of a row to predict, which may be unknown to the model, or missing."""
        return label_of(row[1].get(options.label_field))

    def columns(self, classes: list[str]) -> list[str]:
        """The names of the cells that a prediction adds to a row."""
        return ["predicted_label", *(f"probability_{label}" for label in classes)]

    def cells(
        self, dataset: LabeledDataset, outputs: np.ndarray, classes: list[str]
    ) -> Iterator[dict]:
        """For each row, the cells that a prediction adds, from `outputs` of `predict`."""
        names = self.columns(classes)
        for row in outputs:
            numbers = [round(float(probability), 6) for probability in row]
            yield dict(zip(names, [classes[int(row.argmax())], *numbers]))

    def label_cells(self, rows: LabeledRows) -> Iterator[dict]:
        """For each row, its label as written beside its prediction."""
        return ({"label": label} for label in rows.labels)

    def counts(self, rows: LabeledRows, dataset: LabeledDataset) -> list[str]:
        """Numbers of rows by class, to print."""
        numbers = np.bincount(dataset.labels, minlength=len(rows.classes))
        named = zip(rows.classes[:SHOWN_CLASSES], numbers)
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

    def title(self, classes: list[str]) -> str:
        """What a model does, for its card."""
        return f"choose one of {len(classes)} classes"


class Regression(Classification):
    """A number for a row."""

    name, tally, has_classes = "regression", NumberTally, False
    read = staticmethod(read_numbers)
    curves = ("eval/pearson", "eval/spearman")

    def label(self, row: Row, options: ColumnOptions, classes: list[str]) -> float:
        """NaN if it has none."""
        return number_of(row[1].get(options.label_field))

    def columns(self, classes: list[str]) -> list[str]:
        """One number."""
        return ["predicted_label"]

    def cells(
        self, dataset: LabeledDataset, outputs: np.ndarray, classes: list[str]
    ) -> Iterator[dict]:
        """For each row, the number, in the fewest digits that no other float32 has."""
        return ({"predicted_label": float(str(number))} for number in outputs)

    def counts(self, rows: LabeledRows, dataset: LabeledDataset) -> list[str]:
        """The range of the numbers, to print."""
        low, high, mean = min(rows.labels), max(rows.labels), np.mean(rows.labels)
        return [f"numbers from {low:g} to {high:g}, {mean:.4g} on average"]

    def warning(self, predicted: Sequence[int], classes: list[str], scores: dict) -> str | None:
        """That a constant would have a smaller squared error."""
        is_worse = scores.get("r2", 0.0) < 0
        return "the model is worse than predicting the mean of the rows" if is_worse else None

    def title(self, classes: list[str]) -> str:
        """What a model does, for its card."""
        return "give a text a number"


class EntityRecognition(Classification):
    """Labeled spans in a text."""

    name = "ner"
    auto_class, pipeline = "AutoModelForTokenClassification", "token-classification"
    pipeline_options = ', aggregation_strategy="first"'
    dataset, tally = TaggedDataset, EntityTally
    read = staticmethod(read_tagged_rows)
    names = staticmethod(labels_of)  # in its tags
    has_classes = False
    when_long = "read in overlapping windows"
    predictions = "test_predictions.jsonl"
    curves = ("eval/precision", "eval/recall", "eval/f1")

    def documents(
        self, paths: Sequence[str], options: ColumnOptions, problems: list[str]
    ) -> Iterator[Row]:
        """The rows of tables and CoNLL files, with or without entities."""

        def check_entities(row: Row) -> bool:
            where, record, (text, *_) = row
            try:
                entities_of(record, text, where, options)
            except UserError as error:
                problems.append(str(error))
                return False
            return True

        return filter(check_entities, read_documents(paths, options, problems))

    def label(self, row: Row, options: ColumnOptions, classes: list[str]) -> Entities | None:
        """None if it has no column for entities, or if the model lacks one of their labels."""
        where, record, (text, *_) = row
        entities = entities_of(record, text, where, options)
        found, known = {label for *_, label in entities or ()}, set(labels_of(classes))
        return entities if found <= known else None

    def columns(self, classes: list[str]) -> list[str]:
        """A list of entities."""
        return ["predicted_entities"]

    def cells(
        self, dataset: TaggedDataset, outputs: np.ndarray, classes: list[str]
    ) -> Iterator[dict]:
        """For each row, the entities with label, text and score."""
        labels: list[TaggedText] = dataset.labels
        bounds = np.cumsum([len(text.words) for text in labels])[:-1]
        for text, shares in zip(labels, np.split(outputs, bounds)):
            entities = []
            for *span, score in decode(shares, text.words, classes):
                shown = {"text": text.text[span[0] : span[1]], "score": round(score, 6)}
                entities.append(dict(zip(KEYS, span)) | shown)
            yield {"predicted_entities": entities}

    def label_cells(self, rows: LabeledRows) -> Iterator[dict]:
        """For each row, its text and entities."""
        for (text, *_), entities in zip(rows.texts, rows.labels):
            yield {"text": text, "entities": [dict(zip(KEYS, entity)) for entity in entities]}

    def counts(self, rows: LabeledRows, dataset: TaggedDataset) -> list[str]:
        """Numbers of entities by label, to print."""
        found = [label for entities in rows.labels for *_, label in entities]
        named = labels_of(rows.classes)[:SHOWN_CLASSES]
        return [f"{label} {found.count(label):,}" for label in named]

    def warning(self, predicted: Sequence[int], classes: list[str], scores: dict) -> str | None:
        """That it finds nothing, as in a run that needs more steps."""
        return None if sum(predicted) else "the model finds no entities"

    def title(self, classes: list[str]) -> str:
        """What a model does, for its card."""
        return f"find entities with {counted(len(labels_of(classes)), 'label')}"


TASKS: dict[str, Classification] = {
    task.name: task for task in (Classification(), EntityRecognition(), Regression())
}
