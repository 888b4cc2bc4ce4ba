"""The report that answers "did it help?": verdict, tables and plots, as Markdown and HTML.

The facts of an experiment flow in (pretrain/adapt/pipeline.py). The prose is in report_template.md,
whose fields are these facts and the tables made here.
"""

import base64
import html
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, mode, stdev

import numpy as np
import torch
import transformers

from pretrain import plots
from pretrain.adapt.domain import draw_overlap
from pretrain.adapt.forgetting import MARGIN
from pretrain.bootstrap import DRAWS, bootstrap
from pretrain.errors import counted
from pretrain.files import markdown_table, write_text
from pretrain.finetune.tasks import TASKS, Metric

TEMPLATE = Path(__file__).with_name("report_template.md")
FEW_ROWS, MANY_UNKNOWN, OWN_TEXT, MANY_RUNS = 100, 0.05, 0.95, 0.5  # limits for warnings
ENCODERS = {  # in the order of a comparison before and after
    "base": "original encoder",
    "control": "pretrained on the control text",
    "adapted": "pretrained on your text",
}
TEXTS = {
    "text": "your text",
    "task": "the task",
    "control": "the control text",
    "general": "the general text",
}
TEXTS_HEADER = ["text", "documents", "copies removed", "training rows added"]
PIECES_HEADER = ["text", "words", "pieces per word", "unknown words"]
SHOWN_LABELS = 20
GUESS = "the most frequent class"
Difference = tuple[float, float, float]  # between two mean scores, and its 95% interval


def write_report(output: Path, facts: dict) -> str:
    """Write report.md, report.html and their plots; returns the verdict."""
    task, metric, guess = TASKS[facts["task"]], _metric_of(facts), _guess(facts)
    budgets, differences = facts["budgets"], {}
    for other in [name for name in facts["scores"] if name != "adapted"]:
        differences[other] = {name: _difference(facts, other, name) for name in budgets}
    answer = verdict(differences, budgets, metric.title) + forgotten(facts["forgetting"])
    answer += caveats(facts)
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    machine = f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"
    labels = cell(", ".join(facts["labels"][:SHOWN_LABELS]))
    names = [TEXTS[name] for name in facts["overlap"]["overlap"]]
    texts = _text_rows(facts["text"], "documents", "removed", "task_texts")
    pieces = _text_rows(facts["overlap"]["texts"], "words", "pieces_per_word", "unknown_share")
    text = TEMPLATE.read_text(encoding="utf-8").format(
        **facts,
        answer=answer,
        encoder=cell(facts["model"]),
        seed_count=counted(facts["seeds"], "seed"),
        replayed=f", {facts['replay']:.0%} on general text" if facts["replay"] else "",
        predicts=task.describe(facts["labels"]) + (f" ({labels})" if labels else ""),
        meaning=metric.meaning,
        guess="" if guess is None else f" Always predicting {GUESS} would reach {guess:.3f}.",
        draws=DRAWS,
        texts_table=table(TEXTS_HEADER, texts, ",", ",", ","),
        scores_table=_compare_scores(output, facts, differences, guess),
        labels_section=_compare_labels(output, facts),
        perplexities=_compare_perplexities(output, facts),
        forgetting_section=_describe_forgetting(facts["forgetting"]),
        overlap_table=draw_overlap(output / "overlap.png", facts["overlap"], names),
        pieces_table=table(PIECES_HEADER, pieces, ",", ".2f", ".2%"),
        time_table=_time_table(facts),
        versions=f"{machine}, {libraries}, Python {platform.python_version()}",
        commands=_commands(facts),
    )
    write_text(output / "report.md", text)
    write_text(output / "report.html", to_html(text, output))
    return answer


def _difference(facts: dict, other: str, budget: str) -> Difference:
    """How much better the adapted encoder is than another."""
    left, right = (facts["scores"][name][budget] for name in (other, "adapted"))
    gain = np.mean(_scores_of(right, facts)) - np.mean(_scores_of(left, facts))
    outcomes = [[_outcomes_of(run["predicted"], facts) for run in runs] for runs in (left, right)]
    return float(gain), *bootstrap(_metric_of(facts).score, *map(np.stack, outcomes))


def _metric_of(facts: dict) -> Metric:
    return TASKS[facts["task"]].metrics[facts["metric"]]


def _outcomes_of(predicted: list, facts: dict) -> np.ndarray:
    return TASKS[facts["task"]].outcomes(facts["truth"], predicted, facts["labels"])


def _scores_of(runs: list[dict], facts: dict) -> list[float]:
    return [run["test"][facts["metric"]] for run in runs]


# Markdown.


def cell(text: object) -> str:
    """Any text on one line, escaped for Markdown and HTML."""
    escaped = re.sub(r"([\\`*_\[\]!])", r"\\\1", html.escape(str(text), quote=False))
    return escaped.replace("\n", " ")


def table(header: list[object], rows: Iterable[Sequence[object]], *formats: str) -> str:
    """A table with escaped cells; `formats` are for the last columns. None means not finite."""
    formats = [""] * (len(header) - len(formats)) + [*formats]

    def text(value: object, spec: str) -> str:
        return cell("not finite" if value is None else format(value, spec))

    shown = [list(map(text, row, formats)) for row in rows]
    return markdown_table(list(map(cell, header)), shown)


def spread(scores: Sequence[float]) -> str:
    """Mean and standard deviation, which needs two scores."""
    shown = f"{mean(scores):.3f}"
    return f"{shown} ± {stdev(scores):.3f}" if len(scores) > 1 else shown


def to_html(text: str, folder: Path) -> str:
    """The Markdown as one HTML page that contains the plots of `folder`."""
    import markdown  # comes with tensorboard

    def embed(found: re.Match) -> str:
        data = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    page = TEMPLATE.with_suffix(".html").read_text(encoding="utf-8")
    return page.replace("BODY", re.sub(r'src="(\w+\.png)"', embed, body))


# The answer.


def _change(difference: Difference) -> str:
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*difference)


def verdict(
    differences: dict[str, dict[str, Difference]], budgets: dict[str, int], score: str
) -> str:
    """The answer: "yes" only for budgets whose interval lies above 0.

    `differences` in a `score`: adapted encoder minus "base" and, if it ran, minus "control"."""
    gains, over_control = differences["base"], differences.get("control")

    def numbers(found: dict[str, Difference], names: Iterable[str]) -> str:
        shown = [f"{_change(found[name])} with {budgets[name]:,} labeled rows" for name in names]
        return f"{score} {', '.join(shown)}"

    def only(names: list[str]) -> str:
        counts = " and ".join(f"{budgets[name]:,}" for name in names)
        return "" if len(names) == len(gains) else f" with {counts} labeled rows"

    helped = [name for name, (_, low, _) in gains.items() if low > 0]
    hurt = [name for name, (_, _, high) in gains.items() if high < 0]
    unclear = [name for name in gains if name not in helped + hurt]
    effects = {"helped": helped, "hurt": hurt, "made no clear difference to": unclear}
    found = [f"{did} this task: {numbers(gains, names)}" for did, names in effects.items() if names]
    answer = f"Yes{only(helped)}" if helped else "No"
    text = f"**{answer}**: further pretraining on this text {'. It '.join(found)}"
    if over_control:
        changes = numbers(over_control, over_control)
        text += f". Compared with the same pretraining on the control text: {changes}"
        better = [name for name in helped if over_control[name][1] > 0]
        if better:
            text += f"; so it is this text that helps{only(better)}"
        elif helped:
            text += "; so more pretraining on any text may help as much"
    return f"{text}. (95% intervals in parentheses.)"


def caveats(facts: dict) -> str:
    """Warnings about the verdict, or ""."""
    perplexity, rows, seen = facts["perplexity"], facts["rows"]["test"], facts["seen_in_training"]
    unknown = max(text["unknown_share"] for text in facts["overlap"]["texts"].values())
    shared = facts["overlap"]["overlap"]["text"]["task"]
    groups = [group for by_budget in facts["scores"].values() for group in by_budget.values()]
    runs, metric = [run for group in groups for run in group], facts["metric"]
    unfinished = sum(run["best_step"] == run["steps"] and run["valid"][metric] < 1 for run in runs)
    worse = sum(run["test"].get("r2", 0.0) < 0 for run in runs)
    constant = sum(all(row == run["predicted"][0] for row in run["predicted"]) for run in runs)
    too_short = perplexity.get("after", 0) > perplexity.get("unigram", 0)
    warnings = {
        "there is only one seed": facts["seeds"] == 1,
        f"in {unfinished} of the {len(runs)} fine-tuning runs the last step was the best, so "
        "longer ones may score higher": unfinished > MANY_RUNS * len(runs),
        f"{constant} of the {len(runs)} fine-tuned models predict the same for every row": constant,
        f"{worse} of the {len(runs)} fine-tuned models are worse than predicting the mean of the "
        "test rows": worse,
        "pretraining was too short: guessing by frequency still beats this model": too_short,
        f"there are only {rows} test rows": rows < FEW_ROWS,
        f"{seen:,} of the {rows:,} test texts are also training rows": seen > rows // 20,
        f"the tokenizer does not know {unknown:.0%} of the words": unknown > MANY_UNKNOWN,
        f"your text shares {shared:.0%} of its frequent words with the training rows, so this says "
        "little about other text of the domain": shared > OWN_TEXT,
    }
    found = [text for text, holds in warnings.items() if holds]
    return f" Note that {', and that '.join(found)}." if found else ""


def forgotten(change: dict) -> str:
    """A sentence about the change of the perplexity on general text; "" if it was not measured."""
    if not change:
        return ""
    if None in change.values():
        return " The perplexity on general text is not finite."
    said = "It may have forgotten general text"
    if change["low"] > MARGIN:
        said = "It forgot general text"
    elif change["high"] <= MARGIN:
        said = "It did not forget general text"
    interval = "{difference:+.3f}, 95% interval {low:+.3f} to {high:+.3f} over {drawn}"
    numbers = "perplexity {before:,.4g} before, {after:,.4g} after".format(**change)
    interval = interval.format(**change)
    return f" {said}: {numbers} (log-perplexity {interval}; margin {MARGIN:g})."


def _guess(facts: dict) -> float | None:
    """The score of always predicting the most frequent class of the test rows, if there is one."""
    if not TASKS[facts["task"]].has_classes:
        return None
    truth = facts["truth"]
    outcomes = _outcomes_of([mode(truth)] * len(truth), facts)
    each_once = np.ones((1, len(truth)), np.float32)
    return float(_metric_of(facts).score(each_once, outcomes)[0])


# Sections: a table each, and a plot.


def _compare_scores(output: Path, facts: dict, differences: dict, guess: float | None) -> str:
    budgets, seeds, metric = facts["budgets"], facts["seeds"], _metric_of(facts).title
    rows, curves = {budget: [f"{count:,}"] for budget, count in budgets.items()}, {}
    for name, runs in facts["scores"].items():
        means, deviations = [], []
        for budget, row in rows.items():
            scores = _scores_of(runs[budget], facts)
            means.append(np.mean(scores))
            deviations.append(np.std(scores, ddof=1 if seeds > 1 else 0))
            row.append(spread(scores))
        curves[ENCODERS[name]] = (list(budgets.values()), means, deviations)
    path, labels = output / "learning_curve.png", ("labeled training rows", metric)
    title = f"{metric} on the test rows: mean and deviation over the seeds ({seeds})"
    levels = {} if guess is None else {f"always {GUESS}": guess}
    plots.curves(path, title, labels, curves, levels, "x")

    header = ["labeled rows", *curves]
    for name, by_budget in differences.items():
        header.append(f"your text minus {name.replace('base', 'original')} (95% interval)")
        for budget, row in rows.items():
            row.append(_change(by_budget[budget]))
    return table(header, rows.values())


def _compare_labels(output: Path, facts: dict) -> str:
    """A section: F1 of each class or type, and the plot of the classes; "" without labels."""
    task, labels = TASKS[facts["task"]], facts["labels"]
    if not labels:
        return ""
    f1, matrices = {}, {}
    budget, count = list(facts["budgets"].items())[-1]  # the largest
    for name in [name for name in ENCODERS if name in facts["scores"]]:
        tests = [run["test"] for run in facts["scores"][name][budget]]
        f1[name] = [np.mean([test["classes"][label]["f1"] for test in tests]) for label in labels]
        if "confusion" in tests[0]:
            matrices[ENCODERS[name]] = np.sum([test["confusion"] for test in tests], axis=0)
    support = [tests[0]["classes"][label][task.support_key] for label in labels]
    header = [task.label_name, task.support, *map(ENCODERS.get, f1), "difference"]
    rows = zip(labels, support, *f1.values(), np.subtract(f1["adapted"], f1["base"]))
    formats = [","] + [".3f"] * len(f1) + ["+.3f"]
    how = f"F1 with {count:,} labeled rows, as the mean over the seeds."
    text = f"\n\n## {task.by_label}\n\n{how} The difference is to the original encoder.\n\n"
    text += table(header, rows, *formats)
    if matrices:
        title = f"Predicted classes with {count:,} labeled rows, summed over seeds"
        plots.confusion(output / "confusion.png", title, matrices, labels)
        text += "\n\n![Confusion before and after](confusion.png)"
    return text


def _compare_perplexities(output: Path, facts: dict) -> str:
    perplexity, missing = facts["perplexity"], " and no ".join(facts["fresh_parts"])
    if "curve" not in perplexity:
        return "There is no perplexity: no validation set, or no finite number."
    curves, rows, warmup = {}, [["before", perplexity["before"]]], 0
    if "MLM head" in facts["fresh_parts"]:
        warmup = max(1, facts["pretraining"]["adapted"]["warmup_steps"])
    for name, label in (("curve", "validation set"), ("training", "training text")):
        points = [(x, y) for x, y in perplexity[name] if x >= warmup and y is not None]
        if points := points or perplexity[name][-1:]:  # none if no finite number was logged
            curves[label] = (*zip(*points), None)
    if warmup:
        rows[0][0] = f"before (meaningless: the encoder had no {missing})"
        steps, values, _ = curves["validation set"]
        rows.append([f"at step {steps[0]}, the first evaluation after warm-up", values[0]])
    path, labels = output / "perplexity.png", ("optimizer step", "perplexity (logarithmic)")
    title = "Perplexity while pretraining on your text: lower is better"
    levels = {"guessing by frequency": perplexity["unigram"]}
    plots.curves(path, title, labels, curves, levels, "y")

    rows.append(["after pretraining on your text", perplexity["after"]])
    if "control" in perplexity:
        rows.append(["after the same pretraining on the control text", perplexity["control"]])
    rows.append(["guessing each token by its frequency", perplexity["unigram"]])
    text = table(["", "perplexity"], rows, ",.1f") + "\n\n![Perplexity](perplexity.png)"
    for name, run in facts["pretraining"].items():
        if Path(run["use"]).name != "final":
            text += (
                f"\n\nThe encoder {ENCODERS[name]} is that of the last step. Its validation "
                f"perplexity was lower at step {run['best_step']:,}: fewer steps may help more."
            )
    return text


def _describe_forgetting(change: dict) -> str:
    """A section of the report; "" if it was not measured."""
    if not change:
        return ""
    rows = [["original encoder", change["before"]], ["pretrained on your text", change["after"]]]
    if "unigram" in change:  # not in experiments of earlier versions
        rows.append(["guessing each token by its frequency", change["unigram"]])
    method, rest = "Each predicts with its own MLM head.", "four fifths of the general text"
    if change.get("held_out"):
        rest = "the replayed part of the general text"
        method += f" The text is the {change['held_out']:.0%} that was not replayed."
    if change["trains_head"]:
        method = (
            "The original encoder came without an MLM head, so both got the same fresh head. It "
            f"was trained on {rest} while the encoder stayed frozen; the rest was predicted."
        )
    meaning = (
        "Both predict the same masked tokens of the general text. The difference of the logarithms "
        f"counts as forgetting if its 95% interval, drawn over {change['drawn']}, lies above "
        f"{MARGIN:g} (a perplexity that is {np.exp(MARGIN) - 1:.0%} higher)."
    )
    shown = table(["", "perplexity on general text"], rows, ",.2f")
    return f"\n\n## Did it forget general text?\n\n{meaning} {method}\n\n{shown}"


def _text_rows(texts: dict[str, dict], *keys: str) -> list[list[object]]:
    return [[TEXTS[name], *map(facts.get, keys)] for name, facts in texts.items() if name in TEXTS]


def _time_table(facts: dict) -> str:
    minutes: Counter[str] = Counter()
    for name, seconds in facts["seconds"].items():
        name = name.partition(".")[0]  # what follows identifies a text
        minutes[" ".join(name.split("-")[:2])] += seconds / 60  # all fine-tuning runs of an encoder
    return table(["part", "minutes"], [*minutes.items(), ("total", minutes.total())], ",.1f")


def _commands(facts: dict) -> str:
    tuned = [runs[budget][0] for budget in facts["budgets"] for runs in facts["scores"].values()]
    runs = [facts, *facts["pretraining"].values(), facts["overlap"], *tuned]
    return "\n".join(run["command"] for run in runs)
