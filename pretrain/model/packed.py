"""What every family does with a packed batch: encode it without padding, score masked positions, sum the losses."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from pretrain.batch import Batch, Output, PackedBatch
from pretrain.model.attention import SDPA, PackedSelfAttention, choose_kernel
from pretrain.model.cross_entropy import summed_cross_entropy
from pretrain.model.dropout import Dropout
from pretrain.model.gelu import Gelu
from pretrain.model.layer_norm import LayerNorm

REPLACED = {nn.Dropout: Dropout, nn.LayerNorm: LayerNorm, GELUActivation: Gelu}  # stock module -> what computes the same faster


class PackedModel:
    """Batch -> Output, mixed into a pretrained model of transformers; `loss_weights` says which losses there are."""

    masked_lm_head = ""  # name of the module that scores hidden states [M, width]
    loss_weights = {"mlm": 1.0}
    class_weights: dict[str, Tensor] = {}  # by loss: float [classes], where its classes weigh differently
    position_offset = 0  # of the first token's position
    head_may_differ = False  # from the checkpoint's in size; it starts fresh then
    attention = SDPA  # or VARLEN
    kernel = ""  # of VARLEN, one of attention.KERNELS; "": `choose_kernel` does

    def post_init(self) -> None:
        """Called by transformers once the modules are made; the names of the weights stay."""
        for layer in self.base_model.encoder.layer:
            layer.attention.self = PackedSelfAttention(layer.attention.self)
        for module in list(self.modules()):
            for name, child in module.named_children():
                if type(child) in REPLACED:
                    setattr(module, name, REPLACED[type(child)](child))
        super().post_init()

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may have."""
        return self.config.max_position_embeddings - self.position_offset

    def problems_of(self, objective: str, max_length: int, option: str = "--max-length") -> list[str]:
        """What of a task the model cannot do, a message each; `option` is what the length came by."""
        problems, config = [], self.config
        if max_length > self.max_length:
            problems.append(f"{option} {max_length}: the model has {self.max_length} positions; needed is at most that")
        if objective != "mlm" and config.model_type != "bert":
            problems.append(f"--objective {objective}: the family {config.model_type} has no NSP head; needed is --objective mlm")
        elif objective != "mlm" and config.type_vocab_size < 2:
            problems.append(f"--objective {objective}: the model has {config.type_vocab_size} token types; needed are 2, or "
                            "--objective mlm")
        return problems

    def set_objective(self, objective: str, nsp_weight: float = 1.0) -> None:
        """Choose the losses; a family with one MLM head has nothing to choose."""

    def encode(self, batch: PackedBatch) -> Tensor:
        """float [T, width]: the last hidden states. Not the encoder's own forward, whose pooler sees the pack's first token only."""
        encoder = self.base_model
        hidden = encoder.embeddings(input_ids=batch.input_ids[None], token_type_ids=batch.token_type_ids[None],
                                    position_ids=batch.position_ids[None] + self.position_offset)
        # The kernel gets tensors and one constant: the lengths, new in every batch, would make a compiled graph recompile.
        ends = {"lengths": batch.lengths}
        if self.attention != SDPA:
            kernel = self.kernel or choose_kernel(self.config.hidden_size // self.config.num_attention_heads, batch.max_length)
            ends = {"cu_seqlens": batch.cu_seqlens, "max_length": batch.max_length, "kernel": kernel}
        return encoder.encoder(hidden, **ends).last_hidden_state[0]

    def first_tokens(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """[N, width]: the hidden state of each sequence's first token; an empty dummy gets that of the last token."""
        return hidden[batch.cu_seqlens[:-1].clamp(max=len(hidden) - 1).long()]

    def masked_lm_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[M, vocabulary]: scores at the masked positions, in the precision of the products."""
        return self.get_submodule(self.masked_lm_head)(hidden[batch.masked_positions])

    def score(self, hidden: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """(logits, labels) of each loss."""
        return {"mlm": (self.masked_lm_logits(hidden, batch), batch.masked_lm_labels)}

    def forward(self, batch: PackedBatch) -> Output:
        """Sums over the batch; the caller divides them by counts of the whole step."""
        scored = self.score(self.encode(batch), batch)
        losses = {name: summed_cross_entropy(logits, labels, self.class_weights.get(name)) for name, (logits, labels) in scored.items()}
        return Output({name: loss for name, (loss, _) in losses.items()}, {name: correct for name, (_, correct) in losses.items()})

    @torch.no_grad()
    def add_vectors(self, size: int, pieces: dict[int, list[int]], from_pieces: bool) -> None:
        """Make room for `size` tokens in embeddings, decoder and bias; with `from_pieces`, a new token starts from the mean of the
        tokens that stood for it, else it stays random."""
        if size > self.config.vocab_size:
            self.resize_token_embeddings(size, mean_resizing=False)
        decoder = self.get_output_embeddings()
        for weights in {id(w): w for w in (self.get_input_embeddings().weight, decoder.weight, decoder.bias)}.values():
            for number, old in pieces.items() if from_pieces else ():
                if old:
                    weights[number] = weights[old].mean(0)
