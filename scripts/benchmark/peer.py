"""The peer of the benchmark: transformers.Trainer with the stock model, set as fast as it goes.

Imports nothing of ours that its users would not: its process starts as quickly as one of theirs."""

import copy
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from scripts.benchmark.clock import Clock, Pace

LOADER_WORKERS = 8  # on a GPU: its collator is Python, and one process would hold the device up


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
        has_pairs = "next_sentence_label" in self.rows[0]
        stock = AutoModelForPreTraining if has_pairs else AutoModelForMaskedLM
        model = stock.from_config(copy.deepcopy(self.config), attn_implementation="sdpa")
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def train(self, folder: str, steps: int, *callbacks, resume=None, **changed: object) -> None:
        """Train and print nothing; `changed` are TrainingArguments."""
        values = {"save_strategy": "no", **self.arguments, "max_steps": steps, **changed}
        arguments = TrainingArguments(folder, **values)
        collator = DataCollatorForLanguageModeling(self.tokenizer, **self.masks)
        made = (self.make_model(), arguments, collator, self.rows)
        trainer = Trainer(*made, callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)

    def train_in_turns(
        self, turns: Connection, folder: str, steps: int, pace: Pace, more: dict
    ) -> None:
        """Train in a process of its own, a block of steps each turn; `more` goes to `train`."""
        rows, batch = self.rows, self.arguments["per_device_train_batch_size"]
        batch *= self.arguments["gradient_accumulation_steps"]

        class TakeTurns(TrainerCallback):
            def on_train_begin(self, arguments, state, control, **_) -> None:
                self.clock = Clock(turns, arguments.device, pace)

            def on_step_end(self, arguments, state, control, **_) -> None:
                trained = rows[batch * (state.global_step - 1) : batch * state.global_step]
                self.clock.end_step(sum(len(row["input_ids"]) for row in trained))

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
