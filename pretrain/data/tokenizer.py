"""Tokenizers: loading, training, adding tokens, and what masking must know about them.

`Vocabulary` holds the facts of a tokenizer as numpy arrays, so the other data modules are
vectorized, and a worker process receives a few kilobytes instead of a tokenizer.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from pretrain.data.sentences import in_groups
from pretrain.errors import UserError, refusing
from pretrain.files import CODE_FIELDS, key_of, model_folder, read_json, read_text

# Workers fork after the tokenizer has used its threads; without this, each fork prints a warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MIN_OCCURRENCES = 5  # in the text, of the pieces that a new entry joins
NEEDED = ("pad", "cls", "sep", "mask")  # special tokens that pretraining needs
# Chinese characters in Unicode 16, and Japanese syllables.
HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
KANA = (0x3040, 0x30FF)
# Texts that are encoded together: their encodings take a hundred times as much memory.
ENCODED_TOGETHER, ENCODED_CHARACTERS = 10_000, 1 << 22
MIN_CAPITALS = 0.01  # share of entries with capitals; above it, a vocabulary is for cased text
MAX_IDS = 1 << 24  # the memory of the engine grows with the ids
PASSING_STATE = ("truncation", "padding")  # changes when a tokenizer is used
EXPECTED_FILES = "tokenizer.json, tokenizer_config.json or vocab.txt"
FREE_NAMES = ("bos_token", "eos_token")  # roles that BERT does not use
MARKED = r"\[.+\]|<.+>|\w+_token=.+"  # how most special tokens are written


@dataclass(frozen=True)
class Vocabulary:
    """What packing and masking need from a tokenizer. Arrays are indexed by token id."""

    size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    unknown_id: int  # -1 if it has none
    is_special: np.ndarray  # bool [size]
    # bool [size]: False for "##" pieces. None: depends on the text (BPE, SentencePiece).
    starts_word: np.ndarray | None
    ordinary_ids: np.ndarray  # uint32 [size - specials]: for random replacements
    fingerprint: str
    needs_space: bool = False  # in running text, the token of a word includes the space before it


def load(name: str, lowercase: str = "auto") -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, in a vocab.txt (or a folder with only that), or on the hub.

    `lowercase` is auto, on or off and applies only to a bare vocab.txt, which does not say whether
    it is for text in lower case. UserError if it cannot be loaded or used."""
    path = Path(model_folder(name))
    saved = ("tokenizer.json", "tokenizer_config.json")
    if path.is_dir() and not any((path / file).is_file() for file in saved):
        path = path / "vocab.txt"
        if not path.is_file():
            raise UserError(f"{name}: no tokenizer in this folder; expected {EXPECTED_FILES}")
    if path.is_file():
        vocabulary = read_vocabulary(path)
        if lowercase == "auto":
            lowercase = "off" if _has_capitals(vocabulary) else "on"
        return from_vocabulary(vocabulary, lowercase == "on")
    if (path / "config.json").is_file():  # it decides the class of the tokenizer
        read_json(path / "config.json", expected="the config of a model")
    source = str(path) if path.is_dir() else name
    problem = f"{name}: no complete tokenizer in a folder, on the hub or in its cache"
    with refusing(problem, f"offline, expected a folder with {EXPECTED_FILES}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        for field in CODE_FIELDS:
            tokenizer.init_kwargs.pop(field, None)
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise UserError(f"{name}: {kind} is implemented in Python; expected a fast tokenizer")
        _try_out(tokenizer)
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise any error if the tokenizer fails on a text, or has no vocabulary or invalid ids."""
    entries, limit = tokenizer.get_vocab(), tokenizer.model_max_length
    if entries.keys() <= set(tokenizer.all_special_tokens):  # the vocabulary file is missing
        raise ValueError("it has no vocabulary")
    size = max(entries.values()) + 1
    if size > MAX_IDS or not limit >= 1:
        raise ValueError(f"its ids go up to {size - 1:,}, its texts to {limit} tokens")
    json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str).encode()  # as it is saved
    backend, text = without_limits(tokenizer), "A b, 1\u00e9\u4eac\U0010fffd"
    used = [*tokenizer.all_special_ids, *backend.encode(text).ids, *backend.encode(text, text).ids]
    if not all(0 <= number < size for number in used):
        raise ValueError(f"it uses ids beyond its vocabulary: {used}")


def read_vocabulary(path: Path) -> dict[str, int]:
    """Entry -> id of a vocab.txt. Split on \\n only: entries may hold other line breaks."""
    entries = read_text(path, "a vocabulary in UTF-8").removesuffix("\n").split("\n")
    vocabulary = {entry.removesuffix("\r"): number for number, entry in enumerate(entries)}
    missing = ", ".join(token for token in SPECIAL_TOKENS if token not in vocabulary)
    if missing:
        raise UserError(f"{path}: no {missing}; expected a BERT vocabulary, one entry per line")
    return vocabulary


def _has_capitals(vocabulary: Iterable[str]) -> bool:
    words = [entry for entry in vocabulary if not entry.startswith("[")]  # [CLS], [unused1]
    return sum(word != word.lower() for word in words) > MIN_CAPITALS * len(words)


def from_vocabulary(vocabulary: dict[str, int], lowercase: bool) -> PreTrainedTokenizerBase:
    """BERT's WordPiece tokenizer over `vocabulary`; splits Chinese characters as BERT does."""
    return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, model_max_length=512)


def train(
    read: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool = True
) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer of at most `vocab_size` entries, trained on the texts of `read()`.

    Small texts get fewer entries: those of rare words would hardly be trained, nor would the pieces
    that words of other texts are made of. Memory grows only with the number of distinct words. The
    text is read twice, or more often if there is no room for all its characters."""
    # The trainer numbers single characters in the order of a hash table, which differs between
    # processes, and breaks ties by number. Entries passed as special tokens keep their order, so
    # the first pass finds the characters and the second gets them sorted.
    # The limit on characters keeps rare ones from crowding out words, but leaves room for Chinese.
    limit = max(256, vocab_size * 6 // 10)

    def train_entries(size: int, first: list[str], limit: int) -> dict[str, int]:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        alphabet = [entry for entry in first if len(entry) == 1]
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=first,
            initial_alphabet=alphabet,
            limit_alphabet=limit,
            min_frequency=MIN_OCCURRENCES,
            show_progress=False,
        )
        tokenizer.train_from_iterator(read(), trainer)
        return tokenizer.get_vocab()

    characters = train_entries(0, SPECIAL_TOKENS, limit)  # size 0 gives only single characters
    while len(characters) > vocab_size:  # a character may count twice: also inside words
        limit = limit * vocab_size // len(characters)
        characters = train_entries(0, SPECIAL_TOKENS, limit)
    first = SPECIAL_TOKENS + sorted(characters.keys() - set(SPECIAL_TOKENS))
    limit = sum(len(entry) == 1 for entry in first)  # no others, even if they are as frequent
    return from_vocabulary(train_entries(vocab_size, first, limit), lowercase)


def without_limits(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's engine that neither truncates nor pads."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def encode_together(
    backend: Tokenizer, texts: Sequence, with_offsets: bool = False, **more: bool
) -> Iterator[Encoding]:
    """The encodings of `texts`, in order, on all threads, a part at a time in memory."""
    encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
    for group in in_groups(texts, characters_of, ENCODED_CHARACTERS, ENCODED_TOGETHER):
        # A tokenizer that loads may still fail.
        with refusing("the tokenizer fails on this text", "expected a tokenizer that works"):
            encodings = encode(group, **more)
        yield from encodings


def characters_of(text: str | tuple[str, ...]) -> int:
    """The characters of a text of one or more parts."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def find_unknown(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[float, list[str]]:
    """(share of the tokens of `texts` that are unknown to the tokenizer, the text of each)."""
    backend, parts, num_tokens = without_limits(tokenizer), [], 0
    encodings = encode_together(backend, texts, with_offsets=True, add_special_tokens=False)
    for text, encoding in zip(texts, encodings):
        num_tokens += len(encoding.ids)
        for number, (start, end) in zip(encoding.ids, encoding.offsets):
            if number == tokenizer.unk_token_id:
                parts.append(text[start:end])
    return len(parts) / max(1, num_tokens), parts


def unknown_characters(tokenizer: PreTrainedTokenizerBase, parts: Sequence[str]) -> Counter[str]:
    """The characters in `parts`, unknown tokens, that the tokenizer does not know by themselves,
    with their frequencies. One of them makes a whole word unknown, in the script of the others."""
    counts = Counter("".join(parts))
    _, unknown = find_unknown(tokenizer, list(counts))
    return Counter({character: counts[character] for character in unknown})


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits that identify what the tokenizer does, apart from its limits."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return key_of({key: value for key, value in state.items() if key not in PASSING_STATE})


def describe(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The `Vocabulary` of a tokenizer; UserError if it lacks a token that pretraining needs."""
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_token_id") for name in NEEDED}
    missing = ", ".join(f"[{name.upper()}]" for name in NEEDED if ids[f"{name}_id"] is None)
    if not missing and list(ids.values()).count(ids["mask_id"]) > 1:
        missing = "[MASK]"
    if missing:
        problem = f"{tokenizer.name_or_path or 'the tokenizer'}: no {missing} token"
        raise UserError(f"{problem}; expected a tokenizer for masked language modeling")
    entries, unknown_id = tokenizer.get_vocab(), tokenizer.unk_token_id
    size = max(entries.values()) + 1
    starts_word, is_special = np.ones(size, bool), np.ones(size, bool)
    is_special[list(entries.values())] = False  # ids without an entry stay special: never drawn
    starts_word[[number for entry, number in entries.items() if entry.startswith("##")]] = False
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    without_role = [token["id"] for token in state["added_tokens"] if token["special"]]
    is_special[[*tokenizer.all_special_ids, *without_role]] = True
    return Vocabulary(
        size=size,
        **ids,
        unknown_id=-1 if unknown_id is None else unknown_id,
        is_special=is_special,
        starts_word=starts_word if state["model"]["type"] == "WordPiece" else None,
        ordinary_ids=np.flatnonzero(~is_special).astype(np.uint32),
        fingerprint=fingerprint(tokenizer),
        needs_space='"ByteLevel"' in json.dumps(state["pre_tokenizer"]),
    )


def _space_before(tokenizer: PreTrainedTokenizerBase) -> str:
    """What precedes a word in running text and is part of its tokens."""
    return "" if '"WordPiece"' in tokenizer.backend_tokenizer.to_str() else " "


def _split_name(entry: str) -> tuple[str, str]:
    """(name, token) of NAME=TOKEN, or ("", token)."""
    name, equals, token = entry.partition("=")
    return (name, token) if equals and name.isidentifier() else ("", entry)


def new_words(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """(`words` that are new to the tokenizer, the others by reason)."""
    backend, vocabulary = without_limits(tokenizer), tokenizer.get_vocab()
    normalize = backend.normalizer.normalize_str if backend.normalizer else str
    space, seen, kept = _space_before(tokenizer), set(), []
    skipped: dict[str, list[str]] = {"blank": [], "already a token": [], "repeated": []}
    for word in words:
        read = normalize(word).strip()
        pieces = backend.encode(space + word, add_special_tokens=False).ids
        is_piece = len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id
        if not word:
            skipped["blank"].append(word)
        elif is_piece or word in vocabulary:
            skipped["already a token"].append(word)
        elif read in seen:
            skipped["repeated"].append(word)
        else:
            kept.append(word)
        seen.add(read)
    return kept, skipped


def special_problems(
    tokenizer: PreTrainedTokenizerBase, specials: Sequence[str], words: list[str]
) -> list[str]:
    """What is wrong with `specials` (TOKEN or NAME=TOKEN) as new tokens in addition to `words`;
    each problem starts with the entry."""
    vocabulary, taken = tokenizer.get_vocab(), set(words)
    free_names, problems = set(FREE_NAMES), []
    for entry in specials:
        name, token = _split_name(entry)
        is_known = not name and token in vocabulary  # a known token may get a name
        parts = re.split(r"[,;\s]+", entry)
        if len(parts) > 1 and all(re.fullmatch(MARKED, part) for part in parts):
            problems.append(f"{entry}: is a list; expected separate words: {' '.join(parts)}")
        elif name and name not in free_names:
            expected = f"{' or '.join(FREE_NAMES)} as the name, each once, or no name"
            problems.append(f"{entry}: the name {name} is not available; expected {expected}")
        elif not token.strip() or token in taken or is_known:
            problem = f"{entry}: {token!r} is blank, repeated, or already a token"
            problems.append(f"{problem}; expected a new token")
        taken.add(token)
        free_names.discard(name)
    return problems


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, words: list[str], specials: Sequence[str]
) -> dict[int, list[int]]:
    """Make each of `words` and `specials` a token; returns the ids that each new one replaces.

    Both must have no problems (see above). Words are matched before the tokenizer's own rules, so
    they stay whole; in scripts with spaces, only whole words match."""
    backend, size, space = without_limits(tokenizer), len(tokenizer), _space_before(tokenizer)
    entries = [_split_name(entry) for entry in specials]
    texts = {word: space + word for word in words} | {token: token for _, token in entries}
    pieces = {
        token: backend.encode(text, add_special_tokens=False).ids for token, text in texts.items()
    }
    added, strips = [], bool(space)
    for word in words:
        is_single = not (is_unspaced(word[0]) or is_unspaced(word[-1]))
        # A tokenizer that puts spaces around characters would normalize this token to " X  Y ".
        is_normalized = not any(map(is_unspaced, word))
        settings = {"single_word": is_single, "normalized": is_normalized, "lstrip": strips}
        added.append(AddedToken(word, **settings))
    tokenizer.add_tokens(added)
    settings = {"special": True, "normalized": False, "lstrip": strips}
    named = {name: AddedToken(token, **settings) for name, token in entries if name}
    extra = [AddedToken(token, **settings) for name, token in entries if not name]
    named |= {"extra_special_tokens": extra} if extra else {}
    tokenizer.add_special_tokens(named, replace_extra_special_tokens=False)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in pieces}
    return {ids[token]: found for token, found in pieces.items() if ids[token] >= size}


def is_unspaced(character: str) -> bool:
    """Whether the script of a character has no spaces: Chinese characters and kana."""
    return any(low <= ord(character) <= high for low, high in (KANA, *HAN))
