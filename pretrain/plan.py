"""The numbers of a run that are derived from its options, its text and the machine.

Micro-batches, steps, phases, intervals: computed once, printed before training, saved with the run.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from pretrain.batch import IGNORED
from pretrain.config import (
    MODEL_SIZES,
    OBJECTIVES,
    Config,
    counted_length,
    length_option,
    longest,
    min_micro_batch_size,
    phase_lengths,
    typed,
)
from pretrain.data.corpus import Shard, is_corpus
from pretrain.data.loader import PretrainingDataset
from pretrain.data.mixture import Mixture
from pretrain.data.pairs import Task, micro_batch_bounds
from pretrain.errors import UserError, counted
from pretrain.runtime.distributed import World

MIN_TRUE_SHARE = 0.1  # of the planned pairs
MAX_ALONE_SHARE = 0.5  # of documents that are one long sentence; above, a warning is printed
CPU_SEQUENCES, GPU_TOKENS = 32, 1 << 15  # of a micro-batch, by default
SHAPE_MULTIPLE = 32  # tokens; micro-batches without fixed shapes are filled up to this multiple
MAX_PASSES = 1000  # of a run, over a text of a mixture
COUNTED_SHARDS = 4  # planned at the start to count an epoch, extrapolated to the rest


def make_tasks(config: Config, micro_batch_size: int) -> list[Task]:
    """The task of each phase, planned for the highest mask rate."""
    pairs, rate = OBJECTIVES[config.objective], max(config.mask_rate)
    return [
        Task(pairs, length, micro_batch_size, rate, config.seed, counted_length(config))
        for length, _ in phase_lengths(config)
    ]


def check_sizes(config: Config, saved: dict, world: World) -> None:
    """UserError if the processes cannot share a step evenly, as far as the sizes are known."""
    batch, size = config.batch_size, saved.get("micro_batch_size") or config.micro_batch_size
    if not size:
        if batch % world.size:
            expected = f"expected a multiple of the number of processes, {world.size}"
            raise UserError(f"--batch-size {batch}: does not divide evenly; {expected}")
        return
    micro_batches, rest = divmod(batch, size)
    if rest:  # the size of a resumed run may not fit
        expected = f"expected a multiple of the --micro-batch-size {size}"
        raise UserError(f"--batch-size {batch}: does not divide evenly; {expected}")
    if micro_batches % world.size:
        fits = ", ".join(map(str, _divisors(micro_batches)))
        raise UserError(
            f"{counted(world.size, 'process')}: a step of --batch-size {batch} has "
            f"{counted(micro_batches, 'micro-batch')} of --micro-batch-size {size}; expected a "
            f"number of processes that divides them: {fits}"
        )


def default_micro_batch_size(config: Config, device: torch.device, world: World) -> int:
    """The largest size that divides a step evenly, up to what keeps the device busy. Prints a
    warning if no divisor is good; UserError if none has room for the longest sequence."""
    batch = config.batch_size
    length, smallest = counted_length(config), min_micro_batch_size(config)
    enough = max(smallest, GPU_TOKENS // length if device.type == "cuda" else CPU_SEQUENCES)
    each = batch // world.size
    found = _fitting_divisor(each, smallest, enough)
    if not found:
        on_each = f" on each of {world.size} processes" if world.size > 1 else ""
        problem = f"no equal micro-batches{on_each} have room for {longest(config)} tokens"
        expected = f"expected a multiple of {smallest * world.size}"
        raise UserError(f"--batch-size {batch}: {problem}; {expected}")
    if 2 * found < min(enough, each):
        problem = f"--batch-size {batch}: divides into micro-batches of only {found}, which is slow"
        print(f"{problem}; a multiple of {enough * world.size} would be faster")
    return found


def smaller_micro_batch_size(config: Config, size: int, device: torch.device, world: World) -> int:
    """The next size to try when `size` is too large for the device; UserError if there is none."""
    smallest = min_micro_batch_size(config)
    divisors = _divisors(config.batch_size // world.size)
    found = max((divisor for divisor in divisors if smallest <= divisor <= size // 2), default=0)
    too_large = f"--micro-batch-size {size}: is too large for the memory of {device}"
    if not found or config.shard:
        smaller = "a smaller one" if found else f"shorter sequences ({length_option(config)})"
        advice = f"use a larger device, --gradient-checkpointing, or {smaller} in a new run"
        raise UserError(f"{too_large}; {advice}")
    print(f"{too_large}; this run uses {found}")
    return found


def counted_micro_batch_size(config: Config) -> int:
    """The micro-batch size that an epoch is counted with: that of one process on a CPU, so that the
    steps of a run depend on neither the device nor the number of processes."""
    smallest = min_micro_batch_size(config)
    enough = max(smallest, CPU_SEQUENCES)
    return config.micro_batch_size or _fitting_divisor(config.batch_size, smallest, enough)


def _fitting_divisor(number: int, low: int, enough: int) -> int:
    """The largest divisor from `low` to `enough`, else the smallest above; 0 if there is none."""
    divisors = [size for size in _divisors(number) if size >= low]
    return max((size for size in divisors if size <= enough), default=(divisors or [0])[0])


def _divisors(number: int) -> list[int]:
    """In ascending order."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


@dataclass(frozen=True)
class Epoch:
    """A pass over the text or, of a mixture, over its first text."""

    steps: int  # of the optimizer
    passes: tuple[float, ...] = ()  # over each text of a mixture


def count_epoch(dataset: PretrainingDataset | Mixture, config: Config) -> Epoch:
    """An epoch, estimated from the first shards. UserError if the text does not fit the task."""
    counts = []
    for number, part in enumerate(dataset.parts):
        name = f" in {config.train[number]}" if config.mix else ""
        step_share = dataset.shares[0] if number == 0 else 0.0  # the others may be repeated
        counts.append(_count_pass(part, config, step_share, name))
    drawn = counts[0][0] / dataset.shares[0]  # tokens of the epoch
    passes = [share * drawn / max(1, n) for share, (n, _) in zip(dataset.shares, counts)]
    micro_batches = sum(count * number for count, (_, number) in zip(passes, counts))
    steps = max(1, round(micro_batches * counted_micro_batch_size(config) / config.batch_size))
    return Epoch(steps, tuple(passes) if config.mix else ())


def _count_pass(
    dataset: PretrainingDataset, config: Config, step_share: float, in_text: str
) -> tuple[float, float]:
    """(tokens, micro-batches of `counted_micro_batch_size`) of a pass over a text, estimated from
    its first shards.

    UserError if the text does not fit the task, or has fewer tokens than `step_share` of a step."""
    task, corpus = dataset.task, dataset.source
    places = range(min(COUNTED_SHARDS, corpus.num_shards))
    plans, sizes = [dataset.plan(0, place) for place in places], []
    for place in places:
        sizes.append(corpus.info["shards"][dataset.shard_at(0, place)]["tokens"])
    share = sum(sizes) / corpus.info["tokens"]
    at_length = f"{in_text} at {task.max_length} tokens" if config.phases else in_text
    if task.pairs:
        check_pairs(np.concatenate([plan.label for plan in plans]), config, at_length)
        shards = [corpus.shard(dataset.shard_at(0, place)) for place in places]
        _report_long_sentences(config, shards, share, task.max_tokens, in_text)
    num_tokens = sum(int(plan.lengths.sum()) for plan in plans)
    step_tokens = round(step_share * config.batch_size * task.counted_length)
    if num_tokens < step_tokens and share == 1:
        largest = int(num_tokens / step_share) // task.counted_length
        expected = f"more text, or {length_option(config)} below {num_tokens} tokens"
        if largest >= min_micro_batch_size(config):
            expected = f"at most --batch-size {largest} --micro-batch-size {largest}, or more text"
        raise UserError(
            f"--batch-size {config.batch_size}: a step is {step_tokens:,} tokens, the text has "
            f"{num_tokens:,}{at_length}; expected {expected}"
        )
    as_counted = replace(task, micro_batch_size=counted_micro_batch_size(config))
    num_micro_batches = sum(len(micro_batch_bounds(plan, as_counted)) - 1 for plan in plans)
    return num_tokens / share, num_micro_batches / share


def _report_long_sentences(
    config: Config, shards: list[Shard], share: float, max_tokens: int, in_text: str
) -> None:
    """Print how many sentences do not fit in a pair, by a `share` of the shards, with a warning if
    most documents are one such sentence."""
    is_long = [np.diff(shard.sentences) > max_tokens for shard in shards]
    num_long = int(np.concatenate(is_long).sum())
    if not num_long:
        return
    found = counted(round(num_long / share), "sentence")
    print(f"{found} over {max_tokens} tokens{in_text}: cut into pieces of at most half that")
    is_alone = [  # bool [documents]: a single sentence, and a long one
        long[shard.documents[:-1]] & (np.diff(shard.documents) == 1)
        for shard, long in zip(shards, is_long)
    ]
    if np.concatenate(is_alone).mean() > MAX_ALONE_SHARE:
        ways = "use --objective mlm"
        if not config.split_sentences:
            ways = "use --split-sentences, or --objective mlm"
        problem = f"--objective {config.objective}: most documents are one long sentence"
        print(f"{problem}, so a pair has two halves of one; {ways}")


def check_pairs(labels: np.ndarray, config: Config, at_length: str = "") -> None:
    """Print the shares of true, false and missing pairs; UserError if too few are true.

    `labels` int64 [sequences]: 0 is next, 1 is random or swapped, IGNORED: no pair."""
    true, false, none = (float((labels == label).mean()) for label in (0, 1, IGNORED))
    print(
        f"{config.objective}{at_length}: {true:.1%} of the sequences are true pairs, {false:.1%} "
        f"are {OBJECTIVES[config.objective]} pairs, {none:.1%} have no pair"
    )
    if true < MIN_TRUE_SHARE:
        raise UserError(
            f"--objective {config.objective}: only {true:.1%} of the planned pairs{at_length} are "
            "true, because documents have too few sentences; expected at least "
            f"{MIN_TRUE_SHARE:.0%}: use --objective mlm, or another --format (sentences: one per "
            "line, a blank line between documents)"
        )


def drop_old_end(config: Config, saved: dict) -> Config:
    """The options of a resumed run: if only --epochs is new, it replaces --max-steps."""
    if not saved or config.epochs == saved["options"]["epochs"]:
        return config
    is_old = config.max_steps == saved["options"]["max_steps"]
    return replace(config, max_steps=0) if is_old else config


def count_steps(config: Config, asked: Config, saved: dict, steps_per_epoch: int) -> int:
    """Optimizer steps of the run; a resumed run keeps its own unless the options changed."""
    names = ("max_steps", "epochs")
    if saved and all(getattr(asked, name) == saved["options"][name] for name in names):
        return saved["total_steps"]
    total = config.max_steps or max(1, round(config.epochs * steps_per_epoch))
    if saved and total != saved["total_steps"]:
        changed = f"the schedules{' and the phases' if config.phases else ''} change"
        print(f"the run now ends at step {total}, not {saved['total_steps']}: {changed}")
    return total


def count_passes(config: Config, epoch: Epoch, total_steps: int) -> tuple[float, ...]:
    """How often the run reads each text of a mixture; (): no mixture, or not counted. UserError for
    one, other than the first, that it would read more than MAX_PASSES times."""
    passes = tuple(count * total_steps / epoch.steps for count in epoch.passes)
    for path, count in list(zip(config.train, passes))[1:]:
        if count > MAX_PASSES:
            problem = f"{path} would be read {count:,.0f} times"
            expected = f"expected at most {MAX_PASSES:,}: a smaller share, or more text"
            raise UserError(f"{typed(config, 'mix')}: {problem}; {expected}")
    return passes


def report_ineffective(
    config, total_steps: int, world: World, has_validation: bool = True, asked=None
) -> None:
    """Print which options of pretrain.py or finetune.py have no effect, or not the full one.

    `asked`: as the user gave them, where `config` has chosen values."""
    asked = asked or config
    if asked.max_steps and asked.epochs != type(asked).epochs:
        print(f"{typed(asked, 'epochs', 'max_steps')}: the steps count; --epochs has no effect")
    if config.warmup > max(1, total_steps):
        problem = f"longer than the run of {counted(total_steps, 'step')}"
        print(f"{typed(config, 'warmup')}: {problem}; the learning rate does not reach its peak")
    names, kind = ("vocab_size", "lowercase"), type(asked)
    given = [name for name in names if getattr(asked, name, None) != getattr(kind, name, None)]
    if "vocab_size" in given and asked.model not in MODEL_SIZES:
        print(f"{typed(asked, 'vocab_size')}: has no effect; the tokenizer is the model's")
    from_text = given and asked.model in MODEL_SIZES and not asked.tokenizer
    if from_text and any(map(is_corpus, asked.train)):
        print(f"{typed(asked, *given)}: has no effect; the tokenizer is the prepared corpus's")
    if getattr(config, "shard", False) and world.size == 1:
        print("--shard: has no effect in one process; start several with torchrun")
    if config.eval_every != type(config).eval_every and not has_validation:
        print(f"{typed(config, 'eval_every')}: has no effect; there is no validation text")


def intervals(config: Config, total_steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """(steps between evaluations, steps between checkpoints)."""
    eval_every = max(10, min(1000, total_steps // 20))
    save_every = eval_every if eval_every > 500 else 2 * eval_every  # most follow an evaluation
    return (
        steps_between(config.eval_every, steps_per_epoch, auto=eval_every),
        steps_between(config.save_every, steps_per_epoch, auto=save_every),
    )


def steps_between(every: str, steps_per_epoch: int, auto: int) -> int:
    """Steps between evaluations or checkpoints: N, "epoch", or "auto"."""
    named = {"epoch": steps_per_epoch, "auto": auto}
    return named[every] if every in named else int(every)
