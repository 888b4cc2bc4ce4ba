"""Texts compared by their words: counts equal a slow form, overlap equals set arithmetic, pieces equal those of transformers' tokenizer for
each word by itself, the candidates are taken by --add-tokens as they are; and every bad input in one message."""
import json
import re
import unicodedata
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import refusal, script
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import domain
from pretrain.command import UserError
from pretrain.config import TextOptions
from pretrain.data import tokenizer as tokenizers
from pretrain.data.reading import read_lines
from pretrain.runtime.distributed import World
from pretrain.text import check_text

rjieba = pytest.importorskip("rjieba")
imread = pytest.importorskip("matplotlib.image").imread

DOMAIN = script("domain")
ENGLISH = "The Bank's river, the bank-note; 2024 e\u0301tude étude x_y B2B 3rd ½ naïve.\n\nBANK? bank! ÉTUDE ٣\n"
CHINESE = "今天心情很好，我们去公园散步。\n他在北京大学学习人工智能，第5年GPT模型。\n\n今天天气不错，北京大学很大。\n"
SEGMENTED = "今天 心情 很 好 ， 我们 去 公园 散步 。\n他 在 北京 大学 学习 人工智能 ， 第 5 年 GPT 模型 。\n"


@pytest.fixture
def text_of(tmp_path, cache):
    """The checked text of some content, as the command checks it."""
    def make(content, **options):
        path = tmp_path / "text.txt"
        path.write_text(content, encoding="utf-8")
        return check_text([str(path)], "--input text", TextOptions(cache=str(cache), format="sentences", **options), World(), "word")
    return make


def is_word(text):
    return all(unicodedata.category(character)[0] in "LNM" for character in text)


def slow_count(content, words):
    """One character after the other; `words` as --words says it."""
    counts = Counter()
    for line in unicodedata.normalize("NFC", content).split("\n"):
        spaced = "".join(f" {c} " if words == "tokenizer" and tokenizers.is_unspaced(c) else c if is_word(c) else " " for c in line)
        counts.update(word for word in (filter(is_word, rjieba.cut(line)) if words == "jieba" else spaced.split()) if not word.isnumeric())
    return counts


@pytest.mark.parametrize("content, words, told", [
    (ENGLISH, "auto", "tokenizer"), (CHINESE, "auto", "jieba"), (SEGMENTED, "auto", "spaces"), (CHINESE, "tokenizer", "tokenizer"),
    (CHINESE, "spaces", "spaces"), (SEGMENTED, "jieba", "jieba")], ids=["English", "rjieba", "spaces", "characters", "no spaces", "given"])
def test_word_counts_equal_a_slow_form(content, words, told, text_of):
    text = text_of(content, words=words)
    counts = domain.count_words(text)
    assert text.markup.words == told and counts == slow_count(content, told) and sum(counts.values()) >= 6
    if content is ENGLISH:
        assert counts["étude"] == 2 and {"B2B", "3rd", "x", "y", "s", "BANK"} <= counts.keys() and not counts.keys() & {"2024", "½", "٣"}
    elif told != "tokenizer":
        assert counts["北京" if content is SEGMENTED else "北京大学" if told == "jieba" else "北京大学很大"] >= 1
    else:
        assert counts["北"] == 2 and counts["GPT"] == 1 and "5" not in counts


@pytest.mark.parametrize("line", ["हिन्दी भाषा", "สวัสดี", "مُحَمَّد"])
def test_combining_marks_are_part_of_their_word(line, text_of):
    assert domain.count_words(text_of(line + "\n")) == Counter(line.split(" "))


@pytest.mark.parametrize("line", ["\u2764\ufe0f good", "\u0301 good"], ids=["heart", "accent"])
def test_marks_without_a_letter_are_no_word(line, text_of):
    """An emoji is mostly a sign and a selector, which is a mark."""
    assert domain.count_words(text_of(line + "\n")) == {"good": 1}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*"aB1é_'- 北京語x²٣", "e\u0301", "x\u0301", "हि"]), max_size=30).map("".join),
       st.sampled_from(["tokenizer", "spaces"]))
def test_words_of_any_line_are_those_of_the_slow_form(line, words):
    text = SimpleNamespace(markup=SimpleNamespace(words=words), sentences=lambda: [(line, ()), None])
    assert domain.count_words(text) == slow_count(line, words)


def test_the_bound_on_distinct_words_keeps_the_frequent_ones(text_of, monkeypatch):
    """Rare words come and go; those that are frequent throughout keep their counts to the end."""
    lines = [f"often always {chr(97 + number % 26)}{chr(97 + number // 26)}rare" for number in range(300)]
    text = text_of("\n".join(lines) + "\n")
    everything, sizes = domain.count_words(text), []
    monkeypatch.setattr(domain, "MAX_DISTINCT", 40)

    class Watched(Counter):
        def update(self, *words):
            super().update(*words)
            sizes.append(len(self))

    monkeypatch.setattr(domain, "Counter", Watched)
    bounded = domain.count_words(text)
    assert len(everything) == 302 and len(bounded) <= 40 and max(sizes) <= 43
    assert bounded["often"] == bounded["always"] == everything["often"] == 300
    assert all(count <= everything[word] for word, count in bounded.items())


# Stop words and the order of words.

def test_stop_words_are_none_both_lists_or_those_of_a_file(tmp_path):
    assert domain.stop_words("none") == set()
    both = domain.stop_words("auto")
    assert {"the", "and", "的", "我们", "没有"} <= both and not both & {"bank", "银行", ""}
    (tmp_path / "stop.txt").write_text("Bank\n  river \n", encoding="utf-8")
    assert domain.stop_words(str(tmp_path / "stop.txt")) == {"bank", "river"}


def test_words_are_ranked_by_count_then_by_the_alphabet():
    counts = Counter({"Bank": 2, "bank": 3, "river": 5, "a": 9, "的": 7, "é": 5, "Apple": 5, "the": 8, "北": 5})
    assert domain.frequent_words(counts, {"the", "的"}) == ["apple", "bank", "river", "é", "北"]
    assert domain.frequent_words(counts, set()) == ["the", "的", "apple", "bank", "river", "é", "北"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1), min_size=1, max_size=4), st.integers(1, 9))
def test_overlap_equals_set_arithmetic(texts, top):
    ranked = {str(number): words for number, words in enumerate(texts)}
    shares, num_words = domain.overlap(ranked, top)
    assert num_words == min(top, *map(len, texts)) and np.array_equal(shares, shares.T) and (np.diag(shares) == 1).all()
    for row, one in enumerate(texts):
        for column, other in enumerate(texts):
            common = [word for word in one[:num_words] if word in other[:num_words]]
            assert shares[row, column] == len(common) / num_words


def test_a_text_without_words_has_no_overlap():
    with pytest.raises(UserError, match="empty: holds nothing but stop words; needed is text"):
        domain.overlap({"full": ["bank"], "empty": []}, 10)


# How a tokenizer breaks words.

def one_by_one(counts, tokenizer, before=""):
    """(pieces per word, unknown share, {word: pieces}) by transformers' tokenizer."""
    ids = {word: tokenizer(before + word, add_special_tokens=False).input_ids for word in counts}
    total = sum(counts.values())
    unknown = sum(counts[word] for word in counts if tokenizer.unk_token_id in ids[word])
    return sum(counts[word] * len(ids[word]) for word in counts) / total, unknown / total, {word: len(of) for word, of in ids.items()}


COUNTS = Counter({"bank": 50, "Banking": 9, "banking": 3, "riverization": 6, "RÉSUMÉ": 7, "zebra": 4, "Ω": 8, "the": 30, "modelization": 20,
                  "quickly": 5, "moneyermoney": 11, "Ünlöwed": 5})


@pytest.mark.parametrize("kind", ["lower-casing", "cased", "byte-level"])
def test_pieces_equal_those_of_each_word_by_itself(kind, documents, tiny_tokenizer, roberta_tokenizer):
    tokenizer = {"lower-casing": tiny_tokenizer, "byte-level": roberta_tokenizer}.get(kind)
    if kind == "cased":
        tokenizer = tokenizers.train(lambda: (sentence.title() for document in documents for sentence in document), 120, lowercase=False)
    found = domain.fragmentation(COUNTS, tokenizer, {"the"})
    pieces_per_word, unknown_share, pieces = one_by_one(COUNTS, tokenizer, " " if kind == "byte-level" else "")
    assert (found.pieces_per_word, found.unknown_share) == pytest.approx((pieces_per_word, unknown_share))
    assert (unknown_share > 0) == (kind != "byte-level") and pieces_per_word > 1
    read = Counter()
    for word, count in COUNTS.items():
        lowered = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        read[lowered if kind == "lower-casing" else word] += count
    unknown = {word for word in read if tokenizer.unk_token_id in tokenizer(word).input_ids}
    expected = {(word, count, one_by_one({word: 1}, tokenizer, " " if kind == "byte-level" else "")[2][word])
                for word, count in read.items() if count >= 5 and word != "the"}
    assert set(found.broken) == {entry for entry in expected if entry[2] > 1 or entry[0] in unknown} and len(found.broken) >= 4
    assert found.broken == sorted(found.broken, key=lambda entry: (-entry[1] * entry[2], entry[0]))


# The command.

@pytest.fixture(scope="module")
def home(documents, tiny_tokenizer, tmp_path_factory):
    """English text of two kinds, Chinese text, and a tokenizer for each script."""
    folder = tmp_path_factory.mktemp("domain")
    half = len(documents) // 2
    for name, of in (("one", documents[:half]), ("two", documents[half:])):
        (folder / f"{name}.txt").write_text("\n\n".join("\n".join(document) for document in of) + "\n", encoding="utf-8")
    (folder / "other.txt").write_text("\n\n".join(f"Bank-Zebras crossed riverization! the hippopotamus Ω\nRésumé {chr(97 + n)}x."
                                                  for n in range(9)) + "\n", encoding="utf-8")
    (folder / "zh.txt").write_text(CHINESE * 8, encoding="utf-8")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    tokenizers.train(lambda: [character for character in CHINESE if character not in "散步"], 120).save_pretrained(folder / "chinese")
    (folder / "more.txt").write_text("river rivers more\n\nthe bank\n")
    (folder / "stops.txt").write_text("bank\n")
    (folder / "only.txt").write_text("the of and\nof the, 2024!\n")
    (folder / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    return folder


@pytest.fixture
def compare(home, cache, tmp_path, capsys):
    """Runs the command; (JSON on its last line, what it printed, its folder)."""
    def run(*argv):
        capsys.readouterr()
        argv = [str(word).replace("HOME", str(home)) for word in argv]
        DOMAIN.main([*argv, "--format", "sentences", "--cache", str(cache), "--output", str(tmp_path / "out")])
        told = capsys.readouterr().out
        return json.loads(told.splitlines()[-1]), told, tmp_path / "out"
    return run


def test_the_command_tells_writes_and_draws_what_it_compares(compare, home, documents):
    result, told, output = compare("--input", "one=HOME/one.txt", "two=HOME/two.txt", "two=HOME/more.txt", "other=HOME/other.txt",
                                   "--top", "50", "--tokenizer", "HOME/tokenizer", "--candidates", "3", "--stop-words", "HOME/stops.txt")
    assert json.loads((output / "domain.json").read_text(encoding="utf-8")) == result and list(result["overlap"]) == ["one", "two", "other"]
    left_out, ranked = {"bank"}, {}
    for name in ("one", "two", "other"):
        counts = slow_count("\n".join((home / f"{file}.txt").read_text() for file in (name, "more")[:1 + (name == "two")]), "tokenizer")
        lower = Counter(word for word, count in counts.items() for word in [word.lower()] * count)
        ranked[name] = [word for word, _ in sorted(lower.items(), key=lambda item: (-item[1], item[0]))
                        if word not in left_out and len(word) > 1 or word == "ω"]
        of = result["texts"][name]
        assert (of["words"], of["distinct_words"]) == (sum(counts.values()), len(counts))
        assert f"{name}: {of['words']:,} words, {of['distinct_words']:,} distinct, {of['pieces_per_word']:.2f} pieces each, " in told
        assert len((output / f"candidates-{name}.txt").read_text(encoding="utf-8").splitlines()) == 3
    size = result["words_compared"]
    assert size == min(50, *map(len, ranked.values())) < 50
    for one, row in result["overlap"].items():
        assert row == {other: len(set(ranked[one][:size]) & set(ranked[other][:size])) / size for other in ranked}
        assert f"| {one} | " + " | ".join(f"{share:.0%}" for share in row.values()) + " |" in told
    assert result["overlap"]["one"]["two"] > result["overlap"]["one"]["other"]
    assert imread(output / "overlap.png").shape[0] > 400 and f"shared by the {size} most frequent words" in told


@pytest.mark.parametrize("text, name, some", [
    ("other", "tokenizer", {"zebras", "hippopotamus", "ω"}), ("zh", "chinese", {"北京大学", "散步"}), ("zh", "tokenizer", {"北京大学"})],
    ids=["English", "Chinese", "unknown script"])
def test_candidates_are_taken_by_add_tokens_as_they_are(text, name, some, compare, home):
    _, _, output = compare("--input", f"text=HOME/{text}.txt", "--tokenizer", f"HOME/{name}")
    path = str(output / "candidates-text.txt")
    words, tokenizer = read_lines(path, "--add-tokens"), tokenizers.load(str(home / name))
    assert some <= set(words) and len(set(words)) == len(words)
    size = len(tokenizer)
    added = tokenizers.add_tokens(tokenizer, words, [], f"--add-tokens {path}")
    assert len(added) == len(words) == len(tokenizer) - size
    assert all(tokenizer(word, add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids(word)] for word in words)


@pytest.mark.parametrize("kind, counts", [("roberta", {"ing": 9, "riverized": 9}), ("roberta", {"Bank": 5, "ed": 7}), (
    "xlm_roberta", {"Ｂanks": 9, "Banks": 9, "zebra": 9}), ("whole words", {"北京": 9, "北海": 9})])
def test_candidates_of_other_tokenizers_are_taken_too(kind, counts, request, tmp_path):
    """Not so a word whose letters are a piece inside of words, which breaks at the start of one; and of two forms that a normalizer of
    SentencePiece makes one there is one."""
    if kind == "whole words":
        entries = [*tokenizers.SPECIAL_TOKENS, "北", "京", "北京"]
        tokenizer = tokenizers.from_vocabulary({word: number for number, word in enumerate(entries)}, True)
    else:
        request.getfixturevalue(f"{kind}_tokenizer").save_pretrained(tmp_path)
        tokenizer = tokenizers.load(str(tmp_path))
    words = [word for word, _, _ in domain.fragmentation(Counter(counts), tokenizer).broken]
    assert words and len(tokenizers.add_tokens(tokenizer, words, [])) == len(words)


@pytest.mark.parametrize("argv, message", [
    ([], "--input: needed are texts, NAME=PATH, two or more to compare"),
    (["--input", "HOME/one.txt"], "--input HOME/one.txt: needed is NAME=PATH"),
    (["--input", "one=HOME/absent.txt"], "--input one HOME/absent.txt: no such file"),
    (["--input", "one=HOME/latin.txt"], "--input one HOME/latin.txt: "),
    (["--input", "one=CORPUS"], "--input one: is a prepared corpus; needed is text"),
    (["--input", "one=HOME/one.txt", "only=HOME/only.txt"], "only: holds nothing but stop words; needed is text"),
    (["--input", "one=HOME/one.txt", "--candidates", "-1"], "--candidates -1: needed is a whole number of at least 1"),
    (["--input", "one=HOME/one.txt", "--stop-words", "HOME/no.txt"], "--stop-words HOME/no.txt: cannot be read as UTF-8 text (No such"),
    (["--input", "one=HOME/one.txt", "--stop-words", "HOME/latin.txt"], "--stop-words HOME/latin.txt: cannot be read as UTF-8 text ("),
    (["--input", "one=HOME/one.txt", "--tokenizer", "HOME/absent"], "--tokenizer HOME/absent: no such folder or vocab.txt"),
    (["--input", "one=HOME/one.txt", "--vocab-size", "300"], "unrecognized arguments: --vocab-size 300"),
    (["--input", "one=HOME/one.txt", "--lexicon", ""], "--lexicon : needed is a name, or the option left away"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_told_in_one_message_and_nothing_is_written(argv, message, home, corpus, cache, tmp_path, capsys):
    *argv, message = (word.replace("HOME", str(home)).replace("CORPUS", str(corpus.folder)) for word in [*argv, message])
    told = refusal(DOMAIN.main, [*argv, "--cache", cache, "--output", tmp_path / "out"], capsys)
    assert told.startswith(message) and "\n" not in told and not (tmp_path / "out").exists()


def test_all_that_is_bad_is_told_at_once(capsys):
    told = refusal(DOMAIN.main, ["--input", "text.txt", "a=", "=x.txt", "a/b=x.txt", "--top", "0", "--candidates", "0"], capsys)
    assert [re.match(r"--[a-z]+ \S+?(?=: )", line)[0] for line in told.splitlines()] == [
        "--input text.txt", "--input a=", "--input =x.txt", "--input a/b=x.txt", "--top 0", "--candidates 0"]
