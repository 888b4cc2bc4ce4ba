"""The main job as a user runs it: `scripts/pretrain.py` from text to checkpoints, resumed, and refused.

Runs go through the script's `main` in this process; exit codes and one run under SIGKILL through a process of its own.
"""
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SIZES, assert_same_run, interrupted_copy, refusal, rows, script, ten_steps

from pretrain.batch import IGNORED
from pretrain.command import UserError, parse
from pretrain.config import OBJECTIVES, Config, validate
from pretrain.data.dataset import make_loader
from pretrain.data.tokenizer import describe, load
from pretrain.files import sha256_of
from pretrain.parts import default_micro_batch_size, make_task
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import World

PRETRAIN, EVALUATE, PREPARE = script("pretrain"), script("evaluate"), script("prepare")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, text_file):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def arguments(workplace, text_file):
    return ten_steps(text_file, workplace / "cache", micro_batch_size=8)


@pytest.fixture(scope="module")
def finished(workplace, arguments):
    """The uninterrupted run that others are compared with."""
    output = workplace / "finished"
    PRETRAIN.main([*arguments, "--output", str(output)])
    return output


def test_a_run_leaves_what_it_promises(finished):
    assert {"final", "best", "checkpoint-10", "config.json", "metrics.jsonl", "summary.json"} <= {path.name for path in finished.iterdir()}
    logged = rows(finished)
    assert [row["step"] for row in logged] == [0, 1, 3, 4, 6, 8, 9, 10]
    assert {"train/loss", "train/mlm_loss", "train/nsp_loss", "train/perplexity", "train/mlm_accuracy", "train/nsp_accuracy",
            "optim/learning_rate", "optim/grad_norm"} <= logged[1].keys()
    assert [row["step"] for row in logged if "eval/perplexity" in row] == [0, 4, 8, 10]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["steps"] == 10
    assert summary["eval_perplexity"] == logged[-1]["eval/perplexity"]
    assert summary["tokens_per_second"] == pytest.approx(summary["real_tokens"] / summary["seconds"], rel=1e-2)
    # A step is 16 x 32 tokens; a micro-batch closes below its limit, and the last of an epoch is short.
    assert 0.7 * 10 * 16 * 32 < summary["real_tokens"] <= 10 * 16 * 32
    assert summary["best_perplexity"] == min(row["eval/perplexity"] for row in logged if "eval/perplexity" in row)


@pytest.mark.parametrize(("step", "more"), [(2, []), (6, ["--workers", "2"])])
def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, step, more, capsys):
    interrupted_copy(finished, tmp_path / "run", step)
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run"), *more])
    assert_same_run(finished, tmp_path / "run")
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert "is finished, at step 10" in capsys.readouterr().out


def test_workers_and_bf16_change_nothing_about_resuming(arguments, tmp_path):
    options = [*arguments, "--precision", "bf16", "--max-steps", "4"]
    PRETRAIN.main([*options, "--output", str(tmp_path / "whole")])
    PRETRAIN.main([*options, "--output", str(tmp_path / "parts"), "--workers", "1"])
    for folder in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "parts" / folder)
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "parts")])
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=4)


def test_sigkill_then_resume(finished, arguments, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *arguments, "--output", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run" / "checkpoint-2").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(finished, tmp_path / "run")


def test_max_minutes_stops_and_resumes(finished, arguments, tmp_path):
    PRETRAIN.main([*arguments, "--max-minutes", "1e-6", "--output", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] < 10 and "stopped" in summary["state"] and not (tmp_path / "run" / "final").exists()
    PRETRAIN.main(["--resume", "--max-minutes", "0", "--output", str(tmp_path / "run")])
    assert rows(finished) == rows(tmp_path / "run")


def test_damaged_checkpoint_is_passed_over(finished, tmp_path, capsys):
    interrupted_copy(finished, tmp_path / "run", 8)
    weights = tmp_path / "run" / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert f"passed over: {weights} has" in capsys.readouterr().out
    assert_same_run(finished, tmp_path / "run")


def test_a_damaged_checkpoint_never_outlives_good_ones(finished, tmp_path):
    interrupted_copy(finished, tmp_path / "run", 8)
    (tmp_path / "run" / "checkpoint-8" / "config.json").unlink()
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run"), "--keep", "1", "--save-every", "7"])
    assert [path.name for path in ckpt.checkpoints(tmp_path / "run")] == ["checkpoint-10"]
    assert ckpt.problem_of(tmp_path / "run" / "checkpoint-10") is None
    assert (tmp_path / "run" / ".checkpoint-8.damaged").is_dir()


def test_a_run_killed_before_final_is_written_gets_it(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "summary.json").unlink()
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "finished"


def test_totals_survive_resuming_between_logged_steps(finished, tmp_path):
    interrupted_copy(finished, tmp_path / "run", 4)  # numbers are logged at 3 and 6
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    whole, parts = (json.loads((folder / "summary.json").read_text()) for folder in (finished, tmp_path / "run"))
    assert whole["real_tokens"] == parts["real_tokens"] > 0


def test_a_config_file_never_names_the_run_to_replace(finished):
    assert not {"output", "resume", "overwrite"} & json.loads((finished / "config.json").read_text()).keys()


def test_overwrite_replaces_nothing_but_runs(arguments, tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"holds thesis.tex, which no run has written"):
        PRETRAIN.main([*arguments, "--output", str(tmp_path / "papers"), "--overwrite"])
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "years"


def test_few_documents_hold_out_their_tails(arguments, tmp_path, documents):
    """Two books: the last sentences of each are held out, and pairs still come from two documents."""
    books = [[sentence for document in documents[start::2] for sentence in document] for start in (0, 1)]
    (tmp_path / "books.txt").write_text("\n\n".join("\n".join(book) for book in books) + "\n\n\n", encoding="utf-8")
    PRETRAIN.main([*arguments, "--train", str(tmp_path / "books.txt"), "--max-steps", "2", "--output", str(tmp_path / "run")])
    assert "eval/perplexity" in rows(tmp_path / "run")[-1]


def test_another_vocabulary_than_the_models_is_refused(finished, arguments, tmp_path):
    entries = (finished / "final" / "tokenizer.json").read_text()
    vocabulary = json.loads(entries)["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    ordinary = [name for name in names if name.isalpha()]
    names[vocabulary[ordinary[0]]], names[vocabulary[ordinary[1]]] = ordinary[1], ordinary[0]
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    more = [part for part in arguments if part not in SIZES]
    with pytest.raises(UserError, match="its vocabulary differs from that of the model"):
        PRETRAIN.main([*more, "--model", str(finished / "final"), "--tokenizer", str(tmp_path / "vocab.txt"), "--output",
                       str(tmp_path / "run")])


def test_embedded_default(tmp_path, cache, capsys, monkeypatch):
    """Without arguments, a few steps: the text is there, precision and steps follow the machine, the masks are filled."""
    monkeypatch.setattr("pretrain.embedded.MIN_STEPS", 2)
    monkeypatch.setattr("pretrain.embedded.MAX_STEPS", 2)
    PRETRAIN.main(["--cache", str(cache), "--output", str(tmp_path / "run"), "--vocab-size", "500"])
    told = capsys.readouterr().out
    assert "a step takes" in told and "a few masks, filled by the model" in told and "[MASK]" in told
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_longer_run_is_told_and_a_changed_one_refused(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError) as refused:
        PRETRAIN.main(["--resume", "--output", str(tmp_path / "run"), "--seed", "1", "--batch-size", "32", "--objective", "mlm"])
    for option, new, old in (("seed", 1, 0), ("batch-size", 32, 16), ("objective", "mlm", "mlm+nsp")):
        assert f"--{option} {new}: the run was started with {old}" in str(refused.value)
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run"), "--max-steps", "12"])
    assert "now ends at step 12, not 10: the schedules of learning rate and masks change" in capsys.readouterr().out
    assert rows(tmp_path / "run")[-1]["step"] == 12


def test_resume_on_an_empty_folder_starts(arguments, tmp_path):
    PRETRAIN.main([*arguments, "--max-steps", "1", "--resume", "--output", str(tmp_path / "new")])
    assert (tmp_path / "new" / "final").is_dir()


def test_overwrite_keeps_the_old_run_until_the_new_one_has_a_checkpoint(finished, arguments, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match="is not empty"):
        PRETRAIN.main([*arguments, "--output", str(tmp_path / "run")])
    with pytest.raises(UserError, match="no such file"):
        PRETRAIN.main([*arguments, "--train", str(tmp_path / "absent"), "--output", str(tmp_path / "run"), "--overwrite"])
    assert_same_run(finished, tmp_path / "run")
    PRETRAIN.main([*arguments, "--max-steps", "2", "--output", str(tmp_path / "run"), "--overwrite"])
    assert [path.name for path in ckpt.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


def test_patience_stops_early_and_stays_stopped(arguments, tmp_path, capsys):
    # A rate at which nothing is learnt: the held-out perplexity stops falling at once.
    PRETRAIN.main([*arguments, "--learning-rate", "1e-30", "--eval-every", "1", "--patience", "2", "--output", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and (tmp_path / "run" / "final").is_dir()
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert "is finished, at step 2" in capsys.readouterr().out


def test_evaluate_gives_the_numbers_of_the_run(finished, text_file, workplace, capsys):
    EVALUATE.main(["--model", str(finished / "final"), "--input", str(text_file), "--valid-fraction", "0.05", "--precision", "fp32",
                   "--cache", str(workplace / "cache")])
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = rows(finished)[-1]
    assert numbers == {name: last[f"eval/{name}"] for name in numbers}


def test_prepared_corpus_trains_like_its_text(finished, arguments, text_file, tmp_path, workplace):
    PREPARE.main(["--input", str(text_file), "--vocab-size", "120", "--output", str(tmp_path / "corpus"), "--cache",
                  str(workplace / "cache")])
    position = arguments.index("--train")
    PRETRAIN.main(["--train", str(tmp_path / "corpus"), *arguments[position + 2:], "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")


def test_config_file_gives_defaults_that_flags_override(finished, arguments, tmp_path):
    PRETRAIN.main(["--config", str(finished / "config.json"), "--output", str(tmp_path / "run"), "--max-steps", "1"])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["max_steps"] == 1 and saved["masking"] == "word"


def test_further_pretraining_from_a_finished_run(finished, arguments, tmp_path):
    more = [part for part in arguments if part not in SIZES]
    PRETRAIN.main([*more, "--model", str(finished / "final"), "--max-steps", "2", "--objective", "mlm", "--output", str(tmp_path / "run")])
    first = rows(tmp_path / "run")[0]
    assert first["eval/perplexity"] == pytest.approx(rows(finished)[-1]["eval/perplexity"], rel=0.2)
    assert "were not trained" in (tmp_path / "run" / "final" / "README.md").read_text()


# Masks.

def ordinary_tokens(batch, vocabulary):
    """int: tokens of a batch that may be masked."""
    before, number = batch.input_ids.clone(), batch.counts["mlm"]  # what follows is filling
    before[batch.masked_positions[:number]] = batch.masked_lm_labels[:number]
    return int((~torch.from_numpy(vocabulary.is_special)[before]).sum())


def test_the_mask_rate_goes_from_the_first_value_to_the_second(arguments, tmp_path, steps_seen):
    more = [*arguments, "--masking", "token", "--mask-rate", "0.2", "0.6"]
    PRETRAIN.main([*more, "--output", str(tmp_path / "run")])
    vocabulary = describe(load(str(tmp_path / "run" / "final")))
    assert len(steps_seen) == 10
    for step, batches in enumerate(steps_seen):
        share = sum(batch.counts["mlm"] for batch in batches) / sum(ordinary_tokens(batch, vocabulary) for batch in batches)
        assert share == pytest.approx(0.2 + 0.4 * step / 9, abs=0.015), step
    assert len({batch.counts["mlm"] for batches in steps_seen for batch in batches}) > 10
    interrupted_copy(tmp_path / "run", tmp_path / "parts", 4)
    for workers in ("0", "2"):
        PRETRAIN.main(["--resume", "--output", str(tmp_path / "parts"), "--workers", workers])
        assert_same_run(tmp_path / "run", tmp_path / "parts")
        shutil.rmtree(tmp_path / "parts")
        interrupted_copy(tmp_path / "run", tmp_path / "parts", 6)
    down = [*arguments, "--masking", "word", "--mask-rate", "0.4", "0.1", "--max-steps", "2"]
    PRETRAIN.main([*down, "--output", str(tmp_path / "down")])
    (first, *_), (last, *_) = steps_seen[-2:]
    assert ordinary_tokens(first, vocabulary) * 0.35 < first.counts["mlm"] and last.counts["mlm"] < ordinary_tokens(last, vocabulary) * 0.15


TERMS = ["quickly banking", "river", "modelization tokens", "slow money"]


@pytest.fixture(scope="module")
def marked(workplace, documents):
    """Files that mark TERMS: JSONL with spans, a lexicon, a table of similar words; and how often a term stands in the text."""
    pattern = re.compile("|".join(rf"\b{term}\b" for term in TERMS))
    texts = ["\n".join(document) for document in documents]
    spans = [[[match.start(), match.end(), "TERM"] for match in pattern.finditer(text)] for text in texts]
    (workplace / "spans.jsonl").write_text("".join(json.dumps({"text": text, "entities": found}) + "\n"
                                                   for text, found in zip(texts, spans)), encoding="utf-8")
    (workplace / "terms.txt").write_text("\n".join(map(str.title, TERMS)) + "\n", encoding="utf-8")  # the tokenizer lower-cases
    (workplace / "similar.tsv").write_text("bank\tmoney\tmodel\nriver\tmoney\nmoney\triver\n", encoding="utf-8")
    return {"spans": str(workplace / "spans.jsonl"), "lexicon": str(workplace / "terms.txt"), "similar": str(workplace / "similar.tsv"),
            "number": sum(map(len, spans))}


MASKINGS = {
    "token": [], "word": [], "span": [], "entity by spans": ["--train", "{spans}"], "entity by a lexicon": ["--lexicon", "{lexicon}"],
    "entity then tokens": ["--lexicon", "{lexicon}", "--entity-fill", "token", "--entity-probability", "1", "--entity-budget", "0.3"],
    "word by similar": ["--replace", "similar", "--similar", "{similar}"],
    "span by similar": ["--replace", "similar", "--similar", "{similar}"],
    "entity by similar": ["--train", "{spans}", "--replace", "similar", "--similar", "{similar}"],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MASKINGS)
def test_every_masking_trains_with_every_objective(name, objective, arguments, marked, tmp_path, steps_seen, capsys):
    masking, more = name.split()[0], [part.format(**marked) for part in MASKINGS[name]]
    PRETRAIN.main([*arguments, "--masking", masking, "--objective", objective, *more, "--max-steps", "2", "--save-every", "2", "--output",
                   str(tmp_path / "run")])
    logged = rows(tmp_path / "run")
    assert logged[-1]["step"] == 2 and math.isfinite(logged[-1]["train/loss"]) and math.isfinite(logged[-1]["eval/perplexity"])
    assert ("train/nsp_loss" in logged[-1]) is (objective != "mlm")
    if masking == "entity":
        assert f", {marked['number']:,} entities (" in capsys.readouterr().out
    tokenizer = load(str(tmp_path / "run" / "final"))
    batches, whole, cut = [batch for batches in steps_seen for batch in batches], 0, 0
    shown = {number for batch in batches for number in batch.input_ids.tolist()}
    assert (tokenizer.mask_token_id in shown) is ("similar" not in name)
    for batch in batches:
        number = batch.counts["mlm"]
        assert number == (batch.masked_lm_labels != IGNORED).sum() > 0
        before, masked = batch.input_ids.clone(), set(batch.masked_positions[:number].tolist())
        before[batch.masked_positions[:number]] = batch.masked_lm_labels[:number]
        tokens = tokenizer.convert_ids_to_tokens(before.tolist())
        for place, token in enumerate(tokens):
            if token.startswith("##") and not tokens[place - 1].startswith("["):  # a window may begin within a word
                together = (place in masked) == (place - 1 in masked)
                whole, cut = whole + (together and place in masked), cut + (not together)
    assert whole > 0 and (cut > 0) is (name in ("token", "entity then tokens"))


def test_a_schedule_and_entities_beyond_the_rate_fit_filled_batches(arguments, marked, tmp_path, monkeypatch):
    """As on a GPU, where batches are filled: the fixed sizes hold at the higher rate and beyond the rate."""
    collators = []
    monkeypatch.setattr("pretrain.train.make_loader", lambda dataset, collator, *more, **options: make_loader(
        dataset, collators.append(replace(collator, fill=True)) or collators[-1], *more, **options))
    more = ["--masking", "entity", "--lexicon", marked["lexicon"], "--entity-probability", "1", "--entity-budget", "1", "--mask-rate",
            "0.05", "0.5", "--max-steps", "4", *SIZES, "hidden_dropout_prob=0"]
    PRETRAIN.main([*arguments, *more, "--output", str(tmp_path / "filled")])
    assert collators[0].fill
    monkeypatch.undo()
    PRETRAIN.main([*arguments, *more, "--output", str(tmp_path / "exact")])
    for exact, filled in zip(rows(tmp_path / "exact"), rows(tmp_path / "filled"), strict=True):
        assert filled == pytest.approx(exact, rel=1e-3)


def test_a_corpus_prepared_with_a_lexicon_trains_like_its_text(arguments, marked, text_file, tmp_path, workplace):
    PREPARE.main(["--input", str(text_file), "--vocab-size", "120", "--lexicon", marked["lexicon"], "--output", str(tmp_path / "corpus"),
                  "--cache", str(workplace / "cache")])
    assert json.loads((tmp_path / "corpus" / "corpus.json").read_text())["entities"] == marked["number"]
    more = [*arguments, "--masking", "entity", "--max-steps", "2"]
    PRETRAIN.main([*more, "--lexicon", marked["lexicon"], "--output", str(tmp_path / "text")])
    PRETRAIN.main([*more, "--train", str(tmp_path / "corpus"), "--output", str(tmp_path / "run")])
    assert_same_run(tmp_path / "text", tmp_path / "run", step=2)


def test_a_corpus_prepared_from_spans_trains_by_entities(arguments, marked, tmp_path, workplace):
    PREPARE.main(["--input", marked["spans"], "--vocab-size", "120", "--entity-field", "entities", "--output", str(tmp_path / "corpus"),
                  "--cache", str(workplace / "cache")])
    more = [*arguments, "--masking", "entity", "--max-steps", "2"]
    PRETRAIN.main([*more, "--train", marked["spans"], "--output", str(tmp_path / "text")])
    PRETRAIN.main([*more, "--train", str(tmp_path / "corpus"), "--output", str(tmp_path / "run")])
    assert_same_run(tmp_path / "text", tmp_path / "run", step=2)


def test_held_out_text_needs_no_entities(arguments, marked, text_file, tmp_path):
    (tmp_path / "valid.txt").write_text("teach .\nlearn slow .\n\n" * 20, encoding="utf-8")
    PRETRAIN.main([*arguments, "--masking", "entity", "--lexicon", marked["lexicon"], "--valid", str(tmp_path / "valid.txt"), "--max-steps",
                   "1", "--output", str(tmp_path / "run")])
    assert "eval/perplexity" in rows(tmp_path / "run")[-1]


def test_a_schedule_is_planned_for_its_highest_rate():
    assert [make_task(Config(mask_rate=rates)).mask_rate for rates in ([0.1, 0.4], [0.4, 0.1], [0.3])] == [0.4, 0.4, 0.3]


def test_text_without_entities_is_refused(arguments, marked, text_file, tmp_path, workplace, capsys):
    PREPARE.main(["--input", str(text_file), "--vocab-size", "120", "--output", str(tmp_path / "corpus"), "--cache",
                  str(workplace / "cache")])
    (tmp_path / "strange.txt").write_text("xylophone\n", encoding="utf-8")
    for more, told in (
            (["--train", tmp_path / "corpus"], f"--masking entity: --train {tmp_path / 'corpus'} brings no entities; needed is a"),
            ([], "--masking entity: --train brings no entities; needed is a --lexicon, JSONL with spans (--entity-field), tagged"),
            (["--lexicon", tmp_path / "strange.txt"], f"--lexicon: none of its terms occurs in --train {text_file}"),
            (["--train", marked["spans"], "--entity-field", "terms"], f"{marked['spans']}, line 1: has no column 'terms'")):
        message = refusal(PRETRAIN.main, [*arguments, "--masking", "entity", "--output", tmp_path / "run", *more], capsys)
        assert message.startswith(told) and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_options_of_text_are_refused_with_a_prepared_corpus(arguments, text_file, tmp_path, workplace, capsys):
    corpus = tmp_path / "corpus"
    PREPARE.main(["--input", str(text_file), "--vocab-size", "120", "--output", str(corpus), "--cache", str(workplace / "cache")])
    more = ["--train", corpus, "--max-documents", "3", "--split-sentences", "--output", tmp_path / "run"]
    told = refusal(PRETRAIN.main, [*arguments, *more], capsys)
    assert told.startswith("--split-sentences auto --max-documents 3: --train ") and "prepared already" in told


def test_a_run_is_started_again_from_another_directory(arguments, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    more = ["--train", text_file.name, "--max-steps", "2", "--output", str(tmp_path / "run")]
    PRETRAIN.main([*arguments, *more])
    for folder in ckpt.checkpoints(tmp_path / "run"):  # as if it had been killed before the first
        shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "run" / "final")
    expected = rows(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    PRETRAIN.main(["--resume", "--output", "run"])
    assert rows(tmp_path / "run") == expected


def test_the_folder_of_a_run_stands_for_its_model(finished, arguments, tmp_path):
    for name, model in (("run", finished), ("final", finished / "final")):
        PRETRAIN.main([*map(str, arguments), "--model", str(model), "--max-steps", "1", "--output", str(tmp_path / name)])
    assert rows(tmp_path / "run") == rows(tmp_path / "final")


@pytest.mark.parametrize("budget", ["0.05", "1"])
def test_entities_that_never_fit_are_told(budget, arguments, marked, tmp_path, capsys):
    more = ["--train", marked["spans"], "--masking", "entity", "--entity-budget", budget, "--max-length", "16", "--max-steps", "1"]
    PRETRAIN.main([*arguments, *more, "--output", str(tmp_path / "run")])
    assert ("entities fit into that share of their sequence" in capsys.readouterr().out) is (budget != "1")


def test_a_table_of_similar_words_that_has_changed_is_refused_on_resume(arguments, marked, tmp_path, capsys):
    (tmp_path / "similar.tsv").write_text(Path(marked["similar"]).read_text(), encoding="utf-8")
    more = ["--masking", "word", "--replace", "similar", "--similar", str(tmp_path / "similar.tsv"), "--output", str(tmp_path / "run")]
    PRETRAIN.main([*arguments, *more, "--max-steps", "2"])
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "training_state.json").read_text())
    assert state["similar_words"] == sha256_of(tmp_path / "similar.tsv")
    (tmp_path / "similar.tsv").write_text("bank\triver\n", encoding="utf-8")
    told = refusal(PRETRAIN.main, ["--resume", "--output", tmp_path / "run", "--max-steps", "3"], capsys)
    assert told == f"--similar {tmp_path / 'similar.tsv'}: has changed since the run was started; restore it, or start another run"


def test_held_out_records_need_no_entities(arguments, marked, tmp_path):
    (tmp_path / "valid.jsonl").write_text('{"text": "the bank ."}\n{"text": "the river ."}\n', encoding="utf-8")
    more = ["--train", marked["spans"], "--masking", "entity", "--entity-field", "entities", "--objective", "mlm"]
    PRETRAIN.main([*arguments, *more, "--valid", str(tmp_path / "valid.jsonl"), "--max-steps", "1", "--output", str(tmp_path / "run")])
    assert math.isfinite(rows(tmp_path / "run")[-1]["eval/perplexity"])


def test_a_table_without_a_similar_word_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "similar.tsv").write_text("bank\triver money\nmoney\tmoney\n", encoding="utf-8")
    more = ["--replace", "similar", "--similar", tmp_path / "similar.tsv", "--output", tmp_path / "run"]
    assert refusal(PRETRAIN.main, [*arguments, *more], capsys).startswith(
        f"--similar {tmp_path / 'similar.tsv'}: holds no word with a similar one of as many tokens")


def test_new_options_go_through_config_json(arguments, marked, tmp_path):
    """A run's config.json starts the same run; lists of one value and of two, words, tokens with brackets and equals signs."""
    (tmp_path / "words.txt").write_text("slow-2\n", encoding="utf-8")
    more = ["--train", marked["spans"], "--valid", marked["spans"], "--masking", "entity", "--mask-rate", "0.1", "0.3", "--lexicon",
            marked["lexicon"], "--entity-probability", "0.75", "--entity-budget", "0.3", "--entity-fill", "token", "--replace", "similar",
            "--similar", marked["similar"], "--words", "spaces", "--text-field", "text", "--entity-field", "entities",
            "--split-sentences", "en", "--max-documents", "40", "--add-tokens", str(tmp_path / "words.txt"), "--add-special-tokens",
            "[name]", "eos_token=[EOT]", "--new-vectors", "random", "--max-steps", "2"]
    PRETRAIN.main([*arguments, *more, "--output", str(tmp_path / "one")])
    saved = json.loads((tmp_path / "one" / "config.json").read_text())
    assert saved["mask_rate"] == [0.1, 0.3] and saved["add_special_tokens"] == ["[name]", "eos_token=[EOT]"]
    PRETRAIN.main(["--config", str(tmp_path / "one" / "config.json"), "--output", str(tmp_path / "two")])
    assert json.loads((tmp_path / "two" / "config.json").read_text()) == saved
    assert_same_run(tmp_path / "one", tmp_path / "two", step=2)
    assert parse(["--config", str(tmp_path / "one" / "config.json"), "--mask-rate", "0.2"], Config, "").mask_rate == [0.2]


BAD = [
    (["--mask-rate", "1.5", "--epochs", "-1", "--max-length", "2"], ["--mask-rate 1.5", "--epochs -1.0", "--max-length 2"]),
    (["--mask-split", ".5", ".1", ".1"], ["--mask-split 0.5 0.1 0.1: needed is three shares"]),
    (["--batch-size", "20"], ["--batch-size 20: is not a multiple of --micro-batch-size 8"]),
    (["--batch-size", "65536"], ["needed is at most --batch-size"]),
    (["--device", "tpu"], ["--device tpu: unknown"]),
    (["--device", "cuda"], ["--device cuda: this torch"]),
    (["--precision", "fp16"], ["--precision fp16: the CPU has no fp16 training"]),
    (["--model", "enormous"], ["--model enormous: is no size (tiny, mini", "offline, give a folder"]),
    (["--tokenizer", "absent"], ["--tokenizer absent: no such folder or vocab.txt"]),
    (["--valid", "absent.txt"], ["--valid absent.txt: no such file"]),
    (["--config-override", "width=3"], ["--config-override width=3: unknown field; known are"]),
    (["--eval-every", "often"], ["--eval-every often: needed is a number of steps above 0, epoch or auto"]),
    (["--resume", "--overwrite"], ["--resume --overwrite: exclude each other"]),
    (["--format", "text"], ["1 document"]),
    (["--batch-size", "1000000007"], ["--batch-size 1000000007: is not a multiple of --micro-batch-size 8"]),
    (["--vocab-size", "1000000000000"], ["--vocab-size 1000000000000: needed is 100 to 1048576 entries"]),
    (["--config-override", "type_vocab_size=1"], ["the model has 1 token types"]),
    (["--config-override", "num_hidden_layers=-1"], ["num_hidden_layers is -1, needed is a whole number within 1..1024"]),
    (["--learning-rate", "nan"], ["--learning-rate nan: needed is a number above 0"]),
    (["--learning-rate", "fast"], ["--learning-rate: invalid float value: 'fast'"]),
    (["--patience", "2", "--valid-fraction", "0"], ["--patience: needed is held-out text"]),
    (["--mask-rate", "0.1", "0.2", "0.3"], ["--mask-rate 0.1 0.2 0.3: needed is one or two shares above 0 and at most 0.8"]),
    (["--mask-rate", "0.1", "0"], ["--mask-rate 0.1 0.0: needed is one or two shares above 0 and at most 0.8"]),
    (["--mask-rate", "0.1", "nan"], ["--mask-rate 0.1 nan: needed is one or two shares"]),
    (["--mask-rate"], ["--mask-rate: expected at least one argument"]),
    (["--masking", "phrase"], ["--masking: invalid choice: 'phrase'"]),
    (["--replace", "similar"], ["--replace similar: needed is a table, --similar FILE, and --masking word, span or entity, not word"]),
    (["--replace", "similar", "--similar", "x", "--masking", "token"], ["--replace similar: needed is a table", "entity, not token"]),
    (["--similar", "x"], ["--similar x: is used with --replace similar only; needed is both or neither"]),
    (["--replace", "similar", "--similar", "absent"], ["--similar absent: cannot be read as UTF-8 text (No such file or directory)"]),
    (["--lexicon", "x", "--masking", "token"], ["--lexicon x: marks entities, needed is --masking entity with it, not token"]),
    (["--entity-field", "x"], ["--entity-field x: marks entities, needed is --masking entity with it, not word"]),
    (["--masking", "entity", "--lexicon", "absent"], ["--lexicon absent: cannot be read as UTF-8 text (No such file or directory)"]),
    (["--entity-probability", "0"], ["--entity-probability 0.0: needed is a share above 0 and at most 1"]),
    (["--entity-probability", "1.5", "--entity-budget", "-1"], ["--entity-probability 1.5: needed", "--entity-budget -1.0: needed"]),
    (["--entity-fill", "span"], ["--entity-fill: invalid choice: 'span'"]),
    (["--max-documents", "-1"], ["--max-documents -1: needed is a whole number of at least 0"]),
    (["--words", "stanford"], ["--words: invalid choice: 'stanford'"]),
    *(([f"--{name}", " "], [f"--{name}  : needed is a name, or the option left away"])
      for name in ("text-field", "entity-field", "add-tokens", "lexicon", "similar")),
    (["--split-sentences", "klingon"], ["--split-sentences klingon: needed is a language code such as en, or auto"]),
]


@pytest.mark.parametrize(("more", "messages"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_options_are_told_before_work_starts(arguments, tmp_path, more, messages):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError) as refused:
        PRETRAIN.main([*arguments, "--output", str(tmp_path / "run"), *more])
    for message in messages:
        assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_positions_of_the_model_bound_the_length(finished, arguments, tmp_path):
    more = [part for part in arguments if part not in SIZES]
    with pytest.raises(UserError, match="--max-length 1024: the model has 512 positions"):
        PRETRAIN.main([*more, "--model", str(finished / "final"), "--max-length", "1024", "--output", str(tmp_path / "run")])


def test_documents_of_one_sentence_are_refused_under_nsp(arguments, tmp_path, text_file):
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(line for line in text_file.read_text().splitlines() if line), encoding="utf-8")
    options = [*arguments, "--train", str(lines), "--max-length", "128", "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"0.0% of the planned pairs would be true next ones.*--objective mlm"):
        PRETRAIN.main(options)
    PRETRAIN.main([*options, "--objective", "mlm", "--max-steps", "1"])


def test_text_of_nothing_but_special_tokens_is_refused(arguments, tmp_path):
    (tmp_path / "special.txt").write_text("[MASK] [SEP]\n[CLS] [MASK]\n\n" * 60, encoding="utf-8")
    with pytest.raises(UserError, match="--valid .*special.txt: holds only special and unknown tokens"):
        PRETRAIN.main([*arguments, "--valid", str(tmp_path / "special.txt"), "--output", str(tmp_path / "run")])


def test_a_wrong_config_file_is_named(tmp_path):
    for content, message in (("learning_rate: fast", "--learning-rate: invalid float value"), ("width: 3", "unknown option width"),
                             ("- 1", "holds list"), ("a: [", "is not valid YAML")):
        (tmp_path / "options.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=f"--config .*options.yaml: .*{message}"):
            PRETRAIN.main(["--config", str(tmp_path / "options.yaml")])


def test_a_garbled_log_does_not_stop_resuming(finished, tmp_path):
    interrupted_copy(finished, tmp_path / "run", 8)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(b"\xff\xfe{\n" + log.read_bytes() + b'[1]\n{"step": "a"}\n{"step": 9')
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")


def test_exit_code_and_message_without_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "pretrain.py"), "--train", "absent.txt", "--mask-rate", "2"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "error: --mask-rate 2.0" in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_at_a_save_leaves_earlier_checkpoints(finished, tmp_path, monkeypatch):
    interrupted_copy(finished, tmp_path / "run", 4)
    original = torch.save

    def full(content, path, *more, **options):
        original(content, path, *more, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint-6: cannot be written \(No space left on device\)"):
        PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    monkeypatch.undo()
    assert [path.name for path in ckpt.checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-2"]
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")


def test_commands_of_the_readme_are_commands():
    """Each pretrain.py line of the README parses, and its options fit each other."""
    lines = [line.split("#")[0] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python scripts/pretrain.py")]
    assert len(lines) >= 2
    for line in lines:
        assert validate(parse(shlex.split(line)[2:], Config, "")) == []


# Defaults.

@pytest.mark.parametrize("device, batch_size, lengths, processes, expected", [
    ("cpu", 256, {}, 1, 32), ("cpu", 8, {}, 1, 8), ("cpu", 24, {}, 1, 24), ("cpu", 100, {}, 1, 25),
    ("cpu", 256, {"max_length": 512}, 4, 32), ("cpu", 256, {"phases": ["8:0.5", "512:0.5"]}, 1, 64), ("cuda", 256, {}, 1, 256),
    ("cuda", 256, {"max_length": 512}, 1, 64), ("cuda", 256, {}, 8, 32), ("cuda", 2048, {}, 4, 256),
    ("cuda", 4, {"max_length": 1 << 16}, 1, 1)])
def test_the_default_micro_batch_divides_the_step_and_keeps_the_device_busy(device, batch_size, lengths, processes, expected):
    config = Config(batch_size=batch_size, **lengths)
    assert default_micro_batch_size(config, torch.device(device), World(0, processes)) == expected


def test_a_batch_that_no_good_micro_batch_divides_is_told(capsys):
    assert default_micro_batch_size(Config(batch_size=37), torch.device("cpu"), World()) == 1
    assert capsys.readouterr().out.startswith("--batch-size 37: only micro-batches of 1 divide it, which is slow; a multiple of 32")
    default_micro_batch_size(Config(batch_size=36), torch.device("cpu"), World())
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="^--batch-size 7: 4 processes cannot share it evenly; needed is a multiple of 4$"):
        default_micro_batch_size(Config(batch_size=7), torch.device("cpu"), World(0, 4))


def test_a_small_batch_needs_no_second_option(arguments, tmp_path):
    place, more = arguments.index("--batch-size"), ["--batch-size", "6", "--output", str(tmp_path / "run")]
    assert arguments[place + 2] == "--micro-batch-size"
    given = arguments[:place] + arguments[place + 4:]
    PRETRAIN.main([*given, *more, "--max-steps", "1"])
    assert ckpt.read_values(tmp_path / "run" / "checkpoint-1")["options"]["micro_batch_size"] == 6
    PRETRAIN.main([*given, *more, "--max-steps", "2", "--resume"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
