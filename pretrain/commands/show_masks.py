"""Show what the model will read: some examples with their masks in color, and statistics of the
masking strategy.

Takes the data and task options of pretraining; trains nothing."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from pretrain import config, recipe, schema
from pretrain.cli import parse
from pretrain.errors import UserError, check, counted
from pretrain.files import write_aside
from pretrain.preflight import output_problems, problems_of
from pretrain.schema import option

KINDS = {  # what the model reads for a masked token -> terminal color, name
    "mask": ("1;31", "[MASK]"),
    "random": ("1;35", "a random token"),
    "similar": ("1;34", "a similar word"),
    "same": ("1;33", "itself"),
}
LEGEND = (
    "word[MASK], or in color: masked; word[other]: replaced; word[=]: kept; <word>, or "
    "underlined: in an entity"
)


@dataclass(frozen=True)
class ShowMasksOptions(
    config.TaskOptions, config.DataOptions, config.TokenizerOptions, config.ModelOptions
):
    """Display: options of show_masks.py."""

    model: str = option("base", "model whose tokenizer is used, or a size, as in pretraining")
    recipe: str = option("auto", "decides the mask rate, as in pretraining", config.RECIPE)
    mask_rate: config.Numbers = option(
        (),
        "share to predict; two: linear schedule (default: auto, as in pretraining)",
        config.MASK_RATE,
        takes_auto=True,
    )
    examples: int = option(12, "sequences to show", config.COUNT_OR_0)
    sampled: int = option(100, "micro-batches to compute the statistics from", config.COUNT)
    micro_batch_size: int = option(32, "sequences of max-length in a micro-batch", config.COUNT)
    seed: int = option(0, "seed of pairs and masks, as in pretraining", config.SEED)
    position: tuple[float, ...] = option(
        (),
        "data position to start at, as printed for a skipped step (default: 0 0 0); a last number "
        "from 0 to 1 is the share of the run that is done",
        schema.each(schema.number(0, 2**53)),
        metavar="NUMBER",
    )
    phase: int = option(1, "number of the phase of --phases to show", config.COUNT)
    save: str | None = option(
        None, "file to save the tensors to, for torch.load (default: none)", config.FILE
    )
    color: str = option(
        "auto", "color: auto (if the output is a terminal), on or off", config.AUTO_ON_OFF
    )


def main(argv: Sequence[str]) -> None:
    """Parse, draw, print."""
    options = parse(argv, ShowMasksOptions, __doc__, ignored=config.Config)
    problems, num_phases = problems_of(options), max(1, len(options.phases))
    if options.phase > num_phases:
        problems.append(f"--phase {options.phase}: expected a phase of --phases, 1 to {num_phases}")
    if options.save:  # it may replace a file
        problems += output_problems(options, "save", may_exist=not Path(options.save).is_dir())
    check(problems)
    if not options.mask_rate:
        rate = recipe.auto_mask_rate(options, options.model in config.MODEL_SIZES)
        if options.recipe == "classic":
            rate = recipe.CLASSIC["mask_rate"]
        options = replace(options, mask_rate=rate)

    import torch

    from pretrain.data.collate import pack

    dataset, collator, tokenizer = open_data(options)
    in_color = options.color == "on"
    if options.color == "auto":
        in_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before = sum(share for _, share in config.phase_lengths(options)[: options.phase - 1])
    start, end_epoch = dataset.start._replace(progress=before), 1
    if options.position:
        start, end_epoch = _read_position(options, dataset), None
    counts, saved, left = Counter(), [], options.examples
    for position in islice(dataset.positions(start, end_epoch), options.sampled):
        examples = dataset[position._replace(progress=start.progress)]
        packed, batch = pack(examples, collator.vocabulary), collator(examples)
        kinds = kinds_of(packed, batch, collator)
        counts.update(count(packed, kinds), shortfall=batch.shortfall)
        for number in range(min(left, batch.num_sequences)):
            print_example(tokenizer, packed, batch, kinds, number, in_color)
        left = max(0, left - batch.num_sequences)
        if options.save:
            saved.append(asdict(batch))
    print_numbers(counts, options, collator.masking.rate(start.progress), start.progress)
    if options.save:
        write_aside(Path(options.save), lambda path: torch.save(saved, path))
        print(f"{options.save}: {counted(len(saved), 'micro-batch')} for torch.load")


def _read_position(options: ShowMasksOptions, dataset):
    """The position in --position, which may end with its progress. UserError if its numbers do not
    fit this text, or lie beyond its end."""
    shown = f"--position {' '.join(f'{number:g}' for number in options.position)}"
    count = len(dataset.start.numbers)
    numbers, progress = options.position[:count], options.position[count:]
    is_place = len(numbers) == count and all(number % 1 == 0 for number in numbers)
    if not is_place or len(progress) > 1 or max(progress, default=0) > 1:
        expected = f"{count} whole numbers and perhaps a share up to 1, as the run prints them"
        raise UserError(f"{shown}: is not a position in this text; expected {expected}")
    position = dataset.position_of([int(number) for number in numbers])
    for part, place in zip(dataset.parts, position.places):
        last = part.source.num_shards - 1
        if place.place > last:
            raise UserError(f"{shown}: has place {place.place}; expected 0 to {last}")
        last = part.plan(place.epoch, place.place).num_micro_batches - 1
        if place.micro_batch > last:
            raise UserError(f"{shown}: has micro-batch {place.micro_batch}; expected 0 to {last}")
    return position._replace(progress=progress[0] if progress else 0.0)


def open_data(options: ShowMasksOptions) -> tuple:
    """(dataset, collator, tokenizer) of a run; `options` take the place of its Config."""
    from pretrain import demo, plan
    from pretrain.corpora import make_dataset, open_text
    from pretrain.data import tokenizer as tokenizers
    from pretrain.data.collate import Collator
    from pretrain.inputs import prepare_tokenizer
    from pretrain.mask_setup import make_masking

    if not options.train:
        train = (str(demo.embedded_text(Path(options.cache))),)
        options = replace(options, train=train, format="sentences")
    tokenizer, text, _ = prepare_tokenizer(options, None)
    vocabulary = tokenizers.describe(tokenizer)
    masking = make_masking(options, tokenizer, vocabulary)
    texts, _ = open_text(options, tokenizer, vocabulary, text, {})
    task = plan.make_tasks(options, options.micro_batch_size)[options.phase - 1]
    dataset = make_dataset(options, texts, task)
    if task.pairs:
        for part in dataset.parts:
            plan.check_pairs(part.plan(0, part.place_of_largest).label, options)
    collator = Collator(task, vocabulary, masking, multiple=plan.SHAPE_MULTIPLE)
    return dataset, collator, tokenizer


def kinds_of(packed, batch, collator) -> np.ndarray:
    """str [T]: the kind of each masked token (see KINDS), "" for all others."""
    from pretrain.data.masking import draw_masks, similar_ids

    masking = collator.masking
    masked, leader = draw_masks(packed, masking.budget(packed), masking)
    table = masking.similar
    old, new = packed.ids[masked], batch.input_ids.numpy()[masked]
    similar = similar_ids(packed, masked, leader, table) if table else -1
    cases = [new == collator.vocabulary.mask_id, new == old, new == similar]
    kinds = np.full(len(packed.ids), "", "U7")
    kinds[masked] = np.select(cases, ["mask", "same", "similar"], "random")
    return kinds


def count(packed, kinds: np.ndarray) -> Counter:
    """Counts in a micro-batch: tokens by kind; words and entities, masked in part and whole."""
    masked = kinds != ""
    counts = Counter(kinds[masked].tolist(), tokens=len(kinds), masked=int(masked.sum()))
    counts["maskable"] = int(packed.maskable.sum())
    counts["runs"] = int((masked[1:] & ~masked[:-1]).sum())
    of_entities = packed.maskable & packed.in_entity
    units = (
        ("words", packed.word_starts, packed.maskable),
        ("entities", packed.entity_starts, of_entities),
    )
    for name, starts, inside in units:
        unit = np.cumsum(starts)
        sizes = np.bincount(unit[inside])
        hits = np.bincount(unit[inside & masked], minlength=len(sizes))
        counts[name] = int((sizes > 0).sum())
        counts[f"touched {name}"] = int((hits > 0).sum())
        counts[f"whole {name}"] = int(((hits == sizes) & (hits > 0)).sum())
    return counts


def print_example(tokenizer, packed, batch, kinds, number: int, in_color: bool) -> None:
    """Print a sequence: each token and, if it is masked, what the model reads. Entities are
    underlined, or between < and >."""
    tokens = np.flatnonzero(packed.sequence == number)
    old = tokenizer.convert_ids_to_tokens(packed.ids[tokens].tolist())
    new = tokenizer.convert_ids_to_tokens(batch.input_ids[tokens].tolist())
    words = []
    for word, shown, kind, in_entity in zip(old, new, kinds[tokens], packed.in_entity[tokens]):
        marks = {"random": f"[{shown}]", "similar": f"[{shown}]", "same": "[=]"}
        if not in_color:
            marks["mask"] = shown
        word += marks.get(kind, "")
        codes = [KINDS[kind][0]] if kind else []
        codes += ["4"] if in_entity else []
        if in_color and codes:
            word = f"\x1b[{';'.join(codes)}m{word}\x1b[0m"
        elif in_entity:
            word = f"<{word}>"
        words.append(word)
    print(" ".join(words), end="\n\n")


def print_numbers(counts: Counter, options: ShowMasksOptions, rate: float, progress: float) -> None:
    """Print the statistics of the strategy, for the mask rate after that share of the run."""

    def share(part: str, whole: str) -> str:
        return f"{counts[part] / max(1, counts[whole]):.1%}"

    kinds = [f"{text} {share(kind, 'masked')}" for kind, (_, text) in KINDS.items() if counts[kind]]
    run_length = counts["masked"] / max(1, counts["runs"])
    word_length = counts["maskable"] / max(1, counts["words"])
    how = f"mask rate {rate:g}" if options.entity_fill != "none" else "nothing else"
    if len(set(options.mask_rate)) > 1:
        first, last = options.mask_rate[0], options.mask_rate[-1]
        how += f" (of {first:g} to {last:g}, after {progress:.0%} of the run)"
    shown = f"{options.objective}, {counted(counts['tokens'], 'token')}"
    if options.examples:
        print(f"above            {LEGEND}")
    print(f"masking          {options.masking}, {how}; {shown}")
    shortfall = f"shortfall {share('shortfall', 'masked')} of the masked tokens"
    print(f"masked           {share('masked', 'maskable')} of the ordinary tokens; {shortfall}")
    print(f"replaced by      {', '.join(kinds)}")
    print(f"in a row         {run_length:.2f} tokens on average")
    touched = f"{share('touched words', 'words')} masked in part or whole"
    whole = f"{share('whole words', 'touched words')} of these as a whole"
    print(f"words            {word_length:.2f} tokens each; {touched}, {whole}")
    if counts["entities"]:
        whole = f"{share('whole entities', 'entities')} masked as a whole"
        touched = f"{share('touched entities', 'entities')} in part or whole"
        print(f"entities         {counts['entities']:,}; {whole}, {touched}")
