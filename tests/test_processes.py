"""Two processes train on the batches of one: the same losses and weights, from the same command under torchrun."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file


def test_two_processes_equal_one(text_file, tmp_path):
    options = ["--train", str(text_file), "--model", "tiny", "--config-override", "hidden_size=32", "intermediate_size=64",
               "num_attention_heads=2", "hidden_dropout_prob=0", "--vocab-size", "120", "--max-length", "32", "--batch-size", "16",
               "--micro-batch-size", "4", "--max-steps", "6", "--eval-every", "3", "--log-every", "1", "--precision", "fp32",
               "--learning-rate", "1e-3", "--cache", str(tmp_path / "cache"), "--eval-tokens", "600"]
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                   str(ROOT / "scripts" / "pretrain.py"), *options, "--output", str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "12")
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(7))
    for left, right in zip(one, two):
        for name in ("train/loss", "train/perplexity", "train/nsp_accuracy", "eval/loss", "eval/mlm_accuracy", "optim/grad_norm"):
            if name in left:
                assert right[name] == pytest.approx(left[name], rel=1e-4), (left["step"], name)
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in "12")
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
