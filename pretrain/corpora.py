"""From checked text to corpora: found in the cache, prepared there, or those of a resumed run."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from pretrain.cli import command
from pretrain.config import OBJECTIVES, Config, DataOptions, typed
from pretrain.data.corpus import FORMAT_VERSION, Corpus, damage_of, is_corpus, open_corpus
from pretrain.data.loader import PretrainingDataset
from pretrain.data.mixture import Mixture
from pretrain.data.pairs import Task
from pretrain.data.parallel import WorkersFailed
from pretrain.data.prepare import prepare
from pretrain.data.sources import content_key, expand, states_of
from pretrain.data.tokenizer import Vocabulary
from pretrain.errors import UserError, counted, option_named
from pretrain.files import key_of
from pretrain.inputs import (
    TRAINING_WAYS,
    TextFiles,
    cache_named,
    check_sample,
    check_text,
    check_vocabulary,
    marked_in,
    no_entities,
    option_of,
    text_paths,
)
from pretrain.runtime.distributed import gather, main_first

SHOWN_TOKENS = 8  # of the added ones, with their counts


@dataclass(frozen=True)
class Text:
    """A text to train on, and the part of it that is held out for validation."""

    name: str  # of its scores in the log of a mixture
    paths: tuple[str, ...]  # as given
    training: Corpus
    validation: Corpus | None

    @property
    def shown(self) -> str:
        """The option and its paths, for messages."""
        return f"--train {' '.join(self.paths)}"


def open_text(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    text: dict[str, TextFiles],
    saved: dict,
) -> tuple[list[Text], dict[str, object]]:
    """(the text of a run or the texts of its mixture, what a checkpoint saves about them).

    Prepares them if necessary; UserError if there is too little. --valid is validation text of the
    first one. A resumed run opens the corpora in its `saved` values, even if the text has changed;
    UserError if it has, and they no longer exist."""
    opened: dict[str, Corpus] = {}
    folders, all_paths = saved.get("corpus_folders", {}), text_paths(config)
    terms = [config.lexicon] if config.lexicon else []
    found = {name: text_key([*paths, *terms]) for name, paths in all_paths.items()}
    keys = saved.get("text") or found
    for name, paths in all_paths.items():
        option, folder, masking = option_of(name), folders.get(name), marked_in(name, config)
        with option_named(option):
            is_usable = all(gather(_is_usable(folder, config)))
            if is_usable:
                opened[name] = open_corpus(folder, vocabulary)
        if not is_usable:
            files = text.get(name) or check_text(paths, option, config, masking)
            cache = Path(config.cache)
            opened[name] = open_or_prepare(
                files, tokenizer, vocabulary, cache, masking, is_accepted=bool(saved)
            )
        elif keys.get(name) != found[name]:
            shown = " ".join([option, *paths, *(["or --lexicon", *terms] if terms else [])])
            changed = f"{shown}: has changed since the run started"
            print(f"{changed}; the run continues on its corpus, {folder}")
    facts: dict[str, object] = {"text": keys}
    facts["corpus_folders"] = {name: str(opened[name].folder.absolute()) for name in opened}
    given = opened.pop("valid", None)
    facts["corpus"] = "+".join(corpus.fingerprint for corpus in opened.values())
    facts["valid_corpus"] = given.fingerprint if given else None
    for option, fact in (("train", "corpus"), ("valid", "valid_corpus")):
        if saved and saved.get(fact, facts[fact]) != facts[fact]:
            problem = f"{typed(config, option)}: the text has changed since the run was started"
            expected = "expected the original text, or a new run in another --output"
            raise UserError(f"{problem}; {expected}")
    texts = []
    for (name, training), shown in zip(opened.items(), text_names(config.train)):
        validation = given if name == "train" else None
        if validation is None and config.valid_fraction:
            training, validation = training.split(config.valid_fraction)
        texts.append(Text(shown, all_paths[name], training, validation))
    for entry in texts:
        if given and not saved:
            _report_shared(config, given, entry)
        _check_sizes(config, entry, given, is_first=entry is texts[0])
    return texts, facts


def make_dataset(
    config: DataOptions, texts: Sequence[Text], task: Task
) -> PretrainingDataset | Mixture:
    """The micro-batches of a text, or of a mixture."""
    parts = [PretrainingDataset(text.training, task) for text in texts]
    return Mixture(parts, config.mix) if config.mix else parts[0]


def text_names(entries: Sequence[str]) -> list[str]:
    """A name for each entry of --train, from its file or folder: "a/en_web.txt" is en_web. No two
    are equal."""
    names: list[str] = []
    for number, entry in enumerate(entries, 1):
        stem = Path(os.path.abspath(entry)).name.partition(".")[0]
        name = re.sub(r"\W+", "_", stem).strip("_") or f"text_{number}"
        while name in names:
            name += f"_{number}"
        names.append(name)
    return names


def _report_shared(config: Config, validation: Corpus, text: Text) -> None:
    """Print how many documents of --valid are also in a text to train on."""
    shared = validation.count_shared(text.training)
    if shared:
        shown = f"{typed(config, 'valid')}: {shared:,} of {counted(validation.count(), 'document')}"
        where = text.shown if config.mix else "--train"
        print(f"{shown} also in {where}, so scores will look too good; expected other text")


def _is_usable(folder: str | None, config: Config) -> bool:
    """Whether a resumed run can open its corpus in `folder`. If it is missing, or damaged in the
    cache, the run prepares it again."""
    if not folder or not is_corpus(folder):
        return False
    is_cached = Path(folder).parent == Path(os.path.abspath(config.cache))
    return not (is_cached and damage_of(Path(folder)))


def text_key(paths: Iterable[str]) -> str:
    """16 hexadecimal digits that change when a file of `paths` is edited, added or removed."""
    try:
        states = [state for entry in expand(paths) for state in states_of(entry)]
    except UserError:  # no file exists any more
        states = []
    return key_of([[Path(path).name, *state] for path, *state in states])


def report_added(
    corpora: Iterable[Corpus], added: dict[int, list[int]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, int]:
    """Count the added tokens in the training text, most frequent first; prints a summary."""
    if not added:
        return {}
    ids = sorted(added)
    size = len(tokenizer)
    counts = np.zeros(size, np.int64)
    for corpus in corpora:
        for index in range(corpus.num_shards):
            counts += np.bincount(corpus.tokens(index), minlength=size)
    found = Counter(dict(zip(tokenizer.convert_ids_to_tokens(ids), counts[ids].tolist())))
    never = [token for token, count in found.items() if not count]
    common = found.most_common(min(SHOWN_TOKENS, len(found) - len(never)))
    parts = [", ".join(f"{token} {count:,}" for token, count in common)] if common else []
    if never:
        parts.append(f"{len(never):,} never occur, such as {', '.join(never[:3])}")
    total = f"{counted(len(found), 'added token')}, {counted(found.total(), 'occurrence')}"
    print(f"{total}: {'; '.join(parts)}; added_tokens.tsv lists all")
    return dict(found.most_common())


def _check_sizes(config: Config, text: Text, given: Corpus | None, is_first: bool) -> None:
    """UserError if there are too few documents for the objective, with a way that works. `given` is
    the text of --valid, which only the first text of a mixture may have."""
    training, validation = text.training, text.validation
    needed = 2 if OBJECTIVES[config.objective] == "random" else 1  # random: from another document
    ways = f"more text or another --format{', or --objective mlm' if needed == 2 else ''}"
    shown, whole = text.shown, training.info["documents"]
    is_held_out = validation is not given  # a part of the text itself
    without = f"{'--valid PATHS or ' if is_first else ''}--valid-fraction 0"
    if training.count(at_most=needed) < needed:
        found = f"{training.count()} for training"
        if is_held_out and whole >= needed:  # copies of a document stay on one side
            found += f", besides validation documents and their copies ({whole:,} in all)"
            ways = f"other documents, {without}"
    elif validation and validation.count(at_most=needed) < needed:
        found = f"{validation.count()} for validation"
        if is_held_out:
            ways = f"{without}, {ways}"
        else:
            shown = typed(config, "valid")
    else:
        return
    raise UserError(f"{shown}: has {found}; expected {needed} or more documents: {ways}")


def open_or_prepare(
    text: TextFiles,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    cache: Path,
    masking: str = "token",
    output: Path | None = None,
    is_accepted: bool = False,
    ways: str = TRAINING_WAYS,
    **more_arguments: object,
) -> Corpus:
    """The corpus of the text: found in the cache, or prepared there or in `output`.

    UserError that suggests `ways` if too much of the text is unknown to the tokenizer, unless it
    `is_accepted` (a run that has started resumes), and for `masking` "entity" if the text has no
    entities. `more_arguments` are those of `prepare`."""
    verb = "found"
    if text.is_corpus:
        with option_named(text.option):
            corpus = open_corpus(text.paths[0], vocabulary)
    else:
        normalizer = tokenizer.backend_tokenizer.normalizer
        ignore_case = normalizer is not None and normalizer.normalize_str("A") == "a"
        markup = replace(text.markup, ignore_case=ignore_case)
        roles = tokenizer.special_tokens_map  # saved with the corpus, in no fingerprint
        settings = [text.text_format, vocabulary.fingerprint, FORMAT_VERSION, markup.key, roles]
        folder = output or cache / content_key(text.sources, *settings)
        with main_first():
            if not (folder / "corpus.json").is_file():
                verb = "prepared"
                if not is_accepted:
                    check_sample(text, tokenizer, ways)
                found = (markup.find(*item) for item in text.sentences() if item)
                needs_entities = masking == "entity" or (markup.lexicon and masking != "any")
                if needs_entities and not any(found):
                    raise no_entities(text)
            with contextlib.nullcontext() if output else cache_named(cache):
                corpus = _prepare(
                    text,
                    tokenizer,
                    folder,
                    markup=markup,
                    replace_damaged=not output,  # what is in the cache is ours
                    **more_arguments,
                )
    if vocabulary.is_special[corpus.shard(corpus.largest).ids[: 1 << 20]].all():
        problem = "only special and unknown tokens, so nothing can be masked"
        raise UserError(f"{text.name}: {problem}; expected text that fits the tokenizer")
    info = corpus.info
    if not is_accepted:
        share = info["unknown_tokens"] / info["tokens"]
        check_vocabulary(text.name, share, tokenizer, text.sample(), ways)
    if masking == "entity" and not info["entities"]:
        raise no_entities(text)
    name = text.name if len(text.paths) == 1 else text.option
    print(f"{name}: {_shown(info)} ({verb} in {corpus.folder})")
    return corpus


def _prepare(text: TextFiles, tokenizer: PreTrainedTokenizerBase, folder: Path, **more) -> Corpus:
    """`prepare`; if its processes fail, the message has the command that runs it in one."""
    try:
        return prepare(text.sources, text.text_format, tokenizer, folder, **more)
    except WorkersFailed as error:
        way = command("prepare", "--workers", 1, "--input", *text.paths)
        raise UserError(f"{error}, or one process: {way}") from error


def _shown(info: dict) -> str:
    """The counts in the manifest of a corpus."""
    parts = [counted(info[f"{noun}s"], noun) for noun in ("document", "sentence", "token")]
    by = f" by {info['words_by']}" if info["words_by"] != "tokenizer" else ""
    parts.append(f"{info['tokens'] / info['words']:.2f} per word{by}")
    parts.append(f"{info['unknown_tokens'] / info['tokens']:.2%} unknown to the tokenizer")
    parts += [counted(info["entities"], "entity")] if info["entities"] else []
    return ", ".join(parts)
