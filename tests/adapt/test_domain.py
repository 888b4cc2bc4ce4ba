"""Texts compared by their words.

Counts equal a slow loop, pieces equal the tokens of transformers for each single word, and
--add-tokens accepts the candidates unchanged.
"""

import json
import unicodedata
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import refusal, script, sentence_pieces, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.adapt import domain
from pretrain.config import TextOptions
from pretrain.data import tokenizer as tokenizers
from pretrain.data.sources import read_lines
from pretrain.inputs import check_text

rjieba = pytest.importorskip("rjieba")
imread = pytest.importorskip("matplotlib.image").imread

DOMAIN = script("domain").main
ENGLISH = "The Bank's river, the bank-note; 2024 e\u0301tude étude x_y B2B 3rd ½ naïve.\n\n"
ENGLISH += "BANK? bank! ÉTUDE ٣\n"
CHINESE = "今天心情很好，我们去公园散步。\n他在北京大学学习人工智能，第5年GPT模型。\n\n"
CHINESE += "今天天气不错，北京大学很大。\n"
SEGMENTED = "今天 心情 很 好 ， 我们 去 公园 散步 。\n他 在 北京 大学 学习 ， 第 5 年 GPT 模型 。\n"


@pytest.fixture
def text_of(tmp_path, cache):
    """Some content as checked text, as in the command."""

    def make(content, **options):
        path = tmp_path / "text.txt"
        path.write_text(content, encoding="utf-8")
        options = TextOptions(cache=str(cache), format="sentences", **options)
        return check_text([str(path)], "--input text", options, "word")

    return make


def is_word(text):
    return all(unicodedata.category(character)[0] in "LNM" for character in text)


def slow_count(content, words):
    """Counts words character by character; `words` is the value of --words."""
    counts = Counter()
    for line in unicodedata.normalize("NFC", content).split("\n"):
        spaced = ""
        for character in line:
            is_alone = words == "tokenizer" and tokenizers.is_unspaced(character)
            # A mark alone is no word: many emoji are a symbol and a selector, which is a mark.
            is_loose = unicodedata.category(character)[0] == "M" and not spaced[-1:].strip()
            is_inside = is_word(character) and not is_loose
            spaced += f" {character} " if is_alone else character if is_inside else " "
        found = filter(is_word, rjieba.cut(line)) if words == "jieba" else spaced.split()
        counts.update(word for word in found if not word.isnumeric())
    return counts


@pytest.mark.parametrize(
    "content, words, chosen, some",
    [
        (ENGLISH, "auto", "tokenizer", {"étude": 2, "B2B": 1, "3rd": 1, "x": 1, "s": 1, "BANK": 1}),
        (CHINESE, "auto", "jieba", {"北京大学": 2}),
        (SEGMENTED, "auto", "spaces", {"北京": 1}),
        (CHINESE, "tokenizer", "tokenizer", {"北": 2, "GPT": 1, "5": 0}),
    ],
)
def test_word_counts_equal_a_slow_form(content, words, chosen, some, text_of):
    text = text_of(content, words=words)
    counts = domain.count_words(text)
    assert text.markup.words == chosen and counts == slow_count(content, chosen)
    assert {word: counts[word] for word in some} == some and not counts.keys() & {"2024", "½", "٣"}


CHARACTERS = [*"aB1é_'- 北京語x²٣", "e\u0301", "x\u0301", "\u0301", "हि", "สวัส", "\u2764\ufe0f"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(CHARACTERS), max_size=30), st.sampled_from(["tokenizer", "spaces"]))
def test_words_of_any_line_are_those_of_the_slow_form(characters, words):
    line, markup = "".join(characters), SimpleNamespace(words=words)
    text = SimpleNamespace(markup=markup, sentences=lambda: [(line, ()), None])
    assert domain.count_words(text) == slow_count(line, words)


def test_the_bound_on_distinct_words_keeps_the_frequent_ones(text_of, monkeypatch):
    """Rare words come and go; words that are frequent throughout keep their counts."""
    rare = [f"{chr(97 + number % 26)}{chr(97 + number // 26)}rare" for number in range(300)]
    text = text_of("".join(f"often always {word}\n" for word in rare))
    everything = domain.count_words(text)
    monkeypatch.setattr(domain, "MAX_DISTINCT", 40)
    bounded = domain.count_words(text)
    assert len(everything) == 302 and len(bounded) <= 40
    assert bounded["often"] == bounded["always"] == everything["often"] == 300
    assert all(count <= everything[word] for word, count in bounded.items())


# Stop words and the order of words.


def test_stop_words_come_from_the_lists_or_a_file(tmp_path):
    both = domain.stop_words("auto")
    assert {"the", "and", "的", "我们", "没有"} <= both and not both & {"bank", "银行", ""}
    (tmp_path / "stop.txt").write_text("Bank\n  river \n", encoding="utf-8")
    assert domain.stop_words(str(tmp_path / "stop.txt")) == {"bank", "river"}
    assert domain.stop_words("none") == set()


def test_words_are_ranked_by_count_then_by_the_alphabet():
    counts = {"Bank": 2, "bank": 3, "river": 5, "é": 5, "Apple": 5, "北": 5, "a": 9, "的": 7}
    ranked = ["apple", "bank", "river", "é", "北"]
    assert domain.frequent_words(Counter(counts), {"的"}) == ranked
    assert domain.frequent_words(Counter(counts), set()) == ["的", *ranked]


# How a tokenizer breaks words.

COUNTS = Counter({"bank": 50, "Banking": 9, "banking": 3, "riverization": 6, "RÉSUMÉ": 7, "Ω": 8})
COUNTS |= {"zebra": 4, "the": 30, "modelization": 20, "quickly": 5, "Ünlöwed": 5}
COUNTS["moneyermoney"] = 11


@pytest.mark.parametrize("kind", ["lower-casing", "byte-level"])
def test_pieces_equal_each_word_tokenized_alone(kind, tiny_tokenizer, roberta_tokenizer):
    tokenizer = {"lower-casing": tiny_tokenizer, "byte-level": roberta_tokenizer}[kind]
    space = " " if kind == "byte-level" else ""

    def pieces(word):
        return tokenizer(space + word, add_special_tokens=False).input_ids

    def is_unknown(word):
        return tokenizer.unk_token_id in pieces(word)

    shares, broken = domain.fragmentation(COUNTS, tokenizer, {"the"})
    num_pieces = sum(count * len(pieces(word)) for word, count in COUNTS.items())
    num_unknown = sum(count for word, count in COUNTS.items() if is_unknown(word))
    assert shares["pieces_per_word"] == pytest.approx(num_pieces / COUNTS.total())
    assert shares["unknown_share"] == pytest.approx(num_unknown / COUNTS.total())
    assert (num_unknown > 0) == (kind != "byte-level") and num_pieces > COUNTS.total()

    read = Counter()
    for word, count in COUNTS.items():
        letters = [
            c for c in unicodedata.normalize("NFD", word.lower()) if not "\u0300" <= c < "\u0370"
        ]
        read["".join(letters) if kind == "lower-casing" else word] += count
    expected = [
        (word, count, len(pieces(word)))
        for word, count in read.items()
        if count >= 5 and word != "the" and (len(pieces(word)) > 1 or is_unknown(word))
    ]
    assert broken == sorted(expected, key=lambda entry: (-entry[1] * entry[2], entry[0]))
    assert len(broken) >= 4


def test_a_chinese_word_has_no_piece_for_a_space_that_its_text_lacks(tmp_path):
    lines = ["很好今天", "去今天我们", "好今天", "我们很好今天去"] * 9
    sentence_pieces(lines, 40).save_pretrained(tmp_path)
    tokenizer = tokenizers.load(str(tmp_path))
    assert "今天" in tokenizer("我们今天", add_special_tokens=False).tokens()
    assert tokenizer("今天", add_special_tokens=False).tokens() == ["▁", "今天"]
    shares, _ = domain.fragmentation(Counter({"今天": 5}), tokenizer, set())
    assert shares["pieces_per_word"] == 1


# The command.


@pytest.fixture(scope="module")
def home(documents, tiny_tokenizer, tmp_path_factory):
    """English text of two kinds, Chinese text, and a tokenizer for each script."""
    half, folder = len(documents) // 2, tmp_path_factory.mktemp("domain")
    word = "Bank-Zebras crossed riverization! the hippopotamus Ω\nRésumé {}x."
    texts = {
        "other.txt": "\n\n".join(word.format(letter) for letter in "abcdefghi") + "\n",
        "zh.txt": CHINESE * 8,
        "more.txt": "river rivers more\n\nthe bank\n",
        "stops.txt": "bank\n",
        "only.txt": "the of and\nof the, 2024!\n",
    }
    write_documents(folder / "one.txt", documents[:half])
    write_documents(folder / "two.txt", documents[half:])
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    characters = [character for character in CHINESE if character not in "散步"]
    tokenizers.train(lambda: iter(characters), 120).save_pretrained(folder / "chinese")
    return folder


@pytest.fixture
def compare(home, cache, tmp_path, capsys):
    """Run the command; returns (JSON on its last line, its output, its folder)."""

    def run(line):
        output = tmp_path / "out"
        more = ["--format", "sentences", "--cache", str(cache), "--output", str(output)]
        DOMAIN([*line.replace("HOME", str(home)).split(), *more])
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed, output

    return run


def test_the_command_prints_writes_and_draws_what_it_compares(compare, home):
    result, printed, output = compare(
        "--input one=HOME/one.txt two=HOME/two.txt two=HOME/more.txt other=HOME/other.txt "
        "--top 50 --tokenizer HOME/tokenizer --candidates 3 --stop-words HOME/stops.txt"
    )
    assert json.loads((output / "domain.json").read_text(encoding="utf-8")) == result
    files, frequent = {"one": ["one"], "two": ["two", "more"], "other": ["other"]}, {}
    size = result["words_compared"]
    for name, of in files.items():
        content = "\n".join((home / f"{file}.txt").read_text(encoding="utf-8") for file in of)
        counts, facts = slow_count(content, "tokenizer"), result["texts"][name]
        frequent[name] = set(domain.frequent_words(counts, {"bank"})[:size])
        assert facts["words"] == counts.total() and facts["distinct_words"] == len(counts)
        candidates = (output / f"candidates-{name}.txt").read_text(encoding="utf-8")
        assert candidates.count("\n") == 3
    assert list(result["overlap"]) == list(files) and size < 50
    for one, row in result["overlap"].items():
        assert row == {other: len(frequent[one] & frequent[other]) / size for other in files}
        assert f"| {one} | " + " | ".join(f"{share:.0%}" for share in row.values()) in printed
    assert result["overlap"]["one"]["two"] > result["overlap"]["one"]["other"]
    assert imread(output / "overlap.png").shape[0] > 400


@pytest.mark.parametrize(
    "text, name, some",
    [
        ("other", "tokenizer", {"zebras", "hippopotamus", "ω"}),
        ("zh", "chinese", {"北京大学", "散步"}),
    ],
)
def test_add_tokens_accepts_the_candidates(text, name, some, compare, home):
    _, _, output = compare(f"--input text=HOME/{text}.txt --tokenizer HOME/{name}")
    words = read_lines(str(output / "candidates-text.txt"))
    assert some <= set(words) and len(set(words)) == len(words)
    tokenizer = tokenizers.load(str(home / name))
    size = len(tokenizer)
    added = tokenizers.add_tokens(tokenizer, words, [])
    assert len(added) == len(words) == len(tokenizer) - size
    for word in words:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        assert ids == [tokenizer.convert_tokens_to_ids(word)]


ONE = "--input one=HOME/one.txt"


@pytest.mark.parametrize(
    "line, named",
    [
        ("", "--input: "),
        ("--input HOME/one.txt", "--input HOME/one.txt: "),
        ("--input =x.txt", "--input =x.txt: "),
        ("--input a/b=x.txt", "--input a/b=x.txt: "),
        ("--input one=HOME/absent.txt", "--input one HOME/absent.txt: "),
        ("--input one=CORPUS", "--input one CORPUS: "),
        (f"{ONE} only=HOME/only.txt", "--input only: "),
        (f"{ONE} --stop-words HOME/no.txt", "--stop-words HOME/no.txt: "),
        (f"{ONE} --tokenizer HOME/absent", "--tokenizer HOME/absent: "),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    line, named, home, corpus, cache, tmp_path, capsys
):
    for name, folder in (("HOME", home), ("CORPUS", corpus.folder)):
        line, named = line.replace(name, str(folder)), named.replace(name, str(folder))
    words = [*line.split(), "--cache", cache, "--output", tmp_path / "out"]
    refusal(DOMAIN, words, capsys, named, tmp_path / "out")
