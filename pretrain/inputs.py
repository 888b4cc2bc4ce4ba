"""From paths to checked text, and to a tokenizer that knows it: loaded, or trained on it.

The main process checks and prepares; the others wait and open what it wrote.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pretrain.cli import command
from pretrain.config import (
    MODEL_SIZES,
    PLAIN_FORMATS,
    Config,
    DataOptions,
    TextOptions,
    TokenizerOptions,
    typed,
)
from pretrain.data import tokenizer as tokenizers
from pretrain.data.annotate import CHINESE_SHARE, Markup, describe_script, main_script, read_terms
from pretrain.data.conll import looks_tagged
from pretrain.data.corpus import is_corpus, load_tokenizer
from pretrain.data.formats import open_files
from pretrain.data.sentences import Span, Stream, cut_into_pieces, sentences
from pretrain.data.sources import Source, content_key, expand, read_lines
from pretrain.data.tables import SPLIT, splits_of
from pretrain.errors import NotWritable, UserError, check, counted, option_named, require
from pretrain.files import exclusive
from pretrain.model.loading import load_config
from pretrain.runtime.checkpoint import problem_of, write_folder
from pretrain.runtime.distributed import main_first

SAMPLED_PIECES, SAMPLED_CHARACTERS = 16, 1 << 18  # read to detect the script of a text
# Shares of unknown tokens: one for a warning, one for a UserError. A vocabulary that fits leaves
# less than 1%.
WARNED_UNKNOWN, MAX_UNKNOWN = 0.05, 0.3
SHOWN_UNKNOWN = 10  # unknown characters or words in a message, and characters of such a word
# What a command can take to know its text.
TOKENIZER_WAYS = "expected a --tokenizer for this text, or a larger --vocab-size to train one"
TRAINING_WAYS = (
    "expected a --tokenizer or --model for this text (or, from scratch, a larger --vocab-size)"
)
MODEL_WAYS = "expected a --model for this text"  # of a command that takes the model's tokenizer


@dataclass(frozen=True)
class TextFiles:
    """The text of an option: checked files and their markup, or one prepared corpus."""

    sources: list[Source]  # empty for a corpus
    text_format: str
    markup: Markup = Markup()
    option: str = "--input"
    paths: tuple[str, ...] = ()  # as given

    @property
    def is_corpus(self) -> bool:
        return not self.sources

    @property
    def name(self) -> str:
        """The option and its paths, for messages."""
        return f"{self.option} {' '.join(self.paths)}"

    def sentences(self) -> Stream:
        """All of the text, as `prepare` will read it."""
        spans = [Span(source.path, 0, source.size) for source in self.sources]
        return sentences(spans, self.text_format, self.markup.cut)

    def sample(self) -> str:
        """Sentences from the beginnings of some pieces, about SAMPLED_CHARACTERS in all; "" for a
        corpus."""
        if self.is_corpus:
            return ""
        paths = [Path(source.path) for source in self.sources]
        size = sum(source.size for source in self.sources) // SAMPLED_PIECES
        pieces = cut_into_pieces(paths, self.text_format, max(1, size))
        pieces = pieces[:: -(-len(pieces) // SAMPLED_PIECES)]
        parts = []
        for piece in pieces:
            room = SAMPLED_CHARACTERS // len(pieces)
            for item in filter(None, sentences(piece, self.text_format)):
                parts.append(item[0][:room])
                room -= len(parts[-1])
                if not room:
                    break
        return "\n".join(parts)


@contextlib.contextmanager
def cache_named(cache: str | Path) -> Iterator[None]:
    """Name --cache if what is made inside cannot be written there."""
    try:
        yield
    except NotWritable as error:
        raise UserError(f"--cache {cache}: {error}") from error


def check_text(
    paths: tuple[str, ...], option: str, options: TextOptions, masking: str = "token"
) -> TextFiles:
    """The text that `paths` name, checked.

    `masking` says what to mark in it: a value of --masking, or "any" for everything."""
    text = TextFiles([], "", option=option, paths=tuple(paths))
    # The texts of a mixture may lack them, except for the first; see `marked_in`.
    may_lack_entities = masking == "any" and hasattr(options, "masking")
    with option_named(option):
        if any(map(is_corpus, paths)):
            _check_corpus(text, options)
            return text
        with main_first(), cache_named(options.cache):
            with_entities = masking in ("entity", "any")
            sources, text_format = open_files(paths, options, with_entities, may_lack_entities)
            for entry in expand(paths):
                _report_unread_splits(option, entry)
    text = replace(text, sources=sources, text_format=text_format)
    if options.format == "auto" and text_format in PLAIN_FORMATS and looks_tagged(text.sample()):
        problem = "each line looks like a token and its tag, but is read as text"
        print(f"{text.name}: {problem}; to read the tags, use --format conll")
    return replace(text, markup=_choose_markup(text, options, masking))


def _report_unread_splits(option: str, entry: str) -> None:
    """Print which part of a saved DatasetDict is read, if it has several."""
    others = [name for name in splits_of(entry) if name != SPLIT]
    if others:
        found = f"{option} {entry}: reads its split {SPLIT}, not {', '.join(others)}"
        names = [name for name in others if name.startswith("valid")]
        advice = f"; to validate on it, use --valid {entry}/{names[0]}" if names else ""
        print(found + (advice if option == "--train" else ""))


def _check_corpus(text: TextFiles, options: TextOptions) -> None:
    """UserError for anything besides the corpus, or options of text that no other text can use."""
    if len(text.paths) > 1:
        raise UserError(f"{' '.join(text.paths)}: expected one prepared corpus, or text")
    names = [entry.name for entry in fields(TextOptions) if entry.name != "cache"]
    given = [name for name in names if getattr(options, name) != getattr(TextOptions, name)]
    if given and not (getattr(options, "valid", None) or getattr(options, "mix", None)):
        problem = f"{typed(options, *given)}: {text.name} is already prepared"
        expected = f"expected raw text, or pass the options to {command('prepare')}"
        raise UserError(f"{problem}; {expected}")


def _choose_markup(text: TextFiles, options: TextOptions, masking: str) -> Markup:
    """How to split and mark the text; UserError if a package or a term is missing."""
    chinese_share, is_segmented = describe_script(text.sample())
    words, language, terms = options.words, options.split_sentences or "", ()
    fills_words = getattr(options, "entity_fill", "word") == "word"
    uses_words = masking in ("word", "span") or (masking != "token" and fills_words)
    if words == "auto" and (not uses_words or chinese_share < CHINESE_SHARE):
        words = "tokenizer"
    elif words == "auto":
        words = "spaces" if is_segmented else "jieba"
        print(f"{text.option}: {chinese_share:.0%} Chinese characters, so --words is {words}")
    if language == "auto":
        language = "zh" if chinese_share > 0.5 else "en"
    if words == "jieba":
        is_chosen = options.words == "auto" and hasattr(options, "masking")
        shown = typed(options, "masking") if is_chosen else "--words jieba"
        fills = " or --entity-fill none" if masking == "entity" else ""
        require("rjieba", f"{shown}: finding Chinese words", f"use --words tokenizer{fills}")
    if language:
        require("sentencex", f"--split-sentences {language}")
    if options.lexicon:
        require("ahocorasick_rs", typed(options, "lexicon"))
        with option_named("--lexicon"):
            terms = read_terms(options.lexicon)
    elif masking == "entity" and text.text_format != "jsonl":
        raise no_entities(text)
    return Markup(language, words, terms if masking != "token" else ())


def prepare_tokenizer(
    config: Config, checkpoint: Path | None
) -> tuple[PreTrainedTokenizerBase, dict[str, TextFiles], dict[int, list[int]]]:
    """(tokenizer, checked text by name as in `text_paths`, ids that each new token replaces).

    With a checkpoint, its tokenizer and no text."""
    if checkpoint:
        return tokenizers.load(str(checkpoint)), {}, {}
    tokenizer = find_tokenizer(config, config.model)
    # Before the text, which may take long to convert.
    added = add_tokens(tokenizer, config) if tokenizer else {}
    text = {}
    for name, paths in text_paths(config).items():
        text[name] = check_text(paths, option_of(name), config, marked_in(name, config))
    if not tokenizer:
        tokenizer = make_tokenizer(config, [text[name] for name in text if name != "valid"])
        added = add_tokens(tokenizer, config)
    return tokenizer, text, added


def text_paths(config: DataOptions) -> dict[str, tuple[str, ...]]:
    """The paths of each text of a run: "train", with --mix also "train-2", "train-3" ..., and
    "valid" if it is given."""
    texts = {"train": config.train}
    if config.mix:
        for number, path in enumerate(config.train, 1):
            texts[f"train-{number}" if number > 1 else "train"] = (path,)
    return texts | ({"valid": config.valid} if config.valid else {})


def option_of(name: str) -> str:
    """The option of a text in `text_paths`."""
    return "--valid" if name == "valid" else "--train"


def marked_in(name: str, config: Config) -> str:
    """What to mark in a text of `text_paths`; see `check_text`. Evaluation masks single tokens, and
    only the first text of a mixture must have entities."""
    if name == "valid":
        return "token"
    return "any" if config.masking == "entity" and name != "train" else config.masking


def find_tokenizer(
    options: TokenizerOptions, model: str = "base"
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the options or of the model; None if the text decides."""
    if model not in MODEL_SIZES:
        with option_named("--model"):
            load_config(model)  # so that a wrong name is reported as a wrong model
    if options.tokenizer:
        with option_named("--tokenizer"):
            return tokenizers.load(options.tokenizer, options.lowercase)
    if model in MODEL_SIZES:
        return None
    with option_named("--model"):
        return tokenizers.load(model, options.lowercase)


def make_tokenizer(
    options: TokenizerOptions, texts: Sequence[TextFiles]
) -> PreTrainedTokenizerBase:
    """The tokenizer of the first corpus among `texts`, or else one trained on all of them."""
    for text in texts:
        if text.is_corpus:
            with option_named(text.option):
                return load_tokenizer(text.paths[0])
    lowercase = options.lowercase != "off"
    sources = [source for text in texts for source in text.sources]
    formats = [text.text_format for text in texts]
    rules = (options.vocab_size, tokenizers.MIN_OCCURRENCES, lowercase)
    key = content_key(sources, *formats, *rules)
    folder = Path(options.cache) / f"tokenizer-{key}"
    with main_first(), cache_named(options.cache):
        if problem_of(folder, needed=()):
            _train_tokenizer(folder, texts, options.vocab_size, lowercase)
    return tokenizers.load(str(folder))


def _train_tokenizer(
    folder: Path, texts: Sequence[TextFiles], vocab_size: int, lowercase: bool
) -> None:
    unmarked = [replace(text, markup=Markup()) for text in texts]

    def read() -> Iterator[str]:
        return (item[0] for text in unmarked for item in text.sentences() if item)

    with exclusive(folder):
        if problem := problem_of(folder, needed=()):  # else another process was faster
            shown = problem if folder.is_dir() else folder
            print(f"{shown}: training a WordPiece vocabulary of up to {vocab_size:,} entries")
            trained = tokenizers.train(read, vocab_size, lowercase)
            write_folder(folder, trained.save_pretrained)


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, options: TokenizerOptions
) -> dict[int, list[int]]:
    """Add tokens to the tokenizer; returns the ids that each new one replaces."""
    specials, words = options.add_special_tokens, []
    if options.add_tokens:
        words = _read_new_words(tokenizer, options)
    highest = max(tokenizer.get_vocab().values())
    if (words or specials) and highest >= len(tokenizer):
        option = typed(options, "add_tokens" if words else "add_special_tokens")
        problem = f"the vocabulary has {len(tokenizer):,} entries, but an id of {highest:,}"
        expected = "expected each entry once: a new token would replace another"
        raise UserError(f"{option}: {problem}; {expected}")
    found = tokenizers.special_problems(tokenizer, specials, words)
    check([f"--add-special-tokens {problem}" for problem in found])
    return tokenizers.add_tokens(tokenizer, words, specials) if words or specials else {}


def _read_new_words(tokenizer: PreTrainedTokenizerBase, options: TokenizerOptions) -> list[str]:
    """The new words of --add-tokens; prints how many are skipped. UserError if all are blank."""
    shown = typed(options, "add_tokens")
    with option_named("--add-tokens"):
        words = read_lines(options.add_tokens)
    kept, skipped = tokenizers.new_words(tokenizer, words)
    if not any(words):
        raise UserError(f"{shown}: no words; expected one per line")
    parts = []
    for reason, found in skipped.items():
        examples = f" ({', '.join(found[:3])})" if any(found) else ""
        parts += [f"{len(found):,} {reason}{examples}"] if found else []
    if parts:
        print(f"{shown}: {counted(len(kept), 'new word')}; skipped {', '.join(parts)}")
    return kept


def check_sample(text: TextFiles, tokenizer: PreTrainedTokenizerBase, ways: str) -> None:
    """UserError that suggests `ways` if too much of a sample is unknown to the tokenizer."""
    sample = text.sample()
    share, _ = tokenizers.find_unknown(tokenizer, sample.split("\n"))
    if share > MAX_UNKNOWN:
        check_vocabulary(text.name, share, tokenizer, sample, ways)


def check_vocabulary(
    name: str,
    share: float,
    tokenizer: PreTrainedTokenizerBase,
    sample: str,
    ways: str = MODEL_WAYS,
) -> None:
    """UserError if the `share` of tokens that are unknown is above MAX_UNKNOWN, a printed warning
    above WARNED_UNKNOWN. `name` is an option and its value, `sample` some of its text."""
    if share <= WARNED_UNKNOWN:
        return
    _, parts = tokenizers.find_unknown(tokenizer, sample[:SAMPLED_CHARACTERS].split("\n"))
    problem = f"{name}: {share:.0%} of the tokens are unknown to the tokenizer"
    if parts:
        counts = tokenizers.unknown_characters(tokenizer, parts) or Counter(parts)
        script = main_script("".join(counts.elements()))
        script = f"mostly {script} characters" if script else "mostly symbols"
        common = [part[:SHOWN_UNKNOWN] for part, _ in counts.most_common(SHOWN_UNKNOWN)]
        problem += f", {script}, such as {' '.join(common)}"
    limit = getattr(tokenizer.backend_tokenizer.model, "max_input_chars_per_word", math.inf)
    if 2 * sum(len(part) > limit for part in parts) > len(parts):
        problem += f"; words of more than {limit} characters always are"
    if share > MAX_UNKNOWN:
        raise UserError(f"{problem}; {ways}")
    print(f"{problem}; {ways}")


def no_entities(text: TextFiles) -> UserError:
    """The error for --masking entity where nothing is marked."""
    if text.markup.lexicon:
        expected = "expected terms spelled as in the text"
        return UserError(f"--lexicon: no term occurs in {text.name}; {expected}")
    ways = "--lexicon FILE, JSONL with spans (--entity-field), or tagged tokens (--format conll)"
    return UserError(f"--masking entity: no entities in {text.name}; expected {ways}")
