"""From paths to text that can be trained on: files checked, tokenizer loaded or trained, corpus found or prepared, split.

The first process prepares, the others wait and open what it has written.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pretrain.command import UserError, check, require
from pretrain.config import MODEL_SIZES, Config, TextOptions, TokenizerOptions
from pretrain.data import corpus as corpora
from pretrain.data import formats, marking, reading
from pretrain.data import tokenizer as tokenizers
from pretrain.data.corpus import Corpus
from pretrain.data.marking import Markup
from pretrain.data.preparing import prepare
from pretrain.files import exclusive
from pretrain.model import bert
from pretrain.runtime.checkpoint import problem_of, write_folder
from pretrain.runtime.distributed import World, main_first

SAMPLED_FILES, SAMPLED_SENTENCES = 16, 1000  # that tell the script of a text


@dataclass(frozen=True)
class TextFiles:
    """Checked files, their format, and how they are to be cut and marked."""

    sources: list[reading.Source]
    text_format: str
    markup: Markup = Markup()

    def sentences(self) -> Iterator[reading.Sentence | None]:
        """All of the text, as `prepare` will read it."""
        for source in self.sources:
            yield from reading.sentences([reading.Span(source.path, 0, source.size)], self.text_format, self.markup.cut)


def check_text(paths: list[str], name: str, options: TextOptions, world: World, masking: str = "token") -> TextFiles | None:
    """The text that `paths` mean, checked and in files that `prepare` reads; None where they mean a prepared corpus.

    What is marked follows from `masking`, an option's value, or "any": all that the text and the options bring."""
    if any(corpora.is_corpus(path) for path in paths):
        check([f"{name} {' '.join(paths)}: needed is one prepared corpus, or text"] if len(paths) > 1 else [])
        given = {entry.name: getattr(options, entry.name) for entry in fields(TextOptions)
                 if entry.name != "cache" and getattr(options, entry.name) != entry.default}
        if given and not getattr(options, "valid", None):
            raise UserError(" ".join(f"--{option.replace('_', '-')} {value}" for option, value in given.items())
                            + f": {name} {paths[0]} is prepared already; needed is the option to prepare.py, or the text itself")
        return None
    with main_first(world):
        files, text_format = formats.open_files(paths, name, options, masking in ("entity", "any"))
        sources = reading.check_files(files, name, Path(options.cache) / "sources.json")
    return choose_markup(TextFiles(sources, text_format), name, options, masking)


def choose_markup(text: TextFiles, name: str, options: TextOptions, masking: str) -> TextFiles:
    """`text` with its markup; UserError where an extra is missing, or --masking entity has nothing to go by."""
    sources = text.sources[:: max(1, len(text.sources) // SAMPLED_FILES)]
    streams = [islice(replace(text, sources=[source]).sentences(), SAMPLED_SENTENCES) for source in sources]
    chinese_share, is_segmented = marking.describe_script("".join(item[0] for stream in streams for item in stream if item))
    words = options.words
    if words == "auto":
        words = "tokenizer" if masking == "token" or chinese_share < marking.CHINESE_SHARE else "spaces" if is_segmented else "jieba"
        if words != "tokenizer":
            print(f"{name}: {chinese_share:.0%} of the text is Chinese, the words of which are told by {words} (--words)")
    language = options.split_sentences or ""
    language = ("zh" if chinese_share > 0.5 else "en") if language == "auto" else language
    for module, what, used in (("rjieba", "Chinese words (--words tokenizer does without)", words == "jieba"),
                               ("sentencex", f"--split-sentences {language}", language),
                               ("ahocorasick_rs", f"--lexicon {options.lexicon}", options.lexicon)):
        if used:
            require(module, what)
    if masking == "entity" and not options.lexicon and text.text_format != "jsonl":
        raise no_entities(name)
    terms = marking.read_terms(options.lexicon) if options.lexicon and masking != "token" else ()
    return replace(text, markup=Markup(language, words, terms))


def prepare_tokenizer(config: Config, checkpoint: Path | None, world: World) -> tuple[PreTrainedTokenizerBase, dict, dict]:
    """(tokenizer, checked text files by option, what each added token was before): loaded, or trained on the training text and
    kept in the cache."""
    if checkpoint:
        return tokenizers.load(str(checkpoint)), {}, {}
    text = {"train": check_text(config.train, "--train", config, world, config.masking)}
    if config.valid:  # held-out text is masked by tokens, whatever the training
        text["valid"] = check_text(config.valid, "--valid", config, world)
    tokenizer = make_tokenizer(config, text["train"], config.train[0], world, config.model)
    return tokenizer, text, add_tokens(tokenizer, config)


def make_tokenizer(options: TokenizerOptions, text: TextFiles | None, path: str, world: World,
                   model: str = "base") -> PreTrainedTokenizerBase:
    """The tokenizer of the options: the given one, the model's, the corpus's in `path`, or one trained on `text`."""
    lowercase = options.lowercase == "on"
    if options.tokenizer:
        return tokenizers.load(options.tokenizer, lowercase)
    if model not in MODEL_SIZES:
        bert.load_config(model)  # a wrong name is told as such, not as a tokenizer's
        return tokenizers.load(model, lowercase)
    if text is None:
        return corpora.load_tokenizer(path)
    return trained_tokenizer(text, options.vocab_size, lowercase, Path(options.cache), world)


def add_tokens(tokenizer: PreTrainedTokenizerBase, options: TokenizerOptions) -> dict[int, list[int]]:
    """Add the tokens of the options to the tokenizer; the ids that each new one was before."""
    words = reading.read_lines(options.add_tokens, "--add-tokens") if options.add_tokens else []
    if not words and not options.add_special_tokens:
        return {}
    return tokenizers.add_tokens(tokenizer, words, options.add_special_tokens, f"--add-tokens {options.add_tokens}")


def trained_tokenizer(text: TextFiles, vocab_size: int, lowercase: bool, cache: Path, world: World) -> PreTrainedTokenizerBase:
    """WordPiece tokenizer trained on `text`, found again by fingerprint of text and settings."""
    lines = replace(text, markup=Markup())
    key = reading.content_key(text.sources, text.text_format, vocab_size, lowercase)
    folder = cache / f"tokenizer-{key}"
    with main_first(world), contextlib.nullcontext() if _is_good(folder) else exclusive(folder):
        if not _is_good(folder):  # another process may have been faster
            print(f"training a WordPiece vocabulary of {vocab_size:,} on {len(text.sources):,} files")
            made = tokenizers.train(lambda: (item[0] for item in lines.sentences() if item), vocab_size, lowercase)
            write_folder(folder, made.save_pretrained)
    return tokenizers.load(str(folder))


def _is_good(folder: Path) -> bool:
    """Whether a tokenizer is there and as it was written; tells where it is not."""
    damage = problem_of(folder, needed=()) if folder.is_dir() else ""
    if damage:
        print(f"{damage}: the tokenizer is made again")
    return damage is None


def open_text(config: Config, tokenizer: PreTrainedTokenizerBase, vocabulary: tokenizers.Vocabulary, text: dict, state: dict,
              world: World) -> tuple[Corpus, Corpus | None]:
    """(training, held-out) text, prepared where it is not yet; a resumed run opens what it was started with."""
    opened = {}
    for name in ("train", "valid"):
        paths = getattr(config, name)
        folder = state.get("corpus_folders", {}).get(name)
        if folder and paths and corpora.is_corpus(folder):
            opened[name] = corpora.open_corpus(folder, vocabulary, f"--{name}")
        elif paths:
            masking = config.masking if name == "train" else "token"
            files = text[name] if name in text else check_text(paths, f"--{name}", config, world, masking)
            opened[name] = open_or_prepare(files, paths[0], tokenizer, vocabulary, Path(config.cache), f"--{name}", world, masking)
    training = opened["train"]
    if state and training.fingerprint != state["corpus"]:
        raise UserError(f"--train {' '.join(config.train)}: the run was started on the corpus {state['corpus']}, the text now makes "
                        f"{training.fingerprint}; restore the text, or start a run in another --output")
    if config.valid:
        held_out = opened["valid"]
    else:
        training, held_out = training.split(config.valid_fraction) if config.valid_fraction else (training, None)
    check_documents(training, held_out, config)
    return training, held_out


def open_or_prepare(files: TextFiles | None, path: str, tokenizer: PreTrainedTokenizerBase, vocabulary: tokenizers.Vocabulary,
                    cache: Path, name: str, world: World, masking: str = "token", output: Path | None = None,
                    workers: int | None = None, ray: str | None = None) -> Corpus:
    """The corpus in `path`, or that of the text files, found in the cache or prepared into it, or into `output`, by `workers` or `ray`."""
    if files is None:
        prepared, told = corpora.open_corpus(path, vocabulary, name), "found"
    else:
        normalizer = tokenizer.backend_tokenizer.normalizer
        markup = replace(files.markup, ignore_case=normalizer is not None and normalizer.normalize_str("A") == "a")
        key = reading.content_key(files.sources, files.text_format, vocabulary.fingerprint, corpora.FORMAT_VERSION, markup.key)
        folder = output or cache / key
        with main_first(world):
            told = "found" if corpora.is_corpus(folder) else "prepared"
            if told == "prepared" and (masking == "entity" or markup.lexicon):
                check_entities(files, markup, path, name)
            prepared = prepare(files.sources, files.text_format, tokenizer, folder, markup=markup, workers=workers, ray=ray)
    if vocabulary.is_special[prepared.shard(0).ids[:1 << 20]].all():
        raise UserError(f"{name} {path}: holds only special and unknown tokens, so nothing can be masked; needed is text that fits the "
                        "tokenizer")
    info = prepared.info
    if masking == "entity" and not info["entities"]:
        raise no_entities(f"{name} {path}")
    print(f"{name}: {info['documents']:,} documents, {info['sentences']:,} sentences, {info['tokens']:,} tokens, "
          f"{info['tokens'] / info['words']:.2f} a word{' by ' + info['words_by'] if info['words_by'] != 'tokenizer' else ''}, "
          f"{info['unknown_tokens'] / info['tokens']:.2%} of them unknown to the tokenizer"
          f"{', {:,} entities'.format(info['entities']) if info['entities'] else ''} ({told} in {prepared.folder})")
    return prepared


def check_entities(files: TextFiles, markup: Markup, path: str, name: str) -> None:
    """UserError where neither the text nor the lexicon marks an entity; stops at the first."""
    if not any(markup.find(*item) for item in files.sentences() if item):
        found_none = UserError(f"--lexicon: none of its terms occurs in {name} {path}; needed are some that do, in the text's spelling")
        raise found_none if markup.lexicon else no_entities(f"{name} {path}")


def no_entities(text: str) -> UserError:
    """What to tell where --masking entity has nothing to go by."""
    return UserError(f"--masking entity: {text} brings no entities; needed is a --lexicon, JSONL with spans (--entity-field), "
                     "tagged tokens (--format conll), or a corpus prepared from such")


def check_documents(training: Corpus, held_out: Corpus | None, config: Config) -> None:
    """UserError where there is no text left on a side, or one document under NSP."""
    needed = 2 if config.objective == "mlm+nsp" else 1
    held_out_name, held_out_paths = ("--valid", config.valid) if config.valid else ("--train", config.train)
    for corpus, name, paths in ((training, "--train", config.train), (held_out, held_out_name, held_out_paths)):
        if corpus is None:
            continue
        found = corpus.count(at_most=needed)
        if found < needed:
            what = ("with --objective mlm+nsp a random next sentence comes from another document" if needed == 2 else
                    "copies of a document are held out together" if corpus is training and not config.valid else "there is no text")
            side = "" if config.valid or not config.valid_fraction else " held out" if corpus is held_out else " left to train on"
            raise UserError(f"{name} {' '.join(paths)}: {found} document{'s' * (found != 1)}{side}, needed are at least {needed} "
                            f"({what}); ways out: more text, another --format, --objective mlm, --valid PATHS, or --valid-fraction 0")
