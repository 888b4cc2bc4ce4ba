"""Compare texts by their words, and with a tokenizer: shared words, pieces per word, new tokens."""

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import parse
from pretrain.config import COUNT, ON_OFF, TextOptions, missing, validate
from pretrain.errors import check, option_named, require
from pretrain.schema import each, option, pattern

NAMED_PATHS = each(pattern(r"[^=/]+=.+", "NAME=PATH, a name without a slash", "NAME=PATH"))


@dataclass(frozen=True)
class DomainOptions(TextOptions):
    """Comparison: all options of domain.py."""

    input: tuple[str, ...] = option(
        (), "texts to compare; one NAME may have several paths", NAMED_PATHS, required=True
    )
    tokenizer: str | None = option(None, "folder, vocab.txt or hub name to break words with")
    lowercase: str = option("on", "lower-case and strip accents, for a bare vocab.txt", ON_OFF)
    top: int = option(10_000, "most frequent words that are compared", COUNT)
    stop_words: str = option("auto", "words to leave out: auto (English, Chinese), none, or a file")
    candidates: int = option(1000, "words in each file of candidates for --add-tokens", COUNT)
    output: str = option(
        "runs/domain", "folder of the results; files of the same name are replaced"
    )


def main(argv: list[str]) -> None:
    """Parse, count, compare; JSON on the last line."""
    options = parse(argv, DomainOptions, __doc__)
    check(missing(options) + validate(options))
    paths: dict[str, list[str]] = {}
    for entry in options.input:
        name, _, path = entry.partition("=")
        paths.setdefault(name, []).append(path)

    from pretrain.adapt import domain
    from pretrain.data import tokenizer as tokenizers
    from pretrain.files import write_json, write_text

    require("matplotlib", "the plot of the overlap")
    with option_named("--stop-words"):
        ignored = domain.stop_words(options.stop_words)
    with option_named("--tokenizer"):
        lowercase = options.lowercase == "on"
        tokenizer = tokenizers.load(options.tokenizer, lowercase) if options.tokenizer else None
    texts = {
        name: domain.read_text(tuple(of), f"--input {name}", options) for name, of in paths.items()
    }
    with option_named("--input"):
        facts, broken = domain.compare(texts, tokenizer, options.top, ignored)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if len(texts) > 1:
        table = domain.draw_overlap(output / "overlap.png", facts, list(texts))
        num_words = facts["words_compared"]
        print(f"shared by the {num_words:,} most frequent words of two texts:\n{table}")
        write_text(output / "overlap.md", f"{table}\n")
    for name, of in facts["texts"].items():
        line = f"{name}: {of['words']:,} words, {of['distinct_words']:,} distinct"
        if tokenizer:
            path = output / f"candidates-{name}.txt"
            candidates = [f"{word}\n" for word, _, _ in broken[name][: options.candidates]]
            write_text(path, "".join(candidates))
            worst = [f"{word} ({count:,} x {pieces})" for word, count, pieces in broken[name][:8]]
            line += f", {of['pieces_per_word']:.2f} pieces each, {of['unknown_share']:.2%} unknown"
            line += f"; the words that break most: {', '.join(worst)}; {path}"
        print(line)
    write_json(output / "domain.json", facts)
    print(json.dumps(facts, ensure_ascii=False))
