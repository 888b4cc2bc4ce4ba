"""Formats: JSONL, CSV, TSV, Parquet, Arrow, a saved data set and tagged tokens, compressed or not,
hold the documents of the plain text; entities come back as they were written; and every bad input
is named with its file and line and leaves nothing behind."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import refused, write_documents, write_rows
from data_reference import grouped, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import TextOptions
from pretrain.data.formats import open_files
from pretrain.data.sentences import Span, sentences

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

datasets.disable_progress_bars()


def read(*paths, need_entities: bool = False, cache: Path | None = None, **options) -> list[list]:
    """Documents as lists of (sentence, entities), read through the cache."""
    cache = cache or Path(paths[0]).parent / "cache"
    options = TextOptions(cache=str(cache), **options)
    need_entities = need_entities or options.entity_field is not None
    sources, text_format = open_files(tuple(map(str, paths)), options, need_entities)
    spans = [Span(source.path, 0, source.size) for source in sources]
    return grouped(sentences(spans, text_format))


def entities(documents: list[list]) -> list[list[str]]:
    """The texts that the spans of each document cover."""
    return [
        [sentence[start:end] for sentence, spans in document for start, end in spans]
        for document in documents
    ]


def message(*paths, **options) -> str:
    """The message of the UserError, which must leave no converted file in the cache."""
    cache = options.get("cache") or Path(paths[0]).parent / "cache"
    before = set(cache.rglob("*"))
    text = refused(read, *paths, **options)
    left = [path.name for path in set(cache.rglob("*")) - before if path.is_file()]
    assert not [name for name in left if "partial" in name or name.startswith("converted")]
    return text


def lines(path: Path, *records) -> Path:
    rows = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def write_arrow(path: Path, rows: list[dict]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_splits(path: Path, rows: list[dict]) -> None:
    other = datasets.Dataset.from_list([{"text": "other"}])
    train = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"test": other, "train": train}).save_to_disk(str(path))


WRITERS = {
    "jsonl": lambda path, rows: lines(path, *(json.dumps(row, ensure_ascii=False) for row in rows)),
    "csv": write_rows,
    "tsv": write_rows,
    "parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path, batch_size=2),
    "arrow": write_arrow,
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(str(path)),
    "saved splits": write_splits,
}
COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKED = [("txt", ".gz"), ("csv", ".bz2"), ("jsonl", ".xz"), ("parquet", ".gz")]


def write(folder: Path, kind: str, rows: list[dict]) -> Path:
    WRITERS[kind](folder / f"table.{kind}", rows)
    return folder / f"table.{kind}"


LINE = (
    st.text(st.sampled_from("ab ,\"'\t;é中😀\\#\r\u2028"), min_size=1, max_size=8)
    .map(str.strip)
    .filter(bool)
)
DOCUMENTS = st.lists(st.lists(LINE, min_size=1, max_size=3), min_size=1, max_size=5)


@pytest.mark.parametrize("kind, suffix", [*((kind, "") for kind in WRITERS), *PACKED])
def test_a_format_gives_the_documents_of_the_plain_text(tmp_path_factory, kind, suffix):
    is_fast = kind in ("jsonl", "csv", "tsv") and not suffix

    @settings(max_examples=30 if is_fast else 5, deadline=None)
    @given(documents=DOCUMENTS)
    def compare(documents):
        if kind == "tsv":  # a tab inside a cell does not separate cells
            documents = [[line.replace("\t", "_") for line in document] for document in documents]
        folder = tmp_path_factory.mktemp("formats")
        plain = write_documents(folder / "plain.txt", documents)
        expected = read(plain, format="sentences")
        assert texts(expected) == documents
        rows = [
            {"id": place, "text": "\n".join(document)} for place, document in enumerate(documents)
        ]
        path = plain if kind == "txt" else write(folder, kind, rows)
        if suffix:
            packed = path.with_name(path.name + suffix)
            packed.write_bytes(COMPRESSORS[suffix](path.read_bytes()))
            path = packed
        assert read(path, format="sentences" if kind == "txt" else "auto") == expected

    compare()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("cells", [['"Ah', '"Oh" said he'], ['"Open', "middle", 'close"', "last"]])
def test_a_tsv_without_quoting_is_read_verbatim(tmp_path, newline, cells):
    """A quote never closes, or closes in another row."""
    path = tmp_path / "table.tsv"
    rows = ["id\ttext", *(f"1\t{cell}" for cell in cells)]
    path.write_bytes(f"\ufeff{newline.join(rows)}".encode())
    assert texts(read(path)) == [[cell] for cell in cells]


def test_a_csv_spelled_out(tmp_path):
    raw = '\ufeffid,text\r\n1,"He said ""no"", and\nleft"\r\n\r\n2, b \r\n'
    (tmp_path / "a.csv").write_bytes(raw.encode())
    assert texts(read(tmp_path / "a.csv")) == [['He said "no", and', "left"], ["b"]]
    path = lines(tmp_path / "b.csv", "id;text", '1;"x; y, z"', "2;w")
    assert texts(read(path)) == [["x; y, z"], ["w"]]


def test_json_keeps_every_character(tmp_path):
    """Escapes, a BOM, blank lines, other line breaks, half of a surrogate pair."""
    raw = b'\xef\xbb\xbf{"text": "\\u4e2d\\ud83d\\ude00 \\ud83d."}\r\n\n'
    (tmp_path / "a.json").write_bytes(raw + '{"text": "a\u2028b"}'.encode())
    assert texts(read(tmp_path / "a.json")) == [["中😀 ?."], ["a\u2028b"]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_list_of_strings_is_the_sentences(tmp_path, kind):
    rows = [{"text": ["One. Two.", "three"]}, {"text": []}, {"text": ["four"]}]
    assert texts(read(write(tmp_path, kind, rows))) == [["One. Two.", "three"], ["four"]]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_text_column(tmp_path_factory, kind):
    """The given one, else `text`, else the only one with words."""

    def table(**columns) -> Path:
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        return write(tmp_path_factory.mktemp("formats"), kind, rows)

    both = table(title=["t", "u"], text=["a", "b"])
    assert texts(read(both)) == [["a"], ["b"]]
    assert texts(read(both, text_field="title")) == [["t"], ["u"]]
    assert texts(read(table(number=[1, 2], body=["a", "b"]))) == [["a"], ["b"]]
    place = "row 1" if kind == "parquet" else "line 1"
    two = table(title=["t"], body=["a"])
    for name, options in (
        ("text", {}),
        ("spans", {"text_field": "title", "entity_field": "spans"}),
    ):
        told = message(two, **options)
        assert told.startswith(f"{two}, {place}: ") and f"'{name}'" in told
        assert "title, body" in told


def test_the_format_option_overrides_the_file_name(tmp_path):
    path = lines(tmp_path / "a.txt", {"text": "a"}, {"text": "b"})
    assert texts(read(path, format="jsonl")) == [["a"], ["b"]]
    assert texts(read(path, format="lines")) == [['{"text": "a"}'], ['{"text": "b"}']]
    assert texts(read(lines(tmp_path / "C.JSONL", {"text": "c"}))) == [["c"]]


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
    names = ["one", "three", "four", "five", "six", "seven", "eight"]
    expected = [[name] for name in names]
    expected.insert(1, ["two a", "two b"])
    for limit in (0, 2, 7):
        found = read(*sorted(folder.iterdir()), cache=tmp_path / "cache", max_documents=limit)
        assert texts(found) == (expected[:limit] if limit else expected)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_name_with_brackets_is_that_file(tmp_path, kind):
    WRITERS[kind](tmp_path / f"a[1].{kind}", [{"text": "one"}])
    WRITERS[kind](tmp_path / f"a1.{kind}", [{"text": "two"}])
    assert texts(read(tmp_path / f"a[1].{kind}")) == [["one"]]


def test_converted_text_is_found_again_until_something_changes(tmp_path, capsys):
    row = {"text": "a", "body": "b", "entities": [[0, 1]]}
    path = lines(tmp_path / "a.jsonl", row, row | {"entities": []})

    def converts(**options) -> bool:
        read(path, **options)
        return "converting" in capsys.readouterr().out

    for change in (
        {},
        {"text_field": "body"},
        {"max_documents": 1},
        {"entity_field": "entities"},
    ):
        assert converts(**change) and not converts(**change), change
    lines(path, {"text": "c"})
    assert converts() and texts(read(path)) == [["c"]]


def test_a_data_set_by_a_hub_name_is_read_once(tmp_path, capsys):
    """hub:NAME, hub:NAME:CONFIG and hub:NAME:CONFIG:SPLIT."""
    (tmp_path / "set").mkdir()  # load_dataset takes a folder as a name, too
    lines(tmp_path / "set" / "train.jsonl", {"text": "a\nb"}, {"text": "c"})
    lines(tmp_path / "set" / "test.jsonl", {"text": "d"})
    train, test = [["a", "b"], ["c"]], [["d"]]
    for more, expected in {":default": train, ":default:test": test, "::test": test}.items():
        for is_first in (True, False):
            assert texts(read(f"hub:{tmp_path}/set{more}", cache=tmp_path / "cache")) == expected
            assert ("converting" in capsys.readouterr().out) == is_first
    assert message("hub:a:b:c:d", cache=tmp_path).startswith("hub:a:b:c:d: ")


SPAN_FORMS = {
    "list": lambda start, end: [start, end],
    "list with a type": lambda start, end: [start, end, "DISEASE"],
    "start and end": lambda start, end: {"start": start, "end": end, "label": "x"},
    "offsets": lambda start, end: {"id": 1, "start_offset": start, "end_offset": end},
    "positions": lambda start, end: {"start_pos": start, "end_pos": end, "label_type": "y"},
}


@pytest.mark.parametrize(
    "kind, form",
    [*(("jsonl", form) for form in SPAN_FORMS), ("csv", "list"), ("parquet", "start and end")],
)
def test_spans_in_every_form(tmp_path, kind, form):
    """Out of order, twice, side by side, in characters where bytes or UTF-16 would differ."""
    spans = [SPAN_FORMS[form](*span) for span in ((5, 6), (1, 2), (2, 4), (1, 2))]
    rows = [{"text": "😀中é文\nab c", "spans": spans}, {"text": "none", "spans": []}]
    if kind == "csv":
        rows = [row | {"spans": json.dumps(row["spans"])} for row in rows]
    path = write(tmp_path, kind, rows)
    first = [("😀中é文", ((1, 2), (2, 4))), ("ab c", ((0, 1),))]
    assert read(path, entity_field="spans") == [first, [("none", ())]]
    assert entities(read(path)) == [[], []]


def test_the_entities_column_is_read_if_needed(tmp_path):
    """`datasets` may return a list of spans as columns."""
    columns = {"start": [3, 0], "end": [5, 2], "label": ["x", "y"]}
    path = lines(tmp_path / "a.jsonl", {"text": "ab cd", "entities": columns}, {"text": "cd"})
    assert entities(read(path)) == [[], []]
    assert entities(read(path, need_entities=True)) == [["ab", "cd"], []]
    assert message(path, entity_field="entities").startswith(f"{path}, line 2: ")


def tags_of(length: int, kind: str, scheme: str) -> list[str]:
    if not kind:
        return ["O"] * length
    if length == 1 and scheme != "BIO":
        return [f"S-{kind}"]
    middle, end = {"BIO": "II", "BIOES": "IE", "BMES": "ME"}[scheme]
    prefixes = ["B"] + [middle] * (length - 2) + [end] * (length > 1)
    return [f"{prefix}-{kind}" for prefix in prefixes]


CHUNK = st.tuples(
    st.lists(st.integers(0, 25), min_size=1, max_size=3), st.sampled_from(["", "", "LOC", "PER"])
)
SENTENCES = st.lists(st.lists(CHUNK, min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(SENTENCES, min_size=1, max_size=3),
    scheme=st.sampled_from(["BIO", "BIOES", "BMES"]),
    gap=st.sampled_from([" ", ""]),
    with_starts=st.booleans(),
    separator=st.sampled_from(["\t", " ", " NN I-NP ", "\tx\t"]),
    newline=st.sampled_from(["\n", "\r\n", " \n", "\t\n"]),
    dash=st.sampled_from("-_"),
)
def test_tagged_tokens_are_read(
    tmp_path_factory, documents, scheme, gap, with_starts, separator, newline, dash
):
    """Words are joined by spaces, characters are not; without -DOCSTART-, each is a sentence."""
    rows, expected, covered = [], [], []
    for document in documents:
        rows += ["-DOCSTART- -X- O", ""] if with_starts else []
        found = [[], []]  # sentences and entities
        for sentence in document:
            parts, tags, spans = [], [], []
            for numbers, kind in sentence:
                chunk = [f"word{chr(97 + n)}" if gap else chr(0x4E00 + n) for n in numbers]
                parts += chunk
                tags += tags_of(len(chunk), kind, scheme)
                spans += [gap.join(chunk)] if kind else []
            rows += [*(f"{p}{separator}{t.replace('-', dash)}" for p, t in zip(parts, tags)), ""]
            found[0].append(gap.join(parts))
            found[1] += spans
            if not with_starts:
                expected.append([gap.join(parts)])
                covered.append(spans)
        if with_starts:
            expected.append(found[0])
            covered.append(found[1])
    path = tmp_path_factory.mktemp("formats") / "a.conll"
    path.write_bytes(("\ufeff" * with_starts + newline.join(rows)).encode())
    documents = read(path)
    assert texts(documents) == expected and entities(documents) == covered


def test_characters_with_a_digit_are_joined_word_by_word(tmp_path, capsys):
    rows = "今0 B-X|天1 M-X|去0 M-X|了1 E-X|家0 S-Y|10 O|21 O||好0 O".replace(" ", "\t").split("|")
    found = read(lines(tmp_path / "a.bmes", *rows))
    assert texts(found) == [["今天 去了 家 12"], ["好"]]
    assert entities(found) == [["今天 去了", "家"], []] and "'今0'" in capsys.readouterr().out


@pytest.mark.parametrize("row", ["  {}", " \t{}", "\u3000 {}"])
def test_a_token_may_be_white_space(tmp_path, row):
    rows = ["口 B-X", row.format("I-X"), "腔 I-X", row.format("O"), "溃 S-X"]
    found = read(lines(tmp_path / "a.bio", *rows))
    assert texts(found) == [["口 腔 溃"]] and entities(found) == [["口 腔", "溃"]]


def tagged(*tags: str) -> list[str]:
    return [f"word{number} {tag}" for number, tag in enumerate(tags)]


@pytest.mark.parametrize(
    "stray, covered",
    [
        (("O", "I-X", "I-X"), "word1 word2"),
        (("B-Y", "I-X"), "word1"),
        (("B-X", "E-X", "E-X"), "word2"),
    ],
)
def test_a_few_stray_tags_are_read_as_beginnings(tmp_path, capsys, stray, covered):
    """Up to two percent: 1 of 50."""
    others = 49 - sum(tag[0] in "BS" for tag in stray)
    path = lines(tmp_path / "a.conll", *tagged(*stray), "", *tagged(*["B-X"] * others))
    found = entities(read(path))
    assert found[0][-1] == covered and len(found[1]) == others
    line = int(covered.split()[0][4:]) + 1
    assert f"{path}, line {line}: " in capsys.readouterr().out
    path = lines(tmp_path / "b.conll", *tagged(*stray), "", *tagged(*["B-X"] * (others - 1)))
    assert message(path).startswith(f"{path}, line {line}: ")


GOOD = '{"text": "good"}'
OBJECTS = ['{"text": "a"', '["a"]', '{"text": 3}', '{"text": ["a", 3]}', '{"body": "a"}']
SPANS = [[[0, 6]], [[-1, 2]], [[2, 2]], [[3, 5], [0, 4]], "[[0, 1]", [[1]], ["ab"], [[0.0, 1.0]]]
SPANS += [[{"start": 0}], [None], 3, {"start": 0, "end": [2]}, {"start": 0, "end": 9}]
BAD_ROWS = {  # name: line, rows
    "tag.conll": (3, "a O\n\nb X-LOC"),
    "untagged.conll": (2, "a O\nb"),
    "no token.conll": (2, "a O\n\tO"),
    "short.csv": (3, "id,text\n1,a\nb"),
    "long.tsv": (3, "id\ttext\n1\ta\nb\tc\td"),
    "twice.csv": (1, "text,text\na,b"),
    "quote.csv": (2, 'id,text\n1,"never closed'),
    **{f"{n}.jsonl": (3, f"{GOOD}\n\n{line}\n{GOOD}") for n, line in enumerate(OBJECTS)},
}


@pytest.mark.parametrize("value", SPANS, ids=str)
def test_bad_spans_are_named_with_their_line(tmp_path, value):
    good = {"text": "中bcde", "entities": [[0, 5]]}
    path = lines(tmp_path / "a.jsonl", good, good | {"entities": value})
    text = message(path, need_entities=True)
    assert text.startswith(f"{path}, line 2: ")
    assert text == message(path, entity_field="entities")


@pytest.mark.parametrize("value", ["Apple; Google", "[[0,3],[2,3]]"])
def test_a_column_that_only_has_the_name_of_entities_is_not_read(tmp_path, value):
    path = lines(tmp_path / "a.csv", "text,entities", f'a b,"{value}"', "c d,")
    assert read(path, need_entities=True) == [[("a b", ())], [("c d", ())]]
    assert message(path, entity_field="entities").startswith(f"{path}, line 2: ")


def test_an_empty_first_cell_does_not_leave_the_text_to_another_column(tmp_path):
    rows = {"id": "A1", "body": ""}, {"id": "A2", "body": "some words"}
    path = lines(tmp_path / "a.jsonl", *rows)
    assert "text_field" in message(path)
    assert read(path, text_field="body") == [[("some words", ())]]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_line(tmp_path, name):
    number, rows = BAD_ROWS[name]
    path = lines(tmp_path / name, rows)
    assert message(path).startswith(f"{path}, line {number}: ")
    packed = path.with_name(f"{name}.gz")  # by the name that the user gave
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert message(packed).startswith(f"{packed} ({name}), line {number}: ")


def test_an_entity_field_without_a_span_is_named(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "a", "spans": []}, {"text": "b", "spans": None})
    text = message(path, entity_field="spans")
    assert text.startswith(f"{path}: ") and "'spans'" in text


@pytest.mark.parametrize("raw", [b"", "café".encode("latin-1")], ids=str)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "conll", "parquet", "arrow"])
def test_empty_and_non_utf8_files_are_named(tmp_path, kind, raw):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(raw)
    assert message(path).startswith(f"{path}: ")


def test_a_parquet_file_without_rows_is_one_of_many(tmp_path):
    """Spark writes such parts. Alone, it is refused."""
    empty = tmp_path / "0.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(
        datasets.Dataset.from_dict({"text": ["a"]}).data.table.slice(1), empty
    )
    WRITERS["parquet"](tmp_path / "1.parquet", [{"text": "one"}])
    assert texts(read(*sorted(tmp_path.glob("*.parquet")), cache=tmp_path / "cache")) == [["one"]]
    assert message(empty).startswith(f"{empty}: ")


def test_damaged_tables_are_named(tmp_path):
    """Only a header, a truncated Parquet file, a data set without a file."""
    parquet, saved = tmp_path / "a.parquet", tmp_path / "b"
    WRITERS["parquet"](parquet, [{"text": "a"}] * 50)
    parquet.write_bytes(parquet.read_bytes()[:-9])
    WRITERS["saved"](saved, [{"text": "a"}])
    next(saved.glob("*.arrow")).unlink()
    for path in (parquet, saved, lines(tmp_path / "a.csv", "text")):
        assert message(path).startswith(f"{path}: ")
    assert message("hub:nobody/nothing", cache=tmp_path).startswith("hub:nobody/nothing: ")


def test_a_pipe_in_a_saved_data_set_is_not_opened(tmp_path):
    WRITERS["saved"](tmp_path / "saved", [{"text": "a"}])
    (path,) = (tmp_path / "saved").glob("*.arrow")
    path.unlink()
    os.mkfifo(path)
    assert str(path) in message(tmp_path / "saved")


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_compressed_file_that_is_cut_short_is_named(tmp_path, suffix):
    raw = "".join(f'{{"text": "text {number**7}"}}\n' for number in range(2000)).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    packed = COMPRESSORS[suffix](raw)
    for damaged in (packed[: len(packed) // 2], b"no archive"):
        path.write_bytes(damaged)
        text = message(path)
        assert text.startswith(f"{path}: ") and str(tmp_path / "cache") not in text
        assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:14]),
    "changed": lambda path: path.write_bytes(path.read_bytes().swapcase()),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_text_in_the_cache_is_made_again(damage, tmp_path):
    """What is unpacked, decoded or converted, and the notes about it."""
    path, other, cache = tmp_path / "a.jsonl.gz", tmp_path / "other.txt", tmp_path / "cache"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    other.write_text("мир\n\nмир\n", encoding="cp1251")

    def found() -> list:
        return texts(read(path)), texts(read(other, encoding="cp1251", cache=cache))

    whole = found()
    for file in [file for file in cache.rglob("*") if file.is_file()]:
        damage(file)
        assert found() == whole, file


def test_archives(tmp_path):
    """All files of a zip are read except hidden ones; tar is refused."""
    both, empty, tar = (tmp_path / name for name in ("both.zip", "empty.zip", "files.tar.gz"))
    with zipfile.ZipFile(both, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", '{"text": "a\\nb"}\n')
        archive.writestr("b.csv", "text,other\nb,1\n")
        archive.writestr("__MACOSX/._a.txt", b"\0")
    assert texts(read(both)) == [["a", "b"], ["b"]]
    with zipfile.ZipFile(empty, "w"):
        pass
    tar.write_bytes(gzip.compress(b"anything"))
    for path in (empty, tar):
        assert message(path).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "kind, package",
    [("parquet", "datasets"), ("saved", "datasets"), ("txt.zst", "zstandard")],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, kind, package):
    path = tmp_path / f"table.{kind}"
    WRITERS.get(kind, lambda path, rows: path.write_bytes(b"x"))(path, [{"text": "a"}])
    monkeypatch.setitem(sys.modules, package, None)
    text = message(path)
    assert text.startswith(f"{path}: ") and text.endswith(f"pip install {package}")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "conll", "txt.gz"])
def test_every_format_is_read_in_its_encoding(tmp_path, kind):
    """Beside a file in UTF-8, which stays as it is."""
    rows = ["你好，世界", "第二句话"]
    contents = {
        "jsonl": "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows),
        "conll": "".join("".join(f"{token}\tO\n" for token in row) + "\n" for row in rows),
    }
    lines_of_text = ("" if "txt" in kind else "text\n") + "".join(f"{row}\n" for row in rows)
    content = contents.get(kind, lines_of_text)
    path, other = tmp_path / f"a.{kind}", tmp_path / f"b.{kind.removesuffix('.gz')}"
    other.write_text(content, encoding="utf-8")
    options = {"format": "lines"} if "txt" in kind else {}
    expected = read(other, **options)
    for encoding in ("gb18030", "utf-16"):
        raw = content.encode(encoding)
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
        assert message(path).startswith(f"{path}")
        assert read(path, encoding=encoding, **options) == expected
        assert read(path, other, encoding=encoding, **options) == 2 * expected
        assert message(path, encoding="ascii").startswith(f"{path}")


def test_a_compressed_file_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 << 20))
    text = "word\n" * 500_000
    packed, archive = tmp_path / "a.txt.gz", tmp_path / "b.zip"
    packed.write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("b.txt", text)
    for path in (packed, archive):
        assert message(path).startswith(f"{path}: ")
        assert not [*(tmp_path / "cache").rglob("*.txt*")]
