"""Hamming distances between messages: all pairs, or the nearest of a database."""

import torch
from torch import Tensor

from bincomm.ops import reference
from bincomm.ops.library import BACKEND, define, use_triton

DISTANCES_PER_BLOCK = 1 << 24  # held at once when the database is searched in blocks
COUNTED_BITS = 2046  # of messages, at most, for which the GPU's kernel has a bin for every distance


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Number of bits in which messages differ, for all pairs.

    Args:
        a: (N, ⌈K/32⌉) int32 messages, as from `pack_signs`; any strides.
        b: (M, ⌈K/32⌉) int32 messages on the same device.

    Returns:
        (N, M) int32, from 0 to K. No gradient.

    Raises:
        TypeError: an argument is no int32 tensor.
        ValueError: shapes or devices do not fit.
    """
    _check("a", a, "b", b)
    if BACKEND == "reference":
        return reference.hamming_distance(a, b)
    return torch.ops.bincomm.hamming_distance(a, b)


def hamming_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k messages of a database nearest to each query; of equal distances the first ones.

    The database is searched in blocks: memory does not grow with the product of the two sizes.

    Args:
        queries: (Q, ⌈K/32⌉) int32 messages, as from `pack_signs`; any strides.
        database: (D, ⌈K/32⌉) int32 messages on the same device.
        k: from 0 to D.

    Returns:
        Distances (Q, k) int32, ascending, and indices into the database (Q, k) int64. No gradient.

    Raises:
        TypeError: an argument is no int32 tensor.
        ValueError: shapes, devices or k do not fit.
    """
    _check("queries", queries, "database", database)
    if not 0 <= k <= len(database):
        raise ValueError(f"k: expected from 0 to the database's size, {len(database)}, got {k}")
    if BACKEND == "reference":
        return reference.hamming_topk(queries, database, k)
    return torch.ops.bincomm.hamming_topk(queries, database, k)


def _check(name: str, messages: Tensor, other_name: str, others: Tensor) -> None:
    for argument, x in ((name, messages), (other_name, others)):
        if not isinstance(x, Tensor) or x.dtype != torch.int32:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{argument}: expected int32 messages, got {kind}")
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{argument}: expected shape (messages, words ≥ 1), got {tuple(x.shape)}")
    if others.shape[1] != messages.shape[1]:
        raise ValueError(
            f"{other_name}: expected {messages.shape[1]} words like {name}, got {others.shape[1]}"
        )
    if others.device != messages.device:
        raise ValueError(f"{other_name}: expected on {messages.device} like {name}, got {others.device}")


def topk_in_blocks(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`hamming_topk` by the device's `hamming_distance`, block by block, each merged into the best so far."""
    size, results = len(database), []
    rows = max(1, min(len(queries), DISTANCES_PER_BLOCK >> 12))
    block = max(k, DISTANCES_PER_BLOCK // rows)
    for part in queries.split(rows):
        # distance · D + index orders by distance, then index; no two keys are equal.
        best = part.new_empty((len(part), 0), dtype=torch.int64)
        for first in range(0, size, block):
            distances = torch.ops.bincomm.hamming_distance(part, database[first : first + block])
            indices = torch.arange(first, first + distances.shape[1], device=part.device)
            keys = torch.cat([best, distances.to(torch.int64) * size + indices], 1)
            best = keys.topk(min(k, keys.shape[1]), largest=False, sorted=True).values
        results.append(best)
    keys = torch.cat(results) if size else queries.new_empty((len(queries), 0), dtype=torch.int64)
    return (keys // max(1, size)).to(torch.int32), keys % max(1, size)


define(
    "hamming_distance(Tensor a, Tensor b) -> Tensor",
    cpu="C++",
    pytorch=reference.hamming_distance,
    fake=lambda a, b: a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32),
)
define(
    "hamming_topk(Tensor queries, Tensor database, int k) -> (Tensor, Tensor)",
    cpu="C++",
    pytorch=topk_in_blocks,
    fake=lambda queries, database, k: (
        queries.new_empty((queries.shape[0], k), dtype=torch.int32),
        queries.new_empty((queries.shape[0], k), dtype=torch.int64),
    ),
)
use_triton("hamming_distance", "hamming", "launch_hamming_distance")
use_triton(
    "hamming_topk",
    "hamming",
    "launch_hamming_topk",
    unless=lambda queries, database, k: 32 * queries.shape[1] > COUNTED_BITS,
    pytorch=topk_in_blocks,
)
