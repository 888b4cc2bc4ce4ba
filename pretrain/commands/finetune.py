"""Fine-tune an encoder for text classification: best model, scores, confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pretrain.cli import read_command_line
from pretrain.commands.pretrain import read_saved
from pretrain.config import FinetuneOptions, missing, validate
from pretrain.errors import check

HINT = "--resume continues from the newest checkpoint, if there is one"


def main(argv: Sequence[str]) -> None:
    """Parse, train, print the scores; JSON on the last line."""
    given = read_command_line(argv, FinetuneOptions, __doc__)
    options = given.with_defaults()
    resumes = options.resume and options.output
    if resumes:
        options = given.with_defaults(read_saved(Path(options.output)))
    check(missing(options) + validate(options))

    from pretrain.files import hold, read_json
    from pretrain.finetune.build import build, print_plan
    from pretrain.runtime.checkpoint import prune
    from pretrain.train import FINISHED, train

    output = Path(options.output or "")
    if options.output:
        hold(output)
    summary = output / "summary.json"
    if resumes and summary.is_file() and read_json(summary).get("state", FINISHED) == FINISHED:
        prune(output, keep=0)  # a kill may have left checkpoints
        print(f"{output} is finished; its scores are in {summary}")
        return
    run = build(options)
    run.open_output()
    print_plan(run)
    report(run.output, train(run))


def report(output: Path, summary: dict) -> None:
    """Print the scores and where everything is; JSON on the last line."""
    from pretrain.finetune.scores import numbers_of, score_table

    numbers = {}
    for name in ("valid", "test"):
        scores = summary.pop(name, None)
        if scores:
            best = f"the model of step {summary['best_step']}"
            print(f"\n--{name}, {best}:\n{score_table(scores)}")
            numbers |= {f"{name}_{key}": value for key, value in numbers_of(scores).items()}
    final = output / "final"
    if summary["state"] != "finished":
        print(f"\nresume: python scripts/finetune.py --resume --output {output}")
    else:
        print(f"\nmodel: {final}" if final.is_dir() else f"\nscores: {output}")
    print(f"TensorBoard: tensorboard --logdir {output}")
    print(json.dumps(summary | numbers))
