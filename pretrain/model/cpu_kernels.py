"""Fast paths for the CPU: gradients of attention, cross-entropy, random bits for dropout.

The simple form of each is next to its call, and tests compare the two.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from pretrain.batch import IGNORED

GROUP_SCORES = 1 << 19  # attention scores computed at once, so that they stay in the cache
LONGEST_GROUPED = 512  # tokens; beyond this, torch's backward pass is as fast and takes less memory
ROW_SCORES = 1 << 20  # logits computed at once: 4 MB in float32
MANY_SCORES = 1 << 16  # logits; from here, computing them by rows pays off
DROPOUT_BITS = {2: np.uint16, 4: np.uint32}  # by the size of a number in bytes


def is_backward_slow(qkv: Tensor, lengths: tuple[int, ...]) -> bool:
    """Whether `GroupedBackward` beats torch: short sequences in bf16 in training."""
    if qkv.device.type != "cpu" or qkv.element_size() > 2 or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and max(lengths) <= LONGEST_GROUPED


class GroupedBackward(torch.autograd.Function):
    """Attention whose gradients are plain matrix products over groups of similar lengths. This
    takes half the time of torch's backward pass, which runs short bf16 sequences at an eighth of
    the matrix rate. Scores are float32: bf16 is too coarse for a sharp attention head."""

    @staticmethod
    def forward(
        ctx, qkv: Tensor, lengths: tuple[int, ...], window: int | None, attend: Callable
    ) -> Tensor:
        """qkv [T, 3, H, D] -> attend(qkv, lengths, window) [T, H, D]."""
        ctx.save_for_backward(qkv)
        ctx.lengths, ctx.window = lengths, window
        return attend(qkv, lengths, window)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of `qkv`."""
        lengths, (qkv,) = ctx.lengths, ctx.saved_tensors
        gradients = torch.empty_like(qkv)
        inputs = torch.cat([qkv, grad[:, None]], 1).split(lengths)
        outputs = gradients.split(lengths)
        for group in _groups(lengths, num_heads=qkv.shape[2]):
            padded = pad_sequence([inputs[number] for number in group], batch_first=True)
            tensors = padded.permute(2, 0, 3, 1, 4)  # [4, G, H, L, D], 0 beyond a sequence
            of_group = [lengths[number] for number in group]
            grads = _attention_gradients(tensors, of_group, ctx.window)
            for number, part in zip(group, grads.permute(1, 3, 0, 2, 4)):
                outputs[number].copy_(part[: lengths[number]])
        return gradients, None, None, None


def _groups(lengths: tuple[int, ...], num_heads: int) -> Iterator[list[int]]:
    """Indices of `lengths`, longest first, in groups of at most GROUP_SCORES scores."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        size = max(1, GROUP_SCORES // (num_heads * lengths[order[0]] ** 2))
        yield order[:size]
        order = order[size:]


def _attention_gradients(tensors: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """Query, key, value and the gradient of the output [4, G, H, L, D] -> gradients of the first
    three [3, G, H, L, D]. Sequence g has lengths[g] tokens, longest first."""
    shape, scale = tensors.shape, tensors.shape[-1] ** -0.5
    query, key, value, grad = tensors.flatten(1, 2).unbind(0)  # [G x H, L, D] each
    scores = torch.bmm(query.float() * scale, key.float().transpose(1, 2))
    if lengths[-1] < lengths[0]:
        is_padding = torch.arange(lengths[0]) >= torch.tensor(lengths)[:, None]
        by_sequence = scores.unflatten(0, shape[1:3])  # [G, H, L, L]
        by_sequence.masked_fill_(is_padding[:, None, None], float("-inf"))
    if window is not None and lengths[0] > window + 1:
        places = torch.arange(lengths[0])
        is_far = (places[:, None] - places).abs() > window
        # The lowest number, not -inf: beyond a sequence, every score of a row may be masked.
        scores.masked_fill_(is_far, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1)
    weighted = torch.bmm(grad, value.transpose(1, 2)) * probabilities
    weighted.sub_(probabilities * weighted.sum(-1, keepdim=True))
    grad_scores = weighted.mul_(scale).to(query.dtype)
    grad_query = torch.bmm(grad_scores, key)
    grad_key = torch.bmm(grad_scores.transpose(1, 2), query)
    grad_value = torch.bmm(probabilities.to(query.dtype).transpose(1, 2), grad)
    return torch.stack([grad_query, grad_key, grad_value]).view(3, *shape[1:])


def are_rows_faster(logits: Tensor) -> bool:
    """Whether `RowwiseCrossEntropy` beats torch for these logits."""
    if logits.device.type != "cpu" or logits.dtype == torch.float64:
        return False
    return logits.numel() >= MANY_SCORES and not torch.compiler.is_compiling()


class RowwiseCrossEntropy(torch.autograd.Function):
    """(summed loss, number correct), a few rows at a time, without a float32 copy of all logits.
    Reads each logit once; the same pass computes the gradient, in the type of the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits [M, classes], labels int64 [M], some IGNORED."""
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss, num_correct = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        size = max(1, ROW_SCORES // logits.shape[1])
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            scores, label = logits[rows].float(), labels[rows]
            counted = label != IGNORED
            target = torch.where(counted, label, 0)[:, None]
            of_target, top = scores.gather(1, target)[:, 0], scores.amax(-1)
            probabilities = scores.softmax(-1)
            loss += ((top - probabilities.amax(-1).log() - of_target) * counted).sum()
            # Not the argmax of all rows, which takes longer than the softmax.
            candidates = ((of_target == top) & counted).nonzero()[:, 0]
            num_correct += (scores[candidates].argmax(-1) == label[candidates]).sum()
            if gradient is not None:
                probabilities.scatter_add_(1, target, torch.full(target.shape, -1.0))
                if not counted.all():
                    probabilities *= counted[:, None]
                gradient[rows] = probabilities
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(num_correct)
        return loss.float(), num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_loss), None  # in place: it is as large as the logits


def dropout_factors(like: Tensor, p: float) -> Tensor:
    """0 or 1 / (1 - p) for each number of `like`, in its type; numpy draws, with a seed from torch.
    The share of zeros compensates for rounding the factor: 0.0986 instead of 0.1 in bf16."""
    scale = torch.tensor(1 / (1 - p), dtype=like.dtype)
    kind = DROPOUT_BITS[like.element_size()]
    pattern = scale.view(getattr(torch, kind.__name__)).numpy()
    random = np.random.Generator(np.random.SFC64(int(torch.randint(1 << 62, ()))))
    words = random.integers(1 << 64, size=-(-like.numel() // 4), dtype=np.uint64)
    bits = words.view(np.uint16)[: like.numel()]
    factors = (bits < round(65536 / float(scale))).astype(kind) * pattern
    return torch.from_numpy(factors).view(like.dtype).view(like.shape)
