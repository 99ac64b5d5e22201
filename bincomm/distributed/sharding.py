"""Parameters that are split over the ranks (FSDP2): splitting, gathering and loading them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from bincomm.distributed.ranks import Ranks


def shard(network: nn.Module, ranks: Ranks) -> None:
    """Split a network's parameters over all ranks, block by block where its backbone has blocks."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in getattr(network.backbone, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def gather_tensors(tree: Any, keep: bool = True) -> Any:
    """A copy on the CPU of nested values, their tensors put together from all ranks, which all must call.
    Ranks that do not keep it get None for every tensor: where one writes, the others spare the memory."""

    def copy(tensor: Tensor) -> Tensor | None:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.detach().to("cpu", copy=True) if keep else None

    return tree_map_only(Tensor, copy, tree)


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor that all ranks have, split over them as another one is."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def load_sharded(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole weights into a network, whose parameters may be split over the ranks."""
    current = network.state_dict()
    network.load_state_dict({name: shard_like(value, current[name]) for name, value in state.items()})


def load_sharded_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a whole state into an optimizer, whose parameters may be split over the ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        model = parameters[number]
        for name, value in values.items():
            if value.shape == model.shape and value.dim():
                values[name] = shard_like(value, model)
    optimizer.load_state_dict(state)
