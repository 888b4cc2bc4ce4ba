"""Experiments on entities and numbers, from end to end on a tiny encoder.

The report shows the parts, whose scores follow from the saved predictions; bad input is refused."""

# ruff: noqa: F401, F811  (fixtures of test_pipeline.py)

import json
import random
import shutil
from itertools import product

import numpy as np
import pytest
from conftest import as_conll, read_rows, refusal, write_rows
from test_outcomes import LABELS, slow_classes, slow_entities, slow_numbers
from test_pipeline import (
    ADAPT,
    BUDGETS,
    ENCODERS,
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
TASKS = {"ner": "--task ner", "regression": "--task regression"}
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
    """Of an experiment with a control."""
    kinds = {"ner": ("conll", "jsonl", "conll"), "regression": ("jsonl",) * 3}
    splits = ("train", "valid", "test")
    files = {name: row_files / f"{name}.{kind}" for name, kind in zip(splits, kinds[task])}
    return {
        "model": place / "model",
        "text": place / "text.txt",
        "control": place / "control.txt",
        **files,
        "pretrain": f"{PRETRAIN} --cache {cache}",
        "finetune": f"{FINE} {TASKS[task]}",
        "seeds": 2,
        "label-budgets": [*BUDGETS],
    }


@pytest.fixture(scope="module", params=TASKS)
def experiment(request, place, row_files, cache, tmp_path_factory):
    """(task, options, folder of a finished experiment)."""
    options = options_of(request.param, place, row_files, cache)
    output = tmp_path_factory.mktemp("experiment") / request.param
    return request.param, options, adapt(options, output)


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
    task, _, output = experiment
    slow, of_task = SLOW[task], tasks.TASKS[task]
    metric = next(iter(of_task.metrics))
    scores, outcomes = {}, {}
    for name, budget in product(ENCODERS, BUDGETS):
        for seed in range(2):
            run = f"{name}-{budget}-{seed}"
            result = part(output, f"finetune-{run}")
            truth, predicted = truth_and_predictions(task, output, run)
            assert result["predicted"] == predicted and len(truth) == 20
            expected = slow(truth, predicted, metric)
            assert result["test"][metric] == pytest.approx(expected, abs=1e-6)
            assert result["train_rows"] == (30 if budget == "all" else int(budget))
            scores.setdefault((name, budget), []).append(result["test"][metric])
            found = of_task.outcomes(truth, predicted, LABELS)
            outcomes.setdefault((name, budget), []).append(found)
    assert len(set(map(tuple, scores.values()))) > 3, "equal scores would show nothing"
    report = report_of(output)
    _, shown, *_ = tables(report)
    for row, budget in zip(shown[1:], BUDGETS, strict=True):
        of = [scores[name, budget] for name in ENCODERS]
        assert row[1:4] == [f"{np.mean(run):.3f} ± {np.std(run, ddof=1):.3f}" for run in of]
        for cell, other in zip(row[4:], ("base", "control"), strict=True):
            sides = [np.stack(outcomes[name, budget]) for name in (other, "adapted")]
            low, high = bootstrap.bootstrap(of_task.metrics[metric].score, *sides)
            gain = np.mean(scores["adapted", budget]) - np.mean(scores[other, budget])
            assert cell == f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
    assert of_task.metrics[metric].title in report and "most frequent class" not in report


def test_entities_by_type_are_compared(experiment):
    task, _, output = experiment
    report = report_of(output)
    assert "confusion.png" not in report and not (output / "confusion.png").exists()
    assert ("## Entities per type before and after" in report) == (task == "ner")
    assert "## Which classes?" not in report
    if task != "ner":
        assert "a number for each row; 30 training rows" in report.replace("\n  ", " ")
        return
    header, *rows = tables(report)[2]
    assert header[:2] == ["type", "test entities"]
    assert "entities of 3 types (LOC, ORG, PER)" in report
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
        numbers = [f"{f1[name]:.3f}" for name in ("base", "control", "adapted")]
        assert row == [label, str(support), *numbers, f"{f1['adapted'] - f1['base']:+.3f}"]


@pytest.mark.parametrize(
    "task, metric",
    [("ner", "macro_f1"), ("regression", "spearman"), ("classification", "matthews")],
)
def test_other_metrics_are_compared(task, metric, place, row_files, cache, tmp_path):
    options = options_of("regression", place, row_files, cache)
    del options["control"]
    if task == "classification":  # the number of entities, as a class
        for name in ("train", "valid", "test"):
            lines = [f"{row['text']}\t{int(row['label'] > 1)}" for row in read_rows(options[name])]
            options[name] = tmp_path / f"{name}.tsv"
            options[name].write_text("\n".join(["text\tlabel", *lines]))
    else:
        options["label-field"] = "entities" if task == "ner" else "label"
    fine = f"{FINE} --task {task} --metric {metric}"
    more = {"seeds": 1, "label-budgets": [12], "finetune": fine}
    if task == "ner":  # the text has no entities: only the rows have some
        options["pretrain"] += " --masking entity"
    output = adapt(options, tmp_path / "out", task_text=True, **more)
    texts = "\n".join(row["text"] for row in read_rows(output / "text.jsonl"))
    assert all(row["text"] in texts for row in read_rows(row_files / "train.jsonl"))
    if task == "ner":  # what --masking entity masks
        added = read_rows(output / "text.jsonl")[-30:]
        for found, row in zip(added, read_rows(row_files / "train.jsonl"), strict=True):
            spans = [[entity["start"], entity["end"]] for entity in row["entities"]]
            assert found["text"] == row["text"] and found.get("entities", []) == spans
    result = part(output, "finetune-adapted-12-0")
    report = report_of(output)
    metrics = tasks.TASKS[task].metrics
    assert f"{result['test'][metric]:.3f}" == tables(report)[1][1][2]
    assert metrics[metric].title in report and metrics[metric].meaning in report
    if task == "classification":
        truth = [int(line.rpartition("\t")[2]) for line in lines]
        expected = slow_classes(truth, result["predicted"], metric)
        assert result["test"][metric] == pytest.approx(expected)


@pytest.mark.parametrize(
    "task, option, value, named",
    [
        ("ner", "test", "O.conll", "--test {folder}/O.conll: "),
        ("ner", "test", "NEW.conll", "--test {folder}/NEW.conll: "),
        ("ner", "label-budgets", "0", "--label-budgets 0: "),
        ("ner", "text-pair-field", "text", "--text-pair-field text "),
        ("regression", "test", "O.conll", "--test {folder}/O.conll"),
        ("regression", "test", "same.jsonl", "--test {folder}/same.jsonl: "),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    task, option, value, named, place, row_files, cache, tmp_path, capsys
):
    (tmp_path / "O.conll").write_text("river\tO\nbank\tO\n")
    (tmp_path / "NEW.conll").write_text("river\tB-NEW\nbank\tO\n")
    (tmp_path / "same.jsonl").write_text('{"text": "river", "label": 1}\n' * 3)
    options = options_of(task, place, row_files, cache)
    value = tmp_path / value if option == "test" else value
    output, begins = tmp_path / "out", named.format(folder=tmp_path)
    refusal(ADAPT, argv(options, output, **{option: value}), capsys, begins, output)
