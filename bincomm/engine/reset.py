"""The head is drawn anew during a run."""

import torch

from bincomm.building import hash_seed
from bincomm.engine.optimizer import clear_state
from bincomm.networks import Network


def reset_head(
    student: Network, teacher: Network, optimizer: torch.optim.Optimizer, seed: tuple[int, int]
) -> None:
    """Draw the head anew, the same for student and teacher, and clear the optimizer's state of it."""
    # Every rank draws it, on the CPU: the same numbers for all.
    for head in (student.head, teacher.head):
        head.reset(torch.Generator().manual_seed(hash_seed(*seed)))
    clear_state(optimizer, student.head)
