"""Marking: flags of words and entities against a loop over tokens and characters, lexicon terms
against a search place by place, sentences cut by sentencex, and a prepared corpus against each of
its sentences marked alone."""

import json
import sys

import numpy as np
import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import prepare as preparing
from pretrain.data.annotate import HAN, Markup, describe_script, mark, read_terms
from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START
from pretrain.data.prepare import prepare
from pretrain.data.sentences import Span, sentences
from pretrain.data.sources import check_files
from pretrain.data.tokenizer import SPECIAL_TOKENS, from_vocabulary

rjieba = pytest.importorskip("rjieba")
pytest.importorskip("sentencex")

CHINESE = "今天天气很好我们去公园北京大学"
S, T, W = ENTITY_START, ENTITY_INSIDE, WORD_START


@pytest.fixture(scope="module")
def tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz,.-"
    pieces = [*letters, *(f"##{letter}" for letter in letters), *dict.fromkeys(CHINESE)]
    entries = [*SPECIAL_TOKENS, *pieces, "heart", "##land", "##ing", "heartland"]
    return from_vocabulary({entry: number for number, entry in enumerate(entries)}, True)


def is_chinese(character: str) -> bool:
    return any(low <= ord(character) <= high for low, high in HAN)


def slow_flags(sentence: str, spans, tokenizer, words: str) -> list[int]:
    """Flags of one sentence, token by token."""
    encoding = tokenizer.backend_tokenizer.encode(sentence, add_special_tokens=False)
    begins = {0}  # of the words that jieba finds
    for word in rjieba.cut(sentence) if words == "jieba" else []:
        begins.add(max(begins) + len(word))
    flags, before = [], None
    for place, (token, (start, end)) in enumerate(zip(encoding.tokens, encoding.offsets)):
        flag = W if place == 0 or not token.startswith("##") else 0
        joins = start > 0 and is_chinese(sentence[start]) and is_chinese(sentence[start - 1])
        if words != "tokenizer" and joins and start not in begins:
            flag = 0
        touching = [n for n, (low, high) in enumerate(spans) if start < high and low < end]
        owner = touching[0] if touching else None
        if owner is not None:
            flag |= T if owner == before else S
        before = owner
        flags.append(flag)
    return flags


def fast_flags(sentences: list, tokenizer, words: str = "tokenizer") -> list[int]:
    texts = [text for text, _ in sentences]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    starts = []
    for encoding in encodings:
        starts += [n == 0 or not t.startswith("##") for n, t in enumerate(encoding.tokens)]
    return mark(sentences, encodings, np.array(starts, bool), words).tolist()


PARTS = st.sampled_from(["heart", "land", "ing ", " ", ", ", "x", "Él", "☃", *CHINESE])


@st.composite
def marked_sentences(draw):
    """Text of words, Chinese characters, spaces and marks, with spans over any characters."""
    text = "".join(draw(st.lists(PARTS, min_size=1, max_size=14))).strip() or "a"
    places = draw(st.lists(st.integers(0, len(text)), max_size=8, unique=True).map(sorted))
    return text, tuple(zip(places[::2], places[1::2]))


@settings(max_examples=150, deadline=None)
@given(
    sentences=st.lists(marked_sentences(), min_size=1, max_size=4),
    words=st.sampled_from(["tokenizer", "jieba", "spaces"]),
)
def test_flags_against_a_loop(tokenizer, sentences, words):
    expected = []
    for sentence in sentences:
        expected += slow_flags(*sentence, tokenizer, words)
    assert fast_flags(sentences, tokenizer, words) == expected


def test_flags_spelled_out(tokenizer):
    """Checks the loop itself."""
    tokens = ["heart", "##ing", ",", "北", "京", "大", "学", "heartland"]
    sentence = "hearting, 北京大学 heartland", ((0, 8), (10, 12), (12, 14))
    assert tokenizer.tokenize(sentence[0]) == tokens
    expected = [W | S, T, W, W | S, W | T, W | S, W | T, W]
    assert fast_flags([sentence], tokenizer) == expected
    assert slow_flags(*sentence, tokenizer, "tokenizer") == expected
    expected = [W | S, T, W, W | S, T, S, T, W]  # jieba knows 北京大学
    assert fast_flags([sentence], tokenizer, "jieba") == expected
    assert fast_flags([("北京 大学", ())], tokenizer, "spaces") == [W, 0, W, 0]
    # A sentence starts a word, and an entity.
    pair = [("a heart", ((0, 1),)), ("a", ((0, 1),))]
    assert fast_flags(pair, tokenizer) == [W | S, W, W | S]
    # A token that an entity touches belongs to it, even one that extends beyond it on both sides.
    assert fast_flags([("heartland.", ((3, 5),))], tokenizer) == [W | S, W]


def slow_find(text: str, terms, known, ignore_case: bool) -> list[tuple[int, int]]:
    """Tries every place: longest terms first, then from the left, without overlap."""

    def letter(character: str) -> bool:
        return character.isalnum() and not ("\u3040" <= character <= "\u9fff")

    def is_inside(place: int) -> bool:
        return 0 < place < len(text) and letter(text[place - 1]) and letter(text[place])

    fold = str.lower if ignore_case else str
    spans, folded = list(known), {fold(term) for term in terms}
    for length in sorted({len(term) for term in terms}, reverse=True):
        for start in range(len(text) - length + 1):
            end = start + length
            is_free = all(end <= low or high <= start for low, high in spans)
            is_term = fold(text[start:end]) in folded
            if is_term and is_free and not is_inside(start) and not is_inside(end):
                spans.append((start, end))
    return sorted(spans)


PIECE = st.sampled_from(
    ["heart", "Heart", "land", " ", "-", "a", "天", "今天", "天气", "1", "カ", "é"]
)
TERM = (
    st.lists(PIECE, min_size=1, max_size=3).map("".join).filter(lambda term: term == term.strip())
)


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(PIECE, max_size=10).map("".join),
    terms=st.lists(TERM, min_size=1, max_size=5),
    ignore_case=st.booleans(),
    known=st.booleans(),
)
def test_terms_against_a_search_place_by_place(text, terms, ignore_case, known):
    spans = ((1, 3),) if known and len(text) > 2 else ()
    found = Markup(lexicon=tuple(terms), ignore_case=ignore_case).find(text, spans)
    assert found == slow_find(text, terms, spans, ignore_case)


@pytest.mark.parametrize(
    "text, term",
    [
        ("İ heart", "heart"),  # a letter whose lower case is longer moves nothing
        ("cafe\u0301s cafe", "cafe"),  # a term ends with its combining marks
    ],
)
def test_terms_spelled_out(text, term):
    spans = Markup(lexicon=(term,), ignore_case=True).find(text)
    assert spans == [(text.rindex(term), len(text))]


def test_terms_of_a_file(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_bytes("\ufeff heart attack \r\n\n北\u2028京\nheart attack\n".encode())
    assert read_terms(str(path)) == ("heart attack", "北\u2028京")
    for raw in (b"\n \n", b"caf\xe9\n", None):
        path.write_bytes(raw) if raw else path.unlink()
        assert refused(read_terms, str(path)).startswith(f"{path}: ")


def test_sentences_are_cut_by_language(tmp_path):
    english, chinese = Markup("en").cut, Markup("zh").cut
    parts = ["Dr. Smith came.  ", "He left! ", "Why? "]
    assert english("".join(parts)) == parts
    parts = ["今天很好。", "我们去公园！"]
    assert [part.strip() for part in chinese("".join(parts))] == parts
    path, text = tmp_path / "a.jsonl", "We met. Who knows? Nobody. Not I."
    path.write_text(json.dumps({"text": text, "entities": [[12, 25]]}) + "\n")
    span = Span(str(path), 0, path.stat().st_size)
    assert len(english(text)) == 4  # of which two have an end inside the entity
    found = list(sentences([span], "jsonl", english))
    assert found == [("We met.", ()), ("Who knows? Nobody.", ((4, 17),)), ("Not I.", ()), None]
    # At a capital letter, such a space, and a period, the package panics.
    text = "We chose plan B\u00a0. Then we left."
    assert "".join(english(text)) == text


def test_parts_that_lose_characters_are_not_used(monkeypatch):
    monkeypatch.setattr("sentencex.segment", lambda language, line: line.split("."))
    assert Markup("en").cut("a. b. c") == ["a. b. c"]


@pytest.mark.parametrize("opened, closed", [(":(", "b)"), ("'", "'")])
def test_marks_pages_apart_hide_no_sentences(opened, closed):
    middle = ["He didn't see Dr. Smith. ", "«Who? ", "I.» "] * 10
    parts = [f"A {opened} sad day. ", *middle, f"Or {closed} came. ", "The end."]
    assert Markup("en").cut("".join(parts)) == parts
    parts = ["他走了。", "“她来了。", "我们去。", "你们去。", "他们去。”", "天黑了。"]
    assert Markup("zh").cut("".join(parts)) == parts
    parts = ['He said, "Stop! It is late." ', "We left."]  # a short speech stays whole
    assert Markup("en").cut("".join(parts)) == parts


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("aB.!? \"'()“«。！今\u3000\xa0é😀\t\x0b"), max_size=60))
def test_parts_of_a_line_make_the_line(line):
    assert "".join(Markup("en").cut(line)) == line == "".join(Markup("zh").cut(line))


@pytest.mark.parametrize(
    "sample, expected",
    [
        ("", (0, False)),
        ("今天 天气 很 好", (1, True)),
        ("今天天气很好，我们去公园。 北京大学", (1, False)),
        ("a word 今 天", (2 / 7, True)),
        ("\U00020000\U00020001a カ", (2 / 4, False)),
    ],
)
def test_the_script_of_a_text(sample, expected):
    assert describe_script(sample) == pytest.approx(expected)


@pytest.mark.parametrize("package", ["sentencex", "ahocorasick_rs", "rjieba"])
def test_a_missing_package_is_named(tokenizer, tmp_path, monkeypatch, package):
    path, markup = tmp_path / "text.txt", Markup("en", "jieba", ("heart",))
    path.write_text("今天 heart", encoding="utf-8")
    monkeypatch.setitem(sys.modules, package, None)
    more = {"tokenizer": tokenizer, "folder": tmp_path / "corpus", "markup": markup}
    told = refused(prepare, check_files([path]), "lines", **more)
    assert told.endswith(f"pip install {package.replace('_', '-')}")


def test_the_key_identifies_what_is_marked():
    markups = [Markup(), Markup("en"), Markup(words="jieba"), Markup(lexicon=("a",))]
    markups += [Markup(lexicon=("a", "b")), Markup(lexicon=("a",), ignore_case=True)]
    assert len({str(markup.key) for markup in markups}) == len(markups)
    markups[3].find("a")
    assert markups[3].key == Markup(lexicon=("a",)).key


TEXT = [
    "heart, heartland 北京大学 today. The heart of it! 今天天气很好。我们去公园。",
    "",
    "Heart\t北 京 大学",
    "no more",
    "",
    "heart",
    "",
    "北京北京。heartland of hearts",
    "x",
] * 6


def joined(corpus) -> dict[str, list[int]]:
    """Arrays of all shards, offsets as lengths."""
    found = {name: [] for name in ("ids", "flags", "hashes", "sentences", "documents")}
    for index in range(corpus.num_shards):
        shard = corpus.shard(index)
        for name, values in found.items():
            array = getattr(shard, name)
            values += (array if name in ("ids", "flags", "hashes") else np.diff(array)).tolist()
    return found


@pytest.mark.parametrize(
    "markup",
    [Markup("en", "jieba", ("heart", "北京", "Heart of"), True), Markup("", "spaces")],
    ids=["all", "spaces"],
)
def test_a_corpus_is_marked_as_each_sentence_alone(tokenizer, tmp_path, monkeypatch, markup):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT), encoding="utf-8")
    sources, ids, flags, lengths = check_files([path]), [], [], []
    for line in TEXT:
        for part in markup.cut(line) if markup.cut and line else [line]:
            part = part.strip()
            if part:
                lengths.append(len(tokenizer.tokenize(part)))
                ids += tokenizer(part, add_special_tokens=False)["input_ids"]
                spans = slow_find(part, markup.lexicon, (), markup.ignore_case)
                flags += slow_flags(part, spans, tokenizer, markup.words)
    found = []
    for piece_bytes, batch in ((1 << 20, 1 << 20), (90, 1 << 20), (400, 7)):
        monkeypatch.setattr(preparing, "BATCH_CHARACTERS", batch)
        folder = tmp_path / str(piece_bytes)
        corpus = prepare(sources, "sentences", tokenizer, folder, piece_bytes, markup)
        assert (corpus.num_shards > 1) == (piece_bytes < 1 << 20)
        found.append(joined(corpus))
    expected = {"ids": ids, "flags": flags, "sentences": lengths}
    assert {name: found[0][name] for name in expected} == expected
    assert all(other == found[0] for other in found)
    info = corpus.info
    assert info["words"] == sum(flag & W > 0 for flag in flags)
    assert info["words_by"] == markup.words
    assert info["entities"] == sum(flag & S > 0 for flag in flags)
    assert bool(info["entities"]) == bool(markup.lexicon)
