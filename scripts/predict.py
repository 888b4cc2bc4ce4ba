"""Labels and probabilities for the rows of a file, streaming and in order, and scores where the rows have labels."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.command import UserError, check, option, parse, run_command  # noqa: E402
from pretrain.config import ColumnOptions, DeviceOptions, validate  # noqa: E402


@dataclass
class PredictOptions(DeviceOptions, ColumnOptions):
    """Options of this command."""

    model: str | None = option(None, "classifier: the folder of a model or a fine-tuning run, or a hub name")
    input: list[str] = option([], "rows: CSV, TSV, JSONL or Parquet files, in order", nargs="+", metavar="FILE")
    output: str | None = option(None, "file of the result, .csv or .jsonl: the rows with predicted_label and a probability of each class",
                                metavar="FILE")
    max_length: int | None = option(None, "tokens of a row, specials included; the rest is cut (default: as in fine-tuning)")
    batch_size: int = option(64, "rows that go through the device at once")
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

    from pretrain.data.labelled import LabelledCollator, LabelledDataset, choose_columns
    from pretrain.data.tables import open_tables
    from pretrain.data.tokenizer import load
    from pretrain.files import write_aside
    from pretrain.model.attention import choose_attention
    from pretrain.model.classifier import check_tokenizer, load_classifier
    from pretrain.predict import Tally, check_rows, new_columns, predict, predict_rows, table_of, write_rows
    from pretrain.runtime.distributed import start
    from pretrain.runtime.optim import autocast, choose_precision

    _, device = start(options.device, alone="prediction")
    precision = choose_precision(options.precision, device)
    tokenizer, model = load(options.model, option="--model"), load_classifier(options.model)
    model.attention = choose_attention(device, precision)
    max_length = options.max_length or int(min(tokenizer.model_max_length, model.max_length))
    check(model.problems_of("mlm", max_length))
    classes = list(model.config.id2label.values())
    where, first = next(open_tables(options.input, "--input"), ("", {}))
    if not first:
        raise UserError(f"--input {' '.join(options.input)}: holds no row; needed are rows of text")
    columns = choose_columns(first, where, options)
    check_rows(open_tables(options.input, "--input"), columns, new_columns(classes))
    pair = LabelledDataset([("a",) * len(columns)], tokenizer, max_length)
    check_tokenizer(model, options.model, max(tokenizer.get_vocab().values()) + 1, int(pair.type_ids.max()) + 1)

    collator, tally, counted = LabelledCollator(max_length, options.batch_size), Tally(classes), []
    model, context = model.to(device), autocast(device, precision)
    rows = predict_rows(open_tables(options.input, "--input"), columns, options.label_field, lambda texts: predict(
        model, LabelledDataset(texts, tokenizer, max_length), collator, device, context), tally)
    write_aside(output, lambda partial: counted.append(write_rows(partial, rows, output.suffix == ".csv", str(output))))
    print(f"{counted[0]:,} rows in {output}")
    result = {"rows": counted[0]}
    if tally.confusion.any():
        scores = tally.scores()
        print(table_of(scores))
        result |= {name: value for name, value in scores.items() if isinstance(value, float)}
    if tally.left_out and (options.label_field in first or tally.confusion.any()):
        print(f"left out of the scores: {tally.left_out:,} rows whose {options.label_field} is none of the model's labels "
              f"({', '.join(classes[:20])})")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
