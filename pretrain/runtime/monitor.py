"""What a run shows: progress (a bar, or lines if stderr is not a terminal), TensorBoard and
metrics.jsonl."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from pretrain.errors import UserError
from pretrain.files import write_text

LINE_SECONDS = 5.0  # between lines of progress
BAR = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.05}
SHOWN = {
    "train/loss": "loss {:.4g}",
    "train/perplexity": "ppl {:.4g}",
    "speed/tokens_per_second": "tokens/s {:,.0f}",
}
PERPLEXITIES = ["train/perplexity", "eval/perplexity", "eval/unigram_perplexity"]
# TensorBoard's custom scalars. Each loss also gets a chart of its own.
PRETRAINING_CHARTS = {"perplexity": {"training and held-out": ["Multiline", PERPLEXITIES]}}


class Monitor:
    """Writes the numbers of a run from `start_step` on. Deletes rows and events after that step,
    and its evaluation unless `evaluated`. Does nothing unless `active` (the main process); `quiet`
    hides the bar and the numbers."""

    def __init__(
        self,
        output: Path,
        start_step: int,
        total_steps: int,
        options: dict,
        evaluated: bool = True,
        active: bool = True,
        charts: dict = PRETRAINING_CHARTS,
        score: str = "eval/perplexity",
        quiet: bool = False,
    ):
        if not active:
            self.log = self.advance = self.say = self.flush = self.close = lambda *_: None
            return
        self.start_step, self.total_steps, self.quiet = start_step, total_steps, quiet
        self.path = output / "metrics.jsonl"
        kept = _trim_rows(self.path, start_step, evaluated)
        self.file = self.path.open("a", encoding="utf-8")
        first_cut = start_step + 1 if evaluated and start_step else start_step
        self.writer = SummaryWriter(str(output), purge_step=first_cut)
        self.charts = None if kept else charts  # to add with the first numbers
        for row in kept:
            if row["step"] >= first_cut:  # purged with the evaluation of the same step
                self._add_scalars(row)
        self.options = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in options.items()
        }
        if start_step == 0:
            self._hyperparameters({score: math.nan})
        self.begin, self.last_line = time.monotonic(), 0.0
        self.bar = tqdm(total=total_steps, initial=start_step, disable=quiet or None, **BAR)

    def log(self, step: int, values: dict[str, float | str]) -> None:
        """Write the values of `step`: finite numbers to metrics.jsonl and TensorBoard's curves,
        strings to its text tab."""
        row = {"step": step}
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            elif math.isfinite(value):
                row[name] = value
        if len(row) == 1:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self._add_scalars(row)
        if not self.quiet:
            self._show(row)

    def advance(self) -> None:
        self.bar.update()

    def say(self, message: str) -> None:
        """Print a line to stderr, above the progress bar."""
        tqdm.write(message, file=sys.stderr)

    def flush(self) -> None:
        """Write everything so far to disk, before a checkpoint. UserError if the run folder was
        moved or removed."""
        opened = os.fstat(self.file.fileno())
        if not self.path.is_file() or not os.path.samestat(self.path.stat(), opened):
            problem = "was moved or removed during the run; resume it in its new location"
            raise UserError(f"{self.path.parent}: {problem}")
        self.writer.flush()
        os.fsync(self.file.fileno())

    def close(self, metrics: dict[str, float]) -> None:
        """Write the options with the run's last `metrics`, then close the files."""
        self._hyperparameters(metrics)
        for opened in (self.bar, self.writer, self.file):
            opened.close()

    def _add_scalars(self, row: dict[str, float]) -> None:
        if self.charts is not None:  # once in a run: TensorBoard reads the first layout only
            self.writer.add_custom_scalars(_layout(self.charts, row))
            self.charts = None
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])

    def _hyperparameters(self, metrics: dict[str, float]) -> None:
        # SummaryWriter.add_hparams would add a second event file and show the run twice.
        for summary in hparams(self.options, metrics):
            self.writer.file_writer.add_summary(summary)

    def _show(self, row: dict[str, float]) -> None:
        """Evaluation scores as a line; training numbers in the bar, or a line now and then."""
        step, scores = row["step"], []
        for name, value in row.items():
            if name.startswith("eval/") and not name.endswith("loss"):
                scores.append(f"{name.removeprefix('eval/').replace('_', ' ')} {value:.4g}")
        if scores:
            self.say(f"step {step}: validation {', '.join(scores)}")
        shown = ", ".join(text.format(row[name]) for name, text in SHOWN.items() if name in row)
        if shown:
            self.bar.set_postfix_str(shown, refresh=False)
        now = time.monotonic()
        if self.bar.disable and shown and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            seconds_per_step = (now - self.begin) / max(1, step - self.start_step)
            minutes = seconds_per_step * (self.total_steps - step) / 60
            self.say(f"step {step}/{self.total_steps}: {shown}, {minutes:.1f} min left")


def _layout(charts: dict, names: Iterable[str]) -> dict:
    """`charts`, and one more for each loss in `names`."""
    loss_charts = {}
    for loss in sorted({name.partition("/")[2] for name in names if name.endswith("_loss")}):
        title = f"{loss.removesuffix('_loss').upper()}, training and held-out"
        loss_charts[title] = ["Multiline", [f"train/{loss}", f"eval/{loss}"]]
    return charts | {"loss": loss_charts} if loss_charts else charts


def _trim_rows(path: Path, start_step: int, evaluated: bool) -> list[dict]:
    """Delete the rows after `start_step`, its evaluation unless `evaluated`, and partial rows.
    Returns the rows that are left: none if the run starts over."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines(keepends=True):
        try:
            row = json.loads(line)
            if row["step"] == start_step and not evaluated:
                row = {name: value for name, value in row.items() if not name.startswith("eval/")}
            is_kept = row["step"] <= start_step and start_step > 0 and len(row) > 1
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if is_kept and line.endswith("\n"):
            kept.append(row)
    if text:
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
