"""The peer of the benchmark: transformers.Trainer with the stock model and DataCollatorForLanguageModeling, set as fast as it goes.

Imports nothing of ours but what describes the task, so that a process of its own starts as quickly as one of its users'."""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch._dynamo.utils import counters
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from pretrain.benchmark.processes import answer, wait_for_turn

LOADER_WORKERS = 8  # on a GPU: its collator is Python, and one process would hold the device up
COMPILED = ("graphs", "graph_breaks")
FIRST_STEP = "first-step"  # file that a process on its own writes once that is done


@dataclass(frozen=True)
class Rows(Dataset):
    """Sequences without masks; a row is lists of numbers, as a tokenized data set of `datasets` gives it."""

    ids: np.ndarray  # [T]
    token_types: np.ndarray  # [T]
    is_special: np.ndarray  # bool [T]
    offsets: np.ndarray  # [N + 1]
    labels: np.ndarray | None  # [N], next_sentence_label

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict:
        place = slice(*self.offsets[index : index + 2])
        columns = {
            "input_ids": self.ids,
            "token_type_ids": self.token_types,
            "special_tokens_mask": self.is_special,
        }
        row = {name: array[place].tolist() for name, array in columns.items()}
        return (
            row if self.labels is None else row | {"next_sentence_label": int(self.labels[index])}
        )


@dataclass(frozen=True)
class Peer:
    """All that a Trainer needs; small enough to travel to a process of its own."""

    rows: Rows
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    arguments: dict  # of TrainingArguments
    masks: dict  # of DataCollatorForLanguageModeling
    gradient_checkpointing: bool

    def make_model(self) -> torch.nn.Module:
        """The stock model, from scratch: with the NSP head where the rows have labels."""
        stock = (
            transformers.AutoModelForMaskedLM
            if self.rows.labels is None
            else transformers.AutoModelForPreTraining
        )
        model = stock.from_config(copy.deepcopy(self.config), attn_implementation="sdpa")
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def make_trainer(
        self, folder: str, steps: int, callback: TrainerCallback, **more: object
    ) -> transformers.Trainer:
        """A Trainer for `steps`, which tells nothing; `more` are TrainingArguments."""
        arguments = transformers.TrainingArguments(
            folder, max_steps=steps, **{"save_strategy": "no", **self.arguments, **more}
        )
        collator = transformers.DataCollatorForLanguageModeling(self.tokenizer, **self.masks)
        trainer = transformers.Trainer(
            self.make_model(), arguments, collator, self.rows, callbacks=[callback]
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run_alone(self, folder: str, steps: int, resume: bool) -> None:
        """Train to step `steps` and save, in a process of its own; tells of the first step by a file, and of a GPU's peak memory in it."""

        class Tell(TrainerCallback):
            def on_step_end(self, arguments, state, control, **_) -> None:
                synchronize(arguments.device)
                Path(folder, FIRST_STEP).touch()

        self.make_trainer(folder, steps, Tell(), save_strategy="steps", save_steps=steps).train(
            resume_from_checkpoint=resume or None
        )
        Path(folder, FIRST_STEP).write_text(
            str(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0),
            encoding="utf-8",
        )

    def run_in_turns(
        self, channel: object, folder: str, steps: int, block_steps: int, untimed_steps: int
    ) -> None:
        """Train in a process of its own, in blocks of `untimed_steps` and `block_steps`: a line of stdin starts a block, a line of
        stdout answers with what it took."""

        class TakeTurns(TrainerCallback):
            def wait(self, device: torch.device) -> None:
                wait_for_turn()
                self.compiled = compiled_so_far()
                self.block_begin = self.begin = begin_block(device)

            def on_train_begin(self, arguments, state, control, **_) -> None:
                self.wait(arguments.device)

            def on_step_end(self, arguments, state, control, **_) -> None:
                done = state.global_step % (untimed_steps + block_steps)
                if done == 0:
                    block = end_block(arguments.device, self.begin)
                    block["untimed_seconds"] = self.begin - self.block_begin
                    answer(channel, block | (compiled_so_far() - self.compiled))
                    if state.global_step < steps:
                        self.wait(arguments.device)
                elif done == untimed_steps:
                    self.begin = begin_block(arguments.device)

        self.make_trainer(folder, steps, TakeTurns()).train()


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def begin_block(device: torch.device) -> float:
    """Start the clock of a few steps, for `end_block`."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter()


def end_block(device: torch.device, begin: float) -> dict[str, float]:
    """Seconds since `begin`, and the peak memory of a GPU since then (0 elsewhere). Memory that no tensor uses goes back to the GPU,
    for the other side."""
    synchronize(device)
    seconds, peak = time.perf_counter() - begin, 0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
    return {"seconds": seconds, "peak_bytes": peak}


def compiled_so_far() -> Counter:
    """What torch.compile has done in this process: graphs that it made, and places where it had to leave one."""
    return Counter(
        dict(
            zip(
                COMPILED,
                (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())),
            )
        )
    )


def describe(run, rows: Rows) -> Peer:
    """The peer of `run` over `rows`: the same batch, accumulation, precision and rate; on a GPU compiled and padded to one length, which
    is its best there, elsewhere padded to the longest of a batch."""
    config, fixed = run.config, run.device.type == "cuda" and run.compile
    arguments = {
        "per_device_train_batch_size": config.micro_batch_size,
        "optim": "adamw_torch_fused",
        "learning_rate": config.learning_rate,
        "gradient_accumulation_steps": config.batch_size // config.micro_batch_size,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": run.precision == "bf16",
        "fp16": run.precision == "fp16",
        "torch_compile": fixed,
        "use_cpu": run.device.type == "cpu",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_num_workers": LOADER_WORKERS if run.device.type == "cuda" else config.workers,
        "logging_nan_inf_filter": False,  # it would wait for the device in every step
        "logging_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    mask, random, _ = config.mask_split
    masks = {
        "mlm_probability": config.mask_rate[0],
        "mask_replace_prob": mask,
        "random_replace_prob": random,
        "pad_to_multiple_of": run.dataset.task.max_length if fixed else None,
    }
    return Peer(
        rows, run.model.config, run.tokenizer, arguments, masks, config.gradient_checkpointing
    )
