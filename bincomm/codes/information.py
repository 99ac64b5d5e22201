"""Mutual information of bits and factors, exactly corrected for chance, and the gap between bits (MIG).

A factor is anything known of an image that has finitely many values: its class, its color, where its object
lies. Bits are (n, K) bool, as from `unpack_signs`; factors are (n, F) integers, a column each, whose values
need not be consecutive. Information and entropy are in bits. All is computed on the CPU, in fp64.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Information(NamedTuple):
    """Mutual information of each bit and each factor, (K, F) in bits; see `mutual_information`."""

    plug_in: Tensor  # uncorrected
    chance: Tensor  # its expectation by chance
    corrected: Tensor


def mutual_information(bits: Tensor, factors: Tensor) -> Information:
    """How much each bit says about each factor.

    `I(b; f) = Σ p(b, v)·log₂(p(b, v) / (p(b)·p(v)))`, p being shares of the images: at most the smaller of
    the two entropies, and above 0 by chance. Its expectation by chance is E[I] over all permutations of the
    factor's column, where counts of pairs are hypergeometric; it is computed exactly, not sampled. The
    corrected value is that of adjusted mutual information (Vinh, Epps and Bailey, JMLR 2010), but in bits,
    `M·(I - E[I])/(M - E[I])` with `M = min(H(b), H(f))`: M where one determines the other, 0 on average where
    they are independent, and so sometimes below 0.

    Args:
        bits: (n, K) bool.
        factors: (n, F) integers.

    Returns:
        I, E[I] and the corrected I, each (K, F) fp64. All are 0 for a bit or a factor that does not vary.

    Raises:
        TypeError, ValueError: see `check_factors`.
    """
    check_factors(bits, factors)
    ones, own = bits.cpu().sum(0), entropy(bits)
    columns = []
    for factor in factors.T.cpu():
        values, indices = factor.unique(return_inverse=True)
        counts, images = count_ones(bits, indices, len(values))
        plug_in, chance = _information(counts, images), _expected_information(ones, images)
        most = torch.minimum(own, _entropy(images))
        room = most - chance
        corrected = torch.where(room > 1e-9, most * (plug_in - chance) / room, 0.0)
        columns.append((plug_in, chance, corrected))
    return Information(*(torch.stack(values, 1) for values in zip(*columns, strict=True)))


def largest_by_chance(bits: Tensor, factor: Tensor, *, draws: int = 200, seed: int = 0) -> float:
    """The plug-in information of the best of K bits that 19 of 20 independent factors do not exceed.

    The factor's values are permuted over the images `draws` times, and the largest information of any bit is
    noted. Where bits are independent of the factor, their own largest is one more such draw, above the result
    with a probability of at most 5 %. So among K meaningless bits, even one is called significant in at most
    5 % of the cases, however the bits depend on each other (Westfall and Young 1993).

    Args:
        bits: (n, K) bool.
        factor: (n,) integers.
        draws: at least 19.
        seed: of the permutations.

    Raises:
        TypeError, ValueError: see `check_factors`, or too few draws.
    """
    check_factors(bits, factor[:, None])
    if draws < 19:
        raise ValueError(f"draws: expected at least 19, got {draws}")
    generator = torch.Generator().manual_seed(seed)
    images, rows = factor.cpu().unique(return_counts=True)[1], bits.cpu().float()
    largest = [
        _information(_sums(rows, torch.randperm(len(rows), generator=generator), images), images).max()
        for _ in range(draws)
    ]
    return torch.stack(largest).sort().values[draws - (draws + 1) // 20].item()


class Gap(NamedTuple):
    """Mutual information gap of each factor, (F,), and the most that any bits could reach on it, (F,); see
    `mutual_information_gap`."""

    gap: Tensor
    ceiling: Tensor


def mutual_information_gap(bits: Tensor, factors: Tensor) -> Gap:
    """Whether one bit alone carries a factor: MIG of Chen et al. 2018 (arXiv 1802.04942), by factor.

    `(I(b₁; f) - I(b₂; f)) / H(f)`, b₁ and b₂ being the bits with the most and the second most information
    about f (plug-in); MIG is the mean over factors. 1 where one bit says all and no other anything, 0 where
    two say the same. A bit carries at most one bit, and divides the V values of a factor in two at best: so a
    factor of more than two values has a ceiling, the entropy of the most even division over H(f), and can be
    spread over several bits with no gap at all. Read it beside `dci`, which allows for that.

    Args:
        bits: (n, K ≥ 2) bool.
        factors: (n, F) integers; each has to vary.

    Raises:
        TypeError, ValueError: see `check_factors`; fewer than two bits, or a factor that does not vary.
    """
    check_factors(bits, factors, varied=True)
    if bits.shape[1] < 2:
        raise ValueError(f"bits: expected at least 2, got {bits.shape[1]}")
    first, second = mutual_information(bits, factors).plug_in.topk(2, dim=0).values
    entropies = entropy(factors)
    halves = torch.tensor(
        [_most_even_half(factor.unique(return_counts=True)[1].tolist()) for factor in factors.T.cpu()]
    )
    most = _entropy(torch.stack([halves, len(factors) - halves], 1))
    return Gap((first - second) / entropies, most / entropies)


def count_ones(bits: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For values (n,) from 0 to V - 1 = `count` - 1: how often each bit of (n, K) bool is 1 in the images of
    each value, (V, K) int64, and how many images have the value, (V,) int64. Exact below 2²⁴ images."""
    values = values.cpu()
    images = torch.bincount(values, minlength=count)
    return _sums(bits.cpu().float(), values.argsort(), images), images


def entropy(columns: Tensor) -> Tensor:
    """Entropy in bits of each column of (n, C) bits or factors: (C,) fp64."""
    if columns.dtype == torch.bool:
        ones = columns.cpu().sum(0)
        return _entropy(torch.stack([ones, len(columns) - ones], 1))
    return torch.stack([_entropy(column.unique(return_counts=True)[1]) for column in columns.T.cpu()])


def check_factors(
    bits: Tensor, factors: Tensor, names: tuple[str, str] = ("bits", "factors"), *, varied: bool = False
) -> None:
    """Raise, naming the argument, unless there are bits and factors of the same images.

    Raises:
        TypeError: bits are not bool, or factors are not integers.
        ValueError: not (n, K) and (n, F) with n, K, F ≥ 1; with `varied`, a factor that has only one value.
    """
    if bits.dtype != torch.bool:
        raise TypeError(f"{names[0]}: expected bool, got {bits.dtype}")
    if bits.dim() != 2 or bits.numel() == 0:
        raise ValueError(f"{names[0]}: expected shape (n ≥ 1, K ≥ 1), got {tuple(bits.shape)}")
    check_integers(names[1], factors, len(bits))
    if varied and (constant := (factors == factors[0]).all(0).nonzero()).numel():
        raise ValueError(f"{names[1]}: expected every factor to vary, column {int(constant[0])} does not")


def check_integers(name: str, factors: Tensor, images: int) -> None:
    """Raise, naming the argument, unless factors are integers (images, F ≥ 1); TypeError or ValueError."""
    if factors.dtype.is_floating_point or factors.dtype.is_complex or factors.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {factors.dtype}")
    if factors.dim() != 2 or factors.shape[1] == 0 or len(factors) != images:
        raise ValueError(f"{name}: expected shape ({images}, F ≥ 1), got {tuple(factors.shape)}")


def _entropy(counts: Tensor) -> Tensor:
    """Entropy in bits of counts (..., V)."""
    shares = counts / counts.sum(-1, keepdim=True, dtype=torch.float64)
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(2) + 0.0


def _sums(rows: Tensor, order: Tensor, images: Tensor) -> Tensor:
    """(V, K) int64 sums of the first `images[0]` rows in this order, the next `images[1]`, and so on."""
    return F.embedding_bag(order, rows, images.cumsum(0) - images, mode="sum").long()


def _most_even_half(images: list[int]) -> int:
    """The most even division of values with so many images: how many images its smaller half has."""
    n, sums = sum(images), 1  # bit i: a subset of the values has i images in total
    for count in images:
        sums |= sums << count
    return (sums & ((1 << (n // 2 + 1)) - 1)).bit_length() - 1


def _information(ones: Tensor, images: Tensor) -> Tensor:
    """I in bits, (K,), from how often bits are 1 for each value, (V, K), and its images, (V,)."""
    n, b = images.sum(), ones.sum(0)
    joint = _n_log_n(torch.cat([ones, images[:, None] - ones]))
    alone = _n_log_n(torch.stack([b, n - b])) + _n_log_n(images)
    return ((joint + _n_log_n(n[None]) - alone) / n / math.log(2)).clamp(min=0)  # below by rounding alone


def _n_log_n(counts: Tensor) -> Tensor:
    """Σ n log n over the first dimension of counts; fp64."""
    counts = counts.double()
    return torch.special.xlogy(counts, counts).sum(0)


def _expected_information(ones: Tensor, images: Tensor) -> Tensor:
    """E[I] in bits, (K,), over all permutations, of bits that are 1 in `ones` (K,) images and a factor whose
    values have `images` (V,): `Σ_v Σ_m h(m)·[m/n·log(n·m/(b·a)) + (a-m)/n·log(n·(a-m)/((n-b)·a))]`,
    a images with value v, b with the bit, h(m) the probability that m have both."""
    n = int(images.sum())
    ones, indices = ones.unique(return_inverse=True)
    factorials = torch.lgamma(torch.arange(1, n + 2, dtype=torch.float64))  # their logarithms
    b = ones[:, None]
    expected = torch.zeros(len(ones), dtype=torch.float64)
    for a, multiplicity in torch.stack(images.unique(return_counts=True), 1).tolist():
        # By Hoeffding's bound m is farther from its mean with a probability below 1e-18.
        reach = math.ceil(math.sqrt(21 * a)) + 1
        m = b * a // n + torch.arange(-reach, reach + 1)
        possible = (m >= 0) & (m <= a) & (m <= b) & (a - m <= n - b)
        m = torch.where(possible, m, (a + b - n).clamp(min=0))
        logarithm = (
            (factorials[b] - factorials[m] - factorials[b - m])
            + (factorials[n - b] - factorials[a - m] - factorials[n - b - a + m])
            - (factorials[n] - factorials[a] - factorials[n - a])
        )
        inside = torch.special.xlogy(m, n * m / (b * a).clamp(min=1).double())
        outside = torch.special.xlogy(a - m, n * (a - m) / ((n - b) * a).clamp(min=1).double())
        expected += multiplicity * (possible * logarithm.exp() * (inside + outside)).sum(1) / n
    return expected[indices] / math.log(2)
