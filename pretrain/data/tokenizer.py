"""Tokenizers: from a folder, a bare vocab.txt or a hub name, or trained on the text; and what the masks need to know of one.

`Vocabulary` holds the facts of a tokenizer as numpy arrays, so that the rest of the data wing is vectorised and a worker
process receives a few kilobytes instead of a tokenizer.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from pretrain.command import UserError, check, refusing
from pretrain.files import key_of, model_folder, read_json

# Workers fork after the tokenizer has used its threads; the setting must be explicit or it warns at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))  # Chinese characters of Unicode 16
ENCODED_TOGETHER = 10_000  # texts
MOST_IDS = 1 << 24
PASSING_STATE = ("truncation", "padding")  # state that changes as a tokenizer is used, not part of what it is


@dataclass(frozen=True)
class Vocabulary:
    """What packing and masking need of a tokenizer. Arrays are indexed by token id."""

    size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    unknown_id: int  # -1 where there is none
    is_special: np.ndarray  # bool [size]
    starts_word: np.ndarray | None  # bool [size]; False for "##" pieces; None where only the text tells (BPE, SentencePiece)
    ordinary_ids: np.ndarray  # uint32 [size - specials], what a random replacement is drawn from
    fingerprint: str
    needs_space: bool = False  # a word in running text has its space in its token


def load(name: str, lowercase: bool = True, option: str = "--tokenizer") -> PreTrainedTokenizerBase:
    """Tokenizer of a folder, a vocab.txt file (or a folder that holds no more than that) or a hub name; `option` is for messages.

    Raises UserError where it cannot be had. `lowercase` is used for a bare vocab.txt only."""
    path = Path(model_folder(str(Path(name).expanduser())))
    if path.is_dir() and not (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        path = path / "vocab.txt"
        if not path.is_file():
            raise UserError(f"{option} {name}: the folder holds no tokenizer, none of tokenizer.json, tokenizer_config.json, vocab.txt")
    if path.is_file():
        return from_vocabulary(read_vocabulary(path), lowercase)
    if (path / "config.json").is_file():  # the tokenizer's class depends on it
        read_json(path / "config.json", needed="a model's config")
    source, problem = (str(path), "its tokenizer cannot be read") if path.is_dir() else (
        name, "no such folder or vocab.txt, and not to be had from the hub or its cache")
    with refusing(f"{option} {name}: {problem}", "offline, give a folder with tokenizer.json or vocab.txt"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{option} {name}: is {type(tokenizer).__name__} in Python; needed is one of the tokenizers library")
    with refusing(f"{option} {name}: its tokenizer is garbled", "needed are its files as they were saved"):
        _try_out(tokenizer)
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise something, of any kind, where the tokenizer fails at a text, has no vocabulary, or ids that are too high or not its own."""
    entries, limit = tokenizer.get_vocab(), tokenizer.model_max_length
    if entries.keys() <= set(tokenizer.all_special_tokens):  # what transformers makes where the vocabulary's file is missing
        raise ValueError("it has no vocabulary")
    size = max(entries.values()) + 1
    if size > MOST_IDS or not limit >= 1:  # the engine's own state would grow with the ids
        raise ValueError(f"its ids reach to {size - 1:,}, its texts to {limit} tokens")
    json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str).encode()  # as it is saved
    backend, text = without_limits(tokenizer), "A b, 1\u00e9\u4eac\U0010fffd"
    used = [*tokenizer.all_special_ids, *backend.encode(text).ids, *backend.encode(text, text).ids]
    if not all(0 <= number < size for number in used):
        raise ValueError(f"it uses ids that it has not: {used}")


def read_vocabulary(path: Path) -> dict[str, int]:
    """Entry -> id of a vocab.txt. Split on newlines only: entries may hold other Unicode line breaks."""
    try:
        entries = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tokenizer {path}: cannot be read as a UTF-8 vocabulary ({error})") from error
    entries = [entry.removesuffix("\r") for entry in entries]
    if entries[-1] == "":
        entries.pop()
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise UserError(f"--tokenizer {path}: lacks {', '.join(missing)}; needed is a WordPiece vocabulary of BERT, an entry a line")
    return vocabulary


def from_vocabulary(vocabulary: dict[str, int], lowercase: bool) -> PreTrainedTokenizerBase:
    """BERT's WordPiece tokenizer over `vocabulary`; Chinese characters are split as BERT does."""
    return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, model_max_length=512)


def train(read: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool = True) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer of at most `vocab_size` entries trained on the texts of `read()`, in memory that grows with the
    distinct words only.

    The text is read twice. The trainer numbers single characters in the order of a hash table, which differs from process
    to process, and breaks ties by number; entries given as special tokens it numbers as told."""
    characters = sorted(entry for entry in _train_once(read(), 0, vocab_size, lowercase, []) if entry not in SPECIAL_TOKENS)
    return from_vocabulary(_train_once(read(), vocab_size, vocab_size, lowercase, characters), lowercase)


def _train_once(texts: Iterable[str], vocab_size: int, final_size: int, lowercase: bool, first: list[str]) -> dict[str, int]:
    """Entry -> id after one training; below the number of characters, `vocab_size` gives these alone."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # A share of the entries for single characters keeps rare ones from crowding words out, and Chinese whole.
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + first, show_progress=False,
                                        limit_alphabet=max(256, final_size * 6 // 10))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()


def without_limits(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's engine that neither truncates nor pads, whatever its last user has set."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def encode_together(backend: Tokenizer, texts: Sequence, **more: bool) -> Iterator[Encoding]:
    """The encodings of `texts`, in order; some are in memory at a time, and the engine's threads share them."""
    for start in range(0, len(texts), ENCODED_TOGETHER):
        yield from backend.encode_batch_fast(texts[start: start + ENCODED_TOGETHER], **more)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits that name what the tokenizer does, whatever truncation and padding are set in it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in PASSING_STATE:
        state.pop(key, None)
    return key_of(state)


def describe(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The `Vocabulary` of a tokenizer; UserError where it lacks a special token that pretraining needs."""
    names = ("pad", "cls", "sep", "mask")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    missing = [f"[{name.upper()}]" for name in names if ids[name] is None or name == "mask" and [*ids.values()].count(ids[name]) > 1]
    if missing:
        raise UserError(f"--tokenizer {tokenizer.name_or_path or 'given'}: has no {', '.join(missing)} token; "
                        "needed is a tokenizer made for masked language modelling")
    entries = tokenizer.get_vocab()
    size = max(entries.values()) + 1
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    starts_word, is_special = np.ones(size, bool), np.ones(size, bool)  # an id without an entry is never drawn
    for entry, number in entries.items():
        is_special[number] = False
        starts_word[number] = not entry.startswith("##")
    is_special[tokenizer.all_special_ids] = True
    unknown = tokenizer.unk_token_id
    return Vocabulary(size, ids["pad"], ids["cls"], ids["sep"], ids["mask"], -1 if unknown is None else unknown, is_special,
                      starts_word if state["model"]["type"] == "WordPiece" else None, np.flatnonzero(~is_special).astype(np.uint32),
                      fingerprint(tokenizer), needs_space='"ByteLevel"' in json.dumps(state["pre_tokenizer"]))


def add_tokens(tokenizer: PreTrainedTokenizerBase, words: list[str], specials: list[str],
               source: str = "--add-tokens") -> dict[int, list[int]]:
    """Make `words` and `specials` (TOKEN, or NAME=TOKEN) one token each, in place; the ids that each new one was before.

    Words are matched before the tokenizer's own rules, so that they stay whole; as words only, where the script writes
    words apart. UserError names a word, by `source` and line, that holds nothing or is a token already."""
    backend, before, seen, problems = without_limits(tokenizer), {}, {}, []
    vocabulary, wordpiece = tokenizer.get_vocab(), '"WordPiece"' in backend.to_str()
    normalize = backend.normalizer.normalize_str if backend.normalizer else str
    for line, word in enumerate(words, start=1):
        name, same = f"{source}, line {line}", seen.setdefault(normalize(word).strip(), line)
        pieces = backend.encode(word if wordpiece else f" {word}", add_special_tokens=False).ids
        if not word:
            problems.append(f"{name}: is blank; needed is a token")
        elif same != line:
            problems.append(f"{name}: {word!r} is the same to the tokenizer as line {same}; needed is each token once")
        elif word in vocabulary or len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id:
            problems.append(f"{name}: {word!r} is a token already; needed are tokens that the vocabulary lacks")
        before[word] = pieces
    named = {}
    for entry in specials:
        name, equals, token = entry.partition("=")
        is_named = bool(equals) and name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES
        if equals and name.endswith("_token") and not is_named:
            problems.append(f"--add-special-tokens {entry}: {name} is none of {', '.join(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)}")
        token = token if is_named else entry
        if not token.strip():
            problems.append(f"--add-special-tokens {entry!r}: is blank; needed is TOKEN or NAME=TOKEN")
        elif token in before or not is_named and token in vocabulary:
            problems.append(f"--add-special-tokens {entry}: {token} is a token already; needed is one that is new")
        elif is_named and name in named:
            problems.append(f"--add-special-tokens {entry}: {name} is given twice")
        elif is_named and name not in ("bos_token", "eos_token"):
            problems.append(f"--add-special-tokens {entry}: the model was trained with {getattr(tokenizer, name)} as its {name}; needed is "
                            "bos_token, eos_token, or TOKEN alone")
        named.setdefault(name if is_named else "extra_special_tokens", []).append(
            AddedToken(token, lstrip=not wordpiece, normalized=False, special=True))
        before[token] = backend.encode(token, add_special_tokens=False).ids
    check(problems)
    size = len(tokenizer)
    # Unnormalized where characters are set apart: the tokenizer would keep such a token as " X  Y ".
    tokenizer.add_tokens([AddedToken(word, single_word=not (is_unspaced(word[0]) or is_unspaced(word[-1])), lstrip=not wordpiece,
                                     normalized=not any(map(is_unspaced, word))) for word in words])
    extra = named.pop("extra_special_tokens", [])
    tokenizer.add_special_tokens({name: tokens[-1] for name, tokens in named.items()} | (
        {"extra_special_tokens": extra} if extra else {}), replace_extra_special_tokens=False)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in before}
    return {ids[token]: pieces for token, pieces in before.items() if ids[token] >= size}


def is_unspaced(character: str) -> bool:
    """Whether it is of a script that writes words without spaces between them: Chinese characters and kana."""
    return "\u3040" <= character <= "\u30ff" or any(low <= ord(character) <= high for low, high in HAN)
