"""Kill a run at many random moments, resume it each time, and compare it with an undisturbed run.

    python tests/stress.py --kills 50 --work /tmp/stress

Weights, optimizer state, random states and logged numbers must be equal bit for bit, and the curves
of TensorBoard must have one point for each logged number. A run that ends before its next kill is
compared, removed and started again."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import (  # noqa: E402
    ROOT,
    SIZES,
    arguments_of,
    assert_same,
    assert_same_run,
    make_documents,
    read_rows,
    rows,
    write_documents,
)
from safetensors.torch import load_file  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# Dropout, accumulation, whole words and pairs; saves and evaluates often.
OFTEN = """--batch-size 16 --micro-batch-size 4 --max-length 32 --precision fp32 --device cpu
--learning-rate 1e-3 --save-every 7 --eval-every 10 --log-every 3 --keep 2"""
PRETRAINING = f"--model tiny --vocab-size 120 --masking word --eval-tokens 2000 {OFTEN}"
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node"


def command_of(script, processes, *options):
    launcher = arguments_of(TORCHRUN, [processes]) if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / "scripts" / f"{script}.py"), *map(str, options)]


def run(command):
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)


def pretraining(given):
    """The script and its options."""
    text = write_documents(given.work / "text.txt", make_documents(200))
    files = ["--train", text, "--cache", given.work / "cache", "--workers", given.workers]
    options = ["--optimizer", given.optimizer, "--max-steps", given.steps]
    return "pretrain", arguments_of(PRETRAINING, SIZES, files, options)


def finetuning(given):
    """The script and its options; the encoder is pretrained for a few steps first."""
    encoder, options = given.work / "encoder", []
    if not encoder.exists():
        script, words = pretraining(given)
        run(command_of(script, 1, *words, "--max-steps", 2, "--output", encoder))
    for name, count in (("train", 300), ("valid", 60), ("test", 60)):
        lines = []
        for document in make_documents(count, name):
            text = " ".join(document)[:200]
            label = "odd" if text.count("e") % 2 else "even"
            lines.append(json.dumps({"text": text, "label": label}) + "\n")
        (given.work / f"{name}.jsonl").write_text("".join(lines))
        options += [f"--{name}", given.work / f"{name}.jsonl"]
    options += ["--model", encoder, "--optimizer", given.optimizer, "--max-steps", given.steps]
    return "finetune", arguments_of(OFTEN, "--patience 0", options)


def family_of(pid):
    """A process and all its descendants, children last."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    family = [pid]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    return family


def disturb(command, number, seconds):
    """Start the command and send it a signal after some seconds (SIGKILL to all processes); its
    exit code, None if it ended before."""
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=ENVIRONMENT, **output)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        for pid in family_of(process.pid) if number == signal.SIGKILL else [process.pid]:
            os.kill(pid, number)
        return process.wait(60)
    assert process.returncode == 0, process.returncode
    return None


def assert_one_curve(output):
    """TensorBoard reads each logged number once, in order."""
    accumulator = EventAccumulator(str(output), size_guidance={"scalars": 0}).Reload()
    logged = read_rows(output / "metrics.jsonl")
    for name in {name for row in logged for name in row} - {"step"}:
        points = [event.step for event in accumulator.Scalars(name)]
        assert points == [row["step"] for row in logged if name in row], name


def assert_same_result(whole, parts, steps):
    """Both runs have the same result. A finished fine-tuning has no checkpoints."""
    if (whole / f"checkpoint-{steps}").exists():
        assert_same_run(whole, parts, steps)
    else:
        assert_same(*(load_file(of / "final" / "model.safetensors") for of in (whole, parts)))
        assert rows(whole) == rows(parts)
        name = "test_predictions.csv"
        assert (whole / name).read_text() == (parts / name).read_text()
    assert_one_curve(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT", "USR1", "HUP"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--finetune", action="store_true", help="finetune.py, in one process")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds until a signal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    source, codes = random.Random(given.seed), Counter()
    script, options = (finetuning if given.finetune else pretraining)(given)
    whole, parts = given.work / "whole", given.work / "parts"
    command = command_of(script, given.processes, *options, "--resume", "--output")
    run([*command, str(whole)])
    number = getattr(signal, f"SIG{given.signal}")
    while codes.total() < given.kills:
        begin = time.monotonic()
        code = disturb([*command, str(parts)], number, source.uniform(0, given.longest))
        found = sorted(path.name for path in parts.glob("checkpoint-*"))
        seconds = time.monotonic() - begin
        print(f"{codes.total()}: {seconds:.1f} s, exit code {code}, {found}", flush=True)
        if code is None:
            assert_same_result(whole, parts, given.steps)
            shutil.rmtree(parts)
        else:
            codes[code] += 1
    run([*command, str(parts)])
    assert_same_result(whole, parts, given.steps)
    print(f"{given.kills} times {given.signal}, exit codes {dict(codes)}: the same run")


if __name__ == "__main__":
    main()
