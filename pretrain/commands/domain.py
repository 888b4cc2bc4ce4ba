"""Compare texts by their words, and with a tokenizer: shared words, pieces per word, new tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import parse
from pretrain.config import COUNT, ON_OFF, TextOptions, missing, validate
from pretrain.errors import UserError, check, option_named, require
from pretrain.schema import option


@dataclass(frozen=True)
class DomainOptions(TextOptions):
    """Comparison: all options of domain.py."""

    input: tuple[str, ...] = option(
        (),
        "texts to compare: NAME=PATH for each file, folder or glob; one NAME may have several",
        metavar="NAME=PATH",
        required=True,
    )
    tokenizer: str | None = option(
        None, "folder, vocab.txt or hub name: how it breaks the words (default: not shown)"
    )
    lowercase: str = option("on", "lower-case and strip accents, for a bare vocab.txt", ON_OFF)
    top: int = option(10_000, "most frequent words that are compared", COUNT)
    stop_words: str = option(
        "auto", "words to leave out: auto (English and Chinese ones), none, or a file, one a line"
    )
    candidates: int = option(1000, "words in each file of candidates for --add-tokens", COUNT)
    output: str = option(
        "runs/domain", "folder of the results; files of the same name are replaced"
    )


def main(argv: list[str]) -> None:
    """Parse, count, compare; JSON on the last line."""
    options = parse(argv, DomainOptions, __doc__)
    paths = read_names(options)

    import numpy as np

    from pretrain import plots
    from pretrain.adapt import domain
    from pretrain.data import tokenizer as tokenizers
    from pretrain.files import markdown_table, write_json, write_text
    from pretrain.inputs import check_text
    from pretrain.runtime.distributed import World

    require("matplotlib", "the plot of the overlap")
    with option_named("--stop-words"):
        ignored = domain.stop_words(options.stop_words)
    with option_named("--tokenizer"):
        lowercase = options.lowercase == "on"
        tokenizer = tokenizers.load(options.tokenizer, lowercase) if options.tokenizer else None
    texts = {
        name: check_text(tuple(of), f"--input {name}", options, World(), "word")
        for name, of in paths.items()
    }
    for name, text in texts.items():
        if text.is_corpus:
            raise UserError(f"--input {name}: is a prepared corpus; expected text")
    with option_named("--input"):
        facts, broken = domain.compare(texts, tokenizer, options.top, ignored)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if len(texts) > 1:
        names, num_words = list(texts), facts["words_compared"]
        shares = [list(row.values()) for row in facts["overlap"].values()]
        rows = [[name, *map("{:.0%}".format, row)] for name, row in zip(names, shares)]
        table = markdown_table(["", *names], rows)
        print(f"shared by the {num_words:,} most frequent words of two texts:\n{table}")
        write_text(output / "overlap.md", f"{table}\n")
        plots.overlap(output / "overlap.png", names, np.array(shares), num_words)
    for name, of in facts["texts"].items():
        line = f"{name}: {of['words']:,} words, {of['distinct_words']:,} distinct"
        if tokenizer:
            path = output / f"candidates-{name}.txt"
            candidates = [f"{word}\n" for word, _, _ in broken[name][: options.candidates]]
            write_text(path, "".join(candidates))
            worst = [f"{word} ({count:,} x {pieces})" for word, count, pieces in broken[name][:8]]
            line += (
                f", {of['pieces_per_word']:.2f} pieces each, {of['unknown_share']:.2%} of them "
                f"unknown; the words that break most: {', '.join(worst)}; {path}"
            )
        print(line)
    write_json(output / "domain.json", facts)
    print(json.dumps(facts, ensure_ascii=False))


def read_names(options: DomainOptions) -> dict[str, list[str]]:
    """Name of each text -> its paths; checks all options."""
    texts: dict[str, list[str]] = {}
    problems = missing(options)
    for entry in options.input:
        name, _, path = entry.partition("=")
        if not name or not path or "/" in name:
            problems.append(f"--input {entry}: expected NAME=PATH")
        texts.setdefault(name, []).append(path)
    check(problems + validate(options))
    return texts
