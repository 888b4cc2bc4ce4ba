"""Labelled texts: columns and labels as they stand in tables; ids and token types equal those of transformers' tokenizers, cut alike;
a label budget by a slow definition; every epoch every example once; how a step is cut into micro-batches does not matter, with weights
of classes, too."""
import copy
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import assert_close, gradients, roughen, small_config
from transformers import BertForSequenceClassification as Stock

from pretrain.batch import IGNORED
from pretrain.command import UserError
from pretrain.config import LabelOptions
from pretrain.data import labelled
from pretrain.data import tokenizer as tokenizers
from pretrain.data.labelled import LabelledCollator, LabelledDataset, StepSampler, budget_rows, classes_of, label_of, read_labelled, text_of
from pretrain.model.classifier import load_classifier
from pretrain.runtime.optim import autocast, make_optimizer
from pretrain.train import train_step

datasets = pytest.importorskip("datasets")

CPU = torch.device("cpu")


def write(path, rows):
    """Rows as CSV, JSONL or Parquet, by the name."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        tab = "," if path.suffix == ".csv" else "\t"
        path.write_text("\n".join([tab.join(rows[0]), *(tab.join(map(str, row.values())) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


def read(path, classes=None, **options):
    return read_labelled([str(path)], "--train", LabelOptions(**options), classes)


def problem(call, *arguments, **options):
    with pytest.raises(UserError) as told:
        call(*arguments, **options)
    return str(told.value)


# Columns and labels.

@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("labels, read_as, classes", [
    (["sad", "glad", "sad", "calm"], ["sad", "glad", "sad", "calm"], ["calm", "glad", "sad"]),
    ([10, 9, -1, 10], ["10", "9", "-1", "10"], ["-1", "9", "10"]), (["1", "2", "01", "1"], ["1", "2", "01", "1"], ["01", "1", "2"]),
    ([True, False, True, True], ["true", "false", "true", "true"], ["false", "true"]),
    (["b", "B", "é", "b"], ["b", "B", "é", "b"], ["B", "b", "é"]),
], ids=["names", "numbers", "spellings", "truth", "case"])
def test_labels_are_read_alike_in_every_format(labels, read_as, classes, suffix, tmp_path):
    path = write(tmp_path / f"rows{suffix}", [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)])
    if labels[0] is True and suffix in (".csv", ".tsv"):
        read_as, classes = [text.title() for text in read_as], [text.title() for text in classes]  # as they are written
    rows = read(path)
    assert rows.texts == [(f"text {number}",) for number in range(4)] and rows.labels == read_as
    assert classes_of(rows, "--train", [path]) == classes


def test_a_label_is_a_name_or_a_whole_number():
    for value in ("yes", 7, "-7", 0, "v1.5", "情绪", "1,5"):
        assert label_of(value) == str(value)
    assert [label_of(value) for value in (" yes ", True, False, "", "  ", None)] == ["yes", "true", "false", None, None, None]
    for value in (1.0, 0.5, float("nan"), "1.5", "-.5", "+2.0", "1e3", ["a"], [], {"a": 1}, {}):
        with pytest.raises(ValueError, match="^holds "):
            label_of(value)


def test_columns_are_those_asked_for_or_the_one_of_words():
    record = {"id": "7", "title": "a title", "body": "a body", "label": "x", "kind": "y"}

    def chosen(record, **options):
        return labelled.choose_columns(record, "here", LabelOptions(**options))

    assert chosen(record | {"text": "words"}) == ("text",) and chosen({"id": "7", "body": "words", "label": "x"}) == ("body",)
    assert chosen(record, text_field="body") == ("body",)
    assert chosen(record, text_field="title", text_pair_field="body") == ("title", "body")
    assert chosen({"body": "a", "kind": "y", "n": "3"}, label_field="kind") == ("body",), "the label is no text"
    assert chosen({"first": "a", "second": "b", "label": "x"}, text_pair_field="second") == ("first", "second")
    assert problem(chosen, record) == ("here: has no column 'text', it has id, title, body, kind; needed is --text-field with one of these")
    assert problem(chosen, record, text_field="words") == (
        "here: has no column 'words', it has id, title, body, label, kind; needed is one of these as --text-field")
    assert problem(chosen, record, text_field="body", text_pair_field="other") == (
        "here: has no column 'other', it has id, title, body, label, kind; needed is one of these as --text-pair-field")


def test_texts_of_a_row_are_whole_and_halves_of_surrogate_pairs_are_replaced():
    assert text_of({"a": " x\n", "b": "y"}, ("b", "a"), "here") == ("y", " x\n")
    assert text_of({"a": "x\ud83dy"}, ("a",), "here") == ("x?y",)
    for value, held in ((7, "'7'"), (["x"], '"[\'x\']"'), (None, "no text"), ("", "no text"), (" \t", "no text")):
        assert problem(text_of, {"a": "x", "b": value}, ("a", "b"), "here") == f"here: the column b holds {held}; needed is text"
    assert problem(text_of, {"a": "x"}, ("a", "b"), "here") == "here: has no column 'b', it has a; needed are those of the first row"


def test_files_are_read_in_the_order_given_and_each_row_that_is_wrong_is_told(tmp_path):
    later = write(tmp_path / "a.csv", [{"text": "one", "label": "x"}, {"text": " ", "label": "x"}, {"text": "two", "label": ""}])
    first = write(tmp_path / "b.jsonl", [{"text": "three", "label": "y"}, {"text": "four", "label": 1.5}, {"text": 4, "label": "y"}])
    told = problem(read_labelled, [first, later], "--valid", LabelOptions(), ["y"])
    assert told.splitlines() == [
        f"--valid {first}, line 2: the column label holds '1.5'; needed is a name or a whole number",
        f"--valid {first}, line 3: the column text holds '4'; needed is text",
        f"--valid {later}, line 2: the label 'x' does not occur in --train; there are y",
        f"--valid {later}, line 3: the column text holds no text; needed is text",
        f"--valid {later}, line 4: has no label; needed is a name or a whole number in the column label"]
    good = [write(tmp_path / name, [{"text": text, "label": "y"}]) for name, text in (("z.csv", "last"), ("c.jsonl", "mid"))]
    assert read_labelled(good, "--train", LabelOptions()).texts == [("last",), ("mid",)]


def test_a_file_without_the_column_is_told_once(tmp_path):
    good = write(tmp_path / "a.csv", [{"text": "one", "label": "x"}])
    other = write(tmp_path / "b.csv", [{"text": "one", "kind": "x"}] * 3)
    told = f"--train {other}, line 2: has no column 'label', it has text, kind; needed is one of these as --label-field"
    assert problem(read_labelled, [good, other], "--train", LabelOptions()) == told == problem(read, other)
    assert problem(read, other, text_field="body", label_field="kind").count("\n") == 0


@pytest.mark.parametrize("labels, kinds", [
    (["x", "3", "4", "y"], "the name 'x' ({path}, line 1) with the whole number '3' ({path}, line 2)"),
    ([True, 1, False, 0], "the boolean 'true' ({path}, line 1) with the whole number '1' ({path}, line 2)"),
    (["true", True, 7], "the name 'true' ({path}, line 1) with the boolean 'true' ({path}, line 2) with the whole number '7' ({path}, "
     "line 3)"),
], ids=["names", "truth", "all"])
def test_kinds_of_labels_do_not_mix_in_train_alone(labels, kinds, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "one", "label": label} for label in labels])
    assert problem(read, path) == f"--train: the column label mixes {kinds.format(path=path)}; needed is one kind"
    names = [label_of(label) for label in labels]
    assert read(path, classes=names).labels == names, "what --train has is right elsewhere"


@pytest.mark.parametrize("labels, message", [
    (["x"] * 3, "all 3 rows have the label 'x'; needed are two classes at least"),
    (["a", "b", "c"], "3 different labels in 3 rows, such as 'a'; needed are classes, at most 1000, with several rows each (is "
     "--label-field right?)"),
    ([str(number // 2) for number in range(2002)], "1,001 different labels in 2,002 rows, such as '0'; needed are classes, at most 1000, "
     "with several rows each (is --label-field right?)"),
    (["a", "b"], None), (["a", "b", "c", "c"], None), ([str(number // 2) for number in range(2000)], None),
], ids=lambda value: "told" if isinstance(value, str) else None)
def test_what_is_no_set_of_classes_is_told(labels, message):
    rows = labelled.Labelled([("words",)] * len(labels), labels)
    if message is None:
        assert len(classes_of(rows, "--train", [])) == len(set(labels))
    else:
        assert problem(classes_of, rows, "--train", ["a.csv", "b.csv"]) == f"--train a.csv b.csv: {message}"


# Label budget.

LABELS = st.lists(st.sampled_from("aaaaabbc"), min_size=2, max_size=60).filter(lambda labels: len(set(labels)) > 1)


@settings(max_examples=80, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 2**40), data=st.data())
def test_a_budget_is_in_proportion_nested_and_of_its_seed(labels, seed, data):
    """Row for row it takes the class of which the smallest share is taken: no class is ahead of another by more than a row."""
    sizes = Counter(labels)
    budget = data.draw(st.integers(len(sizes), len(labels)))
    rows = budget_rows(labels, budget, seed)
    assert len(set(rows.tolist())) == budget == len(rows) and rows.min() >= 0 and rows.max() < len(labels)
    assert budget_rows(labels, len(labels), seed)[:budget].tolist() == rows.tolist(), "the first rows of a larger one"
    taken = Counter(labels[row] for row in rows)
    assert taken.keys() == sizes.keys()
    for one in sizes:
        for other in sizes:
            assert taken[other] == sizes[other] or (taken[one] - 1) / sizes[one] <= taken[other] / sizes[other]
        share = budget * sizes[one] / len(labels)
        assert share - len(sizes) * sizes[one] / len(labels) <= taken[one] <= share + 1
    names = [f"name of {label}" for label in labels]
    assert budget_rows(names, budget, seed).tolist() == rows.tolist(), "whatever the classes are called"


def test_budgets_of_other_seeds_are_other_rows_and_every_row_has_its_chance():
    labels, drawn = ["a"] * 30 + ["b"] * 10, Counter()
    for seed in range(200):
        rows = budget_rows(labels, 8, seed)
        assert Counter(labels[row] for row in rows) == {"a": 6, "b": 2}
        drawn.update(rows.tolist())
    assert len(drawn) == 40 and max(drawn.values()) < 75  # 40 are expected; beyond 75 there are 6 deviations
    assert len({tuple(budget_rows(labels, 8, seed)) for seed in range(200)}) == 200


# Ids.

@pytest.fixture(scope="module")
def texts(documents):
    """Texts of 1 to some 300 tokens, one or two parts."""
    sentences = [sentence for document in documents for sentence in document]
    joined = [" ".join(sentences[start: start + 1 + start % 3])[:500] for start in range(24)]
    return [*joined, "bank", "河流 bank 银行", "Bank's  RIVER\n\tmoney?", "zzz 🙂"]


@pytest.mark.parametrize("max_length", [14, 64, 1000])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["tiny_tokenizer", "roberta_tokenizer", "xlm_roberta_tokenizer"])
def test_ids_and_types_equal_those_of_transformers(name, parts, max_length, texts, request, monkeypatch):
    monkeypatch.setattr(tokenizers, "ENCODED_TOGETHER", 7)
    tokenizer = copy.deepcopy(request.getfixturevalue(name))
    given_texts = [(text,) if parts == 1 else (text, other) for text, other in zip(texts, reversed(texts))]
    tokenizer("whatever", truncation=True, max_length=3, padding="max_length")  # leaves its limits set
    dataset = LabelledDataset(given_texts, tokenizer, max_length, np.arange(len(texts)))
    tokenizer.model_max_length = 10**9
    cut, arguments = 0, {"return_token_type_ids": True, "padding": False}
    for number, text in enumerate(given_texts):
        expected = tokenizer(*text, truncation=True, max_length=max_length, **arguments)
        ids, types, label = dataset[number]
        assert (ids.tolist(), types.tolist(), label) == (expected["input_ids"], expected["token_type_ids"], number)
        cut += len(tokenizer(*text, truncation=False, **arguments)["input_ids"]) > max_length
    assert dataset.num_cut == cut and len(dataset) == len(texts) and (cut > 0) is (max_length < 1000)
    assert max(len(dataset[number][0]) for number in range(len(texts))) <= max_length
    bare = LabelledDataset(given_texts, tokenizer, max_length)
    assert all(bare[number][2] == IGNORED for number in range(len(texts)))


def test_a_tokenizer_that_cuts_on_the_left_cuts_there(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.truncation_side = "left"
    for text in (("bank river money water teach learn model token mask",), ("bank river money water", "teach learn model token mask")):
        ids, _, _ = LabelledDataset([text], tokenizer, 8)[0]
        assert ids.tolist() == tokenizer(*text, truncation=True, max_length=8)["input_ids"] != tokenizer(*text)["input_ids"]


# Steps.

@settings(max_examples=60, deadline=None)
@given(num_examples=st.integers(1, 50), batch_size=st.integers(1, 60), seed=st.integers(0, 2**40))
def test_each_epoch_has_every_example_once_and_its_last_step_the_rest(num_examples, batch_size, seed):
    per_epoch = -(-num_examples // batch_size)
    steps = list(islice(StepSampler(num_examples, batch_size, seed), 3 * per_epoch))
    sizes = [batch_size] * (per_epoch - 1) + [num_examples - batch_size * (per_epoch - 1)]
    orders = []
    for epoch in range(3):
        part = steps[epoch * per_epoch: (epoch + 1) * per_epoch]
        assert [len(step) for step in part] == sizes
        orders.append([example for step in part for example in step])
        assert sorted(orders[-1]) == list(range(num_examples))
    if num_examples > 20:
        other = list(islice(StepSampler(num_examples, num_examples, seed + 1), 1))[0]
        assert orders[0] != orders[1] != orders[2] != orders[0] and other not in (*orders, list(range(num_examples)))
    again = StepSampler(num_examples, 1, seed)
    assert [example for step in islice(again, 3 * num_examples) for example in step] == sum(orders, []), "whatever the batch"


def make_examples(count=32, size=100, seed=4):
    source = np.random.default_rng(seed)
    return [(source.integers(5, size, length).astype(np.uint32), (np.arange(length) > length // 2).astype(np.uint8),
             source.choice([0, 0, 0, 1, 2]))
            for length in source.integers(3, 40, count)]


@pytest.mark.parametrize("weights", [None, np.array([0.5, 2.0, 5.0])], ids=["plain", "weighted"])
@pytest.mark.parametrize("micro_batch_size", [1, 5, 32, 99])
def test_examples_are_packed_end_to_end(micro_batch_size, weights):
    examples = make_examples()
    examples[3] = (*examples[3][:2], IGNORED)
    batches = LabelledCollator(40, micro_batch_size, weights)(examples)
    assert [batch.num_sequences for batch in batches] == [len(examples[start: start + micro_batch_size])
                                                          for start in range(0, 32, micro_batch_size)]
    number = 0
    for batch in batches:
        assert batch.max_length == 40 and batch.num_tokens == len(batch.input_ids) == sum(batch.lengths) == batch.cu_seqlens[-1]
        assert batch.cu_seqlens.dtype == torch.int32
        assert {batch.input_ids.dtype, batch.token_type_ids.dtype, batch.position_ids.dtype, batch.label.dtype} == {torch.int64}
        mine, number = examples[number: number + batch.num_sequences], number + batch.num_sequences
        for place, (ids, types, label) in enumerate(mine):
            start, end = batch.cu_seqlens[place: place + 2].tolist()
            assert batch.input_ids[start:end].tolist() == ids.tolist() and batch.token_type_ids[start:end].tolist() == types.tolist()
            assert batch.position_ids[start:end].tolist() == list(range(len(ids))) and batch.label[place] == label
            assert batch.lengths[place] == len(ids)
        known = [label for *_, label in mine if label != IGNORED]
        assert batch.counts == {"label": pytest.approx(len(known) if weights is None else sum(weights[label] for label in known))}
    assert number == 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A BERT with a head for three classes, without dropout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(5)
    roughen(Stock(small_config(100, num_labels=3))).save_pretrained(folder)
    return folder


def step(model, batches, max_grad_norm=1.0):
    """One update; weight decay as in fine-tuning."""
    return train_step(model, model.loss_weights, batches, make_optimizer(model, 1e-3, 0.01, [0.9, 0.999], 1e-6),
                      torch.amp.GradScaler("cpu", enabled=False), autocast(CPU, "fp32"), 1e-3, max_grad_norm, CPU)


@pytest.mark.parametrize("weights", [None, [0.3, 1.0, 4.0]], ids=["plain", "weighted"])
def test_the_update_is_that_of_torchs_mean_however_the_step_is_cut(weights, checkpoint):
    """A mean of the micro-batches' means differs: their classes, and so their weights, do."""
    examples, results = make_examples(), {}
    for size in (32, 8, 5):
        model = load_classifier(str(checkpoint)).train()
        model.class_weights = {} if weights is None else {"label": torch.tensor(weights)}
        batches = LabelledCollator(40, size, None if weights is None else np.array(weights))(examples)
        assert len({batch.counts["label"] for batch in batches}) > (size < 32) * (weights is not None)
        results[size] = step(model, batches), dict(model.named_parameters())
    for result, after in results.values():
        assert_close(after, results[32][1], atol=1e-6, rtol=0.0)
        torch.testing.assert_close(result.grad_norm, results[32][0].grad_norm, rtol=1e-5, atol=0.0)

    stock = Stock.from_pretrained(checkpoint).train()
    logits = torch.cat([stock(input_ids=torch.from_numpy(ids.astype(np.int64))[None],
                              token_type_ids=torch.from_numpy(types.astype(np.int64))[None]).logits for ids, types, _ in examples])
    labels = torch.tensor([int(label) for *_, label in examples])
    loss = F.cross_entropy(logits, labels, weight=None if weights is None else torch.tensor(weights))
    loss.backward()
    norm = torch.stack([gradient.norm() for gradient in gradients(stock).values()]).norm()
    torch.testing.assert_close(results[8][0].grad_norm, norm, rtol=1e-4, atol=0.0)
    sums = results[8][0].sums
    assert (sums["label_loss"] / sums["label_count"]).item() == pytest.approx(loss.item(), rel=1e-5)
    assert sums["label_correct"] == (logits.argmax(-1) == labels).sum()


@pytest.mark.parametrize("weight", [3.0, 0.25])
def test_a_step_of_one_example_has_the_loss_of_that_example_whatever_its_class_weighs(weight, checkpoint):
    """The last step of an epoch may hold one example; torch's weighted mean of one is its loss."""
    norms, examples = [], [(*make_examples()[0][:2], 0)]
    for weights in (None, [weight, 1.0, 1.0]):
        model = load_classifier(str(checkpoint)).train()
        model.class_weights = {} if weights is None else {"label": torch.tensor(weights)}
        norms.append(step(model, LabelledCollator(40, 1, None if weights is None else np.array(weights))(examples)).grad_norm)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0.0)
