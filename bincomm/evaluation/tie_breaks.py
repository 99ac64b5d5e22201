"""What a vote comes to when some of the voters are drawn at random: for images equally near."""

import math

import numpy as np

from bincomm.evaluation.labeled import RESOLUTION

NEGLIGIBLE = 1e-13  # a probability


def chance_to_win(
    votes: np.ndarray, tied: np.ndarray, weight: float, left: int, own: int, powers: np.ndarray
) -> float:
    """Probability that a class gets the most votes, the first of equal ones, when `left` of the tied images,
    drawn at random, add a vote of the same weight each.

    The numbers of drawn images have the multivariate hypergeometric distribution: that of independent
    binomial numbers, of the same p, given their sum. If x of the own class are drawn, each other class may
    have as many as keep its votes below. The probability of that together with the sum is a coefficient of a
    product of truncated generating functions, one a class, computed from their values on the unit circle.

    Args:
        votes: (C,) of the nearer images, tied: (C,) numbers of tied images.
        weight: of a tied image's vote.
        left: drawn images, at least 1 and fewer than are tied.
        own: the class.
        powers: `powers_on_circle(k)` of some k ≥ left.
    """
    total = int(tied.sum())
    others = np.flatnonzero((votes > 0) | (tied > 0))
    others = others[others != own]
    # x of the own class, and how many of each other class leave it the winner.
    x = np.arange(max(0, left - (total - tied[own])), min(left, tied[own]) + 1)
    room = (votes[own] - votes[others, None]) / weight + x
    slack = max(votes.max() / weight, left) / RESOLUTION  # of rounding: equal votes are equal
    first_wins = (others > own)[:, None]
    most = np.where(first_wins, np.floor(room + slack), np.ceil(room - slack) - 1)
    limits = np.clip(most, -1, np.minimum(tied[others], left)[:, None]).astype(np.int64)
    possible = (limits >= 0).all(0)
    p = left / total
    own_law = _binomial(int(tied[own]), p, left)[x]
    likely = possible & (own_law > NEGLIGIBLE)
    if not likely.any():
        return 0.0
    x, limits, own_law = x[likely], limits[:, likely], own_law[likely]
    product = powers[left - x].conj()
    free = total - tied[own]  # images of the classes that cannot win, or hardly
    can_win = tied[others] > limits.min(1)
    for count, limit in zip(tied[others][can_win], limits[can_win], strict=True):
        law = _binomial(int(count), p, left)
        if law[limit.min() + 1 :].sum() > NEGLIGIBLE:
            free -= count
            end = limit.max() + 1
            product *= (law[:end, None] * powers[:end]).cumsum(0)[limit]
    product *= (1 - p + p * powers[1]) ** free
    points = 2 * powers.shape[1] - 1
    both = (2 * product.real.sum(1) - product[:, 0].real) / points
    return float(np.clip((own_law * both).sum() / _binomial(total, p, left)[left], 0, 1))


def powers_on_circle(k: int) -> np.ndarray:
    """Powers 0 to k of points on the unit circle, (k + 1, P), of which the other P - 1 are conjugate: so many
    that of a sum of draws that is k on average no likely value is taken for k.
    """
    half = int(k / 2 + 6 * math.sqrt(k) + 20)
    return np.exp(np.multiply.outer(np.arange(k + 1), 2j * np.pi / (2 * half + 1) * np.arange(half + 1)))


def _binomial(count: int, p: float, largest: int) -> np.ndarray:
    """Probabilities of 0, 1, ... up to min(count, largest) successes."""
    x = np.arange(min(count, largest) + 1)
    chosen = np.concatenate([[0], np.log((count - x[:-1]) / (x[:-1] + 1)).cumsum()])  # log of C(count, x)
    return np.exp(chosen + x * math.log(p) + (count - x) * math.log1p(-p))
