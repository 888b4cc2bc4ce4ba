"""A suite of small tasks: its numbers are those of its runs, and only what changed runs again."""

import json
import shutil
from statistics import mean, stdev

import pytest
import torch
from conftest import refusal, save, script
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SUITE = script("suite").main
FAST = "--max-steps 2 --batch-size 8 --max-length 16 --learning-rate 1e-2 --precision fp32"
SMALL = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16)


def write_rows(path, header, count):
    rows = [f"river {n} bank,{'odd' if n % 2 else 'even'},money" for n in range(count)]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join([header, *rows]) + "\n", "utf-8")


@pytest.fixture(scope="module")
def place(tiny_tokenizer, tmp_path_factory):
    """A model and two tasks, one of them with other names, pairs and no test rows."""
    folder = tmp_path_factory.mktemp("suite")
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(tiny_tokenizer), **SMALL))
    save(folder / "model", model, tiny_tokenizer)
    for split in ("train", "valid", "test"):
        write_rows(folder / "tasks" / "plain" / f"{split}.csv", "text,label,more", 16)
    pairs = folder / "tasks" / "pairs"
    for split in ("first_train", "dev", "test"):
        write_rows(pairs / f"{split}.csv", "sentence1,gold,sentence2", 16)
    values = {"train": "first_*.csv", "test": None, "text_field": "sentence1"}
    values |= {"text-pair-field": "sentence2", "label_field": "gold", "metric": "accuracy"}
    (pairs / "task.json").write_text(json.dumps(values), "utf-8")
    return folder


@pytest.fixture
def plain(place, tmp_path):
    """A folder with one of the tasks."""
    shutil.copytree(place / "tasks" / "plain", tmp_path / "tasks" / "plain")
    return tmp_path / "tasks"


def options_for(place, tasks, output, *more):
    options = {"--model": place / "model", "--tasks": tasks, "--output": output, "--finetune": FAST}
    return [*(str(word) for pair in options.items() for word in pair), *more]


def saved(output):
    """Name of each result -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "parts").iterdir()}


def test_its_numbers_are_those_of_its_runs_and_it_runs_only_what_is_missing(place, tmp_path):
    tasks, output = tmp_path / "tasks", tmp_path / "out"
    shutil.copytree(place / "tasks", tasks)
    SUITE(options_for(place, tasks, output, "--seeds", "2"))
    facts, first = json.loads((output / "suite.json").read_text()), saved(output)
    splits = {name: task["split"] for name, task in facts["tasks"].items()}
    assert splits == {"pairs": "valid", "plain": "test"}
    for name, task in facts["tasks"].items():
        for seed, score in enumerate(task["scores"]):
            (folder,) = (output / "runs").glob(f"{name}-{seed}-*")
            summary = json.loads((folder / "summary.json").read_text())
            assert score == summary[task["split"]][task["metric"]]
            options = json.loads((folder / "config.json").read_text())
            assert (options["seed"], options["save_model"]) == (seed, False)
        report = (output / "report.md").read_text()
        assert f"{mean(task['scores']):.3f} ± {stdev(task['scores']):.3f}" in report
    columns = zip(*(task["scores"] for task in facts["tasks"].values()))
    assert facts["averages"] == [mean(column) for column in columns]

    next((output / "parts").glob("plain-0-*")).unlink()  # as if it was interrupted
    shutil.rmtree(output / "runs")
    (output / "report.md").unlink()
    SUITE(options_for(place, tasks, output, "--seeds", "2"))
    assert (output / "report.md").read_text() == report
    again = saved(output)
    assert first.keys() == again.keys() and len(first.items() - again.items()) == 1

    write_rows(tasks / "plain" / "train.csv", "text,label,more", 24)
    SUITE(options_for(place, tasks, output, "--seeds", "2"))
    new = saved(output)
    assert again.items() <= new.items()  # nothing ran twice
    names = sorted(name.rsplit("-", 1)[0] for name in new.keys() - again.keys())
    assert names == ["plain-0", "plain-1"]


def test_another_model_on_the_hub_is_fine_tuned_anew(
    place, plain, tiny_tokenizer, tmp_path, on_hub
):
    output = tmp_path / "out"
    for name in ("a/one", "b/two"):
        model = BertModel(BertConfig(vocab_size=len(tiny_tokenizer), **SMALL))
        save(on_hub(name), model, tiny_tokenizer)
        SUITE(options_for(place, plain, output, "--seeds", "1", "--model", name))
    assert len(saved(output)) == 2


def test_another_model_with_pickled_weights_is_fine_tuned_anew(place, plain, tmp_path):
    pickled, output = tmp_path / "pickled", tmp_path / "out"
    shutil.copytree(place / "model", pickled)
    weights = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    for scale in (1, 2):
        torch.save(
            {key: scale * value for key, value in weights.items()}, pickled / "pytorch_model.bin"
        )
        SUITE(options_for(place, plain, output, "--seeds", "1", "--model", str(pickled)))
    assert len(saved(output)) == 2


def test_a_task_runs_again_if_its_files_change_places(place, plain, tmp_path):
    output = tmp_path / "out"
    write_rows(plain / "plain" / "test.csv", "text,label,more", 24)
    for splits in ({}, {"valid": "test.csv", "test": "valid.csv"}):
        (plain / "plain" / "task.json").write_text(json.dumps(splits), "utf-8")
        SUITE(options_for(place, plain, output, "--seeds", "1"))
    assert len(saved(output)) == 2


def test_a_file_of_options_keeps_those_of_the_tasks(place, tmp_path):
    output, options = tmp_path / "out", tmp_path / "options.json"
    options.write_text(json.dumps({"max-steps": 1, "learning-rate": 1e-2}), "utf-8")
    more = ["--seeds", "1", "--finetune", f"--config {options}"]
    SUITE(options_for(place, place / "tasks", output, *more))
    facts = json.loads((output / "suite.json").read_text())["tasks"]
    assert (facts["pairs"]["metric"], facts["plain"]["metric"]) == ("accuracy", "macro_f1")
    for folder in (output / "runs").iterdir():
        assert json.loads((folder / "config.json").read_text())["max_steps"] == 1


@pytest.mark.parametrize(
    "file, content, named",
    [
        ("plain/valid.csv", None, ["plain", "valid"]),
        ("pairs/task.json", '{"seed": 1}', ["seed"]),
        ("pairs/task.json", '{"color": 1}', ["color"]),
        ("plain/task.json", "{", ["plain", "JSON"]),
        ("plain/task.json", '{"label_field": "class"}', ["plain", "class"]),
        ("plain/task.json", '{"valid": null}', ["plain", "--valid", "missing"]),
        ("plain/train.csv", "text,label\n今天,odd\n很好,even\n", ["plain", "--train", "unknown"]),
        ("plain/task.json", '{"train": ["train.csv", 5]}', ["plain", "task.json", "train"]),
        ("plain/task.json", '{"train": "/train.csv"}', ["plain", "task.json", "train"]),
        ("plain/train.1k.csv", "text,label", ["plain", "train.1k.csv, train.csv"]),
    ],
)
def test_a_bad_task_is_named_before_any_work(file, content, named, place, tmp_path, capsys):
    tasks, output = tmp_path / "tasks", tmp_path / "out"
    shutil.copytree(place / "tasks", tasks)
    (tasks / file).unlink() if content is None else (tasks / file).write_text(content)
    message = refusal(SUITE, options_for(place, tasks, output), capsys)
    assert all(word in message for word in ["--tasks", *named])
    assert not (output / "parts").exists()


@pytest.mark.parametrize("names", [["report.md", "runs"], ["experiment.json", "parts"]])
def test_a_folder_that_no_suite_wrote_is_refused(names, place, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    for name in names:
        (output / name).write_text("mine")
    argv = options_for(place, place / "tasks", output)
    assert refusal(SUITE, argv, capsys).startswith(f"--output {output}: ")
    assert {path.name for path in output.iterdir()} == set(names)


@pytest.mark.parametrize(
    "more, option",
    [
        (["--finetune", "--seed 3"], "--seed"),
        (["--finetune", "--train x.csv"], "--train"),
        (["--seeds", "0"], "--seeds"),
        (["--tasks", "nowhere"], "--tasks"),
        (["--tasks", "{place}/model"], "--tasks"),  # no folder is in it
    ],
)
def test_bad_options_are_refused(more, option, place, tmp_path, capsys):
    more = [word.format(place=place) for word in more]
    argv = options_for(place, place / "tasks", tmp_path / "out", *more)
    assert option in refusal(SUITE, argv, capsys)
