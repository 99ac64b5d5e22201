"""The paper's objective, agreement and coding rate of a student's views, in one node of autograd; its β."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from bincomm.ops import reference
from bincomm.ops.coding_rate import LARGEST_IN_FP32, add_rate_gradient, coding_rate, rate_bounds
from bincomm.ops.library import KERNELS, LIBRARY, define, refuse_tangent, uses_reference
from bincomm.ops.sign_bce import check_pairs, sign_bce

# What β keeps up: the coding rate as a share of its range, and the mean entropy of a bit.
SHARE, ENTROPY = 0.6, 0.9
LEAST, LARGEST = 1e-4, 1e3  # β₀
NEW_SHARE = 0.1  # of a batch in the averages
RISE, FALL = 0.15, 0.03  # of log β₀ at the largest error

CONSTANTS = {  # of the kernel
    **{"SHARE": SHARE, "ENTROPY": ENTROPY, "NEW_SHARE": NEW_SHARE, "RISE": RISE, "FALL": FALL},
    **{"LOG_LEAST": math.log(LEAST), "LOG_LARGEST": math.log(LARGEST)},
}

OPS = torch.ops.bincomm


def discrete_communication(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: Tensor | float,
    eps_squared: float,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """`sign_bce(student, teacher) - β·γ·R`, with R the mean of `coding_rate(student[:U])`.

    The value, and, added, the gradients of these two, without a gradient of the size of all views for the
    rate of some: by autograd alone, three passes over the student's logits, and a kernel for every scalar.

    Args:
        student: (V, n, K) logits.
        teacher: (U, n, K) logits of the student's first U views, or their message.
        beta: β; or the state (3,) of the control that finds it (see `control_beta`).
        eps_squared, group: of `coding_rate`; all ranks have n images.

    Returns:
        The loss, and, without a gradient, (3,): agreement, R and β; with a control (6,), its next state last.

    Raises:
        What the two operations raise.
    """
    check_pairs(student, teacher, "cross")
    bits = student.shape[-1]
    if (
        uses_reference(student)
        or teacher.dtype == torch.float64
        or student.numel() == 0
        or not 0 < bits / LARGEST_IN_FP32 <= eps_squared
        or (isinstance(beta, Tensor) and beta.dtype != torch.float32)
    ):
        agreement = sign_bce(student, teacher)
        rates = coding_rate(student[: len(teacher)], eps_squared=eps_squared, group=group)
        return weigh_rate(
            agreement, agreement, rates, student, beta=beta, eps_squared=eps_squared, group=group
        )
    refuse_tangent("student", student)
    loss, scalars, *_ = OPS.discrete_communication.default(
        student, teacher, *_state_and_beta(beta, student), eps_squared, *_ranks(group)
    )
    return loss, scalars


def control_beta(state: Tensor, share: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """β for a batch, and the next state of its control; see `bincomm.objectives.BetaControl`.

    Args:
        state: (3,): log β₀, and the averages of the next two.
        share: the coding rate as a share of its range, a scalar.
        entropy: the mean entropy of a bit, a scalar.
    """
    averages = state[1:].lerp(torch.stack([share, entropy]).to(state), NEW_SHARE)
    averages = torch.where(averages.isfinite(), averages, state[1:])
    errors = []
    for average, target in zip(averages, (SHARE, ENTROPY), strict=True):
        short = target - average
        errors.append(short / torch.where(short > 0, target, 1 - target))
    error = torch.maximum(*errors)
    log_beta = state[0] + torch.where(error > 0, RISE, FALL) * error
    log_beta = log_beta.clamp(math.log(LEAST), math.log(LARGEST))
    return (log_beta + error).exp(), torch.cat([log_beta.view(1), averages])


def weigh_rate(
    agreement: Tensor,
    cost: Tensor,
    rates: Tensor,
    student: Tensor,
    *,
    beta: Tensor | float,
    eps_squared: float,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """`cost - β·γ·R` and the scalars, as of `discrete_communication`, for any agreement.

    Args:
        agreement: a scalar, which is reported; `cost` is what is made of it.
        rates: (U,), of the student's (V, n, K) first views.
        beta, eps_squared, group: of `discrete_communication`.
    """
    return _weigh(
        cost, agreement, rates, student, *_state_and_beta(beta, student), eps_squared, *_ranks(group)
    )


def _state_and_beta(beta: Tensor | float, student: Tensor) -> tuple[Tensor, float]:
    """The state of a control, or (0,), and β."""
    if isinstance(beta, Tensor):
        if beta.device != student.device:
            raise ValueError(
                f"beta: its control is on {beta.device} and student on {student.device}: move the objective"
            )
        return beta, 0.0
    return student.new_empty(0, dtype=torch.float32), float(beta)


def _ranks(group: "torch.distributed.ProcessGroup | None") -> tuple[str, int]:
    """Name and size of a group of several ranks."""
    return (group.group_name, group.size()) if group is not None and group.size() > 1 else ("", 1)


def _weigh(
    cost: Tensor,
    agreement: Tensor,
    rates: Tensor,
    student: Tensor,
    state: Tensor,
    beta: float,
    eps_squared: float,
    group: str,
    ranks: int,
) -> tuple[Tensor, Tensor]:
    views, images, bits = student[: len(rates)].detach(), student.shape[1] * ranks, student.shape[2]
    rate = rates.mean()
    value = rate.detach()
    weight: Tensor | float = beta
    if len(state):
        least, largest = rate_bounds(images, bits, eps_squared)
        ones = (views > 0).float().sum((0, 1))
        if group:
            ones = reference.SumOverRanks.apply(ones, group)
        p = ones / (len(views) * images)
        entropies = (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)
        entropy = (entropies.mean() + entropy_bias(images)).clamp(max=1)
        weight, state = control_beta(state, (value - least) / (largest - least), entropy)
    loss = cost - weight * balance(bits, images) * rate
    used = weight if isinstance(weight, Tensor) else value.new_full((), weight)
    return loss, torch.cat([torch.stack([agreement.detach(), value, used.to(value)]), state.to(value)])


def balance(bits: int, images: int) -> float:
    """γ = (K + N)/(K·N), the weight that makes the coding rates of different sizes comparable."""
    return (bits + images) / (bits * images)


def entropy_bias(images: int) -> float:
    """By how much the entropy of that many samples is too small on average, in bits (Miller and Madow)."""
    return 1 / (2 * images * math.log(2))


@functools.cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"bincomm.kernels.{name}")


def _agree_on_cuda(student: Tensor, teacher: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    return _kernels("sign_bce").launch_partial_sums(student, teacher, pairs)


def _weigh_on_cuda(
    partial: Tensor,
    rates: Tensor,
    student: Tensor,
    state: Tensor,
    beta: float,
    eps_squared: float,
    group: str,
    ranks: int,
) -> tuple[Tensor, Tensor]:
    views, n, bits = student.shape
    kernels, teachers, images = _kernels("discrete_communication"), len(rates), n * ranks
    ones = student.new_empty((0, bits), dtype=torch.float32)
    if len(state):
        ones = kernels.launch_count_ones(student[:teachers])
        if group:
            ones = reference.SumOverRanks.apply(ones.sum(0, keepdim=True), group)
    least, largest = rate_bounds(images, bits, eps_squared)
    return kernels.launch_weigh_rate(
        *(partial, rates, ones, state),
        scale=1 / _kernels("sign_bce").number_of_terms(views, teachers, n, bits, "cross"),
        messages=teachers * images,
        bias=entropy_bias(images),
        beta=beta,
        balance=balance(bits, images),
        least=least,
        span=largest - least,
        constants=CONSTANTS,
    )


def _weigh_pytorch(agreement: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return _weigh(agreement, agreement, *rest)


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward(
    agree: Callable[..., tuple[Tensor, Tensor]],
    weigh: Callable[..., tuple[Tensor, Tensor]],
    student: Tensor,
    teacher: Tensor,
    state: Tensor,
    beta: float,
    eps_squared: float,
    group: str,
    ranks: int,
) -> Results:
    agreement, messages = agree(student, teacher, "cross")
    rates, factor, reciprocal, images, _, _ = OPS.coding_rate.default(
        student[: len(teacher)], eps_squared, group
    )
    loss, scalars = weigh(agreement, rates, student, state, beta, eps_squared, group, ranks)
    return loss, scalars, messages, factor, reciprocal, images


def _fake(
    student: Tensor, teacher: Tensor, state: Tensor, beta: float, eps_squared: float, group: str, ranks: int
) -> Results:
    loss, messages = OPS.sign_bce.default(student, teacher, "cross")
    _, factor, reciprocal, images, _, _ = OPS.coding_rate.default(student[: len(teacher)], eps_squared, group)
    return loss, loss.new_empty(3 + len(state)), messages, factor, reciprocal, images


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, _, _, ctx.eps_squared, ctx.group, ctx.ranks = inputs
    _, scalars, messages, factor, reciprocal, images = output
    ctx.mark_non_differentiable(scalars, messages, factor, reciprocal, images)
    if teacher.dtype == torch.int32:
        messages = teacher  # it was given as a message, and no other is returned
    ctx.save_for_backward(scalars, student, messages, factor, reciprocal, images)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad is not None:
        gradient = OPS.discrete_communication_backward.default(
            grad, *ctx.saved_tensors, ctx.eps_squared, ctx.group, ctx.ranks
        )
    return gradient, None, None, None, None, None, None


def _gradient(
    grad: Tensor,
    scalars: Tensor,
    student: Tensor,
    messages: Tensor,
    factor: Tensor,
    reciprocal: Tensor,
    images: Tensor,
    eps_squared: float,
    group: str,
    ranks: int,
) -> Tensor:
    gradient = OPS.sign_bce_backward.default(grad, student, messages, "cross")
    teachers, (_, n, bits) = len(messages), student.shape
    weight = -balance(bits, n * ranks) / teachers
    saved = student[:teachers], factor, reciprocal, images
    add_rate_gradient(
        gradient[:teachers], grad.expand(teachers), scalars[2], weight, *saved, eps_squared, group
    )
    return gradient


def _refuse_second_derivative(ctx, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "student: the coding rate has no second derivative; use its definition, by BINCOMM_BACKEND=reference "
        "or logits in fp64"
    )


define(
    "discrete_communication(Tensor student, Tensor teacher, Tensor state, float beta, float eps_squared,"
    " str group, int ranks) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu="C++, BLAS",
    pytorch=functools.partial(_forward, OPS.sign_bce.default, _weigh_pytorch),
    fake=_fake,
)
define(
    "discrete_communication_backward(Tensor grad, Tensor scalars, Tensor student, Tensor messages,"
    " Tensor factor, Tensor reciprocal, Tensor images, float eps_squared, str group, int ranks) -> Tensor",
    cpu=None,
    cuda=None,
    pytorch=_gradient,
    fake=lambda grad, scalars, student, *rest: student.new_empty(student.shape),
)
if importlib.util.find_spec("triton") is not None:
    on_cuda = functools.partial(_forward, _agree_on_cuda, _weigh_on_cuda)
    LIBRARY.impl("discrete_communication", on_cuda, "CUDA")
    KERNELS["discrete_communication"]["cuda"] = "Triton"
torch.library.register_autograd(
    "bincomm::discrete_communication", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "bincomm::discrete_communication_backward", _refuse_second_derivative, lib=LIBRARY
)
