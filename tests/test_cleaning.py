"""Pretraining text without the texts of the test: what is removed equals a slow search over all runs of sentences, offsets of entities
stay at their words, and what is counted is what is gone."""
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.cleaning import as_record, without_copies, write_cleaned
from pretrain.data.reading import Span, check_files, sentences
from pretrain.text import TextFiles

WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", " a", "a b", "b\t a", "\u3000b\xa0", " ", "ａ"]), max_size=9)
COPIES = st.sets(st.sampled_from(["a", "b", "ab", "aab", "abb", "bab", "abab", "baba", "ａ"]), min_size=1, max_size=4)


def left_of(texts, copies):
    kept, removed = without_copies([(text, ()) for text in texts], sorted(copies))
    return [text for text, _ in kept], removed


def slow_copy_at(texts, place, copies):
    """The end of the longest run from `place` on that is a copy, by joining every run anew; `place` where there is none."""
    return max([end for end in range(place + 1, len(texts) + 1) if "".join("".join(texts[place:end]).split()) in copies], default=place)


@settings(max_examples=300, deadline=None)
@given(WORDS, COPIES)
@example(["a", "b", "ab"], {"ab"})
@example(["a", "a", "b", "b"], {"aab", "abb", "b"})
def test_what_is_removed_equals_a_slow_search(texts, copies):
    expected, count, place = [], 0, 0
    while place < len(texts):
        end = slow_copy_at(texts, place, copies)
        expected += [] if end > place else [texts[place]]
        count, place = count + (end > place), max(end, place + 1)
    assert left_of(texts, copies) == (expected, count)


@pytest.mark.parametrize("document, copies, left, removed", [
    (["a", "b", "c", "d"], {"bc"}, ["a", "d"], 1),
    (["a", "b", "c"], {"ab", "abc"}, [], 1),  # the longest
    (["a", "b", "a", "b"], {"ab"}, [], 2),
    (["ab c"], {"ab"}, ["ab c"], 0),  # a part of a sentence is none
    (["ab", "c"], {"b"}, ["ab", "c"], 0),
    (["A"], {"a"}, ["A"], 0),
    (["x", "a\u3000b", "", "\xa0c", "y"], {"abc"}, ["x", "y"], 1),  # white space makes no difference
    (["a", "b", "x"], {"abc", "abd", "a"}, ["b", "x"], 1),  # the longest that is whole
    ([], {"a"}, [], 0),
])
def test_whole_sentences_are_removed_and_nothing_else(document, copies, left, removed):
    assert left_of(document, copies) == (left, removed)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(exclude_characters="\n\r", exclude_categories=("Cs", "Cc", "Zl", "Zp", "Zs")), min_size=1,
                                  max_size=9), st.data()), min_size=1, max_size=5))
def test_entities_stay_at_their_words(drawn):
    document = []
    for text, data in drawn:
        places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
        document.append((text, tuple(zip(places[::2], places[1::2]))))
    record = as_record(document)
    assert record["text"] == "\n".join(text for text, _ in document)
    assert [record["text"][start:end] for start, end in record.get("entities", [])] == [
        text[start:end] for text, spans in document for start, end in spans]
    assert ("entities" in record) == any(spans for _, spans in document)


def read(path):
    """Documents as lists of (sentence, entities)."""
    documents = [[]]
    for item in sentences([Span(str(path), 0, path.stat().st_size)], "jsonl"):
        documents[-1].append(item) if item is not None else documents.append([])
    return documents[:-1]


@pytest.fixture
def cleaned(tmp_path):
    """Writes documents of (sentence, spans), cleans them; (documents read again, counts)."""
    def clean(documents, test_texts, more=()):
        source = tmp_path / "text.jsonl"
        source.write_text("".join(json.dumps(as_record(document)) + "\n" for document in documents))
        text = TextFiles(check_files([source], "--text", tmp_path / "sources.json"), "jsonl")
        counts = write_cleaned(text, test_texts, list(more), tmp_path / "out" / "clean.jsonl")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"clean.jsonl"}
        assert len((tmp_path / "out" / "clean.jsonl").read_text().splitlines()) == counts["documents"]
        return read(tmp_path / "out" / "clean.jsonl"), counts
    return clean


def test_documents_their_entities_and_counts(cleaned):
    aspirin = [("Aspirin helps .", ((0, 7),)), ("So does rest .", ()), ("Ibuprofen is like Aspirin .", ((0, 9), (18, 25)))]
    documents = [aspirin, [("one .", ()), ("two .", ())], [("left alone .", ())]]
    left, counts = cleaned(documents, [("So  does rest .",), ("one .\ntwo .",), ("absent",)])
    assert left == [[aspirin[0], aspirin[2]], [("left alone .", ())]]
    assert counts == {"documents": 2, "removed": 2, "task_texts": 0}


def test_each_text_of_a_pair_is_a_copy_and_so_are_task_texts(cleaned):
    left, counts = cleaned([[("premise .", ()), ("middle", ()), ("hypothesis .", ())]], [("premise .", "hypothesis .")],
                           [("new one .", "premise ."), ("hypothesis .", "premise ."), ("two\nlines",)])
    assert left == [[("middle", ())], [("new one .", ())], [("two", ()), ("lines", ())]]
    assert counts == {"documents": 3, "removed": 2 + 3, "task_texts": 3}


def test_copies_reach_over_no_end_of_a_document(cleaned):
    left, counts = cleaned([[("a .", ())], [("b .", ())]], [("a .\nb .",)])
    assert left == [[("a .", ())], [("b .", ())]] and counts["removed"] == 0


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    source = tmp_path / "text.txt"
    source.write_text("one .\n\ntwo .\n")
    text = TextFiles(check_files([source], "--text", tmp_path / "sources.json"), "sentences")
    monkeypatch.setattr("pretrain.cleaning.as_record", lambda kept: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_cleaned(text, [("absent",)], [], tmp_path / "clean.jsonl")
    assert {path.name for path in tmp_path.iterdir()} <= {"text.txt", "sources.json"}
