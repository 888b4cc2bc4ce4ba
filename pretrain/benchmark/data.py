"""Speeds of the data side, in real tokens: preparing text, and what comes from a prepared corpus."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from pretrain.data import preparing, reading
from pretrain.data.dataset import DataPosition, MicroBatchSampler, PretrainingDataset, make_loader

GOAL = 8e6  # tokens/s of a core, so that few workers feed any GPU
EATEN = 1e6  # tokens/s that BERT-base takes on an H200
SAMPLE_BYTES = (
    8 << 20
)  # text of `prepare`; less is repeated, so that what a corpus costs once weighs little
EPOCH_SHARDS = 2  # of a larger corpus so many shards are walked
LOADER_SECONDS = 0.7  # of each measure; a worker's few batches in advance weigh little then


def measure_prepare(text, tokenizer, repeats: int) -> dict:
    """Tokens/s of `prepare` and of `encode_batch_fast` alone, over the same sentences, in turns."""
    piece = reading.cut_into_pieces(
        [Path(source.path) for source in text.sources], text.text_format, SAMPLE_BYTES
    )[0]
    stream = [item and item[0] for item in reading.sentences(piece, text.text_format)]
    stream *= max(1, SAMPLE_BYTES // sum(len(sentence) for sentence in stream if sentence))
    sentences, times = [sentence for sentence in stream if sentence], []
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder, "sample.txt")
        sample.write_text("".join(f"{sentence or ''}\n" for sentence in stream), encoding="utf-8")
        sources = reading.check_files([sample], "sample")
        for number in range(repeats + 1):
            begin = time.perf_counter()
            corpus = preparing.prepare(sources, "sentences", tokenizer, Path(folder, str(number)))
            middle = time.perf_counter()
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(
                sentences, add_special_tokens=False
            )
            times.append((middle - begin, time.perf_counter() - middle))
    tokens = corpus.info["tokens"]
    assert tokens == sum(len(encoding.ids) for encoding in encodings), (
        "the sides must do the same work"
    )
    return {
        "prepare": {
            "tokens_per_second": {
                side: tokens / median(taken)
                for side, taken in zip(("ours", "peer"), zip(*times[1:]))
            }
        }
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread; numpy's work here is on one as it is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_data(run, repeats: int) -> dict:
    """Tokens/s of planning an epoch and of packing and masking all its micro-batches, in this process alone on one thread; every
    strategy in turns, beside token masks. Entities need text with some (--lexicon, spans or tags, under --masking entity), similar
    words a table (--similar)."""
    corpus, given = run.dataset.source, run.collator.masking
    strategies = {
        masking: dataclasses.replace(given, masking=masking, similar=None)
        for masking in ("token", "word", "span", "entity")
    }
    strategies["similar"] = dataclasses.replace(given, masking="word")
    available = {"entity": corpus.info["entities"], "similar": given.similar}
    rates = {masking: [] for masking in strategies if available.get(masking, True)}
    with one_thread():
        for epoch in range(
            repeats + 1
        ):  # another epoch has other pairs, so nothing is planned already
            for masking, kept in rates.items():
                collator = dataclasses.replace(run.collator, masking=strategies[masking])
                dataset, tokens = PretrainingDataset(corpus, run.dataset.task), 0
                begin = time.perf_counter()
                for position in dataset.positions(DataPosition(epoch, 0, 0), end_epoch=epoch + 1):
                    if position.place == EPOCH_SHARDS:
                        break
                    tokens += collator(dataset.__getitems__([position])).num_tokens
                kept.append(tokens / (time.perf_counter() - begin))
    medians = {masking: median(kept[1:]) for masking, kept in rates.items()}
    peers = {masking: {"peer": medians["token"]} for masking in medians if masking != "token"}
    return {
        f"data_{masking}": {
            "tokens_per_second": {"ours": rate, "goal": GOAL} | peers.get(masking, {})
        }
        for masking, rate in medians.items()
    }


def measure_loader(run, repeats: int) -> dict:
    """Tokens/s that reach the loop through the DataLoader, by number of worker processes; the clock starts at the first batch."""
    rates = {workers: [] for workers in sorted({0, 1, 2, run.config.workers})}
    for _ in range(repeats):
        for workers, kept in rates.items():
            dataset, tokens = PretrainingDataset(run.dataset.source, run.dataset.task), 0
            loader = make_loader(
                dataset, run.collator, MicroBatchSampler(dataset, DataPosition(0, 0, 0)), workers
            )
            with one_thread(), contextlib.closing(loader):
                next(loader)
                begin = time.perf_counter()
                while (seconds := time.perf_counter() - begin) < LOADER_SECONDS:
                    tokens += next(loader).num_tokens
            kept.append(tokens / seconds)
    return {
        f"loader_{workers}_workers": {"tokens_per_second": {"ours": median(kept), "goal": EATEN}}
        for workers, kept in rates.items()
    }
