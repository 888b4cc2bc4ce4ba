"""Self-attention over packed sequences on a GPU: a Triton kernel for each direction.

FlashAttention's variable-length kernels return three gradients that must then be stacked. Most
sequences here fit in one block of 128 tokens, where one pass writes all three to one tensor.

Follows FlashAttention-2 (Dao 2023): the backward pass recomputes the probabilities from the base-2
logsumexp of each row of scores. Shapes: T tokens, N sequences, H heads, head dimension D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # tokens of a sequence per program; with 4 warps the fastest on an H200
SHORT = 128  # tokens; the backward pass handles sequences up to this length in one block
MAX_GRID = 65_535  # CUDA's limit, for the grid dimension of the sequences
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bounds(offsets, sequence):
    """(first token in the pack, number of tokens) of a sequence, int64."""
    start = tl.load(offsets + sequence).to(tl.int64)
    return start, tl.load(offsets + sequence + 1).to(tl.int64) - start


@triton.jit
def _rows(base, rows, length, stride, D: tl.constexpr):
    """[rows, D] of a tensor; 0 beyond the sequence."""
    places = base + rows[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(places, mask=rows[:, None] < length, other=0.0)


@triton.jit
def _store_rows(base, rows, length, stride, values, D: tl.constexpr):
    places = base + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def _forward(qkv, out, lse, offsets, T, scale, H, D: tl.constexpr, BLOCK: tl.constexpr):
    """A block of queries of one sequence and head."""
    start, length = _bounds(offsets, tl.program_id(1))
    first = tl.program_id(0) * BLOCK
    if first >= length:
        return
    head, stride = tl.program_id(2), 3 * H * D
    query = qkv + start * stride + head * D
    key, value = query + H * D, query + 2 * H * D
    rows = first + tl.arange(0, BLOCK)
    q = _rows(query, rows, length, stride, D)
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for begin in range(0, length, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        scores = tl.dot(q, tl.trans(_rows(key, columns, length, stride, D))) * (scale * LOG2_E)
        scores = tl.where(columns[None, :] < length, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        rescale = tl.exp2(row_max - new_max)
        p = tl.exp2(scores - new_max[:, None])
        total = total * rescale + tl.sum(p, 1)
        v = _rows(value, columns, length, stride, D)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        row_max = new_max
    _store_rows(out + (start * H + head) * D, rows, length, H * D, acc / total[:, None], D)
    tl.store(lse + head * T + start + rows, row_max + tl.log2(total), mask=rows < length)


@triton.jit
def _backward_short(
    grad, qkv, grad_qkv, lse, offsets, T, scale, H, D: tl.constexpr, BLOCK: tl.constexpr
):
    """One sequence and head, in one block."""
    start, length = _bounds(offsets, tl.program_id(0))
    if length == 0:
        return
    head, stride = tl.program_id(1), 3 * H * D
    rows = tl.arange(0, BLOCK)
    query = qkv + start * stride + head * D
    q = _rows(query, rows, length, stride, D)
    k = _rows(query + H * D, rows, length, stride, D)
    v = _rows(query + 2 * H * D, rows, length, stride, D)
    g = _rows(grad + (start * H + head) * D, rows, length, H * D, D)
    lse_rows = tl.load(lse + head * T + start + rows, mask=rows < length, other=float("inf"))
    p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - lse_rows[:, None])
    p = tl.where(rows[None, :] < length, p, 0.0)
    to = grad_qkv + start * stride + head * D
    _store_rows(to + 2 * H * D, rows, length, stride, tl.dot(tl.trans(p.to(g.dtype)), g), D)
    dp = tl.dot(g, tl.trans(v))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(g.dtype)
    _store_rows(to, rows, length, stride, tl.dot(ds, k) * scale, D)
    _store_rows(to + H * D, rows, length, stride, tl.dot(tl.trans(ds), q) * scale, D)


@triton.jit
def _scores_gradient(q, k, v, g, o, lse_rows, columns, length, scale):
    """(probabilities, gradient of the scores) [rows, columns]; g is the gradient of output o."""
    p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - lse_rows[:, None])
    p = tl.where(columns[None, :] < length, p, 0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    return p.to(g.dtype), (p * (tl.dot(g, tl.trans(v)) - delta[:, None])).to(g.dtype)


@triton.jit
def _backward_long(
    grad, qkv, out, grad_qkv, lse, offsets, T, scale, H, D: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of keys and values, then the same block of queries, of one sequence and head."""
    start, length = _bounds(offsets, tl.program_id(1))
    first = tl.program_id(0) * BLOCK
    if first >= length:
        return
    head, stride = tl.program_id(2), 3 * H * D
    query = qkv + start * stride + head * D
    key, value = query + H * D, query + 2 * H * D
    grads, outs = grad + (start * H + head) * D, out + (start * H + head) * D
    lse_rows = lse + head * T + start
    to = grad_qkv + start * stride + head * D
    block = first + tl.arange(0, BLOCK)

    k = _rows(key, block, length, stride, D)
    v = _rows(value, block, length, stride, D)
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    for begin in range(0, length, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        q = _rows(query, rows, length, stride, D)
        g = _rows(grads, rows, length, H * D, D)
        o = _rows(outs, rows, length, H * D, D)
        row_lse = tl.load(lse_rows + rows, mask=rows < length, other=float("inf"))
        p, ds = _scores_gradient(q, k, v, g, o, row_lse, block, length, scale)
        dv = tl.dot(tl.trans(p), g, dv)
        dk = tl.dot(tl.trans(ds), q, dk)
    _store_rows(to + 2 * H * D, block, length, stride, dv, D)
    _store_rows(to + H * D, block, length, stride, dk * scale, D)

    q = _rows(query, block, length, stride, D)
    g = _rows(grads, block, length, H * D, D)
    o = _rows(outs, block, length, H * D, D)
    row_lse = tl.load(lse_rows + block, mask=block < length, other=float("inf"))
    dq = tl.zeros([BLOCK, D], tl.float32)
    for begin in range(0, length, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        keys = _rows(key, columns, length, stride, D)
        values = _rows(value, columns, length, stride, D)
        _, ds = _scores_gradient(q, keys, values, g, o, row_lse, columns, length, scale)
        dq = tl.dot(ds, keys, dq)
    _store_rows(to, block, length, stride, dq * scale, D)


def _power_of_2(length: int) -> int:
    """The next power of 2, at least 16, which is the minimum for a matrix product."""
    return max(16, triton.next_power_of_2(length))


@torch.library.custom_op("pretrain::packed_attention", mutates_args=())
def packed_attention(qkv: Tensor, cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """qkv [T, 3, H, D] in fp16 or bf16, cu_seqlens int32 [N + 1] -> (output [T, H, D], base-2
    logsumexp float32 [H, T]). The sequences cover all T tokens, with at most `max_length` each;
    D is a power of 2, at least 16."""
    (T, _, H, D), N = qkv.shape, len(cu_seqlens) - 1
    assert qkv.dtype in (torch.float16, torch.bfloat16), qkv.dtype
    assert N < MAX_GRID, f"{N} sequences; expected at most {MAX_GRID - 1}"
    out, lse = _empty_outputs(qkv)
    block = min(BLOCK, _power_of_2(max_length))
    grid = (triton.cdiv(max_length, block), N, H)
    sizes = (T, D**-0.5, H, D, block)
    _forward[grid](qkv.contiguous(), out, lse, cu_seqlens, *sizes)
    return out, lse


@packed_attention.register_fake
def _empty_outputs(qkv, *_) -> tuple[Tensor, Tensor]:
    T, _, H, D = qkv.shape
    return qkv.new_empty(T, H, D), qkv.new_empty(H, T, dtype=torch.float32)


@torch.library.custom_op("pretrain::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_length: int
) -> Tensor:
    """The gradient of qkv, [T, 3, H, D], from the gradient of the output."""
    (T, _, H, D), N = qkv.shape, len(cu_seqlens) - 1
    grad, qkv = grad.contiguous(), qkv.contiguous()
    grad_qkv = torch.empty_like(qkv)
    block = _power_of_2(max_length) if max_length <= SHORT else BLOCK
    sizes = (T, D**-0.5, H, D, block)
    if max_length <= SHORT:
        warps = 8 if block == SHORT else 4  # fewer would spill registers
        _backward_short[N, H](grad, qkv, grad_qkv, lse, cu_seqlens, *sizes, num_warps=warps)
    else:
        grid = (triton.cdiv(max_length, block), N, H)
        _backward_long[grid](grad, qkv, out, grad_qkv, lse, cu_seqlens, *sizes)
    return grad_qkv


@packed_attention_backward.register_fake
def _(grad, qkv, out, lse, cu_seqlens, max_length):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.max_length = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)


def _gradient(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    qkv, out, lse, cu_seqlens = ctx.saved_tensors
    return packed_attention_backward(grad, qkv, out, lse, cu_seqlens, ctx.max_length), None, None


packed_attention.register_autograd(_gradient, setup_context=_save_for_backward)
