"""Validation perplexity, MLM and NSP accuracy of any BERT checkpoint on any text.

For the model of a run, the numbers equal those of the run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain import config
from pretrain.cli import parse
from pretrain.config import COUNT, COUNT_OR_0, LENGTH, OBJECTIVES, PATHS
from pretrain.errors import UserError, check, option_named
from pretrain.preflight import problems_of
from pretrain.schema import number, one_of, option

DEFAULT = {"objective": "mlm+nsp", "max_length": 128, "eval_tokens": 200_000, "eval_batch_size": 32}


@dataclass(frozen=True)
class EvaluateOptions(config.DeviceOptions, config.TextOptions):
    """Evaluation: options of evaluate.py; the defaults come from the run that made the model."""

    model: str | None = option(None, "BERT checkpoint: folder or hub name", required=True)
    input: tuple[str, ...] = option(
        (), "text: files, folders, globs, or one prepared corpus", PATHS, required=True
    )
    valid_fraction: float = option(
        0.0, "use only the documents that pretrain.py holds out (0: all)", number(0, 0.5)
    )
    # By default the run's values, else those of DEFAULT.
    objective: str | None = option(None, "the run's, else mlm+nsp", one_of(*OBJECTIVES))
    max_length: int | None = option(None, "tokens in a sequence (the run's, else 128)", LENGTH)
    eval_tokens: int | None = option(None, "limit of tokens (the run's, else 200000)", COUNT)
    eval_batch_size: int | None = option(
        None, "sequences of max-length in a micro-batch (the run's, else 32)", COUNT_OR_0
    )


def main(argv: Sequence[str]) -> None:
    """Parse, evaluate, print the numbers; JSON on the last line."""
    options = parse(argv, EvaluateOptions, __doc__)
    check(problems_of(options))

    from pretrain import evaluate
    from pretrain.corpora import open_or_prepare
    from pretrain.files import as_json, model_folder
    from pretrain.inputs import MODEL_WAYS, check_text
    from pretrain.runtime import distributed
    from pretrain.runtime.checkpoint import read_facts
    from pretrain.runtime.optim import autocast, choose_precision, overflow_advice

    with option_named("--model"):
        facts = DEFAULT | read_facts(Path(model_folder(options.model)))
    options = replace(options, **{name: getattr(options, name) or facts[name] for name in DEFAULT})
    with option_named("--device"):
        world, device = distributed.start(options.device)
    same = options.precision == "auto" and facts.get("precision") in ("bf16", "fp32")
    with option_named("--precision"):
        precision = choose_precision(facts["precision"] if same else options.precision, device)
    text = check_text(options.input, "--input", options, world)
    pairs, length = OBJECTIVES[options.objective], options.max_length
    model, tokenizer, vocabulary = load_model(options)
    cache = Path(options.cache)
    corpus = open_or_prepare(text, tokenizer, vocabulary, cache, world, ways=MODEL_WAYS)
    if options.valid_fraction:
        corpus = corpus.split(options.valid_fraction)[1]
    documents, least = corpus.count(), 2 if pairs == "random" else 1
    if documents < least:
        problem = f"{documents} documents; --objective {options.objective} needs {least}"
        ways = "expected more text, another --format, or --objective mlm"
        raise UserError(f"{text.name}: {problem}; {ways}")
    shape = (length, options.eval_batch_size, vocabulary, options.eval_tokens)
    validation = evaluate.make_validation_set(corpus, pairs, *shape)
    context = autocast(device, precision)
    numbers = evaluate.evaluate(model.to(device), validation, device, context, world)
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        problem = f"{', '.join(bad)} not finite on this text in {precision}"
        expected = f"expected {overflow_advice(precision)}"
        raise UserError(f"--model {options.model}: {problem}; {expected}")
    tokens = sum(batch.num_tokens for batch in validation.batches)
    print(
        f"{options.model} on {tokens:,} tokens of {documents:,} documents, {options.objective} at "
        f"{length} tokens, in {precision}"
    )
    for name, value in numbers.items():
        print(f"{name.replace('_', ' '):16} {value:,.4f}")
    print(as_json(numbers))


def load_model(options: EvaluateOptions) -> tuple:
    """(model, tokenizer, vocabulary); UserError if they do not fit each other or the options."""
    from pretrain.data import tokenizer as tokenizers
    from pretrain.model.loading import from_checkpoint

    with option_named("--model"):
        model, fresh = from_checkpoint(options.model)
        tokenizer = tokenizers.load(options.model)
        vocabulary = tokenizers.describe(tokenizer)
        size, rows = vocabulary.size, model.config.vocab_size
        if size > rows:
            problem = f"its tokenizer has {size:,} entries, the model {rows:,}"
            raise UserError(f"{options.model}: {problem}; expected the model's own tokenizer")
    with option_named("--max-length"):
        check(model.length_problems(options.max_length))
    has_pairs = OBJECTIVES[options.objective] is not None
    with option_named("--objective"):
        check(model.pair_problems(options.objective) if has_pairs else [])
    model.use_pairs(1.0 if has_pairs else None)
    if fresh:
        print(f"{options.model} has no {', '.join(fresh)}: these numbers are meaningless")
    return model, tokenizer, vocabulary
