"""From options to a `Masking`; reports which words and entities of the text it will not cover."""

from collections.abc import Iterator
from dataclasses import fields
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from pretrain.config import Config, typed
from pretrain.data.collate import pack
from pretrain.data.loader import PretrainingDataset
from pretrain.data.masking import Masking, Packed, SimilarWords, has_similar, read_similar
from pretrain.data.mixture import Mixture
from pretrain.data.sources import read_lines
from pretrain.data.tokenizer import Vocabulary, without_limits
from pretrain.errors import UserError, counted, option_named

MIN_FITTING_SHARE = 0.8  # of the entities; below this, a warning is printed
MIN_SIMILAR_SHARE = 0.5  # of the words, likewise
SAMPLED_MICRO_BATCHES = 20  # to count entities and words in


def make_masking(
    config: Config, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> Masking:
    """The masking that the options describe. Prints how many words of --similar are usable;
    UserError if none is."""
    names = [entry.name for entry in fields(Masking) if hasattr(config, entry.name)]
    options = {name: getattr(config, name) for name in names if name != "similar"}
    if config.replace != "similar":
        return Masking(**options)
    backend = without_limits(tokenizer)
    space = " " if vocabulary.needs_space else ""

    def encode(word: str) -> list[int]:
        """Ids of a word in running text; [] if the tokenizer does not know it."""
        ids = backend.encode(space + word, add_special_tokens=False).ids
        return [] if vocabulary.is_special[ids].any() else ids

    with option_named("--similar"):
        similar = read_similar(read_lines(config.similar), encode)
    shown = typed(config, "similar")
    if similar is None:
        problem = "no word has a similar word with the same number of tokens"
        expected = "expected one word per line, then its similar words, separated by tabs"
        raise UserError(f"{shown}: {problem}; {expected}")
    pairs = counted(similar.counts.sum(), "similar word")
    found = f"{counted(len(similar.counts), 'word')} with {pairs}"
    print(f"{shown}: {found} of the same number of tokens")
    return Masking(**options, similar=similar)


def report_similar(
    config: Config,
    dataset: PretrainingDataset | Mixture,
    table: SimilarWords,
    vocabulary: Vocabulary,
) -> None:
    """Print the share of the words that have a similar word, with a warning if it is small: all
    others become random tokens."""
    found = [has_similar(packed, table) for packed in _sample(dataset, vocabulary)]
    share = np.concatenate(found).mean()
    covered = f"{typed(config, 'similar')}: has a similar word for {share:.1%} of the words"
    if share < MIN_SIMILAR_SHARE:
        covered += "; the others become random tokens: expected a table that covers the text"
    print(covered)


def report_long_entities(
    config: Config, dataset: PretrainingDataset, vocabulary: Vocabulary
) -> None:
    """Warn if many entities exceed the budget of their sequence, as in short documents."""
    num_entities = num_fitting = 0
    for packed in _sample(dataset, vocabulary):
        entities = packed.maskable & packed.in_entity
        unit = np.cumsum(packed.entity_starts) - 1
        sizes = np.bincount(unit[entities], minlength=int(packed.entity_starts.sum()))
        allowed = config.entity_budget * packed.count(packed.maskable)
        fits = sizes <= allowed[packed.sequence[packed.entity_starts]]
        num_entities += int((sizes > 0).sum())
        num_fitting += int(((sizes > 0) & fits).sum())
    if num_fitting < MIN_FITTING_SHARE * num_entities:
        entities = counted(num_entities, "entity")
        found = f"{num_fitting:,} of {entities} fit in that share of a sequence"
        advice = "the others are never masked whole; use a higher budget or longer documents"
        print(f"{typed(config, 'entity_budget')}: {found}; {advice}")


def _sample(dataset: PretrainingDataset | Mixture, vocabulary: Vocabulary) -> Iterator[Packed]:
    """The first micro-batches of an epoch."""
    positions = islice(dataset.positions(dataset.start, end_epoch=1), SAMPLED_MICRO_BATCHES)
    return (pack(dataset[position], vocabulary) for position in positions)
