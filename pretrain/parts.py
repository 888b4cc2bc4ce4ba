"""The parts of a run from its options: phases, masks, model and steps, with the checks of what must fit what."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pretrain import phases
from pretrain.batch import IGNORED
from pretrain.command import UserError, check
from pretrain.config import MODEL_SIZES, Config
from pretrain.data import tokenizer as tokenizers
from pretrain.data.collate import Collator, pack
from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, Corpus
from pretrain.data.dataset import DataPosition, PretrainingDataset
from pretrain.data.masking import Masking, read_similar
from pretrain.data.planning import Task
from pretrain.data.reading import read_lines
from pretrain.evaluate import HeldOut, make_held_out
from pretrain.model import bert
from pretrain.model.packed import PackedModel
from pretrain.runtime.distributed import World

MIN_TRUE_SHARE = 0.1  # of the planned pairs
MIN_FITTING_SHARE, SAMPLED_MICRO_BATCHES = 0.8, 20  # of the entities
CPU_SEQUENCES, GPU_TOKENS = 32, 1 << 15  # of a micro-batch, by default
SHAPE_MULTIPLE = 32  # of tokens, where a micro-batch is not filled to its limits
COUNTED_SHARDS = 4  # planned at the start to count an epoch; a larger corpus is extrapolated from them


@dataclass(frozen=True)
class Phase:
    """What is read while sequences have one length; a run without --phases has one."""

    number: int  # from 0 on
    dataset: PretrainingDataset
    collator: Collator
    held_out: HeldOut | None
    eval_batch_size: int  # sequences in its micro-batches

    @property
    def max_length(self) -> int:
        """Tokens in a sequence."""
        return self.collator.task.max_length


def make_task(config: Config, number: int = 0) -> Task:
    """The task of a phase, planned for the highest mask rate."""
    lengths = [length for length, _ in phases.lengths_and_shares(config)]
    return Task(config.objective, lengths[number], config.micro_batch_size, max(config.mask_rate), config.seed, lengths[0])


def make_phase(config: Config, number: int, dataset: PretrainingDataset, held_out: Corpus | None, vocabulary: tokenizers.Vocabulary,
               masking: Masking, fill: bool) -> Phase:
    """A phase with its held-out batches, whose tokens are those of the first phase's at most, but for one sequence at least."""
    task = dataset.task
    eval_batch_size = max(1, (config.eval_batch_size or config.micro_batch_size) * task.counted_length // task.max_length)
    batches = held_out and make_held_out(held_out, config.objective, task.max_length, eval_batch_size, vocabulary, config.eval_tokens,
                                         fill, dataset.source)
    return Phase(number, dataset, Collator(task, vocabulary, masking, fill, SHAPE_MULTIPLE), batches, eval_batch_size)


def make_masking(config: Config, tokenizer: PreTrainedTokenizerBase) -> Masking:
    """The draw of the options; UserError where the table of similar words has none."""
    similar = None
    if config.replace == "similar":
        similar = read_similar(read_lines(config.similar, "--similar"), _word_encoder(tokenizer))
        if similar is None:
            raise UserError(f"--similar {config.similar}: holds no word with a similar one of as many tokens; needed are lines of a word "
                            "and, after tabs, similar ones")
        print(f"--similar {config.similar}: {len(similar.counts):,} words with {similar.counts.sum():,} similar ones of as many tokens")
    return Masking(config.masking, tuple(config.mask_split), config.entity_probability, config.entity_budget, config.entity_fill, similar)


def _word_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Ids of a word as it stands in running text; none for one that the tokenizer does not know, which is like no other."""
    vocabulary, backend = tokenizers.describe(tokenizer), tokenizers.without_limits(tokenizer)

    def encode(word: str) -> list[int]:
        ids = backend.encode(" " * vocabulary.needs_space + word, add_special_tokens=False).ids
        return [] if vocabulary.is_special[ids].any() else ids
    return encode


def tell_unfit_entities(dataset: PretrainingDataset, vocabulary: tokenizers.Vocabulary, config: Config) -> None:
    """Tell of entities that are longer than their sequence's budget; short documents have many."""
    num_entities = num_fitting = 0
    for position in islice(dataset.positions(DataPosition(0, 0, 0), end_epoch=1), SAMPLED_MICRO_BATCHES):
        packed = pack(dataset.__getitems__([position]), vocabulary)
        maskable, starts = ~vocabulary.is_special[packed.ids], packed.flags & ENTITY_INSIDE == 0
        in_entity = maskable & (packed.flags & (ENTITY_START | ENTITY_INSIDE) > 0)
        sizes = np.bincount(np.cumsum(starts)[in_entity] - 1, minlength=int(starts.sum()))
        allowed = config.entity_budget * np.bincount(packed.sequence[maskable], minlength=len(packed.lengths))
        num_entities += int((sizes > 0).sum())
        num_fitting += int(((sizes > 0) & (sizes <= allowed[packed.sequence[starts]])).sum())
    if num_fitting < MIN_FITTING_SHARE * num_entities or not num_entities:
        print(f"--entity-budget {config.entity_budget}: {num_fitting:,} of {num_entities:,} entities fit into that share of their "
              "sequence, the others are never masked as a whole; a higher budget, or longer documents, help")


def report_added(corpus: Corpus, added: dict[int, list[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """How often each added token occurs in the training text; told in short."""
    if not added:
        return {}
    last = max(added)
    counts = sum(np.bincount(np.minimum(corpus.tokens(index), last + 1), minlength=last + 2) for index in range(corpus.num_shards))
    counts = counts[sorted(added)].tolist()
    ranked = dict(sorted(zip(tokenizer.convert_ids_to_tokens(sorted(added)), counts), key=lambda item: -item[1]))
    most, never = list(ranked.items())[:8], [token for token, count in ranked.items() if not count]
    print(f"{len(ranked):,} added tokens occur {sum(counts):,} times: " + ", ".join(f"{token} {count:,}" for token, count in most)
          + (f"; {len(never):,} never do, such as {', '.join(never[:3])}" if never else "") + "; all in added_tokens.tsv")
    return ranked


def make_model(config: Config, checkpoint: Path | None, tokenizer: PreTrainedTokenizerBase, vocabulary: tokenizers.Vocabulary,
               added: dict[int, list[int]]) -> PackedModel:
    """Model from scratch, from a checkpoint, or of the run to resume; UserError where it does not fit tokenizer or lengths."""
    if checkpoint:
        return bert.from_checkpoint(str(checkpoint), [])[0]
    if config.model in MODEL_SIZES:
        model, fresh = bert.from_size(config.model, vocabulary.size, phases.longest(config), vocabulary.pad_id, config.config_override), []
    else:
        model, fresh = bert.from_checkpoint(config.model, config.config_override)
    settings, problems = model.config, model.problems_of(config.objective, phases.longest(config), phases.option_of(config))
    if settings.is_decoder:
        problems.append(f"--model {config.model}: is a decoder (is_decoder); needed is an encoder")
    size = vocabulary.size - len(added)
    if size > settings.vocab_size or size + 128 <= settings.vocab_size and config.model not in MODEL_SIZES:  # rounded-up tables are common
        problems.append(f"--tokenizer {config.tokenizer or config.model}: has {size:,} entries, the model {config.model} "
                        f"{settings.vocab_size:,}; needed is the model's own tokenizer")
    elif config.tokenizer and config.model not in MODEL_SIZES:
        problems += other_vocabulary(config, tokenizer)
    check(problems)
    if added and config.model not in MODEL_SIZES:
        model.add_vectors(vocabulary.size, added, config.new_vectors == "mean")
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) in added:
            setattr(settings, name, getattr(tokenizer, name))
    if fresh:
        print(f"{config.model} has no {', no '.join(fresh)}: starting fresh, so the first held-out numbers mean nothing")
    return model


def other_vocabulary(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A problem where --tokenizer is not the model's own, if the model comes with one."""
    try:
        own = tokenizers.load(config.model, config.lowercase == "on")
    except UserError:
        return []  # the model comes without a tokenizer
    if own.get_vocab().items() <= tokenizer.get_vocab().items():
        return []
    return [f"--tokenizer {config.tokenizer}: its vocabulary differs from that of the model {config.model}; leave --tokenizer away"]


def default_micro_batch_size(config: Config, device: torch.device, world: World) -> int:
    """The most sequences, up to what keeps the device busy, that a step divides into evenly; `build` halves them until they fit.
    UserError where the processes cannot share a step; a message where it has no good divisor."""
    if config.batch_size % world.size:
        raise UserError(f"--batch-size {config.batch_size}: {world.size} processes cannot share it evenly; needed is a multiple of "
                        f"{world.size}")
    length, least = phases.lengths_and_shares(config)[0][0], phases.least_micro_batch_size(config)
    enough = max(least, GPU_TOKENS // length if device.type == "cuda" else CPU_SEQUENCES)
    found = max((size for size in range(least, enough + 1) if config.batch_size % (size * world.size) == 0), default=least)
    if 2 * found < min(enough, config.batch_size // world.size):
        print(f"--batch-size {config.batch_size}: only micro-batches of {found} divide it, which is slow; a multiple of "
              f"{enough * world.size} would be faster")
    return found


def check_processes(config: Config, world: World) -> None:
    """UserError where the micro-batches of a step cannot be shared out evenly."""
    micro_batches = config.batch_size // config.micro_batch_size
    if micro_batches % world.size:
        fits = ", ".join(str(count) for count in range(1, micro_batches + 1) if micro_batches % count == 0)
        raise UserError(f"{world.size} processes: a step of --batch-size {config.batch_size} has {micro_batches} micro-batches of "
                        f"--micro-batch-size {config.micro_batch_size}; needed is a number of processes that divides them: {fits}")


def check_plan(dataset: PretrainingDataset, config: Config, whole_step: bool = True) -> int:
    """Optimizer steps in an epoch of this length, from the plan of its first shards; UserError where the text cannot serve the task."""
    plans, task = [dataset.plan(0, place) for place in range(min(COUNTED_SHARDS, dataset.source.num_shards))], dataset.task
    labels = np.concatenate([plan.label for plan in plans])
    num_tokens = sum(int(plan.lengths.sum()) for plan in plans)
    planned = sum(plan.num_micro_batches for plan in plans)
    share = len(plans) / dataset.source.num_shards
    at_length = f" at {task.max_length} tokens" * bool(config.phases)
    if config.objective != "mlm":
        true_share = float((labels == 0).mean())
        random_share = float((labels == 1).mean())
        print(f"{config.objective}{at_length}: {true_share:.1%} of the pairs are true next ones, {random_share:.1%} are "
              f"{'random' if config.objective == 'mlm+nsp' else 'swapped'}, {(labels == IGNORED).mean():.1%} are sequences without a pair")
        if true_share < MIN_TRUE_SHARE:
            raise UserError(f"--objective {config.objective}: {true_share:.1%} of the planned pairs{at_length} would be true next ones, "
                            f"needed are at least {MIN_TRUE_SHARE:.0%}: the documents have too few sentences. Ways out: --objective "
                            "mlm, or another --format (sentences: a sentence a line, a blank line between documents)")
    long_sentences = sum(int((np.diff(dataset.source.shard(dataset.shard_at(0, place)).sentences) > task.max_tokens).sum())
                         for place in range(len(plans)))
    if long_sentences and config.objective != "mlm":
        print(f"{round(long_sentences / share):,} sentences are longer than {task.max_tokens} tokens: planned in pieces of half of that")
    if whole_step and num_tokens < config.batch_size * task.counted_length and share == 1:
        largest = num_tokens // task.counted_length
        raise UserError(f"--batch-size {config.batch_size}: a step is {config.batch_size * task.counted_length:,} tokens, the text makes "
                        f"{num_tokens:,}{at_length}; needed is " + (
                            f"at most --batch-size {largest} --micro-batch-size {largest}, or more text"
                            if largest else f"more text, or {phases.option_of(config)} below {num_tokens} tokens"))
    return max(1, round(planned / share / (config.batch_size // config.micro_batch_size)))


def count_steps(config: Config, state: dict, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: decided when it starts; a resumed run keeps them unless it is told otherwise."""
    wanted = config.max_steps or max(1, round(config.epochs * steps_per_epoch))
    if not state:
        return wanted
    saved = state["options"]
    if config.epochs != saved["epochs"] and config.max_steps == saved["max_steps"]:
        config.max_steps, wanted = 0, max(1, round(config.epochs * steps_per_epoch))
    if (config.max_steps, config.epochs) == (saved["max_steps"], saved["epochs"]):
        return state["total_steps"]
    print(f"the run now ends at step {wanted}, not {state['total_steps']}: the schedules of learning rate and masks"
          f"{', and where phases end,' * bool(config.phases)} change")
    return wanted
