"""What bits carry of known factors: how much, which bit of which factor, and for how long.

A factor is anything known of an image that has finitely many values: its class, its colour, where its object
lies. Bits are (n, K) bool, as from `unpack_signs`; factors are (n, F) integers, a column each, whose values
need not be consecutive. Information and entropy are in bits. All is computed on the CPU, in fp64 where not
said otherwise.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bincomm.evaluation.linear import linear_probe


class Information(NamedTuple):
    """Mutual information of each bit and each factor, (K, F) in bits; see `mutual_information`."""

    measured: Tensor
    chance: Tensor
    corrected: Tensor


def mutual_information(bits: Tensor, factors: Tensor) -> Information:
    """How much each bit tells of each factor.

    `I(b; f) = Σ p(b, v)·log₂(p(b, v) / (p(b)·p(v)))`, p being shares of the images: at most the smaller of
    the two entropies, and above 0 by chance. What is to be expected by chance is E[I] over all orders of the
    factor's column, where counts of pairs are hypergeometric; it is computed exactly, not drawn. The
    corrected value is that of adjusted mutual information (Vinh, Epps and Bailey, JMLR 2010) left in bits,
    `M·(I - E[I])/(M - E[I])` with `M = min(H(b), H(f))`: M where the one determines the other, 0 on average
    where they are independent, and so below 0 at times.

    Args:
        bits: (n, K) bool.
        factors: (n, F) integers.

    Returns:
        I, E[I] and the corrected I, each (K, F) fp64. All are 0 for a bit or a factor that does not vary.

    Raises:
        TypeError, ValueError: see `check_factors`.
    """
    check_factors(bits, factors)
    measured, chance, most = (
        torch.zeros(bits.shape[1], factors.shape[1], dtype=torch.float64) for _ in range(3)
    )
    entropies = entropy(bits)
    for column, factor in enumerate(factors.T.cpu()):
        ones, images = _count_ones(bits, *factor.unique(return_inverse=True))
        counts = torch.stack([ones, images - ones])  # (2, K, V)
        joint = _entropy(counts.movedim(0, 1).flatten(1))
        measured[:, column] = (entropies + _entropy(images) - joint).clamp(min=0)
        chance[:, column] = _expected_information(ones.sum(1), images)
        most[:, column] = torch.minimum(entropies, _entropy(images))
    room = most - chance
    corrected = torch.where(room > 1e-9, most * (measured - chance) / room, 0.0)
    return Information(measured, chance, corrected)


def entropy(columns: Tensor) -> Tensor:
    """Entropy in bits of each column of (n, C) bits or factors: (C,) fp64."""
    counts = [column.unique(return_counts=True)[1].double() for column in columns.T.cpu()]
    return torch.stack([_entropy(count) for count in counts])


class Gap(NamedTuple):
    """Mutual information gap of each factor, (F,), and the most that any bits could reach, (F,); see
    `mutual_information_gap`."""

    gap: Tensor
    ceiling: Tensor


def mutual_information_gap(bits: Tensor, factors: Tensor) -> Gap:
    """Whether one bit alone carries a factor: MIG of Chen et al. 2018 (arXiv 1802.04942), by factor.

    `(I(b₁; f) - I(b₂; f)) / H(f)`, b₁ and b₂ being the bits with the most and the second most information
    on f, as measured; MIG is the mean over factors. 1 where one bit says all and no other anything, 0 where
    two say the same. A bit holds at most one bit, so that a factor of more entropy has a ceiling,
    `1/H(f)`, and can lie in several bits with no gap at all: read it beside `dci`, which allows for that.

    Args:
        bits: (n, K ≥ 2) bool.
        factors: (n, F) integers; each has to vary.

    Raises:
        TypeError, ValueError: see `check_factors`; fewer than two bits, or a factor that does not vary.
    """
    check_factors(bits, factors, varied=True)
    if bits.shape[1] < 2:
        raise ValueError(f"bits: expected at least 2, got {bits.shape[1]}")
    first, second = mutual_information(bits, factors).measured.topk(2, dim=0).values
    entropies = entropy(factors)
    return Gap((first - second) / entropies, (1 / entropies).clamp(max=1))


class Recovery(NamedTuple):
    """Share of the queries in which each factor is found, (F,), and by naming always the value commonest in
    the gallery, (F,)."""

    accuracy: Tensor
    chance: Tensor


def recover(
    gallery: Tensor, gallery_factors: Tensor, queries: Tensor, query_factors: Tensor, *, seed: int = 0
) -> Recovery:
    """How well a linear classifier reads each factor off bits, or off features.

    The classifier is `bincomm.evaluation.linear.linear_probe`, trained on the gallery for each factor; bits
    are shown to it as ±1. In fp32.

    Args:
        gallery: (N, K) bool or (N, D) floating point; gallery_factors: (N, F) integers.
        queries: (M, K) or (M, D), of the same kind; query_factors: (M, F). A value that the gallery lacks is
            missed.
        seed: of the classifiers.

    Raises:
        TypeError: factors that are no integers, or bits compared with features.
        ValueError: shapes that do not fit, no images, or values that are not finite.
    """
    _check_integers("gallery_factors", gallery_factors, len(gallery))
    _check_integers("query_factors", query_factors, len(queries))
    if query_factors.shape[1] != gallery_factors.shape[1]:
        raise ValueError(
            f"query_factors: expected {gallery_factors.shape[1]} columns, got {query_factors.shape[1]}"
        )
    if gallery.dtype != queries.dtype:
        raise TypeError(f"queries: expected {gallery.dtype} like gallery, got {queries.dtype}")
    if gallery.dtype == torch.bool:
        gallery, queries = 2 * gallery.float() - 1, 2 * queries.float() - 1
    found = []
    for known, asked in zip(gallery_factors.T, query_factors.T, strict=True):
        values, counts = known.unique(return_counts=True)
        accuracy = linear_probe(gallery, known, queries, asked, seed=seed).accuracy
        found.append((accuracy, (asked == values[counts.argmax()]).double().mean().item()))
    return Recovery(*torch.tensor(found, dtype=torch.float64).T)


class DCI(NamedTuple):
    """How bits and factors are paired; see `dci`."""

    disentanglement: float
    completeness: float
    informativeness: float
    by_bit: Tensor  # (K,) disentanglement
    by_factor: Tensor  # (F,) completeness
    accuracy: Tensor  # (F,) informativeness
    importance: Tensor  # (K, F), columns sum to 1


def dci(
    gallery: Tensor,
    gallery_factors: Tensor,
    queries: Tensor,
    query_factors: Tensor,
    *,
    trees: int = 100,
    seed: int = 0,
) -> DCI:
    """Disentanglement, completeness and informativeness (Eastwood and Williams, ICLR 2018).

    Of R_kf, the importance of bit k to a predictor of factor f, the columns sum to 1. Disentanglement of a
    bit is `1 - H_F(R_k. / Σ_f R_kf)`, H_F being entropy to base F: 1 where it matters to one factor alone.
    All in all it is the mean weighted by Σ_f R_kf. Completeness of a factor is `1 - H_K(R_.f)`: 1 where one
    bit alone matters; all in all the mean. Informativeness is here the share of queries in which the factor
    is found, to be held against chance, see `recover`: a factor that the bits do not carry has importances
    too, but they mean nothing.

    The predictor is gradient-boosted trees of scikit-learn, as in disentanglement_lib (arXiv 1811.12359),
    and not L1 logistic regression: trees also read what only several bits together say, parity included, and
    there is no strength of a penalty to be chosen that would decide how sparse R looks. Importance is the
    impurity that splits at a bit take away. It takes seconds for each factor with several values.

    Args:
        gallery: (N, K ≥ 2) bool, gallery_factors: (N, F ≥ 2) integers; each has to vary.
        queries: (M, K) bool, query_factors: (M, F) integers.
        trees: of each value of a factor.
        seed: decides between bits that are equally good.

    Raises:
        TypeError, ValueError: see `check_factors`; fewer than two bits or factors, a factor that does not
            vary, or shapes that do not fit.
    """
    from sklearn.ensemble import GradientBoostingClassifier

    check_factors(gallery, gallery_factors, ("gallery", "gallery_factors"), varied=True)
    check_factors(queries, query_factors, ("queries", "query_factors"))
    if min(gallery.shape[1], gallery_factors.shape[1]) < 2:
        raise ValueError(
            f"gallery: expected at least 2 bits and 2 factors, got {gallery.shape[1]} and "
            f"{gallery_factors.shape[1]}"
        )
    _check_same_columns(gallery, gallery_factors, queries, query_factors, ("queries", "query_factors"))
    importances, accuracies = [], []
    for known, asked in zip(gallery_factors.T.cpu(), query_factors.T.cpu(), strict=True):
        model = GradientBoostingClassifier(n_estimators=trees, random_state=seed)
        model.fit(gallery.cpu().numpy(), known.numpy())
        importances.append(torch.from_numpy(model.feature_importances_))
        accuracies.append(model.score(queries.cpu().numpy(), asked.numpy()))
    importance = torch.stack(importances, 1).double()
    accuracy = torch.tensor(accuracies, dtype=torch.float64)
    by_bit = 1 - _relative_entropy(importance)
    by_factor = 1 - _relative_entropy(importance.T)
    weights = importance.sum(1) / importance.sum()
    return DCI(
        float(weights @ by_bit),
        float(by_factor.mean()),
        float(accuracy.mean()),
        by_bit,
        by_factor,
        accuracy,
        importance,
    )


class Meaning(NamedTuple):
    """What bits mean of factors, and whether they keep it, each (K, F); see `keeps_meaning`."""

    strength: Tensor
    strength_chance: Tensor
    correlation: Tensor
    agreement: Tensor
    agreement_chance: Tensor

    def by_factor(self) -> tuple[Tensor, Tensor, Tensor]:
        """Correlation, agreement and agreement by chance, each (F,): means over bits, weighted by how far
        their strength lies above chance. NaN for a factor of which no bit says anything, and where it cannot
        be told."""
        weights = (self.strength - self.strength_chance).clamp(min=0)
        weights = weights / weights.sum(0)  # NaN where there are none
        return tuple(
            (weights * values).sum(0) for values in (self.correlation, self.agreement, self.agreement_chance)
        )


def keeps_meaning(
    seen_bits: Tensor, seen_factors: Tensor, unseen_bits: Tensor, unseen_factors: Tensor
) -> Meaning:
    """Whether a bit means of a factor the same on images of classes never trained on.

    The meaning of a bit b for a factor f is `s_v = p(b = 1 | f = v)`, the share of ones for each value, on
    seen classes; u_v is the same on unseen ones. The definitions are this project's own.

    - strength: share of the bit's variance that the factor explains on seen classes, `Σ p_v·(s_v - s)² /
      (s·(1 - s))`, which is χ²/n of their table; by chance `(V - 1)/(n - 1)`.
    - correlation: Pearson's of s_v and u_v over the values that both have, all alike. 1 the meaning is kept,
      -1 turned round, 0 on average if the values' meanings were dealt out anew, with a standard deviation of
      1/√(V - 1) for a single bit; 0 also where a bit is constant.
    - agreement: share of the unseen images whose bit is the one more frequent on seen images of the same
      value. Its chance level ignores the value: the one more frequent on all seen images.

    Noise pulls correlation and agreement down as a loss of meaning does: compare them with the same for other
    images of the seen classes, and look at bits whose strength is above chance, as `Meaning.by_factor` does.

    Args:
        seen_bits: (N, K) bool, seen_factors: (N, F) integers, of classes trained on.
        unseen_bits: (M, K) bool, unseen_factors: (M, F) integers, of others; what is not among the values of
            a factor in both (as are those of the class itself) is left out.

    Returns:
        Each (K, F) fp64. Correlation is NaN for a factor of which both have fewer than two values, agreement
        where they have none.

    Raises:
        TypeError, ValueError: see `check_factors`, or shapes that do not fit.
    """
    names = ("unseen_bits", "unseen_factors")
    check_factors(seen_bits, seen_factors, ("seen_bits", "seen_factors"))
    check_factors(unseen_bits, unseen_factors, names)
    _check_same_columns(seen_bits, seen_factors, unseen_bits, unseen_factors, names)
    columns = [
        _meaning_of(seen_bits, seen, unseen_bits, unseen)
        for seen, unseen in zip(seen_factors.T.cpu(), unseen_factors.T.cpu(), strict=True)
    ]
    return Meaning(*(torch.stack(values, 1) for values in zip(*columns, strict=True)))


def check_factors(
    bits: Tensor, factors: Tensor, names: tuple[str, str] = ("bits", "factors"), *, varied: bool = False
) -> None:
    """Raise, naming the argument, unless there are bits and factors of the same images.

    Raises:
        TypeError: bits are not bool, or factors no integers.
        ValueError: not (n, K) and (n, F) with n, K, F ≥ 1; with `varied`, a factor that has one value alone.
    """
    if bits.dtype != torch.bool:
        raise TypeError(f"{names[0]}: expected bool, got {bits.dtype}")
    if bits.dim() != 2 or bits.numel() == 0:
        raise ValueError(f"{names[0]}: expected shape (n ≥ 1, K ≥ 1), got {tuple(bits.shape)}")
    _check_integers(names[1], factors, len(bits))
    if varied and (constant := (factors == factors[0]).all(0).nonzero()).numel():
        raise ValueError(f"{names[1]}: expected every factor to vary, column {int(constant[0])} does not")


def _check_integers(name: str, factors: Tensor, images: int) -> None:
    if factors.dtype.is_floating_point or factors.dtype.is_complex or factors.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {factors.dtype}")
    if factors.dim() != 2 or factors.shape[1] == 0 or len(factors) != images:
        raise ValueError(f"{name}: expected shape ({images}, F ≥ 1), got {tuple(factors.shape)}")


def _check_same_columns(
    bits: Tensor, factors: Tensor, others: Tensor, their_factors: Tensor, names: tuple[str, str]
) -> None:
    for name, ours, theirs in ((names[0], bits, others), (names[1], factors, their_factors)):
        if ours.shape[1] != theirs.shape[1]:
            raise ValueError(f"{name}: expected {ours.shape[1]} columns, got {theirs.shape[1]}")


def _entropy(counts: Tensor) -> Tensor:
    """Entropy in bits of counts (..., V)."""
    shares = counts / counts.sum(-1, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(2)


def _relative_entropy(weights: Tensor) -> Tensor:
    """Entropy of rows (..., V) to base V; 1 for a row of zeros."""
    total = weights.sum(-1, keepdim=True)
    shares = torch.where(total > 0, weights / total, 1 / weights.shape[-1])
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(weights.shape[-1])


def _count_ones(bits: Tensor, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of images whose values are `values[places]`: how often each bit is 1 for each value, (K, V), and how
    many images have it, (V,); fp64, exact."""
    ones = torch.zeros(len(values), bits.shape[1], dtype=torch.float64)
    ones.index_add_(0, places, bits.cpu().double())
    return ones.T, torch.bincount(places, minlength=len(values)).double()


def _expected_information(ones: Tensor, images: Tensor) -> Tensor:
    """E[I] in bits, (K,), of bits that are 1 in `ones` (K,) of the images and a factor whose values are those
    of `images` (V,), over all orders: `Σ_v Σ_m h(m)·[m/n·log(n·m/(b·a)) + (a-m)/n·log(n·(a-m)/((n-b)·a))]`,
    a images with value v, b with the bit, h(m) the probability that m have both."""
    n = images.sum()
    ones, place = ones.unique(return_inverse=True)
    b = ones[:, None]
    expected = torch.zeros(len(ones), dtype=torch.float64)
    for a, times in zip(*images.unique(return_counts=True), strict=True):
        m = torch.arange(int(a) + 1, dtype=torch.float64)
        possible = (m <= b) & (a - m <= n - b)
        logarithm = _log_choose(b, m) + _log_choose(n - b, a - m) - _log_choose(n, a)
        probability = torch.where(possible, logarithm, -torch.inf).exp()
        inside = torch.special.xlogy(m, n * m / (b * a).clamp(min=1))
        outside = torch.special.xlogy(a - m, n * (a - m) / ((n - b) * a).clamp(min=1))
        expected += times * torch.where(possible, probability * (inside + outside) / n, 0.0).sum(1)
    return expected[place] / math.log(2)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of n over k; anything where k is not among 0 ... n."""
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)


def _meaning_of(
    seen_bits: Tensor, seen: Tensor, unseen_bits: Tensor, unseen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five columns (K,) of `Meaning` for one factor."""
    values, places = torch.cat([seen, unseen]).unique(return_inverse=True)
    ones, images = _count_ones(seen_bits, values, places[: len(seen)])
    their_ones, their_images = _count_ones(unseen_bits, values, places[len(seen) :])
    n, all_ones = images.sum(), ones.sum(1)
    mean = all_ones / n
    had = images > 0
    share = ones[:, had] / images[had]
    explained = (images[had] / n * (share - mean[:, None]) ** 2).sum(1)
    variance = mean * (1 - mean)
    strength = torch.where(variance > 0, explained / variance, 0.0)
    chance = torch.where(variance > 0, (had.sum() - 1) / (n - 1), 0.0)

    both = had & (their_images > 0)
    ones, images, their_ones, their_images = (
        ones[:, both], images[both], their_ones[:, both], their_images[both],
    )  # fmt: skip
    likely = ones > images / 2  # (K, V)
    commoner = (all_ones > n / 2)[:, None]
    agreed, agreed_by_chance = (
        torch.where(bit, their_ones, their_images - their_ones).sum(1) / their_images.sum()
        for bit in (likely, commoner)
    )
    if both.sum() < 2:
        return strength, chance, torch.full_like(mean, torch.nan), agreed, agreed_by_chance
    s, u = ones / images, their_ones / their_images
    s, u = s - s.mean(1, keepdim=True), u - u.mean(1, keepdim=True)
    scale = (s.square().sum(1) * u.square().sum(1)).sqrt()
    correlation = torch.where(scale > 1e-12, (s * u).sum(1) / scale, 0.0)
    return strength, chance, correlation, agreed, agreed_by_chance
