"""Fill the [MASK] in a sentence: the most probable tokens, and the sentence with each of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.cli import parse
from pretrain.config import COUNT
from pretrain.errors import UserError, check, counted, option_named, refusing
from pretrain.files import model_folder
from pretrain.preflight import problems_of
from pretrain.schema import option


@dataclass(frozen=True)
class FillMaskOptions:
    """Filling: options of fill_mask.py."""

    texts: tuple[str, ...] = option(
        (), "quoted text with [MASK]", required=True, positional=True, nargs="*", metavar="TEXT"
    )
    model: str | None = option(None, "run folder, model folder or hub name", required=True)
    top: int = option(5, "number of tokens to show for each [MASK]", COUNT)


def main(argv: Sequence[str]) -> None:
    """Parse, predict, print a table for each mask."""
    options = parse(argv, FillMaskOptions, __doc__)
    check(problems_of(options))

    from pretrain.data.tokenizer import find_unknown
    from pretrain.model.loading import from_checkpoint
    from pretrain.model.packed import MLM_HEAD

    with option_named("--model"):
        model, fresh = from_checkpoint(options.model)
        if MLM_HEAD in fresh:
            raise UserError(f"{options.model}: has no MLM head; expected a pretrained model")
        fill = open_pipeline(options.model)
    for text in options.texts:
        _, unknown = find_unknown(fill.tokenizer, text.split("[MASK]"))
        if unknown:
            print(f"{text!r}: unknown to the tokenizer: {' '.join(unknown)}")
        for rows in fill_masks(fill, text, options.top, model.max_length):
            print(f"{'token':16}{'score':>8}  sentence")
            for token, score, sentence in rows:
                print(f"{token:16}{score:8.4f}  {sentence}")
            print()


def open_pipeline(name: str):
    """The fill-mask pipeline of transformers, which also shows that the folder opens there."""
    import transformers

    from pretrain.data.tokenizer import describe, load

    transformers.utils.logging.set_verbosity_error()  # the pipeline ignores the NSP head
    tokenizer = load(name)
    describe(tokenizer)  # raises UserError without [MASK]
    with refusing(f"{name}: does not open in transformers", "expected a complete checkpoint"):
        model, info = transformers.AutoModelForMaskedLM.from_pretrained(
            model_folder(name), trust_remote_code=False, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        problem = f"its layers are not those of transformers: {missing[0]} is missing"
        raise UserError(f"{name}: {problem}; expected a model that opens there")
    return transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")


def fill_masks(fill, text: str, top: int, max_length: int) -> list[list[tuple[str, float, str]]]:
    """For each [MASK], the `top` rows of (token, probability, text with the token filled in)."""
    mask = fill.tokenizer.mask_token
    parts = text.replace(mask, "[MASK]").split("[MASK]")
    masked = mask.join(parts)
    length = len(fill.tokenizer(masked).input_ids)
    if len(parts) < 2 or length > max_length:
        found = f"has {counted(len(parts) - 1, 'mask')} and {counted(length, 'token')}"
        raise UserError(f"{text!r}: {found}; expected a [MASK], and at most {max_length} tokens")
    guesses = fill(masked, top_k=min(top, fill.model.config.vocab_size))
    tables = []
    for place, rows in enumerate(guesses if len(parts) > 2 else [guesses], start=1):
        before, after = "[MASK]".join(parts[:place]), "[MASK]".join(parts[place:])
        tokens = [(row["token_str"], row["score"]) for row in rows]
        if not all(math.isfinite(score) for _, score in tokens):
            problem = f"its predictions for {text!r} are not finite; expected another model"
            raise UserError(f"--model {fill.model.name_or_path}: {problem}")
        if not before or before[-1].isspace():  # a byte-level token brings its own space
            tokens = [(token.removeprefix(" "), score) for token, score in tokens]
        tables.append([(token, score, before + token + after) for token, score in tokens])
    return tables
