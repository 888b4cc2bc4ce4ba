"""BERT with MLM and NSP heads on packed batches: transformers' BertModel as encoder, our heads, summed losses.

Parameter names, class name and ties are those of transformers' BertForPreTraining: `save_pretrained` writes the class name
into config.json, and a folder written here opens there and the other way round.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertPreTrainedModel

from pretrain.batch import IGNORED, Batch, Output
from pretrain.config import MODEL_SIZES, UserError
from pretrain.model.attention import SDPA
from pretrain.model.heads import MaskedLMHead, PreTrainingHeads

OVERRIDES = {int: int, float: float, str: str, bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()]}

transformers.utils.logging.disable_progress_bar()  # its bars for every file written break the run's own


class BertForPreTraining(BertPreTrainedModel):
    """Batch -> Output: the summed MLM and NSP losses and the right answers of a packed batch.

    `loss_weights` says which losses there are: with "mlm" alone, pooler and NSP head are frozen and not computed."""

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

    def encode(self, batch: Batch) -> Tensor:
        """float [T, width]: the last hidden states. Not BertModel.forward, whose pooler sees the pack's first token only."""
        hidden = self.bert.embeddings(input_ids=batch.input_ids[None], token_type_ids=batch.token_type_ids[None],
                                      position_ids=batch.position_ids[None])
        # The kernel gets tensors and one constant: the lengths, new in every batch, would make a compiled graph recompile.
        ends = ({"lengths": batch.lengths} if self.config._attn_implementation == SDPA else
                {"cu_seqlens": batch.cu_seqlens, "max_length": batch.max_length})
        return self.bert.encoder(hidden, **ends).last_hidden_state[0]

    def masked_lm_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """float32 [M, vocabulary]: scores at the masked positions."""
        return self.cls.predictions(hidden[batch.masked_positions]).float()

    def next_sentence_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """float32 [N, 2]: scores of "is next" and "is random" at each [CLS]."""
        first = hidden[batch.cu_seqlens[:-1].long()]
        return self.cls.seq_relationship(self.bert.pooler(first[:, None])).float()  # the pooler takes token 0 of [N, 1, width]

    def forward(self, batch: Batch) -> Output:
        """Sums over the batch; the caller divides them by counts of the whole step."""
        hidden = self.encode(batch)
        scored = {"mlm": (self.masked_lm_logits(hidden, batch), batch.masked_lm_labels)}
        if "nsp" in self.loss_weights:
            scored["nsp"] = (self.next_sentence_logits(hidden, batch), batch.next_sentence_label)
        return Output({name: F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
                       for name, (logits, labels) in scored.items()},
                      {name: (logits.detach().argmax(-1) == labels).sum() for name, (logits, labels) in scored.items()})


def from_size(size: str, vocab_size: int, max_length: int, pad_id: int, overrides: list[str]) -> BertForPreTraining:
    """A model from scratch of a size named in MODEL_SIZES, with BERT's other settings."""
    layers, width = MODEL_SIZES[size]
    config = BertConfig(vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
                        intermediate_size=4 * width, max_position_embeddings=max(512, max_length), pad_token_id=pad_id)
    override(config, overrides)
    config._attn_implementation = SDPA
    try:
        return BertForPreTraining(config)
    except Exception as error:  # each wrong field has its own, from ValueError to IndexError
        raise UserError(f"--config-override {' '.join(overrides)}: makes no model ({type(error).__name__}: {error})") from error


def load_config(name: str) -> BertConfig:
    """The config of a BERT checkpoint (folder or hub name); UserError where it cannot be had or is of another family."""
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers raises many kinds here, from OSError to KeyError
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--model {name}: is no size ({', '.join(MODEL_SIZES)}), no folder with a config.json, and not to be had from "
                        f"the hub or its cache ({type(error).__name__}: {reason}); offline, give a folder") from error
    if config.model_type != "bert":
        raise UserError(f"--model {name}: is of the family {config.model_type!r} (config.model_type); families that work: bert")
    return config


def from_checkpoint(name: str, overrides: list[str]) -> tuple[BertForPreTraining, list[str]]:
    """(model in float32, parts that start fresh) of a BERT checkpoint, with or without heads."""
    config = load_config(name)
    override(config, overrides)
    try:
        model, info = BertForPreTraining.from_pretrained(name, config=config, dtype=torch.float32, attn_implementation=SDPA,
                                                         output_loading_info=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(f"--model {name}: its weights cannot be read ({type(error).__name__}: {reason})") from error
    missing = sorted(info["missing_keys"])
    encoder = [key for key in missing if key.startswith(("bert.embeddings", "bert.encoder"))]
    if encoder:
        raise UserError(f"--model {name}: lacks {len(encoder)} weights of the encoder, {encoder[0]} first; needed is a BERT checkpoint")
    parts = {"bert.pooler": "pooler", "cls.predictions": "MLM head", "cls.seq_relationship": "NSP head"}
    return model, [part for prefix, part in parts.items() if any(key.startswith(prefix) for key in missing)]


def override(config: BertConfig, entries: list[str]) -> None:
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


def count_flops(model: BertForPreTraining, batch: Batch) -> float:
    """Floating-point operations of a forward and backward pass over the real tokens: 6 for each encoder weight and token,
    12 x layers x width for each pair of tokens that attend, 6 for each weight of the MLM head and masked position."""
    config = model.config
    encoder = sum(weight.numel() for weight in model.bert.encoder.parameters() if weight.ndim == 2)
    head = config.hidden_size * (config.hidden_size + config.vocab_size)
    pairs = sum(length * length for length in batch.lengths[:batch.num_sequences])
    return (6.0 * encoder * batch.num_tokens + 12.0 * config.num_hidden_layers * config.hidden_size * pairs
            + 6.0 * head * batch.counts["mlm"])
