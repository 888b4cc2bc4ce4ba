"""Where a run stands: the progress that a checkpoint keeps, and the sums since the last logged step."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.batch import PackedBatch
from pretrain.data.dataset import DataPosition
from pretrain.evaluate import read_sums
from pretrain.files import TEXT, integer, real
from pretrain.runtime.optim import AUTOCAST

COUNT = integer(0, 2**53)
NUMBERS = (lambda value: type(value) is dict and all(type(item) in (int, float) for item in value.values()), "an object of numbers")
FLAG = (lambda value: type(value) is bool, "true or false")
POSITION = (lambda value: type(value) is list and len(value) in (3, 4) and all(COUNT[0](number) for number in value[:3])
            and value[3:] in ([], [None]), "a data position")
FORM = {"position": POSITION, "is_logged": FLAG, "finished": FLAG, "best_perplexity": real(0, math.inf),
        **dict.fromkeys(("step", "skipped", "skipped_in_a_row", "best_step", "evaluations_without_gain", "last_eval_step"), COUNT),
        **dict.fromkeys(("phase", "last_eval_phase"), integer(0, 2**53, or_none=True)),  # a checkpoint of an older version has none
        **dict.fromkeys(("totals", "last_train", "last_eval", "row", "window"), NUMBERS)}  # of a Progress, as JSON
TEXT_OR_NONE = (lambda value: value is None or TEXT[0](value), "text, or nothing")
STATE_FORM = {  # of training_state.json, as `saved_values` makes it
    "options": {"epochs": (lambda value: type(value) in (int, float) and value > 0, "a number above 0"), "precision": TEXT,
                "max_steps": integer(0, 2**53), "micro_batch_size": integer(1, 2**53)},
    "asked_micro_batch_size": integer(1, 2**53), "progress": FORM,
    "total_steps": integer(1, 2**53), "steps_per_epoch": integer(1, 2**53), "threads": integer(1, 1024), "processes": integer(1, 1 << 20),
    "precision": (tuple(AUTOCAST).__contains__, "bf16, fp16 or fp32"), "similar_words": TEXT_OR_NONE, "corpus": TEXT,
    "corpus_folders": {"train": TEXT_OR_NONE, "valid": TEXT_OR_NONE}}


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint needs beside weights, optimizer and random states."""

    step: int = 0  # optimizer updates done
    position: DataPosition = DataPosition(0, 0, 0)  # of the next micro-batch, as `phase` cuts them
    phase: int = 0  # its number; the next step may be the first of another
    totals: dict[str, float] = field(default_factory=dict)  # real tokens, sequences, seconds of training; to the last logged step
    skipped: int = 0  # steps that were not finite
    skipped_in_a_row: int = 0
    best_perplexity: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    last_train: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    last_eval_step: int = 0
    last_eval_phase: int = 0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last logged step
    row: dict[str, float] = field(default_factory=dict)  # numbers of this step that are not logged yet
    is_logged: bool = False  # this step has been evaluated and logged; not so where a signal has come before
    finished: bool = False

    def __post_init__(self):
        self.position = DataPosition(*self.position)

    @classmethod
    def restored(cls, saved: dict | None) -> Progress:
        """From what a checkpoint has kept, which fits FORM; None: the start."""
        return cls(**{name: saved[name] for name in FORM if saved.get(name) is not None}) if saved else cls()

    def add_window(self, sums: dict[str, float], numbers: dict[str, float]) -> None:
        """Take over the sums and the means of a window."""
        for name in ("tokens", "sequences", "seconds", "masked", "shortfall"):
            self.totals[name] = self.totals.get(name, 0.0) + sums.get(name, 0.0)
        self.last_train = numbers


@dataclass
class Window:
    """Sums since the last logged step, of this process: losses on the device, the rest on the host."""

    device_sums: dict[str, Tensor]
    host_sums: dict[str, float]

    @classmethod
    def restored(cls, saved: dict[str, float], device: torch.device, is_main: bool) -> Window:
        """The window that a checkpoint has kept; the first process holds it, the others hold zeros."""
        kept = {name: value if is_main else 0.0 for name, value in saved.items()}
        on_device = [name for name in kept if name.endswith(("_loss", "_correct", "_count"))]
        return cls({name: torch.tensor(kept.pop(name), dtype=torch.float64, device=device) for name in on_device}, kept)

    def add(self, sums: dict[str, Tensor], batches: Sequence[PackedBatch], flops: float) -> None:
        """One update: its sums on the device."""
        host = {"tokens": sum(batch.num_tokens for batch in batches), "slots": sum(len(batch.input_ids) for batch in batches),
                "sequences": sum(batch.num_sequences for batch in batches), "flops": flops,
                "masked": sum(batch.counts.get("mlm", 0) for batch in batches), "shortfall": sum(batch.shortfall for batch in batches)}
        for name, value in host.items():
            self.host_sums[name] = self.host_sums.get(name, 0.0) + value
        self.device_sums = {name: self.device_sums.get(name, 0.0) + value for name, value in sums.items()}

    def add_seconds(self, name: str, seconds: float, world_size: int) -> None:
        """Time spent; the sum over the processes is their mean."""
        self.host_sums[name] = self.host_sums.get(name, 0.0) + seconds / world_size

    def read(self, device: torch.device) -> dict[str, float]:
        """The sums over all processes; waits for the device."""
        return read_sums({**self.device_sums, **self.host_sums}, device)


def speed(sums: dict[str, float], peak: float) -> dict[str, float]:
    """The numbers under `speed/`; `peak` is the matrix rate of all devices in FLOP/s."""
    seconds = max(sums["seconds"], 1e-9)
    return {"speed/tokens_per_second": sums["tokens"] / seconds, "speed/mfu": sums["flops"] / seconds / peak,
            "speed/data_wait": sums["wait_seconds"] / seconds, "speed/padding": 1 - sums["tokens"] / sums["slots"]}
