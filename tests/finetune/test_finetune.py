"""Fine-tuning and prediction, from files to files: a toy task is learned, the best model is kept
and gives the same results in transformers, scores equal scikit-learn's, an interrupted run resumes
bit for bit, and bad input is reported before anything is written."""

import contextlib
import io
import json
import random
import shutil
import signal
from codecs import BOM_UTF8
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    arguments_of,
    assert_same,
    at,
    change_weights,
    fail,
    in_processes,
    overflowing,
    read_rows,
    refusal,
    refused,
    send,
    summary_of,
    without_privileges,
    write_rows,
)
from conftest import rows as exact_rows
from huggingface_hub import ModelCard
from packed_reference import small_config
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pretrain import train
from pretrain.cli import parse, run_command
from pretrain.commands import finetune as FINETUNE
from pretrain.commands import predict as PREDICT
from pretrain.config import Config, FinetuneOptions
from pretrain.files import model_folder
from pretrain.finetune import build as module
from pretrain.finetune import predict
from pretrain.finetune.scores import Tally, score_table
from pretrain.finetune.tasks import TASKS
from pretrain.resume import portable_options
from pretrain.runtime import checkpoint as ckpt

sklearn_metrics = pytest.importorskip("sklearn.metrics")
compute_class_weight = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight

CLASSES = {
    "finance": ["bank", "money", "banks", "moneys"],
    "nature": ["river", "water", "rivers", "waters"],
    "school": ["teach", "learn", "teacher", "learner"],
}
PROBABILITIES = [f"probability_{label}" for label in CLASSES]
ADDED = ["predicted_label", *PROBABILITIES]
OTHERS = ["quick", "slow", "token", "mask", "model", "train"]  # words of no class
FP32 = arguments_of("--precision fp32 --device cpu")
FAST = arguments_of("--batch-size 16 --learning-rate 1e-2", FP32)


def make_rows(count, seed, weights=(3, 2, 1), noise=0.0):
    """Rows of 4 to 20 words, two of them from the class; a share of `noise` has a random label."""
    source, rows = random.Random(seed), []
    for number in range(count):
        name = source.choices(list(CLASSES), weights)[0] if number > 2 else list(CLASSES)[number]
        words = source.choices(CLASSES[name], k=2) + source.choices(OTHERS, k=2)
        source.shuffle(words)
        words += source.choices(OTHERS, k=source.randint(0, 16))
        name = source.choice(list(CLASSES)) if source.random() < noise else name
        rows.append({"id": str(number), "text": " ".join(words), "label": name})
    return rows


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    sizes = {"train": (90, 1), "valid": (40, 2), "test": (30, 3)}
    return {name: write_rows(folder / f"{name}.csv", make_rows(*of)) for name, of in sizes.items()}


@pytest.fixture(scope="session")
def data(encoder, files):
    """Options for the model and its data."""
    return ["--model", encoder, "--train", files["train"], "--valid", files["valid"]]


def build(*argv, **options):
    return module.build(parse(arguments_of(*argv), FinetuneOptions, ""), quiet=True, **options)


def run_of(output, *argv):
    """The summary of a run in this process."""
    run = build(FAST, *argv, ["--output", output])
    run.open_output()
    return train.train(run)


def printed(main, *argv):
    """The output of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(arguments_of(*argv))
    return out.getvalue()


def metrics(output, part):
    """Rows of metrics.jsonl with numbers under `part`."""
    return [row for row in read_rows(output / "metrics.jsonl") if any(part in name for name in row)]


def stock_probabilities(folder, texts, **more):
    """float [texts, classes] from the stock model, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        inputs = (tokenizer(*of, truncation=True, return_tensors="pt", **more) for of in texts)
        return torch.cat([model(**of).logits for of in inputs]).softmax(-1).numpy()


def sklearn_report(labels, predicted):
    options = {"output_dict": True, "zero_division": 0}
    return sklearn_metrics.classification_report(labels, predicted, **options)


def sklearn_loss(truth, probabilities, **options):
    """In float64, since a float32 row does not sum to 1."""
    found = np.asarray(probabilities, np.float64)
    return sklearn_metrics.log_loss(truth, found / found.sum(1, keepdims=True), **options)


def assert_stock_pipeline(found, folder, rows):
    """Predicted labels and probabilities equal the pipeline of transformers."""
    settings = {"top_k": None, "truncation": True, "device": "cpu"}
    classify = pipeline("text-classification", model=str(folder), **settings)
    for mine, scores in zip(found, classify([row["text"] for row in rows]), strict=True):
        assert mine["predicted_label"] == scores[0]["label"]
        for entry in scores:
            share = float(mine[f"probability_{entry['label']}"])
            assert share == pytest.approx(entry["score"], abs=2e-5)


@pytest.fixture(scope="session")
def finished(data, files, tmp_path_factory):
    """(run folder, output of the command)."""
    output = tmp_path_factory.mktemp("finished") / "run"
    more = "--epochs 10 --log-every 20 --patience 0 --max-length 24"
    paths = ["--test", files["test"], "--output", output]
    return output, printed(FINETUNE.main, data, FAST, more, paths)


@pytest.fixture(autouse=True)
def quick(finished, monkeypatch):
    """Only `finished` has a picture; drawing would take most of the time of other runs."""
    monkeypatch.setattr(module.plots, "confusion", lambda path, *_: path.write_bytes(b"drawn"))


# A run.


def test_a_separable_task_is_learned_and_reported(finished):
    output, text = finished
    summary, last = summary_of(output), json.loads(text.splitlines()[-1])
    assert summary["valid"]["accuracy"] > 0.95 and summary["test"]["macro_f1"] > 0.95
    assert (summary["steps"], summary["train_rows"], summary["skipped_steps"]) == (60, 90, 0)
    assert last["test_macro_f1"] == summary["test"]["macro_f1"]
    assert last["valid_loss"] == summary["valid"]["loss"] and last["state"] == "finished"
    assert score_table(summary["test"]) in text and f"step {summary['best_step']}:" in text
    training = metrics(output, "train/loss")
    assert [row["step"] for row in training] == [1, 20, 40, 60]
    assert training[0]["train/loss"] == pytest.approx(np.log(3), abs=0.3)
    assert training[-1]["train/loss"] < 0.2 and training[-1]["train/accuracy"] > 0.9


def test_the_options_of_a_run_repeat_it(finished, encoder):
    path = finished[0] / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["max_length"] == 24 and saved["model"] == encoder
    again = portable_options(parse(["--config", str(path)], FinetuneOptions, ""))
    start = {"output": None, "resume": False, "overwrite": False}
    assert again == saved | start and not start.keys() & saved.keys()


def test_a_folder_that_is_named_like_a_size(encoder, files, tmp_path, monkeypatch):
    shutil.copytree(encoder, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert portable_options(FinetuneOptions(model="tiny"))["model"] == str(tmp_path / "tiny")
    assert portable_options(Config(model="tiny"))["model"] == "tiny"
    run = build("--model tiny", FP32, ["--train", files["train"], "--valid", files["valid"]])
    assert run.model.config.num_hidden_layers == 1


def test_predictions_and_picture_are_those_of_the_stock_pipeline(finished, files):
    output, rows = finished[0], read_rows(files["test"])
    found = read_rows(output / "test_predictions.csv")
    assert list(found[0]) == ["label", *ADDED]
    assert [row["label"] for row in found] == [row["label"] for row in rows]
    assert_stock_pipeline(found, output / "final", rows)
    picture = (output / "confusion.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000


def test_the_folder_opens_in_transformers_and_has_a_model_card(finished):
    folder, summary = finished[0] / "final", summary_of(finished[0])
    stock = AutoModelForSequenceClassification
    model, info = stock.from_pretrained(folder, output_loading_info=True)
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    assert type(model).__module__.startswith("transformers.")
    assert list(model.config.id2label.values()) == list(CLASSES)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 24, "a pipeline cuts there"
    data = ModelCard.load(folder / "README.md").data
    assert data.pipeline_tag == "text-classification"
    scores = {(of.dataset_name, of.metric_type): of.metric_value for of in data.eval_results}
    assert scores["test rows", "f1"] == pytest.approx(summary["test"]["macro_f1"], abs=1e-4)
    assert scores["validation rows", "accuracy"] == pytest.approx(summary["valid"]["accuracy"])
    assert model_folder(str(finished[0])) == str(folder)


# The best model.


def test_the_saved_model_is_from_the_best_evaluation(whole):
    options, output = whole
    summary, evaluated = summary_of(output), metrics(output, "eval/")
    best = max(evaluated, key=lambda row: (row["eval/macro_f1"], -row["eval/loss"]))
    assert [row["step"] for row in evaluated] == [3, 6, 9, 10]
    assert best["step"] == summary["best_step"] < 10
    rows = read_rows(options[options.index("--valid") + 1])
    labels = np.array([list(CLASSES).index(row["label"]) for row in rows])
    found = stock_probabilities(output / "final", [(row["text"],) for row in rows])
    accuracy = (found.argmax(-1) == labels).mean()
    assert accuracy == summary["valid"]["accuracy"] == best["eval/accuracy"]
    assert sklearn_loss(labels, found) == pytest.approx(summary["valid"]["loss"], rel=1e-4)
    matrix = sklearn_metrics.confusion_matrix(labels, found.argmax(-1)).tolist()
    assert summary["valid"]["confusion"] == matrix
    assert best["eval_f1/school"] == summary["valid"]["classes"]["school"]["f1"]


def test_the_best_is_by_metric_then_by_loss(data):
    run = build(data, FAST, "--metric accuracy")
    state, taken = train.TrainState(), []
    series = [(0.5, 2.0), (0.5, 2.0), (0.5, 1.5), (0.4, 0.1), (0.6, 9.0), (0.6, 9.5), (0.1, 0.0)]
    for step, (score, loss) in enumerate(series):
        state.record(step, {"accuracy": score, "macro_f1": step, "loss": loss}, run)
        taken.append((state.best_step, state.evaluations_without_gain))
    assert taken == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2)]


@pytest.mark.parametrize("score, step, noted", [(0.6, 3, True), (0.6, 2, False), (1.0, 3, False)])
def test_a_run_whose_last_step_is_its_best_says_so(score, step, noted, data):
    """Unless its score is perfect."""
    run = build(data, FAST, "--max-steps 3")
    best = {"macro_f1": score, "loss": 2.0, "confusion": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}
    notes = run.notes(train.TrainState(step=3, best_step=step, best_scores=best))
    assert any(note.startswith("--max-steps 3: ") for note in notes) is noted


# Numbers that are not finite.


def strict_json(text):
    """As parsers read it that know no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("bad", [{1}, {4}, {1, 2, 3}], ids=["one", "test", "all"])
def test_outputs_that_are_not_finite_have_no_scores(bad, data, files, output, monkeypatch):
    """Evaluations 1 to 3, then the test rows. The best of the others counts, if there is one."""
    original, calls = module.predict, []

    def spoiled(*arguments):
        calls.append(1)
        found = original(*arguments)
        return found * np.nan if len(calls) in bad else found

    monkeypatch.setattr(module, "predict", spoiled)
    command = data, FAST, "--max-steps 3 --eval-every 1", ["--test", files["test"]]
    argv = arguments_of(*command, ["--output", output])
    assert run_command(FINETUNE.main, argv) == (2 if bad == {1, 2, 3} else 0)
    rows = [strict_json(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row["eval/macro_f1"] for row in rows if "eval/macro_f1" in row}
    assert {step for step, score in evaluated.items() if score is None} == bad - {4}
    assert (output / "final").is_dir() is (len(bad) == 1)
    if len(bad) == 1:
        summary = strict_json((output / "summary.json").read_text())
        assert summary["best_step"] not in bad and summary["valid"]["loss"] > 0
        assert ("test" in summary) is (output / "test_predictions.csv").exists() is (bad == {1})
        assert any(note.startswith("--test ") for note in summary["notes"]) is (bad == {4})


def test_a_model_that_overflows_gives_a_message_and_no_labels(
    data, finished, files, output, tmp_path, capsys
):
    folder = overflowing(finished[0] / "final", tmp_path / "big")
    argv = ["--model", folder, "--input", files["test"], "--output", tmp_path / "out.csv", *FP32]
    refusal(PREDICT.main, argv, capsys, f"--model {folder}: ")
    assert not (tmp_path / "out.csv").exists()
    argv = ["--model", folder, *data[2:], *FAST, "--max-steps", "3", "--output", output]
    assert run_command(FINETUNE.main, arguments_of(argv)) == 2
    assert "3 of the 3 steps" in capsys.readouterr().err.splitlines()[-1]
    assert not (output / "final").exists() and not (output / "summary.json").exists()


def test_a_run_that_only_skips_stops(data, output):
    more = "--learning-rate 1e20 --max-steps 40 --patience 0"
    told = refused(run_of, output, data, more, names="20 steps in a row")
    assert "its data" not in told, "the guard has no command that shows it"


# Interrupted and resumed.


def assert_same_result(left, right):
    """Weights, scores, predictions and logged numbers are equal bit for bit."""
    summaries = [summary_of(output) for output in (left, right)]
    for summary in summaries:
        assert summary["state"] == "finished" and summary.pop("seconds") > 0
        del summary["sequences_per_second"], summary["tokens_per_second"]
    assert summaries[0] == summaries[1] and exact_rows(left) == exact_rows(right)
    predictions = [(of / "test_predictions.csv").read_bytes() for of in (left, right)]
    assert predictions[0] == predictions[1]
    assert_same(*(load_file(of / "final" / "model.safetensors") for of in (left, right)))
    for output in (left, right):
        assert not [*output.glob("checkpoint-*"), *output.glob(".*"), *output.glob("best")]


@pytest.fixture(scope="session")
def whole(encoder, files, tmp_path_factory):
    """(options, folder) of an uninterrupted run whose best model is not the last."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [make_rows(48, 35, noise=0.5), make_rows(60, 5, noise=0.4)]
    paths = [write_rows(folder / f"{name}.csv", of) for name, of in zip(("train", "valid"), rows)]
    options = ["--model", encoder, "--train", paths[0], "--valid", paths[1]]
    options += ["--test", files["test"], *FP32]
    options += arguments_of("--batch-size 8 --learning-rate 3e-2 --max-steps 10 --eval-every 3")
    printed(FINETUNE.main, options, ["--output", folder / "run"])
    assert 3 < summary_of(folder / "run")["best_step"] < 10
    return options, folder / "run"


@pytest.mark.parametrize(
    "target, name, call",
    [
        (train, "train_step", 6),
        (module, "predict", 2),
        (ckpt, "sync", 25),
        (module, "predict", 5),  # of the test rows
        (module.FinetuningRun, "export", 6),  # final/
        (train, "write_json", 1),  # the summary
    ],
)
def test_killed_anywhere_then_resumed(target, name, call, whole, output, tmp_path, monkeypatch):
    options, undisturbed = whole
    command = [*options, "--save-every", "2", "--resume", "--output", output]
    kill = at(target, name, call, send(signal.SIGKILL))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    given = {"prepare": lambda rank: kill()}
    ((code, text),) = in_processes(tmp_path, FINETUNE.main, command, **given)
    assert code == -signal.SIGKILL, text
    printed(FINETUNE.main, command)
    assert_same_result(undisturbed, output)


def test_a_signal_during_an_evaluation_saves_and_exits(whole, output, monkeypatch, capsys):
    options, undisturbed = whole
    with monkeypatch.context() as patch:
        at(module, "predict", 2, send(signal.SIGINT), patch.setattr)()
        argv = arguments_of(options, ["--output", output])
        assert run_command(FINETUNE.main, argv, FINETUNE.HINT) == 128 + signal.SIGINT
    error = capsys.readouterr().err
    assert "step 6 of 10" in error and "--resume" in error and "Traceback" not in error
    assert "SIGINT" in summary_of(output)["state"]
    assert [ckpt.step_of(path) for path in ckpt.checkpoints(output)] == [6]
    printed(FINETUNE.main, "--resume", ["--output", output])
    assert_same_result(output, undisturbed)


def test_a_signal_at_the_end_keeps_the_result(whole, output, monkeypatch):
    options, undisturbed = whole
    with monkeypatch.context() as patch:
        at(module, "predict", 5, send(signal.SIGTERM), patch.setattr)()  # of the test rows
        assert run_command(FINETUNE.main, arguments_of(options, ["--output", output])) == 0
    assert_same_result(output, undisturbed)


def test_a_finished_run_in_a_read_only_folder_is_reported(whole, output):
    shutil.copytree(whole[1], output)
    output.chmod(0o555)
    given = {"prepare": lambda rank: without_privileges()}
    argv = ["--resume", "--output", output]
    ((code, told),) = in_processes(output.parent, FINETUNE.main, argv, **given)
    output.chmod(0o755)
    assert (code, told) == (0, "")


@pytest.mark.parametrize("name", ["summary.json", "final/model.safetensors"])
def test_a_damaged_result_is_made_again(name, whole, output):
    """Empty, as after a power failure, or with another number."""
    undisturbed = whole[1]
    is_summary = name == "summary.json"
    content = b"" if is_summary else (undisturbed / name).read_bytes().replace(b"1", b"2")
    shutil.copytree(undisturbed, output)
    (output / name).write_bytes(content)
    assert str(output / name) in printed(FINETUNE.main, "--resume", ["--output", output])
    assert_same_result(output, undisturbed)


@pytest.fixture
def stopped(whole, output):
    """The folder of a run that stopped after a step."""
    printed(FINETUNE.main, whole[0], "--max-minutes 1e-9", ["--output", output])
    assert "--max-minutes" in summary_of(output)["state"]
    return output


def test_a_resumed_run_refuses_other_options_and_other_rows(stopped, whole, files, capsys):
    for name, value in (("--label-budget", "30"), ("--train", files["valid"])):
        command = ["--resume", "--output", stopped, name, value]
        assert refusal(FINETUNE.main, command, capsys).startswith(f"{name} {value}: ")
        command[2] = whole[1]  # finished, so it has no checkpoint
        assert refusal(FINETUNE.main, command, capsys).startswith(f"{name} {value}: ")
    path = Path(json.loads((stopped / "config.json").read_text())["valid"][0])
    rows = path.read_text()
    write_rows(path, make_rows(60, 9))
    assert "rows have changed" in refusal(FINETUNE.main, ["--resume", "--output", stopped], capsys)
    path.write_text(rows)
    more = "--max-minutes 0 --max-steps 3 --patience 9 --keep 9 --micro-batch-size 8"
    printed(FINETUNE.main, "--resume", ["--output", stopped], more)
    assert summary_of(stopped)["steps"] == 3, "these may change"


def test_a_new_run_does_not_start_in_the_folder_of_an_unfinished_one(stopped, whole, capsys):
    command = [*whole[0], "--output", stopped]
    text = refusal(FINETUNE.main, command, capsys)
    assert text.startswith(f"--output {stopped}: ") and "--resume" in text
    printed(FINETUNE.main, command, "--overwrite")
    assert_same_result(stopped, whole[1])


# Options.


def test_balanced_weights_are_scikit_learns(data, files):
    labels, names = [row["label"] for row in read_rows(files["train"])], np.array(list(CLASSES))
    expected = compute_class_weight("balanced", classes=names, y=labels)
    run = build(data, FAST, "--class-weights balanced")
    np.testing.assert_allclose(run.datasets["train"].class_weights, expected)
    torch.testing.assert_close(run.model.class_weights, torch.from_numpy(expected).float())
    few = build(data, FAST, "--class-weights balanced --label-budget 4")
    np.testing.assert_allclose(few.datasets["train"].class_weights, [4 / 6, 4 / 3, 4 / 3])
    assert build(data, FAST).model.class_weights is None


def test_a_label_budget_takes_rows_of_each_class_by_the_seed(data, files):
    def rows(budget, seed=0):
        run = build(data, FAST, f"--label-budget {budget} --seed {seed}")
        assert len(run.datasets["valid"]) == 40
        return list(zip(run.datasets["train"].rows.texts, run.datasets["train"].rows.labels))

    few = rows(6)
    every = [((row["text"],), row["label"]) for row in read_rows(files["train"])]
    assert set(few) < set(every) and {label for _, label in few} == CLASSES.keys()
    assert rows(30)[:6] == few != rows(6, 1)


def test_steps_and_lengths_follow_from_the_options(data, output):
    def numbers(more):
        run = build(data, FAST, more, ["--output", output])
        length = run.datasets["train"].max_length
        return run.total_steps, run.eval_every, run.save_every, length, run.micro_batch_size

    assert numbers("") == (60, 6, 0, 64, 16)
    more = "--eval-every 4 --save-every epoch --max-length 32 --micro-batch-size 8"
    assert numbers(f"--epochs 0.5 {more}") == (3, 4, 6, 32, 8)
    assert numbers("--max-steps 77 --save-every 5")[:3] == (77, 6, 5)
    assert not output.exists(), "what only reads writes nothing"


def test_rows_that_are_cut_or_trained_on_are_reported(data, files, tmp_path, capsys):
    mixed = read_rows(files["valid"])[:9] + read_rows(files["train"])[:5]
    path = write_rows(tmp_path / "mixed.csv", mixed)
    argv = data, FAST, "--max-length 12", ["--test", path]
    module.build(parse(arguments_of(*argv), FinetuneOptions, ""))
    *_, line, last = capsys.readouterr().out.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(data[1])
    cut = sum(len(tokenizer(row["text"])["input_ids"]) > 12 for row in mixed)
    assert cut and line.startswith("--test: 14 rows, ") and f" {cut} over 12 tokens" in line
    assert last.startswith(f"--test {path}: 5 of 14 texts ")


def test_rows_that_the_tokenizer_does_not_know_are_refused(data, files, tmp_path, capsys):
    """Before training."""
    foreign = [row | {"text": row["text"] + " москва" * 30} for row in read_rows(files["train"])]
    path = write_rows(tmp_path / "foreign.csv", foreign)
    told = refusal(FINETUNE.main, [*data, *FAST, "--train", path], capsys)
    assert told.startswith(f"--train {path}: ") and "Cyrillic" in told
    assert "--tokenizer" not in told  # finetune.py has no such option


# A result that is replaced.


def test_a_result_is_replaced_once_the_new_one_is_complete(data, tmp_path, monkeypatch):
    output, aside = tmp_path / "run", tmp_path / ".run.replaced"
    options = output, data, "--max-steps 2"
    run_of(*options)
    first = (output / "summary.json").read_text()
    refused(run_of, *options, begins=f"--output {output}")
    for _ in range(2):  # what a failed run leaves replaces nothing
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of luck"):
            patch.setattr(module, "predict", fail(RuntimeError("out of luck")))
            run_of(*options, "--overwrite")
        assert not (output / "summary.json").exists() and not (output / "final").exists()
        assert (aside / "summary.json").read_text() == first
        assert (aside / "final").is_dir()
    run_of(*options, "--overwrite --seed 5")
    assert not aside.exists() and (output / "summary.json").read_text() != first
    assert {row["step"] for row in metrics(output, "")} == {1, 2}, "nothing of the old run"
    (output / "notes.txt").write_text("mine")
    refused(run_of, *options, "--overwrite", begins=f"--output {output}", names="notes.txt")


# Scores.


@pytest.mark.parametrize("present", [[0, 1, 2, 3], [0, 2]], ids=["all", "two"])
def test_scores_are_those_of_scikit_learn(present):
    """Macro averages are over the classes that occur or are predicted, as in its report."""
    source, tally = np.random.default_rng(1), Tally(["a", "b", "c", "d"])
    labels = source.choice(present, 50)
    found = source.dirichlet(np.ones(4), 50).astype(np.float32)
    found[:, [number for number in range(4) if number not in present]] *= 1e-3
    found /= found.sum(1, keepdims=True)
    found[0] = np.eye(4)[(labels[0] + 1) % 4]  # certain, and wrong: its loss is large and finite
    for part in (slice(7), slice(7, 7), slice(7, 50)):
        tally.add(labels[part], found[part])
    scores, predicted = tally.scores(), found.argmax(-1)
    report = sklearn_report(labels, predicted)
    assert scores["accuracy"] == pytest.approx(np.mean(labels == predicted))
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "rows": "support"}
    for name, theirs in names.items():
        if name != "rows":
            assert scores[f"macro_{name}"] == pytest.approx(report["macro avg"][theirs])
        for number, label in enumerate(tally.classes):
            expected = report.get(str(number), {theirs: 0.0})[theirs]
            assert scores["classes"][label][name] == pytest.approx(expected)
    expected = sklearn_metrics.matthews_corrcoef(labels, predicted)
    assert scores["matthews"] == pytest.approx(expected)
    rest = sklearn_loss(labels[1:], found[1:], labels=range(4)) * 49
    assert scores["loss"] == pytest.approx((rest - np.log(1e-30)) / 50, rel=1e-5)
    matrix = sklearn_metrics.confusion_matrix(labels, predicted, labels=range(4)).tolist()
    assert scores["confusion"] == matrix
    shown = [f"{scores['classes']['a'][name]:.3f}" for name in ("precision", "recall", "f1")]
    table = score_table(scores).splitlines()
    assert table[1].split() == ["a", *shown, str(np.sum(labels == 0))] and len(table) == 7


# Bad input of finetune.py.

GOOD = "".join(f"words {number},{'ab'[number % 2]}\n" for number in range(8))


@pytest.mark.parametrize(
    "name, content, where, value",
    [
        ("train.csv", f"{GOOD} ,b\n", ", line 10:", "text"),
        ("train.csv", f"{GOOD}x,3\n", ":", "'3' ({path}, line 10)"),
        ("valid.csv", f"{GOOD}x,c\n", ", line 10:", "'c'"),
        ("test.csv", "x,2.0\n", ", line 2:", "'2.0'"),
        ("train.csv", "", ":", "no rows"),
        ("train.csv", "Grüße,a\n", "", "UTF-8"),
        ("valid.txt", GOOD, ":", ".tsv"),  # it may be renamed
        ("test.conll", "x B-X\n", ":", "csv, tsv, jsonl, parquet"),
    ],
)
def test_bad_rows_are_reported_in_one_line(name, content, where, value, encoder, tmp_path, capsys):
    argv, option = ["--model", encoder, "--output", tmp_path / "run"], name.partition(".")[0]
    for each in ("train", "valid", "test"):
        path = tmp_path / (name if each == option else f"{each}.csv")
        path.write_text(f"text,label\n{content if each == option else GOOD}", encoding="latin-1")
        argv += [f"--{each}", path]
    path = tmp_path / name
    text = refusal(FINETUNE.main, argv, capsys, f"--{option} {path}{where}")
    assert value.format(path=path) in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, option",
    [
        ("--label-budget 91", ""),
        ("--label-budget 2", ""),
        ("--max-length 65", ""),
        ("--train absent.csv", ""),
        ("--precision fp16", ""),
        ("--model absent", ""),
        ("--output {train}", "--output {train}:"),
        ("--text-pair-field id --text-field other", "--train {train}, line 1:"),
        ("--micro-batch-size 5", "--batch-size"),
        ("--epochs 0", "--epochs 0.0:"),
        ("--task ner --metric accuracy", ""),
        ("--class-weights balanced --task ner", ""),
        ("--text-pair-field label --task ner", ""),
        ("--task spans", ""),
    ],
)
def test_bad_options_of_finetune_are_one_line(more, option, data, files, output, capsys):
    argv = [*data, *FAST, "--output", output, *(part.format(**files) for part in more.split(" "))]
    refusal(FINETUNE.main, argv, capsys, option.format(**files) or f"{more}:", output)


@pytest.fixture
def misfits(encoder, finished, vocabulary, tmp_path):
    """name -> folder of a model that does not match its tokenizer, or has no tokenizer."""
    stock = AutoModelForSequenceClassification.from_config
    for name, size, settings in (
        ("bare", vocabulary.size, {}),
        ("small", vocabulary.size - 30, {}),
        ("one type", vocabulary.size, {"type_vocab_size": 1}),
        ("several", vocabulary.size, {"problem_type": "multi_label_classification"}),
    ):
        no_tokenizer = shutil.ignore_patterns("tokenizer*") if name == "bare" else None
        shutil.copytree(finished[0] / "final", tmp_path / name, ignore=no_tokenizer)
        stock(small_config(size, **settings)).save_pretrained(tmp_path / name)
    spoiled = shutil.copytree(finished[0] / "final", tmp_path / "not finite")
    change_weights(spoiled, lambda weights: weights["classifier.bias"][0].fill_(np.nan))
    return {path.name: path for path in tmp_path.iterdir()}


def test_models_that_do_not_fit_are_reported(data, finished, misfits, tmp_path, capsys):
    for name, more, option in (
        ("not finite", [], f"--model {misfits['not finite']}:"),
        ("bare", [], f"--model {misfits['bare']}:"),
        ("small", [], f"--model {misfits['small']}:"),
        ("one type", ["--text-pair-field", "id"], "--text-pair-field id:"),
    ):
        argv = ["--model", misfits[name], *data[2:], *more, "--output", tmp_path / "run"]
        refusal(FINETUNE.main, argv, capsys, option)
    refusal(FINETUNE.main, [*data, "--output", finished[0]], capsys, f"--output {finished[0]}:")


def test_several_processes_are_refused(data, finished, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    predicting = ["--model", finished[0], "--input", files["test"]]
    for main, argv in ((FINETUNE.main, data), (PREDICT.main, predicting)):
        argv = [*argv, "--output", tmp_path / "out.csv"]
        assert "torchrun" in refusal(main, argv, capsys, "--device auto")
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_a_run_starts_from_a_fine_tuned_run_with_its_head(data, finished, tmp_path):
    """A run folder stands for its model; with the same labels, the head is kept if wanted."""
    argv = ["--model", finished[0], *data[2:], *FAST, "--output", tmp_path / "run"]
    run, fresh = build(argv), build(argv, keep_head=False)
    weights = load_file(finished[0] / "final" / "model.safetensors")
    assert all(torch.equal(weights[name], of) for name, of in run.model.state_dict().items())
    scores = run.validate(0, lambda: 0, None)
    assert scores["accuracy"] > 0.95
    assert not torch.equal(fresh.model.classifier.weight, weights["classifier.weight"])


# Prediction.


@pytest.fixture
def predict_argv(finished, tmp_path):
    """Options of predict.py, given files."""

    def argv(paths, output="out.jsonl", *more):
        paths = paths if isinstance(paths, list) else [paths]
        options = ["--model", finished[0], "--input", *paths, "--output", tmp_path / output]
        return arguments_of(options, FP32, *more)

    return argv


@pytest.mark.parametrize("read_as, written_as, chunk", [("csv", "jsonl", 4), ("jsonl", "csv", 99)])
def test_rows_come_back_in_order_with_the_numbers_of_the_stock_pipeline(
    read_as, written_as, chunk, finished, predict_argv, tmp_path, monkeypatch
):
    monkeypatch.setattr(PREDICT, "CHUNK", chunk)
    rows = [row | {"note": 'a, "b"\nc'} for row in make_rows(23, 9, noise=0.3)]
    path, output = write_rows(tmp_path / f"in.{read_as}", rows), tmp_path / f"out.{written_as}"
    text = printed(PREDICT.main, predict_argv(path, output.name, "--batch-size 3"))
    found, last = read_rows(output), json.loads(text.splitlines()[-1])
    assert list(found[0]) == [*rows[0], *ADDED]
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert_stock_pipeline(found, finished[0] / "final", rows)
    report = sklearn_report(*([row[name] for row in found] for name in ("label", ADDED[0])))
    assert last["rows"] == 23 and last["accuracy"] == pytest.approx(report["accuracy"])
    assert last["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"])
    assert 0.5 < last["accuracy"] < 1 and "not scored" not in text and "--model" not in text


def test_rows_stream_a_chunk_at_a_time(predict_argv, tmp_path, monkeypatch):
    monkeypatch.setattr(PREDICT, "CHUNK", 4)
    task, read_rows, seen = TASKS["classification"], [], []
    documents = task.documents

    def counted_documents(*arguments):
        read_rows.clear()  # they were checked before
        for row in documents(*arguments):
            read_rows.append(row)
            yield row

    def count(model, dataset, *more):
        seen.append((len(read_rows), len(dataset)))

    monkeypatch.setattr(task, "documents", counted_documents)
    at(predict, "predict", 0, count, monkeypatch.setattr)()
    PREDICT.main(predict_argv(write_rows(tmp_path / "in.jsonl", make_rows(10, 8))))
    assert seen == [(4, 4), (8, 4), (10, 2)]


def test_rows_without_a_known_label_are_predicted_but_not_scored(predict_argv, tmp_path):
    rows = make_rows(12, 8)
    for number, label in ((1, "sports"), (4, None), (5, "sports"), (6, "  "), (7, 1.5)):
        rows[number]["label"] = label
    del rows[9]["label"]
    rows[2]["label"] += " "  # a label, as in training
    text = printed(PREDICT.main, predict_argv(write_rows(tmp_path / "in.jsonl", rows)))
    found, lines = read_rows(tmp_path / "out.jsonl"), text.splitlines()
    assert [row.get("label") for row in found] == [row.get("label") for row in rows]
    assert "label" not in found[9] and {row["predicted_label"] for row in found} <= CLASSES.keys()
    known = [number for number, row in enumerate(rows) if str(row.get("label")).strip() in CLASSES]
    right = [found[n]["predicted_label"] == rows[n]["label"].strip() for n in known]
    assert json.loads(lines[-1])["accuracy"] == pytest.approx(sum(right) / 6) and len(known) == 6
    assert lines[-2].startswith("not scored: 6 rows") and lines[-4].split()[-1] == "6"


def test_without_a_single_known_label_there_is_no_score(predict_argv, tmp_path):
    rows = [{"text": row["text"]} for row in make_rows(3, 8)]
    text = printed(PREDICT.main, predict_argv(write_rows(tmp_path / "in.csv", rows)))
    assert "not scored: 3 rows" in text and json.loads(text.splitlines()[-1]) == {"rows": 3}


@pytest.mark.parametrize("encoding, mark", [("utf-8", b""), ("gbk", BOM_UTF8)])
def test_predictions_can_be_opened_where_their_rows_were(encoding, mark, predict_argv, tmp_path):
    """Without a byte-order mark, spreadsheets take UTF-8 for the encoding of the system."""
    (tmp_path / "in.csv").write_text("text,备注\nbank,好\n", encoding=encoding)
    PREDICT.main(predict_argv(tmp_path / "in.csv", "out.csv", f"--encoding {encoding}"))
    assert (tmp_path / "out.csv").read_bytes().startswith(mark + "text,备注,".encode())


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_half_a_surrogate_pair_in_another_column_is_kept_as_an_escape(name, predict_argv, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "bank", "note": "\\ud800"}\n')
    PREDICT.main(predict_argv(tmp_path / "in.jsonl", name))
    assert read_rows(tmp_path / name)[0]["note"] == ("\ud800" if name == "out.jsonl" else "\\ud800")


def test_a_full_disk_is_not_taken_for_other_columns():
    with pytest.raises(OSError, match="No space"):
        predict.write_rows(Path("/dev/full"), ({"text": "a" * 99} for _ in range(999)), True)


def test_several_files_other_columns_pairs_and_truncation(finished, predict_argv, tmp_path):
    rows = [{"body": of["text"], "kind": of["label"], "second": "slow"} for of in make_rows(7, 3)]
    rows[0]["body"] += " bank" * 40
    paths = [write_rows(tmp_path / "z.csv", rows[:3]), write_rows(tmp_path / "a.jsonl", rows[3:])]
    options = "--text-field body --label-field kind --max-length 10 --overwrite"
    for pair in ("", "--text-pair-field second"):
        argv = predict_argv(paths, "out.jsonl", options, pair)
        assert "accuracy" in json.loads(printed(PREDICT.main, argv).splitlines()[-1])
        found = read_rows(tmp_path / "out.jsonl")
        assert [row["kind"] for row in found] == [row["kind"] for row in rows]
        parts = [(row["body"], row["second"])[: 1 + bool(pair)] for row in found]
        expected = stock_probabilities(finished[0] / "final", parts, max_length=10)
        mine = [[row[name] for name in PROBABILITIES] for row in found]
        np.testing.assert_allclose(mine, expected, atol=2e-5)


def test_output_may_replace_a_file_or_its_own_input(predict_argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PREDICT, "CHUNK", 4)
    rows, path = make_rows(11, 7), tmp_path / "rows.csv"
    write_rows(path, rows)
    refusal(PREDICT.main, predict_argv(path, path.name), capsys, f"--output {path}:")
    printed(PREDICT.main, predict_argv(path, path.name, "--overwrite"))
    assert [row["text"] for row in read_rows(path)] == [row["text"] for row in rows]
    assert "predicted_label" in read_rows(path)[0]


@pytest.mark.parametrize(
    "written_as, spoil, wheres",
    [
        ("jsonl", {2: {"text": " "}, 9: {"text": None}}, ["line 3", "line 10"]),
        ("jsonl", {9: {"predicted_label": "x"}}, ["line 10"]),
        ("csv", {9: {"new": 1}}, ["line 10"]),
    ],
    ids=["blank", "taken", "other columns"],
)
def test_wrong_rows_are_reported_before_any_work_and_nothing_is_left(
    written_as, spoil, wheres, predict_argv, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(PREDICT, "CHUNK", 4)
    path, output = tmp_path / "in.jsonl", tmp_path / f"out.{written_as}"
    monkeypatch.setattr(predict, "predict", fail(AssertionError("predicts too early")))
    write_rows(path, [row | spoil.get(number, {}) for number, row in enumerate(make_rows(12, 6))])
    output.write_text("old")
    lines = refusal(PREDICT.main, predict_argv(path, output.name, "--overwrite"), capsys)
    for line, where in zip(lines.splitlines(), wheres, strict=True):
        assert line.startswith(f"--input {path}, {where}")
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.jsonl", output.name}
    assert output.read_text() == "old"


def test_bad_input_of_predict_is_reported_in_one_line(
    encoder, files, misfits, predict_argv, tmp_path, capsys
):
    (tmp_path / "rows.txt").write_text("text\nwords\n")
    (tmp_path / "header.csv").write_text("text,label\n")
    models = [encoder, tmp_path / "absent"]
    models += [misfits[name] for name in ("bare", "small", "several", "not finite")]
    inputs = [tmp_path / name for name in ("header.csv", "rows.txt", "absent.csv")]
    for paths, more, option in (
        *((files["test"], ["--model", model], f"--model {model}:") for model in models),
        *((path, [], f"--input {path}:") for path in inputs),
        (files["test"], ["--text-field", "body"], f"--input {files['test']}, line 1:"),
        (files["test"], ["--output", tmp_path / "o.txt"], f"--output {tmp_path / 'o.txt'}:"),
        (files["test"], ["--output", f"{files['test']}/o.csv"], f"--output {files['test']}/o.csv:"),
        (files["test"], ["--max-length", "65"], "--max-length 65:"),
    ):
        refusal(PREDICT.main, predict_argv(paths, "out.jsonl", more), capsys, option)
        assert not (tmp_path / "out.jsonl").exists()
