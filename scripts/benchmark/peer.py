"""The peer of the benchmark: transformers.Trainer with the stock model, set as fast as it goes.

Imports nothing of ours that its users would not: its process starts as quickly as one of theirs."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import transformers
from torch._dynamo.utils import counters
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

LOADER_WORKERS = 8  # on a GPU: its collator is Python, and one process would hold the device up


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def begin_clock(device: torch.device) -> float:
    """The time, once the device is idle; its peak memory counts from here on."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter()


def end_clock(device: torch.device, begin: float) -> dict[str, float]:
    """Seconds since `begin`, peak memory of a GPU, and what torch.compile did so far.

    Memory that no tensor uses goes back to the GPU, for the other side."""
    synchronize(device)
    seconds, peak = time.perf_counter() - begin, 0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
    compiled = {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    return {"seconds": seconds, "peak_bytes": peak, **compiled}


@dataclass(frozen=True)
class Peer:
    """All that a Trainer needs; small enough to travel to a process of its own."""

    rows: list[dict]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    arguments: dict  # of TrainingArguments
    masks: dict  # of DataCollatorForLanguageModeling
    gradient_checkpointing: bool

    def make_model(self) -> torch.nn.Module:
        """The stock model, from scratch; with the NSP head if the rows have labels."""
        stock = transformers.AutoModelForPreTraining
        if "next_sentence_label" not in self.rows[0]:
            stock = transformers.AutoModelForMaskedLM
        model = stock.from_config(copy.deepcopy(self.config), attn_implementation="sdpa")
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def train(
        self, folder: str, steps: int, *callbacks: TrainerCallback, resume=False, **changed: object
    ) -> None:
        """Train and print nothing; `changed` are TrainingArguments."""
        values = {"save_strategy": "no", **self.arguments, "max_steps": steps, **changed}
        trainer = transformers.Trainer(
            self.make_model(),
            transformers.TrainingArguments(folder, **values),
            transformers.DataCollatorForLanguageModeling(self.tokenizer, **self.masks),
            self.rows,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume or None)

    def run_in_turns(
        self, turns: Connection, folder: str, steps: int, untimed: int, timed: int, **more: object
    ) -> None:
        """Train in a process of its own, a block of steps each turn; `more` goes to `train`."""
        rows, batch = self.rows, self.arguments["per_device_train_batch_size"]
        batch *= self.arguments["gradient_accumulation_steps"]

        class TakeTurns(TrainerCallback):
            def on_train_begin(self, arguments, state, control, **_) -> None:
                turns.recv()
                self.first_begin = self.begin = begin_clock(arguments.device)

            def on_step_end(self, arguments, state, control, **_) -> None:
                step, device = state.global_step, arguments.device
                if step % (untimed + timed) == 0:
                    block = end_clock(device, self.begin)
                    trained = rows[batch * (step - timed) : batch * step]
                    block["tokens"] = sum(len(row["input_ids"]) for row in trained)
                    block["untimed_seconds"] = self.begin - self.first_begin
                    turns.send(block)
                    if step < steps:
                        self.on_train_begin(arguments, state, control)
                elif step % (untimed + timed) == untimed:
                    self.begin = begin_clock(device)

        self.train(folder, steps, TakeTurns(), **more)


def describe(run, rows: list[dict]) -> Peer:
    """The peer of `run` over `rows`: the same batch, accumulation, precision and rate.

    On a GPU it is compiled and padded to one length, which is its best there; elsewhere padded to
    the longest sequence of a batch."""
    config, on_gpu = run.config, run.device.type == "cuda"
    is_fixed = on_gpu and run.compile
    arguments = {
        "per_device_train_batch_size": run.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // run.micro_batch_size,
        "optim": "adamw_torch_fused",
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": run.precision == "bf16",
        "fp16": run.precision == "fp16",
        "torch_compile": is_fixed,
        "use_cpu": not on_gpu,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_num_workers": LOADER_WORKERS if on_gpu else run.data.workers,
        "logging_nan_inf_filter": False,  # it would wait for the device in every step
        "logging_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    mask_share, random_share, _ = config.mask_split
    masks = {
        "mlm_probability": config.mask_rate[0],
        "mask_replace_prob": mask_share,
        "random_replace_prob": random_share,
        "pad_to_multiple_of": run.phases[0].max_length if is_fixed else None,
    }
    model_config, checkpointing = run.model.config, config.gradient_checkpointing
    return Peer(rows, model_config, run.tokenizer, arguments, masks, checkpointing)
