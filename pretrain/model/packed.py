"""What every family does with a packed batch: encode without padding, score, sum the losses."""

from collections.abc import Set

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pretrain.batch import Batch, Loss
from pretrain.model.attention import SDPA, PackedSelfAttention, attention_over
from pretrain.model.losses import cross_entropy
from pretrain.model.replacements import REPLACEMENTS, aligned_linear

MLM_HEAD = "MLM head"  # the part of every family that predicts masked tokens


class PackedModel:
    """Batch -> losses by name: a mixin for a pretrained model of transformers. A family is one file
    (see roberta.py, distilbert.py, modernbert.py) with `transform` and whatever differs from BERT,
    and one line in `loading.FAMILIES`. Class and weight names stay stock: transformers reads the
    files."""

    parts: dict[str, str] = {}  # weight prefix -> name of the part, which starts fresh if missing
    pair_parts: tuple[str, ...] = ()  # modules that only the NSP loss trains; (): no NSP head
    position_offset = 0  # position id of the first token
    config_form: dict = {}  # of the config's fields, besides `loading.MODEL_FORM`
    dropout_fields: tuple[str, ...] = ("hidden_dropout_prob",)  # of the config
    # End of a weight's name -> number of matrices stacked in it; Muon takes them one by one.
    stacked: dict[str, int] = {}
    head_may_differ = False  # in size from the checkpoint, and then starts fresh
    nsp_weight: float | None = None  # of the NSP or SOP loss; None: MLM only
    attention = SDPA  # or VARLEN

    def post_init(self) -> None:
        """Called by transformers once the modules exist."""
        self.replace_attention()
        for module in self.modules():
            if type(module) in REPLACEMENTS:
                module.__class__ = REPLACEMENTS[type(module)]
        super().post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Our modules are stock ones: without this, transformers would skip some of their rules for
        fresh weights, as it does for code from the hub."""
        return False

    @classmethod
    def sizes(cls, width: int, max_length: int) -> dict[str, object]:
        """Fields of the config of a model from scratch, besides its width, layers and heads."""
        return {"intermediate_size": 4 * width, "max_position_embeddings": max(512, max_length)}

    @classmethod
    def config_problem(cls, config: PreTrainedConfig) -> str | None:
        """Why the fields of `config` do not fit together; None if they do."""
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            return f"hidden_size is {width}; expected a multiple of num_attention_heads, {heads}"
        return None

    @property
    def layers(self) -> nn.ModuleList:
        return self.base_model.encoder.layer

    @property
    def windows(self) -> list[int | None]:
        """How far a token sees in each layer; None: to the ends of its sequence."""
        return [None] * len(self.layers)

    @property
    def config_dropout(self) -> float:
        """The highest of the config's own rates."""
        return max(getattr(self.config, name) for name in self.dropout_fields)

    def replace_attention(self) -> None:
        """Put packed attention, which takes `attend`, in place of each layer's own."""
        for layer in self.layers:
            layer.attention.self.__class__ = PackedSelfAttention

    @property
    def max_length(self) -> int:  # tokens per sequence
        return self.config.max_position_embeddings - self.position_offset

    def length_problems(self, max_length: int) -> list[str]:
        """What is wrong with sequences of `max_length` tokens."""
        if max_length <= self.max_length:
            return []
        return [f"{max_length}: too long for the model; expected at most {self.max_length}"]

    def pair_problems(self, objective: str) -> list[str]:
        """What is wrong with `objective`, which needs pairs of texts."""
        if not self.pair_parts:
            family = self.config.model_type
            return [f"{objective}: {family} models have no NSP head; expected mlm"]
        if self.config.type_vocab_size < 2:
            return [f"{objective}: the model has one token type, not two; expected mlm"]
        return []

    def use_pairs(self, weight: float | None) -> None:
        """Compute the NSP or SOP loss with this weight. None: MLM only, with `pair_parts` frozen,
        because DDP expects a gradient for every trainable parameter."""
        assert weight is None or self.pair_parts, f"{type(self).__name__} has no NSP head"
        self.nsp_weight = weight
        for name in self.pair_parts:
            self.get_submodule(name).requires_grad_(weight is not None)

    def forward(self, batch: Batch) -> dict[str, Loss]:
        return self.losses(self.encode(batch), batch)

    def encode(self, batch: Batch) -> Tensor:
        """[T, width]: the last hidden states. Tokens must not read those of other sequences. Does
        not use the encoder's own forward, whose pooler reads only the first token of the pack."""
        encoder, attend = self.base_model.encoder, attention_over(batch, self.attention)
        return encoder(self.embed(batch), attend=attend).last_hidden_state[0]

    def embed(self, batch: Batch) -> Tensor:
        """[1, T, width]: the input of the first layer."""
        ids, types = batch.input_ids[None], batch.token_type_ids[None]
        positions = batch.position_ids[None] + self.position_offset
        embeddings = self.base_model.embeddings
        return embeddings(input_ids=ids, token_type_ids=types, position_ids=positions)

    @torch.no_grad()
    def start_at_frequencies(self, shares: np.ndarray) -> None:
        """Set the decoder's bias, if it has one, so that a fresh MLM head guesses each token by its
        share of the text, float64 [vocabulary]. A run would spend its first hundreds of steps on
        learning it."""
        bias = self.get_output_embeddings().bias
        if bias is not None:
            bias.copy_(torch.from_numpy(np.log(shares)))

    def losses(self, hidden: Tensor, batch: Batch) -> dict[str, Loss]:
        """The terms of the training loss by name, the same ones for every batch: add yours here.
        Multiply by masks: indexing with them makes the host wait for a GPU and breaks compiled
        graphs."""
        logits = self.masked_lm_logits(hidden, batch)
        losses = {"mlm": cross_entropy(logits, batch.labels["mlm"])}
        if self.nsp_weight is not None:
            name = "sop" if "sop" in batch.labels else "nsp"  # one head for both
            logits = self.next_sentence_logits(hidden, batch)
            losses[name] = cross_entropy(logits, batch.labels[name], weight=self.nsp_weight)
        return losses

    def masked_lm_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[M, vocabulary], in autocast's precision: transform -> tied decoder + bias, at masked
        positions only. The others have no loss (transformers #3294)."""
        masked = self.transform(hidden[batch.masked_positions])
        decoder = self.get_output_embeddings()  # shares its weight with the word embeddings
        if masked.device.type == "cpu" or type(decoder) is not nn.Linear:  # wrapped, as by LoRA
            return decoder(masked)
        return aligned_linear(masked, decoder)

    def transform(self, hidden: Tensor) -> Tensor:
        """[M, width] -> [M, width]: what the MLM head does before the decoder."""
        raise NotImplementedError

    def first_tokens(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[N, width]: the hidden state of each sequence's first token; for an empty dummy, that of
        the last token of the pack."""
        return hidden[batch.cu_seqlens[:-1].clamp(max=len(hidden) - 1).long()]

    def classifier_input(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What `classifier` of a fine-tuned model reads: [N, width] from a pooler or, without one,
        [N, 1, width]. A pooler and a classifier without one both read token 0."""
        first = self.first_tokens(hidden, batch)[:, None]
        pooler = getattr(self.base_model, "pooler", None)
        return first if pooler is None else self.dropout(pooler(first))

    def _heads(self) -> list[tuple[str, nn.Module]]:
        """MLM heads that have the bias of their decoder a second time, which they do not use."""
        heads = [item for item in self.named_modules() if hasattr(item[1], "decoder")]
        return [(name, head) for name, head in heads if hasattr(head, "bias")]

    @torch.no_grad()
    def load_bias(self, missing: Set[str]) -> set[str]:
        """Copy a head's bias if its decoder's is `missing`, as in files of older versions. Returns
        which names of biases are not missing after all."""
        found = set()
        for name, head in self._heads():
            names = {f"{name}.bias", f"{name}.decoder.bias"}
            if names <= missing:
                continue
            found |= names
            if f"{name}.decoder.bias" in missing:
                head.decoder.bias.copy_(head.bias)
        return found

    def settle_bias(self) -> None:
        """Let a head share its decoder's bias if the decoder is tied, as transformers does. If not,
        files have both: then the head's is a frozen copy, since DDP expects a gradient for every
        trainable parameter."""
        embeddings = self.get_input_embeddings().weight
        for _, head in self._heads():
            bias = head.decoder.bias
            if head.decoder.weight is not embeddings:
                bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
            head.bias = bias

    @torch.no_grad()
    def add_vectors(self, size: int, pieces: dict[int, list[int]], from_pieces: bool) -> None:
        """Grow embeddings, decoder and bias to `size` tokens. With `from_pieces` a new token starts
        at the mean of the tokens that it replaces; otherwise it starts random."""
        if size > self.config.vocab_size:
            self.resize_token_embeddings(size, mean_resizing=False)
            self.settle_bias()
        decoder = self.get_output_embeddings()
        for weights in (self.get_input_embeddings().weight, decoder.weight, decoder.bias):
            for number, old in pieces.items():
                if old and from_pieces and weights is not None:
                    weights[number] = weights[old].mean(0)


def count_flops(model: PackedModel, batch: Batch) -> float:
    """FLOPs of a forward and backward pass over the real tokens: 6 per encoder weight and token,
    12 x width per layer and pair of tokens that attend, 6 per MLM head weight and masked position.
    """
    config, lengths = model.config, np.array(batch.lengths[: batch.num_sequences])
    encoder = sum(weight.numel() for weight in model.layers.parameters() if weight.ndim == 2)
    head = config.hidden_size * (config.hidden_size + config.vocab_size)
    pairs = 0
    for window in model.windows:
        beyond = 0 if window is None else np.maximum(0, lengths - window)  # tokens at one end
        pairs += int((lengths**2 - beyond * np.maximum(0, beyond - 1)).sum())
    attention = config.hidden_size * pairs
    masked = batch.counts.get("mlm", 0)  # none in classification
    return 6.0 * encoder * batch.num_tokens + 12.0 * attention + 6.0 * head * masked
