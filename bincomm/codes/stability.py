"""What two codes of the same images have in common: of two views, or of two checkpoints.

Signs are (n, K) and (n, K'), row by row of the same image, see `bincomm.codes.arguments`; arithmetic is in
fp64, and what is drawn at random has a seed of its own. For neighbors in common see
`bincomm.codes.distances.neighbor_overlap`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor

from bincomm.bits import binary_entropy
from bincomm.codes.arguments import as_bits
from bincomm.codes.usage import cross_correlations, share_of_ones


class Stability(NamedTuple):
    """How often a bit is the same in two views of an image, (K,) each."""

    equal: Tensor  # share of the images where it is, from 0 to 1
    chance: Tensor  # the same for views of two different images
    kappa: Tensor  # 0 chance, 1 always: (equal - chance)/(1 - chance)
    information: Tensor  # of one view's bit about the other's, in bits, from 0 to 1


def stability(signs: Tensor, others: Tensor) -> Stability:
    """How often each bit is equal in two views of the same images, against chance (Cohen's kappa).

    Chance is `p q + (1-p)(1-q)`, with the shares of ones of both views: a bit that is nearly always 1 is
    nearly always equal, and has a kappa near 0 all the same. A constant bit's kappa is 0. The standard error
    of the share is at most 1/(2√n). The mutual information is that of the four shares of pairs of bits, less
    its mean for independent bits, 1/(2n ln 2), and at least 0; its sum over the bits counts those that repeat
    each other, too.

    Args:
        signs, others: (n, K) of one view and of the other, row by row of the same image.

    Raises:
        ValueError: different shapes.
    """
    bits, other = as_bits(signs), as_bits(others)
    if bits.shape != other.shape:
        raise ValueError(f"others: expected shape {tuple(bits.shape)} like signs, got {tuple(other.shape)}")
    p, q, equal = (share_of_ones(x) for x in (bits, other, bits == other))
    chance = p * q + (1 - p) * (1 - q)
    room = 1 - chance
    kappa = torch.where(room > 1e-12, (equal - chance) / room.clamp(min=1e-12), 0.0)
    both = share_of_ones(bits & other)
    joint = torch.stack([both, p - both, q - both, 1 - p - q + both]).clamp(min=0)
    entropy_of_pairs = -torch.xlogy(joint, joint).sum(0) / math.log(2)
    information = binary_entropy(p) + binary_entropy(q) - entropy_of_pairs - 1 / (2 * len(bits) * math.log(2))
    return Stability(equal, chance, kappa, information.clamp(min=0))


class Prediction(NamedTuple):
    """How well each bit of a code is predicted by another code of the same images, (K,) each."""

    correlation: Tensor  # largest |correlation| with a single bit of the other
    chance: float  # its mean if the codes were independent
    probe: Tensor  # kappa of a linear probe on all bits of the other: 1 always right, 0 chance


def predicted_from(signs: Tensor, others: Tensor, *, images: int = 10_000, seed: int = 0) -> Prediction:
    """How well each bit of a code is predicted by another code of the same images.

    By the best single bit, or its inverse: the largest |correlation|. For independent codes that is not 0
    but about √(2 ln K'/n), the largest of K' by chance; `chance` is its mean over the bits after the images
    of the other code were permuted. And by a probe, ridge regression on all K' bits: fitted on one half of
    the images and tested on the other, and the other way round, its strength chosen by leave-one-out on the
    fitted half. Its score is Cohen's kappa between the predicted sign and the bit, 0 on average by chance. It
    needs several times K' images; with fewer it falls short even for equal codes. Constant bits: 0.

    Args:
        signs: (n, K), others: (n, K'), row by row of the same image.
        images: at most so many are used for the probe, drawn at random.

    Raises:
        ValueError: different numbers of images, or fewer than 4.
    """
    bits, other = as_bits(signs), as_bits(others)
    n = len(bits)
    if len(other) != n or n < 4:
        raise ValueError(f"others: expected as many images as in signs, at least 4; got {len(other)} and {n}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(bits.device)
    varying = bits.any(0) & ~bits.all(0)
    best = cross_correlations(bits, other).abs().amax(1)
    shuffled = cross_correlations(bits, other[order]).abs().amax(1)[varying]
    halves = order[:images].chunk(2)
    predicted = torch.zeros_like(bits)
    for fitted, tested in (halves, halves[::-1]):
        x, y = (2.0 * code[fitted].double().cpu().numpy() - 1 for code in (other, bits))
        model = RidgeCV(alphas=len(fitted) * np.array([1e-3, 1e-2, 1e-1, 1.0])).fit(x, y)
        logits = model.predict(2.0 * other[tested].double().cpu().numpy() - 1).reshape(len(tested), -1)
        predicted[tested] = torch.from_numpy(logits > 0).to(bits.device)
    used = torch.cat(halves)
    probe = stability(predicted[used], bits[used]).kappa
    return Prediction(best, float(shuffled.mean()) if varying.any() else 0.0, probe)
