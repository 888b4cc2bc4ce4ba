"""Commands of this project, as a user runs them: do they end well, and do their numbers agree?"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pretrain.files import read_json
from scripts.benchmark.processes import Process, start_script, training_rows

POLL_SECONDS = 0.05
FREQUENT_WORDS, WORDS_PER_ROW = 200, 12  # few words: each occurs in some training row
NUM_ROWS = {"train": 512, "valid": 128, "test": 128}
FINETUNING_STEPS = 60
MASKED_TEXT = "Return True [MASK] the object is a string."
LEAST_F1 = 0.9  # on rows that a word tells apart
F1_TOLERANCE = 0.02  # of bf16 beside bf16 in other batches
RESUMED_TOLERANCE = 0.02  # of a logged loss, in bf16 with atomic sums
LEAST_FALL = 0.05  # of the loss, in a run of some hundred steps


@contextlib.contextmanager
def commands(found: dict) -> Iterator[dict[str, Process]]:
    """Commands by name. At the end, also if interrupted, they are stopped and put into `found`."""
    started: dict[str, Process] = {}
    try:
        yield started
        found["failed"] = {}  # it said that the part did not finish
    finally:
        for name, process in started.items():
            found[name] = process.outcome()
            process.stop()
            code = found[name]["exit_code"]
            if code != 0:
                end = "did not end" if code is None else f"ended with {code}"
                found["failed"][name] = f"{end}: {process.tail()}"


def losses_of(output: Path) -> dict[int, float]:
    """Logged losses of a run, by step."""
    return {step: row["train/loss"] for step, row in training_rows(output).items()}


def measure_resume(bench, found: dict) -> None:
    """Losses of a run of --steps steps beside those of one that is killed after two thirds of them
    and resumed. Both start at the same time."""
    folder, steps = bench.folder, bench.options.steps
    every = max(1, steps // 3)
    options = bench.run_options(max_steps=steps, save_every=str(every), log_every=1, keep=2)
    outputs = {name: folder / f"{name}-run" for name in ("whole", "killed")}
    found["resumed_from"] = 0
    try:
        with commands(found) as running:
            for name, output in outputs.items():
                changed = options | {"output": str(output)}
                running[name] = start_script(folder, name, "pretrain", changed)
            killed, output = running["killed"], outputs["killed"]
            while killed.is_running() and max(losses_of(output), default=0) < 2 * every:
                time.sleep(POLL_SECONDS)
            killed.stop()
            del running["killed"]
            names = [path.name for path in output.glob("checkpoint-[0-9]*")]
            found["resumed_from"] = max((int(n.partition("-")[2]) for n in names), default=0)
            changed = {"resume": True, "output": str(output)}
            running["resumed"] = start_script(folder, "resumed", "pretrain", changed)
            for process in running.values():
                process.wait()
    finally:
        compare(found, *map(losses_of, outputs.values()))


def compare(found: dict, whole: dict[int, float], resumed: dict[int, float]) -> None:
    """Losses by step, side by side, and their largest relative difference up to the checkpoint and
    after it."""
    start, differences, found["losses"] = found["resumed_from"], {"before": [], "after": []}, []
    for step, loss in sorted(whole.items()):
        found["losses"].append({"step": step, "loss": loss, "loss_resumed": resumed.get(step)})
        if step in resumed:
            differences["after" if step > start else "before"].append(abs(resumed[step] / loss - 1))
    before, after = (max(values, default=0.0) for values in differences.values())
    found.update(difference_before=before, difference_after=after)
    num_compared = sum(map(len, differences.values()))
    if not start or not differences["after"] or num_compared < len(whole):
        found["failed"]["losses"] = f"{num_compared} of {len(whole)} to compare, from step {start}"
    elif after > max(RESUMED_TOLERANCE, 2 * before):
        found["failed"]["losses"] = f"of the resumed run differ by {after:.2%}"


def measure_fp16(bench, found: dict) -> None:
    """Losses, loss scales and skipped steps of a run in fp16; in fp32 on a CPU."""
    folder, steps = bench.folder, bench.options.steps
    found["precision"] = "fp16" if bench.device_type == "cuda" else "fp32"
    options = bench.run_options(
        output=str(folder / "run"),
        precision=found["precision"],
        max_steps=steps,
        log_every=max(1, steps // 30),
        learning_rate=5e-4,
    )
    try:
        with commands(found) as running:
            running["run"] = start_script(folder, "fp16", "pretrain", options)
            running["run"].wait()
    finally:
        found["losses"] = [
            {"step": step, "loss": row["train/loss"], "loss_scale": row.get("optim/loss_scale")}
            for step, row in sorted(training_rows(folder / "run").items())
        ]
    if not found["failed"]:
        found["skipped_steps"] = read_json(folder / "run" / "summary.json")["skipped_steps"]
        first, last = found["losses"][0]["loss"], found["losses"][-1]["loss"]
        if not last < (1 - LEAST_FALL) * first:  # a loss that is not finite is not logged
            found["failed"]["loss"] = f"does not fall: from {first:.4f} to {last:.4f}"


def measure_use(bench, found: dict) -> None:
    """Fine-tuning, then prediction with its model; evaluation and filled masks beside them.

    --model is a model that was pretrained on the text."""
    folder, options, text = bench.folder, bench.options, bench.options.train[0]
    model, device = {"model": options.model}, {"device": options.device}
    rows = {name: folder / f"{name}.tsv" for name in NUM_ROWS}
    for name, path in rows.items():
        write_rows(Path(text), path, NUM_ROWS[name])
    finetuning = {
        "max_steps": FINETUNING_STEPS,
        "eval_every": str(FINETUNING_STEPS // 2),
        "learning_rate": 5e-4,
        "output": str(folder / "classifier"),
        **{name: [str(path)] for name, path in rows.items()},
    }
    evaluation = {"input": [text], "eval_tokens": 20_000}
    evaluation |= {"format": options.format, "cache": options.cache}
    prediction = {"model": finetuning["output"], "input": finetuning["test"]}
    prediction["output"] = str(folder / "predictions.csv")
    with commands(found) as running:
        start = partial(start_script, folder)
        running["finetune"] = start("finetune", "finetune", finetuning | model | device)
        running["evaluate"] = start("evaluate", "evaluate", evaluation | model | device)
        running["fill_mask"] = start("fill_mask", "fill_mask", model, MASKED_TEXT)
        running["finetune"].wait()
        running["predict"] = start("predict", "predict", prediction | device)
        for process in running.values():
            process.wait()
    if not found["failed"]:
        tuned = found["finetune"]["result"]["test_macro_f1"]
        predicted = found["predict"]["result"]["macro_f1"]
        found["macro_f1"] = f"{tuned:.4f} by finetune, {predicted:.4f} by predict"
        if min(tuned, predicted) < LEAST_F1 or abs(tuned - predicted) > F1_TOLERANCE:
            found["failed"]["macro_f1"] = found["macro_f1"]


def write_rows(text: Path, path: Path, count: int) -> None:
    """Labeled rows of frequent words of a text, each of which belongs to one class only."""
    words = Counter(re.findall(r"[a-z]{3,}", text.read_text(encoding="utf-8").lower()))
    frequent = [word for word, _ in words.most_common(FREQUENT_WORDS)]
    generator, lines = random.Random(path.name), ["text\tlabel"]
    for number in range(count):
        label = number % 2
        row = generator.choices(frequent[label::2], k=WORDS_PER_ROW)
        lines.append(f"{' '.join(row)}\tclass {label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
