"""Make a table of similar words, to pretrain on with --similar, from your word vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import parse
from pretrain.config import COUNT, FILE
from pretrain.errors import check, counted, option_named
from pretrain.preflight import output_problems, problems_of
from pretrain.schema import option


@dataclass(frozen=True)
class SimilarWordsOptions:
    """Similar words: options of similar_words.py."""

    vectors: str | None = option(
        None, "word2vec, fastText or GloVe file: `word v1 v2 ...` per line", FILE, required=True
    )
    output: str | None = option(None, "table to write, tab-separated", FILE, required=True)
    count: int = option(10, "similar words of each word", COUNT)
    max_words: int = option(50_000, "read only the first, the most frequent ones", COUNT)
    overwrite: bool = option(False, "replace the --output file")


def main(argv: Sequence[str]) -> None:
    """Parse, find the nearest words, write the table."""
    options = parse(argv, SimilarWordsOptions, __doc__)
    check(problems_of(options))
    output = Path(options.output)
    check(output_problems(options, may_exist=options.overwrite and not output.is_dir()))

    from pretrain.data.vectors import nearest, read_vectors
    from pretrain.files import write_text

    with option_named("--vectors"):
        words, vectors = read_vectors(options.vectors, options.max_words)
    rows = nearest(vectors, min(options.count, len(words) - 1))
    lines = ["\t".join([word, *map(words.__getitem__, row)]) for word, row in zip(words, rows)]
    write_text(output, "\n".join(lines) + "\n")
    print(f"{counted(len(words), 'word')} in {output}")
