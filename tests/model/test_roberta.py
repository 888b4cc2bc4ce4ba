"""RoBERTa, XLM-RoBERTa and CamemBERT: packed losses, logits and gradients equal those of transformers' own classes on the same
examples padded, folders go both ways, and a run goes from text to a model that fills masks."""
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import assert_same_run, interrupted_copy, refusal, rows, script
from packed_reference import assert_close, gradients, make_batches, pad, roughen
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, AutoTokenizer

from pretrain.batch import IGNORED
from pretrain.model import bert
from pretrain.model.packed import PackedModel

FAMILIES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
PRETRAIN, EVALUATE, FILL_MASK = script("pretrain"), script("evaluate"), script("fill_mask")


def stock_class(family, head="ForMaskedLM"):
    return getattr(transformers, FAMILIES[family] + head)


def small_stock(family, vocab_size, pad_id=1, head="ForMaskedLM", **settings):
    """The stock model: two narrow layers without dropout, one type of tokens, 64 tokens at most; noise on every weight."""
    torch.manual_seed(5)
    config = stock_class(family, head).config_class(**{
        "vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 64 + pad_id + 1, "type_vocab_size": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-5, "pad_token_id": pad_id, "bos_token_id": 2, "eos_token_id": 3, **settings})
    return roughen(stock_class(family, head)(config))


@pytest.fixture(scope="module")
def batch(corpus, vocabulary):
    return make_batches(corpus, vocabulary, "mlm")[0]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, vocabulary, tmp_path_factory):
    """(family, a folder written by its stock class)."""
    folder = tmp_path_factory.mktemp(request.param)
    small_stock(request.param, vocabulary.size).save_pretrained(folder)
    return request.param, folder


def padded(batch, pad_id):
    """The arguments of a stock class, which counts positions by what is not padding."""
    inputs = {name: value for name, value in pad(batch).items() if name != "next_sentence_label"}
    assert pad_id not in batch.input_ids
    return inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad_id)}


# The same numbers as the stock classes.

@pytest.mark.parametrize("pad_id", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_losses_and_gradients_equal_stock_model_padded(family, pad_id, batch, vocabulary, tmp_path):
    small_stock(family, vocabulary.size, pad_id).save_pretrained(tmp_path)
    model, fresh = bert.from_checkpoint(str(tmp_path), [])
    assert fresh == [] and isinstance(model, PackedModel) and isinstance(model, stock_class(family))
    model.set_objective("mlm")
    model.train()
    stock, inputs = stock_class(family).from_pretrained(tmp_path).train(), padded(batch, pad_id)
    theirs, masked = stock(**inputs), inputs["labels"] != IGNORED
    logits, labels = theirs.logits[masked], inputs["labels"][masked]
    assert len(logits) == batch.counts["mlm"] > 0
    torch.testing.assert_close(model.masked_lm_logits(model.encode(batch), batch), logits, atol=1e-5, rtol=1e-5)

    output = model(batch)
    assert output.loss_sums.keys() == output.num_correct.keys() == model.loss_weights.keys() == {"mlm"}
    torch.testing.assert_close(output.loss_sums["mlm"], F.cross_entropy(logits, labels, reduction="sum"), atol=1e-5, rtol=1e-5)
    assert output.num_correct["mlm"] == (logits.argmax(-1) == labels).sum()
    loss = output.loss_sums["mlm"] / batch.counts["mlm"]
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=1e-5)

    loss.backward()
    theirs.loss.backward()
    assert_close(gradients(model), gradients(stock), atol=1e-5, rtol=1e-4)
    assert len(gradients(model)) == len([weight for weight in model.parameters() if weight.requires_grad])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, batch, vocabulary, tmp_path):
    small_stock(family, vocabulary.size, hidden_dropout_prob=0.1).save_pretrained(tmp_path)
    found = []
    for checkpointing in (False, True):
        model = bert.from_checkpoint(str(tmp_path), [])[0].train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(1)
        model(batch).loss_sums["mlm"].backward()
        found.append(gradients(model))
    assert_close(*found, atol=0.0, rtol=0.0)


def test_counted_flops_equal_those_of_torchs_counter(saved, batch):
    model = bert.from_checkpoint(str(saved[1]), [])[0]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).loss_sums["mlm"].backward()
    assert bert.count_flops(model, batch) == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_below_those_of_text_are_no_length(family):
    config = stock_class(family).config_class(max_position_embeddings=514, num_hidden_layers=1)
    with torch.device("meta"):
        assert config.pad_token_id == 1 and bert.FAMILIES[family](config).max_length == 512


# Folders.

def test_saved_folder_opens_with_the_auto_class(saved, tmp_path):
    family, folder = saved
    model = bert.from_checkpoint(str(folder), [])[0]
    model.save_pretrained(tmp_path)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    assert after == before and after["architectures"] == [f"{FAMILIES[family]}ForMaskedLM"] and after["model_type"] == family
    opened, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is stock_class(family)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    for each in (model, opened):
        assert each.lm_head.decoder.weight is each.roberta.embeddings.word_embeddings.weight
        assert each.lm_head.decoder.bias is each.lm_head.bias
        for name, weight in stock_class(family).from_pretrained(folder).named_parameters():
            assert torch.equal(each.get_parameter(name), weight), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_alone_gets_a_fresh_head(family, vocabulary, tmp_path):
    stock = small_stock(family, vocabulary.size, head="Model")
    stock.save_pretrained(tmp_path)
    model, fresh = bert.from_checkpoint(str(tmp_path), [])
    assert fresh == ["MLM head"]
    for name, weight in stock.named_parameters():
        assert name.startswith("pooler") or torch.equal(model.get_parameter(f"roberta.{name}"), weight), name


def test_a_next_sentence_objective_is_no_objective_of_the_model(saved):
    model = bert.from_checkpoint(str(saved[1]), [])[0]
    assert model.problems_of("mlm+nsp", 8) == [f"--objective mlm+nsp: the family {saved[0]} has no NSP head; needed is --objective mlm"]
    assert model.problems_of("mlm", model.max_length) == [] != model.problems_of("mlm", model.max_length + 1)


# A run.

@pytest.fixture(scope="module", params=["roberta", "xlm-roberta"])
def base(request, roberta_tokenizer, xlm_roberta_tokenizer, tmp_path_factory):
    """(family, a checkpoint with its tokenizer); dropout is on."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = {"roberta": roberta_tokenizer, "xlm-roberta": xlm_roberta_tokenizer}[request.param]
    small_stock(request.param, len(tokenizer), tokenizer.pad_token_id, hidden_dropout_prob=0.1, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, folder


@pytest.fixture(scope="module")
def arguments(base, text_file, cache):
    return ["--train", str(text_file), "--model", str(base[1]), "--objective", "mlm", "--masking", "word", "--max-length", "64",
            "--batch-size", "16", "--micro-batch-size", "8", "--max-steps", "6", "--save-every", "2", "--eval-every", "3", "--keep", "9",
            "--eval-tokens", "600", "--cache", str(cache), "--learning-rate", "1e-3", "--precision", "fp32"]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "finished"
    PRETRAIN.main([*arguments, "--output", str(output)])
    return output


def test_a_run_trains_and_its_model_opens_with_transformers(base, finished):
    logged = rows(finished)
    assert logged[-1]["step"] == 6 and all(math.isfinite(row["train/loss"]) for row in logged if "train/loss" in row)
    assert logged[-1]["eval/perplexity"] < 0.9 * logged[0]["eval/perplexity"]
    opened, info = AutoModelForMaskedLM.from_pretrained(finished / "final", output_loading_info=True)
    assert type(opened) is stock_class(base[0]) and not info["missing_keys"] and not info["unexpected_keys"]
    text = "banking rivers teach quickly ."
    assert AutoTokenizer.from_pretrained(finished / "final")(text).input_ids == AutoTokenizer.from_pretrained(base[1])(text).input_ids


def test_whole_words_are_masked(base, arguments, tmp_path, steps_seen):
    PRETRAIN.main([*arguments, "--max-steps", "2", "--output", str(tmp_path / "run")])
    tokenizer, pieces, started = AutoTokenizer.from_pretrained(base[1]), 0, {"\u0120", "\u2581"}
    for batch in (batch for batches in steps_seen for batch in batches):
        before, number = batch.input_ids.clone(), batch.counts["mlm"]  # what follows is filling
        before[batch.masked_positions[:number]] = batch.masked_lm_labels[:number]
        masked, tokens = set(batch.masked_positions[:number].tolist()), tokenizer.convert_ids_to_tokens(before.tolist())
        for place, token in enumerate(tokens):
            if token[0] not in started and token.isalpha() and tokens[place - 1].lstrip("\u0120\u2581").isalpha():
                assert (place in masked) == (place - 1 in masked), tokens[place - 1:place + 1]
                pieces += place in masked
    assert pieces > 20


def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path):
    interrupted_copy(finished, tmp_path / "run", 2)
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run", step=6)


def test_evaluate_gives_the_numbers_of_the_run(finished, text_file, cache, capsys):
    EVALUATE.main(["--model", str(finished / "final"), "--input", str(text_file), "--valid-fraction", "0.05", "--precision", "fp32",
                   "--cache", str(cache)])
    numbers, last = json.loads(capsys.readouterr().out.splitlines()[-1]), rows(finished)[-1]
    assert numbers == {name: last[f"eval/{name}"] for name in numbers} and "mlm_loss" in numbers


def test_masks_are_filled_where_the_text_says_MASK(finished, capsys):
    FILL_MASK.main(["--model", str(finished / "final"), "--top", "3", "quick [MASK] learn ."])
    head, *told = capsys.readouterr().out.strip().splitlines()
    tokenizer, model = (auto.from_pretrained(finished / "final") for auto in (AutoTokenizer, AutoModelForMaskedLM))
    inputs = tokenizer(f"quick {tokenizer.mask_token} learn .", return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id].softmax(-1)[0].topk(3)
    assert head.split() == ["token", "score", "sentence"] and len(told) == 3
    for line, score, number in zip(told, scores.values.tolist(), scores.indices.tolist()):
        assert f"{score:8.4f}  quick" in line and line.startswith(tokenizer.decode([number])) and line.endswith(" learn .")


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_a_next_sentence_objective_is_refused_in_one_message(base, arguments, objective, text_file, cache, tmp_path, capsys):
    told = refusal(PRETRAIN.main, [*arguments, "--objective", objective, "--output", tmp_path / "run"], capsys)
    assert told == f"--objective {objective}: the family {base[0]} has no NSP head; needed is --objective mlm"
    assert not (tmp_path / "run").exists()
    evaluated = ["--model", base[1], "--input", text_file, "--objective", objective, "--cache", cache, "--max-length", "64"]
    told = refusal(EVALUATE.main, evaluated, capsys)
    assert told == f"--objective {objective}: the family {base[0]} has no NSP head; needed is --objective mlm"


def test_positions_of_the_model_bound_the_length(base, arguments, tmp_path, capsys):
    told = refusal(PRETRAIN.main, [*arguments, "--max-length", "65", "--output", tmp_path / "run"], capsys)
    assert told == "--max-length 65: the model has 64 positions; needed is at most that"


def test_the_config_names_the_family_and_not_the_folder(base, arguments, tmp_path, capsys):
    shutil.copytree(base[1], tmp_path / "electra")
    assert isinstance(bert.from_checkpoint(str(tmp_path / "electra"), [])[0], stock_class(base[0]))
    config = json.loads((tmp_path / "electra" / "config.json").read_text())
    (tmp_path / "electra" / "config.json").write_text(json.dumps({**config, "model_type": "electra"}))
    told = refusal(PRETRAIN.main, [*arguments, "--model", tmp_path / "electra", "--output", tmp_path / "run"], capsys)
    assert told == (f"--model {tmp_path / 'electra'}: is of the family 'electra' (config.model_type); families that work: bert, roberta, "
                    "xlm-roberta, camembert")
