"""Every option of a run, once: default, help, bounds, and whether a resume may change it.

A command combines the groups that it needs. A group's docstring begins with its title in --help.
pretrain/preflight.py checks the values.
"""

import codecs
import os
from dataclasses import dataclass, fields
from itertools import accumulate, chain

from pretrain.errors import UserError, counted
from pretrain.schema import (
    AUTO,
    Rule,
    changeable,
    each,
    flag,
    integer,
    number,
    one_of,
    option,
    pattern,
)

MODEL_SIZES = {  # (layers, width); heads: width / 64, inner width: 4 x width (Turc et al. 2019)
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
# Families that a model from scratch can have -> whether they have a head for pairs.
ARCHITECTURES = {"bert": True, "modernbert": False}
# --objective -> pairs: in half of them B comes from another document, or is swapped with A.
OBJECTIVES = {"mlm+nsp": "random", "mlm+sop": "swapped", "mlm": None}
# --task of fine-tuning -> scores that may select the best model; the first is the default.
TASK_METRICS = {
    "classification": ("macro_f1", "accuracy", "matthews"),
    "ner": ("f1", "macro_f1"),
    "regression": ("pearson", "spearman", "correlation"),
}
PLAIN_FORMATS = ("sentences", "lines", "text")
RECORD_FORMATS = ("jsonl", "conll", "csv", "tsv", "parquet", "arrow")
LANGUAGES = (  # ISO 639-1; sentencex would treat any other code as English
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy "
    "da de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu "
    "hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb "
    "lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om "
    "or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw "
    "ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
UTF8 = "utf-8"
DEFAULT_LENGTH, MAX_LENGTH = 128, 1 << 16  # tokens in a sequence


# Bounds of the values.


def _phase(text: str) -> tuple[int, float]:
    length, share = text.split(":")
    return int(length), float(share)


def _are_phases(texts: tuple[str, ...]) -> bool:
    try:
        lengths, shares = zip(*map(_phase, texts))
    except ValueError:
        return False
    return all(map(LENGTH.holds, lengths)) and min(shares) > 0 and abs(sum(shares) - 1) <= 1e-6


def _is_encoding(name: str) -> bool:
    try:
        codecs.lookup(name).incrementaldecoder()
        return "a".encode(name) != b""
    except (LookupError, TypeError, ValueError):  # unknown, or not an encoding of text
        return False


COUNT = integer(1, 10**12)
COUNT_OR_0 = integer(0, 10**12)
EPOCHS = number(0, 10**6, above=True)
SEED = integer(0, 2**63 - 1)
LENGTH = integer(8, MAX_LENGTH)
POSITIVE = number(0, above=True)
NOT_NEGATIVE = number(0)
SHARE = number(0, 1, above=True)
AUTO_ON_OFF = one_of("auto", "on", "off")
LOWERCASE = "strip case and accents (trained or vocab.txt); auto: unless vocab.txt has capitals"
PRECISION = one_of("auto", "bf16", "fp16", "fp32")
FORMAT = one_of("auto", *PLAIN_FORMATS, *RECORD_FORMATS)
WORDS = one_of("auto", "tokenizer", "spaces", "jieba")
ARCHITECTURE = one_of(*ARCHITECTURES)
OBJECTIVE = one_of(*OBJECTIVES)
MASKING = one_of("token", "word", "span", "entity")
SCHEDULE = one_of("linear", "cosine", "constant", "wsd")
VECTORS = one_of("mean", "random")
FILL = one_of("word", "token", "none")
REPLACE = one_of("mask", "similar")
OPTIMIZER = one_of("adamw", "muon")
OPTIMIZER_HELP = "muon: Muon for the encoder's matrices, AdamW for the rest"
RECIPE = one_of("auto", "classic")
DROPOUT = number(0, 0.9)
REPLAY = number(0, 0.9)
TASK = one_of(*TASK_METRICS)
METRIC = one_of(*dict.fromkeys(chain.from_iterable(TASK_METRICS.values())))
CLASS_WEIGHTS = one_of("none", "balanced")
WORKERS = integer(0, 256)
TOKENS = each(pattern(r".+", "a token", "TOKEN"))
NAME = pattern(r".*\S.*", "a name; omit the option for none", "NAME")
FILE = pattern(r".*\S.*", "a file; omit the option for none", "FILE")
FILES = each(FILE)
PATHS = each(pattern(r".+", "files, folders or globs", "PATH"))
NAMED_PATHS = each(pattern(r".+", "NAME=PATH of several texts, or paths of one", "PATH"))
LANGUAGE = Rule(
    lambda code: code == "auto" or code in LANGUAGES.split(),
    "a two-letter code such as en or zh (ISO 639-1), or auto",
    metavar="LANGUAGE",
)
ENCODING = Rule(_is_encoding, "an encoding, such as gb18030, utf-16 or cp1251", metavar="NAME")
ENCODING_HELP = "encoding of files that are not UTF-8, such as gb18030 or cp1251"
INTERVAL = pattern(r"epoch|auto|0*[1-9][0-9]*", "a number of steps above 0, epoch or auto")
BUDGETS = each(pattern(r"all|[0-9]+", "a number of rows, or all", "N"))
ASSIGNMENTS = each(pattern(r"[^\W\d]\w*=.*", "KEY=VALUE", "KEY=VALUE"), nargs="*")
BETA = Rule(lambda beta: 0 <= beta < 1, "numbers of at least 0 and below 1", metavar="BETA")
BETAS = each(BETA, nargs=2)
SPLIT = Rule(
    lambda shares: all(share >= 0 for share in shares) and abs(sum(shares) - 1) < 1e-6,
    "three shares from 0 to 1 that sum to 1",
    metavar="SHARE",
    nargs=3,
)
SHARES = each(Rule(POSITIVE.holds, "finite numbers above 0", metavar="SHARE"))
MASK_RATE = Rule(
    lambda rates: 1 <= len(rates) <= 2 and all(0 < rate <= 0.8 for rate in rates),
    "one or two shares above 0 and at most 0.8",
    metavar="SHARE",
)
PHASES = Rule(
    _are_phases,
    "LENGTH:SHARE of each phase, such as 128:0.9 512:0.1 (in quotes in YAML): lengths of 8 to "
    f"{MAX_LENGTH} tokens, shares above 0 that sum to 1",
    metavar="LENGTH:SHARE",
)


# Groups of options.

Texts = tuple[str, ...]
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class ModelOptions:
    """Model: what is trained."""

    model: str = option("base", f"folder or hub name, or a size: {', '.join(MODEL_SIZES)}")
    architecture: str = option("bert", "family of a model from scratch", ARCHITECTURE)
    config_override: Texts = option(
        (), "change fields of the model's config, such as hidden_dropout_prob=0", ASSIGNMENTS
    )


@dataclass(frozen=True)
class TokenizerOptions:
    """Tokenizer: loaded, or trained on the text."""

    tokenizer: str | None = option(None, "folder, vocab.txt or hub name (default: the model's)")
    vocab_size: int = option(30522, "largest size of a trained vocabulary", integer(100, 1 << 20))
    lowercase: str = option("auto", LOWERCASE, AUTO_ON_OFF)
    add_tokens: str | None = option(None, "file of words to add as tokens, one per line", FILE)
    add_special_tokens: Texts = option(
        (), "tokens to add that are never split or masked: [name], eos_token=[EOT]", TOKENS
    )
    new_vectors: str = option("mean", "new embeddings: mean of their pieces, or random", VECTORS)


@dataclass(frozen=True)
class TextOptions:
    """Text: how to read it, and what to mark in it."""

    format: str = option(
        "auto",
        "sentences: one per line, a blank line between documents; lines: one document per line; "
        "text: one document per file; conll: a token and its tag per line; others: tables",
        FORMAT,
    )
    encoding: str = option(UTF8, ENCODING_HELP, ENCODING)
    text_field: str | None = option(None, "text column, one sentence per line", NAME)
    entity_field: str | None = option(None, "column of spans, [start, end] or {start:, end:}", NAME)
    split_sentences: str | None = option(
        None, "cut lines into sentences: en, zh ... or auto", LANGUAGE, nargs="?", const="auto"
    )
    words: str = option("auto", "how to find words in Chinese text", WORDS)
    lexicon: str | None = option(None, "file of terms to mark as entities, one per line", FILE)
    max_documents: int = option(0, "read only the first N documents (0: all)", COUNT_OR_0)
    cache: str = changeable("runs/.cache", "folder for prepared corpora and trained tokenizers")


ENTITY_OPTIONS = ("entity_field", "lexicon")  # without effect in a command that masks no entities


@dataclass(frozen=True)
class DataOptions(TextOptions):
    """Data: text to train on, and text to validate on."""

    train: Texts = option((), "files, folders, globs, hub:NAME[:CONFIG[:SPLIT]], corpus", PATHS)
    mix: Numbers = option((), "token share of each entry of --train (default: one text)", SHARES)
    valid: Texts = option((), "validation text (default: a share of --train)", PATHS)
    valid_fraction: float = option(
        0.05, "share of the documents of --train to hold out (0: none)", number(0, 0.5)
    )
    workers: int | None = changeable(None, "processes for data (default: CPU 0, GPU 2)", WORKERS)


@dataclass(frozen=True)
class TaskOptions:
    """Objective and masking: what is predicted."""

    objective: str = option("mlm+nsp", "MLM, with next-sentence or sentence-order pairs", OBJECTIVE)
    nsp_weight: float = option(1.0, "weight of the NSP or SOP loss in the sum", NOT_NEGATIVE)
    masking: str = option("token", "what is masked as a whole", MASKING)
    mask_rate: Numbers = option((0.15,), "share to predict; two: linear schedule", MASK_RATE)
    mask_split: Numbers = option((0.8, 0.1, 0.1), "shares of [MASK], random, unchanged", SPLIT)
    entity_probability: float = option(0.5, "chance that an entity is masked", SHARE)
    entity_budget: float = option(0.2, "maximum share of a sequence to mask as entities", SHARE)
    entity_fill: str = option("word", "what else to mask, up to --mask-rate; none: nothing", FILL)
    replace: str = option("mask", "masked tokens become [MASK] or a similar word", REPLACE)
    similar: str | None = option(None, "tab-separated file: a word, then similar words", FILE)
    max_length: int | None = option(
        None, f"tokens per sequence, including special ones (default: {DEFAULT_LENGTH})", LENGTH
    )
    phases: Texts = option((), "lengths, each for a share of steps", PHASES, excludes="max_length")


@dataclass(frozen=True)
class OptimizationOptions:
    """Optimization: how the weights change, with the defaults of fine-tuning."""

    batch_size: int = option(32, "examples per optimizer step", COUNT)
    micro_batch_size: int | None = option(None, "sequences per pass (default: what fits)", COUNT)
    epochs: float = changeable(10.0, "passes over the rows, if --max-steps is 0", EPOCHS)
    max_steps: int = changeable(0, "optimizer steps of the run (0: from --epochs)", COUNT_OR_0)
    optimizer: str = option("adamw", OPTIMIZER_HELP, OPTIMIZER)
    learning_rate: float = option(5e-5, "peak learning rate, for either optimizer", POSITIVE)
    weight_decay: float = option(0.01, "weight decay, on matrices only (0: off)", NOT_NEGATIVE)
    adam_betas: Numbers = option((0.9, 0.999), "betas of AdamW", BETAS)
    adam_epsilon: float = option(1e-6, "epsilon of AdamW", POSITIVE)
    warmup: float = option(0.06, "share of the run if below 1, else steps", NOT_NEGATIVE)
    schedule: str = option("linear", "learning rate after warm-up", SCHEDULE)
    max_grad_norm: float = option(1.0, "clip gradients to this norm (0: off)", NOT_NEGATIVE)
    patience: int = changeable(3, "stop after N evaluations without gain (0: off)", COUNT_OR_0)
    seed: int = option(0, "seed for weights, dropout, pairs and masks", SEED)


@dataclass(frozen=True)
class RecipeOptions(OptimizationOptions):
    """Optimization: what pretrain/recipe.py chooses for the text and the model, unless given."""

    optimizer: str = option(AUTO, OPTIMIZER_HELP, OPTIMIZER)
    recipe: str = option("auto", "auto, or classic: BERT's own settings", RECIPE)
    batch_size: int | str = option(AUTO, "sequences per step, over all processes", COUNT)
    epochs: float | str = changeable(AUTO, "passes over the text, if --max-steps is 0", EPOCHS)
    learning_rate: float | str = option(AUTO, "peak learning rate, for either optimizer", POSITIVE)
    warmup: float | str = option(AUTO, "share of the run if below 1, else steps", NOT_NEGATIVE)
    schedule: str = option(AUTO, "learning rate after warm-up", SCHEDULE)
    mask_rate: Numbers = option(
        (), "share to predict; two: linear schedule (default: auto)", MASK_RATE, takes_auto=True
    )
    phases: Texts = option(
        (),
        "lengths, each for a share of steps (default: auto)",
        PHASES,
        excludes="max_length",
        takes_auto=True,
    )
    dropout: float | str = option(
        AUTO, "dropout rate in training; the saved config is unchanged", DROPOUT
    )
    patience: int | str = changeable(
        AUTO, "stop after N evaluations without gain (0: off; auto: if it overfits)", COUNT_OR_0
    )


@dataclass(frozen=True)
class DeviceOptions:
    """Device: where to compute, and how."""

    device: str = changeable("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N")
    precision: str = changeable("auto", "auto: bf16 if it is fast on the device", PRECISION)


@dataclass(frozen=True)
class MachineOptions(DeviceOptions):
    """Device: more options for training."""

    compile: str = changeable(
        "auto", "torch.compile; auto: to pretrain on a GPU in half precision", AUTO_ON_OFF
    )
    gradient_checkpointing: bool = changeable(False, "saves memory, takes about a third longer")


@dataclass(frozen=True)
class RunOptions:
    """Run: its folder, and what happens how often."""

    output: str | None = changeable(None, "run folder (default: runs/DATE-TIME)")
    resume: bool = changeable(False, "continue the run in --output from its newest checkpoint")
    overwrite: bool = changeable(False, "replace the run in --output", excludes="resume")
    max_minutes: float = changeable(0.0, "save and stop after N minutes (0: off)", NOT_NEGATIVE)
    eval_every: str = changeable("auto", "steps between evaluations: N, epoch or auto", INTERVAL)
    save_every: str = changeable("auto", "steps between checkpoints: N, epoch or auto", INTERVAL)
    log_every: int = changeable(10, "steps between logged numbers; step 1 is always logged", COUNT)
    keep: int = changeable(3, "number of newest checkpoints to keep", COUNT)


@dataclass(frozen=True)
class Config(
    RunOptions,
    MachineOptions,
    RecipeOptions,
    TaskOptions,
    DataOptions,
    TokenizerOptions,
    ModelOptions,
):
    """Run: all options of pretrain.py."""

    eval_tokens: int = option(200_000, "maximum validation tokens per evaluation", COUNT)
    eval_batch_size: int = option(
        0, "sequences of max-length per evaluation micro-batch (0: as in training)", COUNT_OR_0
    )
    shard: bool = changeable(False, "shard the weights across processes (FSDP2)")


@dataclass(frozen=True)
class ColumnOptions:
    """Rows: where to find text and labels."""

    encoding: str = option(UTF8, ENCODING_HELP, ENCODING)
    text_field: str | None = option(None, "text column (default: text, or the only one)", NAME)
    text_pair_field: str | None = option(None, "column of a second text to pair with it", NAME)
    label_field: str = option("label", "label column: names, numbers or, for ner, spans", NAME)


@dataclass(frozen=True)
class LabelOptions(ColumnOptions):
    """Rows: CSV, TSV, JSONL or Parquet files with labels; for ner also CoNLL."""

    train: Texts = option((), "labeled rows to train on", FILES, required=True)
    valid: Texts = option((), "labeled rows to select the model with", FILES, required=True)
    test: Texts = option((), "labeled rows to test on (default: none)", FILES)


@dataclass(frozen=True)
class FinetuneOptions(RunOptions, MachineOptions, OptimizationOptions, LabelOptions):
    """Fine-tuning: all options of finetune.py."""

    model: str | None = option(None, "encoder: a folder or a hub name", required=True)
    task: str = option("classification", "predict a class, entities (ner) or a number", TASK)
    label_budget: int = option(0, "train on N rows, in class proportion (0: all)", COUNT_OR_0)
    max_length: int | None = option(None, "tokens per example (default: at most 512)", LENGTH)
    micro_batch_size: int | None = option(None, "examples per pass (default: --batch-size)", COUNT)
    metric: str = option(AUTO, "score of --task that selects the best model", METRIC)
    class_weights: str = option("none", "balanced: equal total weight per class", CLASS_WEIGHTS)
    seed: int = option(0, "seed for head, dropout, row order and sampling", SEED)
    output: str | None = changeable(None, "run folder (default: runs/finetune-DATE-TIME)")
    eval_every: str = changeable("epoch", "steps between evaluations: N, epoch or auto", INTERVAL)
    save_every: str = changeable("auto", "N, epoch, or auto: only when stopped", INTERVAL)
    keep: int = changeable(1, "number of newest checkpoints to keep", COUNT)
    save_model: bool = changeable(True, "keep the model, not only scores and predictions")


@dataclass(frozen=True)
class AdaptOptions(LabelOptions):
    """Experiment: all options of adapt.py."""

    model: str | None = option(None, "encoder: a folder or a hub name", required=True)
    text: Texts = option((), "domain text to pretrain on", PATHS, required=True)
    control: Texts = option((), "text of another domain, for comparison", PATHS)
    general: Texts = changeable((), "general text: does the encoder get worse at it?", PATHS)
    replay: float = option(0.0, "share of the tokens from --general while pretraining", REPLAY)
    test: Texts = option((), "labeled rows to compare on", FILES, required=True)
    task_text: bool = option(False, "also pretrain on the texts of --train")
    label_budgets: Texts = changeable(("all",), "rows to fine-tune on, or all", BUDGETS)
    seeds: int = changeable(5, "fine-tune each encoder N times per budget: seeds 0 to N - 1", COUNT)
    pretrain: str = changeable("", "options of the pretraining, in quotes", metavar="OPTIONS")
    finetune: str = changeable("", "options of the fine-tuning, in quotes", metavar="OPTIONS")
    output: str = changeable("runs/adapt", "folder of the experiment, where it resumes")
    overwrite: bool = changeable(False, "start the experiment in --output over")


@dataclass(frozen=True)
class SuiteOptions:
    """Suite: all options of suite.py."""

    model: str | None = option(None, "encoder: a folder or a hub name", required=True)
    tasks: str | None = option(
        None, "folder with a subfolder for each task", FILE, required=True, metavar="DIR"
    )
    seeds: int = changeable(3, "fine-tune on each task N times: seeds 0 to N - 1", COUNT)
    finetune: str = changeable("", "options of finetune.py, in quotes", metavar="OPTIONS")
    output: str = changeable("runs/suite", "folder of the results, where it resumes")


# Derived from the options.


def as_folder(model: str) -> str:
    """A folder or hub name such that pretrain.py does not take it for a size."""
    return os.path.join(".", model) if model in MODEL_SIZES else model


def phase_lengths(config: TaskOptions) -> list[tuple[int, float]]:
    """(tokens per sequence, share of the optimizer steps) of each phase; one without --phases.

    A micro-batch and a step have the same number of tokens in every phase."""
    return [_phase(text) for text in config.phases] or [(config.max_length or DEFAULT_LENGTH, 1.0)]


def counted_length(config: TaskOptions) -> int:
    """Batch sizes count sequences of this many tokens: --max-length, or that of the first of the
    --phases that were given."""
    return config.max_length or phase_lengths(config)[0][0]


def longest(config: TaskOptions) -> int:
    """Tokens per sequence in the longest phase."""
    return max(length for length, _ in phase_lengths(config))


def min_micro_batch_size(config: TaskOptions) -> int:
    """Counted sequences with as many tokens as one of the longest."""
    return -(-longest(config) // counted_length(config))


def length_option(config: TaskOptions) -> str:
    """The option that sets the lengths."""
    return "--phases" if config.phases else "--max-length"


def phase_ends(config: TaskOptions, total_steps: int) -> list[int]:
    """The last step of each phase; UserError if a phase would get no steps."""
    shares = accumulate(share for _, share in phase_lengths(config))
    ends = [round(total_steps * share) for share in shares]
    ends[-1] = total_steps
    steps = [end - begin for begin, end in zip([0, *ends], ends)]
    if min(steps) < 1:
        problem = f"{typed(config, 'phases')}: {counted(total_steps, 'step')} split into {steps}"
        advice = "change the shares, --max-steps or --epochs"
        raise UserError(f"{problem}; expected at least one per phase: {advice}")
    return ends


def may_change(options: type) -> set[str]:
    """Names of the options that may change when a run is resumed."""
    return {entry.name for entry in fields(options) if entry.metadata["may_change"]}


def typed(options: object, *names: str) -> str:
    """Options and their values as typed on a command line."""
    words = []
    for name in names:
        value = getattr(options, name)
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [flag(name), *map(str, values)]
    return " ".join(words)
