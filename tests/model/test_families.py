"""Every family: packed losses, logits and gradients equal the stock classes of transformers on
the same examples, padded, and folders go both ways."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import change_json, change_weights
from packed_reference import (
    FAMILIES,
    MAX_LENGTH,
    ROBERTAS,
    WINDOW,
    assert_close,
    assert_same_training,
    gradients,
    make_batches,
    pad,
    small_model,
    small_packed,
    small_stock,
    stock_class,
)
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining

from pretrain.batch import IGNORED
from pretrain.config import OBJECTIVES
from pretrain.model.loading import from_checkpoint, from_size
from pretrain.model.packed import PackedModel, count_flops

HEADS = {**dict.fromkeys(FAMILIES, "ForMaskedLM"), "bert": "ForPreTraining"}
OTHERS = [family for family in FAMILIES if family not in ROBERTAS and family != "bert"]
# A module of a layer, and not its last one, before whose end the backward pass stops recomputing.
INNER = {"distilbert": "ffn", "modernbert": "attn"}


@pytest.fixture(scope="module")
def batches(corpus, vocabulary):
    return {objective: make_batches(corpus, vocabulary, objective)[0] for objective in OBJECTIVES}


def saved_stock(family, vocabulary, folder, head=None, **settings):
    """A stock model in `folder`."""
    model = small_stock(family, head or HEADS[family], vocabulary.size, **settings)
    model.save_pretrained(folder)
    return model


# The same numbers as the stock classes.


@pytest.mark.parametrize(
    "family, objective, pad_id",
    [("bert", objective, 0) for objective in OBJECTIVES]
    + [(family, "mlm", 1) for family in ROBERTAS]
    + [(family, "mlm", 0) for family in ("roberta", *OTHERS)],
)
def test_logits_losses_and_gradients_equal_stock_model_padded(
    family, objective, pad_id, batches, vocabulary, tmp_path
):
    """Our model loads what the stock class has saved, and vice versa."""
    batch = batches[objective]
    saved_stock(family, vocabulary, tmp_path / "stock", pad_token_id=pad_id)
    model, fresh = from_checkpoint(str(tmp_path / "stock"))
    assert fresh == [] and isinstance(model, PackedModel)
    assert isinstance(model, stock_class(family, HEADS[family]))
    model.use_pairs(1.0 if objective != "mlm" else None)
    model.train()  # dropout is 0; training mode must not change anything else
    model.save_pretrained(tmp_path / "ours")
    head = HEADS[family] if objective != "mlm" else "ForMaskedLM"
    stock = stock_class(family, head).from_pretrained(tmp_path / "ours").train()

    inputs = pad(batch, pad_id)
    masked = inputs["labels"] != IGNORED
    pairs = "sop" if objective == "mlm+sop" else "nsp"
    labels = {"mlm": inputs["labels"][masked], pairs: inputs.get("next_sentence_label")}
    if objective == "mlm":
        assert not batch.counts.get("nsp")
        inputs.pop("next_sentence_label", None)
    theirs = stock(**inputs)
    hidden = model.encode(batch)
    ours = {"mlm": model.masked_lm_logits(hidden, batch)}
    if objective == "mlm":
        expected = {"mlm": theirs.logits[masked]}
    else:
        ours[pairs] = model.next_sentence_logits(hidden, batch)
        expected = {"mlm": theirs.prediction_logits[masked], pairs: theirs.seq_relationship_logits}
    assert_close(ours, expected, atol=1e-5)

    terms = assert_same_training(model, batch, stock, theirs)
    assert terms.keys() == expected.keys()
    for name, logits in expected.items():
        num_known = (labels[name] != IGNORED).sum()
        assert num_known == batch.counts[name] > 0
        mean = F.cross_entropy(logits, labels[name], ignore_index=IGNORED)
        torch.testing.assert_close(terms[name].sum / num_known, mean, atol=1e-5, rtol=1e-5)
        assert terms[name].num_correct == (logits.argmax(-1) == labels[name]).sum()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_bf16_gradients_are_close_to_float32(family, batches, vocabulary):
    """With hidden states in bf16, too: LayerNorm's sums are in float32."""
    entries = {"bert": ["hidden_dropout_prob=0"], "modernbert": [f"local_attention={2 * WINDOW}"]}
    torch.manual_seed(0)
    sizes = ("tiny", vocabulary.size, MAX_LENGTH, vocabulary.pad_id)
    model = from_size(*sizes, entries[family], family).train()
    batch, found = batches["mlm+nsp" if family == "bert" else "mlm"], []
    for is_bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            terms = model(batch)
        sum(term.sum / batch.counts[name] for name, term in terms.items()).backward()
        found.append(gradients(model))
    exact, rounded = found
    largest = max(gradient.norm() for gradient in exact.values())
    for name, gradient in exact.items():
        # A bias of the keys has a gradient of 0: it shifts all scores of a query equally.
        size = gradient.norm().clamp(min=1e-3 * largest)
        assert (rounded[name] - gradient).norm() < 0.025 * size, name


@pytest.mark.parametrize("kind, drops", [("attention_probs", False), ("hidden", True)])
def test_dropout_is_on_hidden_states_only(kind, drops, vocabulary, batches):
    model = small_model(vocabulary.size, **{f"{kind}_dropout_prob": 0.5})
    trained = model(batches["mlm+nsp"])["mlm"].sum
    assert torch.equal(trained, model.eval()(batches["mlm+nsp"])["mlm"].sum) is not drops


@pytest.mark.parametrize("family", ["bert", *OTHERS])
def test_gradient_checkpointing_gives_the_same_gradients(family, vocabulary, batches, tmp_path):
    saved_stock(family, vocabulary, tmp_path, hidden_dropout_prob=0.1)
    found, calls, batch = [], [], batches["mlm+nsp" if family == "bert" else "mlm"]
    for checkpointing in (False, True):
        model = from_checkpoint(str(tmp_path))[0].train()
        inner = getattr(model.layers[0], INNER.get(family, "intermediate"))
        inner.register_forward_hook(lambda *_: calls.append(1))
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(1)  # the same dropout, which the second pass must draw again
        sum(term.sum for term in model(batch).values()).backward()
        found.append(gradients(model))
    assert len(calls) == 1 + 2, "activations are recomputed in the backward pass"
    assert_close(*found, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_counted_flops_equal_torchs_counter(family, vocabulary, corpus):
    """6 for a weight and token is exact for matrices; torch counts the same products one by one.
    For windows see test_modernbert.py: torch also counts scores that a mask hides."""
    model = small_packed(family, vocabulary.size)
    exact, filled = (make_batches(corpus, vocabulary, "mlm", fill=fill)[0] for fill in (0, 1))
    # The counter does not know the fused kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(exact)["mlm"].sum.backward()
    assert count_flops(model, exact) == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert count_flops(model, exact) == count_flops(model, filled), "filling is not work"


# Folders.


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_opens_with_the_auto_classes(family, vocabulary, tmp_path):
    own = {"attention_probs_dropout_prob": 0.3, "layer_norm_eps": 1e-7}  # stays, though unused
    saved_stock(family, vocabulary, tmp_path / "stock", **own)
    from_checkpoint(str(tmp_path / "stock"))[0].save_pretrained(tmp_path / "ours")
    paths = [tmp_path / name / "config.json" for name in ("stock", "ours")]
    before, after = (json.loads(path.read_text()) for path in paths)
    assert after == before and after["model_type"] == family
    assert after["architectures"] == [FAMILIES[family] + HEADS[family]]
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert_close(weights, load_file(tmp_path / "stock" / "model.safetensors"), atol=0.0, rtol=0.0)
    autos = [AutoModelForMaskedLM]
    autos += [AutoModelForPreTraining] * (family != "modernbert")  # transformers lists none
    for auto in autos + [AutoModel] * (family == "bert"):  # the others' heads have no pooler
        model, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"], auto
        for name, weight in model.state_dict().items():
            if name in weights or f"bert.{name}" in weights:  # not tied to another
                assert torch.equal(weight, weights.get(name, weights.get(f"bert.{name}"))), name


@pytest.mark.parametrize(
    "family, head, fresh",
    [
        ("bert", "Model", ["MLM head", "NSP head"]),
        ("bert", "ForMaskedLM", ["pooler", "NSP head"]),
        ("bert", "ForTokenClassification", ["pooler", "MLM head", "NSP head"]),
        *((family, "Model", ["MLM head"]) for family in ("roberta", *OTHERS)),
    ],
)
def test_parts_that_a_checkpoint_lacks_are_reported_as_fresh(
    family, head, fresh, vocabulary, tmp_path
):
    stock = saved_stock(family, vocabulary, tmp_path, head)
    model, reported = from_checkpoint(str(tmp_path))
    assert reported == fresh
    ours, theirs = model.base_model.state_dict(), stock.base_model.state_dict()
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 12 and all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_half_precision_checkpoint_is_trained_and_saved_in_float32(vocabulary, tmp_path):
    stock = small_stock("bert", HEADS["bert"], vocabulary.size).half()
    stock.save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    model, _ = from_checkpoint(str(tmp_path / "half"))
    expected = {name: weight.float() for name, weight in stock.named_parameters()}
    assert_close(dict(model.named_parameters()), expected, atol=0.0, rtol=0.0)
    model.save_pretrained(tmp_path / "full")  # whose config.json names the type, too
    opened = AutoModelForPreTraining.from_pretrained(tmp_path / "full")
    assert {weight.dtype for weight in opened.parameters()} == {torch.float32}


@pytest.mark.parametrize("family, says_tied", [("bert", False), ("roberta", True)])
def test_a_decoder_of_its_own_is_loaded_trained_grown_and_saved(
    family, says_tied, vocabulary, batches, tmp_path
):
    """Also if the config says that it is tied or, as in files of older versions, if only the head's
    bias is there. Every trainable weight has a gradient, as DDP expects."""
    folder, size = tmp_path / "stock", vocabulary.size
    stock = saved_stock(family, vocabulary, folder, tie_word_embeddings=False)
    decoder = stock.get_output_embeddings()

    def only_the_heads_bias(weights):
        weights["cls.predictions.bias"] = weights.pop("cls.predictions.decoder.bias")

    if not says_tied:
        change_weights(folder, only_the_heads_bias)
    tied = {"tie_word_embeddings": says_tied}
    change_json(folder / "config.json", lambda config: config | tied)
    model, fresh = from_checkpoint(str(folder))
    assert fresh == []
    model.use_pairs(None)
    model(batches["mlm"])["mlm"].sum.backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert gradients(model).keys() == trained
    model.add_vectors(size + 1, {size: [5]}, from_pieces=True)
    model.save_pretrained(tmp_path / "ours")
    opened, info = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    for found in (model.get_output_embeddings(), opened.get_output_embeddings()):
        assert torch.equal(found.weight[:size], decoder.weight)
        assert torch.equal(found.bias[:size], decoder.bias)


# Pairs and lengths.


@pytest.mark.parametrize(
    "family, token_types, takes_pairs",
    [("bert", 2, True), ("bert", 1, False), ("roberta", 1, False), ("modernbert", None, False)],
)
def test_lengths_and_pairs_that_a_model_accepts(family, token_types, takes_pairs, vocabulary):
    model = small_packed(family, vocabulary.size, type_vocab_size=token_types)
    assert model.max_length == MAX_LENGTH, "positions below those of text are no length"
    assert model.length_problems(MAX_LENGTH) == []
    (problem,) = model.length_problems(MAX_LENGTH + 1)
    assert problem.startswith(f"{MAX_LENGTH + 1}: ")
    problems = model.pair_problems("mlm+nsp")
    assert [problem.startswith("mlm+nsp: ") for problem in problems] == [True] * (not takes_pairs)
