"""What is marked in text beside its tokens: where words begin and which tokens are entities, as flags of a corpus.

Words are the tokenizer's, but for Chinese, where neighbouring characters are joined as `rjieba` or the spaces of segmented
text say. Entities are the spans that records bring, and the terms of a lexicon where they occur.
"""
from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pretrain.command import UserError, require
from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START
from pretrain.data.reading import Cut, Sentence, read_lines
from pretrain.data.tokenizer import HAN, is_unspaced
from pretrain.files import key_of

HAN_CLASS = "[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in HAN) + "]"
CHINESE_SHARE = 0.05  # of the letters, from which on a text's Chinese words matter; other words are told the same with them
BLANK, ALONE = 0, 1  # kinds of characters; others are letters, digits and marks
SEGMENTED_SHARE = 0.2  # spaces between Chinese characters, for each of them, in a text that is taken for segmented


@dataclass(frozen=True)
class Markup:
    """How text is cut and marked when it is prepared; part of a corpus's fingerprint. `lexicon`: the terms."""

    language: str = ""  # of sentence splitting; "" is off
    words: str = "tokenizer"  # or "jieba", "spaces"
    lexicon: tuple[str, ...] = ()
    ignore_case: bool = False  # of the lexicon

    @property
    def key(self) -> list:
        """What to name the markup by, in JSON."""
        return [self.language, self.words, key_of(self.lexicon), self.ignore_case]

    @property
    def cut(self) -> Cut | None:
        """Divides a line into sentences; None where lines are sentences."""
        if not self.language:
            return None
        segment = require("sentencex", "--split-sentences").segment

        def cut(line: str) -> list[str]:
            parts = segment(self.language, line)
            return parts if sum(map(len, parts)) == len(line) else [line]
        return cut

    @cached_property
    def _matcher(self):
        terms = [self._folded(term) for term in self.lexicon]
        return require("ahocorasick_rs", "--lexicon").AhoCorasick(terms)

    def _folded(self, text: str) -> str:
        lower = text.lower() if self.ignore_case else text
        # Offsets must hold: a character that becomes two stays.
        return lower if len(lower) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)

    def find(self, text: str, known: tuple[tuple[int, int], ...] = ()) -> list[tuple[int, int]]:
        """`known` spans and the terms of the lexicon beside them, longest first, none over another, at the bounds of words."""
        spans = list(known)
        if not self.lexicon:
            return spans
        found = [(start, end) for _, start, end in self._matcher.find_matches_as_indexes(self._folded(text), overlapping=True)
                 if not (_inside_word(text, start) or _inside_word(text, end))]
        free = bytearray(b"\1") * len(text)
        for start, end in spans:
            free[start:end] = bytes(end - start)
        for start, end in sorted(found, key=lambda span: (span[0] - span[1], span[0])):
            if all(free[start:end]):
                free[start:end] = bytes(end - start)
                spans.append((start, end))
        return sorted(spans)


def _inside_word(text: str, place: int) -> bool:
    """Whether `place` lies between two letters or digits of a script that writes words apart."""
    around = text[max(0, place - 1): place + 1]
    joined = all(character.isalnum() or unicodedata.category(character)[0] == "M" for character in around)
    return 0 < place < len(text) and joined and not any(map(is_unspaced, around))


def read_terms(path: str) -> tuple[str, ...]:
    """The terms of a lexicon, one a line, blank lines left out; UserError where there is none."""
    terms = tuple(dict.fromkeys(line for line in read_lines(path, "--lexicon") if line))
    if not terms:
        raise UserError(f"--lexicon {path}: holds no term; needed is one a line")
    return terms


def is_han(text: str) -> np.ndarray:
    """bool [characters]: Chinese ones."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    return np.logical_or.reduce([(codes >= low) & (codes <= high) for low, high in HAN])


def describe_script(sample: str) -> tuple[float, bool]:
    """(share of Chinese characters in the letters of a text, whether their words are set apart by spaces)."""
    han, letters = int(is_han(sample).sum()), sum(map(str.isalpha, sample))
    gaps = len(re.findall(f"(?<={HAN_CLASS}) +(?={HAN_CLASS})", sample))
    return han / max(1, letters), gaps > SEGMENTED_SHARE * max(1, han)


def mark(sentences: list[Sentence], encodings: list, starts_word: np.ndarray | None, words: str) -> np.ndarray:
    """uint8 [T]: flags of the tokens of `sentences`; `encodings` have offsets. `starts_word` bool [T] tells which tokens begin a
    word by the tokenizer; None: the characters tell."""
    text = "".join(sentence for sentence, _ in sentences)
    bases = np.cumsum([0] + [len(sentence) for sentence, _ in sentences])
    counts = np.array([len(encoding.ids) for encoding in encodings], np.int64)
    offsets = np.array([span for encoding in encodings for span in encoding.offsets], np.int64).reshape(-1, 2)
    offsets += np.repeat(bases[:-1], counts)[:, None]
    begin, end = offsets[:, 0], np.maximum(offsets[:, 1] - 1, offsets[:, 0])  # first and last character of each token
    if starts_word is None:
        starts_word = _starts_by_characters(text, begin, end)
        starts_word[(np.cumsum(counts) - counts)[counts > 0]] = True
    flags = starts_word.astype(np.uint8) * WORD_START
    if words != "tokenizer":
        flags[_joined(text, bases, words, sentences)[begin]] &= ~np.uint8(WORD_START)
    owner = np.zeros(len(text) + 1, np.int64)  # number of the entity that each character belongs to
    number = 0
    for base, (_, spans) in zip(bases.tolist(), sentences):
        for start, stop in spans:
            number += 1
            owner[base + start: base + stop] = number
    place = _next_place(owner > 0)[begin]
    entity = np.where(place <= end, owner[place], 0)
    goes_on = np.append(False, entity[1:] == entity[:-1])
    flags[(entity > 0) & ~goes_on] |= ENTITY_START
    flags[(entity > 0) & goes_on] |= ENTITY_INSIDE
    return flags


def _next_place(holds: np.ndarray) -> np.ndarray:
    """int64 [characters]: for each the first place from there on that `holds`, else the last place."""
    return np.minimum.accumulate(np.where(holds, np.arange(len(holds)), len(holds) - 1)[::-1])[::-1]


def _starts_by_characters(text: str, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """bool [T]: which tokens, from character `begin` to `end`, begin a word: a word begins where letters, digits and marks change
    over, and with each character of a script without spaces; the space before a word, if it is a token, begins it."""
    codes, inverse = np.unique(np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32), return_inverse=True)
    kinds = np.array([_kind(chr(code)) for code in codes.tolist()] + [BLANK])[np.append(inverse, len(codes))]
    begins = np.append(True, kinds[1:] != kinds[:-1]) | (kinds == ALONE)
    place = _next_place(kinds != BLANK)[begin]
    is_blank = place > end
    goes_on = (place[1:] <= end[:-1]) | is_blank[:-1]  # with a character of which the token before holds some bytes, or its space
    return is_blank | (begins[place] & ~np.append(False, goes_on))


def _kind(character: str) -> int:
    category = unicodedata.category(character)[0]
    return ALONE if is_unspaced(character) else BLANK if character.isspace() else {"L": 2, "M": 2, "N": 3}.get(category, 4)


def _joined(text: str, bases: np.ndarray, words: str, sentences: list[Sentence]) -> np.ndarray:
    """bool [characters + 1]: Chinese characters that go on with the word of the one before."""
    starts = np.zeros(len(text) + 1, bool)
    starts[bases] = True
    if words == "jieba":
        jieba = require("rjieba", "--words jieba")
        lengths = [len(word) for sentence, _ in sentences for word in jieba.cut(sentence)]
        starts[np.cumsum(lengths, dtype=np.int64)] = True
    han = is_han(text)
    return np.append(han, False) & np.insert(han, 0, False) & ~starts
