"""Prepare text into a corpus folder that `pretrain.py --train DIR` opens: token ids, tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import parse
from pretrain.config import PATHS, TextOptions, TokenizerOptions, missing, typed, validate
from pretrain.errors import check, option_named, require
from pretrain.schema import integer, option


@dataclass(frozen=True)
class PrepareOptions(TextOptions, TokenizerOptions):
    """Preparation: options of prepare.py."""

    input: tuple[str, ...] = option((), "text: files, folders, globs", PATHS, required=True)
    output: str | None = option(
        None, "corpus folder to write (default: in the cache, found again for the same text)"
    )
    workers: int | None = option(
        None,
        "processes that share the text, 0: none (default: one per core, at most one per 64 MB)",
        integer(0, 256),
    )
    ray: str | None = option(
        None,
        "share the text on a Ray cluster, whose machines must find it and --output under the same "
        "path: its address, auto, or local for one on this machine (default: off)",
        excludes="workers",
        nargs="?",
        const="local",
        metavar="ADDRESS",
    )


def main(argv: Sequence[str]) -> None:
    """Parse, tokenize, print what was written."""
    options = parse(argv, PrepareOptions, __doc__)
    problems = missing(options) + validate(options)
    if options.output and Path(options.output).exists():
        problems.append(f"{typed(options, 'output')}: already exists; expected a new folder")
    check(problems)
    if options.ray:
        require("ray", typed(options, "ray"))

    from pretrain.data import parallel, tokenizer
    from pretrain.inputs import add_tokens, check_text, make_tokenizer, open_or_prepare
    from pretrain.runtime.distributed import World

    world = World()
    text = check_text(options.input, "--input", options, world, masking="any")
    if text.is_corpus:
        check([f"{text.name}: is already a prepared corpus; expected text"])
    made = make_tokenizer(options, text, world)
    add_tokens(made, options)
    if options.ray:
        with option_named("--ray"):
            parallel.connect(options.ray)
    vocabulary, cache = tokenizer.describe(made), Path(options.cache)
    output = Path(options.output) if options.output else None
    how = {"output": output, "workers": options.workers, "on_cluster": options.ray is not None}
    corpus = open_or_prepare(text, made, vocabulary, cache, world, **how)
    print(f"train on it:  python scripts/pretrain.py --train {corpus.folder}")
