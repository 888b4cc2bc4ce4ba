"""Predict labels, entities or numbers for the rows of a file; print scores if they have labels.

Rows stream: a file of any size is read, predicted and written in chunks."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import parse
from pretrain.config import COUNT, FILES, LENGTH, UTF8, ColumnOptions, DeviceOptions, typed
from pretrain.data.sources import expand
from pretrain.errors import UserError, check, counted, option_named
from pretrain.files import as_json, exclusive, write_aside
from pretrain.preflight import output_problems, problems_of
from pretrain.schema import option, pattern

CHUNK = 1024  # rows
TABLE = pattern(r".*\.(csv|jsonl)", "a name that ends in .csv or .jsonl", "FILE")


@dataclass(frozen=True)
class PredictOptions(DeviceOptions, ColumnOptions):
    """Prediction"""

    model: str | None = option(None, "fine-tuned model or its run, or a hub name", required=True)
    input: tuple[str, ...] = option(
        (), "rows: CSV, TSV, JSONL or Parquet; CoNLL for entities", FILES, required=True
    )
    output: str | None = option(
        None, "file for rows and predictions: .csv or .jsonl", TABLE, required=True
    )
    max_length: int | None = option(None, "tokens per row (default: as in fine-tuning)", LENGTH)
    batch_size: int = option(64, "rows per forward pass", COUNT)
    overwrite: bool = option(False, "replace the --output file")


def main(argv: Sequence[str]) -> None:
    """Parse, predict, print the scores; JSON on the last line."""
    options = parse(argv, PredictOptions, __doc__)
    check(problems_of(options))
    output = Path(options.output)
    check(output_problems(options, may_exist=options.overwrite and not output.is_dir()))

    import numpy as np

    from pretrain.data.sentences import in_groups
    from pretrain.data.tokenizer import ENCODED_CHARACTERS, characters_of
    from pretrain.finetune.build import load_model
    from pretrain.finetune.dataset import LabeledRows
    from pretrain.finetune.heads import task_of
    from pretrain.finetune.predict import check_rows, predict, write_rows
    from pretrain.finetune.scores import numbers_of, score_table
    from pretrain.finetune.tasks import TASKS
    from pretrain.model_setup import decide_precision
    from pretrain.runtime.distributed import start
    from pretrain.runtime.optim import autocast, overflow_advice

    with option_named("--device"):
        _, device = start(options.device, alone="prediction")
    precision = decide_precision(options, {}, device)
    tokenizer, model = load_model(options.model, options, device, precision)
    task, context = TASKS[task_of(model.config)], autocast(device, precision)
    classes = [] if task.name == "regression" else list(model.config.id2label.values())
    with option_named("--input"):
        as_csv = output.suffix == ".csv"
        check_rows(options.input, options, task, classes, as_csv)
    tally = task.tally(classes)

    def predicted_rows():
        """The records with the cells of their predictions."""
        rows = task.documents(options.input, options, [])
        for chunk in in_groups(rows, lambda row: characters_of(row[2]), ENCODED_CHARACTERS, CHUNK):
            texts = [row_texts for *_, row_texts in chunk]
            labels = [task.label(row, options, classes) for row in chunk]
            dataset = task.dataset(LabeledRows(texts, labels, classes), tokenizer)
            if not tally.num_scored + tally.num_unlabeled:  # the first chunk stands for all
                dataset.check_tokens(typed(options, "input"))
            outputs = predict(model, dataset, options.batch_size, context)
            if not np.isfinite(outputs).all():
                problem = f"its output in {precision} is not finite"
                expected = f"expected {overflow_advice(precision)}"
                raise UserError(f"--model {options.model}: {problem}; {expected}")
            tally.add(dataset.labels, outputs)
            for (_, record, _), cells in zip(chunk, task.cells(dataset, outputs)):
                yield record | cells

    def write(path):
        encoding = _csv_encoding(options) if as_csv else UTF8
        write_rows(path, predicted_rows(), as_csv, encoding=encoding)

    with option_named("--output"), exclusive(output, wait=False), option_named(f"{output}:"):
        write_aside(output, write)
    num_rows = tally.num_scored + tally.num_unlabeled
    print(f"{counted(num_rows, 'row')} in {output}")
    scores = tally.scores() if tally.num_scored else {}
    if warning := task.warning(tally.predicted, classes, scores):
        print(f"--model {options.model}: {warning}")
    if scores:
        print(score_table(scores))
    if tally.num_unlabeled:
        known = f" ({', '.join(task.names(classes)[:20])})" if classes else ""
        unlabeled = counted(tally.num_unlabeled, "row")
        print(f"not scored: {unlabeled} without a label of the model{known}")
    print(as_json({"rows": num_rows} | numbers_of(scores)))


def _csv_encoding(options: PredictOptions) -> str:
    """UTF-8, with a byte-order mark if the first input begins with one or is in another encoding:
    spreadsheets that write such files take CSV without it for another encoding."""
    with open(expand(options.input[:1])[0], "rb") as first:
        is_marked = first.read(3) == codecs.BOM_UTF8
    return "utf-8-sig" if is_marked or codecs.lookup(options.encoding).name != UTF8 else UTF8
