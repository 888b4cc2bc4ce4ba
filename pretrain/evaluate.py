"""Numbers on a validation set: perplexity, MLM and NSP accuracy, sample predictions.

The batches of a validation set are made once, with masks that no training option changes (tokens,
rate 0.15, 80/10/10, a fixed seed). Perplexities on the same text with the same tokenizer, objective
and length are therefore comparable between runs and with scripts/evaluate.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pretrain.batch import IGNORED, Batch
from pretrain.data.collate import Collator, Examples
from pretrain.data.corpus import Corpus
from pretrain.data.hash_rng import key
from pretrain.data.masking import Masking
from pretrain.data.pairs import Task, make_plan, micro_batch_bounds
from pretrain.data.tokenizer import Vocabulary
from pretrain.errors import UserError, counted
from pretrain.files import markdown_table
from pretrain.metrics import LossTotals
from pretrain.model.packed import PackedModel
from pretrain.runtime.distributed import World

SEED, MASK_RATE, MASKING = 15, 0.15, Masking()  # of the pairs and masks
SHOWN_SEQUENCES, SHOWN_GUESSES = 4, 3
PAIR_KINDS = {"nsp": ("next", "random"), "sop": ("in order", "swapped")}  # of labels 0 and 1


@dataclass(frozen=True)
class ValidationSet:
    """Batches in memory, the document that each sequence begins in, and the perplexity of guessing
    each token by its frequency."""

    batches: list[Batch]
    documents: np.ndarray  # int64 [sequences]
    unigram_perplexity: float | None = None

    def __str__(self) -> str:
        """Its size and, for pairs, the share of the more frequent kind: what a constant guess would
        reach as nsp_accuracy."""
        tokens = sum(batch.num_tokens for batch in self.batches)
        documents = counted(len(np.unique(self.documents)), "document")
        sequences = counted(len(self.documents), "sequence")
        size = f"{tokens:,} tokens in {sequences} of {documents}"
        for name, kinds in PAIR_KINDS.items():
            of_batches = [batch.labels[name] for batch in self.batches if name in batch.labels]
            labels = torch.cat(of_batches) if of_batches else torch.empty(0)
            counts = [int((labels == kind).sum()) for kind in (0, 1)]
            if sum(counts):
                share = max(counts) / sum(counts)
                size += f", {share:.1%} of the pairs {kinds[counts[1] > counts[0]]}"
        return size


def make_validation_set(
    corpus: Corpus,
    pairs: str | None,
    max_length: int,
    micro_batch_size: int,
    vocabulary: Vocabulary,
    max_tokens: int,
    fill: bool = False,
    training: Corpus | None = None,
) -> ValidationSet:
    """Batches of the documents with the lowest hashes: at most `max_tokens` tokens, but at least
    one sequence. `pairs` and `fill` are as in `Task` and `Collator`; the frequencies to guess by
    are those of `training` (None: no `unigram_perplexity`).

    The same text gives the same sequences, whatever the micro-batch size. UserError, without the
    name of the text, if nothing can be masked."""
    task = Task(pairs, max_length, micro_batch_size, MASK_RATE, SEED)
    shard, collator = corpus.select(max_tokens), Collator(task, vocabulary, MASKING, fill)
    plan = make_plan(shard, np.arange(len(shard.hashes)), task, key(SEED))
    num_fitting = int(np.searchsorted(np.cumsum(plan.lengths), max_tokens, side="right"))
    plan = plan.take(slice(0, max(1, num_fitting)))
    bounds = pairwise(micro_batch_bounds(plan, task))
    batches = [collator(Examples(shard, plan.take(slice(*pair)))) for pair in bounds]
    if not any(batch.counts["mlm"] for batch in batches):
        problem = "what is evaluated has only special and unknown tokens, so nothing can be masked"
        raise UserError(f"{problem}; expected other text, or another share of it")
    unigram = training and unigram_perplexity(training, batches, vocabulary.size)
    starts = shard.sentences[shard.documents]
    documents = np.searchsorted(starts, plan.a_start, side="right") - 1
    return ValidationSet(batches, documents, unigram)


def unigram_perplexity(corpus: Corpus, batches: list[Batch], vocab_size: int) -> float:
    """Perplexity of guessing masked tokens by their frequencies; see `unigram_shares`."""
    labels = np.concatenate([batch.labels["mlm"].numpy() for batch in batches])
    shares = corpus.unigram_shares(vocab_size)[labels[labels != IGNORED]]
    return float(np.exp(-np.log(shares).mean()))


@torch.no_grad()
def evaluate(
    model: PackedModel,
    validation: ValidationSet,
    context: torch.autocast,
    world: World = World(),
    stop: Callable[[], int] = lambda: 0,
) -> dict[str, float] | None:
    """Means as in `LossTotals.means`, and unigram_perplexity. Draws no random numbers.

    None if `stop`, which all processes call before each batch, returns a signal."""
    batches, totals = validation.batches, LossTotals()
    with evaluation_mode(model), context:
        for start in range(0, len(batches), world.size):
            if stop():
                return None
            number = start + world.rank
            # All processes must take part if the model is sharded; repeated batches do not count.
            batch = batches[min(number, len(batches) - 1)]
            losses = LossTotals.of(model(batch.to(model.device)), batch.denominators)
            totals += losses if number < len(batches) else losses.where(False)
    if stop():
        return None
    means = totals.read(model.device).means()
    if validation.unigram_perplexity is not None:
        means["unigram_perplexity"] = validation.unigram_perplexity
    return means


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Turn dropout off inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def sample_predictions(
    model: PackedModel,
    validation: ValidationSet,
    tokenizer: PreTrainedTokenizerBase,
    context: torch.autocast,
) -> str:
    """Markdown: a few sequences with their masks, and the most likely tokens for each mask."""
    batch = validation.batches[0]
    with evaluation_mode(model), context:
        on_device = batch.to(model.device)
        logits = model.masked_lm_logits(model.encode(on_device), on_device)
    ends = batch.cu_seqlens[: min(SHOWN_SEQUENCES, batch.num_sequences) + 1].tolist()
    positions = batch.masked_positions[: batch.counts["mlm"]].tolist()
    shown = [position for position in positions if position < ends[-1]]
    probabilities = logits[: len(shown)].float().cpu().softmax(-1)
    shares, ids = probabilities.topk(SHOWN_GUESSES)
    name, paragraphs = tokenizer.convert_ids_to_tokens, []
    for start, end in pairwise(ends):
        tokens, rows = name(batch.input_ids[start:end].tolist()), []
        for index, position in enumerate(shown):
            if start <= position < end:
                guesses = zip(name(ids[index].tolist()), shares[index].tolist())
                predicted = ", ".join(f"{token} {share:.2f}" for token, share in guesses)
                place, label = position - start, name(int(batch.labels["mlm"][index]))
                rows.append([place, tokens[place], label, predicted])
                tokens[place] = f"**{tokens[place]}**"
        text = " ".join(tokens).replace(" ##", "").replace("|", "\\|")
        table = markdown_table(["position", "input", "label", "predicted"], rows)
        paragraphs.append(f"{text}\n\n{table}")
    return "\n\n".join(paragraphs)
