"""Models from scratch and from checkpoints, checked before anything large is made.

A UserError says "VALUE: what is wrong; expected what"; callers add the option.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from pretrain.config import MODEL_SIZES
from pretrain.errors import UserError, refusing
from pretrain.files import CHECKSUMS, CODE_FIELDS, model_folder, read_json, sums_of
from pretrain.model.bert import BertForPreTraining
from pretrain.model.distilbert import DistilBertForMaskedLM
from pretrain.model.modernbert import ModernBertForMaskedLM
from pretrain.model.packed import PackedModel
from pretrain.model.roberta import CamembertForMaskedLM, RobertaForMaskedLM, XLMRobertaForMaskedLM
from pretrain.schema import FILE_NAME, Rule, integer, misfit, number, one_of, optional, values_of

FAMILIES: dict[str, type[PackedModel]] = {
    "bert": BertForPreTraining,
    "roberta": RobertaForMaskedLM,
    "xlm-roberta": XLMRobertaForMaskedLM,
    "camembert": CamembertForMaskedLM,
    "distilbert": DistilBertForMaskedLM,
    "modernbert": ModernBertForMaskedLM,
}  # by config.model_type; names can mislead: chinese-roberta-wwm-ext is a BERT

SIZES = "hidden_size num_attention_heads intermediate_size type_vocab_size max_position_embeddings"
SHARES = "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout layer_norm_eps"
NOTHING = Rule(lambda value: value is None, "nothing")
NAMES = Rule(
    lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names),
    "a list of names",
)
NO_HUB_CODE = Rule(lambda value: "/" not in str(value), "a name without /: hub code is not run")
MODEL_FORM = {  # of config.json: what sets sizes, or would fail deep inside the library
    **dict.fromkeys(SIZES.split(), optional(integer(1, 1 << 20))),
    "num_hidden_layers": optional(integer(1, 1024)),
    "vocab_size": optional(integer(1, 1 << 24)),
    **dict.fromkeys(SHARES.split(), optional(number(0, 1))),
    "initializer_range": optional(number(0, 1e3)),
    "architectures": optional(NAMES),
    "num_labels": optional(integer(0, 1 << 16)),
    "pad_token_id": optional(integer(0, 1 << 24)),
    "chunk_size_feed_forward": optional(integer(0, 0)),
    "return_dict": optional(one_of(True)),
    "position_embedding_type": optional(one_of("absolute")),
    "hidden_act": optional(one_of(*ACT2FN)),
    **dict.fromkeys(("per_layer_config", "transformers_weights"), NOTHING),
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), NO_HUB_CODE),
}
INDEX_FORM = {"weight_map": values_of(FILE_NAME, "an object that names files of this folder")}
# In the order in which transformers looks for them.
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
UNREAD = (".md", ".pt")  # ends of files that no model is made from: model card, training state
FEW_WEIGHTS = 1 << 24  # up to this many are created before the files are found to lack them
BOOLS = {"true": True, "1": True, "false": False, "0": False}
NOT_OVERRIDDEN = {"model_type", "transformers_version", "_name_or_path"}
NOT_OVERRIDDEN |= {"output_attentions", "output_hidden_states"}
PARSERS = {int: int, float: float, str: str, bool: lambda text: BOOLS[text.lower()]}

transformers.utils.logging.disable_progress_bar()  # its bar for each file breaks the run's own


def from_size(
    size: str,
    vocab_size: int,
    max_length: int,
    pad_id: int,
    overrides: Sequence[str] = (),
    architecture: str = "bert",
) -> PackedModel:
    """A model from scratch of a size in MODEL_SIZES and a family in FAMILIES; UserError if
    `overrides` do not fit."""
    layers, width = MODEL_SIZES[size]
    family = FAMILIES[architecture]
    kind = family.config_class.model_type
    assert kind in CONFIG_MAPPING, f"{kind}: register its config with transformers.AutoConfig"
    config = family.config_class(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        pad_token_id=pad_id,
        **family.sizes(width, max_length),
    )
    override(config, overrides)
    value = " ".join(overrides) or size
    with refusing(f"{value}: cannot build a model", "expected fields that fit together"):
        model = family(config)
    model.settle_bias()
    return model


def from_checkpoint(
    name: str, config: PreTrainedConfig | None = None
) -> tuple[PackedModel, list[str]]:
    """(model in float32, parts that start fresh) of a checkpoint, with or without heads. `config`
    comes from `load_config`, with or without overrides."""
    config = config or load_config(name)
    model, missing = load_weights(FAMILIES[config.model_type], name, config)
    is_fresh = {prefix: any(key.startswith(prefix) for key in missing) for prefix in model.parts}
    fresh = [part for prefix, part in model.parts.items() if is_fresh[prefix]]
    return model, list(dict.fromkeys(fresh))  # a part may have several prefixes


def load_config(name: str) -> PreTrainedConfig:
    """The config of a checkpoint: the folder of a model or a run, or a hub name."""
    folder, problem = model_folder(name), "its config.json cannot be used"
    path, expected = Path(folder, "config.json"), "the config of a model"
    if path.is_file():  # checked before a number in it allocates something large
        kind = read_json(path, MODEL_FORM, expected).get("model_type")
        if type(kind) is str:
            _check_family(name, kind)  # also one that transformers does not know
    else:
        problem, expected = "cannot be found", "a folder or a hub name (offline: a folder)"
    with refusing(f"{name}: {problem}", f"expected {expected}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_family(name, config.model_type)
    for field in CODE_FIELDS:
        vars(config).pop(field, None)
    # Nothing here returns them, and a config that asks for them cannot be saved.
    config.output_attentions = config.output_hidden_states = False
    config._attn_implementation = "eager"  # ours replaces it; another one may not be installed
    # The file may list labels in any order.
    config.id2label = {number: str(label) for number, label in sorted(config.id2label.items())}
    check_config(config, name)
    return config


def _check_family(name: str, model_type: str) -> None:
    if model_type not in FAMILIES:
        problem = f"has model_type {model_type!r} in its config"
        raise UserError(f"{name}: {problem}; expected one of {', '.join(FAMILIES)}")


def check_config(config: PreTrainedConfig, value: str) -> None:
    """UserError about `value` if the fields of `config` do not make a model."""
    family = FAMILIES[config.model_type]
    problem = misfit(config.to_dict(), MODEL_FORM | family.config_form)
    problem = problem or family.config_problem(config)
    if problem:
        raise UserError(f"{value}: {problem}")


def override(config: PreTrainedConfig, entries: Sequence[str]) -> None:
    """Set fields of `config` from KEY=VALUE entries, in the types of its family's defaults.
    UserError for an unknown field, or for values that make no model."""
    kinds = {name: type(value) for name, value in type(config)().to_dict().items()}
    known = {name for name, kind in kinds.items() if kind in PARSERS and hasattr(config, name)}
    known -= NOT_OVERRIDDEN
    for entry in entries:
        name, _, text = entry.partition("=")
        if name not in known:
            raise UserError(f"{entry}: unknown field; expected one of {', '.join(sorted(known))}")
        kind = kinds[name]
        with refusing(f"{entry}: cannot be read", f"expected a value of type {kind.__name__}"):
            setattr(config, name, PARSERS[kind](text))
    if not entries:
        return
    check_config(config, " ".join(entries))
    if layer_types := getattr(config, "layer_types", None):  # one per layer, new ones as usual
        num_layers = config.num_hidden_layers
        usual = type(config)(num_hidden_layers=num_layers).layer_types
        config.layer_types = [*layer_types, *usual[len(layer_types) :]][:num_layers]


def load_weights(
    family: type[PackedModel], name: str, config: PreTrainedConfig
) -> tuple[PackedModel, list[str]]:
    """(model in float32, weights missing from the checkpoint). UserError if an encoder weight is
    missing, or any weight is not finite."""
    transformers.utils.logging.set_verbosity_error()  # no table of missing weights
    expected = "expected a complete checkpoint, in safetensors or without pickled code"
    with refusing(f"{name}: its weights cannot be read", expected):
        _check_files(family, name, config)
        _report_changes(Path(model_folder(name)))
        cached_file(  # so that pretrain/card.py finds the license of a hub model in the cache
            model_folder(name),
            "README.md",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        options = {"ignore_mismatched_sizes": family.head_may_differ, "output_loading_info": True}
        model, info = family.from_pretrained(
            model_folder(name), config=config, dtype=torch.float32, **options
        )
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    missing -= model.load_bias(missing)
    of_encoder = re.compile(rf"{family.base_model_prefix}\.(?!pooler\.)")
    if lacks := sorted(filter(of_encoder.match, missing)):
        problem = f"{len(lacks)} weights of the encoder are missing, such as {lacks[0]}"
        raise UserError(f"{name}: {problem}; expected a {config.model_type} checkpoint")
    if unused := sorted(filter(of_encoder.match, info["unexpected_keys"])):
        shown = f"{len(unused)} weights of the encoder, such as {unused[0]}"
        print(f"{name}: its config has no place for {shown}")
    for key, weight in model.state_dict().items():
        num_bad = weight.numel() - int(weight.isfinite().sum())
        if num_bad:
            problem = f"{num_bad:,} of {weight.numel():,} numbers of {key} are NaN or infinite"
            raise UserError(f"{name}: {problem}; expected finite weights")
    if decoder := model.get_output_embeddings():  # transformers decides by the weights themselves
        model.config.tie_word_embeddings = decoder.weight is model.get_input_embeddings().weight
        model.settle_bias()
    return model, sorted(missing)


def _check_files(family: type[PackedModel], name: str, config: PreTrainedConfig) -> None:
    """UserError if `config` describes more weights than the files hold."""
    files = _weight_files(model_folder(name))
    num_bytes = sum(map(os.path.getsize, files))
    with torch.device("meta"):  # allocates nothing
        num_weights = sum(weight.numel() for weight in family(config).parameters())
    if files and num_weights > max(num_bytes, FEW_WEIGHTS):
        problem = f"has {num_bytes:,} bytes for the {num_weights:,} weights of its config"
        raise UserError(f"{name}: {problem}; expected a complete checkpoint with its own config")


def _report_changes(folder: Path) -> None:
    """Print which files of a folder have changed since a run wrote it: otherwise a flipped bit of a
    weight would go unnoticed."""
    if not (folder / CHECKSUMS).exists():
        return
    try:
        written = read_json(folder / CHECKSUMS)
    except UserError as error:
        print(error)
        return
    found = sums_of(folder, ignored=UNREAD)
    names = [name for name in written if not name.endswith(UNREAD)]
    if changed := [name for name in names if found.get(name) != written[name]]:
        advice = "unless you edited it, restore it or write the model again"
        print(f"{folder}: not as it was written: {', '.join(changed)}; {advice}")


def _weight_files(folder: str) -> list[str]:
    """The files from which transformers reads the weights, fetched if `folder` is a hub name.
    UserError if an index names files outside the folder."""
    for name in WEIGHT_FILES:
        path = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
        if path and path.endswith(".index.json"):
            read_json(Path(path), INDEX_FORM, "an index of weights")
            return get_checkpoint_shard_files(folder, path)[0]
        if path:
            return [path]
    return []
