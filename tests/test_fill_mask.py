"""fill_mask.py shows the predictions of the stock model."""

import shutil

import pytest
import torch
from conftest import change_weights, overflowing, refusal, script
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from pretrain.model.bert import BertForPreTraining
from pretrain.model.loading import FAMILIES
from pretrain.runtime.checkpoint import write_model

FILL_MASK = script("fill_mask")


def tables(printed):
    """[[(token, score, sentence)]] as printed."""
    found = []
    for block in printed.strip().split("\n\n"):
        head, *lines = block.split("\n")
        assert head.split() == ["token", "score", "sentence"]
        found.append([(line[:16].strip(), float(line[16:24]), line[26:]) for line in lines])
    return found


def stock_tables(folder, texts, top):
    """The slow form: the stock model's softmax at each mask, one text after another."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForMaskedLM.from_pretrained(folder).eval()
    found = []
    for text in texts:
        inputs = tokenizer(text.replace("[MASK]", tokenizer.mask_token), return_tensors="pt")
        with torch.no_grad():
            logits = stock(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id]
        parts = text.split("[MASK]")
        for place, (scores, ids) in enumerate(zip(*logits.softmax(-1).topk(top)), start=1):
            before, after = "[MASK]".join(parts[:place]), "[MASK]".join(parts[place:])
            rows = zip(map(tokenizer.decode, ids[:, None]), scores.tolist())
            filled = [(token, score, (before + token + after).lstrip()) for token, score in rows]
            found.append([(token.strip(), p, s.replace("  ", " ")) for token, p, s in filled])
    return found


def assert_stock_scores(model, texts, capsys):
    FILL_MASK.main(["--model", str(model), "--top", "4", *texts])
    found, expected = tables(capsys.readouterr().out), stock_tables(model, texts, 4)
    assert len(found) == len(expected) == sum(text.count("[MASK]") for text in texts)
    for row, expected_row in zip(sum(found, []), sum(expected, [])):
        assert row == (expected_row[0], pytest.approx(expected_row[1], abs=1e-4), expected_row[2])


def test_scores_equal_the_stock_models_softmax(pretrained, capsys):
    texts = ["[MASK] bank [MASK] river [MASK] .", "money [MASK]"]
    assert_stock_scores(pretrained, texts, capsys)


def test_bad_input_is_refused_in_one_message(encoder, pretrained, tmp_path, capsys):
    model, bare = pretrained, tmp_path / "bare"
    big = overflowing(model, tmp_path / "big")
    change_weights(big, lambda weights: weights["cls.predictions.bias"][0].fill_(3e38))
    spoiled = shutil.copytree(model, tmp_path / "spoiled")
    change_weights(spoiled, lambda weights: weights["cls.predictions.bias"][0].fill_(torch.nan))
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    for argv, said in (
        (["--model", model, "bank river ."], "'bank river .'"),
        (["--model", model, "[MASK] " + "bank " * 600], "'[MASK] bank bank"),
        (["--model", encoder, "[MASK]"], f"--model {encoder}: "),  # without a head
        (["--model", bare, "[MASK]"], f"--model {bare}: "),
        (["--model", big, "bank [MASK]"], f"--model {big}: "),
        (["--model", spoiled, "bank [MASK]"], f"--model {spoiled}: "),
        (["--model", model, "--top", "0", "[MASK]"], "--top 0: "),
    ):
        message = refusal(FILL_MASK.main, argv, capsys)
        assert said in message and "\n" not in message


def test_words_that_the_tokenizer_does_not_know_are_shown(pretrained, capsys):
    FILL_MASK.main(["--model", str(pretrained), "bank [MASK] река", "bank [MASK] river ."])
    first, *rest = capsys.readouterr().out.splitlines()
    assert "река" in first and "bank" in first
    assert not [line for line in rest if "unknown" in line]


class OwnEncoder(BertForPreTraining):
    def __init__(self, config):
        super().__init__(config)
        self.bert.encoder.layer = nn.ModuleList([nn.Linear(config.hidden_size, config.hidden_size)])


def test_layers_that_transformers_does_not_have_are_not_filled_with_random_numbers(
    pretrained, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(FAMILIES, "bert", OwnEncoder)
    facts = {"objective": "mlm", "started_from": "tiny", "held_out": {}}
    model = OwnEncoder(AutoConfig.from_pretrained(pretrained))
    write_model(tmp_path / "own", model, tiny_tokenizer, facts, model.state_dict())
    assert "AutoModel" not in (tmp_path / "own" / "README.md").read_text("utf-8")
    message = refusal(FILL_MASK.main, ["--model", tmp_path / "own", "bank [MASK]"], capsys)
    assert f"--model {tmp_path / 'own'}: " in message
