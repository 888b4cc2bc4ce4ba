"""Entities: every way to write them gives the same rows; windows count each word once, where it has
the most context; tags and spans turn into each other; scores equal seqeval's."""

import copy
import json
import re

import numpy as np
import pytest
from conftest import as_conll, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset import problems
from transformers import AutoTokenizer

from pretrain.batch import IGNORED
from pretrain.config import LabelOptions
from pretrain.data.tokenizer import without_limits
from pretrain.finetune.dataset import LabeledRows
from pretrain.finetune.entities import decode, tag_words
from pretrain.finetune.scores import EntityTally
from pretrain.finetune.tasks import TASKS
from pretrain.finetune.windows import OVERLAP, TaggedDataset, TaggedText

TEXTS = ["Ada met Bo Li in Rome .", "nothing here", "Rome"]
ENTITIES = [((0, 3, "PER"), (8, 13, "PER"), (17, 21, "LOC")), (), ((0, 4, "LOC"),)]
TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def read(*paths, tags=None, **options):
    return TASKS["ner"].read([str(path) for path in paths], LabelOptions(**options), tags)


# Reading.


@pytest.mark.parametrize(
    "scheme, name, encoding",
    [("BIO", "a.conll", "utf-8"), ("BIOES", "a.txt", "utf-16"), ("BMES", "a.conll", "utf-8")],
)
def test_tagged_tokens_become_rows(scheme, name, encoding, tmp_path):
    path = tmp_path / name
    path.write_text(as_conll(TEXTS, ENTITIES, scheme), encoding=encoding)
    rows = read(path, encoding=encoding)
    assert rows.texts == [(text,) for text in TEXTS] and rows.labels == ENTITIES
    assert rows.classes == TAGS


def test_labels_may_hold_both_separators_and_sentences_are_rows(tmp_path):
    path = tmp_path / "a.bio"
    path.write_text("-DOCSTART- O\n\nab B_X-Y_Z\ncd I_X-Y_Z\n\nef B-U_V\n")
    assert read(path).labels == [((0, 5, "X-Y_Z"),), ((0, 2, "U_V"),)]


SPELLINGS = {
    "entities": lambda *span: dict(zip(("start", "end", "label"), span)),
    "spans": lambda *span: dict(zip(("start_offset", "end_offset", "type"), span)),
    "labels": lambda *span: list(span),
    "label": lambda *span: dict(zip(("begin", "end", "tag"), span)),
    "mine": lambda *span: dict(zip(("start", "end", "entity_group"), span)),
}


@pytest.mark.parametrize("column", SPELLINGS)
def test_spans_in_every_spelling_become_rows(column, tmp_path):
    """Out of order, with white space at their ends; as JSON in a cell of a table."""
    found = [[SPELLINGS[column](*span) for span in spans[::-1]] for spans in ENTITIES]
    found[0][0] = SPELLINGS[column](16, 22, "LOC")
    options = {"label_field": "mine"} if column == "mine" else {}
    for name, cells in (("a.jsonl", found), ("a.csv", map(json.dumps, found))):
        rows = [{"text": text, column: of} for text, of in zip(TEXTS, cells)]
        assert read(write_rows(tmp_path / name, rows), **options).labels == ENTITIES


def test_half_a_surrogate_pair_in_a_label_is_replaced(tmp_path):
    """TensorBoard and a config cannot hold it."""
    rows = [{"text": "Rome", "spans": [[0, 4, "b\ud83d"]]}]
    assert read(write_rows(tmp_path / "a.jsonl", rows)).labels == [((0, 4, "b?"),)]


BAD_ROWS = {
    "overlap": [[0, 5, "PER"], [3, 8, "LOC"]],
    "no label": [[0, 3]],
    "blank": [[3, 4, "PER"]],
}


def test_every_row_with_bad_spans_is_reported(tmp_path):
    rows = [{"text": TEXTS[0], "spans": spans} for spans in ([], *BAD_ROWS.values())]
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"text": "", "spans": []}])
    found = problems(read, path)
    assert len(found) == len(BAD_ROWS) + 1
    for number, line in enumerate(found, start=2):
        assert line.startswith(f"{path}, line {number}: ") or f"{path}, line {number}" in line


@pytest.mark.parametrize(
    "content, named",
    [
        ("a B-X\nb Q-X\n", "a.conll, line 2: "),
        ("a B-X\nb I\n", "a.conll, line 2: "),
        ("one\ncolumn\n", "a.conll, line 1: "),
        ("a O\nb O\n", "a.conll: "),
        ("", "a.conll"),
        ("a B\nb I\n", "a.conll, sentence 1"),
    ],
)
def test_bad_tags_are_one_message(content, named, tmp_path):
    path = tmp_path / "a.conll"
    path.write_text(content)
    (line,) = problems(read, path)
    assert named in line


def test_characters_numbered_within_words_become_words(tmp_path, capsys):
    """One that is several code points, such as an emoji, keeps no digit; other tokens do."""
    path = tmp_path / "numbered.conll"
    tokens = ["科0", "技1", *["好0"] * 100, "👍🏽0", "10", "21", "iPhone6", "人0"]
    path.write_text("".join(f"{token}\tB-PER\n" for token in tokens), encoding="utf-8")
    text = " ".join(["科技", *"好" * 100, "👍🏽", "12", "iPhone6", "人"])
    assert read(path).texts == [(text,)] and str(path) in capsys.readouterr().out


# Words and windows.

WORDS = ["bank", "banking", "riverization", "waterally", "x", "slowly,", "teach-ing", ""]
WORDS += ["中文", "a中b"]
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join).filter(str.strip)


@pytest.fixture(params=["tiny_tokenizer", "roberta_tokenizer", "xlm_roberta_tokenizer"])
def any_tokenizer(request, tmp_path_factory):
    """A tokenizer of each kind: WordPiece, byte-level BPE, SentencePiece."""
    folder = tmp_path_factory.mktemp("tokenizer")
    request.getfixturevalue(request.param).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def slow_owner(place, count, windows):
    """The window (begin, end) in which a token has the most context; where a text ends, its
    context is complete."""

    def context(window):
        begin, end = window
        before = place - begin if begin else count
        after = end - 1 - place if end < count else count
        return min(before, after)

    holding = [window for window in windows if window[0] <= place < window[1]]
    return max(holding, key=context)


@settings(max_examples=60, deadline=None)
@given(text=TEXT, max_length=st.integers(8, 30))
def test_each_word_counts_once_where_it_has_the_most_context(tiny_tokenizer, text, max_length):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    backend = without_limits(tokenizer)
    whole = backend.encode(text, add_special_tokens=False)
    tokenizer.model_max_length = max_length
    words = list(re.finditer(r"\S+", text))[::2]
    entities = tuple((*word.span(), "LOC") for word in words)
    dataset = TaggedDataset(LabeledRows([(text,)], [entities], TAGS), tokenizer)
    room = max_length - 2
    step, count = room - room // OVERLAP, len(whole.ids)
    begins = [0]
    while begins[-1] + room < count:
        begins.append(begins[-1] + step)
    windows = [(begin, min(begin + room, count)) for begin in begins]
    assert len(dataset) == len(windows) and dataset.num_cut == (len(windows) > 1)
    numbers = whole.word_ids
    first = [place for place in range(count) if numbers[place] not in numbers[:place]]
    tag_of = dict(zip(first, dataset.labels[0].tags))
    seen, expected = [], []
    for (ids, types, places, tags), (begin, end) in zip(dataset.examples, windows):
        inner = whole.ids[begin:end]
        assert ids.tolist() == [tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]
        assert len(types) == len(ids) and not types.any()
        held = [place for place in first if begin <= place < end]
        assert (places - 1 + begin).tolist() == held
        assert tags.tolist() == [tag_of[place] for place in held]
        seen += held
        expected += [slow_owner(place, count, windows) == (begin, end) for place in held]
    assert dataset.is_predicted.tolist() == expected
    assert np.array(seen)[dataset.is_predicted].tolist() == first
    starts = [whole.offsets[place][0] for place in first]
    assert dataset.labels[0].words[:, 0].tolist() == starts


def test_a_text_that_fits_is_read_whole(any_tokenizer):
    """Also by tokenizers whose tokens share a character or begin with a space."""
    texts = ["banking slowly , 中文 x", " the river a中b", "\u3000中\u3000", "teach-ing (token)"]
    expected = ["banking slowly , 中 文 x", "the river a 中 b", "中", "teach - ing ( token )"]
    tokenizer = copy.deepcopy(any_tokenizer)
    tokenizer.model_max_length = 64
    rows = LabeledRows([(text,) for text in texts], [None] * 4, TAGS)
    dataset = TaggedDataset(rows, tokenizer)
    assert len(dataset) == 4 and not dataset.num_cut
    for text, tagged, example, words in zip(texts, dataset.labels, dataset.examples, expected):
        assert example[0].tolist() == tokenizer(text)["input_ids"]
        found = [text[start:end] for start, end in tagged.words.tolist()]
        assert "".join(found) == "".join(words.split())
        if "▁" not in tokenizer.get_vocab():  # that one joins unknown characters in one token
            assert set("中文") & set(text) <= set(found)
        assert (tagged.tags == IGNORED).all() and len(tagged.tags) == len(example[2]) == len(found)


def test_micro_batches_hold_the_tags_of_all_words(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.model_max_length = 12
    texts = ["bank river " * 20, "money", "slow banking " * 9]
    entities = [((0, 4, "LOC"), (5, 10, "PER")), (), ((5, 12, "LOC"),)]
    dataset = TaggedDataset(LabeledRows([(of,) for of in texts], entities, TAGS), tokenizer)
    batches = list(dataset.micro_batches(range(len(dataset)), 3))
    assert len(batches) == -(-len(dataset) // 3) > 2
    tags = np.concatenate([batch.labels["label"].numpy() for batch in batches])
    once = np.concatenate([of.tags for of in dataset.labels])
    assert tags[dataset.is_predicted].tolist() == once.tolist()
    assert sum(batch.counts["label"] for batch in batches) == len(tags) > len(once)
    for batch in batches:
        ids = batch.input_ids[batch.masked_positions]
        pieces = tiny_tokenizer.convert_ids_to_tokens(ids.tolist())
        assert not any(piece.startswith(("##", "[CLS]", "[SEP]")) for piece in pieces)


# Tags and spans.


@st.composite
def tagged_texts(draw):
    """(words [words, 2], entities that begin and end with words, tags of another opinion)."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=12))
    words, place = [], 0
    for gap, size in sizes:
        words.append((place + gap, place + gap + size))
        place += gap + size
    entities, first = [], 0
    while first < len(words):
        length = draw(st.integers(0, 3))
        last = min(first + length, len(words)) - 1
        if length:
            label = draw(st.sampled_from(["LOC", "PER"]))
            entities.append((words[first][0], words[last][1], label))
        first = max(last, first) + 1
    other = draw(st.lists(st.integers(0, 4), min_size=len(words), max_size=len(words)))
    return np.array(words), tuple(entities), np.array(other)


def sure_of(tags):
    """Probabilities that say `tags`, differently sure of each."""
    shares = np.full((len(tags), len(TAGS)), 0.01)
    shares[np.arange(len(tags)), tags] = np.linspace(0.5, 0.9, len(tags))
    return shares


def slow_decode(tags, words):
    """conlleval's rule, one word at a time."""
    spans, current = [], None
    for tag, (start, end) in zip([TAGS[number] for number in tags], words.tolist()):
        if tag == "O":
            current = None
        elif tag[0] == "B" or current is None or current[2] != tag[2:]:
            current = [start, end, tag[2:]]
            spans.append(current)
        else:
            current[1] = end
    return [tuple(span) for span in spans]


@settings(max_examples=80, deadline=None)
@given(case=tagged_texts())
def test_tags_and_spans_turn_into_each_other(case):
    words, entities, other = case
    tags, num_snapped = tag_words(entities, words, TAGS)
    assert num_snapped == 0
    assert tuple(span[:3] for span in decode(sure_of(tags), words, TAGS)) == entities
    assert [span[:3] for span in decode(sure_of(other), words, TAGS)] == slow_decode(other, words)


@pytest.mark.parametrize(
    "entities, expected, num_snapped",
    [
        ([(1, 4, "PER")], "B-PER O O", 1),
        ([(0, 6, "PER")], "B-PER I-PER O", 1),
        ([(0, 2, "PER"), (2, 4, "LOC")], "B-PER O O", 2),  # two in one word
        ([(2, 7, "PER"), (7, 10, "LOC")], "B-PER I-PER O", 2),
        ([(4, 5, "PER")], "O O O", 1),  # a character that the tokenizer drops
        ([(0, 4, "PER"), (5, 8, "PER")], "B-PER B-PER O", 0),
    ],
)
def test_entities_that_end_inside_a_word_take_it_whole(entities, expected, num_snapped):
    words = np.array([[0, 4], [5, 8], [9, 12]])
    tags, found = tag_words([*entities], words, TAGS)
    if entities[-1][1] == 10:
        expected = "B-PER I-PER B-LOC"  # its first word is taken, its second is not
    assert " ".join(TAGS[tag] for tag in tags) == expected and found == num_snapped


# Scores.


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # seqeval, where there are no entities
@settings(max_examples=40, deadline=None)
@given(cases=st.lists(tagged_texts(), min_size=1, max_size=5))
def test_scores_are_those_of_seqeval(cases):
    classification_report = pytest.importorskip("seqeval.metrics").classification_report
    tally, given_tags, found_tags = EntityTally(TAGS), [], []
    texts, outputs = [], []
    for words, entities, other in cases:
        tags, _ = tag_words(entities, words, TAGS)
        texts.append(TaggedText("", words, tags, entities))
        outputs.append(sure_of(other))
        given_tags.append([TAGS[tag] for tag in tags])
        found_tags.append([TAGS[tag] for tag in other])
    for start in range(0, len(texts), 2):
        tally.add(texts[start : start + 2], np.concatenate(outputs[start : start + 2]))
    report = classification_report(given_tags, found_tags, output_dict=True, zero_division=0)
    scores = tally.scores()
    theirs = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
    for label, row in [*scores["classes"].items(), ("micro avg", scores)]:
        expected = report.get(label, dict.fromkeys([*theirs.values(), "support"], 0))
        assert {name: row[name] for name in theirs} == pytest.approx(
            {name: expected[of] for name, of in theirs.items()}
        )
        assert row.get("entities", expected["support"]) == expected["support"]


def test_texts_without_entities_are_not_scored_and_nan_is_no_score():
    words, shares = np.array([[0, 1]]), sure_of([3])
    tally = EntityTally(TAGS)
    known, unknown = (TaggedText("a", words, np.array([3]), of) for of in (((0, 1, "PER"),), None))
    tally.add([unknown, known], np.concatenate([sure_of([1]), shares]))
    scores = tally.scores()
    assert (tally.num_scored, tally.num_unlabeled, scores["f1"]) == (1, 1, 1.0)
    assert scores["loss"] == pytest.approx(-np.log(shares[0, 3])) and scores["macro_f1"] == 1.0
    tally.add([known], shares * np.nan)
    broken = tally.scores()
    assert all(np.isnan(broken[name]) for name in ("loss", "precision", "recall", "f1", "macro_f1"))
