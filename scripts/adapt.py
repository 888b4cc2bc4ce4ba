"""Does going on with pretraining on your text help your task? The whole experiment, and one report that answers."""
import shlex
import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.command import parse, run_command  # noqa: E402
from pretrain.config import AdaptOptions  # noqa: E402


def main(argv: list[str]) -> None:
    """Parse, run what is not done yet, write the report, tell the verdict."""
    joined: list[str] = []
    for part in argv:  # argparse takes "--max-steps=5", one word, for an option of its own
        joined += [f"{joined.pop()}={part}" if joined and joined[-1] in ("--pretrain", "--finetune") else part]
    options = parse(joined, AdaptOptions, __doc__)

    import numpy as np

    from pretrain import adapt
    from pretrain.experiment import build_experiment, describe, open_experiment
    from pretrain.report import write_report

    experiment = build_experiment(options)
    open_experiment(experiment)
    print(describe(experiment))
    facts = adapt.run_experiment(experiment)
    truth = np.array([experiment.classes.index(label) for label in experiment.rows["test"].labels])
    predictions = {name: {budget: np.array([adapt.predicted(experiment, name, budget, seed) for seed in range(options.seeds)])
                          for budget in experiment.budgets} for name in experiment.encoders}
    answer = write_report(experiment.output, facts | {"command": shlex.join(["python", "scripts/adapt.py", *argv])}, truth, predictions)
    if experiment.replaced:
        shutil.rmtree(experiment.replaced, ignore_errors=True)
    print(f"\n{answer.replace('**', '')}\n\nreport: {experiment.output / 'report.html'} (the same as {experiment.output / 'report.md'})")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], "the same command goes on where it was"))
