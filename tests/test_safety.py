"""Untrusted folders: damage anywhere in a corpus is found and the file named. Nothing in a folder
runs, escapes it or allocates too much. Whatever its JSON says, a command works or prints what is
wrong."""

import copy
import functools
import json
import operator
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change_json, refusal, refused, save, script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_reference import small_stock

from pretrain.data import tokenizer as tokenizers
from pretrain.data.corpus import ARRAYS, Corpus, load_tokenizer, open_corpus, seal
from pretrain.data.prepare import prepare
from pretrain.data.sources import check_files
from pretrain.errors import UserError, refusing
from pretrain.files import sha256_of
from pretrain.finetune.heads import load_classifier
from pretrain.model.bert import BertForPreTraining
from pretrain.model.loading import from_checkpoint
from pretrain.runtime.checkpoint import FACTS, FACTS_FORM, read_facts
from pretrain.schema import misfit

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LAYERS_DEEP = json.loads('{"a":' * 200 + "0" + "}" * 200)
NUMBERS = [-1, 0, 1, 7, 0.5, 2**31, 10**9, 2**63, 2**64, 10**18, 10**400, 1e308]
TEXTS = ["", "x", "../x", "/etc/passwd", "..", "\0", "\ud800", "x" * 5000]
NESTED = [[], {}, [[]], ["x"] * 3, {"x": 1}, LAYERS_DEEP]
VALUES = [None, True, False, *NUMBERS, float("nan"), float("inf"), *TEXTS, *NESTED]


def places(value, at=()):
    """Keys of everything inside `value`."""
    keys = value if isinstance(value, dict) else ()
    for key in range(len(value)) if isinstance(value, list) else keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def put(value, place, new):
    """`value` with a new item at a place, or without the item there."""
    if not place:
        return new
    *above, last = place
    inner = functools.reduce(operator.getitem, above, value)
    if isinstance(new, str) and new == "drop":
        del inner[last]
    else:
        inner[last] = copy.deepcopy(new)
    return value


@st.composite
def mutations(draw):
    """A function that changes one to three places of a JSON value: dropped, or of another type,
    size or sign."""
    place, new = st.floats(0, 1, exclude_max=True), st.sampled_from(["drop", *VALUES])
    steps = draw(st.lists(st.tuples(place, st.booleans(), new), min_size=1, max_size=3))

    def mutate(value):
        value = copy.deepcopy(value)
        for share, is_shallow, new in steps:
            found = [place for place in places(value) if not is_shallow or len(place) < 3]
            if found:
                put(value, found[int(share * len(found))], new)
        return value

    return mutate


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# Corpora.


@pytest.fixture(scope="module")
def source(text_file, tiny_tokenizer, tmp_path_factory):
    """A corpus of two shards."""
    folder = tmp_path_factory.mktemp("safety") / "corpus"
    prepare(check_files([text_file]), "sentences", tiny_tokenizer, folder, piece_bytes=60_000)
    return folder


@pytest.fixture
def corpus_copy(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "corpus"))


def read_all(folder):
    """Read everything in a corpus, in all ways that commands read it."""
    corpus, vocabulary = Corpus(folder), tokenizers.describe(load_tokenizer(folder))
    open_corpus(folder, vocabulary)
    shards = [part.select(1000) for part in (corpus, *corpus.split(0.3)) if part.count()]
    shards += [corpus.shard(index) for index in range(corpus.num_shards)]
    for shard in shards:
        assert vocabulary.is_special[shard.ids].shape == shard.flags.shape
    content = [[getattr(shard, name).tolist() for name in ARRAYS] for shard in shards]
    return content, vocabulary.fingerprint


def damaged(raw):
    """The content of a file after some damage."""
    ways = {"removed": None, "empty": b"", "half": raw[: len(raw) // 2]}
    ways |= {"cut short": raw[:-1], "longer": raw + b"\0"}
    flips = ((0, 1), (len(raw) // 3, 64), (len(raw) - 1, 16))
    for place, bit in flips:
        flipped = bytes([raw[place] ^ bit])
        ways[f"bit of byte {place}"] = raw[:place] + flipped + raw[place + 1 :]
    return ways


def test_damage_to_any_file_of_a_corpus_is_named(source, corpus_copy):
    """Changed white space in the manifest does not matter; any other damage is found."""
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    expected, harmless = read_all(source), []
    assert len(files) > 10 and Path("tokenizer/tokenizer.json") in files
    for name in files:
        path, raw = corpus_copy / name, (source / name).read_bytes()
        for damage, content in damaged(raw).items():
            path.unlink() if content is None else path.write_bytes(content)
            try:
                assert read_all(corpus_copy) == expected
                harmless.append((str(name), damage))
            except UserError as error:
                assert str(path) in str(error).split(";")[0], (name, damage)
            path.write_bytes(raw)
    assert len(harmless) <= 3
    assert all(name == "corpus.json" and "byte" in damage for name, damage in harmless)
    assert read_all(corpus_copy) == expected


def test_a_changed_number_in_the_manifest_is_detected(corpus_copy):
    path = corpus_copy / "corpus.json"
    change_json(path, lambda info: {**info, "tokens": info["tokens"] * 2})
    refused(Corpus, corpus_copy, names=path)


@pytest.fixture
def rewrite(corpus_copy):
    """Change the manifest and its checksum, as an attacker would; returns its path."""
    path = corpus_copy / "corpus.json"
    original = path.read_text()

    def apply(change):
        info = json.loads(original)
        change(info)
        path.write_text(json.dumps(seal(info)))
        return path

    return apply


@pytest.mark.parametrize("entry", ["shards", "tokenizer_files"])
def test_no_name_in_a_manifest_escapes_the_folder(corpus_copy, rewrite, entry):
    for name in ("../corpus/shard-00000", "/etc/passwd", "..", 7):
        path = rewrite(lambda info, name=name: info[entry][0].update(name=name))
        assert f"{entry}[0].name" in refused(Corpus, corpus_copy, names=path)


def hostile(name, array):
    """Arrays that may stand in place of a good one: other types and shapes, objects, offsets that
    fall or lead out of the arrays, ids that no vocabulary has."""
    yield from (array[:-1], array[:, None])
    yield from (array.astype(kind) for kind in (">i4", "f8", "S4", object))
    if name in ("ids", "sentences", "documents"):
        yield np.full_like(array, np.iinfo(array.dtype).max)
    if name in ("sentences", "documents"):
        yield from (array[::-1].copy(), array + 1, np.zeros_like(array))


def write_array(path, rewrite, raw):
    """Replace an array by other bytes, with a fitting hash in the manifest."""
    path.write_bytes(raw)
    entry = {path.name.split(".")[1]: {"bytes": len(raw), "sha256": sha256_of(path)}}
    rewrite(lambda info: info["shards"][0]["arrays"].update(entry))


@pytest.mark.parametrize("name", ARRAYS)
def test_hostile_arrays_with_fitting_hashes(source, corpus_copy, rewrite, name, tmp_path):
    path = corpus_copy / f"shard-00000.{name}.npy"
    for array in hostile(name, np.load(source / path.name)):
        np.save(tmp_path / "array.npy", array, allow_pickle=True)
        write_array(path, rewrite, (tmp_path / "array.npy").read_bytes())
        refused(read_all, corpus_copy, names=path)


def test_a_file_that_is_not_an_array(corpus_copy, rewrite, tmp_path):
    np.savez(tmp_path / "archive.npz", ids=np.zeros(3))
    header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u2', 'fortran_order': False, 'shape': (%d,), }"
    huge, deep = header % 10**17 + b" " * 80 + b"\n", header.replace(b"(%d,)", b"(" * 90)
    bomb = pickle.dumps(Bomb(tmp_path / "mark"))
    path = corpus_copy / "shard-00000.ids.npy"
    for raw in (b"", b"x" * 300, (tmp_path / "archive.npz").read_bytes(), bomb, huge, deep):
        write_array(path, rewrite, raw)
        refused(read_all, corpus_copy, names=path)
    assert not (tmp_path / "mark").exists()


@FUZZ
@given(mutate=mutations())
def test_a_mutated_manifest(source, corpus_copy, mutate):
    """With a matching checksum."""
    info = seal(mutate(json.loads((source / "corpus.json").read_text())))
    (corpus_copy / "corpus.json").write_text(json.dumps(info))
    try:
        read_all(corpus_copy)
    except UserError as error:
        assert str(corpus_copy) in str(error)


@pytest.mark.parametrize("raw", ["{", '{"format_version": 1}', None])
def test_commands_name_a_bad_manifest(corpus_copy, pretrained, tmp_path, raw, capsys):
    path = corpus_copy / "corpus.json"
    path.write_text(raw) if raw else path.unlink()
    common = ["--cache", tmp_path / "cache", "--device", "cpu", "--max-length", 64]
    for name, option, more in (
        ("evaluate", "--input", ["--model", pretrained]),
        ("pretrain", "--train", ["--output", tmp_path / "run"]),
    ):
        text = refusal(script(name).main, [option, corpus_copy, *more, *common], capsys)
        assert text.startswith(f"{option} {path}: ")


# Models.


@pytest.fixture
def model_copy(pretrained, tmp_path):
    return Path(shutil.copytree(pretrained, tmp_path / "model"))


@pytest.fixture(scope="module", params=["bert", "modernbert"])
def any_model(request, tiny_tokenizer, vocabulary, tmp_path_factory):
    """Models whose configs have different fields."""
    model = small_stock(request.param, "ForMaskedLM", vocabulary.size)
    return save(tmp_path_factory.mktemp("safety") / request.param, model, tiny_tokenizer)


@FUZZ
@given(mutate=mutations())
def test_a_mutated_config(any_model, tmp_path, mutate):
    folder = Path(shutil.copytree(any_model, tmp_path / "model", dirs_exist_ok=True))
    change_json(folder / "config.json", mutate)
    for load in (from_checkpoint, tokenizers.load, lambda name: load_classifier(name, ["a", "b"])):
        try:
            load(str(folder))
        except UserError as error:
            assert str(folder) in str(error)


WRONG_VALUES = {
    "hidden_size": [10**9, 10**400, -1, "12", 2.0, True],
    "vocab_size": [10**9],
    "num_labels": [10**9],
    "hidden_dropout_prob": [1.5, 10**400, -0.1, "none", float("nan")],
    "pad_token_id": [-1],
    "per_layer_config": [{"0": {"hidden_size": 10**9}}],
    "attn_implementation": ["somebody/kernel"],
}


@pytest.mark.parametrize("field", WRONG_VALUES)
def test_a_wrong_size_is_reported_before_allocation(model_copy, field, monkeypatch):
    monkeypatch.setattr(BertForPreTraining, "__init__", None)
    path = model_copy / "config.json"
    config = json.loads(path.read_text())
    for value in WRONG_VALUES[field]:
        path.write_text(json.dumps({**config, field: value}))
        for load in (from_checkpoint, load_classifier):
            assert f"{path}: {field} is " in refused(load, str(model_copy))


@pytest.mark.parametrize("place", ["one file", "in shards", "on the hub"])
def test_a_config_that_describes_more_than_the_weights_hold(model_copy, place, on_hub):
    name, weights = str(model_copy), model_copy / "model.safetensors"
    size = weights.stat().st_size
    (model_copy / "ours.bin").write_bytes(bytes(size))  # other files do not count
    if place == "in shards":
        weights.rename(model_copy / "one.safetensors")
        index = {"metadata": {}, "weight_map": {"bert.pooler.dense.bias": "one.safetensors"}}
        (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    if place == "on the hub":
        name = "some-body/some-model"
        model_copy = shutil.copytree(model_copy, on_hub(name), dirs_exist_ok=True)
    change_json(model_copy / "config.json", lambda config: config | {"type_vocab_size": 1 << 20})
    # Found out before reading them.
    assert f"{size:,} bytes" in refused(from_checkpoint, name, names=name)


@pytest.mark.parametrize(
    ("name", "device"),
    [("config.json", None), ("tokenizer.json", "/dev/zero"), ("model.safetensors", "/dev/zero")],
)
def test_a_pipe_or_a_device_in_a_model_folder_is_not_opened(model_copy, name, device, capsys):
    path = model_copy / name
    path.unlink()
    path.symlink_to(device) if device else os.mkfifo(path)
    for load in (from_checkpoint, load_classifier, tokenizers.load):
        assert refused(load, str(model_copy), names=path)
    argv = ["--model", model_copy, "--input", __file__]
    assert refusal(script("evaluate").main, argv, capsys).startswith(f"--model {path}: ")


@pytest.mark.parametrize("option", ["--add-tokens", "--config", "--tokenizer", "--train"])
def test_a_pipe_in_place_of_a_file_is_not_opened(option, text_file, tmp_path, capsys):
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    argv = ["--train", text_file, "--model", "tiny", "--output", tmp_path / "run"]
    text = refusal(script("pretrain").main, [*argv, option, pipe], capsys)
    assert text.startswith(f"{option} {pipe}: ")


WEIGHTS = {
    "pickle": lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol=2)),
    "torch": lambda bomb, path: torch.save({"bert.pooler.dense.bias": bomb}, path),
    "other": lambda bomb, path: path.write_bytes(b"x" * 4096),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_pickled_code_in_weights_does_not_run(model_copy, tmp_path, kind):
    (model_copy / "model.safetensors").unlink()
    WEIGHTS[kind](Bomb(tmp_path / "mark"), model_copy / "pytorch_model.bin")
    text = refused(from_checkpoint, str(model_copy), names=model_copy)
    assert "weights_only" not in text  # nobody should turn it off
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../model/model.safetensors", 7])
def test_no_weight_index_escapes_the_folder(model_copy, name):
    (model_copy / "model.safetensors").unlink()  # otherwise no index is read
    path = model_copy / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
    assert "weight_map" in refused(from_checkpoint, str(model_copy), names=path)


def test_code_in_a_model_folder_does_not_run(model_copy, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", None)  # a question would fail
    code = f"import os; os.mkdir({str(tmp_path / 'mark')!r})\nclass C: pass\n"
    (model_copy / "code.py").write_text(code)
    classes = {"AutoConfig": "code.C", "AutoModel": "code.C", "AutoTokenizer": ["code.C", "code.C"]}
    new = {"auto_map": classes, "model_type": "unheard-of", "tokenizer_class": "C"}
    for name in ("config.json", "tokenizer_config.json"):
        change_json(model_copy / name, lambda value: value | new)
    for load in (from_checkpoint, load_classifier, tokenizers.load):
        refused(load, str(model_copy), names=model_copy)
    assert not (tmp_path / "mark").exists()


def test_references_to_code_are_not_copied(model_copy, tmp_path):
    """A run whose model starts from a folder with code does not name that code."""
    new = {
        "auto_map": {"AutoModel": "code.C", "AutoTokenizer": ["code.C", "code.C"]},
        "custom_pipelines": {"other": {"impl": "code.C", "pt": ["AutoModel"]}},
    }
    for name in ("config.json", "tokenizer_config.json"):
        change_json(model_copy / name, lambda value: value | new)
    model, _ = from_checkpoint(str(model_copy))
    save(tmp_path / "final", model, tokenizers.load(str(model_copy)))
    for path in (tmp_path / "final").glob("*.json"):
        assert "code.C" not in path.read_text(), path.name


# Tokenizers.


@FUZZ
@given(mutate=mutations(), name=st.sampled_from(["tokenizer.json"] * 2 + ["tokenizer_config.json"]))
def test_a_mutated_tokenizer(pretrained, model_copy, mutate, name):
    for other in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pretrained / other, model_copy / other)
    change_json(model_copy / name, mutate)
    try:
        loaded = tokenizers.load(str(model_copy))
        vocabulary = tokenizers.describe(loaded)
        encoded = tokenizers.without_limits(loaded).encode("banking rivers \u4eac")
        assert vocabulary.is_special[encoded.ids].dtype == bool
    except UserError as error:
        assert str(model_copy) in str(error)


def test_a_panic_becomes_a_message_and_an_interruption_does_not():
    class PanicException(BaseException):  # as in the tokenizers library
        pass

    def work(error):
        with refusing("x: is damaged", "expected y"):
            raise error

    panic = PanicException("index out of range")
    assert "PanicException: index out of range" in refused(work, panic)
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            work(error)


# Facts.


@FUZZ
@given(mutate=mutations())
def test_mutated_facts(tmp_path, mutate):
    facts = {"objective": "mlm", "max_length": 64, "eval_tokens": 1000, "eval_batch_size": 8}
    facts["nsp_weight"] = 0.5
    (tmp_path / FACTS).write_text(json.dumps(mutate({**facts, "precision": "fp32"})))
    found = read_facts(tmp_path)
    assert not misfit({**facts, **found}, FACTS_FORM)
