"""Optimizer state by parameter name: any optimizer, any number of processes; and random states."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import in_processes, refused
from packed_reference import small_model

from pretrain.config import OptimizationOptions
from pretrain.runtime.distributed import World, start, stop
from pretrain.runtime.optim import make_optimizers, step_if
from pretrain.runtime.sharding import (
    OptimizerState,
    RandomState,
    is_sharded,
    part_like,
    place,
    whole,
    whole_weights,
)

CPU = torch.device("cpu")
BETAS = (0.9, 0.99)
OPTIONS = OptimizationOptions(learning_rate=0.01, weight_decay=0.1, adam_betas=BETAS)
FROZEN = "bert.pooler"  # weights that get no gradient in the first steps


class Odd(torch.optim.Optimizer):
    """An optimizer with a list, integers and bf16 in its state, a count in its group."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient, state = whole(weight.grad), self.state[weight]
                if not state:
                    state["rows"] = [torch.zeros(len(gradient), dtype=torch.float64)]
                    state["half"] = torch.zeros_like(gradient, dtype=torch.bfloat16)
                    state["seen"] = torch.tensor(0)
                state["rows"][0] += gradient.flatten(1).sum(1) if gradient.ndim > 1 else gradient
                state["half"].lerp_(gradient.bfloat16(), 0.5)
                state["seen"] += group["count"]
                change = state["half"].float() + state["rows"][0].mean().float()
                weight -= part_like(weight, group["lr"] * change)


OPTIMIZERS = {
    "adamw": lambda model: make_optimizers(model, OPTIONS),
    "muon": lambda model: make_optimizers(model, replace(OPTIONS, optimizer="muon")),
    "adagrad": lambda model: [torch.optim.Adagrad(model.parameters(), lr=0.1)],
    "adafactor": lambda model: [torch.optim.Adafactor(model.parameters(), lr=0.1)],
    "odd": lambda model: [Odd(model.parameters(), lr=0.01)],
}


def make(kind):
    model = small_model(40)
    return model, OPTIMIZERS[kind](model)


def take_steps(model, optimizers, steps):
    """Gradients depend only on the step and the weight; FROZEN gets them from step 2 on."""
    for step in steps:
        for number, (name, weight) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(1000 * step + number)
            gradient = torch.randn(weight.shape, generator=generator)
            is_frozen = name.startswith(FROZEN) and step < 2
            weight.grad = None if is_frozen else part_like(weight, gradient)
        for optimizer in optimizers:
            step_if(torch.tensor(True), optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumed_equals_uninterrupted(kind, tmp_path):
    """Bit for bit, with weights that have no state yet."""
    model, optimizers = make(kind)
    take_steps(model, optimizers, [0, 1])
    torch.save(OptimizerState(model, optimizers).state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True, mmap=True)
    assert saved["weights"].keys() == dict(model.named_parameters()).keys()
    resumed, others = make(kind)
    resumed.load_state_dict(model.state_dict())
    OptimizerState(resumed, others).load_state_dict(saved)
    for left, right in ((model, optimizers), (resumed, others)):
        take_steps(left, right, [2, 3])
    for name, weight in model.named_parameters():
        assert torch.equal(resumed.get_parameter(name), weight), name
    expected = OptimizerState(model, optimizers).state_dict()
    assert_same_state(OptimizerState(resumed, others).state_dict(), expected)


def assert_same_state(left, right, **tolerance):
    tolerance = tolerance or {"atol": 0.0, "rtol": 0.0}
    assert left["groups"] == right["groups"]
    assert left["weights"].keys() == right["weights"].keys()
    for name, entry in left["weights"].items():
        torch.testing.assert_close(right["weights"][name], entry, **tolerance)


def test_state_without_a_weight_is_refused_when_saving():
    model, optimizers = make("adamw")
    optimizers[0].state["total"] = {"sum": torch.zeros(3)}
    refused(OptimizerState(model, optimizers).state_dict, names="total")


# Sharded over two processes.


def sharded_run(folder, kind):
    """In two sharded processes: steps 0 and 1, or 2 and 3 after loading folder/"state".
    Saves the outcome in folder/"result"."""

    def main(argv):
        world, device = start("cpu")
        model = place(small_model(40), device, shard=True)
        assert is_sharded(model)
        optimizers = OPTIMIZERS[kind](model)
        state = OptimizerState(model, optimizers)
        if (folder / "state").exists():
            weights, saved = torch.load(folder / "state", weights_only=True)
            for name, weight in model.named_parameters():
                weight.data.copy_(part_like(weight, weights[name]))
            state.load_state_dict(saved)
            take_steps(model, optimizers, [2, 3])
        else:
            take_steps(model, optimizers, [0, 1])
        result = (whole_weights(model), state.state_dict())
        if world.is_main:
            torch.save(result, folder / "result")
        stop()

    return in_processes(folder, main, [], count=2)


@pytest.mark.parametrize("kind", ["muon", "adagrad"])
def test_sharded_state_fits_one_process_and_back(kind, tmp_path):
    model, optimizers = make(kind)
    ended = sharded_run(tmp_path, kind)
    assert [code for code, _ in ended] == [0, 0], ended
    weights, saved = torch.load(tmp_path / "result", weights_only=True)
    tied = ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")
    assert len({weights[name].data_ptr() for name in tied}) == 1, "still one tensor"
    take_steps(model, optimizers, [0, 1])
    state = OptimizerState(model, optimizers)
    close = {"atol": 1e-5, "rtol": 1e-4}
    assert_same_state(saved, state.state_dict(), **close)
    model.load_state_dict(weights)  # from two processes to one
    state.load_state_dict(saved)
    torch.save((model.state_dict(), copy.deepcopy(state.state_dict())), tmp_path / "state")
    take_steps(model, optimizers, [2, 3])
    ended = sharded_run(tmp_path, kind)  # and back
    assert [code for code, _ in ended] == [0, 0], ended
    weights, saved = torch.load(tmp_path / "result", weights_only=True)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weights[name], weight.detach(), **close)
    assert_same_state(saved, state.state_dict(), **close)


def test_state_that_cannot_be_sharded_is_refused_by_name(tmp_path):
    """When saving, and when a state from one process is sharded."""
    for _ in ("save", "load"):
        ended = sharded_run(tmp_path, "odd")
        assert [code for code, _ in ended] == [2, 2], ended
        assert all("weight rows 0: cannot be sharded" in told for _, told in ended)
        model, optimizers = make("odd")
        take_steps(model, optimizers, [0])
        state = OptimizerState(model, optimizers).state_dict()
        torch.save((model.state_dict(), state), tmp_path / "state")


# Random states.


def test_another_number_of_processes_starts_from_new_seeds():
    seeds = set()
    for _ in range(2):
        saved = RandomState(CPU, World()).state_dict()
        for rank in range(3):
            RandomState(CPU, World(rank, 3)).load_state_dict(saved)
            seeds.add(torch.initial_seed())
    assert len(seeds) == 6
