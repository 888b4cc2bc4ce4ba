"""What a run shows: progress (a bar, or lines if stderr is not a terminal), TensorBoard and
metrics.jsonl."""

import json
import math
import os
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from pretrain.errors import UserError, counted
from pretrain.files import as_json, write_text

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
        self.unshown, self.last_line = "", -math.inf
        # The first logged step and its time. Steps up to it may compile, so they are not counted.
        self.timed_from: tuple[int, float] | None = None
        self.bar = tqdm(total=total_steps, initial=start_step, disable=quiet or None, **BAR)

    def log(self, step: int, values: dict[str, float | str]) -> None:
        """Write the values of `step`: numbers to metrics.jsonl (null if not finite) and the finite
        ones to TensorBoard's curves, strings to its text tab."""
        row = {"step": step}
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            else:
                row[name] = value if math.isfinite(value) else None
        if len(row) == 1:
            return
        self.file.write(as_json(row) + "\n")
        self.file.flush()
        self._add_scalars(row)
        if not self.quiet:
            self._show(row)

    def advance(self) -> None:
        """Count a step in the bar."""
        if self.bar.n == self.start_step:
            self.bar.unpause()  # so that its rate ignores the first step, which may compile
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
            charts = dict(self.charts)
            for loss in sorted({name.partition("/")[2] for name in row if name.endswith("_loss")}):
                title = f"{loss.removesuffix('_loss').upper()}, training and held-out"
                numbers = ["Multiline", [f"train/{loss}", f"eval/{loss}"]]
                charts.setdefault("loss", {})[title] = numbers
            self.writer.add_custom_scalars(charts)
            self.charts = None
        for name, value in row.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, row["step"])

    def _hyperparameters(self, metrics: dict[str, float]) -> None:
        # SummaryWriter.add_hparams would add a second event file and show the run twice.
        for summary in hparams(self.options, metrics):
            self.writer.file_writer.add_summary(summary)

    def _show(self, row: dict[str, float | None]) -> None:
        """Evaluation scores as a line; training numbers in the bar or, without one, as a line now
        and then and before each line of scores."""
        step, now = row["step"], time.monotonic()
        scores = []
        for name, value in row.items():
            group, _, score = name.partition("/")
            if group.startswith("eval") and not score.endswith("loss"):
                shown = "not finite" if value is None else f"{value:.4g}"
                text = f"{group.removeprefix('eval_')} " if group != "eval" else ""
                scores.append(f"{text}{score.replace('_', ' ')} {shown}")
        numbers = {name: row.get(name) for name in SHOWN}
        found = [SHOWN[name].format(value) for name, value in numbers.items() if value is not None]
        if found:
            self.bar.set_postfix_str(", ".join(found), refresh=False)
            self.timed_from = self.timed_from or (step, now)
            first, begin = self.timed_from
            if step > first:
                minutes = (now - begin) / (step - first) * (self.total_steps - step) / 60
                found.append(f"{minutes:.1f} min left")
            self.unshown = f"step {step}/{self.total_steps}: {', '.join(found)}"
        is_due = scores or now - self.last_line >= LINE_SECONDS
        if self.bar.disable and self.unshown and is_due:
            self.say(self.unshown)
            self.unshown, self.last_line = "", now
        if scores:
            self.say(f"step {step}: validation {', '.join(scores)}")


def _trim_rows(path: Path, start_step: int, evaluated: bool) -> list[dict]:
    """Delete the rows after `start_step`, its evaluation unless `evaluated`, and partial rows.
    Returns the rows that are left: none if the run starts over."""
    kept, num_damaged = [], 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines(keepends=True):
        try:
            row = json.loads(line)
            if row["step"] == start_step and not evaluated:
                row = {name: value for name, value in row.items() if not name.startswith("eval")}
            is_kept = row["step"] <= start_step and start_step > 0 and len(row) > 1
        except (ValueError, KeyError, TypeError, AttributeError):
            num_damaged += line.endswith("\n")  # else a kill cut it short
            continue
        if is_kept and line.endswith("\n"):
            kept.append(row)
    if num_damaged:
        rows = counted(num_damaged, "row")
        print(f"{path}: {rows} cannot be read and will be missing from the log")
    if path.exists():  # also a pipe, which is replaced
        write_text(path, "".join(as_json(row) + "\n" for row in kept))
    return kept
