"""Every option of every command, once: name, default, help and check.

A command takes the groups that it needs; `validate` returns every problem of the values at once.
"""
from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass

from pretrain import phases
from pretrain.command import option

MODEL_SIZES = {  # (layers, width); heads are width / 64, the inner width 4 x width, as in Turc et al. 2019
    "tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768), "large": (24, 1024),
}
OBJECTIVES = ("mlm+nsp", "mlm+sop", "mlm")
PLAIN_FORMATS = ("sentences", "lines", "text")
RECORD_FORMATS = ("jsonl", "conll", "csv", "tsv", "parquet", "arrow")
NUM_SPECIALS = {"mlm+nsp": 3, "mlm+sop": 3, "mlm": 2}  # [CLS] A [SEP] B [SEP], or [CLS] A [SEP]


@dataclass
class ModelOptions:
    model: str = option("base", f"a size to train from scratch ({', '.join(MODEL_SIZES)}), or a checkpoint to go on from (BERT, RoBERTa, "
                        "XLM-RoBERTa, CamemBERT): a folder or a hub name")
    config_override: list[str] = option([], "KEY=VALUE...: change fields of the model's config, such as "
                                        "hidden_dropout_prob=0 (default: none)", nargs="*", metavar="KEY=VALUE")


@dataclass
class TokenizerOptions:
    tokenizer: str | None = option(None, "folder, vocab.txt or hub name (default: the model's own; for a size from scratch, "
                                   "one is trained on the text)")
    vocab_size: int = option(30522, "entries of a tokenizer trained on the text")
    lowercase: str = option("on", "lower-case and strip accents, for a trained tokenizer or a bare vocab.txt",
                            choices=("on", "off"))
    add_tokens: str | None = option(None, "file of words, one a line, that become one token each (default: none)", metavar="FILE")
    add_special_tokens: list[str] = option([], "tokens that are never split and never masked: [name], or eos_token=[EOT] to give "
                                           "one a part (default: none)", nargs="+", metavar="TOKEN")
    new_vectors: str = option("mean", "vectors of added tokens: mean of the pieces that each one replaces, or random",
                              choices=("mean", "random"))


@dataclass
class TextOptions:
    format: str = option("auto", "sentences: one a line, a blank line between documents; lines: a document a line; text: a file is "
                         "a document; conll: a token and its tag a line; or a table of documents; auto: told from name and text",
                         choices=("auto", *PLAIN_FORMATS, *RECORD_FORMATS))
    text_field: str | None = option(None, "column of JSONL or a table that holds the text, its lines being sentences (default: text, "
                                    "or the only one that holds strings)", metavar="NAME")
    entity_field: str | None = option(None, "column of lists of character spans, [start, end, ...] or {start:, end:} (default: none, "
                                      "with --masking entity: entities where there is one)", metavar="NAME")
    split_sentences: str | None = option(None, "cut each line into sentences: a language code such as en, or auto (default: off)",
                                         nargs="?", const="auto", metavar="LANGUAGE")
    words: str = option("auto", "where words of Chinese text end: jieba; spaces, in text that is segmented; tokenizer, each "
                        "character is one; auto: spaces or jieba where --masking needs words of Chinese text",
                        choices=("auto", "tokenizer", "spaces", "jieba"))
    lexicon: str | None = option(None, "file of terms, one a line, that are marked as entities where they occur (default: none)",
                                 metavar="FILE")
    max_documents: int = option(0, "read only the first N documents (0: all)")
    cache: str = option("runs/.cache", "folder of prepared corpora, converted text and trained tokenizers, found again by fingerprint")


@dataclass
class DataOptions(TextOptions):
    train: list[str] = option([], "text: files, folders, globs, hub:NAME[:CONFIG[:SPLIT]], or one prepared corpus (default: the "
                              "embedded English text)", nargs="+", metavar="PATH")
    valid: list[str] = option([], "held-out text (default: documents of the training text, see --valid-fraction)",
                              nargs="+", metavar="PATH")
    valid_fraction: float = option(0.05, "share of the training documents that is held out (0: off), at least two, chosen by "
                                   "a hash of their text")
    workers: int | None = option(None, "processes that prepare batches, 0: none (default: 0 on CPU, 2 on a GPU)")


@dataclass
class TaskOptions:
    exclusive: typing.ClassVar = ({"max_length", "phases"},)
    objective: str = option("mlm+nsp", "next-sentence pairs, sentence-order pairs, or masks alone", choices=OBJECTIVES)
    nsp_weight: float = option(1.0, "factor of the NSP or SOP loss in the sum")
    masking: str = option("token", "what is masked as a whole: tokens, words, spans of words, or entities and then words",
                          choices=("token", "word", "span", "entity"))
    mask_rate: list[float] = option([0.15], "share of the ordinary tokens that is predicted; two values: from the first to the "
                                    "second over the run", nargs="+", metavar="SHARE")
    mask_split: list[float] = option([0.8, 0.1, 0.1], "shares that become [MASK], a random token, themselves", nargs=3,
                                     metavar="SHARE")
    entity_probability: float = option(0.5, "--masking entity: chance of each entity to be chosen")
    entity_budget: float = option(0.2, "--masking entity: share of a sequence that chosen entities may take (1: no cap)")
    entity_fill: str = option("word", "--masking entity: what fills up to --mask-rate", choices=("word", "token"))
    replace: str = option("mask", "what stands for the first share of --mask-split: [MASK], or a similar word from --similar",
                          choices=("mask", "similar"))
    similar: str | None = option(None, "file of similar words: a word and, after tabs, words of its kind a line (default: none)",
                                 metavar="FILE")
    max_length: int | None = option(None, f"tokens in a sequence, specials included (default: {phases.DEFAULT_LENGTH})")
    phases: list[str] = option([], "in place of --max-length: lengths one after another, each for a share of the optimizer steps, such as "
                               "128:0.9 512:0.1; a batch counts sequences of the first (default: one length)", nargs="+",
                               metavar="LENGTH:SHARE")


@dataclass
class OptimizationOptions:
    batch_size: int = option(256, "sequences of max-length in an optimizer step, over all processes")
    micro_batch_size: int | None = option(None, "sequences of max-length that go through one device at once (default: at most 32, on a "
                                          "GPU at most 32,768 tokens, halved until they fit)")
    epochs: float = option(3.0, "passes over the text; sets the number of steps where --max-steps is 0")
    max_steps: int = option(0, "optimizer steps of the run (0: from --epochs)")
    learning_rate: float = option(1e-4, "peak rate of AdamW")
    weight_decay: float = option(0.01, "decay of AdamW, on matrices only (0: off)")
    adam_betas: list[float] = option([0.9, 0.999], "betas of AdamW", nargs=2, metavar="BETA")
    adam_epsilon: float = option(1e-6, "epsilon of AdamW")
    warmup: float = option(0.06, "warm-up: a share of the run if below 1, else steps (0: off)")
    schedule: str = option("linear", "after warm-up: linear or cosine to 0, constant, or wsd (constant, then linear to 0 over "
                           "the last tenth)", choices=("linear", "cosine", "constant", "wsd"))
    max_grad_norm: float = option(1.0, "gradients are scaled to this norm at most (0: off)")
    patience: int = option(0, "stop after so many evaluations without a lower held-out perplexity (0: off)")
    seed: int = option(0, "seed of weights, dropout, pairs and masks")


@dataclass
class DeviceOptions:
    device: str = option("auto", "auto (a GPU where there is one), cpu, cuda or cuda:N")
    precision: str = option("auto", "autocast of the encoder: auto (bf16 where the device computes it fast), bf16, fp16 with a "
                            "gradient scaler, or fp32 (its products in TF32 on a GPU)", choices=("auto", "bf16", "fp16", "fp32"))


@dataclass
class MachineOptions(DeviceOptions):
    compile: str = option("auto", "torch.compile: auto (on with the CUDA attention kernel, off on CPU, where it does not pay), "
                          "on, off", choices=("auto", "on", "off"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, about a third more "
                                          "time")


@dataclass
class RunOptions:
    output: str | None = option(None, "run folder (default: runs/DATE-TIME; runs/default for the embedded text)")
    resume: bool = option(False, "go on from the newest good checkpoint of --output, with the options saved there")
    overwrite: bool = option(False, "replace the run in --output, once the new run has a checkpoint")
    max_minutes: float = option(0.0, "save and stop after so many minutes, resumable; the schedule stays (0: off)")
    eval_every: str = option("auto", "steps between evaluations: N, epoch, or auto (a tenth of the run, 10 to 1000)")
    eval_tokens: int = option(200_000, "held-out tokens that an evaluation reads at most")
    eval_batch_size: int = option(0, "sequences of max-length in an evaluation's micro-batch (0: micro-batch-size)")
    save_every: str = option("auto", "steps between checkpoints: N, epoch, or auto (a tenth of the run, 10 to 1000)")
    log_every: int = option(10, "steps between logged numbers; step 1 is always logged")
    keep: int = option(3, "newest checkpoints that are kept")
    shard: bool = option(False, "under torchrun: each process holds a part of every weight (FSDP2), for encoders that do not fit one "
                         "device")


@dataclass
class Config(RunOptions, MachineOptions, OptimizationOptions, TaskOptions, DataOptions, TokenizerOptions, ModelOptions):
    """All options of `scripts/pretrain.py`."""


@dataclass
class ColumnOptions:
    text_field: str | None = option(None, "column of the text (default: text, or the only one that holds words)", metavar="NAME")
    text_pair_field: str | None = option(None, "column of a second text, read together with the first (default: none)", metavar="NAME")
    label_field: str = option("label", "column of the label; labels are names or whole numbers", metavar="NAME")


@dataclass
class LabelOptions(ColumnOptions):
    train: list[str] = option([], "labelled rows to train on: CSV, TSV, JSONL or Parquet files", nargs="+", metavar="FILE")
    valid: list[str] = option([], "labelled rows by which the best model is chosen", nargs="+", metavar="FILE")
    test: list[str] = option([], "labelled rows to score it on; adapt.py needs them (default: none)", nargs="+", metavar="FILE")


@dataclass
class FinetuneOptions(MachineOptions, OptimizationOptions, LabelOptions):
    """All options of `scripts/finetune.py`."""

    model: str | None = option(None, "encoder: a folder of a model or a run, or a hub name")
    label_budget: int = option(0, "train on so many rows only, drawn by --seed with the classes in proportion (0: all)")
    max_length: int | None = option(None, "tokens of an example, specials included; the rest is cut (default: what the model takes, at "
                                    "most 512)")
    batch_size: int = option(32, "examples in an optimizer step")
    micro_batch_size: int | None = option(None, "examples that go through the device at once (default: the batch)")
    epochs: float = option(10.0, "passes over the training rows; sets the number of steps where --max-steps is 0")
    learning_rate: float = option(5e-5, "peak rate of AdamW")
    patience: int = option(3, "stop after so many evaluations without a better --metric (0: off)")
    metric: str = option("macro_f1", "score on --valid by which the best model is chosen: mean F1 of the classes, or accuracy",
                         choices=("macro_f1", "accuracy"))
    class_weights: str = option("none", "balanced: each class weighs alike in the loss, however few rows it has",
                                choices=("none", "balanced"))
    seed: int = option(0, "seed of the head's weights, dropout, the order of the rows and the rows of --label-budget")
    eval_every: str = option("epoch", "steps between evaluations: N, epoch, or auto (an epoch)")
    log_every: int = option(10, "steps between logged numbers; step 1 is always logged")
    output: str | None = option(None, "folder of the result (default: runs/finetune-DATE-TIME)")
    overwrite: bool = option(False, "replace the result in --output")
    save_model: bool = option(True, "keep the model; without it, scores and predictions alone")


@dataclass
class AdaptOptions(LabelOptions):
    """All options of `scripts/adapt.py`."""

    model: str | None = option(None, "encoder to go on from: a folder of a model or a run, or a hub name")
    text: list[str] = option([], "text of the domain to pretrain on, as pretrain.py's --train", nargs="+", metavar="PATH")
    control: list[str] = option([], "text of another domain: the same pretraining on it is compared (default: none)", nargs="+",
                                metavar="PATH")
    task_text: bool = option(False, "pretrain on the texts of --train, too")
    label_budgets: list[str] = option(["all"], "numbers of training rows to fine-tune on, drawn with the classes in proportion, or all",
                                      nargs="+", metavar="N")
    seeds: int = option(5, "fine-tune each encoder with each budget so many times, seeds from 0 on")
    pretrain: str = option("", "options of pretrain.py, in quotes: \"--max-steps 500 --masking word\" (default: its own)",
                           metavar="OPTIONS")
    finetune: str = option("", "options of finetune.py, in quotes (default: its own)", metavar="OPTIONS")
    output: str = option("runs/adapt", "folder of the experiment; one that was interrupted goes on")
    overwrite: bool = option(False, "start the experiment in --output anew")


# What `python scripts/pretrain.py` runs when no text is given; a flag still overrides each value. At a rate of 3e-3 with the usual
# short warm-up some runs stayed at the unigram level; at these 800 steps reached 0.54 of it.
EMBEDDED_DEFAULTS = {
    "model": "tiny", "vocab_size": 4096, "max_length": 64, "batch_size": 32, "micro_batch_size": 32, "learning_rate": 2e-3, "warmup": 0.2,
    "format": "sentences", "output": "runs/default", "eval_tokens": 60_000, "config_override": ["hidden_dropout_prob=0"],
}


def interval(value: str) -> int | str:
    """`--eval-every` and `--save-every`: a number of steps, 'epoch' or 'auto'; ValueError otherwise."""
    return value if value in ("epoch", "auto") else int(value)


def validate(config) -> list[str]:
    """Every problem of the values that shows without looking at a file, a message each; fields that a command lacks are
    passed over."""
    problems = []

    def need(name: str, holds: Callable[[typing.Any], bool], needed: str) -> None:
        value = getattr(config, name, None)
        if value is None:
            return
        finite = all(math.isfinite(v) for v in (value if isinstance(value, list) else [value]) if isinstance(v, float))
        if not finite or not holds(value):
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            problems.append(f"--{name.replace('_', '-')} {shown}: needed is {needed}")

    need("mask_rate", lambda v: len(v) <= 2 and all(0 < rate <= 0.8 for rate in v), "one or two shares above 0 and at most 0.8")
    for name in ("entity_probability", "entity_budget"):
        need(name, lambda v: 0 < v <= 1, "a share above 0 and at most 1")
    need("split_sentences", lambda v: v == "auto" or (len(v) in (2, 3) and v.isalpha() and v not in ("on", "off")),
         "a language code such as en, or auto")
    for name in ("text_field", "text_pair_field", "label_field", "entity_field", "add_tokens", "lexicon", "similar"):
        need(name, lambda v: v.strip(), "a name, or the option left away")
    need("mask_split", lambda v: all(0 <= share <= 1 for share in v) and abs(sum(v) - 1) < 1e-6,
         "three shares within 0..1 that sum to 1")
    need("valid_fraction", lambda v: 0 <= v <= 0.5, "a share within 0..0.5")
    need("adam_betas", lambda v: all(0 <= beta < 1 for beta in v), "two numbers within 0..1, below 1")
    for name in ("nsp_weight", "weight_decay", "warmup", "max_grad_norm", "max_minutes"):
        need(name, lambda v: v >= 0, "a number of at least 0")
    for name in ("learning_rate", "adam_epsilon", "epochs"):
        need(name, lambda v: v > 0, "a number above 0")
    for name in ("batch_size", "micro_batch_size", "keep", "log_every", "eval_tokens"):
        need(name, lambda v: v >= 1, "a whole number of at least 1")
    need("workers", lambda v: 0 <= v <= 256, "0 to 256 processes")
    for name in ("max_steps", "patience", "eval_batch_size", "seed", "max_documents", "label_budget"):
        need(name, lambda v: 0 <= v < 2**63, "a whole number of at least 0")
    need("max_length", lambda v: 8 <= v <= 1 << 16, "8 to 65536 tokens")
    need("vocab_size", lambda v: 100 <= v <= 1 << 20, "100 to 1048576 entries")
    need("config_override", lambda v: all(entry.partition("=")[0].isidentifier() and "=" in entry for entry in v), "KEY=VALUE")
    for name in ("eval_every", "save_every"):
        need(name, lambda v: v in ("epoch", "auto") or (v.isdecimal() and v.isascii() and int(v) > 0),
             "a number of steps above 0, epoch or auto")
    return problems + _validate_together(config)


def _validate_together(config) -> list[str]:
    problems = phases.problems_of(config) if hasattr(config, "phases") else []
    batch, micro = getattr(config, "batch_size", 0), getattr(config, "micro_batch_size", 1) or 0
    if micro >= 1 and batch >= 1 and batch % micro:
        fits = [size for size in range(1, min(batch, micro) + 1) if batch % size == 0]
        problems.append(f"--batch-size {batch}: is not a multiple of --micro-batch-size {micro}; "
                        f"needed is a micro-batch size that divides it, such as {fits[-1] if fits else 1}")
    if getattr(config, "replace", "mask") == "similar" and not (config.similar and config.masking != "token"):
        problems.append(f"--replace similar: needed is a table, --similar FILE, and --masking word, span or entity, not {config.masking}")
    elif getattr(config, "similar", None) and config.replace != "similar":
        problems.append(f"--similar {config.similar}: is used with --replace similar only; needed is both or neither")
    if getattr(config, "masking", "entity") != "entity" and (config.lexicon or config.entity_field):
        problems.append(f"--{'lexicon' if config.lexicon else 'entity-field'} {config.lexicon or config.entity_field}: marks entities, "
                        f"needed is --masking entity with it, not {config.masking}")
    if getattr(config, "resume", False) and config.overwrite:
        problems.append("--resume --overwrite: exclude each other; needed is one of the two")
    if getattr(config, "resume", False) and not config.output:
        problems.append("--resume: needed is the run folder, --output DIR")
    if getattr(config, "patience", 0) and not config.valid and not getattr(config, "valid_fraction", 1):
        problems.append("--patience: needed is held-out text, --valid PATHS or a --valid-fraction above 0")
    if getattr(config, "precision", "") == "fp16" and config.device == "cpu":
        problems.append("--precision fp16: the CPU has no fp16 training; needed is bf16 or fp32")
    return problems
