"""BERT with its MLM and NSP heads on packed batches.

The modules are those of transformers' BertForPreTraining, and `save_pretrained` writes its name to
config.json. The heads read only masked and [CLS] positions.
"""

import transformers
from torch import Tensor

from pretrain.batch import Batch
from pretrain.model.packed import MLM_HEAD, PackedModel

POOLER, NSP_HEAD = "bert.pooler", "cls.seq_relationship"


class BertForPreTraining(PackedModel, transformers.BertForPreTraining):
    """Batch -> losses by name: summed MLM and NSP (or SOP) losses."""

    parts = {POOLER: "pooler", "cls.predictions": MLM_HEAD, NSP_HEAD: "NSP head"}
    pair_parts = (POOLER, NSP_HEAD)
    nsp_weight = 1.0

    def transform(self, hidden: Tensor) -> Tensor:
        return self.cls.predictions.transform(hidden)

    def next_sentence_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """float32 [N, 2]: logits of 0, "is next", and 1, "is random" or swapped, at each [CLS]."""
        first = self.first_tokens(hidden, batch)
        pooled = self.bert.pooler(first[:, None])  # the pooler takes token 0 of [N, 1, width]
        return self.cls.seq_relationship(pooled).float()
