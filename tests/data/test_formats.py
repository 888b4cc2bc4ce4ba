"""Formats: the same documents as JSONL, CSV, TSV, Parquet, Arrow, a saved data set and tagged tokens, compressed or not, as in the
plain text; entities against what they were written from; and every bad input with its file, its line and nothing left behind."""
import bz2
import csv
import gzip
import itertools
import json
import lzma
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.command import UserError
from pretrain.config import TextOptions
from pretrain.data import formats, reading

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Makes a fresh folder each time it is called."""
    root, numbers = tmp_path_factory.mktemp("formats"), itertools.count()

    def make() -> Path:
        folder = root / str(next(numbers))
        folder.mkdir()
        return folder
    return make


def read(*paths, need_entities: bool = False, cache: Path | None = None, **options) -> list[list]:
    """Documents as lists of (sentence, entities), by way of the cache."""
    cache = cache or Path(paths[0]).parent / "cache"
    options = TextOptions(cache=str(cache), **options)
    need_entities |= options.entity_field is not None
    files, text_format = formats.open_files([str(path) for path in paths], "--train", options, need_entities)
    documents, open_document = [], []
    for file in files:
        for item in reading.sentences([reading.Span(str(file), 0, file.stat().st_size)], text_format):
            if item is None:
                documents.append(open_document)
                open_document = []
            else:
                open_document.append(item)
    assert open_document == []
    return documents


def texts(documents: list[list]) -> list[list[str]]:
    return [[sentence for sentence, _ in document] for document in documents]


def entities(documents: list[list]) -> list[list[str]]:
    """What the spans of each document cover."""
    return [[sentence[start:end] for sentence, spans in document for start, end in spans] for document in documents]


def message(*paths, **options) -> str:
    """Of the UserError, which leaves no converted text and nothing half-written in the cache."""
    cache = options.get("cache") or Path(paths[0]).parent / "cache"
    before = set(cache.rglob("*"))
    with pytest.raises(UserError) as caught:
        read(*paths, **options)
    left = [path.name for path in set(cache.rglob("*")) - before if path.is_file()]
    assert not [name for name in left if "partial" in name or name.startswith("converted")]
    return str(caught.value)


def lines(path: Path, *records) -> Path:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records), encoding="utf-8")
    return path


# ---------------------------------------------------------------- one writer for each format

def write_delimited(path: Path, rows: list[dict], delimiter: str, **settings) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter, **settings)
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path: Path, rows: list[dict]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"),
    "csv": lambda path, rows: write_delimited(path, rows, ","),
    "tsv": lambda path, rows: write_delimited(path, rows, "\t"),
    "parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2),
    "arrow": write_arrow,
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(str(path)),
    "saved splits": lambda path, rows: datasets.DatasetDict(
        {"test": datasets.Dataset.from_list([{"text": "other"}]), "train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path)),
}
COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}

LINE = st.text(st.sampled_from('ab ,"\'\t;é中😀\\#\r\u2028'), min_size=1, max_size=8).map(str.strip).filter(bool)
DOCUMENTS = st.lists(st.lists(LINE, min_size=1, max_size=3), min_size=1, max_size=5)


def plain_text(documents: list[list[str]]) -> str:
    return "\n\n".join("\n".join(document) for document in documents) + "\n"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_format_gives_the_documents_of_the_plain_text(scratch, kind):
    @settings(max_examples=40 if kind in ("jsonl", "csv", "tsv") else 8, deadline=None)
    @given(documents=DOCUMENTS)
    def compare(documents):
        if kind == "tsv":  # a tab in a cell of lines may look like rows of their own
            documents = [[line.replace("\t", "_") for line in document] for document in documents]
        folder = scratch()
        (folder / "plain.txt").write_text(plain_text(documents), encoding="utf-8", newline="")
        expected = read(folder / "plain.txt", format="sentences")
        assert texts(expected) == documents
        WRITERS[kind](folder / f"table.{kind}", [{"id": number, "text": "\n".join(document)} for number, document in enumerate(documents)])
        assert read(folder / f"table.{kind}") == expected
    compare()


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv", "parquet", "arrow"])
def test_a_compressed_file_gives_the_documents_of_the_plain_text(scratch, kind, suffix):
    @settings(max_examples=4 if kind in ("parquet", "arrow") else 10, deadline=None)
    @given(documents=DOCUMENTS)
    def compare(documents):
        if kind == "tsv":  # a tab in a cell of lines may look like rows of their own
            documents = [[line.replace("\t", "_") for line in document] for document in documents]
        folder = scratch()
        path = folder / f"some.text.{kind}"
        if kind == "txt":
            path.write_text(plain_text(documents), encoding="utf-8", newline="")
        else:
            WRITERS[kind](path, [{"text": "\n".join(document)} for document in documents])
        packed = path.with_name(path.name + suffix)
        packed.write_bytes(COMPRESSORS[suffix](path.read_bytes()))
        assert texts(read(packed, format="sentences" if kind == "txt" else "auto")) == documents
    compare()


def test_a_zipped_file_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "text.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("text.jsonl", '{"text": "a\\nb"}\n{"text": "c"}\n')
    assert texts(read(tmp_path / "text.jsonl.zip")) == [["a", "b"], ["c"]]


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(LINE.map(lambda line: f"x{line}".replace("\t", " ").replace("\r", " ")), min_size=1, max_size=5),
       newline=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_a_tsv_without_quoting_is_read_as_it_stands(scratch, documents, newline, bom):
    """The last row can only be read so: a quote that nothing closes."""
    path = scratch() / "table.tsv"
    rows = ["id\ttext", *(f"1\t{document}" for document in documents), '2\t"Ah', '3\t"Oh" said he']
    path.write_bytes((("\ufeff" if bom else "") + newline.join(rows)).encode())
    assert texts(read(path)) == [*([document] for document in documents), ['"Ah'], ['"Oh" said he']]


def test_a_csv_spelled_out(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffid,text\r\n1,"He said ""no"", and\nleft"\r\n\r\n2, b \r\n'.encode())
    assert texts(read(tmp_path / "a.csv")) == [['He said "no", and', "left"], ["b"]]


def test_json_keeps_every_character(tmp_path):
    """Escapes, a BOM, blank lines, other line breaks, half of a surrogate pair."""
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"text": "\\u4e2d\\ud83d\\ude00 \\ud83d."}\r\n\n' + '{"text": "a\u2028b"}'.encode())
    assert texts(read(tmp_path / "a.json")) == [["中😀 ?."], ["a\u2028b"]]


def test_one_array_of_json_is_numbered_by_item(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\ufeff\n" + json.dumps([{"text": "a"}, {"text": "b\nc"}], indent=1), encoding="utf-8")
    assert texts(read(path)) == [["a"], ["b", "c"]]
    path.write_text(json.dumps([{"text": "a"}, {"text": 3}], indent=1))
    assert message(path).startswith(f"{path}, line 2: the column text holds '3'")
    path.write_text('[{"text": "a"},')
    assert message(path).startswith(f"{path}, line 1: is no JSON (")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_a_list_of_strings_is_the_sentences(tmp_path, kind):
    WRITERS[kind](tmp_path / f"a.{kind}", [{"text": ["One. Two.", "three"]}, {"text": []}, {"text": ["four"]}])
    assert texts(read(tmp_path / f"a.{kind}")) == [["One. Two.", "three"], ["four"]]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "arrow", "saved"])
def test_the_text_column(tmp_path, kind):
    """text where there is one, the only one that holds strings otherwise, the one that is told always."""
    def write(name, **columns):
        WRITERS[kind](tmp_path / f"{name}.{kind}", [dict(zip(columns, row)) for row in zip(*columns.values())])
        return tmp_path / f"{name}.{kind}"

    both = write("both", title=["t", "u"], text=["a", "b"])
    assert texts(read(both)) == [["a"], ["b"]]
    assert texts(read(both, text_field="title")) == [["t"], ["u"]]
    if kind in ("csv", "tsv"):  # where everything is a string
        assert texts(read(write("only", body=["a", "b"]))) == [["a"], ["b"]]
    else:
        assert texts(read(write("only", number=[1, 2], body=["a", "b"], flag=[True, False]))) == [["a"], ["b"]]
    row = "line 2" if kind in ("csv", "tsv") else "line 1" if kind == "jsonl" else "row 1"
    two = write("two", title=["t"], body=["a"])
    assert message(two) == (
        f"{two}, {row}: has no column 'text', it has title, body; needed is --text-field with one of these")
    assert message(two, text_field="tilte") == (
        f"{two}, {row}: has no column 'tilte', it has title, body; needed is one of these as --text-field")
    assert message(two, text_field="title", entity_field="spans") == (
        f"{two}, {row}: has no column 'spans', it has title, body; needed is one of these as --entity-field")


def test_blank_rows_are_left_out_and_counted(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": ""}, {"text": " \n\t"}, {"text": None}, {"text": []}, {"text": "b"})
    assert texts(read(path)) == [["a"], ["b"]]
    assert "--train: 2 documents; 4 without text are left out\n" in capsys.readouterr().out


def test_a_format_that_is_told_wins_over_the_name(tmp_path):
    path = lines(tmp_path / "a.txt", {"text": "a"}, {"text": "b"})
    assert texts(read(path, format="jsonl")) == [["a"], ["b"]]
    assert texts(read(path, format="lines")) == [['{"text": "a"}'], ['{"text": "b"}']]
    path = lines(tmp_path / "b.csv", "text,id", "a,1")
    assert texts(read(path, format="lines")) == [["text,id"], ["a,1"]]
    path = lines(tmp_path / "C.JSONL", {"text": "c"})
    assert texts(read(path)) == [["c"]]
    path = lines(tmp_path / "d.csv.txt", "a,b")
    assert texts(read(path)) == [["a,b"]]


def test_files_of_several_formats_are_read_in_order_of_their_names(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines(folder / "1.jsonl", {"text": "one"})
    lines(folder / "2.txt", "two a", "two b", "", "three")
    lines(folder / "3.csv", "text", "four")
    (folder / "4.txt.gz").write_bytes(gzip.compress(b"five\n"))
    (folder / "5.conll").write_text("six O\n")
    WRITERS["saved"](folder / "6", [{"text": "seven"}])
    WRITERS["parquet"](folder / "7.parquet", [{"text": "eight"}])
    expected = [["one"], ["two a", "two b"], ["three"], ["four"], ["five"], ["six"], ["seven"], ["eight"]]
    entries = sorted(str(path) for path in folder.iterdir())
    assert texts(read(*entries, cache=tmp_path / "cache")) == expected
    for limit in range(1, 9):
        assert texts(read(*entries, cache=tmp_path / "cache", max_documents=limit)) == expected[:limit]


def test_a_name_with_brackets_is_that_file(tmp_path):
    for kind in ("jsonl", "parquet", "arrow", "saved"):
        WRITERS[kind](tmp_path / f"a[1].{kind}", [{"text": "one"}])
        WRITERS[kind](tmp_path / f"a1.{kind}", [{"text": "two"}])
        assert texts(read(tmp_path / f"a[1].{kind}")) == [["one"]], kind


@pytest.mark.parametrize("text_format", ["sentences", "lines", "text"])
def test_max_documents_of_plain_text(tmp_path, text_format):
    for name, text in (("1.txt", "a\nb\n\nc\n"), ("2.txt", "d\n\ne\nf")):
        (tmp_path / name).write_text(text)
    expected = {"sentences": [["a", "b"], ["c"], ["d"], ["e", "f"]], "lines": [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]],
                "text": [["a", "b", "c"], ["d", "e", "f"]]}[text_format]
    for limit in range(8):
        found = texts(read(tmp_path / "1.txt", tmp_path / "2.txt", format=text_format, max_documents=limit))
        assert found == (expected[:limit] if limit else expected)


def test_plain_text_stays_where_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n")
    options = TextOptions(cache=str(tmp_path / "cache"))
    assert formats.open_files([str(tmp_path / "a.txt")], "--train", options, False) == ([tmp_path / "a.txt"], "sentences")


def test_converted_text_is_found_again_until_something_changes(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", {"text": "a", "body": "b", "entities": [[0, 1]]}, {"text": "aa", "body": "bb", "entities": []})

    def converts(**options) -> bool:
        read(path, **options)
        return "converting" in capsys.readouterr().out

    assert converts() and not converts()
    for change in ({"text_field": "body"}, {"max_documents": 1}, {"need_entities": True}, {"entity_field": "entities"}):
        assert converts(**change) and not converts(**change), change
    lines(path, {"text": "c"})
    assert converts() and texts(read(path)) == [["c"]]


def test_hub_names_are_told_apart(tmp_path, monkeypatch):
    """hub:NAME, hub:NAME:CONFIG and hub:NAME:CONFIG:SPLIT; streamed."""
    asked = []

    def load(name, config=None, **named):
        asked.append((name, config, named))
        return [{"text": "a\nb"}, {"text": "c"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for entry in ("hub:some/name", "hub:some/name:config", "hub:some/name:config:validation", "hub:some/name::test"):
        assert texts(read(entry, cache=tmp_path)) == [["a", "b"], ["c"]]
    assert [(name, config, named["split"]) for name, config, named in asked] == [
        ("some/name", None, "train"), ("some/name", "config", "train"), ("some/name", "config", "validation"), ("some/name", None, "test")]
    assert all(named["streaming"] for *_, named in asked)


# ---------------------------------------------------------------- entities

SPAN_FORMS = {
    "list": lambda start, end: [start, end],
    "list with a type": lambda start, end: [start, end, "DISEASE"],
    "start and end": lambda start, end: {"start": start, "end": end, "label": "x"},
    "offsets": lambda start, end: {"id": 1, "start_offset": start, "end_offset": end},
    "positions": lambda start, end: {"entity": "x", "start_pos": start, "end_pos": end, "label_type": "y"},
}


@pytest.mark.parametrize("form", SPAN_FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_spans_in_every_form(tmp_path, kind, form):
    """Out of order, twice, beside each other, in characters where bytes or UTF-16 would differ."""
    if kind == "parquet" and form == "list with a type":
        pytest.skip("a column of Parquet is of one type")
    spans = [SPAN_FORMS[form](*span) for span in ((5, 6), (1, 2), (2, 4), (1, 2))]
    rows = [{"text": "😀中é文\nab c", "spans": spans}, {"text": "none", "spans": []}]
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, [{**row, "spans": json.dumps(row["spans"])} for row in rows] if kind == "csv" else rows)
    assert read(path, entity_field="spans") == [[("😀中é文", ((1, 2), (2, 4))), ("ab c", ((0, 1),))], [("none", ())]]
    assert read(path) == [[("😀中é文", ()), ("ab c", ())], [("none", ())]]


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.lists(st.tuples(st.sampled_from(["a", "é", "中文", "😀", "x,"]), st.booleans()), min_size=1, max_size=4),
                      max_size=3))
def test_entities_of_jsonl_come_back(scratch, words):
    records, expected = [], []
    for document in words:
        text, spans = "", []
        for word, is_entity in document:
            text += " " * bool(text)
            spans += [[len(text), len(text) + len(word)]] * is_entity
            text += word
        records.append({"text": text, "entities": spans[::-1]})
        expected.append([word for word, is_entity in document if is_entity])
    found = read(lines(scratch() / "a.jsonl", *records, {"text": "z", "entities": [[0, 1]]}), need_entities=True)
    assert entities(found) == [*expected, ["z"]]


def test_the_entities_column_is_read_where_it_is_needed(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "ab", "entities": [[0, 1]]}, {"text": "cd"}, {"text": "ef", "entities": None})
    assert entities(read(path)) == [[], [], []]
    assert entities(read(path, need_entities=True)) == [["a"], [], []]
    assert message(path, entity_field="entities").startswith(f"{path}, line 2: has no column 'entities', it has text; ")


@pytest.mark.parametrize("value", [[0, 2], {"start": 0, "end": [2]}, {"start": "a", "end": 2}, {"start": 0, "end": 9}, 2.5])
def test_a_span_that_is_in_no_list_is_told(tmp_path, value):
    path = lines(tmp_path / "a.jsonl", {"text": "ab", "entities": value})
    assert message(path, need_entities=True).startswith(f"{path}, line 1: ")


def test_columns_of_a_list_are_spans(tmp_path):
    """Some versions of `datasets` give a list of mappings so."""
    path = lines(tmp_path / "a.jsonl", {"text": "ab cd", "entities": {"start": [3, 0], "end": [5, 2], "label": ["x", "y"]}})
    assert entities(read(path, need_entities=True)) == [["ab", "cd"]]


# ---------------------------------------------------------------- tagged tokens

def tag(length: int, kind: str, scheme: str) -> list[str]:
    if scheme == "BIO":
        return [f"B-{kind}"] + [f"I-{kind}"] * (length - 1)
    middle = "I" if scheme == "BIOES" else "M"
    return [f"S-{kind}"] if length == 1 else [f"B-{kind}"] + [f"{middle}-{kind}"] * (length - 2) + [f"E-{kind}"]


CHUNK = st.tuples(st.lists(st.integers(0, 25), min_size=1, max_size=3), st.sampled_from(["", "", "LOC", "PER"]))


@settings(max_examples=120, deadline=None)
@given(documents=st.lists(st.lists(st.lists(CHUNK, min_size=1, max_size=4), min_size=1, max_size=3), min_size=1, max_size=3),
       scheme=st.sampled_from(["BIO", "BIOES", "BMES"]), tokens=st.sampled_from(["words", "characters"]),
       with_starts=st.booleans(), separator=st.sampled_from(["\t", " ", " NN I-NP ", "\tx\t"]), newline=st.sampled_from(["\n", "\r\n"]),
       underscore=st.booleans())
def test_tagged_tokens_come_back(scratch, documents, scheme, tokens, with_starts, separator, newline, underscore):
    """Words joined by spaces, or characters by nothing; documents of sentences where -DOCSTART- tells them, else of one sentence."""
    rows, expected, covered = [], [], []
    for document in documents:
        rows += ["-DOCSTART- -X- O", ""] * with_starts
        sentences, found = [], []
        for sentence in document:
            parts, tags = [], []
            for numbers, kind in sentence:
                chunk = [f"word{chr(97 + number)}" if tokens == "words" else chr(0x4E00 + number) for number in numbers]
                parts += chunk
                tags += tag(len(chunk), kind, scheme) if kind else ["O"] * len(chunk)
                found += [(" " if tokens == "words" else "").join(chunk)] * bool(kind)
            rows += [*(part + separator + (mark.replace("-", "_") if underscore else mark) for part, mark in zip(parts, tags)), ""]
            sentences.append((" " if tokens == "words" else "").join(parts))
            if not with_starts:
                expected.append([sentences[-1]])
                covered.append(found)
                found = []
        if with_starts:
            expected.append(sentences)
            covered.append(found)
    path = scratch() / "a.conll"
    path.write_bytes(newline.join(rows).encode())
    found = read(path)
    assert texts(found) == expected and entities(found) == covered


def test_characters_with_a_digit_are_joined_word_by_word(tmp_path, capsys):
    path = tmp_path / "a.bmes"
    path.write_text("今0\tB-X\n天1\tM-X\n去0\tM-X\n了1\tE-X\n家0\tS-Y\n10\tO\n21\tO\n\n好0\tO\n", encoding="utf-8")
    found = read(path)
    assert texts(found) == [["今天 去了 家 12"], ["好"]] and entities(found) == [["今天 去了", "家"], []]
    assert "tokens such as '今0' are read as a character and its place in its word" in capsys.readouterr().out


def test_tags_spelled_out(tmp_path):
    """Neighbours of one type are two entities at a B; of two types at a change that begins; spans are of characters."""
    path = tmp_path / "a.bio"
    path.write_text("\ufeffNew B-LOC\nYork I-LOC\nParis B-LOC\nJoe B-PER\n( O\ny S-LOC\n) O\nend B-X\n", encoding="utf-8")
    assert entities(read(path)) == [["New York", "Paris", "Joe", "y", "end"]]


def tagged(*tags: str) -> list[str]:
    return [f"word{number} {tag}" for number, tag in enumerate(tags)]


@pytest.mark.parametrize("stray, covered", [(("O", "I-X", "I-X"), "word1 word2"), (("B-Y", "I-X"), "word1"), (("E-X",), "word0"),
                                            (("S-X", "I-X"), "word1"), (("B-X", "E-X", "E-X"), "word2"), (("O", "M-X"), "word1")])
def test_a_few_stray_tags_are_read_as_beginnings(tmp_path, capsys, stray, covered):
    good = 60
    path = lines(tmp_path / "a.conll", *tagged(*stray), "", *tagged(*["B-X"] * good))
    found = entities(read(path))
    assert found[0][-1] == covered and len(found[1]) == good
    told = f"{path}, line {int(covered.split()[0][4:]) + 1}: the tag {stray[int(covered.split()[0][4:])]} goes on with what does not begin"
    assert told in capsys.readouterr().out
    path = lines(tmp_path / "b.conll", *tagged(*stray), "", *tagged(*["B-X"] * 40))  # 1 of 41 and more
    assert message(path).endswith("needed is B- at the first token of each entity (B, I, O, or B, M, E, S, O)")


def test_stray_tags_of_two_percent_are_the_last_that_pass(tmp_path):
    path = lines(tmp_path / "a.conll", *tagged("I-X", *["B-X"] * 49))
    assert len(entities(read(path))[0]) == 50
    path = lines(tmp_path / "b.conll", *tagged("I-X", *["B-X"] * 48))
    assert message(path).startswith(f"{path}, line 1: the tag I-X goes on with what does not begin before it, as 1 of 49 do in the file; ")


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("line, problem", [
    ('{"text": "a"', "is no JSON ("), ("text", "is no JSON ("), ('["a"]', "holds 'a', needed is an object a line, or one array"),
    ('"a"', "holds 'a', needed is an object"), ("3", "holds '3', needed is an object"), ("null", "holds 'None', needed is an object"),
    ('{"text": 3}', "the column text holds '3', needed is text"), ("{}", "has no column 'text', it has "),
    ('{"text": ["a", 3]}', "the column text holds \"['a', 3]\", needed is text"), ('{"body": "a"}', "has no column 'text', it has body; "),
])
def test_a_bad_line_of_json_is_told_with_its_number(tmp_path, line, problem):
    path = lines(tmp_path / "a.jsonl", {"text": "good"}, "", line, {"text": "good"})
    assert message(path).startswith(f"{path}, line 3: {problem}")


@pytest.mark.parametrize("value, problem", [
    ([[0, 6]], "the span [0, 6] is out of range; needed is 0 <= start < end <= 5, the characters of the text"),
    ([[-1, 2]], "the span [-1, 2] is out of range; "), ([[2, 2]], "the span [2, 2] is out of range; "),
    ([[3, 2]], "the span [3, 2] is out of range; "), ([[0, 4], [0, 5]], "the spans [0, 4] and [0, 5] overlap; "),
    ([[3, 5], [0, 4]], "the spans [0, 4] and [3, 5] overlap; needed are spans that do not"),
    ("[[0, 1]", "the spans '[[0, 1]' are no JSON; needed is [[start, end], ...]"),
    *[(value, f"{str(value[0])!r} is no span; needed is [start, end, ...] or {{\"start\": 0, \"end\": 4}}, in characters") for value in (
        [[1]], ["ab"], [["a", "b"]], [[0.0, 1.0]], [[True, 2]], [{"start": 0}], [{"begin_offset": 0, "end": 2}],
        [{"start": 0, "end": None}], [3], [None])],
    (3, "'3' is no span; "),
])
def test_bad_spans_are_told_with_their_line(tmp_path, value, problem):
    path = lines(tmp_path / "a.jsonl", {"text": "中bcde", "entities": [[0, 5]]}, {"text": "中bcde", "entities": value})
    text = message(path, need_entities=True)
    assert text.startswith(f"{path}, line 2: {problem}") and text == message(path, entity_field="entities")


def test_an_entity_field_without_a_span_is_told(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "a", "spans": []}, {"text": "b", "spans": None})
    assert message(path, entity_field="spans") == (
        f"--entity-field spans: {path} holds no span in it; needed is a column with some")


@pytest.mark.parametrize("rows, problem", [
    (["a O", "b X-LOC"], "line 2: the tag 'X-LOC' is unknown; needed is O, or B, I, M, E, S with -TYPE"),
    (["a O", "", "b b-LOC"], "line 3: the tag 'b-LOC' is unknown; "), (["a U-LOC"], "line 1: the tag 'U-LOC' is unknown; "),
    (["a O", "b"], "line 2: holds 'b'; needed is a token and, after a tab or a space, its tag"),
    (["one", "column"], "line 1: holds 'one'; "), (["a O", "\tO"], "line 2: holds '\\tO'; "),
])
def test_a_bad_line_of_tagged_tokens_is_told_with_its_number(tmp_path, rows, problem):
    path = lines(tmp_path / "a.conll", *rows)
    assert message(path).startswith(f"{path}, {problem}")


@pytest.mark.parametrize("kind, separator", [("csv", ","), ("tsv", "\t")])
def test_a_row_of_another_length_is_told(tmp_path, kind, separator):
    for row, count in (("b", 1), (separator.join("bcd"), 3)):
        path = lines(tmp_path / f"{count}.{kind}", separator.join(["id", "text"]), separator.join("1a"), row)
        assert message(path) == (f"{path}, line 3: has {count} fields, the header has 2; needed is "
                                 f"{'a comma' if separator == ',' else 'a tab'} between fields")


def test_a_csv_of_semicolons_is_read_by_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id;text\n1;\"x; y, z\"\n2;w\n")
    assert texts(read(path, cache=tmp_path / "cache")) == [["x; y, z"], ["w"]]


def test_a_csv_with_an_open_quote_is_told(tmp_path):
    path = lines(tmp_path / "a.csv", "id,text", '1,"never closed')
    assert message(path).startswith(f"{path}: is no CSV (")


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_compressed_file_that_is_cut_short_is_told(tmp_path, kind, suffix):
    raw = "".join(json.dumps({"text": f"text {number ** 7}"}) + "\n" for number in range(2000)).encode()
    path = tmp_path / f"a.{kind}{suffix}"
    packed = COMPRESSORS[suffix](raw)
    for damaged in (packed[:-20], packed[:len(packed) // 2], b"no archive", b"\x1f\x8b"):
        path.write_bytes(damaged)
        text = message(path)
        assert text.startswith(f"{path}: cannot be unpacked (") and text.endswith(f"needed is a whole {suffix} file")
        assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_a_compressed_file_is_not_unpacked_twice(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    read(path)

    def refuse(*_, **__):
        raise AssertionError("unpacked again")

    monkeypatch.setattr(formats.shutil, "copyfileobj", refuse)
    assert texts(read(path)) == texts(read(path, max_documents=1)) == [["a"]]


LATIN = "café".encode("latin-1")


@pytest.mark.parametrize("name, raw, problem", [
    ("a.txt", LATIN, "--train {}: is not UTF-8 at byte offset 3 ("),
    ("a.jsonl", b'{"text": "a"}\n{"text": "' + LATIN + b'"}', "--train {}: is not UTF-8 at byte offset "),
    ("a.csv", b"text\n" + LATIN, "--train {}: is not UTF-8 at byte offset "),
    ("a.tsv", b"text\n" + LATIN, "--train {}: is not UTF-8 at byte offset "),
    ("a.conll", LATIN + b" O\n", "--train {}: is not UTF-8 at byte offset "), ("a.parquet", LATIN, "{}: cannot be read as parquet ("),
    ("a.arrow", LATIN, "{}: cannot be read as arrow ("),
])
def test_what_is_not_utf8_or_not_of_the_format_is_told(tmp_path, name, raw, problem):
    (tmp_path / name).write_bytes(raw)
    assert message(tmp_path / name).startswith(problem.format(tmp_path / name))
    if name not in ("a.parquet", "a.arrow"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(raw))
        assert message(packed).startswith(problem.partition("{}")[0]) and name in message(packed)


@pytest.mark.parametrize("raw", [b"", b"\n\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv", "conll", "parquet", "arrow"])
def test_an_empty_file_is_told(tmp_path, kind, raw):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(raw)
    assert str(path) in message(path)


def test_a_header_alone_holds_no_text(tmp_path):
    for kind in ("csv", "tsv"):
        path = lines(tmp_path / f"a.{kind}", "text")
        assert message(path) == f"--train {path}: holds no text; needed is a document at least"


def test_a_cut_parquet_file_and_a_damaged_data_set_are_told(tmp_path):
    WRITERS["parquet"](tmp_path / "a.parquet", [{"text": "a"}] * 50)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert message(tmp_path / "a.parquet").startswith(f"{tmp_path / 'a.parquet'}: cannot be read as parquet (")
    WRITERS["saved"](tmp_path / "b", [{"text": "a"}])
    next((tmp_path / "b").glob("*.arrow")).unlink()
    assert message(tmp_path / "b").startswith(f"{tmp_path / 'b'}: cannot be read as saved (")


def test_an_unknown_hub_name_is_told_offline(tmp_path):
    assert message("hub:nobody/nothing", cache=tmp_path).startswith("hub:nobody/nothing: cannot be read as hub (")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_a_missing_extra_is_told_with_its_command(tmp_path, monkeypatch, kind):
    WRITERS[kind](tmp_path / f"a.{kind}", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message(tmp_path / f"a.{kind}") == (
        f"{tmp_path / f'a.{kind}'}: needs the package datasets, which is not installed: pip install datasets")


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    path = lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    monkeypatch.setattr(formats, "choose_field", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read(path)
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["sources.json"]


def test_a_data_set_by_the_name_of_the_hub_is_streamed_once(tmp_path, capsys):
    (tmp_path / "set").mkdir()  # load_dataset takes a folder for a name, too
    lines(tmp_path / "set" / "train.jsonl", {"text": "a\nb"}, {"text": "c"})
    lines(tmp_path / "set" / "test.jsonl", {"text": "d"})
    for name, expected in ((f"hub:{tmp_path}/set", [["a", "b"], ["c"]]), (f"hub:{tmp_path}/set:default:test", [["d"]])):
        assert texts(read(name, cache=tmp_path / "cache")) == expected
        assert "converting hub" in capsys.readouterr().out
        read(name, cache=tmp_path / "cache")
        assert "converting" not in capsys.readouterr().out


def test_a_codec_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert message(tmp_path / "a.txt.zst") == (f"{tmp_path / 'a.txt.zst'}: needs the package zstandard, which is not installed: "
                                               "pip install zstandard")


def test_an_archive_brings_all_its_files_under_their_names(tmp_path, capsys):
    lines(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.csv").write_text("text,other\nb,1\n")
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as archive:
        for name in ("a.jsonl", "b.csv"):
            archive.write(tmp_path / name, name)
    assert texts(read(tmp_path / "both.zip")) == [["a"], ["b"]]
    with gzip.open(tmp_path / "files.tar.gz", "wb") as packed:
        packed.write(b"anything")
    assert message(tmp_path / "files.tar.gz") == f"{tmp_path / 'files.tar.gz'}: is an archive; needed are its files (tar -xf), or a .zip"


def test_a_fault_in_a_compressed_file_is_told_with_the_name_that_the_user_gave(tmp_path):
    with gzip.open(tmp_path / "a.csv.gz", "wt") as packed:
        packed.write("text,other\na,1,2\n")
    assert message(tmp_path / "a.csv.gz").startswith(f"{tmp_path / 'a.csv.gz'} (a.csv), line 2: has 3 fields")


def test_a_column_that_is_there_twice_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    assert message(tmp_path / "a.csv") == f"{tmp_path / 'a.csv'}, line 1: has the column 'text' twice; needed are names that differ"


@pytest.mark.parametrize("name", ["hub:", "hub:a:b:c:d"])
def test_a_name_of_the_hub_has_a_form(name, tmp_path):
    assert "needed is hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT" in message(name, cache=tmp_path / "cache")


def test_quotes_of_a_tsv_that_happen_to_match_join_no_rows(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"Open quote\n2\tmiddle\n3\tclose it"\n4\tlast\n')
    assert texts(read(tmp_path / "a.tsv")) == [['"Open quote'], ["middle"], ['close it"'], ["last"]]


def test_an_archive_without_a_file_is_told_and_hidden_ones_are_passed_over(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert message(tmp_path / "empty.zip") == f"{tmp_path / 'empty.zip'}: holds no file; needed is one with text"
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr("a.txt", "a\n")
        archive.writestr("__MACOSX/._a.txt", b"\0")
    assert texts(read(tmp_path / "mac.zip")) == [["a"]]
