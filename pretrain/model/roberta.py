"""RoBERTa, XLM-RoBERTa and CamemBERT with their MLM head on packed batches."""

import torch.nn.functional as F
import transformers
from torch import Tensor

from pretrain.model.packed import MLM_HEAD, PackedModel


class PackedRoberta(PackedModel):
    """What these families do differently from BERT."""

    parts = {"lm_head": MLM_HEAD}

    @property
    def position_offset(self) -> int:
        """Positions start after the padding id, as in fairseq."""
        return self.config.pad_token_id + 1

    def transform(self, hidden: Tensor) -> Tensor:
        return self.lm_head.layer_norm(F.gelu(self.lm_head.dense(hidden)))


class RobertaForMaskedLM(PackedRoberta, transformers.RobertaForMaskedLM):
    """Batch -> losses by name."""


class XLMRobertaForMaskedLM(PackedRoberta, transformers.XLMRobertaForMaskedLM):
    """Batch -> losses by name."""


class CamembertForMaskedLM(PackedRoberta, transformers.CamembertForMaskedLM):
    """Batch -> losses by name."""
