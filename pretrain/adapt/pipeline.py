"""The experiment: does further pretraining on this text help this task, and by how much?

The texts are cleaned and compared, the encoder is pretrained on each, perplexities are measured,
and every encoder is fine-tuned for every label budget and seed. Each part leaves its result in
`parts/`, so that an interrupted experiment resumes where it was.
"""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path

from pretrain import build as pretraining
from pretrain.adapt import domain
from pretrain.adapt.checks import TRAINED_ON, Experiment, naming
from pretrain.adapt.dedup import write_cleaned
from pretrain.cli import as_command
from pretrain.config import Config, FinetuneOptions
from pretrain.data import tokenizer as tokenizers
from pretrain.errors import UserError
from pretrain.evaluate import evaluate
from pretrain.files import read_json, write_text
from pretrain.finetune import build as finetuning
from pretrain.inputs import check_text
from pretrain.model.loading import from_checkpoint
from pretrain.model.packed import PackedModel
from pretrain.run import PretrainingRun, print_plan
from pretrain.runtime.checkpoint import checkpoints
from pretrain.runtime.distributed import World
from pretrain.runtime.optim import autocast
from pretrain.schema import integer
from pretrain.train import train

# How the files that `clean` writes are read, whatever was asked for the text itself.
CLEANED = {"format": "jsonl", "max_documents": 0} | dict.fromkeys(
    ("text_field", "entity_field", "split_sentences")
)
COMPARED_WORDS = 10_000


def run_experiment(experiment: Experiment) -> dict:
    """Run the parts that have no result yet; returns the facts for the report."""
    options, part, budgets = experiment.options, experiment.part, experiment.budgets
    metric = experiment.finetuning.metric
    cleaned = part("text", clean)
    for name in experiment.texts:
        if not cleaned[name]["documents"]:
            raise UserError(f"--{name}: has only copies of test texts; expected other text")
    overlap = part("overlap", compare)
    trained = [name for name in experiment.encoders if name in TRAINED_ON]
    runs = {name: part(f"pretrain-{name}", pretrain, name) for name in trained}
    perplexity = part("perplexity", measure_perplexity)
    scores = {name: {budget: [] for budget in budgets} for name in experiment.encoders}
    for budget, seed, name in product(budgets, range(options.seeds), experiment.encoders):
        run = f"finetune-{name}-{budget}-{seed}"
        found = ", found" if experiment.part_file(run).is_file() else ""
        result = part(run, fine_tune, name, budget, seed)
        scores[name][budget].append(result)
        print(
            f"{name}, {budgets[budget]:,} labels, seed {seed}: {metric.replace('_', ' ')} "
            f"{result['test'][metric]:.3f} ({result['wall_seconds']:.0f} s{found})"
        )
    test, seen = experiment.rows["test"], set(experiment.rows["train"].texts)
    return {
        "text": cleaned,
        "overlap": overlap,
        "pretraining": runs,
        "perplexity": perplexity,
        "scores": scores,
        "model": options.model,
        "metric": metric,
        "classes": experiment.classes,
        "budgets": budgets,
        "seeds": options.seeds,
        "fresh_parts": experiment.fresh_parts,
        "rows": {name: len(rows.labels) for name, rows in experiment.rows.items()},
        "truth": [experiment.classes.index(label) for label in test.labels],
        "seen_in_training": sum(text in seen for text in test.texts),
    }


# The two commands that the experiment runs.


def pretrain_on(run: PretrainingRun) -> dict:
    """The summary of a pretraining run, which is started, resumed, or found finished."""
    summary = run.output / "summary.json"
    if run.has_result() and summary.is_file():
        return read_json(summary)
    run.open_output()
    print_plan(run)
    return train(run)


def finetune_one(options: FinetuneOptions) -> dict:
    """The summary of a fine-tuning run with a fresh head, which is started or resumed."""
    resume = bool(checkpoints(Path(options.output)))
    options = replace(options, resume=resume, overwrite=not resume)
    run = finetuning.build(options, keep_head=False, quiet=True)
    run.open_output()
    return train(run)


def perplexity_of(model: PackedModel, run: PretrainingRun) -> float:
    """That of a model on the validation set of a run, at the length of its last phase."""
    precision = autocast(run.device, run.precision)
    return evaluate(model, run.phases[-1].validation, run.device, precision)["perplexity"]


# The parts.


def clean(experiment: Experiment) -> dict:
    """Write each text without copies of test texts to NAME.jsonl; --task-text adds the task's."""
    counts, rows = {}, experiment.rows
    for name, text in experiment.texts.items():
        more = rows["train"].texts if experiment.options.task_text and name == "text" else []
        path = experiment.output / f"{name}.jsonl"
        counts[name] = write_cleaned(text, rows["test"].texts, more, path)
    return counts


def compare(experiment: Experiment) -> dict:
    """What scripts/domain.py finds in the texts of pretraining and of the task."""
    records = [{"text": "\n".join(parts)} for parts in experiment.rows["train"].texts]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(experiment.output / "task.jsonl", "".join(lines))
    options, model = replace(experiment.pretraining, **CLEANED), experiment.options.model
    names = [name for name in ("text", "task", "control") if name in {"task", *experiment.texts}]
    paths = {name: str(experiment.output / f"{name}.jsonl") for name in names}
    texts = {
        name: check_text((path,), name, options, World(), "word") for name, path in paths.items()
    }
    ignored = domain.stop_words("auto")
    facts, _ = domain.compare(texts, tokenizers.load(model), COMPARED_WORDS, ignored)
    inputs = [f"{name}={path}" for name, path in paths.items()]
    command = ["python", "scripts/domain.py", "--input", *inputs, "--tokenizer", model]
    return facts | {"command": shlex.join(command)}


def config_of(experiment: Experiment, name: str) -> Config:
    """The options of a pretraining run; the control takes as many steps as the adapted run."""
    config = replace(
        experiment.pretraining,
        **CLEANED,
        model=experiment.options.model,
        output=str(experiment.output / name),
        train=(str(experiment.output / f"{TRAINED_ON[name]}.jsonl"),),
        resume=True,
    )
    if name == "control":
        path = experiment.part_file("pretrain-adapted")
        adapted = read_json(path, {"steps": integer(1)}, "the result of a part")
        config = replace(config, max_steps=adapted["steps"])
    return config


def build_run(experiment: Experiment, config: Config) -> PretrainingRun:
    """The run of these options; what is wrong with them is wrong with --pretrain."""
    with naming(experiment.options, "pretrain"):
        return pretraining.build(config)


def pretrain(experiment: Experiment, name: str) -> dict:
    """Pretrain on a text; the run's summary."""
    config = config_of(experiment, name)
    command = as_command("pretrain", replace(config, resume=False, output=None))
    if name == "adapted" and "control" in experiment.texts:
        # The control's text is checked before hours are spent.
        path = experiment.output / "control"
        build_run(experiment, replace(config, train=(f"{path}.jsonl",), output=str(path)))
    run = build_run(experiment, config)
    warmup = config.warmup
    return pretrain_on(run) | {
        "command": command,
        "device": f"{run.device}, {run.precision}",
        "warmup_steps": round(warmup * run.total_steps) if warmup < 1 else int(warmup),
    }


def measure_perplexity(experiment: Experiment) -> dict:
    """Validation perplexities of the domain's text before and after pretraining on each text.

    All are at the length of the last phase. {} without a validation set."""
    config = config_of(experiment, "adapted")
    run = build_run(experiment, config)
    validation = run.phases[-1].validation
    if not validation:
        return {}
    lines = (run.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    evaluations = [row for row in rows if "eval/perplexity" in row]
    comparable = [row for row in evaluations if run.is_comparable(row["step"])]
    curve = [[row["step"], row["eval/perplexity"]] for row in comparable]
    if curve[0][0] > 0:  # the run was evaluated at its start, but at the length of its first phase
        untrained = replace(config, output=str(experiment.output / "untrained"))
        curve.insert(0, [0, perplexity_of(build_run(experiment, untrained).model, run)])
    training = [[row["step"], row["train/perplexity"]] for row in rows if "train/perplexity" in row]
    result = {
        "before": curve[0][1],
        "after": curve[-1][1],
        "curve": curve,
        "training": training,
        "unigram": validation.unigram_perplexity,
    }
    if "control" in experiment.texts:
        model = from_checkpoint(experiment.encoders["control"])[0]
        model.attention = run.model.attention
        model.use_pairs(run.model.nsp_weight)
        if model.config.vocab_size == run.model.config.vocab_size:  # else tokens were added
            result["control"] = perplexity_of(model.to(run.device), run)
    return result


def fine_tune(experiment: Experiment, name: str, budget: str, seed: int) -> dict:
    """Fine-tune an encoder; the run's summary and the class that each test row got."""
    options = replace(
        experiment.finetuning,
        model=experiment.encoders[name],
        seed=seed,
        label_budget=0 if budget == "all" else int(budget),
    )
    output = experiment.output / "finetune" / f"{name}-{budget}-{seed}"
    summary = finetune_one(replace(options, output=str(output)))
    with (output / "test_predictions.csv").open(encoding="utf-8", newline="") as rows:
        labels = [row["predicted_label"] for row in csv.DictReader(rows)]
    command = as_command("finetune", replace(options, save_model=True))
    predicted = [experiment.classes.index(label) for label in labels]
    return summary | {"command": command, "predicted": predicted}
