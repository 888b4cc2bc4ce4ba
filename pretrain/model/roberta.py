"""RoBERTa, XLM-RoBERTa and CamemBERT with their MLM head on packed batches.

The models are transformers' own, under their own class names, which `save_pretrained` writes into config.json; only `forward`
is ours, and that decoder and head keep one bias when the vocabulary grows.
"""
from __future__ import annotations

import transformers
from torch import nn

from pretrain.model.packed import PackedModel


class RobertaPositions(PackedModel):
    """How the family counts positions."""

    @property
    def position_offset(self) -> int:
        """Positions are counted from the one after that of padding, as in fairseq."""
        return self.config.pad_token_id + 1


class _PackedRoberta(RobertaPositions):
    masked_lm_head = "lm_head"  # dense, gelu, LayerNorm, decoder

    def set_output_embeddings(self, decoder: nn.Linear) -> None:
        """Called when the vocabulary is resized."""
        self.lm_head.decoder, self.lm_head.bias = decoder, decoder.bias


class RobertaForMaskedLM(_PackedRoberta, transformers.RobertaForMaskedLM):
    """Batch -> Output."""


class XLMRobertaForMaskedLM(_PackedRoberta, transformers.XLMRobertaForMaskedLM):
    """Batch -> Output."""


class CamembertForMaskedLM(_PackedRoberta, transformers.CamembertForMaskedLM):
    """Batch -> Output."""
