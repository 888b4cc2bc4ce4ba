"""Predict labels and probabilities for the rows of a file; print scores if they have labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import parse
from pretrain.config import COUNT, FILES, LENGTH, ColumnOptions, DeviceOptions, typed
from pretrain.errors import UserError, check, option_named
from pretrain.files import as_json, exclusive, write_aside
from pretrain.preflight import output_problems, problems_of
from pretrain.schema import option, pattern

TABLE = pattern(r".*\.(csv|jsonl)", "a name that ends in .csv or .jsonl", "FILE")


@dataclass(frozen=True)
class PredictOptions(DeviceOptions, ColumnOptions):
    """Prediction"""

    model: str | None = option(None, "classifier or its run: folder or hub name", required=True)
    input: tuple[str, ...] = option((), "rows: CSV, TSV, JSONL or Parquet", FILES, required=True)
    output: str | None = option(
        None, "file for rows, labels and probabilities: .csv or .jsonl", TABLE, required=True
    )
    max_length: int | None = option(None, "tokens in a row (default: as in fine-tuning)", LENGTH)
    batch_size: int = option(64, "rows per forward pass", COUNT)
    overwrite: bool = option(False, "replace the file --output")


def main(argv: Sequence[str]) -> None:
    """Parse, predict, print the scores; JSON on the last line."""
    options = parse(argv, PredictOptions, __doc__)
    check(problems_of(options))
    output = Path(options.output)
    check(output_problems(options, may_exist=options.overwrite and not output.is_dir()))

    import numpy as np

    from pretrain.build import decide_precision
    from pretrain.finetune.build import check_tokens, load_model
    from pretrain.finetune.dataset import LabeledDataset, read_texts
    from pretrain.finetune.predict import check_rows, predict, predict_rows, write_rows
    from pretrain.finetune.scores import Tally, numbers_of, only_class, score_table
    from pretrain.runtime.distributed import start
    from pretrain.runtime.optim import autocast, overflow_advice

    with option_named("--device"):
        _, device = start(options.device, alone="prediction")
    precision = decide_precision(options, {}, device)
    tokenizer, model = load_model(options.model, options, device, precision)
    classes, context = list(model.config.id2label.values()), autocast(device, precision)
    with option_named("--input"):
        check_rows(options.input, options, classes)
    tally = Tally(classes)

    def predict_chunk(rows):
        dataset = LabeledDataset(rows, tokenizer)
        if not tally.predicted.any():  # the first chunk stands for all
            check_tokens(typed(options, "input"), dataset, tokenizer, rows.texts)
        probabilities = predict(model, dataset, options.batch_size, context)
        bad = np.flatnonzero(~np.isfinite(probabilities).all(-1))
        if len(bad):
            problem = f"its output in {precision} is not finite for {rows.texts[bad[0]][0][:60]!r}"
            expected = f"expected {overflow_advice(precision)}"
            raise UserError(f"--model {options.model}: {problem}; {expected}")
        tally.add(dataset.labels, probabilities)
        return probabilities

    def write(path):
        rows = read_texts(options.input, options, [])
        predicted = predict_rows(rows, options.label_field, classes, predict_chunk)
        write_rows(path, predicted, as_csv=output.suffix == ".csv")

    with option_named("--output"), exclusive(output, wait=False), option_named(f"{output}:"):
        write_aside(output, write)
    scored, scores = int(tally.confusion.sum()), {}
    print(f"{scored + tally.unlabeled:,} rows in {output}")
    if only := only_class(tally.predicted, classes):
        print(f"--model {options.model}: all rows get the label {only}")
    if scored:
        scores = tally.scores()
        print(score_table(scores))
    if tally.unlabeled:
        known = ", ".join(classes[:20])
        print(f"not scored: {tally.unlabeled:,} rows without a label of the model ({known})")
    print(as_json({"rows": scored + tally.unlabeled} | numbers_of(scores)))
