"""Reading text: what a document is in each format, compared with a slow reading of the whole text at once; lines longer than
the limit; that cutting into pieces never changes a document; the format that is told from the text; every bad input with
its message; and the index that spares reading a file again."""
import codecs
import json
import os
import re
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.command import UserError
from pretrain.data import reading
from pretrain.data.reading import Span, check_files, content_key, cut_into_pieces, detect_format, expand

FORMATS = ("sentences", "lines", "text")


def reference_documents(raw: bytes, text_format: str) -> list[list[str]]:
    """The documents of a file, the slow way: decode it whole, split it whole."""
    lines = [line.strip() for line in raw.decode("utf-8").removeprefix("\ufeff").split("\n")]
    if text_format == "lines":
        return [[line] for line in lines if line]
    if text_format == "text":
        groups = [[line for line in lines if line]]
    else:
        groups = [[]]
        for line in lines:
            if line:
                groups[-1].append(line)
            else:
                groups.append([])
    return [group for group in groups if group]


def read_documents(pieces: list[list[Span]], text_format: str) -> list[list[str]]:
    documents, open_document = [], []
    for item in chain.from_iterable(reading.sentences(piece, text_format) for piece in pieces):
        if item is None:
            documents.append(open_document)
            open_document = []
        else:
            open_document.append(item[0])
    assert open_document == [], "a document without an end"
    return documents


def whole(path) -> list[list[Span]]:
    return [[Span(str(path), 0, path.stat().st_size)]]


def message(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("reading")


# ---------------------------------------------------------------- documents and sentences

CASES = {
    "plain": b"one\ntwo\n\nthree\n",
    "no newline at the end": b"one\ntwo\n\nthree",
    "trailing blank line": b"one\n\ntwo\n\n",
    "blank runs": b"\n\n\none\n\n\n\ntwo\nthree\n\n\n",
    "crlf": b"one\r\ntwo\r\n\r\nthree\r\n",
    "bom": codecs.BOM_UTF8 + b"one\n\ntwo\n",
    "bom and crlf": codecs.BOM_UTF8 + b"\r\none\r\n\r\ntwo",
    "white-space lines": "one\n \t \ntwo\n\u3000\nthree\n\xa0\nfour\n".encode(),
    "spaces around": b"  one  \n\ttwo\t\n",
    "chinese": "今天天气很好。\n我们去公园。\n\n第二篇。\n".encode(),
    "other line breaks": "one\u2028still one\x0bstill\x85one\nA\rB\n".encode(),
    "two bytes": b"a\n",
}


@pytest.mark.parametrize("text_format", FORMATS)
@pytest.mark.parametrize("raw", CASES.values(), ids=CASES.keys())
def test_documents_are_those_of_the_slow_reading(tmp_path, raw, text_format):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    assert read_documents(whole(path), text_format) == reference_documents(raw, text_format)


def test_formats_spelled_out(tmp_path):
    """Holds the reference itself: the three formats of one text, written by hand."""
    path = tmp_path / "text.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"a\r\n b \r\n \t\r\n\r\nc\r\n\r\n")
    assert read_documents(whole(path), "sentences") == [["a", "b"], ["c"]]
    assert read_documents(whole(path), "lines") == [["a"], ["b"], ["c"]]
    assert read_documents(whole(path), "text") == [["a", "b", "c"]]


def cut_at_stops(line: str) -> list[str]:
    """A sentence ends after each "." and the spaces behind it; the parts make the line."""
    return re.findall(r"[^.]*\.\s*|[^.]+", line)


def test_a_cut_divides_lines_and_keeps_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a. b.  c\n\n...\nd.\n")
    found = [item and item[0] for item in reading.sentences(whole(path)[0], "sentences", cut_at_stops)]
    assert found == ["a.", "b.", "c", None, ".", ".", ".", "d.", None]
    found = [item and item[0] for item in reading.sentences(whole(path)[0], "lines", cut_at_stops)]
    assert found == ["a.", "b.", "c", None, ".", ".", ".", None, "d.", None]
    assert [item and item[0] for item in reading.sentences(whole(path)[0], "lines", lambda line: [])] == []


# ---------------------------------------------------------------- records and entities

def slow_sentences(text: str, entities: list, cut) -> list[tuple[str, tuple]]:
    """Character by character: a sentence ends where a line or part does, unless one entity owns the characters on both sides."""
    owner = [next((number for number, (start, end) in enumerate(entities) if start <= place < end), None) for place in range(len(text))]
    begins, place = set(), 0
    for line in text.split("\n"):
        for part in (cut(line) if cut else None) or [line]:
            place += len(part)
            begins.add(place)
        place += 1
    groups = []
    for place in range(len(text)):
        if not groups or (place in begins and (owner[place] is None or owner[place] != owner[place - 1])):
            groups.append([])
        groups[-1].append(place)
    found = []
    for group in groups:
        while group and not text[group[0]].strip():
            group.pop(0)
        while group and not text[group[-1]].strip():
            group.pop()
        if group:
            spans = []
            for number in dict.fromkeys(owner[place] for place in group if owner[place] is not None):
                mine = [place - group[0] for place in group if owner[place] == number]
                spans.append((mine[0], mine[-1] + 1))
            found.append(("".join(text[place] for place in group), tuple(spans)))
    return found


@st.composite
def texts_with_entities(draw):
    text = draw(st.text(st.sampled_from("ab. \n中é😀"), min_size=1, max_size=40))
    places = draw(st.lists(st.integers(0, len(text)), max_size=8, unique=True).map(sorted))
    return text, [[start, end] for start, end in zip(places[::2], places[1::2])]


@settings(max_examples=300, deadline=None)
@given(records=st.lists(texts_with_entities(), min_size=1, max_size=3), cut=st.sampled_from([None, cut_at_stops]),
       piece_bytes=st.sampled_from([1, 60, 1 << 20]))
def test_records_against_the_slow_reading(scratch, records, cut, piece_bytes):
    path = scratch / "records.jsonl"
    path.write_text("".join(json.dumps({"text": text, "entities": entities} if entities else {"text": text}) + "\n"
                            for text, entities in records), encoding="utf-8")
    found = [[]]
    for item in chain.from_iterable(reading.sentences(piece, "jsonl", cut) for piece in cut_into_pieces([path], "jsonl", piece_bytes)):
        if item is None:
            found.append([])
        else:
            found[-1].append(item)
    assert found == [*(slow_sentences(text, entities, cut) for text, entities in records), []]


def test_records_spelled_out(tmp_path):
    """Holds the reference itself: an end of a sentence inside an entity is none, one at its bounds is."""
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": " In St. Ives.\nA  b\nc. d", "entities": [[4, 12], [14, 15], [17, 20]]}) + "\n" + '{"text": "e"}\n')
    expected = [("In St. Ives.", ((3, 11),)), ("A  b\nc.", ((0, 1), (3, 6))), ("d", ()), None, ("e", ()), None]
    assert list(reading.sentences(whole(path)[0], "jsonl", cut_at_stops)) == expected
    assert slow_sentences(" In St. Ives.\nA  b\nc. d", [[4, 12], [14, 15], [17, 20]], cut_at_stops) == expected[:3]


def test_only_newlines_end_a_line(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("one\u2028two\x0bthree\x85four\n".encode())
    assert read_documents(whole(path), "lines") == [["one\u2028two\x0bthree\x85four"]]


def test_documents_never_reach_over_a_file(tmp_path):
    first, second = tmp_path / "1.txt", tmp_path / "2.txt"
    first.write_text("a\nb")
    second.write_text("c\n")
    piece = whole(first)[0] + whole(second)[0]
    for text_format, expected in (("sentences", [["a", "b"], ["c"]]), ("lines", [["a"], ["b"], ["c"]]), ("text", [["a", "b"], ["c"]])):
        assert read_documents([piece], text_format) == expected


# ---------------------------------------------------------------- long lines

def test_a_long_line_is_cut_at_white_space(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 16)
    line = "the quick brown fox jumps over\tthe lazy dog and runs away from it all"
    path = tmp_path / "text.txt"
    path.write_text(f"{line}\nnext\n\nother\n")
    first, second = read_documents(whole(path), "sentences")
    assert second == ["other"] and first[-1] == "next"
    parts = first[:-1]
    assert len(parts) > 3 and re.split(r"\s", " ".join(parts)) == re.split(r"\s", line)  # no word is cut


@pytest.mark.parametrize("limit", [3, 4, 5, 16, 17, 18])  # 3: a part may hold less than one character
def test_a_long_line_without_spaces_is_cut_between_characters(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", limit)
    line = "今天的天气很好我们一起去公园散步吧😀然后a回b家éé"
    path = tmp_path / "text.txt"
    path.write_text(f"{line}\n\nzz\n", encoding="utf-8")
    first, second = read_documents(whole(path), "sentences")
    assert "".join(first) == line and len(first) > 2 and "".join(second) == "zz"
    assert max(len(part.encode()) for part in first) <= limit + 3  # what a character cut by the limit adds


@pytest.mark.parametrize("text_format", FORMATS)
@pytest.mark.parametrize("raw", [b"abcdefg \nxyz\n", b"abc def  \nxyz\n", b"abcdefg\r\nxyz\r\n", b"abc             \nxyz\n", b"abcdefg\t",
                                 b"ab\n\nabcdefg  \r\nxyz"])
def test_white_space_at_the_end_of_a_long_line_is_no_blank_line(tmp_path, monkeypatch, raw, text_format):
    """The cut may leave nothing but the line's end for the last part; the line was not blank all the same."""
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 8)
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    found = [[" ".join(document).split() for document in read_documents(whole(path), text_format)],
             [" ".join(document).split() for document in reference_documents(raw, text_format)]]
    assert found[0] == found[1]


def test_a_long_line_of_white_space_is_blank(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 8)
    path = tmp_path / "text.txt"
    path.write_bytes(b"a\n" + b" " * 30 + b"\nb\n")
    assert read_documents(whole(path), "sentences") == [["a"], ["b"]]


LONG_WORDS = st.sampled_from(["a", "bcd", "efghijklmnop", "中文", "今天天气很好", "😀", "é"])


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.lists(st.tuples(LONG_WORDS, st.sampled_from(["", " ", "  ", "\t"])), max_size=8), max_size=6),
       limit=st.integers(4, 24), newline=st.sampled_from(["\n", "\r\n"]), text_format=st.sampled_from(FORMATS))
def test_long_lines_keep_characters_and_documents(scratch, lines, limit, newline, text_format):
    """But for where a sentence ends, a limit of a few bytes changes nothing."""
    raw = newline.join("".join(word + space for word, space in line) for line in lines).encode()
    path = scratch / "long.txt"
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_LINE_BYTES", limit)
        found = read_documents(whole(path), text_format)
    bare = [["".join("".join(document).split()) for document in documents] for documents in (found, reference_documents(raw, text_format))]
    assert bare[0] == bare[1]


# ---------------------------------------------------------------- pieces

LINES = st.sampled_from(["a", "bb cc", "", "", " ", "\t", "\u3000", "中文 字", "x" * 30, "y" * 8 + " ", "y" * 9 + " "])
TEXT = st.tuples(st.booleans(), st.lists(st.tuples(LINES, st.sampled_from(["\n", "\n", "\r\n"])), max_size=25), st.booleans()).map(
    lambda parts: (codecs.BOM_UTF8 if parts[0] else b"") + "".join(line + end for line, end in parts[1]).encode()
    + (b"last" if parts[2] else b""))


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=3), piece_bytes=st.integers(1, 90), text_format=st.sampled_from(FORMATS),
       limit=st.sampled_from([8, 1 << 20]))
def test_pieces_hold_the_same_documents(scratch, texts, piece_bytes, text_format, limit):
    files = [scratch / f"{number}.txt" for number in range(len(texts))]
    for file, raw in zip(files, texts):
        file.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_LINE_BYTES", limit)
        pieces = cut_into_pieces(files, text_format, piece_bytes)
        together = [[Span(str(file), 0, len(raw)) for file, raw in zip(files, texts)]]
        assert read_documents(pieces, text_format) == read_documents(together, text_format)
    spans = [span for piece in pieces for span in piece]
    for file, raw in zip(files, texts):  # the spans of a file tile it, in order
        mine = [span for span in spans if span.path == str(file)]
        assert b"".join(raw[span.start: span.end] for span in mine) == raw and all(span.end > span.start for span in mine)
    assert [span.path for span in spans] == sorted(span.path for span in spans)
    for piece in pieces:  # more than piece_bytes only where one document is
        assert len(piece) <= 1 or sum(span.end - span.start for span in piece) <= piece_bytes


def test_large_files_are_split_and_small_ones_grouped(tmp_path):
    large, small = tmp_path / "1-large.txt", [tmp_path / f"2-{number}.txt" for number in range(10)]
    large.write_text("".join(f"sentence {number}\n\n" for number in range(100)))
    for file in small:
        file.write_text("short\n")
    sizes = [sum(span.end - span.start for span in piece) for piece in cut_into_pieces([large, *small], "sentences", 200)]
    assert len(sizes) >= 7 and all(100 < size <= 220 for size in sizes[:-2])
    assert len(cut_into_pieces([large, *small], "text", 200)) == 2  # a file is a document: it is never cut
    assert len(cut_into_pieces([large, *small], "sentences", 1 << 20)) == 1


# ---------------------------------------------------------------- format

def write(folder, **texts) -> list:
    files = []
    for name, text in texts.items():
        files.append(folder / f"{name}.txt")
        files[-1].write_text(text, encoding="utf-8")
    return files


def test_groups_of_lines_are_sentences(tmp_path):
    text_format, why = detect_format(write(tmp_path, a="one\ntwo\nthree\n\nfour\n\n\n"))
    assert text_format == "sentences" and "groups of 2.0 lines" in why
    assert detect_format(write(tmp_path, a="\ufeffone\r\ntwo\r\n\r\nthree\r\n"))[0] == "sentences"
    # some files with groups, some without
    assert detect_format(write(tmp_path, a="one\ntwo\n\nthree\n", b="four\n"))[0] == "sentences"


@pytest.mark.parametrize("text", ["one\ntwo\nthree\n", "one\ntwo\nthree\n\n\n", "\n\none\ntwo\n", "one\n\ntwo\n\nthree\n", "one"])
def test_one_file_without_groups_is_lines(tmp_path, text):
    """Blank lines at the ends, or after every line, make no groups."""
    text_format, why = detect_format(write(tmp_path, a=text))
    assert text_format == "lines" and "each line is taken for a document" in why


def test_many_small_files_without_groups_are_text(tmp_path):
    text_format, why = detect_format(write(tmp_path, **{f"f{number}": "one\ntwo\n" for number in range(40)}))
    assert text_format == "text" and why.startswith("40 small files")


def test_large_files_without_groups_are_lines(tmp_path):
    line = "word " * 20 + "\n"
    assert detect_format(write(tmp_path, a=line * 1400, b=line * 1400))[0] == "lines"


# ---------------------------------------------------------------- bad input

MIB = 1 << 20
BAD_UTF8 = {
    "in the middle": b"ab\xff cd",
    "latin-1": "café au lait".encode("latin-1"),
    "beyond a MiB": b"a" * MIB + b"ok \xff more",
    "a character that the first MiB cuts": b"a" * (MIB - 1) + b"\xc3(",
    "cut at the end": "abc中".encode()[:-1],
    "cut at the end, beyond a MiB": b"a" * (MIB - 2) + "中文".encode()[:-2],
    "surrogate": b"a\xed\xa0\x80",
}


@pytest.mark.parametrize("raw", BAD_UTF8.values(), ids=BAD_UTF8.keys())
def test_not_utf8_is_told_with_its_offset(tmp_path, raw):
    path = tmp_path / "bad.txt"
    path.write_bytes(raw)
    with pytest.raises(UnicodeDecodeError) as expected:
        raw.decode("utf-8")
    text = message(check_files, [path], "--train")
    assert text.startswith(f"--train {path}: is not UTF-8 at byte offset {expected.value.start} (")
    assert "needed is UTF-8 text (iconv -f LATIN1 -t UTF-8 converts)" in text


def test_a_character_across_a_mib_is_good(tmp_path):
    path = tmp_path / "good.txt"
    path.write_bytes(b"a" * (MIB - 1) + "中文".encode())
    (source,) = check_files([path], "--train")
    assert source.size == MIB + 5


@pytest.mark.parametrize("raw, offset", [(b"ab\0cd", 2), ("hi".encode("utf-16-le"), 1), (b"a" * MIB + b"bc\0", MIB + 2)])
def test_binary_is_told_with_its_offset(tmp_path, raw, offset):
    path = tmp_path / "bad.bin"
    path.write_bytes(raw)
    assert message(check_files, [path], "--valid") == (
        f"--valid {path}: is binary or UTF-16 (a NUL byte at byte offset {offset}); needed is UTF-8 text")


@pytest.mark.parametrize("raw", [b"", b" \n\t\r\n", "\ufeff\n\u3000\n".encode(), codecs.BOM_UTF8, b"\n" * (MIB + 1)])
def test_nothing_to_read(tmp_path, raw):
    path = tmp_path / "nothing.txt"
    path.write_bytes(raw)
    assert message(check_files, [path], "--train") == f"--train {path}: {'holds only white space' if raw else 'is empty'}"


def test_text_after_a_blank_mib_is_no_blank_file(tmp_path):
    path = tmp_path / "late.txt"
    path.write_bytes(b"\n" * MIB + b"a")
    assert check_files([path], "--train")[0].size == MIB + 1


def test_every_bad_file_is_told_at_once(tmp_path):
    contents = {"a": b"", "b": b"good", "c": b"\0", "d": b" ", "e": b"\xff"}
    for name, raw in contents.items():
        (tmp_path / name).write_bytes(raw)
    lines = message(check_files, [*sorted(tmp_path.iterdir()), tmp_path / "gone"], "--train").splitlines()
    assert [line.split(":")[0] for line in lines] == [f"--train {tmp_path / name}" for name in ("a", "c", "d", "e", "gone")]
    assert lines[-1] == f"--train {tmp_path / 'gone'}: cannot be read (No such file or directory)"


def test_expand(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.md", ".hidden/e.txt", "sub/.f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt", "sub/c.txt", "sub/deep/d.md")]
    assert expand([str(tmp_path)], "--train") == names
    assert expand([str(tmp_path / "*.txt")], "--train") == names[:2]
    assert expand([str(tmp_path / "**" / "*.txt")], "--train") == names[:3]
    assert expand([str(tmp_path / "s*")], "--train") == names[2:]  # a folder that matches stands for its files
    assert expand([str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path / "a.txt")], "--train") == names


def test_expand_is_absolute_and_gives_each_file_once(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert expand(["a.txt", "./a.txt", str(tmp_path)], "--train") == [str(tmp_path / "a.txt")]
    assert expand(["a.txt", "sub/../a.txt"], "--train") == [str(tmp_path / "a.txt")]


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert expand([str(tmp_path / "a[1].txt")], "--train") == [str(tmp_path / "a[1].txt")]


def test_what_is_no_file_stays_one_entry(tmp_path, monkeypatch):
    """hub:NAME, and folders that `datasets` has saved; a folder that holds such folders stands for its files."""
    monkeypatch.chdir(tmp_path)
    for name, mark in (("one", "dataset_info.json"), ("two", "dataset_dict.json")):
        (tmp_path / name).mkdir()
        for file in (mark, "data.arrow"):
            (tmp_path / name / file).write_text("x")
    assert expand(["hub:some/name:config:train", "two", "one", "hub:some/name:config:train"], "--train") == [
        str(tmp_path / "one"), str(tmp_path / "two"), "hub:some/name:config:train"]
    assert expand(["o*"], "--train") == [str(tmp_path / "one")]


def test_small_files_are_read_by_line(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_bytes(codecs.BOM_UTF8 + "one \r\n\n\ttwo\u2028three\n".encode())
    assert reading.read_lines(str(path), "--lexicon") == ["one", "", "two\u2028three"]
    path.write_bytes(b"caf\xe9\n")
    assert message(reading.read_lines, str(path), "--lexicon").startswith(f"--lexicon {path}: cannot be read as UTF-8 text (")
    assert message(reading.read_lines, str(tmp_path / "gone"), "--similar") == (
        f"--similar {tmp_path / 'gone'}: cannot be read as UTF-8 text (No such file or directory)")


def test_every_missing_path_is_told_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.txt").write_text("text")
    entries = [str(tmp_path / name) for name in ("gone.txt", "good.txt", "empty", "*.md")]
    missing = "no such file or folder, and no file matches it as a glob"
    assert message(expand, entries, "--valid").splitlines() == [
        f"--valid {entries[0]}: {missing}", f"--valid {entries[2]}: is a folder without files", f"--valid {entries[3]}: {missing}"]


# ---------------------------------------------------------------- index and key

def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path, index = tmp_path / "text.txt", tmp_path / "deep" / "index.json"
    path.write_text("text")
    first = check_files([path], "--train", index)

    def refuse(file):
        raise AssertionError(f"{file} is read again")

    monkeypatch.setattr(reading, "_scan", refuse)
    assert check_files([path], "--train", index) == first
    with pytest.raises(AssertionError, match="read again"):
        check_files([path], "--train")  # without the index


def test_a_changed_file_is_noticed(tmp_path, capsys):
    path, index = tmp_path / "text.txt", tmp_path / "index.json"
    path.write_text("text")
    (first,) = check_files([path], "--train", index)
    path.write_text("TEXT")  # the same size
    os.utime(path, ns=(first.mtime_ns + 1, first.mtime_ns + 1))
    (second,) = check_files([path], "--train", index)
    assert second.sha256 != first.sha256
    assert f"{path} has changed since it was prepared" in capsys.readouterr().out
    os.utime(path, ns=(first.mtime_ns + 2, first.mtime_ns + 2))  # touched, not changed
    (third,) = check_files([path], "--train", index)
    assert third.sha256 == second.sha256 and third.mtime_ns == first.mtime_ns + 2
    assert capsys.readouterr().out == ""
    path.write_text("longer")
    os.utime(path, ns=(first.mtime_ns + 2, first.mtime_ns + 2))  # the same time
    assert check_files([path], "--train", index)[0].sha256 not in (first.sha256, second.sha256)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": {"path": "x"}}', "\xff"])
def test_a_damaged_index_only_costs_time(tmp_path, content):
    path, index = tmp_path / "text.txt", tmp_path / "index.json"
    path.write_text("text")
    index.write_bytes(content.encode("latin-1"))
    assert check_files([path], "--train", index) == check_files([path], "--train")
    assert check_files([path], "--train", index)  # and it is whole again


def test_content_key_names_the_content_in_order(tmp_path):
    for name, text in (("1.txt", "a"), ("2.txt", "b"), ("3.txt", "a")):
        (tmp_path / name).write_text(text)
    one, two, three = check_files(sorted(tmp_path.iterdir()), "--train")
    assert content_key([one, two], "lines") == content_key([three, two], "lines")  # whatever the path
    assert len({content_key([one, two], "lines"), content_key([two, one], "lines"), content_key([one, two], "text"),
                content_key([one], "lines")}) == 4
