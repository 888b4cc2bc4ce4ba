"""The experiment from end to end, on a tiny encoder: its report tells what its parts have left, the parts are what the single commands
give, and one that was interrupted, asked for more or started anew ends as the one that was not; every bad input in one message."""
import csv
import json
import re
import shlex
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import make_documents, refusal, rows, script
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForPreTraining, BertModel

from pretrain import adapt, experiment, pictures, significance, train
from pretrain import finetune as finetuning
from pretrain.command import as_command, parse, run_command
from pretrain.config import AdaptOptions, Config, FinetuneOptions, validate
from pretrain.data import tokenizer as tokenizers
from pretrain.data.labelled import budget_rows

f1_score = pytest.importorskip("sklearn.metrics").f1_score

ADAPT, PRETRAIN, FINETUNE, EVALUATE = script("adapt"), script("pretrain"), script("finetune"), script("evaluate")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
FINE = "--max-steps 3 --eval-every 1 --max-length 32 --batch-size 8 --learning-rate 3e-2 --precision fp32"
ENCODERS, BUDGETS, TASKS = ("base", "adapted", "control"), {"12": 12, "all": 30}, []


def write_rows(path, texts, label_of):
    with path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("text", "label"), *((text, label_of(text)) for text in texts)])


@pytest.fixture(scope="module")
def place(documents, tmp_path_factory):
    """An encoder, texts and labelled rows; the first test row and the last, which has two sentences, are copied in both texts."""
    folder = tmp_path_factory.mktemp("adapt")
    sentences = [sentence for document in make_documents(60, 5) for sentence in document if 3 < len(sentence.split()) < 15]
    test = [*sentences[42:60], "\n".join(sentences[60:62])]
    for name, texts in (("train", sentences[:30]), ("valid-1", sentences[30:40]), ("valid-2", sentences[40:42]), ("test", test)):
        write_rows(folder / f"{name}.csv", texts, lambda text: "even|<b>" if len(text.split()) % 2 else "odd")
    copies = [[test[0].replace(" ", "  "), *documents[0]], [*documents[1], *sentences[60:62], "river ."], sentences[60:62]]
    for name, of in (("text", documents[2:]), ("control", make_documents(40, 11))):
        (folder / f"{name}.txt").write_text("\n\n".join("\n".join(document) for document in [*of, *copies]) + "\n", encoding="utf-8")
    tokenizer = tokenizers.train(lambda: (sentence for document in documents for sentence in document), 120)
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **SMALL)
    for name, kind in (("model", BertForPreTraining), ("headless", BertModel)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def pretraining(place, cache):
    return ("--max-steps 3 --save-every 1 --eval-every 1 --log-every 1 --batch-size 4 --micro-batch-size 4 --max-length 32 "
            f"--objective mlm --eval-tokens 500 --learning-rate 3e-2 --precision fp32 --cache {cache}")


@pytest.fixture(scope="module")
def small(place, pretraining):
    """Without a control, one budget and one seed."""
    named = [part for name, file in (("train", "train"), ("valid", "valid-*"), ("test", "test"))
             for part in (f"--{name}", str(place / f"{file}.csv"))]
    return ["--model", str(place / "model"), "--text", str(place / "text.txt"), *named, "--pretrain", pretraining, "--finetune", FINE,
            "--seeds", "1", "--label-budgets", "12"]


@pytest.fixture(scope="module")
def whole(small, place):
    return [*small[:-4], "--control", str(place / "control.txt"), "--seeds", "2", "--label-budgets", *BUDGETS]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Pictures and intervals have their own tests (tests/test_report.py): here their names are enough."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(significance, "DRAWS", 400)
        for name in ("overlap", "curves", "confusion"):
            context.setattr(pictures, name, lambda path, *_, **__: path.write_bytes(path.name.encode()))
        yield


@pytest.fixture(scope="module")
def finished(whole, place):
    """The uninterrupted experiment that others are compared with; what it has fine-tuned is in TASKS."""
    with pytest.MonkeyPatch.context() as context:
        seen = counted(context, "finetune")
        ADAPT.main([*whole, "--output", str(place / "finished")])
    TASKS.extend(task for task, in seen)
    return place / "finished"


@pytest.fixture(scope="module")
def finished_small(small, place):
    ADAPT.main([*small, "--output", str(place / "small")])
    return place / "small"


def part(folder, name):
    return json.loads((folder / "parts" / f"{name}.json").read_text(encoding="utf-8"))


def report_of(folder):
    """The report without the times, the machine and the commands, in which the folder is named."""
    return (folder / "report.md").read_text(encoding="utf-8").split("## Time")[0]


def tables(text):
    """[[cells as text]] of every table, without the rule below its head."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in lines.strip().split("\n")
             if not row.startswith("|---")] for lines in found]


def counted(monkeypatch, name, module=adapt):
    """What `module.name` is called with; it still works."""
    calls, original = [], getattr(module, name)

    def observed(*arguments, **more):
        calls.append(arguments)
        return original(*arguments, **more)

    monkeypatch.setattr(module, name, observed)
    return calls


def stopped(monkeypatch, module, name, number):
    """Ctrl-C as `module.name` is called for the `number`-th time."""
    calls, original = [], getattr(module, name)

    def interrupted(*arguments, **more):
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    monkeypatch.setattr(module, name, interrupted)


def nothing_is_trained(monkeypatch):
    for name in ("finetune", "train", "write_cleaned", "compare"):
        monkeypatch.setattr(adapt, name, lambda *_, name=name, **__: pytest.fail(f"{name} is called again"))


# What it leaves.

def test_numbers_of_the_report_are_those_of_the_parts(finished):
    scores, classes, *_ = tables(report_of(finished))
    values = {(name, budget): [part(finished, f"finetune-{name}-{budget}-{seed}")["test"] for seed in range(2)]
              for name in ENCODERS for budget in BUDGETS}
    assert len({tuple(of["macro_f1"] for of in results) for results in values.values()}) >= 4, "equal scores would show nothing"
    for row, (budget, count) in zip(scores[1:], BUDGETS.items(), strict=True):
        means = {name: [of["macro_f1"] for of in values[name, budget]] for name in ENCODERS}
        assert row[:4] == [str(count), *(f"{np.mean(of):.3f} ± {np.std(of, ddof=1):.3f}" for of in means.values())]
        assert [cell.split(" ")[0] for cell in row[4:]] == [
            f"{np.mean(means['adapted']) - np.mean(means[other]):+.3f}" for other in ("base", "control")]
        low, high = map(float, re.search(r"\((.*) to (.*)\)", row[4]).groups())
        assert low <= float(row[4].split(" ")[0]) <= high
    for row, label in zip(classes[1:], ("even|<b>", "odd"), strict=True):
        f1 = [np.mean([of["classes"][label]["f1"] for of in values[name, "all"]]) for name in ("base", "adapted")]
        assert row == [label.replace("|<b>", "\\|&lt;b&gt;"), str(values["base", "all"][0]["classes"][label]["rows"]),
                       *(f"{value:.3f}" for value in f1), f"{f1[1] - f1[0]:+.3f}"]


def test_scores_of_the_parts_are_those_of_the_predictions(finished):
    for name in ENCODERS:
        for budget in BUDGETS:
            for seed in range(2):
                with (finished / "finetune" / f"{name}-{budget}-{seed}" / "test_predictions.csv").open() as file:
                    labels, predicted = zip(*((row["label"], row["predicted_label"]) for row in csv.DictReader(file)))
                assert len(labels) == 19
                assert part(finished, f"finetune-{name}-{budget}-{seed}")["test"]["macro_f1"] == pytest.approx(
                    f1_score(labels, predicted, average="macro"), abs=1e-12)


def test_the_encoders_share_rows_and_seeds(finished, place):
    tasks = {tuple(task.output.name.split("-")): task for task in TASKS}
    assert list(tasks) == [(name, budget, str(seed)) for budget in BUDGETS for seed in range(2) for name in ENCODERS]
    with (place / "train.csv").open(newline="") as file:
        all_rows = [((row["text"],), row["label"]) for row in csv.DictReader(file)]
    models = {"base": str(place / "model"), **{name: str(finished / name / "final") for name in ENCODERS[1:]}}
    for (name, budget, seed), task in tasks.items():
        chosen = all_rows
        if budget != "all":
            chosen = [all_rows[row] for row in budget_rows([label for _, label in all_rows], int(budget), int(seed))]
        assert list(zip(task.rows["train"].texts, task.rows["train"].labels)) == chosen and len(chosen) == BUDGETS[budget]
        assert task.options.model == models[name] and task.options.seed == int(seed) and not task.options.save_model
        assert replace(task.options, model="", output="") == replace(tasks["base", budget, seed].options, model="", output="")
        assert task.rows["test"] == TASKS[0].rows["test"] and len(task.rows["valid"].labels) == 12
    assert tasks["base", "12", "0"].rows["train"] != tasks["base", "12", "1"].rows["train"]


def evaluated(folder, place, cache, capsys):
    """Perplexities of the three encoders at 32 tokens, by scripts/evaluate.py."""
    found = {}
    for name, model in (("before", place / "model"), ("after", folder / "adapted"), ("control", folder / "control")):
        EVALUATE.main(["--model", str(model), "--input", str(folder / "text.jsonl"), "--valid-fraction", "0.05", "--max-length", "32",
                       "--objective", "mlm", "--eval-tokens", "500", "--eval-batch-size", "4", "--precision", "fp32",
                       "--cache", str(cache)])
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"]
    return found


def test_perplexities_are_those_of_evaluate(finished, place, cache, capsys):
    told, found = part(finished, "perplexity"), evaluated(finished, place, cache, capsys)
    assert {name: told[name] for name in found} == pytest.approx(found, rel=1e-6) and len(set(found.values())) == 3
    assert [step for step, _ in told["curve"]] == [0, 1, 2, 3] and [step for step, _ in told["training"]] == [1, 2, 3]
    assert told["curve"][0][1] == told["before"] and told["curve"][-1][1] == told["after"]
    shown = tables(report_of(finished))[2]
    assert [row[1] for row in shown[1:]] == [f"{told[name]:,.1f}" for name in ("before", "after", "control", "unigram")]


def test_with_phases_all_perplexities_are_those_of_the_last_length(small, place, pretraining, cache, tmp_path, capsys):
    phases = pretraining.replace("--max-length 32", "--phases 16:0.4 32:0.6")
    ADAPT.main([*small, "--control", str(place / "control.txt"), "--pretrain", phases, "--output", str(tmp_path / "out")])
    told, found = part(tmp_path / "out", "perplexity"), evaluated(tmp_path / "out", place, cache, capsys)
    assert {name: told[name] for name in found} == pytest.approx(found, rel=1e-6) and len(set(found.values())) == 3
    assert [step for step, _ in told["curve"]] == [0, 2, 3] and not (tmp_path / "out" / "untrained").exists()
    ADAPT.main([*small, "--control", str(place / "control.txt"), "--pretrain", phases, "--output", str(tmp_path / "out")])
    told = refusal(ADAPT.main, [*small, "--pretrain", "--phases 32:0.5 600:0.5", "--output", str(tmp_path / "other")], capsys)
    assert told.splitlines()[0].startswith('--pretrain "--phases 32:0.5 600:0.5": --phases 600: the model has 512 positions')


def test_the_control_has_the_steps_of_the_adapted_run_and_the_same_options(finished, small, place, pretraining, tmp_path):
    runs = [json.loads((finished / name / "config.json").read_text()) for name in ENCODERS[1:]]
    assert {name for name in runs[0] if runs[0][name] != runs[1][name]} == {"train"}
    assert [run["train"] for run in runs] == [[str(finished / f"{name}.jsonl")] for name in ("text", "control")]
    # Also where its text is longer, and nothing is held out.
    epochs = pretraining.replace("--max-steps 3", "--epochs 0.02 --valid-fraction 0")
    ADAPT.main([*small, "--text", str(place / "control.txt"), "--control", str(place / "text.txt"), "--pretrain", epochs, "--output",
                str(tmp_path / "out")])
    steps = [part(tmp_path / "out", f"pretrain-{name}")["steps"] for name in ENCODERS[1:]]
    assert steps == 2 * [rows(tmp_path / "out" / "control")[-1]["step"]] and 0 < steps[0] < 5
    assert "No text was held out" in report_of(tmp_path / "out") and not (tmp_path / "out" / "perplexity.png").exists()
    assert part(tmp_path / "out", "perplexity").keys() == {"wall_seconds"}


def test_copies_of_test_texts_are_removed_and_counted(finished, place):
    counts = part(finished, "text")
    for name, documents in (("text", 58 + 2), ("control", 40 + 2)):
        assert {key: counts[name][key] for key in ("documents", "removed", "task_texts")} == {
            "documents": documents, "removed": 3, "task_texts": 0}
        assert len((finished / f"{name}.jsonl").read_text().splitlines()) == documents
    with (place / "test.csv").open(newline="") as file:
        first, *_, last = (row["text"] for row in csv.DictReader(file))
    for name in ("text", "control"):
        kept = [json.loads(line)["text"] for line in (finished / f"{name}.jsonl").read_text().splitlines()]
        assert not any(" ".join(first.split()) == " ".join(line.split()) for text in kept for line in text.split("\n"))
        assert not any(last in text for text in kept) and any(text.endswith("\nriver .") for text in kept)
    told = report_of(finished)
    assert told.count("3 exact copies of test texts were removed") == 2 and "- Your text: 60 documents; 3 exact" in told


def test_what_has_trained_nothing_yet_may_start_with_other_options(small, place, tmp_path, monkeypatch):
    """The others: a model without heads, the task's texts but for a copy of a test text, fewer steps."""
    texts = {name: [row["text"] for row in csv.DictReader((place / f"{name}.csv").open(newline=""))] for name in ("train", "test")}
    write_rows(tmp_path / "train.csv", [*texts["train"], texts["test"][0]], lambda text: "odd" if len(text) % 2 else "even|<b>")
    output = tmp_path / "out"
    with monkeypatch.context() as context:
        stopped(context, train, "train_step", 1)
        assert run_command(ADAPT.main, [*small, "--output", str(output)]) == 130
    assert {path.name for path in (output / "parts").iterdir()} == {"text.json", "overlap.json"}
    pretrain = small[small.index("--pretrain") + 1].replace("--max-steps 3", "--max-steps 2")
    ADAPT.main([*small, "--model", str(place / "headless"), "--train", str(tmp_path / "train.csv"), "--task-text", "--pretrain", pretrain,
                "--output", str(output)])
    written = [json.loads(line)["text"] for line in (output / "text.jsonl").read_text().splitlines()]
    counts, told, page = part(output, "text")["text"], report_of(output), (output / "report.md").read_text()
    assert written[60:] == texts["train"] and (counts["documents"], counts["removed"], counts["task_texts"]) == (90, 4, 31)
    assert "; the 31 texts of the training rows were added." in told and "--task-text" in page.split("## Commands")[1]
    assert "- 1 of the test texts are among the training rows, too." in told and part(output, "pretrain-adapted")["steps"] == 2
    assert re.search(r"came without .*MLM head.*, which started at random: its perplexity before", told)
    curve = part(output, "perplexity")["curve"]
    assert tables(told)[2][1] == ["at step 1, the first held-out value after warm-up", f"{curve[1][1]:,.1f}"]


@pytest.mark.parametrize("more", [["--task-text"], ["--model", "{place}/headless"]], ids=["text", "model"])
def test_the_checkpoints_of_other_options_are_not_gone_on_from(more, small, place, tmp_path, monkeypatch, capsys):
    """Two of three steps are done: to end on another text would mix the two."""
    output = tmp_path / "out"
    with monkeypatch.context() as context:
        stopped(context, train, "train_step", 3)
        assert run_command(ADAPT.main, [*small, "--output", str(output)]) == 130
    kept = {path: path.read_bytes() for path in (output / "experiment.json", output / "parts" / "text.json", output / "text.jsonl")}
    assert (output / "adapted" / "checkpoint-2").is_dir()
    nothing_is_trained(monkeypatch)
    told = refusal(ADAPT.main, [*small, *(word.format(place=place) for word in more), "--output", output], capsys)
    assert told.startswith(f"--output {output}: its experiment was started with {more[0]} ")
    assert all(path.read_bytes() == content for path, content in kept.items())


# Commands.

def commands(folder):
    return [shlex.split(line) for line in (folder / "report.md").read_text().split("```")[1].strip().split("\n")]


def test_every_printed_command_parses(finished, whole, place):
    first, *others = commands(finished)
    overlap = others.pop(2)
    assert overlap[:2] == ["python", "scripts/domain.py"]
    assert first == ["python", "scripts/adapt.py", *whole, "--output", str(finished)]
    assert len(others) == 2 + 3 * 2 and validate(parse(first[2:], AdaptOptions, "")) == []
    for command in others:
        kind = {"scripts/pretrain.py": Config, "scripts/finetune.py": FinetuneOptions}[command[1]]
        options = parse(command[2:], kind, "")
        assert validate(options) == [] and options.output is None and not options.overwrite
    assert [parse(command[2:], FinetuneOptions, "").model for command in others[2:]] == 2 * [
        str(place / "model"), *(str(finished / name / "final") for name in ENCODERS[1:])]


def test_the_printed_commands_repeat_the_parts(finished, tmp_path, capsys):
    _, adapted, control, overlap, *fine = commands(finished)
    capsys.readouterr()
    script("domain").main([*overlap[2:], "--cache", str(tmp_path), "--output", str(tmp_path / "domain")])
    told, of = json.loads(capsys.readouterr().out.splitlines()[-1]), part(finished, "overlap")
    assert [list(row.values()) for row in told["overlap"].values()] == of["shares"] and told["words_compared"] == of["words"]
    assert all(told["texts"][name][key] == of["texts"][shown][key] for name, shown in zip(told["texts"], of["names"])
               for key in ("words", "pieces_per_word", "unknown_share"))
    for name, command in (("adapted", adapted), ("control", control)):
        PRETRAIN.main([*command[2:], "--output", str(tmp_path / name)])
        assert rows(tmp_path / name) == rows(finished / name)
    for number, name in ((4, "adapted-all"), (1, "adapted-12")):
        FINETUNE.main([*fine[number][2:], "--seed", "1", "--output", str(tmp_path / name)])
        again = json.loads((tmp_path / name / "summary.json").read_text())
        assert again["test"] == part(finished, f"finetune-{name}-1")["test"] and (tmp_path / name / "final" / "model.safetensors").is_file()


VALUES = {bool: st.booleans(), int: st.integers(-5, 10**6), float: st.floats(0, 1e9),
          str: st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8).filter(lambda text: text[0] != "-")}


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([Config, FinetuneOptions, AdaptOptions]))
def test_a_command_means_the_options_that_it_was_made_of(data, kind):
    options = kind()
    for entry in data.draw(st.lists(st.sampled_from(fields(kind)), max_size=6)):
        hint, arguments = kind.__annotations__.get(entry.name) or entry.type, entry.metadata["argparse"]
        inner = next(of for name, of in (("bool", bool), ("int", int), ("float", float), ("str", str)) if name in str(hint))
        value = st.sampled_from(arguments["choices"]) if "choices" in arguments else VALUES[inner]
        count = arguments.get("nargs")
        is_list = str(hint).startswith("list")
        setattr(options, entry.name, data.draw(st.lists(value, min_size=count if isinstance(count, int) else 1,
                                                        max_size=count if isinstance(count, int) else 3) if is_list else value))
    python, path, *argv = shlex.split(as_command("some", options))
    assert (python, path) == ("python", "scripts/some.py") and parse(argv, kind, "") == options


# Going on.

def test_a_finished_experiment_trains_nothing_again_and_rewrites_the_report(finished, whole, tmp_path, monkeypatch, capsys):
    output = shutil.copytree(finished, tmp_path / "out")
    for name in ("report.md", "report.html", "learning_curve.png"):
        (output / name).unlink()
    nothing_is_trained(monkeypatch)
    ADAPT.main([*whole, "--output", str(output)])
    assert report_of(output) == report_of(finished) and (output / "learning_curve.png").is_file() and (output / "report.html").is_file()
    told = capsys.readouterr().out
    answer = report_of(output).split("\n")[2].removeprefix("> ").replace("**", "")
    assert answer in told and f"report: {output / 'report.html'}" in told and "12 times fine-tuning: budgets 12, 30, 2 seeds" in told


@pytest.mark.parametrize("module, name, number", [(finetuning, "finish", 2), (train, "train_step", 2)],
                         ids=["fine-tuning", "pretraining"])
def test_an_interrupted_experiment_ends_as_the_uninterrupted_one(module, name, number, finished_small, small, tmp_path, monkeypatch):
    arguments = [*small, "--output", str(tmp_path / "out")]
    with monkeypatch.context() as context:
        stopped(context, module, name, number)
        assert run_command(ADAPT.main, arguments) == 130
    assert not (tmp_path / "out" / "report.md").exists()
    done = {path.name for path in (tmp_path / "out" / "parts").glob("*")}
    with monkeypatch.context() as context:
        if "pretrain-adapted.json" in done:
            context.setattr(adapt, "train", lambda *_: pytest.fail("pretrained again"))
        steps = counted(context, "train_step", train)
        calls = counted(context, "finetune")
        ADAPT.main(arguments)
    assert len(calls) == (1 if name == "finish" else 2)
    assert len(steps) == {"finish": 0, "train_step": 2}[name]
    assert report_of(tmp_path / "out") == report_of(finished_small)
    assert rows(tmp_path / "out" / "adapted") == rows(finished_small / "adapted")
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_more_seeds_and_budgets_run_what_is_new_alone(finished_small, small, tmp_path, monkeypatch):
    """An option that means the same in other words is no other."""
    output = shutil.copytree(finished_small, tmp_path / "out")
    monkeypatch.setattr(adapt, "train", lambda *_: pytest.fail("pretrained again"))
    calls = counted(monkeypatch, "finetune")
    more = ["--seeds", "2", "--label-budgets", "20", "12", "--finetune", f"--seed=0 --patience 3 {FINE}"]
    ADAPT.main([*small, *more, "--output", str(output)])
    assert {(task.output.name.split("-")[0], task.options.label_budget, task.options.seed) for (task,) in calls} == {
        (name, *new) for name in ENCODERS[:2] for new in ((12, 1), (20, 0), (20, 1))} and len(calls) == 6
    assert [row[0] for row in tables(report_of(output))[0][1:]] == ["12", "20"] and "over 2 seeds" in report_of(output)
    assert part(output, "finetune-base-12-0") == part(finished_small, "finetune-base-12-0")


def test_overwrite_starts_anew_and_what_was_there_stays_until_there_is_a_report(finished_small, small, tmp_path, monkeypatch):
    output = shutil.copytree(finished_small, tmp_path / "out")
    aside = tmp_path / ".out.replaced"
    other = [*small, "--finetune", FINE.replace("--max-steps 3", "--max-steps 2"), "--output", str(output)]
    with monkeypatch.context() as context:
        stopped(context, adapt, "finetune", 1)
        assert run_command(ADAPT.main, [*other, "--overwrite"]) == 130
    assert (aside / "report.md").is_file() and not (output / "report.md").exists()
    calls = counted(monkeypatch, "finetune")
    ADAPT.main(other)
    assert len(calls) == 2 and (output / "report.md").is_file() and not aside.exists()
    assert part(output, "finetune-base-12-0")["steps"] == 2


# What is refused.

@pytest.mark.parametrize("more, message", [
    (["--task-text"], "--output {output}: its experiment was started with --task-text False, not True; needed is another folder, or"),
    (["--finetune", FINE + " --metric accuracy"], "--output {output}: its experiment was started with --finetune \"--metric\" macro_f1, "
     "not accuracy; needed is another folder, or --overwrite"),
    (["--model", "{place}/headless"], "--output {output}: its experiment was started with --model {place}/model, not {place}/headless; "),
    (["--control", "{place}/control.txt"], "--output {output}: its experiment was started with --control [], not ['{place}/control.txt']"),
], ids=["task-text", "finetune", "model", "control"])
def test_other_options_are_refused(more, message, finished_small, small, place, capsys, monkeypatch):
    nothing_is_trained(monkeypatch)
    names = {"place": place, "output": finished_small}
    told = refusal(ADAPT.main, [*small, *(word.format(**names) for word in more), "--output", finished_small], capsys)
    assert told.startswith(message.format(**names))


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def with_row(content):
    return content + b"bank river .,odd\n"


@pytest.mark.parametrize("name, change, what", [
    ("train.csv", with_row, "{path}"), ("valid-2.csv", with_row, "{path}"), ("valid-2.csv", None, "{path}"),
    ("test.csv", with_row, "{path}"), ("text.txt", lambda content: content + b"\nbank river .\n", "text"),
    ("model/model.safetensors", flipped, "{path}"),
], ids=["train", "of a glob", "removed", "test", "text", "model"])
def test_a_changed_file_is_refused(name, change, what, finished_small, small, place, tmp_path, monkeypatch, capsys):
    output, path = shutil.copytree(finished_small, tmp_path / "out"), place / name
    before, parts = path.read_bytes(), len(list((output / "parts").iterdir()))
    nothing_is_trained(monkeypatch)
    try:
        path.write_bytes(change(before)) if change else path.unlink()
        told = refusal(ADAPT.main, [*small, "--output", output], capsys)
    finally:
        path.write_bytes(before)
    assert f"--output {output}: its experiment was started with another {what.format(path=path)}; needed is another folder, or" in told
    assert len(list((output / "parts").iterdir())) == parts


def test_a_folder_that_holds_something_else_is_refused(small, tmp_path, finished_small, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    told = refusal(ADAPT.main, [*small, "--output", tmp_path / "mine"], capsys)
    assert told == f"--output {tmp_path / 'mine'}: is not empty and holds no experiment; needed is another folder"
    told = refusal(ADAPT.main, [*small, "--output", tmp_path / "mine", "--overwrite"], capsys)
    assert told.startswith(f"--output {tmp_path / 'mine'} --overwrite: holds thesis.txt, which no run has written")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    told = refusal(ADAPT.main, [*small, "--output", tmp_path / "mine" / "thesis.txt"], capsys)
    assert told == f"--output {tmp_path / 'mine' / 'thesis.txt'}: is a file; needed is a folder"


GIVEN = "is given by the experiment; needed is the option left away"


@pytest.mark.parametrize("more, message", [
    (["--model", "base"], "--model base: is a size; needed is a pretrained encoder, a folder or a hub name"),
    (["--seeds", "0"], "--seeds 0: needed is a whole number of at least 1"),
    (["--label-budgets", "31"], "--label-budgets 31: needed is at least 2, a row of each class, and at most 30, the rows of --train"),
    (["--label-budgets", "all", "1"], "--label-budgets 1: needed is at least 2, a row of each class, and at most 30"),
    (["--label-budgets", "1²"], "--label-budgets 1²: needed is a number of rows, or all"),
    (["--pretrain", "--valid x.txt"], f'--pretrain "--valid x.txt": --valid {GIVEN}'),
    (["--pretrain", "--patience 3"], f'--pretrain "--patience 3": --patience {GIVEN}'),
    (["--pretrain", "--masks 3"], '--pretrain "--masks 3": unrecognized arguments: --masks 3; --help lists the options'),
    (["--pretrain", "--mask-rate 0.9"], '--pretrain "--mask-rate 0.9": --mask-rate 0.9: needed is one or two shares'),
    (["--pretrain", '--cache "my'], '--pretrain "--cache "my": No closing quotation'),
    (["--pretrain", "--seed 3 --overwrite"], f'--pretrain "--seed 3 --overwrite": --overwrite {GIVEN}'),
    (["--pretrain", "--max-minutes 3"], f'--pretrain "--max-minutes 3": --max-minutes {GIVEN}'),
    (["--finetune", "--label-field x"], f'--finetune "--label-field x": --label-field {GIVEN}'),
    (["--finetune", "--epochs 3 --no-save-model"], f'--finetune "--epochs 3 --no-save-model": --save-model {GIVEN}'),
    (["--finetune", "--epochs 0"], '--finetune "--epochs 0": --epochs 0.0: needed is a number above 0'),
    (["--finetune", "--max-length 9999"], '--finetune "--max-length 9999": --max-length 9999: the model has 512 positions'),
    (["--pretrain", "--max-length 9999"], '--pretrain "--max-length 9999": --max-length 9999: the model has 512 positions'),
    (["--model", "/absent"], "--model /absent: no such folder"),
    (["--text", "absent.txt"], "--text absent.txt: no such file"),
    (["--test", "absent.csv"], "--test absent.csv: no such file"),
    (["--text", "{corpus}"], "--text: is a prepared corpus; needed is text, from which copies of test texts can be removed"),
    (["--control", "{corpus}"], "--control: is a prepared corpus; needed is text, from which copies of test texts can be removed"),
    (["--text-field", "body"], "--train {place}/train.csv, line 2: has no column 'body', it has text, label"),
    (["--max-steps", "3"], "unrecognized arguments: --max-steps 3"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_told_in_one_message_before_anything_is_written(more, message, small, place, corpus, cache, tmp_path, capsys):
    names = {"place": place, "corpus": corpus.folder}
    kept = [word for name, word in zip(["", *small], small) if "--pretrain" not in (name, word)] + ["--pretrain", f"--cache {cache}"]
    told = refusal(ADAPT.main, [*kept, *(word.format(**names) for word in more), "--output", tmp_path / "out"], capsys)
    assert told.startswith(message.format(**names)) and "\n" not in told
    assert not (tmp_path / "out").exists()


def test_a_switch_alone_can_be_passed_on(small, tmp_path, monkeypatch):
    seen = counted(monkeypatch, "open_experiment", experiment)
    stopped(monkeypatch, experiment, "describe", 1)
    assert run_command(ADAPT.main, [*small, "--finetune", "--gradient-checkpointing", "--output", str(tmp_path / "out")]) == 130
    assert seen[0][0].finetuning.gradient_checkpointing


def test_what_is_missing_is_told_at_once(capsys):
    assert refusal(ADAPT.main, [], capsys).splitlines() == [
        "--model: needed is an encoder to go on from", "--text: needed is text to pretrain on", "--train: needed is labelled rows to "
        "fine-tune on", "--valid: needed is labelled rows to choose the best model by", "--test: needed is labelled rows to score it on"]


def test_a_control_that_is_the_text_itself_is_refused(small, place, tmp_path, capsys):
    text = small[small.index("--text") + 1]
    told = refusal(ADAPT.main, [*small, "--control", text, "--output", tmp_path / "out"], capsys)
    assert told == f"--control {text}: is the text of --text; needed is text of another domain"


def test_text_of_nothing_but_test_texts_is_refused(small, place, tmp_path, capsys):
    with (place / "test.csv").open(newline="") as file:
        (tmp_path / "copies.txt").write_text("\n\n".join(row["text"] for row in csv.DictReader(file)) + "\n")
    told = refusal(ADAPT.main, [*small, "--text", tmp_path / "copies.txt", "--output", tmp_path / "out"], capsys)
    assert told == "--text: holds nothing but copies of test texts; needed is other text"
