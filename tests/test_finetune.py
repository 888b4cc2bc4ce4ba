"""Fine-tuning and prediction, from files to files: a toy task is learned, the best model is the one that is kept and is the same to stock
transformers, scores are those of scikit-learn, and everything that does not fit is told in one message before anything is written."""
import contextlib
import csv
import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal, script
from packed_reference import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel, pipeline

from pretrain import finetune as module
from pretrain import predict
from pretrain.command import UserError, parse
from pretrain.config import FinetuneOptions
from pretrain.files import model_folder
from pretrain.model.classifier import load_classifier

Dataset = pytest.importorskip("datasets").Dataset
sklearn_metrics = pytest.importorskip("sklearn.metrics")
compute_class_weight = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight

FINETUNE, PREDICT = script("finetune"), script("predict")
CLASSES = {"finance": ["bank", "money", "banks", "moneys"], "nature": ["river", "water", "rivers", "waters"],
           "school": ["teach", "learn", "teacher", "learner"]}
ADDED = "predicted_label, probability_finance, probability_nature, probability_school"
OTHERS = ["quick", "slow", "token", "mask", "model", "train"]  # words of no class


def make_rows(count, seed, weights=(3, 2, 1), noise=0.0):
    """Rows of 4 to 20 words, two of the first four of the class; a share of `noise` has a label drawn anew."""
    source, rows = random.Random(seed), []
    for number in range(count):
        name = source.choices(list(CLASSES), weights)[0] if number > 2 else list(CLASSES)[number]
        words = source.choices(CLASSES[name], k=2) + source.choices(OTHERS, k=2)
        source.shuffle(words)
        words += source.choices(OTHERS, k=source.randint(0, 16))
        name = source.choice(list(CLASSES)) if source.random() < noise else name
        rows.append({"id": str(number), "text": " ".join(words), "label": name})
    return rows


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_back(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="session")
def encoder(tiny_tokenizer, vocabulary, tmp_path_factory):
    """A pretrained encoder: one narrow layer, at most 64 tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(3)
    BertModel(small_config(vocabulary.size, num_hidden_layers=1, hidden_dropout_prob=0.1)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {name: write_csv(folder / f"{name}.csv", make_rows(count, seed))
            for name, count, seed in (("train", 90, 1), ("valid", 40, 2), ("test", 30, 3))}


@pytest.fixture
def data(encoder, files):
    """Options that say what is trained on what."""
    return ["--model", encoder, "--train", files["train"], "--valid", files["valid"]]


FAST = ["--batch-size", "16", "--learning-rate", "1e-2", "--precision", "fp32", "--device", "cpu"]


def build(argv):
    return module.build(parse([str(part) for part in argv], FinetuneOptions, ""), lambda message: None)


def run_of(argv, output):
    """The summary of a run in this process."""
    return module.finetune(build([*argv, *FAST, "--output", output]), quiet=True)


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def stock_probabilities(folder, texts, **more):
    """float [texts, classes] by transformers' own model, a text at a time."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(**tokenizer(*text, truncation=True, return_tensors="pt", **more)).logits for text in texts]
    return torch.cat(logits).softmax(-1).numpy()


@pytest.fixture(scope="session")
def finished(encoder, files, tmp_path_factory):
    """(run folder, what the script told)."""
    output, told = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with contextlib.redirect_stdout(told):
        FINETUNE.main(["--model", encoder, *(part for name, path in files.items() for part in (f"--{name}", path)), *FAST, "--epochs", "10",
                       "--log-every", "20", "--patience", "0", "--max-length", "24", "--output", str(output)])
    return output, told.getvalue()


# A run.

def test_a_separable_task_is_learned_and_told(finished, files):
    output, told = finished
    summary, last = json.loads((output / "summary.json").read_text(encoding="utf-8")), json.loads(told.splitlines()[-1])
    assert summary["valid"]["accuracy"] > 0.95 and summary["test"]["accuracy"] > 0.95 and summary["test"]["macro_f1"] > 0.95
    assert (summary["steps"], summary["train_rows"], summary["skipped_steps"]) == (10 * 6, 90, 0)  # a last step of 10 in each epoch
    assert last["test_macro_f1"] == summary["test"]["macro_f1"] and last["valid_loss"] == summary["valid"]["loss"]
    counts = Counter(row["label"] for row in read_back(Path(files["test"])))
    assert f"--test: 30 rows, finance {counts['finance']}, nature {counts['nature']}, school {counts['school']}\n" in told
    assert "run: 60 steps of 16 examples, evaluation every 6;" in told and "at most 24 tokens an example" in told
    assert predict.table_of(summary["test"]) in told and f"the model of step {summary['best_step']}:" in told
    assert {path.name.partition(".tfevents")[0] for path in output.iterdir()} == {
        "config.json", "summary.json", "metrics.jsonl", "events.out", "final", "confusion.png", "test_predictions.csv"}


def test_the_options_of_a_run_repeat_it_from_any_folder(finished, encoder, files, tmp_path, monkeypatch):
    path = finished[0] / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["max_length"] == 24 and saved["model"] == encoder and not {"output", "overwrite"} & saved.keys()
    assert module.saved_options(parse(["--config", str(path)], FinetuneOptions, "")) == saved | {"output": None, "overwrite": False}
    monkeypatch.chdir(Path(encoder).parent)
    given = ["--model", Path(encoder).name, "--train", "a.csv", files["train"], "--valid", "~/b.csv"]
    here = module.saved_options(parse(given, FinetuneOptions, ""))
    assert here["model"] == encoder and here["train"] == [str(Path(encoder).parent / "a.csv"), files["train"]] and here["test"] == []
    assert here["valid"] == [str(Path("~/b.csv").expanduser())]
    assert module.saved_options(FinetuneOptions(model="bert-base-uncased"))["model"] == "bert-base-uncased"


def test_of_many_classes_some_have_a_curve():
    numbers = module.flat("eval", {"loss": 1.0, "confusion": [[1]], "classes": {f"c{number}": {"f1": number / 50} for number in range(40)}})
    assert numbers == {"eval/loss": 1.0} | {f"eval_f1/c{number}": number / 50 for number in range(30)}


def test_numbers_go_to_the_log_and_to_tensorboard(finished):
    output, _ = finished
    rows = metrics(output)
    evaluated = [row["step"] for row in rows if "eval/accuracy" in row]
    assert evaluated == [*range(6, 61, 6)] and [row["step"] for row in rows if "train/loss" in row] == [1, 20, 40, 60]
    training = {"train/loss", "train/accuracy", "speed/tokens_per_second", "optim/learning_rate", "optim/grad_norm", "memory/peak_bytes"}
    held_out = {"eval/loss", "eval/accuracy", *(f"eval/macro_{name}" for name in ("precision", "recall", "f1")),
                *(f"eval_f1/{label}" for label in CLASSES)}
    assert rows[0].keys() == {"step", *training} and rows[-1].keys() == {"step", *training, *held_out}
    assert rows[0]["train/loss"] == pytest.approx(np.log(3), abs=0.3) and rows[-1]["train/loss"] < 0.2 and rows[-1]["train/accuracy"] > 0.9
    accumulator = EventAccumulator(str(output), size_guidance={"scalars": 0})
    accumulator.Reload()
    assert training | held_out <= set(accumulator.Tags()["scalars"])
    assert [event.step for event in accumulator.Scalars("eval/macro_f1")] == evaluated
    summary = json.loads((output / "summary.json").read_text())
    (best,) = [row for row in rows if row["step"] == summary["best_step"]]
    assert best["eval/loss"] == summary["valid"]["loss"] and best["eval_f1/school"] == summary["valid"]["classes"]["school"]["f1"]


def test_predictions_and_picture_are_those_of_the_stock_pipeline(finished, files):
    output, _ = finished
    found, rows = read_back(output / "test_predictions.csv"), read_back(Path(files["test"]))
    assert list(found[0]) == ["label", "predicted_label", *(f"probability_{label}" for label in CLASSES)] and len(found) == len(rows)
    classify = pipeline("text-classification", model=str(output / "final"), top_k=None, truncation=True, device="cpu")
    for mine, row, scores in zip(found, rows, classify([row["text"] for row in rows]), strict=True):
        assert mine["label"] == row["label"] and mine["predicted_label"] == scores[0]["label"]
        for entry in scores:
            assert float(mine[f"probability_{entry['label']}"]) == pytest.approx(entry["score"], abs=2e-5)
    picture = (output / "confusion.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000


def test_the_folder_opens_with_stock_transformers_and_says_what_it_is(finished):
    folder = finished[0] / "final"
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    assert type(model).__module__.startswith("transformers.") and list(model.config.id2label.values()) == list(CLASSES)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 24, "a pipeline cuts where training did"
    card, summary = (folder / "README.md").read_text(encoding="utf-8"), json.loads((finished[0] / "summary.json").read_text())
    assert "pipeline_tag: text-classification" in card and "| classes | finance, nature, school |" in card
    assert f"| test macro f1 | {summary['test']['macro_f1']:.4f} |" in card and "| tokens of an example | 24 |" in card
    assert model_folder(str(finished[0])) == str(folder) and model_folder("bert-base-uncased") == "bert-base-uncased"


def test_the_same_seed_gives_the_same_run_and_another_seed_another(data, files, tmp_path):
    options = [*data, "--test", files["test"], "--max-steps", "5", "--eval-every", "2", "--no-save-model"]
    first, again, other = (run_of([*options, "--seed", seed], tmp_path / name) for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert json.loads((tmp_path / "a" / "summary.json").read_text()) == first and first.pop("seconds") > 0 < again.pop("seconds")
    assert first == again and first["valid"]["loss"] != other["valid"]["loss"]
    names = [f"{name}/test_predictions.csv" for name in "ab"]
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()


def test_how_a_step_goes_through_the_device_does_not_matter(data, tmp_path):
    """But for dropout, which is drawn for each micro-batch; so it is off."""
    quiet = tmp_path / "encoder"
    shutil.copytree(data[1], quiet)
    config = json.loads((quiet / "config.json").read_text()) | {"hidden_dropout_prob": 0.0}
    (quiet / "config.json").write_text(json.dumps(config))
    options = ["--model", quiet, *data[2:], "--max-steps", "4", "--class-weights", "balanced", "--no-save-model"]
    whole, parts, checkpointed = (run_of([*options, *more], tmp_path / str(len(more))) for more in (
        [], ["--micro-batch-size", "4"], ["--micro-batch-size", "8", "--gradient-checkpointing"]))
    assert whole["valid"]["loss"] == pytest.approx(parts["valid"]["loss"], rel=1e-4)
    assert whole["valid"]["loss"] == pytest.approx(checkpointed["valid"]["loss"], rel=1e-4)


# The best model.

@pytest.fixture(scope="session")
def noisy(encoder, tmp_path_factory):
    """(options, held-out rows, run folder, summary): a few rows with wrong labels are learned by heart, so that the best model is not
    the last."""
    folder = tmp_path_factory.mktemp("noisy")
    train, rows = write_csv(folder / "train.csv", make_rows(48, 34, noise=0.5)), make_rows(60, 5, noise=0.4)
    valid = write_csv(folder / "valid.csv", rows)
    options = ["--model", encoder, "--train", train, "--valid", valid, "--patience", "0", "--schedule", "constant"]
    return options, rows, folder / "run", run_of([*options, "--epochs", "16"], folder / "run")


def test_the_saved_model_is_that_of_the_best_evaluation(noisy):
    _, rows, output, summary = noisy
    evaluated = [row for row in metrics(output) if "eval/loss" in row]
    best = max(evaluated, key=lambda row: (row["eval/macro_f1"], -row["eval/loss"]))
    assert len(evaluated) == 16 and best["step"] == summary["best_step"] < summary["steps"] == 48
    assert evaluated[-1]["eval/loss"] > 1.03 * best["eval/loss"]
    labels = np.array([list(CLASSES).index(row["label"]) for row in rows])
    shares = stock_probabilities(output / "final", [(row["text"],) for row in rows])
    assert (shares.argmax(-1) == labels).mean() == summary["valid"]["accuracy"] == best["eval/accuracy"]
    assert sklearn_metrics.log_loss(labels, shares.astype(float)) == pytest.approx(summary["valid"]["loss"], rel=1e-4)
    assert summary["valid"]["confusion"] == sklearn_metrics.confusion_matrix(labels, shares.argmax(-1)).tolist()
    task = build([*noisy[0], *FAST, "--output", output.parent / "absent"])
    task.model = load_classifier(str(output))
    scores = module.evaluate(task, "valid", torch.autocast("cpu", enabled=False))
    assert scores["loss"] == pytest.approx(summary["valid"]["loss"], rel=1e-5)


@pytest.mark.parametrize("metric", ["macro_f1", "accuracy"])
def test_better_is_the_metric_and_then_the_loss(metric):
    model, best, taken = torch.nn.Linear(1, 1, bias=False), module.Best(), []
    other = {"macro_f1": "accuracy", "accuracy": "macro_f1"}[metric]
    for step, (score, loss) in enumerate([(0.5, 2.0), (0.5, 2.0), (0.5, 1.5), (0.4, 0.1), (0.6, 9.0), (0.6, 9.5), (0.1, 0.0)]):
        torch.nn.init.constant_(model.weight, step)
        best.update({metric: score, other: step, "loss": loss}, metric, step, model)
        taken.append((best.step, best.weights["weight"].item(), best.evaluations_without_gain))
    assert taken == [(0, 0, 0), (0, 0, 1), (2, 2, 0), (2, 2, 1), (4, 4, 0), (4, 4, 1), (4, 4, 2)]


@pytest.mark.parametrize("patience, steps", [(0, 5), (1, 2), (3, 4)])
def test_it_stops_after_so_many_evaluations_without_gain(patience, steps, data, tmp_path, monkeypatch):
    levels = iter(range(100, 0, -1))  # worse each time
    monkeypatch.setattr(module, "evaluate", lambda task, name, context: {
        "macro_f1": next(levels) / 100, "loss": 1.0, "accuracy": 0.5, "classes": {}, "confusion": [[1] * 3] * 3})
    summary = run_of([*data, "--max-steps", "5", "--eval-every", "1", "--patience", patience, "--no-save-model"], tmp_path / "run")
    assert (summary["steps"], summary["best_step"], summary["valid"]["macro_f1"]) == (steps, 1, 1.0)
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, steps + 1))


# Options.

def test_balanced_weights_are_scikit_learns(data, files, tmp_path):
    labels = [row["label"] for row in read_back(Path(files["train"]))]
    task = build([*data, *FAST, "--class-weights", "balanced", "--output", tmp_path / "run"])
    expected = compute_class_weight("balanced", classes=np.array(list(CLASSES)), y=labels)
    np.testing.assert_allclose(task.collator.class_weights, expected)
    torch.testing.assert_close(task.model.class_weights["label"], torch.tensor(expected, dtype=torch.float32))
    budget = build([*data, *FAST, "--class-weights", "balanced", "--label-budget", "4", "--output", tmp_path / "run"])
    np.testing.assert_allclose(budget.collator.class_weights, [4 / 6, 4 / 3, 4 / 3])  # of the rows that are trained on
    plain = build([*data, *FAST, "--output", tmp_path / "run"])
    assert plain.collator.class_weights is None and plain.model.class_weights == {}


def test_a_label_budget_takes_rows_of_each_class_by_the_seed(data, files, tmp_path):
    def rows(budget, seed=0):
        return build([*data, *FAST, "--label-budget", budget, "--seed", seed, "--output", tmp_path / "run"]).rows["train"]

    all_rows = [((row["text"],), row["label"]) for row in read_back(Path(files["train"]))]
    few = rows(6)
    assert Counter(few.labels).keys() == CLASSES.keys() and len(few.texts) == 6 and set(zip(few.texts, few.labels)) <= set(all_rows)
    assert rows(30).texts[:6] == few.texts and rows(6, seed=1).texts != few.texts and len(rows(0).texts) == 90
    task = build([*data, *FAST, "--label-budget", "6", "--output", tmp_path / "run"])
    assert len(task.datasets["train"]) == 6 and len(task.datasets["valid"]) == 40 and (task.eval_every, task.total_steps) == (1, 10)


def test_steps_and_lengths_follow_from_the_options(data, tmp_path):
    def task(*more):
        return build([*data, *FAST, *more, "--output", tmp_path / "run"])

    default = task()
    assert (default.total_steps, default.eval_every, default.collator.max_length, default.collator.micro_batch_size) == (60, 6, 64, 16)
    other = task("--epochs", "0.5", "--eval-every", "4", "--max-length", "64", "--micro-batch-size", "8")
    assert (other.total_steps, other.eval_every, other.collator.max_length, other.collator.micro_batch_size) == (3, 4, 64, 8)
    assert task("--epochs", "0.01").total_steps == 1 and task("--max-steps", "77", "--eval-every", "auto").total_steps == 77
    assert not (tmp_path / "run").exists(), "what only reads writes nothing"


def test_rows_that_are_cut_and_rows_that_are_trained_on_are_told(data, files, tmp_path, capsys):
    rows = read_back(Path(files["valid"]))
    mixed = write_csv(tmp_path / "mixed.csv", rows[:9] + read_back(Path(files["train"]))[:5])
    argv = [*data[:4], "--valid", mixed, "--test", mixed, *FAST, "--max-length", "12", "--output", str(tmp_path / "run")]
    module.build(parse(argv, FinetuneOptions, ""))
    told = capsys.readouterr().out.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(data[1])
    cut = [sum(len(tokenizer(row["text"])["input_ids"]) > 12 for row in read_back(Path(path))) for path in (files["train"], mixed)]
    assert told == ["--valid: 5 of 14 texts are texts of --train, too", "--test: 5 of 14 texts are texts of --train, too",
                    f"--train: {cut[0]} of 90 rows are longer than 12 tokens and are cut",
                    *(f"--{name}: {cut[1]} of 14 rows are longer than 12 tokens and are cut" for name in ("valid", "test"))]
    assert 0 < cut[0] < 90


def test_pairs_and_columns_by_name_in_parquet(encoder, tmp_path):
    """What is asked is whether two texts are of one topic: the second text is read, and which it is."""
    source, rows = random.Random(3), []
    for number in range(60):
        one, other = source.choices(list(CLASSES), k=2)
        rows.append({"left": source.choice(CLASSES[one]), "kind": int(number % 3 == 0), "right": f"{source.choice(CLASSES[other])} slow"})
    path = str(tmp_path / "rows.parquet")
    Dataset.from_list(rows).to_parquet(path)
    options = ["--model", encoder, "--train", path, "--valid", path, "--text-field", "left", "--text-pair-field", "right", "--label-field",
               "kind"]
    task = build([*options, *FAST, "--output", tmp_path / "run"])
    assert task.classes == ["0", "1"] and task.rows["valid"].texts == [(row["left"], row["right"]) for row in rows]
    summary = run_of([*options, "--max-steps", "3"], tmp_path / "run")
    shares = stock_probabilities(tmp_path / "run" / "final", [(row["left"], row["right"]) for row in rows])
    expected = sklearn_metrics.log_loss([row["kind"] for row in rows], shares.astype(float))
    assert expected == pytest.approx(summary["valid"]["loss"], rel=1e-4)


# A result that is replaced.

def test_a_result_is_replaced_once_another_is_whole(data, tmp_path, monkeypatch):
    output, aside = tmp_path / "run", tmp_path / ".run.replaced"
    options = [*data, "--max-steps", "2", "--no-save-model"]
    run_of(options, output)
    (output / "final").mkdir()  # as of a run that kept its model
    first = (output / "summary.json").read_text()
    with pytest.raises(UserError, match=f"--output {output}: is not empty; needed is another folder, or --overwrite to replace it"):
        run_of(options, output)

    def failing(*arguments):
        assert (aside / "summary.json").read_text() == first and (aside / "final").is_dir() and not (output / "final").exists()
        raise RuntimeError("out of luck")

    for _ in range(2):  # what a failed run has left replaces nothing
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of luck"):
            patch.setattr(module, "evaluate", failing)
            run_of([*options, "--overwrite"], output)
        assert not (output / "summary.json").exists() and (aside / "summary.json").read_text() == first
    run_of([*options, "--overwrite", "--seed", "5"], output)
    assert not aside.exists() and (output / "summary.json").read_text() != first and not (output / "final").exists()
    assert [row["step"] for row in metrics(output)] == [1, 2], "nothing of the old run"
    assert {"summary.json", "confusion.png"} <= {path.name for path in output.iterdir()}, "scores are kept without a model"
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"^--output {output} --overwrite: holds notes.txt, which no run has written; needed is"):
        run_of([*options, "--overwrite"], output)


def test_what_was_interrupted_may_be_started_again(encoder, files, tmp_path, monkeypatch):
    output = tmp_path / "run"
    options = ["--model", encoder, "--train", files["train"], "--valid", files["valid"], *FAST, "--max-steps", "2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run_of(options, output)
    assert (output / "metrics.jsonl").is_file() and not (output / "summary.json").exists()
    run_of(options, output)
    assert (output / "final").is_dir() and [row["step"] for row in metrics(output)] == [1, 2]
    with pytest.raises(UserError, match="is not empty"):
        run_of(options, output)


# Scores.

@pytest.mark.parametrize("present", [[0, 1, 2, 3], [0, 2], [1]], ids=["all", "two", "one"])
def test_scores_are_those_of_scikit_learn(present):
    """A mean of the classes is over those that occur or are predicted, as in classification_report."""
    source, classes = np.random.default_rng(1), ["a", "b", "c", "d"]
    labels = source.choice(present, 50)
    shares = source.dirichlet(np.ones(4), 50).astype(np.float32)
    shares[:, [number for number in range(4) if number not in present]] *= 1e-3
    shares /= shares.sum(1, keepdims=True)
    shares[0] = np.eye(4)[(labels[0] + 1) % 4]  # certain, and wrong: its loss is large and finite
    tally, predicted = predict.Tally(classes), shares.argmax(-1)
    for part in (slice(7), slice(7, 7), slice(7, 50)):
        tally.add(labels[part], shares[part])
    scores = tally.scores()
    report = sklearn_metrics.classification_report(labels, predicted, output_dict=True, zero_division=0)
    assert scores["accuracy"] == pytest.approx(np.mean(labels == predicted)) and "weighted avg" in report
    for name, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert scores[f"macro_{name}"] == pytest.approx(report["macro avg"][theirs])
        for number, label in enumerate(classes):
            assert scores["classes"][label][name] == pytest.approx(report.get(str(number), {theirs: 0.0})[theirs])
    assert [scores["classes"][label]["rows"] for label in classes] == np.bincount(labels, minlength=4).tolist()
    expected = sklearn_metrics.log_loss(labels[1:], shares[1:].astype(float), labels=range(4)) * 49 - np.log(1e-30)
    assert scores["loss"] == pytest.approx(expected / 50, rel=1e-5)
    assert scores["confusion"] == sklearn_metrics.confusion_matrix(labels, predicted, labels=range(4)).tolist()
    table = predict.table_of(scores).splitlines()
    names = ("precision", "recall", "f1")
    assert table[1].split() == ["a", *(f"{scores['classes']['a'][name]:.3f}" for name in names), str(np.sum(labels == 0))]
    assert table[-2].split()[-4:] == [*(f"{scores[f'macro_{name}']:.3f}" for name in names), "50"]
    assert table[-1] == f"accuracy {scores['accuracy']:.3f}" and len(table) == 7


# Bad input of finetune.py.

GOOD = "".join(f"words {number},{'ab'[number % 2]}\n" for number in range(8))
TABLES = "needed is a table of rows: csv, tsv, jsonl, parquet, arrow"


@pytest.mark.parametrize("name, content, message", [
    ("train.csv", f"{GOOD} ,b\n", "--train {path}, line 10: the column text holds no text; needed is text"),
    ("train.csv", f"{GOOD}x,3\n", "--train: the column label mixes the name 'a' ({path}, line 2) with the whole number '3' ({path}, line "
     "10); needed is one kind"),
    ("valid.csv", f"{GOOD}x,c\n", "--valid {path}, line 10: the label 'c' does not occur in --train; there are a, b"),
    ("test.csv", "x,1\n", "--test {path}, line 2: the label '1' does not occur in --train; there are a, b"),
    ("test.csv", "x,2.0\n", "--test {path}, line 2: the column label holds '2.0'; needed is a name or a whole number"),
    ("train.csv", "x,a\nx,a\n", "--train {path}: all 2 rows have the label 'a'; needed are two classes at least"),
    ("train.csv", "", "--train {path}: holds no row; needed are rows of a text and a label"),
    ("train.csv", "Grüße,a\n", "--train {path}: is not UTF-8"),
    ("valid.txt", GOOD, f"--valid {{path}}: {TABLES}"), ("test.csv.gz", GOOD, f"--test {{path}}: {TABLES}"),
])
def test_bad_rows_are_told_in_one_message(name, content, message, encoder, tmp_path, capsys):
    paths = {each: tmp_path / (name if name.startswith(each) else f"{each}.csv") for each in ("train", "valid", "test")}
    for path in paths.values():
        path.write_text(f"text,label\n{content if path.name == name else GOOD}", encoding="latin-1")
    argv = ["--model", encoder, *(part for each, path in paths.items() for part in (f"--{each}", path)), "--output", tmp_path / "run"]
    told = refusal(FINETUNE.main, argv, capsys)
    assert told.startswith(message.format(path=tmp_path / name)) and "\n" not in told and not (tmp_path / "run").exists()


BUDGET = "needed is at least 3, a row of each class, and at most 90, the rows of --train"


@pytest.mark.parametrize("more, message", [
    (["--label-budget", "91"], f"--label-budget 91: {BUDGET}"), (["--label-budget", "2"], f"--label-budget 2: {BUDGET}"),
    (["--max-length", "65"], "--max-length 65: the model has 64 positions; needed is at most that"),
    (["--train", "absent.csv"], "--train absent.csv: no such file or folder, and no file matches it as a glob"),
    (["--text-pair-field", "other"], "--train {train}, line 2: has no column 'other', it has id, text, label; needed is one of these as "
     "--text-pair-field"),
    (["--text-field", " "], "--text-field  : needed is a name, or the option left away"),
    (["--micro-batch-size", "5"], "--batch-size 16: is not a multiple of --micro-batch-size 5; needed is a micro-batch size that divides"),
    (["--precision", "fp16"], "--precision fp16: the CPU has no fp16 training; needed is bf16 or fp32"),
    (["--model", "absent"], "--model absent: "), (["--output", "{train}"], "--output {train}: is a file; needed is a folder"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_options_of_finetune_are_told_in_one_message(more, message, data, files, tmp_path, capsys):
    told = refusal(FINETUNE.main, [*data, *FAST, "--output", tmp_path / "run", *(part.format(**files) for part in more)], capsys)
    assert told.startswith(message.format(**files)) and "\n" not in told and not (tmp_path / "run").exists()


def test_what_is_missing_and_what_is_wrong_is_told_at_once(capsys):
    assert refusal(FINETUNE.main, ["--epochs", "0"], capsys).splitlines() == [
        "--model: needed is an encoder to start from", "--train: needed is labelled rows", "--valid: needed is labelled rows to choose the "
        "best model by", "--epochs 0.0: needed is a number above 0"]


def test_models_that_do_not_fit_are_told(data, finished, vocabulary, tmp_path, capsys):
    folders = {name: tmp_path / name for name in ("bare", "small", "one type")}
    shutil.copytree(data[1], folders["bare"], ignore=shutil.ignore_patterns("tokenizer*", "special*", "vocab*"))
    for name, size, types in (("small", vocabulary.size - 30, 2), ("one type", vocabulary.size, 1)):
        BertModel(small_config(size, num_hidden_layers=1, type_vocab_size=types)).save_pretrained(folders[name])
        for path in Path(data[1]).glob("tokenizer*"):
            shutil.copy(path, folders[name])
    for name, more, message in (
            ("bare", [], "--model {}: the folder holds no tokenizer, none of tokenizer.json, tokenizer_config.json, vocab.txt"),
            ("small", [], "--model {}: its tokenizer has 120 ids, the model 90 vectors; needed is the model's own tokenizer"),
            ("one type", ["--text-pair-field", "id"], "--text-pair-field: the model {} has 1 token types, two texts need 2")):
        told = refusal(FINETUNE.main, ["--model", folders[name], *data[2:], *more, "--output", tmp_path / "run"], capsys)
        assert told.startswith(message.format(folders[name])) and "\n" not in told
    told = refusal(FINETUNE.main, [*data, "--output", finished[0]], capsys)
    assert told == f"--output {finished[0]}: is not empty; needed is another folder, or --overwrite to replace it"


def test_several_processes_are_refused(data, finished, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for main, argv, what in ((FINETUNE.main, [*data, "--output", tmp_path / "run"], "fine-tuning"), (PREDICT.main, [
            "--model", finished[0], "--input", files["test"], "--output", tmp_path / "out.csv"], "prediction")):
        assert refusal(main, argv, capsys) == f"2 processes: {what} runs in one; needed is a start without torchrun"
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_from_a_fine_tuned_run_with_its_head(data, finished, tmp_path):
    """A run folder stands for its model, as a model or a start; the same labels, the same head."""
    task = build(["--model", finished[0], *data[2:], *FAST, "--output", tmp_path / "run"])
    weights = AutoModelForSequenceClassification.from_pretrained(finished[0] / "final").state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in task.model.state_dict().items())
    assert module.evaluate(task, "valid", torch.autocast("cpu", enabled=False))["accuracy"] > 0.95


# Prediction.

@pytest.fixture
def predict_argv(finished, tmp_path):
    """Options of predict.py, given files."""
    def argv(paths, output="out.jsonl", *more):
        paths = paths if isinstance(paths, list) else [paths]
        return [str(part) for part in ("--model", finished[0], "--input", *paths, "--output", tmp_path / output, "--precision", "fp32",
                                       "--device", "cpu", *more)]
    return argv


@pytest.mark.parametrize("read_as, written_as, chunk", [("csv", "jsonl", 4), ("jsonl", "csv", 1024), ("csv", "csv", 5)])
def test_rows_come_back_in_order_with_the_numbers_of_the_stock_pipeline(read_as, written_as, chunk, finished, predict_argv, tmp_path,
                                                                        capsys, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", chunk)
    rows = [row | {"note": "a, \"b\"\nc"} for row in make_rows(23, 9, noise=0.3)]
    path = {"csv": write_csv, "jsonl": write_jsonl}[read_as](tmp_path / f"in.{read_as}", rows)
    PREDICT.main(predict_argv(path, f"out.{written_as}", "--batch-size", "3"))
    told, found = capsys.readouterr().out, read_back(tmp_path / f"out.{written_as}")
    names = [f"probability_{label}" for label in CLASSES]
    assert [{name: row[name] for name in rows[0]} for row in found] == rows and list(found[0]) == [*rows[0], "predicted_label", *names]
    classify = pipeline("text-classification", model=str(finished[0] / "final"), top_k=None, truncation=True, device="cpu")
    for row, scores in zip(found, classify([row["text"] for row in rows]), strict=True):
        assert row["predicted_label"] == scores[0]["label"]
        for entry in scores:
            assert float(row[f"probability_{entry['label']}"]) == pytest.approx(entry["score"], abs=2e-5)
    last, report = json.loads(told.splitlines()[-1]), sklearn_metrics.classification_report(
        [row["label"] for row in rows], [row["predicted_label"] for row in found], output_dict=True, zero_division=0)
    assert (last["rows"], last["accuracy"]) == (23, pytest.approx(report["accuracy"])) and "left out" not in told
    assert last["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"]) and 0.5 < last["accuracy"] < 1
    assert f"accuracy {last['accuracy']:.3f}\n" in told and told.startswith(f"23 rows in {tmp_path / f'out.{written_as}'}\n")


def test_rows_stream_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 4)
    read, seen, tally = [], [], predict.Tally(["a", "b"])

    def rows():
        for number in range(10):
            read.append(number)
            yield f"row {number}", {"text": f"text {number}", "kind": "bax"[number % 3]}

    def shares_of(texts):
        assert texts == [(f"text {number}",) for number in range(len(read) - len(texts), len(read))]
        return np.array([[0.25, 0.75]] * len(texts))

    for number, row in enumerate(predict.predict_rows(rows(), ("text",), "kind", shares_of, tally)):
        seen.append(len(read))
        assert row == {"text": f"text {number}", "kind": "bax"[number % 3], "predicted_label": "b", "probability_a": 0.25,
                       "probability_b": 0.75}
    assert seen == [4] * 4 + [8] * 4 + [10] * 2
    assert tally.confusion.tolist() == [[0, 3], [0, 4]] and tally.left_out == 3


def test_rows_without_a_label_that_the_model_knows_are_predicted_but_not_scored(predict_argv, tmp_path, capsys):
    rows = make_rows(12, 8)
    for number, label in ((1, "sports"), (4, None), (5, "sports"), (6, "  "), (7, 1.5)):
        rows[number]["label"] = label
    del rows[9]["label"]
    rows[2]["label"] += " "  # a label, as it is in training
    PREDICT.main(predict_argv(write_jsonl(tmp_path / "in.jsonl", rows)))
    told, found = capsys.readouterr().out, read_back(tmp_path / "out.jsonl")
    known = [number for number, row in enumerate(rows) if str(row.get("label")).strip() in CLASSES]
    assert len(known) == 6 and len(found) == 12 and all(row["predicted_label"] in CLASSES for row in found)
    assert "\nleft out of the scores: 6 rows whose label is none of the model's labels (finance, nature, school)\n" in told
    assert [row.get("label") for row in found] == [row.get("label") for row in rows] and "label" not in found[9]
    right = sum(found[number]["predicted_label"] == rows[number]["label"].strip() for number in known)
    assert json.loads(told.splitlines()[-1])["accuracy"] == pytest.approx(right / 6)
    assert f"{'mean of the classes':21}" in told and told.splitlines()[-4].split()[-1] == "6"


@pytest.mark.parametrize("label", ["", "sports"])
def test_without_a_single_known_label_there_is_no_score(label, predict_argv, tmp_path, capsys):
    rows = [row | {"label": label} for row in make_rows(3, 8)]
    PREDICT.main(predict_argv(write_csv(tmp_path / "in.csv", rows)))
    assert capsys.readouterr().out.splitlines() == [
        f"3 rows in {tmp_path / 'out.jsonl'}", "left out of the scores: 3 rows whose label is none of the model's labels (finance, nature, "
        "school)", '{"rows": 3}']
    PREDICT.main(predict_argv(write_csv(tmp_path / "bare.csv", [{"text": row["text"]} for row in rows]), "bare.csv.csv"))
    assert capsys.readouterr().out.splitlines()[1:] == ['{"rows": 3}']


def test_several_files_other_columns_pairs_and_a_cut(finished, predict_argv, tmp_path, capsys):
    one, two = ([{"body": row["text"], "kind": row["label"], "second": "slow bank water"} for row in make_rows(count, count)]
                for count in (3, 4))
    one[0]["body"] += " bank" * 40
    paths = [write_csv(tmp_path / "z.csv", one), write_jsonl(tmp_path / "a.jsonl", [row | {"more": [1]} for row in two])]
    for pair in ([], ["--text-pair-field", "second"]):
        PREDICT.main(predict_argv(paths, "out.jsonl", "--text-field", "body", "--label-field", "kind", "--max-length", "10", "--overwrite",
                                  *pair))
        found, last = read_back(tmp_path / "out.jsonl"), json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [row["kind"] for row in found] == [row["kind"] for row in one + two] and "accuracy" in last and found[3]["more"] == [1]
        texts = [(row["body"], row["second"])[:1 + bool(pair)] for row in found]
        np.testing.assert_allclose([[row[f"probability_{label}"] for label in CLASSES] for row in found],
                                   stock_probabilities(finished[0] / "final", texts, max_length=10), atol=2e-5)


def test_a_file_replaces_another_or_its_own_input_once_it_is_whole(predict_argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 4)
    rows, path = make_rows(11, 7), tmp_path / "rows.csv"
    write_csv(path, rows)
    argv = predict_argv(path, "rows.csv")
    assert refusal(PREDICT.main, argv, capsys) == f"--output {path}: exists; needed is another name, or --overwrite to replace a file"
    PREDICT.main([*argv, "--overwrite"])
    assert [row["text"] for row in read_back(path)] == [row["text"] for row in rows] and "predicted_label" in read_back(path)[0]
    (tmp_path / "folder.csv").mkdir()
    told = refusal(PREDICT.main, predict_argv(path, "folder.csv", "--overwrite"), capsys)
    assert told == f"--output {tmp_path / 'folder.csv'}: exists; needed is another name, or --overwrite to replace a file"


TAKEN = "{path}, line %s: has a column %r already; needed is a file without it"


@pytest.mark.parametrize("written_as, spoil, messages", [
    ("csv", {2: {"text": " "}, 9: {"text": None}}, ["{path}, line 3: the column text holds no text; needed is text",
                                                    "{path}, line 10: the column text holds no text; needed is text"]),
    ("jsonl", {9: {"text": 5}}, ["{path}, line 10: the column text holds '5'; needed is text"]),
    ("csv", {0: {"predicted_label": "x", "probability_nature": 1}}, [TAKEN % (1, "predicted_label"), TAKEN % (1, "probability_nature")]),
    ("jsonl", {9: {"predicted_label": "x"}}, [TAKEN % (10, "predicted_label")]),
    ("csv", {9: {"new": 1}}, [f"--output {{output}}: row 10 has the columns id, text, label, new, {ADDED}, the first has id, text, label, "
                              f"{ADDED}; needed is .jsonl for rows that differ"]),
], ids=["blank", "no text", "taken", "taken later", "other columns"])
def test_rows_that_are_wrong_are_told_before_any_work_and_nothing_is_left(written_as, spoil, messages, predict_argv, tmp_path, capsys,
                                                                          monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 4)
    if "new" not in spoil.get(9, {}):
        monkeypatch.setattr(predict, "predict", lambda *arguments: pytest.fail("predicts before all rows are checked"))
    rows = [row | spoil.get(number, {}) for number, row in enumerate(make_rows(12, 6))]
    path, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / f"out.{written_as}"
    output.write_text("old")
    told = refusal(PREDICT.main, predict_argv(path, output.name, "--overwrite"), capsys)
    assert told.splitlines() == [message.format(path=path, output=output) for message in messages]
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.jsonl", output.name} and output.read_text() == "old"


def test_bad_input_of_predict_is_told_in_one_message(encoder, finished, files, vocabulary, predict_argv, tmp_path, capsys):
    assert refusal(PREDICT.main, [], capsys).splitlines() == [
        "--model: needed is a classifier", "--input: needed is a file of rows", "--output: needed is a file of the result, .csv or .jsonl"]
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(finished[0] / "final" / name, tmp_path / "bare")
    for name, size, kind in (("small", vocabulary.size - 30, None), ("several", vocabulary.size, "multi_label_classification")):
        shutil.copytree(finished[0] / "final", tmp_path / name)
        AutoModelForSequenceClassification.from_config(small_config(size, problem_type=kind)).save_pretrained(tmp_path / name)
    (tmp_path / "rows.txt").write_text("text\nwords\n")
    (tmp_path / "header.csv").write_text("text,label\n")
    test, output = files["test"], tmp_path / "out.jsonl"
    for paths, more, message in (
            (test, ["--model", encoder], f"--model {encoder}: has no head that chooses one of several classes; needed is a classifier"),
            (test, ["--model", tmp_path / "bare"], f"--model {tmp_path / 'bare'}: the folder holds no tokenizer"),
            (test, ["--model", tmp_path / "small"], f"--model {tmp_path / 'small'}: its tokenizer has 120 ids, the model 90 vectors; "),
            (test, ["--model", tmp_path / "several"], f"--model {tmp_path / 'several'}: has no head that chooses one of several classes"),
            (test, ["--model", tmp_path / "absent"], f"--model {tmp_path / 'absent'}: "),
            (test, ["--output", tmp_path / "out.txt"], f"--output {tmp_path / 'out.txt'}: needed is a name that ends in .csv or .jsonl"),
            (test, ["--max-length", "65"], "--max-length 65: the model has 64 positions; needed is at most that"),
            (test, ["--max-length", "0"], "--max-length 0: needed is 8 to 65536 tokens"),
            (test, ["--text-field", "body"], f"--input {test}, line 2: has no column 'body', it has id, text, label; needed is"),
            (tmp_path / "header.csv", [], f"--input {tmp_path / 'header.csv'}: holds no row; needed are rows of text"),
            (tmp_path / "rows.txt", [], f"--input {tmp_path / 'rows.txt'}: needed is a table of rows: csv, tsv, jsonl, parquet, arrow"),
            (tmp_path / "absent.csv", [], f"--input {tmp_path / 'absent.csv'}: no such file or folder")):
        told = refusal(PREDICT.main, [*predict_argv(paths), *more], capsys)
        assert told.removeprefix("--input ").startswith(message.removeprefix("--input ")) and "\n" not in told and not output.exists()
