"""Folders of others: damage anywhere in a corpus is found and named, nothing in a folder runs, leads out of it or makes something
enormous, and whatever its JSON says, a command works or tells what is wrong."""
import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal, script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.command import UserError, refusing
from pretrain.data import tokenizer as tokenizers
from pretrain.data.corpus import ARRAYS, Corpus, load_tokenizer, open_corpus, seal
from pretrain.data.preparing import prepare
from pretrain.data.reading import check_files
from pretrain.files import integer, misfit, sha256_of
from pretrain.model.bert import BertForPreTraining, from_checkpoint, from_size
from pretrain.model.classifier import load_classifier
from pretrain.runtime.checkpoint import FACTS, read_facts

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LAYERS_DEEP = json.loads('{"a":' * 200 + "0" + "}" * 200)
VALUES = [None, True, False, -1, 0, 1, 7, 0.5, 2**31, 10**9, 2**63, 2**64, 10**18, 1e308, float("nan"), float("inf"), "", "x", "../x",
          "/etc/passwd", "..", "\0", "\ud800", "x" * 5000, [], {}, [[]], ["x"] * 3, {"x": 1}, LAYERS_DEEP]


@pytest.fixture(scope="module")
def source(text_file, tiny_tokenizer, tmp_path_factory) -> Path:
    """A corpus of several shards."""
    folder = tmp_path_factory.mktemp("safety") / "corpus"
    prepare(check_files([text_file], "--train"), "sentences", tiny_tokenizer, folder, piece_bytes=40_000)
    return folder


@pytest.fixture
def corpus_copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "corpus"))


@pytest.fixture(scope="module")
def model(tiny_tokenizer, vocabulary, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("safety") / "model"
    small = from_size("tiny", vocabulary.size, 64, 0, ["hidden_size=32", "num_attention_heads=2", "intermediate_size=64"])
    small.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def read_all(folder: Path) -> tuple:
    """All that commands read of a corpus, by every way that they read it."""
    corpus = Corpus(folder)
    vocabulary = tokenizers.describe(load_tokenizer(folder))
    open_corpus(folder, vocabulary, "--train")
    parts = [part.select(1000) for part in (corpus, *corpus.split(0.3)) if part.count()]
    shards = [corpus.shard(index) for index in range(corpus.num_shards)]
    assert all(vocabulary.is_special[shard.ids].shape == shard.flags.shape for shard in [*parts, *shards])
    return [[getattr(shard, name).tolist() for name in ARRAYS] for shard in [*parts, *shards]], vocabulary.fingerprint


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def damaged(raw: bytes) -> dict[str, bytes | None]:
    """What becomes of a file."""
    flips = {f"bit of byte {place}": bytes([*raw[:place], raw[place] ^ bit, *raw[place + 1:]])
             for place, bit in ((0, 1), (9, 8), (len(raw) // 3, 64), (len(raw) // 2, 1), (len(raw) - 1, 16))}
    return {"removed": None, "emptied": b"", "cut short": raw[:-1], "half": raw[:len(raw) // 2], "longer": raw + b"\0", **flips}


# Corpora.

def test_damage_to_any_file_of_a_corpus_is_named(source, corpus_copy):
    """A flip in the manifest may also show as a file that is not what it says."""
    files = files_of(source)
    expected, hit = read_all(source), set()
    assert len(files) > 10 and "tokenizer/tokenizer.json" in files
    for name in files:
        path, raw = corpus_copy / name, (source / name).read_bytes()
        for damage, content in damaged(raw).items():
            path.unlink() if content is None else path.write_bytes(content)
            try:
                assert read_all(corpus_copy) == expected and name == "corpus.json" and "byte" in damage, (name, damage)
            except UserError as error:
                assert str(path) in str(error).split(";")[0], (name, damage)
                hit.add((name, damage))
            path.write_bytes(raw)
    assert len(hit) >= 10 * len(files) - 3, "a flip in a blank of the manifest may not matter, others do"
    assert read_all(corpus_copy) == expected


@pytest.mark.parametrize("name", ["documents", "tokens", "smallest_hashes", "vocab_size", "words", "fingerprint"])
def test_a_changed_number_in_the_manifest_is_found(corpus_copy, name):
    path = corpus_copy / "corpus.json"
    info = json.loads(path.read_text())
    info[name] = [value + 1 for value in info[name]] if isinstance(info[name], list) else info[name] * 2
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match="corpus.json: its checksum does not fit its content"):
        Corpus(corpus_copy)


def rewrite(folder: Path, change) -> None:
    """Change the manifest as somebody would who knows the checksum."""
    info = json.loads((folder / "corpus.json").read_text())
    change(info)
    (folder / "corpus.json").write_text(json.dumps(seal(info)))


@pytest.mark.parametrize("name", ["../corpus/shard-00000", "/etc/passwd", "..", "", "a/b", "a\0b", 7, None])
def test_no_name_in_a_manifest_leads_out_of_the_folder(corpus_copy, name):
    for change in (lambda info: info["shards"][0].update(name=name), lambda info: info["tokenizer_files"][0].update(name=name)):
        kept = (corpus_copy / "corpus.json").read_text()
        rewrite(corpus_copy, change)
        with pytest.raises(UserError, match=r"corpus.json: (shards|tokenizer_files)\[0\].name is .*needed is a plain file name"):
            Corpus(corpus_copy)
        (corpus_copy / "corpus.json").write_text(kept)


def hostile(name: str, array: np.ndarray) -> list[np.ndarray]:
    """Arrays that a good one could be replaced by."""
    return [array[:-1], array[:, None], array.astype(">i4"), array.astype("f8"), array.astype("S4"), array.astype(object),
            np.full_like(array, np.iinfo(array.dtype).max)][: None if name in ("ids", "sentences", "documents") else -1] + (
            [array[::-1].copy(), array + 1, np.zeros_like(array)] if name in ("sentences", "documents") else [])


@pytest.mark.parametrize("name", ARRAYS)
def test_hostile_arrays_with_fitting_hashes(source, corpus_copy, name):
    """Types, shapes, offsets that fall or lead out of the arrays, ids that no vocabulary has; an array of objects is not unpickled."""
    path = corpus_copy / f"shard-00000.{name}.npy"
    kept = (corpus_copy / "corpus.json").read_text()
    for array in hostile(name, np.load(source / path.name)):
        np.save(path, array, allow_pickle=True)
        file = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        rewrite(corpus_copy, lambda info, file=file: info["shards"][0]["arrays"].update({name: file}))
        with pytest.raises(UserError, match=f"{path.name}: "):
            read_all(corpus_copy)
        (corpus_copy / "corpus.json").write_text(kept)


def test_a_file_that_is_no_array(corpus_copy, tmp_path):
    path = corpus_copy / "shard-00000.ids.npy"
    np.savez(tmp_path / "archive.npz", ids=np.zeros(3))
    header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u2', 'fortran_order': False, 'shape': (%d,), }"
    for raw in (b"", b"x" * 300, (tmp_path / "archive.npz").read_bytes(), pickle.dumps(Bomb(tmp_path / "mark")),
                header % 10**17 + b" " * 80 + b"\n", header.replace(b"(%d,)", b"(" * 90)):
        path.write_bytes(raw)
        rewrite(corpus_copy, lambda info: info["shards"][0]["arrays"].update(ids={"bytes": path.stat().st_size, "sha256": sha256_of(path)}))
        with pytest.raises(UserError, match=f"{path.name}: (is no array|holds no)"):
            read_all(corpus_copy)
    assert not (tmp_path / "mark").exists()


def places(value, at=()):
    """Keys of everything inside `value`."""
    for key in range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ():
        yield (*at, key)
        yield from places(value[key], (*at, key))


@st.composite
def mutations(draw):
    """A function that changes one to three places of a JSON value: dropped, or of another type, size or sign."""
    steps = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.sampled_from(["drop", *VALUES])), min_size=1,
                          max_size=3))

    def mutate(value):
        value = copy.deepcopy(value)
        for share, shallow, new in steps:
            found = [place for place in places(value) if not shallow or len(place) < 3]
            if found:
                *above, last = found[int(share * len(found))]
                inner = value
                for key in above:
                    inner = inner[key]
                if new == "drop":
                    del inner[last]
                else:
                    inner[last] = copy.deepcopy(new)
        return value

    return mutate


@FUZZ
@given(mutations())
def test_a_manifest_of_any_content(source, corpus_copy, mutate):
    """With a checksum that fits."""
    content = mutate(json.loads((source / "corpus.json").read_text()))
    (corpus_copy / "corpus.json").write_text(json.dumps(seal(content)))
    try:
        read_all(corpus_copy)
    except UserError as error:
        assert str(corpus_copy) in str(error)


def test_a_corpus_without_a_good_manifest_is_told_by_the_commands(corpus_copy, model, tmp_path, capsys):
    manifest = corpus_copy / "corpus.json"
    commands = [(script("evaluate").main, ["--model", model, "--input", corpus_copy]),
                (script("pretrain").main, ["--train", corpus_copy, "--output", tmp_path / "run"])]
    for raw, problem in (("{", "cannot be read"), ("{}", "is no corpus of format 3"), (None, "is missing, beside shards of a corpus")):
        manifest.write_text(raw) if raw else manifest.unlink()
        for main, argv in commands:
            assert f"{manifest}: {problem}" in refusal(main, [*argv, "--cache", tmp_path / "cache", "--device", "cpu"], capsys)


def test_a_cached_corpus_that_has_lost_its_manifest(text_file, tiny_tokenizer, corpus_copy):
    (corpus_copy / "corpus.json").unlink()
    with pytest.raises(UserError, match="corpus.json: is missing, beside shards of a corpus; remove the folder"):
        prepare(check_files([text_file], "--train"), "sentences", tiny_tokenizer, corpus_copy)


# Models.

class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@FUZZ
@given(mutations())
def test_a_config_of_any_content(model, model_copy, mutate):
    (model_copy / "config.json").write_text(json.dumps(mutate(json.loads((model / "config.json").read_text()))))
    for work in (lambda: from_checkpoint(str(model_copy), []), lambda: load_classifier(str(model_copy), ["a", "b"]),
                 lambda: tokenizers.load(str(model_copy))):
        try:
            work()
        except UserError as error:
            assert str(model_copy) in str(error)


@pytest.mark.parametrize("field, value", [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", "12"), ("num_hidden_layers", 2.0), ("hidden_size", 10**9), ("hidden_size", -32),
    ("num_attention_heads", 0), ("intermediate_size", 2**40), ("vocab_size", 2**25), ("max_position_embeddings", 2**21),
    ("type_vocab_size", True), ("num_labels", 10**9), ("hidden_dropout_prob", 1.5), ("attention_probs_dropout_prob", "none"),
    ("layer_norm_eps", float("nan")), ("pad_token_id", -1), ("chunk_size_feed_forward", 7), ("return_dict", False),
    ("per_layer_config", {"0": {"hidden_size": 10**9}}), ("attn_implementation", "somebody/kernel"),
    ("_attn_implementation", "somebody/kernel")])
def test_a_wrong_size_is_named_before_it_is_made(model_copy, field, value, monkeypatch):
    path = model_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    monkeypatch.setattr(BertForPreTraining, "__init__", None)
    for load in (lambda name: from_checkpoint(name, []), load_classifier):
        with pytest.raises(UserError, match=rf"config.json: {field} is .*needed is "):
            load(str(model_copy))


@pytest.mark.parametrize("entry, problem", [
    ("num_hidden_layers=1000000000", "num_hidden_layers is 1000000000, needed is a whole number within 1..1024"),
    ("hidden_dropout_prob=nan", "hidden_dropout_prob is nan, needed is a number within 0..1"),
    ("num_attention_heads=3", "hidden_size is .*, needed is a multiple of num_attention_heads, 3"),
    ("hidden_act=swishy", "hidden_act is swishy, needed is one of .*gelu")])
def test_overrides_pass_the_same_checks(model, entry, problem):
    for work in (lambda: from_checkpoint(str(model), [entry]), lambda: from_size("tiny", 100, 64, 0, [entry])):
        with pytest.raises(UserError, match=f"--config-override {entry}: {problem}"):
            work()


def test_a_config_that_says_more_than_the_weights_hold(model_copy):
    path = model_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 1 << 14, "intermediate_size": 1 << 16}))
    with pytest.raises(UserError, match=r"its config describes [\d,]+ weights, its files have [\d,]+ bytes"):
        from_checkpoint(str(model_copy), [])


@pytest.mark.parametrize("write", [lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol=2)),
                                   lambda bomb, path: torch.save({"bert.embeddings.word_embeddings.weight": bomb}, path),
                                   lambda bomb, path: path.write_bytes(b"x" * 4096), lambda bomb, path: path.write_bytes(b"")])
def test_pickled_code_in_weights_does_not_run(model_copy, tmp_path, write):
    (model_copy / "model.safetensors").unlink()
    write(Bomb(tmp_path / "mark"), model_copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"its weights cannot be read \((?!.*weights_only)"):
        from_checkpoint(str(model_copy), [])
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", 7])
def test_no_index_of_weights_leads_out_of_the_folder(model_copy, name):
    (model_copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
    with pytest.raises(UserError, match="model.safetensors.index.json: weight_map is"):
        from_checkpoint(str(model_copy), [])


def test_code_of_a_folder_is_not_asked_for_and_does_not_run(model_copy, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", None)  # a question would fail
    (model_copy / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'mark')!r})\nclass C: pass\n")
    classes = {"AutoConfig": "code.C", "AutoModel": "code.C", "AutoTokenizer": ["code.C", "code.C"]}
    for name, more in (("config.json", {"model_type": "unheard-of"}), ("tokenizer_config.json", {"tokenizer_class": "C"})):
        path = model_copy / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": classes} | more))
    for load in (lambda name: from_checkpoint(name, []), load_classifier, tokenizers.load):
        with pytest.raises(UserError, match="contains custom code which must be executed|cannot be read"):
            load(str(model_copy))
    assert not (tmp_path / "mark").exists()


# Tokenizers.

@FUZZ
@given(mutations(), st.sampled_from(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"]))
def test_a_tokenizer_of_any_content(model, model_copy, mutate, name):
    for other in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / other, model_copy / other)
    (model_copy / name).write_text(json.dumps(mutate(json.loads((model / name).read_text()))))
    try:
        loaded = tokenizers.load(str(model_copy))
        vocabulary = tokenizers.describe(loaded)
        ids = tokenizers.without_limits(loaded).encode("banking rivers \u4eac", add_special_tokens=True).ids
        assert vocabulary.is_special[ids].dtype == bool
    except UserError as error:
        assert str(model_copy) in str(error)


def test_half_a_tokenizer(model_copy):
    state = json.loads((model_copy / "tokenizer.json").read_text())
    entry = list(state["model"]["vocab"])[50]
    config = json.loads((model_copy / "tokenizer_config.json").read_text())
    far = {"model": state["model"] | {"vocab": state["model"]["vocab"] | {entry: 2**31}}}
    special = state["post_processor"]["special_tokens"]
    outside = {"post_processor": state["post_processor"] | {"special_tokens": special | {"[CLS]": special["[CLS]"] | {"ids": [999]}}}}
    panics = {"post_processor": state["post_processor"] | {"single": [{"SpecialToken": {"id": "[NONE]", "type_id": 0}}]}}
    for change, more, problem in ((far, {}, "ValueError: its ids reach to 2,147,483,648"), (outside, {}, "ValueError: it uses ids"),
                                  (panics, {}, "PanicException: "), ({"model": {"type": "x"}}, {}, "Exception: "),
                                  ({}, {"model_max_length": -1}, "ValueError: .* to -1 tokens"),
                                  ({}, {"model_max_length": "x"}, "TypeError"), ({}, {"x": "\ud800"}, "UnicodeEncodeError")):
        (model_copy / "tokenizer.json").write_text(json.dumps(state | change))
        (model_copy / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"} | more))
        with pytest.raises(UserError, match=rf"--tokenizer {model_copy}: its tokenizer (is garbled|cannot be read) \({problem}"):
            tokenizers.load(str(model_copy))
    (model_copy / "tokenizer_config.json").write_text(json.dumps(config | {"mask_token": "[SEP]"}))
    with pytest.raises(UserError, match=r"has no \[MASK\] token"):
        tokenizers.describe(tokenizers.load(str(model_copy)))
    (model_copy / "tokenizer_config.json").write_text(json.dumps(config))
    (model_copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="it has no vocabulary"):
        tokenizers.load(str(model_copy))


def test_a_panic_is_told_and_an_interruption_is_none():
    class PanicException(BaseException):  # as that of the tokenizers library
        pass

    told = pytest.raises(UserError, match=r"^x: is garbled \(PanicException: index out of range\); needed is y$")
    with told, refusing("x: is garbled", "needed is y"):
        raise PanicException("index out of range. Report this")
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), refusing("x", "y"):
            raise error


# Facts and forms.

@FUZZ
@given(mutations())
def test_facts_of_any_content(tmp_path, mutate):
    facts = {"objective": "mlm", "max_length": 64, "eval_tokens": 1000, "eval_batch_size": 8, "precision": "fp32", "batch_size": 3}
    (tmp_path / FACTS).write_text(json.dumps(mutate(facts)))
    found = read_facts(tmp_path)
    assert found.get("objective", "mlm") in ("mlm", "mlm+nsp", "mlm+sop")
    assert all(type(found.get(name, 8)) is int and found.get(name, 8) > 0 for name in ("max_length", "eval_tokens", "eval_batch_size"))


@pytest.mark.parametrize("value, problem", [
    ({"a": 1, "b": [{"c": 2}]}, None), ({"a": 1, "b": []}, None), ([], "the content is of type list, needed is an object"),
    ({"a": 1, "b": {}}, "b is of type dict, needed is an array"), ({"b": []}, "a is none, needed is a whole number within 0..9"),
    ({"a": True, "b": []}, "a is True, needed is a whole number within 0..9"),
    ({"a": 1, "b": [{"c": 2}, {"c": [1]}]}, "b[1].c is of type list, needed is a whole number within 0..9")])
def test_where_a_value_departs_from_a_form(value, problem):
    assert misfit(value, {"a": integer(0, 9), "b": [{"c": integer(0, 9)}]}) == problem
