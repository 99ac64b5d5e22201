"""Sign-BCE on the GPU: one read of the logits forward, one read and one write backward.

With c_v the number of teachers paired with view v, S_v the sum of their bits at an element and a the logit,

    loss     = Σ_v [ c_v softplus(a) - S_v a ] / (pairs n K)
    gradient = [ c_v σ(a) - S_v ] / (pairs n K)

evaluated without cancellation through e = exp(-|a|) and the weight w = (a > 0 ? c_v - S_v : S_v):

    c softplus(a) - S a  =  w |a| + c log(1 + e)          c σ(a) - S  =  sgn(a) (w - c e / (1 + e))

A tile is GROUPS groups of eight neighbouring bits, of one byte of the message each. The sum of its teachers'
bits stays in registers and serves all V views. A log costs about twenty instructions, and instructions, not
bandwidth, are what a tile's time goes into: the loss takes one log per group, of Π(1 + e), kept as
p = Π(1 + e) - 1 so that tiny e are not lost.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 4 warps with one group a thread: eight 16-bit logits are one 128-bit load, and 128 groups leave enough
# programs to fill a GPU's multiprocessors at n·K = 128 k already.
GROUPS = 128
WARPS = 4
FINISH = 1024  # partial sums added at once by the second stage

MODES = {"cross": 0, "all": 1, "matched": 2}


def sign_bce_forward(student: Tensor, teacher: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """Loss and message; see `bincomm.sign_bce` for the arguments.

    Args:
        student: (V, n, K) fp32, fp16 or bf16, any strides.
        teacher: (U, n, K) logits of these dtypes, any strides, or (U, n, ⌈K/32⌉) int32 messages.
        pairs: "cross", "all" or "matched".

    Returns:
        The loss, a scalar in fp32 (NaN without images), and the teacher's message (U, n, ⌈K/32⌉) int32, empty
        where the teacher came as one.
    """
    (views, n, bits), teachers = student.shape, teacher.shape[0]
    words = triton.cdiv(bits, 32)
    packed = teacher.dtype == torch.int32
    messages = student.new_empty(0 if packed else (teachers, n, words), dtype=torch.int32)
    source = teacher.contiguous() if packed else teacher
    programs = _programs(n, words)
    # Fixed order, so the same sum every time: a partial sum a program, added up by one program. No atomics.
    partial = student.new_empty(programs, dtype=torch.float32)
    loss = student.new_empty((), dtype=torch.float32)
    with torch.cuda.device_of(student):
        if programs:
            _forward[(programs,)](
                student,
                source.view(torch.uint8) if packed else source,
                messages.view(torch.uint8),
                partial,
                *(views, n, *student.stride(), *source.stride()),
                **{"K": bits, "U": teachers, "MODE": MODES[pairs], "PACKED": packed},
                **{"BLOCK": GROUPS, "num_warps": WARPS},
            )
        _finish[(1,)](
            partial, loss, programs, 1 / max(1, _terms(views, teachers, n, bits, pairs)), n, BLOCK=FINISH
        )
    return loss, messages


def sign_bce_backward(grad: Tensor, student: Tensor, messages: Tensor, pairs: str) -> Tensor:
    """Gradient of the student's logits, (V, n, K) contiguous in their dtype.

    Args:
        grad: gradient of the loss, a scalar in fp32 on the device; it is read there.
        student: the logits of the forward pass.
        messages: the teacher's (U, n, ⌈K/32⌉) int32.
        pairs: as in the forward pass.
    """
    (views, n, bits), teachers = student.shape, messages.shape[0]
    words = triton.cdiv(bits, 32)
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    programs = _programs(n, words)
    if programs:
        with torch.cuda.device_of(student):
            _backward[(programs,)](
                student,
                messages.contiguous().view(torch.uint8),
                grad,
                gradient,
                *(views, n, *student.stride()),
                1 / _terms(views, teachers, n, bits, pairs),
                **{"K": bits, "U": teachers, "MODE": MODES[pairs], "BLOCK": GROUPS, "num_warps": WARPS},
            )
    return gradient


def _programs(n: int, words: int) -> int:
    groups = 4 * n * words
    if groups >= 2**31:
        raise ValueError(f"student: n = {n} images of {32 * words} bits exceed the 2³⁴ bits a view may have")
    return triton.cdiv(groups, GROUPS)


def _terms(views: int, teachers: int, n: int, bits: int, pairs: str) -> int:
    count = {"cross": teachers * (views - 1), "all": teachers * views, "matched": views}[pairs]
    return count * n * bits


@triton.jit
def _place(n, K: tl.constexpr, BLOCK: tl.constexpr):
    """This program's groups: image (BLOCK, 1), bits (BLOCK, 8), byte of the message (BLOCK, 1), and masks.

    Groups are counted in 32 bits, where division is cheap; what is multiplied by a stride is 64 bits wide.
    """
    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    image = (group // BYTES).to(tl.int64)
    bit = (group % BYTES) * 8 + tl.arange(0, 8)[None, :]
    inside = group < n * BYTES
    mask = inside & (bit < K) if K % 32 else inside & (bit >= 0)
    return image, bit.to(tl.int64), group.to(tl.int64), inside, mask


@triton.jit
def _wide(index):
    """An index 64 bits wide, so that its product with a stride may pass 2³¹."""
    return tl.zeros((), tl.int64) + index


@triton.jit
def _bits_of_byte(messages, u: tl.constexpr, n, group, inside, K: tl.constexpr):
    """Bits of teacher u as fp32 (BLOCK, 8)."""
    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    byte = tl.load(messages + _wide(u) * n * BYTES + group, mask=inside, other=0).to(tl.int32)
    return ((byte >> tl.arange(0, 8)[None, :]) & 1).to(tl.float32)


@triton.jit
def _teacher_bits(
    teacher, u: tl.constexpr, n, place, view, group, inside, mask, K: tl.constexpr, PACKED: tl.constexpr
):
    """Bits of teacher u as fp32 (BLOCK, 8), from its message or its logits.

    A NaN stays a NaN: a teacher that has diverged must show in the loss.
    """
    if PACKED:
        bits = _bits_of_byte(teacher, u, n, group, inside, K)
    else:
        t = tl.load(teacher + _wide(u) * view + place, mask=mask, other=0).to(tl.float32)
        bits = tl.where(t == t, (t > 0).to(tl.float32), t)
    return bits


@triton.jit
def _logits(pointers, mask):
    """A tile of logits in fp32; what lies outside is -inf, which adds nothing to a loss with no bits set."""
    return tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _chain(p, q):
    """(1 + p)(1 + q) - 1."""
    return p + q + p * q


@triton.jit
def _loss(a, s, c):
    """Σ over the eight logits of a group of c softplus(a) - s a: (BLOCK, 8) -> (BLOCK,)."""
    magnitude = tl.abs(a)
    e = tl.exp(-magnitude)
    w = tl.where(a > 0, c - s, s)
    linear = tl.where(
        w == 0, 0.0, w * magnitude
    )  # an infinite logit on its own side costs nothing, not 0 · inf
    p = tl.reduce(e, 1, _chain)
    u = 1 + p
    # log(1 + p), with the rounding of 1 + p divided out again (Higham, Accuracy and Stability, 1.14.1).
    log = tl.where(u == 1, p, tl.log(u) * (p / (u - 1)))
    return tl.sum(linear, 1) + c * log


@triton.jit
def _gradient(a, s, c):
    e = tl.exp(-tl.abs(a))
    w = tl.where(a > 0, c - s, s)
    g = w - c * (e / (1 + e))
    return tl.where(a > 0, g, -g)


@triton.jit
def _forward(
    student,
    teacher,
    messages,
    partial,
    views,
    n,
    student_view,
    student_image,
    student_bit,
    teacher_view,
    teacher_image,
    teacher_bit,
    K: tl.constexpr,
    U: tl.constexpr,
    MODE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, bit, group, inside, mask = _place(n, K, BLOCK)
    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    row = student + image * student_image + bit * student_bit

    place = image * teacher_image + bit * teacher_bit
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, 8), tl.float32)
    for u in tl.static_range(U):
        bits = _teacher_bits(teacher, u, n, place, teacher_view, group, inside, mask, K, PACKED)
        sums += bits
        if not PACKED:
            byte = tl.sum((bits > 0).to(tl.int32) << tl.arange(0, 8)[None, :], 1, keep_dims=True)
            tl.store(messages + _wide(u) * n * BYTES + group, byte.to(tl.uint8), mask=inside)
        if MODE == 2:
            total += _loss(_logits(row + _wide(u) * student_view, mask), bits, 1.0)
    if MODE == 0 and U > 1:
        # The teacher's own views hear the others only. Their bits are read again, not kept: there may be
        # more than fit in registers.
        for u in tl.static_range(U):
            bits = _teacher_bits(teacher, u, n, place, teacher_view, group, inside, mask, K, PACKED)
            total += _loss(_logits(row + _wide(u) * student_view, mask), sums - bits, U - 1.0)
    if MODE != 2:
        FIRST: tl.constexpr = U if MODE == 0 else 0
        for v in range(FIRST, views):
            total += _loss(_logits(row + _wide(v) * student_view, mask), sums, U * 1.0)
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _finish(partial, loss, programs, scale, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(partial + index, mask=index < programs, other=0.0)
    result = tl.sum(total, 0) * scale
    tl.store(loss, tl.where(n == 0, float("nan"), result))


@triton.jit
def _backward(
    student,
    messages,
    grad,
    gradient,
    views,
    n,
    student_view,
    student_image,
    student_bit,
    inverse_terms,
    K: tl.constexpr,
    U: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, bit, group, inside, mask = _place(n, K, BLOCK)
    row = student + image * student_image + bit * student_bit
    out = gradient + image * K + bit
    out_view = _wide(K) * n
    scale = (
        tl.load(grad) * inverse_terms
    )  # in fp32, before the one rounding: scaled first, fp16 would underflow

    sums = tl.zeros((BLOCK, 8), tl.float32)
    for u in tl.static_range(U):
        bits = _bits_of_byte(messages, u, n, group, inside, K)
        sums += bits
        if MODE == 2:
            g = _gradient(_logits(row + _wide(u) * student_view, mask), bits, 1.0) * scale
            tl.store(out + _wide(u) * out_view, g.to(gradient.dtype.element_ty), mask=mask)
    if MODE == 0:
        for u in tl.static_range(U):
            bits = _bits_of_byte(messages, u, n, group, inside, K)
            g = _gradient(_logits(row + _wide(u) * student_view, mask), sums - bits, U - 1.0) * scale
            tl.store(out + _wide(u) * out_view, g.to(gradient.dtype.element_ty), mask=mask)
    if MODE != 2:
        FIRST: tl.constexpr = U if MODE == 0 else 0
        for v in range(FIRST, views):
            g = _gradient(_logits(row + _wide(v) * student_view, mask), sums, U * 1.0) * scale
            tl.store(out + _wide(v) * out_view, g.to(gradient.dtype.element_ty), mask=mask)
