"""The MLM and NSP heads, with the parameter names of transformers' BertForPreTraining, so that files go both ways.

They read only the masked positions and the [CLS] positions: scoring all positions, of which 15 % carry a loss, costs time
and memory for nothing (transformers #3294).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.activations import ACT2FN

ALIGNMENT = 64  # entries of a vocabulary, on a GPU


class PredictionTransform(nn.Module):
    """Dense, activation, LayerNorm; as `cls.predictions.transform`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden)))


class MaskedLMHead(nn.Module):
    """hidden [M, width] -> logits [M, vocabulary]; the decoder is tied to the word embeddings, its bias to `bias`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = PredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary."""
        hidden = self.transform(hidden)
        if hidden.device.type == "cpu" or type(self.decoder) is not nn.Linear:  # or something is put around it, such as LoRA
            return self.decoder(hidden)
        return aligned_linear(hidden, self.decoder)


def aligned_linear(hidden: Tensor, linear: nn.Linear, multiple: int = ALIGNMENT) -> Tensor:
    """[M, width] -> [M, classes]: the scores of `linear`, as a view whose rows begin at multiples of `multiple` numbers.

    Rows that do not begin at multiples of 16 bytes take a GPU three times as long, and few vocabularies have such sizes."""
    missing = -linear.out_features % multiple
    weight, bias = linear.weight.to(hidden.dtype), linear.bias.to(hidden.dtype)  # as autocast would, but before the copy
    scores = F.linear(hidden, F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing)))
    return scores[:, :linear.out_features]


class PreTrainingHeads(nn.Module):
    """`cls`: MLM at masked positions, NSP on the pooled [CLS]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.predictions = MaskedLMHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)
