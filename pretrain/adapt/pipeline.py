"""The experiment: does further pretraining on this text help this task, and by how much?

The texts are cleaned and compared, the encoder is pretrained on each, perplexities are measured,
and every encoder is fine-tuned for every label budget and seed. Each part saves its result in
`parts/`, so an interrupted experiment resumes where it stopped.
"""

import importlib.util
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

from pretrain import build as pretraining
from pretrain import recipe
from pretrain.adapt import domain, forgetting
from pretrain.adapt.checks import TRAINED_ON, Experiment, naming
from pretrain.adapt.dedup import write_cleaned
from pretrain.cli import as_command, command
from pretrain.config import UTF8, FinetuneOptions, TextOptions, typed
from pretrain.corpora import open_or_prepare
from pretrain.data import tokenizer as tokenizers
from pretrain.data.corpus import FEW_DOCUMENTS, Corpus
from pretrain.data.sources import content_key
from pretrain.errors import UserError, counted, option_named
from pretrain.evaluate import evaluate
from pretrain.finetune import build as finetuning
from pretrain.finetune.predict import read_predictions, write_rows
from pretrain.inputs import MODEL_WAYS
from pretrain.model.loading import from_checkpoint
from pretrain.model.packed import MLM_HEAD, PackedModel
from pretrain.model_setup import set_up_model
from pretrain.pretraining import PretrainingRun, print_plan
from pretrain.runtime.checkpoint import checkpoints
from pretrain.runtime.optim import autocast, warmup_steps
from pretrain.train import train

# How the files written by `clean` are read, whatever the options for the original text.
CLEANED = {"format": "jsonl", "encoding": UTF8, "max_documents": 0, "patience": 0}
CLEANED |= dict.fromkeys(("text_field", "entity_field", "split_sentences"))
COMPARED_WORDS = 10_000


def run_experiment(experiment: Experiment) -> dict:
    """Run the parts that have no result yet; returns the facts for the report."""
    part, task = experiment.part, experiment.task
    budgets, seeds = experiment.budgets, experiment.options.seeds
    encoders, metric = experiment.encoders, experiment.finetuning.metric
    runs = list(product(budgets, range(seeds), encoders))
    counts = " and ".join(f"{count:,}" for count in budgets.values())
    work = f"{counted(len(runs), 'fine-tuning run')}, {counts} rows, {counted(seeds, 'seed')}"
    print(f"{', '.join(encoders)}: {work}")
    test, seen = experiment.rows["test"], set(experiment.rows["train"].texts)
    facts = {
        "model": experiment.options.model,
        "task": task.name,
        "metric": metric,
        "labels": experiment.labels,
        "budgets": budgets,
        "seeds": seeds,
        "replay": experiment.options.replay,
        "fresh_parts": experiment.fresh_parts,
        "rows": {name: len(rows.labels) for name, rows in experiment.rows.items()},
        "truth": task.truth(test),
        "seen_in_training": sum(text in seen for text in test.texts),
        "seconds": experiment.parts.seconds,
        "scores": {name: {budget: [] for budget in budgets} for name in encoders},
    }
    facts["text"] = part("text", clean)
    facts["overlap"] = part("overlap", compare)
    facts["pretraining"] = {"adapted": part("pretrain-adapted", pretrain, "adapted")}
    if "control" in encoders:
        same = facts["pretraining"]["adapted"]["recipe"]
        same["max_steps"] = facts["pretraining"]["adapted"]["steps"]
        if experiment.pretraining.entity_fill == "none":  # no command takes a rate with it
            del same["mask_rate"]
        facts["pretraining"]["control"] = part("pretrain-control", pretrain, "control", same)
    facts["perplexity"] = part("perplexity", measure_perplexity)
    facts["forgetting"] = {}
    if experiment.general:  # it may be added or replaced later
        key = content_key(experiment.general.sources, experiment.general.text_format)
        facts["forgetting"] = part(f"forgetting.{key}", measure_forgetting)
    for budget, seed, name in runs:
        run = f"finetune-{name}-{budget}-{seed}"
        result = part(run, fine_tune, name, budget, seed)
        facts["scores"][name][budget].append(result)
        shown = f"{name}, {budgets[budget]:,} rows, seed {seed}"
        experiment.parts.print_score(run, shown, result["test"], metric)
    return facts


# The parts.


def clean(experiment: Experiment) -> dict:
    """Write each text to NAME.jsonl without copies of test texts; --task-text adds task texts."""
    counts, rows = {}, experiment.rows
    of_task = experiment.task.texts(rows["train"]) if experiment.options.task_text else []
    for name, text in experiment.pretraining_texts.items():
        more = of_task if name == "text" else []
        path = experiment.output / f"{name}.jsonl"
        counts[name] = write_cleaned(text, rows["test"].texts, more, path)
        if not counts[name]["documents"]:
            raise UserError(f"--{name}: contains only copies of test texts; expected other text")
    return counts


def compare(experiment: Experiment) -> dict:
    """The facts of scripts/domain.py about the pretraining texts and the task."""
    records = ({"text": "\n".join(parts)} for parts in experiment.rows["train"].texts)
    write_rows(experiment.output / "task.jsonl", records, as_csv=False)
    options, model = replace(experiment.pretraining, **CLEANED), experiment.options.model
    if options.words == "auto" and importlib.util.find_spec("rjieba") is None:
        options = replace(options, words="tokenizer")  # Chinese is compared by characters
    texts, inputs = {}, []
    for name in ("text", "task", "control")[: 1 + len(experiment.texts)]:
        path = str(experiment.output / f"{name}.jsonl")
        texts[name] = domain.check_raw_text((path,), name, options)
        inputs.append(f"{name}={path}")
    ignored = domain.stop_words("auto")
    facts, _ = domain.compare(texts, tokenizers.load(model), COMPARED_WORDS, ignored)
    more = ["--words", options.words] if options.words != TextOptions.words else []
    shown = command("domain", "--input", *inputs, "--tokenizer", model, *more)
    return facts | {"command": shown}


def _run_of(experiment: Experiment, name: str, **changes: object) -> PretrainingRun:
    """A pretraining run. Problems with its options are reported under --pretrain; a text that is
    too short is also reported under the option that named it."""
    output, share = experiment.output, experiment.options.replay
    texts = {TRAINED_ON[name]: round(1 - share, 9)} | ({"general": share} if share else {})
    settings = CLEANED | {"output": str(output / name), "resume": True}
    settings["train"] = tuple(str(output / f"{text}.jsonl") for text in texts)
    settings["mix"] = tuple(texts.values()) if share else ()
    settings |= changes
    config = replace(experiment.pretraining, model=experiment.options.model, **settings)
    with naming(experiment.options, "pretrain"):
        try:
            return pretraining.build(config)
        except UserError as error:
            message = re.sub("--valid PATHS(, | or )", "", str(error))  # the experiment has rows
            inside = f'--pretrain "{experiment.options.pretrain}"'
            for text in texts:
                shown = f"{typed(experiment.options, text)}, {inside}: has "
                message = message.replace(f"--train {output / text}.jsonl: has ", shown)
            raise UserError(message) from error


def _untrained(experiment: Experiment) -> PretrainingRun:
    """A run like that on the text, before its first step."""
    return _run_of(experiment, "adapted", output=str(experiment.output / "untrained"))


def _trained(experiment: Experiment, name: str, run: PretrainingRun) -> PackedModel:
    """A pretrained encoder, set up as that of `run`."""
    model, _ = from_checkpoint(experiment.encoders[name])
    set_up_model(model, run.asked, run.config, run.device, run.precision)
    return model.to(run.device)


def pretrain(experiment: Experiment, name: str, same: dict | None = None) -> dict:
    """Pretrain on a text, with the values in `same`, which an earlier pretraining used; returns the
    summary."""
    is_new = not checkpoints(experiment.output / "control")  # else its text has been checked
    if name == "adapted" and "control" in experiment.texts and is_new:
        _run_of(experiment, "control")  # to check its text before hours are spent
    run = _run_of(experiment, name, **recipe.as_options(same or {}))
    if name == "adapted" and experiment.general:
        _open_general(experiment, run)  # checks that there is enough of it
    run.open_output()
    print_plan(run)
    return train(run) | {
        "command": as_command("pretrain", replace(run.asked, resume=False, output=None)),
        "device": f"{run.device}, {run.precision}",
        "warmup_steps": warmup_steps(run.config.warmup, run.total_steps),
    }


def measure_perplexity(experiment: Experiment) -> dict:
    """Perplexities on validation documents of the domain, before and after each pretraining.

    All are measured at the length of the last phase. {} without a validation set, or if none is
    finite."""
    run = _run_of(experiment, "adapted")
    validation, context = run.phases[-1].validation, autocast(run.device, run.precision)
    if not validation:
        return {}

    def perplexity_of(model: PackedModel) -> float:
        return evaluate(model, validation, context)["perplexity"]

    curve = [point for point in run.curve("eval/perplexity") if run.is_comparable(point[0])]
    if not curve:
        return {}
    if curve[0][0] > 0:  # the first evaluation was at the length of the first phase
        curve.insert(0, (0, perplexity_of(_untrained(experiment).model)))
    result = {
        "before": curve[0][1],
        "after": curve[-1][1],
        "curve": curve,
        "training": run.curve("train/perplexity"),
        "unigram": validation.unigram_perplexity,
    }
    if "control" in experiment.texts:
        result["control"] = perplexity_of(_trained(experiment, "control", run))
    return result


def measure_forgetting(experiment: Experiment) -> dict:
    """The change of the perplexity on the general text; see `forgetting.measure`. `held_out`: the
    share of its tokens that was not replayed, 0.0 if it was not replayed at all."""
    run = _untrained(experiment)
    adapted = _trained(experiment, "adapted", run)
    training, corpus = _open_general(experiment, run)
    has_head, held_out = MLM_HEAD not in experiment.fresh_parts, 0.0
    if experiment.options.replay:
        tokens = corpus.count_tokens()
        held_out = tokens / (training.count_tokens() + tokens)
    with option_named(f"{typed(experiment.options, 'general')}:"):
        change = forgetting.measure(run, adapted, training, corpus, has_head)
    return change | {"held_out": held_out}


def _open_general(experiment: Experiment, run: PretrainingRun) -> tuple[Corpus, Corpus]:
    """(general text that is replayed or that a fresh head is trained on, the rest); the whole text
    twice if it is only measured. UserError if one of them is empty."""
    general, cache, share = experiment.general, Path(run.config.cache), 0.0
    if MLM_HEAD in experiment.fresh_parts:
        share = forgetting.HEAD_HELD_OUT
    if experiment.options.replay:  # what pretraining held out
        path, share = str(experiment.output / "general.jsonl"), run.config.valid_fraction
        general = domain.check_raw_text((path,), "--general", run.config, "token")
    vocabulary = tokenizers.describe(run.tokenizer)
    corpus = open_or_prepare(general, run.tokenizer, vocabulary, cache, ways=MODEL_WAYS)
    parts = corpus.split(share) if share else (corpus, corpus)
    if not all(part.count(at_most=1) for part in parts):
        shown = typed(experiment.options, "general")
        expected = f"expected {FEW_DOCUMENTS} or more different documents"
        raise UserError(f"{shown}: too little text to train an MLM head and to test it; {expected}")
    return parts


def fine_tune(experiment: Experiment, name: str, budget: str, seed: int) -> dict:
    """Fine-tune an encoder; returns the summary of the run, with what it predicts for each row."""
    model, label_budget = experiment.encoders[name], 0 if budget == "all" else int(budget)
    options = replace(experiment.finetuning, model=model, seed=seed, label_budget=label_budget)
    output = experiment.output / "finetune" / f"{name}-{budget}-{seed}"
    summary = run_fine_tuning(options, output, "test")
    cells = read_predictions(output / experiment.task.predictions)
    predicted = experiment.task.predicted(cells, experiment.labels)
    shown = as_command("finetune", replace(options, save_model=True))
    return summary | {"command": shown, "predicted": predicted}


def run_fine_tuning(options: FinetuneOptions, output: Path, split: str) -> dict:
    """The summary of a run in `output`, which resumes if it was interrupted. UserError if it has no
    scores of `split`."""
    resume = bool(checkpoints(output))
    folder = {"output": str(output), "resume": resume, "overwrite": not resume}
    run = finetuning.build(replace(options, **folder), keep_head=False, quiet=True)
    run.open_output()
    summary = train(run)
    if split not in summary:
        raise UserError("\n".join(summary["notes"]))  # the outputs are not finite
    return summary
