"""Labels and probabilities for the rows of a file, streaming and in order, and scores where the rows have labels."""
import json
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.command import UserError, check, option, parse, run_command  # noqa: E402
from pretrain.config import validate  # noqa: E402


@dataclass
class PredictOptions:
    """Options of this command."""

    model: str | None = option(None, "classifier: the folder of a model or a fine-tuning run, or a hub name")
    input: list[str] = option([], "rows: CSV, TSV, JSONL or Parquet files, in order", nargs="+", metavar="FILE")
    output: str | None = option(None, "file of the result, .csv or .jsonl: the rows with predicted_label and a probability of each class",
                                metavar="FILE")
    text_field: str | None = option(None, "column of the text (default: text, or the only one that holds words)", metavar="NAME")
    text_pair_field: str | None = option(None, "column of a second text (default: none)", metavar="NAME")
    label_field: str = option("label", "column of the label, where there is one: the scores are told", metavar="NAME")
    max_length: int | None = option(None, "tokens of a row, specials included; the rest is cut (default: as in fine-tuning)")
    batch_size: int = option(64, "rows that go through the device at once")
    device: str = option("auto", "auto (a GPU where there is one), cpu, cuda or cuda:N")
    precision: str = option("auto", "auto (bf16 where the device computes it fast), bf16, fp16 or fp32",
                            choices=("auto", "bf16", "fp16", "fp32"))
    overwrite: bool = option(False, "replace the file --output")


def main(argv: list[str]) -> None:
    """Parse, predict, tell the scores; JSON on the last line."""
    options = parse(argv, PredictOptions, __doc__)
    output = Path(options.output or "")
    needed = {"model": "a classifier", "input": "a file of rows", "output": "a file of the result, .csv or .jsonl"}
    problems = [f"--{name}: needed is {what}" for name, what in needed.items() if not getattr(options, name)]
    if options.output and output.suffix not in (".csv", ".jsonl"):
        problems.append(f"--output {output}: needed is a name that ends in .csv or .jsonl")
    if options.output and output.exists() and (output.is_dir() or not options.overwrite):
        problems.append(f"--output {output}: exists; needed is another name, or --overwrite to replace a file")
    check(problems + validate(options))

    import torch

    from pretrain import predict
    from pretrain.data.formats import open_tables
    from pretrain.data.labelled import LabelledCollator, choose_columns, text_of
    from pretrain.data.tokenizer import load
    from pretrain.files import write_aside
    from pretrain.model.attention import choose_attention
    from pretrain.model.classifier import load_classifier
    from pretrain.runtime.distributed import start
    from pretrain.runtime.optim import autocast, choose_precision

    world, device = start(options.device)
    if world.size > 1:
        raise UserError(f"{world.size} processes: predictions run in one; needed is a start without torchrun")
    precision = choose_precision(options.precision, device)
    rows = open_tables(options.input, "--input")
    first = next(rows, None)
    if first is None:
        raise UserError(f"--input {' '.join(options.input)}: holds no row; needed are rows of text")
    columns = choose_columns(first[1], first[0], options)
    label_field = options.label_field if options.label_field in first[1] else None
    tokenizer, model = load(options.model, option="--model"), load_classifier(options.model).to(device)
    model.config._attn_implementation = choose_attention(device, precision)
    max_length = options.max_length or min(tokenizer.model_max_length, model.max_length)
    check(model.problems_of("mlm", max_length))
    collator, known, left_out = LabelledCollator(max_length, options.batch_size), [], Counter()
    predicted = predict.predict_rows(chain([first], rows), lambda where, record: text_of(record, columns, where), label_field, model,
                                     tokenizer, collator, device, autocast(device, precision), known, left_out)
    num_rows = 0

    def write(partial: Path) -> None:
        nonlocal num_rows
        num_rows = predict.write_rows(partial, predicted, output.suffix == ".csv")

    with torch.inference_mode():
        write_aside(output, write)
    print(f"{num_rows:,} rows in {output}")
    result = {"rows": num_rows}
    if left_out:
        print(f"without scores: {sum(left_out.values()):,} rows whose {label_field} is none of the model's labels, such as "
              f"{left_out.most_common(1)[0][0] or 'nothing'!r}")
    if known:
        scores = predict.score(*predict.known_labels(known), list(model.config.id2label.values()))
        print(predict.table_of(scores))
        result |= {name: value for name, value in scores.items() if isinstance(value, float)}
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
