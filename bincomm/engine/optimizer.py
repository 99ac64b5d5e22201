"""AdamW with DINO's parameter groups, and clearing of a module's state."""

from typing import Any

import torch
from torch import Tensor, nn


def create_optimizer(network: nn.Module, backbone_apart: bool = False) -> torch.optim.AdamW:
    """AdamW in two groups: matrices with weight decay, biases and other one-dimensional parameters without;
    prototypes, DINO's last layer, are a third. With `backbone_apart` the backbone has two groups of its own.

    Learning rate and decay are set every step; a group's key "decays" tells whether it takes the decay, and
    "frozen", of the prototypes and of a backbone apart, that it is not to change. It is the fused
    implementation, because that one can leave out a step; see `step_unless`.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    prototypes = [p for name, p in named if name == "head.prototypes"]
    apart = [p for name, p in named if backbone_apart and name.startswith("backbone.")]
    others = {id(p) for p in (*prototypes, *apart)}
    groups = in_two([p for _, p in named if id(p) not in others])
    if prototypes:
        groups.append({"params": prototypes, "decays": True, "frozen": False})
    if apart:
        groups += [{**group, "frozen": False, "backbone": True} for group in in_two(apart)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def in_two(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of parameters with and without weight decay."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "decays": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decays": False},
    ]


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group.get("frozen") else lr  # which stops the decay, too
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def freeze_last_layer(optimizer: torch.optim.Optimizer, frozen: bool) -> None:
    """From the next step on, leave the prototypes as they are, or train them again; their moments follow the
    gradients all the same. Nothing where there are none."""
    for group in optimizer.param_groups:
        if "frozen" in group and "backbone" not in group:
            group["frozen"] = frozen


def freeze_backbone(optimizer: torch.optim.Optimizer, frozen: bool) -> None:
    """From the next step on, leave the backbone as it is, or train it again, as `freeze_last_layer` does with
    the prototypes. Nothing where it is not apart."""
    for group in optimizer.param_groups:
        if "backbone" in group:
            group["frozen"] = frozen


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step, or where `skip`, 0 or 1 on the device, is 1 leave parameters and moments as they are."""
    # Fused optimizers read these two attributes; torch.amp.GradScaler sets them in the same way.
    optimizer.found_inf, optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
    optimizer.step()


def clear_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Forget the moments and step counts of a module's parameters, as if they were new."""
    for parameter in module.parameters():
        optimizer.state.pop(parameter, None)
