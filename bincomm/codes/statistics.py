"""What a code is made of: how its bits are used, what they tell of classes, and how steady they are.

Signs are (n, K), bool or numbers of which those above 0 are ones, a row for each image; entropies and
information are in bits, arithmetic is in fp64, and what is drawn at random is drawn from a seed of its own.
The figures of a code are estimates from n images: each docstring says how far they can be trusted.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import beta, binom
from sklearn.linear_model import RidgeCV
from torch import Tensor

from bincomm.bits import DEAD_SHARE, binary_entropy
from bincomm.codes import factors
from bincomm.evaluation.retrieval import mean_average_precision
from bincomm.ops.hamming import hamming_distance, hamming_topk
from bincomm.ops.messages import pack_signs

PAIRS = 1 << 25  # pairs of images up to which all distances are counted: about 8 000 images
BLOCK = 1 << 22  # distances, and entries of a Gram matrix's factors, held at once


def share_of_ones(signs: Tensor) -> Tensor:
    """(K,) shares of the images in which each bit is 1; the standard error is at most 1/(2√n)."""
    bits = _bits(signs)
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
    plug_in: Tensor  # as counted
    marginals: Tensor  # sum of the entropies of its bits, corrected alike: what independent bits would have


def block_entropies(signs: Tensor, width: int = 8) -> BlockEntropies:
    """Joint entropy of each block of `width` consecutive bits, with the correction of Miller and Madow.

    `H = H_plug-in + (m - 1)/(2n ln 2)`, m the number of words that occur (Miller 1955; Paninski 2003, Neural
    Computation 15). The plug-in estimate is too low by about (2^width - 1)/(2n ln 2) bits, 8-bit blocks by
    0.04 at n = 5 000 and by 0.4 at 500, and never above log₂ n. The correction is good where n is several
    times 2^width; below that it too falls short, and a low figure then tells of few images, not of the code.

    Raises:
        ValueError: no signs, or a width that is not from 1 to 16.
    """
    bits = _bits(signs)
    if not 1 <= width <= 16:
        raise ValueError(f"width: expected from 1 to 16 bits, got {width}")
    n, rows = len(bits), []
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
    return _cross_correlations(bits := _bits(signs), bits)


def dead_bits(signs: Tensor) -> list[int]:
    """Bits that take their rarer value in less than `DEAD_SHARE` of the images, as training counts them."""
    p = share_of_ones(signs)
    return (torch.minimum(p, 1 - p) < DEAD_SHARE).nonzero().flatten().tolist()


class Duplicates(NamedTuple):
    """Bits that say what an earlier one said: (the first that says it, the bit), each bit at most once."""

    same: list[tuple[int, int]]
    inverted: list[tuple[int, int]]


def duplicate_bits(signs: Tensor, tolerance: float = 0.0) -> Duplicates:
    """Bits equal to an earlier bit, or its inverse, in all images but a share of at most `tolerance`.

    Dead bits are left out: they are nearly equal to each other, and are counted by `dead_bits`. In n images
    two independent fair bits are equal with probability 2⁻ⁿ, so ten images say little.
    """
    bits = _bits(signs)
    n, ones = len(bits), bits.double().sum(0)
    differ = (ones[:, None] + ones - 2 * _both(bits)) / n
    alive = torch.ones(bits.shape[1], dtype=torch.bool, device=bits.device)
    alive[dead_bits(bits)] = False
    earlier = (alive[:, None] & alive).tril(-1)
    found = Duplicates([], [])
    same, inverted = (earlier & (differ <= tolerance)), (earlier & (1 - differ <= tolerance))
    for bit in (same | inverted).any(1).nonzero().flatten().tolist():
        first = int((same[bit] | inverted[bit]).nonzero()[0])
        (found.same if same[bit, first] else found.inverted).append((first, bit))
    return found


class DistanceHistograms(NamedTuple):
    """How many pairs of images lie at each Hamming distance from 0 to K, (K+1,) int64 each."""

    every: Tensor
    within: Tensor | None  # pairs of one class; None without labels
    between: Tensor | None  # pairs of two classes
    sampled: bool  # whether only some pairs were counted


def distance_histograms(
    signs: Tensor, labels: Tensor | None = None, *, pairs: int = PAIRS, seed: int = 0
) -> DistanceHistograms:
    """Hamming distances of pairs of images, each pair counted once.

    Where there are more than `pairs` pairs, images are drawn and compared with all others, as many as make up
    that number; a pair of two drawn images is then counted twice. The shares stay unbiased.

    Raises:
        ValueError: no signs, or another number of labels.
    """
    bits = _bits(signs)
    messages, n, size = _pack(bits), len(bits), bits.shape[1] + 1
    if labels is not None:
        labels = _labels(labels, n)
    sampled = n * (n - 1) // 2 > pairs
    rows = torch.arange(n)
    if sampled:
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, pairs // n)]
    rows, every = rows.to(bits.device), torch.arange(n, device=bits.device)
    counts = torch.zeros(2, size, dtype=torch.int64, device=bits.device)
    for some in rows.split(max(1, BLOCK // n)):
        distances = hamming_distance(messages[some], messages).long()
        counted = some[:, None] != every if sampled else some[:, None] < every
        if labels is not None:
            distances += size * (labels[some, None] != labels)
        counts += torch.bincount(distances[counted], minlength=2 * size).view(2, size)
    counts = counts.cpu()
    if labels is None:
        return DistanceHistograms(counts[0], None, None, sampled)
    return DistanceHistograms(counts.sum(0), counts[0], counts[1], sampled)


def separation(within: Tensor, between: Tensor) -> float:
    """Probability that a pair of one class is nearer than a pair of two, from their histograms; ties count
    half. 0.5: the code does not tell classes apart at all; 1: every such pair is nearer. It is the area under
    the ROC curve of "same class", judged by distance. NaN if one of them is empty."""
    within, between = within.double(), between.double()
    farther = between.sum() - between.cumsum(0)
    won = (within * (farther + between / 2)).sum()
    return float(won / (within.sum() * between.sum()))


class Kept(NamedTuple):
    """Retrieval with some of the bits: over draws of which ones, mean, standard deviation, least, largest."""

    bits: int
    draws: int
    precision: float
    deviation: float
    least: float
    largest: float


def precision_by_bits(
    signs: Tensor,
    labels: Tensor,
    kept: Sequence[int],
    *,
    draws: int = 5,
    queries: int = 500,
    seed: int = 0,
) -> list[Kept]:
    """mAP@ALL of the code by Hamming distance when only so many of its bits are kept, drawn at random.

    Queries are images drawn at random, a fifth of them and at most `queries`; they are searched for among all
    others, the same ones for every number of bits. The spread is that between draws of bits; that between
    draws of queries comes to it. See `bincomm.evaluation.retrieval.mean_average_precision`.

    Args:
        signs: (n, K), labels: (n,) class indices.
        kept: numbers of bits, each from 1 to K; of all K there is one draw.

    Raises:
        ValueError: fewer than 2 images, no such number of bits, or no query with an image of its class.
    """
    bits = _bits(signs)
    labels = _labels(labels, len(bits))
    n, size = bits.shape
    if n < 2:
        raise ValueError(f"signs: expected at least 2 images, got {n}")
    if not all(1 <= count <= size for count in kept):
        raise ValueError(f"kept: expected from 1 to {size} bits, got {list(kept)}")
    generator = torch.Generator().manual_seed(seed)
    asking, answering = torch.randperm(n, generator=generator).split_with_sizes(
        (asked := max(1, min(queries, n // 5)), n - asked)
    )
    found = []
    for count in kept:
        values = []
        for _ in range(1 if count == size else draws):
            chosen = torch.randperm(size, generator=generator)[:count]
            messages = _pack(bits[:, chosen])
            values.append(
                mean_average_precision(
                    messages[answering], labels[answering], messages[asking], labels[asking]
                )
            )
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        found.append(Kept(count, len(values), float(np.mean(values)), deviation, min(values), max(values)))
    return found


class Information(NamedTuple):
    """Mutual information of each bit with a variable, (K,) each, in bits."""

    corrected: Tensor  # for chance: 0 on average for a bit that has nothing to do with it
    plug_in: Tensor  # as counted
    significant: Tensor  # bool: larger than chance leaves any of the K bits, at a level of 5 %
    threshold: float  # the plug-in estimate above which it is
    entropy: float  # of the variable, the most there is to tell (a bit has at most 1)


def mutual_information(signs: Tensor, values: Tensor, *, draws: int = 200, seed: int = 0) -> Information:
    """Mutual information of every bit with a variable of few values, as a class or an attribute.

    As counted from n images it is above 0 by chance, by about (values - 1)/(2n ln 2), and corrected for that
    as `bincomm.codes.factors.mutual_information` tells: 0 on average by chance, where it is sometimes below
    0, and as much as there is to tell where one determines the other. `significant` holds it against
    `bincomm.codes.factors.largest_by_chance`: among K bits without meaning the chance of calling even one
    significant is 5 %. That is of one variable; of twenty without meaning one may have a significant bit.

    Args:
        signs: (n, K), values: (n,) int; images with a value below 0, unknown, are left out.
        draws: permutations, at least 19.

    Raises:
        ValueError: another number of values than of images, none that is known, or too few draws.
    """
    bits = _bits(signs)
    values = _labels(values, len(bits), unknown=True)
    known = values >= 0
    if not known.any():
        raise ValueError("values: expected at least one that is known (0 or above), got none")
    bits, values = bits[known], values[known]
    measured, _, corrected = (x[:, 0] for x in factors.mutual_information(bits, values[:, None]))
    threshold = factors.largest_by_chance(bits, values, draws=draws, seed=seed)
    entropy = factors.entropy(values[:, None]).item()
    return Information(corrected, measured, measured > threshold + 1e-12, threshold, entropy)


def class_shares(signs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """How many images each class has, (C,) int64, and the share of them in which each bit is 1, (C, K); NaN
    in classes without images.

    Raises:
        ValueError: another number of labels than of images, or a label that is not below `classes`.
    """
    ones, counts = _count_ones(signs, labels, classes)
    return counts, ones / counts[:, None].double()


def _count_ones(signs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    bits = _bits(signs)
    labels = _labels(labels, len(bits))
    if int(labels.max()) >= classes:
        raise ValueError(f"labels: expected below {classes}, the number of classes, got {int(labels.max())}")
    return factors.count_ones(bits, labels, classes)


class Sharing(NamedTuple):
    """In which classes each bit is mostly 1, and mostly 0, (C, K) bool each; in neither where it is open."""

    ones: Tensor
    zeros: Tensor


def sharing(signs: Tensor, labels: Tensor, classes: int, *, level: float = 0.01) -> Sharing:
    """Classes that share a bit: those of whose images significantly more than half have it.

    One-sided exact binomial tests of each class and bit against a share of 1/2, at `level` each: of a hundred
    that are undecided in truth, one at most is called mostly 1, and one mostly 0. A class of fewer than 7
    images is called neither, at 0.01.

    Raises:
        ValueError: see `class_shares`.
    """
    ones, images = _count_ones(signs, labels, classes)
    ones, images = ones.numpy(), images[:, None].numpy()
    # P(at least as many ones), and as many zeros, of so many fair tosses; of none it is 1.
    found = [torch.from_numpy(binom.sf(x - 1, images, 0.5) <= level) for x in (ones, images - ones)]
    return Sharing(*found)


class Difference(NamedTuple):
    """How much more often each bit is 1 in one class than in another, with an interval, (K,) each."""

    difference: Tensor  # of the shares, from -1 to 1
    low: Tensor
    high: Tensor
    order: list[int]  # the bits, largest difference first


def telling_apart(
    signs: Tensor, labels: Tensor, first: int, second: int, *, level: float = 0.05
) -> Difference:
    """Bits by how well they tell two classes apart: the share of ones in the first minus that in the second.

    The intervals are made of those of the two shares, by squaring and adding as Newcombe does (Statistics in
    Medicine 17, 1998), but of exact ones (Clopper and Pearson 1934): with Wilson's, and so many bits, a class
    of few images would differ from a large one in nearly every rare bit that they happen to have. Each is at
    a level of `level`/K (Bonferroni): all K hold together with a probability of 1 - `level`, so the bit that
    comes out first of so many is not flattered.

    Raises:
        ValueError: another number of labels than of images, or a class without images.
    """
    bits = _bits(signs)
    labels = _labels(labels, len(bits))
    tail, parts = level / bits.shape[1] / 2, []
    for name, label in (("first", first), ("second", second)):
        of_class = bits[labels == label]
        n, ones = len(of_class), of_class.sum(0).cpu()
        if n == 0:
            raise ValueError(f"{name}: expected a class with images, class {label} has none")
        # The distributions are not defined where there are no ones, or no zeros: the limits are 0 and 1.
        low = torch.from_numpy(beta.ppf(tail, ones, n - ones + 1)).nan_to_num(0.0)
        high = torch.from_numpy(beta.isf(tail, ones + 1, n - ones)).nan_to_num(1.0)
        parts.append((ones.double() / n, low, high))
    (p, p_low, p_high), (q, q_low, q_high) = parts
    difference = p - q
    low = difference - torch.hypot(p - p_low, q_high - q)
    high = difference + torch.hypot(p_high - p, q - q_low)
    order = difference.abs().sort(descending=True, stable=True).indices.tolist()
    return Difference(difference, low, high, order)


class Surest(NamedTuple):
    """Rows of the images in which a bit is most surely 1 and 0, the surest first."""

    ones: list[int]
    zeros: list[int]


def surest(logits: Tensor, bit: int, count: int = 8) -> Surest:
    """Images with the largest and the smallest logit of a bit, of equal ones the first; fewer than `count`
    where fewer have that sign.

    Args:
        logits: (n, K), of whose signs the code consists.
        bit: from 0 to K - 1.
    """
    if logits.dim() != 2 or not 0 <= bit < logits.shape[1]:
        raise ValueError(f"bit: expected one of the columns of {tuple(logits.shape)} logits, got {bit}")
    column = logits[:, bit]
    ones = int((column > 0).sum())
    found = [
        column.sort(descending=largest, stable=True).indices[: min(count, there_are)].tolist()
        for largest, there_are in ((True, ones), (False, len(column) - ones))
    ]
    return Surest(*found)


class Stability(NamedTuple):
    """How often a bit is the same in two views of an image, (K,) each."""

    agreement: Tensor  # share of the images, from 0 to 1
    chance: Tensor  # agreement of views of two different images
    kappa: Tensor  # how far above chance, of the way to always: (agreement - chance)/(1 - chance)


def stability(signs: Tensor, others: Tensor) -> Stability:
    """Agreement of each bit between two views of the same images, against chance (Cohen's kappa).

    Chance is `p q + (1-p)(1-q)`, with the shares of ones of both views: a bit that is nearly always 1 agrees
    nearly always, and has a kappa near 0 all the same. A constant bit's kappa is 0. The agreement's standard
    error is at most 1/(2√n).

    Args:
        signs, others: (n, K) of one view and of the other, row by row of the same image.
    """
    bits, other = _bits(signs), _bits(others)
    if bits.shape != other.shape:
        raise ValueError(f"others: expected shape {tuple(bits.shape)} like signs, got {tuple(other.shape)}")
    p, q, agreement = (share_of_ones(x) for x in (bits, other, bits == other))
    chance = p * q + (1 - p) * (1 - q)
    room = 1 - chance
    kappa = torch.where(room > 1e-12, (agreement - chance) / room.clamp(min=1e-12), 0.0)
    return Stability(agreement, chance, kappa)


class Prediction(NamedTuple):
    """How well each bit of a code is known from another code of the same images, (K,) each."""

    correlation: Tensor  # largest |correlation| with a single bit of the other
    chance: float  # its mean if the codes had nothing to do with each other
    probe: Tensor  # kappa of a linear probe on all bits of the other: 1 always right, 0 chance


def predicted_from(signs: Tensor, others: Tensor, *, images: int = 10_000, seed: int = 0) -> Prediction:
    """How well each bit of a code is predicted by another code of the same images.

    By the best single bit, or its inverse: the largest |correlation|. With nothing in common that is not 0
    but about √(2 ln K'/n), the largest of K' of chance; `chance` is its mean over the bits after the images
    of the other code were permuted. And by ridge regression on all K' bits, fitted on one half of the images
    and judged on the other, both ways round, its strength chosen by leave-one-out on the half that is fitted;
    judged by Cohen's kappa between the predicted sign and the bit, which is 0 on average by chance. A probe
    wants several times K' images; with fewer it falls short even of equal codes. Constant bits: 0.

    Args:
        signs: (n, K), others: (n, K'), row by row of the same image.
        images: of which the probe is made at most, drawn at random.

    Raises:
        ValueError: different numbers of images, or fewer than 4.
    """
    bits, other = _bits(signs), _bits(others)
    n = len(bits)
    if len(other) != n or n < 4:
        raise ValueError(f"others: expected as many images as in signs, at least 4; got {len(other)} and {n}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(bits.device)
    varying = bits.any(0) & ~bits.all(0)
    best = _cross_correlations(bits, other).abs().amax(1)
    shuffled = _cross_correlations(bits, other[order]).abs().amax(1)[varying]
    halves = order[:images].chunk(2)
    predicted = torch.zeros_like(bits)
    for fitted, judged in (halves, halves[::-1]):
        x, y = (2.0 * code[fitted].double().cpu().numpy() - 1 for code in (other, bits))
        model = RidgeCV(alphas=len(fitted) * np.array([1e-3, 1e-2, 1e-1, 1.0])).fit(x, y)
        found = model.predict(2.0 * other[judged].double().cpu().numpy() - 1).reshape(len(judged), -1)
        predicted[judged] = torch.from_numpy(found > 0).to(bits.device)
    used = torch.cat(halves)
    probe = stability(predicted[used], bits[used]).kappa
    return Prediction(best, float(shuffled.mean()) if varying.any() else 0.0, probe)


class Overlap(NamedTuple):
    """How alike the neighborhoods of two codes are: 1 the same, and what it is by chance."""

    overlap: float
    chance: float


def neighbor_overlap(
    signs: Tensor, others: Tensor, k: int = 10, *, queries: int = 1000, seed: int = 0
) -> Overlap:
    """Share of an image's k nearest by Hamming distance that two codes of the same images have in common.

    The image itself is no neighbor. Of items tied at the k-th place each belongs by the share of the places
    that are left to it; the overlap is the cosine between the two codes' belongings, averaged over images.
    Without ties that is the number in common over k, and codes that give the same distances have 1 with ties
    as well. Chance is what two codes with nothing in common would have, `k²/(n-1)` over the two norms.

    Args:
        signs: (n, K), others: (n, K'), row by row of the same image.
        k: from 1 to n - 1.
        queries: images whose neighborhoods are compared at most, drawn at random.
    """
    bits, other = _bits(signs), _bits(others)
    n = len(bits)
    if len(other) != n:
        raise ValueError(f"others: expected {n} images like signs, got {len(other)}")
    if not 1 <= k < n:
        raise ValueError(f"k: expected from 1 to one less than the number of images, {n - 1}, got {k}")
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:queries].to(bits.device)
    overlaps, chances = [], []
    for some in rows.split(max(1, BLOCK // n)):
        a, b = (_belongings(_pack(code), some, k) for code in (bits, other))
        norms = a.norm(dim=1) * b.norm(dim=1)
        overlaps.append((a * b).sum(1) / norms)
        chances.append(k * k / (n - 1) / norms)
    return Overlap(torch.cat(overlaps).mean().item(), torch.cat(chances).mean().item())


def _belongings(messages: Tensor, rows: Tensor, k: int) -> Tensor:
    """(m, n) how far each item belongs to the k nearest of some: 1, 0, or a share where it is tied."""
    # The item itself, at a distance of 0, comes before the k others.
    last = hamming_topk(messages[rows], messages, k + 1)[0][:, k:]
    distances = hamming_distance(messages[rows], messages)
    distances[torch.arange(len(rows), device=rows.device), rows] = torch.iinfo(torch.int32).max
    nearer, tied = distances < last, distances == last
    return nearer + tied * ((k - nearer.sum(1, keepdim=True)) / tied.sum(1, keepdim=True).double())


def _bits(signs: Tensor) -> Tensor:
    """Signs as bool, checked."""
    if signs.dim() != 2 or signs.numel() == 0:
        raise ValueError(f"signs: expected shape (n ≥ 1, K ≥ 1), got {tuple(signs.shape)}")
    return signs if signs.dtype == torch.bool else signs > 0


def _labels(labels: Tensor, n: int, unknown: bool = False) -> Tensor:
    """Labels, checked."""
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(
            f"labels: expected {n} whole numbers, one an image, got {labels.dtype} {tuple(labels.shape)}"
        )
    if not unknown and int(labels.min()) < 0:
        raise ValueError(f"labels: expected class indices from 0 on, got {int(labels.min())}")
    return labels.long()


def _pack(bits: Tensor) -> Tensor:
    return pack_signs(bits.float())


def _both(bits: Tensor, other: Tensor | None = None) -> Tensor:
    """(K, K') numbers of images in which both bits are 1; exact."""
    other = bits if other is None else other
    rows = max(1, BLOCK // max(bits.shape[1], other.shape[1]))  # below 2²⁴, up to which fp32 counts
    parts = zip(bits.split(rows), other.split(rows), strict=True)
    return sum((a.float().T @ b.float()).double() for a, b in parts)


def _cross_correlations(bits: Tensor, other: Tensor) -> Tensor:
    """(K, K') correlations between the bits of two codes; 0 with constant ones."""
    n, a, b = len(bits), bits.double().sum(0), other.double().sum(0)
    scale = ((a * (n - a))[:, None] * (b * (n - b))).sqrt()
    return torch.where(scale > 0, (n * _both(bits, other) - a[:, None] * b) / scale.clamp(min=1), 0.0)
