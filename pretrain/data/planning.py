"""Plan: all examples of one shard in one epoch, as arrays.

The plan is a pure function of (seed, epoch, shard) and of the task: resuming plans one shard again and replays nothing.
Segment pairs follow BERT's create_pretraining_data (Devlin et al. 2019), sentence order ALBERT's (Lan et al. 2020), with
all documents walked in lockstep instead of one by one.
"""
from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from pretrain.batch import IGNORED
from pretrain.config import NUM_SPECIALS
from pretrain.data.corpus import Shard
from pretrain.data.draws import derive, integers, uniform

SHORT_TARGET_SHARE = 0.1  # of the pairs aim at a random shorter length, as in BERT
LANE_SEQUENCES = 128  # a longer document is walked in this many sequences' worth at a time, so that a book is planned fast
SEQUENCES_PER_SLOT = 4  # a micro-batch holds at most this many sequences for each sequence of max_length


@dataclass(frozen=True)
class Task:
    """What decides the examples and the micro-batches; a change of any of it changes the data."""

    objective: str
    max_length: int
    micro_batch_size: int  # full sequences in a micro-batch, of max_length or of `counted_length`
    mask_rate: float  # the highest of the run
    seed: int
    counted_length: int | None = None  # of a run's first phase, the tokens of whose micro-batches those of the others have, too

    @property
    def max_tokens(self) -> int:
        """Tokens of text in a sequence."""
        return self.max_length - NUM_SPECIALS[self.objective]

    @property
    def token_limit(self) -> int:
        """Tokens in a micro-batch, specials included."""
        return self.micro_batch_size * (self.counted_length or self.max_length)

    @property
    def slots(self) -> int:
        """Sequences of max_length that reach the end of a micro-batch, the last one perhaps beyond it."""
        return -(-self.token_limit // self.max_length)

    @property
    def sequence_limit(self) -> int:
        """Sequences in a micro-batch."""
        return self.slots * SEQUENCES_PER_SLOT

    @property
    def masked_limit(self) -> int:
        """Masked positions in a micro-batch; one more for each full sequence leaves room for rounding."""
        return int(self.mask_rate * self.token_limit) + self.slots

    def budget(self, num_maskable: np.ndarray, mask_rate: float | None = None) -> np.ndarray:
        """int64: tokens that are masked of so many maskable ones in a sequence; at a rate below the task's, with a schedule."""
        rate = self.mask_rate if mask_rate is None else mask_rate
        return np.minimum(np.maximum(1, np.floor(rate * num_maskable + 0.5)), num_maskable).astype(np.int64)


@dataclass(frozen=True)
class Plan:
    """Examples in the order in which they are used. Text of example i: ids[a_start:a_start + a_length], then B likewise."""

    a_start: np.ndarray  # int64
    a_length: np.ndarray
    b_start: np.ndarray
    b_length: np.ndarray  # 0 where there is no B
    label: np.ndarray  # int64: 0 next or in order, 1 random or swapped, IGNORED without a pair
    keys: np.ndarray  # uint64: of the example, for its masks
    bounds: tuple[int, ...] = ()  # micro-batch m is examples bounds[m]:bounds[m + 1]

    @property
    def lengths(self) -> np.ndarray:
        """int64: tokens of each example, specials included."""
        return self.a_length + self.b_length + 2 + (self.b_length > 0)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the shard."""
        return max(0, len(self.bounds) - 1)

    def take(self, chosen: np.ndarray | slice) -> Plan:
        """The plan of some examples; without bounds."""
        return Plan(self.a_start[chosen], self.a_length[chosen], self.b_start[chosen], self.b_length[chosen],
                    self.label[chosen], self.keys[chosen])


def make_plan(shard: Shard, documents: np.ndarray, task: Task, key: np.uint64) -> Plan:
    """Plan of `documents` (int64 places in `shard`), shuffled and cut into micro-batches; `key` stands for (seed, epoch,
    shard)."""
    plan = plan_windows(shard, documents, task, key) if task.objective == "mlm" else plan_pairs(shard, documents, task, key)
    # Not in the order of the keys themselves: their bits have decided the labels.
    plan = plan.take(np.argsort(derive(plan.keys, np.uint64(6)), kind="stable"))
    return Plan(**{**vars(plan), "bounds": micro_batch_bounds(plan, task)})


def plan_windows(shard: Shard, documents: np.ndarray, task: Task, key: np.uint64) -> Plan:
    """Plain MLM: each document as consecutive windows of max_tokens, the first cut at a random offset; nothing is dropped."""
    width = task.max_tokens
    starts = shard.sentences[shard.documents[documents]]
    lengths = shard.sentences[shard.documents[documents + 1]] - starts
    first = 1 + integers(derive(key, documents), width)  # length of the first window
    counts = 1 + np.maximum(0, -(-(lengths - first) // width))
    owner = np.repeat(np.arange(len(documents)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.where(rank == 0, 0, first[owner] + (rank - 1) * width)
    end = np.minimum(first[owner] + rank * width, lengths[owner])
    nothing = np.zeros(len(owner), np.int64)
    return Plan(starts[owner] + begin, end - begin, nothing, nothing, np.full(len(owner), IGNORED),
                derive(derive(key, np.uint64(1 << 32)), np.arange(len(owner))))


def plan_pairs(shard: Shard, documents: np.ndarray, task: Task, key: np.uint64) -> Plan:
    """Segment pairs. Sentences fill a target length; A and B are split at a sentence boundary.

    NSP: B is random for half, from another document, and the sentences it displaces go back. A chunk of one sentence has
    a random B, as in BERT. SOP: A and B are swapped for half; a chunk of one sentence is a sequence without a pair."""
    edges, first, last = _sentence_edges(shard, documents, task.max_tokens)
    walked = _walk(edges, *_lanes(edges, first, last, LANE_SEQUENCES * task.max_length), task, key, len(documents) > 1)
    start, split, end, target, is_random, owner, draw = walked
    a_start, a_length = edges[start], edges[split] - edges[start]
    b_start, b_length = edges[split], edges[end] - edges[split]
    label = np.where(end > split, 0, IGNORED)
    if is_random.any():
        chosen = np.flatnonzero(is_random)
        other = integers(derive(draw[chosen], np.uint64(4)), len(documents) - 1)
        other += other >= owner[chosen]
        b_first = first[other] + integers(derive(draw[chosen], np.uint64(5)), last[other] - first[other])
        wanted = np.maximum(1, target[chosen] - a_length[chosen])
        b_last = np.minimum(np.searchsorted(edges, edges[b_first] + wanted), last[other])
        b_start[chosen], b_length[chosen], label[chosen] = edges[b_first], edges[b_last] - edges[b_first], 1
    a_start, a_length, b_start, b_length = truncate_pairs(a_start, a_length, b_start, b_length, task.max_tokens, draw)
    if task.objective == "mlm+sop":
        swapped = (label == 0) & (uniform(derive(draw, np.uint64(4))) < 0.5)
        a_start, b_start = np.where(swapped, b_start, a_start), np.where(swapped, a_start, b_start)
        a_length, b_length = np.where(swapped, b_length, a_length), np.where(swapped, a_length, b_length)
        label = np.where(swapped, 1, label)
    return Plan(a_start, a_length, b_start, b_length, label, draw)


def _sentence_edges(shard: Shard, documents: np.ndarray, max_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(edges, first, last): token offsets of the sentences of the shard, and where in `edges` each document starts and ends.

    A sentence longer than `max_tokens` is cut into consecutive pieces of half of that, so that two of them fill a sequence
    and none is truncated."""
    edges, doc_first, doc_last = np.asarray(shard.sentences), shard.documents[documents], shard.documents[documents + 1]
    lengths = np.diff(edges)
    if lengths.max(initial=0) <= max_tokens:
        return edges, doc_first, doc_last
    pieces = np.where(lengths > max_tokens, -(-2 * lengths // max_tokens), 1)
    before = np.concatenate([[0], np.cumsum(pieces)])
    owner = np.repeat(np.arange(len(lengths)), pieces)
    rank = np.arange(len(owner)) - before[owner]
    cut = np.append(edges[owner] + rank * max_tokens // 2, edges[-1])
    return cut, before[doc_first], before[doc_last]


def _lanes(edges: np.ndarray, first: np.ndarray, last: np.ndarray, lane_tokens: int) -> tuple[np.ndarray, ...]:
    """(start, end, document) of the lanes: a document, or a part of one longer than `lane_tokens`, as places in `edges`."""
    tokens = edges[last] - edges[first]
    counts = np.maximum(1, -(-tokens // lane_tokens))
    owner = np.repeat(np.arange(len(first)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.maximum(np.searchsorted(edges, edges[first][owner] + rank * lane_tokens), first[owner])
    end = np.append(start[1:], 0)
    is_last = rank == counts[owner] - 1
    end[is_last] = last[owner[is_last]]
    return start, end, owner


def _walk(edges: np.ndarray, position: np.ndarray, end: np.ndarray, owner: np.ndarray, task: Task, key: np.uint64,
          others: bool) -> tuple[np.ndarray, ...]:
    """Chunks of all lanes in lockstep: (start, split, end, target, is_random, document, key), one row for each example.

    One document, slowly: take sentences until they reach the target; split them; go on after the split where B is random,
    else after the chunk."""
    may_be_random = task.objective == "mlm+nsp" and others
    lane_keys, step, rows = derive(key, position), 0, []
    while True:
        going = position < end
        if not going.all():
            position, end, owner, lane_keys = position[going], end[going], owner[going], lane_keys[going]
        if not len(position):
            break
        draw = derive(lane_keys, np.uint64(step))
        is_short = uniform(derive(draw, np.uint64(0))) < SHORT_TARGET_SHARE
        target = np.where(is_short, 2 + integers(derive(draw, np.uint64(1)), task.max_tokens - 1), task.max_tokens)
        stop = np.minimum(np.searchsorted(edges, edges[position] + target), end)
        split = position + 1 + integers(derive(draw, np.uint64(2)), np.maximum(stop - position - 1, 1))
        is_random = (stop - position == 1) | (draw >> np.uint64(63)).astype(bool)
        is_random &= may_be_random
        rows.append((position, split, stop, target, is_random, owner, draw))
        position = np.where(is_random, split, stop)
        step += 1
    if not rows:
        return tuple(np.zeros(0, kind) for kind in (np.int64, np.int64, np.int64, np.int64, bool, np.int64, np.uint64))
    return tuple(np.concatenate(column) for column in zip(*rows))


def truncate_pairs(a_start: np.ndarray, a_length: np.ndarray, b_start: np.ndarray, b_length: np.ndarray, max_tokens: int,
                   keys: np.ndarray) -> tuple[np.ndarray, ...]:
    """The pairs cut to `max_tokens` in sum: from the longer side while they differ, then from both; each side at a random
    end."""
    new_b = np.minimum(b_length, np.maximum(max_tokens // 2, max_tokens - a_length))
    new_a = np.minimum(a_length, max_tokens - new_b)
    coins = derive(keys, np.uint64(3))
    a_start = a_start + np.where(coins & np.uint64(1), a_length - new_a, 0)
    b_start = b_start + np.where(coins & np.uint64(2), b_length - new_b, 0)
    return a_start, new_a, b_start, new_b


def micro_batch_bounds(plan: Plan, task: Task) -> tuple[int, ...]:
    """Where micro-batches begin and end: each takes examples in order up to the limit of tokens, sequences or masks."""
    tokens = np.concatenate([[0], np.cumsum(plan.lengths)]).tolist()
    masks = np.concatenate([[0], np.cumsum(task.budget(plan.a_length + plan.b_length))]).tolist()
    bounds, total = [0], len(plan.lengths)
    while bounds[-1] < total:
        start = bounds[-1]
        stop = min(start + task.sequence_limit, bisect_right(tokens, tokens[start] + task.token_limit) - 1,
                   bisect_right(masks, masks[start] + task.masked_limit) - 1)
        assert stop > start, (start, stop, total)
        bounds.append(stop)
    return tuple(bounds)
