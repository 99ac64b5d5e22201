"""How well the bits of a code are used: shares of ones, entropies, correlations, dead and repeated bits.

Signs are (n, K), see `bincomm.codes.arguments`. Entropies are in bits, arithmetic is in fp64. The figures are
estimates from n images: each docstring says how far they can be trusted.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bincomm.bits import DEAD_SHARE, binary_entropy
from bincomm.codes.arguments import as_bits

STRONGEST = 20  # pairs of bits listed with their correlation
BLOCK = 1 << 22  # entries of a Gram matrix's factors held at once


def share_of_ones(signs: Tensor) -> Tensor:
    """(K,) shares of the images in which each bit is 1; the standard error is at most 1/(2√n)."""
    bits = as_bits(signs)
    return bits.sum(0).double() / len(bits)


def bit_entropies(signs: Tensor) -> Tensor:
    """(K,) entropy of each bit, `H = -p log₂ p - (1-p) log₂(1-p)`, p its share of ones; from 0 to 1 bit.

    The plug-in estimate, too low by about 1/(2n ln 2) bits: 0.007 at n = 100.
    """
    return binary_entropy(share_of_ones(signs))


class BlockEntropies(NamedTuple):
    """Entropies of blocks of consecutive bits, (B,) each, in bits."""

    bits: Tensor  # in each block; the last one may be shorter
    entropy: Tensor  # corrected
    plug_in: Tensor  # uncorrected
    marginals: Tensor  # sum of the entropies of its bits, corrected too: what independent bits would have


def block_entropies(signs: Tensor, width: int = 8) -> BlockEntropies:
    """Joint entropy of each block of `width` consecutive bits, with the correction of Miller and Madow.

    `H = H_plug-in + (m - 1)/(2n ln 2)`, m the number of words that occur (Miller 1955; Paninski 2003, Neural
    Computation 15). The plug-in estimate is too low by about (2^width - 1)/(2n ln 2) bits, 8-bit blocks by
    0.04 at n = 5 000 and by 0.4 at 500, and never above log₂ n. The correction is good where n is several
    times 2^width; below that it is too low as well, and a low figure then means few images, not a poor code.

    Raises:
        ValueError: no signs, or a width that is not from 1 to 16.
    """
    bits = as_bits(signs)
    if not 1 <= width <= 16:
        raise ValueError(f"width: expected from 1 to 16 bits, got {width}")
    n, rows = len(bits), list[tuple[int, float, float, float]]()
    unit = 1 / (2 * n * math.log(2))
    single = bit_entropies(bits) + unit * (bits.any(0) & ~bits.all(0)).double()
    for block, marginals in zip(bits.split(width, 1), single.clamp(max=1).split(width), strict=True):
        size = block.shape[1]
        words = (block.long() << torch.arange(size, device=bits.device)).sum(1)
        p = torch.bincount(words).double() / n
        p = p[p > 0]
        plug_in = -(p * p.log2()).sum().item() + 0.0
        corrected = min(plug_in + (len(p) - 1) * unit, size)
        rows.append((size, corrected, plug_in, marginals.sum().item()))
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    return BlockEntropies(columns[0].long(), *columns[1:])


def bit_correlations(signs: Tensor) -> Tensor:
    """(K, K) Pearson correlations between bits, from -1 to 1: the phi coefficient of two binary variables.

    A constant bit correlates with nothing: 0, in its place on the diagonal too. Of independent bits the
    correlations have a standard deviation of about 1/√n.
    """
    bits = as_bits(signs)
    return cross_correlations(bits, bits)


class CorrelationSummary(NamedTuple):
    """The correlations of pairs of bits in brief, because their matrix has K² entries."""

    rms: float  # root mean square; 0 without pairs
    by_chance: float  # that of independent bits
    absolute: list[int]  # histogram of the absolute values, 50 bins from 0 to 1
    strongest: list[tuple[int, int, float]]  # the STRONGEST pairs and their correlation


def summarize_correlations(signs: Tensor) -> CorrelationSummary:
    """Correlations of all pairs of bits, dead ones left out, because one odd image can make them alike."""
    bits = as_bits(signs)
    dead = set(dead_bits(bits))
    alive = torch.tensor([bit for bit in range(bits.shape[1]) if bit not in dead], dtype=torch.int64)
    first, second = alive[torch.triu_indices(len(alive), len(alive), 1)]
    values = bit_correlations(bits)[first, second]
    order = values.abs().sort(descending=True, stable=True).indices[:STRONGEST].tolist()
    return CorrelationSummary(
        values.square().mean().sqrt().item() if len(values) else 0.0,
        len(bits) ** -0.5,
        torch.histc(values.abs().float(), 50, 0, 1).long().tolist(),
        [(int(first[pair]), int(second[pair]), float(values[pair])) for pair in order],
    )


def dead_bits(signs: Tensor) -> list[int]:
    """Bits that take their rarer value in less than `DEAD_SHARE` of the images, as training counts them."""
    p = share_of_ones(signs)
    return (torch.minimum(p, 1 - p) < DEAD_SHARE).nonzero().flatten().tolist()


class Duplicates(NamedTuple):
    """Bits that repeat an earlier one, or its inverse: (the first such bit, the bit), each at most once."""

    same: list[tuple[int, int]]
    inverted: list[tuple[int, int]]


def duplicate_bits(signs: Tensor, tolerance: float = 0.0) -> Duplicates:
    """Bits equal to an earlier bit, or its inverse, in all images but a share of at most `tolerance`.

    Dead bits are left out: they are nearly equal to each other, and `dead_bits` counts them. In n images two
    independent fair bits are equal with probability 2⁻ⁿ, so ten images prove little.
    """
    bits = as_bits(signs)
    n, ones = len(bits), bits.double().sum(0)
    differ = (ones[:, None] + ones - 2 * _count_both(bits, bits)) / n
    alive = torch.ones(bits.shape[1], dtype=torch.bool, device=bits.device)
    alive[dead_bits(bits)] = False
    earlier = (alive[:, None] & alive).tril(-1)
    duplicates = Duplicates([], [])
    same, inverted = (earlier & (differ <= tolerance)), (earlier & (1 - differ <= tolerance))
    for bit in (same | inverted).any(1).nonzero().flatten().tolist():
        first = int((same[bit] | inverted[bit]).nonzero()[0])
        (duplicates.same if same[bit, first] else duplicates.inverted).append((first, bit))
    return duplicates


def cross_correlations(bits: Tensor, other: Tensor) -> Tensor:
    """(K, K') correlations between the bits of two codes (n, K) and (n, K') bool; 0 with constant bits."""
    n, a, b = len(bits), bits.double().sum(0), other.double().sum(0)
    scale = ((a * (n - a))[:, None] * (b * (n - b))).sqrt()
    return torch.where(scale > 0, (n * _count_both(bits, other) - a[:, None] * b) / scale.clamp(min=1), 0.0)


def _count_both(bits: Tensor, other: Tensor) -> Tensor:
    """(K, K') numbers of images in which both bits are 1; exact."""
    rows = max(1, BLOCK // max(bits.shape[1], other.shape[1]))  # below 2²⁴, up to which fp32 counts
    counts = torch.zeros(bits.shape[1], other.shape[1], dtype=torch.float64, device=bits.device)
    for a, b in zip(bits.split(rows), other.split(rows), strict=True):
        counts += a.float().T @ b.float()
    return counts
