"""Hamming distances of all pairs of messages on the GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 32 × 32 pairs a program, eight a thread: 48 registers, so there are enough warps to hide the loads. Counting
# the bits takes longest, at 16 words per clock and multiprocessor, and larger tiles do not change that.
ROWS = 32
COLUMNS = 32
WARPS = 4


def launch_hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Differing bits of (N, words) and (M, words) int32 messages, any strides -> (N, M) int32."""
    (n, words), m = a.shape, b.shape[0]
    distances = torch.empty((n, m), dtype=torch.int32, device=a.device)
    if distances.numel():
        with torch.cuda.device_of(a):
            hamming_distance_kernel[(triton.cdiv(n, ROWS) * triton.cdiv(m, COLUMNS),)](
                *(a, b, distances, n, m, words, *a.stride(), *b.stride()),
                **{"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS},
            )
    return distances


@triton.jit
def _count_bits(x):
    """Bits set in 32-bit words. LLVM knows this form and makes it one instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def hamming_distance_kernel(
    a_ptr,
    b_ptr,
    distances_ptr,
    n,
    m,
    words,
    stride_a_row,
    stride_a_word,
    stride_b_row,
    stride_b_word,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of ROWS × COLUMNS distances of messages a (n, words) and b (m, words)."""
    tiles_per_row = tl.cdiv(m, COLUMNS)
    row = (tl.program_id(0) // tiles_per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles_per_row).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    count = tl.zeros((ROWS, COLUMNS), tl.int32)
    for word in range(words):
        x = tl.load(a_ptr + row * stride_a_row + word * stride_a_word, mask=row < n, other=0)
        y = tl.load(b_ptr + column * stride_b_row + word * stride_b_word, mask=column < m, other=0)
        count += _count_bits(x[:, None] ^ y[None, :])
    mask = (row < n)[:, None] & (column < m)[None, :]
    tl.store(distances_ptr + row[:, None] * m + column[None, :], count, mask=mask)
