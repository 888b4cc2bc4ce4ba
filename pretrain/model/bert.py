"""BERT with MLM and NSP heads on packed batches, and models from checkpoints of every family.

BERT's encoder is transformers' BertModel, its heads are ours. Parameter names, class name and ties are those of
BertForPreTraining: `save_pretrained` writes the class name into config.json, and files go both ways.
"""
from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertPreTrainedModel

from pretrain.batch import Batch
from pretrain.command import UserError, refusing
from pretrain.config import MODEL_SIZES
from pretrain.files import FILE_NAMES, integer, misfit, model_folder, read_json, real
from pretrain.model.heads import MaskedLMHead, PreTrainingHeads
from pretrain.model.packed import PackedModel
from pretrain.model.roberta import CamembertForMaskedLM, RobertaForMaskedLM, XLMRobertaForMaskedLM

OVERRIDES = {int: int, float: float, str: str, bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()]}
FEW_WEIGHTS = 1 << 28  # that may be made before it shows that a file lacks them

MODEL_FORM = {  # of config.json: what decides sizes, or would fail deep in the library
    "num_hidden_layers": integer(1, 1024, True), "hidden_size": integer(1, 1 << 16, True), "num_attention_heads": integer(1, 1 << 12, True),
    "intermediate_size": integer(1, 1 << 20, True), "vocab_size": integer(1, 1 << 24, True), "type_vocab_size": integer(1, 1 << 10, True),
    "max_position_embeddings": integer(1, 1 << 20, True), "num_labels": integer(0, 1 << 16, True),
    "pad_token_id": integer(0, 1 << 24, True), "chunk_size_feed_forward": integer(0, 0, True),
    "return_dict": (lambda value: value in (None, True), "true"),
    "hidden_dropout_prob": real(0, 1), "attention_probs_dropout_prob": real(0, 1), "classifier_dropout": real(0, 1),
    "layer_norm_eps": real(0, 1), "initializer_range": real(0, 1e3), "per_layer_config": (lambda value: value is None, "nothing"),
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), (lambda value: "/" not in str(value), "no code of the hub"))}

transformers.utils.logging.disable_progress_bar()  # its bars for every file written break the run's own


class BertForPreTraining(PackedModel, BertPreTrainedModel):
    """Batch -> Output: the summed MLM and NSP losses and the right answers of a packed batch.

    With the loss "mlm" alone, pooler and NSP head are frozen and not computed."""

    masked_lm_head = "cls.predictions"
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = PreTrainingHeads(config)
        self.loss_weights = {"mlm": 1.0, "nsp": 1.0}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskedLMHead):
            nn.init.zeros_(module.bias)

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder, for transformers' tying and resizing."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, decoder: nn.Linear) -> None:
        """The counterpart of `get_output_embeddings`."""
        self.cls.predictions.decoder = decoder
        self.cls.predictions.bias = decoder.bias

    def set_objective(self, objective: str, nsp_weight: float = 1.0) -> None:
        """Choose the losses; parameters that no loss reaches are frozen (DDP wants a gradient for every other)."""
        self.loss_weights = {"mlm": 1.0} if objective == "mlm" else {"mlm": 1.0, "nsp": nsp_weight}
        for module in (self.bert.pooler, self.cls.seq_relationship):
            module.requires_grad_(objective != "mlm")

    def next_sentence_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """float32 [N, 2]: scores of "is next" and "is random" at each [CLS]."""
        first = self.first_tokens(hidden, batch)[:, None]  # the pooler takes token 0 of [N, 1, width]
        return self.cls.seq_relationship(self.bert.pooler(first)).float()

    def score(self, hidden: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """(logits, labels) of each loss."""
        scored = super().score(hidden, batch)
        if "nsp" in self.loss_weights:
            scored["nsp"] = (self.next_sentence_logits(hidden, batch), batch.next_sentence_label)
        return scored


FAMILIES = {"bert": BertForPreTraining, "roberta": RobertaForMaskedLM, "xlm-roberta": XLMRobertaForMaskedLM,
            "camembert": CamembertForMaskedLM}  # by config.model_type; a name tells nothing: chinese-roberta-wwm-ext is a BERT


def from_size(size: str, vocab_size: int, max_length: int, pad_id: int, overrides: list[str]) -> BertForPreTraining:
    """A model from scratch of a size named in MODEL_SIZES, with BERT's other settings."""
    layers, width = MODEL_SIZES[size]
    config = BertConfig(vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
                        intermediate_size=4 * width, max_position_embeddings=max(512, max_length), pad_token_id=pad_id)
    override(config, overrides)
    with refusing(f"--config-override {' '.join(overrides)}: makes no model", "needed are fields that fit together"):
        return BertForPreTraining(config)


def load_config(name: str) -> PreTrainedConfig:
    """The config of a checkpoint (folder of a model or a run, or hub name); UserError where it cannot be had or is of another
    family."""
    path, problem = Path(model_folder(name), "config.json"), "its config.json cannot be used"
    if path.is_file():  # before a number in it makes something large
        read_json(path, MODEL_FORM, "a model's config")
    else:
        problem = f"is no size ({', '.join(MODEL_SIZES)}), no folder with a config.json, and not to be had from the hub or its cache"
    with refusing(f"--model {name}: {problem}", "offline, give a folder"):
        config = AutoConfig.from_pretrained(model_folder(name), trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise UserError(f"--model {name}: is of the family {config.model_type!r} (config.model_type); families that work: "
                        f"{', '.join(FAMILIES)}")
    config.id2label = {number: str(label) for number, label in sorted(config.id2label.items())}  # a file may have them in any order
    check_config(config, f"--model {name}")
    return config


def check_config(config: PreTrainedConfig, name: str) -> None:
    """UserError where the fields of `config` make no model: before anything is as large as they say."""
    problem = misfit(config.to_dict(), MODEL_FORM)
    if not problem and config.hidden_size % config.num_attention_heads:
        problem = f"hidden_size is {config.hidden_size}, needed is a multiple of num_attention_heads, {config.num_attention_heads}"
    if not problem and config.hidden_act not in ACT2FN:
        problem = f"hidden_act is {config.hidden_act}, needed is one of {', '.join(ACT2FN)}"
    if problem:
        raise UserError(f"{name}: {problem}")


def check_files(folder: Path, config: PreTrainedConfig, name: str) -> None:
    """UserError where the weights of a folder are in other folders, or fewer than `config` says."""
    for index in folder.glob("*.index.json"):
        read_json(index, {"weight_map": FILE_NAMES}, "an index of weights")
    num_bytes, width = sum(path.stat().st_size for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]), config.hidden_size
    weights = width * (config.vocab_size + config.max_position_embeddings
                       + config.num_hidden_layers * (4 * width + 2 * config.intermediate_size))
    if num_bytes and weights > max(num_bytes, FEW_WEIGHTS):
        raise UserError(f"--model {name}: its config describes {weights:,} weights, its files have {num_bytes:,} bytes; needed is a whole "
                        "checkpoint and its own config")


def from_checkpoint(name: str, overrides: list[str]) -> tuple[PackedModel, list[str]]:
    """(model in float32, parts that start fresh) of a checkpoint of one of FAMILIES, with or without heads."""
    config = load_config(name)
    override(config, overrides)
    model, missing = load_weights(FAMILIES[config.model_type], name, config)
    parts = {"bert.pooler": "pooler", "cls.predictions": "MLM head", "lm_head": "MLM head", "cls.seq_relationship": "NSP head"}
    return model, [part for prefix, part in parts.items() if any(key.startswith(prefix) for key in missing)]


def load_weights(family: type[PackedModel], name: str, config: PreTrainedConfig) -> tuple[PackedModel, list[str]]:
    """(model of a class in float32, weights that the checkpoint lacks, none of the encoder)."""
    transformers.utils.logging.set_verbosity_error()  # its table of what is missing; the caller tells
    check_files(Path(model_folder(name)), config, name)
    with refusing(f"--model {name}: its weights cannot be read", "needed is a whole checkpoint, in safetensors or without code in it"):
        model, info = family.from_pretrained(model_folder(name), config=config, dtype=torch.float32,
                                             output_loading_info=True, ignore_mismatched_sizes=family.head_may_differ)
    missing, prefix = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}), family.base_model_prefix
    encoder = [key for key in missing if key.startswith((f"{prefix}.embeddings", f"{prefix}.encoder"))]
    if encoder:
        raise UserError(f"--model {name}: lacks {len(encoder)} weights of the encoder, {encoder[0]} first; needed is a "
                        f"{config.model_type} checkpoint")
    return model, missing


def override(config: PreTrainedConfig, entries: list[str]) -> None:
    """Set fields of `config` from KEY=VALUE entries, in the type of the field's default; UserError for an unknown key."""
    defaults = BertConfig()
    for entry in entries:
        name, _, text = entry.partition("=")
        kind = type(getattr(defaults, name, None))
        if name == "model_type" or kind not in OVERRIDES:
            known = sorted(key for key, value in defaults.to_dict().items() if type(value) in OVERRIDES and key != "model_type")
            raise UserError(f"--config-override {entry}: unknown field; known are {', '.join(known)}")
        try:
            setattr(config, name, OVERRIDES[kind](text))
        except (ValueError, KeyError) as error:
            raise UserError(f"--config-override {entry}: needed is a value of type {kind.__name__}") from error
    if entries:
        check_config(config, f"--config-override {' '.join(entries)}")


def count_flops(model: PackedModel, batch: Batch) -> float:
    """Floating-point operations of a forward and backward pass over the real tokens: 6 for each encoder weight and token,
    12 x layers x width for each pair of tokens that attend, 6 for each weight of the MLM head and masked position."""
    config = model.config
    encoder = sum(weight.numel() for weight in model.base_model.encoder.parameters() if weight.ndim == 2)
    head = config.hidden_size * (config.hidden_size + config.vocab_size)
    pairs = sum(length * length for length in batch.lengths[:batch.num_sequences])
    return (6.0 * encoder * batch.num_tokens + 12.0 * config.num_hidden_layers * config.hidden_size * pairs
            + 6.0 * head * batch.counts["mlm"])
