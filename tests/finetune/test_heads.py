"""Classifiers: packed logits, losses and gradients equal the stock classes of transformers on the
same texts, padded; folders open with AutoModelForSequenceClassification and keep their labels; a
head is kept if the labels match and starts fresh otherwise. The same for regression and tags."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import change_json, read_json, refused
from packed_reference import (
    FAMILIES,
    MAX_LENGTH,
    assert_close,
    assert_same_training,
    pad,
    small_stock,
    stock_class,
)
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from pretrain.finetune.dataset import pack
from pretrain.finetune.heads import CLASSIFIERS, load_classifier, task_of
from pretrain.model.loading import load_config

HEAD, VOCAB, CLASSES = "ForSequenceClassification", 90, ["calm", "glad", "sad"]


def stock_classifier(family, head=HEAD, classes=CLASSES, **settings):
    label2id = {label: number for number, label in enumerate(classes)}
    names = {"id2label": dict(enumerate(classes)), "label2id": label2id}
    return small_stock(family, head, VOCAB, **names, **settings)


def make_batch(pairs=False):
    """Thirteen texts of 3 to MAX_LENGTH tokens."""
    source, examples = np.random.default_rng(2), []
    for length in [MAX_LENGTH, 3, *source.integers(3, MAX_LENGTH + 1, 11)]:
        ids = source.integers(5, VOCAB, length).astype(np.uint32)
        types = np.arange(length) >= (length // 2 if pairs else length)
        examples.append((ids, types.astype(np.uint8), source.integers(len(CLASSES))))
    return pack(examples, MAX_LENGTH)


BOTH = pytest.mark.parametrize("saved", ["bert", "roberta"], indirect=True)  # a pooler and none
KINDS = ["bert", "roberta", "distilbert", "modernbert"]  # the others are built as RoBERTa is


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """(family, a folder written by its stock class)."""
    folder = tmp_path_factory.mktemp(request.param)
    stock_classifier(request.param).save_pretrained(folder)
    return request.param, str(folder)


def head_of(model):
    weights = model.state_dict().items()
    return {name: weight for name, weight in weights if name.startswith("classifier")}


def assert_equal(ours, theirs):
    assert_close(ours, theirs, atol=0.0, rtol=0.0)


# The same numbers as the stock classes.


@pytest.mark.parametrize(
    "family, settings",
    [*((family, {}) for family in FAMILIES), ("modernbert", {"classifier_pooling": "mean"})],
)
def test_logits_loss_and_gradients_equal_the_stock_model_padded(family, settings, tmp_path):
    stock_classifier(family, **settings).save_pretrained(tmp_path)
    batch, model = make_batch(pairs=family == "bert"), load_classifier(str(tmp_path)).train()
    stock = stock_class(family, HEAD).from_pretrained(tmp_path).train()
    assert isinstance(model, type(stock)) and type(model) is CLASSIFIERS[family]
    theirs = stock(**pad(batch, model.config.pad_token_id))
    logits = model.label_logits(model.encode(batch), batch)
    assert logits.shape == (13, 3) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=1e-5)

    terms = assert_same_training(model, batch, stock, theirs)
    assert terms.keys() == batch.counts.keys() == {"label"} and batch.counts["label"] == 13
    assert terms["label"].num_correct == (theirs.logits.argmax(-1) == batch.labels["label"]).sum()


@BOTH
def test_head_dropout_is_only_on_in_training(saved, tmp_path):
    stock_classifier(saved[0], classifier_dropout=0.5).save_pretrained(tmp_path)
    model, batch = load_classifier(str(tmp_path)), make_batch()
    hidden = model.encode(batch)
    for is_training in (True, False):
        model.train(is_training)
        first, second = (model.label_logits(hidden, batch) for _ in range(2))
        assert torch.equal(first, second) is not is_training


# Folders and heads.


def test_a_saved_folder_opens_with_the_auto_class_under_the_names_of_its_labels(saved, tmp_path):
    (family, folder), classes = saved, ["no", "yes", "perhaps", "never"]
    model = load_classifier(folder, classes)
    model.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["architectures"] == [FAMILIES[family] + HEAD] and config["model_type"] == family
    assert config["problem_type"] == "single_label_classification"
    auto = AutoModelForSequenceClassification
    opened, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is stock_class(family, HEAD)
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    assert opened.config.id2label == dict(enumerate(classes)) and opened.config.num_labels == 4
    assert opened.config.label2id == {"no": 0, "yes": 1, "perhaps": 2, "never": 3}
    assert_equal(opened.state_dict(), model.state_dict())


@BOTH
def test_a_head_is_kept_if_the_labels_match(saved):
    stock = stock_class(saved[0], HEAD).from_pretrained(saved[1])
    for classes in (None, CLASSES):
        model = load_classifier(saved[1], classes)
        assert_equal(model.state_dict(), stock.state_dict())
        assert list(model.config.id2label.values()) == CLASSES and model.dtype == torch.float32


@BOTH
@pytest.mark.parametrize(
    "classes, keep_head",
    [
        (CLASSES[::-1], True),
        ([str(number) for number in range(40)], True),
        (CLASSES, False),
    ],
    ids=["in another order", "more", "the same, asked for"],
)
def test_a_head_starts_fresh_if_the_labels_differ(classes, keep_head, saved):
    """Even if the sizes match."""
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(load_classifier(saved[1], classes, keep_head))
    old, model = stock_class(saved[0], HEAD).from_pretrained(saved[1]).state_dict(), found[0]
    assert list(model.config.id2label.values()) == classes
    assert model.config.num_labels == len(classes)
    deviation = model.config.initializer_range
    for name, weight in head_of(model).items():
        assert weight.shape != old[name].shape or not torch.equal(weight, old[name]), name
        if name.endswith("bias"):
            assert not weight.any(), f"{name} starts at zero"
        else:
            assert weight.abs().max() < 6 * deviation and weight.std() > 0.3 * deviation, name
            assert torch.equal(weight, head_of(found[1])[name]), "of the seed"
            assert not torch.equal(weight, head_of(found[2])[name])
    for name, weight in old.items():  # the encoder stays
        assert name.startswith("classifier") or torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize(
    "family, head", [*((family, "ForMaskedLM") for family in KINDS), ("bert", "Model")]
)
def test_a_pretrained_encoder_is_a_classifier_only_with_a_new_head(family, head, tmp_path):
    stock = stock_classifier(family, head, classes=["LABEL_0", "LABEL_1"])
    stock.save_pretrained(tmp_path)
    refused(load_classifier, str(tmp_path), begins=f"{tmp_path}: ")
    model = load_classifier(str(tmp_path), CLASSES)
    for name, weight in stock.base_model.named_parameters():
        ours = model.base_model.state_dict().get(name)
        assert name.startswith("pooler") or torch.equal(ours, weight), name
    assert model.state_dict().keys() == stock_classifier(family).state_dict().keys()


def test_encoders_with_and_without_a_pooler_get_the_same_head(tmp_path):
    """A missing pooler is drawn, too; a comparison of encoders must not depend on their heads."""
    heads = []
    for head in ("Model", "ForMaskedLM", HEAD):
        stock_classifier("bert", head, classes=["x", "y"]).save_pretrained(tmp_path / head)
        torch.manual_seed(1)
        heads.append(head_of(load_classifier(str(tmp_path / head), CLASSES)))
    for other in heads[1:]:
        assert_equal(heads[0], other)


def test_multi_label_heads_are_not_used(tmp_path):
    stock_classifier("bert", problem_type="multi_label_classification").save_pretrained(tmp_path)
    refused(load_classifier, str(tmp_path), begins=f"{tmp_path}: ")
    config = load_classifier(str(tmp_path), ["a", "b"]).config
    assert config.problem_type == "single_label_classification"


@pytest.mark.parametrize("saved", ["bert"], indirect=True)
@pytest.mark.parametrize("task", ["classification", "regression", "ner"])
def test_a_head_of_another_task_is_not_used(task, saved, tmp_path):
    """Even if its sizes and labels match, as those of a classifier and a tagger may."""
    own = {"classification": CLASSES, "regression": [], "ner": CLASSES}
    torch.manual_seed(7)
    model = load_classifier(saved[1], own[task], task=task)
    model.save_pretrained(tmp_path)
    assert task_of(model.config) == task == task_of(load_config(str(tmp_path)))
    for other, classes in own.items():
        if other == task:
            again = load_classifier(str(tmp_path), classes, task=other)
            assert_equal(again.state_dict(), model.state_dict())
            continue
        refused(load_classifier, str(tmp_path), task=other, begins=f"{tmp_path}: ")
        torch.manual_seed(8)
        fresh = head_of(load_classifier(str(tmp_path), classes, task=other))
        old = head_of(model)
        for name in fresh.keys() & old.keys():
            assert name.endswith("bias") or not torch.equal(fresh[name], old[name]), name


# Regression and tags.


def test_numbers_loss_and_gradients_of_regression_equal_the_stock_model(saved, tmp_path):
    family, folder = saved
    batch = make_batch(pairs=family == "bert")
    numbers = torch.randn(batch.num_sequences, generator=torch.Generator().manual_seed(3))
    batch = replace(batch, labels={"label": numbers})
    load_classifier(folder, [], task="regression").save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["problem_type"] == "regression" and config["id2label"] == {"0": "LABEL_0"}
    model = load_classifier(str(tmp_path)).train()
    stock = stock_class(family, HEAD).from_pretrained(tmp_path).train()
    theirs = stock(**pad(batch, model.config.pad_token_id))
    outputs = model.outputs(model.label_logits(model.encode(batch), batch))
    torch.testing.assert_close(outputs, theirs.logits[:, 0], atol=1e-5, rtol=1e-5)
    assert_same_training(model, batch, stock, theirs)


@BOTH
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_autocast_does_not_round_the_outputs(head, saved, tmp_path):
    """In bf16 with 8 bits, many rows would have the same number."""
    family, _ = saved
    stock_classifier(family, f"For{head}").save_pretrained(tmp_path)
    model, batch = load_classifier(str(tmp_path)), make_batch()
    batch = replace(batch, masked_positions=torch.arange(batch.num_tokens))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.label_logits(model.encode(batch), batch)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).float().mean() > 0.9


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.mark.parametrize("family", KINDS)
def test_tags_loss_and_gradients_equal_the_stock_model_padded(family, tmp_path):
    """Tokens without a tag are IGNORED there, and not even scored here."""
    stock_classifier(family, "ForTokenClassification", TAGS).save_pretrained(tmp_path)
    batch, source = make_batch(), np.random.default_rng(4)
    places = np.flatnonzero(source.random(batch.num_tokens) < 0.6)
    labels = {"label": torch.from_numpy(source.integers(0, len(TAGS), len(places)))}
    positions, counts = torch.from_numpy(places), {"label": float(len(places))}
    batch = replace(batch, masked_positions=positions, labels=labels, counts=counts)
    model = load_classifier(str(tmp_path)).train()
    auto = AutoModelForTokenClassification.from_pretrained(tmp_path)
    stock = stock_class(family, "ForTokenClassification").from_pretrained(tmp_path).train()
    assert type(auto) is type(stock) and isinstance(model, type(stock))
    arguments = pad(batch, model.config.pad_token_id)
    theirs = stock(**arguments)
    is_real = arguments["attention_mask"].bool()
    logits = model.label_logits(model.encode(batch), batch)
    packed = theirs.logits[is_real][positions]
    torch.testing.assert_close(logits, packed, atol=1e-5, rtol=1e-5)
    terms = assert_same_training(model, batch, stock, theirs)
    assert terms["label"].num_correct == (packed.argmax(-1) == labels["label"]).sum()


def test_twelve_labels_are_in_numeric_order(tmp_path):
    """Even if the config sorts its keys as strings ("0", "1", "10", "2"), as some on the hub do."""
    classes = [f"label {number}" for number in range(12)]
    stock_classifier("bert", classes=classes).save_pretrained(tmp_path)
    assert list(load_classifier(str(tmp_path)).config.id2label.values()) == classes
    by_string = dict(sorted((str(number), label) for number, label in enumerate(classes)))
    assert list(by_string)[2] == "10"
    change_json(tmp_path / "config.json", lambda config: config | {"id2label": by_string})
    model, same = load_classifier(str(tmp_path)), load_classifier(str(tmp_path), classes)
    assert list(model.config.id2label.values()) == classes
    assert_equal(head_of(model), head_of(same))  # its own labels, its own head
