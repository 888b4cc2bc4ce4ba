"""Tokenizers: training, vocab.txt files against transformers' own BERT tokenizers on the same text, what the masks are told of
a vocabulary against a loop over its entries, where words begin against a split by letters, digits and marks, tokens that are
added, the fingerprint, and every name that cannot be loaded with its message."""
import functools
import json
import re
import string

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer, XLMRobertaTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from pretrain.command import UserError
from pretrain.data.corpus import WORD_START
from pretrain.data.marking import mark
from pretrain.data.tokenizer import (
    SPECIAL_TOKENS,
    add_tokens,
    describe,
    fingerprint,
    from_vocabulary,
    load,
    read_vocabulary,
    train,
)

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
        f"--tokenizer {tmp_path}: the folder holds no tokenizer, none of tokenizer.json, tokenizer_config.json, vocab.txt")


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
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **more: slow)
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


# ---------------------------------------------------------------- where words begin

ENGLISH = ["Hello world's best cafe, 2004 tries don't re-do it.", "the quick brown fox jumps over the lazy dog",
           "state-of-the-art e-mail x2", "models learn tokens and masks; 12 of 345 tokens (masked)!",
           "New York, New Jersey: $5.00 a day?"] * 6
CHINESE = ["今天天气很好，我们去公园。", "深度学习模型2024年", "人工智能 BERT模型"] * 6
FIVE = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_level() -> RobertaTokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, special_tokens=FIVE, show_progress=False,
                                             initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    made.train_from_iterator(ENGLISH + CHINESE, trainer)
    model = json.loads(made.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def sentence_pieces() -> XLMRobertaTokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.normalizer, made.pre_tokenizer = tokenizers.normalizers.NFKC(), tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=220, special_tokens=FIVE, unk_token="<unk>", show_progress=False,
                                                 initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation))
    made.train_from_iterator(ENGLISH + CHINESE, trainer)
    return XLMRobertaTokenizer(vocab=[tuple(piece) for piece in json.loads(made.to_str())["model"]["vocab"]])


MAKERS = {"byte-level": byte_level, "sentencepiece": sentence_pieces,
          "wordpiece": lambda: train(lambda: ENGLISH + CHINESE + [string.printable], 260, lowercase=False)}


@functools.cache
def known(kind: str):
    """A tokenizer that no test changes, and its vocabulary."""
    made = MAKERS[kind]()
    return made, describe(made)


def starts_of(vocabulary, encoding, text: str) -> np.ndarray:
    """bool: which tokens begin a word, as a corpus is marked."""
    told = None if vocabulary.starts_word is None else vocabulary.starts_word[np.array(encoding.ids, np.int64)]
    return (mark([(text, ())], [encoding], told, "tokenizer") & WORD_START).astype(bool)


def words_of(made, text: str, vocabulary=None) -> list[str]:
    """The characters of each word, without the white space around it; of tokens with one place, the first has it."""
    encoding = made.backend_tokenizer.encode(text, add_special_tokens=False)
    starts = starts_of(vocabulary or describe(made), encoding, text)
    assert starts.dtype == bool and starts[:1].all()
    groups = []
    for is_start, (start, end) in zip(starts.tolist(), encoding.offsets):
        if is_start:
            groups.append([start, end])
        groups[-1][1] = max(groups[-1][1], end)
    return [word for start, end in groups if (word := text[start:end].strip())]


SIMPLE_WORD = st.sampled_from(["hello", "World", "tokens", "x", "2004", "7", "quick", "Internationalization", "zq", "1st"])


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=80, deadline=None)
@given(parts=st.lists(st.tuples(SIMPLE_WORD, st.sampled_from([" ", " ", "  ", ", ", ". ", " (", ") ", "-", "; ", "! "])), max_size=8))
def test_words_of_ascii_text_are_runs_of_letters_digits_and_marks(kind, parts):
    """WordPiece keeps letters and digits together, and each mark apart."""
    made, vocabulary = known(kind)
    text = "".join(word + gap for word, gap in parts)
    expected = re.findall(r"[A-Za-z0-9]+|[^A-Za-z0-9\s]" if kind == "wordpiece" else r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9\s]+", text)
    assert words_of(made, text, vocabulary) == expected


def tokens_of(kind: str, text: str) -> list[tuple[str, int, int, bool]]:
    """(token, its characters from, to, whether a word starts there)."""
    made, vocabulary = known(kind)
    encoding = made.backend_tokenizer.encode(text, add_special_tokens=False)
    starts = starts_of(vocabulary, encoding, text)
    shown = np.array([bool(token.strip("\u2581\u0120")) for token in encoding.tokens], bool)
    for place in range(1, len(starts)):  # a word may begin with tokens that hold its space alone
        starts[place] |= starts[place - 1] and not shown[place - 1]
    rows = [(token, *span, start) for token, span, start in zip(encoding.tokens, encoding.offsets, starts.tolist())]
    return [row for row, is_shown in zip(rows, shown) if is_shown]


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(["今", "天", "深度", "学习", "，", " ", "hello", " world", "龘", "2004", "。"]), max_size=8))
def test_a_word_begins_at_each_chinese_character_and_behind_it(kind, parts):
    """Wherever a token does; its bytes stay together. What is unknown to SentencePiece is of no kind."""
    text, reached = "".join(parts).replace("龘", "模" if kind == "sentencepiece" else "龘"), 0
    for token, start, end, begins in tokens_of(kind, text):
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if start < end and start >= reached > 0 and re.search("[\u4e00-\u9fff]", text[start - 1: start + 1]):
            assert begins, f"{token} at {start}"
        assert not (begins and start < reached), f"{token} at {start}"
        reached = max(reached, end)


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aé今😀ñ 한カ—1.ß\u0301龘"), max_size=12))
def test_no_character_lies_in_two_words(kind, text):
    reached = 0
    for token, start, end, begins in tokens_of(kind, text):
        start += len(text[start:end]) - len(text[start:end].lstrip())
        assert not (begins and start < min(reached, end)), f"{token} at {start}"
        reached = max(reached, end)


def test_words_spelled_out():
    """Holds the reference itself."""
    roberta, xlm = byte_level(), sentence_pieces()
    text = "Hello world's  best, 2004x (don't)!"
    assert words_of(roberta, text) == ["Hello", "world", "'s", "best", ",", "2004", "x", "(", "don", "'t", ")!"]
    assert words_of(xlm, "tokens, 12x2") == ["tokens", ",", "12", "x", "2"] == words_of(roberta, "tokens, 12x2")
    assert words_of(roberta, "a café 龘今") == ["a", "café", "龘", "今"]
    assert describe(roberta).needs_space and not describe(xlm).needs_space


def test_a_sentence_always_begins_a_word():
    made = byte_level()
    encoding = made.backend_tokenizer.encode("learning", add_special_tokens=False)
    flags = mark([("learning", ())] * 3, [encoding] * 3, None, "tokenizer")
    assert len(encoding.ids) > 1 and flags.tolist() == ([WORD_START] + [0] * (len(encoding.ids) - 1)) * 3
    assert mark([], [], None, "tokenizer").tolist() == []


# ---------------------------------------------------------------- added tokens

NEW = ["myocardial infarction", "COVID-19", "Immunoglobulin", "c++", "今天", "zart"]


def spelled(made, text: str) -> list[str]:
    """The text of each token, without white space."""
    encoding = made.backend_tokenizer.encode(text, add_special_tokens=False)
    return [text[start:end].strip() for start, end in encoding.offsets]


@pytest.mark.parametrize("kind", MAKERS)
def test_added_tokens_are_whole_in_the_text(kind, tmp_path):
    made = MAKERS[kind]()
    size, before = len(made), {word: ids_of(made, word if kind == "wordpiece" else f" {word}") for word in NEW}
    pieces = add_tokens(made, NEW, ["[name]", "[Where]"])
    ids = made.convert_tokens_to_ids([*NEW, "[name]", "[Where]"])
    assert sorted(pieces) == sorted(ids) == list(range(size, size + 8)) and len(made) == size + 8
    assert all(pieces[number] == before[word] for number, word in zip(ids, NEW))
    assert pieces[ids[6]] and all(number < size for found in pieces.values() for number in found)
    texts = {"a myocardial infarction, c++ or COVID-19": ["myocardial infarction", "c++", "COVID-19"], "Immunoglobulin": ["Immunoglobulin"],
             "zarts of zart, xzart": ["zart"], "COVID-19x xCOVID-19 COVID-191": [], "说今天好今天": ["今天", "今天"],
             "zart zart": ["zart", "zart"], "the[name]of[Where]": ["[name]", "[Where]"], "(COVID-19)": ["COVID-19"]}
    made.save_pretrained(tmp_path)
    again = load(str(tmp_path))
    assert fingerprint(again) == fingerprint(made) and len(again) == len(made)
    for used in (made, again):
        for text, expected in texts.items():
            found = [part for part, number in zip(spelled(used, text), ids_of(used, text)) if number >= size]
            assert found == expected, text
        vocabulary = describe(used)
        assert vocabulary.size == size + 8 and (vocabulary.starts_word is None or vocabulary.starts_word[size:].all())
        assert vocabulary.is_special[size:].tolist() == [False] * 6 + [True] * 2 and set(ids[6:]) <= set(used.all_special_ids)
        assert words_of(used, "the myocardial infarction of COVID-19, zart", vocabulary)[-5:] == [
            "myocardial infarction", "of", "COVID-19", ",", "zart"]


def test_added_tokens_are_found_in_any_case_where_the_tokenizer_lowers_it(entries):
    made = from_vocabulary({entry: number for number, entry in enumerate(entries)}, True)
    pieces = add_tokens(made, ["COVID-19", "Café Noir"], ["[Name]"])
    first, second, special = sorted(pieces)
    for text in ("covid-19", "COVID-19", "Covid-19", "cafe noir", "CAFÉ NOIR"):
        assert ids_of(made, text) == [first if text[1] in "oO" else second], text
    assert ids_of(made, "[Name]") == [special] and special not in ids_of(made, "[name]")
    plain = from_vocabulary({entry: number for number, entry in enumerate(entries)}, False)
    (number,) = add_tokens(plain, ["COVID-19"], [])
    assert ids_of(plain, "COVID-19") == [number] and number not in ids_of(plain, "covid-19")


def test_a_special_token_may_take_a_name(entries, tmp_path):
    made = from_vocabulary({entry: number for number, entry in enumerate(entries)}, True)
    specials = list(made.all_special_tokens)
    pieces = add_tokens(made, [], ["eos_token=[EOT]", "[A=B]", "bos_token=[SEP]"])
    assert made.eos_token == "[EOT]" and made.bos_token == "[SEP]" and len(pieces) == 2  # [SEP] was there
    assert set(made.all_special_tokens) == {*specials, "[EOT]", "[A=B]"}
    add_tokens(made, [], ["[C]"])
    assert {"[A=B]", "[C]"} <= set(made.all_special_tokens)  # those of before stay
    made.save_pretrained(tmp_path)
    assert load(str(tmp_path)).eos_token == "[EOT]" and set(load(str(tmp_path)).all_special_tokens) == set(made.all_special_tokens)


def test_bad_new_tokens_are_told_at_once_by_line(entries):
    made = from_vocabulary({entry: number for number, entry in enumerate(entries)}, True)
    size = len(made)
    words = ["new words", "", "quick", "NEW words", "[MASK]", "the", "☃", "Quick"]
    lines = message(add_tokens, made, words, ["foo_token=x", " ", "sep_token="]).splitlines()
    assert lines[:6] == [
        "--add-tokens, line 2: is blank; needed is a token",
        "--add-tokens, line 3: 'quick' is a token already; needed are tokens that the vocabulary lacks",
        "--add-tokens, line 4: 'NEW words' is the same to the tokenizer as line 1; needed is each token once",
        "--add-tokens, line 5: '[MASK]' is a token already; needed are tokens that the vocabulary lacks",
        "--add-tokens, line 6: 'the' is a token already; needed are tokens that the vocabulary lacks",
        "--add-tokens, line 8: 'Quick' is the same to the tokenizer as line 3; needed is each token once"]
    assert lines[6].startswith("--add-special-tokens foo_token=x: foo_token is none of ") and "eos_token" in lines[6]
    assert lines[7:] == ["--add-special-tokens ' ': is blank; needed is TOKEN or NAME=TOKEN",
                         "--add-special-tokens 'sep_token=': is blank; needed is TOKEN or NAME=TOKEN"]
    assert len(made) == size
    add_tokens(made, ["new words"], [])
    assert "'New Words' is a token already" in message(add_tokens, made, ["New Words"], [])


@pytest.mark.parametrize("kind, space", [("byte-level", "\u0120"), ("sentencepiece", "\u2581")])
def test_a_word_that_is_a_token_behind_its_space_is_one_already(kind, space):
    made = MAKERS[kind]()
    word = min(entry[1:] for entry in made.get_vocab() if re.fullmatch(f"{space}[a-z]{{2,}}", entry))
    assert f"{word!r} is a token already" in message(add_tokens, made, [word], [])


@pytest.mark.parametrize("kind, space", [("byte-level", "\u0120"), ("sentencepiece", "\u2581")])
def test_a_word_that_is_a_piece_of_others_only_is_new_or_told(kind, space):
    """Its entry without the space must not become the word: it stands inside other words."""
    made = MAKERS[kind]()
    vocabulary = made.get_vocab()
    word = min(entry for entry in vocabulary if re.fullmatch("[a-z]{2,}", entry) and space + entry not in vocabulary)
    try:
        pieces = add_tokens(made, [word], [])
    except UserError:
        return
    assert len(pieces) == 1 and ids_of(made, f"a {word}")[-1] == len(made) - 1 and not describe(made).starts_word[vocabulary[word]]
