"""AdamW with DINO's parameter groups, per-tensor gradient clipping, and clearing of a module's state."""

import torch
from torch import Tensor, nn


def create_optimiser(network: nn.Module) -> torch.optim.AdamW:
    """AdamW in two groups: matrices with weight decay, biases and other one-dimensional parameters without.

    Learning rate and decay are set every step; a group's key "decays" tells whether it takes the decay.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "decays": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decays": False},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)


def set_rates(optimiser: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimiser.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_gradients(network: nn.Module, limit: float) -> Tensor:
    """Scale every parameter's gradient down to norm `limit` (0 = leave it), without reading a norm on the
    host.

    Returns the norm of all gradients together before clipping, a scalar on their device.
    """
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    if limit > 0:
        factors = torch._foreach_div(
            torch._foreach_clamp_max(norms, limit), torch._foreach_clamp_min(norms, 1e-12)
        )
        # A norm within the limit gives exactly 1, so such a gradient is left bit for bit as it was.
        torch._foreach_mul_(gradients, factors)
    return torch.linalg.vector_norm(torch.stack(norms))


def clear_state(optimiser: torch.optim.Optimizer, module: nn.Module) -> None:
    """Forget the moments and step counts of a module's parameters, as if they were new."""
    for parameter in module.parameters():
        optimiser.state.pop(parameter, None)
