"""The training step on a GPU: the variable-length kernel, autocast and the scaler, torch.compile, resume and peak memory, each against
float32 on the CPU, eager mode or the uninterrupted run."""

import contextlib
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch._dynamo
from conftest import ROOT, interrupted_copy, rows, script, ten_steps
from packed_reference import (
    dense_attention,
    gradients,
    make_batches,
    offsets,
    small_model,
)
from torch._dynamo.utils import counters

from pretrain.command import run_command
from pretrain.model.attention import FLASH, TRITON, VARLEN, packed_varlen
from pretrain.model.dropout import Dropout
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import wrap
from pretrain.runtime.optim import autocast, make_optimizer
from pretrain.train import train_step

HAS_KERNEL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_KERNEL, reason="needs a GPU of compute capability 8.0 or later"),
]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
LENGTHS = [64, 512]
SEQUENCES = {64: 8, 512: 2}  # of full length in a micro-batch
RATE = 1e-3


def twins(vocab_size, length, **settings):
    """The same model on the CPU and, with the kernel, on the GPU."""
    loop = small_model(vocab_size, max_position_embeddings=length, **settings)
    kernel = copy.deepcopy(loop).to(GPU)
    kernel.attention = VARLEN
    return loop, kernel


def filled_batches(corpus, vocabulary, length, count=1):
    return make_batches(
        corpus,
        vocabulary,
        micro_batch_size=SEQUENCES[length],
        count=count,
        fill=True,
        max_length=length,
    )


def optimizer_of(model):
    return make_optimizer(model, RATE, 0.01, [0.9, 0.999], 1e-6)


def step(model, batches, optimizer, precision, scaler=None, trained=None, loss_weights=None):
    """One update on the device of `model`."""
    device = next(model.parameters()).device
    return train_step(
        model if trained is None else trained,
        loss_weights or model.loss_weights,
        batches,
        optimizer,
        scaler or torch.amp.GradScaler(device.type, enabled=False),
        autocast(device, precision),
        RATE,
        1.0,
        device,
    )


def losses_of(model, batches, precision, steps, scaler=None, trained=None):
    """Mean masked loss of each of some steps, over the micro-batches in turn."""
    optimizer, means = optimizer_of(model), []
    for number in range(steps):
        batch = batches[number % len(batches)]
        result = step(model, [batch], optimizer, precision, scaler, trained)
        means.append((result.sums["mlm_loss"] / result.sums["mlm_count"]).item())
    return means


def state_of(model, optimizer):
    """Weights and everything that the optimizer keeps."""
    weights = [weight.detach().clone() for weight in model.parameters()]
    return weights + [
        value.clone() for state in optimizer.state.values() for value in state.values()
    ]


@pytest.mark.parametrize("kernel", [TRITON, FLASH])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths", [(3, 1), (1, 7, 64, 33, 128, 1), (512, 1, 300, 129, 82, 0, 0, 0)]
)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_a_kernel_equals_dense_attention(kernel, dtype, lengths, head_dim):
    """With dummies that have no token, too: gradients of what comes before them are finite and right."""
    generator = torch.Generator().manual_seed(1)
    qkv = (
        torch.randn(sum(lengths), 3, 2, head_dim, generator=generator)
        .to(GPU, dtype)
        .requires_grad_()
    )
    exact, cu_seqlens = qkv.detach().float().requires_grad_(), offsets(lengths).to(GPU)
    ours = packed_varlen(qkv, cu_seqlens, max(lengths), kernel)
    expected = dense_attention(exact, cu_seqlens)
    torch.testing.assert_close(ours.float(), expected, atol=2e-2, rtol=2e-2)
    direction = torch.randn(ours.shape, generator=generator).to(GPU)
    (found,) = torch.autograd.grad(ours, qkv, direction.to(dtype))
    (wanted,) = torch.autograd.grad(expected, exact, direction)
    torch.testing.assert_close(found.float(), wanted, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_and_gradients_are_near_float32_on_the_cpu(length, precision, corpus, vocabulary):
    loop, kernel = twins(vocabulary.size, length)
    (batch,) = filled_batches(corpus, vocabulary, length)
    expected = loop(batch)
    sum(expected.loss_sums.values()).backward()
    with autocast(GPU, precision):
        output = kernel(batch.to(GPU))
    sum(output.loss_sums.values()).backward()
    for name, value in output.loss_sums.items():
        assert value.item() == pytest.approx(expected.loss_sums[name].item(), rel=1e-2)
    wanted = gradients(loop)
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in gradients(kernel).items():
        # A bias of the keys has a gradient of 0: it moves all scores of a query alike.
        size = wanted[name].norm().clamp(min=1e-2 * largest)
        assert (gradient.cpu() - wanted[name]).norm() < 0.05 * size, name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_follow_those_of_float32_on_the_cpu(precision, corpus, vocabulary):
    loop, kernel = twins(vocabulary.size, 64)
    batches = filled_batches(corpus, vocabulary, 64, count=2)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    expected = losses_of(loop, batches, "fp32", steps=20)
    found = losses_of(kernel, batches, precision, steps=20, scaler=scaler)
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=2e-2)


def test_dropout_of_a_compiled_graph_has_its_share_and_its_gradient():
    torch._dynamo.reset()
    drop = torch.compile(Dropout(torch.nn.Dropout(0.1)), dynamic=False)
    numbers = torch.ones(4096, 768, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    first, second = drop(numbers), drop(numbers)
    for dropped in (first, second):
        assert (dropped == 0).double().mean().item() == pytest.approx(0.1, abs=1e-3)
        (gradient,) = torch.autograd.grad(dropped.sum(), numbers)
        assert torch.equal(gradient, dropped)
    both = ((first == 0) & (second == 0)).double().mean().item()
    assert both == pytest.approx(0.01, abs=4e-4)


def test_a_compiled_step_equals_the_eager_one_and_waits_for_nothing(corpus, vocabulary):
    """One graph without a break for batches of any lengths, at either length of a run with phases."""
    torch._dynamo.reset()
    counters.clear()
    _, eager = twins(vocabulary.size, 512)
    model = copy.deepcopy(eager)
    trained = wrap(model, compiled=True)
    batches = [
        batch.pin_memory()
        for length in LENGTHS
        for batch in filled_batches(corpus, vocabulary, length, count=3)
    ]
    expected = losses_of(eager, batches, "bf16", steps=len(batches))
    found = losses_of(model, batches, "bf16", steps=len(batches), trained=trained)
    assert found == pytest.approx(expected, rel=1e-2)
    shapes = {(len(batch.input_ids), len(batch.lengths), batch.max_length) for batch in batches}
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == len(shapes)
    optimizer = optimizer_of(model)
    step(model, batches[:1], optimizer, "bf16", trained=trained)  # makes the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, batches[1:3], optimizer, "bf16", trained=trained)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_is_not_finite_changes_nothing(corpus, vocabulary):
    _, model = twins(vocabulary.size, 64)
    batches, optimizer = filled_batches(corpus, vocabulary, 64), optimizer_of(model)
    assert step(model, batches, optimizer, "bf16").finite
    before = state_of(model, optimizer)
    poisoned = {**model.loss_weights, "mlm": math.inf}
    assert not step(model, batches, optimizer, "bf16", loss_weights=poisoned).finite
    assert all(torch.equal(*pair) for pair in zip(before, state_of(model, optimizer)))
    assert step(model, batches, optimizer, "bf16").finite
    assert not all(torch.equal(*pair) for pair in zip(before, state_of(model, optimizer)))


def test_the_scaler_skips_what_overflows_and_lowers_its_scale(corpus, vocabulary):
    _, model = twins(vocabulary.size, 64)
    batches, optimizer = filled_batches(corpus, vocabulary, 64), optimizer_of(model)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [weight.detach().clone() for weight in model.parameters()]
    assert not step(model, batches, optimizer, "fp16", scaler).finite
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
    assert scaler.get_scale() == 2.0**39
    finite = [bool(step(model, batches, optimizer, "fp16", scaler).finite) for _ in range(40)]
    assert finite[-1] and finite == sorted(finite), "once the scale fits, every step counts"


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_run_is_resumed_near_the_uninterrupted_one(compiled, text_file, cache, tmp_path):
    """Its logged peak of memory is that of its own steps: not of what was freed before, such as the trial micro-batch."""
    main = script("pretrain").main
    options = [*ten_steps(text_file, cache, 8), "--precision", "bf16", "--device", "cuda"]
    options += ["--compile", compiled]
    held = torch.empty(1 << 30, dtype=torch.uint8, device=GPU)
    del held
    assert run_command(main, [*options, "--output", str(tmp_path / "whole")]) == 0
    interrupted_copy(tmp_path / "whole", tmp_path / "resumed", step=4)
    assert run_command(main, ["--resume", "--output", str(tmp_path / "resumed")]) == 0
    for ours, theirs in zip(rows(tmp_path / "whole"), rows(tmp_path / "resumed"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    peaks = [row["memory/peak_bytes"] for row in map(json.loads, lines) if "train/loss" in row]
    assert peaks and 0 < max(peaks) < 1 << 30


def test_a_signal_while_kernels_are_compiled(text_file, cache, tmp_path):
    """The signal goes to the whole group, and so to the processes that compile; the run saves after the step."""
    options = [*ten_steps(text_file, cache, 8), "--precision", "bf16", "--device", "cuda"]
    options += ["--compile", "on", "--workers", "2", "--valid-fraction", "0"]
    options += ["--output", str(tmp_path / "run")]
    kernels = tmp_path / "kernels"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(kernels)}
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *options]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while not any(kernels.rglob("*.py")) and run.poll() is None:
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(300) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert [folder.name for folder in ckpt.checkpoints(tmp_path / "run")] == ["checkpoint-1"]
