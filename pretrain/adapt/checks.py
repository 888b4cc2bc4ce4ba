"""A checked experiment and its folder: everything is read and compared before any work starts."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pretrain import config
from pretrain.cli import parse
from pretrain.config import AdaptOptions, Config, FinetuneOptions, typed
from pretrain.data.sources import content_key, expand
from pretrain.errors import UserError, check, option_named
from pretrain.files import hold, model_folder, read_json, sha256_of, write_json
from pretrain.finetune.build import build
from pretrain.finetune.dataset import LabeledRows
from pretrain.inputs import TextFiles, check_text
from pretrain.model.loading import from_checkpoint
from pretrain.runtime.checkpoint import check_output, make_output
from pretrain.runtime.distributed import World, start
from pretrain.runtime.optim import choose_precision
from pretrain.schema import flag

LABEL_OPTIONS = tuple(entry.name for entry in fields(config.LabelOptions))
RUN_OPTIONS = ("model", "output", "overwrite", "resume", "max_minutes")
SET_HERE = {  # options of the two commands that the experiment sets itself
    "pretrain": (*RUN_OPTIONS, "train", "valid", "patience"),
    "finetune": (*RUN_OPTIONS, "label_budget", "seed", "save_model", *LABEL_OPTIONS),
}
TRAINED_ON = {"adapted": "text", "control": "control"}  # encoder -> text
ENTRIES = (  # of the folder of an experiment
    r"experiment\.json|parts|adapted|control|finetune|report\.(md|html)|\w+\.(png|jsonl)"
    r"|\..*\.(partial|lock)"
)
RECORD = ("options", "pretrain", "finetune", "files", "texts")  # the objects in experiment.json


@dataclass
class Experiment:
    """A checked experiment."""

    options: AdaptOptions
    pretraining: Config
    finetuning: FinetuneOptions
    rows: dict[str, LabeledRows]
    classes: list[str]
    budgets: dict[str, int]  # name -> number of rows, the smallest first
    texts: dict[str, TextFiles]  # "text" and, if there is one, "control"
    fresh_parts: list[str]  # heads that the model lacks
    output: Path
    replaced: Path | None = None

    @property
    def encoders(self) -> dict[str, str]:
        """Name -> model of every encoder that is fine-tuned."""
        trained = [name for name, text in TRAINED_ON.items() if text in self.texts]
        final = {name: str(self.output / name / "final") for name in trained}
        return {"base": self.options.model, **final}

    def part_file(self, name: str) -> Path:
        """Where a part keeps its result."""
        return self.output / "parts" / f"{name}.json"

    def part(self, name: str, work: Callable[..., dict], *arguments: object) -> dict:
        """The saved result of a part, else that of `work(self, *arguments)` with its seconds."""
        path = self.part_file(name)
        if path.is_file():
            return read_json(path, {}, "a result; remove the file to run the part again")
        begin = time.monotonic()
        result = work(self, *arguments)
        result["wall_seconds"] = time.monotonic() - begin
        write_json(path, result)
        return result


def build_experiment(options: AdaptOptions) -> Experiment:
    """Read and check everything before any work starts."""
    check(config.missing(options) + config.validate(options))
    if options.model in config.MODEL_SIZES and not Path(options.model).exists():
        expected = "expected a pretrained encoder, a folder or a hub name"
        raise UserError(f"--model {options.model}: is a size to train from scratch; {expected}")
    pretraining = passed_on(options, "pretrain", Config)
    finetuning = passed_on(options, "finetune", FinetuneOptions)
    labels = {name: getattr(options, name) for name in LABEL_OPTIONS}
    finetuning = replace(finetuning, **labels, model=options.model, save_model=False)
    output = Path(options.output)
    with naming(options, "finetune"):
        task = build(replace(finetuning, output=str(output / "finetune" / ".check")))
    budgets = count_budgets(options, len(task.classes), len(task.rows["train"].labels))
    fresh = check_pretraining(options, pretraining)
    texts = read_texts(options, pretraining)
    with option_named("--output"):
        check_output(output, options.overwrite, None, ENTRIES)
    rows, classes = task.rows, task.classes
    return Experiment(
        options, pretraining, finetuning, rows, classes, budgets, texts, fresh, output
    )


def passed_on(options: AdaptOptions, name: str, kind: type):
    """The options of another command in --pretrain or --finetune."""
    with naming(options, name):
        parsed, default = parse(shlex.split(getattr(options, name)), kind, ""), kind()
        given = [key for key in SET_HERE[name] if getattr(parsed, key) != getattr(default, key)]
        problems = [f"omit {flag(key)}: the experiment sets it" for key in given]
        check(config.validate(parsed) + problems)
    return parsed


@contextmanager
def naming(options: AdaptOptions, name: str) -> Iterator[None]:
    """Put --pretrain or --finetune before each problem with the options of that command.

    What names an option of the experiment itself, such as --train, stays."""
    own = {flag(entry.name) for entry in fields(options)}
    prefix = f'--{name} "{getattr(options, name)}": '
    try:
        yield
    except ValueError as error:  # UserError, and shlex's
        lines = str(error).splitlines()
        is_own = [line.split(" ")[0].rstrip(":") in own for line in lines]
        named = [line if known else prefix + line for line, known in zip(lines, is_own)]
        raise UserError("\n".join(named)) from error


def count_budgets(options: AdaptOptions, num_classes: int, num_rows: int) -> dict[str, int]:
    """Number of rows of each budget, the smallest first."""
    names = options.label_budgets
    budgets = {name: num_rows if name == "all" else int(name) for name in names}
    bounds = f"{num_classes}, a row of each class, to {num_rows}, the rows of --train"
    wrong = [name for name, count in budgets.items() if not num_classes <= count <= num_rows]
    check([f"--label-budgets {name}: expected {bounds}, or all" for name in wrong])
    return dict(sorted(budgets.items(), key=lambda item: item[1]))


def check_pretraining(options: AdaptOptions, pretraining: Config) -> list[str]:
    """Check that the model and this machine can do it; the heads that the model lacks."""
    with option_named("--model"):
        model, fresh = from_checkpoint(options.model)
    with naming(options, "pretrain"):
        with option_named(config.length_option(pretraining)):
            check(model.length_problems(config.longest(pretraining)))
        if config.OBJECTIVES[pretraining.objective]:
            with option_named("--objective"):
                check(model.pair_problems(pretraining.objective))
        with option_named("--precision"):
            choose_precision(pretraining.precision, start(pretraining.device)[1])
    return fresh


def read_texts(options: AdaptOptions, pretraining: Config) -> dict[str, TextFiles]:
    """The checked text of --text and --control."""
    names = [name for name in ("text", "control") if getattr(options, name)]
    texts = {}
    for name in names:
        paths, masking = getattr(options, name), pretraining.masking
        texts[name] = check_text(paths, flag(name), pretraining, World(), masking)
        if texts[name].is_corpus:
            expected = "expected text, from which copies of test texts can be removed"
            raise UserError(f"{typed(options, name)}: is a prepared corpus; {expected}")
    if len({content_key(text.sources) for text in texts.values()}) < len(texts):
        shown = typed(options, "control")
        raise UserError(f"{shown}: is the text of --text; expected text of another domain")
    return texts


def open_experiment(experiment: Experiment) -> None:
    """Make the folder, or resume in it; one that has trained with other options is refused."""
    options, output = experiment.options, experiment.output
    hold(output)
    record, path = record_of(experiment), output / "experiment.json"
    is_used = output.is_dir() and any(entry.name != ".lock" for entry in output.iterdir())
    if is_used and not options.overwrite:
        if not path.is_file():
            raise UserError(f"--output {output}: is not empty and has no experiment; expected one")
        saved = read_json(path, dict.fromkeys(RECORD, {}), "an experiment of adapt.py")
        changed = differences(saved, record)
        expected = "expected the same, another folder, or --overwrite"
        if [*output.glob("parts/pretrain-*"), *output.glob("*/checkpoint-*")]:
            start = f"--output {output}: was started with"
            check([f"{start} {difference}; {expected}" for difference in changed])
        elif changed:
            for name in ("parts", "adapted", "control"):
                shutil.rmtree(output / name, ignore_errors=True)
    has_report = (output / "report.md").is_file()
    experiment.replaced = make_output(output, options.overwrite, has_report)
    write_json(path, record)


def record_of(experiment: Experiment) -> dict[str, dict]:
    """Everything that decides the results, as experiment.json keeps it."""
    options, pretraining = experiment.options, experiment.pretraining
    with option_named("--train"):
        files = expand([*options.train, *options.valid, *options.test])
    model = Path(model_folder(options.model))
    files += [*model.glob("*.json"), *model.glob("*.safetensors")]
    files += filter(None, [pretraining.lexicon, pretraining.similar, pretraining.add_tokens])
    values, changeable = asdict(options), config.may_change(AdaptOptions)
    kept = {name: value for name, value in values.items() if name not in changeable}
    hashes = {str(path): sha256_of(Path(path)) for path in files if Path(path).is_file()}
    texts = {
        name: content_key(text.sources, text.text_format, text.markup.key)
        for name, text in experiment.texts.items()
    }
    parts = kept, asdict(pretraining), asdict(experiment.finetuning), hashes, texts
    return json.loads(json.dumps(dict(zip(RECORD, parts))))  # tuples become lists, as in a file


def differences(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """What an experiment was started with that is different now."""
    shown = {"options": "{}", "pretrain": '--pretrain "{}"', "finetune": '--finetune "{}"'}
    found = []
    for kind, values in now.items():
        for name in {**before[kind], **values}:
            old, new = before[kind].get(name), values.get(name)
            if old != new and kind in shown:
                found.append(f"{shown[kind].format(flag(name))} {old}, not {new}")
            elif old != new:
                found.append(f"another {name}")
    return found


def describe(experiment: Experiment) -> str:
    """What will be done, before it starts."""
    encoders, budgets, seeds = experiment.encoders, experiment.budgets, experiment.options.seeds
    rows = [f"{len(of.labels):,} {name} rows" for name, of in experiment.rows.items()]
    counts = [f"{count:,}" for count in budgets.values()]
    return (
        f"task: {len(experiment.classes)} classes, {', '.join(rows)}\n"
        f"encoders: {', '.join(encoders)}; {len(encoders) * len(budgets) * seeds} times "
        f"fine-tuning: budgets {', '.join(counts)}, {seeds} seeds; {experiment.output}"
    )
