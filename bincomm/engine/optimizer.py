"""AdamW with DINO's parameter groups, and clearing of a module's state."""

import torch
from torch import Tensor, nn


def create_optimizer(network: nn.Module) -> torch.optim.AdamW:
    """AdamW in two groups: matrices with weight decay, biases and other one-dimensional parameters without.

    Learning rate and decay are set every step; a group's key "decays" tells whether it takes the decay. It is
    the fused implementation, because that one can leave out a step; see `step_unless`.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "decays": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decays": False},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step, or where `skip`, 0 or 1 on the device, is 1 leave parameters and moments as they are."""
    # Fused optimizers read these two attributes; torch.amp.GradScaler sets them in the same way.
    optimizer.found_inf, optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
    optimizer.step()


def clear_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Forget the moments and step counts of a module's parameters, as if they were new."""
    for parameter in module.parameters():
        optimizer.state.pop(parameter, None)
