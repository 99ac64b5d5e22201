"""Sign-BCE on the GPU: one read of the logits forward, one read and one write backward.

With c_v the number of teachers paired with view v, S_v the sum of their bits at an element and a the logit,

    loss     = Σ_v [ c_v softplus(a) - S_v a ] / (pairs n K)
    gradient = [ c_v σ(a) - S_v ] / (pairs n K)

A tile is BLOCK groups of eight neighboring bits, of one byte of the message each. Its teachers are read once
and kept as bytes. Instructions, not bandwidth, are what a tile's time would go into: the loop over the views
that hear all teachers does nothing that can be done before or after it.

Forward, with e = exp(-|a|), nothing in the loop depends on the teachers, and S is needed only after it:

    Σ_v [ c softplus(a) - S a ]  =  (c - S) Σ_v max(a, 0) + S Σ_v max(-a, 0) + c log Π_v (1 + e)

No term is negative, so small losses are not differences of large ones. The product is kept as Π(1 + e) - 1,
so that tiny e are not lost; a factor is at most 2, so that one log serves many logits.

Backward, S makes three constants of an element, scaled by the loss's gradient, before the loop:

    scale (c σ(a) - S)  =  base + k / (1 + exp(-a))        with base = -S scale, k = c scale
                        =         -k / (1 + exp(a))        where S = c
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch constants, chosen by counting on the compiled code.
WARPS = 4  # small programs: at n·K = 128 k there are as many as a GPU has multiprocessors
# Bytes of a view that a thread loads at once, the most there is. With two views under way and at most 64
# registers a thread, a multiprocessor waits for 32 KB or more; an H200 needs 23 KB to keep its memory busy.
LOAD = 16
FINISH, FINISH_WARPS = 4096, 8  # partial sums a step of the second stage: each step costs a memory's latency
VIEWS = tl.constexpr(14)  # that share a log: even, and Π(1 + e) <= 2⁸ a view stays finite in fp32

MODES = {"cross": 0, "all": 1, "matched": 2}
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
    block = _groups(student.dtype)
    programs = _programs(n, words, block)
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
                **{"BLOCK": block, "num_warps": WARPS},
            )
        scale = 1 / max(1, _terms(views, teachers, n, bits, pairs))
        _finish[(1,)](partial, loss, programs, scale, n, BLOCK=FINISH, num_warps=FINISH_WARPS)
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
    block = _groups(student.dtype)
    programs = _programs(n, words, block)
    if programs:
        with torch.cuda.device_of(student):
            _backward[(programs,)](
                student,
                messages.contiguous().view(torch.uint8),
                grad,
                gradient,
                *(views, n, *student.stride()),
                1 / _terms(views, teachers, n, bits, pairs),
                **{"K": bits, "U": teachers, "MODE": MODES[pairs]},
                **{"BLOCK": block, "num_warps": WARPS},
            )
    return gradient


def _groups(dtype: torch.dtype) -> int:
    """Groups of a program."""
    return 32 * WARPS * LOAD // (8 * dtype.itemsize)


def _programs(n: int, words: int, block: int) -> int:
    groups = 4 * n * words
    if groups >= 2**31:
        raise ValueError(f"student: n = {n} images of {32 * words} bits exceed the 2³⁴ bits a view may have")
    return triton.cdiv(groups, block)


def _terms(views: int, teachers: int, n: int, bits: int, pairs: str) -> int:
    count = {"cross": teachers * (views - 1), "all": teachers * views, "matched": views}[pairs]
    return count * n * bits


@triton.jit
def _wide(index):
    """An index 64 bits wide, so that its product with a stride may pass 2³¹."""
    return tl.zeros((), tl.int64) + index


@triton.jit
def _exp2(x):
    """2ˣ in one instruction; tl.exp2 takes four more to keep results below 2⁻¹²⁶, which here become 0.

    The gradient adds 1 to it. In the loss it is e: a logit beyond ±87 on its own side costs 0, not 1e-38.
    """
    if INTERPRETED:
        power = tl.exp2(x)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return power


@triton.jit
def _inverse(x):
    """1 / x for 1 <= x <= inf in one instruction, to one unit in the last place; 0 for x > 2¹²⁶."""
    if INTERPRETED:
        inverse = 1 / x
    else:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return inverse


@triton.jit
def _place(n, K: tl.constexpr, BLOCK: tl.constexpr):
    """This program's groups: image (BLOCK, 1), bits (BLOCK, 8), byte of the message (BLOCK, 1), and masks.

    What lies outside repeats the last group or bit: only sums and stores need a mask, and no load.
    Groups are counted in 32 bits, where division is cheap; what is multiplied by a stride is 64 bits wide.
    """
    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    inside = group < n * BYTES
    group = tl.minimum(group, n * BYTES - 1)
    bit = (group % BYTES) * 8 + tl.arange(0, 8)[None, :]
    mask = inside & (bit < K)
    if K % 32:
        bit = tl.minimum(bit, K - 1)
    return (group // BYTES).to(tl.int64), bit.to(tl.int64), group.to(tl.int64), inside, mask


@triton.jit
def _bits(byte):
    """Bytes of a message (BLOCK, 1) as bits in fp32 (BLOCK, 8)."""
    return ((byte.to(tl.int32) >> tl.arange(0, 8)[None, :]) & 1).to(tl.float32)


@triton.jit
def _sum_of_bits(kept, U: tl.constexpr):
    sums = _bits(kept[0])
    for u in tl.static_range(1, U):
        sums += _bits(kept[u])
    return sums


@triton.jit
def _chain(p, q):
    """(1 + p)(1 + q) - 1."""
    return tl.fma(p, q, p + q)


@triton.jit
def _extend(p, a):
    """Π(1 + e) - 1 with the factors of the logits a."""
    return _chain(p, _exp2(tl.abs(a) * -LOG2_E))


@triton.jit
def _log(p, mask):
    """Σ log(1 + p) over the eight bits of a group, (BLOCK, 8) -> (BLOCK,)."""
    p = tl.reduce(tl.where(mask, p, 0.0), 1, _chain)
    u = 1 + p
    # The rounding of 1 + p is divided out again (Higham, Accuracy and Stability, 1.14.1).
    return tl.where(u == 1, p, tl.log(u) * (p / (u - 1)))


@triton.jit
def _times(w, x):
    """w x with 0 · inf = 0: an infinite logit on its own side costs nothing."""
    return tl.where(w == 0, 0.0, w * x)


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
    place = image * student_image + bit * student_bit
    zero = tl.zeros((BLOCK, 8), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)

    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    source = group if PACKED else image * teacher_image + bit * teacher_bit
    # In fp32, for of a sum of integers the compiler would keep the eight bits in registers, not their byte.
    power = (1 << tl.arange(0, 8)[None, :]).to(tl.float32)
    kept = ()
    for u in tl.static_range(U):
        if PACKED:
            byte = tl.load(teacher + _wide(u) * n * BYTES + source)
        else:
            t = tl.load(teacher + _wide(u) * teacher_view + source).to(tl.float32)
            byte = tl.sum(tl.where((t > 0) & mask, power, 0.0), 1, keep_dims=True).to(tl.int32)
            total += tl.sum(tl.where(t == t, 0.0, t), 1)  # a teacher that has diverged must show in the loss
        kept += (byte,)
    if not PACKED:
        for u in tl.static_range(U):  # after the loads of all teachers, for none is moved across a store
            tl.store(messages + _wide(u) * n * BYTES + group, kept[u].to(tl.uint8), mask=inside)

    # The views that hear all teachers. Then the teachers' own, which hear the others, or only their own.
    OWN: tl.constexpr = 0 if MODE == 1 else U
    if MODE != 2:
        up, down = zero, zero
        row = student + _wide(OWN) * student_view
        for first in range(OWN, views, VIEWS):
            p = zero
            # Unrolled, two views' loads are under way at once. Loading a view ahead is not the same: the
            # compiler would unpack 16-bit logits, so wait for them, before it goes round.
            for _ in tl.range(first, tl.minimum(first + VIEWS, views), loop_unroll_factor=2):
                a = tl.load(row + place).to(tl.float32)
                row += student_view
                p = _extend(p, a)
                up += tl.maximum(a, 0.0)
                down -= tl.minimum(a, 0.0)
            total += U * _log(p, mask)
        sums = _sum_of_bits(kept, U)
        total += tl.sum(tl.where(mask, _times(U - sums, up) + _times(sums, down), 0.0), 1)
    HEARD: tl.constexpr = 1 if MODE == 2 else U - 1
    if OWN and HEARD:
        for first in tl.static_range(0, U, VIEWS):
            p = zero
            for u in tl.static_range(first, min(first + VIEWS, U)):
                s = _bits(kept[u])
                if MODE == 0:
                    s = _sum_of_bits(kept, U) - s
                a = tl.load(student + _wide(u) * student_view + place).to(tl.float32)
                p = _extend(p, a)
                linear = _times(tl.where(a > 0, HEARD - s, s), tl.abs(a))
                total += tl.sum(tl.where(mask, linear, 0.0), 1)
            total += HEARD * _log(p, mask)
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
def _constants(s, c, scale):
    """(base, k, m) of scale (c σ(a) - s) = base + k / (1 + exp2(m a)).

    Where all teachers agree, base is 0, so that a small gradient is not the difference of large numbers.
    The scale is in fp32, before the one rounding: a gradient scaled later would underflow in fp16.
    """
    return (
        tl.where(s == c, 0.0, -scale * s),
        tl.where(s == c, -scale * c, scale * c),
        tl.where(s == c, LOG2_E, -LOG2_E),
    )


@triton.jit
def _gradient(a, base, k, m):
    return (base + k * _inverse(1 + _exp2(m * a.to(tl.float32)))).to(a.dtype)


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
    image, bit, group, _, mask = _place(n, K, BLOCK)
    place = image * student_image + bit * student_bit
    out = image * K + bit
    out_view = _wide(K) * n
    scale = tl.load(grad) * inverse_terms

    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    kept = ()
    for u in tl.static_range(U):
        kept += (tl.load(messages + _wide(u) * n * BYTES + group),)

    OWN: tl.constexpr = 0 if MODE == 1 else U
    HEARD: tl.constexpr = 1 if MODE == 2 else U - 1
    # Every load stands before the stores it can be put before, for none is moved across a store.
    if OWN:
        a = tl.load(student + place)
    for u in tl.static_range(OWN):
        s = _bits(kept[u])
        if MODE == 0:
            s = _sum_of_bits(kept, U) - s
        base, k, m = _constants(s, HEARD, scale)
        g = _gradient(a, base, k, m)
        if u + 1 < OWN:
            a = tl.load(student + _wide(u + 1) * student_view + place)
        tl.store(gradient + _wide(u) * out_view + out, g, mask=mask)
    if MODE != 2:
        base, k, m = _constants(_sum_of_bits(kept, U), U, scale)
        row = student + _wide(OWN) * student_view
        to = gradient + OWN * out_view
        for v in range(OWN, views, 2):
            a = tl.load(row + place)
            row += student_view
            b = tl.load(row + place, mask=v + 1 < views)
            row += student_view
            tl.store(to + out, _gradient(a, base, k, m), mask=mask)
            to += out_view
            tl.store(to + out, _gradient(b, base, k, m), mask=mask & (v + 1 < views))
            to += out_view
