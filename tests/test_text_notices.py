"""What is printed about text that is probably not read as meant: splits of a saved data set that
are not read, tagged lines, words without a similar one; and what a missing package or a word list
in another encoding leads to."""

import re
import sys

import pytest
from conftest import SHORT_RUN, SIZES, arguments_of, built, refusal

from pretrain.commands.show_masks import main
from pretrain.data.conll import looks_tagged

SENTENCES = ["今天心情很好。", "我们去公园散步。", "天气不错。", "他在北京大学学习。"]
TAGGED = "今\tO\n天\tO\n北\tB-GEO\n京\tI-GEO\n\n" * 30
ENTITIES = ["--masking", "entity", "--lexicon"]


@pytest.fixture
def show(tmp_path, cache):
    """Arguments of show_masks.py on a text, a string or a path."""

    def arguments(text="\n\n".join(["\n".join(SENTENCES)] * 30), *more) -> list[str]:
        path = text
        if isinstance(text, str):
            path = tmp_path / "text.txt"
            path.write_text(text, "utf-8")
        fixed = "--objective mlm --vocab-size 100 --max-length 32 --examples 0 --sampled 1"
        return arguments_of(["--train", path, "--cache", cache, "--valid-fraction", 0], fixed, more)

    return arguments


@pytest.fixture
def terms(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_text("心情\n北京大学\n", "utf-8")
    return path


def test_the_splits_that_are_not_read_are_named(tmp_path, show, capsys):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": SENTENCES})
    saved = tmp_path / "saved"
    datasets.DatasetDict(train=table, validation=table, more=table).save_to_disk(saved)
    main(show(saved))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "validation" in line)
    assert line.startswith(f"--train {saved}: ") and "more" in line
    assert f"--valid {saved}/validation" in line
    datasets.DatasetDict(dev=table).save_to_disk(tmp_path / "other")
    message = refusal(main, show(tmp_path / "other"), capsys)
    assert message.startswith(f"--train {tmp_path}/other: ") and f"{tmp_path}/other/dev" in message


def test_tagged_lines_of_plain_text_are_noticed(show, capsys):
    main(show(TAGGED, "--words", "tokenizer"))
    assert "--format conll" in capsys.readouterr().out
    main(show(TAGGED, "--words", "tokenizer", "--format", "conll"))
    assert "--format conll" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["Plan O\n" * 9, "a b\nc B-X\n" * 9])
def test_other_text_does_not_look_tagged(text):
    assert not looks_tagged(text)


def test_chinese_words_need_a_package_only_where_words_are_masked(show, terms, monkeypatch, capsys):
    pytest.importorskip("ahocorasick_rs")
    monkeypatch.setitem(sys.modules, "rjieba", None)
    arguments = [*show(), *ENTITIES, str(terms)]
    message = refusal(main, arguments, capsys)
    assert message.startswith("--masking entity: ") and "pip install rjieba" in message
    ways = re.findall(r"--(?:words|entity-fill) \w+", message)
    assert ways
    for way in ways:
        main([*arguments, *way.split()])


def test_a_word_list_in_another_encoding_can_be_converted(show, terms, capsys):
    pytest.importorskip("ahocorasick_rs")
    terms.write_text("心情\n北京大学\n", "gb18030")
    message = refusal(main, [*show(), *ENTITIES, str(terms), "--words", "tokenizer"], capsys)
    assert message.startswith(f"--lexicon {terms}: ") and "iconv" in message


SMALL_RUN = "--vocab-size 100 --micro-batch-size 4 --max-length 32 --valid-fraction 0"


def test_the_share_of_words_with_a_similar_one(tmp_path, cache, output, capsys):
    path, table = tmp_path / "text.txt", tmp_path / "similar.tsv"
    path.write_text("\n\n".join(["bank of river money\nmoney river of bank"] * 40))
    table.write_text("bank\tmoney\n")
    files = ["--train", path, "--cache", cache, "--similar", table]
    built(output, files, SHORT_RUN, SIZES, SMALL_RUN, "--masking word --replace similar")
    assert f"--similar {table}: has a similar word for 25.0%" in capsys.readouterr().out
