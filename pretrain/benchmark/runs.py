"""The commands of this project as a user runs them, on the device of the benchmark: do they end well, and do their numbers agree?

Imports no torch, so that the time of a check is that of its commands."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pretrain.benchmark.processes import ROOT, last_lines, start, stop
from pretrain.files import read_json

POLL_SECONDS = 0.05
LOG_LINES, SHOWN_LINES = 30, 8  # in the report, of a command that failed; in the log
FREQUENT_WORDS = 200  # so that each comes in some training row
WORDS_A_ROW, TRAINING_ROWS, OTHER_ROWS = 12, 512, 128
FINETUNING_STEPS = 60
MASKED_TEXT = "Return True [MASK] the object is a string."
LEAST_F1, F1_TOLERANCE = (
    0.9,
    0.02,
)  # of rows that a word tells apart; of bf16 against bf16 in other batches
RESUMED_TOLERANCE = 0.02  # of a logged loss, in bf16 with atomic sums
LEAST_FALL = 0.05  # of the loss in a run of some hundred steps


class Command:
    """A command of scripts/ that has been started, with its output in a file."""

    def __init__(self, folder: Path, name: str, script: str, arguments: list[str]):
        self.log, self.begin = folder / f"{name}.log", time.perf_counter()
        self.process = start([str(ROOT / "scripts" / f"{script}.py"), *arguments], self.log)

    def wait(self) -> dict:
        """What it leaves: exit code, seconds, the JSON of its last line, the end of its log where it failed."""
        code = self.process.wait()
        result = {"exit_code": code, "seconds": time.perf_counter() - self.begin}
        if code != 0:
            return result | {"log": last_lines(self.log, LOG_LINES)}
        try:
            values = json.loads(last_lines(self.log))
        except ValueError:
            values = None
        return result | {"result": values}

    def stop(self) -> None:
        """End it at once, and show the end of its output."""
        stop(self.process, signal.SIGKILL)
        print(f"-- {self.log.stem}:\n{last_lines(self.log, SHOWN_LINES)}")


def pretraining_options(options, output: Path, **more: object) -> list[str]:
    """Flags of pretrain.py for a run on the text of the benchmark."""
    chosen = {
        "model": options.model,
        "format": options.format,
        "vocab-size": options.vocab_size,
        "max-length": options.max_length,
        "batch-size": options.batch_size,
        "micro-batch-size": options.micro_batch_size,
        "device": options.device,
        "compile": options.compile,
        "cache": options.cache,
        "valid-fraction": 0.0,
        "output": output,
        **more,
    }
    flags = [f"--{name}={value}" for name, value in chosen.items()]
    if options.config_override:
        flags += ["--config-override", *options.config_override]
    return ["--train", *options.train, *flags]


def rows_of(output: Path) -> dict[int, dict]:
    """Logged training numbers of a run, by step; a line that is being written is left out."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row for row in rows if "train/loss" in row}


def losses_of(output: Path) -> dict[int, float]:
    """Logged losses of a run, by step."""
    return {step: row["train/loss"] for step, row in rows_of(output).items()}


def checkpoints_of(output: Path) -> list[int]:
    """Steps of the checkpoints of a run."""
    return sorted(
        int(path.name.partition("-")[2])
        for path in output.glob("checkpoint-*")
        if path.name[11:].isdecimal()
    )


def measure_resume(options, folder: Path, note: Callable[[dict], None]) -> None:
    """Losses of a run of `options.steps` steps beside those of one that is killed after two thirds of them and resumed. Both start at
    the same time. Notes what there is also where it is interrupted."""
    steps, outputs = options.steps, {name: folder / name for name in ("whole", "killed")}
    every = max(1, steps // 3)
    more = {"max-steps": steps, "save-every": every, "log-every": 1, "keep": 2, "warmup": 0.1}
    result, before, commands = {"steps": steps, "resumed_from": 0}, {}, {}
    try:
        for name, output in outputs.items():
            flags = pretraining_options(options, output, **more)
            commands[name] = Command(folder, name, "pretrain", flags)
        killed = commands["killed"].process
        while killed.poll() is None and max(losses_of(outputs["killed"]), default=0) < 2 * every:
            time.sleep(POLL_SECONDS)
        commands["killed"].stop()
        before = losses_of(outputs["killed"])
        result["killed_at"] = max(before, default=0)
        result["resumed_from"] = max(checkpoints_of(outputs["killed"]), default=0)
        flags = ["--resume", f"--output={outputs['killed']}"]
        commands["resumed"] = Command(folder, "resumed", "pretrain", flags)
        result["whole"] = commands["whole"].wait()
        result["resumed"] = commands["resumed"].wait()
    finally:
        for command in commands.values():
            command.stop()
        after = losses_of(outputs["killed"])
        note(result | compare(result, losses_of(outputs["whole"]), before, after))


def failures_of(result: dict, names: tuple[str, ...]) -> list[str]:
    """A line for each command that did not end well."""
    codes = {name: result[name]["exit_code"] if name in result else None for name in names}
    return [
        f"{name}: {'did not end' if code is None else f'ended with {code}'}"
        for name, code in codes.items()
        if code != 0
    ]


def compare(
    result: dict, whole: dict[int, float], before: dict[int, float], after: dict[int, float]
) -> dict:
    """Losses of both runs side by side, and their largest relative difference before the kill and after the checkpoint."""
    resumed_from = result["resumed_from"]
    resumed = {step: loss for step, loss in after.items() if step > resumed_from}
    rows = [
        {"step": step, "loss": loss, "loss_resumed": resumed.get(step, before.get(step))}
        for step, loss in sorted(whole.items())
    ]
    compared = [row for row in rows if row["loss_resumed"] is not None]

    def difference(chosen: list[dict]) -> float | None:
        return max((abs(row["loss_resumed"] / row["loss"] - 1) for row in chosen), default=None)

    differences = {
        "before": difference([row for row in compared if row["step"] <= resumed_from]),
        "after": difference([row for row in compared if row["step"] > resumed_from]),
    }
    failed = failures_of(result, ("whole", "resumed"))
    if not resumed_from or not resumed or len(compared) < len(whole):
        failed.append(
            f"resumed from step {resumed_from}, {len(compared)} of {len(whole)} losses to compare"
        )
    elif compared and differences["after"] > max(RESUMED_TOLERANCE, 2 * differences["before"]):
        failed.append(f"losses of the resumed run differ by {differences['after']:.2%}")
    return {"rows": rows, "largest_relative_difference": differences, "failed": failed}


def measure_fp16(options, folder: Path, has_gpu: bool, note: Callable[[dict], None]) -> None:
    """Losses, loss scales and skipped steps of a run in fp16; in fp32 on a CPU, which has no fp16. Notes what there is also where it is
    interrupted."""
    output, result = folder / "run", {"precision": "fp16" if has_gpu else "fp32"}
    more = {
        "max-steps": options.steps,
        "log-every": max(1, options.steps // 30),
        "learning-rate": 5e-4,
    }
    flags = pretraining_options(options, output, precision=result["precision"], **more)
    command = Command(folder, "fp16", "pretrain", flags)
    try:
        result["run"] = command.wait()
    finally:
        command.stop()
        rows = [
            {"step": step, "loss": row["train/loss"], "loss_scale": row.get("optim/loss_scale")}
            for step, row in sorted(rows_of(output).items())
        ]
        failed, summary = failures_of(result, ("run",)), output / "summary.json"
        # A loss that is not finite is not logged.
        if not failed and not rows[-1]["loss"] < (1 - LEAST_FALL) * rows[0]["loss"]:
            failed.append(
                f"the loss does not fall: from {rows[0]['loss']:.4f} to {rows[-1]['loss']:.4f}"
            )
        skipped = read_json(summary)["skipped_steps"] if summary.is_file() else None
        note(result | {"rows": rows, "skipped_steps": skipped, "failed": failed})


def write_rows(text: Path, folder: Path) -> dict[str, Path]:
    """Labelled rows of random frequent words of a text: those first in the alphabet against the others."""
    found = Counter(re.findall(r"[a-z]{3,}", text.read_text(encoding="utf-8").lower()))
    words = sorted(word for word, _ in found.most_common(FREQUENT_WORDS))
    halves, source, paths = (
        (words[: len(words) // 2], words[len(words) // 2 :]),
        random.Random(0),
        {},
    )
    for name, count in (("train", TRAINING_ROWS), ("valid", OTHER_ROWS), ("test", OTHER_ROWS)):
        lines = ["text\tlabel"]
        for number in range(count):
            row = " ".join(source.choices(halves[number % 2], k=WORDS_A_ROW))
            lines.append(f"{row}\t{('first', 'second')[number % 2]}")
        paths[name] = folder / f"{name}.tsv"
        paths[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def measure_use(options, folder: Path, note: Callable[[dict], None]) -> None:
    """Fine-tuning, then prediction with its model; evaluation and masks that are filled beside them. `options.model` is a model that
    was pretrained on the text. Notes what there is also where it is interrupted."""
    text, output, predictions = (
        Path(options.train[0]),
        folder / "classifier",
        folder / "predictions.csv",
    )
    model, device = f"--model={options.model}", f"--device={options.device}"
    paths, result, commands = write_rows(text, folder), {}, {}
    finetuning = [
        *(f"--{name}={path}" for name, path in paths.items()),
        f"--max-steps={FINETUNING_STEPS}",
        f"--eval-every={FINETUNING_STEPS // 2}",
        "--learning-rate=5e-4",
        f"--output={output}",
    ]
    evaluation = [
        f"--input={text}",
        f"--format={options.format}",
        f"--cache={options.cache}",
        "--eval-tokens=20000",
    ]
    prediction = [
        f"--model={output}",
        device,
        f"--input={paths['test']}",
        f"--output={predictions}",
    ]
    try:
        commands["finetune"] = Command(folder, "finetune", "finetune", [model, device, *finetuning])
        commands["evaluate"] = Command(folder, "evaluate", "evaluate", [model, device, *evaluation])
        commands["fill_mask"] = Command(folder, "fill_mask", "fill_mask", [model, MASKED_TEXT])
        result["finetune"] = commands["finetune"].wait()
        commands["predict"] = Command(folder, "predict", "predict", prediction)
        for name in ("evaluate", "fill_mask", "predict"):
            result[name] = commands[name].wait()
    finally:
        for command in commands.values():
            command.stop()
        failed, scores = failures_of(result, ("finetune", "predict", "evaluate", "fill_mask")), {}
        if not failed:
            scores["finetune"] = result["finetune"]["result"]["test_macro_f1"]
            scores["predict"] = result["predict"]["result"]["macro_f1"]
            if (
                min(scores.values()) < LEAST_F1
                or abs(scores["finetune"] - scores["predict"]) > F1_TOLERANCE
            ):
                failed.append(
                    f"macro F1 of the test rows: {scores['finetune']:.3f} as fine-tuned, {scores['predict']:.3f} as predicted"
                )
        note(result | {"macro_f1": scores, "failed": failed})


def measure_tests(paths: list[str], folder: Path, note: Callable[[dict], None]) -> None:
    """Outcome of the tests that need a GPU; they are skipped where there is none. Notes what there is also where it is interrupted."""
    log, begin, result = folder / "tests.log", time.perf_counter(), {"exit_code": None}
    process = start(["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *paths], log)
    try:
        result["exit_code"] = process.wait()
    finally:
        stop(process, signal.SIGKILL)
        print(last_lines(log, 4 * LOG_LINES))
        result |= {"seconds": time.perf_counter() - begin, "summary": last_lines(log)}
        if result["exit_code"] != 0:
            result["log"] = last_lines(log, 4 * LOG_LINES)
        note(result | {"failed": failures_of({"pytest": result}, ("pytest",))})
