"""Training objectives, one signature for all: student and teacher outputs -> a dict of scalars.

Outputs are views first, (V, n, K) and (U, n, K), and the teacher's views are the student's first U: a pair
(u, v) is a teacher's view and another view of the student, u ≠ v, and there are `U·(V-1)` of them. The dict
has the keys of the objective's `scalars`, in their order: "loss", which alone has a gradient, and its parts.
`outputs_are_bits` says whether the signs of the K outputs are a code that is worth monitoring, and
`predicts_bits` whether the sigmoid of a student's output is its probability of the teacher's bit.

Arithmetic is fp32 (fp64 for fp64 outputs) for every dtype and under autocast; no gradient reaches the
teacher. NaN in the outputs, of the student or of the teacher, gives a loss that is NaN. Finite outputs of any
size give neither NaN nor a wrong loss, with two limits: hard agreement sums in fp32, and may be infinite from
outputs of 1e34 on; `DINO`, whose scores are at most 1 from a `PrototypeHead`, divides them by temperatures
and sums them, which holds up to 1e30. Of rows of nearly zero the gradient of a cosine may be too large for
fp16, and is infinite there.

If torch.distributed is initialized, every rank must call with the same number of images, and gradients must
be averaged over the ranks, as DistributedDataParallel does: the objective is then that of all ranks' images
and does not depend on the number of ranks.
"""

import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bincomm.ops import reference
from bincomm.ops.coding_rate import coding_rate
from bincomm.ops.discrete_communication import (
    ENTROPY,
    SHARE,
    balance,
    control_beta,
    discrete_communication,
    weigh_rate,
)
from bincomm.ops.messages import check_logits
from bincomm.ops.sign_bce import sign_bce

AGREEMENTS = ("hard", "soft", "cosine")


class BetaControl(nn.Module):
    """Finds β, the weight of the coding rate, while training: as small as keeps the channel in use.

    The right β depends on the batch, the number of bits, the size of the logits and the stage of the
    training. Two quantities say whether the channel is in use: the coding rate as a share of its range, from
    that of equal rows to its ceiling, and the mean entropy of the bits in a batch. Neither alone does:
    balanced bits may all be the same one, and rows may be spread around a common mean that makes every bit
    nearly constant. Each, averaged over some ten steps, is compared with its target; the worse one counts:

        e = (target - x)/target where x is below it, (target - x)/(1 - target) above, so from -1 to 1
        log β₀ ← log β₀ + 0.15·e where e > 0, + 0.03·e else, because bits die sooner than they are revived
        β = β₀·exp(e)

    A channel that has collapsed comes back: the gradient of the rate vanishes with the spread of the rows,
    but β₀ grows a thousandfold in fifty steps. Its limits hold however long a target is out of reach.

    Everything happens on the device, without a sync. The buffer `state` holds log β₀ and the two averages. It
    is part of the state of training, only ever changed in place, and the same on all ranks, because both
    quantities are those of the images of all ranks.
    """

    START = 0.1  # β₀
    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.tensor([math.log(self.START), SHARE, ENTROPY]))

    @torch.no_grad()
    def forward(self, share: Tensor, entropy: Tensor) -> Tensor:
        """Share and entropy of a batch, scalars from 0 to 1 -> β for this batch; in training mode the state
        follows. What is not finite is passed over."""
        beta, state = control_beta(self.state, share, entropy)
        self.follow(state)
        return beta

    def follow(self, state: Tensor) -> None:
        """In training mode, take the next state."""
        if self.training:
            self.state.copy_(state)


class DiscreteCommunication(nn.Module):
    """The paper's objective: predict the teacher's bits, and keep the channel in use.

    `L = agreement - β·γ·R` with `γ = (K + N)/(K·N)`: `agreement` is `sign_bce` over all pairs of different
    views, `R` the `coding_rate` of the student's views that the teacher sees too, averaged over them, N the
    number of images of all ranks ("Self-Supervised Learning as Discrete Communication", arXiv 2602.09764; γ
    and ε² as in SimDINO, arXiv 2502.10385).

    Args:
        beta: β. Too small and every bit becomes constant, too large and nothing is transmitted. "auto": by
            `BetaControl`; the objective then has a state, and its gradient is that of L with β held.
        eps_squared: ε² of the coding rate.
        agreement: what the student predicts; the last two are the paper's ablations:
            "hard", the teacher's bits `m = 1[a > 0]`: binary cross-entropy, in nats per bit;
            "soft", `σ(a/τ)` in place of the bits, binary cross-entropy likewise;
            "cosine", the bits as ±1: mean cosine of a student's logits and `2m - 1`, in [-1, 1]. It is
            maximized: `L = -agreement - β·γ·R`.
        tau: τ of the soft targets; the others do not use it.
    """

    scalars = ("loss", "agreement", "rate", "beta")
    outputs_are_bits = True

    def __init__(
        self,
        beta: float | Literal["auto"] = "auto",
        eps_squared: float = 0.05,
        *,
        agreement: str = "hard",
        tau: float = 0.1,
    ):
        super().__init__()
        if beta != "auto" and (isinstance(beta, str) or not beta >= 0):
            raise ValueError(f"beta: expected a number ≥ 0 or 'auto', got {beta!r}")
        if agreement not in AGREEMENTS:
            raise ValueError(f"agreement: expected one of {', '.join(AGREEMENTS)}, got {agreement!r}")
        check_positive("eps_squared", eps_squared)
        check_positive("tau", tau)
        self.beta: float | str = beta if isinstance(beta, str) else float(beta)
        self.control = BetaControl() if beta == "auto" else None
        self.eps_squared = eps_squared
        self.agreement = agreement
        self.tau = tau
        self.predicts_bits = agreement != "cosine"

    def extra_repr(self) -> str:
        values = f"beta={self.beta!r}, eps_squared={self.eps_squared}, agreement={self.agreement!r}"
        return values + (f", tau={self.tau}" if self.agreement == "soft" else "")

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Student (V, n, K) and teacher (U, n, K) logits -> loss, agreement, rate (nats), beta."""
        group = all_ranks()
        beta = float(self.beta) if self.control is None else self.control.state
        if self.agreement == "hard":
            loss, scalars = discrete_communication(
                student, teacher, beta=beta, eps_squared=self.eps_squared, group=group
            )
        else:
            if self.agreement == "soft":
                agreement = cost = soft_bce(student, teacher, self.tau)
            else:
                agreement = cosine_to_signs(student, teacher)
                cost = -agreement
            rates = coding_rate(student[: len(teacher)], eps_squared=self.eps_squared, group=group)
            loss, scalars = weigh_rate(
                agreement, cost, rates, student, beta=beta, eps_squared=self.eps_squared, group=group
            )
        if self.control is not None:
            self.control.follow(scalars[3:])
        return dict(zip(self.scalars, (loss, *scalars[:3]), strict=True))


class DenseCommunication(nn.Module):
    """The paper's objective for images, and beside it the same for patches that the student does not see.

    `L = L_images + w·(agreement_p - β_p·γ·R_p)`: `agreement_p` is `sign_bce` of the student's logits of
    masked patches against the bits of the teacher's patches at the same places ("iBOT", arXiv 2111.07832, of
    whose prototypes bits take the place), over all of them. `R_p` is the mean `coding_rate` of SAMPLE masked
    patches of each image, each over the N images of all ranks: it costs what that of the images' two views
    does, however many patches there are, and as it is of as many images and bits, γ and the control of β hold
    for it, too. β_p is `images.beta`, or found by a control of its own where that is "auto".

    Args:
        images: the objective of the images.
        weight: w.
    """

    SAMPLE = 2
    scalars = (*DiscreteCommunication.scalars, "dense_agreement", "dense_rate", "dense_beta")
    outputs_are_bits = True

    def __init__(self, images: DiscreteCommunication, weight: float):
        super().__init__()
        check_positive("weight", weight)
        self.images = images
        self.weight = weight
        self.control = None if images.control is None else BetaControl()
        self.predicts_bits = images.predicts_bits

    def extra_repr(self) -> str:
        return f"weight={self.weight}"

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Student (V + M, n, K) and teacher (2 + M, n, K) logits, of V and of 2 views and then of M masked
        patches of each image -> loss, agreement, rate (nats), beta, and the last three of the patches."""
        patches = len(teacher) - 2
        if patches < 1 or len(student) < len(teacher):
            raise ValueError(
                "student and teacher: expected logits of views and patches, (V + M, n, K) and (2 + M, n, K), "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        of_views, of_patches = student.split([len(student) - patches, patches])
        losses = self.images(of_views, teacher[:2])
        agreement = sign_bce(of_patches.flatten(0, 1)[None], teacher[2:].flatten(0, 1)[None], pairs="matched")
        group, sample = all_ranks(), of_patches[: self.SAMPLE]
        eps_squared = self.images.eps_squared
        cost, scalars = weigh_rate(
            agreement,
            agreement,
            coding_rate(sample, eps_squared=eps_squared, group=group),
            sample,
            beta=float(self.images.beta) if self.control is None else self.control.state,
            eps_squared=eps_squared,
            group=group,
        )
        if self.control is not None:
            self.control.follow(scalars[3:])
        losses["loss"] = losses["loss"] + self.weight * cost
        return losses | dict(zip(self.scalars[4:], scalars[:3], strict=True))


class SimDINO(nn.Module):
    """SimDINO's objective: agree with the teacher in direction, and keep the directions spread.

    `L = -agreement - γ·R` with `γ = (K + N)/(K·N)`: `agreement` is the mean cosine of student and teacher
    outputs over all pairs of different views, in [-1, 1], maximized; `R = ½ logdet(I + α zᵀz)`,
    `α = K/(N·ε²)`, averaged over the views of both, N the number of images of all ranks ("Simplifying
    DINO via Coding Rate Regularization", arXiv 2502.10385).

    Args:
        eps_squared: ε² of the coding rate; SimDINO's argument `eps` is this square.
        expa_type: which rows z are. 1, SimDINO's default: the average of the normalized student and teacher
            outputs of a view, no longer of unit length. 0: the student's normalized outputs, as in
            `DiscreteCommunication`.
    """

    scalars = ("loss", "agreement", "rate")
    outputs_are_bits = True
    predicts_bits = False

    def __init__(self, eps_squared: float = 0.05, *, expa_type: int = 1):
        super().__init__()
        check_positive("eps_squared", eps_squared)
        if expa_type not in (0, 1):
            raise ValueError(f"expa_type: expected 0 or 1, got {expa_type!r}")
        self.eps_squared = eps_squared
        self.expa_type = expa_type

    def extra_repr(self) -> str:
        return f"eps_squared={self.eps_squared}, expa_type={self.expa_type}"

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Student (V, n, K) and teacher (U, n, K) outputs -> loss, agreement, rate (nats)."""
        check_views(student, teacher)
        student_rows, teacher_rows = reference.unit_rows(student), reference.unit_rows(teacher.detach())
        agreement = mean_over_pairs(student_rows, teacher_rows)
        group = all_ranks()
        if self.expa_type == 0:
            rate = coding_rate(student[: len(teacher)], eps_squared=self.eps_squared, group=group).mean()
        else:
            rows = (student_rows[: len(teacher)] + teacher_rows) / 2
            rate = rate_of_rows(rows, self.eps_squared, group).mean()
        return {
            "loss": -agreement - balance(student.shape[-1], number_of_images(student, group)) * rate,
            "agreement": agreement.detach(),
            "rate": rate.detach(),
        }


class DINO(nn.Module):
    """DINO's objective: predict which of P prototypes the teacher sees, its scores centered and sharpened.

    `L = -Σ_p softmax((t_u - c)/τ_t)_p · log softmax(s_v/τ_s)_p`, averaged over all pairs of different views
    and images, in nats ("Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294). In
    training mode the center c follows, after the loss, the teacher's scores:
    `c ← m·c + (1-m)·mean of t over views, images and ranks`.

    Args:
        prototypes: P, the number of scores.
        student_temperature: τ_s.
        teacher_temperature: τ_t, smaller, because centering flattens and this sharpens.
        center_momentum: m.

    The center (P,) is the buffer `center`: part of the state to be saved, and only ever changed in place.
    """

    scalars = ("loss",)
    outputs_are_bits = False
    predicts_bits = False
    center: Tensor

    def __init__(
        self,
        prototypes: int,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
    ):
        super().__init__()
        if prototypes < 1:
            raise ValueError(f"prototypes: expected a number ≥ 1, got {prototypes}")
        check_positive("student_temperature", student_temperature)
        check_positive("teacher_temperature", teacher_temperature)
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum: expected a number from 0 to 1, got {center_momentum}")
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(prototypes))

    def extra_repr(self) -> str:
        return (
            f"prototypes={len(self.center)}, student_temperature={self.student_temperature}, "
            f"teacher_temperature={self.teacher_temperature}, center_momentum={self.center_momentum}"
        )

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Student (V, n, P) and teacher (U, n, P) scores -> loss."""
        check_views(student, teacher)
        if student.shape[-1] != len(self.center):
            raise ValueError(
                f"student: expected scores of {len(self.center)} prototypes, got shape {tuple(student.shape)}"
            )
        scores = reference.widen(teacher.detach())
        targets = ((scores - self.center) / self.teacher_temperature).softmax(-1)
        predictions = (reference.widen(student) / self.student_temperature).log_softmax(-1)
        loss = -mean_over_pairs(predictions, targets)
        if self.training:
            self._update_center(scores)
        return {"loss": loss}

    def _update_center(self, scores: Tensor) -> None:
        mean = scores.mean((0, 1))
        group = all_ranks()
        if group is not None:
            dist.all_reduce(mean, group=group)
            mean /= group.size()
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)


def soft_bce(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Mean over pairs, images and bits of the cross-entropy `-t·log σ(a) - (1-t)·log σ(-a)` between
    `t = σ(a_teacher/τ)` and the student's logits: (V, n, K) and (U, n, K) -> scalar, nats per bit."""
    check_views(student, teacher)
    a, b = reference.widen(student), reference.widen(teacher.detach()) / tau
    # Divided before they are added: a sum of large logits may be infinite where their mean is not.
    share = 1 / (len(teacher) * len(student) * student[0].numel())
    ones = mean_over_pairs(F.logsigmoid(a) * share, b.sigmoid())
    zeros = mean_over_pairs(F.logsigmoid(-a) * share, (-b).sigmoid())
    return -(ones + zeros) * (len(teacher) * len(student) * student.shape[1])


def cosine_to_signs(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over pairs and images of the cosine of the student's logits and the teacher's bits as ±1:
    (V, n, K) and (U, n, K) -> scalar."""
    check_views(student, teacher)
    b = reference.widen(teacher.detach())
    signs = torch.where(b > 0, 1.0, -1.0).to(b.dtype).masked_fill(b.isnan(), torch.nan)
    return mean_over_pairs(reference.unit_rows(student), signs) / math.sqrt(student.shape[-1])


def mean_over_pairs(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over pairs (u, v), u ≠ v, and images of the product `⟨x_v, y_u⟩`: (V, n, K), (U, n, K) -> scalar.

    In one pass, `Σ_v ⟨x_v, Σ_{u≠v} y_u⟩`: a view that the teacher has too is multiplied by the sum of all
    teachers but its own, the sum of the other views by the sum of all. No intermediate result is larger than
    the student's views.
    """
    views, teachers, n = len(student), len(teacher), student.shape[1]
    total = teacher.sum(0)
    both, rest = student.split([teachers, views - teachers])
    products = (both * (total - teacher)).sum() + (rest.sum(0) * total).sum()
    return products / (teachers * (views - 1) * n)


def rate_of_rows(rows: Tensor, eps_squared: float, group: "dist.ProcessGroup | None") -> Tensor:
    """`coding_rate` of rows of any length, which are not normalized: (V, n, K) -> (V,), nats.

    By the definition, in fp64, so that pivots of 1 are 1 for every precision set for matrix products.
    """
    of_images = group is None and rows.shape[-2] < rows.shape[-1]  # the smaller of two equal determinants
    matrix, _ = reference.regularized_gram(rows.double(), eps_squared, group, of_images, normalize=False)
    return reference.half_logdet(matrix).to(rows.dtype)


def number_of_images(views: Tensor, group: "dist.ProcessGroup | None") -> int:
    """N, of all ranks."""
    return views.shape[1] * (1 if group is None else group.size())


def all_ranks() -> "dist.ProcessGroup | None":
    """The group of all ranks; None if there is only one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def check_positive(argument: str, value: float) -> None:
    """Raise ValueError naming the argument unless the number is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{argument}: expected a number > 0, got {value}")


def check_views(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError or TypeError naming the argument unless these are outputs (V, n, K) and (U, n, K)."""
    check_logits("student", student)
    check_logits("teacher", teacher)
    if student.dim() != 3 or len(student) < 2 or 0 in student.shape:
        raise ValueError(
            f"student: expected shape (V, n, K) with V ≥ 2 and n, K ≥ 1, got {tuple(student.shape)}"
        )
    views, n, outputs = student.shape
    if teacher.dim() != 3 or teacher.shape[1:] != student.shape[1:] or not 1 <= len(teacher) <= views:
        raise ValueError(
            f"teacher: expected shape (U, {n}, {outputs}) with 1 ≤ U ≤ {views}, got {tuple(teacher.shape)}"
        )
    if teacher.device != student.device:
        raise ValueError(f"teacher: expected on {student.device} like student, got {teacher.device}")
