"""Experiments on entities and numbers, from end to end on a tiny encoder.

The report shows the parts, whose scores follow from the saved predictions."""

# ruff: noqa: F401, F811  (fixtures of test_pipeline.py)

import json
import random
import shutil
from itertools import product

import numpy as np
import pytest
from conftest import as_conll, read_rows, refusal, write_rows
from test_outcomes import LABELS, slow_entities, slow_numbers
from test_pipeline import (
    ADAPT,
    PRETRAIN,
    adapt,
    argv,
    part,
    place,
    quick,
    report_of,
    tables,
)

from pretrain import bootstrap, train
from pretrain.finetune import tasks

NAMES = {"LOC": ["river", "river bank"], "ORG": ["bank", "water bank"], "PER": ["teacher"]}
OTHERS = ["quick", "slow", "token", "mask", "money"]
FINE = "--max-length 32 --precision fp32 --batch-size 8 --max-steps 12 --eval-every 6"
FINE += " --learning-rate 1e-2"
ENCODERS = ("base", "adapted")
SLOW = {"ner": slow_entities, "regression": slow_numbers}
KEYS = ("start", "end", "label")


def make_row(source):
    """A text and its entities; its number is how many of them it has."""
    words, entities, start = [], [], 0
    for _ in range(source.randint(3, 7)):
        label = source.choice(["", "", *LABELS])
        words.append(source.choice(NAMES.get(label, OTHERS)))
        if label:
            entities.append(dict(zip(KEYS, (start, start + len(words[-1]), label))))
        start += len(words[-1]) + 1
    return {"text": " ".join(words), "entities": entities, "label": len(entities) / 2}


@pytest.fixture(scope="module")
def row_files(tmp_path_factory):
    """Rows for both tasks; the training rows of entities are tagged words."""
    folder, source = tmp_path_factory.mktemp("rows"), random.Random(4)
    for name, count in {"train": 30, "valid": 12, "test": 20}.items():
        rows = [make_row(source) for _ in range(count)]
        write_rows(folder / f"{name}.jsonl", rows)
        spans = [[tuple(of.values()) for of in row["entities"]] for row in rows]
        (folder / f"{name}.conll").write_text(as_conll([row["text"] for row in rows], spans))
    return folder


def options_of(task, place, row_files, cache):
    """With --masking entity, only the rows that --task-text adds have entities."""
    kinds = {"ner": ("conll", "jsonl", "conll"), "regression": ("jsonl",) * 3}
    splits, masking = ("train", "valid", "test"), "entity" if task == "ner" else "token"
    files = {name: row_files / f"{name}.{kind}" for name, kind in zip(splits, kinds[task])}
    return {
        "model": place / "model",
        "text": place / "text.txt",
        "task-text": True,
        **files,
        "pretrain": f"{PRETRAIN} --masking {masking} --cache {cache}",
        "finetune": f"{FINE} --task {task}",
        "seeds": 2,
    }


@pytest.fixture(scope="module", params=SLOW)
def experiment(request, place, row_files, cache, tmp_path_factory):
    """(task, folder of a finished experiment)."""
    options = options_of(request.param, place, row_files, cache)
    output = tmp_path_factory.mktemp("experiment") / request.param
    return request.param, adapt(options, output)


def truth_and_predictions(task, folder, name):
    """What a fine-tuning run wrote for the test rows, in the form of `TASKS`."""
    run = folder / "finetune" / name
    if task == "ner":
        rows = read_rows(run / "test_predictions.jsonl")

        def entities(column):
            return [[[of[key] for key in KEYS] for of in row[column]] for row in rows]

        return entities("entities"), entities("predicted_entities")
    lines = (run / "test_predictions.csv").read_text().splitlines()[1:]
    return [list(column) for column in zip(*(map(float, line.split(",")) for line in lines))]


def test_report_of_the_parts_and_scores_of_the_predictions(experiment):
    task, output = experiment
    slow, of_task = SLOW[task], tasks.TASKS[task]
    metric = next(iter(of_task.metrics))
    scores, outcomes = {name: [] for name in ENCODERS}, {name: [] for name in ENCODERS}
    for name, seed in product(ENCODERS, range(2)):
        result = part(output, f"finetune-{name}-all-{seed}")
        truth, predicted = truth_and_predictions(task, output, f"{name}-all-{seed}")
        assert result["predicted"] == predicted and len(truth) == 20
        expected = slow(truth, predicted, metric)
        assert result["test"][metric] == pytest.approx(expected, abs=1e-6)
        scores[name].append(result["test"][metric])
        outcomes[name].append(of_task.outcomes(truth, predicted, LABELS))
    assert scores["base"] != scores["adapted"], "equal scores would show nothing"
    report = report_of(output)
    _, (_, row), *_ = tables(report)
    shown = [f"{np.mean(of):.3f} ± {np.std(of, ddof=1):.3f}" for of in scores.values()]
    low, high = bootstrap.bootstrap(
        of_task.metrics[metric].score, *map(np.stack, outcomes.values())
    )
    gain = np.mean(scores["adapted"]) - np.mean(scores["base"])
    assert row == ["30", *shown, f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"]
    assert of_task.metrics[metric].title in report and "most frequent class" not in report


def test_entities_of_the_rows_are_masked_in_pretraining(experiment, row_files):
    task, output = experiment
    rows = read_rows(row_files / "train.jsonl")
    for found, row in zip(read_rows(output / "text.jsonl")[-30:], rows, strict=True):
        spans = [[entity["start"], entity["end"]] for entity in row["entities"]]
        assert found["text"] == row["text"]
        assert found.get("entities", []) == (spans if task == "ner" else [])


def test_entities_by_type_are_compared(experiment):
    task, output = experiment
    report = report_of(output)
    assert "confusion.png" not in report and not (output / "confusion.png").exists()
    assert ("## Entities per type before and after" in report) == (task == "ner")
    if task != "ner":
        return
    header, *rows = tables(report)[2]
    assert header[:2] == ["type", "test entities"]
    for row, label in zip(rows, LABELS, strict=True):
        f1 = {}
        for name in ENCODERS:
            found = [truth_and_predictions(task, output, f"{name}-all-{seed}") for seed in range(2)]
            of_label = [
                [[[of for of in entities if of[2] == label] for entities in side] for side in run]
                for run in found
            ]
            f1[name] = np.mean([slow_entities(*run, "f1") for run in of_label])
        support = sum(len(entities) for entities in of_label[0][0])
        numbers = [f"{f1[name]:.3f}" for name in ENCODERS]
        assert row == [label, str(support), *numbers, f"{f1['adapted'] - f1['base']:+.3f}"]
