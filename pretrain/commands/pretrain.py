"""Pretrain BERT with MLM and NSP on your own text, from scratch or from a checkpoint.

Without arguments, trains a tiny BERT on embedded English text in about three minutes."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pretrain.cli import command, parse, read_options
from pretrain.commands.fill_mask import fill_masks, open_pipeline
from pretrain.config import Config, FinetuneOptions
from pretrain.errors import UserError, check
from pretrain.files import model_folder
from pretrain.preflight import problems_of, validate

EMBEDDED_DEFAULTS = {  # for pretrain.py without text
    "model": "tiny",
    "vocab_size": 4096,
    "max_length": 64,
    "format": "sentences",
    "output": "runs/default",
    "eval_tokens": 60_000,
}
EXAMPLES = (
    "Return True [MASK] the object is a string.",
    "Return [MASK] if the path exists, False otherwise.",
    "This is the end of [MASK] file.",
)
HINT = "--resume continues the run"


def main(argv: Sequence[str]) -> None:
    """Parse, prepare, train, report."""
    asked = parse(argv, Config, __doc__)
    saved = read_saved(asked)
    is_demo = not asked.train and not saved
    embedded = dict(EMBEDDED_DEFAULTS)
    if asked.tokenizer:
        del embedded["vocab_size"]
    defaults = embedded if is_demo and not asked.resume else saved
    config = parse(argv, Config, __doc__, defaults=defaults)
    check(problems_of(config, is_new=not saved))
    output = Path(config.output or "")
    if is_demo and config.resume:
        raise UserError(f"--resume --output {output}: no run to resume; expected --train PATHS")
    if is_demo and config.model != EMBEDDED_DEFAULTS["model"]:
        raise UserError(f"--model {config.model}: no text to train on; expected --train PATHS")
    if saved and (output / "final").is_dir() and not list(output.glob("checkpoint-*")):
        from pretrain.resume import changed_options

        check(changed_options(config, {"options": saved}, output / "config.json"))
        print(f"{output} is finished and has no checkpoints; use {model_folder(str(output))}")
        return
    if saved and not os.access(output, os.W_OK) and report_finished(config, saved):
        return

    if is_demo:  # before torch is imported; waiting threads then sleep (see scripts/README.md)
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pretrain import demo
    from pretrain.build import build
    from pretrain.pretraining import print_plan
    from pretrain.runtime.checkpoint import read_facts
    from pretrain.runtime.distributed import stop
    from pretrain.train import FINISHED, train

    if is_demo:
        config = replace(config, train=(str(demo.embedded_text(Path(config.cache))),))
        config = demo.fit_to_machine(config)
    run = build(config)
    final = run.output / "final"
    if run.has_result():
        step = read_facts(final)["step"]
        print(f"{run.output} is finished, at step {step}; use {model_folder(str(run.output))}")
        stop()
        return
    run.open_output()
    print_plan(run)
    summary = train(run)
    report(run.output, summary)
    if is_demo and summary["state"] == FINISHED and run.world.is_main:
        print_examples(final)
    stop()


def read_saved(asked: Config | FinetuneOptions) -> dict | None:
    """Options of the run to resume: from config.json, or from the newest checkpoint if that file is
    missing or damaged. None without a run. UserError if they do not fit the class of `asked`."""
    if not (asked.resume and asked.output):
        return None
    output = Path(asked.output)
    states = list(output.glob("checkpoint-[0-9]*/training_state.json"))
    states.sort(key=lambda path: (len(path.parent.name), path.parent.name), reverse=True)
    problems = []
    for path in filter(os.path.isfile, [output / "config.json", *states]):
        values = {}
        try:
            values = read_options(path)
            values = dict(values["options"]) if path in states else values
            found = validate(parse([], type(asked), "", defaults=values))
        except (UserError, KeyError, TypeError) as error:
            found = str(error).splitlines()
        if values and not found:
            if problems:
                print("\n".join([*problems, f"{path}: using the options in this file"]))
            return values
        problems += [f"{path}: {problem.removeprefix(f'{path}: ')}" for problem in found]
    check(problems)
    return None


def report_finished(config: Config, saved: dict) -> bool:
    """Report a finished run again without writing anything. False if it is not whole, or if an
    option differs from the `saved` ones, which may mean more steps."""
    from pretrain.resume import portable_options

    output, options = Path(config.output), portable_options(config)
    is_same = all(options[name] == value for name, value in saved.items())
    summary = finished_summary(output) if is_same else {}
    if summary:
        print(f"{output} is finished and read-only")
        report(output, summary)
    return bool(summary)


def finished_summary(output: Path, has_model: bool = True) -> dict:
    """The summary of the run in `output`; {} if it is not finished or its result is damaged. Prints
    what is damaged."""
    from pretrain.files import read_json
    from pretrain.runtime.checkpoint import problem_of
    from pretrain.train import FINISHED

    path = output / "summary.json"
    try:
        summary = {"state": FINISHED} | read_json(path) if path.exists() else {}
    except UserError as error:
        print(error)
        return {}
    if summary.get("state") != FINISHED:
        return {}
    problem = problem_of(output / "final", needed=()) if has_model else None
    if problem:
        print(problem)
    return {} if problem else summary


def report(output: Path, summary: dict) -> None:
    """Print the summary and where to find the results."""
    rows = dict(summary)
    notes = rows.pop("notes", [])
    rows.pop("recipe", None)  # runs of earlier versions have none
    if summary["state"] != "finished":
        rows["resume"] = command("pretrain", "--resume", "--output", output)
    rows["TensorBoard"] = f"tensorboard --logdir {shlex.quote(str(output))}"
    formats = {float: ",.4f", int: ","}
    for name, value in rows.items():
        print(f"{name.replace('_', ' '):23} {value:{formats.get(type(value), '')}}")
    for note in notes:
        print(note)


def print_examples(folder: Path) -> None:
    """Print a few masks, filled by the model in `folder`."""
    fill = open_pipeline(str(folder))
    print("a few masks, filled by the model:")
    for text in EXAMPLES:
        (rows,) = fill_masks(fill, text, top=3, max_length=512)
        guesses = ", ".join(f"{token} {share:.2f}" for token, share, _ in rows)
        print(f"  {text}\n    {guesses}")
