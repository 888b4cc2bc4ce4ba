"""Speed of the data pipeline in real tokens: preparing text, and reading from a corpus."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from pretrain.data.collate import Collator
from pretrain.data.loader import DataPosition, PretrainingDataset, TrainData
from pretrain.data.prepare import prepare
from pretrain.data.sources import check_files
from pretrain.errors import UserError
from pretrain.inputs import check_text

CORE_GOAL = 8e6  # tokens/s per core, so that few workers feed any GPU
LOADER_GOAL = 1e6  # tokens/s; above the speed of BERT-base on an H200
SAMPLE_CHARACTERS = 8 << 20  # for `prepare`: enough to make fixed costs small
EPOCH_SHARDS = 2  # of a corpus, at most
LOADER_SECONDS = 0.7  # per measurement: enough to make prefetched batches negligible


def measure_prepare(bench) -> Iterator[dict]:
    """Tokens/s of `prepare`, alternating with `encode_batch_fast` alone on the same sentences."""
    run = bench.make_run()
    text = check_text(bench.options.train, "--train", bench.options)
    if text.is_corpus:
        raise UserError(f"{text.name}: is a corpus; expected text, or --parts without prepare")
    lines = sample_of(text.sentences())
    sentences = [line for line in lines if line]
    sample, seconds = bench.folder / "sample.txt", {"ours": [], "peer": []}
    sample.write_text("\n".join(lines) + "\n", encoding="utf-8")
    encode = run.tokenizer.backend_tokenizer.encode_batch_fast
    for number in range(bench.repeats + 1):
        begin = time.perf_counter()
        folder = bench.folder / str(number)
        corpus = prepare(check_files([sample]), "sentences", run.tokenizer, folder)
        middle = time.perf_counter()
        encodings = encode(sentences, add_special_tokens=False)
        seconds["ours"].append(middle - begin)
        seconds["peer"].append(time.perf_counter() - middle)
    tokens = corpus.info["tokens"]
    assert tokens == sum(len(encoding.ids) for encoding in encodings), "the sides differ"
    rates = {side: tokens / median(measured[1:]) for side, measured in seconds.items()}
    yield {"tokens_per_second": rates}


def sample_of(sentences: Iterator) -> list[str]:
    """The first sentences, with "" between documents; short text is repeated."""
    lines, num_characters = [], 0
    for sentence in sentences:
        lines.append(sentence[0] if sentence else "")
        num_characters += len(lines[-1])
        if num_characters >= SAMPLE_CHARACTERS:
            return lines
    return [*lines, ""] * max(1, SAMPLE_CHARACTERS // num_characters)


def measure_data(bench) -> Iterator[dict]:
    """Tokens/s of planning, packing and masking an epoch on one thread, by masking strategy; and
    through the DataLoader, by number of workers. All take turns.

    Entity masks need text with entities; similar words need --similar."""
    run = bench.make_run()
    dataset, collator = run.phases[0].dataset, run.phases[0].collator
    strategies = {
        f"{name}_masks": replace(collator.masking, masking=name, similar=None)
        for name in ("token", "word", "span", "entity")
    }
    if not dataset.source.info["entities"]:
        del strategies["entity_masks"]
    if collator.masking.similar:
        strategies["similar_masks"] = replace(collator.masking, masking="word")
    workers = {f"{number}_workers": number for number in sorted({0, 1, 2, run.data.workers})}
    rates = {name: [] for name in (*strategies, *workers)}
    unplanned = partial(PretrainingDataset, dataset.source, dataset.task)
    torch.set_num_threads(1)  # numpy uses one here, too
    for epoch in range(bench.repeats + 1):  # each has different pairs
        for name, masking in strategies.items():
            rate = collate_epoch(unplanned(), replace(collator, masking=masking), epoch)
            rates[name].append(rate)
        for name, number in workers.items():
            data = TrainData([(unplanned(), collator)], [0], 1, workers=number)
            rates[name].append(read_data(data))
    found = {name: {"ours": median(kept[1:])} for name, kept in rates.items()}
    for name, sides in found.items():
        sides["goal"] = LOADER_GOAL if name in workers else CORE_GOAL
        if name in strategies and name != "token_masks":
            sides["peer"] = found["token_masks"]["ours"]
    yield found


def collate_epoch(dataset: PretrainingDataset, collator: Collator, epoch: int) -> float:
    """Tokens/s over the first shards of an epoch, from planning to batches."""
    tokens, begin = 0, time.perf_counter()
    for position in dataset.positions(DataPosition(epoch, 0, 0), end_epoch=epoch + 1):
        if position.place == EPOCH_SHARDS:
            break
        tokens += collator(dataset[position]).num_tokens
    return tokens / (time.perf_counter() - begin)


def read_data(data: TrainData) -> float:
    """Tokens/s that reach the loop; the clock starts after the first step."""
    next(data)
    tokens, seconds, begin = 0, 0.0, time.perf_counter()
    while seconds < LOADER_SECONDS:
        tokens += sum(batch.num_tokens for batch in next(data))
        seconds = time.perf_counter() - begin
    data.load_state_dict(data.state_dict())  # ends the workers
    return tokens / seconds
