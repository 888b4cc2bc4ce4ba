"""pretrain.py as a user runs it: from text to checkpoints, resumed, and with bad input."""

import contextlib
import io
import json
import math
import re
import shutil
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from conftest import (
    SIZES,
    arguments_of,
    assert_same_run,
    built,
    in_processes,
    interrupted_copy,
    make_documents,
    overflowing,
    pretrain_into,
    refusal,
    refused,
    resume,
    rows,
    summary_of,
    ten_steps,
    write_documents,
    write_rows,
)
from transformers import BertModel

from pretrain import plan
from pretrain.batch import IGNORED
from pretrain.cli import parse, run_command
from pretrain.commands import adapt, evaluate, finetune, prepare
from pretrain.commands.pretrain import main
from pretrain.config import OBJECTIVES, Config
from pretrain.data.sources import expand
from pretrain.data.tokenizer import describe, load
from pretrain.errors import UserError
from pretrain.files import model_folder, read_json, sha256_of
from pretrain.resume import changed_options, portable_options
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import World
from pretrain.train import train


@pytest.fixture(scope="module")
def arguments(cache, text_file):
    return ten_steps(text_file, cache, micro_batch_size=8)


@pytest.fixture(scope="module")
def to_continue(arguments):
    """The options without those that change the model."""
    return [word for word in arguments if word not in SIZES]


@pytest.fixture(scope="module")
def prepared(text_file, cache, tmp_path_factory):
    """The text as a corpus, without entities."""
    return prepare_into(tmp_path_factory.mktemp("prepared") / "corpus", text_file, cache)


def prepare_into(folder, path, cache, *options):
    """Run prepare.py; returns the corpus folder."""
    files = ["--input", path, "--output", folder, "--cache", cache]
    prepare.main(arguments_of("--vocab-size 120", files, *options))
    return folder


def steps_of(output):
    """Steps of the checkpoints, newest first."""
    return [ckpt.step_of(folder) for folder in ckpt.checkpoints(output)]


def test_a_run_writes_all_documented_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"final", "best", "config.json", "metrics.jsonl", "summary.json"} <= names
    assert steps_of(finished) == [10, 8, 6, 4, 2]
    logged = {row["step"]: row for row in rows(finished)}
    assert list(logged) == [0, 1, 3, 4, 6, 8, 9, 10]
    evaluated = [step for step, row in logged.items() if "eval/perplexity" in row]
    assert evaluated == [0, 4, 8, 10]
    losses = {"loss", "mlm_loss", "nsp_loss", "perplexity", "mlm_accuracy", "nsp_accuracy"}
    assert {f"train/{name}" for name in losses} <= logged[1].keys()
    assert {f"eval/{name}" for name in losses} <= logged[4].keys()
    assert {"optim/learning_rate", "optim/grad_norm"} <= logged[1].keys()
    summary = summary_of(finished)
    assert summary["state"] == "finished" and summary["steps"] == 10
    assert summary["eval_perplexity"] == logged[10]["eval/perplexity"]
    rate = summary["real_tokens"] / summary["seconds"]
    assert summary["tokens_per_second"] == pytest.approx(rate, rel=1e-2)
    # A step is 16 x 32 tokens; a micro-batch closes below its limit.
    assert 0.7 * 10 * 16 * 32 < summary["real_tokens"] <= 10 * 16 * 32
    best = min(logged[step]["eval/perplexity"] for step in evaluated)
    assert summary["best_perplexity"] == best
    of_this_start = {"output", "resume", "overwrite"}
    assert not of_this_start & read_json(finished / "config.json").keys()


# Resumed.


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ("--precision bf16", "--workers 1"),
        ("--valid-fraction 0", "--workers 1"),
        ("--lowercase on", "--lowercase auto"),  # the default of an earlier version, and of this
    ],
)
def test_resuming_works_with_other_workers_and_options(more, changed, arguments, tmp_path, output):
    whole = pretrain_into(output, arguments, more, "--max-steps 4")
    resume(interrupted_copy(whole, tmp_path / "parts", 2), changed)
    assert_same_run(whole, tmp_path / "parts", step=4)
    is_evaluated = any(name.startswith("eval/") for row in rows(whole) for name in row)
    assert is_evaluated is (whole / "best").exists() is ("--valid-fraction 0" not in more)
    assert summary_of(whole)["state"] == "finished"


def test_max_minutes_stops_and_resumes(finished, arguments, output):
    pretrain_into(output, arguments, "--max-minutes 1e-6")
    summary = summary_of(output)
    assert summary["steps"] == 1 and "stopped" in summary["state"]
    assert steps_of(output) == [1] and not (output / "final").exists()
    resume(output, "--max-minutes 0")
    assert_same_run(finished, output)


@pytest.mark.parametrize(("more", "kept"), [("", [10, 8, 6, 4, 2]), ("--keep 1", [10])])
def test_a_damaged_checkpoint_is_skipped(more, kept, finished, output, capsys):
    """It does not count as the newest, so good ones are not pruned in its favor."""
    interrupted_copy(finished, output, 8)
    weights = output / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    resume(output, more)
    assert str(weights) in capsys.readouterr().out and steps_of(output) == kept
    assert (output / ".checkpoint-8.damaged").is_dir()
    assert_same_run(finished, output)


def test_a_checkpoint_of_another_format_is_refused(finished, output, capsys):
    """As from a version without format numbers."""
    interrupted_copy(finished, output, 8)
    checkpoint = output / "checkpoint-8"

    def write(folder):
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        (folder / ckpt.CHECKSUMS).unlink()
        values = read_json(folder / ckpt.STATE_JSON)
        del values["format"]
        (folder / ckpt.STATE_JSON).write_text(json.dumps(values))

    ckpt.write_folder(checkpoint, write)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    refusal(main, ["--resume", "--output", output], capsys, f"--resume {checkpoint}/")
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_a_longer_run_is_reported_and_a_changed_one_refused(finished, output, capsys):
    shutil.copytree(finished, output)
    line = ["--resume", "--output", output]
    told = refusal(main, [*line, "--seed", 1, "--batch-size", 32, "--objective", "mlm"], capsys)
    before = {"--objective mlm": "mlm+nsp", "--batch-size 32": "16", "--seed 1": "0"}
    for option, value in before.items():
        (message,) = (text for text in told.splitlines() if text.startswith(f"{option}: "))
        assert value in message
    resume(output, "--max-steps 12")
    assert re.search(r"\b12\b.*\b10\b", capsys.readouterr().out)
    assert rows(output)[-1]["step"] == 12 and read_json(output / "config.json")["max_steps"] == 12
    resume(output, "--epochs 0.25")  # of 52 steps
    assert rows(output)[-1]["step"] == 13 and read_json(output / "config.json")["max_steps"] == 0


def test_runs_without_a_name_take_a_free_one(arguments, tmp_path, monkeypatch):
    """Three in one second, as from a loop."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/20260102-030405", "runs/20260102-030405-2"):
        assert ckpt.new_folder(Path("runs/20260102-030405")) == Path(name)
    main([*arguments, "--max-steps", "1"])
    main([*arguments, "--max-steps", "1"])
    folders = sorted(Path("runs").glob("*/summary.json"))
    assert len(folders) == 2


@pytest.mark.parametrize("name", [".", "./", ".."])
def test_a_run_may_be_in_the_current_folder_or_above(name, arguments, output, monkeypatch):
    here = output / "below" if name == ".." else output
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    built(name, arguments, "--resume").open_output()
    assert (output / "config.json").is_file()


def test_a_text_that_was_edited_is_reported_and_the_run_keeps_its_corpus(
    arguments, text_file, tmp_path, output, capsys
):
    text = shutil.copy(text_file, tmp_path / "text.txt")
    options = arguments_of(arguments, "--recipe classic --schedule constant --train", [text])
    whole = pretrain_into(tmp_path / "whole", options, "--max-steps 4")
    pretrain_into(output, options, "--max-steps 2")
    with open(text, "a") as file:
        file.write("\nOne more sentence .\n")
    capsys.readouterr()
    resume(output, "--max-steps 4")
    weights = [sha256_of(run / "final" / "model.safetensors") for run in (whole, output)]
    assert weights[0] == weights[1]
    assert f"--train {text}: " in capsys.readouterr().out
    resume(output, "--max-steps 5")
    assert f"--train {text}: " in capsys.readouterr().out  # each time


def test_a_run_resumes_after_its_text_and_the_cache_have_moved(
    arguments, text_file, tmp_path, output, capsys
):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    stays = write_documents(tmp_path / "stays.txt", make_documents(12, seed=9))
    files = ["--cache", old / "cache"]
    for name in ("train", "valid"):
        files += [f"--{name}", shutil.copy(text_file, old / f"{name}.txt")]
        files += [stays] if name == "train" else []
    options = arguments_of(arguments, "--recipe classic --schedule constant", files)
    whole = pretrain_into(tmp_path / "whole", options, "--max-steps 4")
    pretrain_into(output, options, "--max-steps 2")
    shutil.copytree(old, new)
    texts = {f"--{name}": new / f"{name}.txt" for name in ("train", "valid")}
    again = ["--resume", "--output", output, "--max-steps", 4, "--cache", new / "cache"]
    again += ["--train", texts["--train"], stays, "--valid", texts["--valid"]]
    told = refusal(main, again, capsys)  # the old text is still there
    assert all(f"{option} {text}" in told for option, text in texts.items()) and str(old) in told
    shutil.rmtree(old)
    for option, text in texts.items():
        other = shutil.copy(text, new / "other.txt")
        told = refusal(main, [*again, option, other], capsys)
        assert f"{option} {other}: " in told and str(old) in told
        content = text.read_text()
        text.write_text(f"{content}\nOne more sentence .\n")
        told = refusal(main, again, capsys)
        assert f"{option} {text}" in told
        text.write_text(content)
    resume(output, again[3:])
    weights = [sha256_of(run / "final" / "model.safetensors") for run in (whole, output)]
    assert weights[0] == weights[1]


def test_a_name_on_the_hub_is_no_other_model_once_a_folder_has_it(tmp_path, monkeypatch):
    """A size is another model than a folder of that name."""
    monkeypatch.chdir(tmp_path)
    hub, size = ("bert-base-uncased", "bert-base-uncased", True), ("tiny", "./tiny", False)
    for before, now, is_same in (hub, size):
        saved = {"options": portable_options(Config(model=before))}
        Path(now).mkdir()
        assert bool(changed_options(Config(model=now), saved, tmp_path / "none")) is not is_same


def test_a_glob_in_a_folder_with_brackets_finds_the_same_files_from_elsewhere(
    text_file, tmp_path, monkeypatch
):
    folder = tmp_path / "[2024] texts"
    folder.mkdir()
    here = shutil.copy(text_file, folder / "a [1].txt")
    monkeypatch.chdir(folder)
    given = Config(train=("./*.txt", "a [1].txt"), cache="[cache]")
    options = portable_options(given)
    monkeypatch.chdir(tmp_path)
    assert [expand([path]) for path in options["train"]] == [[str(here)]] * 2
    assert options["cache"] == str(folder / "[cache]")


def test_a_run_of_another_command_is_not_resumed(output, capsys):
    output.mkdir()
    (output / "config.json").write_text('{"label_field": "label"}')
    told = refusal(main, ["--resume", "--output", output], capsys)
    assert str(output / "config.json") in told and "label_field" in told


def test_overwrite_keeps_the_old_run_until_the_new_one_has_a_checkpoint(
    finished, arguments, tmp_path, output, capsys
):
    shutil.copytree(finished, output)
    line = [*arguments, "--output", output]
    assert refusal(main, line, capsys).startswith(f"--output {output}: ")
    absent = [*line, "--train", tmp_path / "absent", "--overwrite"]
    assert refusal(main, absent, capsys).startswith("--train ")
    assert_same_run(finished, output)
    shutil.copytree(output / "final", output / "ema")  # as an edited loop may write it
    pretrain_into(output, arguments, "--max-steps 2 --overwrite")
    assert steps_of(output) == [2] and not (output / "ema").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


def test_overwrite_through_a_link_replaces_the_run_behind_it(finished, arguments, tmp_path, output):
    target = shutil.copytree(finished, tmp_path / "elsewhere" / "target")
    output.symlink_to(target)
    pretrain_into(output, arguments, "--max-steps 2 --overwrite")
    assert output.readlink() == target and steps_of(target) == [2]
    assert sorted(path.name for path in target.parent.iterdir()) == [".target.lock", "target"]


def test_patience_stops_early_and_stays_stopped_until_there_are_more_steps(
    arguments, output, capsys
):
    """At a very low rate nothing is learned, so the validation perplexity never falls."""
    pretrain_into(output, arguments, "--learning-rate 1e-30 --eval-every 1 --patience 2")
    assert summary_of(output)["steps"] == 2 and (output / "final").is_dir()
    (note,) = summary_of(output)["notes"]
    assert note.startswith("--patience 2: ") and note in capsys.readouterr().out
    resume(output)
    assert "is finished, at step 2" in capsys.readouterr().out
    resume(output, "--patience 3")
    assert summary_of(output)["steps"] == 3
    resume(output, "--max-steps 20 --patience 2")
    assert summary_of(output)["steps"] == 5 and summary_of(output)["state"] == "finished"
    assert [row["step"] for row in rows(output)] == [0, 1, 2, 3, 4, 5]


def test_a_garbled_log_does_not_stop_resuming(finished, output):
    interrupted_copy(finished, output, 8)
    log = output / "metrics.jsonl"
    log.write_bytes(b"\xff\xfe{\n" + log.read_bytes() + b'[1]\n{"step": "a"}\n{"step": 9')
    resume(output)
    assert_same_run(finished, output)


# Text, models, and what other commands make of a run.


def test_advice_for_few_documents_leads_to_a_run(
    arguments, tmp_path, output, all_sentences, capsys
):
    """One document; one document many times, which would all be held out."""
    files = [arguments, "--format sentences --max-steps 1 --output", [output], "--train"]
    one = write_documents(tmp_path / "one.txt", [all_sentences])
    copies = write_documents(tmp_path / "copies.txt", [all_sentences[:90]] * 6)
    for path, way in ((one, "--objective mlm"), (copies, "--valid-fraction 0")):
        argv = arguments_of(*files, [path], "--overwrite")
        told = refusal(main, argv, capsys)
        assert told.startswith(f"--train {path}: ") and way in told
        assert (path == copies) is ("--valid-fraction" in told)
        main([*argv, *way.split()])


# A vocabulary that does not fit, copies of training documents in the validation text.


RUSSIAN = "москва столица россии "


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, documents):
    """Texts with many words, and with some, that the tokenizer of `finished` does not know."""
    folder, paths = tmp_path_factory.mktemp("foreign"), {}
    for name, share in (("many", 1), ("some", 7)):
        mixed = [
            [f"{line} {RUSSIAN * 14}" if number % share == 0 else line for line in document]
            for number, document in enumerate(documents)
        ]
        paths[name] = write_documents(folder / f"{name}.txt", mixed)
    return paths


def is_possible(message, command):
    """Whether `command` has all options that a message names."""
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        command(["--help"])
    return all(name in shown.getvalue() for name in re.findall(r"--[\w-]+", message))


def test_text_that_the_tokenizer_does_not_know_is_refused_early(
    finished, to_continue, foreign, tmp_path, output, capsys
):
    model, cache = finished / "final", ["--cache", tmp_path / "cache"]
    train = arguments_of(to_continue, ["--model", model, *cache])
    corpus = ["--output", tmp_path / "corpus", "--input"]
    commands = (
        ("--train", main, [*train, "--output", output, "--train"]),
        ("--input", evaluate.main, arguments_of(["--model", model, *cache, "--input"])),
        ("--input", prepare.main, arguments_of(["--tokenizer", model, *cache, *corpus])),
    )
    for option, command, argv in commands:
        told = refusal(command, [*argv, foreign["many"]], capsys)
        assert told.startswith(f"{option} {foreign['many']}: ") and "Cyrillic" in told
        assert is_possible(told, command)
        assert not [*tmp_path.rglob("corpus.json")] and not output.exists()
        more = ["--max-steps", "1"] if command is main else []
        command([str(word) for word in [*argv, foreign["some"], *more]])
        told = capsys.readouterr().out  # most of the text is in Latin letters
        (line,) = re.findall(f"^{option} {foreign['some']}: .*Cyrillic.*", told, re.M)
        assert set("москвати") <= set(line.split())
        shutil.rmtree(tmp_path / "cache")
        shutil.rmtree(output, ignore_errors=True)


def test_a_held_out_part_without_words_is_refused_by_name(
    finished, to_continue, text_file, documents, tmp_path, output, capsys
):
    """Of so few documents, the last sentences are held out."""
    books = write_documents(tmp_path / "books.txt", [[*book, "❦"] for book in documents[:3]])
    model = ["--model", finished / "final", "--cache", tmp_path]
    train = arguments_of(to_continue, model, "--objective mlm --output", [output, "--train"])
    commands = (
        (f"--train {books}: ", main, [*train, books]),
        (f"--train {books}: ", main, [*train, text_file, books, "--mix", 3, 1]),
        (f"--input {books}: ", evaluate.main, [*model, "--valid-fraction", 0.05, "--input", books]),
    )
    for begins, command, argv in commands:
        refusal(command, argv, capsys, begins, output)


def test_text_in_another_encoding_is_refused_with_the_option(finished, tmp_path, output, capsys):
    pytest.importorskip("charset_normalizer")
    path, table, good = (tmp_path / name for name in ("text.txt", "rows.csv", "good.csv"))
    path.write_bytes("今天天气很好，我们去公园散步。\n".encode("gb18030") * 50)
    table.write_bytes(b"text,label\n" + "今天天气很好，我们去公园散步,a\n".encode("gb18030") * 50)
    good.write_text("text,label\n" + "some words,a\nother words,b\n" * 4)
    model, to = ["--model", finished / "final"], ["--output", output]
    rows = ["--train", good, "--valid", good, "--test", good]
    commands = (
        ("--train", main, [*to, "--train", path]),
        ("--input", prepare.main, [*to, "--input", path]),
        ("--input", evaluate.main, [*model, "--input", path]),
        ("--train", finetune.main, [*model, *to, "--valid", good, "--train", table]),
        ("--text", adapt.main, [*model, *to, *rows, "--text", path]),
    )
    for option, command, argv in commands:
        told = refusal(command, arguments_of(argv), capsys)
        assert told.startswith(f"{option} ") and "--encoding gb18030" in told, told
        assert is_possible(told, command)


def test_a_run_on_text_that_was_accepted_resumes(
    finished, to_continue, foreign, tmp_path, output, monkeypatch
):
    train = ["--model", finished / "final", "--train", foreign["many"], "--cache", tmp_path / "c"]
    argv = arguments_of(to_continue, train)
    with monkeypatch.context() as patched:
        patched.setattr("pretrain.inputs.MAX_UNKNOWN", 1.0)
        pretrain_into(output, argv, "--max-steps 4")
    interrupted_copy(output, tmp_path / "copy", 2)
    for folder in (tmp_path / "c").iterdir():  # its corpora must be prepared again
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    resume(tmp_path / "copy")
    assert_same_run(output, tmp_path / "copy", step=4)


def test_training_documents_in_the_validation_text_are_counted(
    arguments, text_file, documents, tmp_path, output, capsys
):
    valid = write_documents(tmp_path / "valid.txt", [*documents[:3], documents[3][:1] * 7])
    pretrain_into(output, arguments, "--max-steps 1 --valid", [valid])
    assert f"--valid {valid}: 3 of 4 documents " in capsys.readouterr().out


@pytest.mark.parametrize("model", ["base", "mini"])
def test_a_model_without_text_is_not_the_demo(model, capsys):
    assert refusal(main, ["--model", model], capsys).startswith(f"--model {model}: ")


@pytest.fixture
def brief(tmp_path, monkeypatch):
    """Options of one step of the demo, on little of its text."""
    monkeypatch.setattr("pretrain.demo.TRAINING_SECONDS", 1e-3)
    monkeypatch.setattr("pretrain.demo.MIN_EPOCHS", 1e-3)
    monkeypatch.setattr("pretrain.demo.TIMED_STEPS", 1)
    monkeypatch.setattr("pretrain.demo.MAX_MODULE_BYTES", 4000)
    return arguments_of("--vocab-size 500 --eval-tokens 5000 --cache", [tmp_path])


def test_embedded_default(brief, output, capsys):
    """Without options, it uses the embedded text, fits the machine, and fills masks at the end."""
    pretrain_into(output, brief)
    told = capsys.readouterr().out
    assert "a step takes" in told and "filled by the model" in told and "[MASK]" in told
    assert summary_of(output)["steps"] == 1


def test_the_demo_in_two_processes_that_share_the_weights(brief, output):
    ended = in_processes(output.parent, main, [*brief, "--shard", "--output", output], count=2)
    assert [code for code, _ in ended] == [0, 0], ended
    assert summary_of(output)["steps"] == 1


@pytest.mark.parametrize("value", ["nan", "1e30"])
def test_a_model_that_overflows_is_refused_or_ends_without_a_result(
    value, finished, text_file, cache, to_continue, output, tmp_path, capsys
):
    """A weight that is NaN is found when it is loaded; with weights that are too large, each step
    is skipped."""
    folder = overflowing(finished / "final", tmp_path / "model", float(value))
    files = ["--model", folder, "--input", text_file, "--cache", cache]
    more = ["--precision", "fp32", "--valid-fraction", "0.05"]
    assert refusal(evaluate.main, [*files, *more], capsys).startswith(f"--model {folder}: ")
    argv = arguments_of(to_continue, ["--model", folder, "--output", output], "--max-steps 2")
    assert run_command(main, argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--model {folder}: " in error if value == "nan" else "2 of the 2 steps" in error
    assert not (output / "final").exists() and not (output / "best").exists()


def test_further_pretraining_from_a_run_or_its_model(finished, to_continue, tmp_path):
    task = "--max-steps 1 --objective mlm --model"
    one = pretrain_into(tmp_path / "1", to_continue, task, [finished])
    two = pretrain_into(tmp_path / "2", to_continue, task, [model_folder(str(finished))])
    assert rows(one) == rows(two)
    before, after = rows(finished)[-1], rows(one)[0]
    assert after["eval/perplexity"] == pytest.approx(before["eval/perplexity"], rel=0.2)
    assert "seq_relationship" in (one / "final" / "README.md").read_text()  # was not trained


def test_a_fresh_head_starts_by_guessing_frequencies(finished, to_continue, tmp_path):
    """From scratch, and on an encoder without a head."""
    encoder = shutil.copytree(finished / "final", tmp_path / "encoder")
    BertModel.from_pretrained(encoder).save_pretrained(encoder)
    headless = pretrain_into(tmp_path / "run", to_continue, "--max-steps 1 --model", [encoder])
    for run in (finished, headless):
        first = rows(run)[0]
        assert first["eval/perplexity"] == pytest.approx(first["eval/unigram_perplexity"], rel=0.05)


# Masks.


def ordinary_tokens(batch, vocabulary):
    """Number of tokens in a batch that may be masked."""
    before, number = batch.input_ids.clone(), batch.counts["mlm"]  # what follows is filling
    before[batch.masked_positions[:number]] = batch.labels["mlm"][:number]
    return int((~torch.from_numpy(vocabulary.is_special)[before]).sum())


def test_the_mask_rate_goes_from_the_first_value_to_the_second(arguments, output, steps_seen):
    pretrain_into(output, arguments, "--masking token --mask-rate 0.2 0.6")
    vocabulary = describe(load(str(output / "final")))

    def share(batches):
        masked = sum(batch.counts["mlm"] for batch in batches)
        return masked / sum(ordinary_tokens(batch, vocabulary) for batch in batches)

    assert len(steps_seen) == 10
    for step, batches in enumerate(steps_seen):
        assert share(batches) == pytest.approx(0.2 + 0.4 * step / 9, abs=0.015), step


TERMS = ["quickly banking", "river", "modelization tokens", "slow money"]


@pytest.fixture(scope="module")
def marked(tmp_path_factory, documents):
    """Files that mark TERMS: JSONL with spans, a lexicon, a table of similar words; and how often
    a term occurs in the text."""
    folder = tmp_path_factory.mktemp("marked")
    pattern = re.compile("|".join(rf"\b{term}\b" for term in TERMS))
    records = []
    for text in ("\n".join(document) for document in documents):
        spans = [[match.start(), match.end(), "TERM"] for match in pattern.finditer(text)]
        records.append({"text": text, "entities": spans})
    write_rows(folder / "spans.jsonl", records)
    titles = "\n".join(map(str.title, TERMS))  # the tokenizer ignores the case
    (folder / "terms.txt").write_text(titles, encoding="utf-8")
    similar = "bank\tmoney\tmodel\nriver\tmoney\nmoney\triver\n"
    (folder / "similar.tsv").write_text(similar, encoding="utf-8")
    return {
        "spans": f"{folder}/spans.jsonl",
        "lexicon": f"{folder}/terms.txt",
        "similar": f"{folder}/similar.tsv",
        "number": sum(len(record["entities"]) for record in records),
    }


MASKINGS = {
    "token": "",
    "word": "",
    "span": "",
    "entity by spans": "--train {spans}",
    "entity by a lexicon": "--lexicon {lexicon}",
    "entity then tokens": "--lexicon {lexicon} --entity-fill token --entity-probability 1 "
    "--entity-budget 0.3",
    "entity alone": "--train {spans} --entity-fill none",
    "word by similar": "--replace similar --similar {similar}",
    "span by similar": "--replace similar --similar {similar}",
    "entity by similar": "--train {spans} --replace similar --similar {similar}",
}


@pytest.mark.parametrize(("name", "objective"), list(zip(MASKINGS, cycle(OBJECTIVES))))
def test_every_masking_and_every_objective_trains(
    name, objective, arguments, marked, output, steps_seen, capsys
):
    masking = name.split()[0]
    task = f"--masking {masking} --objective {objective} --max-steps 2"
    pretrain_into(output, arguments, task, MASKINGS[name].format(**marked))
    last = rows(output)[-1]
    assert last["step"] == 2 and math.isfinite(last["train/loss"])
    assert math.isfinite(last["eval/perplexity"])
    losses = {name for name in last if name.startswith("train/") and name.endswith("_loss")}
    assert losses == {f"train/{part}_loss" for part in objective.split("+")}
    if masking == "entity":
        assert f", {marked['number']:,} entities (" in capsys.readouterr().out
    tokenizer = load(str(output / "final"))
    batches = [batch for batches in steps_seen for batch in batches]
    shown = {number for batch in batches for number in batch.input_ids.tolist()}
    assert (tokenizer.mask_token_id in shown) is ("similar" not in name)
    for batch in batches:
        number = batch.counts["mlm"]
        assert number == (batch.labels["mlm"] != IGNORED).sum()
        assert batch.shortfall == 0 if name == "entity alone" else number > 0


def test_a_schedule_and_entities_beyond_the_rate_fit_filled_batches(arguments, marked, tmp_path):
    """As on a GPU, where batches are filled: the fixed sizes suffice for the highest rate, and for
    entities beyond it."""
    task = f"--masking entity --lexicon {marked['lexicon']} --mask-rate 0.05 0.5 --max-steps 4"
    more = "--entity-probability 1 --entity-budget 1"
    options = arguments_of(arguments, task, more, SIZES, "hidden_dropout_prob=0")
    exact = pretrain_into(tmp_path / "exact", options)
    run = built(tmp_path / "filled", options)
    run.data.phases = [
        (dataset, replace(collator, fill=True)) for dataset, collator in run.data.phases
    ]
    run.open_output()
    train(run)
    for left, right in zip(rows(exact), rows(tmp_path / "filled"), strict=True):
        assert right == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize(
    ("source", "of_prepare", "of_text"),
    [
        ("text", "", ""),
        ("text", "--lexicon {lexicon}", "--masking entity --lexicon {lexicon}"),
        ("spans", "--entity-field entities", "--masking entity"),
    ],
)
def test_a_prepared_corpus_trains_like_its_text(
    source, of_prepare, of_text, arguments, marked, text_file, cache, tmp_path
):
    names = marked | {"text": text_file}
    corpus = prepare_into(tmp_path / "corpus", names[source], cache, of_prepare.format(**names))
    found = read_json(corpus / "corpus.json")["entities"]
    assert found == (marked["number"] if of_prepare else 0)
    task = arguments_of(arguments, of_text.format(**names), "--max-steps 2 --train")
    text = pretrain_into(tmp_path / "text", task, [names[source]])
    if "--lexicon" in task:  # the corpus has it
        del task[task.index("--lexicon") : task.index("--lexicon") + 2]
    assert_same_run(text, pretrain_into(tmp_path / "run", task, [corpus]), step=2)


def test_validation_text_needs_no_entities(arguments, marked, tmp_path):
    (tmp_path / "valid.txt").write_text("teach .\nlearn slow .\n\n" * 20, encoding="utf-8")
    write_rows(tmp_path / "valid.jsonl", [{"text": "the bank ."}, {"text": "the river ."}])
    task = f"--masking entity --max-steps 1 --valid {tmp_path}/valid"
    by_lexicon = f"{task}.txt --lexicon {marked['lexicon']}"
    by_spans = f"{task}.jsonl --train {marked['spans']} --entity-field entities --objective mlm"
    for name, line in (("lexicon", by_lexicon), ("spans", by_spans)):
        output = pretrain_into(tmp_path / name, arguments, line)
        assert math.isfinite(rows(output)[-1]["eval/perplexity"])


@pytest.mark.parametrize("budget", ["0.05", "1"])
def test_entities_that_never_fit_are_reported(budget, arguments, marked, output, capsys):
    task = f"--train {marked['spans']} --masking entity --entity-budget {budget}"
    pretrain_into(output, arguments, task, "--max-length 16 --max-steps 1")
    assert ("--entity-budget" in capsys.readouterr().out) is (budget != "1")


def test_a_lexicon_that_has_changed_is_noticed_on_resume(
    arguments, marked, tmp_path, output, capsys
):
    """The run continues on its corpus, and says so."""
    lexicon = tmp_path / "terms.txt"
    shutil.copy(marked["lexicon"], lexicon)
    pretrain_into(output, arguments, f"--masking entity --lexicon {lexicon} --max-steps 1")
    resume(output, ["--max-steps", 2])
    assert f"--lexicon {lexicon}: has changed" not in capsys.readouterr().out
    lexicon.write_text("quickly banking\n", encoding="utf-8")
    resume(output, ["--max-steps", 3])
    assert f"--lexicon {lexicon}: has changed" in capsys.readouterr().out
    assert rows(output)[-1]["step"] == 3


def test_a_table_of_similar_words_that_has_changed_is_refused_on_resume(
    arguments, marked, tmp_path, output, capsys
):
    table = tmp_path / "similar.tsv"
    shutil.copy(marked["similar"], table)
    pretrain_into(output, arguments, f"--replace similar --similar {table} --max-steps 2")
    assert read_json(output / "checkpoint-2" / ckpt.STATE_JSON)["similar_words"] == sha256_of(table)
    table.write_text("bank\triver\n", encoding="utf-8")
    argv = ["--resume", "--output", output, "--max-steps", 3]
    refusal(main, argv, capsys, f"--similar {table}: ")


def test_a_runs_config_json_starts_the_same_run(arguments, marked, tmp_path):
    """Lists of one value and of two, words, tokens with brackets and equals signs."""
    (tmp_path / "words.txt").write_text("slow-2\n", encoding="utf-8")
    more = f"""--train {marked["spans"]} --valid {marked["spans"]} --lexicon {marked["lexicon"]}
    --masking entity --entity-probability 0.75 --entity-budget 0.3 --entity-fill token
    --mask-rate 0.1 0.3 --replace similar --similar {marked["similar"]} --words spaces
    --text-field text --entity-field entities --split-sentences en --max-documents 40
    --add-tokens {tmp_path}/words.txt --add-special-tokens [name] eos_token=[EOT]
    --new-vectors random --max-steps 2"""
    one = pretrain_into(tmp_path / "one", arguments, more)
    saved = read_json(one / "config.json")
    assert saved["mask_rate"] == [0.1, 0.3]
    assert saved["add_special_tokens"] == ["[name]", "eos_token=[EOT]"]
    two = pretrain_into(tmp_path / "two", f"--config {one}/config.json")
    assert read_json(two / "config.json") == saved
    assert_same_run(one, two, step=2)


# Refused before work starts.


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, text_file, finished):
    """Files that are wrong in some way."""
    folder = tmp_path_factory.mktemp("wrong")
    lines = [line for line in text_file.read_text().splitlines() if line]
    files = {"lines.txt": "\n".join(lines), "special.txt": "[MASK] [SEP]\n[CLS] [MASK]\n\n" * 60}
    files |= {"strange.txt": "xylophone\n", "same.tsv": "bank\triver money\nmoney\tmoney\n"}
    vocabulary = read_json(finished / "final" / "tokenizer.json")["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    first, second = [vocabulary[name] for name in names if name.isalpha()][:2]
    names[first], names[second] = names[second], names[first]
    files["vocab.txt"] = "\n".join(names) + "\n"
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


BAD = {  # options -> what the messages begin with
    "--mask-rate 1.5 --epochs -1": "--mask-rate 1.5: |--epochs -1.0: ",  # see test_config
    "--batch-size 65536": "--batch-size 65536: ",
    "--device tpu": "--device tpu: ",
    "--device cuda": "--device cuda: ",
    "--precision fp16": "--precision fp16: ",
    "--output /": "--output /: ",
    "--cache {wrong}/lines.txt": "--cache {wrong}/lines.txt: ",
    "--model enormous": "--model enormous: ",
    "--model Tiny": "--model Tiny: ",
    "--model ./absent --masking phrase --epochs inf": "--masking phrase: |--epochs inf: |"
    "--model ./absent: ",
    "--model a/longer/name --valid absent.txt": "--valid absent.txt: |--model a/longer/name: ",
    "--tokenizer absent": "--tokenizer absent: |--tokenizer absent --vocab-size 120: ",
    "--valid {wrong}/special.txt": "--valid {wrong}/special.txt: ",
    "--format text": "--train {text}: ",  # one document
    "--train {wrong}/lines.txt --max-length 128": "--objective mlm+nsp: ",
    "--config-override num_hidden_layers=-1": "--config-override num_hidden_layers",
    "--config-override type_vocab_size=1": "--objective mlm+nsp: ",
    "--architecture modernbert": "--architecture modernbert --objective mlm+nsp: ",
    "--model {finished}/final --config-override --architecture modernbert --objective mlm": (
        "--model {finished}/final --architecture modernbert: "
    ),
    "--replace similar --similar absent": "--similar absent: ",
    "--objective mlm --nsp-weight 0.5": "--objective mlm --nsp-weight 0.5: ",
    "--entity-fill none --mask-rate 0.2": "--entity-fill none --mask-rate 0.2: |"
    "--entity-fill none: ",
    "--masking word --entity-probability 1 --entity-budget 0.9 --entity-fill token": (
        "--entity-probability 1.0: |--entity-budget 0.9: |--entity-fill token: "
    ),
    "--replace similar --similar {wrong}/same.tsv": "--similar {wrong}/same.tsv: ",
    "--masking entity": "--masking entity: ",
    "--masking entity --train {prepared}": "--masking entity: ",
    "--masking entity --lexicon absent": "--lexicon absent: ",
    "--masking entity --lexicon {wrong}/strange.txt": "--lexicon: ",
    "--masking entity --train {spans} --entity-field terms": "--train {spans}",
    "--train {prepared} --max-documents 3 --split-sentences": "--split-sentences auto "
    "--max-documents 3: --train {prepared}",
    "--model {finished}/final --config-override --max-length 1024": "--max-length 1024: ",
    "--model {finished}/final --config-override --tokenizer {wrong}/vocab.txt": "--tokenizer "
    "{wrong}/vocab.txt --vocab-size 120: ",
    "--model {finished}/final --config-override --vocab-size 30522 --tokenizer {wrong}/vocab.txt": (
        "--tokenizer {wrong}/vocab.txt: "
    ),
}


@pytest.mark.parametrize("line", BAD)
def test_what_does_not_fit_is_refused_before_work_starts(
    line, arguments, wrong, finished, prepared, text_file, marked, output, capsys
):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    names = {"wrong": wrong, "finished": finished, "prepared": prepared, "text": text_file} | marked
    more = line.format(**names).split()
    expected = BAD[line].format(**names).split("|")
    told = refusal(main, [*arguments, "--output", output, *more], capsys).splitlines()
    assert len(told) == len(expected)
    for message, beginning in zip(told, expected):
        assert message.startswith(beginning)
    assert not output.exists()


# Defaults.


@pytest.mark.parametrize(
    ("device", "batch_size", "lengths", "processes", "expected"),
    [
        ("cpu", 256, {}, 1, 32),
        ("cpu", 8, {}, 1, 8),
        ("cpu", 24, {}, 1, 24),
        ("cpu", 100, {}, 1, 25),
        ("cpu", 10**12, {}, 1, 32),  # in an instant
        ("cpu", 256, {"max_length": 512}, 4, 32),
        ("cpu", 256, {"phases": ("8:0.5", "512:0.5")}, 1, 64),
        ("cuda", 256, {}, 1, 256),
        ("cuda", 256, {"max_length": 512}, 1, 64),
        ("cuda", 256, {}, 8, 32),
        ("cuda", 2048, {}, 4, 256),
        ("cuda", 4, {"max_length": 1 << 16}, 1, 1),
    ],
)
def test_the_default_micro_batch_divides_the_step_and_keeps_the_device_busy(
    device, batch_size, lengths, processes, expected
):
    config, world = Config(batch_size=batch_size, **lengths), World(0, processes)
    assert plan.default_micro_batch_size(config, torch.device(device), world) == expected


@pytest.mark.parametrize(("batch_size", "processes"), [*product((2, 6, 8, 37), (1, 2, 4))])
def test_a_micro_batch_divides_each_step_or_the_batch_is_refused(batch_size, processes):
    config = Config(batch_size=batch_size, phases=("32:0.5", "128:0.5"))
    world = World(0, processes)
    try:
        plan.check_sizes(config, {}, world)
        size = plan.default_micro_batch_size(config, torch.device("cpu"), world)
    except UserError as error:
        assert str(error).startswith(f"--batch-size {batch_size}: ")
        assert all(batch_size % (size * processes) for size in range(4, batch_size + 1))
    else:
        assert size >= 4 and batch_size % (size * processes) == 0


def test_a_batch_that_no_good_micro_batch_divides_is_reported(capsys):
    cpu = torch.device("cpu")
    assert plan.default_micro_batch_size(Config(batch_size=37), cpu, World()) == 1
    assert capsys.readouterr().out.startswith("--batch-size 37: ")
    plan.default_micro_batch_size(Config(batch_size=36), cpu, World())
    assert not capsys.readouterr().out
    told = refused(plan.check_sizes, Config(batch_size=7), {}, World(0, 4))
    assert told.startswith("--batch-size 7: ") and told.endswith(" 4")
    refused(plan.check_sizes, Config(batch_size=10**12, micro_batch_size=1), {}, World(0, 3))
    damaged = {"micro_batch_size": 16}  # in a checkpoint
    told = refused(plan.check_sizes, Config(batch_size=8), damaged, World())
    assert told.startswith("--batch-size 8: ") and told.endswith(" 16")


@pytest.mark.parametrize(
    ("more", "total_steps", "processes", "has_validation", "expected"),
    [
        ("--warmup 10 --shard --eval-every 2", 3, 1, False, "--warmup --shard --eval-every"),
        ("--warmup 10 --shard --eval-every 2", 10, 2, True, ""),
        ("--warmup 0.5", 1, 1, True, ""),
        ("", 3, 1, False, ""),
        ("--max-steps 3", 3, 1, True, ""),
        ("--max-steps 3 --epochs 2", 3, 1, True, "--epochs"),
        ("--vocab-size 200 --lowercase off --train {corpus}", 3, 1, True, "--vocab-size"),
        ("--lowercase off --train {corpus}", 3, 1, True, "--lowercase"),
        ("--lowercase off --train {corpus}/tokenizer", 3, 1, True, ""),
        ("--lowercase off --tokenizer vocab.txt --train {corpus}", 3, 1, True, ""),
    ],
)
def test_what_has_no_effect_is_reported(
    more, total_steps, processes, has_validation, expected, corpus, capsys
):
    more = more.format(corpus=corpus.folder)
    config = parse(f"--warmup 0.06 {more}".split(), Config, "")
    plan.report_ineffective(config, total_steps, World(0, processes), has_validation)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[0] for line in lines] == expected.split()


@pytest.mark.parametrize(
    ("more", "beginning"),
    [("", "--batch-size 16: "), ("--micro-batch-size 8", "3 processes: ")],
)
def test_processes_that_cannot_share_a_step_are_refused_early(more, beginning, output, monkeypatch):
    monkeypatch.setattr("pretrain.build.start", lambda device: (World(0, 3), torch.device("cpu")))
    refused(built, output, f"--train {output}/absent --batch-size 16 {more}", begins=beginning)
