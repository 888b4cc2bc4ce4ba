"""The whole experiment: does going on with pretraining on this text help this task, and by how much?

Overlap of the texts, pretraining on the text and, as a control, the same on another one, held-out perplexities, then fine-tuning of
each encoder for every budget of labels and every seed, and one report. Each part leaves its result in `parts/`, so that an experiment
that was interrupted goes on where it was.
"""
from __future__ import annotations

import csv
import json
import shlex
from dataclasses import replace

from pretrain import domain, setup
from pretrain.cleaning import write_cleaned
from pretrain.command import UserError, as_command
from pretrain.config import Config
from pretrain.data import tokenizer as tokenizers
from pretrain.evaluate import evaluate
from pretrain.experiment import Experiment, told_as
from pretrain.files import integer, read_json, write_aside
from pretrain.finetune import build, finetune
from pretrain.model.bert import from_checkpoint
from pretrain.runtime.distributed import World
from pretrain.runtime.optim import autocast
from pretrain.text import check_text
from pretrain.train import train

READ_ALREADY = {"format": "jsonl", "text_field": None, "entity_field": None, "split_sentences": None, "max_documents": 0}


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
                found = (experiment.output / "parts" / f"{part}.json").is_file()
                result = experiment.part(part, lambda name=name, budget=budget, seed=seed: fine_tune(experiment, name, budget, seed))
                scores[name][budget].append(result)
                print(f"{name}, {experiment.budgets[budget]:,} labels, seed {seed}: {experiment.finetuning.metric.replace('_', ' ')} "
                      f"{result['test'][experiment.finetuning.metric]:.3f} ({result['wall_seconds']:.0f} s{', found' * found})")
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
        adapted = read_json(experiment.output / "parts" / "pretrain-adapted.json", {"steps": integer(1, 1 << 62)}, "the result of a part")
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
    if run.has_result() and summary_file.is_file():
        summary = read_json(summary_file, needed="the summary of a run")
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
    config = config_of(experiment, "adapted")
    run = setup.build(config)
    phase, context = run.phases[-1], autocast(run.device, run.precision)
    if not phase.held_out:
        return {}
    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [[row["step"], row["eval/perplexity"]] for row in rows
             if "eval/perplexity" in row and row.get("train/max_length", phase.max_length) == phase.max_length]
    if curve[0][0] > 0:  # at the start it was that of the first phase, which does not compare
        untrained = setup.build(replace(config, output=str(experiment.output / "untrained"))).model
        curve.insert(0, [0, evaluate(untrained, phase.held_out, run.device, context)["perplexity"]])
    result = {"before": curve[0][1], "after": curve[-1][1], "curve": curve,
              "training": [[row["step"], row["train/perplexity"]] for row in rows if "train/perplexity" in row],
              "unigram": phase.held_out.unigram_perplexity}
    if "control" in experiment.texts:
        model = from_checkpoint(str(experiment.output / "control" / "final"), [])[0]
        model.attention = run.model.attention
        model.set_objective(run.config.objective)
        same_tokens = model.config.vocab_size == run.model.config.vocab_size
        if same_tokens:
            result["control"] = evaluate(model.to(run.device), phase.held_out, run.device, context)["perplexity"]
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
