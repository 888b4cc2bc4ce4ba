"""The flags of a corpus: where words start, and which tokens belong to entities.

Words are the tokenizer's, except that Chinese characters are joined by `rjieba`, or by the spaces
of segmented text. Entities are the spans given with the text and the lexicon terms found in it.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import numpy as np

from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START
from pretrain.data.sentences import Cut, Sentence
from pretrain.data.sources import read_lines
from pretrain.data.tokenizer import HAN, is_unspaced
from pretrain.errors import UserError, refusing, require
from pretrain.files import key_of

HAN_CLASS = "[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in HAN) + "]"
CHINESE_SHARE = 0.05  # of the letters; above this, the Chinese words of a text matter
SEGMENTED_SHARE = 0.2  # spaces per Chinese character; above this, text counts as segmented
# sentencex does not cut between two of these, even if one is in ":(" and one in "b)" pages later.
OPENING = "([{<«“‘„‚‹《「（"
MARKS = OPENING + ")]}>»”’‛‟›》」）\"'`"
# White space other than " " may make it panic. An apostrophe inside a word is not a mark.
HIDING = re.compile(rf"[^\S ]|(?!\b['’]\b)[{re.escape(MARKS)}]")
MAX_QUOTED = 3  # sentences between marks that stay one
CUT_VERSION = 2  # of the rules above
BLANK, ALONE, LETTER, DIGIT, MARK = range(5)  # kinds of characters


@dataclass(frozen=True)
class Markup:
    """How text is split and marked when it is prepared; part of the key of a corpus."""

    language: str = ""  # for sentence splitting; "" turns it off
    words: str = "tokenizer"  # or "jieba", "spaces"
    lexicon: tuple[str, ...] = ()  # terms to mark as entities
    ignore_case: bool = False  # when terms are matched

    @property
    def key(self) -> list:
        """JSON values that identify the markup."""
        language = f"{self.language} {CUT_VERSION}" if self.language else ""
        return [language, self.words, key_of(self.lexicon), self.ignore_case]

    @property
    def cut(self) -> Cut | None:
        """Splits a line into sentences; None if lines are sentences."""
        if not self.language:
            return None
        segment = require("sentencex", "splitting sentences").segment

        def parts_of(text: str) -> list[str]:
            try:
                with refusing("sentencex", "expected sentences"):
                    parts = segment(self.language, text)
            except UserError:  # it panics at some spaces: uncut is better than no corpus
                return [text]
            return parts if sum(map(len, parts)) == len(text) else [text]

        def cut(line: str) -> list[str]:
            sentences = []
            for part in parts_of(line):
                hidden, num_hidden = HIDING.subn(" ", part)
                without_marks = parts_of(hidden) if num_hidden else [part]
                is_glued = len(without_marks) > MAX_QUOTED
                sentences += _cut_like(without_marks, part) if is_glued else [part]
            return sentences

        return cut

    @cached_property
    def _matcher(self):
        engine = require("ahocorasick_rs", "a lexicon")
        return engine.AhoCorasick([self._folded(term) for term in self.lexicon])

    def _folded(self, text: str) -> str:
        """Lower-case text of the same length: a character that would become two is kept."""
        folded = text.lower() if self.ignore_case else text
        if len(folded) == len(text):
            return folded
        return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)

    def find(self, text: str, known: tuple[tuple[int, int], ...] = ()) -> list[tuple[int, int]]:
        """`known` spans and the lexicon terms between them, longest first, without overlap."""
        spans = list(known)
        if not self.lexicon:
            return spans
        matches = self._matcher.find_matches_as_indexes(self._folded(text), overlapping=True)
        free = bytearray(b"\1") * len(text)
        for start, end in spans:
            free[start:end] = bytes(end - start)
        for _, start, end in sorted((start - end, start, end) for _, start, end in matches):
            is_cut = _inside_word(text, start) or _inside_word(text, end)
            if not is_cut and all(free[start:end]):
                free[start:end] = bytes(end - start)
                spans.append((start, end))
        return sorted(spans)


def _cut_like(parts: list[str], text: str) -> list[str]:
    """`text` in parts as long as `parts`, but marks that open a part are moved to its beginning."""
    found, begin = [], 0
    for end in accumulate(map(len, parts)):
        part = text[begin:end]
        if end < len(text):
            bare = part.rstrip(MARKS)
            part = bare if bare[-1:].isspace() else part.rstrip(OPENING)
        found.append(part)
        begin += len(part)
    return list(filter(None, found))


def _inside_word(text: str, place: int) -> bool:
    """Whether the characters before and after `place` belong to one word."""
    around = text[max(0, place - 1) : place + 1]
    joined = all(c.isalnum() or unicodedata.category(c)[0] == "M" for c in around)
    return len(around) == 2 and joined and not any(map(is_unspaced, around))


def read_terms(path: str) -> tuple[str, ...]:
    """The terms of a lexicon, one per line; blank lines are ignored."""
    terms = tuple(dict.fromkeys(line for line in read_lines(path) if line))
    if not terms:
        raise UserError(f"{path}: no terms; expected one per line")
    return terms


def _codes(text: str) -> np.ndarray:
    """uint32 [characters]: code points."""
    return np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)


def is_han(text: str) -> np.ndarray:
    """bool [characters]: which characters are Chinese."""
    codes = _codes(text)
    return np.logical_or.reduce([(codes >= low) & (codes <= high) for low, high in HAN])


def describe_script(sample: str) -> tuple[float, bool]:
    """(share of Chinese characters among letters, whether spaces separate their words)."""
    num_han, num_letters = int(is_han(sample).sum()), sum(map(str.isalpha, sample))
    gaps = len(re.findall(f"(?<={HAN_CLASS}) +(?={HAN_CLASS})", sample))
    return num_han / max(1, num_letters), gaps > SEGMENTED_SHARE * max(1, num_han)


def main_script(sample: str) -> str:
    """The most frequent script among the letters of a sample, such as Latin or Han; "" if none."""
    letters = (unicodedata.name(letter, "?") for letter in sample if letter.isalpha())
    scripts = Counter(name.split(" ")[0] for name in letters)
    script = max(scripts, key=scripts.__getitem__, default="")
    return "Han" if script == "CJK" else script.capitalize()


def mark(
    sentences: list[Sentence], encodings: list, starts_word: np.ndarray | None, words: str
) -> np.ndarray:
    """uint8 [T]: flags of the tokens of `sentences`, whose `encodings` have offsets.

    `starts_word`, bool [T], says which tokens start a word; None: decided by their characters."""
    text = "".join(sentence for sentence, _ in sentences)
    bases = np.cumsum([0] + [len(sentence) for sentence, _ in sentences])
    offsets = [encoding.offsets for encoding in encodings]
    counts = np.fromiter(map(len, offsets), np.int64, len(offsets))
    offsets = np.array(list(chain.from_iterable(offsets)), np.int64).reshape(-1, 2)
    offsets += np.repeat(bases[:-1], counts)[:, None]
    begin = offsets[:, 0]  # first character of each token
    end = np.maximum(offsets[:, 1] - 1, begin)  # its last one
    if starts_word is None:
        starts_word = _starts_by_characters(text, begin, end)
        starts_word[(np.cumsum(counts) - counts)[counts > 0]] = True
    flags = starts_word.astype(np.uint8) * WORD_START
    if words != "tokenizer":
        is_joined = _continues_word(text, bases, words, sentences)[begin]
        flags[is_joined] &= ~np.uint8(WORD_START)
    owner = np.zeros(len(text) + 1, np.int64)  # number of the entity that a character belongs to
    number = 0
    for base, (_, entities) in zip(bases.tolist(), sentences):
        for start, stop in entities:
            number += 1
            owner[base + start : base + stop] = number
    place = _next_place(owner > 0)[begin]
    entity = np.where(place <= end, owner[place], 0)  # [T]
    continues = np.append(False, entity[1:] == entity[:-1])
    flags[(entity > 0) & ~continues] |= ENTITY_START
    flags[(entity > 0) & continues] |= ENTITY_INSIDE
    return flags


def _next_place(holds: np.ndarray) -> np.ndarray:
    """int64 [characters]: the next place (or this one) that `holds`, else the last place."""
    places = np.where(holds, np.arange(len(holds)), len(holds) - 1)
    return np.minimum.accumulate(places[::-1])[::-1]


def _starts_by_characters(text: str, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """bool [T]: which tokens, from character `begin` to `end`, start a word.

    A word starts where the kind of character changes, and at each character of a script without
    spaces. A token that is only the space before a word starts that word."""
    codes, inverse = np.unique(_codes(text), return_inverse=True)
    kinds = np.array([_kind(chr(code)) for code in codes.tolist()] + [BLANK])
    kinds = kinds[np.append(inverse, len(codes))]  # [characters + 1], BLANK after the last one
    starts = np.append(True, kinds[1:] != kinds[:-1]) | (kinds == ALONE)
    place = _next_place(kinds != BLANK)[begin]
    is_blank = place > end
    # The previous token holds some bytes of the same character, or the space before it.
    continues = (place[1:] <= end[:-1]) | is_blank[:-1]
    return is_blank | (starts[place] & ~np.append(False, continues))


def _kind(character: str) -> int:
    if is_unspaced(character):
        return ALONE
    if character.isspace():
        return BLANK
    category = unicodedata.category(character)[0]
    return {"L": LETTER, "M": LETTER, "N": DIGIT}.get(category, MARK)


def _continues_word(text: str, bases: np.ndarray, words: str, sentences: list) -> np.ndarray:
    """bool [characters + 1]: Chinese characters in the same word as the previous character."""
    starts = np.zeros(len(text) + 1, bool)
    starts[bases] = True
    if words == "jieba":
        jieba = require("rjieba", "Chinese words")
        lengths = [len(word) for sentence, _ in sentences for word in jieba.cut(sentence)]
        starts[np.cumsum(lengths, dtype=np.int64)] = True
    han = is_han(text)
    return np.append(han, False) & np.insert(han, 0, False) & ~starts
