"""Pairs: all examples of one shard in one epoch, planned at once as arrays.

A plan is a pure function of (seed, epoch, shard) and the task, so a resumed run plans one shard
again and replays nothing. Segment pairs follow BERT's create_pretraining_data (Devlin et al. 2019)
and ALBERT's sentence order (Lan et al. 2020), but all documents are walked in lockstep.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np

from pretrain.batch import IGNORED
from pretrain.data.corpus import Shard
from pretrain.data.hash_rng import derive, integers, uniform

SHORT_TARGET_SHARE = 0.1  # of pairs that get a random shorter target length, as in BERT
LANE_SEQUENCES = 128  # a longer document (a book) is walked in several places at once
SEQUENCES_PER_SLOT = 4  # the most sequences in a micro-batch for each full one

# Streams of random numbers of an example's key. Stream 7 draws the masks.
IS_SHORT, SHORT_TARGET, SPLIT, TRUNCATION, OTHER_DOCUMENT, OTHER_SENTENCE, ORDER = range(7)
SWAP = OTHER_DOCUMENT  # no task uses both
WINDOW_KEYS = 1 << 32  # a stream of the plan's key, above the ones of its documents


@dataclass(frozen=True)
class Task:
    """Everything that decides examples and micro-batches: any change to it changes the data."""

    pairs: str | None  # half have a "random" B, or have A and B "swapped"; None: no pairs
    max_length: int
    micro_batch_size: int  # full sequences (of counted_length) in a micro-batch
    mask_rate: float  # the highest of the run: micro-batches have room for it
    seed: int
    counted_length: int | None = None  # see `config.counted_length`; None: max_length

    @property
    def max_tokens(self) -> int:  # of text in [CLS] A [SEP] B [SEP], or in [CLS] A [SEP]
        return self.max_length - (3 if self.pairs else 2)

    @property
    def token_limit(self) -> int:  # of a micro-batch, including special tokens
        return self.micro_batch_size * (self.counted_length or self.max_length)

    @property
    def slots(self) -> int:  # full sequences that begin within the token limit
        return -(-self.token_limit // self.max_length)

    @property
    def masked_limit(self) -> int:  # of a micro-batch; each full sequence may round up
        return int(self.mask_rate * self.token_limit) + self.slots


@dataclass(frozen=True)
class Plan:
    """Examples in their order of use. A of example i is ids[a_start:a_start + a_length]."""

    a_start: np.ndarray  # int64
    a_length: np.ndarray
    b_start: np.ndarray
    b_length: np.ndarray  # 0: no B
    label: np.ndarray  # int64: 0 next or in order, 1 random or swapped, IGNORED without a pair
    keys: np.ndarray  # uint64: for the example's random numbers
    bounds: tuple[int, ...] = ()  # micro-batch m is examples bounds[m]:bounds[m + 1]

    @property
    def lengths(self) -> np.ndarray:  # int64: tokens of each example, including special ones
        return self.a_length + self.b_length + 2 + (self.b_length > 0)

    @property
    def num_micro_batches(self) -> int:
        return len(self.bounds) - 1

    def take(self, chosen: np.ndarray | slice) -> Plan:
        """The plan of the chosen examples, without bounds."""
        *columns, _ = vars(self).values()
        return Plan(*(column[chosen] for column in columns))


def make_plan(shard: Shard, documents: np.ndarray, task: Task, key: np.uint64) -> Plan:
    """Plan of `documents` (int64, ascending, places in `shard`), shuffled and cut into
    micro-batches; `key` is derived from (seed, epoch, shard)."""
    plan = (plan_pairs if task.pairs else plan_windows)(shard, documents, task, key)
    # Not in the order of the keys themselves: their bits also decide the labels.
    plan = plan.take(np.argsort(derive(plan.keys, ORDER), kind="stable"))
    return replace(plan, bounds=micro_batch_bounds(plan, task))


def mask_budget(num_maskable: np.ndarray, rate: float) -> np.ndarray:
    """int64: how many of the maskable tokens of each example to mask."""
    rounded = np.maximum(1, np.floor(rate * num_maskable + 0.5))
    return np.minimum(rounded, num_maskable).astype(np.int64)


def count_up(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(group, place) of each item: counts [2, 3] give [0, 0, 1, 1, 1] and [0, 1, 0, 1, 2]."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - (np.cumsum(counts) - counts)[group]


def plan_windows(shard: Shard, documents: np.ndarray, task: Task, key: np.uint64) -> Plan:
    """MLM alone: consecutive windows of max_tokens over each document, the first one shortened to
    a random length; nothing is dropped."""
    width = task.max_tokens
    starts = shard.sentences[shard.documents[documents]]
    lengths = shard.sentences[shard.documents[documents + 1]] - starts
    first = 1 + integers(derive(key, documents), width)  # tokens of the first window
    owner, number = count_up(1 + np.maximum(0, -(-(lengths - first) // width)))
    begin = np.maximum(0, first[owner] + (number - 1) * width)
    end = np.minimum(first[owner] + number * width, lengths[owner])
    no_b = np.zeros(len(owner), np.int64)
    labels = np.full(len(owner), IGNORED)
    keys = derive(derive(key, WINDOW_KEYS), np.arange(len(owner)))
    return Plan(starts[owner] + begin, end - begin, no_b, no_b, labels, keys)


def plan_pairs(shard: Shard, documents: np.ndarray, task: Task, key: np.uint64) -> Plan:
    """Segment pairs of at most max_tokens, in the order of `documents`."""
    plan = truncate(whole_pairs(shard, documents, task, key), task.max_tokens)
    if task.pairs == "random":
        return plan
    swapped = (plan.label == 0) & (uniform(derive(plan.keys, SWAP)) < 0.5)
    segments = np.stack([plan.a_start, plan.a_length, plan.b_start, plan.b_length])
    a_start, a_length, b_start, b_length = np.where(swapped, segments[[2, 3, 0, 1]], segments)
    label = np.where(swapped, 1, plan.label)
    return Plan(a_start, a_length, b_start, b_length, label, plan.keys)


def whole_pairs(shard: Shard, documents: np.ndarray, task: Task, key: np.uint64) -> Plan:
    """Pairs before truncation: sentences fill a target length and are split into A and B.

    With random pairs, half of the Bs come from another document, as does the B of a single
    sentence (as in BERT); unused sentences go back. Otherwise a single sentence has no pair."""
    edges, first, last = _sentences(shard, documents, task.max_tokens)
    start, split, end, target, is_random, document, keys = _walk(edges, first, last, task, key)
    a_start, a_length = edges[start], edges[split] - edges[start]
    b_start, b_length = edges[split], edges[end] - edges[split]
    label = np.where(end > split, 0, IGNORED)
    chosen = np.flatnonzero(is_random)
    if len(chosen):
        other = integers(derive(keys[chosen], OTHER_DOCUMENT), len(documents) - 1)
        other += other >= document[chosen]
        size = last[other] - first[other]
        b_first = first[other] + integers(derive(keys[chosen], OTHER_SENTENCE), size)
        missing = np.maximum(1, target[chosen] - a_length[chosen])
        b_last = np.minimum(np.searchsorted(edges, edges[b_first] + missing), last[other])
        b_start[chosen], b_length[chosen] = edges[b_first], edges[b_last] - edges[b_first]
        label[chosen] = 1
    return Plan(a_start, a_length, b_start, b_length, label, keys)


def truncate(plan: Plan, max_tokens: int) -> Plan:
    """`plan` with pairs of at most `max_tokens`: the longer side is cut until both are equally
    long, then both; each side at a random end."""
    b_length = np.minimum(plan.b_length, np.maximum(max_tokens // 2, max_tokens - plan.a_length))
    a_length = np.minimum(plan.a_length, max_tokens - b_length)
    coins = derive(plan.keys, TRUNCATION)
    a_start = plan.a_start + np.where(coins & np.uint64(1), plan.a_length - a_length, 0)
    b_start = plan.b_start + np.where(coins & np.uint64(2), plan.b_length - b_length, 0)
    return Plan(a_start, a_length, b_start, b_length, plan.label, plan.keys)


def _sentences(shard: Shard, documents: np.ndarray, max_tokens: int) -> tuple[np.ndarray, ...]:
    """(edges, first, last): sentence s is tokens edges[s]:edges[s + 1], document d is sentences
    first[d]:last[d]. A sentence longer than `max_tokens` is cut into pieces of half that length, so
    two of them fill a sequence and none is truncated."""
    edges = np.asarray(shard.sentences)
    first, last = shard.documents[documents], shard.documents[documents + 1]
    lengths = np.diff(edges)
    if lengths.max(initial=0) <= max_tokens:
        return edges, first, last
    pieces = np.where(lengths > max_tokens, -(-2 * lengths // max_tokens), 1)
    owner, number = count_up(pieces)
    before = np.append(0, np.cumsum(pieces))
    cut = np.append(edges[owner] + number * max_tokens // 2, edges[-1])
    return cut, before[first], before[last]


def _lanes(
    edges: np.ndarray, first: np.ndarray, last: np.ndarray, lane_tokens: int
) -> tuple[np.ndarray, ...]:
    """(start, end, document) of the lanes, in sentences: a document is one lane, or several if it
    is longer than `lane_tokens`."""
    owner, number = count_up(-(-(edges[last] - edges[first]) // lane_tokens))
    start = np.searchsorted(edges, edges[first][owner] + number * lane_tokens)
    end = np.minimum(np.append(start[1:], last[-1:]), last[owner])
    filled = start < end
    return start[filled], end[filled], owner[filled]


def _walk(
    edges: np.ndarray, first: np.ndarray, last: np.ndarray, task: Task, key: np.uint64
) -> tuple[np.ndarray, ...]:
    """(start, split, end, target, is_random, document, key) of the sentences of each example: A is
    start:split; B is split:end unless random. For one document: take sentences up to the target
    (in tokens), split them, and continue after the split if B is random, else after the end."""
    may_be_random = task.pairs == "random" and len(first) > 1
    lanes = _lanes(edges, first, last, LANE_SEQUENCES * task.max_length)
    lanes = (*lanes, derive(key, lanes[0]))
    rows: list[tuple[np.ndarray, ...]] = []
    while not rows or len(lanes[0]):
        position, end, document, lane_key = lanes
        draw = derive(lane_key, len(rows))
        is_short = uniform(derive(draw, IS_SHORT)) < SHORT_TARGET_SHARE
        short_target = 2 + integers(derive(draw, SHORT_TARGET), task.max_tokens - 1)
        target = np.where(is_short, short_target, task.max_tokens)
        stop = np.minimum(np.searchsorted(edges, edges[position] + target), end)
        size = stop - position
        split = position + 1 + integers(derive(draw, SPLIT), np.maximum(size - 1, 1))
        is_random = ((size == 1) | (draw >> np.uint64(63)).astype(bool)) & may_be_random
        rows.append((position, split, stop, target, is_random, document, draw))
        position = np.where(is_random, split, stop)
        active = position < end
        lanes = [column[active] for column in (position, end, document, lane_key)]
    return tuple(map(np.concatenate, zip(*rows)))


def micro_batch_bounds(plan: Plan, task: Task) -> tuple[int, ...]:
    """Bounds of micro-batches: each takes examples in order up to the first of three limits."""
    tokens = np.append(0, np.cumsum(plan.lengths)).tolist()
    budget = mask_budget(plan.a_length + plan.b_length, task.mask_rate)
    masks = np.append(0, np.cumsum(budget)).tolist()
    bounds, total = [0], len(plan.keys)
    while bounds[-1] < total:
        start = bounds[-1]
        stop = min(
            start + task.slots * SEQUENCES_PER_SLOT,
            bisect_right(tokens, tokens[start] + task.token_limit) - 1,
            bisect_right(masks, masks[start] + task.masked_limit) - 1,
        )
        assert stop > start, (start, stop, total)
        bounds.append(stop)
    return tuple(bounds)
