"""What remains of the paper's objective on the GPU after agreement and coding rate: β, and the loss.

The control of β needs the entropy of the student's bits, so one kernel counts their ones, in parts. One
program then does all that is a scalar: it adds up the partial sums of the agreement, averages the rates,
finds β and subtracts. By PyTorch that would be forty launches, each as long as a small coding rate's kernel.
"""

import torch
import triton
import triton.language as tl
from bincomm.kernels.sign_bce import REDUCE_BLOCK
from torch import Tensor

# Launch constants, chosen by counting on the compiled code.
ROWS, COLUMNS = 128, 32  # of a program that counts: 32 loads in flight for each of 128 threads
PARTS_AT_ONCE, BITS_AT_ONCE = 16, 512  # of counts that are added up, 16 loads in flight
WEIGH_WARPS = 16


def launch_count_ones(logits: Tensor) -> Tensor:
    """How many logits of each bit are above 0, in parts that are to be added up.

    Args:
        logits: (V, n, K) fp32, fp16 or bf16, any strides.

    Returns:
        (parts, K) fp32, at least one part.
    """
    views, n, bits = logits.shape
    parts = triton.cdiv(views * n, ROWS)
    ones = logits.new_empty((parts, bits), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        count_ones_kernel[(parts, triton.cdiv(bits, COLUMNS))](
            *(logits, ones, n, views * n, *logits.stride()),
            **{"K": bits, "ROWS": ROWS, "COLUMNS": COLUMNS},
        )
    return ones


def launch_weigh_rate(
    partial: Tensor,
    rates: Tensor,
    ones: Tensor,
    state: Tensor,
    *,
    scale: float,
    messages: int,
    bias: float,
    beta: float,
    balance: float,
    least: float,
    span: float,
    constants: dict[str, float],
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and (3,) agreement, rate and β; with a control (6,), with its next state.

    Args:
        partial: partial sums of the agreement, fp32; their sum times `scale` is the agreement.
        rates: (U,) fp32, contiguous.
        ones: (parts, K) of `launch_count_ones`, of so many `messages`; not used without a control.
        state: (3,) fp32 of the control, or (0,): then `beta` is β.
        bias: what is added to the mean entropy of a bit.
        balance: γ.
        least, span: the least rate, and the largest minus it.
        constants: of the control, as the kernel names them.
    """
    controlled = len(state) > 0
    loss = partial.new_empty(())
    scalars = partial.new_empty(3 + len(state))
    with torch.cuda.device_of(partial):
        weigh_rate_kernel[(1,)](
            *(partial, rates, ones, state, loss, scalars),
            *(len(partial), len(rates), len(ones), scale, messages, bias, beta, balance, least, span),
            **{"K": ones.shape[1], "U": triton.next_power_of_2(len(rates)), "CONTROLLED": controlled},
            **constants,
            **{"BLOCK": REDUCE_BLOCK, "PARTS": PARTS_AT_ONCE, "BITS": BITS_AT_ONCE, "num_warps": WEIGH_WARPS},
        )
    return loss, scalars


@triton.jit
def count_ones_kernel(
    logits_ptr,
    ones_ptr,
    n,
    rows,
    stride_view,
    stride_image,
    stride_bit,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A part of the counts: of ROWS rows, and COLUMNS bits."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bit = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    of_row = (row // n).to(tl.int64) * stride_view + (row % n).to(tl.int64) * stride_image
    offset = of_row[:, None] + bit.to(tl.int64)[None, :] * stride_bit
    a = tl.load(logits_ptr + offset, mask=(row < rows)[:, None] & (bit < K)[None, :], other=0.0)
    ones = tl.sum((a.to(tl.float32) > 0).to(tl.int32), 0)
    tl.store(ones_ptr + tl.program_id(0).to(tl.int64) * K + bit, ones.to(tl.float32), mask=bit < K)


@triton.jit
def _entropy_term(p):
    """-p log₂ p, 0 for 0."""
    return tl.where(p > 0, -p * tl.log2(tl.where(p > 0, p, 1.0)), 0.0)


@triton.jit
def _average(old, value, share):
    """The average with a new value, or the old one where that is not finite."""
    new = old + share * (value - old)
    return tl.where(new - new == 0, new, old)


@triton.jit
def _error(average, TARGET: tl.constexpr):
    short = TARGET - average
    return short / tl.where(short > 0, TARGET, 1 - TARGET)


@triton.jit
def weigh_rate_kernel(
    partial_ptr,
    rates_ptr,
    ones_ptr,
    state_ptr,
    loss_ptr,
    scalars_ptr,
    programs,
    teachers,
    parts,
    scale,
    messages,
    bias,
    beta,
    balance,
    least,
    span,
    K: tl.constexpr,
    U: tl.constexpr,
    CONTROLLED: tl.constexpr,
    SHARE: tl.constexpr,
    ENTROPY: tl.constexpr,
    NEW_SHARE: tl.constexpr,
    RISE: tl.constexpr,
    FALL: tl.constexpr,
    LOG_LEAST: tl.constexpr,
    LOG_LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Agreement, rate, β and loss, by one program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + index, mask=index < programs, other=0.0)
    agreement = tl.sum(total, 0) * scale
    view = tl.arange(0, U)
    rate = tl.sum(tl.load(rates_ptr + view, mask=view < teachers, other=0.0), 0) / teachers
    if CONTROLLED:
        entropies = tl.zeros((BITS,), tl.float32)
        for first_bit in range(0, K, BITS):
            bit = first_bit + tl.arange(0, BITS)
            ones = tl.zeros((BITS,), tl.float32)
            for first in range(0, parts, PARTS):
                part = first + tl.arange(0, PARTS)
                mask = (part < parts)[:, None] & (bit < K)[None, :]
                counts = tl.load(ones_ptr + part[:, None] * K + bit[None, :], mask=mask, other=0.0)
                ones += tl.sum(counts, 0)
            p = ones / messages
            entropies += tl.where(bit < K, _entropy_term(p) + _entropy_term(1 - p), 0.0)
        entropy = tl.minimum(tl.sum(entropies, 0) / K + bias, 1.0)
        share = _average(tl.load(state_ptr + 1), (rate - least) / span, NEW_SHARE)
        entropy = _average(tl.load(state_ptr + 2), entropy, NEW_SHARE)
        error = tl.maximum(_error(share, SHARE), _error(entropy, ENTROPY))
        log_beta = tl.load(state_ptr) + tl.where(error > 0, RISE, FALL) * error
        log_beta = tl.minimum(tl.maximum(log_beta, LOG_LEAST), LOG_LARGEST)
        used = tl.exp(log_beta + error)
        tl.store(scalars_ptr + 3, log_beta)
        tl.store(scalars_ptr + 4, share)
        tl.store(scalars_ptr + 5, entropy)
    else:
        used = beta
    tl.store(loss_ptr, agreement - used * balance * rate)
    tl.store(scalars_ptr, agreement)
    tl.store(scalars_ptr + 1, rate)
    tl.store(scalars_ptr + 2, used)
