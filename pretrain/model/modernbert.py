"""ModernBERT (Warner et al. 2024) with its MLM head on packed batches.

Positions are rotations of queries and keys. Some layers, by default every third, attend to the
whole sequence; the others, to a sliding window.
"""

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention

from pretrain.batch import Batch
from pretrain.model.attention import UNPACKED, Attend, attention_over
from pretrain.model.packed import MLM_HEAD, PackedModel
from pretrain.schema import integer, number, one_of, optional

FULL, SLIDING = "full_attention", "sliding_attention"  # in `layer_types` of the config
ALIGNMENT = 64  # inner widths are multiples of this
ROTATION = {  # other types change with the longest sequence of a batch
    "rope_type": one_of("default", "linear", "yarn"),
    "rope_theta": number(0, above=True),
}


class PackedAttention(ModernBertAttention):
    """The stock attention over a pack."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *_,
        attend: Attend | None = None,
        **__,
    ):
        """[1, T, width] -> ([1, T, width], None); `attend` is `attention_over` the batch."""
        assert attend is not None, UNPACKED
        qkv = self.Wqkv(hidden_states[0]).unflatten(-1, (3, -1, self.head_dim))
        mixed = attend(rotated(qkv, *position_embeddings)).flatten(1)
        return self.out_drop(self.Wo(mixed))[None], None


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """qkv [T, 3, H, D] with queries and keys rotated, in float32 (RoPE, Su et al. 2021). cos and
    sin are [1, T, D]: the angles of D / 2 planes, repeated once."""
    first, second = qkv[:, :2].float().chunk(2, -1)
    cos, sin = (angles[0, :, None, None, : qkv.shape[-1] // 2] for angles in (cos, sin))
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([turned.to(qkv.dtype), qkv[:, 2:]], 1)


class PackedModernBert(PackedModel):
    """What differs from BERT. There are neither token types nor a pooler."""

    parts = {"head": MLM_HEAD, "decoder": MLM_HEAD}
    config_form = {
        "local_attention": integer(2, 1 << 24),
        "layer_types": [one_of(FULL, SLIDING)],
        "rope_parameters": {FULL: ROTATION, SLIDING: ROTATION},
        "norm_eps": number(0, 1),
        "initializer_cutoff_factor": optional(number(0, 1e3, above=True)),
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), number(0, 1)),
        **dict.fromkeys(("hidden_activation", "classifier_activation"), one_of(*ACT2FN)),
        "classifier_pooling": one_of("cls", "mean"),
    }
    dropout_fields = ("embedding_dropout", "mlp_dropout", "attention_dropout")
    stacked = {"attn.Wqkv.weight": 3, "mlp.Wi.weight": 2}

    @classmethod
    def sizes(cls, width: int, max_length: int) -> dict[str, object]:
        """Two thirds of BERT's inner width: a gated layer has three matrices instead of two, so the
        number of weights is the same. Special ids are None: the defaults fit another vocabulary."""
        ids = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        return {
            "intermediate_size": ALIGNMENT * round(4 * width * 2 / 3 / ALIGNMENT),
            "max_position_embeddings": max(8192, max_length),
            **dict.fromkeys(ids),
        }

    @classmethod
    def config_problem(cls, config: PreTrainedConfig) -> str | None:
        """Why the heads do not fit: each needs an even width, because pairs are rotated."""
        width, heads = config.hidden_size, config.num_attention_heads
        if width % (2 * heads):
            return f"hidden_size is {width}; expected a multiple of 2 x {heads} attention heads"
        return None

    @property
    def layers(self) -> nn.ModuleList:
        return self.base_model.layers

    @property
    def windows(self) -> list[int | None]:
        """Half of `local_attention` to either side, in sliding layers."""
        is_sliding = [kind == SLIDING for kind in self.config.layer_types]
        return [self.config.local_attention // 2 if sliding else None for sliding in is_sliding]

    def replace_attention(self) -> None:
        """Also add a dropout module where a rate of 0 left none, for a rate that is set later."""
        for layer in self.layers:
            layer.attn.__class__ = PackedAttention
            if isinstance(layer.attn.out_drop, nn.Identity):
                layer.attn.out_drop = nn.Dropout(0.0)

    def encode(self, batch: Batch) -> Tensor:
        """[T, width]: the last hidden states."""
        encoder, positions = self.base_model, batch.position_ids[None]
        # The sum over all layers is not normalized in between: too coarse in autocast's precision.
        hidden = encoder.embeddings(input_ids=batch.input_ids[None]).float()
        arguments = {}
        for kind, window in dict(zip(self.config.layer_types, self.windows)).items():
            arguments[kind] = {
                "attend": attention_over(batch, self.attention, window),
                "position_embeddings": encoder.rotary_emb(hidden, positions, kind),
            }
        for layer, kind in zip(self.layers, self.config.layer_types):
            hidden = layer(hidden, **arguments[kind])
        return encoder.final_norm(hidden)[0]

    def transform(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def classifier_input(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[N, width], from the first token or the mean of all tokens, as the config says."""
        if self.config.classifier_pooling == "mean":
            lengths = batch.cu_seqlens.diff().long()
            pooled = torch.segment_reduce(hidden.float(), "mean", lengths=lengths)
        else:
            pooled = self.first_tokens(hidden, batch)
        return self.drop(self.head(pooled))


class ModernBertForMaskedLM(PackedModernBert, transformers.ModernBertForMaskedLM):
    """Batch -> losses by name."""
