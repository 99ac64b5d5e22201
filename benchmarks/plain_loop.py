"""The same training in plain PyTorch, as in scripts for DINO and similar methods: the peer of our step.

Crops come as a list of batches, a view each. The loss goes through all pairs of views, clipping and the
moving average through all parameters, and numbers are read as they are needed.
"""

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiCrop(nn.Module):
    """Backbone and head on a list of views (n, 3, H, W): -> (V·n, K), crops of one size in one batch."""

    def __init__(self, backbone: Any, hidden: int, bits: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Linear(backbone.num_features, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bits),
        )

    def forward(self, crops: list[Tensor]) -> Tensor:
        features = [
            self.backbone(torch.cat(list(same_size)))
            for _, same_size in groupby(crops, key=lambda crop: crop.shape[-1])
        ]
        return self.head(torch.cat(features))


def create_optimizer(student: nn.Module) -> torch.optim.AdamW:
    """torch's AdamW with its defaults; no weight decay on biases and norms."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in student.parameters():
        (others if parameter.ndim == 1 else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)


def loss_of(student: Tensor, teacher: Tensor, views: int, beta: float, eps_squared: float) -> Tensor:
    """Bits of the teacher (2·n, K) predicted by every other view of the student (V·n, K), less the rate."""
    student_views = student.float().chunk(views)
    teacher_views = teacher.float().chunk(2)

    agreement, pairs = torch.zeros((), device=student.device), 0
    for u, teacher_logits in enumerate(teacher_views):
        message = (teacher_logits > 0).float()
        for v, logits in enumerate(student_views):
            if u == v:
                continue
            agreement += F.binary_cross_entropy_with_logits(logits, message)
            pairs += 1
    agreement = agreement / pairs

    rate = torch.zeros((), device=student.device)
    for logits in student_views[:2]:
        n, bits = logits.shape
        z = F.normalize(logits, dim=-1)
        gram = torch.eye(bits, device=z.device) + bits / (n * eps_squared) * z.T @ z
        rate += torch.linalg.cholesky_ex(gram)[0].diagonal().log().sum()
    rate = rate / 2

    gamma = (bits + n) / (bits * n)
    return agreement - beta * gamma * rate


def clip_gradients(model: nn.Module, limit: float) -> list[float]:
    """Every parameter's gradient down to norm `limit`; the norms before."""
    norms = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm(2)
            norms.append(norm.item())
            factor = limit / (norm + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)
    return norms


class PlainLoop:
    """One training step after another."""

    def __init__(
        self,
        student: MultiCrop,
        teacher: MultiCrop,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        precision: str,
        beta: float,
        eps_squared: float,
        mark: Callable[[str], None] = lambda part: None,
    ):
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.clip, self.beta, self.eps_squared = clip, beta, eps_squared
        self.device = next(student.parameters()).device
        self.autocast = precision == "bf16"
        self.mark = mark  # called at the end of each part, by name

    def __call__(self, crops: list[Tensor], *, lr: float, weight_decay: float, momentum: float) -> float:
        """One step on views (n, 3, H, W), the two global ones first; the loss."""
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = lr
            if index == 0:
                group["weight_decay"] = weight_decay

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                message = self.teacher(crops[:2])
            self.mark("teacher")
            outputs = self.student(crops)
            self.mark("student")

        # In two stages, so that the loss can be timed apart from the network: first to the logits ...
        logits = outputs.detach().requires_grad_()
        loss = loss_of(logits, message, len(crops), self.beta, self.eps_squared)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        self.mark("loss")
        outputs.backward(logits.grad)  # ... then on to the parameters
        self.mark("backward")

        clip_gradients(self.student, self.clip)
        self.mark("clip")
        self.optimizer.step()
        self.mark("optimizer")

        with torch.no_grad():
            for average, current in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                average.mul_(momentum).add_((1 - momentum) * current)
        self.mark("average")
        return loss.item()
