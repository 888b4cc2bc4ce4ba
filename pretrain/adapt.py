"""The whole experiment: does going on with pretraining on this text help this task, and by how much?

Overlap of the texts, pretraining on the text and, as a control, the same on another one, held-out perplexities, then fine-tuning of
each encoder for every budget of labels and every seed, and one report. Each part leaves its result in `parts/`, so that an experiment
that was interrupted goes on where it was.
"""
from __future__ import annotations

import csv
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pretrain import domain, setup
from pretrain.cleaning import write_cleaned
from pretrain.command import UserError, as_command, check, parse
from pretrain.config import MODEL_SIZES, AdaptOptions, Config, FinetuneOptions, LabelOptions, validate
from pretrain.data import tokenizer as tokenizers
from pretrain.data.labelled import Labelled
from pretrain.data.reading import content_key, expand
from pretrain.evaluate import evaluate
from pretrain.files import model_folder, sha256_of, write_aside, write_json
from pretrain.finetune import build, check_budget, finetune
from pretrain.model.bert import from_checkpoint
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import World, start
from pretrain.runtime.optim import autocast, choose_precision
from pretrain.text import TextFiles, check_text
from pretrain.train import train

GIVEN = {  # options that the experiment sets itself
    "pretrain": ("model", "train", "valid", "patience", "max_minutes", "output", "resume", "overwrite"),
    "finetune": ("model", "label_budget", "seed", "output", "overwrite", "save_model", *(entry.name for entry in fields(LabelOptions)))}
MAY_CHANGE = ("seeds", "label_budgets", "output", "overwrite", "pretrain", "finetune")  # the last two are compared as they are understood
READ_ALREADY = {"format": "jsonl", "text_field": None, "entity_field": None, "split_sentences": None, "max_documents": 0}
ENTRIES = r"experiment\.json|parts|adapted|control|finetune|report\.(md|html)|\w+\.(png|jsonl)|\..*\.partial"


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
            return json.loads(path.read_text(encoding="utf-8"))
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
        check(model.problems_of(pretraining.objective, pretraining.max_length))
        choose_precision(pretraining.precision, start(pretraining.device)[1])
    texts = {"text": check_text(options.text, "--text", pretraining, World(), pretraining.masking)}
    if options.control:
        texts["control"] = check_text(options.control, "--control", pretraining, World(), pretraining.masking)
    for name, text in texts.items():
        if text is None:
            raise UserError(f"--{name}: is a prepared corpus; needed is text, from which copies of test texts can be removed")
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
        before = json.loads(path.read_text(encoding="utf-8"))
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


def run_experiment(experiment: Experiment) -> dict:
    """Run the parts that are not done yet; returns what the report tells."""
    cleaned = experiment.part("text", lambda: {name: clean(experiment, name) for name in experiment.texts})
    for name in experiment.texts:
        if not cleaned[name]["documents"]:
            raise UserError(f"--{name}: holds nothing but copies of test texts; needed is other text")
    compared = experiment.part("overlap", lambda: compare(experiment))
    runs = {"adapted": experiment.part("pretrain-adapted", lambda: pretrain(experiment, "adapted"))}
    if "control" in experiment.texts:
        runs["control"] = experiment.part("pretrain-control", lambda: pretrain(experiment, "control"))
    perplexities = experiment.part("perplexity", lambda: held_out(experiment))
    scores = {name: {budget: [] for budget in experiment.budgets} for name in experiment.encoders}
    for budget in experiment.budgets:
        for seed in range(experiment.options.seeds):
            for name in experiment.encoders:
                part = f"finetune-{name}-{budget}-{seed}"
                result = experiment.part(part, lambda name=name, budget=budget, seed=seed: fine_tune(experiment, name, budget, seed))
                scores[name][budget].append(result)
                print(f"{name}, {experiment.budgets[budget]:,} labels, seed {seed}: {experiment.finetuning.metric.replace('_', ' ')} "
                      f"{result['test'][experiment.finetuning.metric]:.3f} ({result['wall_seconds']:.0f} s)")
    seen = set(experiment.rows["train"].texts)
    return {"text": {name: cleaned[name] for name in experiment.texts}, "text_seconds": cleaned["wall_seconds"], "overlap": compared,
            "pretraining": runs, "perplexity": perplexities, "scores": scores,
            "model": experiment.options.model, "metric": experiment.finetuning.metric, "classes": experiment.classes,
            "budgets": experiment.budgets, "seeds": experiment.options.seeds, "fresh_parts": experiment.fresh_parts,
            "rows": {name: len(rows.labels) for name, rows in experiment.rows.items()},
            "seen_in_training": sum(text in seen for text in experiment.rows["test"].texts)}


def clean(experiment: Experiment, name: str) -> dict:
    """Write a text, without copies of test texts, to NAME.jsonl; with --task-text the task's texts join that of the domain."""
    more = experiment.rows["train"].texts if experiment.options.task_text and name == "text" else []
    return write_cleaned(experiment.texts[name], experiment.rows["test"].texts, more, experiment.output / f"{name}.jsonl")


def compare(experiment: Experiment) -> dict:
    """Vocabulary overlap of the pretraining text, the task and the control, and how the model's tokenizer breaks their words."""
    task = experiment.output / "task.jsonl"
    write_aside(task, lambda partial: partial.write_text("".join(
        json.dumps({"text": "\n".join(text)}, ensure_ascii=False) + "\n" for text in experiment.rows["train"].texts), encoding="utf-8"))
    options = replace(experiment.pretraining, **READ_ALREADY)
    names = {"text": "pretraining text", "task": "task", "control": "control text"}
    counts = {shown: domain.count_words(check_text([str(experiment.output / f"{name}.jsonl")], f"--{name}", options, World(), "word"))
              for name, shown in names.items() if name in experiment.texts or name == "task"}
    tokenizer, left_out = tokenizers.load(experiment.options.model), domain.stop_words("auto")
    shares, num_words = domain.overlap({name: domain.frequent_words(of, left_out) for name, of in counts.items()}, 10_000)
    broken = {name: domain.fragmentation(of, tokenizer) for name, of in counts.items()}
    inputs = [f"{name}={experiment.output / name}.jsonl" for name in names if name in experiment.texts or name == "task"]
    command = shlex.join(["python", "scripts/domain.py", "--input", *inputs, "--tokenizer", experiment.options.model])
    return {"command": command, "names": list(counts), "shares": shares.tolist(), "words": num_words, "texts": {
        name: {"words": sum(counts[name].values()), "pieces_per_word": of.pieces_per_word, "unknown_share": of.unknown_share}
        for name, of in broken.items()}}


def config_of(experiment: Experiment, name: str) -> Config:
    """The options of a pretraining run; the control's steps are those of the adapted run."""
    source = {"adapted": "text", "control": "control"}[name]
    config = replace(experiment.pretraining, **READ_ALREADY, model=experiment.options.model, output=str(experiment.output / name),
                     train=[str(experiment.output / f"{source}.jsonl")], resume=True)
    if name == "control":
        adapted = json.loads((experiment.output / "parts" / "pretrain-adapted.json").read_text(encoding="utf-8"))
        config = replace(config, max_steps=adapted["steps"])
    return config


def pretrain(experiment: Experiment, name: str) -> dict:
    """Pretrain, or go on with it; the run's summary."""
    config = config_of(experiment, name)
    command = as_command("pretrain", replace(config, resume=False, output=None))  # `build` fills in what was left open
    with told_as("pretrain", experiment.options):
        if name == "adapted" and "control" in experiment.texts:  # its text, too, is checked before hours are spent
            control = experiment.output / "control"
            setup.build(replace(config, train=[str(control.with_suffix(".jsonl"))], output=str(control)))
        run = setup.build(config)
    summary_file = run.output / "summary.json"
    if run.is_finished and (run.output / "final").is_dir() and summary_file.is_file():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    else:
        setup.open_output(run)
        setup.print_plan(run)
        summary = train(run)
    warmup = run.config.warmup
    return {**summary, "command": command, "device": f"{run.device}, {run.precision}",
            "warmup_steps": round(warmup * run.total_steps) if warmup < 1 else int(warmup)}


def held_out(experiment: Experiment) -> dict:
    """Held-out perplexities of the domain's text before and after pretraining on it, and after pretraining on the control; {} where
    no text was held out."""
    run = setup.build(config_of(experiment, "adapted"))
    if not run.held_out:
        return {}
    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [[row["step"], row["eval/perplexity"]] for row in rows if "eval/perplexity" in row]
    result = {"before": curve[0][1], "after": curve[-1][1], "curve": curve,
              "training": [[row["step"], row["train/perplexity"]] for row in rows if "train/perplexity" in row],
              "unigram": next((row["eval/unigram_perplexity"] for row in rows if "eval/unigram_perplexity" in row), None)}
    if "control" in experiment.texts:
        model = from_checkpoint(str(experiment.output / "control" / "final"), [])[0]
        model.config._attn_implementation = run.model.config._attn_implementation
        model.set_objective(run.config.objective)
        same_tokens = model.config.vocab_size == run.model.config.vocab_size
        if same_tokens:
            result["control"] = evaluate(model.to(run.device), run.held_out, run.device, autocast(run.device, run.precision))["perplexity"]
    return result


def fine_tune(experiment: Experiment, name: str, budget: str, seed: int) -> dict:
    """Fine-tune an encoder; its summary and the command that repeats it."""
    options = replace(experiment.finetuning, model=experiment.encoders[name], seed=seed, label_budget=0 if budget == "all" else int(budget),
                      output=str(experiment.output / "finetune" / f"{name}-{budget}-{seed}"))
    summary = finetune(build(options, tell=lambda line: None, keep_head=False), quiet=True)
    return {**summary, "command": as_command("finetune", replace(options, save_model=True, output=None, overwrite=False))}


def predicted(experiment: Experiment, name: str, budget: str, seed: int) -> list[int]:
    """Numbers of the classes that a fine-tuned model gave the test rows."""
    path = experiment.output / "finetune" / f"{name}-{budget}-{seed}" / "test_predictions.csv"
    with path.open(encoding="utf-8", newline="") as rows:
        return [experiment.classes.index(row["predicted_label"]) for row in csv.DictReader(rows)]
