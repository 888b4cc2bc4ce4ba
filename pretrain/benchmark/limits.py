"""Limits of the device: the largest micro-batch of each side, and how far its numbers are from fp32 on the CPU."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

import torch

from pretrain.batch import IGNORED
from pretrain.benchmark.peer import describe
from pretrain.benchmark.rows import same_examples
from pretrain.data.dataset import PretrainingDataset
from pretrain.model.attention import VARLEN, choose_attention
from pretrain.model.bert import from_size
from pretrain.runtime.faults import is_full
from pretrain.runtime.optim import autocast, make_optimizer
from pretrain.train import train_step

MAX_MICRO_BATCH = 1 << 14  # that is tried on a GPU
EXACTNESS = 16  # the answer is at most a 16th too low
NUMERICS_SEQUENCES = 8
TOLERANCE = 0.02  # relative, of bf16


def measure_largest(run) -> dict:
    """Sequences of max_length that fit the device at once, in eager mode with the optimizer's averages; on a CPU up to twice the
    micro-batch: that tries the search, not the memory."""
    cap = MAX_MICRO_BATCH if run.device.type == "cuda" else 2 * run.config.micro_batch_size
    attempts = {"ours": our_steps, "peer": peer_steps}
    found = {
        side: largest(lambda size, side=side: fits(attempts[side], run, size), cap)
        for side in attempts
    }
    return {"sequences": found, "max_length": run.dataset.task.max_length}


def largest(fits: Callable[[int], bool], cap: int) -> int:
    """The largest size up to `cap` that fits, by doubling and then bisecting; 0 where none does."""
    low, high = 0, 1
    while high <= cap and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // EXACTNESS) and high <= cap:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits(attempt: Callable[[object, int], None], run, size: int) -> bool:
    """Whether two steps of `size` sequences find room; the second has the averages that the first makes."""
    gc.collect()  # what came before may be kept alive by circles, or by an error
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        attempt(run, size)
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        return False
    return True


def our_steps(run, size: int) -> None:
    """Two steps of ours with a micro-batch of `size`, as full as the text fills it."""
    config, task = run.config, dataclasses.replace(run.dataset.task, micro_batch_size=size)
    dataset, collator = (
        PretrainingDataset(run.dataset.source, task),
        dataclasses.replace(run.collator, task=task),
    )
    batch = collator(dataset.__getitems__([dataset.fullest()]))
    optimizer = make_optimizer(run.model.train(), 0.0, 0.0, config.adam_betas, config.adam_epsilon)
    try:
        for _ in range(2):
            result = train_step(
                run.model,
                run.model.loss_weights,
                [batch],
                optimizer,
                torch.amp.GradScaler(enabled=False),
                autocast(run.device, run.precision),
                0.0,
                config.max_grad_norm,
                run.device,
            )
        result.grad_norm.item()  # waits: a GPU tells late
    finally:
        run.model.zero_grad(set_to_none=True)


def peer_steps(run, size: int) -> None:
    """Two steps as Trainer makes them: every sequence as long as max_length."""
    width, device = run.dataset.task.max_length, run.device
    model = describe(run, same_examples(run, 1)).make_model().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    ids = torch.randint(run.collator.vocabulary.size, (size, width), device=device)
    is_masked = torch.rand(ids.shape, device=device) < run.config.mask_rate[0]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(is_masked, ids, IGNORED),
    }
    if "nsp" in run.model.loss_weights:
        inputs["next_sentence_label"] = ids[:, 0] % 2
    for _ in range(2):
        with autocast(device, run.precision):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loss.item()


def measure_numerics(run) -> dict:
    """Relative difference of loss and gradient norm between the device, as the run uses it, and fp32 on the CPU: a tiny model without
    dropout on the same examples and masks."""
    task = dataclasses.replace(run.dataset.task, micro_batch_size=NUMERICS_SEQUENCES)
    dataset, vocabulary, numbers = (
        PretrainingDataset(run.dataset.source, task),
        run.collator.vocabulary,
        [],
    )
    for device, precision, compiled in (
        (run.device, run.precision, run.compile),
        (torch.device("cpu"), "fp32", False),
    ):
        torch.manual_seed(0)
        model = (
            from_size(
                "tiny",
                vocabulary.size,
                task.max_length,
                vocabulary.pad_id,
                ["hidden_dropout_prob=0"],
            )
            .to(device)
            .train()
        )
        model.attention = choose_attention(device, precision)
        model.set_objective(task.objective)
        collator = dataclasses.replace(run.collator, task=task, fill=model.attention == VARLEN)
        batch = collator(dataset.__getitems__([dataset.fullest()]))
        result = train_step(
            torch.compile(model) if compiled else model,
            model.loss_weights,
            [batch],
            make_optimizer(model, 0.0, 0.0, [0.9, 0.999], 1e-6),
            torch.amp.GradScaler(enabled=False),
            autocast(device, precision),
            0.0,
            0.0,
            device,
        )
        numbers.append(
            {
                "loss": (result.sums["mlm_loss"] / result.sums["mlm_count"]).item(),
                "grad_norm": result.grad_norm.item(),
            }
        )
    tested, exact = numbers
    return {
        f"{name}_difference": {
            "ours": abs(tested[name] - exact[name]) / exact[name],
            "goal": TOLERANCE,
        }
        for name in exact
    }
