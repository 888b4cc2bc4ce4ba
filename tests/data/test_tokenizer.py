"""Tokenizers: training, vocab.txt files against transformers' own BERT tokenizers on the same text, what the masks are told of
a vocabulary against a loop over its entries, the fingerprint, and every name that cannot be loaded with its message."""
import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from pretrain.config import UserError
from pretrain.data.tokenizer import SPECIAL_TOKENS, describe, fingerprint, from_vocabulary, load, read_vocabulary, train

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Café Ångström — naïve coöperation!", "深度学习 BERT模型，2024年。",
         "unknownwordwithoutend ñandú ☃", "a-b c_d e.f 'quoted' (par)", "tab\tand\u2028line\x0bbreaks",
         "ｆｕｌｌ　ｗｉｄｔｈ", "x" * 120, ""]


@pytest.fixture(scope="module")
def entries() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGÅéñ0123456789.,!?'()-_—，。深度学习模型年"
    words = ["the", "The", "quick", "##ick", "brown", "cafe", "café", "over", "##ing", "bert", "BERT", "##ber", "naive", "2024"]
    return SPECIAL_TOKENS + list(letters) + [f"##{letter}" for letter in letters[:60]] + words


@pytest.fixture(scope="module")
def vocabulary_file(entries, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_bytes("".join(f"{entry}\n" for entry in entries).encode())
    return path


def message(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- training

def test_trained_tokenizer_splits_chinese_characters_singly():
    made = train(lambda: ["深度学习 深度学习 模型", "深度学习模型 deep learning"] * 5, 200)
    assert made.tokenize("深度学习模型") == list("深度学习模型")
    assert not [entry for entry in made.get_vocab() if len(entry.removeprefix("##")) > 1 and "深" in entry]
    assert made.tokenize("deep学learning") == ["deep", "学", "learning"]


def test_lowercase_on_and_off():
    texts = ["Café Zürich café zürich"] * 5
    on, off = train(lambda: texts, 200), train(lambda: texts, 200, lowercase=False)
    assert on.tokenize("CAFÉ Zürich") == ["cafe", "zurich"]
    assert off.tokenize("Café zürich") == ["Café", "zürich"]
    assert not [entry for entry in on.get_vocab() if entry not in SPECIAL_TOKENS and (entry != entry.lower() or "é" in entry)]
    assert off.tokenize("cafe") != ["Café"] and "É" not in off.get_vocab()


def test_trained_vocabulary_is_of_the_size_and_whole(documents):
    texts = [sentence for document in documents for sentence in document]
    made = train(lambda: texts, 150)
    vocabulary = made.get_vocab()
    assert sorted(vocabulary.values()) == list(range(150)) and [vocabulary[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert made.unk_token_id not in {number for text in texts for number in ids_of(made, text)}  # every character is kept
    assert ids_of(made, "☃") == [made.unk_token_id]


def test_training_again_gives_the_same_tokenizer(documents):
    """A run that trains its tokenizer is repeated exactly only if the ids are the same."""
    texts = [sentence for document in documents for sentence in document]
    assert len({fingerprint(train(lambda: texts, 150)) for _ in range(3)}) == 1


def test_trained_tokenizer_is_found_again_from_its_folder(tmp_path, tiny_tokenizer, documents):
    tiny_tokenizer.save_pretrained(tmp_path)
    found = load(str(tmp_path))
    assert fingerprint(found) == fingerprint(tiny_tokenizer)
    assert all(ids_of(found, text) == ids_of(tiny_tokenizer, text) for text in documents[0])
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert all(ids_of(stock, text) == ids_of(tiny_tokenizer, text) for text in documents[0])


# ---------------------------------------------------------------- vocab.txt

@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_bare_vocabulary_is_read_as_transformers_does(vocabulary_file, lowercase, way):
    mine = load(str(vocabulary_file if way == "file" else vocabulary_file.parent), lowercase)
    stock = BertTokenizer.from_pretrained(str(vocabulary_file.parent), do_lower_case=lowercase)
    in_python = BertTokenizerLegacy(str(vocabulary_file), do_lower_case=lowercase)
    assert mine.is_fast and len(mine) == len(stock) == len(in_python)
    seen = set()
    for text in TEXTS:
        ids = mine(text)["input_ids"]  # with [CLS] and [SEP]
        assert ids == stock(text)["input_ids"] == in_python(text)["input_ids"], text
        seen.update(ids)
    assert mine("one", "two") == stock("one", "two")
    assert len(seen) > 50 and mine.unk_token_id in seen  # the text does reach the entries
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(mine, f"{name}_token_id") == getattr(in_python, f"{name}_token_id")


def test_entries_with_other_line_breaks_keep_their_ids(tmp_path):
    entries = [*SPECIAL_TOKENS, "a", "\u2028", "b", "\x0b", "\x85", "c", "##\u2029", "\x1c", "\x0c", "d"]
    path = tmp_path / "vocab.txt"
    path.write_bytes("\n".join(entries).encode())
    assert read_vocabulary(path) == {entry: number for number, entry in enumerate(entries)}
    made = load(str(path))
    assert made.get_vocab() == {entry: number for number, entry in enumerate(entries)}
    assert ids_of(made, "a b c d") == [5, 7, 10, 14]


@pytest.mark.parametrize("raw", ["{}\n", "{}", "\ufeff{}\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_ends_of_a_vocabulary_file(tmp_path, raw, newline):
    path = tmp_path / "vocab.txt"
    path.write_bytes(raw.replace("\n", newline).format(newline.join([*SPECIAL_TOKENS, "a"])).encode())
    assert read_vocabulary(path) == {entry: number for number, entry in enumerate([*SPECIAL_TOKENS, "a"])}


def test_missing_special_tokens_are_named(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[CLS]\n[SEP]\na\n")
    assert message(load, str(path)) == (
        f"--tokenizer {path}: lacks [UNK], [MASK]; needed is a WordPiece vocabulary of BERT, an entry a line")


def test_a_vocabulary_that_is_no_text(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"[PAD]\n\xff\n")
    assert message(load, str(path)).startswith(f"--tokenizer {path}: cannot be read as a UTF-8 vocabulary (")


# ---------------------------------------------------------------- names that cannot be loaded

def test_a_folder_without_a_tokenizer(tmp_path):
    assert message(load, str(tmp_path)) == (
        f"--tokenizer {tmp_path}: the folder holds none of tokenizer.json, tokenizer_config.json, vocab.txt")


@pytest.mark.parametrize("name", ["no-such-tokenizer", "nobody/nothing", "./gone"])
def test_a_bad_name_is_told_offline(name):
    text = message(load, name)
    assert text.startswith(f"--tokenizer {name}: no such folder or vocab.txt, and not to be had from the hub or its cache (")
    assert text.endswith("offline, give a folder with tokenizer.json or vocab.txt") and "\n" not in text


def test_a_damaged_folder_is_told(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    assert message(load, str(tmp_path)).startswith(f"--tokenizer {tmp_path}: ")


def test_a_tokenizer_in_python_is_refused(vocabulary_file, tmp_path, monkeypatch):
    slow = BertTokenizerLegacy(str(vocabulary_file))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: slow)
    assert message(load, "some/name") == (
        "--tokenizer some/name: is BertTokenizerLegacy in Python; needed is one of the tokenizers library")


def words_only(**special) -> PreTrainedTokenizerFast:
    model = tokenizers.models.WordLevel({token: number for number, token in enumerate([*SPECIAL_TOKENS, "a"])}, "[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), **special)


def test_a_tokenizer_without_masks_is_told():
    made = words_only(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    assert message(describe, made) == (
        "--tokenizer given: has no [MASK] token; needed is a tokenizer made for masked language modelling")
    assert "has no [PAD], [CLS], [SEP], [MASK] token" in message(describe, words_only())


# ---------------------------------------------------------------- vocabulary

def test_vocabulary_against_a_loop(entries):
    made = from_vocabulary({entry: number for number, entry in enumerate(entries)}, True)
    made.add_tokens(["whole"])
    made.add_special_tokens({"additional_special_tokens": ["[NAME]"]})
    found = describe(made)
    entries = [*entries, "whole", "[NAME]"]
    assert found.size == len(entries)
    assert (found.pad_id, found.unknown_id, found.cls_id, found.sep_id, found.mask_id) == (0, 1, 2, 3, 4)
    specials = {*SPECIAL_TOKENS, "[NAME]"}
    assert found.is_special.tolist() == [entry in specials for entry in entries]
    assert found.starts_word.tolist() == [not entry.startswith("##") for entry in entries]
    assert found.ordinary_ids.tolist() == [number for number, entry in enumerate(entries) if entry not in specials]
    assert found.ordinary_ids.dtype == np.uint32 and found.fingerprint == fingerprint(made)


def test_ids_without_an_entry_are_never_drawn():
    """A vocabulary with a line twice has an id that no entry holds."""
    found = describe(from_vocabulary({**{token: number for number, token in enumerate(SPECIAL_TOKENS)}, "a": 5, "b": 7}, True))
    assert found.size == 8 and found.is_special[6] and found.ordinary_ids.tolist() == [5, 7]


def test_a_tokenizer_without_an_unknown_token():
    found = describe(words_only(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"))
    assert found.unknown_id == -1


# ---------------------------------------------------------------- fingerprint

def test_fingerprint_does_not_change_with_use(entries):
    made = from_vocabulary({entry: number for number, entry in enumerate(entries)}, True)
    before = fingerprint(made)
    made(["the quick fox", "the"], truncation=True, max_length=4, padding="max_length")
    assert made.backend_tokenizer.truncation and made.backend_tokenizer.padding  # the call has left its traces
    assert fingerprint(made) == before
    made.backend_tokenizer.enable_truncation(7)
    made.backend_tokenizer.no_padding()
    assert fingerprint(made) == before


def test_fingerprint_names_what_the_tokenizer_does(entries):
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    more = {**vocabulary, "more": len(vocabulary)}
    swapped = {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}
    marks = [fingerprint(made) for made in (from_vocabulary(vocabulary, True), from_vocabulary(vocabulary, False),
                                            from_vocabulary(more, True), from_vocabulary(swapped, True))]
    added = from_vocabulary(vocabulary, True)
    added.add_tokens(["added"])
    assert len({*marks, fingerprint(added)}) == 5
    assert fingerprint(from_vocabulary(dict(reversed(vocabulary.items())), True)) == marks[0]  # whatever the order of entries
    assert all(len(mark) == 16 and int(mark, 16) >= 0 for mark in marks)
