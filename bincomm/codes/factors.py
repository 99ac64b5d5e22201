"""What bits carry of known factors: how well each is recovered, which bit belongs to which factor (DCI), and
whether a bit keeps its meaning on classes never seen.

Bits are (n, K) bool and factors (n, F) integers, see `bincomm.codes.information`. All is computed on the CPU,
in fp64 unless otherwise noted.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bincomm.codes.information import check_factors, check_integers, count_ones
from bincomm.evaluation.linear import linear_probe


class Recovery(NamedTuple):
    """Share of the queries whose factor is predicted correctly, (F,), and the same when the prediction is
    always the most frequent value of the gallery, (F,)."""

    accuracy: Tensor
    chance: Tensor


def recover(
    gallery: Tensor, gallery_factors: Tensor, queries: Tensor, query_factors: Tensor, *, seed: int = 0
) -> Recovery:
    """How well a linear classifier predicts each factor from bits, or from features.

    The classifier is `bincomm.evaluation.linear.linear_probe`, trained on the gallery for each factor; bits
    are given to it as ±1. In fp32.

    Args:
        gallery: (N, K) bool or (N, D) floating point; gallery_factors: (N, F) integers.
        queries: (M, K) or (M, D), of the same kind; query_factors: (M, F). A value that the gallery lacks is
            never predicted.
        seed: of the classifiers.

    Raises:
        TypeError: factors that are not integers, or bits compared with features.
        ValueError: shapes that do not fit, no images, or values that are not finite.
    """
    check_integers("gallery_factors", gallery_factors, len(gallery))
    check_integers("query_factors", query_factors, len(queries))
    if query_factors.shape[1] != gallery_factors.shape[1]:
        raise ValueError(
            f"query_factors: expected {gallery_factors.shape[1]} columns, got {query_factors.shape[1]}"
        )
    if gallery.dtype != queries.dtype:
        raise TypeError(f"queries: expected {gallery.dtype} like gallery, got {queries.dtype}")
    if gallery.dtype == torch.bool:
        gallery, queries = 2 * gallery.float() - 1, 2 * queries.float() - 1
    rows = []
    for known, expected in zip(gallery_factors.T, query_factors.T, strict=True):
        values, counts = known.unique(return_counts=True)
        accuracy = linear_probe(gallery, known, queries, expected, seed=seed).accuracy
        rows.append((accuracy, (expected == values[counts.argmax()]).double().mean().item()))
    return Recovery(*torch.tensor(rows, dtype=torch.float64).T)


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
    That of the code is the mean weighted by Σ_f R_kf. Completeness of a factor is `1 - H_K(R_.f)`: 1 where
    only one bit matters; that of the code is the mean. Informativeness is here the share of queries whose
    factor is predicted correctly, to be compared with chance, see `recover`: a factor that the bits do not
    carry has importances too, but they mean nothing, and as they are spread over all bits they lower
    disentanglement much. Where there are such factors, take `disentanglement(importance[:, carried])` of the
    others.

    The predictor is gradient-boosted trees of scikit-learn, as in disentanglement_lib (arXiv 1811.12359),
    and not L1 logistic regression: trees also use what only several bits together say, parity included, and
    have no strength of a penalty that would decide how sparse R looks. Importance is the impurity that splits
    at a bit remove. It takes seconds for each factor with several values, of 64 bits and 2 000 images, and
    grows with both and with the values: give it thousands of images, not all.

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
    for known, expected in zip(gallery_factors.T.cpu(), query_factors.T.cpu(), strict=True):
        model = GradientBoostingClassifier(n_estimators=trees, random_state=seed)
        model.fit(gallery.cpu().numpy(), known.numpy())
        importances.append(torch.from_numpy(model.feature_importances_))
        accuracies.append(model.score(queries.cpu().numpy(), expected.numpy()))
    importance = torch.stack(importances, 1).double()
    accuracy = torch.tensor(accuracies, dtype=torch.float64)
    of_code, by_bit = disentanglement(importance)
    by_factor = 1 - _relative_entropy(importance.T)
    return DCI(
        of_code,
        float(by_factor.mean()),
        float(accuracy.mean()),
        by_bit,
        by_factor,
        accuracy,
        importance,
    )


def disentanglement(importance: Tensor) -> tuple[float, Tensor]:
    """Disentanglement of the code and of each bit, (K,), from the importance (K, F ≥ 2) of bits to factors,
    see `dci`. 0 where nothing is of any importance."""
    by_bit = 1 - _relative_entropy(importance)
    weights = importance.sum(1)
    return float(weights @ by_bit / weights.sum().clamp(min=1e-12)), by_bit


class Meaning(NamedTuple):
    """What bits say about factors, and whether they keep it, (K, F) but the last; see `keeps_meaning`."""

    strength: Tensor
    strength_chance: Tensor
    correlation: Tensor
    accuracy: Tensor
    accuracy_chance: Tensor
    deviation: Tensor  # (F,)

    def by_factor(self) -> tuple[Tensor, Tensor, Tensor]:
        """Correlation, accuracy and accuracy by chance, each (F,): means over bits, weighted by how far
        their strength lies above chance. NaN for a factor about which no bit says anything, and where one of
        the three is NaN."""
        weights = _weights(self.strength, self.strength_chance)
        correlation, accuracy, chance = (
            (weights * values).sum(0) for values in (self.correlation, self.accuracy, self.accuracy_chance)
        )
        return correlation, accuracy, chance


def keeps_meaning(
    seen_bits: Tensor, seen_factors: Tensor, unseen_bits: Tensor, unseen_factors: Tensor
) -> Meaning:
    """Whether a bit says the same about a factor on images of classes never trained on.

    The meaning of a bit b for a factor f is `s_v = p(b = 1 | f = v)`, the share of ones for each value, on
    seen classes; u_v is the same on unseen ones. The definitions are this project's own.

    - strength: share of the bit's variance that the factor explains on seen classes, `Σ p_v·(s_v - s)² /
      (s·(1 - s))`, which is χ²/n of their table; by chance `(V - 1)/(n - 1)`.
    - correlation: Pearson's of s_v and u_v over the values that both have, each value counting alike. 1: the
      meaning is kept, -1: reversed, 0 on average if the values' meanings were permuted, with a standard
      deviation of 1/√(V - 1) for a single bit; also 0 where a bit is constant.
    - deviation: that of the weighted mean over bits that `Meaning.by_factor` gives, if the values' meanings
      were permuted. Bits are not independent witnesses, so that of many bits may be hardly smaller than that
      of one: for a factor with few values a correlation then proves little.
    - accuracy: share of the unseen images whose bit is the one more frequent on seen images of the same
      value. Its chance level ignores the value: the one more frequent on all seen images.

    Noise lowers correlation and accuracy as a loss of meaning does: compare them with the same for other
    images of the seen classes, and use bits whose strength is above chance, as `Meaning.by_factor` does.

    Args:
        seen_bits: (N, K) bool, seen_factors: (N, F) integers, of classes trained on.
        unseen_bits: (M, K) bool, unseen_factors: (M, F) integers, of others; values of a factor that only one
            of both has (as those of the class itself) are left out.

    Returns:
        Each (K, F) fp64, deviation (F,). Correlation is NaN for a factor of which both share fewer than two
        values, accuracy where they share none, deviation also where no bit's strength is above chance.

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


def _check_same_columns(
    bits: Tensor, factors: Tensor, other_bits: Tensor, other_factors: Tensor, names: tuple[str, str]
) -> None:
    for name, expected, given in ((names[0], bits, other_bits), (names[1], factors, other_factors)):
        if expected.shape[1] != given.shape[1]:
            raise ValueError(f"{name}: expected {expected.shape[1]} columns, got {given.shape[1]}")


def _relative_entropy(weights: Tensor) -> Tensor:
    """Entropy of rows (..., V) to base V; 1 for a row of zeros."""
    total = weights.sum(-1, keepdim=True)
    shares = torch.where(total > 0, weights / total, 1 / weights.shape[-1])
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(weights.shape[-1])


def _meaning_of(
    seen_bits: Tensor, seen: Tensor, unseen_bits: Tensor, unseen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The columns (K,) of `Meaning` for one factor, and its deviation, a number."""
    values, indices = torch.cat([seen, unseen]).unique(return_inverse=True)
    of_seen, of_unseen = indices.split([len(seen), len(unseen)])
    ones, images = count_ones(seen_bits, of_seen, len(values))
    new_ones, new_images = count_ones(unseen_bits, of_unseen, len(values))
    ones, new_ones = ones.T.double(), new_ones.T.double()  # (K, V)
    n, all_ones = len(seen), ones.sum(1)
    mean = all_ones / n
    occurs = images > 0
    share = ones[:, occurs] / images[occurs]
    explained = (images[occurs] / n * (share - mean[:, None]) ** 2).sum(1)
    variance = mean * (1 - mean)
    strength = torch.where(variance > 0, explained / variance, 0.0)
    chance = torch.where(variance > 0, (occurs.sum() - 1) / max(n - 1, 1), 0.0)

    both = occurs & (new_images > 0)
    ones, images, new_ones, new_images = ones[:, both], images[both], new_ones[:, both], new_images[both]
    majority_of_value = ones > images / 2  # (K, V)
    majority_of_all = (all_ones > n / 2)[:, None]
    accuracy, accuracy_chance = (
        torch.where(bit, new_ones, new_images - new_ones).sum(1) / new_images.sum()
        for bit in (majority_of_value, majority_of_all)
    )
    if both.sum() < 2:
        correlation = torch.full_like(mean, torch.nan)
        return strength, chance, correlation, accuracy, accuracy_chance, mean.new_tensor(torch.nan)
    s, u = (_unit(x - x.mean(1, keepdim=True)) for x in (ones / images, new_ones / new_images))
    weights = _weights(strength, chance)
    # C = Σ_v A_vv, and with the values of u permuted Σ_v A_vπ(v); rows and columns of A sum to 0.
    deviation = ((weights[:, None] * s).T @ u).norm() / math.sqrt(len(images) - 1)
    return strength, chance, (s * u).sum(1), accuracy, accuracy_chance, deviation


def _weights(strength: Tensor, chance: Tensor) -> Tensor:
    """Of bits, (K, ...), which sum to 1; NaN where none has a strength above chance."""
    weights = (strength - chance).clamp(min=0)
    return weights / weights.sum(0)


def _unit(rows: Tensor) -> Tensor:
    """Rows (K, V) scaled to length 1; 0 where they are 0 up to rounding."""
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-12, rows / length, 0.0)
