"""Fine-tune one encoder on a folder of tasks, several times each: one table, one average.

Each task is a subfolder with labeled rows and perhaps a task.json with options of finetune.py. The
result of each run is kept under a hash of everything that it depends on. So the same command
resumes, and what a changed task or option affects runs again.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from pretrain.adapt.checks import RUN_OPTIONS, model_files, naming, set_elsewhere
from pretrain.adapt.parts import Parts
from pretrain.adapt.pipeline import run_fine_tuning
from pretrain.adapt.report import spread
from pretrain.cli import as_command, parse, read_options
from pretrain.config import FinetuneOptions, SuiteOptions, typed
from pretrain.data.sources import expand
from pretrain.errors import UserError, check, refusing
from pretrain.files import key_of, markdown_table, sha256_of, write_json, write_text
from pretrain.finetune.build import build
from pretrain.finetune.scores import numbers_of
from pretrain.preflight import missing, start_problems, validate
from pretrain.schema import SHOWN_CHARACTERS

TASK_FILE = "task.json"
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
SET_HERE = (*RUN_OPTIONS, "seed", "save_model")


@dataclass(frozen=True)
class Task:
    """A checked task."""

    options: FinetuneOptions
    metric: str  # the score that counts
    split: str  # "test", or "valid" without test rows
    key: str  # changes with anything that decides its results


def check_folder(output: Path) -> None:
    """UserError if `output` is not empty and no suite wrote it: its report.md would be lost."""
    names = {path.name for path in output.glob("[!.]*")}
    is_begun = names & {"parts", "runs"} and not names & {"report.md", "experiment.json"}
    if names and "suite.json" not in names and not is_begun:
        raise UserError(f"{output}: is not empty; expected a new folder, or one of a suite")


def read_tasks(options: SuiteOptions) -> dict[str, Task]:
    """The tasks in the subfolders of --tasks, by name; all their rows and options are checked.

    UserError names the task and what is wrong."""
    with naming(options, "finetune"):
        asked = parse(shlex.split(options.finetune), FinetuneOptions, "")
        check(set_elsewhere(asked, [*SET_HERE, *SPLITS], "the suite"))
    root = Path(options.tasks)
    folders = sorted(path for path in root.glob("[!.]*") if path.is_dir())
    if not folders:
        raise UserError(f"--tasks {root}: has no subfolder; expected one for each task")
    tasks, problems = {}, []
    for folder in folders:
        try:
            tasks[folder.name] = _read_task(folder, options)
        except UserError as error:
            problems += [f"--tasks {folder}: {line}" for line in str(error).splitlines()]
    check(problems)
    return tasks


def _read_task(folder: Path, options: SuiteOptions) -> Task:
    task_file = folder / TASK_FILE
    values = read_options(task_file) if task_file.is_file() else {}
    problems = [f"omit {name}: the suite sets it" for name in SET_HERE if name in values]
    check([f"{TASK_FILE}: {problem}" for problem in problems])
    given = {name: values.pop(name, ()) for name in SPLITS}
    asked = parse(shlex.split(options.finetune), FinetuneOptions, "", defaults=values)
    files = {name: _files_of(folder, name, patterns) for name, patterns in given.items()}
    finetuning = replace(asked, **files, model=options.model, save_model=False)
    check([*missing(finetuning), *validate(finetuning), *start_problems(finetuning)])
    output = Path(options.output) / "runs" / ".check"  # never made: the run does not start
    run = build(replace(finetuning, output=str(output)), keep_head=False, quiet=True)
    for name, dataset in run.datasets.items():
        dataset.check_tokens(typed(finetuning, name))
    split = "test" if finetuning.test else "valid"
    return Task(finetuning, run.score[0], split, _key_of(finetuning))


def _files_of(folder: Path, split: str, given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The files of a split: those in task.json (null: none), or train.*, valid.* or dev.*, test.*.

    UserError if there is none, except for "test", or if there are several that task.json does not
    name: they may contain each other."""
    if given is None:
        return ()
    patterns = [given] if isinstance(given, str) else given
    expected = "expected names of files in the folder"
    if split == "test":
        expected += ", or null for none"
    with refusing(f"{TASK_FILE}: {split} is {str(given)[:SHOWN_CHARACTERS]!r}", expected):
        found = [str(path) for pattern in patterns for path in sorted(folder.glob(pattern))]
    for stem in () if patterns else SPLITS[split]:
        found = found or sorted(str(path) for path in folder.glob(f"{stem}.*"))
    if len(found) > 1 and not patterns:
        names = ", ".join(Path(path).name for path in found)
        raise UserError(f"{names}: several files; expected one, or names in {TASK_FILE}")
    if not found and (patterns or split != "test"):
        expected = " or ".join(f"{stem}.*" for stem in SPLITS[split])
        absent = ", ".join(patterns) or f"the split {split}"
        raise UserError(f"{absent} is missing; expected {expected}, or names in {TASK_FILE}")
    return tuple(found)


def _key_of(options: FinetuneOptions) -> str:
    values, of_model = asdict(options), model_files(options.model)
    files = {name: expand(values.pop(name)) for name in SPLITS}
    if of_model:  # else the name counts: that of a model on the hub
        files["model"] = of_model
        del values["model"]
    sums = {name: [sha256_of(Path(path)) for path in paths] for name, paths in files.items()}
    return key_of([values, sums])


def run_suite(options: SuiteOptions, tasks: dict[str, Task]) -> dict:
    """Fine-tune on each task with each seed, unless that is done; returns the facts of a report."""
    output, facts = Path(options.output), {"model": options.model, "tasks": {}}
    parts = Parts(output)
    for name, task in tasks.items():
        runs = []
        for seed in range(options.seeds):
            part = f"{name}-{seed}-{task.key}"
            finetuning, folder = replace(task.options, seed=seed), output / "runs" / part
            runs.append(parts.result(part, run_fine_tuning, finetuning, folder, task.split))
            parts.print_score(part, f"{name}, seed {seed}", runs[-1][task.split], task.metric)
        found = [numbers_of(run[task.split]) for run in runs]
        scores = {key: [numbers[key] for numbers in found] for key in found[0]}
        facts["tasks"][name] = {
            "metric": task.metric,
            "split": task.split,
            "scores": scores[task.metric],
            "all_scores": scores,
            "command": as_command("finetune", replace(task.options, save_model=True)),
        }
    columns = zip(*(task["scores"] for task in facts["tasks"].values()))
    facts["averages"] = [mean(column) for column in columns]  # of the tasks, by seed
    return facts


def write_report(output: Path, facts: dict) -> str:
    """Write report.md and suite.json; returns the table: mean and deviation of each task, and of
    the average over tasks."""
    rows = []
    for name, task in facts["tasks"].items():
        others = [key for key in task["all_scores"] if key not in ("loss", task["metric"])]
        more = [f"{key.replace('_', ' ')} {mean(task['all_scores'][key]):.3f}" for key in others]
        metric = task["metric"].replace("_", " ")
        rows.append([name, metric, task["split"], spread(task["scores"]), ", ".join(more)])
    rows.append(["**average**", "", "", f"**{spread(facts['averages'])}**", ""])
    table = markdown_table(["task", "score", "rows", "mean ± deviation", "others"], rows)
    seeds = len(facts["averages"])
    commands = "\n".join(task["command"] for task in facts["tasks"].values())
    text = (
        f"# {facts['model']} on {len(facts['tasks'])} tasks\n\n{table}\n\n"
        f"Means over {seeds} seeds, with the standard deviation. The average weighs all tasks "
        f"equally.\n\n```bash\n{commands}\n```\n"
    )
    write_json(output / "suite.json", facts)  # first: see `check_folder`
    write_text(output / "report.md", text)
    return table
