"""Entity recognition and regression, from files to files: a toy task is learned, the result gives
the same entities in transformers, and bad input is reported before anything is written."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    arguments_of,
    as_conll,
    change_json,
    read_rows,
    refusal,
    summary_of,
    write_rows,
)
from test_finetune import FP32, metrics, printed
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pretrain.commands import finetune as FINETUNE
from pretrain.commands import predict as PREDICT
from pretrain.finetune.scores import NumberTally, score_table
from pretrain.runtime.checkpoint import check_output

OTHERS = ["quick", "slow", "token", "mask", "model", "trained", "sentence"]
NAMES = {"ORG": ["bank", "bank river", "bank river water"], "PER": ["teacher", "money learning"]}
FAST = arguments_of("--batch-size 8 --learning-rate 1e-2", FP32)


def make_texts(count, seed, length=10):
    """(texts, entities): names among other words; each word shows whether it begins a name."""
    source, texts, entities = random.Random(seed), [], []
    for _ in range(count):
        words, spans, place = [], [], 0
        for _ in range(source.randint(1, length)):
            label = source.choice(["", "", *NAMES])
            word = source.choice(NAMES.get(label, OTHERS))
            if label:
                spans.append((place, place + len(word), label))
            words.append(word)
            place += len(word) + 1
        texts.append(" ".join(words))
        entities.append(tuple(spans))
    return texts, entities


def as_records(texts, entities):
    return [{"text": text, "spans": [*map(list, of)]} for text, of in zip(texts, entities)]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Training rows as tagged words, others as spans."""
    folder = tmp_path_factory.mktemp("entities")
    (folder / "train.conll").write_text(as_conll(*make_texts(60, 1, 20), "BIOES"))
    paths = {"train": str(folder / "train.conll")}
    for name, seed in (("valid", 2), ("test", 3)):
        records = as_records(*make_texts(20, seed, 30))
        paths[name] = write_rows(folder / f"{name}.jsonl", records)
    return paths


@pytest.fixture(scope="session")
def data(encoder, files):
    paths = (word for name in files for word in (f"--{name}", files[name]))
    return ["--task", "ner", "--model", encoder, *paths]


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """(run folder, output of the command); texts of more than 24 tokens are cut into windows."""
    output = tmp_path_factory.mktemp("finished") / "run"
    more = "--epochs 10 --patience 0 --max-length 24"
    return output, printed(FINETUNE.main, data, FAST, more, ["--output", output])


def spans_of(row, name="predicted_entities"):
    return [(of["start"], of["end"], of["label"]) for of in row[name]]


# A run.


def test_entities_are_learned_and_reported(finished, files):
    output, text = finished
    summary, last = summary_of(output), json.loads(text.splitlines()[-1])
    assert summary["test"]["f1"] > 0.95 and summary["valid"]["classes"]["ORG"]["f1"] > 0.9
    assert summary["train_rows"] == 60 and last["test_f1"] == summary["test"]["f1"]
    rows = read_rows(files["test"])
    assert "over 24 tokens, read in overlapping windows" in text
    assert score_table(summary["test"]) in (output / "scores.txt").read_text()
    evaluated = metrics(output, "eval/f1")
    best = max(evaluated, key=lambda row: (row["eval/f1"], -row["eval/loss"]))
    assert best["step"] == summary["best_step"] and best["eval_f1/PER"] > 0.9
    found = read_rows(output / "test_predictions.jsonl")
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    given = [[tuple(span) for span in row["spans"]] for row in rows]
    assert [spans_of(row, "entities") for row in found] == given
    right = sum(len({*spans_of(row)} & {*spans_of(row, "entities")}) for row in found)
    assert right / sum(map(len, given)) == pytest.approx(summary["test"]["recall"])
    card = (output / "final" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: token-classification" in card


def test_a_finished_run_may_be_overwritten(finished):
    check_output(finished[0], overwrite=True)


def test_predicted_entities_are_those_of_the_stock_pipeline(finished, tmp_path, monkeypatch):
    """Texts that fit. "first" is the pipeline's way that reads first pieces."""
    monkeypatch.setattr(PREDICT, "CHUNK", 3)
    records = as_records(*make_texts(11, 7, 4))
    records[3] |= {"text": "quick sentences trained slow , bank river", "spans": [[31, 41, "ORG"]]}
    output = tmp_path / "out.csv"
    argv = ["--model", finished[0], "--input", write_rows(tmp_path / "in.jsonl", records)]
    text = printed(PREDICT.main, argv, ["--output", output], FP32)
    found = read_rows(output)
    assert [row["text"] for row in found] == [row["text"] for row in records]
    options = {"aggregation_strategy": "first", "device": "cpu"}
    tagger = pipeline("token-classification", model=str(finished[0] / "final"), **options)
    for row in found:
        row["predicted_entities"] = json.loads(row["predicted_entities"])
        theirs = tagger(row["text"])
        assert spans_of(row) == [(of["start"], of["end"], of["entity_group"]) for of in theirs]
        for mine, other in zip(row["predicted_entities"], theirs):
            assert mine["score"] == pytest.approx(other["score"], abs=2e-5)
            assert mine["text"] == row["text"][mine["start"] : mine["end"]]
    assert json.loads(text.splitlines()[-1])["f1"] > 0.9


def test_windows_predict_what_the_whole_text_does(finished, tmp_path):
    """Where the nearest words decide, the text may be cut anywhere."""
    texts, entities = make_texts(6, 9, 40)
    path = write_rows(tmp_path / "in.jsonl", as_records(texts, entities))
    for length in (64, 16):
        output = tmp_path / f"{length}.jsonl"
        argv = ["--model", finished[0], "--input", path, "--output", output]
        printed(PREDICT.main, argv, FP32, f"--max-length {length} --batch-size 3")
        found = [set(spans_of(row)) for row in read_rows(output)]
        num_right = sum(len(of.intersection(given)) for of, given in zip(found, entities))
        assert num_right > 0.9 * sum(map(len, entities))


def test_tagged_files_and_other_labels_are_predicted(finished, tmp_path):
    """Without a label that the model knows there is no score."""
    path = tmp_path / "in.conll"
    path.write_text("quick O\nbank B-ORG\nriver I-ORG\n\nmoney B-GPE\n")
    more = write_rows(tmp_path / "more.jsonl", [{"text": "slow bank"}])
    argv = ["--model", finished[0], "--input", path, more, "--output", tmp_path / "out.jsonl"]
    text = printed(PREDICT.main, argv, FP32)
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["text"] for row in rows] == ["quick bank river", "money", "slow bank"]
    assert spans_of(rows[0], "entities") == [(6, 16, "ORG")] == spans_of(rows[0])
    assert "not scored: 2 rows" in text and json.loads(text.splitlines()[-1])["rows"] == 3


def test_entities_that_end_inside_a_word_are_counted(encoder, tmp_path):
    rows = [{"text": "quick teacher", "spans": [[6, 11, "PER"]]}, {"text": "bank", "spans": []}]
    path = write_rows(tmp_path / "rows.jsonl", rows * 4)
    argv = ["--task", "ner", "--model", encoder, "--train", path, "--valid", path]
    text = printed(FINETUNE.main, argv, FAST, "--max-steps 1", ["--output", tmp_path / "run"])
    assert f"--train {path}: 4 entities" in text
    assert summary_of(tmp_path / "run")["valid"]["recall"] == 0.0


# Bad input.


def spans_row(*spans):
    return json.dumps({"text": "quick bank", "spans": spans}) + "\n"


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.jsonl", spans_row([0, 50, "X"])),
        ("train.conll", "bank B-X\nriver nonsense\n"),
        ("valid.conll", "bank B-NEW\n"),
        ("test.jsonl", '{"text": "bank"}\n'),
    ],
)
def test_bad_rows_are_reported_in_one_line(name, content, data, files, tmp_path, capsys):
    path, option = tmp_path / name, f"--{name.partition('.')[0]}"
    path.write_text(content)
    output = tmp_path / "run"
    argv = [*data, *FAST, option, path, "--output", output]
    text = refusal(FINETUNE.main, argv, capsys, f"{option} {path}")
    assert not output.exists() and ("NEW" in text or "NEW" not in content)


def test_models_for_other_tasks_are_refused(finished, encoder, files, tmp_path, capsys):
    argv = ["--input", files["test"], "--output", tmp_path / "out.jsonl", *FP32]
    refusal(PREDICT.main, ["--model", encoder, *argv], capsys, "--model ")
    pair = ["--model", finished[0], *argv, "--text-pair-field", "text"]
    refusal(PREDICT.main, pair, capsys, "--text-pair-field text:")
    folder = shutil.copytree(finished[0] / "final", tmp_path / "inside only")
    labels = {"id2label": {str(number): f"I-{number}" for number in range(5)}}
    change_json(folder / "config.json", lambda config: config | labels)
    refusal(PREDICT.main, ["--model", folder, *argv], capsys, f"--model {folder}:")
    taken = write_rows(tmp_path / "taken.jsonl", [{"text": "a", "predicted_entities": 1}])
    argv = ["--model", finished[0], "--output", tmp_path / "out.jsonl", "--input", taken]
    refusal(PREDICT.main, argv, capsys, f"--input {taken}")
    assert not (tmp_path / "out.jsonl").exists()


# Regression.


def make_numbers(count, seed):
    """The number is how many of the words are about water."""
    source, rows = random.Random(seed), []
    for _ in range(count):
        words = source.choices([*OTHERS[:3], "river", "water"], k=8)
        rows.append({"text": " ".join(words), "label": words.count("river") / 2})
    return rows


def test_numbers_are_learned_predicted_and_scored_as_by_scipy(encoder, output, tmp_path):
    stats = pytest.importorskip("scipy.stats")
    paths = [write_rows(tmp_path / f"{n}.csv", make_numbers(80, n)) for n in range(3)]
    argv = ["--task", "regression", "--model", encoder, "--train", paths[0], "--valid", paths[1]]
    argv += ["--test", paths[2], "--output", output]
    printed(FINETUNE.main, argv, FAST, "--epochs 12")
    summary, rows = summary_of(output), read_rows(paths[2])
    found = read_rows(output / "test_predictions.csv")
    labels, predicted = (np.array([float(row[name]) for row in found]) for name in found[0])
    assert labels.tolist() == [float(row["label"]) for row in rows]
    scores = summary["test"]
    assert scores["pearson"] == pytest.approx(stats.pearsonr(labels, predicted)[0], abs=1e-5)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(labels, predicted)[0], abs=1e-5)
    assert scores["correlation"] == pytest.approx((scores["pearson"] + scores["spearman"]) / 2)
    assert scores["loss"] == pytest.approx(np.square(labels - predicted).mean(), rel=1e-4)
    assert scores["r2"] == pytest.approx(1 - scores["loss"] / labels.var(), rel=1e-3)
    assert scores["pearson"] > 0.8
    best = max(metrics(output, "eval/pearson"), key=lambda row: row["eval/pearson"])
    assert best["step"] == summary["best_step"]

    folder = output / "final"
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (stock.config.problem_type, stock.config.num_labels) == ("regression", 1)
    with torch.no_grad():
        inputs = [tokenizer(row["text"], return_tensors="pt") for row in rows]
        theirs = [stock(**of).logits.item() for of in inputs]
    np.testing.assert_allclose(predicted, theirs, atol=2e-5)
    for row in rows[:2]:
        row["label"] = "unknown"
    argv = ["--model", output, "--input", write_rows(tmp_path / "in.csv", rows)]
    text = printed(PREDICT.main, argv, ["--output", tmp_path / "out.jsonl"], FP32)
    again = [row["predicted_label"] for row in read_rows(tmp_path / "out.jsonl")]
    np.testing.assert_allclose(again, theirs, atol=2e-5)
    last = json.loads(text.splitlines()[-1])
    assert last["rows"] == 80 and last["pearson"] > 0.8 and "not scored: 2 rows" in text


@pytest.mark.parametrize("bad", ["high", "nan"])
def test_labels_that_are_no_numbers_are_reported(bad, encoder, tmp_path, capsys):
    good = write_rows(tmp_path / "good.csv", make_numbers(5, 1))
    path = write_rows(tmp_path / "bad.csv", [*make_numbers(3, 1), {"text": "bank", "label": bad}])
    argv = ["--task", "regression", "--model", encoder, "--train", good, "--valid", path]
    refusal(FINETUNE.main, argv, capsys, f"--valid {path}, line 5: ")
    same = write_rows(tmp_path / "same.csv", [{"text": "bank", "label": 2}] * 3)
    refusal(FINETUNE.main, [*argv[:-1], same], capsys, f"--valid {same}: ")


def test_constant_and_infinite_outputs():
    tally = NumberTally()
    tally.add(np.array([1.0, 2.0, np.nan]), np.array([3.0, 3.0, 9.0], np.float32))
    assert (tally.num_scored, tally.num_unlabeled) == (2, 1)
    correlations = {"pearson": 0.0, "spearman": 0.0, "correlation": 0.0}
    assert tally.scores() == {"loss": 2.5, "r2": -9.0, **correlations}
    tally.add(np.array([1.0]), np.array([np.inf], np.float32))
    assert not any(map(np.isfinite, tally.scores().values()))
