"""The peer of the benchmark: transformers.Trainer with the stock model, at its fastest settings.

Imports nothing from `pretrain`, so its process starts as fast as that of a Trainer user."""

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

LOADER_WORKERS = 8  # on a GPU: the collator is in Python, and one process would be too slow


@dataclass(frozen=True)
class Peer:
    """Everything that a Trainer needs; small enough to send to another process."""

    rows: list[dict]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    arguments: dict  # of TrainingArguments
    masks: dict  # of DataCollatorForLanguageModeling

    def make_model(self) -> torch.nn.Module:
        """The stock model, from scratch; with the NSP head if the rows have labels."""
        has_pairs = "next_sentence_label" in self.rows[0]
        stock = AutoModelForPreTraining if has_pairs else AutoModelForMaskedLM
        return stock.from_config(copy.deepcopy(self.config), attn_implementation="sdpa")

    def train(self, folder: str, steps: int, *callbacks, resume=None, **changed: object) -> None:
        """Train without output; `changed` are TrainingArguments."""
        values = {"save_strategy": "no", **self.arguments, "max_steps": steps, **changed}
        arguments = TrainingArguments(folder, **values)
        collator = DataCollatorForLanguageModeling(self.tokenizer, **self.masks)
        model, callbacks = self.make_model(), list(callbacks)
        trainer = Trainer(model, arguments, collator, self.rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)

    def train_in_turns(
        self, turns: Connection, folder: str, steps: int, pace: Pace, more: dict
    ) -> None:
        """Train in a separate process, one block of steps per turn; `more` goes to `train`."""
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
    """The peer of `run` on `rows`: the same batch, accumulation, precision and learning rate.

    On a GPU it is compiled and padded to one length, its fastest way; elsewhere it is padded to the
    longest sequence of a batch."""
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
        "gradient_checkpointing": config.gradient_checkpointing or None,
        "torch_compile": is_fixed,
        "use_cpu": not on_gpu,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_num_workers": LOADER_WORKERS if on_gpu else run.data.workers,
        "logging_nan_inf_filter": False,  # it would wait for the device at every step
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
    return Peer(rows, run.model.config, run.tokenizer, arguments, masks)
