"""A checked experiment: what `scripts/adapt.py` is asked for, everything read and compared before any work starts, and its folder."""
from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pretrain.command import UserError, check, parse
from pretrain.config import MODEL_SIZES, AdaptOptions, Config, FinetuneOptions, LabelOptions, validate
from pretrain.data.labelled import Labelled
from pretrain.data.reading import content_key, expand
from pretrain.files import hold, model_folder, read_json, sha256_of, write_json
from pretrain.finetune import build, check_budget
from pretrain.model.bert import from_checkpoint
from pretrain.phases import longest, option_of
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import World, start
from pretrain.runtime.optim import choose_precision
from pretrain.text import TextFiles, check_text

GIVEN = {  # options that the experiment sets itself
    "pretrain": ("model", "train", "valid", "patience", "max_minutes", "output", "resume", "overwrite"),
    "finetune": ("model", "label_budget", "seed", "output", "overwrite", "save_model", *(entry.name for entry in fields(LabelOptions)))}
MAY_CHANGE = ("seeds", "label_budgets", "output", "overwrite", "pretrain", "finetune")  # the last two are compared as they are understood
ENTRIES = r"experiment\.json|parts|adapted|control|finetune|report\.(md|html)|\w+\.(png|jsonl)|\..*\.(partial|lock)"


@dataclass
class Experiment:
    """A checked experiment."""

    options: AdaptOptions
    pretraining: Config
    finetuning: FinetuneOptions
    rows: dict[str, Labelled]
    classes: list[str]
    budgets: dict[str, int]  # name -> rows; in order
    texts: dict[str, TextFiles]  # "text" and, where there is one, "control"
    fresh_parts: list[str]  # heads that the model lacks
    output: Path
    replaced: Path | None = None

    @property
    def encoders(self) -> dict[str, str]:
        """Name -> model: what is fine-tuned."""
        trained = {"adapted": "text", "control": "control"}
        return {"base": self.options.model} | {name: str(self.output / name / "final") for name, of in trained.items() if of in self.texts}

    def part(self, name: str, work: Callable[[], dict]) -> dict:
        """The result of a part: what it has left in its file, else what `work` returns, with the seconds since it was started last."""
        path = self.output / "parts" / f"{name}.json"
        if path.is_file():
            return read_json(path, needed="a result, or no such file, which makes the part again")
        begin = time.monotonic()
        result = work() | {"wall_seconds": time.monotonic() - begin}
        write_json(path, result)
        return result


def build_experiment(options: AdaptOptions) -> Experiment:
    """Read and check everything before any work starts; UserError tells what does not fit."""
    needed = {"model": "an encoder to go on from", "text": "text to pretrain on", "train": "labelled rows to fine-tune on",
              "valid": "labelled rows to choose the best model by", "test": "labelled rows to score it on"}
    problems = [f"--{name}: needed is {what}" for name, what in needed.items() if not getattr(options, name)]
    check(problems + [f"--seeds {options.seeds}: needed is a whole number of at least 1"] * (options.seeds < 1) + validate(options))
    if options.model in MODEL_SIZES and not Path(options.model).exists():
        raise UserError(f"--model {options.model}: is a size; needed is a pretrained encoder, a folder or a hub name")
    pretraining, finetuning = passed_on(options, "pretrain", Config), passed_on(options, "finetune", FinetuneOptions)
    labels = {entry.name: getattr(options, entry.name) for entry in fields(LabelOptions)}
    finetuning = replace(finetuning, **labels, model=options.model, save_model=False, overwrite=True)
    with told_as("finetune", options):
        task = build(replace(finetuning, output=str(Path(options.output) / "finetune" / ".check")))
    rows, classes = task.rows, task.classes
    problems, budgets = [], {}
    for text in options.label_budgets:
        if text == "all":
            budgets[text] = len(rows["train"].labels)
        elif text.isdecimal() and text.isascii():
            problems += check_budget(int(text), len(rows["train"].labels), len(classes), "--label-budgets")
            budgets[text] = int(text)
        else:
            problems.append(f"--label-budgets {text}: needed is a number of rows, or all")
    check(problems)
    budgets = dict(sorted(budgets.items(), key=lambda item: item[1]))
    model, fresh = from_checkpoint(options.model, [])
    with told_as("pretrain", options):
        check(model.problems_of(pretraining.objective, longest(pretraining), option_of(pretraining)))
        choose_precision(pretraining.precision, start(pretraining.device)[1])
    texts = {"text": check_text(options.text, "--text", pretraining, World(), pretraining.masking)}
    if options.control:
        texts["control"] = check_text(options.control, "--control", pretraining, World(), pretraining.masking)
    for name, text in texts.items():
        if text is None:
            raise UserError(f"--{name}: is a prepared corpus; needed is text, from which copies of test texts can be removed")
    if len({content_key(text.sources) for text in texts.values()}) < len(texts):
        raise UserError(f"--control {' '.join(options.control)}: is the text of --text; needed is text of another domain")
    output = Path(options.output)
    ckpt.check_output(output, options.overwrite, None, ENTRIES)
    return Experiment(options, pretraining, finetuning, rows, classes, budgets, texts, fresh, output)


def passed_on(options: AdaptOptions, name: str, kind: type):
    """The options of another command in --pretrain or --finetune; UserError for those that the experiment gives itself."""
    with told_as(name, options):
        parsed = parse(shlex.split(getattr(options, name)), kind, "")
        check(validate(parsed))
    check([f'--{name} "{getattr(options, name)}": --{given.replace("_", "-")} is given by the experiment; needed is the option left away'
           for given in GIVEN[name] if getattr(parsed, given) != getattr(kind(), given)])
    return parsed


@contextmanager
def told_as(name: str, options: AdaptOptions) -> Iterator[None]:
    """Names the option that another command's options came by in what is wrong with them; what the experiment's own options are
    wrong in stays as it is."""
    own = {f"--{entry.name.replace('_', '-')}" for entry in fields(options)}
    try:
        yield
    except ValueError as error:  # UserError, and shlex's
        raise UserError("\n".join(line if line.split(" ")[0].rstrip(":") in own else f'--{name} "{getattr(options, name)}": {line}'
                                  for line in str(error).splitlines())) from error


def open_experiment(experiment: Experiment) -> None:
    """Make the folder, or go on in it; UserError where it holds an experiment with other options or other files."""
    options, pretraining, output = experiment.options, experiment.pretraining, experiment.output
    hold(output)
    model = Path(model_folder(options.model))
    files = [*expand([*options.train, *options.valid, *options.test], "--train"), *model.glob("*.json"), *model.glob("*.safetensors"), *(
        getattr(pretraining, name) for name in ("lexicon", "similar", "add_tokens") if getattr(pretraining, name))]
    now = {"options": {name: value for name, value in asdict(options).items() if name not in MAY_CHANGE},
           "pretrain": asdict(pretraining), "finetune": asdict(experiment.finetuning),
           "files": {str(path): sha256_of(Path(path)) for path in files if Path(path).is_file()},
           "texts": {name: content_key(text.sources, text.text_format, text.markup.key) for name, text in experiment.texts.items()}}
    path = output / "experiment.json"
    if output.is_dir() and any(output.iterdir()) and not options.overwrite:
        if not path.is_file():
            raise UserError(f"--output {output}: is not empty and holds no experiment; needed is another folder")
        before = read_json(path, dict.fromkeys(("options", "pretrain", "finetune", "files", "texts"), {}), "an experiment of adapt.py")
        check([f"--output {output}: its experiment was started with {what}; needed is another folder, or --overwrite"
               for what in differences(before, now)] if [*output.glob("parts/pretrain-*"), *output.glob("*/checkpoint-*")] else [])
        for name in ("parts", "adapted", "control") if before != now else ():  # nothing has been trained yet
            shutil.rmtree(output / name, ignore_errors=True)
    experiment.replaced = ckpt.make_output(output, options.overwrite, (output / "report.md").is_file())
    write_json(path, now)


def differences(before: dict, now: dict) -> list[str]:
    """What an experiment was started with that is not so now."""
    flags, told = {"options": "--{}", "pretrain": "--pretrain \"--{}\"", "finetune": "--finetune \"--{}\""}, []
    for kind, values in now.items():
        for name in {**before.get(kind, {}), **values}:
            old, value = before.get(kind, {}).get(name), values.get(name)
            if old != value:
                told.append(f"{flags[kind].format(name.replace('_', '-'))} {old}, not {value}" if kind in flags else f"another {name}")
    return told


def describe(experiment: Experiment) -> str:
    """What will be done, before it starts."""
    encoders, budgets = experiment.encoders, experiment.budgets
    rows = ", ".join(f"{len(of.labels):,} {name} rows" for name, of in experiment.rows.items())
    times = len(encoders) * len(budgets) * experiment.options.seeds
    return (f"task: {len(experiment.classes)} classes, {rows}\nencoders: {', '.join(encoders)}; {times} times fine-tuning: budgets "
            f"{', '.join(f'{count:,}' for count in budgets.values())}, {experiment.options.seeds} seeds; {experiment.output}")
