"""Compare texts: the words they share; with --tokenizer, pieces per word and candidate tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pretrain.cli import parse
from pretrain.config import AUTO_ON_OFF, COUNT, ENTITY_OPTIONS, LOWERCASE, TextOptions
from pretrain.errors import check, counted, option_named, require
from pretrain.files import as_json, write_json, write_text
from pretrain.preflight import output_problems, problems_of
from pretrain.schema import each, option, pattern

NAMED_PATHS = each(pattern(r"[^=/]+=.+", "NAME=PATH, no slash in the name", "NAME=PATH"))


@dataclass(frozen=True)
class DomainOptions(TextOptions):
    """Comparison: all options of domain.py."""

    unused: ClassVar = ENTITY_OPTIONS
    input: tuple[str, ...] = option(
        (), "texts to compare; a NAME may have several paths", NAMED_PATHS, required=True
    )
    tokenizer: str | None = option(None, "folder, vocab.txt or hub name, to split words with")
    lowercase: str = option("auto", LOWERCASE, AUTO_ON_OFF)
    top: int = option(10_000, "number of most frequent words to compare", COUNT)
    stop_words: str = option("auto", "words to ignore: auto (English and Chinese), none, or a file")
    candidates: int = option(1000, "words in each file of candidates for --add-tokens", COUNT)
    output: str = option(
        "runs/domain", "folder for the results; files of the same name are replaced"
    )


def main(argv: list[str]) -> None:
    """Parse, count, compare; JSON on the last line."""
    options = parse(argv, DomainOptions, __doc__)
    is_folder = Path(options.output).is_dir()
    check(problems_of(options) + output_problems(options, may_exist=is_folder))
    paths: dict[str, list[str]] = {}
    for entry in options.input:
        name, _, path = entry.partition("=")
        paths.setdefault(name, []).append(path)

    from pretrain.adapt import domain
    from pretrain.data import tokenizer as tokenizers

    require("matplotlib", "the overlap plot")
    with option_named("--stop-words"):
        ignored = domain.stop_words(options.stop_words)
    with option_named("--tokenizer"):
        name = options.tokenizer
        tokenizer = tokenizers.load(name, options.lowercase) if name else None
    texts = {}
    for name, named_paths in paths.items():
        texts[name] = domain.check_raw_text(tuple(named_paths), f"--input {name}", options)
    with option_named("--input"):
        facts, broken = domain.compare(texts, tokenizer, options.top, ignored)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if len(texts) > 1:
        table = domain.draw_overlap(output / "overlap.png", facts, list(texts))
        num_words = facts["words_compared"]
        print(f"share of the {num_words:,} most frequent words in common:\n{table}")
        write_text(output / "overlap.md", f"{table}\n")
    for name, counts in facts["texts"].items():
        line = f"{name}: {counted(counts['words'], 'word')}, {counts['distinct_words']:,} distinct"
        if tokenizer:
            path = output / f"candidates-{name}.txt"
            candidates = [f"{word}\n" for word, _, _ in broken[name][: options.candidates]]
            write_text(path, "".join(candidates))
            worst = [f"{word} ({count:,} x {pieces})" for word, count, pieces in broken[name][:8]]
            line += f", {counts['pieces_per_word']:.2f} pieces per word"
            line += f", {counts['unknown_share']:.2%} unknown"
            line += f"; most fragmented: {', '.join(worst) or 'none'}; {path}"
        print(line)
    write_json(output / "domain.json", facts)
    print(as_json(facts, ensure_ascii=False))
