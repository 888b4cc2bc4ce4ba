"""Pretrain BERT with MLM and NSP on your own text, from scratch or from a checkpoint.

Without arguments: trains a tiny BERT on embedded English text in about three minutes."""
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` finds this script

from pretrain.command import UserError, check, parse, read_options, run_command  # noqa: E402
from pretrain.config import EMBEDDED_DEFAULTS, Config, validate  # noqa: E402


def main(argv: list[str]) -> None:
    """Parse, prepare, train, tell the result."""
    config = parse(argv, Config, __doc__)
    check(validate(config))
    saved = read_saved(Path(config.output)) if config.resume else None
    if saved and Path(config.output, "final").is_dir() and not list(Path(config.output).glob("checkpoint-*")):
        print(f"{config.output} is finished, its checkpoints are gone; its model is {Path(config.output, 'final')}")
        return
    embedded = not config.train and not saved
    if saved:
        config = parse(argv, Config, __doc__, defaults=saved)
    elif config.resume and embedded:
        raise UserError(f"--resume --output {config.output}: holds no run to go on with; needed are the options of a new one, with --train")
    elif embedded and config.model != Config.model:
        raise UserError(f"--model {config.model}: needed is text to train it on, --train PATHS")
    elif embedded:
        config = parse(argv, Config, __doc__, defaults=EMBEDDED_DEFAULTS)

    if embedded:  # before torch is imported: its threads then sleep while they wait, for a shared machine (scripts/README.md)
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pretrain import embedded as default_run
    from pretrain import setup
    from pretrain.runtime.distributed import stop
    from pretrain.train import train

    if embedded:
        config.train = [str(default_run.write_text(Path(config.cache)))]
    run = setup.build(config)
    if run.has_result():
        print(f"{run.output} is finished, at step {run.state['progress']['step']}; its model is {run.output / 'final'}")
        stop()
        return
    if embedded:
        default_run.fit_to_machine(run)
    setup.open_output(run)
    setup.print_plan(run)
    summary = train(run)
    report(run, summary)
    if embedded and summary["state"] == "finished" and run.world.is_main:
        print(f"a few masks, filled by the model:\n{default_run.fill_examples(run.output / 'final')}")
    stop()


def read_saved(output: Path) -> dict | None:
    """Options of the run in a folder: of its config.json, or of the newest checkpoint where that is lost; None where there is no run."""
    states = sorted(output.glob("checkpoint-*/training_state.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    problems = []
    for path in [output / "config.json", *states]:
        try:
            values = read_options(path) if path.is_file() else {}
            if values:
                return values if path.name == "config.json" else dict(values["options"])
        except (UserError, KeyError, TypeError) as error:
            problems.append(f"{path}: {error}")
    check(problems)
    return None


def report(run, summary: dict) -> None:
    """The summary, and where things are."""
    for name, value in summary.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        print(f"{name.replace('_', ' '):24}{shown}")
    if summary["state"] == "finished":
        print(f"{'model':24}{run.output / 'final'}")
    else:
        print(f"{'go on':24}python scripts/pretrain.py --resume --output {run.output}")
    print(f"{'TensorBoard':24}tensorboard --logdir {run.output}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], "--resume goes on from the newest checkpoint, where there is one: they stay whole"))
