"""A checked experiment and its folder: everything is read and checked before any work starts."""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pretrain import config
from pretrain.adapt.domain import check_raw_text
from pretrain.adapt.parts import Parts
from pretrain.cli import parse
from pretrain.config import AdaptOptions, Config, FinetuneOptions, typed
from pretrain.data.sources import content_key, expand
from pretrain.errors import MORE, UserError, check, option_named, require
from pretrain.files import lock, model_folder, read_json, sha256_of, write_json
from pretrain.finetune.build import budget_range, build
from pretrain.finetune.dataset import LabeledRows
from pretrain.finetune.tasks import TASKS, Classification
from pretrain.inputs import MODEL_WAYS, TextFiles, check_sample, marked_in
from pretrain.model.loading import from_checkpoint
from pretrain.model_setup import decide_precision, task_problems
from pretrain.preflight import problems_of, start_problems, validate
from pretrain.resume import run_folder
from pretrain.runtime.checkpoint import check_output, make_output
from pretrain.runtime.distributed import start
from pretrain.schema import flag

LABEL_OPTIONS = tuple(entry.name for entry in fields(config.LabelOptions))
RUN_OPTIONS = ("model", "output", "overwrite", "resume", "max_minutes")
SET_HERE = {  # options of the two commands that only the experiment may set
    "pretrain": (*RUN_OPTIONS, "architecture", "train", "mix", "valid", "patience"),
    "finetune": (*RUN_OPTIONS, "label_budget", "seed", "save_model", *LABEL_OPTIONS),
}
OF_MODEL = ("tokenizer", "lowercase")  # options to pretrain that fine-tuning could not follow
TRAINED_ON = {"adapted": "text", "control": "control"}  # encoder -> text
MODEL_FILES = ("json", "safetensors", "bin", "txt", "model")  # model: SentencePiece
ENTRIES = (  # names in the folder of an experiment
    r"experiment\.json|parts|adapted|control|finetune|report\.(md|html)"
    r"|(text|control|general|task)\.jsonl|(overlap|learning_curve|confusion|perplexity)\.png"
    r"|\..*\.(partial|lock)"
)


@dataclass
class Experiment:
    """A checked experiment."""

    options: AdaptOptions
    pretraining: Config
    finetuning: FinetuneOptions
    rows: dict[str, LabeledRows]
    labels: list[str]  # classes, or types of entities; [] in regression
    budgets: dict[str, int]  # name -> number of rows, smallest first
    texts: dict[str, TextFiles]  # "text" and, if there is one, "control"
    general: TextFiles | None  # to measure forgetting on, and to replay
    fresh_parts: list[str]  # heads that the model does not have
    output: Path
    parts: Parts
    replaced: Path | None = None  # under --overwrite, the old folder, kept until the new report

    @property
    def encoders(self) -> dict[str, str]:
        """Name -> model of every encoder that is fine-tuned."""
        models = {"base": self.options.model}
        for name, text in TRAINED_ON.items():
            if text in self.texts:
                models[name] = str(self.output / name / "final")
        return models

    @property
    def pretraining_texts(self) -> dict[str, TextFiles]:
        """The texts to pretrain on, with the general one if it is replayed."""
        return self.texts | ({"general": self.general} if self.options.replay else {})

    @property
    def task(self) -> Classification:
        """What is fine-tuned on."""
        return TASKS[self.finetuning.task]

    def part(self, name: str, work: Callable[..., dict], *arguments: object) -> dict:
        """The saved result of a part, or else the result of `work(self, *arguments)`."""
        return self.parts.result(name, work, self, *arguments)


def build_experiment(options: AdaptOptions) -> Experiment:
    """Read and check everything before any work starts."""
    check(problems_of(options))
    options = replace(options, model=config.as_folder(options.model))
    pretraining = _passed_on(options, "pretrain", Config)
    if pretraining.encoding == Config.encoding:
        pretraining = replace(pretraining, encoding=options.encoding)
    finetuning = _passed_on(options, "finetune", FinetuneOptions)
    labels = {name: getattr(options, name) for name in LABEL_OPTIONS}
    require("matplotlib", "the plots of the report")
    finetuning = replace(finetuning, model=options.model, save_model=False, **labels)
    output = run_folder(options.output)
    ways = None if (output / "experiment.json").is_file() else "a new folder"
    with option_named("--output"):
        check_output(output, options.overwrite, ways, ENTRIES)
    with naming(options, "finetune"):
        run = build(replace(finetuning, output=str(output / "finetune" / ".check")))
    finetuning = replace(finetuning, metric=run.config.metric)
    rows = {name: dataset.rows for name, dataset in run.datasets.items()}
    allowed, expected = budget_range(run.task, rows["train"])
    named = options.label_budgets
    budgets = {name: allowed[-1] if name == "all" else int(name) for name in named}
    wrong = [name for name, count in budgets.items() if count not in allowed]
    check([f"--label-budgets {name}: expected {expected}, or all" for name in wrong])
    with option_named("--model"):
        model, fresh = from_checkpoint(options.model)
    with naming(options, "pretrain"):
        # Pretraining would honor these, but fine-tuning reads the model's own tokenizer.
        owner = "tokenizer_config.json in the folder of --model"
        problems = set_elsewhere(pretraining, OF_MODEL, owner)
        check(task_problems(model, pretraining) + problems)
        with option_named("--device"):
            device = start(pretraining.device)[1]
        decide_precision(pretraining, {}, device)
        if options.replay and not pretraining.valid_fraction:
            problem = "no general text is held out to measure forgetting on"
            option = typed(pretraining, "valid_fraction")
            raise UserError(f"{option}: {problem}; expected a share above 0")
        texts, general = _read_texts(options, pretraining, run.task.name), None
        if options.general:
            # Replayed text is marked like any other text of a mixture but the first.
            masking = marked_in("train-2", pretraining) if options.replay else "token"
            general = check_raw_text(options.general, "--general", pretraining, masking)
        for text in [*texts.values(), *filter(None, [general])]:
            check_sample(text, run.tokenizer, MODEL_WAYS)
    return Experiment(
        options,
        pretraining,
        finetuning,
        rows,
        run.task.names(run.classes),
        dict(sorted(budgets.items(), key=lambda item: item[1])),
        texts,
        general,
        fresh,
        output,
        Parts(output),
    )


def _passed_on(options: AdaptOptions, name: str, kind: type):
    """The options of another command in --pretrain or --finetune."""
    with naming(options, name):
        parsed = parse(shlex.split(getattr(options, name)), kind, "")
        problems = set_elsewhere(parsed, SET_HERE[name], "the experiment")
        check(validate(parsed) + start_problems(parsed) + problems)
    return parsed


def set_elsewhere(parsed: object, names: Iterable[str], owner: str) -> list[str]:
    """A problem for each of the options `names` that is given although `owner` sets it."""
    given = [name for name in names if getattr(parsed, name) != getattr(type(parsed), name)]
    return [f"omit {flag(name)}: {owner} sets it" for name in given]


@contextmanager
def naming(options: AdaptOptions, name: str) -> Iterator[None]:
    """Put --pretrain or --finetune before each problem with the options of that command.

    A line that starts with an option of the experiment itself, such as --train, is kept."""
    own = {flag(entry.name) for entry in fields(options)}
    try:
        yield
    except ValueError as error:  # UserError, or from shlex
        lines = str(error).splitlines()
        for number, line in enumerate(lines):
            if not line.startswith(MORE) and line.split(" ")[0].rstrip(":") not in own:
                lines[number] = f'--{name} "{getattr(options, name)}": {line}'
        raise UserError("\n".join(lines)) from error


def _read_texts(options: AdaptOptions, pretraining: Config, task: str) -> dict[str, TextFiles]:
    texts = {}
    for name in TRAINED_ON.values():
        paths, masking = getattr(options, name), pretraining.masking
        if name == "text" and options.task_text and task == "ner" and masking == "entity":
            masking = "any"  # the entities of the task's rows are enough
        if paths:
            texts[name] = check_raw_text(paths, flag(name), pretraining, masking)
    if len({content_key(text.sources) for text in texts.values()}) < len(texts):
        shown = typed(options, "control")
        raise UserError(f"{shown}: same text as --text; expected text from another domain")
    return texts


def open_experiment(experiment: Experiment) -> None:
    """Create the folder, or resume in it; UserError if training there began with other options."""
    options, output = experiment.options, experiment.output
    with option_named("--output"):
        lock(output)
    record, path = _record_of(experiment), output / "experiment.json"
    if path.is_file() and not options.overwrite:
        saved = read_json(path, dict.fromkeys(record, {}), "an experiment")
        changed = _differences(saved, record)
        if [*output.glob("parts/pretrain-*"), *output.glob("*/checkpoint-*")]:
            begin = f"--output {output}: was started with"
            expected = "expected the same, another folder, or --overwrite"
            check([f"{begin} {difference}; {expected}" for difference in changed])
        elif changed:
            for name in ("parts", "adapted", "control"):
                shutil.rmtree(output / name, ignore_errors=True)
    has_report = (output / "report.md").is_file()
    experiment.replaced = make_output(output, options.overwrite, has_report)
    write_json(path, record)


def _record_of(experiment: Experiment) -> dict[str, dict]:
    """Everything that decides the results, in the form of experiment.json."""
    options, pretraining = experiment.options, experiment.pretraining
    files = [*expand([*options.train, *options.valid, *options.test]), *model_files(options.model)]
    files += filter(None, [pretraining.lexicon, pretraining.similar, pretraining.add_tokens])
    values, changeable = asdict(options), config.may_change(AdaptOptions)
    texts = {}
    for name, text in experiment.pretraining_texts.items():
        texts[name] = content_key(text.sources, text.text_format, text.markup.key)
    record = {
        "options": {name: value for name, value in values.items() if name not in changeable},
        "pretrain": asdict(pretraining),
        "finetune": asdict(experiment.finetuning),
        "files": {str(path): sha256_of(Path(path)) for path in files if Path(path).is_file()},
        "texts": texts,
    }
    return json.loads(json.dumps(record))  # tuples become lists, as in a file


def model_files(model: str) -> list[Path]:
    """The files of a model that is in a folder; none for a name on the hub."""
    folder = Path(model_folder(model))
    return sorted(path for kind in MODEL_FILES for path in folder.glob(f"*.{kind}"))


def _differences(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """What has changed since the experiment was started."""
    commands = {"options": "{}", "pretrain": '--pretrain "{}"', "finetune": '--finetune "{}"'}
    kinds = {"options": AdaptOptions, "pretrain": Config, "finetune": FinetuneOptions}
    folders = {os.path.abspath(model_folder(of["options"]["model"])) for of in (before, now)}
    is_same_model = len(folders) == 1
    found = []
    for kind, values in now.items():
        # An experiment of an earlier version lacks the newer options.
        defaults = json.loads(json.dumps(asdict(kinds[kind]()))) if kind in kinds else {}
        for name in {**before[kind], **values}:
            old, new = before[kind].get(name, defaults.get(name)), values.get(name)
            is_set = name in (*SET_HERE.get(kind, ()), *OF_MODEL)  # follows from another option
            is_same_folder = name == "model" and is_same_model
            of_model = kind == "files" and os.path.abspath(Path(name).parent) in folders
            if old == new or is_set or is_same_folder or (of_model and not is_same_model):
                continue
            if kind in commands:
                found.append(commands[kind].format(f"{flag(name)} {old}") + f", not {new}")
            else:
                found.append(f"another {name}")
    return found
