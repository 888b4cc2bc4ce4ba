"""A run of each family goes from text to a model that fills masks."""

import itertools
import json
import math
import re

import pytest
import torch
from conftest import (
    assert_same_run,
    interrupted_copy,
    refusal,
    resume,
    rows,
    save,
    script,
)
from packed_reference import small_stock, stock_class
from test_fill_mask import assert_stock_scores
from transformers import AutoModelForMaskedLM, AutoTokenizer

PRETRAIN, EVALUATE, FINETUNE = script("pretrain"), script("evaluate"), script("finetune")
OPTIONS = (
    "--objective mlm --masking word --max-length 64 --batch-size 16 --micro-batch-size 8 "
    "--max-steps 6 --save-every 2 --eval-every 3 --keep 9 --eval-tokens 600 "
    "--learning-rate 1e-3 --precision fp32"
)
TOKENIZERS = {  # family -> fixture
    "roberta": "roberta_tokenizer",
    "xlm-roberta": "xlm_roberta_tokenizer",
    "distilbert": "tiny_tokenizer",
    "modernbert": "modernbert_tokenizer",
}
ONE = pytest.mark.parametrize("base", ["modernbert"], indirect=True)


@pytest.fixture(scope="module", params=TOKENIZERS)
def base(request, tmp_path_factory):
    """(family, a checkpoint with its tokenizer); dropout is on."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = request.getfixturevalue(TOKENIZERS[request.param])
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    dropout = {"hidden_dropout_prob": 0.1}
    model = small_stock(request.param, "ForMaskedLM", len(tokenizer), **dropout, **ids)
    return request.param, save(folder, model, tokenizer)


@pytest.fixture(scope="module")
def arguments(base, text_file, cache):
    paths = ["--train", str(text_file), "--model", str(base[1]), "--cache", str(cache)]
    return [*paths, *OPTIONS.split()]


def test_a_run_trains_and_its_model_opens_with_transformers(base, finished):
    logged = rows(finished)
    assert logged[-1]["step"] == 6
    assert all(math.isfinite(row.get("train/loss", 0.0)) for row in logged)
    assert logged[-1]["eval/perplexity"] < 0.9 * logged[0]["eval/perplexity"]
    folder = finished / "final"
    opened, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert type(opened) is stock_class(base[0], "ForMaskedLM")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    card = (folder / "README.md").read_text()
    assert ("AutoModelForPreTraining" in card) == (base[0] != "modernbert")
    ours, theirs = map(AutoTokenizer.from_pretrained, (folder, base[1]))
    text = "banking rivers teach quickly ."
    assert ours(text).input_ids == theirs(text).input_ids


def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path):
    assert_same_run(finished, resume(interrupted_copy(finished, tmp_path / "run", 4)), step=6)


def test_masks_are_filled_where_the_text_says_MASK(finished, capsys):
    assert_stock_scores(finished / "final", ["quick [MASK] learn ."], capsys)


@ONE
@pytest.mark.parametrize("option, value", [("--objective", "mlm+nsp"), ("--max-length", 65)])
def test_what_the_model_cannot_do_is_refused_by_option_and_value(
    base, arguments, option, value, text_file, cache, tmp_path, capsys
):
    run = [*arguments, option, value, "--output", tmp_path / "run"]
    evaluation = ["--model", base[1], "--input", text_file, "--cache", cache]
    evaluation += ["--objective", "mlm", "--max-length", 64, option, value]
    of_model = f"--model {base[1]} "  # one of two that are compared, perhaps
    for main, options, named in ((PRETRAIN.main, run, ""), (EVALUATE.main, evaluation, of_model)):
        refusal(main, options, capsys, f"{named}{option} {value}: ", tmp_path / "run")


@ONE
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
    for batch in itertools.chain(*steps_seen):
        number = int(batch.counts["mlm"])  # what follows is filling
        positions, labels = batch.masked_positions[:number], batch.labels["mlm"][:number]
        run = torch.cat([torch.zeros(1), (positions.diff() != 1).cumsum(0)])[:number]
        for which in run.unique():
            found |= set(tokenizer.decode(labels[run == which]).split())
    assert found == {"bank", "river"}
