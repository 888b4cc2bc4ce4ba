"""The page that answers "did it help?": tables, pictures and one sentence, from what the parts of an experiment have left.

The difference of two encoders is their mean score over the seeds, one less the other; its 95 % interval is that of a paired bootstrap
over the test rows and the seeds: the same are drawn for both encoders (Efron and Tibshirani 1993, chapter 13).
"""
from __future__ import annotations

import base64
import html
import platform
import re
from pathlib import Path

import numpy as np
import torch
import transformers

from pretrain import pictures
from pretrain.files import markdown_table, write_text

DRAWS, DRAWN_TOGETHER = 10_000, 200
FEW_ROWS, MANY_UNKNOWN = 100, 0.05  # of which a reader is warned
ENCODERS = {"base": "as it was", "adapted": "pretrained on your text", "control": "pretrained on the control text"}
METRICS = {"macro_f1": "macro F1", "accuracy": "accuracy"}
MEANING = {"accuracy": "Accuracy is the share of test rows that get the right class", "macro_f1": (
    "F1 joins how many rows of a class are found with how many found ones are right, 1 is perfect; macro F1 is the mean of the classes")}
STYLE = """body{font:16px/1.5 sans-serif;max-width:52em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}
td,th{border:1px solid #bbb;padding:.3em .7em;text-align:left}img{max-width:100%}pre{background:#f4f4f4;padding:.7em;overflow:auto;
white-space:pre-wrap;word-break:break-all}blockquote{border-left:.4em solid #0072B2;margin:1em 0;padding:.2em 1em;font-size:1.1em}"""


def scores_of(weights: np.ndarray, truth: np.ndarray, predictions: np.ndarray, num_classes: int, metric: str) -> np.ndarray:
    """float [draws, seeds]: the metric when row n of the test counts `weights[d, n]` times; truth int [n], predictions int [seeds, n]."""
    if metric == "accuracy":
        return weights @ (predictions == truth).T.astype(np.float32) / weights.sum(1, keepdims=True)
    is_class = np.eye(num_classes, dtype=np.float32)
    of_truth = weights @ is_class[truth]
    scores = []
    for predicted in predictions:
        hits = weights @ (is_class[truth] * (predicted == truth)[:, None])
        either = of_truth + weights @ is_class[predicted]
        f1 = np.divide(2 * hits, either, out=np.full_like(hits, np.nan), where=either > 0)  # a class that is nowhere is left out
        scores.append(np.nanmean(f1, axis=1))
    return np.stack(scores, axis=1)


def bootstrap(truth: np.ndarray, left: np.ndarray, right: np.ndarray, num_classes: int, metric: str, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean score of `right` less that of `left`, int [seeds, n] both."""
    draw, num_rows, num_seeds, differences = np.random.default_rng(seed), len(truth), len(left), []
    for _ in range(DRAWS // DRAWN_TOGETHER):
        rows = draw.integers(0, num_rows, (DRAWN_TOGETHER, num_rows)) + num_rows * np.arange(DRAWN_TOGETHER)[:, None]
        weights = np.bincount(rows.ravel(), minlength=DRAWN_TOGETHER * num_rows).reshape(DRAWN_TOGETHER, num_rows).astype(np.float32)
        before, after = (scores_of(weights, truth, predictions, num_classes, metric) for predictions in (left, right))
        seeds = draw.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), DRAWN_TOGETHER) / num_seeds
        differences.append(((after - before) * seeds).sum(1))
    low, high = np.quantile(np.concatenate(differences), [0.025, 0.975])
    return float(low), float(high)


def differences_of(truth: np.ndarray, predictions: dict[str, dict[str, np.ndarray]], scores: dict[str, dict[str, list[float]]],
                   num_classes: int, metric: str, left: str) -> dict[str, tuple[float, float, float]]:
    """Budget -> (difference adapted less `left`, low, high)."""
    return {budget: (float(np.mean(scores["adapted"][budget]) - np.mean(scores[left][budget])),
                     *bootstrap(truth, predictions[left][budget], predictions["adapted"][budget], num_classes, metric))
            for budget in scores["adapted"]}


def verdict(differences: dict[str, tuple[float, float, float]], over_control: dict[str, tuple[float, float, float]] | None,
            budgets: dict[str, int], metric: str) -> str:
    """One plain sentence, and one on the control: "yes" only where the interval lies above 0."""
    def shown(chosen: list[str], of: dict) -> str:
        return "; ".join(f"with {budgets[budget]:,} labels {of[budget][0]:+.3f} {METRICS[metric]} (95 % interval {of[budget][1]:+.3f} to "
                         f"{of[budget][2]:+.3f})" for budget in chosen)

    helped = [budget for budget, (_, low, _) in differences.items() if low > 0]
    harmed = [budget for budget, (_, _, high) in differences.items() if high < 0]
    unclear = [budget for budget in differences if budget not in helped + harmed]
    if helped:
        text = f"**Yes**, going on with pretraining on this text helped this task: {shown(helped, differences)}."
        text += f" But it made it worse: {shown(harmed, differences)}." if harmed else ""
    elif harmed:
        text = f"**No**, going on with pretraining on this text made this task worse: {shown(harmed, differences)}."
    else:
        text = f"**No**: that it helps this task could not be shown: {shown(unclear, differences)}; 0 lies within."
    if unclear and helped + harmed:
        text += f" No difference could be shown: {shown(unclear, differences)}."
    if over_control:
        text += f" Against the same pretraining on the control text: {shown(list(over_control), over_control)}"
        better = [budget for budget in helped if over_control[budget][1] > 0]
        if better:
            text += "; so it is this text that helps" + ", where that interval lies above 0" * (len(better) < len(helped))
        elif helped:
            text += "; so nothing shows that it is this text that matters, rather than more pretraining on any"
        text += "."
    return text


def caveats(facts: dict) -> list[str]:
    """What a reader of the verdict has to mind."""
    held_out, rows = facts["perplexity"], facts["rows"]["test"]
    unknown = max(text["unknown_share"] for text in facts["overlap"]["texts"].values())
    told = {
        "one seed alone was tried, another may well turn the answer": facts["seeds"] == 1,
        "pretraining was too short, guessing each token by its frequency is still better than this model":
            "curve" in held_out and held_out["unigram"] and held_out["after"] > held_out["unigram"],
        f"{rows} test rows are few": rows < FEW_ROWS,
        f"{facts['seen_in_training']:,} of the {rows:,} test texts are among the training rows": facts["seen_in_training"] > rows // 20,
        f"the encoder's tokenizer does not know {unknown:.0%} of the words": unknown > MANY_UNKNOWN}
    return [f"Mind that {' and '.join(found)}."] if (found := [text for text, holds in told.items() if holds]) else []


def cell(text: object) -> str:
    """Text for a cell of a Markdown table, and safe in HTML."""
    return re.sub(r"([\\`*_\[\]!])", r"\\\1", html.escape(str(text), quote=False)).replace("\n", " ")


def table(header: list[object], rows: list[list[object]]) -> str:
    """A table whose cells are shown as they are."""
    return markdown_table(list(map(cell, header)), [list(map(cell, row)) for row in rows])


def seeds(facts: dict) -> str:
    """How many there were."""
    return f"{facts['seeds']} seed{'s' * (facts['seeds'] > 1)}"


def minutes(seconds: float) -> str:
    """A time as a reader takes it in."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def write_report(output: Path, facts: dict, truth: np.ndarray, predictions: dict[str, dict[str, np.ndarray]]) -> str:
    """Write report.md, report.html and their pictures; returns the verdict. `predictions`: encoder -> budget -> int [seeds, rows]."""
    metric, budgets, classes = facts["metric"], facts["budgets"], facts["classes"]
    scores = {name: {budget: [result["test"][metric] for result in results] for budget, results in of.items()}
              for name, of in facts["scores"].items()}
    differences = differences_of(truth, predictions, scores, len(classes), metric, "base")
    control = differences_of(truth, predictions, scores, len(classes), metric, "control") if "control" in scores else None
    answer = " ".join([verdict(differences, control, budgets, metric), *caveats(facts)])
    draw_pictures(output, facts, scores)
    sections = [f"# Did going on with pretraining help?\n\n> {answer}", what_was_done(facts),
                scores_section(facts, scores, differences, control), classes_section(facts), perplexity_section(facts),
                overlap_section(facts), time_section(facts), commands_section(facts)]
    text = "\n\n".join(section for section in sections if section) + "\n"
    write_text(output / "report.md", text)
    write_text(output / "report.html", to_html(text, output))
    return answer


def draw_pictures(output: Path, facts: dict, scores: dict) -> None:
    """The pictures of the report."""
    budgets, metric, texts = facts["budgets"], METRICS[facts["metric"]], facts["overlap"]
    pictures.overlap(output / "overlap.png", texts["names"], np.array(texts["shares"]), texts["words"])
    pictures.curves(output / "learning_curve.png", f"{metric} on the test rows, mean and deviation over {seeds(facts)}",
                    "labelled rows to train on", metric,
                    {f"encoder {ENCODERS[name]}": ([budgets[budget] for budget in of], [np.mean(values) for values in of.values()],
                                                   [np.std(values, ddof=len(values) > 1) for values in of.values()])
                     for name, of in scores.items()}, logarithmic="x" if len(budgets) > 1 else "")
    largest = list(budgets)[-1]
    title = f"What became of the test rows of each class, {budgets[largest]:,} labelled rows, {seeds(facts)} added up"
    pictures.confusion(output / "confusion.png", title, {
        f"encoder {ENCODERS[name]}": np.sum([result["test"]["confusion"] for result in facts["scores"][name][largest]], axis=0)
        for name in ("base", "adapted")}, facts["classes"])
    held_out = facts["perplexity"]
    if "curve" in held_out:
        curve, training = (list(zip(*held_out[name])) for name in ("curve", "training"))
        pictures.curves(output / "perplexity.png", "Perplexity while pretraining on your text: lower is better", "optimizer step",
                        "perplexity", {"held-out text": (*curve, None), "training text": (*training, None)}, logarithmic="y",
                        flat={"guessing by frequency": held_out["unigram"]} if held_out["unigram"] else None)


def what_was_done(facts: dict) -> str:
    """What the reader has to know first."""
    rows, text = facts["rows"], facts["text"]
    lines = [f"The encoder **{cell(facts['model'])}** was pretrained further on {text['text']['documents']:,} documents of your text "
             f"({facts['pretraining']['adapted']['steps']:,} optimizer steps). Then the encoder as it was and the one after that "
             "were fine-tuned on the same labelled rows, with the same seeds, and scored on the same test rows.",
             f"- Task: {len(facts['classes'])} classes ({', '.join(map(cell, facts['classes'][:20]))}); "
             + ", ".join(f"{count:,} {name} rows" for name, count in rows.items()) + ".",
             f"- The best model of a fine-tuning run is chosen by the validation rows, all of which are used for every budget; "
             f"{seeds(facts)} each."]
    if facts["seen_in_training"]:
        lines.append(f"- {facts['seen_in_training']:,} of the test texts are among the training rows, too.")
    for name, of in text.items():
        removed = f"{of['removed']:,} exact copies of test texts were removed" if of["removed"] else "it held no exact copy of a test text"
        task = f"; the {of['task_texts']:,} texts of the training rows were added" if of["task_texts"] else ""
        lines.append(f"- {'Your text' if name == 'text' else 'The control text'}: {removed}{task}.")
    if "control" in text:
        lines.append("- Control: the same encoder after as many steps on text of another domain. What your text does beyond that is due to "
                     "its domain.")
    return "## What was done\n\n" + lines[0] + "\n\n" + "\n".join(lines[1:])


def scores_section(facts: dict, scores: dict, differences: dict, control: dict | None) -> str:
    """The answer in numbers."""
    rows = []
    for budget, count in facts["budgets"].items():
        values = [f"{np.mean(of[budget]):.3f}" + (f" ± {np.std(of[budget], ddof=1):.3f}" if facts["seeds"] > 1 else "")
                  for of in scores.values()]
        pairs = [pair for pair in (differences, control) if pair]
        rows.append([f"{count:,}", *values, *(f"{of[budget][0]:+.3f} ({of[budget][1]:+.3f} to {of[budget][2]:+.3f})" for of in pairs)])
    header = ["labelled rows", *(f"encoder {ENCODERS[name]}" for name in scores), "difference (95 % interval)",
              "beyond the control (95 % interval)"][: 2 + len(scores) + (control is not None)]
    return (f"## Does it help the task?\n\n{MEANING[facts['metric']]}. The table has the mean ± standard deviation over "
            f"{seeds(facts)} on the test rows. The interval says what other test rows of the same kind, and other "
            f"seeds, might have shown ({DRAWS:,} draws of both, the same for both encoders): a difference is taken for real where its "
            "interval does not hold 0.\n\n" + table(header, rows)
            + "\n\n![Score by number of labelled rows](learning_curve.png)")


def classes_section(facts: dict) -> str:
    """F1 of each class and the confusions before and after, with the largest budget."""
    largest = list(facts["budgets"])[-1]

    def mean(name: str, label: str) -> float:
        return float(np.mean([result["test"]["classes"][label]["f1"] for result in facts["scores"][name][largest]]))

    num_rows = facts["scores"]["base"][largest][0]["test"]["classes"]
    rows = [[label, num_rows[label]["rows"], f"{mean('base', label):.3f}", f"{mean('adapted', label):.3f}",
             f"{mean('adapted', label) - mean('base', label):+.3f}"] for label in facts["classes"]]
    return (f"## Which classes?\n\nF1 of each class with {facts['budgets'][largest]:,} labelled rows, mean over the seeds; the picture "
            "adds up the seeds.\n\n" + table(["class", "test rows", "before", "after", "difference"], rows)
            + "\n\n![Confusion before and after](confusion.png)")


def perplexity_section(facts: dict) -> str:
    """What pretraining has learnt of the text."""
    held_out, fresh = facts["perplexity"], facts["fresh_parts"]
    if "curve" not in held_out:
        return "## Has it learnt the text?\n\nNo text was held out, so there is no perplexity to tell."
    rows = [["before", f"{held_out['before']:,.2f}"], ["after pretraining on your text", f"{held_out['after']:,.2f}"]]
    told = ""
    if "MLM head" in fresh:
        warmup = facts["pretraining"]["adapted"]["warmup_steps"]
        step, value = next(((step, value) for step, value in held_out["curve"] if step >= max(1, warmup)), held_out["curve"][-1])
        rows[0] = [f"at step {step}, the first held-out value after warm-up", f"{value:,.2f}"]
        told = (f"\n\nThe encoder came without {' and '.join(fresh)}, which started from random weights: its perplexity before "
                f"({held_out['before']:,.0f}) means nothing, so the one after is compared with others.")
    if "control" in held_out:
        rows.append(["after the same pretraining on the control text", f"{held_out['control']:,.2f}"])
    if held_out["unigram"]:
        rows.append(["guessing by frequency", f"{held_out['unigram']:,.2f}"])
    return ("## Has it learnt the text?\n\nPerplexity on documents of your text that were held out: 50 means \"as unsure as among 50 "
            f"tokens\"; lower is better.{told}\n\n" + table(["", "held-out perplexity"], rows) + "\n\n![Perplexity](perplexity.png)")


def overlap_section(facts: dict) -> str:
    """How far the texts are from one another."""
    of = facts["overlap"]
    shares = [[name, *map("{:.0%}".format, row)] for name, row in zip(of["names"], of["shares"])]
    rows = [[name, f"{text['words']:,}", f"{text['pieces_per_word']:.2f}", f"{text['unknown_share']:.2%}"]
            for name, text in of["texts"].items()]
    return (f"## How near are the texts?\n\nShare of their {of['words']:,} most frequent words that two texts have in common, stop words "
            "left out. A pretraining text near the task tends to help more.\n\n" + table(["", *of["names"]], shares)
            + "\n\n![Overlap of the vocabularies](overlap.png)\n\nHow the encoder's tokenizer reads their words:\n\n"
            + table(["text", "words", "pieces a word", "unknown words"], rows))


def time_section(facts: dict) -> str:
    """Time of each part and the machine."""
    runs, scores = facts["pretraining"], facts["scores"]
    seconds = {"cleaning the text, overlap, perplexities": sum((facts["text_seconds"], *(facts[part]["wall_seconds"] for part in (
        "overlap", "perplexity"))))}
    seconds |= {f"pretraining, {name}": run["wall_seconds"] for name, run in runs.items()}
    for name, budgets in scores.items():
        times = [result["wall_seconds"] for results in budgets.values() for result in results]
        seconds[f"{len(times)} times fine-tuning, {name}"] = sum(times)
    rows = [[part, minutes(taken)] for part, taken in seconds.items()]
    return ("## Time\n\n" + table(["part", "time"], [*rows, ["together", minutes(sum(seconds.values()))]])
            + f"\n\nOn {runs['adapted']['device']} ({platform.machine()}, {torch.get_num_threads()} threads), torch {torch.__version__}, "
            f"transformers {transformers.__version__}, Python {platform.python_version()}.")


def commands_section(facts: dict) -> str:
    """Every command that repeats a part."""
    lines = [facts["command"], *(run["command"] for run in facts["pretraining"].values())]
    lines.append(facts["overlap"]["command"])
    lines += [facts["scores"][name][budget][0]["command"] for budget in facts["budgets"] for name in facts["scores"]]
    return ("## Commands\n\nThe whole experiment, its pretraining, the overlap, and the fine-tuning of each encoder with each budget at "
            f"seed 0 (the others: `--seed` up to {facts['seeds'] - 1}):\n\n```\n" + "\n".join(lines) + "\n```")


def to_html(text: str, folder: Path) -> str:
    """One page with the pictures inside."""
    import markdown  # comes with tensorboard

    body = markdown.markdown(text, extensions=["tables", "fenced_code"])

    def inside(found: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / found[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="(\w+\.png)"', inside, body)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>Did going on with pretraining help?</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n")
