"""What bits carry of known factors: how much, which bit of which factor, and for how long.

A factor is anything known of an image that has finitely many values: its class, its color, where its object
lies. Bits are (n, K) bool, as from `unpack_signs`; factors are (n, F) integers, a column each, whose values
need not be consecutive. Information and entropy are in bits. All is computed on the CPU, in fp64 where not
said otherwise.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    ones, own = bits.cpu().sum(0), entropy(bits)
    columns = []
    for factor in factors.T.cpu():
        values, places = factor.unique(return_inverse=True)
        counts, images = count_ones(bits, places, len(values))
        measured, chance = _information(counts, images), _expected_information(ones, images)
        most = torch.minimum(own, _entropy(images))
        room = most - chance
        corrected = torch.where(room > 1e-9, most * (measured - chance) / room, 0.0)
        columns.append((measured, chance, corrected))
    return Information(*(torch.stack(values, 1) for values in zip(*columns, strict=True)))


def largest_by_chance(bits: Tensor, factor: Tensor, *, draws: int = 200, seed: int = 0) -> float:
    """What the best of K bits tells of a factor by chance, at most, in 19 of 20 cases.

    The factor's values are dealt out anew to the images, `draws` times, and the largest `measured` of all
    bits is noted. Where bits have nothing to do with the factor, their own largest is one draw more, above
    the figure returned with a probability of at most 5 %: to call bits above it significant is to call even
    one of K bits without meaning so in at most 5 % of the cases, whatever the bits have in common (Westfall
    and Young 1993).

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


def count_ones(bits: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How often each bit of (n, K) bool is 1 in the images of each value, (V, K) int64, and how many images
    have it, (V,) int64, of values (n,) from 0 to V - 1 = `count` - 1. Exact for fewer than 2²⁴ images."""
    values = values.cpu()
    images = torch.bincount(values, minlength=count)
    return _sums(bits.cpu().float(), values.argsort(), images), images


def entropy(columns: Tensor) -> Tensor:
    """Entropy in bits of each column of (n, C) bits or factors: (C,) fp64."""
    if columns.dtype == torch.bool:
        ones = columns.cpu().sum(0)
        return _entropy(torch.stack([ones, len(columns) - ones], 1))
    return torch.stack([_entropy(column.unique(return_counts=True)[1]) for column in columns.T.cpu()])


class Gap(NamedTuple):
    """Mutual information gap of each factor, (F,), and the most that any bits could reach on it, (F,); see
    `mutual_information_gap`."""

    gap: Tensor
    ceiling: Tensor


def mutual_information_gap(bits: Tensor, factors: Tensor) -> Gap:
    """Whether one bit alone carries a factor: MIG of Chen et al. 2018 (arXiv 1802.04942), by factor.

    `(I(b₁; f) - I(b₂; f)) / H(f)`, b₁ and b₂ being the bits with the most and the second most information
    on f, as measured; MIG is the mean over factors. 1 where one bit says all and no other anything, 0 where
    two say the same. A bit holds at most one bit, and of a factor of V values no more than a cut of them in
    two: so a factor of more than two values has a ceiling, the entropy of the most even cut over H(f), and
    can lie in several bits with no gap at all: read it beside `dci`, which allows for that.

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
    halves = torch.tensor(
        [_most_even_half(factor.unique(return_counts=True)[1].tolist()) for factor in factors.T.cpu()]
    )
    most = _entropy(torch.stack([halves, len(factors) - halves], 1))
    return Gap((first - second) / entropies, most / entropies)


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
    too, but they mean nothing, and being spread over all bits they push disentanglement far down. Where there
    are such factors, take `disentanglement(importance[:, carried])` of the others.

    The predictor is gradient-boosted trees of scikit-learn, as in disentanglement_lib (arXiv 1811.12359),
    and not L1 logistic regression: trees also read what only several bits together say, parity included, and
    there is no strength of a penalty to be chosen that would decide how sparse R looks. Importance is the
    impurity that splits at a bit take away. It takes seconds for each factor with several values, of 64 bits
    and 2 000 images; it grows with both and with the values: show it thousands of images, not all.

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
    all_in_all, by_bit = disentanglement(importance)
    by_factor = 1 - _relative_entropy(importance.T)
    return DCI(
        all_in_all,
        float(by_factor.mean()),
        float(accuracy.mean()),
        by_bit,
        by_factor,
        accuracy,
        importance,
    )


def disentanglement(importance: Tensor) -> tuple[float, Tensor]:
    """Disentanglement of all bits and of each, (K,), from the importance (K, F ≥ 2) of bits to factors; see
    `dci`. 0 where nothing is of any importance."""
    by_bit = 1 - _relative_entropy(importance)
    weights = importance.sum(1)
    return float(weights @ by_bit / weights.sum().clamp(min=1e-12)), by_bit


class Meaning(NamedTuple):
    """What bits mean of factors, and whether they keep it, (K, F) each but the last; see `keeps_meaning`."""

    strength: Tensor
    strength_chance: Tensor
    correlation: Tensor
    agreement: Tensor
    agreement_chance: Tensor
    deviation: Tensor  # (F,)

    def by_factor(self) -> tuple[Tensor, Tensor, Tensor]:
        """Correlation, agreement and agreement by chance, each (F,): means over bits, weighted by how far
        their strength lies above chance. NaN for a factor of which no bit says anything, and where it cannot
        be told."""
        weights = _weights(self.strength, self.strength_chance)
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
    - deviation: that of the weighted mean over bits that `Meaning.by_factor` gives, if the values' meanings
      were dealt out anew. Bits are no independent witnesses, so many of them may have one hardly smaller than
      a single bit's: of a factor with few values a correlation then shows little.
    - agreement: share of the unseen images whose bit is the one more frequent on seen images of the same
      value. Its chance level ignores the value: the one more frequent on all seen images.

    Noise pulls correlation and agreement down as a loss of meaning does: compare them with the same for other
    images of the seen classes, and look at bits whose strength is above chance, as `Meaning.by_factor` does.

    Args:
        seen_bits: (N, K) bool, seen_factors: (N, F) integers, of classes trained on.
        unseen_bits: (M, K) bool, unseen_factors: (M, F) integers, of others; what is not among the values of
            a factor in both (as are those of the class itself) is left out.

    Returns:
        Each (K, F) fp64, deviation (F,). Correlation is NaN for a factor of which both have fewer than two
        values, agreement where they have none, deviation also where no bit's strength is above chance.

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
    return Meaning(*(torch.stack(values, -1) for values in zip(*columns, strict=True)))


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
    shares = counts / counts.sum(-1, keepdim=True, dtype=torch.float64)
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(2) + 0.0


def _relative_entropy(weights: Tensor) -> Tensor:
    """Entropy of rows (..., V) to base V; 1 for a row of zeros."""
    total = weights.sum(-1, keepdim=True)
    shares = torch.where(total > 0, weights / total, 1 / weights.shape[-1])
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(weights.shape[-1])


def _sums(rows: Tensor, order: Tensor, images: Tensor) -> Tensor:
    """(V, K) int64 sums of the first `images[0]` rows in this order, the next `images[1]`, and so on."""
    return F.embedding_bag(order, rows, images.cumsum(0) - images, mode="sum").long()


def _most_even_half(images: list[int]) -> int:
    """Of values with so many images, how many the values of a half have that is as near to half as can be."""
    n, sums = sum(images), 1  # bit i: some of the values have i images together
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
    """E[I] in bits, (K,), of bits that are 1 in `ones` (K,) of the images and a factor whose values are those
    of `images` (V,), over all orders: `Σ_v Σ_m h(m)·[m/n·log(n·m/(b·a)) + (a-m)/n·log(n·(a-m)/((n-b)·a))]`,
    a images with value v, b with the bit, h(m) the probability that m have both."""
    n = int(images.sum())
    ones, place = ones.unique(return_inverse=True)
    factorials = torch.lgamma(torch.arange(1, n + 2, dtype=torch.float64))  # their logarithms
    b = ones[:, None]
    expected = torch.zeros(len(ones), dtype=torch.float64)
    for a, times in torch.stack(images.unique(return_counts=True), 1).tolist():
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
        expected += times * (possible * logarithm.exp() * (inside + outside)).sum(1) / n
    return expected[place] / math.log(2)


def _meaning_of(
    seen_bits: Tensor, seen: Tensor, unseen_bits: Tensor, unseen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The columns (K,) of `Meaning` for one factor, and the last, a number."""
    values, places = torch.cat([seen, unseen]).unique(return_inverse=True)
    (ones, images), (their_ones, their_images) = (
        count_ones(bits, some, len(values))
        for bits, some in zip((seen_bits, unseen_bits), places.split([len(seen), len(unseen)]), strict=True)
    )
    ones, their_ones = ones.T.double(), their_ones.T.double()  # (K, V)
    n, all_ones = len(seen), ones.sum(1)
    mean = all_ones / n
    had = images > 0
    share = ones[:, had] / images[had]
    explained = (images[had] / n * (share - mean[:, None]) ** 2).sum(1)
    variance = mean * (1 - mean)
    strength = torch.where(variance > 0, explained / variance, 0.0)
    chance = torch.where(variance > 0, (had.sum() - 1) / max(n - 1, 1), 0.0)

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
        correlation = torch.full_like(mean, torch.nan)
        return strength, chance, correlation, agreed, agreed_by_chance, mean.new_tensor(torch.nan)
    s, u = (_unit(x - x.mean(1, keepdim=True)) for x in (ones / images, their_ones / their_images))
    weights = _weights(strength, chance)
    # C = Σ_v A_vv, and with the values of u dealt out anew Σ_v A_vπ(v); rows and columns of A sum to 0.
    deviation = ((weights[:, None] * s).T @ u).norm() / math.sqrt(len(images) - 1)
    return strength, chance, (s * u).sum(1), agreed, agreed_by_chance, deviation


def _weights(strength: Tensor, chance: Tensor) -> Tensor:
    """Of bits, (K, ...), which sum to 1; NaN where none has a strength above chance."""
    weights = (strength - chance).clamp(min=0)
    return weights / weights.sum(0)


def _unit(rows: Tensor) -> Tensor:
    """Rows (K, V) of length 1; 0 where they are 0 but for rounding."""
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-12, rows / length, 0.0)
