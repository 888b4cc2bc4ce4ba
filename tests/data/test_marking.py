"""Marking: flags of words and entities against a loop over tokens and characters, terms of a lexicon against a search place by
place, sentences cut by sentencex, and a prepared corpus against each of its sentences marked alone."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.command import UserError
from pretrain.data import preparing, reading
from pretrain.data.corpus import ARRAYS, ENTITY_INSIDE, ENTITY_START, WORD_START
from pretrain.data.marking import HAN, Markup, describe_script, is_han, mark, read_terms
from pretrain.data.preparing import prepare
from pretrain.data.tokenizer import SPECIAL_TOKENS, from_vocabulary

rjieba = pytest.importorskip("rjieba")
pytest.importorskip("sentencex")

CHINESE = "今天天气很好我们去公园北京大学"


@pytest.fixture(scope="module")
def tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz,.-"
    words = ["heart", "##land", "##ing", "heartland"]
    entries = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *dict.fromkeys(CHINESE), *words]
    return from_vocabulary({entry: number for number, entry in enumerate(entries)}, True)


def message(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


# ---------------------------------------------------------------- flags

def slow_flags(sentence: str, spans, tokenizer, words: str) -> list[int]:
    """Flags of one sentence, token by token."""
    encoding = tokenizer.backend_tokenizer.encode(sentence, add_special_tokens=False)
    begins = {0}  # where words that are told begin
    for word in rjieba.cut(sentence) if words == "jieba" else []:
        begins.add(max(begins) + len(word))
    flags, before = [], None
    for place, (token, (start, end)) in enumerate(zip(encoding.tokens, encoding.offsets)):
        flag = WORD_START * (place == 0 or not token.startswith("##"))
        chinese = [at > 0 and any(low <= ord(character) <= high for low, high in HAN)
                   for at, character in ((start, sentence[start]), (start, sentence[start - 1]))]
        if words != "tokenizer" and all(chinese) and start not in begins:
            flag = 0
        owner = next((number for number, span in enumerate(spans) if start < span[1] and span[0] < end), None)
        if owner is not None:
            flag |= ENTITY_INSIDE if owner == before else ENTITY_START
        before = owner
        flags.append(flag)
    return flags


def fast_flags(sentences: list, tokenizer, words: str = "tokenizer") -> list[int]:
    encodings = tokenizer.backend_tokenizer.encode_batch([text for text, _ in sentences], add_special_tokens=False)
    counts = [len(encoding.ids) for encoding in encodings]
    starts = np.array([0, *np.cumsum(counts)[:-1]])[np.array(counts) > 0]
    pieces = np.array([not token.startswith("##") for encoding in encodings for token in encoding.tokens], bool)
    pieces[starts] = True
    return mark(sentences, encodings, pieces, words).tolist()


@st.composite
def marked_sentences(draw):
    """Text of words, Chinese characters, spaces and marks, with spans over any of its characters."""
    text = "".join(draw(st.lists(st.sampled_from(["heart", "land", "ing ", " ", ", ", "x", "Él", "☃", *CHINESE]), min_size=1, max_size=14)))
    text = text.strip() or "a"
    places = draw(st.lists(st.integers(0, len(text)), max_size=8, unique=True).map(sorted))
    return text, tuple(zip(places[::2], places[1::2]))


@settings(max_examples=300, deadline=None)
@given(sentences=st.lists(marked_sentences(), min_size=1, max_size=4), words=st.sampled_from(["tokenizer", "jieba", "spaces"]))
def test_flags_against_a_loop(tokenizer, sentences, words):
    expected = [flag for text, spans in sentences for flag in slow_flags(text, spans, tokenizer, words)]
    assert fast_flags(sentences, tokenizer, words) == expected


def test_flags_spelled_out(tokenizer):
    """Holds the loop itself."""
    text = "hearting, 北京大学 heartland"
    S, T, W = ENTITY_START, ENTITY_INSIDE, WORD_START
    tokens = tokenizer.tokenize(text)
    assert tokens == ["heart", "##ing", ",", "北", "京", "大", "学", "heartland"]
    spans = ((0, 8), (10, 12), (12, 14))
    assert fast_flags([(text, spans)], tokenizer) == [W | S, T, W, W | S, W | T, W | S, W | T, W]
    assert fast_flags([(text, spans)], tokenizer, "jieba") == [W | S, T, W, W | S, T, S, T, W]  # jieba knows 北京大学
    assert fast_flags([("北京 大学", ())], tokenizer, "spaces") == [W, 0, W, 0]
    assert fast_flags([("北京", ()), ("大学", ((0, 1),))], tokenizer, "spaces") == [W, 0, W | S, 0]  # a sentence begins a word
    assert fast_flags([("a heart", ((0, 1),)), ("a", ((0, 1),))], tokenizer) == [W | S, W, W | S]  # and an entity


@pytest.mark.parametrize("span, flags", [((0, 9), 1), ((0, 1), 1), ((8, 9), 1), ((3, 5), 1), ((9, 10), 0)])
def test_a_token_that_an_entity_touches_is_of_it(tokenizer, span, flags):
    """Even one that goes on at both sides of the entity."""
    assert fast_flags([("heartland.", (span,))], tokenizer)[0] == WORD_START | ENTITY_START * flags


def test_words_of_text_without_chinese_are_the_tokenizers(tokenizer):
    sentences = [("heartland hearting x", ()), ("hear, lx", ((1, 3),))]
    assert fast_flags(sentences, tokenizer, "jieba") == fast_flags(sentences, tokenizer, "spaces") == fast_flags(sentences, tokenizer)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(CHINESE + "ab1 ,。\r\t\u3000😀\x01"), max_size=20))
def test_jieba_keeps_every_character(text):
    """What `mark` relies on."""
    assert "".join(rjieba.cut(text)) == text


# ---------------------------------------------------------------- lexicon

def slow_find(text: str, terms: list[str], known, ignore_case: bool) -> list[tuple[int, int]]:
    """Longest first, then from the left, each where nothing is yet: tried at every place."""
    def letter(character: str) -> bool:
        return character.isalnum() and not ("\u3040" <= character <= "\u9fff")

    fold = str.lower if ignore_case else str
    spans = list(known)
    for length in sorted({len(term) for term in terms}, reverse=True):
        for start in range(len(text) - length + 1):
            end = start + length
            if fold(text[start:end]) not in {fold(term) for term in terms if len(term) == length}:
                continue
            cuts = any(0 < place < len(text) and letter(text[place - 1]) and letter(text[place]) for place in (start, end))
            if not cuts and all(end <= low or high <= start for low, high in spans):
                spans.append((start, end))
    return sorted(spans)


PIECE = st.sampled_from(["heart", "Heart", "land", " ", "-", "a", "天", "今天", "天气", "1", "カ", "é"])


@settings(max_examples=300, deadline=None)
@given(text=st.lists(PIECE, max_size=10).map("".join), terms=st.lists(st.lists(PIECE, min_size=1, max_size=3).map("".join).filter(
    lambda term: term == term.strip() != ""), min_size=1, max_size=5), ignore_case=st.booleans(), known=st.booleans())
def test_terms_against_a_search_place_by_place(text, terms, ignore_case, known):
    spans = ((1, 3),) if known and len(text) > 2 else ()
    found = Markup(lexicon=tuple(terms), ignore_case=ignore_case).find(text, spans)
    assert found == slow_find(text, terms, spans, ignore_case)


def test_terms_spelled_out():
    def found(text, *terms, known=(), ignore_case=False):
        return [text[start:end] for start, end in Markup(lexicon=terms, ignore_case=ignore_case).find(text, known)]

    assert found("heart, heartland and HEART-heart", "heart") == ["heart", "heart"]
    assert found("heart, heartland and HEART-heart", "heart", ignore_case=True) == ["heart", "HEART", "heart"]
    assert found("heart", "Heart", ignore_case=True) == ["heart"] and found("heart", "Heart") == []
    assert found("heart attack of heart", "heart", "heart attack", "attack of heart") == ["heart", "attack of heart"]
    assert found("今天天气好", "天气", "天天气", "今天") == ["天天气"]
    assert found("a heart attack", "heart attack", "a", known=((2, 7),)) == ["a", "heart"]
    assert found("type 2 diabetes2", "diabetes", "type 2") == ["type 2"]
    assert found("x\ud7ffy", "z") == [] and Markup().find("heart", ((0, 1),)) == [(0, 1)]


def test_a_letter_whose_lower_case_is_longer_moves_nothing():
    text = "İ heart"
    assert [text[start:end] for start, end in Markup(lexicon=("heart", "İ"), ignore_case=True).find(text)] == ["İ", "heart"]


def test_terms_of_a_file(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_bytes("\ufeff heart attack \r\n\n北京\nheart attack\n".encode())
    assert read_terms(str(path)) == ("heart attack", "北京")
    path.write_text("\n \n")
    assert message(read_terms, str(path)) == f"--lexicon {path}: holds no term; needed is one a line"
    assert message(read_terms, str(tmp_path / "gone")).startswith(f"--lexicon {tmp_path / 'gone'}: cannot be read as UTF-8 text (")


# ---------------------------------------------------------------- sentences, script, extras

def test_sentences_are_cut_by_language():
    assert Markup().cut is None
    assert Markup("en").cut("Dr. Smith came.  He left! Why? ") == ["Dr. Smith came.  ", "He left! ", "Why? "]
    assert [part.strip() for part in Markup("zh").cut("今天很好。我们去公园！")] == ["今天很好。", "我们去公园！"]


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from('ab.!? "\'()。！今\u3000é😀\t\x0b'), max_size=30))
def test_parts_of_a_line_make_the_line(line):
    assert "".join(Markup("en").cut(line)) == line == "".join(Markup("zh").cut(line))


def test_a_cut_that_loses_characters_is_not_taken(monkeypatch):
    import sentencex

    monkeypatch.setattr(sentencex, "segment", lambda language, line: [part.strip() for part in line.split(".")])
    assert Markup("en").cut("a. b. c") == ["a. b. c"]


def test_an_end_of_a_sentence_inside_an_entity_is_none(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "We met. Who knows? Nobody. Not I."
    path.write_text(json.dumps({"text": text, "entities": [[12, 25]]}) + "\n")
    assert len(Markup("en").cut(text)) == 4
    assert list(reading.sentences([reading.Span(str(path), 0, path.stat().st_size)], "jsonl", Markup("en").cut)) == [
        ("We met.", ()), ("Who knows? Nobody.", ((4, 17),)), ("Not I.", ()), None]


@pytest.mark.parametrize("sample, expected", [
    ("This is English.", (0, False)), ("今天天气很好", (1, False)), ("今天 天气 很 好", (1, True)), ("", (0, False)),
    ("今天天气很好，我们去公园。 北京大学", (1, False)), ("a word 今 天", (2 / 7, True)), ("1234 ...", (0, False)),
    ("今天 weather", (2 / 9, False)), ("今天天 weather", (0.3, False)), ("\U00020000\U00020001a", (2 / 3, False)), ("カタカナ", (0, False)),
])
def test_the_script_of_a_text(sample, expected):
    assert describe_script(sample) == pytest.approx(expected)


def test_chinese_characters_are_told_by_their_ranges():
    text = "a今\u33ff\u3400\u4dbf\u4dc0\u4e00\u9fff\ua000\U00020000\U000323af\U000323b0。カ\uf900\ud800"
    assert [character for character, found in zip(text, is_han(text)) if found] == list(
        "今\u3400\u4dbf\u4e00\u9fff\U00020000\U000323af\uf900")


@pytest.mark.parametrize("module, package, use", [
    ("sentencex", "sentencex", lambda: Markup("en").cut), ("ahocorasick_rs", "ahocorasick-rs", lambda: Markup(lexicon=("a",)).find("a")),
    ("rjieba", "rjieba", lambda: mark([("今", ())], [SimpleNamespace(ids=[5], offsets=[(0, 1)])], np.ones(1, bool), "jieba")),
])
def test_a_missing_extra_is_told_with_its_command(monkeypatch, module, package, use):
    monkeypatch.setitem(sys.modules, module, None)
    assert message(use).endswith(f": needs the package {package}, which is not installed: pip install {package}")


def test_the_key_names_what_is_marked():
    markups = [Markup(), Markup("en"), Markup("zh"), Markup(words="jieba"), Markup(words="spaces"), Markup(lexicon=("a",)),
               Markup(lexicon=("b",)), Markup(lexicon=("a", "b")), Markup(lexicon=("a",), ignore_case=True)]
    assert len({str(markup.key) for markup in markups}) == len(markups)
    used = Markup(lexicon=("a",))
    used.find("a")
    assert used.key == Markup(lexicon=("a",)).key and used == Markup(lexicon=("a",))


# ---------------------------------------------------------------- prepared

TEXT = ["heart, heartland 北京大学 today. The heart of it! 今天天气很好。我们去公园。", "", "Heart\t北 京 大学", "no more", "", "heart", "",
        "北京北京。heartland of hearts", "x"] * 6


def concatenated(corpus) -> list[list[int]]:
    shards = [corpus.shard(index) for index in range(corpus.num_shards)]
    lengths = [np.concatenate([np.diff(getattr(shard, name)) for shard in shards]).tolist() for name in ("sentences", "documents")]
    return [np.concatenate([getattr(shard, name) for shard in shards]).tolist() for name in ("ids", "flags", "hashes")] + lengths


@pytest.mark.parametrize("markup", [
    Markup("en", "jieba", ("heart", "北京", "Heart of"), True), Markup("", "spaces", ("heart",)), Markup("zh"),
    Markup("", "tokenizer", ("京大",)), Markup("", "jieba"),
], ids=["all", "spaces", "cut", "lexicon", "jieba"])
def test_a_corpus_is_marked_as_each_sentence_alone(tokenizer, tmp_path, monkeypatch, markup):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT), encoding="utf-8")
    sources = reading.check_files([path], "--train")
    ids, flags, lengths = [], [], []
    for line in TEXT:
        for part in markup.cut(line) if markup.cut and line else [line]:
            part = part.strip()
            if part:
                ids += tokenizer(part, add_special_tokens=False)["input_ids"]
                spans = slow_find(part, list(markup.lexicon), (), markup.ignore_case)
                flags += slow_flags(part, spans, tokenizer, markup.words)
                lengths.append(len(tokenizer.tokenize(part)))
    found = []
    for number, (piece_bytes, batch) in enumerate(((1 << 20, 1 << 20), (90, 1 << 20), (1, 1 << 20), (400, 7))):
        monkeypatch.setattr(preparing, "BATCH_CHARACTERS", batch)
        corpus = prepare(sources, "sentences", tokenizer, tmp_path / str(number), piece_bytes, markup)
        found.append(concatenated(corpus))
        assert (corpus.num_shards > 1) == (piece_bytes < 1 << 20)
    assert found[0][:2] == [ids, flags] and found[0][3] == lengths
    assert all(other == found[0] for other in found)
    info = corpus.info
    assert info["words"] == sum(flag & WORD_START > 0 for flag in flags) and info["words_by"] == markup.words
    assert info["entities"] == sum(flag & ENTITY_START > 0 for flag in flags) and bool(info["entities"]) == bool(markup.lexicon)


def test_given_entities_reach_the_corpus(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a heart\\nheartland x", "entities": [[2, 7], [8, 17]]}\n{"text": "北京大学 heart", "entities": [[1, 3]]}\n')
    sources = reading.check_files([path], "--train")
    S, T, W = ENTITY_START, ENTITY_INSIDE, WORD_START
    corpus = prepare(sources, "jsonl", tokenizer, tmp_path / "one")
    assert corpus.shard(0).flags.tolist() == [W, W | S, W | S, W, W, W | S, W | T, W, W] and corpus.info["entities"] == 3
    corpus = prepare(sources, "jsonl", tokenizer, tmp_path / "two", markup=Markup("", "jieba", ("heart", "京大学")))
    assert corpus.shard(0).flags.tolist() == [W, W | S, W | S, W, W, S, T, 0, W | S]


def test_pieces_of_another_markup_are_not_taken(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT), encoding="utf-8")
    sources = reading.check_files([path], "--train")
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_join_small", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(sources, "sentences", tokenizer, tmp_path / "corpus")
    found = prepare(sources, "sentences", tokenizer, tmp_path / "corpus", markup=Markup(lexicon=("heart",)))
    assert found.info["entities"] > 0
    assert set(ARRAYS) == set(found.info["shards"][0]["arrays"])
    assert not list(found.folder.glob("*.piece.json")) and not (found.folder / "content.key").exists()


def test_a_term_ends_with_its_combining_marks():
    assert Markup(lexicon=("\u0915", "\u0930\u093e\u092e")).find("\u0915\u093f \u0930\u093e\u092e \u0930\u093e\u092e\u0940") == [(3, 6)]
    assert Markup(lexicon=("cafe",)).find("cafe\u0301s cafe") == [(7, 11)]
