"""Show what the model will see: a dozen examples with their masks in colour, and what the strategy does in numbers.

Takes the data and task options of pretrain.py; nothing is trained."""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.command import check, option, parse, run_command  # noqa: E402
from pretrain.config import Config, DataOptions, ModelOptions, TaskOptions, TokenizerOptions, validate  # noqa: E402

COLOURS = {"mask": "1;31", "random": "1;35", "similar": "1;34", "same": "1;33"}  # of ANSI terminals, bold


@dataclass
class ShowMasksOptions(TaskOptions, DataOptions, TokenizerOptions, ModelOptions):
    """Options of this command."""

    model: str = option("base", "the model whose tokenizer is used, or a size, as pretrain.py's")
    examples: int = option(12, "sequences that are shown")
    sampled: int = option(100, "micro-batches that the numbers are taken from")
    micro_batch_size: int = option(32, "sequences of max-length in a micro-batch, as pretrain.py's")
    seed: int = option(0, "seed of pairs and masks, as pretrain.py's")
    position: list[float] = option([], "data position of the first micro-batch that is shown, as a run tells it (default: 0 0 0)",
                                   nargs="+", metavar="NUMBER")
    phase: int = option(1, "the phase of --phases that is shown, from 1 on")
    save: str | None = option(None, "file to write the tensors of the micro-batches to, for torch.load (default: none)", metavar="FILE")
    colour: str = option("auto", "auto (where the output is a terminal), on or off", choices=("auto", "on", "off"))


def main(argv: list[str]) -> None:
    """Parse, draw, print."""
    options = parse(argv, ShowMasksOptions, __doc__, passed_over=Config)
    wanted = [f"--{name} {value}: needed is a whole number of at least {least}" for name, value, least in (
        ("examples", options.examples, 0), ("sampled", options.sampled, 1)) if value < least]
    if options.position and (len(options.position) not in (3, 4) or any(
            not 0 <= number < 2**53 or number % 1 for number in options.position[:3])):
        wanted.append(f"--position {' '.join(map(str, options.position))}: needed are epoch, place, micro-batch and, where the run has a "
                      "schedule, the mask rate")
    if not 1 <= options.phase <= max(1, len(options.phases)):
        wanted.append(f"--phase {options.phase}: needed is a whole number of 1 to {max(1, len(options.phases))}, as many as --phases has")
    check(validate(options) + wanted)

    from pretrain import embedded, parts
    from pretrain.data import tokenizer as tokenizers
    from pretrain.data.collate import Collator
    from pretrain.data.dataset import PretrainingDataset
    from pretrain.runtime.distributed import World
    from pretrain.text import open_text, prepare_tokenizer

    if not options.train:
        options.train, options.format = [str(embedded.write_text(Path(options.cache)))], "sentences"
    shown = vars(options).keys() - {"examples", "sampled", "position", "phase", "save", "colour"}
    config = Config(**{name: getattr(options, name) for name in shown}, batch_size=options.micro_batch_size)
    tokenizer, text, _ = prepare_tokenizer(config, None, World())
    vocabulary, masking = tokenizers.describe(tokenizer), parts.make_masking(config, tokenizer)
    dataset = PretrainingDataset(open_text(config, tokenizer, vocabulary, text, {}, World())[0], parts.make_task(config, options.phase - 1))
    parts.check_plan(dataset, config, whole_step=False)
    collator = Collator(dataset.task, vocabulary, masking, multiple=parts.SHAPE_MULTIPLE)
    in_colour = options.colour == "on" or (options.colour == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    report(dataset, collator, tokenizer, config, options, in_colour)


def report(dataset, collator, tokenizer, config, options, in_colour: bool) -> None:
    """Print the examples and the statistics of the first micro-batches of the run, or of those at --position."""
    from collections import Counter
    from dataclasses import asdict
    from itertools import islice

    import numpy as np
    import torch

    from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START
    from pretrain.data.dataset import DataPosition
    from pretrain.data.draws import derive, uniform
    from pretrain.data.masking import SPLIT, similar_ids

    counts, left, mask_id, saved = Counter(), options.examples, collator.vocabulary.mask_id, []
    start = DataPosition(*map(int, options.position[:3] or (0, 0, 0)), *options.position[3:])
    rate = config.mask_rate[0] if start.mask_rate is None else start.mask_rate
    for position in islice(dataset.positions(start, end_epoch=None if options.position else 1), options.sampled):
        examples = dataset.__getitems__([position._replace(mask_rate=rate)])
        drawn, batch = collator.draw(examples), collator(examples)
        packed, places = drawn.packed, drawn.masked
        labels = batch.masked_lm_labels.numpy()[:len(places)]  # what follows fills the batch
        now = batch.input_ids.numpy()[places]
        saved += [asdict(batch)] if options.save else []
        kinds = np.select([now == mask_id, now == labels], ["mask", "same"], "random").astype(object)
        if collator.masking.similar:
            found = similar_ids(labels, places, drawn.keys, drawn.leader, collator.masking.similar, np.full(len(places), -1))
            by_table = uniform(derive(drawn.keys[drawn.leader[places]], SPLIT)) < config.mask_split[0]
            kinds[(kinds == "random") & by_table & (found >= 0)] = "similar"
        maskable, masked = ~collator.vocabulary.is_special[packed.ids], np.isin(np.arange(len(packed.ids)), places)
        in_entity = packed.flags & (ENTITY_START | ENTITY_INSIDE) > 0
        counts.update(kinds.tolist())
        counts.update({"tokens": len(packed.ids), "maskable": int(maskable.sum()), "masked": len(places), "shortfall": batch.shortfall,
                       "runs": int((masked[1:] & ~masked[:-1]).sum())})
        for name, starts, inside in (("words", packed.flags & WORD_START > 0, maskable),
                                     ("entities", packed.flags & ENTITY_INSIDE == 0, maskable & in_entity)):
            unit = np.cumsum(starts) - 1
            size, hit = (np.bincount(unit[chosen], minlength=unit[-1] + 1) for chosen in (inside, inside & masked))
            counts.update({name: int((size > 0).sum()), f"touched {name}": int((hit > 0).sum()),
                           f"whole {name}": int(((hit == size) & (size > 0)).sum())})
        for number in range(min(left, len(packed.lengths))):
            start, end = batch.cu_seqlens[number: number + 2].tolist()
            print_example(tokenizer, packed.ids[start:end], batch.input_ids[start:end].tolist(), in_entity[start:end],
                          {place - start: kind for place, kind in zip(places.tolist(), kinds.tolist())}, in_colour)
        left = max(0, left - len(packed.lengths))
    print_numbers(counts, config)
    if options.save:
        torch.save(saved, options.save)
        print(f"{options.save}: {len(saved)} micro-batches, as torch.load reads them")


def print_example(tokenizer, before, after, in_entity, kinds: dict[int, str], in_colour: bool) -> None:
    """A sequence: what stood there, and in brackets what the model reads; entities are underlined, or between < and >."""
    words = []
    for place, (old, new) in enumerate(zip(tokenizer.convert_ids_to_tokens(before.tolist()), tokenizer.convert_ids_to_tokens(after))):
        word = f"{old}[{new}]" if kinds.get(place) in ("random", "similar") else f"{old}[=]" if kinds.get(place) == "same" else old
        if in_colour:
            codes = [COLOURS.get(kinds.get(place)), "4" if in_entity[place] else None]
            codes = [code for code in codes if code]
            word = f"\x1b[{';'.join(codes)}m{word}\x1b[0m" if codes else word
        else:
            word = old + new if kinds.get(place) == "mask" else word
            word = f"<{word}>" if in_entity[place] else word
        words.append(word)
    print(" ".join(words), end="\n\n")


def print_numbers(counts, config) -> None:
    """The statistics of the strategy."""
    def share(part: str, whole: str) -> str:
        return f"{counts[part] / max(1, counts[whole]):.1%}"

    rate = " to ".join(f"{value:g}" for value in config.mask_rate)
    print(f"masking {config.masking} at {rate} (shown: the first), {config.objective}, {counts['tokens']:,} tokens")
    print(f"masked           {share('masked', 'maskable')} of the ordinary tokens; shortfall {share('shortfall', 'masked')} of the masked")
    names = {"mask": "[MASK]", "random": "a random token", "similar": "a similar word", "same": "itself"}
    print("replaced by      " + ", ".join(f"{text} {share(name, 'masked')}" for name, text in names.items() if counts[name]))
    print(f"in a row         {counts['masked'] / max(1, counts['runs']):.2f} tokens on average")
    print(f"words            {counts['maskable'] / max(1, counts['words']):.2f} tokens each; {share('touched words', 'words')} of them are "
          f"masked in part or whole, {share('whole words', 'touched words')} of these as a whole")
    if counts["entities"]:
        print(f"entities         {counts['entities']:,}; {share('whole entities', 'entities')} of them are masked as a whole, "
              f"{share('touched entities', 'entities')} in part or whole")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
