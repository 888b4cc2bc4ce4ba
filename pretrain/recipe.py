"""Settings that depend on the text and the model: what "auto" stands for in the options of a run.

They are a function of the text's tokens, the model and the options alone, so that every machine and
number of processes trains alike. They are saved with the run and never computed again. Values that
the user gives are kept, and the others adapt. The measurements behind the numbers are in
scripts/README.md, "How the defaults were found".
"""

import math
from dataclasses import dataclass, replace

from pretrain.config import (
    OPTIMIZER,
    SCHEDULE,
    Config,
    TaskOptions,
    counted_length,
    longest,
    min_micro_batch_size,
)
from pretrain.errors import UserError, counted
from pretrain.schema import AUTO, TEXT, integer, number, optional

SCRATCH, FRESH_HEAD, CONTINUED = "from scratch", "with a fresh MLM head", "with its MLM head"
FORM = {  # of the values in a checkpoint
    "optimizer": OPTIMIZER,
    "batch_size": integer(1),
    "epochs": number(0, above=True),
    "max_length": optional(integer(8)),
    "phases": [TEXT],
    "mask_rate": [number(0, 0.8, above=True)],
    "learning_rate": number(0, above=True),
    "warmup": number(),
    "schedule": SCHEDULE,
    "dropout": number(0, 1),
}
UNSET = (AUTO, ())
CLASSIC = {  # Devlin et al. 2019
    "optimizer": "adamw",
    "batch_size": 256,
    "epochs": 40.0,
    "phases": (),
    "mask_rate": (0.15,),
    "learning_rate": 1e-4,
    "warmup": 0.01,
    "schedule": "linear",
}
WARMUP = 0.06  # of the run
MIN_STEP_TOKENS = 1024
MAX_STEP_TOKENS = 256 * 128  # the batch of BERT's first phase
MAX_TEXT_SHARE = 0.2  # of the text in a step
MIN_EPOCHS, MAX_EPOCHS = 3, 40
TOKENS_OF_ROOT = 7600  # tokens of a run per square root of the text's tokens
# Up to here there is no dropout: measured from scratch; else as in Muennighoff et al. 2023.
MAX_FRESH_EPOCHS = {SCRATCH: 20, FRESH_HEAD: 4, CONTINUED: 4}
# At width 256 and one step, by optimizer and whether it starts from scratch.
RATES = {("muon", True): 0.1, ("adamw", True): 0.05, ("muon", False): 0.03, ("adamw", False): 0.014}
# Shorter and longer runs get the rate of this many steps. At the maximum, that of AdamW for
# BERT-base is 0.9e-4, where Devlin et al. 2019 used 1e-4 for a million steps of the same size.
MIN_RATED_STEPS, MAX_RATED_STEPS = 400, 1 << 15
# From scratch, a run this short or shorter gets a rate in proportion to its steps: at the full rate
# it ends worse than guessing by frequency.
MIN_FULL_STEPS = 200
# From scratch with Muon, text with fewer tokens than this gets a lower rate: in proportion to this
# power of its tokens, but at least this share.
FULL_RATE_TOKENS, RATE_POWER, MIN_RATE_SHARE = 1.6e6, 0.2, 0.7
# From a checkpoint, text that is repeated in more epochs gets a lower rate: by the square root. At
# the full rate, the model learns it by heart.
FULL_RATE_EPOCHS = 15
# At first, short sequences, which teach attention sooner: for this share of the steps, or fewer.
SHORT_LENGTH, SHORT_SHARE, SHORT_TOKENS = 32, 0.7, 7e6
MIN_PHASED_STEPS = 20


@dataclass(frozen=True)
class Situation:
    """What the settings depend on besides the options."""

    text_tokens: int  # of the training text, once
    width: int  # of the model's hidden states
    start: str  # SCRATCH, FRESH_HEAD or CONTINUED
    dropout: float  # in the model's config
    dropout_fields: tuple[str, ...] = ("hidden_dropout_prob",)  # its names there


def resolve(asked: Config, saved: dict, situation: Situation) -> Config:
    """`asked` with a value in place of each "auto"; a resumed run keeps the values it has `saved`.

    `patience` stays: "auto" is a rule, see `TrainState.is_out_of_patience`."""
    if not saved:
        return _choose(asked, situation)
    values = as_options(saved["recipe"])
    if asked.epochs != AUTO:  # may change on resume
        values["epochs"] = asked.epochs
    return replace(asked, **values)


def values_of(config: Config) -> dict:
    """The chosen and the given values, for a checkpoint."""
    return {name: getattr(config, name) for name in FORM}


def as_options(values: dict) -> dict:
    """`values_of` a run, as read from JSON, in the types of the options."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def _choose(asked: Config, situation: Situation) -> Config:
    """A new run's options, without "auto"."""
    given = {name: getattr(asked, name) for name in FORM if getattr(asked, name) not in UNSET}
    if asked.recipe == "classic":
        size = asked.micro_batch_size or 1
        batch_size = size * max(1, round(CLASSIC["batch_size"] / size))
        values = {"batch_size": batch_size, "dropout": situation.dropout}
        return replace(asked, **CLASSIC | values | given)
    run_tokens = given.get("epochs", _auto_epochs(situation)) * situation.text_tokens
    step_tokens = _step_tokens(asked, run_tokens, situation.text_tokens)
    if asked.max_steps:
        run_tokens = asked.max_steps * step_tokens
    steps = run_tokens / step_tokens
    epochs = run_tokens / situation.text_tokens
    from_scratch, length = situation.start == SCRATCH, longest(asked)
    keeps_dropout = epochs > MAX_FRESH_EPOCHS[situation.start]
    overridden = {entry.partition("=")[0] for entry in asked.config_override}
    keeps_dropout |= not overridden.isdisjoint(situation.dropout_fields)
    values = {
        "optimizer": "muon" if from_scratch else "adamw",
        "epochs": epochs,
        "mask_rate": auto_mask_rate(asked, from_scratch),
        "warmup": WARMUP,
        "schedule": "linear",
        "dropout": situation.dropout if keeps_dropout else 0.0,
    } | given
    is_phased = from_scratch and length >= 2 * SHORT_LENGTH and length % SHORT_LENGTH == 0
    if is_phased and steps >= MIN_PHASED_STEPS and "phases" not in given:
        share = round(max(1 / steps, 1e-6, min(SHORT_SHARE, SHORT_TOKENS / run_tokens)), 6)
        values["phases"] = (f"{SHORT_LENGTH}:{share:g}", f"{length}:{1 - share:g}")
        values["max_length"] = length  # batch sizes still count sequences of this length
    values.setdefault("batch_size", step_tokens // counted_length(asked))
    if "learning_rate" not in values:
        values["learning_rate"] = _rate(situation, values["optimizer"], steps, epochs)
    return replace(asked, **values)


def auto_mask_rate(asked: TaskOptions, from_scratch: bool) -> tuple[float, ...]:
    """A high rate at first helps a model from scratch. With entities alone, none has an effect."""
    return (0.3, 0.15) if from_scratch and asked.entity_fill != "none" else (0.15,)


def _auto_epochs(situation: Situation) -> float:
    """Small text is repeated; its masks differ each time."""
    epochs = TOKENS_OF_ROOT / math.sqrt(situation.text_tokens)
    return max(MIN_EPOCHS, min(MAX_EPOCHS, epochs))


def _step_tokens(asked: Config, run_tokens: float, text_tokens: int) -> int:
    """Tokens in a step: by default at most as many as there are steps, in a power of two of
    sequences or in a multiple of the micro-batch that the user gave."""
    length = counted_length(asked)
    if asked.batch_size != AUTO:
        return asked.batch_size * length
    tokens = max(MIN_STEP_TOKENS, min(MAX_STEP_TOKENS, asked.max_steps or math.sqrt(run_tokens)))
    rows = min(tokens, MAX_TEXT_SHARE * text_tokens) / length
    if asked.micro_batch_size:
        return asked.micro_batch_size * max(1, round(rows / asked.micro_batch_size)) * length
    least = min_micro_batch_size(asked)
    return least * 2 ** int(math.log2(max(1.0, rows / least))) * length


def _rate(situation: Situation, optimizer: str, steps: float, epochs: float) -> float:
    """The peak learning rate: lower for long runs and for wide models; from scratch, for very short
    runs and, with Muon, for little text; from a checkpoint, for text that is repeated often."""
    from_scratch = situation.start == SCRATCH
    if (optimizer, from_scratch) not in RATES:
        raise UserError(f"{optimizer}: has no automatic learning rate; expected one to be given")
    rate = RATES[optimizer, from_scratch] * 256 / situation.width
    if not from_scratch:
        rate *= math.sqrt(min(1.0, FULL_RATE_EPOCHS / epochs))
    if from_scratch and steps < MIN_FULL_STEPS:
        rate *= steps / MIN_FULL_STEPS
    if from_scratch and optimizer == "muon":
        share = (situation.text_tokens / FULL_RATE_TOKENS) ** RATE_POWER
        rate *= max(MIN_RATE_SHARE, min(1.0, share))
    return rate / math.sqrt(min(max(steps, MIN_RATED_STEPS), MAX_RATED_STEPS))


def explain(asked: Config, config: Config, situation: Situation, steps: int) -> str:
    """What was chosen for a run of `steps`, with the reasons of the automatic recipe."""
    step_tokens, in_steps = config.batch_size * counted_length(config), counted(steps, "step")
    repeats = config.dropout and config.epochs > MAX_FRESH_EPOCHS[situation.start]
    rates = sorted(set(config.mask_rate), reverse=True)
    chosen = {
        "batch_size": (f"{step_tokens:,} tokens per step", "longer runs take larger steps"),
        "epochs": (f"{config.epochs:.3g} epochs = {in_steps}", "less text, more epochs"),
        "optimizer": (config.optimizer, f"for a model {situation.start}"),
        "learning_rate": (f"learning rate {config.learning_rate:.2g}", "lower for longer runs"),
        "warmup": (f"warm-up {config.warmup:.0%}", ""),
        "schedule": (f"{config.schedule} decay", ""),
        "phases": (f"lengths {' '.join(config.phases)}", "short ones teach attention sooner"),
        "mask_rate": (f"mask rate {' to '.join(map(str, rates))}", ""),
        "dropout": (f"dropout {config.dropout:g}", "text is repeated often" if repeats else ""),
    }
    names = [name for name in chosen if getattr(asked, name) in UNSET]
    names = [name for name in names if getattr(config, name) not in UNSET]
    if asked.max_steps and "epochs" in names:
        names.remove("epochs")
    has_reasons = asked.recipe == "auto"
    parts = []
    for text, reason in map(chosen.get, names):
        parts.append(f"{text} ({reason})" if reason and has_reasons else text)
    in_epoch = "in an epoch" if config.mix else "of text"
    basis = f"{situation.text_tokens:,} tokens {in_epoch}"
    return f"recipe {asked.recipe}, for {basis}: {', '.join(parts) or 'every value was given'}"
