"""Measure speeds on this machine and compare them with a peer in the same run.

Only real tokens count, never padding. prepare: text to token ids, compared with the tokenizer
alone. data: plan, pairs, packing and masks. train: whole steps, compared with transformers.Trainer
on the same pairs. profile: operators or kernels of a step. blocks: MLM alone, compared with Trainer
on blocks without padding. start: seconds to the first step, from scratch and from a checkpoint.
Only on request: quality, the minutes until pretrain.py is as good as Trainer is after --minutes;
and parts of the GPU check (scripts/gpu_check.sh): attention, variants, fp16, use.
"""

import dataclasses
import importlib
import importlib.util
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from pretrain import config
from pretrain.cli import parse
from pretrain.errors import UserError, check
from pretrain.files import as_json, write_json
from pretrain.preflight import validate
from pretrain.schema import each, integer, number, option
from scripts.benchmark.processes import Command, Process, ProcessError, send_rows
from scripts.benchmark.report import add_ratios, print_report

CHECKS = ("attention", "variants", "fp16", "use")  # parts of scripts/gpu_check.sh
PARTS = {  # part -> module, in the order of the runs
    "attention": "attention",
    "variants": "steps",
    **dict.fromkeys(("fp16", "use"), "checks"),
    **dict.fromkeys(("prepare", "data"), "data"),
    **dict.fromkeys(("train", "profile", "blocks"), "steps"),
    "start": "start",
    "quality": "quality",
}
SPEEDS = tuple(part for part in PARTS if part not in (*CHECKS, "quality"))
COMPUTING = ("attention", "prepare", "data")  # others start processes
QUICK = {"model": "mini", "max_length": 128, "batch_size": 16, "micro_batch_size": 16, "steps": 4}
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy")


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions(
    config.MachineOptions,
    config.TaskOptions,
    config.TextOptions,
    config.TokenizerOptions,
    config.ModelOptions,
):
    """Benchmark"""

    model: str = option("mini", "size to train from scratch, or BERT checkpoint")
    train: tuple[str, ...] = option(
        (), "text or a prepared corpus, as in pretrain.py (default: embedded)", metavar="PATH"
    )
    workers: int | None = option(None, "processes that prepare batches, as in pretrain.py")
    batch_size: int = option(64, "sequences of max-length in an optimizer step", integer(1))
    micro_batch_size: int = option(32, "sequences per forward pass", integer(1))
    steps: int = option(10, "timed steps of each side; on a GPU, in blocks of 8", integer(1))
    parts: tuple[str, ...] = option(SPEEDS, "what to measure", choices=tuple(PARTS))
    quick: bool = option(False, "small sizes, few steps: default parts in two minutes on two cores")
    minutes: float = option(
        7.5, "time limit of the part variants, and of each run of quality", number(0, above=True)
    )
    old_rates: tuple[float, ...] = option(
        (5e-5,),
        "for quality: learning rates of Trainer, one run each; the best counts",
        each(number(0, above=True)),
        metavar="RATE",
    )
    json: str | None = option(None, "file for the report, updated after each part", metavar="FILE")


@dataclasses.dataclass
class Bench:
    """What a part gets: the options, a folder for its files, and "cpu" or "cuda"."""

    options: BenchmarkOptions
    folder: Path
    device_type: str

    @property
    def repeats(self) -> int:  # after one warm-up
        return 3 if self.options.quick else 5

    def run_options(self, **changed: object) -> dict:
        """Options of pretrain.py, with the given changes, for a run without validation. The
        classic recipe has what the peer has: AdamW, one length, dropout."""
        known = {entry.name for entry in dataclasses.fields(config.Config)}
        fixed = {"valid_fraction": 0.0, "recipe": "classic"}
        values = dataclasses.asdict(self.options) | fixed | changed
        return {name: value for name, value in values.items() if name in known}

    def make_run(self):
        """The run that the options describe, for a process that computes."""
        from pretrain.build import build

        return build(config.Config(**self.run_options()))


def main(argv: list[str]) -> int:
    """Measure; print a table, and JSON on the last line. Returns 1 if a GPU check failed.

    In the other parts, a side that fails is reported and the other one is still measured."""
    options = parse(argv, BenchmarkOptions, __doc__)
    if options.quick:
        options = parse(argv, BenchmarkOptions, __doc__, defaults=QUICK)
    problems = validate(options)
    if options.phases:
        problems.append("--phases: the benchmark measures one length; expected --max-length")
    check(problems)
    if not options.train and set(options.parts) != {"attention"}:
        from pretrain.demo import embedded_text

        text = str(embedded_text(Path(options.cache)))
        options = dataclasses.replace(options, train=(text,), format="sentences")
    machine, folder = describe_machine(), Path(options.cache).absolute() / "benchmark"
    report = {"options": dataclasses.asdict(options), "machine": machine}
    device_type = "cuda" if machine["gpus"] and options.device != "cpu" else "cpu"
    Process.method = "spawn" if machine["gpus"] else "fork"
    if device_type == "cuda" and machine["gpus"] > 1:
        problem = f"--device {options.device}: {machine['gpus']} GPUs are visible"
        raise UserError(f"{problem}; expected one (set CUDA_VISIBLE_DEVICES=0)")
    try:
        for part in PARTS:
            if part in options.parts:
                measure(part, Bench(options, folder / part, device_type), report)
    finally:  # an interrupted part reports what it has measured
        Process.stop_all()
        save(report)
        print_report(report)
        print(as_json(report), flush=True)
    return int(any(report.get(part, {}).get("failed") for part in CHECKS))


def measure(part: str, bench: Bench, report: dict) -> None:
    """Run a part; the report is saved after each figure. Files of a check stay until its next
    run."""
    if part != "profile":  # it continues our side of `train`
        Process.stop_all()
    found = report[part] = {"failed": {part: "did not finish"}}
    save(report)
    shutil.rmtree(bench.folder, ignore_errors=True)
    bench.folder.mkdir(parents=True)
    module = importlib.import_module(f"scripts.benchmark.{PARTS[part]}")
    rows_of = getattr(module, f"measure_{part}")
    rows = rows_of(bench)
    if part in COMPUTING and Process.method == "fork":  # this process must not compute
        rows = iter(Process(bench.folder, part, send_rows, rows_of, bench).ask, None)
    try:
        for values in rows:
            found.update(values)
            save(report)
        found["failed"].pop(part, None)
    except ProcessError as error:
        found["failed"] = {"ours": str(error)}
    finally:
        for name, process in Process.running.items():
            if isinstance(process, Command):
                found[name] = process.outcome()
                if found[name]["exit_code"] != 0:
                    found["failed"][name] = process.end()
    if part not in CHECKS:
        shutil.rmtree(bench.folder)


def save(report: dict) -> None:
    """Write the report to --json, with ratios."""
    add_ratios(report)
    if report["options"]["json"]:
        write_json(Path(report["options"]["json"]), report)


def describe_machine() -> dict:
    """The machine that is measured. A load far above 0 means that others use it."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    units = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    return {
        "cpu": " ".join([*(names[:1] or [platform.machine()]), *units]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES if importlib.util.find_spec(name)},
    }
