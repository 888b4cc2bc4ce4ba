"""The training step on a GPU: the variable-length kernels, autocast and the scaler, torch.compile,
resume and peak memory, each against float32 on the CPU, eager mode or the uninterrupted run."""

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
    small_packed,
)
from torch._dynamo.utils import counters

from pretrain.cli import run_command
from pretrain.model.attention import FLASH, TRITON, VARLEN, packed_varlen
from pretrain.model.replacements import Dropout
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import wrap
from pretrain.runtime.optim import autocast
from pretrain.train import train_step

HAS_KERNEL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_KERNEL, reason="needs a GPU of compute capability 8.0 or later"),
]
GPU = torch.device("cuda")
LONG = (512, 1, 300, 129, 82, 0, 0, 0)  # sequences of a pack
SEQUENCES = {64: 8, 512: 2}  # by length, of a micro-batch
RATE = 1e-3
ON_GPU = ["--precision", "bf16", "--device", "cuda"]


def twins(loop):
    """The same model on the CPU and, with the kernel, on the GPU."""
    kernel = copy.deepcopy(loop).to(GPU)
    kernel.attention = VARLEN
    return loop, kernel


def filled_batches(corpus, vocabulary, length=64, **more):
    sizes = {"micro_batch_size": SEQUENCES[length], "max_length": length}
    return make_batches(corpus, vocabulary, fill=True, **sizes, **more)


class Trainer:
    """Takes steps with `model`; calls `compiled` in its place if given."""

    def __init__(self, model, precision, scaler=None, compiled=None):
        self.model, self.trained = model, model if compiled is None else compiled
        self.device = next(model.parameters()).device
        self.scaler = scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        self.autocast = autocast(self.device, precision)
        self.optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)

    def step(self, *batches):
        optimizers = [self.optimizer]
        made = (self.scaler, self.autocast, RATE, 1.0, self.device)
        return train_step(self.trained, batches, optimizers, *made)

    def losses(self, batches, steps):
        """Mean masked loss of each step, with the micro-batches in turn."""
        results = [self.step(batches[number % len(batches)]) for number in range(steps)]
        return [result.losses.read(self.device).means()["mlm_loss"] for result in results]

    def state(self):
        """Weights and optimizer state."""
        states = self.optimizer.state.values()
        kept = [value.clone() for state in states for value in state.values()]
        return [weight.detach().clone() for weight in self.model.parameters()] + kept


def are_equal(left, right):
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def assert_equals_dense_attention(lengths, head_dim, dtype, window=None, **kernel):
    """Outputs and gradients equal float32 with a block-diagonal mask."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(sum(lengths), 3, 2, head_dim, generator=generator)
    qkv = qkv.to(GPU, dtype).requires_grad_()
    exact, cu_seqlens = qkv.detach().float().requires_grad_(), offsets(lengths).to(GPU)
    ours = packed_varlen(qkv, cu_seqlens, max(lengths), window=window, **kernel)
    expected = dense_attention(exact, cu_seqlens, window)
    torch.testing.assert_close(ours.float(), expected, atol=2e-2, rtol=2e-2)
    direction = torch.randn(ours.shape, generator=generator).to(GPU)
    (found,) = torch.autograd.grad(ours, qkv, direction.to(dtype))
    (wanted,) = torch.autograd.grad(expected, exact, direction)
    torch.testing.assert_close(found.float(), wanted, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("kernel", [TRITON, FLASH])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "head_dim"), [((3, 1), 64), (LONG, 16)])
def test_a_kernel_equals_dense_attention(kernel, dtype, lengths, head_dim):
    """Even before dummies without tokens, where the gradients are finite and right."""
    assert_equals_dense_attention(lengths, head_dim, dtype, kernel=kernel)


@pytest.mark.parametrize(
    ("lengths", "head_dim", "window"),
    [((3, 64, 33), 26, None), (LONG, 64, 1), (LONG, 64, 128), (LONG, 64, 511)],
)
def test_any_head_dimension_and_window_equals_dense_attention(lengths, head_dim, window):
    """A dimension that is no multiple of 8; a band, also one that covers every sequence."""
    assert_equals_dense_attention(lengths, head_dim, torch.bfloat16, window)


def assert_near(kernel, loop, share):
    """Each gradient of the kernel is within a share of that of the loop."""
    wanted = gradients(loop)
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in gradients(kernel).items():
        # A bias of the keys has a gradient of 0: it shifts all scores of a query equally.
        size = wanted[name].norm().clamp(min=1e-2 * largest)
        assert (gradient.cpu() - wanted[name]).norm() < share * size, name


@pytest.mark.parametrize("family", ["distilbert", "modernbert"])
def test_other_families_compiled_are_close_to_float32_on_the_cpu(family, corpus, vocabulary):
    torch._dynamo.reset()
    sizes = {"max_position_embeddings": 512, "hidden_size": 64}
    loop, kernel = twins(small_packed(family, vocabulary.size, **sizes))
    (batch,) = filled_batches(corpus, vocabulary, 512, objective="mlm")
    expected = loop(batch)["mlm"].sum
    expected.backward()
    with autocast(GPU, "bf16"):
        found = wrap(kernel, compiled=True)(batch.to(GPU))["mlm"].sum
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    assert_near(kernel, loop, 0.06)


@pytest.mark.parametrize(("length", "precision"), [(64, "bf16"), (512, "fp16")])
def test_losses_and_gradients_are_close_to_float32_on_the_cpu(
    length, precision, corpus, vocabulary
):
    loop, kernel = twins(small_model(vocabulary.size, max_position_embeddings=length))
    (batch,) = filled_batches(corpus, vocabulary, length)
    expected = loop(batch)
    sum(loss.sum for loss in expected.values()).backward()
    with autocast(GPU, precision):
        found = kernel(batch.to(GPU))
    sum(loss.sum for loss in found.values()).backward()
    sums = {name: loss.sum.item() for name, loss in expected.items()}
    assert {name: loss.sum.item() for name, loss in found.items()} == pytest.approx(sums, rel=1e-2)
    assert_near(kernel, loop, 0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_follow_float32_on_the_cpu(precision, corpus, vocabulary):
    loop, kernel = twins(small_model(vocabulary.size))
    batches = filled_batches(corpus, vocabulary, count=2)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    expected = Trainer(loop, "fp32").losses(batches, steps=20)
    found = Trainer(kernel, precision, scaler).losses(batches, steps=20)
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=2e-2)


def test_dropout_of_a_compiled_graph_has_its_share_and_its_gradient():
    torch._dynamo.reset()
    drop = torch.compile(Dropout(0.1), dynamic=False)
    numbers = torch.ones(4096, 768, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    first, second = drop(numbers), drop(numbers)
    for dropped in (first, second):
        assert (dropped == 0).double().mean().item() == pytest.approx(0.1, abs=1e-3)
        (gradient,) = torch.autograd.grad(dropped.sum(), numbers)
        assert torch.equal(gradient, dropped)
    both = ((first == 0) & (second == 0)).double().mean().item()
    assert both == pytest.approx(0.01, abs=4e-4)


def test_a_compiled_step_equals_the_eager_one_and_waits_for_nothing(corpus, vocabulary):
    """One graph without a break for batches of any lengths, in each of two phases."""
    torch._dynamo.reset()
    counters.clear()
    _, eager = twins(small_model(vocabulary.size, max_position_embeddings=512))
    model = copy.deepcopy(eager)
    batches = [
        batch.pin_memory()
        for length in SEQUENCES
        for batch in filled_batches(corpus, vocabulary, length, count=3)
    ]
    expected = Trainer(eager, "bf16").losses(batches, steps=len(batches))
    trainer = Trainer(model, "bf16", compiled=wrap(model, compiled=True))
    assert trainer.losses(batches, steps=len(batches)) == pytest.approx(expected, rel=1e-2)
    shapes = {(len(batch.input_ids), len(batch.lengths), batch.max_length) for batch in batches}
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == len(shapes)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(*batches[1:3])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_non_finite_step_changes_nothing(corpus, vocabulary):
    _, model = twins(small_model(vocabulary.size))
    trainer, (batch,) = Trainer(model, "bf16"), filled_batches(corpus, vocabulary)
    assert trainer.step(batch).finite
    before = trainer.state()
    model.use_pairs(math.inf)
    assert not trainer.step(batch).finite
    assert are_equal(before, trainer.state())
    model.use_pairs(1.0)
    assert trainer.step(batch).finite
    assert not are_equal(before, trainer.state())


def test_the_scaler_skips_what_overflows_and_lowers_its_scale(corpus, vocabulary):
    _, model = twins(small_model(vocabulary.size))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    trainer, (batch,) = Trainer(model, "fp16", scaler), filled_batches(corpus, vocabulary)
    before = [weight.detach().clone() for weight in model.parameters()]
    assert not trainer.step(batch).finite
    assert are_equal(before, model.parameters()) and scaler.get_scale() == 2.0**39
    finite = [bool(trainer.step(batch).finite) for _ in range(40)]
    assert finite[-1] and finite == sorted(finite), "once the scale fits, every step counts"


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_resumed_run_is_close_to_the_uninterrupted_one(compiled, text_file, cache, tmp_path):
    """Its logged peak memory is that of its steps, without earlier ones such as the trial
    micro-batch."""
    main, whole, resumed = script("pretrain").main, tmp_path / "whole", tmp_path / "resumed"
    options = [*ten_steps(text_file, cache, 8), *ON_GPU, "--compile", compiled]
    held = torch.empty(1 << 30, dtype=torch.uint8, device=GPU)
    del held
    assert run_command(main, [*options, "--output", str(whole)]) == 0
    interrupted_copy(whole, resumed, step=4)
    assert run_command(main, ["--resume", "--output", str(resumed)]) == 0
    for ours, theirs in zip(rows(whole), rows(resumed), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)
    logged = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    peaks = [row["memory/peak_bytes"] for row in logged if "train/loss" in row]
    assert peaks and 0 < max(peaks) < 1 << 30


def test_a_signal_while_kernels_are_compiled(text_file, cache, tmp_path):
    """It also reaches the processes that compile; the run still saves after its step."""
    output, kernels, log = tmp_path / "run", tmp_path / "kernels", tmp_path / "log"
    options = [*ten_steps(text_file, cache, 8), *ON_GPU, "--compile", "on", "--workers", "2"]
    options += ["--valid-fraction", "0", "--output", str(output)]
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *options]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(kernels)}
    with log.open("w") as file:
        streams = {"stdout": file, "stderr": file, "start_new_session": True}
        run = subprocess.Popen(command, env=environment, **streams)
    try:
        while not any(kernels.rglob("*.py")) and run.poll() is None:
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(300) == 128 + signal.SIGTERM, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert [folder.name for folder in ckpt.checkpoints(output)] == ["checkpoint-1"]
