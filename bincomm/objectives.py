"""Training objectives. Each maps student and teacher logits to a dict of scalars with the key "loss"."""

import torch.distributed as dist
from torch import Tensor, nn

from bincomm.ops.coding_rate import coding_rate
from bincomm.ops.sign_bce import sign_bce


class DiscreteCommunication(nn.Module):
    """The paper's objective: predict the teacher's bits, and keep the channel in use.

    `L = agreement - β·γ·R` with `γ = (K + n)/(K·n)`: `agreement` is `sign_bce` over all pairs of different
    views, `R` the `coding_rate` of the student's views that the teacher sees too, averaged over them
    ("Self-Supervised Learning as Discrete Communication", arXiv 2602.09764; γ and ε² as in SimDINO, arXiv
    2502.10385).

    Args:
        beta: β. Too small and every bit becomes constant, too large and nothing is transmitted.
        eps_squared: ε² of the coding rate.

    Where torch.distributed is initialised, the rate is that of all ranks' images and n in γ their number, so
    the objective depends on the whole batch and not on how many ranks share it. Every rank must call it, all
    with equally many images, and gradients be averaged over the ranks, as DistributedDataParallel does.
    """

    def __init__(self, beta: float = 0.1, eps_squared: float = 0.05):
        super().__init__()
        if not beta >= 0:
            raise ValueError(f"beta: expected a number ≥ 0, got {beta}")
        self.beta = beta
        self.eps_squared = eps_squared

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Student (V, n, K) and teacher (U, n, K) logits -> loss, agreement, rate (nats)."""
        agreement = sign_bce(student, teacher)
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        rate = coding_rate(student[: len(teacher)], eps_squared=self.eps_squared, group=group).mean()
        n, bits = student.shape[1:]
        n *= 1 if group is None else group.size()
        gamma = (bits + n) / (bits * n)
        return {
            "loss": agreement - self.beta * gamma * rate,
            "agreement": agreement.detach(),
            "rate": rate.detach(),
        }
