"""Fine-tune an encoder to predict classes, entities or numbers: best model, scores, predictions."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from pretrain.cli import command, parse
from pretrain.commands.pretrain import finished_summary, read_saved
from pretrain.config import FinetuneOptions
from pretrain.errors import check, option_named
from pretrain.preflight import problems_of

HINT = "--resume continues the run"


def main(argv: Sequence[str]) -> None:
    """Parse, train, print the scores; JSON on the last line."""
    options = parse(argv, FinetuneOptions, __doc__)
    saved = read_saved(options)
    options = parse(argv, FinetuneOptions, __doc__, defaults=saved)
    check(problems_of(options, is_new=not saved))

    from pretrain.files import as_json, lock
    from pretrain.finetune.build import build, print_plan
    from pretrain.finetune.scores import numbers_of, score_table
    from pretrain.resume import changed_options
    from pretrain.runtime.checkpoint import prune
    from pretrain.train import FINISHED, train

    output, resumes = Path(options.output or ""), options.resume and options.output
    is_read_only = output.is_dir() and not os.access(output, os.W_OK)
    if options.output and not (resumes and is_read_only):  # `build` refuses an unfinished run
        with option_named("--output"):
            lock(output)
    # A damaged run continues from its checkpoint or, as a finished one has none, from its start, to
    # the same result.
    if resumes and finished_summary(output, options.save_model):
        check(changed_options(options, {"options": saved or {}}, output / "config.json"))
        if not is_read_only:
            prune(output, keep=0)  # if a kill left checkpoints
        print(f"{output} is finished; its scores are in {output / 'summary.json'}")
        return
    run = build(options)
    run.open_output()
    print_plan(run)
    summary, output, numbers = train(run), run.output, {}
    for name in ("valid", "test"):
        if scores := summary.pop(name, None):
            print(f"\n--{name}, model of step {summary['best_step']}:\n{score_table(scores)}")
            numbers |= numbers_of(scores, f"{name}_")
    if notes := summary.get("notes"):
        print("\n" + "\n".join(notes))
    if summary["state"] != FINISHED:
        print(f"\nresume: {command('finetune', '--resume', '--output', output)}")
    else:
        print(f"\nuse: {output / 'final'}" if options.save_model else f"\nscores: {output}")
    print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(output))}")
    print(as_json(summary | numbers))
