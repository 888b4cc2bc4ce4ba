"""Measure the speeds of this machine against their peers, both sides in one run, real tokens only (padding never counts).

prepare: text to token ids, against the tokenizer alone. data: plan, pairs, packing and masks on one core, and through the DataLoader.
train: the whole step against transformers.Trainer on the same pairs. blocks: plain MLM against Trainer on blocks without padding.
start: processes of their own, to the first step and from a checkpoint, and their memory. largest: the largest micro-batch. profile:
what a step consists of. numerics: the device against fp32 on the CPU. With --models: all that, for several sizes, in a given time."""
import dataclasses
import fcntl
import importlib.util
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain import config as cli  # noqa: E402
from pretrain.command import UserError, check, option, parse, run_command  # noqa: E402
from pretrain.files import write_json  # noqa: E402

PARTS = ("prepare", "data", "train", "blocks", "start", "largest", "profile", "numerics")
WITH_PEER = {"train", "blocks", "start", "largest"}
QUICK = {"model": "mini", "max_length": 128, "batch_size": 16, "micro_batch_size": 16, "steps": 4}
REPEATS = 5  # timed, after one that warms up; of processes 3
WARM_UP_BLOCKS = 2  # of each side; the first compiles


@dataclasses.dataclass
class BenchmarkOptions(cli.MachineOptions, cli.TaskOptions, cli.TextOptions, cli.TokenizerOptions, cli.ModelOptions):
    """Options of this command."""

    model: str = option("mini", "a size to train from scratch, as pretrain.py's, or a BERT checkpoint")
    train: list[str] = option([], "text: files, folders, globs, or one prepared corpus (default: the embedded English text)",
                              nargs="+", metavar="PATH")
    workers: int | None = option(None, "processes that prepare batches, 0: none (default: 0 on CPU, 2 on a GPU)")
    batch_size: int = option(64, "sequences of max-length in an optimizer step")
    micro_batch_size: int = option(32, "sequences of max-length that go through the device at once")
    steps: int = option(10, "timed optimizer steps of each side (on a GPU rounded up to blocks of 8, three at least)")
    parts: list[str] = option(list(PARTS), "what is measured", nargs="+", choices=PARTS)
    quick: bool = option(False, "all parts in two minutes on two cores: "
                         + " ".join(f"--{k} {v}".replace("_", "-") for k, v in QUICK.items()))
    models: list[str] = option([], "sweep: measure these sizes or folders at all --lengths with several micro-batches, the most "
                               "important first, until --minutes are over (default: no sweep)", nargs="+", metavar="MODEL")
    lengths: list[int] = option([128, 512], "max-lengths of a sweep", nargs="+", metavar="TOKENS")
    minutes: float = option(7.5, "time that a sweep may take")
    jobs: int = option(2, "cells of a sweep that compile at the same time on a GPU; they are timed one after the other")
    json: str | None = option(None, "file that gets the report, too, after each part (default: none)", metavar="FILE")
    lock: str | None = option(None, "file by which processes take turns: shared while one warms up, alone while it is timed (default: "
                              "none)", metavar="FILE")


def main(argv: list[str]) -> None:
    """Parse, measure, print a table; JSON on the last line. A side or a cell that has failed is told in its place."""
    options = parse(argv, BenchmarkOptions, __doc__)
    if options.quick:
        options = parse(argv, BenchmarkOptions, __doc__, defaults=QUICK)
    check_options(options)
    from pretrain.benchmark.table import add_ratios, print_report

    report = {"options": vars(options)}

    def note(measured: dict) -> None:
        report.update(measured)
        add_ratios(measured)
        if options.json:
            write_json(Path(options.json), report)

    note({})
    measure = sweep if options.models else measure_parts
    try:
        measure(options, note)
    finally:  # also what an interrupted one has measured
        if len(report) > 1:
            print_report(report)
            print(json.dumps(report), flush=True)


def check_options(options: BenchmarkOptions) -> None:
    """UserError for what cannot be measured."""
    problems = [problem for length in (options.lengths if options.models else [])
                for problem in cli.validate(dataclasses.replace(options, max_length=length)) if "--max-length" in problem]
    problems += cli.validate(options) + ["--phases: a measurement has one length; needed is --max-length"] * bool(options.phases)
    for name, value in (("steps", options.steps), ("jobs", options.jobs)):
        problems += [f"--{name} {value}: needed is a whole number of at least 1"] * (value < 1)
    problems += [f"--minutes {options.minutes}: needed is a number above 0"] * (not 0 < options.minutes < float("inf"))
    problems += [f"--models {model}: needed is a size ({', '.join(cli.MODEL_SIZES)}) or a folder" for model in options.models
                 if model not in cli.MODEL_SIZES and not Path(model).is_dir()]
    check(problems)
    if (options.models or WITH_PEER & set(options.parts)) and importlib.util.find_spec("accelerate") is None:
        raise UserError("transformers.Trainer needs accelerate: pip install accelerate (or --parts "
                        f"{' '.join(part for part in PARTS if part not in WITH_PEER)})")


def build(options: BenchmarkOptions, **changed: object):
    """The run that the options describe."""
    from pretrain import setup

    known = {entry.name for entry in dataclasses.fields(cli.Config)}
    return setup.build(cli.Config(**{name: value for name, value in vars(options).items() if name in known} | changed, valid_fraction=0.0))


def measure_parts(options: BenchmarkOptions, note) -> None:
    """Measure the chosen parts in this process, and note each."""
    import torch

    from pretrain import embedded
    from pretrain.benchmark import alone, data, limits, steps
    from pretrain.benchmark.rows import blocks, same_examples
    from pretrain.text import check_text

    def alone_from_now_on() -> None:
        if lock:
            fcntl.flock(lock, fcntl.LOCK_EX)

    lock = open(options.lock, "a") if options.lock else None  # noqa: SIM115  until the process ends
    if lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
    if not options.train:
        options.train, options.format = [str(embedded.write_text(Path(options.cache)))], "sentences"
    run, repeats = build(options), 3 if options.quick else REPEATS
    if run.world.size > 1 or run.device.type == "cuda" and torch.cuda.device_count() > 1:
        raise UserError(f"--device {options.device}: needed is one process that sees one GPU (CUDA_VISIBLE_DEVICES=0)")
    note({"machine": describe_machine(run.device), "precision": run.precision})
    if "prepare" in options.parts:
        text = check_text(options.train, "--train", options, run.world)
        if text is None:
            raise UserError(f"--train {options.train[0]}: is a prepared corpus; needed is text, or --parts without prepare")
        note(data.measure_prepare(text, run.tokenizer, repeats))
    if "data" in options.parts:
        note(data.measure_data(run, repeats) | data.measure_loader(run, repeats))
    if {"train", "profile"} & set(options.parts):
        ours = steps.Ours(run)
        if "train" in options.parts:
            note({"train": steps.take_turns(ours, same_examples, options.steps, WARM_UP_BLOCKS, alone_from_now_on)})
        if "profile" in options.parts:
            note({"profile": steps.measure_profile(ours, alone_from_now_on)})
        del ours
    alone_from_now_on()
    if "blocks" in options.parts:
        note({"blocks": steps.take_turns(steps.Ours(build(options, objective="mlm")), blocks, options.steps, WARM_UP_BLOCKS)})
    if "start" in options.parts:
        note(alone.measure_start(run, 1 if options.quick or lock else 3))
    if "largest" in options.parts:
        note({"largest": limits.measure_largest(run)})
    if "numerics" in options.parts:
        note({"numerics": limits.measure_numerics(run)})


def sweep(options: BenchmarkOptions, note) -> None:
    """Measure several models and lengths, each in a process of its own, until the time is over."""
    import torch

    from pretrain.benchmark.sweep import MICRO_BATCH_TOKENS, plan, run_sweep

    kind = "cuda" if options.device.startswith("cuda") or options.device == "auto" and torch.cuda.is_available() else "cpu"
    groups = plan(options.models, options.lengths, MICRO_BATCH_TOKENS[kind], options.jobs if kind == "cuda" else 1)
    run_sweep(options, groups, options.minutes, note)


def describe_machine(device) -> dict:
    """What the numbers are measured on; a load far above 0 before the run means that others have a part of it."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")]
    fast = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    packages = [name for name in ("torch", "transformers", "tokenizers", "accelerate", "numpy") if importlib.util.find_spec(name)]
    return {"cpu": " ".join([names[0] if names else platform.machine(), *fast]), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "python": platform.python_version(), **{name: version(name) for name in packages}}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
