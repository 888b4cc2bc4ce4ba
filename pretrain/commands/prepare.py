"""Convert text into a corpus folder (token ids, tokenizer), to pretrain on with --train."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import as_command, parse
from pretrain.config import PATHS, WORKERS, Config, TextOptions, TokenizerOptions, as_folder, typed
from pretrain.errors import check, option_named, require
from pretrain.preflight import output_problems, problems_of
from pretrain.schema import option


@dataclass(frozen=True)
class PrepareOptions(TextOptions, TokenizerOptions):
    """Preparation: options of prepare.py."""

    input: tuple[str, ...] = option((), "text: files, folders, globs", PATHS, required=True)
    output: str | None = option(
        None, "corpus folder to write (default: in the cache, for runs that use the same --words)"
    )
    workers: int | None = option(
        None, "worker processes (default: one per core, at most one per 64 MB)", WORKERS
    )
    ray: str | None = option(
        None,
        "use a Ray cluster: its address, auto, or local to start one here; all machines must see "
        "the text and --output under the same paths (default: off)",
        excludes="workers",
        nargs="?",
        const="local",
        metavar="ADDRESS",
    )


def main(argv: Sequence[str]) -> None:
    """Parse, tokenize, print what was written."""
    options = parse(argv, PrepareOptions, __doc__)
    check(problems_of(options) + (output_problems(options) if options.output else []))
    if options.ray:
        require("ray", typed(options, "ray"))

    from pretrain.corpora import open_or_prepare
    from pretrain.data import parallel
    from pretrain.data.tokenizer import describe
    from pretrain.inputs import (
        TOKENIZER_WAYS,
        add_tokens,
        check_text,
        find_tokenizer,
        make_tokenizer,
    )

    tokenizer = find_tokenizer(options)
    text = check_text(options.input, "--input", options, masking="any")
    if text.is_corpus:
        check([f"{text.name}: already a prepared corpus; expected text"])
    tokenizer = tokenizer or make_tokenizer(options, [text])
    add_tokens(tokenizer, options)
    if options.ray:
        with option_named("--ray"):
            parallel.connect(options.ray)
    vocabulary, cache = describe(tokenizer), Path(options.cache)
    output = Path(options.output) if options.output else None
    corpus = open_or_prepare(
        text,
        tokenizer,
        vocabulary,
        cache,
        output=output,
        ways=TOKENIZER_WAYS,
        workers=options.workers,
        on_cluster=options.ray is not None,
    )
    path, made_from = Path(options.tokenizer or ""), {}
    if options.tokenizer and (not path.exists() or (path / "config.json").is_file()):
        made_from = {  # it has a model, too, perhaps on the hub, which grows by the new tokens
            "model": as_folder(options.tokenizer),
            "add_tokens": options.add_tokens,
            "add_special_tokens": options.add_special_tokens,
        }
    config = Config(train=(str(corpus.folder),), **made_from)
    print(f"to train on it: {as_command('pretrain', config)}")
