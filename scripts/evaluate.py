"""Held-out perplexity, MLM and NSP accuracy of any BERT checkpoint; for a folder of a run, the numbers of that run."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.command import UserError, check, option, parse, run_command  # noqa: E402
from pretrain.config import OBJECTIVES, DeviceOptions, TextOptions, validate  # noqa: E402


@dataclass
class EvaluateOptions(DeviceOptions, TextOptions):
    """Options of this command. Values that are not given come from the run that made the model, else as pretrain.py's."""

    model: str | None = option(None, "BERT checkpoint: a folder or a hub name")
    input: list[str] = option([], "text: files, folders, globs, or one prepared corpus", nargs="+", metavar="PATH")
    valid_fraction: float = option(0.0, "evaluate only the documents that pretrain.py holds out of this text at this share (0: all)")
    objective: str | None = option(None, "mlm+nsp, mlm+sop or mlm (default: the run's, else mlm+nsp)", choices=OBJECTIVES)
    max_length: int | None = option(None, "tokens in a sequence (default: the run's, else 128)")
    eval_tokens: int | None = option(None, "tokens that are read at most (default: the run's, else 200000)")
    eval_batch_size: int | None = option(None, "sequences of max-length in a micro-batch (default: the run's, else 32)")


def main(argv: list[str]) -> None:
    """Parse, evaluate, print the numbers; JSON on the last line."""
    options = parse(argv, EvaluateOptions, __doc__)
    required = {"model": "a BERT checkpoint", "input": "text, as files, folders or globs"}
    check([f"--{name}: needed is {what}" for name, what in required.items() if not getattr(options, name)] + validate(options))

    from pretrain import evaluate
    from pretrain.data import tokenizer as tokenizers
    from pretrain.files import model_folder
    from pretrain.model import bert
    from pretrain.runtime import distributed
    from pretrain.runtime.checkpoint import read_facts
    from pretrain.runtime.optim import autocast, choose_precision
    from pretrain.text import check_text, open_or_prepare

    facts = {"objective": "mlm+nsp", "max_length": 128, "eval_tokens": 200_000, "eval_batch_size": 32,
             **read_facts(Path(model_folder(options.model)))}
    for name in ("objective", "max_length", "eval_tokens", "eval_batch_size"):
        setattr(options, name, getattr(options, name) or facts[name])
    world, device = distributed.start(options.device)
    same = options.precision == "auto" and facts.get("precision") in ("bf16", "fp32")
    precision = choose_precision(facts["precision"] if same else options.precision, device)
    text = check_text(options.input, "--input", options, world)
    model, fresh = bert.from_checkpoint(options.model, [])
    check(model.problems_of(options.objective, options.max_length))
    model.set_objective(options.objective)
    tokenizer = tokenizers.load(options.model, option="--model")
    vocabulary = tokenizers.describe(tokenizer)
    if vocabulary.size > model.config.vocab_size:
        raise UserError(f"--model {options.model}: its tokenizer has {vocabulary.size:,} entries, the model {model.config.vocab_size:,}")
    if fresh:
        print(f"{options.model} has no {', no '.join(fresh)}: fresh weights, so these numbers mean nothing")
    corpus = open_or_prepare(text, options.input[0], tokenizer, vocabulary, Path(options.cache), "--input", world)
    if options.valid_fraction:
        corpus = corpus.split(options.valid_fraction)[1]
    documents = corpus.count()
    if documents < 1 + (options.objective == "mlm+nsp"):
        raise UserError(f"--input {' '.join(options.input)}: {documents} documents, needed are more for --objective {options.objective}; "
                        "ways out: more text, another --format, --objective mlm")
    held_out = evaluate.make_held_out(corpus, options.objective, options.max_length, options.eval_batch_size, vocabulary,
                                      options.eval_tokens)
    numbers = evaluate.evaluate(model.to(device), held_out, device, autocast(device, precision), world)
    tokens = sum(batch.num_tokens for batch in held_out.batches)
    print(f"{options.model} on {tokens:,} tokens of {documents:,} documents, {options.objective} at {options.max_length} tokens, "
          f"in {precision}")
    print("\n".join(f"{name.replace('_', ' '):16} {value:,.4f}" for name, value in numbers.items()))
    print(json.dumps(numbers))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
