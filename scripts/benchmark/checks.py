"""Runs the commands of this project as a user does, and checks exit codes and numbers."""

import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pretrain.files import read_json
from scripts.benchmark.processes import Command, training_rows

POLL_SECONDS = 0.05
FREQUENT_WORDS, WORDS_PER_ROW = 200, 12  # few words, so each one occurs in the training rows
NUM_ROWS = {"train": 512, "valid": 128, "test": 128}
FINETUNING_STEPS = 60
MASKED_TEXT = "Return True [MASK] the object is a string."
MIN_F1 = 0.9  # on rows in which each word shows the class
F1_TOLERANCE = 0.02  # between bf16 results in different batches
MIN_DECREASE = 0.05  # of the loss, in a run of a few hundred steps


def measure_fp16(bench) -> Iterator[dict]:
    """Losses, loss scales and skipped steps of a run in fp16 (in fp32 on a CPU)."""
    output, steps = bench.folder / "run", bench.options.steps
    precision = "fp16" if bench.device_type == "cuda" else "fp32"
    changed = {"output": str(output), "precision": precision, "max_steps": steps}
    changed |= {"log_every": max(1, steps // 30), "learning_rate": 5e-4}

    def losses() -> dict:
        rows = [
            {"step": step, "loss": row["train/loss"], "loss_scale": row.get("optim/loss_scale")}
            for step, row in sorted(training_rows(output).items())
        ]
        return {"losses": rows}

    yield {"precision": precision}
    run = Command(bench.folder, "pretrain", bench.run_options(**changed), name="run")
    while run.is_running():  # an interrupted check leaves its latest result
        time.sleep(POLL_SECONDS)
        yield losses()
    found = losses()
    yield found
    if run.process.exitcode == 0:
        yield {"skipped_steps": read_json(output / "summary.json")["skipped_steps"]}
        first = found["losses"][0]["loss"]
        last = found["losses"][-1]["loss"]
        if not last < (1 - MIN_DECREASE) * first:  # a loss that is not finite is not logged
            yield {"failed": {"loss": f"does not decrease: {first:.4f} to {last:.4f}"}}


def measure_use(bench) -> Iterator[dict]:
    """Run finetune.py, then predict.py with its model; at the same time, evaluate.py and
    fill_mask.py. --model must be pretrained on the text."""
    folder, options, text = bench.folder, bench.options, bench.options.train[0]
    rows = {name: str(folder / f"{name}.tsv") for name in NUM_ROWS}
    for name, path in rows.items():
        _write_rows(Path(text), Path(path), NUM_ROWS[name])
    tuned = str(folder / "tuned")
    model, device = {"model": options.model}, {"device": options.device}
    finetuning = {"max_steps": FINETUNING_STEPS, "eval_every": str(FINETUNING_STEPS // 2)}
    finetuning |= {"learning_rate": 5e-4, "output": tuned, **model, **device}
    finetuning |= {name: [path] for name, path in rows.items()}
    evaluation = {"input": [text], "format": options.format, "cache": options.cache}
    evaluation |= {"eval_tokens": 20_000, **model, **device}
    prediction = {"model": tuned, "input": [rows["test"]], **device}
    finetune = Command(folder, "finetune", finetuning)
    others = [Command(folder, "evaluate", evaluation)]
    others.append(Command(folder, "fill_mask", model, MASKED_TEXT))
    finetune.process.join()
    predict = Command(folder, "predict", prediction | {"output": str(folder / "predictions.csv")})
    for command in (*others, predict):
        command.process.join()
    results = [command.outcome().get("result", {}) for command in (finetune, predict)]
    if all(results):
        scores = (results[0]["test_macro_f1"], results[1]["macro_f1"])
        shown = "{:.4f} by finetune, {:.4f} by predict".format(*scores)
        is_bad = min(scores) < MIN_F1 or max(scores) - min(scores) > F1_TOLERANCE
        yield {"macro_f1": shown, "failed": {"macro_f1": shown} if is_bad else {}}


def _write_rows(text: Path, path: Path, count: int) -> None:
    """Write labeled rows of frequent words from a text; each word belongs to a single class."""
    words = Counter(re.findall(r"[a-z]{3,}", text.read_text(encoding="utf-8").lower()))
    frequent = [word for word, _ in words.most_common(FREQUENT_WORDS)]
    generator, lines = random.Random(path.name), ["text\tlabel"]
    for number in range(count):
        row = generator.choices(frequent[number % 2 :: 2], k=WORDS_PER_ROW)
        lines.append(f"{' '.join(row)}\tclass {number % 2}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
