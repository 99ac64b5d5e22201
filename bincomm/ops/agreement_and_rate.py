"""Agreement and coding rate of a student's views, with one gradient for both."""

import torch
from torch import Tensor

from bincomm.ops.coding_rate import LARGEST_IN_FP32, coding_rate, rate_gradient
from bincomm.ops.library import LIBRARY, define, refuse_tangent, uses_reference
from bincomm.ops.sign_bce import check_pairs, sign_bce

OPS = torch.ops.bincomm


def agreement_and_rate(
    student: Tensor,
    teacher: Tensor,
    *,
    eps_squared: float,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """`sign_bce(student, teacher)` and `coding_rate(student[:U])`.

    The values and, added, the gradients of these two, which in this form are computed without a gradient of
    the size of all views for the rate of some: by autograd alone, three passes over the student's logits.

    Args:
        student: (V, n, K) logits.
        teacher: (U, n, K) logits of the student's first U views, or their message.
        eps_squared, group: of `coding_rate`.

    Returns:
        The agreement, a scalar, in nats per bit, and the rates (U,) in nats.

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
    ):
        views = student[: len(teacher)]
        return sign_bce(student, teacher), coding_rate(views, eps_squared=eps_squared, group=group)
    refuse_tangent("student", student)
    name = group.group_name if group is not None and group.size() > 1 else ""
    agreement, rates, *_ = OPS.agreement_and_rate.default(student, teacher, eps_squared, name)
    return agreement, rates


def _forward(
    student: Tensor, teacher: Tensor, eps_squared: float, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    agreement, messages = OPS.sign_bce.default(student, teacher, "cross")
    rates, factor, reciprocal, images, _, _ = OPS.coding_rate.default(
        student[: len(teacher)], eps_squared, group
    )
    return agreement, rates, messages, factor, reciprocal, images


def _fake(
    student: Tensor, teacher: Tensor, eps_squared: float, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(student, teacher, eps_squared, group)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, ctx.eps_squared, ctx.group = inputs
    _, _, messages, factor, reciprocal, images = output
    ctx.mark_non_differentiable(messages, factor, reciprocal, images)
    if teacher.dtype == torch.int32:
        messages = teacher  # it was given as a message, and no other is returned
    ctx.save_for_backward(student, messages, factor, reciprocal, images)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_agreement: Tensor | None, grad_rates: Tensor | None, *_: Tensor | None):
    student, messages, *rest = ctx.saved_tensors
    if grad_agreement is None:  # of no use for the loss
        grad_agreement = student.new_zeros((), dtype=torch.float32)
    if grad_rates is None:
        grad_rates = student.new_zeros(len(messages), dtype=torch.float32)
    gradient = OPS.agreement_and_rate_backward.default(
        grad_agreement, grad_rates, student, messages, *rest, ctx.eps_squared, ctx.group
    )
    return gradient, None, None, None


def _gradient(
    grad_agreement: Tensor,
    grad_rates: Tensor,
    student: Tensor,
    messages: Tensor,
    factor: Tensor,
    reciprocal: Tensor,
    images: Tensor,
    eps_squared: float,
    group: str,
) -> Tensor:
    gradient = OPS.sign_bce_backward.default(grad_agreement, student, messages, "cross")
    views = slice(len(messages))
    gradient[views] += rate_gradient(
        grad_rates, student[views], factor, reciprocal, images, eps_squared, group
    )
    return gradient


def _refuse_second_derivative(ctx, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "student: the coding rate has no second derivative; use its definition, by BINCOMM_BACKEND=reference "
        "or logits in fp64"
    )


define(
    "agreement_and_rate(Tensor student, Tensor teacher, float eps_squared, str group)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=None,
    cuda=None,
    pytorch=_forward,
    fake=_fake,
)
define(
    "agreement_and_rate_backward(Tensor grad_agreement, Tensor grad_rates, Tensor student, Tensor messages,"
    " Tensor factor, Tensor reciprocal, Tensor images, float eps_squared, str group) -> Tensor",
    cpu=None,
    cuda=None,
    pytorch=_gradient,
    fake=lambda grad_agreement, grad_rates, student, *rest: student.new_empty(student.shape),
)
torch.library.register_autograd(
    "bincomm::agreement_and_rate", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "bincomm::agreement_and_rate_backward", _refuse_second_derivative, lib=LIBRARY
)
