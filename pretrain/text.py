"""From paths to text that can be trained on: files checked, tokenizer loaded or trained, corpus found or prepared, split.

The first process prepares, the others wait and open what it has written.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pretrain.config import MODEL_SIZES, Config, TextOptions, UserError, check
from pretrain.data import corpus as corpora
from pretrain.data import reading
from pretrain.data import tokenizer as tokenizers
from pretrain.data.corpus import Corpus
from pretrain.data.preparing import exclusive, prepare
from pretrain.model import bert
from pretrain.runtime.checkpoint import write_folder
from pretrain.runtime.distributed import World, main_first


@dataclass(frozen=True)
class TextFiles:
    """Checked files and their format."""

    sources: list[reading.Source]
    text_format: str


def check_text(paths: list[str], name: str, options: TextOptions, world: World) -> TextFiles | None:
    """The text files that `paths` mean, checked; None where they mean a prepared corpus."""
    if any(corpora.is_corpus(path) for path in paths):
        check([f"{name} {' '.join(paths)}: needed is one prepared corpus, or text"] if len(paths) > 1 else [])
        return None
    files = reading.expand(paths, name)
    with main_first(world):
        sources = reading.check_files(files, name, Path(options.cache) / "sources.json")
    text_format, why = reading.detect_format(files) if options.format == "auto" else (options.format, "")
    if why:
        print(f"{name}: read as --format {text_format} ({why})")
    return TextFiles(sources, text_format)


def prepare_tokenizer(config: Config, checkpoint: Path | None, world: World) -> tuple[PreTrainedTokenizerBase, dict]:
    """(tokenizer, checked text files by option): loaded, or trained on the training text and kept in the cache."""
    if checkpoint:
        return tokenizers.load(str(checkpoint)), {}
    text = {name: check_text(paths, f"--{name}", config, world) for name, paths in (("train", config.train), ("valid", config.valid))
            if paths}
    lowercase = config.lowercase == "on"
    if config.tokenizer:
        return tokenizers.load(config.tokenizer, lowercase), text
    if config.model not in MODEL_SIZES:
        bert.load_config(config.model)  # a wrong name is told as such, not as a tokenizer's
        return tokenizers.load(config.model, lowercase), text
    if text["train"] is None:
        return corpora.load_tokenizer(config.train[0]), text
    return trained_tokenizer(text["train"], config.vocab_size, lowercase, Path(config.cache), world), text


def trained_tokenizer(text: TextFiles, vocab_size: int, lowercase: bool, cache: Path, world: World) -> PreTrainedTokenizerBase:
    """WordPiece tokenizer trained on `text`, found again by fingerprint of text and settings."""
    key = reading.content_key(text.sources, text.text_format, vocab_size, lowercase)
    folder = cache / f"tokenizer-{key}"
    with main_first(world), exclusive(folder):
        if not folder.is_dir():
            print(f"training a WordPiece vocabulary of {vocab_size:,} on {len(text.sources):,} files")
            made = tokenizers.train(lambda: reading.read_all(text.sources, text.text_format), vocab_size, lowercase)
            write_folder(folder, made.save_pretrained)
    return tokenizers.load(str(folder))


def open_text(config: Config, tokenizer: PreTrainedTokenizerBase, vocabulary: tokenizers.Vocabulary, text: dict, state: dict,
              world: World) -> tuple[Corpus, Corpus | None]:
    """(training, held-out) text, prepared where it is not yet; a resumed run opens what it was started with."""
    opened = {}
    for name in ("train", "valid"):
        paths = getattr(config, name)
        folder = state.get("corpus_folders", {}).get(name)
        if folder and paths and corpora.is_corpus(folder):
            opened[name] = corpora.open_corpus(folder, vocabulary.fingerprint, f"--{name}")
        elif paths:
            files = text[name] if name in text else check_text(paths, f"--{name}", config, world)
            opened[name] = open_or_prepare(files, paths[0], tokenizer, vocabulary, Path(config.cache), f"--{name}", world)
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
                    cache: Path, name: str, world: World) -> Corpus:
    """The corpus in `path`, or that of the text files, from the cache or prepared into it."""
    if files is None:
        return corpora.open_corpus(path, vocabulary.fingerprint, name)
    key = reading.content_key(files.sources, files.text_format, vocabulary.fingerprint, corpora.FORMAT_VERSION)
    folder = cache / key
    with main_first(world):
        known = corpora.is_corpus(folder)
        prepared = prepare(files.sources, files.text_format, tokenizer, folder)
    if vocabulary.is_special[prepared.shard(0).ids[:1 << 20]].all():
        raise UserError(f"{name} {path}: holds only special and unknown tokens, so nothing can be masked; needed is text that fits the "
                        "tokenizer")
    info = prepared.info
    print(f"{name}: {info['documents']:,} documents, {info['sentences']:,} sentences, {info['tokens']:,} tokens, "
          f"{info['unknown_tokens'] / info['tokens']:.2%} of them unknown to the tokenizer "
          f"({'found' if known else 'prepared'} in {folder})")
    return prepared


def check_documents(training: Corpus, held_out: Corpus | None, config: Config) -> None:
    """UserError where there is no text left on a side, or one document under NSP."""
    needed = 2 if config.objective == "mlm+nsp" else 1
    held_out_name, held_out_paths = ("--valid", config.valid) if config.valid else ("--train", config.train)
    for corpus, name, paths in ((training, "--train", config.train), (held_out, held_out_name, held_out_paths)):
        if corpus is None:
            continue
        found = corpus.count(at_most=needed)
        if found < needed:
            what = "with --objective mlm+nsp a random next sentence comes from another document" if needed == 2 else "there is no text"
            side = "" if config.valid or not config.valid_fraction else " held out" if corpus is held_out else " left to train on"
            raise UserError(f"{name} {' '.join(paths)}: {found} document{'s' * (found != 1)}{side}, needed are at least {needed} "
                            f"({what}); ways out: more text, another --format, --objective mlm, --valid PATHS, or --valid-fraction 0")
