"""Prepare text into a corpus folder that `pretrain.py --train DIR` opens: token ids, memory-mapped, with the tokenizer."""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.config import TextOptions, TokenizerOptions, check, option, parse, run_command, validate  # noqa: E402


@dataclass
class PrepareOptions(TextOptions, TokenizerOptions):
    """Options of this command."""

    input: list[str] = option([], "text: files, folders, globs", nargs="+", metavar="PATH")
    output: str | None = option(None, "corpus folder to write (default: in the cache, found again by fingerprint)")


def main(argv: list[str]) -> None:
    """Parse, tokenize, tell what was written."""
    options = parse(argv, PrepareOptions, __doc__)
    needed = [] if options.input else ["--input: needed is text, as files, folders or globs"]
    if options.output and Path(options.output).exists():
        needed.append(f"--output {options.output}: exists already; needed is a new folder")
    check(validate(options) + needed)

    from pretrain.data import tokenizer
    from pretrain.data.preparing import prepare
    from pretrain.runtime.distributed import World
    from pretrain.text import check_text, open_or_prepare, trained_tokenizer

    text = check_text(options.input, "--input", options, World())
    if text is None:
        check([f"--input {options.input[0]}: is a prepared corpus already"])
    lowercase = options.lowercase == "on"
    made = (tokenizer.load(options.tokenizer, lowercase) if options.tokenizer
            else trained_tokenizer(text, options.vocab_size, lowercase, Path(options.cache), World()))
    vocabulary = tokenizer.describe(made)
    if options.output:
        prepared = prepare(text.sources, text.text_format, made, Path(options.output))
    else:
        prepared = open_or_prepare(text, options.input[0], made, vocabulary, Path(options.cache), "--input", World())
    info = prepared.info
    print(f"{prepared.folder}: {info['documents']:,} documents, {info['sentences']:,} sentences, {info['tokens']:,} tokens, "
          f"{info['unknown_tokens'] / info['tokens']:.2%} of them unknown, {len(info['shards'])} shards")
    print(f"train on it:  python scripts/pretrain.py --train {prepared.folder}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
