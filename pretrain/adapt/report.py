"""The report that answers "did it help?": verdict, tables and plots, as Markdown and as one page.

What flows in are the facts that the parts of an experiment have left (pretrain/adapt/pipeline.py);
the prose is in report_template.md, whose fields are facts and functions of this module.
"""

from __future__ import annotations

import base64
import html
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from pretrain import plots
from pretrain.adapt.bootstrap import DRAWS, bootstrap
from pretrain.files import markdown_table, write_text

TEMPLATE = Path(__file__).with_name("report_template.md")
FEW_ROWS, MANY_UNKNOWN, OWN_TEXT = 100, 0.05, 0.95  # limits of the warnings
ENCODERS = {
    "base": "original encoder",
    "adapted": "pretrained on your text",
    "control": "pretrained on the control text",
}
TEXTS = {"text": "your text", "task": "the task", "control": "the control text"}
METRICS = {"macro_f1": "macro F1", "accuracy": "accuracy"}
MEANING = {
    "accuracy": "Accuracy is the share of test rows that get the right class.",
    "macro_f1": "F1 combines recall, the share of a class's rows that are found, and precision, "
    "the share of the rows given that class that are right; macro F1 is the mean of the classes.",
}
Difference = tuple[float, float, float]  # of two mean scores, and the ends of its 95 % interval


def write_report(output: Path, facts: dict) -> str:
    """Write report.md, report.html and their plots; returns the verdict."""
    metric, budgets, runs = facts["metric"], facts["budgets"], facts["scores"]
    scores = {
        name: {budget: [run["test"][metric] for run in of[budget]] for budget in budgets}
        for name, of in runs.items()
    }

    def difference(other: str, budget: str) -> Difference:
        gain = np.mean(scores["adapted"][budget]) - np.mean(scores[other][budget])
        left, right = (
            np.array([run["predicted"] for run in runs[name][budget]])
            for name in (other, "adapted")
        )
        return float(gain), *bootstrap(np.array(facts["truth"]), left, right, metric)

    others = [name for name in scores if name != "adapted"]
    differences = {of: {budget: difference(of, budget) for budget in budgets} for of in others}
    answer = verdict(differences, budgets, metric) + caveats(facts)
    draw_plots(output, facts, scores)
    tables = (classes_table, overlap_table, pieces_table, time_table)
    fields = (guess, notes, learned, *tables, versions, commands)
    text = TEMPLATE.read_text(encoding="utf-8").format(
        **facts,
        answer=answer,
        encoder=cell(facts["model"]),
        meaning=MEANING[metric],
        draws=DRAWS,
        scores_table=scores_table(facts, scores, differences),
        **{field.__name__: field(facts) for field in fields},
    )
    write_text(output / "report.md", text)
    write_text(output / "report.html", to_html(text, output))
    return answer


# Markdown.


def cell(text: object) -> str:
    """Text of any content on one line, safe in Markdown and in HTML."""
    escaped = re.sub(r"([\\`*_\[\]!])", r"\\\1", html.escape(str(text), quote=False))
    return escaped.replace("\n", " ")


def table(header: list[object], rows: Iterable[Sequence[object]], *formats: str) -> str:
    """A table that shows its cells as they are, numbers in the `formats` of the last columns."""
    formats = [""] * (len(header) - len(formats)) + [*formats]
    shown = [[cell(format(value, of)) for value, of in zip(row, formats)] for row in rows]
    return markdown_table(list(map(cell, header)), shown)


def to_html(text: str, folder: Path) -> str:
    """The Markdown as one page, with the plots of `folder` inside."""
    import markdown  # comes with tensorboard

    def embed(found: re.Match) -> str:
        data = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    page = TEMPLATE.with_suffix(".html").read_text(encoding="utf-8")
    return page.replace("BODY", re.sub(r'src="(\w+\.png)"', embed, body))


# The answer.


def change(difference: Difference) -> str:
    """A difference with its interval."""
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*difference)


def verdict(
    differences: dict[str, dict[str, Difference]], budgets: dict[str, int], metric: str
) -> str:
    """The answer: "yes" only for the budgets whose interval lies above 0.

    `differences` are those of the adapted encoder from "base" and, if it ran, from "control"."""
    gains, over_control = differences["base"], differences.get("control")

    def numbers(found: dict[str, Difference], names: list[str]) -> str:
        shown = [f"{change(found[name])} with {budgets[name]:,} labels" for name in names]
        return f"{METRICS[metric]} {', '.join(shown)}"

    def only(names: list[str]) -> str:
        counts = " and ".join(f"{budgets[name]:,}" for name in names)
        return "" if len(names) == len(gains) else f" with {counts} labels"

    helped = [name for name, (_, low, _) in gains.items() if low > 0]
    hurt = [name for name, (_, _, high) in gains.items() if high < 0]
    unclear = [name for name in gains if name not in helped + hurt]
    effects = {"helped": helped, "hurt": hurt, "made no clear difference to": unclear}
    found = [f"{of} this task: {numbers(gains, names)}" for of, names in effects.items() if names]
    answer = f"Yes{only(helped)}" if helped else "No"
    text = f"**{answer}**: further pretraining on this text {'. It '.join(found)}"
    if over_control:
        text += ". Compared with the same pretraining on the control text: "
        text += numbers(over_control, list(over_control))
        better = [name for name in helped if over_control[name][1] > 0]
        if better:
            text += f"; so it is this text that helps{only(better)}"
        elif helped:
            text += "; so more pretraining on any text may help as much"
    return f"{text}. (Intervals are of 95 %.)"


def caveats(facts: dict) -> str:
    """What qualifies the verdict; "" if nothing does."""
    perplexity, rows, seen = facts["perplexity"], facts["rows"]["test"], facts["seen_in_training"]
    unknown = max(text["unknown_share"] for text in facts["overlap"]["texts"].values())
    too_short = perplexity.get("unigram") and perplexity["after"] > perplexity["unigram"]
    warnings = {
        "there is only one seed": facts["seeds"] == 1,
        "pretraining was too short: guessing by frequency still beats this model": too_short,
        f"{rows} test rows are few": rows < FEW_ROWS,
        f"{seen:,} of the {rows:,} test texts are also training rows": seen > rows // 20,
        f"the tokenizer does not know {unknown:.0%} of the words": unknown > MANY_UNKNOWN,
    }
    found = [text for text, holds in warnings.items() if holds]
    return f" Note that {', and that '.join(found)}." if found else ""


def guess(facts: dict) -> float:
    """The score of always giving the most frequent class of the test rows."""
    classes = facts["scores"]["base"][next(iter(facts["budgets"]))][0]["test"]["classes"]
    rows = [of["rows"] for of in classes.values() if of["rows"]]
    accuracy = max(rows) / sum(rows)
    return accuracy if facts["metric"] == "accuracy" else 2 * accuracy / (1 + accuracy) / len(rows)


# Plots.


def draw_plots(output: Path, facts: dict, scores: dict[str, dict[str, list[float]]]) -> None:
    """The plots of the report."""
    budgets, metric, overlap = facts["budgets"], METRICS[facts["metric"]], facts["overlap"]
    names = [TEXTS[name] for name in overlap["overlap"]]
    plots.overlap(output / "overlap.png", names, shares_of(facts), overlap["words_compared"])
    curves = {}
    for name, of in scores.items():
        means = [np.mean(values) for values in of.values()]
        deviations = [np.std(values, ddof=len(values) > 1) for values in of.values()]
        curves[ENCODERS[name]] = (list(budgets.values()), means, deviations)
    path, labels = output / "learning_curve.png", ("labeled training rows", metric)
    title = f"{metric} on the test rows: mean and deviation over the seeds ({facts['seeds']})"
    levels = {"always the most frequent class": guess(facts)}
    plots.curves(path, title, labels, curves, levels, "x" if len(budgets) > 1 else "")

    largest, matrices = list(budgets)[-1], {}
    for name in ("base", "adapted"):
        runs = facts["scores"][name][largest]
        matrices[ENCODERS[name]] = np.sum([run["test"]["confusion"] for run in runs], axis=0)
    title = f"Predicted classes with {budgets[largest]:,} labeled rows, seeds added up"
    plots.confusion(output / "confusion.png", title, matrices, facts["classes"])

    perplexity = facts["perplexity"]
    if "curve" in perplexity:
        curves = {}
        for name, label in (("curve", "validation set"), ("training", "training text")):
            warm = [point for point in perplexity[name] if point[0] >= warmup_of(facts)]
            curves[label] = (*zip(*(warm or perplexity[name])), None)
        path, labels = output / "perplexity.png", ("optimizer step", "perplexity (logarithmic)")
        title = "Perplexity while pretraining on your text: lower is better"
        unigram = perplexity["unigram"]
        levels = {"guessing by frequency": unigram} if unigram else {}
        plots.curves(path, title, labels, curves, levels, "y")


# Fields of the template.


def warmup_of(facts: dict) -> int:
    """Steps in which a fresh MLM head warms up; 0 if the encoder came with one."""
    fresh = "MLM head" in facts["fresh_parts"]
    return facts["pretraining"]["adapted"]["warmup_steps"] if fresh else 0


def shares_of(facts: dict) -> np.ndarray:
    """float64 [texts, texts]: shared words."""
    return np.array([list(row.values()) for row in facts["overlap"]["overlap"].values()])


def notes(facts: dict) -> str:
    """What the reader has to know first."""
    rows, classes, seen = facts["rows"], facts["classes"], facts["seen_in_training"]
    counts = ", ".join(f"{count:,} {name} rows" for name, count in rows.items())
    lines = [
        f"Task: {len(classes)} classes ({', '.join(map(cell, classes[:20]))}); {counts}.",
        f"Pretraining: {facts['pretraining']['adapted']['steps']:,} optimizer steps.",
        f"Fine-tuning: {facts['seeds']} seed(s), which also choose the rows of a budget; whatever "
        f"the budget, all {rows['valid']:,} validation rows choose the best model.",
    ]
    if seen:
        lines.append(f"{seen:,} of the test texts are also among the training rows.")
    for name, of in facts["text"].items():
        if name in TEXTS:
            added = f"; {of['task_texts']:,} texts of the training rows were added"
            lines.append(
                f"{TEXTS[name].capitalize()}: {of['documents']:,} documents; {of['removed']:,} "
                f"exact copies of test texts were removed{added if of['task_texts'] else ''}."
            )
    if "control" in facts["text"]:
        lines.append(
            "Control: the same encoder after as many steps on text of another domain. What your "
            "text does beyond that is due to its content, not to more training."
        )
    own = shares_of(facts)[:2, :2].min()
    if own > OWN_TEXT:
        lines.append(
            f"Your text shares {own:.0%} of its frequent words with the training rows: it is "
            "nearly the task's own text, so this says little about other text of the domain."
        )
    return "\n".join(f"- {line}" for line in lines)


def scores_table(facts: dict, scores: dict, differences: dict) -> str:
    """Scores and their differences, by budget."""
    header = ["labeled rows", *(ENCODERS[name] for name in scores)]
    for name in differences:
        header.append(f"your text minus {name.replace('base', 'original')} (95 % interval)")
    rows = []
    for budget, count in facts["budgets"].items():
        row = [f"{count:,}"]
        for of in scores.values():
            deviation = f" ± {np.std(of[budget], ddof=1):.3f}" if facts["seeds"] > 1 else ""
            row.append(f"{np.mean(of[budget]):.3f}{deviation}")
        rows.append(row + [change(of[budget]) for of in differences.values()])
    return table(header, rows)


def classes_table(facts: dict) -> str:
    """F1 of each class before and after, with the largest budget."""
    largest, classes, f1 = list(facts["budgets"])[-1], facts["classes"], {}
    for name in ("base", "adapted"):
        found = [run["test"]["classes"] for run in facts["scores"][name][largest]]
        f1[name] = np.array([np.mean([of[label]["f1"] for of in found]) for label in classes])
    num_rows = [found[0][label]["rows"] for label in classes]
    rows = zip(classes, num_rows, f1["base"], f1["adapted"], f1["adapted"] - f1["base"])
    header = ["class", "test rows", ENCODERS["base"], ENCODERS["adapted"], "difference"]
    return table(header, rows, ".3f", ".3f", "+.3f")


def learned(facts: dict) -> str:
    """What pretraining has learned about the text."""
    perplexity, text = facts["perplexity"], ""
    if "curve" not in perplexity:
        return "There was no validation set, so there is no perplexity."
    before, value = "before", perplexity["before"]
    if "MLM head" in facts["fresh_parts"]:
        missing = " and no ".join(facts["fresh_parts"])
        text = (
            f"The encoder had no {missing}. These started at random, so its perplexity before "
            f"({value:,.0f}) means nothing: compare the one after with the others.\n\n"
        )
        warm = [point for point in perplexity["curve"] if point[0] >= max(1, warmup_of(facts))]
        step, value = (warm or perplexity["curve"][-1:])[0]
        before = f"at step {step}, the first evaluation after warm-up"
    values = {
        before: value,
        "after pretraining on your text": perplexity["after"],
        "after the same pretraining on the control text": perplexity.get("control"),
        "guessing each token by its frequency": perplexity["unigram"],
    }
    rows = [[name, value] for name, value in values.items() if value]
    shown = table(["", "perplexity"], rows, ",.1f")
    return f"{text}{shown}\n\n![Perplexity](perplexity.png)"


def overlap_table(facts: dict) -> str:
    """Shared words of each pair of texts."""
    of = facts["overlap"]["overlap"]
    rows = [[TEXTS[name], *shares.values()] for name, shares in of.items()]
    return table(["", *map(TEXTS.get, of)], rows, *[".0%"] * len(of))


def pieces_table(facts: dict) -> str:
    """How the tokenizer reads each text."""
    keys, texts = ("words", "pieces_per_word", "unknown_share"), facts["overlap"]["texts"]
    rows = [[TEXTS[name], *(of[key] for key in keys)] for name, of in texts.items()]
    return table(["text", "words", "pieces per word", "unknown words"], rows, ",", ".2f", ".2%")


def time_table(facts: dict) -> str:
    """Time of each part, in minutes."""
    small = sum(facts[part]["wall_seconds"] for part in ("text", "overlap", "perplexity"))
    seconds = {"cleaning the text, overlap, perplexities": small}
    for name, run in facts["pretraining"].items():
        seconds[f"pretraining, {name}"] = run["wall_seconds"]
    for name, budgets in facts["scores"].items():
        times = [run["wall_seconds"] for runs in budgets.values() for run in runs]
        seconds[f"{len(times)} x fine-tuning, {ENCODERS[name]}"] = sum(times)
    seconds["total"] = sum(seconds.values())
    return table(["part", "minutes"], [[name, of / 60] for name, of in seconds.items()], ",.1f")


def versions(facts: dict) -> str:
    """The machine, and what ran on it."""
    device, threads = facts["pretraining"]["adapted"]["device"], torch.get_num_threads()
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    python = f"Python {platform.python_version()}"
    return f"{device}, {platform.machine()}, {threads} threads, {libraries}, {python}"


def commands(facts: dict) -> str:
    """The commands that repeat the parts, a line each."""
    fine = [of[budget][0] for budget in facts["budgets"] for of in facts["scores"].values()]
    runs = [facts, *facts["pretraining"].values(), facts["overlap"], *fine]
    return "\n".join(run["command"] for run in runs)
