"""ModernBERT: the rotations, windows and biases of any config equal the stock class; sizes from
scratch; configs that make no model; a run from scratch that resumes bit for bit."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    assert_same_run,
    change_json,
    interrupted_copy,
    pretrain_into,
    refused,
    resume,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import (
    WINDOW,
    assert_close,
    assert_same_training,
    pad,
    roughen,
    small_config_of,
    small_packed,
    small_stock,
    stock_class,
)

from pretrain.batch import IGNORED
from pretrain.config import Config
from pretrain.finetune.dataset import pack
from pretrain.finetune.heads import load_classifier
from pretrain.model.loading import from_checkpoint, from_size, load_config, override
from pretrain.model.packed import count_flops
from pretrain.model_setup import set_up_model

VOCAB = 90


def make_batch(lengths):
    """Random tokens; every fifth one is masked."""
    source = np.random.default_rng(4)
    texts = [source.integers(5, VOCAB, length) for length in lengths]
    batch = pack([(text, 0 * text, 0) for text in texts], max(lengths))
    masked = torch.arange(1, batch.num_tokens, 5)
    labels = {"mlm": torch.from_numpy(source.integers(5, VOCAB, len(masked)))}
    return replace(batch, masked_positions=masked, labels=labels, counts={"mlm": len(masked)})


# The same numbers as the stock class.

THETAS = {"full_attention": 500.0, "sliding_attention": 90.0}
OTHER = {
    "default": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {
        **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True),
        "decoder_bias": False,
    },
    "positions": {
        "rope_parameters": {
            kind: {"rope_type": "linear", "factor": 2.0, "rope_theta": theta}
            for kind, theta in THETAS.items()
        },
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}


@pytest.mark.parametrize(
    "lengths, name",
    [*product([(200, 64)], OTHER), ((WINDOW + 1, 32, 1, 9), "default"), ((1024, 130), "default")],
    ids=str,
)
def test_logits_loss_and_gradients_equal_the_stock_model_padded(lengths, name, tmp_path):
    """In windows and beyond; weights go both ways."""
    more = {"max_position_embeddings": 1024, "num_hidden_layers": 3, **OTHER[name]}
    small_stock("modernbert", "ForMaskedLM", VOCAB, **more).save_pretrained(tmp_path / "stock")
    model, fresh = from_checkpoint(str(tmp_path / "stock"))
    assert fresh == []
    model.train().save_pretrained(tmp_path / "ours")
    stock = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path / "ours").train()
    decoder, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert (decoder.weight is table.weight) == (name != "untied")
    batch = make_batch(lengths)
    inputs = pad(batch)
    theirs = stock(**inputs)
    hidden = model.encode(batch)
    expected = theirs.logits[inputs["labels"] != IGNORED]
    ours = model.masked_lm_logits(hidden, batch)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert_same_training(model, batch, stock, theirs)


def test_a_fresh_head_has_the_deviation_of_the_stock_one(tmp_path):
    """1 / sqrt(width), where other families have `initializer_range`."""
    small_stock("modernbert", "ForMaskedLM", VOCAB).save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), [str(number) for number in range(40)])
    stock = stock_class("modernbert", "ForSequenceClassification")(model.config)
    deviations = [of.classifier.weight.std().item() for of in (model, stock)]
    assert deviations[0] == pytest.approx(deviations[1], rel=0.1)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 20))
def test_counted_pairs_are_those_within_windows(lengths, window):
    kinds = {"layer_types": ["sliding_attention"] * 2, "local_attention": 2 * window}
    model, batch = small_packed("modernbert", VOCAB, **kinds), make_batch(lengths)
    pairs = sum(
        abs(query - key) <= window
        for length in lengths
        for query in range(length)
        for key in range(length)
    )
    encoder = sum(weight.numel() for weight in model.layers.parameters() if weight.ndim == 2)
    head = 32 * (32 + VOCAB) * batch.counts["mlm"]
    assert count_flops(model, batch) == 6 * encoder * sum(lengths) + 12 * 2 * 32 * pairs + 6 * head


# From scratch.


def test_fresh_weights_are_those_of_the_stock_class():
    torch.manual_seed(8)
    model = from_size("tiny", 120, 64, 0, ["num_hidden_layers=3"], "modernbert")
    torch.manual_seed(8)
    stock = transformers.ModernBertForMaskedLM(model.config)
    assert_close(model.state_dict(), stock.state_dict(), atol=0.0, rtol=0.0)
    assert model.max_length == 8192 and model.windows == [None, 64, 64]


@pytest.mark.parametrize("count", [1, 5])
def test_the_types_of_layers_follow_their_number(count):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = small_config_of("modernbert", VOCAB, num_hidden_layers=3, layer_types=kinds)
    override(config, [f"num_hidden_layers={count}", "mlp_dropout=0.2", "local_attention=6"])
    usual = ["full_attention", "sliding_attention"]  # of the layers 3 and 4
    assert config.layer_types == [*kinds, *usual][:count]
    assert (config.mlp_dropout, config.local_attention) == (0.2, 6)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
WRONG = [
    {"layer_types": ["full_attention"]},
    {"layer_types": ["full_attention", "chunked_attention"]},
    {"layer_types": None, "global_attn_every_n_layers": 0},
    {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": -1.0}}},
    {"norm_eps": float("nan")},
]


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_a_config_that_makes_no_model_is_refused(fields, tmp_path):
    small_stock("modernbert", "ForMaskedLM", VOCAB).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", lambda config: config | fields)
    refused(from_checkpoint, str(tmp_path), begins=f"{tmp_path}: ")


def test_the_form_takes_the_configs_of_published_checkpoints(tmp_path):
    """Those of 2024 say how often a layer is full, and have two fields for the rotations."""
    config = small_config_of("modernbert", VOCAB).to_dict()
    for name in ("layer_types", "rope_parameters"):
        del config[name]
    older = {"global_attn_every_n_layers": 2, "global_rope_theta": 16e4, "local_rope_theta": 1e4}
    older |= {"position_embedding_type": "absolute", "reference_compile": None}
    (tmp_path / "config.json").write_text(json.dumps(config | older))
    loaded = load_config(str(tmp_path))
    assert loaded.layer_types == ["full_attention", "sliding_attention"]
    thetas = {kind: of["rope_theta"] for kind, of in loaded.rope_parameters.items()}
    assert thetas == {"full_attention": 16e4, "sliding_attention": 1e4}


@pytest.mark.parametrize(
    ("given", "chosen", "expected"),
    [("auto", 0.2, [0.1, 0.2, 0.0]), ("auto", 0.0, [0.0] * 3), (0.2, 0.2, [0.2] * 3)],
)
def test_dropout_is_that_of_each_module_or_one_for_all(given, chosen, expected):
    """Each module keeps its own if the recipe chose that of the model's config."""
    rates = {"mlp_dropout": 0.2, "embedding_dropout": 0.1}
    model = roughen(from_size("tiny", VOCAB, 64, 0, [], "modernbert"))
    for name, rate in rates.items():
        setattr(model.config, name, rate)
    model.base_model.embeddings.drop.p = 0.1
    for layer in model.layers:
        layer.mlp.drop.p = 0.2
    asked = Config(objective="mlm", dropout=given)
    set_up_model(model, asked, replace(asked, dropout=chosen), torch.device("cpu"), "fp32")
    layer = model.layers[1]
    found = [of.p for of in (model.base_model.embeddings.drop, layer.mlp.drop, layer.attn.out_drop)]
    assert found == expected


# A run.


def test_a_run_from_scratch_resumes_bit_for_bit(text_file, cache, tmp_path):
    """Steps with short and long sequences, Muon and dropout."""
    options = (
        "--architecture modernbert --model tiny --objective mlm --masking word --vocab-size 120",
        "--phases 32:0.5 96:0.5 --batch-size 16 --micro-batch-size 8 --max-steps 6 --dropout 0.1",
        "--learning-rate 5e-3 --save-every 2 --eval-every 3 --keep 9 --eval-tokens 600",
        "--precision fp32 --config-override hidden_size=32 intermediate_size=64",
        f"num_attention_heads=2 num_hidden_layers=3 local_attention={2 * WINDOW}",
    )
    files = ["--train", text_file, "--cache", cache]
    finished = pretrain_into(tmp_path / "finished", *options, files)
    interrupted_copy(finished, tmp_path / "run", 2)
    assert_same_run(finished, resume(tmp_path / "run"), step=6)
