"""Attention over packed sequences, without padding, plugged into transformers' attention registry.

A pack is one row of T tokens; `lengths` (host) and `cu_seqlens` (device) say where its sequences end. Two ways give the same
result: the variable-length FlashAttention kernel of torch on CUDA, and a loop of scaled_dot_product_attention elsewhere.
Neither drops attention probabilities: the kernel cannot, and on CPU it would cost two to three times.

Shapes: H heads, D numbers a head.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

SDPA, VARLEN = "packed_sdpa", "packed_varlen"


def packed_sdpa(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, *,
                lengths: tuple[int, ...], scaling: float | None = None, **_: object) -> tuple[Tensor, None]:
    """query, key, value [1, H, T, D] -> [1, T, H, D]; each sequence attends to itself, one call each.

    On CPU this loop beat scattering to a padded batch and nested tensors, down to sequences of 32 tokens."""
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    return torch.cat([F.scaled_dot_product_attention(*part, scale=scaling) for part in parts], dim=2).transpose(1, 2), None


def packed_varlen(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, *,
                  cu_seqlens: Tensor, max_length: int, **_: object) -> tuple[Tensor, None]:
    """The same by one kernel: fp16 or bf16 on Ampere or later; `max_length` a fixed bound, so that one graph serves."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, D]
    # Seven arguments by position: the names and order of later ones differ between torch releases.
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_length, max_length)[None], None


AttentionInterface.register(SDPA, packed_sdpa)
AttentionInterface.register(VARLEN, packed_varlen)


def choose_attention(device: torch.device, precision: str) -> str:
    """Name of the attention for a device and a precision ("bf16", "fp16" or "fp32")."""
    kernel = device.type == "cuda" and precision != "fp32" and torch.cuda.get_device_capability(device) >= (8, 0)
    return VARLEN if kernel else SDPA
