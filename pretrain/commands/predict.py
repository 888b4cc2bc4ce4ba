"""Labels and probabilities for the rows of a file, in order, and scores if the rows have labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import parse
from pretrain.config import COUNT, LENGTH, ColumnOptions, DeviceOptions, missing, validate
from pretrain.errors import UserError, check, option_named
from pretrain.schema import Rule, option

TABLE_NAME = Rule(lambda name: name.endswith((".csv", ".jsonl")), "a name in .csv or .jsonl")


@dataclass(frozen=True)
class PredictOptions(DeviceOptions, ColumnOptions):
    """Prediction"""

    model: str | None = option(
        None, "classifier: folder of a model or a fine-tuning run, or hub name", required=True
    )
    input: tuple[str, ...] = option(
        (), "rows: CSV, TSV, JSONL or Parquet files, in order", required=True, metavar="FILE"
    )
    output: str | None = option(
        None,
        "result, .csv or .jsonl: the rows with predicted_label and a probability of each class",
        TABLE_NAME,
        required=True,
        metavar="FILE",
    )
    max_length: int | None = option(
        None,
        "tokens in a row, special ones included; the rest is cut (default: as in fine-tuning)",
        LENGTH,
    )
    batch_size: int = option(64, "rows that the device processes at once", COUNT)
    overwrite: bool = option(False, "replace the file --output")


def main(argv: Sequence[str]) -> None:
    """Parse, predict, print the scores; JSON on the last line."""
    options = parse(argv, PredictOptions, __doc__)
    check(missing(options) + validate(options))
    output = Path(options.output)
    if output.exists() and (output.is_dir() or not options.overwrite):
        raise UserError(f"--output {output}: exists; expected another name, or --overwrite")

    from pretrain.build import decide_precision
    from pretrain.data.tables import open_tables
    from pretrain.files import write_aside
    from pretrain.finetune import predict
    from pretrain.finetune.build import load_model
    from pretrain.finetune.dataset import LabeledDataset
    from pretrain.finetune.scores import Tally, numbers_of, score_table
    from pretrain.runtime.distributed import start
    from pretrain.runtime.optim import autocast

    with option_named("--device"):
        _, device = start(options.device, alone="prediction")
    precision = decide_precision(options, {}, device)
    tokenizer, model = load_model(options.model, options, device, precision)
    classes, field = list(model.config.id2label.values()), options.label_field
    with option_named("--input"):
        columns = predict.check_rows(options.input, options, predict.new_columns(classes))
    tally = Tally(classes)

    def predict_chunk(texts):
        dataset, context = LabeledDataset(texts, tokenizer), autocast(device, precision)
        return predict.predict(model, dataset, options.batch_size, context)

    def write(path):
        tables = open_tables(options.input)
        rows = predict.predict_rows(tables, columns, field, predict_chunk, tally)
        predict.write_rows(path, rows, as_csv=output.suffix == ".csv")

    with option_named(f"--output {output}:"):
        write_aside(output, write)
    count = int(tally.confusion.sum()) + tally.unlabeled
    print(f"{count:,} rows in {output}")
    numbers = {}
    if tally.confusion.any():
        scores = tally.scores()
        print(score_table(scores))
        numbers = numbers_of(scores)
    if tally.unlabeled:
        known = ", ".join(classes[:20])
        print(f"not scored: {tally.unlabeled:,} rows without a label of the model ({known})")
    print(json.dumps({"rows": count} | numbers))
