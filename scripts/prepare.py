"""Prepare text into a corpus folder that `pretrain.py --train DIR` opens: token ids, memory-mapped, with the tokenizer."""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.command import check, option, parse, require, run_command  # noqa: E402
from pretrain.config import TextOptions, TokenizerOptions, validate  # noqa: E402


@dataclass
class PrepareOptions(TextOptions, TokenizerOptions):
    """Options of this command."""

    input: list[str] = option([], "text: files, folders, globs", nargs="+", metavar="PATH")
    output: str | None = option(None, "corpus folder to write (default: in the cache, found again by fingerprint)")
    workers: int | None = option(None, "processes that share the text, a piece of 64 MB at a time, 0: none; the corpus is the same "
                                 "(default: one a core, at most one for each 64 MB)")
    ray: str | None = option(None, "share the text on a Ray cluster instead: its address, auto, or local for one on this machine; text and "
                             "--output on storage that all its machines have under the same path (default: off)", nargs="?", const="local",
                             metavar="ADDRESS")


def main(argv: list[str]) -> None:
    """Parse, tokenize, tell what was written."""
    options = parse(argv, PrepareOptions, __doc__)
    needed = [] if options.input else ["--input: needed is text, as files, folders or globs"]
    if options.output and Path(options.output).exists():
        needed.append(f"--output {options.output}: exists already; needed is a new folder")
    if options.ray is not None and options.workers is not None:
        needed.append(f"--workers {options.workers} --ray {options.ray}: exclude each other; needed is one of the two")
    check(validate(options) + needed)
    if options.ray:
        require("ray", "--ray")

    from pretrain.data import tokenizer
    from pretrain.runtime.distributed import World
    from pretrain.text import add_tokens, check_text, make_tokenizer, open_or_prepare

    text = check_text(options.input, "--input", options, World(), masking="any")
    if text is None:
        check([f"--input {options.input[0]}: is a prepared corpus already"])
    made = make_tokenizer(options, text, options.input[0], World())
    add_tokens(made, options)
    prepared = open_or_prepare(text, options.input[0], made, tokenizer.describe(made), Path(options.cache), "--input", World(),
                               output=options.output and Path(options.output), workers=options.workers, ray=options.ray)
    print(f"train on it:  python scripts/pretrain.py --train {prepared.folder}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
