"""The Triton kernels against dense attention in Triton's interpreter, without a GPU;
tests/test_cuda.py runs them on one."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton", minversion="3.7", reason="older interpreters fail with new numpy")

COMPARE = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from packed_reference import dense_attention, offsets
from pretrain.model.attention_kernel import packed_attention

torch.manual_seed(0)
for head_dim, lengths in [
    (16, (5, 16, 1)),  # one block of 16 tokens
    (32, (128, 1, 0, 77, 0)),  # two blocks forward, one backward
    (16, (129, 40, 0, 300, 0)),  # several blocks each way
]:
    qkv = torch.randn(sum(lengths), 3, 2, head_dim)
    # Scores far below 0: those of the padding, which are 0, would overflow unless they are masked.
    qkv[:, 0], qkv[:, 1] = 8 + qkv[:, 0], qkv[:, 1] - 8
    qkv = qkv.half().requires_grad_()
    exact = qkv.detach().float().requires_grad_()
    cu_seqlens, direction = offsets(lengths), torch.randn(sum(lengths), 2, head_dim)
    ours = packed_attention(qkv, cu_seqlens, max(lengths))[0]
    expected = dense_attention(exact, cu_seqlens)
    torch.testing.assert_close(ours.float(), expected, atol=2e-3, rtol=2e-3)
    (found,) = torch.autograd.grad(ours, qkv, direction.half())
    (wanted,) = torch.autograd.grad(expected, exact, direction)
    assert (found.float() - wanted).norm() < 5e-3 * wanted.norm()
"""


def test_the_kernels_equal_dense_attention():
    """In a process of its own: Triton reads the variable when the kernels are defined."""
    command = [sys.executable, "-c", COMPARE, str(ROOT), str(ROOT / "tests")]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
