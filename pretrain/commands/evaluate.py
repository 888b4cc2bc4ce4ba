"""Validation perplexity, MLM and NSP accuracy of any BERT checkpoint on any text.

For the model of a run, the numbers equal those of the run, except the perplexity of guessing where
the run had --valid: here, the frequencies are those of the evaluated text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from pretrain import config
from pretrain.cli import parse
from pretrain.config import COUNT, COUNT_OR_0, LENGTH, NAME, NAMED_PATHS, OBJECTIVES, typed
from pretrain.data.sources import by_name
from pretrain.errors import UserError, check, counted, option_named
from pretrain.preflight import problems_of
from pretrain.schema import number, one_of, option

DEFAULT = {"objective": "mlm+nsp", "max_length": 128, "eval_tokens": 200_000, "eval_batch_size": 32}


@dataclass(frozen=True)
class EvaluateOptions(config.DeviceOptions, config.TextOptions):
    """Evaluation: options of evaluate.py; the defaults come from the run that made the model."""

    unused: ClassVar = config.ENTITY_OPTIONS
    model: str | None = option(None, "BERT checkpoint: folder or hub name", required=True)
    baseline: str | None = option(None, "checkpoint to compare with on the same masks", NAME)
    input: tuple[str, ...] = option(
        (),
        "text: files, folders, globs, or one prepared corpus; NAME=PATH for several texts",
        NAMED_PATHS,
        required=True,
    )
    valid_fraction: float = option(
        0.0, "use only the documents that pretraining holds out (0: all)", number(0, 0.5)
    )
    # By default the run's values, else those of DEFAULT.
    objective: str | None = option(
        None,
        "what to score (default: the run's, else mlm+nsp, or mlm for a model without an NSP head)",
        one_of(*OBJECTIVES),
    )
    max_length: int | None = option(
        None, "tokens per sequence (default: the run's, else 128)", LENGTH
    )
    eval_tokens: int | None = option(
        None, "maximum tokens to evaluate (default: the run's, else 200000)", COUNT
    )
    eval_batch_size: int | None = option(
        None, "sequences of max-length in a micro-batch (default: the run's, else 32)", COUNT_OR_0
    )


def main(argv: Sequence[str]) -> None:
    """Parse, evaluate, print the numbers; JSON on the last line."""
    options = parse(argv, EvaluateOptions, __doc__)
    check(problems_of(options))

    from pretrain.files import as_json, model_folder
    from pretrain.inputs import check_text
    from pretrain.model.attention import choose_attention
    from pretrain.runtime import distributed
    from pretrain.runtime.checkpoint import read_facts
    from pretrain.runtime.optim import choose_precision

    with option_named("--model"):
        facts = DEFAULT | read_facts(Path(model_folder(options.model)))
    asked = options.objective
    options = replace(options, **{name: getattr(options, name) or facts[name] for name in DEFAULT})
    with option_named("--device"):
        world, device = distributed.start(options.device)
    same = options.precision == "auto" and facts.get("precision") in ("bf16", "fp32")
    with option_named("--precision"):
        precision = choose_precision(facts["precision"] if same else options.precision, device)
    loaded = {"model": load_model(options, "model")}
    _, _, tokenizer, vocabulary = loaded["model"]
    if options.baseline:
        loaded["baseline"] = load_model(options, "baseline")
        if loaded["baseline"][-1].fingerprint != vocabulary.fingerprint:
            problem = "its tokenizer differs from that of --model, so masks cannot be the same"
            raise UserError(f"{typed(options, 'baseline')}: {problem}; expected the same tokenizer")
    options = replace(options, objective=fitting_objective(options, loaded, asked is not None))
    texts = {}
    for name, paths in by_name(options.input).items():
        texts[name] = check_text(paths, f"--input {name}".strip(), options)
    models = {}
    for name, (model, *_) in loaded.items():
        weight = facts.get("nsp_weight", 1.0)
        model.use_pairs(weight if OBJECTIVES[options.objective] else None)
        model.attention = choose_attention(device, precision)
        models[name] = model.to(device)
    numbers = {}
    for name, text in texts.items():
        validation = open_input(options, text, tokenizer, vocabulary)
        numbers[name] = measure(options, name, validation, models, precision, world)
    print(as_json(numbers.get("", numbers)))


def open_input(options: EvaluateOptions, text, tokenizer, vocabulary):
    """The validation set of a text; with --valid-fraction, that of a run. UserError if there are
    too few documents, or nothing can be masked."""
    from pretrain.corpora import open_or_prepare
    from pretrain.evaluate import make_validation_set
    from pretrain.inputs import MODEL_WAYS

    cache = Path(options.cache)
    corpus = open_or_prepare(text, tokenizer, vocabulary, cache, ways=MODEL_WAYS)
    training = corpus  # to guess the frequencies of tokens from
    if options.valid_fraction:
        training, corpus = corpus.split(options.valid_fraction)
    documents, least = corpus.count(), 2 if OBJECTIVES[options.objective] == "random" else 1
    if documents < least:
        problem = f"{counted(documents, 'document')}; --objective {options.objective} needs {least}"
        ways = "expected more text, another --format, or --objective mlm"
        raise UserError(f"{text.name}: {problem}; {ways}")
    shape = (options.max_length, options.eval_batch_size, vocabulary, options.eval_tokens)
    pairs = OBJECTIVES[options.objective]
    with option_named(f"{text.name}:"):
        return make_validation_set(corpus, pairs, *shape, training=training)


def measure(
    options: EvaluateOptions, name: str, validation, models: dict, precision: str, world
) -> dict:
    """Print and return the numbers of a text for the "model" in `models`, and how they changed from
    the "baseline", if there is one. UserError if one is not finite."""
    from pretrain.compare import compare
    from pretrain.evaluate import evaluate
    from pretrain.runtime.optim import autocast, overflow_advice

    model, change = models["model"], None
    context = autocast(model.device, precision)
    numbers = evaluate(model, validation, context, world)
    if "baseline" in models:
        change = compare(models["baseline"], model, validation, context)
        numbers |= {
            "baseline_perplexity": change.before,
            "log_perplexity_difference": change.difference,
            "difference_low": change.low,
            "difference_high": change.high,
        }
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        problem = f"{', '.join(bad)} not finite on this text in {precision}"
        expected = f"expected {overflow_advice(precision)}"
        raise UserError(f"--model {options.model}: {problem}; {expected}")
    of_text = f"{name}: " if name else ""
    how = f"{options.objective} at {options.max_length} tokens, in {precision}"
    print(f"{of_text}{options.model} on {validation}; {how}")
    for key, value in numbers.items():
        print(f"{key.replace('_', ' '):26} {value:,.4f}")
    if change:
        print(f"{of_text}from {options.baseline} to {options.model}: {change}")
    return numbers


def fitting_objective(options: EvaluateOptions, models: dict, was_asked: bool) -> str:
    """The objective of `options`; mlm if one of `models`, by option as from `load_model`, cannot
    judge pairs. If the objective `was_asked` for, UserError names that model instead."""
    if OBJECTIVES[options.objective] is None:
        return options.objective
    for name, (model, fresh, *_) in models.items():
        missing = f"{options.objective}: the model has no {' or '.join(fresh)}; expected mlm"
        problems = model.pair_problems(options.objective) + ([missing] if fresh else [])
        if was_asked:
            with option_named(f"{typed(options, name)} --objective"):
                check(problems)
        elif problems:
            print(f"{typed(options, name)}: has no head for pairs, so mlm alone is evaluated")
            return "mlm"
    return options.objective


def load_model(options: EvaluateOptions, name: str) -> tuple:
    """(model, parts for pairs that it lacks, tokenizer, vocabulary) of the option `name`. UserError
    if they do not fit each other or --max-length, or if there is no MLM head."""
    from pretrain.data import tokenizer as tokenizers
    from pretrain.model.loading import from_checkpoint
    from pretrain.model.packed import MLM_HEAD

    folder = getattr(options, name)
    with option_named(f"--{name}"):
        model, fresh = from_checkpoint(folder)
        tokenizer = tokenizers.load(folder)
        vocabulary = tokenizers.describe(tokenizer)
        size, rows = vocabulary.size, model.config.vocab_size
        if size > rows:
            problem = f"its tokenizer has {size:,} entries, the model {rows:,}"
            raise UserError(f"{folder}: {problem}; expected the model's own tokenizer")
    with option_named(f"--{name} {folder} --max-length"):
        check(model.length_problems(options.max_length))
    if MLM_HEAD in fresh:
        problem = f"has no {MLM_HEAD}, so its predictions would be random"
        ways = "a model trained to predict masked tokens; adapt.py --general compares others"
        raise UserError(f"{typed(options, name)}: {problem}; expected {ways}")
    return model, fresh, tokenizer, vocabulary
