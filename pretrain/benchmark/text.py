"""The text of a benchmark on a GPU: large enough for a vocabulary of full size, the same every time."""

from __future__ import annotations

import random
from pathlib import Path

from pretrain.files import write_text

COPIES = 3  # the embedded text alone gives 16,387 entries, two copies give 30,522
LETTERS = ("aeiouy", "bcdfghjklmnpqrstvwxz")


def write_full_text(cache: Path) -> Path:
    """The embedded text in the `sentences` format, and copies of it with other letters: each copy has
    words of its own, as often and as long as those of the original. Written once."""
    path = cache / f"benchmark-{COPIES}-copies.txt"
    if not path.is_file():
        from pretrain import embedded  # imports torch

        text = embedded.write_text(cache).read_text(encoding="utf-8").strip()
        copies = [text.translate(_other_letters(number)) for number in range(COPIES)]
        write_text(path, "\n\n".join(copies) + "\n")
    return path


def _other_letters(number: int) -> dict[int, str]:
    """A table for str.translate: vowels become vowels, consonants become consonants; number 0 changes nothing."""
    source, table = random.Random(number), {}
    for letters in LETTERS:
        shuffled = source.sample(letters, len(letters)) if number else list(letters)
        for old, new in zip(letters, shuffled):
            table[old] = new
            table[old.upper()] = new.upper()
    return str.maketrans(table)
