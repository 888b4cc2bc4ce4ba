"""pretrain.py as a user runs it: from text to checkpoints, resumed, and with bad input."""

import math
import re
import shutil
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from conftest import (
    SIZES,
    arguments_of,
    assert_same_run,
    built,
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
from pretrain.commands import evaluate, prepare
from pretrain.commands.pretrain import main
from pretrain.config import OBJECTIVES, Config
from pretrain.data.sources import expand
from pretrain.data.tokenizer import describe, load
from pretrain.files import model_folder, read_json, sha256_of
from pretrain.resume import portable_options
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
    ("more", "changed"), [("--precision bf16", "--workers 1"), ("--valid-fraction 0", "")]
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


def test_a_damaged_checkpoint_is_skipped(finished, output, capsys):
    interrupted_copy(finished, output, 8)
    weights = output / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    resume(output)
    assert str(weights) in capsys.readouterr().out and steps_of(output) == [10, 8, 6, 4, 2]
    assert (output / ".checkpoint-8.damaged").is_dir()
    assert_same_run(finished, output)


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
    """Also several in one second, as from a loop."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/20260102-030405", "runs/20260102-030405-2"):
        assert ckpt.new_folder(Path("runs/20260102-030405")) == Path(name)
    main([*arguments, "--max-steps", "1"])
    assert len(list(Path("runs").glob("*/summary.json"))) == 1


def test_a_run_may_be_in_the_current_folder(arguments, output, monkeypatch):
    output.mkdir()
    monkeypatch.chdir(output)
    built(".", arguments, "--resume").open_output()
    assert (output / "config.json").is_file()


def test_a_text_that_was_edited_is_reported_and_the_run_keeps_its_corpus(
    arguments, text_file, marked, tmp_path, output, capsys
):
    """So is a lexicon."""
    text = shutil.copy(text_file, tmp_path / "text.txt")
    lexicon = shutil.copy(marked["lexicon"], tmp_path / "terms.txt")
    files = ["--train", text, "--lexicon", lexicon]
    options = arguments_of(arguments, "--masking entity --schedule constant", files)
    whole = pretrain_into(tmp_path / "whole", options, "--max-steps 4")
    pretrain_into(output, options, "--max-steps 2")
    text.write_text(text.read_text() + "\nOne more sentence .\n")
    lexicon.write_text("quickly banking\n")
    capsys.readouterr()
    resume(output, "--max-steps 4")
    weights = [sha256_of(run / "final" / "model.safetensors") for run in (whole, output)]
    assert weights[0] == weights[1]
    told = capsys.readouterr().out
    assert f"--train {text}: " in told and f"--lexicon {lexicon}: has changed" in told


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
        content = text.read_text()
        text.write_text(f"{content}\nOne more sentence .\n")
        assert f"{option} {text}" in refusal(main, again, capsys)
        text.write_text(content)
    resume(output, again[3:])
    weights = [sha256_of(run / "final" / "model.safetensors") for run in (whole, output)]
    assert weights[0] == weights[1]


def test_a_run_finds_its_files_from_any_folder(text_file, tmp_path, monkeypatch):
    """Also a glob in a folder whose name has brackets."""
    folder = tmp_path / "[2024] texts"
    folder.mkdir()
    path = shutil.copy(text_file, folder / "a [1].txt")
    monkeypatch.chdir(folder)
    config = Config(train=("./*.txt", "a [1].txt"), cache="[cache]", model="bert-base-uncased")
    options = portable_options(config)
    monkeypatch.chdir(tmp_path)
    assert [expand([entry]) for entry in options["train"]] == [[str(path)]] * 2
    assert options["cache"] == str(folder / "[cache]") and options["model"] == config.model


def test_a_run_of_another_command_is_not_resumed(output, capsys):
    output.mkdir()
    (output / "config.json").write_text('{"label_field": "label"}')
    told = refusal(main, ["--resume", "--output", output], capsys)
    assert str(output / "config.json") in told and "label_field" in told


def test_overwrite_keeps_the_old_run_until_the_new_one_has_a_checkpoint(
    finished, arguments, tmp_path, output, capsys
):
    """Through a link, it replaces the run behind it."""
    target = shutil.copytree(finished, tmp_path / "elsewhere" / "target")
    output.symlink_to(target)
    line = [*arguments, "--output", output]
    assert refusal(main, line, capsys).startswith(f"--output {output}: ")
    absent = [*line, "--train", tmp_path / "absent", "--overwrite"]
    assert refusal(main, absent, capsys).startswith("--train ")
    assert_same_run(finished, output)
    shutil.copytree(output / "final", output / "ema")  # as an edited loop may write it
    pretrain_into(output, arguments, "--max-steps 2 --overwrite")
    assert steps_of(output) == [2] and not (output / "ema").exists()
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


def test_text_that_the_tokenizer_does_not_know_is_refused_early(
    finished, to_continue, documents, tmp_path, output, capsys
):
    """A smaller share is reported."""

    def foreign(name, share):
        mixed = [
            [f"{line} {'москва столица россии ' * 14}" for line in document]
            if number % share == 0
            else document
            for number, document in enumerate(documents)
        ]
        return str(write_documents(tmp_path / name, mixed))

    many, some = foreign("many.txt", 1), foreign("some.txt", 7)
    files = ["--model", finished / "final", "--cache", tmp_path / "cache", "--output", output]
    argv = arguments_of(to_continue, files, "--max-steps 1 --train")
    assert "Cyrillic" in refusal(main, [*argv, many], capsys, f"--train {many}: ", output)
    assert not [*tmp_path.rglob("corpus.json")]
    main([*argv, some])
    (line,) = re.findall(f"^--train {some}: .*Cyrillic.*", capsys.readouterr().out, re.M)
    assert set("москвати") <= set(line.split())  # most of the text is in Latin letters


def test_a_held_out_part_without_words_is_refused_by_name(
    finished, to_continue, documents, tmp_path, output, capsys
):
    """Of so few documents, the last sentences are held out."""
    books = write_documents(tmp_path / "books.txt", [[*book, "❦"] for book in documents[:3]])
    files = ["--model", finished / "final", "--cache", tmp_path, "--output", output]
    argv = arguments_of(to_continue, files, "--objective mlm --train", [books])
    refusal(main, argv, capsys, f"--train {books}: ", output)


def test_text_in_another_encoding_is_refused_with_the_option(output, tmp_path, capsys):
    pytest.importorskip("charset_normalizer")
    path = tmp_path / "text.txt"
    path.write_bytes("今天天气很好，我们去公园散步。\n".encode("gb18030") * 50)
    for option, command in (("--train", main), ("--input", prepare.main)):
        told = refusal(command, ["--output", output, option, path], capsys)
        assert told.startswith(f"{option} ") and "--encoding gb18030" in told, told


def test_training_documents_in_the_validation_text_are_counted(
    arguments, text_file, documents, tmp_path, output, capsys
):
    valid = write_documents(tmp_path / "valid.txt", [*documents[:3], documents[3][:1] * 7])
    pretrain_into(output, arguments, "--max-steps 1 --valid", [valid])
    assert f"--valid {valid}: 3 of 4 documents " in capsys.readouterr().out


def test_a_model_without_text_is_not_the_demo(capsys):
    refusal(main, ["--model", "base"], capsys, "--model base: ")


def test_embedded_default(tmp_path, output, capsys, monkeypatch):
    """Without options, it uses the embedded text, fits the machine, and fills masks at the end."""
    monkeypatch.setattr("pretrain.demo.TRAINING_SECONDS", 1e-3)
    monkeypatch.setattr("pretrain.demo.MIN_EPOCHS", 1e-3)
    monkeypatch.setattr("pretrain.demo.TIMED_STEPS", 1)
    monkeypatch.setattr("pretrain.demo.MAX_MODULE_BYTES", 4000)
    pretrain_into(output, "--vocab-size 500 --eval-tokens 5000 --cache", [tmp_path])
    told = capsys.readouterr().out
    assert "a step takes" in told and "filled by the model" in told and "[MASK]" in told
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
    without = "teach .\nlearn slow .\n\n" * 20  # validation text needs no entities
    (folder / "without.txt").write_text(without, encoding="utf-8")
    similar = "bank\tmoney\tmodel\nriver\tmoney\nmoney\triver\n"
    (folder / "similar.tsv").write_text(similar, encoding="utf-8")
    return {
        "spans": f"{folder}/spans.jsonl",
        "lexicon": f"{folder}/terms.txt",
        "without": f"{folder}/without.txt",
        "similar": f"{folder}/similar.tsv",
        "number": sum(len(record["entities"]) for record in records),
    }


MASKINGS = {
    "entity by spans": "--train {spans}",
    "entity then tokens": "--lexicon {lexicon} --entity-fill token --entity-probability 1 "
    "--entity-budget 0.3 --valid {without}",
    "entity alone": "--train {spans} --entity-fill none",
    "span by similar": "--replace similar --similar {similar}",
}


@pytest.mark.parametrize(("name", "objective"), list(zip(MASKINGS, cycle(OBJECTIVES))))
def test_maskings_and_objectives_train_together(
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
    assert found == marked["number"]
    task = arguments_of(arguments, of_text.format(**names), "--max-steps 2 --train")
    text = pretrain_into(tmp_path / "text", task, [names[source]])
    if "--lexicon" in task:  # the corpus has it
        del task[task.index("--lexicon") : task.index("--lexicon") + 2]
    assert_same_run(text, pretrain_into(tmp_path / "run", task, [corpus]), step=2)


@pytest.mark.parametrize("budget", ["0.05", "1"])
def test_entities_that_never_fit_are_reported(budget, arguments, marked, output, capsys):
    task = f"--train {marked['spans']} --masking entity --entity-budget {budget}"
    built(output, arguments, task, "--max-length 16")
    assert ("--entity-budget" in capsys.readouterr().out) is (budget != "1")


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
    "--device cuda": "--device cuda: ",
    "--precision fp16": "--precision fp16: ",
    "--output /": "--output /: ",
    "--cache {wrong}/lines.txt": "--cache {wrong}/lines.txt: ",
    "--model ./absent --masking phrase --epochs inf": "--masking phrase: |--epochs inf: |"
    "--model ./absent: ",
    "--model a/longer/name --valid absent.txt": "--valid absent.txt: |--model a/longer/name: ",
    "--tokenizer absent": "--tokenizer absent: |--tokenizer absent --vocab-size 120: ",
    "--valid {wrong}/special.txt": "--valid {wrong}/special.txt: ",
    "--train {wrong}/lines.txt --max-length 128": "--objective mlm+nsp: ",
    "--architecture modernbert": "--architecture modernbert --objective mlm+nsp: ",
    "--model {finished}/final --config-override --architecture modernbert --objective mlm": (
        "--model {finished}/final --architecture modernbert: "
    ),
    "--objective mlm --nsp-weight 0.5": "--objective mlm --nsp-weight 0.5: ",
    "--entity-fill none --mask-rate 0.2": "--entity-fill none --mask-rate 0.2: |"
    "--entity-fill none: ",
    "--replace similar --similar {wrong}/same.tsv": "--similar {wrong}/same.tsv: ",
    "--masking entity": "--masking entity: ",
    "--masking entity --train {prepared}": "--masking entity: ",
    "--masking entity --lexicon {wrong}/strange.txt": "--lexicon: ",
    "--train {prepared} --max-documents 3 --split-sentences": "--split-sentences auto "
    "--max-documents 3: --train {prepared}",
    "--model {finished}/final --config-override --max-length 1024": "--max-length 1024: ",
    "--model {finished}/final --config-override --vocab-size 30522 --tokenizer {wrong}/vocab.txt": (
        "--tokenizer {wrong}/vocab.txt: "
    ),
}


@pytest.mark.parametrize("line", BAD)
def test_what_does_not_fit_is_refused_before_work_starts(
    line, arguments, wrong, finished, prepared, marked, output, capsys
):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    names = {"wrong": wrong, "finished": finished, "prepared": prepared} | marked
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
        ("cpu", 8, {}, 1, 8),
        ("cpu", 100, {}, 1, 25),
        ("cpu", 10**12, {}, 1, 32),  # in an instant
        ("cpu", 256, {"phases": ("8:0.5", "512:0.5")}, 1, 64),
        ("cuda", 256, {"max_length": 512}, 1, 64),
        ("cuda", 256, {}, 8, 32),
        ("cuda", 4, {"max_length": 1 << 16}, 1, 1),
    ],
)
def test_the_default_micro_batch_divides_the_step_and_keeps_the_device_busy(
    device, batch_size, lengths, processes, expected
):
    config, world = Config(batch_size=batch_size, **lengths), World(0, processes)
    assert plan.default_micro_batch_size(config, torch.device(device), world) == expected


def test_a_batch_that_no_good_micro_batch_divides_is_reported(capsys):
    cpu = torch.device("cpu")
    assert plan.default_micro_batch_size(Config(batch_size=37), cpu, World()) == 1
    assert capsys.readouterr().out.startswith("--batch-size 37: ")
    two = Config(batch_size=2, phases=("32:0.5", "128:0.5"))
    refused(plan.default_micro_batch_size, two, cpu, World(), begins="--batch-size 2: ")
    told = refused(plan.check_sizes, Config(batch_size=7), {}, World(0, 4))
    assert told.startswith("--batch-size 7: ") and told.endswith(" 4")
    damaged = {"micro_batch_size": 16}  # in a checkpoint
    told = refused(plan.check_sizes, Config(batch_size=8), damaged, World())
    assert told.startswith("--batch-size 8: ") and told.endswith(" 16")


@pytest.mark.parametrize(
    ("more", "total_steps", "processes", "has_validation", "expected"),
    [
        ("--warmup 10 --shard --eval-every 2", 3, 1, False, "--warmup --shard --eval-every"),
        ("--warmup 10 --shard --eval-every 2", 10, 2, True, ""),
        ("--max-steps 3 --epochs 2", 3, 1, True, "--epochs"),
        ("--lowercase off --train {corpus}", 3, 1, True, "--lowercase"),
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


def test_processes_that_cannot_share_a_step_are_refused_early(output, monkeypatch):
    monkeypatch.setattr("pretrain.build.start", lambda device: (World(0, 3), torch.device("cpu")))
    options = f"--train {output}/absent --batch-size 16"
    refused(built, output, options, begins="--batch-size 16: ")
