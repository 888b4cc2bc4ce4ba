"""Self-attention over packed sequences, without padding, in the place of transformers' own; the names of its weights stay.

A pack is one row of T tokens; `lengths` (host) and `cu_seqlens` (device) say where its sequences end. Query, key and value come from
one matrix product. Attention is one kernel on CUDA, ours or FlashAttention's, and a loop over the sequences elsewhere.
No probability is dropped: the kernel cannot, and on CPU it would cost two to three times.

Shapes: H heads, D numbers a head.
"""
from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

SDPA, VARLEN = "sdpa loop", "varlen kernel"
KERNELS = TRITON, FLASH, CUDNN = "triton", "flash", "cudnn"  # for VARLEN; CUDNN leaves the choice between the two to torch
GROUP_SCORES = 1 << 19  # scores that the backward pass on CPU handles at once: they stay in its cache
HAS_TRITON = importlib.util.find_spec("triton") is not None  # it comes with CUDA builds of torch
LONGEST_TRITON = 512  # tokens of a sequence up to which the Triton kernel was measured, and is the fastest
LONGEST_PLAIN = 512  # tokens of a sequence, beyond which torch's own backward pass is as fast and takes less memory


class PackedSelfAttention(nn.Module):
    """Takes over query, key and value of a self-attention module of transformers, which calls it with one row."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.query, self.key, self.value = stock.query, stock.key, stock.value
        self.num_heads = stock.num_attention_heads

    def forward(self, hidden_states: Tensor, attention_mask: None = None, *, lengths: tuple[int, ...] | None = None,
                cu_seqlens: Tensor | None = None, max_length: int = 0, kernel: str = "", **_: object) -> tuple[Tensor, None]:
        """[1, T, width] -> [1, T, width]; either `lengths`, or `cu_seqlens` and a fixed bound, so that one graph serves."""
        assert lengths is not None or cu_seqlens is not None, "needed is a packed batch: call the model's `encode`"
        parts, hidden = (self.query, self.key, self.value), hidden_states[0]
        if all(type(part) is nn.Linear for part in parts):
            qkv = F.linear(hidden, torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
        else:  # something is put around them, such as LoRA
            qkv = torch.cat([part(hidden) for part in parts], -1)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        attended = packed_sdpa(qkv, lengths) if lengths is not None else packed_varlen(qkv, cu_seqlens, max_length, kernel)
        return attended.flatten(1)[None], None


def packed_sdpa(qkv: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[T, 3, H, D] -> [T, H, D]; each sequence attends to itself, one call each.

    Empty sequences are skipped. On CPU this loop beat scattering to a padded batch and nested tensors, down to sequences of 32 tokens."""
    lengths = tuple(length for length in lengths if length)
    if (qkv.device.type == "cpu" and qkv.dtype != torch.float32 and torch.is_grad_enabled() and max(lengths) <= LONGEST_PLAIN
            and not torch.compiler.is_compiling()):
        return _GroupedBackward.apply(qkv, lengths)
    return torch.cat([_attend(part.movedim(0, 2)).movedim(1, 0) for part in qkv.split(lengths)])


def packed_varlen(qkv: Tensor, cu_seqlens: Tensor, max_length: int, kernel: str) -> Tensor:
    """The same by one of KERNELS, in fp16 or bf16 on Ampere or later."""
    if kernel == TRITON:
        from pretrain.model.attention_kernel import packed_attention

        return packed_attention(qkv, cu_seqlens, max_length)[0]
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.14 uses cuDNN on some GPUs unless a window is set. This window covers every token.
    window = (max_length, max_length) if kernel == FLASH else (-1, -1)
    # Seven arguments by position: the names and order of later ones differ between torch releases.
    return varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_length, max_length, window_size=window)


class _GroupedBackward(torch.autograd.Function):
    """`packed_sdpa` whose gradients are those of plain matrix products over a few sequences of about the same length at once.

    torch's own backward pass of short sequences in bf16 runs at an eighth of the matrix rate on CPU; this takes half its time, with
    scores in float32: their error in bf16 would be that of the probabilities of a sharp head."""

    @staticmethod
    def forward(ctx, qkv: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.lengths = lengths
        return packed_sdpa(qkv, lengths)  # grad mode is off here

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        lengths, (qkv,) = ctx.lengths, ctx.saved_tensors
        gradients = torch.empty_like(qkv)
        inputs, outputs = torch.cat([qkv, grad[:, None]], 1).split(lengths), gradients.split(lengths)
        for group in _groups(lengths, qkv.shape[2]):
            padded = pad_sequence([inputs[number] for number in group], batch_first=True)  # [G, L, 4, H, D], 0 where there is no token
            found = _gradients(padded.permute(2, 0, 3, 1, 4), [lengths[number] for number in group])
            for number, part in zip(group, found.permute(1, 3, 0, 2, 4)):
                outputs[number].copy_(part[:lengths[number]])
        return gradients, None


def _groups(lengths: tuple[int, ...], num_heads: int) -> Iterator[list[int]]:
    """Places of `lengths`, the longest first, in groups of at most GROUP_SCORES scores, one sequence at least."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        size = max(1, GROUP_SCORES // (num_heads * lengths[order[0]] ** 2))
        yield order[:size]
        order = order[size:]


def _attend(qkv: Tensor) -> Tensor:
    """[3, H, L, D] -> [H, L, D]."""
    return F.scaled_dot_product_attention(*qkv[:, None].unbind(0))[0]


def _gradients(tensors: Tensor, lengths: list[int]) -> Tensor:
    """Query, key, value and the gradient of what was attended [4, G, H, L, D] -> the gradients of the three [3, G, H, L, D].

    Sequence g has lengths[g] tokens, the longest first."""
    shape, scale = tensors.shape, tensors.shape[-1] ** -0.5
    query, key, value, grad = tensors.flatten(1, 2).unbind(0)  # [G x H, L, D] each
    scores = torch.bmm(query.float() * scale, key.float().transpose(1, 2))
    if lengths[-1] < lengths[0]:
        is_padding = torch.arange(lengths[0]) >= torch.tensor(lengths)[:, None]
        scores.view(*shape[1:3], *scores.shape[1:]).masked_fill_(is_padding[:, None, None], float("-inf"))
    probabilities = scores.softmax(-1)
    weighted = torch.bmm(grad, value.transpose(1, 2)) * probabilities
    grad_scores = weighted.sub_(probabilities * weighted.sum(-1, keepdim=True)).mul_(scale).to(query.dtype)
    return torch.stack([torch.bmm(grad_scores, key), torch.bmm(grad_scores.transpose(1, 2), query),
                        torch.bmm(probabilities.to(query.dtype).transpose(1, 2), grad)]).view(3, *shape[1:])


def choose_attention(device: torch.device, precision: str) -> str:
    """Name of the attention for a device and a precision ("bf16", "fp16" or "fp32")."""
    has_kernel = device.type == "cuda" and precision != "fp32" and torch.cuda.get_device_capability(device) >= (8, 0)
    return VARLEN if has_kernel else SDPA


def choose_kernel(head_width: int, max_length: int) -> str:
    """One of KERNELS for a head dimension: the fastest measured (scripts/README.md)."""
    fits = HAS_TRITON and head_width in (16, 32, 64)  # with 128 it needs more shared memory than many GPUs have
    return TRITON if fits and max_length <= LONGEST_TRITON else FLASH
