"""State that fits any number of processes: weights, optimizer state, random states.

A sharded model (FSDP2) has a part of every weight on each process. Saved state is whole, by
parameter name, and split again on load. All processes must call these functions together.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.batch import Loss
from pretrain.errors import UserError
from pretrain.runtime.distributed import World, gather, is_sharded

SHARDING = "cannot be sharded with this optimizer"


def place(model: nn.Module, device: torch.device, shard: bool) -> nn.Module:
    """`model` on `device`; with `shard`, split over the processes layer by layer (FSDP2)."""
    if not shard or not dist.is_initialized():
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh  # slow to import
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.export import register_dataclass

    register_dataclass(Loss)  # FSDP before torch 2.12 finds no gradients in other dataclasses
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in [*model.layers, model]:
        fully_shard(layer, mesh=mesh)
    register_fsdp_forward_method(model, "encode")  # sample predictions call it directly
    return model


def is_part(tensor: Tensor) -> bool:
    """Whether `tensor` is sharded (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def part_like(weight: Tensor, tensor: Tensor) -> Tensor:
    """The whole `tensor`, split like `weight` if that is sharded."""
    if not is_part(weight):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = weight.device_mesh, weight.placements
    return distribute_tensor(tensor.to(weight.device), mesh, placements, src_data_rank=None)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """State dict of `model`; if sharded, it is whole on the main process and empty on others."""
    weights = model.state_dict()
    if not is_sharded(model):
        return weights
    weights = {name: _on_main(weight) for name, weight in weights.items()}
    if dist.get_rank() != 0:
        return {}
    tied = model.all_tied_weights_keys.items()  # one tensor each, not two
    return weights | {name: weights[same] for name, same in tied}


def _on_main(tensor: Tensor) -> Tensor | None:
    gathered = whole(tensor)
    return gathered.cpu() if dist.get_rank() == 0 else None


def map_tensors(change: Callable[[Tensor, str], object], value: object, name: str) -> object:
    """`value` with each tensor in it, at any depth, replaced by `change(tensor, its name)`."""
    if isinstance(value, Tensor):
        return change(value, name)
    if isinstance(value, dict):
        return {key: map_tensors(change, part, f"{name} {key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [map_tensors(change, part, f"{name} {i}") for i, part in enumerate(value)]
        return type(value)(parts)
    return value


class OptimizerState:
    """State of a model's optimizers, of any kind and number, by parameter name. Each weight belongs
    to at most one optimizer; one without state, frozen so far, has an empty entry. Create this
    before the first forward pass, while sharded weights are in place."""

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        names = {weight: name for name, weight in model.named_parameters()}
        self._owned: dict[str, tuple] = {}  # by name: a weight, its optimizer, its group
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    name = names.get(weight)
                    assert name, f"weight {tuple(weight.shape)} is not in the model"
                    assert name not in self._owned, f"{name} belongs to two optimizers"
                    self._owned[name] = (weight, optimizer, group)

    def state_dict(self) -> dict:
        """{"weights": {parameter name: its state}, "groups": [[values of a group] by optimizer]}.
        UserError for state that belongs to no weight or cannot be sharded like its weight."""
        weights, groups = {}, []
        known = {weight for weight, *_ in self._owned.values()}
        for optimizer in self.optimizers:
            groups.append([_without_params(group) for group in optimizer.param_groups])
            for key in optimizer.state.keys() - known:
                raise UserError(f"optimizer state {key}: belongs to no weight; it cannot be saved")
        for name, (weight, optimizer, _) in self._owned.items():
            state = dict(optimizer.state.get(weight, {}))
            weights[name] = map_tensors(partial(_saved, weight), state, name)
        return {"weights": weights, "groups": groups}

    def load_state_dict(self, state: dict) -> None:
        """Restore the result of `state_dict`; raises an error if it does not fit the model."""
        unmatched = state["weights"].keys() ^ self._owned.keys()
        if unmatched:
            raise UserError(f"optimizer state: it or the model has no weight {min(unmatched)}")
        for optimizer, saved_groups in zip(self.optimizers, state["groups"], strict=True):
            for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
                load = partial(_copied, group["params"][0].device)
                group.update(map_tensors(load, _without_params(saved), "group"))
        for name, (weight, optimizer, group) in self._owned.items():
            is_on_device = group.get("fused") or group.get("capturable")
            # Fused kernels do not check shapes: a wrong one would corrupt memory.
            is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)
            for key, value in state["weights"][name].items():
                # As in torch: the step count is on the CPU unless the optimizer is fused.
                device = "cpu" if key == "step" and not is_on_device else weight.device
                load = partial(_loaded, weight, device, is_fused)
                optimizer.state[weight][key] = map_tensors(load, value, f"{name} {key}")


def _without_params(group: dict) -> dict:
    return {key: value for key, value in group.items() if key != "params"}


def _saved(weight: Tensor, tensor: Tensor, name: str) -> Tensor | None:
    if not is_part(weight):
        return tensor
    _check(name, not tensor.ndim or (is_part(tensor) and tensor.shape == weight.shape))
    return _on_main(tensor)


def _loaded(weight: Tensor, device, is_fused: bool, tensor: Tensor, name: str) -> Tensor:
    if is_fused or is_part(weight):
        problem = SHARDING if is_part(weight) else "does not fit the model"
        _check(name, not tensor.ndim or tensor.shape == weight.shape, problem)
    if tensor.ndim and is_part(weight):
        return part_like(weight, tensor)
    return _copied(device, tensor, name)


def _copied(device: torch.device, tensor: Tensor, name: str) -> Tensor:
    return tensor.to(device, copy=True)  # not a view of the mapped file


def _check(name: str, fits: bool, problem: str = SHARDING) -> None:
    if not fits:
        expected = "expected a scalar or the shape of its weight"
        raise UserError(f"optimizer state {name}: {problem}; {expected}")


class RandomState:
    """The random states that dropout draws from, of all processes."""

    def __init__(self, device: torch.device, world: World):
        self._device, self._world = device, world

    def state_dict(self) -> dict[str, list[dict[str, Tensor]]]:
        """The states by rank."""
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return {"processes": gather(states)}

    def load_state_dict(self, state: dict) -> None:
        """Restore this process's state; if the number of processes changed, draw a new seed from
        the state of the first."""
        processes, rank = state["processes"], self._world.rank
        is_same = len(processes) == self._world.size
        states = processes[rank if is_same else 0]
        torch.set_rng_state(states["cpu"])
        if not is_same:
            torch.manual_seed(int(torch.randint(1 << 62, ())) + rank)
        elif self._device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self._device)
