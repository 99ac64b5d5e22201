"""Sign-BCE on the GPU: one read of the logits forward, one read and one write backward.

With c_v the number of teachers paired with view v, S_v the sum of their bits at an element and a the logit,

    loss     = Σ_v [ c_v softplus(a) - S_v a ] / (pairs n K)
    gradient = [ c_v σ(a) - S_v ] / (pairs n K)

A tile is BLOCK groups of eight neighboring bits, each one byte of the message. Its teachers are read once and
kept as bytes. A tile would be limited by instructions, not by bandwidth. Therefore the loop over the views
that are paired with all teachers does nothing that can be done before or after it.

Forward, with e = exp(-|a|), nothing in the loop depends on the teachers, and S is needed only after it:

    Σ_v [ c softplus(a) - S a ]  =  (c - S) Σ_v max(a, 0) + S Σ_v max(-a, 0) + c log Π_v (1 + e)

No term is negative, so small losses are not differences of large ones. The product is kept as Π(1 + e) - 1,
so that tiny e are not lost; a factor is at most 2, so one log serves many logits.

Backward, three constants of an element, scaled by the loss's gradient, are computed from S before the loop:

    scale (c σ(a) - S)  =  base + k / (1 + exp(-a))        with base = -S scale, k = c scale
                        =         -k / (1 + exp(a))        where S = c
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch constants, chosen by counting on the compiled code.
WARPS = 4  # of a program, at most
FEWEST_PROGRAMS = 512  # if possible, so that every multiprocessor has some
# Bytes of a view that a thread loads at once, the largest load there is. With loads of three views in flight
# and at most 64 registers per thread, a multiprocessor has 48 KB or more in flight; an H200 needs 23 KB to
# keep its memory busy.
LOAD_BYTES = 16
REDUCE_BLOCK = 4096  # partial sums per step of the reduction: each step costs a memory latency
REDUCE_WARPS = 8
VIEWS_IN_FLIGHT = tl.constexpr(3)  # views whose logits are loaded at once
# A multiple of those, and Π(1 + e), at most 2⁸ per view, stays finite in fp32 also with the rest.
VIEWS_PER_LOG = tl.constexpr(12)

MODES = {"cross": 0, "all": 1, "matched": 2}
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def launch_sign_bce_forward(student: Tensor, teacher: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """Loss and message; see `bincomm.sign_bce` for the arguments.

    Args:
        student: (V, n, K) fp32, fp16 or bf16, any strides.
        teacher: (U, n, K) logits of these dtypes, any strides, or (U, n, ⌈K/32⌉) int32 messages.
        pairs: "cross", "all" or "matched".

    Returns:
        The loss, a scalar in fp32 (NaN without images), and the teacher's message (U, n, ⌈K/32⌉) int32, which
        is empty if the teacher was given as a message.
    """
    partial, messages = launch_partial_sums(student, teacher, pairs)
    (views, n, bits), teachers = student.shape, teacher.shape[0]
    loss = student.new_empty((), dtype=torch.float32)
    scale = 1 / max(1, number_of_terms(views, teachers, n, bits, pairs))
    with torch.cuda.device_of(student):
        sign_bce_reduce_kernel[(1,)](
            partial, loss, len(partial), scale, n, BLOCK=REDUCE_BLOCK, num_warps=REDUCE_WARPS
        )
    return loss, messages


def launch_partial_sums(student: Tensor, teacher: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """As `launch_sign_bce_forward`, but instead of the loss the programs' sums of terms, (programs,) fp32.

    They are to be added up in a fixed order, so that the loss is the same every time; atomics have none.
    """
    (views, n, bits), teachers = student.shape, teacher.shape[0]
    words = triton.cdiv(bits, 32)
    packed = teacher.dtype == torch.int32
    messages = student.new_empty(0 if packed else (teachers, n, words), dtype=torch.int32)
    source = teacher.contiguous() if packed else teacher
    programs, block, warps = _programs(n, words, student.dtype)
    partial = student.new_empty(programs, dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(student):
            sign_bce_forward_kernel[(programs,)](
                student,
                source.view(torch.uint8) if packed else source,
                messages.view(torch.uint8),
                partial,
                *(views, n, *student.stride(), *source.stride()),
                **{"K": bits, "U": teachers, "MODE": MODES[pairs], "PACKED": packed},
                **{"REST": _number_of_shared_views(views, teachers, pairs) % VIEWS_IN_FLIGHT.value},
                **{"BLOCK": block, "num_warps": warps},
            )
    return partial, messages


def launch_sign_bce_backward(grad: Tensor, student: Tensor, messages: Tensor, pairs: str) -> Tensor:
    """Gradient of the student's logits, (V, n, K) contiguous in their dtype.

    Args:
        grad: gradient of the loss, a scalar in fp32 on the device; it is read by the kernel only.
        student: the logits of the forward pass.
        messages: the teacher's (U, n, ⌈K/32⌉) int32.
        pairs: as in the forward pass.
    """
    (views, n, bits), teachers = student.shape, messages.shape[0]
    words = triton.cdiv(bits, 32)
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    programs, block, warps = _programs(n, words, student.dtype)
    if programs:
        with torch.cuda.device_of(student):
            sign_bce_backward_kernel[(programs,)](
                student,
                messages.contiguous().view(torch.uint8),
                grad,
                gradient,
                *(views, n, *student.stride()),
                1 / number_of_terms(views, teachers, n, bits, pairs),
                **{"K": bits, "U": teachers, "MODE": MODES[pairs]},
                **{"BLOCK": block, "num_warps": warps},
            )
    return gradient


def groups_per_program(dtype: torch.dtype, warps: int = WARPS) -> int:
    """Groups of eight bits that one program processes: one load per thread."""
    return 32 * warps * LOAD_BYTES // (8 * dtype.itemsize)


def _programs(n: int, words: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """How many programs there are, their groups of eight bits, and their warps."""
    groups = 4 * n * words
    if groups >= 2**31:
        raise ValueError(f"student: n = {n} images of {32 * words} bits exceed the 2³⁴ bits a view may have")
    warps = WARPS
    while warps > 1 and groups < FEWEST_PROGRAMS * groups_per_program(dtype, warps):
        warps //= 2
    block = groups_per_program(dtype, warps)
    return triton.cdiv(groups, block), block, warps


def _number_of_shared_views(views: int, teachers: int, pairs: str) -> int:
    """Of the views that are paired with all teachers."""
    return {"cross": views - teachers, "all": views, "matched": 0}[pairs]


def number_of_terms(views: int, teachers: int, n: int, bits: int, pairs: str) -> int:
    """How many terms the loss is the mean of: pairs of views, images and bits."""
    count = {"cross": teachers * (views - 1), "all": teachers * views, "matched": views}[pairs]
    return count * n * bits


@triton.jit
def _to_int64(index):
    """An index as 64-bit integer, so that its product with a stride may exceed 2³¹."""
    return tl.zeros((), tl.int64) + index


@triton.jit
def _exp2(x):
    """2ˣ in one instruction; tl.exp2 needs four more to keep results below 2⁻¹²⁶, which become 0 here.

    The gradient adds 1 to it. In the loss it is e: a correct logit beyond ±87 costs 0, not 1e-38.
    """
    if INTERPRETED:
        power = tl.exp2(x)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return power


@triton.jit
def _reciprocal(x):
    """1 / x for 1 <= x <= inf in one instruction, to one unit in the last place; 0 for x > 2¹²⁶."""
    if INTERPRETED:
        inverse = 1 / x
    else:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return inverse


@triton.jit
def _group_indices(n, K: tl.constexpr, BLOCK: tl.constexpr):
    """This program's groups: image (BLOCK, 1), bits (BLOCK, 8), byte of the message (BLOCK, 1), and masks.

    Indices beyond the end repeat the last group or bit: only sums and stores need a mask, loads need none.
    Groups are counted in 32 bits, where division is cheap; indices multiplied by a stride have 64 bits.
    """
    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    group_mask = group < n * BYTES
    group = tl.minimum(group, n * BYTES - 1)
    bit = (group % BYTES) * 8 + tl.arange(0, 8)[None, :]
    mask = group_mask & (bit < K)
    if K % 32:
        bit = tl.minimum(bit, K - 1)
    return (group // BYTES).to(tl.int64), bit.to(tl.int64), group.to(tl.int64), group_mask, mask


@triton.jit
def _unpack_bits(byte):
    """Bytes of a message (BLOCK, 1) as bits in fp32 (BLOCK, 8)."""
    return ((byte.to(tl.int32) >> tl.arange(0, 8)[None, :]) & 1).to(tl.float32)


@triton.jit
def _sum_of_bits(teacher_bytes, U: tl.constexpr):
    sums = _unpack_bits(teacher_bytes[0])
    for u in tl.static_range(1, U):
        sums += _unpack_bits(teacher_bytes[u])
    return sums


@triton.jit
def _combine_products(p, q):
    """(1 + p)(1 + q) - 1."""
    return tl.fma(p, q, p + q)


@triton.jit
def _multiply_factors(p, a):
    """Π(1 + e) - 1 with the factors of the logits a."""
    return _combine_products(p, _exp2(tl.abs(a) * -LOG2_E))


@triton.jit
def _add_view(p, positive, negative, a):
    """Π(1 + e) - 1, Σ max(a, 0) and Σ max(-a, 0) with the logits a of one more view."""
    return _multiply_factors(p, a), positive + tl.maximum(a, 0.0), negative - tl.minimum(a, 0.0)


@triton.jit
def _inside(x, mask, K: tl.constexpr):
    """Where a group may have bits beyond K, whether x and inside."""
    if K % 32:
        x = x & mask
    return x


@triton.jit
def _inside_or_0(x, mask, K: tl.constexpr):
    """Where a group may have bits beyond K, 0 there."""
    if K % 32:
        x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def _log_of_product(p, mask, K: tl.constexpr):
    """Σ log(1 + p) over the eight bits of a group, (BLOCK, 8) -> (BLOCK,)."""
    p = tl.reduce(_inside_or_0(p, mask, K), 1, _combine_products)
    u = 1 + p
    # Corrects the rounding of 1 + p (Higham, Accuracy and Stability, 1.14.1).
    return tl.where(u == 1, p, tl.log(u) * (p / (u - 1)))


@triton.jit
def _multiply(w, x):
    """w x with 0 · inf = 0: an infinite logit with the correct sign costs nothing."""
    return tl.where(w == 0, 0.0, w * x)


@triton.jit
def _zero_bits(n, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros (BLOCK, 8) of a dtype. The compiler does not know that they are, as n might be negative."""
    bits: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    zero = (n >> 31).to(bits) + tl.zeros((BLOCK, 8), bits)
    return zero.to(dtype, bitcast=True)


@triton.jit
def _and(x, y, z):
    """x & y & z, bit by bit."""
    if INTERPRETED:
        return x
    return _bitwise("lop3.b32 $0, $1, $2, $3, 0x80;", x, y, z)


@triton.jit
def _or_and(x, y, z):
    """x | (y & z), bit by bit."""
    if INTERPRETED:
        return x
    return _bitwise("lop3.b32 $0, $1, $2, $3, 0xf8;", x, y, z)


@triton.jit
def _bitwise(instruction: tl.constexpr, x, y, z):
    """One instruction for 32 bits of x, y and z."""
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise(
        instruction, "=r,r,r,r", [x, y, z], dtype=x.dtype, is_pure=True, pack=PACK
    )


@triton.jit
def _nan_or_0(t):
    """For each group NaN if one of its logits is, else 0: (BLOCK, 8) -> (BLOCK,)."""
    largest = tl.reduce(tl.abs(t), 1, _largest)
    return tl.where(largest == largest, 0.0, largest)


@triton.jit
def _largest(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign_bce_forward_kernel(
    student_ptr,
    teacher_ptr,
    messages_ptr,
    partial_ptr,
    views,
    n,
    stride_student_view,
    stride_student_image,
    stride_student_bit,
    stride_teacher_view,
    stride_teacher_image,
    stride_teacher_bit,
    K: tl.constexpr,
    U: tl.constexpr,
    MODE: tl.constexpr,
    PACKED: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A partial sum of the loss, not yet divided by the number of terms, and unless PACKED the messages."""
    image, bit, group, group_mask, mask = _group_indices(n, K, BLOCK)
    offset = image * stride_student_image + bit * stride_student_bit
    zero = tl.zeros((BLOCK, 8), tl.float32)
    zero_bits = _zero_bits(n, student_ptr.dtype.element_ty, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)

    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    source = group if PACKED else image * stride_teacher_image + bit * stride_teacher_bit
    # In fp32, because of a sum of integers the compiler would keep eight bits in registers, not one byte.
    power = (1 << tl.arange(0, 8)[None, :]).to(tl.float32)
    teacher_bytes = ()
    for u in tl.static_range(U):
        if PACKED:
            byte = tl.load(teacher_ptr + _to_int64(u) * n * BYTES + source)
        else:
            t = tl.load(teacher_ptr + _to_int64(u) * stride_teacher_view + source).to(tl.float32)
            byte = tl.sum(tl.where(_inside(t > 0, mask, K), power, 0.0), 1, keep_dims=True).to(tl.int32)
            total += _nan_or_0(t)  # a NaN of the teacher must show in the loss
        teacher_bytes += (byte,)  # type: ignore[assignment]  # unrolled: each has its own type
    if not PACKED:
        for u in tl.static_range(U):  # after all teachers' loads: the compiler moves no load across a store
            tl.store(
                messages_ptr + _to_int64(u) * n * BYTES + group,
                teacher_bytes[u].to(tl.uint8),
                mask=group_mask,
            )

    # First the views that are paired with all teachers. Then the teachers' own views, which are paired with
    # the other teachers or, if matched, only with their own.
    OWN_VIEWS: tl.constexpr = 0 if MODE == 1 else U
    if MODE != 2:
        p, positive, negative = zero, zero, zero
        view_ptr = student_ptr + _to_int64(OWN_VIEWS) * stride_student_view
        for first in range(OWN_VIEWS, views - REST, VIEWS_PER_LOG):
            if first > OWN_VIEWS:
                total += U * _log_of_product(p, mask, K)
                p = zero
            for _ in range(first, tl.minimum(first + VIEWS_PER_LOG, views - REST), VIEWS_IN_FLIGHT):
                # Loads of three views are to be in flight at once, but the compiler would unpack the logits
                # of one, so wait for them, before it loads the next ones. Therefore each depends on all
                # three, by bits that are 0.
                logits = ()
                for _v in tl.static_range(VIEWS_IN_FLIGHT):
                    logits += (tl.load(view_ptr + offset),)  # type: ignore[assignment]
                    view_ptr += stride_student_view
                common = _and(logits[0], logits[1], logits[2])  # type: ignore[misc]  # unrolled
                for v in tl.static_range(VIEWS_IN_FLIGHT):
                    a = _or_and(logits[v], common, zero_bits).to(tl.float32)
                    p, positive, negative = _add_view(p, positive, negative, a)
        logits = ()
        for _v in tl.static_range(REST):
            logits += (tl.load(view_ptr + offset),)  # type: ignore[assignment]
            view_ptr += stride_student_view
        for v in tl.static_range(REST):
            p, positive, negative = _add_view(p, positive, negative, logits[v].to(tl.float32))
        total += U * _log_of_product(p, mask, K)
        sums = _sum_of_bits(teacher_bytes, U)
        linear = _multiply(U - sums, positive) + _multiply(sums, negative)
        total += tl.sum(_inside_or_0(linear, mask, K), 1)
    OWN_TEACHERS: tl.constexpr = 1 if MODE == 2 else U - 1
    if OWN_VIEWS and OWN_TEACHERS:
        for first in tl.static_range(0, U, VIEWS_PER_LOG):
            p = zero
            for start in tl.static_range(first, min(first + VIEWS_PER_LOG, U), VIEWS_IN_FLIGHT):
                logits = ()
                for u in tl.static_range(start, min(start + VIEWS_IN_FLIGHT, U)):
                    a = tl.load(student_ptr + _to_int64(u) * stride_student_view + offset)
                    logits += (a,)  # type: ignore[assignment]
                for u in tl.static_range(start, min(start + VIEWS_IN_FLIGHT, U)):
                    s = _unpack_bits(teacher_bytes[u])
                    if MODE == 0:
                        s = _sum_of_bits(teacher_bytes, U) - s
                    a = logits[u - start].to(tl.float32)
                    p = _multiply_factors(p, a)
                    if OWN_TEACHERS == 1:  # max(-a, 0) if the bit is 1, else max(a, 0)
                        linear = tl.maximum(tl.where(s > 0, -a, a), 0.0)
                    else:
                        linear = _multiply(tl.where(a > 0, OWN_TEACHERS - s, s), tl.abs(a))
                    total += tl.sum(_inside_or_0(linear, mask, K), 1)
            total += OWN_TEACHERS * _log_of_product(p, mask, K)
    total = tl.where(tl.reshape(group_mask, (BLOCK,)), total, 0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def sign_bce_reduce_kernel(partial_ptr, loss_ptr, programs, scale, n, BLOCK: tl.constexpr):
    """The loss from the programs' partial sums."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + index, mask=index < programs, other=0.0)
    result = tl.sum(total, 0) * scale
    tl.store(loss_ptr, tl.where(n == 0, float("nan"), result))


@triton.jit
def _gradient_constants(s, c, scale):
    """(base, k, m) of scale (c σ(a) - s) = base + k / (1 + exp2(m a)).

    Where all teachers agree on a 1, base is 0, so that a small gradient is no difference of large numbers.
    The scale is applied in fp32, before the only rounding: a gradient scaled later would underflow in fp16.
    """
    return (
        tl.where(s == c, 0.0, -scale * s),
        tl.where(s == c, -scale * c, scale * c),
        tl.where(s == c, LOG2_E, -LOG2_E),
    )


@triton.jit
def _gradient(a, base, k, m):
    return (base + k * _reciprocal(1 + _exp2(m * a.to(tl.float32)))).to(a.dtype)


@triton.jit
def sign_bce_backward_kernel(
    student_ptr,
    messages_ptr,
    grad_ptr,
    gradient_ptr,
    views,
    n,
    stride_student_view,
    stride_student_image,
    stride_student_bit,
    inverse_terms,
    K: tl.constexpr,
    U: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient (V, n, K) of all views for BLOCK groups of bits."""
    image, bit, group, _, mask = _group_indices(n, K, BLOCK)
    offset = image * stride_student_image + bit * stride_student_bit
    gradient_offset = image * K + bit
    stride_gradient_view = _to_int64(K) * n
    scale = tl.load(grad_ptr) * inverse_terms

    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    teacher_bytes = ()
    for u in tl.static_range(U):
        byte = tl.load(messages_ptr + _to_int64(u) * n * BYTES + group)
        teacher_bytes += (byte,)  # type: ignore[assignment]  # as in the forward kernel

    OWN_VIEWS: tl.constexpr = 0 if MODE == 1 else U
    OWN_TEACHERS: tl.constexpr = 1 if MODE == 2 else U - 1
    # Every load comes before as many stores as possible, because the compiler moves no load across a store.
    if OWN_VIEWS:
        a = tl.load(student_ptr + offset)
    for u in tl.static_range(OWN_VIEWS):
        s = _unpack_bits(teacher_bytes[u])
        if MODE == 0:
            s = _sum_of_bits(teacher_bytes, U) - s
        base, k, m = _gradient_constants(s, OWN_TEACHERS, scale)
        g = _gradient(a, base, k, m)
        if u + 1 < OWN_VIEWS:
            a = tl.load(student_ptr + _to_int64(u + 1) * stride_student_view + offset)
        tl.store(gradient_ptr + _to_int64(u) * stride_gradient_view + gradient_offset, g, mask=mask)
    if MODE != 2:
        base, k, m = _gradient_constants(_sum_of_bits(teacher_bytes, U), U, scale)
        view_ptr = student_ptr + _to_int64(OWN_VIEWS) * stride_student_view
        gradient_view_ptr = gradient_ptr + OWN_VIEWS * stride_gradient_view
        for v in range(OWN_VIEWS, views, 2):
            a = tl.load(view_ptr + offset)
            view_ptr += stride_student_view
            b = tl.load(view_ptr + offset, mask=v + 1 < views)
            view_ptr += stride_student_view
            tl.store(gradient_view_ptr + gradient_offset, _gradient(a, base, k, m), mask=mask)
            gradient_view_ptr += stride_gradient_view
            tl.store(
                gradient_view_ptr + gradient_offset, _gradient(b, base, k, m), mask=mask & (v + 1 < views)
            )
            gradient_view_ptr += stride_gradient_view
