"""Tokenizers: training, vocab.txt files against transformers' own BERT tokenizers on the same text,
what masks know of a vocabulary against a loop over its entries, where words start against a split
by letters, digits and marks, added tokens, the fingerprint, and names that cannot be loaded."""

import functools
import re
import string

import numpy as np
import pytest
import tokenizers
from conftest import byte_level, refused, sentence_pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from pretrain.data.annotate import mark
from pretrain.data.corpus import WORD_START
from pretrain.data.tokenizer import (
    MIN_OCCURRENCES,
    SPECIAL_TOKENS,
    add_tokens,
    describe,
    fingerprint,
    from_vocabulary,
    load,
    new_words,
    read_vocabulary,
    special_problems,
    train,
)

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Café Ångström — naïve coöperation!"]
TEXTS += ["深度学习 BERT模型，2024年。", "unknownwordwithoutend ñandú ☃", "x" * 120, ""]
TEXTS += ["a-b c_d e.f 'quoted' (par)", "tab\tand\u2028line\x0bbreaks", "ｆｕｌｌ　ｗｉｄｔｈ"]


def numbered(entries: list[str]) -> dict[str, int]:
    return {entry: number for number, entry in enumerate(entries)}


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGÅéñ0123456789.,!?'()-_—，。深度学习模型年"
WORDS = ["the", "The", "quick", "##ick", "brown", "cafe", "café", "over", "##ing", "bert", "BERT"]
ENTRIES = [*SPECIAL_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS[:60]), *WORDS, "2024"]


def bert(lowercase: bool = True):
    return from_vocabulary(numbered(ENTRIES), lowercase)


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_bytes("".join(f"{entry}\n" for entry in ENTRIES).encode())
    return path


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_trained_tokenizer_splits_chinese_characters_singly():
    made = train(lambda: ["深度学习 深度学习 模型", "深度学习模型 deep learning"] * 5, 200)
    assert made.tokenize("深度学习模型") == list("深度学习模型")
    with_deep = [entry for entry in made.get_vocab() if "深" in entry]
    assert all(len(entry.removeprefix("##")) == 1 for entry in with_deep)
    assert made.tokenize("deep学learning") == ["deep", "学", "learning"]


def test_lowercase_on_and_off():
    texts = ["Café Zürich café zürich"] * 5
    on, off = train(lambda: texts, 200), train(lambda: texts, 200, lowercase=False)
    assert on.tokenize("CAFÉ Zürich") == ["cafe", "zurich"]
    assert off.tokenize("Café zürich") == ["Café", "zürich"]


def test_rare_words_are_made_of_pieces_of_common_ones():
    """An entry for each would be trained hardly ever, and so would the pieces of unseen words."""
    texts = ["teaching banks"] * MIN_OCCURRENCES + ["river teaches"] * (MIN_OCCURRENCES - 1)
    made = train(lambda: texts, 30_000)
    assert {"teaching", "banks"} <= made.vocab.keys()
    assert made.vocab.keys().isdisjoint({"river", "teaches"})
    assert made.tokenize("teaches")[0].startswith("teach")


def test_a_trained_vocabulary_has_the_size_and_all_characters(documents):
    """It is the same each time, so a run that trains its tokenizer can be repeated exactly."""
    texts = sum(documents, [])
    made = train(lambda: texts, 150)
    vocabulary = made.get_vocab()
    assert sorted(vocabulary.values()) == list(range(150))
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert made.unk_token_id not in {number for text in texts for number in ids_of(made, text)}
    assert ids_of(made, "☃") == [made.unk_token_id]
    assert fingerprint(train(lambda: texts, 150)) == fingerprint(made)


def test_a_vocabulary_without_room_for_all_characters_keeps_its_size():
    syllables = [chr(0xAC00 + 20 * number) for number in range(500)]
    lines = [" ".join(syllables[start] + syllables[start - 1] for start in range(500))] * 6
    assert 150 < len(train(lambda: lines, 300, lowercase=False)) <= 300


@pytest.mark.parametrize("lowercase, way", [("on", "file"), ("off", "folder")])
def test_a_bare_vocabulary_is_read_as_transformers_does(vocabulary_file, lowercase, way):
    folder = str(vocabulary_file.parent)
    mine = load(folder if way == "folder" else str(vocabulary_file), lowercase)
    stock = BertTokenizer.from_pretrained(folder, do_lower_case=lowercase == "on")
    in_python = BertTokenizerLegacy(str(vocabulary_file), do_lower_case=lowercase == "on")
    assert mine.is_fast and len(mine) == len(stock) == len(in_python)
    seen = set()
    for text in TEXTS:
        ids = mine(text)["input_ids"]  # with [CLS] and [SEP]
        assert ids == stock(text)["input_ids"] == in_python(text)["input_ids"], text
        seen.update(ids)
    assert mine("one", "two") == stock("one", "two")
    assert len(seen) > 50 and mine.unk_token_id in seen  # the text reaches the entries
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(mine, f"{name}_token_id") == getattr(in_python, f"{name}_token_id")


@pytest.mark.parametrize("name", ["Paris", "paris"])
def test_a_bare_vocabulary_with_capitals_keeps_those_of_the_text(tmp_path, name):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL_TOKENS, "[unused1]", "the", name]))
    assert load(str(path)).tokenize("the Paris") == ["the", name]


def test_entries_with_other_line_breaks_keep_their_ids(tmp_path):
    breaks = ["a", "\u2028", "b", "\x0b", "\x85", "c", "##\u2029", "\x1c", "\x0c", "d"]
    path = tmp_path / "vocab.txt"
    path.write_bytes("\n".join([*SPECIAL_TOKENS, *breaks]).encode())
    made = load(str(path))
    assert read_vocabulary(path) == made.get_vocab() == numbered([*SPECIAL_TOKENS, *breaks])
    assert ids_of(made, "a b c d") == [5, 7, 10, 14]


def test_ends_of_a_vocabulary_file(tmp_path):
    path, entries = tmp_path / "vocab.txt", [*SPECIAL_TOKENS, "a"]
    path.write_bytes(("\ufeff" + "".join(f"{entry}\r\n" for entry in entries)).encode())
    assert read_vocabulary(path) == numbered(entries)


@pytest.mark.parametrize(
    "file, raw",
    [
        ("vocab.txt", b"[PAD]\n[CLS]\n[SEP]\na\n"),  # without [UNK] and [MASK]
        ("other.txt", b"text"),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_folder_without_a_good_tokenizer_is_named(tmp_path, file, raw):
    (tmp_path / file).write_bytes(raw)
    assert refused(load, str(tmp_path)).startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/nothing", "./gone"])
def test_a_bad_name_is_named_offline(name):
    text = refused(load, name)
    assert text.startswith(f"{name}: ") and "\n" not in text


def words_only(**special) -> PreTrainedTokenizerFast:
    model = tokenizers.models.WordLevel(numbered([*SPECIAL_TOKENS, "a"]), "[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), **special)


def test_special_tokens_that_a_tokenizer_lacks():
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    for some, lacking in (({}, "[PAD], [CLS], [SEP], [MASK]"), (special, "[MASK]")):
        assert lacking in refused(describe, words_only(**some))
    assert describe(words_only(**special, mask_token="[MASK]")).unknown_id == -1


def test_vocabulary_against_a_loop():
    made = bert()
    made.add_tokens(["whole"])
    made.add_special_tokens({"additional_special_tokens": ["[NAME]"]})
    made.backend_tokenizer.add_special_tokens(["<|endoftext|>"])  # special, but without a role
    found, entries = describe(made), [*ENTRIES, "whole", "[NAME]", "<|endoftext|>"]
    specials = {*SPECIAL_TOKENS, "[NAME]", "<|endoftext|>"}
    ids = (found.pad_id, found.unknown_id, found.cls_id, found.sep_id, found.mask_id)
    assert ids == (0, 1, 2, 3, 4) and found.size == len(entries)
    assert found.is_special.tolist() == [entry in specials for entry in entries]
    assert found.starts_word.tolist() == [not entry.startswith("##") for entry in entries]
    ordinary = [number for number, entry in enumerate(entries) if entry not in specials]
    assert found.ordinary_ids.tolist() == ordinary and found.ordinary_ids.dtype == np.uint32
    assert found.fingerprint == fingerprint(made)


def test_ids_without_an_entry_are_never_drawn():
    """A vocabulary with a line twice has an id that no entry holds."""
    found = describe(from_vocabulary({**numbered(SPECIAL_TOKENS), "a": 5, "b": 7}, True))
    assert found.size == 8 and found.is_special[6] and found.ordinary_ids.tolist() == [5, 7]


def test_fingerprint_does_not_change_with_use():
    made = bert()
    before = fingerprint(made)
    made(["the quick fox", "the"], truncation=True, max_length=4, padding="max_length")
    backend = made.backend_tokenizer
    assert backend.truncation and backend.padding  # the call has left its traces
    assert fingerprint(made) == before


def test_fingerprint_identifies_what_the_tokenizer_does():
    vocabulary = numbered(ENTRIES)
    more = {**vocabulary, "more": len(vocabulary)}
    swapped = {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}
    made = [from_vocabulary(entries, True) for entries in (vocabulary, more, swapped)]
    added = bert()
    added.add_tokens(["added"])
    found = [fingerprint(tokenizer) for tokenizer in (*made, added, bert(lowercase=False))]
    assert len(set(found)) == 5 and all(re.fullmatch("[0-9a-f]{16}", each) for each in found)
    reordered = from_vocabulary(dict(reversed(vocabulary.items())), True)
    assert fingerprint(reordered) == found[0]


ENGLISH = [
    "Hello world's best cafe, 2004 tries don't re-do it.",
    "the quick brown fox jumps over the lazy dog",
    "state-of-the-art e-mail x2",
    "models learn tokens and masks; 12 of 345 tokens (masked)!",
    "New York, New Jersey: $5.00 a day?",
] * 6
CHINESE = ["今天天气很好，我们去公园。", "深度学习模型2024年", "人工智能 BERT模型"] * 6


def wordpiece() -> BertTokenizer:
    return train(lambda: ENGLISH + CHINESE + [string.printable], 260, lowercase=False)


ALPHABET = string.ascii_letters + string.digits + string.punctuation
MAKERS = {
    "byte-level": lambda: byte_level(ENGLISH + CHINESE, 420),
    "sentencepiece": lambda: sentence_pieces(ENGLISH + CHINESE, 220, ALPHABET),
    "wordpiece": wordpiece,
}


@functools.cache
def known(kind: str):
    """A tokenizer that no test changes, and its vocabulary."""
    made = MAKERS[kind]()
    return made, describe(made)


def starts_of(vocabulary, encoding, text: str) -> np.ndarray:
    """bool: which tokens start a word, as a corpus is marked."""
    starts, ids = vocabulary.starts_word, np.array(encoding.ids, np.int64)
    flags = mark([(text, ())], [encoding], None if starts is None else starts[ids], "tokenizer")
    return (flags & WORD_START).astype(bool)


def words_of(made, text: str, vocabulary=None) -> list[str]:
    """The characters of each word, stripped."""
    encoding = made.backend_tokenizer.encode(text, add_special_tokens=False)
    starts = starts_of(vocabulary or describe(made), encoding, text)
    assert starts[:1].all()
    groups = []
    for is_start, (start, end) in zip(starts.tolist(), encoding.offsets):
        if is_start:
            groups.append([start, end])
        groups[-1][1] = max(groups[-1][1], end)
    words = [text[start:end].strip() for start, end in groups]
    return [word for word in words if word]


SIMPLE_WORD = st.sampled_from(
    ["hello", "World", "tokens", "x", "2004", "7", "quick", "Internationalization", "zq", "1st"]
)
MIXED = ["今", "天", "深度", "学习", "，", " ", "hello", " world", "龘", "2004", "。"]
GAP = st.sampled_from([" ", " ", "  ", ", ", ". ", " (", ") ", "-", "; ", "! "])


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.tuples(SIMPLE_WORD, GAP), max_size=8))
def test_words_of_ascii_text_are_runs_of_letters_digits_and_marks(kind, parts):
    """WordPiece keeps letters and digits together, and each mark apart."""
    made, vocabulary = known(kind)
    text = "".join(word + gap for word, gap in parts)
    runs = r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9\s]+"
    pattern = r"[A-Za-z0-9]+|[^A-Za-z0-9\s]" if kind == "wordpiece" else runs
    assert words_of(made, text, vocabulary) == re.findall(pattern, text)


def tokens_of(kind: str, text: str) -> list[tuple[int, int, bool]]:
    """(first character, end, whether a word starts there) of each token that is not a space."""
    made, vocabulary = known(kind)
    encoding = made.backend_tokenizer.encode(text, add_special_tokens=False)
    starts = starts_of(vocabulary, encoding, text)
    rows, after_space = [], False
    for token, (start, end), begins in zip(encoding.tokens, encoding.offsets, starts.tolist()):
        begins = begins or after_space  # a word may begin with tokens that hold its space alone
        is_space = not token.strip("\u2581\u0120")
        after_space = begins and is_space
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if not is_space:
            rows.append((start, end, begins))
    return rows


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=80, deadline=None)
@given(parts=st.lists(st.sampled_from([*MIXED, *"aéñ😀한カ—1.ß\u0301"]), max_size=10))
def test_a_word_starts_at_each_chinese_character_and_after_it(kind, parts):
    """If a token starts there; its bytes stay together. Unknown SentencePieces have no kind."""
    text, reached = "".join(parts).replace("龘", "模" if kind == "sentencepiece" else "龘"), 0
    for start, end, begins in tokens_of(kind, text):
        is_beside = start > 0 and re.search("[\u4e00-\u9fff]", text[start - 1 : start + 1])
        if start < end and start >= reached and is_beside:
            assert begins, f"{text[start:end]} at {start}"
        assert not (begins and start < min(reached, end)), f"{text[start:end]} at {start}"
        reached = max(reached, end)


def test_words_spelled_out():
    """Checks the reference itself."""
    roberta, xlm = MAKERS["byte-level"](), MAKERS["sentencepiece"]()
    words = ["Hello", "world", "'s", "best", ",", "2004", "x", "(", "don", "'t", ")!"]
    assert words_of(roberta, "Hello world's  best, 2004x (don't)!") == words
    for made in (roberta, xlm):
        assert words_of(made, "tokens, 12x2") == ["tokens", ",", "12", "x", "2"]
    assert words_of(roberta, "a café 龘今") == ["a", "café", "龘", "今"]
    assert describe(roberta).needs_space and not describe(xlm).needs_space


def test_a_sentence_always_starts_a_word():
    encoding = known("byte-level")[0].backend_tokenizer.encode("learning", add_special_tokens=False)
    flags = mark([("learning", ())] * 3, [encoding] * 3, None, "tokenizer")
    inside = len(encoding.ids) - 1
    assert inside > 0 and flags.tolist() == ([WORD_START] + [0] * inside) * 3
    assert mark([], [], None, "tokenizer").tolist() == []


NEW = ["myocardial infarction", "COVID-19", "Immunoglobulin", "c++", "今天", "zart"]
NEW_IN_TEXT = {
    "a myocardial infarction, c++ or COVID-19": ["myocardial infarction", "c++", "COVID-19"],
    "Immunoglobulin": ["Immunoglobulin"],
    "zarts of zart, xzart": ["zart"],
    "COVID-19x xCOVID-19 COVID-191": [],
    "说今天好今天": ["今天", "今天"],
    "zart zart": ["zart", "zart"],
    "the[name]of[Where]": ["[name]", "[Where]"],
    "(COVID-19)": ["COVID-19"],
}


def new_in(made, text: str, size: int) -> list[str]:
    """The characters of the tokens of `text` with ids from `size` on."""
    encoding = made.backend_tokenizer.encode(text, add_special_tokens=False)
    pairs = zip(encoding.ids, encoding.offsets)
    return [text[start:end].strip() for number, (start, end) in pairs if number >= size]


@pytest.mark.parametrize("kind", MAKERS)
def test_added_tokens_are_whole_in_the_text(kind, tmp_path):
    made = MAKERS[kind]()
    size, space = len(made), "" if kind == "wordpiece" else " "
    before = {word: ids_of(made, space + word) for word in NEW}
    assert new_words(made, NEW)[0] == NEW
    assert special_problems(made, ["[name]", "[Where]"], NEW) == []
    pieces = add_tokens(made, NEW, ["[name]", "[Where]"])
    ids = made.convert_tokens_to_ids([*NEW, "[name]", "[Where]"])
    assert sorted(pieces) == sorted(ids) == list(range(size, size + 8)) and len(made) == size + 8
    assert all(pieces[number] == before[word] for number, word in zip(ids, NEW))
    assert pieces[ids[6]] and all(number < size for found in pieces.values() for number in found)
    made.save_pretrained(tmp_path)
    again = load(str(tmp_path))
    assert fingerprint(again) == fingerprint(made) and len(again) == len(made)
    for used in (made, again):
        for text, expected in NEW_IN_TEXT.items():
            assert new_in(used, text, size) == expected, text
        found = describe(used)
        assert found.size == size + 8
        assert found.starts_word is None or found.starts_word[size:].all()
        assert found.is_special[size:].tolist() == [False] * 6 + [True] * 2
        assert set(ids[6:]) <= set(used.all_special_ids)
        words = words_of(used, "the myocardial infarction of COVID-19, zart", found)
        assert words[-5:] == ["myocardial infarction", "of", "COVID-19", ",", "zart"]


def test_added_tokens_are_found_in_any_case_if_the_tokenizer_lowers_it():
    made, plain = bert(), bert(lowercase=False)
    first, special = sorted(add_tokens(made, ["Café Noir"], ["[Name]"]))
    assert ids_of(made, "cafe noir") == ids_of(made, "CAFÉ NOIR") == [first]
    assert ids_of(made, "[Name]") == [special] and special not in ids_of(made, "[name]")
    (number,) = add_tokens(plain, ["COVID-19"], [])
    assert ids_of(plain, "COVID-19") == [number] and number not in ids_of(plain, "covid-19")


def test_a_special_token_may_take_a_name(tmp_path):
    made = bert()
    specials = {*made.all_special_tokens, "[EOT]", "[A=B]", "[C]"}
    pieces = add_tokens(made, [], ["eos_token=[EOT]", "[A=B]", "bos_token=[SEP]"])
    assert len(pieces) == 2  # [SEP] was there
    add_tokens(made, [], ["[C]"])  # earlier ones stay
    made.save_pretrained(tmp_path)
    for used in (made, load(str(tmp_path))):
        assert used.eos_token == "[EOT]" and used.bos_token == "[SEP]"
        assert set(used.all_special_tokens) == specials
