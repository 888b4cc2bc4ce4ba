"""The model: packed losses, logits and gradients equal those of transformers' own classes on the same examples padded; folders go
both ways; every checkpoint, config field and size that is asked for is taken as it is or refused with a message."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from packed_reference import MAX_LENGTH, assert_close, gradients, make_batches, pad, roughen, small_config, small_model
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, BertConfig, BertModel
from transformers import BertForMaskedLM as StockMaskedLM
from transformers import BertForPreTraining as Stock

from pretrain.batch import IGNORED
from pretrain.command import UserError
from pretrain.config import MODEL_SIZES, OBJECTIVES
from pretrain.model import bert
from pretrain.model.attention import SDPA

POOLER_AND_NSP = {f"{name}.{kind}" for name in ("bert.pooler.dense", "cls.seq_relationship") for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def batches(corpus, vocabulary):
    return {objective: make_batches(corpus, vocabulary, objective)[0] for objective in OBJECTIVES}


@pytest.fixture(scope="module")
def saved(vocabulary, tmp_path_factory):
    """A folder written by our class."""
    folder = tmp_path_factory.mktemp("ours")
    small_model(vocabulary.size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock_saved(vocabulary, tmp_path_factory):
    """A folder written by the stock class, with heads."""
    folder = tmp_path_factory.mktemp("stock")
    roughen(Stock(small_config(vocabulary.size))).save_pretrained(folder)
    return folder


def copy(source, target, **settings):
    """A copy of a model folder, with fields of its config changed."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **settings}))
    return target


# The same numbers as the stock classes.

def test_gradients_of_bf16_are_near_those_of_float32(corpus, vocabulary):
    """With the residual stream in bf16, too: LayerNorm's statistics and the sums of its weights' gradients are in float32."""
    torch.manual_seed(0)
    model = bert.from_size("tiny", vocabulary.size, MAX_LENGTH, vocabulary.pad_id, ["hidden_dropout_prob=0"]).train()
    batch, found = make_batches(corpus, vocabulary)[0], []
    for is_bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            losses = model(batch).loss_sums
        sum(losses[name] / batch.counts[name] for name in losses).backward()
        found.append(gradients(model))
    exact, rounded = found
    largest = max(gradient.norm() for gradient in exact.values())
    for name, gradient in exact.items():  # a bias of the keys has a gradient of 0: it moves all scores of a query alike
        assert (rounded[name] - gradient).norm() < 0.025 * gradient.norm().clamp(min=1e-3 * largest), name


@pytest.mark.parametrize("writer", ["ours", "stock"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_losses_and_gradients_equal_stock_model_padded(objective, writer, saved, stock_saved, batches):
    folder, batch = {"ours": saved, "stock": stock_saved}[writer], batches[objective]
    model, fresh = bert.from_checkpoint(str(folder), [])
    assert fresh == []
    model.set_objective(objective)
    model.train()  # dropout is 0; training mode must not change anything else
    stock = (StockMaskedLM if objective == "mlm" else Stock).from_pretrained(folder).train()
    inputs = pad(batch)
    masked = inputs["labels"] != IGNORED
    assert masked.sum() == batch.counts["mlm"] > 0
    if objective == "mlm":
        inputs.pop("next_sentence_label")
        assert batch.counts["nsp"] == 0
    theirs = stock(**inputs)
    hidden = model.encode(batch)
    ours = {"mlm": model.masked_lm_logits(hidden, batch)}
    expected = {"mlm": (theirs.logits if objective == "mlm" else theirs.prediction_logits)[masked]}
    if objective != "mlm":
        ours["nsp"], expected["nsp"] = model.next_sentence_logits(hidden, batch), theirs.seq_relationship_logits
    assert_close(ours, expected, atol=1e-5)

    output = model(batch)
    labels = {"mlm": inputs["labels"][masked], "nsp": batch.next_sentence_label}
    assert output.loss_sums.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(output.loss_sums[name] / batch.counts[name],
                                   F.cross_entropy(logits, labels[name], ignore_index=IGNORED), atol=1e-5, rtol=1e-5)
        assert output.num_correct[name] == sum(int(row.argmax()) == label for row, label in zip(logits, labels[name].tolist()))
    loss = sum(total / batch.counts[name] for name, total in output.loss_sums.items())
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=1e-5)

    loss.backward()
    theirs.loss.backward()
    assert_close(gradients(model), gradients(stock), atol=1e-5, rtol=1e-4)
    assert len(gradients(model)) == len([weight for weight in model.parameters() if weight.requires_grad])


def test_examples_in_a_pack_do_not_see_one_another(vocabulary, corpus):
    model = small_model(vocabulary.size)
    whole, *parts = make_batches(corpus, vocabulary, micro_batch_size=8), *make_batches(corpus, vocabulary, micro_batch_size=1, count=4)
    hidden = model.encode(whole[0])
    start = 0
    for part in parts:  # the plan's order does not depend on the size of a micro-batch
        torch.testing.assert_close(hidden[start:start + part.num_tokens], model.encode(part), atol=1e-5, rtol=1e-5)
        start += part.num_tokens


def test_attention_probabilities_are_never_dropped_in_training(vocabulary, batches):
    batch, model = batches["mlm+nsp"], small_model(vocabulary.size, attention_probs_dropout_prob=0.5)
    trained = model(batch).loss_sums["mlm"]
    assert torch.equal(trained, model.eval()(batch).loss_sums["mlm"])


def test_hidden_dropout_stays(vocabulary, batches):
    model = small_model(vocabulary.size, hidden_dropout_prob=0.5)
    assert not torch.equal(model(batches["mlm"]).loss_sums["mlm"], model(batches["mlm"]).loss_sums["mlm"])


def test_gradient_checkpointing_gives_the_same_gradients(vocabulary, batches):
    found, calls = [], []
    for checkpointing in (False, True):
        model = small_model(vocabulary.size, hidden_dropout_prob=0.1)
        model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)  # the same dropout, which the second pass must draw again
        output = model(batches["mlm+nsp"])
        sum(output.loss_sums.values()).backward()
        found.append(gradients(model))
    assert len(calls) == 1 + 2, "activations are recomputed in the backward pass"
    assert_close(*found, atol=0.0, rtol=0.0)


# Folders.

def test_saved_folder_opens_with_the_auto_classes(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining"] and config["model_type"] == "bert"
    weights = load_file(saved / "model.safetensors")
    left_over = {AutoModelForPreTraining: set(), AutoModelForMaskedLM: POOLER_AND_NSP,
                 AutoModel: {name for name in weights if name.startswith("cls.")}}
    for auto, expected in left_over.items():
        model, info = auto.from_pretrained(saved, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"], auto
        assert set(info["unexpected_keys"]) == expected, auto
        for name, weight in model.named_parameters():
            stored = weights[name if name in weights else f"bert.{name}"]
            assert torch.equal(weight, stored), (auto, name)


@pytest.mark.parametrize("opens", [lambda folder: bert.from_checkpoint(folder, [])[0], AutoModelForPreTraining.from_pretrained,
                                   AutoModelForMaskedLM.from_pretrained])
def test_decoder_is_tied_to_the_word_embeddings_after_loading(saved, opens):
    model = opens(str(saved))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


@pytest.mark.parametrize("head, fresh", [
    (lambda config: BertModel(config), ["MLM head", "NSP head"]),
    (lambda config: BertModel(config, add_pooling_layer=False), ["pooler", "MLM head", "NSP head"]),
    (lambda config: StockMaskedLM(config), ["pooler", "NSP head"]),
    (lambda config: Stock(config), []),
])
def test_parts_that_a_checkpoint_lacks_are_reported_as_fresh(head, fresh, vocabulary, tmp_path):
    stock = roughen(head(small_config(vocabulary.size)))
    stock.save_pretrained(tmp_path)
    model, reported = bert.from_checkpoint(str(tmp_path), [])
    assert reported == fresh
    ours = dict(model.named_parameters())
    for name, weight in stock.named_parameters():
        assert torch.equal(ours[name if name in ours else f"bert.{name}"], weight), name
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_saved_config_keeps_the_models_own_values(vocabulary, tmp_path):
    Stock(small_config(vocabulary.size, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2, layer_norm_eps=1e-7)).save_pretrained(
        tmp_path / "before")
    bert.from_checkpoint(str(tmp_path / "before"), [])[0].save_pretrained(tmp_path / "after")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after"))
    assert after["attention_probs_dropout_prob"] == 0.3
    assert after == before


def test_half_precision_checkpoint_is_trained_and_saved_in_float32(vocabulary, tmp_path):
    stock = roughen(Stock(small_config(vocabulary.size))).half()
    stock.save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["bert.pooler.dense.bias"].dtype == torch.float16
    model, _ = bert.from_checkpoint(str(tmp_path / "half"), [])
    for name, weight in stock.named_parameters():
        ours = model.get_parameter(name)
        assert ours.dtype == torch.float32 and torch.equal(ours, weight.float()), name
    model.save_pretrained(tmp_path / "full")
    opened = AutoModelForPreTraining.from_pretrained(tmp_path / "full")  # reads the dtype in config.json
    assert {weight.dtype for weight in opened.parameters()} == {torch.float32}


def test_the_config_names_the_family_and_not_the_folder(saved, tmp_path):
    folder = copy(saved, tmp_path / "chinese-roberta-wwm-ext")
    assert bert.from_checkpoint(str(folder), [])[1] == []
    assert type(bert.from_checkpoint(str(folder), [])[0]) is bert.BertForPreTraining


@pytest.mark.parametrize("family", ["distilbert", "electra", "albert", "deberta-v2", "modernbert", "xlm-roberta-xl"])
def test_another_family_is_refused_with_those_that_work(family, tmp_path):
    (tmp_path / "bert-base").mkdir()
    (tmp_path / "bert-base" / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UserError, match=rf"--model .*bert-base: is of the family '{family}' \(config.model_type\); families that work: "
                                        r"bert, roberta, xlm-roberta, camembert$"):
        bert.from_checkpoint(str(tmp_path / "bert-base"), [])


def test_name_that_cannot_be_had_offline():
    with pytest.raises(UserError, match=r"(?s)--model nobody/nothing: is no size \(tiny, .*\), no folder with a config.json, and not to "
                                        r"be had from the hub.*offline, give a folder"):
        bert.from_checkpoint("nobody/nothing", [])


@pytest.mark.parametrize("damage", ["cut short", "empty", "missing", "no safetensors"])
def test_weights_that_cannot_be_read(damage, saved, tmp_path):
    folder = copy(saved, tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes({"cut short": weights.read_bytes()[:-100], "empty": b"", "no safetensors": b"x" * 4096}[damage])
    with pytest.raises(UserError, match=rf"--model {folder}: its weights cannot be read \(\w+: .+\)"):
        bert.from_checkpoint(str(folder), [])


def test_checkpoint_without_a_weight_of_the_encoder_is_refused(saved, tmp_path):
    folder = copy(saved, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks 1 weights of the encoder, {name} first"):
        bert.from_checkpoint(str(folder), [])


def test_config_that_does_not_fit_the_weights_is_refused(saved):
    with pytest.raises(UserError, match=r"its weights cannot be read"):
        bert.from_checkpoint(str(saved), ["intermediate_size=96"])


# Objective, sizes, overrides.

def test_mlm_alone_freezes_pooler_and_nsp_head(vocabulary, batches):
    model = small_model(vocabulary.size, "mlm")
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == POOLER_AND_NSP
    output = model(batches["mlm+nsp"])  # pairs are there and not scored
    assert output.loss_sums.keys() == output.num_correct.keys() == model.loss_weights.keys() == {"mlm"}
    model.set_objective("mlm+nsp", nsp_weight=0.5)
    assert all(weight.requires_grad for weight in model.parameters())
    assert model.loss_weights == {"mlm": 1.0, "nsp": 0.5}


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_sizes_have_the_layers_and_widths_of_the_table(size):
    with torch.device("meta"):  # no memory for the large ones
        model = bert.from_size(size, vocab_size=1000, max_length=64, pad_id=3, overrides=[])
    layers, width = MODEL_SIZES[size]
    assert len(model.bert.encoder.layer) == layers
    assert model.bert.encoder.layer[0].attention.self.query.weight.shape == (width, width)
    assert model.bert.encoder.layer[0].attention.self.query.out_features // model.config.num_attention_heads == 64
    assert model.bert.encoder.layer[0].intermediate.dense.weight.shape == (4 * width, width)
    assert model.cls.predictions.decoder.weight.shape == (1000, width)
    assert model.bert.embeddings.word_embeddings.padding_idx == model.config.pad_token_id == 3
    assert model.config.max_position_embeddings == 512 and model.attention == SDPA


def test_a_size_reaches_the_longest_sequence_and_takes_overrides():
    model = bert.from_size("tiny", 120, 600, 0, ["hidden_size=32", "num_attention_heads=4", "hidden_dropout_prob=0"])
    assert model.bert.embeddings.position_embeddings.weight.shape == (600, 32)
    assert model.bert.encoder.layer[0].attention.self.query.out_features // model.config.num_attention_heads == 8
    assert model.bert.embeddings.dropout.p == 0


@pytest.mark.parametrize("entry, name, value", [
    ("num_hidden_layers=3", "num_hidden_layers", 3), ("hidden_dropout_prob=0", "hidden_dropout_prob", 0.0),
    ("layer_norm_eps=1e-7", "layer_norm_eps", 1e-7), ("hidden_act=relu", "hidden_act", "relu"),
    ("tie_word_embeddings=false", "tie_word_embeddings", False), ("use_cache=True", "use_cache", True)])
def test_override_keeps_the_type_of_the_field(entry, name, value):
    config = BertConfig()
    bert.override(config, [entry])
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


def test_override_takes_a_share_where_the_checkpoint_holds_a_whole_number():
    config = BertConfig(**json.loads('{"hidden_dropout_prob": 0}'))  # as some published configs have it
    bert.override(config, ["hidden_dropout_prob=0.1"])
    assert config.hidden_dropout_prob == 0.1


@pytest.mark.parametrize("entry, message", [
    ("no_such_field=1", r"--config-override no_such_field=1: unknown field; known are .*hidden_dropout_prob.*num_hidden_layers"),
    ("to_dict=1", r"--config-override to_dict=1: unknown field"),
    ("num_hidden_layers=two", r"--config-override num_hidden_layers=two: needed is a value of type int"),
    ("num_hidden_layers=2.5", r"--config-override num_hidden_layers=2.5: needed is a value of type int"),
    ("hidden_dropout_prob=", r"--config-override hidden_dropout_prob=: needed is a value of type float"),
    ("is_decoder=maybe", r"--config-override is_decoder=maybe: needed is a value of type bool"),
])
def test_override_refuses(entry, message):
    with pytest.raises(UserError, match=message):
        bert.override(BertConfig(), [entry])


@pytest.mark.parametrize("entry", ["num_attention_heads=3", "hidden_act=nothing", "hidden_dropout_prob=1.5", "vocab_size=0"])
def test_override_that_makes_no_model_is_refused_with_its_name(entry):
    with pytest.raises(UserError, match=rf"--config-override.*{entry}"):
        bert.from_size("tiny", 120, 64, 0, ["num_hidden_layers=1", entry])


def test_counted_flops_equal_those_of_torchs_counter(vocabulary, corpus):
    """6 for a weight and token is exact for matrices; torch counts the same products one by one."""
    batch, model = make_batches(corpus, vocabulary, "mlm")[0], small_model(vocabulary.size, "mlm")
    # The counter does not know the fused kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).loss_sums["mlm"].backward()
    assert bert.count_flops(model, batch) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_filling_is_not_counted_as_work(vocabulary, corpus):
    model = small_model(vocabulary.size)
    exact, filled = (make_batches(corpus, vocabulary, fill=fill)[0] for fill in (False, True))
    assert bert.count_flops(model, exact) == bert.count_flops(model, filled)
    assert transformers.utils.logging.is_progress_bar_enabled() is False  # its bars would break the run's own
