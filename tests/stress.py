"""Kill a run many times at random moments, resume it each time, and compare what it ends as with the run that nobody has disturbed.

    python tests/stress.py --kills 50 --signal KILL --processes 1 --work /tmp/stress

Weights, optimizer, random states and logged numbers have to be equal bit for bit, and TensorBoard's curves to have one point for each
logged step. Tests use the parts with few kills; this command is for a change of what keeps runs safe."""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import ROOT, SIZES, assert_same_run, make_documents  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def command_of(processes: int, *arguments: object) -> list[str]:
    """The command line of pretrain.py in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / "scripts" / "pretrain.py"), *map(str, arguments)]


def options_of(work: Path, steps: int, workers: int = 0) -> list[object]:
    """A small run with dropout, accumulation, whole words and NSP, that saves and evaluates often."""
    text = work / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join("\n".join(document) for document in make_documents(200)) + "\n", encoding="utf-8")
    return ["--train", text, "--model", "tiny", *SIZES, "--vocab-size", "120", "--masking", "word", "--max-length", "32", "--batch-size",
            "16", "--micro-batch-size", "4", "--max-steps", steps, "--save-every", "7", "--eval-every", "10", "--log-every", "3",
            "--keep", "2", "--eval-tokens", "2000", "--cache", work / "cache", "--learning-rate", "1e-3", "--precision", "fp32",
            "--workers", workers]


def family_of(pid: int) -> list[int]:
    """A process and all that came of it, children last."""
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


def disturb(command: list[str], number: int, seconds: float, whole_family: bool) -> int | None:
    """Start the command and send it a signal after so many seconds; its exit code, None where it was at its end before."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        assert process.returncode == 0, process.returncode
        return None
    except subprocess.TimeoutExpired:
        for pid in family_of(process.pid) if whole_family else [process.pid]:
            os.kill(pid, number)
        return process.wait(60)


def assert_one_curve(output: Path) -> None:
    """TensorBoard reads each logged step once, in order."""
    accumulator = EventAccumulator(str(output), size_guidance={"scalars": 0}).Reload()
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/perplexity", "eval/perplexity", "optim/learning_rate"):
        points = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert [step for step, _ in points] == [row["step"] for row in logged if name in row], name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT", "USR1"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds until a signal, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    options, source = options_of(given.work, given.steps, given.workers), random.Random(given.seed)
    whole, parts = given.work / "whole", given.work / "parts"
    subprocess.run(command_of(given.processes, *options, "--output", whole), env=ENVIRONMENT, check=True)
    codes, number = Counter(), getattr(signal, f"SIG{given.signal}")
    command = command_of(given.processes, *options, "--output", parts, "--resume")
    for kill in range(given.kills):
        begin = time.monotonic()
        code = disturb(command, number, source.uniform(0, given.longest), whole_family=number == signal.SIGKILL)
        codes[code] += 1
        found = sorted(path.name for path in parts.glob("checkpoint-*"))
        print(f"{kill + 1}: {time.monotonic() - begin:.1f} s, exit code {code}, {', '.join(found)}", flush=True)
        if code is None:
            break
    subprocess.run(command, env=ENVIRONMENT, check=True)
    assert_same_run(whole, parts, step=given.steps)
    assert_one_curve(parts)
    print(f"{sum(codes.values())} times {given.signal}, exit codes {dict(codes)}: the same run, bit for bit")


if __name__ == "__main__":
    main()
