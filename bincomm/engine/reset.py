"""Re-initialization of the head during a run."""

import torch

from bincomm.building import hash_seed
from bincomm.engine.optimizer import clear_state
from bincomm.networks import Network


def reset_head(
    student: Network, teacher: Network, optimizer: torch.optim.Optimizer, seed: tuple[int, int]
) -> None:
    """Re-initialize the heads, equally for student and teacher, and clear the optimizer's state of them."""
    # Drawn on the CPU, from the same seed on every rank.
    for network in (student, teacher):
        generator = torch.Generator().manual_seed(hash_seed(*seed))
        for head in network.heads:
            head.reset(generator)
    for head in student.heads:
        clear_state(optimizer, head)
