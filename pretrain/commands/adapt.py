"""Find out whether further pretraining on your text helps your task; writes a report."""

import shlex
import shutil
from dataclasses import fields
from itertools import takewhile

from pretrain.cli import parse
from pretrain.config import AdaptOptions
from pretrain.errors import UserError
from pretrain.schema import flag


def main(argv: list[str]) -> None:
    """Parse, run the parts that have no result yet, write the report, print the verdict."""
    options = parse(_join_quoted(argv), AdaptOptions, __doc__)

    from pretrain.adapt.checks import build_experiment, open_experiment
    from pretrain.adapt.pipeline import run_experiment
    from pretrain.adapt.report import write_report

    experiment = build_experiment(options)
    open_experiment(experiment)
    facts = run_experiment(experiment)
    facts["command"] = shlex.join(["python", "scripts/adapt.py", *argv])
    output = experiment.output
    answer = write_report(output, facts)
    if experiment.replaced:
        shutil.rmtree(experiment.replaced, ignore_errors=True)
    print(f"\n{answer.replace('**', '')}\n")
    print(f"report: {output / 'report.html'} (also as {output / 'report.md'})")


def _join_quoted(argv: list[str]) -> list[str]:
    """`argv` with --pretrain and its value as one word: argparse would read a separate value that
    starts with dashes as another option."""
    joined, own = [], {flag(entry.name) for entry in fields(AdaptOptions)}
    for place, word in enumerate(argv):
        if joined and joined[-1] in ("--pretrain", "--finetune"):
            name, rest = joined[-1], argv[place + 1 :]
            values = list(takewhile(lambda other: other.partition("=")[0] not in own, rest))
            if word.startswith("--") and " " not in word and values:
                expected = f'{name} "{" ".join([word, *values])}"'
                raise UserError(f"{name} {word}: needs quotes; expected {expected}")
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
