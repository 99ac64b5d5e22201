"""Hamming distances between the images of a code: their histograms, and what is retrieved by them.

Signs are (n, K), labels (n,), see `bincomm.codes.arguments`; what is drawn at random has a seed of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bincomm.codes.arguments import as_bits, as_labels
from bincomm.evaluation.retrieval import mean_average_precision
from bincomm.ops.hamming import hamming_distance, hamming_topk
from bincomm.ops.messages import pack_signs

PAIRS = 1 << 25  # pairs of images up to which all distances are counted: about 8 000 images
BLOCK = 1 << 22  # distances held at once


class DistanceHistograms(NamedTuple):
    """How many pairs of images lie at each Hamming distance from 0 to K, (K+1,) int64 each."""

    all: Tensor
    within: Tensor | None  # pairs of one class; None without labels
    between: Tensor | None  # pairs of two classes; None without labels
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
    bits = as_bits(signs)
    messages, n, size = pack_signs(bits.float()), len(bits), bits.shape[1] + 1
    if labels is not None:
        labels = as_labels(labels, n)
    sampled = n * (n - 1) // 2 > pairs
    rows = torch.arange(n)
    if sampled:
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, pairs // n)]
    rows, columns = rows.to(bits.device), torch.arange(n, device=bits.device)
    counts = torch.zeros(2, size, dtype=torch.int64, device=bits.device)
    for block in rows.split(max(1, BLOCK // n)):
        distances = hamming_distance(messages[block], messages).long()
        counted = block[:, None] != columns if sampled else block[:, None] < columns
        if labels is not None:
            distances += size * (labels[block, None] != labels)
        counts += torch.bincount(distances[counted], minlength=2 * size).view(2, size)
    counts = counts.cpu()
    if labels is None:
        return DistanceHistograms(counts[0], None, None, sampled)
    return DistanceHistograms(counts.sum(0), counts[0], counts[1], sampled)


def separation(within: Tensor, between: Tensor) -> float:
    """Probability that a pair of one class is nearer than a pair of two, from their histograms (K+1,); ties
    count half. 0.5: distances do not separate classes at all; 1: every pair of one class is nearer. It is the
    area under the ROC curve of "same class", judged by distance. NaN if one of them is empty."""
    within, between = within.double(), between.double()
    farther = between.sum() - between.cumsum(0)
    nearer_within = (within * (farther + between / 2)).sum()
    return float(nearer_within / (within.sum() * between.sum()))


class SubsetPrecision(NamedTuple):
    """mAP with a subset of the bits: over draws of subsets, mean, standard deviation, least, largest; and the
    number of queries that it leaves out, because the gallery has no image of their class."""

    bits: int
    draws: int
    precision: float
    deviation: float
    least: float
    largest: float
    unmatched: int


def precision_by_bits(
    signs: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    *,
    draws: int = 5,
    queries: int = 500,
    seed: int = 0,
) -> list[SubsetPrecision]:
    """mAP@ALL of the code by Hamming distance when only some of its bits, drawn at random, are used.

    Queries are images drawn at random, a fifth of them and at most `queries`; the others are the gallery, the
    same for every number of bits. The spread is that between draws of bits; that between draws of queries
    comes on top. See `bincomm.evaluation.retrieval.mean_average_precision`.

    Args:
        signs: (n, K), labels: (n,) class indices.
        counts: numbers of bits, each from 1 to K; of all K there is one draw.

    Raises:
        ValueError: fewer than 2 images, no such number of bits, or no query with an image of its class.
    """
    bits = as_bits(signs)
    labels = as_labels(labels, len(bits))
    n, size = bits.shape
    if n < 2:
        raise ValueError(f"signs: expected at least 2 images, got {n}")
    if not all(1 <= count <= size for count in counts):
        raise ValueError(f"counts: expected from 1 to {size} bits, got {list(counts)}")
    generator = torch.Generator().manual_seed(seed)
    order, m = torch.randperm(n, generator=generator), max(1, min(queries, n // 5))
    query, gallery = order[:m], order[m:]
    unmatched = int((~torch.isin(labels[query], labels[gallery])).sum())
    result = []
    for count in counts:
        values = []
        for _ in range(1 if count == size else draws):
            chosen = torch.randperm(size, generator=generator)[:count]
            messages = pack_signs(bits[:, chosen].float())
            values.append(
                mean_average_precision(messages[gallery], labels[gallery], messages[query], labels[query])
            )
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        mean = float(np.mean(values))
        least, largest = min(values), max(values)
        result.append(SubsetPrecision(count, len(values), mean, deviation, least, largest, unmatched))
    return result


class Overlap(NamedTuple):
    """How alike the neighborhoods of two codes are: 1 the same, and what it is by chance."""

    overlap: float
    chance: float


def neighbor_overlap(
    signs: Tensor, others: Tensor, k: int = 10, *, queries: int = 1000, seed: int = 0
) -> Overlap:
    """Share of an image's k nearest by Hamming distance that two codes of the same images have in common.

    The image itself is no neighbor. Images tied at rank k share the remaining ranks: each is a member by an
    equal fraction. The overlap is the cosine between the two codes' memberships, averaged over images.
    Without ties that is the number in common over k, and codes that give the same distances have 1 with ties
    as well. Chance is what two codes with nothing in common would have, `k²/(n-1)` over the two norms.

    Args:
        signs: (n, K), others: (n, K'), row by row of the same image.
        k: from 1 to n - 1.
        queries: images whose neighborhoods are compared at most, drawn at random.

    Raises:
        ValueError: different numbers of images, or such a k.
    """
    bits, other = as_bits(signs), as_bits(others)
    n = len(bits)
    if len(other) != n:
        raise ValueError(f"others: expected {n} images like signs, got {len(other)}")
    if not 1 <= k < n:
        raise ValueError(f"k: expected from 1 to one less than the number of images, {n - 1}, got {k}")
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:queries].to(bits.device)
    overlaps, chances = [], []
    for block in rows.split(max(1, BLOCK // n)):
        a, b = (_memberships(pack_signs(code.float()), block, k) for code in (bits, other))
        norms = a.norm(dim=1) * b.norm(dim=1)
        overlaps.append((a * b).sum(1) / norms)
        chances.append(k * k / (n - 1) / norms)
    return Overlap(torch.cat(overlaps).mean().item(), torch.cat(chances).mean().item())


def _memberships(messages: Tensor, rows: Tensor, k: int) -> Tensor:
    """(m, n) whether each image is among the k nearest of some rows: 1, 0, or a fraction where it is tied."""
    # The image itself, at a distance of 0, comes before the k others.
    last = hamming_topk(messages[rows], messages, k + 1)[0][:, k:]
    distances = hamming_distance(messages[rows], messages)
    distances[torch.arange(len(rows), device=rows.device), rows] = torch.iinfo(torch.int32).max
    nearer, tied = distances < last, distances == last
    return nearer + tied * ((k - nearer.sum(1, keepdim=True)) / tied.sum(1, keepdim=True).double())
