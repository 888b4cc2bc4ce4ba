"""A run of each family goes from text to a model that fills masks, and on to a classifier."""

import csv
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_same_run, interrupted_copy, refusal, rows, script
from packed_reference import small_stock, stock_class
from test_fill_mask import assert_stock_scores
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

PRETRAIN, EVALUATE, FINETUNE = script("pretrain"), script("evaluate"), script("finetune")
OPTIONS = (
    "--objective mlm --masking word --max-length 64 --batch-size 16 --micro-batch-size 8 "
    "--max-steps 6 --save-every 2 --eval-every 3 --keep 9 --eval-tokens 600 "
    "--learning-rate 1e-3 --precision fp32"
)
WORD_STARTS = ("\u0120", "\u2581")  # of byte-level BPE and of SentencePiece


TOKENIZERS = {  # family -> fixture
    "roberta": "roberta_tokenizer",
    "xlm-roberta": "xlm_roberta_tokenizer",
    "distilbert": "tiny_tokenizer",
    "modernbert": "modernbert_tokenizer",
}
NEW = pytest.mark.parametrize("base", ["distilbert", "modernbert"], indirect=True)


@pytest.fixture(scope="module", params=TOKENIZERS)
def base(request, tmp_path_factory):
    """(family, a checkpoint with its tokenizer); dropout is on."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = request.getfixturevalue(TOKENIZERS[request.param])
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    dropout = {"hidden_dropout_prob": 0.1}
    model = small_stock(request.param, "ForMaskedLM", len(tokenizer), **dropout, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, folder


@pytest.fixture(scope="module")
def arguments(base, text_file, cache):
    paths = ["--train", str(text_file), "--model", str(base[1]), "--cache", str(cache)]
    return [*paths, *OPTIONS.split()]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "finished"
    PRETRAIN.main([*arguments, "--output", str(output)])
    return output


def test_a_run_trains_and_its_model_opens_with_transformers(base, finished):
    logged = rows(finished)
    assert logged[-1]["step"] == 6
    assert all(math.isfinite(row.get("train/loss", 0.0)) for row in logged)
    assert logged[-1]["eval/perplexity"] < 0.9 * logged[0]["eval/perplexity"]
    folder = finished / "final"
    opened, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert type(opened) is stock_class(base[0], "ForMaskedLM")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours, theirs = map(AutoTokenizer.from_pretrained, (folder, base[1]))
    text = "banking rivers teach quickly ."
    assert ours(text).input_ids == theirs(text).input_ids


def test_whole_words_are_masked(base, arguments, tmp_path, steps_seen):
    PRETRAIN.main([*arguments, "--max-steps", "2", "--output", str(tmp_path / "run")])
    tokenizer, pieces = AutoTokenizer.from_pretrained(base[1]), 0
    is_wordpiece = base[0] == "distilbert"
    for batch in (batch for batches in steps_seen for batch in batches):
        number = int(batch.counts["mlm"])  # what follows is filling
        positions, ids = batch.masked_positions[:number], batch.input_ids.clone()
        ids[positions] = batch.labels["mlm"][:number]
        masked = set(positions.tolist())
        tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
        for place, token in enumerate(tokens):
            before = tokens[place - 1].lstrip("".join(WORD_STARTS))
            if token.startswith("##") or (
                not is_wordpiece
                and not token.startswith(WORD_STARTS)
                and token.isalpha()
                and before.isalpha()
            ):
                assert (place in masked) == (place - 1 in masked), tokens[place - 1 : place + 1]
                pieces += place in masked
    assert pieces > 20


def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path):
    interrupted_copy(finished, tmp_path / "run", 2)
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run", step=6)


def test_evaluate_gives_the_numbers_of_the_run(finished, text_file, cache, capsys):
    paths = ["--model", finished / "final", "--input", text_file, "--cache", cache]
    options = [*paths, "--valid-fraction", "0.05", "--precision", "fp32"]
    EVALUATE.main([str(option) for option in options])
    numbers, last = json.loads(capsys.readouterr().out.splitlines()[-1]), rows(finished)[-1]
    assert numbers == {name: last[f"eval/{name}"] for name in numbers} and "mlm_loss" in numbers


def test_masks_are_filled_where_the_text_says_MASK(finished, capsys):
    assert_stock_scores(finished / "final", ["quick [MASK] learn ."], capsys)


@pytest.mark.parametrize(
    "option, value", [("--objective", "mlm+nsp"), ("--objective", "mlm+sop"), ("--max-length", 65)]
)
def test_what_the_model_cannot_do_is_refused_by_option_and_value(
    base, arguments, option, value, text_file, cache, tmp_path, capsys
):
    run = [*arguments, option, value, "--output", tmp_path / "run"]
    evaluation = ["--model", base[1], "--input", text_file, "--cache", cache]
    evaluation += ["--objective", "mlm", "--max-length", 64, option, value]
    of_model = f"--model {base[1]} "  # one of two that are compared, perhaps
    for main, options, named in ((PRETRAIN.main, run, ""), (EVALUATE.main, evaluation, of_model)):
        message = refusal(main, options, capsys)
        assert message.startswith(f"{named}{option} {value}: ") and "\n" not in message
    assert not (tmp_path / "run").exists()


@NEW
def test_entities_are_masked_whole_and_alone(base, arguments, documents, tmp_path, steps_seen):
    """All of their tokens and no others."""
    text = tmp_path / "text.jsonl"
    with text.open("w") as out:
        for sentence in itertools.chain(*documents):
            spans = [match.span() for match in re.finditer(r"\b(bank|river)\b", sentence)]
            out.write(json.dumps({"text": sentence, "entities": spans}) + "\n")
    more = ["--train", text, "--masking", "entity", "--entity-fill", "none"]
    more += ["--entity-budget", 0.5, "--max-steps", 2, "--output", tmp_path / "run"]
    PRETRAIN.main([*arguments, *map(str, more)])
    tokenizer, found = AutoTokenizer.from_pretrained(base[1]), set()
    for batch in (batch for batches in steps_seen for batch in batches):
        number = int(batch.counts["mlm"])  # what follows is filling
        positions, labels = batch.masked_positions[:number], batch.labels["mlm"][:number]
        run = torch.cat([torch.zeros(1), (positions.diff() != 1).cumsum(0)])[:number]
        for which in run.unique():
            found |= set(tokenizer.decode(labels[run == which]).split())
    assert found == {"bank", "river"}


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Files of rows with two classes, which a word tells apart."""
    folder, files = tmp_path_factory.mktemp("rows"), {}
    for name, start in (("train", 0), ("valid", 40), ("test", 60)):
        kinds = ("river water {} teach,water", "bank train {} model,money")
        lines = [kinds[number % 2].format("slow " * (number % 7)) for number in range(start, 80)]
        files[name] = folder / f"{name}.csv"
        files[name].write_text("\n".join(["text,label", *lines]) + "\n")
    return [str(word) for name, path in files.items() for word in (f"--{name}", path)]


@NEW
def test_fine_tuning_gives_a_stock_classifier(base, finished, labeled, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "classifier"
    options = ["--model", finished / "final", "--epochs", 4, "--learning-rate", "3e-3"]
    options += ["--precision", "fp32", "--output", output]
    FINETUNE.main([*labeled, *map(str, options)])
    summary = json.loads((output / "summary.json").read_text())
    assert summary["test"]["macro_f1"] > 0.9
    stock = AutoModelForSequenceClassification.from_pretrained(output / "final").eval()
    assert type(stock) is stock_class(base[0], "ForSequenceClassification")
    tokenizer = AutoTokenizer.from_pretrained(output / "final")
    lines = Path(labeled[-1]).read_text().splitlines()
    texts = [row["text"] for row in csv.DictReader(lines)]
    with torch.no_grad():
        logits = [stock(**tokenizer(text, return_tensors="pt")).logits for text in texts]
    predicted = csv.DictReader((output / "test_predictions.csv").read_text().splitlines())
    for row, expected in zip(predicted, torch.cat(logits).softmax(-1).tolist(), strict=True):
        names = [f"probability_{label}" for label in ("money", "water")]
        assert [float(row[name]) for name in names] == pytest.approx(expected, abs=1e-4)
