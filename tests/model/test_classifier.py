"""Classifiers: packed logits, losses and gradients equal those of transformers' own classes on the same texts padded; folders open with
AutoModelForSequenceClassification under their labels' names; a head is kept where the labels are its own and starts fresh elsewhere."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from packed_reference import assert_close, gradients, roughen
from transformers import AutoModelForSequenceClassification

from pretrain.batch import IGNORED
from pretrain.command import UserError
from pretrain.data.labelled import LabelledCollator
from pretrain.model.classifier import CLASSIFIERS, load_classifier

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
VOCAB, POSITIONS, CLASSES = 90, 40, ["calm", "glad", "sad"]


def stock_class(family, head="ForSequenceClassification"):
    return getattr(transformers, FAMILIES[family] + head)


def small_stock(family, head="ForSequenceClassification", classes=CLASSES, **settings):
    """The stock model: two narrow layers without dropout, POSITIONS tokens at most, named classes; noise on every weight."""
    torch.manual_seed(5)
    offset = 0 if family == "bert" else 2
    return roughen(stock_class(family, head)(stock_class(family, head).config_class(**{
        "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": POSITIONS + offset, "type_vocab_size": 1 if offset else 2, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "pad_token_id": 1 if offset else 0, "id2label": dict(enumerate(classes)),
        "label2id": {label: number for number, label in enumerate(classes)}, **settings})))


def make_examples(pairs=False, count=13, seed=2):
    """(ids, token types, label) of texts of 3 to POSITIONS tokens, without padding."""
    source, examples = np.random.default_rng(seed), []
    for length in [POSITIONS, 3, *source.integers(3, POSITIONS + 1, count - 2)]:
        types = np.arange(length) >= length // 2 if pairs else np.zeros(length)
        examples.append((source.integers(5, VOCAB, length).astype(np.uint32), types.astype(np.uint8), source.integers(len(CLASSES))))
    return examples


def padded(examples, pad_id):
    """The arguments of a stock class."""
    shape = (len(examples), max(len(ids) for ids, _, _ in examples))
    arguments = {name: torch.zeros(shape, dtype=torch.int64) for name in ("token_type_ids", "attention_mask")}
    arguments["input_ids"] = torch.full(shape, pad_id)
    for row, (ids, types, _) in enumerate(examples):
        arguments["input_ids"][row, :len(ids)] = torch.from_numpy(ids.astype(np.int64))
        arguments["token_type_ids"][row, :len(ids)] = torch.from_numpy(types.astype(np.int64))
        arguments["attention_mask"][row, :len(ids)] = 1
    return arguments | {"labels": torch.tensor([int(label) for *_, label in examples])}


BOTH = pytest.mark.parametrize("saved", ["bert", "roberta"], indirect=True)  # a pooler and none


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """(family, a folder written by its stock class)."""
    folder = tmp_path_factory.mktemp(request.param)
    small_stock(request.param).save_pretrained(folder)
    return request.param, str(folder)


def head_of(model):
    return {name: weight.detach() for name, weight in model.state_dict().items() if name.startswith("classifier")}


# The same numbers as the stock classes.

def test_logits_loss_and_gradients_equal_the_stock_model_padded(saved):
    family, folder = saved
    examples = make_examples(pairs=family == "bert")
    (batch,) = LabelledCollator(POSITIONS, len(examples))(examples)
    model, stock = load_classifier(folder).train(), stock_class(family).from_pretrained(folder).train()
    assert isinstance(model, stock_class(family)) and type(model) is CLASSIFIERS[family] and model.loss_weights == {"label": 1.0}
    theirs = stock(**padded(examples, model.config.pad_token_id))
    logits = model.label_logits(model.encode(batch), batch)
    assert logits.shape == (13, 3) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=1e-5)

    output = model(batch)
    assert output.loss_sums.keys() == output.num_correct.keys() == batch.counts.keys() == {"label"} and batch.counts["label"] == 13
    loss = output.loss_sums["label"] / batch.counts["label"]
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=1e-5)
    assert output.num_correct["label"] == (theirs.logits.argmax(-1) == batch.label).sum()
    loss.backward()
    theirs.loss.backward()
    assert_close(gradients(model), gradients(stock), atol=1e-5, rtol=1e-4)
    assert gradients(model).keys() == dict(model.named_parameters()).keys(), "all of it is trained, the pooler of BERT too"


@BOTH
def test_ignored_labels_and_weights_of_classes_are_those_of_torch(saved):
    model, (batch,) = load_classifier(saved[1]), LabelledCollator(POSITIONS, 99)(make_examples())
    logits = model.label_logits(model.encode(batch), batch)
    some = torch.where(torch.arange(13) % 3 == 0, IGNORED, batch.label)
    output = model(replace(batch, label=some))
    torch.testing.assert_close(output.loss_sums["label"], F.cross_entropy(logits[some >= 0], some[some >= 0], reduction="sum"))
    assert output.num_correct["label"] == (logits.argmax(-1) == some).sum()
    model.class_weights = {"label": torch.tensor([0.2, 1.0, 3.0])}
    expected = F.cross_entropy(logits, batch.label, weight=torch.tensor([0.2, 1.0, 3.0]), reduction="sum")
    torch.testing.assert_close(model(batch).loss_sums["label"], expected)
    assert CLASSIFIERS[saved[0]].class_weights == {}, "of one model alone"


@BOTH
def test_the_head_drops_in_training_alone(saved, tmp_path):
    small_stock(saved[0], classifier_dropout=0.5).save_pretrained(tmp_path)
    model, (batch,) = load_classifier(str(tmp_path)), LabelledCollator(POSITIONS, 99)(make_examples())
    hidden = model.encode(batch)
    for mode, same in ((True, False), (False, True)):
        model.train(mode)
        assert torch.equal(model.label_logits(hidden, batch), model.label_logits(hidden, batch)) is same


# Folders and heads.

def test_a_saved_folder_opens_with_the_auto_class_under_the_names_of_its_labels(saved, tmp_path):
    family, folder = saved
    model = load_classifier(folder, ["no", "yes", "perhaps", "never"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [f"{FAMILIES[family]}ForSequenceClassification"] and config["model_type"] == family
    assert config["problem_type"] == "single_label_classification"
    opened, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is stock_class(family) and not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    assert opened.config.id2label == {0: "no", 1: "yes", 2: "perhaps", 3: "never"} and opened.config.num_labels == 4
    assert opened.config.label2id == {"no": 0, "yes": 1, "perhaps": 2, "never": 3}
    assert opened.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in opened.state_dict().items())


@BOTH
@pytest.mark.parametrize("classes", [None, CLASSES], ids=["its own", "the same"])
def test_a_head_is_kept_where_the_labels_are_its_own(classes, saved):
    model, stock = load_classifier(saved[1], classes), stock_class(saved[0]).from_pretrained(saved[1])
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in stock.state_dict().items())
    assert list(model.config.id2label.values()) == CLASSES and model.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("classes, keep_head", [
    (["a", "b", "c"], True), ([*reversed(CLASSES)], True), (["a", "b"], True), ([str(number) for number in range(40)], True),
    (CLASSES, False)], ids=["as many", "in another order", "fewer", "more", "the same, asked for"])
def test_a_head_starts_fresh_where_the_labels_differ(classes, keep_head, saved):
    """Also where the sizes agree: what the old head knows of "calm" says nothing of "a". The encoder stays."""
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(load_classifier(saved[1], classes, keep_head))
    old, model = stock_class(saved[0]).from_pretrained(saved[1]).state_dict(), found[0]
    assert list(model.config.id2label.values()) == classes and model.config.num_labels == len(classes)
    for name, weight in head_of(model).items():
        assert weight.shape != old[name].shape or not torch.equal(weight, old[name]), name
        if name.endswith("bias"):
            assert not weight.any(), f"{name} starts at zero"
        else:
            assert weight.abs().max() < 6 * model.config.initializer_range and weight.std() > 0.3 * model.config.initializer_range, name
            assert torch.equal(weight, head_of(found[1])[name]) and not torch.equal(weight, head_of(found[2])[name]), "of the seed"
    assert all(name.startswith("classifier") or torch.equal(model.state_dict()[name], weight) for name, weight in old.items())


NO_HEAD = "--model {}: has no head that chooses one of several classes; needed is a classifier, such as finetune.py makes"


@pytest.mark.parametrize("family, head", [*((family, "ForMaskedLM") for family in FAMILIES), ("bert", "Model")])
def test_a_pretrained_encoder_gets_a_head_and_without_one_is_no_classifier(family, head, tmp_path):
    stock = small_stock(family, head, classes=["LABEL_0", "LABEL_1"])
    stock.save_pretrained(tmp_path)
    with pytest.raises(UserError) as told:
        load_classifier(str(tmp_path))
    assert str(told.value) == NO_HEAD.format(tmp_path)
    model = load_classifier(str(tmp_path), CLASSES)
    for name, weight in stock.base_model.named_parameters():
        assert name.startswith("pooler") or torch.equal(model.base_model.get_parameter(name), weight), name
    assert model.state_dict().keys() == small_stock(family).state_dict().keys()


def test_encoders_with_and_without_a_pooler_get_the_same_head(tmp_path):
    """A pooler that is missing is drawn, too; what encoders are compared by is not the draw of their heads."""
    heads = []
    for head in ("Model", "ForMaskedLM", "ForSequenceClassification"):
        small_stock("bert", head, classes=["x", "y"]).save_pretrained(tmp_path / head)
        torch.manual_seed(1)
        heads.append(head_of(load_classifier(str(tmp_path / head), CLASSES)))
    for other in heads[1:]:
        assert_close(heads[0], other, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("settings", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}, {"classes": ["x"]}],
                         ids=str)
def test_a_head_of_several_labels_at_once_or_of_a_number_is_none_and_the_encoder_serves(settings, tmp_path):
    small_stock("bert", **settings).save_pretrained(tmp_path)
    with pytest.raises(UserError) as told:
        load_classifier(str(tmp_path))
    assert str(told.value) == NO_HEAD.format(tmp_path)
    assert load_classifier(str(tmp_path), ["a", "b"]).config.problem_type == "single_label_classification"


def test_twelve_labels_stand_in_the_order_of_their_numbers(tmp_path):
    """A config whose keys are sorted as strings ("0", "1", "10", "2"), as some on the hub are, names the same classes."""
    classes = [f"label {number}" for number in range(12)]
    small_stock("bert", classes=classes).save_pretrained(tmp_path)
    assert list(load_classifier(str(tmp_path)).config.id2label.values()) == classes
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = dict(sorted(config["id2label"].items()))
    assert list(config["id2label"])[2] == "10"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert list(load_classifier(str(tmp_path)).config.id2label.values()) == classes
    assert all(torch.equal(load_classifier(str(tmp_path), classes).state_dict()[name], weight)
               for name, weight in head_of(load_classifier(str(tmp_path))).items()), "its own labels, its own head"
