"""What a run shows: a progress bar (lines where stderr is no terminal), TensorBoard, and the same numbers in metrics.jsonl."""
from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from pretrain.command import UserError
from pretrain.files import write_text

LINE_SECONDS = 5.0  # between lines where there is no progress bar
PRETRAINING_CHARTS = {
    "perplexity": {"training and held-out": ["Multiline", ["train/perplexity", "eval/perplexity", "eval/unigram_perplexity"]]},
    "loss": {"MLM, training and held-out": ["Multiline", ["train/mlm_loss", "eval/mlm_loss"]],
             "NSP, training and held-out": ["Multiline", ["train/nsp_loss", "eval/nsp_loss"]]}}


class Monitor:
    """Writes the numbers of a run. Rows from `first_row` on are cut, from metrics.jsonl and from TensorBoard: a run that goes
    on after a crash writes them again. With `active` off (other processes than the first) it does nothing; with `quiet` it shows
    no bar and no lines of numbers."""

    def __init__(self, output: Path, first_row: int, total_steps: int, options: dict, active: bool = True,
                 charts: dict = PRETRAINING_CHARTS, score: str = "eval/perplexity", quiet: bool = False):
        self.active, self.total_steps, self.quiet = active, total_steps, quiet
        if not active:
            return
        self.path = output / "metrics.jsonl"
        _cut(self.path, first_row)
        self.file = self.path.open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(output), purge_step=first_row)
        self.options = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in options.items()}
        if first_row == 0:
            self.writer.add_custom_scalars(charts)
            self._hyperparameters({score: math.nan})
        self.begin, self.first_step, self.last_line = time.monotonic(), max(0, first_row - 1), 0.0
        self.bar = tqdm(total=total_steps, initial=self.first_step, unit="step", disable=quiet or None, dynamic_ncols=True, smoothing=0.05)

    def _hyperparameters(self, metrics: dict[str, float]) -> None:
        # The parts of SummaryWriter.add_hparams, which would open a second event file and show the run twice.
        for summary in hparams(self.options, metrics):
            self.writer.file_writer.add_summary(summary)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Write the numbers of `step`, if there are any, once: one row of metrics.jsonl, one point of each curve."""
        if not self.active or not numbers:
            return
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}  # a skipped step's are not, nor JSON
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.file.flush()
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self._show(step, numbers)

    def _show(self, step: int, numbers: dict[str, float]) -> None:
        shown = {"loss": numbers.get("train/loss"), "ppl": numbers.get("train/perplexity"),
                 "tokens/s": numbers.get("speed/tokens_per_second")}
        shown = {name: f"{value:,.0f}" if name == "tokens/s" else f"{value:.4g}" for name, value in shown.items() if value is not None}
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        if self.quiet:
            return
        if any(name.startswith("eval/") for name in numbers):
            parts = [f"{name.removeprefix('eval/').replace('_', ' ')} {value:.4g}" for name, value in numbers.items()
                     if name.startswith("eval/") and not name.endswith("loss")]
            self.say(f"step {step}: held-out {', '.join(parts)}")
        elif self.bar.disable and shown and time.monotonic() - self.last_line >= LINE_SECONDS:
            left = (time.monotonic() - self.begin) / max(1, step - self.first_step) * (self.total_steps - step)
            self.last_line = time.monotonic()
            self.say(f"step {step}/{self.total_steps}: " + ", ".join(f"{name} {value}" for name, value in shown.items())
                     + f", {left / 60:.1f} min left")

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.active:
            self.bar.update()

    def text(self, step: int, name: str, markdown: str) -> None:
        """A panel of TensorBoard's text tab."""
        if self.active:
            self.writer.add_text(name, markdown, step)

    def say(self, message: str | None) -> None:
        """A line for the user, if there is one, on stderr, above the progress bar."""
        if self.active and message:
            tqdm.write(message, file=sys.stderr)

    def flush(self) -> None:
        """Everything so far to disk; called before a checkpoint. UserError where the run's folder is no longer where it was."""
        if self.active:
            if not self.path.is_file() or not os.path.samestat(self.path.stat(), os.fstat(self.file.fileno())):
                raise UserError(f"{self.path.parent}: has been moved or removed while its run was at work; --resume goes on there")
            self.writer.flush()
            os.fsync(self.file.fileno())

    def close(self, metrics: dict[str, float]) -> None:
        """Write the hyper-parameters with the run's last `metrics` and close the files."""
        if self.active:
            self._hyperparameters(metrics)
            self.bar.close()
            self.writer.close()
            self.file.close()


def _cut(path: Path, first_row: int) -> None:
    """Drop the rows from step `first_row` on, and a row that a crash has cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] < first_row:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that was in use: of the GPU by torch, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
