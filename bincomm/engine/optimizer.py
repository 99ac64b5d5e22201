"""AdamW with DINO's parameter groups, and clearing of a module's state."""

from typing import Any

import torch
from torch import Tensor, nn


def create_optimizer(network: nn.Module) -> torch.optim.AdamW:
    """AdamW in two groups: matrices with weight decay, biases and other one-dimensional parameters without;
    prototypes, DINO's last layer, are a third.

    Learning rate and decay are set every step; a group's key "decays" tells whether it takes the decay, and
    "frozen", of the prototypes, that it is not to change. It is the fused implementation, because that one
    can leave out a step; see `step_unless`.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    prototypes = [p for name, p in named if name == "head.prototypes"]
    parameters = [p for name, p in named if name != "head.prototypes"]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "decays": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decays": False},
    ]
    if prototypes:
        groups.append({"params": prototypes, "decays": True, "frozen": False})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group.get("frozen") else lr  # which stops the decay, too
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def freeze_last_layer(optimizer: torch.optim.Optimizer, frozen: bool) -> None:
    """From the next step on, leave the prototypes as they are, or train them again; their moments follow the
    gradients all the same. Nothing where there are none."""
    for group in optimizer.param_groups:
        if "frozen" in group:
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
