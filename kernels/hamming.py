"""Hamming distances of messages on the GPU: of all pairs, or the smallest.

The nearest of a database are found by counting, because there are few different distances: once the distances
of a query to a segment of the database lie in memory, 16 bits each, one program counts how often each occurs,
which tells how large the k-th smallest is, and then collects those up to it, in the order of the database. A
single query has as many segments as keep all multiprocessors busy; the results of the segments are merged.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 32 × 32 pairs a program, eight a thread: 48 registers, so there are enough warps to hide the loads. Counting
# the bits takes longest, at 16 words per clock and multiprocessor, and larger tiles do not change that.
ROWS = 32
COLUMNS = 32
WARPS = 4
SELECT_COLUMNS = 1024  # distances of one step of the selection
SELECT_PROGRAMS = 512  # if possible, so that every multiprocessor has some
DISTANCES = 1 << 27  # held at once, two bytes each


def launch_hamming_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The nearest messages, of at most 2046 bits; see `bincomm.hamming_topk` for the arguments."""
    count, size = len(queries), len(database)
    if not count * k:
        empty = queries.new_empty((count, k))
        return empty, empty.to(torch.int64)
    rows = max(1, min(count, DISTANCES // size))
    keys = [_nearest_keys(part, database, k) for part in queries.split(rows)]
    # distance · size + index orders by distance, then index; no two keys are equal.
    best = torch.cat(keys)
    return (best // size).to(torch.int32), best % size


def _nearest_keys(queries: Tensor, database: Tensor, k: int) -> Tensor:
    """The keys of the k nearest messages of every query, ascending."""
    (count, words), size = queries.shape, database.shape[0]
    distances = torch.empty((count, size), dtype=torch.int16, device=queries.device)
    _launch_distances(queries, database, distances)
    # Segments of at least 4 k messages, so that merging is little work beside the selection.
    segments = min(triton.cdiv(SELECT_PROGRAMS, count), max(1, size // max(4 * k, 4 * SELECT_COLUMNS)))
    length = triton.cdiv(size, segments)
    largest = torch.iinfo(torch.int64).max  # in place of the keys that a short last segment lacks
    keys = torch.full((count, segments * k), largest, dtype=torch.int64, device=queries.device)
    with torch.cuda.device_of(queries):
        hamming_select_kernel[(count, segments)](
            *(distances, keys, size, k, length),
            **{"BINS": triton.next_power_of_2(32 * words + 2), "COLUMNS": SELECT_COLUMNS, "num_warps": WARPS},
        )
    return keys.topk(k, largest=False, sorted=True).values


def launch_hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Differing bits of (N, words) and (M, words) int32 messages, any strides -> (N, M) int32."""
    distances = torch.empty((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    _launch_distances(a, b, distances)
    return distances


def _launch_distances(a: Tensor, b: Tensor, distances: Tensor) -> None:
    (n, words), m = a.shape, b.shape[0]
    if distances.numel():
        with torch.cuda.device_of(a):
            hamming_distance_kernel[(triton.cdiv(n, ROWS) * triton.cdiv(m, COLUMNS),)](
                *(a, b, distances, n, m, words, *a.stride(), *b.stride()),
                **{"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS},
            )


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


@triton.jit
def hamming_select_kernel(
    distances_ptr,
    keys_ptr,
    size,
    k,
    length,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of a row of distances (size,), in a segment of this length, the keys of the k smallest, in no order of
    theirs: first those below the k-th smallest, then those equal to it, both in the order of the row."""
    row, segment = tl.program_id(0), tl.program_id(1)
    distances_ptr += row.to(tl.int64) * size
    keys_ptr += (row.to(tl.int64) * tl.num_programs(1) + segment) * k
    begin = segment * length
    end = tl.minimum(begin + length, size)
    column = tl.arange(0, COLUMNS)
    NONE: tl.constexpr = BINS - 1  # larger than every distance
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(begin, end, COLUMNS):
        index = first + column
        distance = tl.load(distances_ptr + index, mask=index < end, other=NONE).to(tl.int32)
        counts += tl.histogram(distance, BINS)
    # The k-th smallest distance is the first that at least k are not above; NONE if there are fewer.
    kth = tl.sum((tl.cumsum(counts, 0) < k).to(tl.int32), 0)
    kth = tl.minimum(kth, NONE)
    smaller = 0  # number of those collected
    equal = tl.sum(tl.where(tl.arange(0, BINS) < kth, counts, 0), 0)  # the place of the next one of these
    for first in range(begin, end, COLUMNS):
        index = first + column
        distance = tl.load(distances_ptr + index, mask=index < end, other=NONE).to(tl.int32)
        if tl.min(distance, 0) <= kth:  # of few steps
            is_smaller = (distance < kth).to(tl.int32)
            is_equal = ((distance == kth) & (index < end)).to(tl.int32)
            place = tl.where(
                is_smaller > 0, smaller + tl.cumsum(is_smaller, 0), equal + tl.cumsum(is_equal, 0)
            )
            taken = (is_smaller > 0) | ((is_equal > 0) & (place <= k))
            key = distance.to(tl.int64) * size + index
            tl.store(keys_ptr + place - 1, key, mask=taken)
            smaller += tl.sum(is_smaller, 0)
            equal += tl.sum(is_equal, 0)
