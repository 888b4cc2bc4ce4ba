"""Measure the speeds of this machine against their peers, both sides in one run, real tokens only (padding never counts).

prepare: text to token ids, against the tokenizer alone. data: plan, pairs, packing and masks on one core, and through the DataLoader.
train: the whole step against transformers.Trainer on the same pairs. blocks: plain MLM against Trainer on blocks without padding.
start: processes of their own, to the first step and from a checkpoint, and their memory. largest: the largest micro-batch. profile:
what a step consists of. numerics: the device against fp32 on the CPU. With --models: all that, for several sizes, in a given time.

Parts of the GPU check (scripts/gpu_check.sh): attention, variants, resume, fp16, use, tests; scripts/README.md describes them."""

import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # else `import pretrain` may find a script

from pretrain import config as cli  # noqa: E402
from pretrain.command import UserError, check, option, parse, run_command  # noqa: E402
from pretrain.files import write_json  # noqa: E402

PARTS = ("prepare", "data", "train", "blocks", "start", "largest", "profile", "numerics")
CHECKS = (
    "attention",
    "variants",
    "resume",
    "fp16",
    "use",
    "tests",
)  # parts of scripts/gpu_check.sh
WITHOUT_TEXT = {"attention", "tests"}
QUICK = {"model": "mini", "max_length": 128, "batch_size": 16, "micro_batch_size": 16, "steps": 4}
REPEATS = 5  # timed, after one that warms up; of processes 3
WARM_UP_BLOCKS = 2  # of each side; the first compiles


@dataclasses.dataclass
class BenchmarkOptions(
    cli.MachineOptions, cli.TaskOptions, cli.TextOptions, cli.TokenizerOptions, cli.ModelOptions
):
    """Options of this command."""

    model: str = option(
        "mini", "a size to train from scratch, as pretrain.py's, or a BERT checkpoint"
    )
    train: list[str] = option(
        [],
        "text: files, folders, globs, or one prepared corpus (default: the embedded English text)",
        nargs="+",
        metavar="PATH",
    )
    workers: int | None = option(
        None, "processes that prepare batches, 0: none (default: 0 on CPU, 2 on a GPU)"
    )
    batch_size: int = option(64, "sequences of max-length in an optimizer step")
    micro_batch_size: int = option(32, "sequences of max-length that go through the device at once")
    steps: int = option(
        10,
        "timed optimizer steps of each side (on a GPU rounded up to blocks of 8, three at least)",
    )
    parts: list[str] = option(
        list(PARTS),
        "what is measured; or parts of the GPU check: " + ", ".join(CHECKS),
        nargs="+",
        choices=(*PARTS, *CHECKS),
    )
    quick: bool = option(
        False,
        "all parts in two minutes on two cores: "
        + " ".join(f"--{k} {v}".replace("_", "-") for k, v in QUICK.items()),
    )
    models: list[str] = option(
        [],
        "sweep: measure these sizes or folders at all --lengths with several micro-batches, the most "
        "important first, until --minutes are over (default: no sweep)",
        nargs="+",
        metavar="MODEL",
    )
    lengths: list[int] = option([128, 512], "max-lengths of a sweep", nargs="+", metavar="TOKENS")
    minutes: float = option(7.5, "time that a sweep, or the part variants, may take")
    tests: list[str] = option(
        ["tests"], "files or folders of the part tests", nargs="+", metavar="PATH"
    )
    json: str | None = option(
        None, "file that gets the report, too, after each part (default: none)", metavar="FILE"
    )


def main(argv: list[str]) -> int:
    """Parse, measure, print a table; JSON on the last line. A side or a cell that has failed is told in its place; exit code 1 where a
    part of the GPU check has."""
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
    return int(any(report.get(part, {}).get("failed") for part in CHECKS))


def check_options(options: BenchmarkOptions) -> None:
    """UserError for what cannot be measured."""
    problems = [
        problem
        for length in (options.lengths if options.models else [])
        for problem in cli.validate(dataclasses.replace(options, max_length=length))
        if "--max-length" in problem
    ]
    problems += cli.validate(options) + [
        "--phases: a measurement has one length; needed is --max-length"
    ] * bool(options.phases)
    problems += [f"--steps {options.steps}: needed is a whole number of at least 1"] * (
        options.steps < 1
    )
    problems += [f"--minutes {options.minutes}: needed is a number above 0"] * (
        not 0 < options.minutes < float("inf")
    )
    problems += [
        f"--models {model}: needed is a size ({', '.join(cli.MODEL_SIZES)}) or a folder"
        for model in options.models
        if model not in cli.MODEL_SIZES and not Path(model).is_dir()
    ]
    check(problems)


def config_values(options: BenchmarkOptions) -> dict:
    """The options of the run that is measured."""
    known = {entry.name for entry in dataclasses.fields(cli.Config)}
    return {name: value for name, value in vars(options).items() if name in known} | {
        "valid_fraction": 0.0
    }


def build(options: BenchmarkOptions, **changed: object):
    """The run that the options describe."""
    from pretrain import setup

    return setup.build(cli.Config(**config_values(options) | changed))


def has_gpu(options: BenchmarkOptions) -> bool:
    """Whether the measurement is of a GPU."""
    if options.device != "auto":
        return options.device.startswith("cuda")
    import torch

    return torch.cuda.is_available()


def measure_parts(options: BenchmarkOptions, note) -> None:
    """Measure the chosen parts, and note each."""
    if not options.train and set(options.parts) - WITHOUT_TEXT:
        options.format = "sentences"
        if has_gpu(options):
            from pretrain.benchmark.text import write_full_text as write_text
        else:
            from pretrain.embedded import write_text
        options.train = [str(write_text(Path(options.cache)))]
    for part in options.parts:
        if part in CHECKS:
            note({part: {"failed": ["has not ended"]}})
            measure_check(options, part, lambda found, part=part: note({part: found}))
    if set(options.parts) - set(CHECKS):
        measure_speed(options, note)


def measure_check(options: BenchmarkOptions, part: str, note) -> None:
    """Measure a part of the GPU check; most start processes of their own."""
    from pretrain.benchmark import runs

    folder = Path(options.cache).absolute() / part
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if part == "attention":
        import torch

        from pretrain.benchmark.attention import measure_attention

        tokens = options.micro_batch_size * options.max_length
        measure_attention(
            torch.device("cuda" if has_gpu(options) else "cpu"), options.lengths, tokens, note
        )
    elif part == "variants":
        from pretrain.benchmark.variants import measure_variants

        measure_variants(config_values(options), 60 * options.minutes, has_gpu(options), note)
    elif part == "resume":
        runs.measure_resume(options, folder, note)
    elif part == "fp16":
        runs.measure_fp16(options, folder, has_gpu(options), note)
    elif part == "use":
        runs.measure_use(options, folder, note)
    elif part == "tests":
        runs.measure_tests(options.tests, folder, note)


def measure_speed(options: BenchmarkOptions, note) -> None:
    """Measure the parts that go against a peer or a goal, in this process."""
    import torch

    from pretrain.benchmark import alone, data, limits, steps
    from pretrain.benchmark.rows import blocks, same_examples
    from pretrain.text import check_text

    run, repeats = build(options), 3 if options.quick else REPEATS
    if run.world.size > 1 or run.device.type == "cuda" and torch.cuda.device_count() > 1:
        raise UserError(
            f"--device {options.device}: needed is one process that sees one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    note({"machine": describe_machine(run.device), "precision": run.precision})
    if "prepare" in options.parts:
        text = check_text(options.train, "--train", options, run.world)
        if text is None:
            raise UserError(
                f"--train {options.train[0]}: is a prepared corpus; needed is text, or --parts without prepare"
            )
        note(data.measure_prepare(text, run.tokenizer, repeats))
    if "data" in options.parts:
        note(data.measure_data(run, repeats) | data.measure_loader(run, repeats))
    if {"train", "profile"} & set(options.parts):
        if "train" in options.parts:
            ours = steps.measure_training(
                run,
                lambda micro_batch_size: build(options, micro_batch_size=micro_batch_size),
                same_examples,
                options.steps,
                WARM_UP_BLOCKS,
                lambda found: note({"train": found}),
            )
        else:
            ours = steps.Ours(run)
        if "profile" in options.parts:
            note({"profile": steps.measure_profile(ours)})
        del ours
    if "blocks" in options.parts:
        steps.measure_training(
            build(options, objective="mlm"),
            lambda micro_batch_size: build(
                options, objective="mlm", micro_batch_size=micro_batch_size
            ),
            blocks,
            options.steps,
            WARM_UP_BLOCKS,
            lambda found: note({"blocks": found}),
        )
    if "start" in options.parts:
        note(alone.measure_start(run, 1 if options.quick else 3))
    if "largest" in options.parts:
        note({"largest": limits.measure_largest(run)})
    if "numerics" in options.parts:
        note({"numerics": limits.measure_numerics(run)})


def sweep(options: BenchmarkOptions, note) -> None:
    """Measure several models and lengths, each in a process of its own, until the time is over."""
    from pretrain.benchmark.sweep import MICRO_BATCH_TOKENS, plan, run_sweep

    tokens = MICRO_BATCH_TOKENS["cuda" if has_gpu(options) else "cpu"]
    run_sweep(options, plan(options.models, options.lengths, tokens), options.minutes, note)


def describe_machine(device) -> dict:
    """What the numbers are measured on; a load far above 0 before the run means that others have a part of it."""
    import torch

    cpuinfo = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    )
    names = [
        line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")
    ]
    fast = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    packages = [
        name
        for name in ("torch", "transformers", "tokenizers", "accelerate", "numpy")
        if importlib.util.find_spec(name)
    ]
    return {
        "cpu": " ".join([names[0] if names else platform.machine(), *fast]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
