"""Attention over packs: it equals dense attention under a block-diagonal mask, the grouped backward pass gives the exact gradients,
filled batches change no loss and no gradient, and the kernel's path (tensors and one constant) gives the same through the whole
model and compiles once for batches of any lengths."""
import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import assert_close, dense_attention, gradients, make_batches, offsets, small_model
from torch._dynamo.testing import CompileCounter

from pretrain.batch import IGNORED
from pretrain.config import OBJECTIVES
from pretrain.model import attention
from pretrain.model.attention import SDPA, VARLEN, choose_attention, packed_sdpa


@pytest.fixture
def with_mask(monkeypatch):
    """`dense_attention` in the place of the kernel."""
    monkeypatch.setattr(attention, "packed_varlen", lambda qkv, cu_seqlens, *_: dense_attention(qkv, cu_seqlens))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twins(vocab_size, **settings):
    """The same model with either attention."""
    models = [small_model(vocab_size, **settings) for _ in range(2)]
    models[1].attention = VARLEN
    return models


def run(model, batch, compiled=None):
    """(losses, gradients) of one batch; `compiled` is called in place of the model that it wraps."""
    model.zero_grad()
    output = (model if compiled is None else compiled)(batch)
    sum(output.loss_sums.values()).backward()
    return {name: value.detach() for name, value in output.loss_sums.items()}, gradients(model)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any), heads=st.integers(1, 3), width=st.sampled_from([1, 4, 8]),
       seed=st.integers(0, 99))
def test_packed_sdpa_equals_dense_attention_with_a_block_diagonal_mask(lengths, heads, width, seed):
    qkv = torch.randn(sum(lengths), 3, heads, width, generator=torch.Generator().manual_seed(seed))
    ours = packed_sdpa(qkv, tuple(lengths))
    assert ours.shape == (sum(lengths), heads, width)
    torch.testing.assert_close(ours, dense_attention(qkv, offsets(lengths)), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), heads=st.integers(1, 3),
       scores=st.sampled_from([1, 2000, 1 << 19]), sharpness=st.sampled_from([1.0, 3.0]), seed=st.integers(0, 99))
def test_gradients_by_groups_are_those_of_float64(lengths, heads, scores, sharpness, seed):
    """In bf16 on CPU, for groups of one, a few and all sequences, and for heads that look at few places."""
    generator = torch.Generator().manual_seed(seed)
    qkv = (sharpness * torch.randn(sum(lengths), 3, heads, 16, generator=generator)).bfloat16().requires_grad_()
    direction = torch.randn(sum(lengths), heads, 16, generator=generator).bfloat16()
    exact = qkv.detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "GROUP_SCORES", scores)
        ours = packed_sdpa(qkv, tuple(lengths))
        assert type(ours.grad_fn).__name__ == "_GroupedBackwardBackward"
        (found,) = torch.autograd.grad(ours, qkv, direction)
    (wanted,) = torch.autograd.grad(dense_attention(exact, offsets(lengths)), exact, direction.double())
    assert torch.linalg.norm(found.double() - wanted) <= 0.01 * torch.linalg.norm(wanted) + 1e-3


def test_long_sequences_and_float32_keep_torchs_own_gradients():
    for dtype, lengths in ((torch.bfloat16, (attention.LONGEST_PLAIN + 1, 3)), (torch.float32, (4, 3))):
        qkv = torch.randn(sum(lengths), 3, 1, 8, dtype=dtype, requires_grad=True)
        assert "Grouped" not in type(packed_sdpa(qkv, lengths).grad_fn).__name__


def test_what_is_put_around_a_projection_is_called(corpus, vocabulary):
    """As LoRA does; and the stock way of calling the encoder is refused in words."""
    model, batch = small_model(vocabulary.size), make_batches(corpus, vocabulary)[0]
    before = model.encode(batch)
    stock = model.bert.encoder.layer[0].attention.self.value
    model.bert.encoder.layer[0].attention.self.value = torch.nn.Sequential(stock)
    torch.testing.assert_close(model.encode(batch), before)
    model.bert.encoder.layer[0].attention.self.value = torch.nn.Sequential(stock, torch.nn.Tanh())
    assert (model.encode(batch) - before).abs().max() > 0.1
    with pytest.raises(AssertionError, match="needed is a packed batch"):
        model.bert(input_ids=batch.input_ids[None, :10])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_filled_batch_gives_the_losses_and_gradients_of_the_exact_one(objective, corpus, vocabulary):
    model = small_model(vocabulary.size, objective)
    exact, filled = (make_batches(corpus, vocabulary, objective, fill=fill, count=4)[-1] for fill in (False, True))
    assert len(filled.input_ids) > len(exact.input_ids) and len(filled.masked_positions) > len(exact.masked_positions)
    assert filled.lengths[-1] == 0 and filled.cu_seqlens[-1] == len(filled.input_ids)  # dummies with tokens and without
    assert (filled.masked_lm_labels[len(exact.masked_positions):] == IGNORED).all()
    assert (filled.num_tokens, filled.num_sequences, filled.counts) == (exact.num_tokens, exact.num_sequences, exact.counts)
    for ours, theirs in zip(run(model, filled), run(model, exact)):
        assert_close(ours, theirs, atol=2e-5)
    assert model(filled).num_correct == model(exact).num_correct


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("fill", [False, True], ids=["exact", "filled"])
def test_the_kernels_path_through_the_model_equals_the_loop(objective, fill, corpus, vocabulary, with_mask):
    loop, kernel = twins(vocabulary.size, objective=objective)
    batch = make_batches(corpus, vocabulary, objective, fill=fill)[0]
    for ours, theirs in zip(run(kernel, batch), run(loop, batch)):
        assert_close(ours, theirs, atol=2e-5)


def test_gradient_checkpointing_on_the_kernels_path(corpus, vocabulary, with_mask):
    plain, recomputed = twins(vocabulary.size)
    recomputed.gradient_checkpointing_enable()
    batch = make_batches(corpus, vocabulary, fill=True)[0]
    for ours, theirs in zip(run(recomputed, batch), run(plain, batch)):
        assert_close(ours, theirs, atol=2e-5)


def test_filled_batches_compile_once_for_each_number_of_sequences_without_a_graph_break(corpus, vocabulary, with_mask):
    eager, model = twins(vocabulary.size)
    batches = make_batches(corpus, vocabulary, fill=True, count=3)
    assert len({batch.lengths for batch in batches}) > 1 and len({batch.num_tokens for batch in batches}) > 1
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)  # a graph break would raise
    for batch in batches:
        for ours, theirs in zip(run(model, batch, compiled), run(eager, batch)):
            assert_close(ours, theirs, atol=2e-5)
    assert counter.frame_count == len({len(batch.lengths) for batch in batches}) < len(batches)


def test_exact_batches_would_compile_again(corpus, vocabulary, with_mask):
    """What filling is for: the counter above sees a recompilation where shapes differ."""
    _, model = twins(vocabulary.size)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for batch in make_batches(corpus, vocabulary, count=2):
        compiled(batch)
    assert counter.frame_count > 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_attention_on_cpu_is_the_loop(precision):
    assert choose_attention(torch.device("cpu"), precision) == SDPA


@pytest.mark.parametrize("capability, precision, expected", [
    ((9, 0), "bf16", VARLEN), ((8, 0), "fp16", VARLEN), ((8, 0), "fp32", SDPA), ((7, 5), "fp16", SDPA), ((7, 0), "bf16", SDPA)])
def test_attention_on_cuda_is_the_kernel_where_there_is_one(capability, precision, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_attention(torch.device("cuda", 0), precision) == expected
