"""Text files: what a document is in each format, against a slow reading of the whole text at once;
lines beyond the limit; pieces, which never change a document; the detected format; every bad file
with its name; and the index, which avoids reading a file again."""

import codecs
import errno
import json
import os
import re
from itertools import chain, islice
from pathlib import Path

import pytest
from conftest import refused
from data_reference import grouped, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import sentences as reading
from pretrain.data.sentences import Span, cut_into_pieces, detect_format, sentences
from pretrain.data.sources import (
    MAX_CHARACTERS,
    check_files,
    expand,
    likely_encodings,
)
from pretrain.data.tables import read_rows
from pretrain.inputs import SAMPLED_CHARACTERS, TextFiles

FORMATS = ("sentences", "lines", "text")
BOM = codecs.BOM_UTF8
MIB = 1 << 20


def reference_documents(raw: bytes, text_format: str) -> list[list[str]]:
    """The documents of a file, the slow way: decode it whole, split it whole."""
    lines = [line.strip() for line in raw.decode("utf-8").removeprefix("\ufeff").split("\n")]
    if text_format == "lines":
        return [[line] for line in lines if line]
    groups = [[]]
    for line in lines:
        if line:
            groups[-1].append(line)
        elif text_format == "sentences":
            groups.append([])
    return [group for group in groups if group]


def read_documents(pieces: list[list[Span]], text_format: str) -> list[list[str]]:
    return texts(grouped(chain.from_iterable(sentences(piece, text_format) for piece in pieces)))


def whole(*paths) -> list[Span]:
    return [Span(str(path), 0, path.stat().st_size) for path in paths]


def bare(documents: list[list[str]]) -> list[str]:
    """The characters of each document, wherever its sentences end."""
    return ["".join("".join(document).split()) for document in documents]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("reading")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "text.txt"


def cut_at_stops(line: str) -> list[str]:
    """A sentence ends after each "." and the spaces after it; joined, the parts are the line."""
    return re.findall(r"[^.]*\.\s*|[^.]+", line)


def slow_sentences(text: str, entities: list, cut) -> list[tuple[str, tuple]]:
    """Character by character: a sentence ends where a line or part does, unless one entity owns
    the characters on both sides."""
    owner = [None] * len(text)
    for number, (start, end) in enumerate(entities):
        owner[start:end] = [number] * (end - start)
    begins, place = set(), 0
    for line in text.split("\n"):
        for part in (cut(line) if cut else None) or [line]:
            place += len(part)
            begins.add(place)
        place += 1
    groups = []
    for place in range(len(text)):
        splits = owner[place] is None or place == 0 or owner[place] != owner[place - 1]
        if not groups or (place in begins and splits):
            groups.append([])
        groups[-1].append(place)
    found = []
    for group in groups:
        while group and not text[group[0]].strip():
            group.pop(0)
        while group and not text[group[-1]].strip():
            group.pop()
        spans = []
        for number in dict.fromkeys(owner[place] for place in group if owner[place] is not None):
            mine = [place - group[0] for place in group if owner[place] == number]
            spans.append((mine[0], mine[-1] + 1))
        if group:
            found.append(("".join(text[place] for place in group), tuple(spans)))
    return found


@st.composite
def texts_with_entities(draw):
    text = draw(st.text(st.sampled_from("ab. \n中é😀"), min_size=1, max_size=40))
    places = draw(st.lists(st.integers(0, len(text)), max_size=8, unique=True).map(sorted))
    return text, [[start, end] for start, end in zip(places[::2], places[1::2])]


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(texts_with_entities(), min_size=1, max_size=3),
    cut=st.sampled_from([None, cut_at_stops]),
    piece_bytes=st.sampled_from([1, 60, MIB]),
)
def test_records_against_the_slow_reading(scratch, records, cut, piece_bytes):
    path = scratch / "records.jsonl"
    rows = [{"text": text} | ({"entities": spans} if spans else {}) for text, spans in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pieces = cut_into_pieces([path], "jsonl", piece_bytes)
    found = grouped(chain.from_iterable(sentences(piece, "jsonl", cut) for piece in pieces))
    assert found == [slow_sentences(text, entities, cut) for text, entities in records]


def test_a_long_line_is_cut_at_white_space(path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 16)
    line = "the quick brown fox jumps over\tthe lazy dog and runs away from it all"
    path.write_text(f"{line}\nnext\n\nother\n")
    first, second = read_documents([whole(path)], "sentences")
    assert second == ["other"] and first[-1] == "next"
    assert len(first) > 4 and " ".join(first[:-1]).split() == line.split()  # no word is cut


LINES = st.sampled_from(
    ["a", "bb cc", "", "", " ", "\t", "\u3000", "中文 字", "今天天气很好😀é" * 3, "x" * 30]
    + ["y" * 8 + " ", "y" * 9 + " ", "bcd\tefghijklmnop  é\t", " abc" + " " * 13, " " * 30]
    + ["A\u2028B\x0bC\x85D\rE"]  # only \n ends a line
)


@st.composite
def raw_texts(draw):
    lines = draw(st.lists(st.tuples(LINES, st.sampled_from(["\n", "\n", "\r\n"])), max_size=25))
    begin, end = draw(st.sampled_from([b"", BOM])), draw(st.sampled_from([b"", b"end"]))
    return begin + "".join(line + newline for line, newline in lines).encode() + end


@settings(max_examples=200, deadline=None)
@given(
    raws=st.lists(raw_texts(), min_size=1, max_size=3),
    piece_bytes=st.integers(1, 90),
    text_format=st.sampled_from(FORMATS),
    limit=st.sampled_from([4, 8, 13, MIB]),
)
def test_pieces_hold_the_documents_of_each_file(scratch, raws, piece_bytes, text_format, limit):
    """A limit of a few bytes changes nothing but where sentences end."""
    files = [scratch / f"{number}.txt" for number in range(len(raws))]
    for file, raw in zip(files, raws):
        file.write_bytes(raw)
    expected = [reference_documents(raw, text_format) for raw in raws]
    expected = list(chain.from_iterable(expected))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_LINE_BYTES", limit)
        pieces = cut_into_pieces(files, text_format, piece_bytes)
        found = read_documents(pieces, text_format)
        assert found == read_documents([whole(*files)], text_format)
    assert bare(found) == bare(expected) and (limit < MIB or found == expected)
    spans = [span for piece in pieces for span in piece]
    assert all(span.end > span.start for span in spans)
    for file, raw in zip(files, raws):  # the spans of a file tile it, in order
        mine = [raw[span.start : span.end] for span in spans if span.path == str(file)]
        assert b"".join(mine) == raw
    assert [span.path for span in spans] == sorted(span.path for span in spans)
    for piece in pieces:  # beyond piece_bytes only if one document is
        assert len(piece) <= 1 or sum(span.end - span.start for span in piece) <= piece_bytes


def test_large_files_are_split_and_small_ones_grouped(tmp_path):
    large, small = tmp_path / "1-large.txt", [tmp_path / f"2-{number}.txt" for number in range(10)]
    large.write_text("".join(f"sentence {number}\n\n" for number in range(100)))
    for file in small:
        file.write_text("short\n")
    pieces = cut_into_pieces([large, *small], "sentences", 200)
    sizes = [sum(span.end - span.start for span in piece) for piece in pieces]
    assert len(sizes) >= 7 and all(100 < size <= 220 for size in sizes[:-2])
    assert len(cut_into_pieces([large, *small], "text", 200)) == 2  # a file is never cut


LONG_FILE = ("word " * 20 + "\n") * 1400


@pytest.mark.parametrize(
    "expected, contents",
    [
        ("sentences", ["one\ntwo\nthree\n\nfour\n\n\n"]),
        ("sentences", ["\ufeffone\r\ntwo\r\n\r\nthree\r\n"]),
        ("sentences", ["one\ntwo\n\nthree\n", "four\n"]),  # some files without groups
        ("lines", ["\n\none\ntwo\nthree\n\n\n"]),  # blank lines at the ends make no groups
        ("lines", ["one\n\ntwo\n\nthree\n"]),  # nor do those after every line
        ("text", ["one\ntwo\n"] * 40),
        ("lines", [LONG_FILE] * 2),
    ],
)
def test_the_detected_format(tmp_path, expected, contents):
    files = [tmp_path / f"{number}.txt" for number in range(len(contents))]
    for file, text in zip(files, contents):
        file.write_text(text, encoding="utf-8")
    assert detect_format(files)[0] == expected


BAD_TEXT = {
    "in the middle": b"ab\xff cd",
    "a character that the first MiB cuts": b"a" * (MIB - 1) + b"\xc3(",
    "cut at the end, beyond a MiB": b"a" * (MIB - 2) + "中文".encode()[:-2],
    "surrogate": b"a\xed\xa0\x80",
    "binary beyond a MiB": b"a" * MIB + b"bc\0",
    "empty": b"",
    "white space": "\ufeff \t\n\u3000\r\n".encode(),
}


@pytest.mark.parametrize("raw", BAD_TEXT.values(), ids=BAD_TEXT.keys())
def test_bad_text_is_named_with_its_offset(path, raw):
    path.write_bytes(raw)
    offset = raw.find(b"\0")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start
    told = refused(check_files, [path])
    assert told.startswith(f"{path}: ") and (offset < 0 or re.search(rf"offset {offset}\b", told))


def test_good_text_across_a_chunk_boundary(path):
    raw = b"\n" * (MIB - 1) + "中文".encode()
    path.write_bytes(raw)
    assert check_files([path])[0].size == len(raw)


def test_every_bad_file_is_named_at_once(tmp_path):
    for name, raw in {"a": b"", "b": b"good", "c": b"\0", "d": b" ", "e": b"\xff"}.items():
        (tmp_path / name).write_bytes(raw)
    lines = refused(check_files, [*sorted(tmp_path.iterdir()), tmp_path / "gone"]).splitlines()
    bad = [str(tmp_path / name) for name in ("a", "c", "d", "e", "gone")]
    assert [line.split(":")[0] for line in lines] == bad


def test_expand(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d[1].md", ".hidden/e.txt", "sub/.f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt", "sub/c.txt", "sub/deep/d[1].md")]
    monkeypatch.chdir(tmp_path)
    for paths, expected in (
        ([tmp_path], names),
        ([tmp_path / "*.txt"], names[:2]),
        ([tmp_path / "**" / "*.txt"], names[:3]),
        ([tmp_path / "s*"], names[2:]),  # a folder that matches stands for its files
        ([tmp_path / "b.txt", tmp_path, tmp_path / "a.txt"], [names[1], names[0], *names[2:]]),
        ([names[3]], names[3:]),  # brackets: a file first
        (["a.txt", "./a.txt", "sub/../a.txt", names[0]], names[:1]),
    ):
        assert expand(map(str, paths)) == expected


def test_a_folder_is_read_behind_links(tmp_path, monkeypatch):
    """Each folder once, also if a link leads up; a link to nothing is named."""
    for name in ("elsewhere/c.txt", "text/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path / "text")
    for name, target in (("more", "../elsewhere"), ("gone.txt", "nowhere"), (".x.txt", "nowhere")):
        Path(name).symlink_to(target)
    Path("more/up").symlink_to("../text")
    expected = [str(Path.cwd() / name) for name in ("a.txt", "gone.txt", "more/c.txt")]
    assert expand(["."]) == expected and expand(["*.txt"]) == expected[:2]
    assert refused(check_files, map(Path, expected)).startswith(f"{expected[1]}: ")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Also for a superuser, who can read every folder but those of some network file systems."""
    (tmp_path / "text").mkdir()
    folder, scandir = tmp_path / "text" / "closed", os.scandir
    folder.mkdir()

    def refuse(path):
        if os.fspath(path) == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refused(expand, [str(tmp_path / "text")]).startswith(f"{folder}: ")


def test_a_name_that_is_not_utf8_is_shown_with_escapes(tmp_path):
    (tmp_path / "caf\udce9.txt").write_text("text")
    assert refused(expand, [str(tmp_path)]).startswith(f"{tmp_path}/caf\\udce9.txt: ")


def test_the_index_avoids_reading_until_a_file_changes(path, tmp_path, capsys):
    index = tmp_path / "deep" / "index.json"

    def check(text: str, later_ns: int):
        path.write_text(text)
        os.utime(path, ns=(0, later_ns))
        return check_files([path], index)[0]

    first = check("text", 1)
    assert check("TEXT", 1) == first != check_files([path])[0]  # taken from the index
    assert capsys.readouterr().out == ""
    second = check("TEXT", 2)  # the same size
    assert second.sha256 != first.sha256 and str(path) in capsys.readouterr().out
    third = check("TEXT", 3)  # touched, not changed
    assert (third.sha256, third.mtime_ns) == (second.sha256, 3) and capsys.readouterr().out == ""
    assert check("longer", 3).sha256 not in (first.sha256, second.sha256)  # the same time


@pytest.mark.parametrize("raw", ["{", '{"x": 1}', '{"x": {"path": "x"}}'])
def test_a_damaged_index_only_costs_time(path, tmp_path, raw):
    index = tmp_path / "index.json"
    path.write_text("text")
    index.write_text(raw)
    assert check_files([path], index) == check_files([path])
    assert str(path) in json.loads(index.read_text())  # and it is whole again


# Encodings.

CHINESE = "今天天气很好，我们去公园散步。\n他在北京大学学习人工智能。\n"
ENCODED = {
    "gb18030": CHINESE,
    "cp1251": "Москва является столицей России, в этом городе живёт много людей.\n",
    "cp1250": "Rząd ogłosił wczoraj, że zwiększy wydatki na służbę zdrowia. To za mało, i żąda.\n",
    "utf-16": CHINESE,
    "utf-16-be": "plain words\n",
}


@pytest.mark.parametrize("name", ENCODED)
def test_text_in_another_encoding_shows_how_each_likely_one_reads_it(path, name):
    """In Latin script, several read it without an error, and mostly wrong: only a reader can
    tell."""
    pytest.importorskip("charset_normalizer")
    text = ENCODED[name] * 50
    encoded = text.encode(name)
    path.write_bytes(encoded)
    told, likely = refused(check_files, [path]), likely_encodings(encoded)
    assert told.startswith(f"{path}: ")
    for encoding, word in likely.items():
        assert encoding in told and word in told
        assert (word in text) == (encoded.decode(encoding) == text)
    assert any(word in text for word in likely.values())


@pytest.mark.parametrize("name", ENCODED)
def test_text_is_checked_in_its_encoding(path, tmp_path, name):
    path.write_bytes(ENCODED[name].encode(name))
    (source,) = check_files([path], encoding=name)
    assert source.encoding == codecs.lookup(name).name
    path.write_bytes(CHINESE.encode())  # most encodings would decode it
    assert check_files([path], encoding=name) == check_files([path])
    path.write_bytes("\n".encode(name))
    assert refused(check_files, [path], encoding=name).startswith(f"{path}: ")


def test_ascii_is_read_in_an_encoding_only_if_that_is_made_of_ascii(path):
    path.write_bytes("日本".encode("iso2022_jp"))
    assert path.read_bytes().isascii()
    (source,) = check_files([path], encoding="iso-2022-jp")
    assert path.read_bytes().decode(source.encoding) == "日本"
    path.write_bytes(b"words\n")
    assert check_files([path], encoding="utf-16") == check_files([path])


def test_damaged_utf8_is_not_taken_for_another_encoding(path):
    path.write_bytes(CHINESE.encode() * 50 + b"\xff\xfe\n" + CHINESE.encode())
    told = refused(check_files, [path])
    assert told.startswith(f"{path}: ") and 'option "encoding"' not in told


# Bounds.


def test_a_line_beyond_the_limit_is_named(path):
    path.write_text("short\n" + "word " * (MAX_CHARACTERS // 5 + 1))
    assert refused(check_files, [path]).startswith(f"{path}, line 2: ")


def test_a_document_beyond_the_limit_is_named(path):
    path.write_text("word word\n" * (MAX_CHARACTERS // 10 + 1))
    assert refused(cut_into_pieces, [path], "text", 1).startswith(f"{path}: ")
    assert cut_into_pieces([path], "lines")


def test_a_cell_beyond_the_limit_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\ngood\n"' + "word word\n" * (MAX_CHARACTERS // 10 + 1) + '"\n')
    rows = read_rows(str(path), "csv")
    assert next(rows)[1] == {"text": "good"}
    assert refused(next, rows).startswith(f"{path}, line ")


def test_an_array_of_json_is_read_by_item(tmp_path):
    path, records = tmp_path / "a.json", [{"text": f"{n} [,]{{}}" + "x" * n} for n in range(3000)]
    for text in (json.dumps(records), "\ufeff\n" + json.dumps(records, indent=1) + "\n"):
        path.write_text(text, encoding="utf-8")
        assert [row for _, row in read_rows(str(path), "jsonl")] == records
        path.write_text(text.rstrip()[:-1], encoding="utf-8")
        rows = read_rows(str(path), "jsonl")
        assert len(list(islice(rows, 3000))) == 3000
        assert refused(next, rows).startswith(f"{path}, line 3001: ")
    path.write_text('[{"text": "a"}] x')
    assert refused(list, read_rows(str(path), "jsonl")).startswith(f"{path}, line 2: ")


def test_samples_and_sentences_are_bounded(tmp_path):
    """Whatever the number and the length of lines and files."""
    line = "word " * 300_000
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} {line}\n" if number % 3 else "ab\n")
    sources = check_files(sorted(tmp_path.iterdir()))
    for few in (sources[:1], sources[1:2], sources):
        sample = TextFiles(few, "lines").sample()
        assert 2 <= len(sample) <= SAMPLED_CHARACTERS + 20
    assert {"2", "16"} < set(sample.split())
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": line, "entities": [[5, 9]]}) + "\n")
    ((*parts,),) = grouped(sentences(whole(path), "jsonl"))
    assert len(parts) == 2 and " ".join(text for text, _ in parts) == line.strip()
    assert max(len(text) for text, _ in parts) < MIB + 20
    assert sum(len(spans) for _, spans in parts) == 1
