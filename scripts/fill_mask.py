"""Fill the [MASK] of a sentence: the most probable tokens, their scores, and the sentence with each."""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.command import UserError, check, option, parse, run_command  # noqa: E402


@dataclass
class FillMaskOptions:
    """Options of this command."""

    texts: list[str] = option([], "sentences with one [MASK] or more, each in quotes", nargs="*", metavar="TEXT", positional=True)
    model: str | None = option(None, "model: the folder final, best or a checkpoint of a run, or a hub name")
    top: int = option(5, "tokens that are shown for each [MASK]")


def main(argv: list[str]) -> None:
    """Parse, predict, print a table for each mask."""
    options = parse(argv, FillMaskOptions, __doc__)
    problems = [] if options.model else ["--model: needed is a model that fills masks"]
    problems += [] if options.texts else ["TEXT: needed is a sentence with [MASK], in quotes"]
    check(problems + [f"--top {options.top}: needed is a whole number of at least 1"] * (options.top < 1))

    from pretrain.evaluate import fill_masks
    from pretrain.model.bert import from_checkpoint

    model, fresh = from_checkpoint(options.model, [])
    if "MLM head" in fresh:
        raise UserError(f"--model {options.model}: has no MLM head, so it cannot fill masks; needed is a pretrained model")
    for rows in fill_masks(options.model, options.texts, options.top, model.max_length):
        print(f"{'token':16}{'score':>8}  sentence")
        print("\n".join(f"{token:16}{score:8.4f}  {sentence}" for token, score, sentence in rows), end="\n\n")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
