"""Held-out numbers: perplexity, MLM and NSP accuracy, and sample predictions.

The held-out batches are made once, with masks that no training option changes (tokens, rate 0.15, 80/10/10, a seed of their
own), so that perplexities of the same text, tokenizer, objective and length compare, between runs and with
scripts/evaluate.py.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pretrain.batch import IGNORED, Batch, Output
from pretrain.command import UserError, refusing
from pretrain.data.collate import Collator, Examples
from pretrain.data.corpus import Corpus
from pretrain.data.draws import key
from pretrain.data.masking import Masking
from pretrain.data.planning import Task, make_plan, micro_batch_bounds
from pretrain.data.tokenizer import Vocabulary, describe, load
from pretrain.files import markdown_table, model_folder
from pretrain.model.packed import PackedModel
from pretrain.runtime.distributed import World, sum_over_ranks

SEED, MASK_RATE, MASKING = 15, 0.15, Masking()  # of the held-out pairs and masks


@dataclass(frozen=True)
class HeldOut:
    """Held-out batches in memory, and the perplexity of guessing each token by its frequency in the training text."""

    batches: list[Batch]
    unigram_perplexity: float | None = None


def make_held_out(corpus: Corpus, objective: str, max_length: int, micro_batch_size: int, vocabulary: Vocabulary, max_tokens: int,
                  fill: bool = False, training: Corpus | None = None) -> HeldOut:
    """Batches over the documents of lowest hash, of at most `max_tokens` tokens; the same sequences for the same text,
    whatever the micro-batch size."""
    task = Task(objective, max_length, micro_batch_size, MASK_RATE, SEED)
    shard = corpus.select(max_tokens)
    plan = make_plan(shard, np.arange(len(shard.hashes)), task, key(SEED))
    plan = plan.take(slice(0, max(1, int(np.searchsorted(np.cumsum(plan.lengths), max_tokens, side="right")))))
    bounds = micro_batch_bounds(plan, task)
    collator = Collator(task, vocabulary, MASKING, fill)
    batches = [collator(Examples(shard, plan.take(slice(start, end)))) for start, end in zip(bounds, bounds[1:])]
    unigram = None if training is None or not batches else unigram_perplexity(training, batches, vocabulary.size)
    return HeldOut(batches, unigram)


def unigram_perplexity(corpus: Corpus, batches: list[Batch], vocab_size: int) -> float:
    """Perplexity at the masked positions of `batches` when each token is guessed by its share, plus one, of the first shard."""
    counts = 1.0 + np.bincount(corpus.tokens(0), minlength=vocab_size)
    labels = np.concatenate([batch.masked_lm_labels[batch.masked_lm_labels != IGNORED].numpy() for batch in batches])
    return float(np.exp(-np.log(counts[labels] / counts.sum()).mean()))


def summarize(sums: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """Means under the names that TensorBoard and metrics.jsonl use: loss, NAME_loss, NAME_accuracy, perplexity; without what
    nothing was counted for."""
    means = {name: sums[f"{name}_loss"] / sums[f"{name}_count"] for name in weights if sums[f"{name}_count"]}
    numbers = {"loss": sum(weights[name] * mean for name, mean in means.items())} if means else {}
    for name, mean in means.items():
        numbers[f"{name}_loss"] = mean
        numbers[f"{name}_accuracy"] = sums[f"{name}_correct"] / sums[f"{name}_count"]
    if "mlm" in means:
        numbers["perplexity"] = math.exp(min(means["mlm"], 700.0))
    return numbers


def add_up(total: dict[str, Tensor | float], output: Output) -> dict[str, Tensor]:
    """`total` plus the sums of an output, on the device: NAME_loss and NAME_correct, float64 scalars."""
    parts = {f"{name}_loss": value for name, value in output.loss_sums.items()}
    parts |= {f"{name}_correct": value for name, value in output.num_correct.items()}
    return {key: total.get(key, 0) + value.detach().double() for key, value in parts.items()}


def read_sums(total: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """The sums over all processes, each of which has the same keys; waits for the device."""
    keys = sorted(total)
    values = [torch.as_tensor(total[key], dtype=torch.float64, device=device) for key in keys]
    return dict(zip(keys, sum_over_ranks(torch.stack(values).cpu()).tolist())) if keys else {}


@torch.no_grad()
def evaluate(model: PackedModel, held_out: HeldOut, device: torch.device, autocast: torch.autocast, world: World = World(),
             stop: Callable[[], int] = lambda: 0) -> dict[str, float] | None:
    """Held-out numbers, named as `summarize` names them, and unigram_perplexity; no random number is drawn. None where `stop`, asked
    before each batch by all processes together, ends it."""
    was_training = model.training
    model.eval()
    batches, counted = held_out.batches, held_out.batches[world.rank:: world.size]
    total = {f"{name}_{kind}": 0.0 for name in model.loss_weights for kind in ("loss", "correct")}
    with autocast:
        for number in range(world.rank, -(-len(batches) // world.size) * world.size, world.size):
            if stop():
                break
            output = model(batches[min(number, len(batches) - 1)].to(device))  # a sharded model needs every process each time
            if number < len(batches):
                total |= add_up(total, output)
    model.train(was_training)
    if stop():
        return None
    total |= {f"{name}_count": float(sum(batch.counts[name] for batch in counted)) for name in model.loss_weights}
    numbers = summarize(read_sums(total, device), model.loss_weights)
    if held_out.unigram_perplexity is not None:
        numbers["unigram_perplexity"] = held_out.unigram_perplexity
    return numbers


@torch.no_grad()
def sample_predictions(model: PackedModel, held_out: HeldOut, tokenizer: PreTrainedTokenizerBase, device: torch.device,
                       autocast: torch.autocast, num_sequences: int = 4, top: int = 3) -> str:
    """Markdown: held-out sequences with their masks, and the most probable tokens for each masked place."""
    was_training = model.training
    model.eval()
    batch = held_out.batches[0]
    with autocast:
        on_device = batch.to(device)
        logits = model.masked_lm_logits(model.encode(on_device), on_device)
    model.train(was_training)
    shown = min(num_sequences, batch.num_sequences)
    places = [place for place in batch.masked_positions[:batch.counts["mlm"]].tolist() if place < batch.cu_seqlens[shown]]
    probabilities, ids = logits[:len(places)].float().cpu().softmax(-1).topk(top)
    paragraphs = []
    for number in range(shown):
        start, end = batch.cu_seqlens[number: number + 2].tolist()
        tokens = tokenizer.convert_ids_to_tokens(batch.input_ids[start:end].tolist())
        rows = []
        for index in (index for index, place in enumerate(places) if start <= place < end):
            right = tokenizer.convert_ids_to_tokens(int(batch.masked_lm_labels[index]))
            guesses = ", ".join(f"{token} {share:.2f}" for token, share in
                                zip(tokenizer.convert_ids_to_tokens(ids[index].tolist()), probabilities[index].tolist()))
            rows.append([places[index] - start, tokens[places[index] - start], right, guesses])
            tokens[places[index] - start] = f"**{tokens[places[index] - start]}**"
        paragraphs.append(" ".join(tokens).replace(" ##", "").replace("|", "\\|") + "\n\n"
                          + markdown_table(["place", "read", "right", "predicted"], rows))
    return "\n\n".join(paragraphs)


def fill_masks(folder: str, texts: Iterable[str], top: int, max_length: int) -> Iterator[list[tuple[str, float, str]]]:
    """For each [MASK] of each text the `top` (token, probability, text with it), by transformers' own pipeline, which also
    shows that the folder opens there; UserError for a text without [MASK]."""
    transformers.utils.logging.set_verbosity_error()  # the NSP head that the pipeline leaves over is no news
    tokenizer = load(folder, option="--model")
    describe(tokenizer)  # refuses one without [MASK]
    with refusing(f"--model {folder}: does not open in transformers", "needed is a whole checkpoint and its own config"):
        fill = transformers.pipeline("fill-mask", model=model_folder(folder), tokenizer=tokenizer, device="cpu", trust_remote_code=False)
    top = min(top, fill.model.config.vocab_size)
    for text in texts:
        parts = text.replace(fill.tokenizer.mask_token, "[MASK]").split("[MASK]")
        masked = fill.tokenizer.mask_token.join(parts)
        length = len(fill.tokenizer(masked).input_ids)
        if len(parts) < 2 or length > max_length:
            raise UserError(f"{text!r}: has {len(parts) - 1} masks and {length} tokens; needed is a [MASK] or more, within {max_length} "
                            "tokens")
        guesses = fill(masked, top_k=top)
        for place, rows in enumerate(guesses if len(parts) > 2 else [guesses], start=1):
            before, after = "[MASK]".join(parts[:place]), "[MASK]".join(parts[place:])
            yield [(row["token_str"], row["score"], before + row["token_str"] + after) for row in rows]
