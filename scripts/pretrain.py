"""Pretrain BERT with MLM and NSP on your own text, from scratch or from a checkpoint.

Without arguments: trains a tiny BERT on embedded English text in about three minutes."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` finds this script

from pretrain.config import EMBEDDED_DEFAULTS, Config, UserError, check, parse, read_options, run_command, validate  # noqa: E402


def main(argv: list[str]) -> None:
    """Parse, prepare, train, tell the result."""
    config = parse(argv, Config, __doc__)
    check(validate(config))
    saved = Path(config.output or "", "config.json")
    embedded = not config.train
    if config.resume and embedded and not saved.is_file():
        raise UserError(f"--resume --output {config.output}: holds no run to go on with; needed are the options of a new one, with --train")
    if config.resume and saved.is_file():
        config = parse(argv, Config, __doc__, defaults={**read_options(saved), "resume": False, "overwrite": False})
        embedded = False
    elif embedded:
        config = parse(argv, Config, __doc__, defaults=EMBEDDED_DEFAULTS)

    from pretrain import embedded as embedded_text
    from pretrain import setup
    from pretrain.runtime.distributed import stop
    from pretrain.train import train

    if embedded:
        config.train = [str(embedded_text.write_text(Path(config.cache)))]
    run = setup.build(config)
    if run.is_finished:
        print(f"{run.output} is finished, at step {run.state['progress']['step']}; its model is {run.output / 'final'}")
        return
    if embedded and not run.checkpoint:
        embedded_text.fit_to_machine(run)
    setup.open_output(run)
    setup.print_plan(run)
    summary = train(run)
    if run.world.is_main:
        report(run, summary, embedded)
    stop()


def report(run, summary: dict, show_masks: bool) -> None:
    """The summary, and where things are."""
    print("\n".join(f"{name.replace('_', ' '):22} {value:,.4f}" if isinstance(value, float) else f"{name.replace('_', ' '):22} {value}"
                    for name, value in summary.items()))
    if show_masks:
        from pretrain.embedded import fill_examples

        print(f"a few masks, filled by the model:\n{fill_examples(run.output / 'final')}")
    print(f"model        {run.output / 'final'}\nTensorBoard  tensorboard --logdir {run.output}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
