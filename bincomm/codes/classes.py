"""What the bits of a code say about classes, or about any variable of few values.

Signs are (n, K), labels (n,), see `bincomm.codes.arguments`. Information is in bits, arithmetic in fp64.
"""

from typing import NamedTuple

import torch
from scipy.stats import beta, binom
from torch import Tensor

from bincomm.codes import information
from bincomm.codes.arguments import as_bits, as_labels

MIN_CLASS_IMAGES = 10  # from so many images on, a class's share of ones means something


class SignificantInformation(NamedTuple):
    """Mutual information of each bit with a variable, (K,) each, in bits."""

    corrected: Tensor  # for chance: 0 on average for an independent bit
    plug_in: Tensor  # uncorrected
    significant: Tensor  # bool: larger than that of any of K independent bits, at a level of 5 %
    threshold: float  # the plug-in estimate above which it is significant
    entropy: float  # of the variable: the most that can be known of it (a bit has at most 1)


def significant_information(
    signs: Tensor, values: Tensor, *, draws: int = 200, seed: int = 0
) -> SignificantInformation:
    """Mutual information of every bit with a variable of few values, such as a class or an attribute.

    The plug-in estimate from n images is above 0 by chance, by about (values - 1)/(2n ln 2), and is corrected
    as in `bincomm.codes.information.mutual_information`: by chance the corrected value is 0 on average, and
    so sometimes below 0; where one variable determines the other it is the smaller entropy. `significant`
    compares with `bincomm.codes.information.largest_by_chance`: among K independent bits the probability of
    calling even one significant is 5 %. That holds for one variable; of twenty independent ones, one may have
    a significant bit.

    Args:
        signs: (n, K), values: (n,) int; images with a value below 0, unknown, are left out.
        draws: permutations, at least 19.

    Raises:
        ValueError: another number of values than of images, no known value, or too few draws.
    """
    bits = as_bits(signs)
    values = as_labels(values, len(bits), unknown=True)
    known = values >= 0
    if not known.any():
        raise ValueError("values: expected at least one that is known (0 or above), got none")
    bits, values = bits[known], values[known]
    plug_in, _, corrected = (x[:, 0] for x in information.mutual_information(bits, values[:, None]))
    threshold = information.largest_by_chance(bits, values, draws=draws, seed=seed)
    entropy = information.entropy(values[:, None]).item()
    return SignificantInformation(corrected, plug_in, plug_in > threshold + 1e-12, threshold, entropy)


def class_shares(signs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """How many images each class has, (C,) int64, and the share of them in which each bit is 1, (C, K); NaN
    in classes without images.

    Raises:
        ValueError: another number of labels than of images, or a label that is not below `classes`.
    """
    ones, counts = _count_ones(signs, labels, classes)
    return counts, ones / counts[:, None].double()


class MajorityClasses(NamedTuple):
    """In which classes each bit is mostly 1, and mostly 0, (C, K) bool each; where undecided, neither."""

    ones: Tensor
    zeros: Tensor


def majority_classes(signs: Tensor, labels: Tensor, classes: int, *, level: float = 0.01) -> MajorityClasses:
    """Classes that share a bit: those in which significantly more than half of the images have it.

    One-sided exact binomial tests of each class and bit against a share of 1/2, at `level` each: of a hundred
    that are truly undecided, one at most is called mostly 1, and one mostly 0. At 0.01, a class of fewer than
    7 images is called neither.

    Raises:
        ValueError: see `class_shares`.
    """
    ones, images = (counts.numpy() for counts in _count_ones(signs, labels, classes))
    images = images[:, None]
    # P(at least so many ones), and so many zeros, of as many fair tosses; of none it is 1.
    tests = [torch.from_numpy(binom.sf(x - 1, images, 0.5) <= level) for x in (ones, images - ones)]
    return MajorityClasses(*tests)


def most_alike(images: Tensor, shares: Tensor) -> tuple[int, int]:
    """The two classes whose shares of ones, as from `class_shares`, differ least on average; of the classes
    of MIN_CLASS_IMAGES images or more, if there are two."""
    candidates = (images >= MIN_CLASS_IMAGES).nonzero().flatten()
    if len(candidates) < 2:
        candidates = (images > 0).nonzero().flatten()
    difference = torch.cdist(shares[candidates], shares[candidates], p=1).fill_diagonal_(float("inf"))
    first, second = divmod(int(difference.argmin()), len(candidates))
    return int(candidates[first]), int(candidates[second])


class ClassDifference(NamedTuple):
    """How much more often each bit is 1 in one class than in another, with an interval, (K,) each."""

    difference: Tensor  # of the shares, from -1 to 1
    low: Tensor
    high: Tensor
    order: list[int]  # the bits, largest difference first


def class_difference(
    signs: Tensor, labels: Tensor, first: int, second: int, *, level: float = 0.05
) -> ClassDifference:
    """How well each bit separates two classes: the share of ones in the first minus that in the second.

    An interval combines those of the two shares by the square-and-add method of Newcombe (Statistics in
    Medicine 17, 1998), but with exact intervals (Clopper and Pearson 1934): with Wilson's, and many bits, a
    class of few images would differ from a large one in nearly every rare bit that its images happen to have.
    Each is at a level of `level`/K (Bonferroni): all K hold together with a probability of 1 - `level`, so
    the largest of many differences is not overrated.

    Raises:
        ValueError: another number of labels than of images, or a class without images.
    """
    bits = as_bits(signs)
    labels = as_labels(labels, len(bits))
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
    return ClassDifference(difference, low, high, order)


def _count_ones(signs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    bits = as_bits(signs)
    labels = as_labels(labels, len(bits))
    if int(labels.max()) >= classes:
        raise ValueError(f"labels: expected below {classes}, the number of classes, got {int(labels.max())}")
    return information.count_ones(bits, labels, classes)
