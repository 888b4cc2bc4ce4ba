"""Fine-tune an encoder for text classification: the best model by held-out score, its scores and its confusion matrix."""
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.command import parse, run_command  # noqa: E402
from pretrain.config import FinetuneOptions  # noqa: E402


def main(argv: list[str]) -> None:
    """Parse, train, print the scores; JSON on the last line."""
    options = parse(argv, FinetuneOptions, __doc__)

    from pretrain.files import hold
    from pretrain.finetune import build, describe, finetune
    from pretrain.predict import table_of

    task = build(options)
    hold(task.output)
    print(describe(task))
    summary = finetune(task)
    for name in ("valid", "test"):
        if name in summary:
            print(f"\n--{name}, the model of step {summary['best_step']}:\n{table_of(summary[name])}")
    print(f"\n{'model' if options.save_model else 'scores'}: {task.output / 'final' if options.save_model else task.output}\n"
          f"TensorBoard: tensorboard --logdir {task.output}")
    scores = {f"{part}_{name}": value for part in ("valid", "test") for name, value in summary.pop(part, {}).items()
              if isinstance(value, float)}
    print(json.dumps(summary | scores))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
