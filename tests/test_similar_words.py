"""similar_words.py: the table holds the nearest words by cosine, and `--similar` reads it."""

import numpy as np
import pytest
from conftest import refusal, script

from pretrain.data import vectors as module

SIMILAR_WORDS = script("similar_words")


@pytest.mark.parametrize(("header", "block"), [("", 1), ("32 5\n", 1 << 24)])
def test_the_table_holds_the_nearest_words(tmp_path, header, block, monkeypatch):
    """Against a slow comparison of each pair; repeated words and zeros are skipped."""
    monkeypatch.setattr(module, "BLOCK_SCORES", block)
    draw = np.random.default_rng(3)
    rows = {f"w{number}": draw.normal(size=5).round(3) for number in range(30)}
    extra = [("w3", np.ones(5)), ("zero", np.zeros(5))]
    lines = [f"{word} {' '.join(map(str, row))}\n" for word, row in [*rows.items(), *extra]]
    path, output = tmp_path / "vectors.txt", tmp_path / "similar.tsv"
    path.write_text(header + "".join(lines))
    SIMILAR_WORDS.main(["--vectors", str(path), "--output", str(output), "--count", "4"])

    def cosine(one, other):
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    found = [line.split("\t") for line in output.read_text().splitlines()]
    assert [row[0] for row in found] == list(rows)
    for word, *similar in found:
        others = sorted(rows.keys() - {word}, key=lambda other: -cosine(rows[word], rows[other]))
        assert similar == others[:4]
    few = ["--max-words", "3", "--overwrite"]
    SIMILAR_WORDS.main(["--vectors", str(path), "--output", str(output), *few])
    assert [len(line.split("\t")) for line in output.read_text().splitlines()] == [3, 3, 3]


def test_words_with_spaces(tmp_path):
    """As in the largest vectors of GloVe."""
    path = tmp_path / "vectors.txt"
    rows = [("of", "1", "0"), ("new york", "0.1", "1"), (". . .", "0", "1"), ("to", "1", "0.1")]
    path.write_text("".join(f"{' '.join(row)} \n" for row in rows))
    assert module.read_vectors(str(path), 10)[0] == [word for word, *_ in rows]


BAD = {
    "a 1 2\nb 1\n": ", line 2: ",
    "a 1 2\nb 1 nan\n": ", line 2: ",
    "": ": ",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_vectors_are_named_with_their_line(tmp_path, text, capsys):
    path, output = tmp_path / "vectors.txt", tmp_path / "similar.tsv"
    path.write_text(text)
    argv = ["--vectors", path, "--output", output]
    refusal(SIMILAR_WORDS.main, argv, capsys, f"--vectors {path}{BAD[text]}", output)
    output.write_text("kept")
    assert refusal(SIMILAR_WORDS.main, argv, capsys).startswith(f"--output {output}: ")
    assert output.read_text() == "kept"
