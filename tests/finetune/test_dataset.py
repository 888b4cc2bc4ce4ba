"""Labeled texts: columns and labels of tables; ids and token types equal the tokenizers of
transformers; a label budget equals a slow definition; every epoch has every example once; the
micro-batch size does not change a step, even with class weights."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import at, refused, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import assert_close, gradients, roughen, small_config
from transformers import BertForSequenceClassification as Stock

from pretrain.batch import IGNORED
from pretrain.config import LabelOptions
from pretrain.data import tokenizer as tokenizers
from pretrain.data.sentences import in_groups
from pretrain.finetune import dataset as module
from pretrain.finetune.dataset import (
    LabeledDataset,
    LabeledRows,
    LabeledSteps,
    budget_rows,
    choose_columns,
    classes_of,
    pack,
    read_texts,
)
from pretrain.finetune.heads import load_classifier
from pretrain.finetune.tasks import TASKS
from pretrain.runtime.optim import autocast
from pretrain.train import train_step

datasets = pytest.importorskip("datasets")

CPU = torch.device("cpu")


def read(*paths, classes=None, **options):
    rows = [str(path) for path in paths]
    return TASKS["classification"].read(rows, LabelOptions(**options), classes)


def problems(call, *arguments, **options):
    """The lines of the UserError."""
    return refused(call, *arguments, **options).splitlines()


def texts_of(path, **options):
    return [texts for *_, texts in read_texts([str(path)], LabelOptions(**options), [])]


# Columns and labels.


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "labels, read_as, classes",
    [
        ([10, 9, -1, 10], ["10", "9", "-1", "10"], ["-1", "9", "10"]),
        (["+1", "-1", "+1", "0"], ["+1", "-1", "+1", "0"], ["-1", "0", "+1"]),
        ([True, False, True, True], ["true", "false", "true", "true"], ["false", "true"]),
        (["b", "B", "é", "b"], ["b", "B", "é", "b"], ["B", "b", "é"]),
    ],
    ids=["numbers", "signs", "booleans", "case"],
)
def test_labels_are_the_same_in_every_format(labels, read_as, classes, suffix, tmp_path):
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    if labels[0] is True and suffix in (".csv", ".tsv"):  # written as Python does
        read_as, classes = [of.title() for of in read_as], [of.title() for of in classes]
    found = read(write_rows(tmp_path / f"rows{suffix}", rows))
    assert found.texts == [(f"text {number}",) for number in range(4)] and found.labels == read_as
    assert found.classes == classes


GOOD = ["yes", "-7", "v1.5", "情绪", "1,5", 7, 0, " yes ", True, False]
WRONG = ["", None, 1.0, float("nan"), "1.5", "-.5", "+2.0", "1e3", ["a"], [], {"a": 1}, {}, "other"]


def test_a_label_is_a_name_or_a_whole_number(tmp_path):
    path = tmp_path / "a.jsonl"
    read_as = [value if isinstance(value, str) else json.dumps(value) for value in GOOD]
    classes = [label.strip() for label in read_as]
    write_rows(path, [{"text": "x", "label": value} for value in GOOD])
    assert read(path, classes=classes).labels == classes
    write_rows(path, [{"text": "x", "label": value} for value in [*WRONG, "yes"]])
    wheres = [f"{path}, line {number}" for number in range(1, len(WRONG) + 1)]
    for known, expected in ((classes, wheres), (None, wheres[:-1])):
        found = problems(read, path, classes=known)
        assert [line.partition(":")[0] for line in found] == expected


def test_columns_are_named_or_the_only_one_with_words():
    record = {"id": "7", "title": "a title", "body": "a body", "label": "x", "kind": "y"}

    def chosen(record, **options):
        return choose_columns(record, "here", LabelOptions(**options))

    assert chosen(record | {"text": "words"}) == ("text",)
    assert chosen({"id": "7", "body": "words", "label": "x"}) == ("body",)
    assert chosen({"body": "a", "kind": "y", "n": "3"}, label_field="kind") == ("body",)
    assert chosen(record, text_field="title", text_pair_field="body") == ("title", "body")
    pair = {"first": "a", "second": "b", "label": "x"}
    assert chosen(pair, text_pair_field="second") == ("first", "second")
    for name, options in (
        ("text", {}),
        ("words", {"text_field": "words"}),
        ("other", {"text_field": "body", "text_pair_field": "other"}),
    ):
        (line,) = problems(chosen, record, **options)
        assert line.startswith("here: ") and repr(name) in line


def test_files_are_read_in_the_order_given_and_each_wrong_row_is_listed(tmp_path):
    texts = [7, ["x"], None, "", " \t", "good"]
    rows = [{"text": text, "b": "y", "label": "y"} for text in texts]
    first = write_rows(tmp_path / "z.jsonl", rows)
    rows = [{"text": text, "b": "y", "label": label} for text, label in (("x", ""), ("x", "y"))]
    later = write_rows(tmp_path / "a.csv", rows)
    found = problems(read, first, later, classes=["y"])
    wheres = [*(f"{first}, line {number}" for number in range(1, 6)), f"{later}, line 2"]
    assert [line.partition(":")[0] for line in found] == wheres
    assert len(problems(read, first, text_field="b", text_pair_field="text", classes=["y"])) == 5


@pytest.mark.parametrize("name", ["text", "label"])
def test_a_missing_column_is_reported_once(tmp_path, name):
    row = {"text": "one", "label": "x"}
    good = write_rows(tmp_path / "a.csv", [row])
    other = write_rows(tmp_path / "b.csv", [{"kind": row.pop(name), **row}] * 3)
    (line,) = problems(read, good, other, text_field="text")
    assert line.startswith(f"{other}, line 1: ") and f"{name}_field" in line and "kind" in line


def test_a_sentence_in_place_of_the_header_is_no_column(tmp_path):
    """A name of the same length in JSON is meant, and so is one that is given."""
    sentences = [f"the {place} of the river is long" for place in ("bank", "bed", "bend")]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(sentences))
    (line,) = problems(texts_of, path)
    assert line.startswith(f"{path}, line 1: ") and "text_field" in line
    assert texts_of(path, text_field=sentences[0]) == [(text,) for text in sentences[1:]]
    assert texts_of(write_rows(tmp_path / "a.jsonl", [{sentences[0]: "words"}])) == [("words",)]


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_another_task_are_one_problem(task, tmp_path):
    """Names, numbers and entities; each is read as the two others."""
    kinds = {"classification": "name", "regression": 1.5, "ner": [[0, 3, "X"]]}
    for kind in kinds.keys() - {task}:
        rows = [{"text": f"one {number}", "label": kinds[kind]} for number in range(5)]
        path = write_rows(tmp_path / f"{kind}.jsonl", rows)
        (line,) = problems(TASKS[task].read, [path], LabelOptions())
        assert line.startswith(f"{path}, line 1: ") and "right task" in line


@pytest.mark.parametrize(
    "labels, wheres", [(["x", "3", "4", "y"], [1, 2]), ([True, False, 0, 1], [1, 3])]
)
def test_mixed_kinds_of_labels_are_refused(labels, wheres, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one", "label": label} for label in labels])
    (line,) = problems(read, path)
    shown = [number for number in range(1, 5) if f"({path}, line {number})" in line]
    assert line.startswith(f"{path}: ") and shown == wheres


def test_the_number_of_classes_is_checked():
    """At least two, at most 1,000, and for more than two some label that repeats."""
    many = [str(number // 2) for number in range(2002)]
    for labels in (["x"] * 3, ["a", "b", "c"], many):
        refused(classes_of, labels, "here", begins="here: ")
    for labels in (["a", "b"], ["a", "b", "c", "c"], many[:2000]):
        assert len(classes_of(labels, "here")) == len(set(labels))


# Label budget.

LABELS = st.lists(st.sampled_from("aaaaabbc"), min_size=2, max_size=60).filter(
    lambda labels: len(set(labels)) > 1
)


@settings(max_examples=80, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 2**40), data=st.data())
def test_a_budget_is_proportional_nested_and_seeded(labels, seed, data):
    """Row for row it takes the class of which the smallest share is taken, so no class is ahead of
    another by more than a row."""
    sizes = Counter(labels)
    budget = data.draw(st.integers(len(sizes), len(labels)))
    rows = budget_rows(labels, budget, seed).tolist()
    assert len(set(rows)) == budget == len(rows) and set(rows) <= set(range(len(labels)))
    assert budget_rows(labels, len(labels), seed)[:budget].tolist() == rows
    names = [f"name of {label}" for label in labels]
    assert budget_rows(names, budget, seed).tolist() == rows, "whatever the classes are called"
    taken = Counter(labels[row] for row in rows)
    assert taken.keys() == sizes.keys()
    for one, size in sizes.items():
        for other in sizes:
            is_behind = (taken[one] - 1) / size <= taken[other] / sizes[other]
            assert is_behind or taken[other] == sizes[other]
        share = budget * size / len(labels)
        assert share - len(sizes) * size / len(labels) <= taken[one] <= share + 1


# Ids.


@pytest.fixture(scope="module")
def texts(all_sentences):
    """Texts of 1 to about 300 tokens."""
    joined = [" ".join(all_sentences[start : start + 1 + start % 3])[:500] for start in range(24)]
    return [*joined, "bank", "河流 bank 银行", "Bank's  RIVER\n\tmoney?", "zzz 🙂"]


@pytest.mark.parametrize(
    "parts, max_length, side", [(1, 14, "right"), (2, 64, "left"), (2, 1000, "right")]
)
@pytest.mark.parametrize("name", ["tiny_tokenizer", "roberta_tokenizer", "xlm_roberta_tokenizer"])
def test_ids_and_types_equal_those_of_transformers(
    name, parts, max_length, side, texts, request, monkeypatch
):
    monkeypatch.setattr(tokenizers, "ENCODED_TOGETHER", 7)
    tokenizer = copy.deepcopy(request.getfixturevalue(name))
    given_texts = [pair[:parts] for pair in zip(texts, reversed(texts))]
    tokenizer("limits", truncation=True, max_length=3, padding="max_length")  # which stay set
    tokenizer.model_max_length, tokenizer.truncation_side = max_length, side
    labels = [str(number) for number in range(len(texts))]
    dataset = LabeledDataset(LabeledRows(given_texts, labels, labels), tokenizer)
    tokenizer.model_max_length = 10**9
    cut, arguments = 0, {"return_token_type_ids": True, "padding": False}
    for number, text in enumerate(given_texts):
        stock = tokenizer(*text, truncation=True, max_length=max_length, **arguments)
        ids, types, label = dataset.examples[number]
        assert ids.tolist() == stock["input_ids"] and label == number
        assert types.tolist() == stock["token_type_ids"]
        cut += len(tokenizer(*text, truncation=False, **arguments)["input_ids"]) > max_length
    assert dataset.num_cut == cut and (cut > 0) is (max_length < 1000)
    assert len(dataset) == len(texts)
    known = LabeledDataset(LabeledRows(given_texts, labels, labels[1:3]), tokenizer).labels
    assert known.tolist() == [IGNORED, 0, 1, *[IGNORED] * (len(texts) - 3)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_long_text_only_the_part_in_use_is_tokenized(side, tiny_tokenizer, monkeypatch):
    """Else a cell of tens of MB would take GB."""
    monkeypatch.setattr(module, "MAX_CHARACTERS", 100)
    tokenizer, sizes = copy.deepcopy(tiny_tokenizer), []
    tokenizer.truncation_side, tokenizer.model_max_length = side, 8

    def note(backend, texts):
        sizes.extend(map(tokenizers.characters_of, texts))

    at(module, "encode_together", 0, note, monkeypatch.setattr)()
    text = "bank river money " * 100 + "teach learn model"
    dataset = LabeledDataset(LabeledRows([(text,)], [""], ["a", "b"]), tokenizer)
    stock = tokenizer(text, truncation=True, max_length=8)["input_ids"]
    assert dataset.examples[0][0].tolist() == stock and dataset.num_cut == 1 and sizes == [100]


def test_long_texts_are_encoded_in_small_groups():
    texts = ["x" * size for size in (4, 6, 1, 30, 2, 2, 2, 2)]
    groups = list(in_groups(texts, len, 10, 3))
    assert [list(map(len, group)) for group in groups] == [[4, 6], [1], [30], [2, 2, 2], [2]]
    assert list(in_groups([], len, 10, 3)) == []


# Steps.


class Rows(list):
    """Replaces a dataset: its examples are row numbers."""

    def micro_batches(self, rows, size):
        return [rows[start : start + size] for start in range(0, len(rows), size)]


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 50),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_each_epoch_has_every_row_once(num_rows, batch_size, seed, data):
    rows, per_epoch = Rows(range(num_rows)), -(-num_rows // batch_size)
    whole = LabeledSteps(rows, batch_size, 3, seed)
    steps = [sum(next(whole), []) for _ in range(3 * per_epoch)]
    sizes = [batch_size] * (per_epoch - 1) + [num_rows - batch_size * (per_epoch - 1)]
    orders = []
    for epoch in range(3):
        part = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert [len(step) for step in part] == sizes
        orders.append(sum(part, []))
        assert sorted(orders[-1]) == list(range(num_rows))
    if num_rows > 20:
        other = next(LabeledSteps(rows, num_rows, num_rows, seed + 1))[0]
        assert all(left != right for left, right in zip([*orders, other], [*orders[1:], orders[0]]))
    single = LabeledSteps(rows, 1, 1, seed)
    assert [next(single)[0][0] for _ in range(3 * num_rows)] == sum(orders, []), "for any batch"
    resumed, step = LabeledSteps(rows, batch_size, 3, seed), data.draw(st.integers(0, len(steps)))
    resumed.load_state_dict({"step": step})
    assert [sum(next(resumed), []) for _ in steps[step:]] == steps[step:]
    assert resumed.state_dict() == whole.state_dict() == {"step": len(steps)}


def make_examples(count=32):
    source, examples = np.random.default_rng(4), []
    for length in source.integers(3, 40, count):
        ids = source.integers(5, 100, length).astype(np.uint32)
        types = (np.arange(length) > length // 2).astype(np.uint8)
        examples.append((ids, types, source.choice([0, 0, 0, 1, 2])))
    return examples


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A BERT with a head for three classes, without dropout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(5)
    roughen(Stock(small_config(100, num_labels=3))).save_pretrained(folder)
    return folder


def step(checkpoint, examples, size, weights=None):
    """(model after one update by micro-batches of `size`, its result, its micro-batches)."""
    model = load_classifier(str(checkpoint)).train()
    if weights is not None:
        weights = np.array(weights)
        model.class_weights = torch.from_numpy(weights).float()
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    batches = [pack(part, 40, weights) for part in parts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = train_step(model, batches, [optimizer], scaler, autocast(CPU, "fp32"), 1e-3, 1.0, CPU)
    return model, result, batches


def norm_of(result):
    return result.logged["optim/grad_norm"]


@pytest.mark.parametrize("weights", [None, [0.3, 1.0, 4.0]], ids=["plain", "weighted"])
def test_the_update_equals_torchs_mean_for_any_micro_batch_size(weights, checkpoint):
    """A mean of the micro-batches' means differs: their classes, and so their weights, do."""
    examples = make_examples()
    whole, whole_result, _ = step(checkpoint, examples, 32, weights)
    for size in (8, 31):  # the last one holds one example
        model, result, batches = step(checkpoint, examples, size, weights)
        assert weights is None or len({batch.counts["label"] for batch in batches}) > 1
        assert_close(
            dict(model.named_parameters()), dict(whole.named_parameters()), atol=1e-6, rtol=0.0
        )
        torch.testing.assert_close(norm_of(result), norm_of(whole_result), rtol=1e-5, atol=0.0)

    stock, logits = Stock.from_pretrained(checkpoint).train(), []
    for ids, types, _ in examples:
        ids, types = (torch.from_numpy(of.astype(np.int64))[None] for of in (ids, types))
        logits.append(stock(input_ids=ids, token_type_ids=types).logits)
    logits, labels = torch.cat(logits), torch.tensor([int(label) for *_, label in examples])
    weight = None if weights is None else torch.tensor(weights)
    loss = F.cross_entropy(logits, labels, weight=weight)
    loss.backward()
    norm = torch.stack([gradient.norm() for gradient in gradients(stock).values()]).norm()
    torch.testing.assert_close(norm_of(whole_result), norm, rtol=1e-4, atol=0.0)
    totals = whole_result.losses
    mean = (totals.sums["label"] / totals.counts["label"]).item()
    assert mean == pytest.approx(loss.item(), rel=1e-5)
    assert totals.num_correct["label"] == (logits.argmax(-1) == labels).sum()
