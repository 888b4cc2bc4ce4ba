"""The experiment from end to end on a tiny encoder.

The report shows the results of the parts, the parts equal the single commands, an interrupted,
extended or restarted experiment gives the same result, and bad input is refused.
"""

import base64
import json
import re
import shlex
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import (
    at,
    fail,
    make_documents,
    read_rows,
    refusal,
    rows,
    save,
    script,
    write_documents,
    write_rows,
)
from transformers import BertConfig, BertForPreTraining, BertModel

from pretrain import bootstrap, plots, train
from pretrain.adapt import pipeline
from pretrain.adapt.checks import build_experiment
from pretrain.cli import parse, run_command
from pretrain.config import AdaptOptions, FinetuneOptions
from pretrain.data import tokenizer as tokenizers

f1_score = pytest.importorskip("sklearn.metrics").f1_score

ADAPT = script("adapt").main
SMALL = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16)
STEPS = "--max-steps 3 --eval-every 1 --max-length 32 --learning-rate 3e-2 --precision fp32"
PRETRAIN = f"{STEPS} --batch-size 4 --save-every 1 --log-every 1 --objective mlm --eval-tokens 500"
FINE = f"{STEPS} --batch-size 8"
ENCODERS, BUDGETS = ("base", "adapted", "control"), {"12": 12, "all": 30}
LABELS = ["even|<b>", "odd"]


def labeled(texts):
    return [{"text": text, "label": LABELS[len(text.split()) % 2 == 0]} for text in texts]


@pytest.fixture(scope="module")
def place(documents, all_sentences, tmp_path_factory):
    """An encoder, texts and labeled rows.

    Both texts contain the first test row and the last one, which has two sentences."""
    folder = tmp_path_factory.mktemp("adapt")
    drawn = [sentence for document in make_documents(60, 5) for sentence in document]
    sentences = [sentence for sentence in drawn if 3 < len(sentence.split()) < 15]
    test = [*sentences[42:60], "\n".join(sentences[60:62])]
    texts = {"valid-1": sentences[30:40], "valid-2": sentences[40:42]}
    for name, of in (texts | {"train": sentences[:30], "test": test}).items():
        write_rows(folder / f"{name}.csv", labeled(of))
    last = sentences[60:62]
    copies = [[test[0].replace(" ", "  "), *documents[0]], [*documents[1], *last, "river ."], last]
    for name, of in (("text", documents[2:22]), ("control", make_documents(18, 11))):
        write_documents(folder / f"{name}.txt", [*of, *copies])
    tokenizer = tokenizers.train(lambda: iter(all_sentences), 120)
    torch.manual_seed(0)  # encoders with scores that differ
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **SMALL)
    for name, kind in (("model", BertForPreTraining), ("headless", BertModel)):
        save(folder / name, kind(config), tokenizer)
    return folder


@pytest.fixture(scope="module")
def small(place, cache):
    """Options with one budget, one seed and no control."""
    files = {"text": "text.txt", "train": "train.csv", "valid": "valid-*.csv", "test": "test.csv"}
    return {
        "model": place / "model",
        **{name: place / file for name, file in files.items()},
        "pretrain": f"{PRETRAIN} --cache {cache}",
        "finetune": FINE,
        "seeds": 1,
        "label_budgets": [12],
    }


@pytest.fixture(scope="module")
def whole(small, place):
    return small | {"control": place / "control.txt", "seeds": 2, "label_budgets": [*BUDGETS]}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Skips plots and intervals, which test_report.py tests."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(bootstrap, "DRAWS", 400)
        for name in ("overlap", "curves", "confusion"):
            context.setattr(plots, name, lambda path, *_: path.write_bytes(path.name.encode()))
        yield


def argv(options, output, **more):
    """The command line for these options; True is a switch."""
    words = []
    for name, value in (options | more | {"output": output}).items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def adapt(options, output, **more):
    """Run an experiment; returns its folder."""
    ADAPT(argv(options, output, **more))
    return output


@pytest.fixture(scope="module")
def finished(whole, place):
    """The uninterrupted experiment, for comparison."""
    return adapt(whole, place / "finished")


@pytest.fixture(scope="module")
def finished_small(small, place):
    return adapt(small, place / "small")


def part(folder, name):
    return json.loads((folder / "parts" / f"{name}.json").read_text(encoding="utf-8"))


def report_of(folder):
    """The report without times, machine and commands (which name the folder)."""
    return (folder / "report.md").read_text(encoding="utf-8").split("## Time")[0]


def tables(text):
    """[[cells as text]] of every table, without the line below its header."""
    found = []
    for lines in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in lines.strip().split("\n")]
        found.append([[cell.strip() for cell in row] for row in cells if row[0] != "---"])
    return found


def fine_tunings(monkeypatch):
    """A list that collects the names of fine-tuning runs as they start."""
    names = []

    def note(run):
        if isinstance(run.config, FinetuneOptions):
            names.append(run.output.name)

    at(pipeline, "train", 0, note, monkeypatch.setattr)()
    return names


def interrupted(arguments, module, name, number):
    """Run the experiment with Ctrl-C at call `number` of `module.name`."""
    stop = fail(KeyboardInterrupt())
    with pytest.MonkeyPatch.context() as context:
        at(module, name, number, stop, context.setattr)()
        assert run_command(ADAPT, arguments) == 130


def forbid_work(monkeypatch):
    """Fail if the experiment cleans a text, trains or fine-tunes."""
    for name in ("write_cleaned", "train"):
        monkeypatch.setattr(pipeline, name, lambda *_, name=name: pytest.fail(f"{name} is called"))


# What it leaves.


def test_report_numbers_match_the_parts(finished):
    _, scores, classes, *_ = tables(report_of(finished))
    runs = {}
    for name, budget in product(ENCODERS, BUDGETS):
        found = [part(finished, f"finetune-{name}-{budget}-{seed}") for seed in range(2)]
        runs[name, budget] = [run["test"] for run in found]
    f1 = {key: [run["macro_f1"] for run in of] for key, of in runs.items()}
    assert len(set(map(tuple, f1.values()))) >= 4, "equal scores would show nothing"
    for row, (budget, count) in zip(scores[1:], BUDGETS.items(), strict=True):
        base, adapted, control = (f1[name, budget] for name in ENCODERS)
        means = [f"{np.mean(of):.3f} ± {np.std(of, ddof=1):.3f}" for of in (base, adapted, control)]
        assert row[:4] == [str(count), *means]
        for cell, other in zip(row[4:], (base, control), strict=True):
            shown, low, high = re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", cell).groups()
            assert shown == f"{np.mean(adapted) - np.mean(other):+.3f}"
            assert float(low) <= float(shown) <= float(high)
    for row, label in zip(classes[1:], LABELS, strict=True):
        of_class = {key: [run["classes"][label]["f1"] for run in of] for key, of in runs.items()}
        base, adapted, control = (np.mean(of_class[name, "all"]) for name in ENCODERS)
        count = runs["base", "all"][0]["classes"][label]["rows"]
        numbers = [f"{value:.3f}" for value in (base, control, adapted)]
        name = label.replace("|<b>", "\\|&lt;b&gt;")
        assert row == [name, str(count), *numbers, f"{adapted - base:+.3f}"]


def test_every_section_of_the_report(finished, place):
    text, page = ((finished / f"report.{kind}").read_text("utf-8") for kind in ("md", "html"))
    labels = [row["label"] for row in read_rows(place / "test.csv")]
    most = [max(LABELS, key=labels.count)] * len(labels)
    assert f"would reach {f1_score(labels, most, average='macro'):.3f}" in text
    *_, shares, pieces, minutes = tables(text)
    overlap = part(finished, "overlap")
    for row, of in zip(shares[1:], overlap["overlap"].values(), strict=True):
        assert row[1:] == [f"{share:.0%}" for share in of.values()]
    for row, of in zip(pieces[1:], overlap["texts"].values(), strict=True):
        numbers = [of["pieces_per_word"], f"{of['unknown_share']:.2%}"]
        assert row[1:] == [f"{of['words']:,}", f"{numbers[0]:.2f}", numbers[1]]
    seconds = [part(finished, path.stem)["wall_seconds"] for path in finished.glob("parts/*")]
    assert minutes[-1] == ["total", f"{sum(seconds) / 60:.1f}"] and len(minutes) == 1 + 8 + 1
    files = re.findall(r"\((\w+\.png)\)", text)
    data = [base64.b64encode((finished / name).read_bytes()).decode() for name in files]
    images = re.findall(r'src="(.*?)"', page)
    assert images == [f"data:image/png;base64,{of}" for of in data] and len(files) == 4
    assert "even|<b>" not in page
    assert not re.search(r'https?://|<link|<script|src="(?!data:image/png)|file:', page)


def test_encoders_share_rows_and_seeds(finished, whole):
    """Options decide the rows of a budget; between encoders, only the model differs."""
    models = {name: str(finished / name / "final") for name in ENCODERS} | {"base": whole["model"]}
    others = set()
    for encoder, budget, seed in product(ENCODERS, BUDGETS, (0, 1)):
        name = f"{encoder}-{budget}-{seed}"
        result = part(finished, f"finetune-{name}")
        run = parse(shlex.split(result["command"])[2:], FinetuneOptions, "")
        assert run.model == str(models[encoder]) and run.seed == seed
        assert run.label_budget == (0 if budget == "all" else int(budget))
        others.add(replace(run, model="", seed=0, label_budget=0))
        rows = read_rows(finished / "finetune" / name / "test_predictions.csv")
        labels, predicted = ([row[key] for row in rows] for key in ("label", "predicted_label"))
        assert [LABELS[number] for number in result["predicted"]] == predicted
        expected = f1_score(labels, predicted, average="macro")
        assert len(labels) == 19 and result["test"]["macro_f1"] == pytest.approx(expected)
    assert len(others) == 1


@pytest.mark.parametrize("phases, steps", [("", [0, 1, 2, 3]), ("16:0.4 32:0.6", [0, 2, 3])])
def test_perplexities_equal_evaluate_at_the_last_length(
    phases, steps, finished, small, place, cache, tmp_path, capsys
):
    """With phases, the untrained encoder is evaluated again, at the last length."""
    output, models = finished, {"before": place / "model", "after": "adapted", "control": "control"}
    if phases:
        options = small["pretrain"].replace("--max-length 32", f"--phases {phases}")
        output = adapt(small, tmp_path / "out", pretrain=options)
        del models["control"]
    saved, found = part(output, "perplexity"), {}
    for name, model in models.items():
        line = f"--model {output / model} --input {output / 'text.jsonl'} --valid-fraction 0.05"
        line += " --max-length 32 --objective mlm --eval-tokens 500 --eval-batch-size 4"
        script("evaluate").main(f"{line} --precision fp32 --cache {cache}".split())
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"]
    assert {name: saved[name] for name in found} == pytest.approx(found, rel=1e-6)
    assert len(set(found.values())) == len(found) and not (output / "untrained").exists()
    assert [step for step, _ in saved["curve"]] == steps
    assert [step for step, _ in saved["training"]] == [1, 2, 3]
    assert saved["curve"][0][1] == saved["before"] and saved["curve"][-1][1] == saved["after"]
    shown = [row[1] for row in tables(report_of(output))[3][1:]]
    assert shown == [f"{saved[name]:,.1f}" for name in (*found, "unigram")]


def test_the_control_run_has_the_same_steps_and_options(
    finished, small, place, documents, tmp_path
):
    runs = [json.loads((finished / name / "config.json").read_text()) for name in ENCODERS[1:]]
    recipes = [part(finished, f"pretrain-{name}")["recipe"] for name in ENCODERS[1:]]
    assert recipes[0] == recipes[1]
    differing = {name for name in runs[0] if runs[0][name] != runs[1][name]}
    assert differing - recipes[0].keys() == {"train"}
    names = ("text", "control")
    assert [run["train"] for run in runs] == [[str(finished / f"{name}.jsonl")] for name in names]
    # Also if its text is longer, without a validation set, and if only entities are masked.
    epochs = small["pretrain"].replace("--max-steps 3", "--epochs 0.02 --valid-fraction 0")
    (tmp_path / "terms.txt").write_text("\n".join(sorted(documents[0][0].split())))
    epochs += f" --masking entity --entity-fill none --lexicon {tmp_path / 'terms.txt'}"
    texts = {"text": place / "control.txt", "control": place / "text.txt"}
    output = adapt(small | texts, tmp_path / "out", pretrain=epochs)
    steps = [part(output, f"pretrain-{name}")["steps"] for name in ENCODERS[1:]]
    assert steps == 2 * [rows(output / "control")[-1]["step"]] and 0 < steps[0] < 5
    assert part(output, "perplexity").keys() == {"wall_seconds"}
    assert not (output / "perplexity.png").exists() and "perplexity.png" not in report_of(output)
    assert "±" not in str(tables(report_of(output)))


def test_copies_of_test_texts_are_removed_and_counted(finished, place):
    first, *_, last = (row["text"] for row in read_rows(place / "test.csv"))
    for name, documents in (("text", 20 + 2), ("control", 18 + 2)):
        texts = [row["text"] for row in read_rows(finished / f"{name}.jsonl")]
        assert len(texts) == documents and any(text.endswith("\nriver .") for text in texts)
        squeezed = " ".join(" ".join(texts).split())
        assert " ".join(first.split()) not in squeezed and not any(last in text for text in texts)
    texts = [["your text", "22", "3", "0"], ["the control text", "20", "3", "0"]]
    assert tables(report_of(finished))[0][1:] == texts


# Commands.


def test_the_printed_commands_repeat_the_parts(finished, whole, place, tmp_path, capsys):
    lines = (finished / "report.md").read_text().split("```")[1].strip().split("\n")
    first, adapted, control, overlap, *fine = map(shlex.split, lines)
    assert first == ["python", "scripts/adapt.py", *argv(whole, finished)]
    models = [place / "model", *(finished / name / "final" for name in ENCODERS[1:])]
    found = [parse(words, FinetuneOptions, "").model for _, _, *words in fine]
    assert found == 2 * list(map(str, models))
    more = ["--cache", str(tmp_path), "--output", str(tmp_path / "domain")]
    script("domain").main([*overlap[2:], *more])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed.items() <= part(finished, "overlap").items()
    for name, command in (("adapted", adapted), ("control", control)):
        script("pretrain").main([*command[2:], "--output", str(tmp_path / name)])
        assert rows(tmp_path / name) == rows(finished / name)
    output = tmp_path / "fine"
    script("finetune").main([*fine[1][2:], "--seed", "1", "--output", str(output)])
    again = json.loads((output / "summary.json").read_text())
    assert again["test"] == part(finished, "finetune-adapted-12-1")["test"]
    assert (output / "final" / "model.safetensors").is_file()


# Resuming.


def test_a_finished_experiment_trains_nothing_and_rewrites_the_report(
    finished, whole, tmp_path, monkeypatch, capsys
):
    output = shutil.copytree(finished, tmp_path / "out")
    for name in ("report.md", "report.html", "learning_curve.png"):
        (output / name).unlink()
    forbid_work(monkeypatch)
    adapt(whole, output)
    assert report_of(output) == report_of(finished)
    assert (output / "learning_curve.png").is_file() and (output / "report.html").is_file()
    answer = report_of(output).split("\n")[2].removeprefix("> ").replace("**", "")
    assert answer in capsys.readouterr().out


def test_a_model_folder_that_is_named_like_a_size(small, place, tmp_path, monkeypatch):
    shutil.copytree(place / "model", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    experiment = build_experiment(parse(argv(small, "out", model="tiny"), AdaptOptions, ""))
    assert experiment.encoders["base"] == "./tiny"


def test_a_part_whose_file_was_removed_runs_again(finished, whole, steps_seen):
    """As the message about a damaged one says. The run itself has finished."""
    before = report_of(finished)
    (finished / "parts" / "pretrain-adapted.json").unlink()
    adapt(whole, finished)
    assert report_of(finished) == before and not steps_seen


def test_an_experiment_interrupted_in_fine_tuning_gives_the_same_result(
    finished_small, small, tmp_path, monkeypatch
):
    """Three steps each: pretraining, fine-tuning of the base and of the adapted encoder."""
    arguments = argv(small, tmp_path / "out")
    interrupted(arguments, train, "train_step", 8)
    assert not (tmp_path / "out" / "report.md").exists()
    runs = fine_tunings(monkeypatch)
    ADAPT(arguments)
    assert runs == ["adapted-12-0"]
    assert report_of(tmp_path / "out") == report_of(finished_small)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_more_seeds_and_budgets_run_only_what_is_new(finished_small, small, tmp_path, monkeypatch):
    """An option that says the same in other words is no change."""
    output = shutil.copytree(finished_small, tmp_path / "out")
    names = fine_tunings(monkeypatch)
    again = f"--seed=0 --patience 3 {FINE}"
    adapt(small, output, seeds=2, label_budgets=[20, 12], finetune=again)
    runs = ("12-1", "20-0", "20-1")
    assert names == [f"{name}-{run}" for run in runs for name in ENCODERS[:2]]
    assert [row[0] for row in tables(report_of(output))[1][1:]] == ["12", "20"]
    for name in ("pretrain-adapted", "finetune-base-12-0"):
        assert part(output, name) == part(finished_small, name)


def test_an_experiment_interrupted_in_pretraining_continues_in_a_moved_folder(
    finished_small, small, tmp_path, monkeypatch, capsys
):
    """Two of three steps are done, and saved: finishing on another text would mix the two."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    interrupted(argv(small, "./"), train, "train_step", 3)
    output = (tmp_path / "here").rename(tmp_path / "there")
    assert (output / "adapted" / "checkpoint-2").is_dir()
    message = refusal(ADAPT, argv(small, output, task_text=True), capsys)
    assert message.startswith(f"--output {output}: ") and "--task-text " in message
    assert report_of(adapt(small, output)) == report_of(finished_small)
    assert rows(output / "adapted") == rows(finished_small / "adapted")
    of_run = part(output, "pretrain-adapted")
    assert of_run["wall_seconds"] >= of_run["seconds"], "the time before the interruption counts"


def test_overwrite_keeps_the_old_experiment_until_the_new_report(
    finished_small, small, tmp_path, monkeypatch
):
    output, aside = shutil.copytree(finished_small, tmp_path / "out"), tmp_path / ".out.replaced"
    other = small | {"finetune": FINE.replace("--max-steps 3", "--max-steps 2")}
    interrupted(argv(other, output, overwrite=True), pipeline, "train", 2)
    assert (aside / "report.md").is_file() and not (output / "report.md").exists()
    names = fine_tunings(monkeypatch)
    adapt(other, output)
    assert len(names) == 2 and (output / "report.md").is_file() and not aside.exists()
    assert part(output, "finetune-base-12-0")["steps"] == 2


def test_options_may_change_before_training(small, place, tmp_path):
    """Changes to a model without heads, to --task-text, and to fewer steps."""
    train_texts, (copy, *_) = (
        [row["text"] for row in read_rows(place / f"{name}.csv")] for name in ("train", "test")
    )
    write_rows(tmp_path / "train.csv", labeled([*train_texts, copy]))
    output = tmp_path / "out"
    interrupted(argv(small, output), train, "train_step", 1)
    assert {path.name for path in (output / "parts").iterdir()} == {"text.json", "overlap.json"}
    other = {"model": place / "headless", "train": tmp_path / "train.csv", "task_text": True}
    pretrain = small["pretrain"].replace("--max-steps 3", "--max-steps 2")
    adapt(small | other, output, pretrain=pretrain)
    assert [row["text"] for row in read_rows(output / "text.jsonl")][22:] == train_texts
    counts = {"documents": 52, "removed": 4, "task_texts": 31}
    assert part(output, "text")["text"] == counts
    assert part(output, "pretrain-adapted")["steps"] == 2
    report = report_of(output)
    assert tables(report)[0][1:] == [["your text", "52", "4", "31"]]
    assert "- 1 of the test texts" in report and "no MLM head" in report


# What is refused.


def test_other_options_are_refused(finished_small, small, place, capsys, monkeypatch):
    forbid_work(monkeypatch)
    metric, model = FINE + " --metric accuracy", place / "headless"
    for more, values in (
        ({"finetune": metric}, ('--finetune "--metric', "macro_f1", "accuracy")),
        ({"model": model}, ("--model", str(small["model"]), str(model))),
    ):
        message = refusal(ADAPT, argv(small, finished_small, **more), capsys)
        assert message.startswith(f"--output {finished_small}: ")
        assert all(value in message for value in values)


@pytest.mark.parametrize(
    "name, added",
    [
        ("test.csv", b"bank river .,odd\n"),
        ("text.txt", b"\nbank river .\n"),
        ("model/model.safetensors", b""),
    ],
)
def test_a_changed_file_is_refused(name, added, finished_small, small, place, monkeypatch, capsys):
    """`added`: b"" flips the last byte."""
    forbid_work(monkeypatch)
    path, parts = place / name, sorted(finished_small.rglob("*"))
    before = path.read_bytes()
    try:
        path.write_bytes(before + added if added else before[:-1] + bytes([before[-1] ^ 1]))
        message = refusal(ADAPT, argv(small, finished_small), capsys)
    finally:
        path.write_bytes(before)
    what = "another text" if name == "text.txt" else f"another {path}"
    assert message.startswith(f"--output {finished_small}: ") and what in message
    assert sorted(finished_small.rglob("*")) == parts


@pytest.mark.parametrize("name", ["survey.jsonl", "photo.png"])
def test_a_folder_with_other_files_is_refused(name, small, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text("precious")
    for output, more in ((mine, {}), (mine, {"overwrite": True}), (mine / name, {})):
        message = refusal(ADAPT, argv(small, output, **more), capsys)
        assert message.startswith(f"--output {output}")
    assert (mine / name).read_text() == "precious"


def test_options_without_quotes_are_refused_with_the_quotes(small, place, capsys):
    unquoted = shlex.split("--pretrain --max-steps 3 --epochs=2 --seeds 1")
    words = [*argv(small, place / "x"), *unquoted]
    message = refusal(ADAPT, words, capsys, "--pretrain --max-steps: ")
    assert '--pretrain "--max-steps 3 --epochs=2"' in message


@pytest.mark.parametrize(
    "flag, value, inner",
    [
        ("model", "/absent", ""),
        ("seeds", "0", ""),
        ("label-budgets", "31", ""),
        ("label-budgets", "1²", ""),
        ("pretrain", "--seed 3 --overwrite", ""),
        ("pretrain", "--masks 3", ""),
        ("pretrain", '--cache "my', ""),
        ("pretrain", "--mask-rate 0.9", "--mask-rate 0.9: "),
        ("pretrain", "--masking entity", "--masking entity: "),
        ("pretrain", "--lowercase off", "omit --lowercase: "),  # fine-tuning would not honor it
        ("pretrain", "--tokenizer {place}/model", "omit --tokenizer: "),
        ("finetune", "--label-field x", ""),
        ("finetune", "--no-save-model", ""),  # a switch alone is one word
        ("finetune", "--epochs 0", "--epochs 0"),
        ("finetune", "--max-length 9999", "--max-length 9999: "),
        ("text", "absent.txt", ""),
        ("general", "absent.txt", ""),
        ("test", "absent.csv", ""),
        ("control", "{place}/text.txt", ""),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    flag, value, inner, small, place, cache, tmp_path, capsys
):
    value = value.format(place=place)
    named = f'--{flag} "{value}": {inner}' if inner or "--" in value else f"--{flag} {value}: "
    arguments = argv(small | {"pretrain": f"--cache {cache}"}, tmp_path / "out", **{flag: value})
    refusal(ADAPT, arguments, capsys, named.format(place=place), tmp_path / "out")


def test_too_few_documents_are_a_problem_of_the_option_that_named_them(
    small, documents, tmp_path, capsys
):
    """The advice names no option that an experiment has for rows."""
    few = write_documents(tmp_path / "few.txt", [document[:1] for document in documents[2:5]])
    message = refusal(ADAPT, argv(small, tmp_path / "out", control=few), capsys)
    assert message.startswith(f'--control {few}, --pretrain "') and "--valid " not in message


def test_text_with_only_copies_of_test_texts_is_refused(small, place, tmp_path, capsys):
    copies = "\n\n".join(row["text"] for row in read_rows(place / "test.csv"))
    (tmp_path / "copies.txt").write_text(copies + "\n")
    arguments = argv(small, tmp_path / "out", text=tmp_path / "copies.txt")
    assert refusal(ADAPT, arguments, capsys).startswith("--text: ")


def test_text_that_the_tokenizer_does_not_know_is_refused(small, place, tmp_path, capsys):
    """Under the name that the user gave, and before anything is written."""
    text, output = tmp_path / "foreign.txt", tmp_path / "out"
    text.write_text("москва столица\nмосква город\n\n" * 20)
    arguments = argv(small, output, text=text)
    assert "--tokenizer" not in refusal(ADAPT, arguments, capsys, f"--text {text}: ", output)
