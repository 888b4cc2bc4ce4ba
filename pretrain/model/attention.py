"""Self-attention over packed sequences, without padding.

A pack is one row of T tokens; `lengths` (host) and `cu_seqlens` (device) say where its sequences
end. On CUDA, attention is one kernel, ours or FlashAttention's; elsewhere, a loop over sequences.
There is no attention dropout: the kernels have none, and on CPU it would take two to three times as
long. In a sliding window of `window`, a token attends to those at most that many places away.
Shapes: H heads, head dimension D.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.model import cpu_kernels

SDPA, VARLEN = "sdpa loop", "varlen kernel"
# For VARLEN. CUDNN lets torch choose between FlashAttention and cuDNN.
KERNELS = TRITON, FLASH, CUDNN = "triton", "flash", "cudnn"
Attend = Callable[[Tensor], Tensor]  # qkv [T, 3, H, D] -> [T, H, D]
HAS_TRITON = importlib.util.find_spec("triton") is not None  # part of CUDA builds of torch
TRITON_HEAD_DIMS = (16, 32, 64)  # 128 needs more shared memory than many GPUs have
LONGEST_TRITON = 512  # tokens per sequence; the longest measured, up to which it is the fastest
FLASH_ALIGNMENT = 8  # the head dimension must be a multiple of this
LEAST_BLOCK = 64  # queries that share the keys of a window on CPU
UNPACKED = "expected a packed batch: call the model's `encode`"


class PackedSelfAttention(nn.Module):
    """What the stock self-attention of BERT and RoBERTa becomes, with the same weights."""

    def forward(self, hidden_states: Tensor, *_, attend: Attend | None = None, **__):
        """[1, T, width] -> ([1, T, width], None); `attend` is `attention_over` the batch."""
        assert attend is not None, UNPACKED
        qkv = project_together((self.query, self.key, self.value), hidden_states[0])
        qkv = qkv.unflatten(-1, (3, self.num_attention_heads, -1))
        return attend(qkv).flatten(1)[None], None


def project_together(parts: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """[T, width] -> [T, 3 x width]: queries, keys and values, in one matrix product."""
    if all(type(part) is nn.Linear for part in parts):
        weights, biases = zip(*((part.weight, part.bias) for part in parts))
        return F.linear(hidden, torch.cat(weights), torch.cat(biases))
    return torch.cat([part(hidden) for part in parts], -1)  # they are wrapped, as by LoRA


def attention_over(batch: Batch, name: str, window: int | None = None) -> Attend:
    """Attention within the sequences of `batch`, by SDPA or VARLEN. Without `window`, over all of
    a sequence."""
    if name == SDPA:
        return partial(packed_sdpa, lengths=batch.lengths, window=window)
    # No lengths here: they differ in every batch, which would recompile the graph.
    bounds = {"cu_seqlens": batch.cu_seqlens, "max_length": batch.max_length}
    return partial(packed_varlen, **bounds, window=window)


def packed_sdpa(qkv: Tensor, lengths: tuple[int, ...], window: int | None = None) -> Tensor:
    """[T, 3, H, D] -> [T, H, D]: one call of torch's attention for each sequence that has tokens.
    On CPU this loop beat a padded batch and nested tensors, even for sequences of 32 tokens."""
    lengths = tuple(length for length in lengths if length)
    if cpu_kernels.is_backward_slow(qkv, lengths):
        return cpu_kernels.GroupedBackward.apply(qkv, lengths, window, _attend_one_by_one)
    return _attend_one_by_one(qkv, lengths, window)


def _attend_one_by_one(qkv: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    outputs = []
    for part in qkv.split(lengths):
        query, key, value = part.permute(1, 2, 0, 3)[:, None]  # [1, H, L, D] each
        if window is None or len(part) <= window + 1:  # every token is near every other
            output = F.scaled_dot_product_attention(query, key, value)
        else:
            output = _attend_nearby(query, key, value, window)
        outputs.append(output[0].movedim(1, 0))
    return torch.cat(outputs)


def _attend_nearby(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """[1, H, L, D] each -> [1, H, L, D]. Time and memory grow with L, not with its square: a block
    of queries reads only the keys that one of them can see."""
    length, outputs = query.shape[2], []
    block = max(LEAST_BLOCK, 2 * window)
    places = torch.arange(length, device=query.device)
    for start in range(0, length, block):
        rows = slice(start, start + block)
        columns = slice(max(0, start - window), start + block + window)
        is_near = (places[rows, None] - places[None, columns]).abs() <= window
        inputs = (query[:, :, rows], key[:, :, columns], value[:, :, columns])
        outputs.append(F.scaled_dot_product_attention(*inputs, attn_mask=is_near))
    return torch.cat(outputs, 2)


def packed_varlen(
    qkv: Tensor, cu_seqlens: Tensor, max_length: int, kernel: str = "", window: int | None = None
) -> Tensor:
    """[T, 3, H, D] -> [T, H, D] with one of KERNELS, in fp16 or bf16 on Ampere or later. "": the
    fastest one measured, see scripts/README.md. Only FLASH has a sliding window."""
    if window is not None and max_length <= window + 1:  # every token is near every other
        window = None
    fits = HAS_TRITON and qkv.shape[-1] in TRITON_HEAD_DIMS and max_length <= LONGEST_TRITON
    kernel = kernel or (TRITON if fits and window is None else FLASH)
    assert window is None or kernel == FLASH, kernel
    if kernel == TRITON:
        from pretrain.model.attention_kernel import packed_attention

        return packed_attention(qkv, cu_seqlens, max_length)[0]
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.14 uses cuDNN on some GPUs unless a window is set: here, one that covers every token.
    reach = max_length if window is None else window
    sides = (reach, reach) if kernel == FLASH else (-1, -1)
    # Seven arguments by position: the names and order of later ones differ between releases.
    ends, width, more = (cu_seqlens, cu_seqlens, max_length, max_length), qkv.shape[-1], {}
    if missing := -width % FLASH_ALIGNMENT:  # zeros do not change the scores
        qkv, more = F.pad(qkv, (0, missing)), {"scale": width**-0.5}
    return varlen_attn(*qkv.unbind(1), *ends, window_size=sides, **more)[..., :width]


def choose_attention(device: torch.device, precision: str) -> str:
    """SDPA or VARLEN, for a device and a precision ("bf16", "fp16" or "fp32")."""
    has_kernel = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return VARLEN if has_kernel and precision != "fp32" else SDPA
