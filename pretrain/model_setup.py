"""From options to the model of a run, checked against its tokenizer and its task, and set up for
the device."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pretrain.config import MODEL_SIZES, OBJECTIVES, Config, length_option, longest, typed
from pretrain.data import tokenizer as tokenizers
from pretrain.data.tokenizer import Vocabulary
from pretrain.errors import UserError, check, option_named
from pretrain.model.attention import VARLEN, choose_attention
from pretrain.model.loading import from_checkpoint, from_size, load_config, override
from pretrain.model.packed import PackedModel
from pretrain.runtime.optim import choose_precision
from pretrain.schema import AUTO


def make_model(
    config: Config,
    checkpoint: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    added: dict[int, list[int]],
) -> tuple[PackedModel, list[str]]:
    """(model, names of its parts that start fresh): from scratch, pretrained, or of the checkpoint
    to resume.

    UserError if it does not fit the tokenizer, the objective or the lengths."""
    if checkpoint:
        return from_checkpoint(str(checkpoint))
    from_scratch, overrides = config.model in MODEL_SIZES, config.config_override
    if from_scratch:
        sizes = (vocabulary.size, longest(config), vocabulary.pad_id)
        with option_named("--config-override"):
            model = from_size(config.model, *sizes, overrides, config.architecture)
        tokenizer.model_max_length = model.max_length
        fresh = list(model.parts.values())
    else:
        with option_named("--model"):
            settings = load_config(config.model)
        with option_named("--config-override"):
            override(settings, overrides)
        with option_named("--model"):
            model, fresh = from_checkpoint(config.model, settings)
    problems, num_entries = task_problems(model, config), vocabulary.size - len(added)
    check(problems + _vocabulary_problems(model, config, tokenizer, num_entries))
    if added and not from_scratch:
        model.add_vectors(vocabulary.size, added, config.new_vectors == "mean")
    for role in ("bos_token", "eos_token"):
        is_named = any(entry.startswith(f"{role}=") for entry in config.add_special_tokens)
        if from_scratch or is_named:
            setattr(model.config, f"{role}_id", getattr(tokenizer, f"{role}_id"))
    if fresh and not from_scratch:
        missing = f"{config.model} has no {' or '.join(fresh)}"
        print(f"{missing}: initialized randomly, so the first validation numbers mean little")
    return model, fresh


def task_problems(model: PackedModel, config: Config) -> list[str]:
    """Why the model does not fit the lengths or the objective, or that it is not an encoder."""
    option = length_option(config)
    problems = [f"{option} {problem}" for problem in model.length_problems(longest(config))]
    if OBJECTIVES[config.objective]:
        problems += [f"--objective {text}" for text in model.pair_problems(config.objective)]
    if getattr(model.config, "is_decoder", False):
        problems.append(f"--model {config.model}: is a decoder; expected an encoder")
    return problems


def _vocabulary_problems(
    model: PackedModel, config: Config, tokenizer: PreTrainedTokenizerBase, num_entries: int
) -> list[str]:
    """A problem if the tokenizer (`num_entries` entries without the added tokens) does not fit the
    model, or differs from the one that a pretrained model has."""
    rows, from_scratch = model.config.vocab_size, config.model in MODEL_SIZES
    # Tables are often padded to a round number of rows.
    if num_entries > rows or (num_entries + 128 <= rows and not from_scratch):
        problem = f"has {num_entries:,} entries, but the model {config.model} has {rows:,}"
        option = f"--tokenizer {config.tokenizer or config.model}"
        return [f"{option}: {problem}; expected the model's own tokenizer"]
    if from_scratch or not config.tokenizer:
        return []
    try:
        own = tokenizers.load(config.model, config.lowercase)
    except UserError:
        return []
    if own.get_vocab().items() <= tokenizer.get_vocab().items():
        return []
    problem = f"its vocabulary differs from that of the model {config.model}"
    return [f"{typed(config, 'tokenizer')}: {problem}; omit --tokenizer"]


def decide_precision(config, saved: dict, device: torch.device) -> str:
    """The precision of the run; a resumed run keeps its own unless the option changed."""
    before = saved.get("precision")
    is_same = saved and config.precision == saved["options"]["precision"]
    with option_named("--precision"):
        precision = choose_precision(before if is_same else config.precision, device)
    if saved and precision != before:
        effect = "so its numbers will differ from those of an uninterrupted run"
        print(f"the run resumes in {precision} instead of {before}, {effect}")
    return precision


def set_up_model(
    model: PackedModel, asked: Config, config: Config, device: torch.device, precision: str
) -> None:
    """Choose attention, losses, dropout and gradient checkpointing. `asked`: what `config` is made
    from."""
    model.attention = choose_attention(device, precision)
    keeps_rates = asked.dropout == AUTO and config.dropout == model.config_dropout
    if not keeps_rates:  # else each module keeps its own rate, as in the config
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    model.use_pairs(config.nsp_weight if OBJECTIVES[config.objective] else None)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)


def enable_gradient_checkpointing(model: PackedModel) -> None:
    """Call transformers' method, which was renamed."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


def should_compile(config: Config, model: PackedModel) -> bool:
    """What --compile says; auto: where attention takes packs of fixed shapes, without --shard."""
    if config.compile != "auto":
        return config.compile == "on"
    is_compiled = model.attention == VARLEN and not config.shard
    if is_compiled:  # what cannot be compiled runs in eager mode
        torch._dynamo.config.suppress_errors = True
    return is_compiled
