"""Pretraining text without test texts.

Removals equal a slow search over all runs of sentences, entities keep their words, and the counts
are right. An interruption leaves no file.
"""

import json
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.adapt import dedup
from pretrain.data.sentences import Span, sentences
from pretrain.data.sources import Source
from pretrain.inputs import TextFiles

WORDS = ["a", "b", "ab", "ba", " a", "a b", "b\t a", "\u3000b\xa0", " ", "ａ", "A", ""]
COPIES = ["a", "b", "ab", "aab", "abb", "bab", "abab", "baba", "ａ"]


def slow_copy_at(texts, start, copies):
    """The end of the longest run from `start` on that is a copy; joins every run from scratch."""
    ends = range(start + 1, len(texts) + 1)
    found = [end for end in ends if "".join("".join(texts[start:end]).split()) in copies]
    return max(found, default=start)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(WORDS), max_size=9),
    st.sets(st.sampled_from(COPIES), min_size=1, max_size=4),
)
@example(["a", "b", "ab"], {"ab"})
@example(["a", "a", "b", "b"], {"aab", "abb", "b"})
@example(["a", "b", "x"], {"abc", "abd", "a"})  # the longest that is whole
def test_what_is_removed_equals_a_slow_search(texts, copies):
    expected, count, start = [], 0, 0
    while start < len(texts):
        end = slow_copy_at(texts, start, copies)
        if end > start:
            count, start = count + 1, end
        else:
            expected.append((texts[start], ()))
            start += 1
    document = [(text, ()) for text in texts]
    assert dedup.without_copies(document, sorted(copies)) == (expected, count)


TEXT = st.text(
    st.characters(exclude_characters="\n\r", exclude_categories=("Cs", "Cc", "Zl", "Zp", "Zs")),
    min_size=1,
    max_size=9,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXT, st.data()), min_size=1, max_size=5))
def test_entities_stay_at_their_words(drawn):
    document, words = [], []
    for text, data in drawn:
        ends = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
        spans = tuple(zip(ends[::2], ends[1::2]))
        document.append((text, spans))
        words += [text[start:end] for start, end in spans]
    record = dedup.as_record(document)
    assert record["text"] == "\n".join(text for text, _ in document)
    assert [record["text"][start:end] for start, end in record.get("entities", [])] == words
    assert ("entities" in record) == bool(words)


@pytest.fixture
def clean(tmp_path):
    """Clean documents of (sentence, spans); returns (documents read back, counts)."""

    def run(documents, test_texts, more=()):
        source, target = tmp_path / "text.jsonl", tmp_path / "out" / "clean.jsonl"
        lines = [json.dumps(dedup.as_record(document)) + "\n" for document in documents]
        source.write_text("".join(lines))
        text = TextFiles([Source(str(source), source.stat().st_size, 0, "")], "jsonl")
        counts = dedup.write_cleaned(text, test_texts, list(more), target)
        assert [path.name for path in target.parent.iterdir()] == ["clean.jsonl"]
        assert len(target.read_text().splitlines()) == counts["documents"]
        read = [[]]
        for item in sentences([Span(str(target), 0, target.stat().st_size)], "jsonl"):
            read[-1].append(item) if item is not None else read.append([])
        return read[:-1], counts

    return run


def test_documents_their_entities_and_counts(clean):
    aspirin = [
        ("Aspirin helps .", ((0, 7),)),
        ("So does rest .", ()),
        ("Ibuprofen is like Aspirin .", ((0, 9), (18, 25))),
    ]
    documents = [aspirin, [("one .", ()), ("two .", ())], [("left alone .", ())]]
    left, counts = clean(documents, [("So  does rest .",), ("one .\ntwo .",), ("absent",)])
    assert left == [[aspirin[0], aspirin[2]], [("left alone .", ())]]
    assert counts == {"documents": 2, "removed": 2, "task_texts": 0}


def test_each_text_of_a_pair_is_a_copy_and_so_are_task_texts(clean):
    """No copy extends beyond the end of a document."""
    more = [("new one .", "premise ."), ("hypothesis .", "premise ."), ("two\nlines",)]
    left, counts = clean(
        [[("premise .", ()), ("middle", ()), ("hypothesis .", ())], [("next .", ())]],
        [("premise .", "hypothesis ."), ("hypothesis .\nnext .",)],
        [[(part, ()) for part in parts] for parts in more],
    )
    kept = [[("middle", ())], [("next .", ())], [("new one .", ())], [("two", ()), ("lines", ())]]
    assert left == kept and counts == {"documents": 4, "removed": 2 + 3, "task_texts": 3}


def test_an_interruption_leaves_no_text_without_its_end(tmp_path):
    def stream():
        yield from [("one .", ()), None]
        assert list(tmp_path.iterdir()), "writing has begun"
        raise KeyboardInterrupt

    text = SimpleNamespace(sentences=stream)
    with pytest.raises(KeyboardInterrupt):
        dedup.write_cleaned(text, [("absent",)], [], tmp_path / "clean.jsonl")
    assert list(tmp_path.iterdir()) == []
