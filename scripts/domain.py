"""Compare texts by their words, and with a tokenizer: vocabulary overlap, pieces per word, and candidates for --add-tokens."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.command import UserError, check, option, parse, require, run_command  # noqa: E402
from pretrain.config import TextOptions, validate  # noqa: E402


@dataclass
class DomainOptions(TextOptions):
    """Options of this command."""

    input: list[str] = option([], "texts to compare: NAME=PATH for each file, folder or glob; one NAME may have several", nargs="+",
                              metavar="NAME=PATH")
    tokenizer: str | None = option(None, "folder, vocab.txt or hub name: how it breaks the words (default: not told)")
    lowercase: str = option("on", "lower-case and strip accents, for a bare vocab.txt", choices=("on", "off"))
    top: int = option(10_000, "most frequent words that are compared")
    stop_words: str = option("auto", "words that overlap leaves out: auto (English and Chinese ones), none, or a file with one a line")
    candidates: int = option(1000, "words in each file of candidates for --add-tokens")
    output: str = option("runs/domain", "folder of the results; files of the same name are replaced")


def main(argv: list[str]) -> None:
    """Parse, count, compare; JSON on the last line."""
    options = parse(argv, DomainOptions, __doc__)
    texts: dict[str, list[str]] = {}
    problems = [] if options.input else ["--input: needed are texts, NAME=PATH, two or more to compare"]
    for entry in options.input:
        name, equals, path = entry.partition("=")
        if not (name and equals and path) or "/" in name:
            problems.append(f"--input {entry}: needed is NAME=PATH")
        texts.setdefault(name, []).append(path)
    problems += [f"--{name} {value}: needed is a whole number of at least 1" for name, value in (
        ("top", options.top), ("candidates", options.candidates)) if value < 1]
    check(problems + validate(options))

    from pretrain import domain, pictures
    from pretrain.data import tokenizer as tokenizers
    from pretrain.files import markdown_table, write_json, write_text
    from pretrain.runtime.distributed import World
    from pretrain.text import check_text

    require("matplotlib", "the picture of the overlap")
    left_out = domain.stop_words(options.stop_words)
    tokenizer = options.tokenizer and tokenizers.load(options.tokenizer, options.lowercase == "on")
    checked = {name: check_text(paths, f"--input {name}", options, World(), "word") for name, paths in texts.items()}
    prepared = [name for name, text in checked.items() if text is None]
    if prepared:
        raise UserError(f"--input {prepared[0]}: is a prepared corpus; needed is text")
    counts = {name: domain.count_words(text) for name, text in checked.items()}
    ranked = {name: domain.frequent_words(of, left_out) for name, of in counts.items()}
    shares, num_words = domain.overlap(ranked, options.top)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    result = {"words_compared": num_words, "overlap": {name: dict(zip(texts, row)) for name, row in zip(texts, shares.tolist())},
              "texts": {name: {"words": sum(of.values()), "distinct_words": len(of)} for name, of in counts.items()}}
    if len(texts) > 1:
        table = markdown_table(["", *texts], [[name, *map("{:.0%}".format, row)] for name, row in zip(texts, shares)])
        print(f"shared by the {num_words:,} most frequent words of two texts, stop words left out:\n{table}")
        write_text(output / "overlap.md", f"{table}\n")
        pictures.overlap(output / "overlap.png", list(texts), shares, num_words)
    for name, of in counts.items():
        told = f"{name}: {sum(of.values()):,} words, {len(of):,} distinct"
        if tokenizer:
            broken = domain.fragmentation(of, tokenizer, left_out)
            result["texts"][name] |= {"pieces_per_word": broken.pieces_per_word, "unknown_share": broken.unknown_share}
            path = output / f"candidates-{name}.txt"
            write_text(path, "".join(f"{word}\n" for word, _, _ in broken.broken[:options.candidates]))
            told += f", {broken.pieces_per_word:.2f} pieces each, {broken.unknown_share:.2%} of them unknown; the words that break most: "
            told += ", ".join(f"{word} ({count:,} x {pieces})" for word, count, pieces in broken.broken[:8]) + f"; {path}"
        print(told)
    write_json(output / "domain.json", result)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
