"""Sign-BCE: how well a student's logits predict the signs of a teacher's."""

import torch
from torch import Tensor

from bincomm.ops import reference
from bincomm.ops.library import LIBRARY, define, refuse_tangent, use_triton, uses_reference
from bincomm.ops.messages import check_logits

PAIRS = ("cross", "all", "matched")


def sign_bce(student: Tensor, teacher: Tensor, *, pairs: str = "cross") -> Tensor:
    """Binary cross-entropy between student logits and the teacher's message, averaged over pairs of views.

    `mean over (u, v), images and bits of  softplus(a_v) - m_u·a_v`, with `m = 1[a_teacher > 0]`: the
    agreement term of "Self-Supervised Learning as Discrete Communication" (arXiv 2602.09764). Arithmetic is
    fp32, the targets are never written to memory, and no gradient reaches the teacher.

    Args:
        student: (V, n, K) logits, V views of n images, K bits; fp32, fp16, bf16 or fp64, any strides.
        teacher: (U, n, K) logits, or their message (U, n, ⌈K/32⌉) int32 from `pack_signs`.
        pairs: "cross" pairs every teacher view u with every student view v ≠ u (student views 0…U-1 are the
            teacher's own, so V ≥ U), "all" leaves nothing out, "matched" pairs view v with message v (V = U).

    Returns:
        Scalar, fp32 (fp64 for fp64 logits), in nats per bit: ln 2 ≈ 0.693 for logits of 0.
        NaN logits on either side give NaN, as does n = 0. Sums are fp32: logits of 1e34 or more may give inf.

    Raises:
        TypeError: an argument is not a tensor of the dtypes above.
        ValueError: shapes, devices or `pairs` do not fit.
    """
    check_pairs(student, teacher, pairs)
    if uses_reference(student):
        return reference.sign_bce(student, teacher.detach(), pairs)
    refuse_tangent("student", student)
    if teacher.dtype == torch.float64:  # as fp32 that keep the sign of what would vanish there, and NaN
        teacher = (teacher > 0).to(torch.float32).masked_fill_(teacher.isnan(), torch.nan)
    return torch.ops.bincomm.sign_bce(student, teacher, pairs)[0]


def check_pairs(student: Tensor, teacher: Tensor, pairs: str) -> None:
    """Raise TypeError or ValueError naming the argument unless these are arguments of `sign_bce`."""
    check_logits("student", student)
    if isinstance(teacher, Tensor) and teacher.dtype == torch.int32:
        packed = True
    else:
        packed = False
        check_logits("teacher", teacher)
    if pairs not in PAIRS:
        raise ValueError(f"pairs: expected one of {', '.join(PAIRS)}, got {pairs!r}")
    if student.dim() != 3:
        raise ValueError(f"student: expected shape (V, n, K), got {tuple(student.shape)}")
    views, n, bits = student.shape
    width = (bits + 31) // 32 if packed else bits
    if teacher.dim() != 3 or teacher.shape[1] != n or teacher.shape[2] != width:
        kind = f"messages of {bits} bits" if packed else "logits"
        raise ValueError(f"teacher: expected {kind} of shape (U, {n}, {width}), got {tuple(teacher.shape)}")
    if teacher.device != student.device:
        raise ValueError(f"teacher: expected on {student.device} like student, got {teacher.device}")
    teachers = teacher.shape[0]
    if teachers == 0 or views == 0:
        raise ValueError(
            f"student and teacher: expected at least one view each, got V={views} and U={teachers}"
        )
    if pairs == "matched" and teachers != views:
        raise ValueError(f"teacher: pairs='matched' needs U = V = {views} views, got U={teachers}")
    if pairs == "cross" and (teachers > views or views == 1):
        raise ValueError(f"student: pairs='cross' needs V ≥ max(U, 2) views, got V={views} and U={teachers}")


def sign_bce_pytorch(student: Tensor, teacher: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """Loss and messages in PyTorch."""
    packed = teacher.dtype == torch.int32
    messages = teacher.new_empty(0) if packed else reference.pack_signs(teacher)
    return reference.sign_bce(student, teacher, pairs), messages


def sign_bce_backward_pytorch(grad: Tensor, student: Tensor, messages: Tensor, pairs: str) -> Tensor:
    """`∂loss/∂a_v = (c_v·σ(a_v) - S_v)/(pairs·n·K)`: c_v teachers are paired with v, S_v sums their bits."""
    a = reference.widen(student)
    m = reference.unpack_signs(messages, student.shape[-1]).to(a.dtype)
    teachers_of: list[list[int]] = [[] for _ in student]
    for u, v in reference.paired_views(len(student), len(messages), pairs):
        teachers_of[v].append(u)
    terms = sum(map(len, teachers_of)) * student.shape[1] * student.shape[2]
    rows = [len(us) * a[v].sigmoid() - m[us].sum(0) for v, us in enumerate(teachers_of)]
    return (torch.stack(rows) * (grad / terms)).to(student.dtype)


def _fake(student: Tensor, teacher: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    packed = teacher.dtype == torch.int32
    words = (student.shape[2] + 31) // 32
    shape = (0,) if packed else (teacher.shape[0], student.shape[1], words)
    return student.new_empty((), dtype=torch.float32), student.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, ctx.pairs = inputs
    # Backward recomputes from the logits and the bits; nothing else of the logits' size is saved.
    ctx.save_for_backward(student, teacher if teacher.dtype == torch.int32 else output[1])
    ctx.set_materialize_grads(False)  # no zeros for the message


def _backward(
    ctx, grad_loss: Tensor | None, grad_messages: Tensor | None
) -> tuple[Tensor | None, None, None]:
    if grad_loss is None:
        return None, None, None
    student, messages = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient will be differentiated again
        return sign_bce_backward_pytorch(grad_loss, student, messages, ctx.pairs), None, None
    return torch.ops.bincomm.sign_bce_backward(grad_loss, student, messages, ctx.pairs), None, None


# The first result is the loss, the second the teacher's message, empty if the teacher was given as a message.
define(
    "sign_bce(Tensor student, Tensor teacher, str pairs) -> (Tensor, Tensor)",
    cpu="C++",
    pytorch=sign_bce_pytorch,
    fake=_fake,
)
define(
    "sign_bce_backward(Tensor grad, Tensor student, Tensor messages, str pairs) -> Tensor",
    cpu="C++",
    pytorch=sign_bce_backward_pytorch,
    fake=lambda grad, student, messages, pairs: student.new_empty(student.shape),
)
torch.library.register_autograd("bincomm::sign_bce", _backward, setup_context=_setup_context, lib=LIBRARY)
use_triton("sign_bce", "sign_bce", "launch_sign_bce_forward")
use_triton("sign_bce_backward", "sign_bce", "launch_sign_bce_backward")
