"""Attention over packs equals dense attention under a block-diagonal mask; the grouped backward
pass gives the exact gradients; the kernel's path (tensors and one constant) gives the same
through the whole model, and compiles once for batches of any lengths."""

import copy
from functools import partial

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import (
    assert_close,
    dense_attention,
    gradients,
    make_batches,
    offsets,
    small_model,
    small_packed,
)
from torch._dynamo.testing import CompileCounter

from pretrain.batch import IGNORED
from pretrain.model import attention, cpu_kernels
from pretrain.model.attention import SDPA, VARLEN, choose_attention, packed_sdpa, packed_varlen
from pretrain.runtime.distributed import wrap

WINDOWS = st.one_of(st.none(), st.integers(0, 30))


@pytest.fixture
def with_mask(monkeypatch):
    """A model with `dense_attention` in place of the kernel."""

    def dense(qkv, cu_seqlens, window, **_):
        return dense_attention(qkv, cu_seqlens, window)

    monkeypatch.setattr(attention, "packed_varlen", dense)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twins(model):
    """The same model with either attention."""
    kernel = copy.deepcopy(model)
    kernel.attention = VARLEN
    return model, kernel


def run(model, batch, compiled=None):
    """(losses, gradients) of one batch; `compiled`, if given, is called in place of the model."""
    model.zero_grad()
    output = (model if compiled is None else compiled)(batch)
    sum(loss.sum for loss in output.values()).backward()
    return {name: loss.sum.detach() for name, loss in output.items()}, gradients(model)


def assert_equal_runs(left, right):
    for ours, theirs in zip(left, right):
        assert_close(ours, theirs, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 4, 8]),
    window=WINDOWS,
    block=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_packed_sdpa_equals_dense_attention_with_a_block_diagonal_mask(
    lengths, heads, width, window, block, seed
):
    qkv = torch.randn(sum(lengths), 3, heads, width, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LEAST_BLOCK", block)
        ours = packed_sdpa(qkv, tuple(lengths), window)
    assert ours.shape == (sum(lengths), heads, width)
    expected = dense_attention(qkv, offsets(lengths), window)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    heads=st.integers(1, 3),
    scores=st.sampled_from([1, 2000, 1 << 19]),
    sharpness=st.sampled_from([1.0, 3.0]),
    window=WINDOWS,
    seed=st.integers(0, 99),
)
def test_gradients_by_groups_equal_float64(lengths, heads, scores, sharpness, window, seed):
    """In bf16 on CPU, for groups of one, a few and all sequences, and for sharp heads."""
    generator = torch.Generator().manual_seed(seed)
    qkv = sharpness * torch.randn(sum(lengths), 3, heads, 16, generator=generator)
    qkv = qkv.bfloat16().requires_grad_()
    direction = torch.randn(sum(lengths), heads, 16, generator=generator).bfloat16()
    exact = qkv.detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "GROUP_SCORES", scores)
        ours = packed_sdpa(qkv, tuple(lengths), window)
        assert "Grouped" in type(ours.grad_fn).__name__
        (found,) = torch.autograd.grad(ours, qkv, direction)
    expected = dense_attention(exact, offsets(lengths), window)
    (wanted,) = torch.autograd.grad(expected, exact, direction.double())
    assert torch.linalg.norm(found.double() - wanted) <= 0.01 * torch.linalg.norm(wanted) + 1e-3


def test_a_wrapped_projection_is_called(corpus, vocabulary):
    """As with LoRA. The stock way to call the encoder raises a clear error."""
    model, batch = small_model(vocabulary.size), make_batches(corpus, vocabulary)[0]
    before, layer = model.encode(batch), model.layers[0].attention.self
    stock = layer.value
    layer.value = torch.nn.Sequential(stock)
    torch.testing.assert_close(model.encode(batch), before)
    layer.value = torch.nn.Sequential(stock, torch.nn.Tanh())
    assert (model.encode(batch) - before).abs().max() > 0.1
    with pytest.raises(AssertionError, match="packed batch"):
        model.bert(input_ids=batch.input_ids[None, :10])


@pytest.mark.parametrize(("head_dim", "given"), [(36, 40), (64, 64)])
def test_head_dimensions_that_flash_attention_lacks_are_filled(head_dim, given, monkeypatch):
    """It takes multiples of 8. The stand-in scales as torch does if it gets no scale."""

    def varlen_attn(query, key, value, ends, *_, window_size, scale=None):
        assert query.shape[-1] == given
        scaled = query * (scale or given**-0.5) * given**0.5
        return dense_attention(torch.stack([scaled, key, value], 1), ends)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    qkv, ends = torch.randn(40, 3, 2, head_dim), offsets((7, 33))
    torch.testing.assert_close(packed_varlen(qkv, ends, 33, "flash"), dense_attention(qkv, ends))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_kernels_path_and_filling_change_no_loss_and_no_gradient(
    checkpointing, corpus, vocabulary, with_mask
):
    loop, kernel = twins(small_model(vocabulary.size))
    if checkpointing:
        kernel.gradient_checkpointing_enable()
    exact, filled = (make_batches(corpus, vocabulary, fill=fill, count=4)[-1] for fill in (0, 1))
    num_masked = len(exact.masked_positions)
    assert len(filled.input_ids) > len(exact.input_ids)
    # Dummies with tokens and without.
    assert filled.lengths[-1] == 0 and filled.cu_seqlens[-1] == len(filled.input_ids)
    assert len(filled.masked_positions) > num_masked
    assert (filled.labels["mlm"][num_masked:] == IGNORED).all()
    for name in ("num_tokens", "num_sequences", "counts"):
        assert getattr(filled, name) == getattr(exact, name)
    expected = run(loop, exact)
    for model, batch in ((loop, filled), (kernel, exact), (kernel, filled)):
        assert_equal_runs(run(model, batch), expected)
    ours, theirs = kernel(filled), loop(exact)
    assert all(ours[name].num_correct == theirs[name].num_correct for name in theirs)


@pytest.mark.parametrize(
    "family, lengths", [("bert", (16, 24, 40)), ("distilbert", (16,)), ("modernbert", (16,))]
)
def test_filled_batches_compile_once_for_each_shape_without_a_graph_break(
    family, lengths, corpus, vocabulary, with_mask, monkeypatch
):
    """In several phases, each seen twice: by default the second would make one graph of any shape,
    and the third would have none."""
    counter, batches = CompileCounter(), []
    # ModernBERT's two layers differ: in the second one, attention has a window.
    layers = {"num_hidden_layers": 2 if family == "modernbert" else 1}
    objective = "mlm+nsp" if family == "bert" else "mlm"
    eager, model = twins(small_packed(family, vocabulary.size, objective, **layers))
    compile_with = partial(torch.compile, backend=counter, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_with)
    compiled = wrap(model, True)
    for length in lengths:
        more = {"fill": True, "count": 3, "max_length": length}
        batches += make_batches(corpus, vocabulary, objective, **more)
    for batch in batches + batches:
        assert_equal_runs(run(model, batch, compiled), run(eager, batch))
    for name in ("lengths", "num_tokens"):
        assert len({getattr(batch, name) for batch in batches}) > 1
    shapes = {(len(batch.input_ids), len(batch.lengths)) for batch in batches}
    assert counter.frame_count == len(shapes) < len(batches)


CPU, AMPERE, TURING = ("cpu", (0, 0)), ("cuda", (8, 0)), ("cuda", (7, 5))
CHOICES = [(CPU, "fp32", SDPA), (CPU, "bf16", SDPA), (TURING, "fp16", SDPA), (TURING, "bf16", SDPA)]
CHOICES += [(AMPERE, "fp32", SDPA), (AMPERE, "fp16", VARLEN), (("cuda", (9, 0)), "bf16", VARLEN)]


@pytest.mark.parametrize("device, precision, expected", CHOICES)
def test_cuda_uses_the_kernel_if_it_has_one(device, precision, expected, monkeypatch):
    name, capability = device
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_attention(torch.device(name), precision) == expected
