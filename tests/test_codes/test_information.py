"""Against scikit-learn, brute force, and cases computed by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from factor_tables import all_combinations, brute_force_information, exact, random_bits
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from bincomm.codes.information import (
    count_ones,
    entropy,
    largest_by_chance,
    mutual_information,
    mutual_information_gap,
)


def test_information_of_copies_is_entropy():
    factors = all_combinations(2, 2, 3, times=5)
    bits = torch.stack([factors[:, 0] == 1, factors[:, 1] == 0, factors[:, 2] == 2], 1)
    result = mutual_information(bits, factors)
    third = math.log2(3) - 2 / 3  # entropy of a bit that is 1 in a third of the images
    expected = torch.diag(exact([1.0, 1.0, third]))
    torch.testing.assert_close(result.plug_in, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy(bits), expected.diag(), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy(factors), exact([1.0, 1.0, math.log2(3)]))
    torch.testing.assert_close(result.corrected.diag(), expected.diag(), atol=1e-12, rtol=0)
    assert (result.chance > 0).all()
    assert (result.corrected - result.corrected.diag().diag() < 0).logical_or(torch.eye(3) == 1).all()


def test_information_is_that_of_scikit_learn_and_of_the_definition():
    factors = torch.stack([torch.randint(v, (500,)) for v in (2, 5, 9)], 1)
    factors[:, 1] = factors[:, 1] * 7 - 3  # neither consecutive nor positive
    bits = random_bits(500, 6, p=0.3) | (factors[:, 1:2] == 4)
    result = mutual_information(bits, factors)
    for k, f in itertools.product(range(6), range(3)):
        b, v = bits[:, k].numpy(), factors[:, f].numpy()
        table = np.histogram2d(b, v, bins=(2, np.append(np.unique(v), v.max() + 1)))[0].astype(np.int64)
        assert result.plug_in[k, f] == pytest.approx(mutual_info_score(b, v) / math.log(2), abs=1e-12)
        assert result.plug_in[k, f] == pytest.approx(brute_force_information(bits[:, k], factors[:, f]))
        chance = expected_mutual_information(table, 500) / math.log(2)
        assert result.chance[k, f] == pytest.approx(chance, rel=1e-8)


def test_chance_is_the_mean_over_all_orders():
    bits, factor = torch.tensor([1, 1, 0, 0, 0, 1]).bool(), torch.tensor([0, 0, 1, 2, 2, 2])
    orders = [
        brute_force_information(bits, torch.tensor(order))
        for order in itertools.permutations(factor.tolist())
    ]
    result = mutual_information(bits[:, None], factor[:, None])
    assert result.chance.item() == pytest.approx(np.mean(orders))


@pytest.mark.parametrize(
    ("images", "shares"), [(40, [1 / 40] * 40), (20_000, [0.05, 0.35, 0.6]), (60_000, [0.001, 0.999])]
)
def test_chance_is_that_of_scikit_learn_whatever_the_shares(images, shares):
    factor = torch.arange(len(shares)).repeat_interleave((torch.tensor(shares) * images).round().long())
    ones = [0, 1, 3, images // 2, images - 2, images]
    bits = torch.stack([torch.randperm(len(factor)) < count for count in ones], 1)
    result = mutual_information(bits, factor[:, None]).chance[:, 0]
    for k in range(1, 5):
        table = np.zeros((2, len(shares)), np.int64)
        np.add.at(table, (bits[:, k].long().numpy(), factor.numpy()), 1)
        chance = expected_mutual_information(table, len(factor)) / math.log(2)
        assert result[k].item() == pytest.approx(chance, rel=1e-7)
    assert result[[0, 5]].abs().max() < 1e-12


def test_ones_are_counted_by_value():
    bits, values = random_bits(300, 5), torch.randint(4, (300,))
    values[values == 2] = 5  # two values without images
    ones, images = count_ones(bits, values, 7)
    assert images.tolist() == [int((values == v).sum()) for v in range(7)]
    assert ones.tolist() == [bits[values == v].sum(0).tolist() for v in range(7)]


@pytest.mark.slow
def test_one_time_in_twenty_the_best_of_bits_without_meaning_is_called_significant():
    called = 0
    for seed in range(400):
        bits = random_bits(200, 6)
        bits[:, 1] = bits[:, 0] ^ (torch.rand(200) < 0.1)  # nearly the same again
        factor = torch.randint(3, (200,))
        threshold = largest_by_chance(bits, factor, draws=19, seed=seed)
        called += bool((mutual_information(bits, factor[:, None]).plug_in > threshold).any())
    assert abs(called / 400 - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_largest_by_chance_is_one_of_permutations():
    bits, factor = random_bits(90, 4), torch.randint(5, (90,))
    drawn = []
    for seed in range(3):
        result = largest_by_chance(bits, factor, draws=39, seed=seed)
        generator, largest = torch.Generator().manual_seed(seed), []
        for _ in range(39):
            order = torch.randperm(90, generator=generator)
            ordered = factor.sort().values
            largest.append(max(brute_force_information(bits[order, k], ordered) for k in range(4)))
        assert result == pytest.approx(sorted(largest)[-2])  # 1 of 40 is larger, and this one: 2 in 40
        drawn.append(result)
    assert len(set(drawn)) == 3
    with pytest.raises(ValueError, match="draws: expected at least 19, got 3"):
        largest_by_chance(bits, factor, draws=3)


def test_random_bits_carry_nothing():
    factors = torch.stack([torch.randint(v, (400,)) for v in (3, 9)], 1)
    result = mutual_information(random_bits(400, 300), factors)
    assert result.plug_in.mean() > 0.002  # what the correction is for
    # E[I] is about (V - 1)/(2·n·ln 2) and its deviation over bits √(V - 1)/(√2·n·ln 2); 4 of its errors.
    for column, values in enumerate((3, 9)):
        error = math.sqrt((values - 1) / 2) / (400 * math.log(2) * math.sqrt(300))
        assert abs(result.corrected[:, column].mean()) < 4 * error
        assert result.chance[:, column].mean() == pytest.approx((values - 1) / (800 * math.log(2)), rel=0.05)


def test_what_does_not_vary_carries_nothing():
    bits = torch.stack([torch.zeros(6), torch.ones(6), torch.tensor([1, 0, 1, 0, 1, 0])], 1).bool()
    result = mutual_information(bits, torch.tensor([[5, 0], [5, 1], [5, 2], [5, 0], [5, 1], [5, 2]]))
    for values in result:
        assert values.isfinite().all()
        assert (values[:2] == 0).all()
        assert (values[:, 0].abs() < 1e-12).all()
    one = mutual_information(torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int64))
    assert all((values == 0).all() for values in one)


def test_gap_of_copies_is_one_and_of_twins_zero():
    factors = all_combinations(2, 2, times=3)
    copies = factors == 1
    result = mutual_information_gap(copies, factors)
    torch.testing.assert_close(result.gap, torch.ones(2).double())
    torch.testing.assert_close(result.ceiling, torch.ones(2).double())
    assert mutual_information_gap(copies.repeat(1, 2), factors).gap.abs().max() < 1e-12


def test_a_factor_of_less_than_a_bit_has_no_ceiling_above_one():
    factors = torch.tensor([0, 0, 0, 1])[:, None]
    result = mutual_information_gap(torch.cat([factors == 1, factors == 2], 1), factors)
    assert (result.gap.item(), result.ceiling.item()) == pytest.approx((1, 1))


def test_gap_of_a_factor_in_several_bits():
    factors = all_combinations(4, 2, times=2)
    bits = torch.stack([factors[:, 0] > 1, factors[:, 0] == 1, factors[:, 1] == 1], 1)
    # 1 bit and H(1/4) = 2 - 3/4·log₂3 bits, of the factor's 2
    result = mutual_information_gap(bits, factors)
    torch.testing.assert_close(result.gap, exact([(1 - 2 + 0.75 * math.log2(3)) / 2, 1.0]))
    torch.testing.assert_close(result.ceiling, exact([0.5, 1.0]))


def test_gap_of_a_bit_that_mixes_two_factors():
    """b₁ = x AND y of two fair coins, b₂ a copy of y, b₃ their parity."""
    factors = all_combinations(2, 2, times=4)
    x, y = factors.T == 1
    bits = torch.stack([x & y, y, x ^ y], 1)
    mixed = (2 - 0.75 * math.log2(3)) - 0.5  # I(x AND y; x) = H(1/4) - ½·H(1/2)
    expected = exact([[mixed, mixed], [0, 1], [0, 0]])
    torch.testing.assert_close(mutual_information(bits, factors).plug_in, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(mutual_information_gap(bits, factors).gap, exact([mixed, 1 - mixed]))


def test_gap_against_brute_force():
    factors = torch.stack([torch.randint(v, (200,)) for v in (2, 3, 4)], 1)
    bits = random_bits(200, 8) ^ (factors[:, [0, 1, 2, 0, 1, 2, 0, 1]] == 1)
    bits[:, :3] |= factors > 0
    result = mutual_information_gap(bits, factors).gap
    for f in range(3):
        information = sorted(brute_force_information(bits[:, k], factors[:, f]) for k in range(8))
        shares = np.unique(factors[:, f], return_counts=True)[1] / 200
        assert result[f] == pytest.approx(
            (information[-1] - information[-2]) / -(shares * np.log2(shares)).sum()
        )


def test_the_ceiling_is_what_the_best_of_all_bits_reaches():
    for counts in ([10, 10, 10], [1, 2, 3, 4, 17], [40, 3, 3], [7, 7, 7, 7, 7, 7, 7, 7, 7]):
        factor = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
        cuts = list(itertools.product([False, True], repeat=len(counts)))
        bits = torch.tensor(cuts).T[factor[:, 0]]
        information = mutual_information(bits, factor).plug_in.max()
        result = mutual_information_gap(bits[:, :2], factor)
        assert result.ceiling.item() == pytest.approx(float(information / entropy(factor)[0]))
    thirds = torch.arange(3).repeat(30)[:, None]
    result = mutual_information_gap(torch.cat([thirds == 1, thirds == 7], 1), thirds)
    assert result.gap.item() == pytest.approx(result.ceiling.item())
