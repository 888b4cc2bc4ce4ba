"""Limits of the device: the largest micro-batch, and the difference from fp32 on the CPU."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pretrain.batch import Batch
from pretrain.data.loader import PretrainingDataset
from pretrain.model.attention import VARLEN
from pretrain.model.loading import from_size
from pretrain.model_setup import set_up_model
from pretrain.runtime.memory import is_full, trial_seconds
from pretrain.runtime.optim import autocast
from pretrain.train import train_step
from scripts.benchmark.peer import describe
from scripts.benchmark.rows import blocks

MAX_MICRO_BATCH = 1 << 14  # tried on a GPU
EXACTNESS = 16  # the answer is at most 1/16 too low
NUMERICS_SEQUENCES = 8
TOLERANCE = 0.02  # relative, of bf16


def measure_largest(bench) -> Iterator[dict]:
    """The number of max_length sequences that fit the device, in eager mode with AdamW's state.

    On a CPU, at most twice the micro-batch: that tests the search, not the memory."""
    run, sequences = bench.make_run(), {}
    cap = MAX_MICRO_BATCH if run.device.type == "cuda" else 2 * run.micro_batch_size
    for side, fits in (("ours", ours_fits), ("peer", partial(peer_fits, folder=bench.folder))):
        sequences[side] = largest(partial(fits, run), cap)
        yield {"sequences": sequences}


def largest(fits: Callable[[int], bool], cap: int) -> int:
    """The largest size up to `cap` that fits, by doubling and then bisecting; 0 if none does."""
    low, high = 0, 1
    while high <= cap and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // EXACTNESS) and high <= cap:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def ours_fits(run, size: int) -> bool:
    """Whether the fullest micro-batch of `size` sequences passes the trial of a run."""
    batch = fullest_batch(run, size, run.phases[0].collator.fill).to(run.device)
    return trial_seconds(run.model, batch, run.autocast()) is not None


def peer_fits(run, size: int, folder: Path) -> bool:
    """Whether a Trainer has memory for two steps (the second one with AdamW's state) of `size`
    sequences of max_length."""
    label = {"next_sentence_label": 0} if run.phases[0].dataset.task.pairs else {}
    rows = [row | label for row in blocks(run, 2 * size)]
    eager = {"torch_compile": False, "dataloader_num_workers": 0}
    batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 1}
    gc.collect()  # cycles may keep the previous trainer
    torch.cuda.empty_cache()  # a no-op on a CPU
    try:
        describe(run, rows).train(str(folder), 2, **eager, **batch)
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        return False
    return True


def fullest_batch(run, size: int, fill: bool) -> Batch:
    """The micro-batch with the most tokens if the run had micro-batches of `size` sequences."""
    phase = run.phases[0]
    task = replace(phase.dataset.task, micro_batch_size=size)
    dataset = PretrainingDataset(phase.dataset.source, task)
    return replace(phase.collator, task=task, fill=fill)(dataset[dataset.fullest()])


def measure_numerics(bench) -> Iterator[dict]:
    """Relative difference of loss and gradient norm between the device, as the run uses it, and
    fp32 on the CPU: a tiny model without dropout, on the same examples and masks."""
    run, numbers, no_dropout = bench.make_run(), [], ["hidden_dropout_prob=0"]
    vocabulary, length = run.phases[0].collator.vocabulary, run.phases[0].max_length
    tested = (run.device, run.precision, run.compile)
    exact = (torch.device("cpu"), "fp32", False)
    for device, precision, is_compiled in (tested, exact):
        torch.manual_seed(0)
        model = from_size("tiny", vocabulary.size, length, vocabulary.pad_id, no_dropout)
        set_up_model(model.to(device).train(), run.config, device, precision)
        batch = fullest_batch(run, NUMERICS_SEQUENCES, fill=model.attention == VARLEN)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)]
        scaler, context = torch.amp.GradScaler(enabled=False), autocast(device, precision)
        trained = torch.compile(model) if is_compiled else model
        result = train_step(trained, [batch], optimizers, scaler, context, 0.0, 1.0, device)
        loss = result.losses.read(device).means()["mlm_loss"]
        numbers.append((loss, float(result.logged["optim/grad_norm"])))
    for name, value, reference in zip(("loss", "grad_norm"), *numbers):
        difference = abs(value - reference) / reference
        yield {f"{name}_difference": {"ours": difference, "goal": TOLERANCE}}
