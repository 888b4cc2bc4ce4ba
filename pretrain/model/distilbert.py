"""DistilBERT with its MLM head on packed batches."""

import transformers
from torch import Tensor, nn
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention

from pretrain.batch import Batch
from pretrain.model.attention import UNPACKED, Attend, attention_over, project_together
from pretrain.model.packed import MLM_HEAD, PackedModel
from pretrain.schema import integer, number


class PackedAttention(DistilBertSelfAttention):
    """The stock attention over a pack."""

    def forward(self, hidden_states: Tensor, *_, attend: Attend | None = None, **__):
        """[1, T, width] -> ([1, T, width], None); `attend` is `attention_over` the batch."""
        assert attend is not None, UNPACKED
        qkv = project_together((self.q_lin, self.k_lin, self.v_lin), hidden_states[0])
        qkv = qkv.unflatten(-1, (3, self.n_heads, -1))
        return self.out_lin(attend(qkv).flatten(1))[None], None


class PackedDistilBert(PackedModel):
    """What differs from BERT: names, and there are neither token types nor a pooler."""

    parts = {"vocab_": MLM_HEAD}
    config_form = {
        **dict.fromkeys(("dim", "n_heads", "hidden_dim"), integer(1, 1 << 20)),
        "n_layers": integer(1, 1024),
        **dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), number(0, 1)),
    }
    dropout_fields = ("dropout",)

    @property
    def layers(self) -> nn.ModuleList:
        return self.base_model.transformer.layer

    def replace_attention(self) -> None:
        for layer in self.layers:
            layer.attention.__class__ = PackedAttention

    def encode(self, batch: Batch) -> Tensor:
        """[T, width]: the last hidden states."""
        encoder, attend = self.base_model, attention_over(batch, self.attention)
        ids, positions = batch.input_ids[None], batch.position_ids[None]
        hidden = encoder.embeddings(input_ids=ids, position_ids=positions)
        return encoder.transformer(hidden, attend=attend).last_hidden_state[0]

    def transform(self, hidden: Tensor) -> Tensor:
        return self.vocab_layer_norm(self.activation(self.vocab_transform(hidden)))

    def classifier_input(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[N, width]."""
        return self.dropout(self.pre_classifier(self.first_tokens(hidden, batch)).relu())


class DistilBertForMaskedLM(PackedDistilBert, transformers.DistilBertForMaskedLM):
    """Batch -> losses by name."""
