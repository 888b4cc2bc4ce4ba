"""The page that answers "did it help?": tables, pictures and one sentence, from what the parts of an experiment have left."""
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
from pretrain.significance import DRAWS, differences_of

FEW_ROWS, MANY_UNKNOWN, OWN_TEXT = 100, 0.05, 0.95  # of which a reader is warned
ENCODERS = {"base": "original encoder", "adapted": "pretrained on your text", "control": "pretrained on the control text"}
METRICS = {"macro_f1": "macro F1", "accuracy": "accuracy"}
MEANING = {"accuracy": "Accuracy is the share of test rows that get the right class", "macro_f1": (
    "F1 combines recall, the share of a class's rows that are found, and precision, the share of the rows given that class that are right; "
    "1 is perfect, and macro F1 is the mean of the classes")}
STYLE = """body{font:16px/1.5 sans-serif;max-width:52em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}
td,th{border:1px solid #bbb;padding:.3em .7em;text-align:left}img{max-width:100%}pre{background:#f4f4f4;padding:.7em;overflow:auto;
white-space:pre-wrap;word-break:break-all}blockquote{border-left:.4em solid #0072B2;margin:1em 0;padding:.2em 1em;font-size:1.1em}"""


def verdict(differences: dict[str, tuple[float, float, float]], over_control: dict[str, tuple[float, float, float]] | None,
            budgets: dict[str, int], metric: str) -> str:
    """The answer, "yes" only for budgets whose interval lies above 0, and what the control adds to it."""
    def numbers(chosen: list[str], of: dict) -> str:
        return "; ".join(f"with {budgets[budget]:,} labels {of[budget][0]:+.3f} {METRICS[metric]} (95 % interval {of[budget][1]:+.3f} to "
                         f"{of[budget][2]:+.3f})" for budget in chosen)

    def only(chosen: list[str]) -> str:
        return "" if len(chosen) == len(differences) else f" with {' and '.join(f'{budgets[budget]:,}' for budget in chosen)} labels"

    helped = [budget for budget, (_, low, _) in differences.items() if low > 0]
    harmed = [budget for budget, (_, _, high) in differences.items() if high < 0]
    unclear = [budget for budget in differences if budget not in helped + harmed]
    what = "further pretraining on this text"
    if helped:
        text = f"**Yes{only(helped)}**: {what} helped this task, {numbers(helped, differences)}."
        text += f" It made it worse {numbers(harmed, differences)}." if harmed else ""
    elif harmed:
        text = f"**No**: {what} made this task worse, {numbers(harmed, differences)}."
    else:
        text = f"**No**: that {what} helps this task could not be shown, {numbers(unclear, differences)}; 0 lies within."
    if unclear and helped + harmed:
        text += f" No difference could be shown {numbers(unclear, differences)}; 0 lies within."
    if over_control:
        text += f" Against the same pretraining on the control text: {numbers(list(over_control), over_control)}"
        better = [budget for budget in helped if over_control[budget][1] > 0]
        if better:
            text += f"; so it is this text that helps{only(better)}"
        elif helped:
            text += "; so nothing shows that it is this text that matters, rather than more pretraining on any"
        text += "."
    return text


def guess(facts: dict) -> float:
    """The score of always saying the class that is most frequent in the test rows."""
    rows = [of["rows"] for of in facts["scores"]["base"][list(facts["budgets"])[0]][0]["test"]["classes"].values()]
    accuracy = max(rows) / sum(rows)
    return accuracy if facts["metric"] == "accuracy" else 2 * accuracy / (1 + accuracy) / sum(count > 0 for count in rows)


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
    sections = [f"# Did further pretraining help?\n\n> {answer}", what_was_done(facts),
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
                    {ENCODERS[name]: ([budgets[budget] for budget in of], [np.mean(values) for values in of.values()],
                                                   [np.std(values, ddof=len(values) > 1) for values in of.values()])
                     for name, of in scores.items()}, logarithmic="x" if len(budgets) > 1 else "",
                    flat={"always the most frequent class": guess(facts)})
    largest = list(budgets)[-1]
    title = f"What became of the test rows of each class, {budgets[largest]:,} labelled rows, {seeds(facts)} added up"
    pictures.confusion(output / "confusion.png", title, {
        ENCODERS[name]: np.sum([result["test"]["confusion"] for result in facts["scores"][name][largest]], axis=0)
        for name in ("base", "adapted")}, facts["classes"])
    held_out = facts["perplexity"]
    if "curve" in held_out:
        first = facts["pretraining"]["adapted"]["warmup_steps"] if "MLM head" in facts["fresh_parts"] else 0  # before, it means nothing
        curve, training = (list(zip(*([point for point in held_out[name] if point[0] >= first] or held_out[name])))
                           for name in ("curve", "training"))
        pictures.curves(output / "perplexity.png", "Perplexity while pretraining on your text: lower is better", "optimizer step",
                        "perplexity (logarithmic)", {"held-out text": (*curve, None), "training text": (*training, None)}, logarithmic="y",
                        flat={"guessing by frequency": held_out["unigram"]} if held_out["unigram"] else None)


def what_was_done(facts: dict) -> str:
    """What the reader has to know first."""
    rows, text = facts["rows"], facts["text"]
    lines = [f"The encoder **{cell(facts['model'])}** was pretrained further on your text, {text['text']['documents']:,} documents with "
             f"those held out for perplexity ({facts['pretraining']['adapted']['steps']:,} optimizer steps). Then the original encoder "
             "and the one pretrained further were fine-tuned on the same labelled rows, with the same seeds, and scored on the same test "
             "rows.",
             f"- Task: {len(facts['classes'])} classes ({', '.join(map(cell, facts['classes'][:20]))}); "
             + ", ".join(f"{count:,} {name} rows" for name, count in rows.items()) + ".",
             f"- The best model of a fine-tuning run is chosen by all {rows['valid']:,} validation rows, whatever the budget: labels "
             f"beyond it; {seeds(facts)} each, which also choose the rows of a budget."]
    if facts["seen_in_training"]:
        lines.append(f"- {facts['seen_in_training']:,} of the test texts are among the training rows, too.")
    for name, of in text.items():
        removed = f"{of['removed']:,} exact copies of test texts were removed" if of["removed"] else "it held no exact copy of a test text"
        task = f"; the {of['task_texts']:,} texts of the training rows were added" if of["task_texts"] else ""
        lines.append(f"- {'Your text' if name == 'text' else 'The control text'}: {of['documents']:,} documents; {removed}{task}.")
    if "control" in text:
        lines.append("- Control: the same encoder after as many steps on text of another domain. What your text does beyond that is due to "
                     "what it says, not to more training alone.")
    own = np.array(facts["overlap"]["shares"])[:2, :2].min()
    if own > OWN_TEXT:
        lines.append(f"- Your text shares {own:.0%} of its frequent words with the task's training rows: it is nearly the task's own text, "
                     "so this says little of other text of the domain.")
    return "## What was done\n\n" + lines[0] + "\n\n" + "\n".join(lines[1:])


def scores_section(facts: dict, scores: dict, differences: dict, control: dict | None) -> str:
    """The answer in numbers."""
    rows = []
    for budget, count in facts["budgets"].items():
        values = [f"{np.mean(of[budget]):.3f}" + (f" ± {np.std(of[budget], ddof=1):.3f}" if facts["seeds"] > 1 else "")
                  for of in scores.values()]
        pairs = [pair for pair in (differences, control) if pair]
        rows.append([f"{count:,}", *values, *(f"{of[budget][0]:+.3f} ({of[budget][1]:+.3f} to {of[budget][2]:+.3f})" for of in pairs)])
    header = ["labelled rows", *(ENCODERS[name] for name in scores), "your text less original (95 % interval)",
              "your text less control (95 % interval)"][: 2 + len(scores) + (control is not None)]
    return (f"## Does it help the task?\n\n{MEANING[facts['metric']]}. Always saying the most frequent class would reach "
            f"{guess(facts):.3f}. The table has the mean ± standard deviation over {seeds(facts)} on the test rows. The interval is of the "
            f"difference, on the same rows, seed by seed ({DRAWS:,} bootstrap draws of test rows and seeds, each used for both encoders), "
            "so that it may leave out 0 where the ± overlap; with few seeds it is rough. A difference is taken for real where its interval "
            "leaves out 0.\n\n" + table(header, rows)
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
            "adds up the seeds.\n\n" + table(["class", "test rows", ENCODERS["base"], ENCODERS["adapted"], "difference"], rows)
            + "\n\n![Confusion before and after](confusion.png)")


def perplexity_section(facts: dict) -> str:
    """What pretraining has learnt of the text."""
    held_out, fresh = facts["perplexity"], facts["fresh_parts"]
    if "curve" not in held_out:
        return "## Has it learnt the text?\n\nNo text was held out, so there is no perplexity to tell."
    rows = [["before", f"{held_out['before']:,.1f}"], ["after pretraining on your text", f"{held_out['after']:,.1f}"]]
    told = ""
    if "MLM head" in fresh:
        warmup = facts["pretraining"]["adapted"]["warmup_steps"]
        step, value = next(((step, value) for step, value in held_out["curve"] if step >= max(1, warmup)), held_out["curve"][-1])
        rows[0] = [f"at step {step}, the first held-out value after warm-up", f"{value:,.1f}"]
        told = (f"\n\nThe encoder came without {' and '.join(fresh)} (what guesses masked tokens), which started at random: its perplexity "
                f"before ({held_out['before']:,.0f}) means nothing, so the one after is compared with others.")
    if "control" in held_out:
        rows.append(["after the same pretraining on the control text", f"{held_out['control']:,.1f}"])
    if held_out["unigram"]:
        rows.append(["guessing each token by its frequency", f"{held_out['unigram']:,.1f}"])
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
        seconds[f"{len(times)} times fine-tuning, {ENCODERS[name]}"] = sum(times)
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
            f"<title>Did further pretraining help?</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n")
