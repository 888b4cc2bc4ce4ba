"""Find out whether further pretraining on your text helps your task; writes a report."""

from pretrain.cli import command, join_quoted, parse
from pretrain.config import AdaptOptions

HINT = "run the same command again, without --overwrite, to continue"


def main(argv: list[str]) -> None:
    """Parse, run the parts that have no result yet, write the report, print the verdict."""
    options = parse(join_quoted(argv, AdaptOptions), AdaptOptions, __doc__)

    from pretrain.adapt.checks import build_experiment, open_experiment
    from pretrain.adapt.pipeline import run_experiment
    from pretrain.adapt.report import write_report
    from pretrain.files import remove

    experiment = build_experiment(options)
    open_experiment(experiment)
    facts = run_experiment(experiment)
    facts["command"] = command("adapt", *argv)
    output = experiment.output
    answer = write_report(output, facts)
    if experiment.replaced:
        remove(experiment.replaced)
    print(f"\n{answer.replace('**', '')}\n")
    print(f"report: {output / 'report.html'} (also as {output / 'report.md'})")
