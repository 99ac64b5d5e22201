import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="bincomm.codes.factors needs the packages of bincomm[eval]")
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from bincomm.codes.factors import (
    count_ones,
    dci,
    disentanglement,
    entropy,
    keeps_meaning,
    largest_by_chance,
    mutual_information,
    mutual_information_gap,
    recover,
)


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def every(*values, times=1):
    """(n, F): each combination of the factors' values, equally often."""
    return torch.tensor(list(itertools.product(*(range(v) for v in values)))).repeat(times, 1)


def random_bits(images, bits, p=0.5):
    return torch.rand(images, bits) < p


def brute_force_information(bits, factor):
    """From the definition, pair by pair, in bits."""
    found = 0.0
    for b, v in itertools.product((False, True), set(factor.tolist())):
        both = ((bits == b) & (factor == v)).double().mean().item()
        apart = (bits == b).double().mean().item() * (factor == v).double().mean().item()
        found += both * math.log2(both / apart) if both else 0.0
    return found


# Information


def test_information_of_copies_is_entropy():
    factors = every(2, 2, 3, times=5)
    bits = torch.stack([factors[:, 0] == 1, factors[:, 1] == 0, factors[:, 2] == 2], 1)
    found = mutual_information(bits, factors)
    third = math.log2(3) - 2 / 3  # entropy of a bit that is 1 in a third of the images
    expected = torch.diag(exact([1.0, 1.0, third]))
    torch.testing.assert_close(found.measured, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy(bits), expected.diag(), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy(factors), exact([1.0, 1.0, math.log2(3)]))
    torch.testing.assert_close(found.corrected.diag(), expected.diag(), atol=1e-12, rtol=0)
    assert (found.chance > 0).all()
    assert (found.corrected - found.corrected.diag().diag() < 0).logical_or(torch.eye(3) == 1).all()


def test_information_is_that_of_scikit_learn_and_of_the_definition():
    factors = torch.stack([torch.randint(v, (500,)) for v in (2, 5, 9)], 1)
    factors[:, 1] = factors[:, 1] * 7 - 3  # neither consecutive nor positive
    bits = random_bits(500, 6, p=0.3) | (factors[:, 1:2] == 4)
    found = mutual_information(bits, factors)
    for k, f in itertools.product(range(6), range(3)):
        b, v = bits[:, k].numpy(), factors[:, f].numpy()
        table = np.histogram2d(b, v, bins=(2, np.append(np.unique(v), v.max() + 1)))[0].astype(np.int64)
        assert found.measured[k, f] == pytest.approx(mutual_info_score(b, v) / math.log(2), abs=1e-12)
        assert found.measured[k, f] == pytest.approx(brute_force_information(bits[:, k], factors[:, f]))
        chance = expected_mutual_information(table, 500) / math.log(2)
        assert found.chance[k, f] == pytest.approx(chance, rel=1e-8)


def test_chance_is_the_mean_over_all_orders():
    bits, factor = torch.tensor([1, 1, 0, 0, 0, 1]).bool(), torch.tensor([0, 0, 1, 2, 2, 2])
    orders = [
        brute_force_information(bits, torch.tensor(order))
        for order in itertools.permutations(factor.tolist())
    ]
    found = mutual_information(bits[:, None], factor[:, None])
    assert found.chance.item() == pytest.approx(np.mean(orders))


@pytest.mark.parametrize(
    ("images", "shares"), [(40, [1 / 40] * 40), (20_000, [0.05, 0.35, 0.6]), (60_000, [0.001, 0.999])]
)
def test_chance_is_that_of_scikit_learn_whatever_the_shares(images, shares):
    factor = torch.arange(len(shares)).repeat_interleave((torch.tensor(shares) * images).round().long())
    ones = [0, 1, 3, images // 2, images - 2, images]
    bits = torch.stack([torch.randperm(len(factor)) < count for count in ones], 1)
    found = mutual_information(bits, factor[:, None]).chance[:, 0]
    for k in range(1, 5):
        table = np.zeros((2, len(shares)), np.int64)
        np.add.at(table, (bits[:, k].long().numpy(), factor.numpy()), 1)
        chance = expected_mutual_information(table, len(factor)) / math.log(2)
        assert found[k].item() == pytest.approx(chance, rel=1e-7)
    assert found[[0, 5]].abs().max() < 1e-12


def test_ones_are_counted_by_value():
    bits, values = random_bits(300, 5), torch.randint(4, (300,))
    values[values == 2] = 5  # two values without images
    ones, images = count_ones(bits, values, 7)
    assert images.tolist() == [int((values == v).sum()) for v in range(7)]
    assert ones.tolist() == [bits[values == v].sum(0).tolist() for v in range(7)]


def test_one_time_in_twenty_the_best_of_bits_without_meaning_is_called_significant():
    called = 0
    for seed in range(400):
        bits = random_bits(200, 6)
        bits[:, 1] = bits[:, 0] ^ (torch.rand(200) < 0.1)  # nearly the same again
        factor = torch.randint(3, (200,))
        threshold = largest_by_chance(bits, factor, draws=19, seed=seed)
        called += bool((mutual_information(bits, factor[:, None]).measured > threshold).any())
    assert abs(called / 400 - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_largest_by_chance_is_one_of_permutations():
    bits, factor = random_bits(90, 4), torch.randint(5, (90,))
    drawn = []
    for seed in range(3):
        found = largest_by_chance(bits, factor, draws=39, seed=seed)
        generator, largest = torch.Generator().manual_seed(seed), []
        for _ in range(39):
            order = torch.randperm(90, generator=generator)
            dealt = factor.sort().values
            largest.append(max(brute_force_information(bits[order, k], dealt) for k in range(4)))
        assert found == pytest.approx(sorted(largest)[-2])  # 1 of 40 is larger, and this one: 2 in 40
        drawn.append(found)
    assert len(set(drawn)) == 3
    with pytest.raises(ValueError, match="draws: expected at least 19, got 3"):
        largest_by_chance(bits, factor, draws=3)


def test_random_bits_carry_nothing():
    factors = torch.stack([torch.randint(v, (400,)) for v in (3, 9)], 1)
    found = mutual_information(random_bits(400, 300), factors)
    assert found.measured.mean() > 0.002  # what the correction is for
    # E[I] is about (V - 1)/(2·n·ln 2) and its deviation over bits √(V - 1)/(√2·n·ln 2); 4 of its errors.
    for column, values in enumerate((3, 9)):
        error = math.sqrt((values - 1) / 2) / (400 * math.log(2) * math.sqrt(300))
        assert abs(found.corrected[:, column].mean()) < 4 * error
        assert found.chance[:, column].mean() == pytest.approx((values - 1) / (800 * math.log(2)), rel=0.05)


def test_what_does_not_vary_carries_nothing():
    bits = torch.stack([torch.zeros(6), torch.ones(6), torch.tensor([1, 0, 1, 0, 1, 0])], 1).bool()
    found = mutual_information(bits, torch.tensor([[5, 0], [5, 1], [5, 2], [5, 0], [5, 1], [5, 2]]))
    for values in found:
        assert values.isfinite().all()
        assert (values[:2] == 0).all()
        assert (values[:, 0].abs() < 1e-12).all()
    one = mutual_information(torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int64))
    assert all((values == 0).all() for values in one)


# The gap


def test_gap_of_copies_is_one_and_of_twins_zero():
    factors = every(2, 2, times=3)
    copies = factors == 1
    found = mutual_information_gap(copies, factors)
    torch.testing.assert_close(found.gap, torch.ones(2).double())
    torch.testing.assert_close(found.ceiling, torch.ones(2).double())
    assert mutual_information_gap(copies.repeat(1, 2), factors).gap.abs().max() < 1e-12


def test_a_factor_of_less_than_a_bit_has_no_ceiling_above_one():
    factors = torch.tensor([0, 0, 0, 1])[:, None]
    found = mutual_information_gap(torch.cat([factors == 1, factors == 2], 1), factors)
    assert (found.gap.item(), found.ceiling.item()) == pytest.approx((1, 1))


def test_gap_of_a_factor_in_several_bits():
    factors = every(4, 2, times=2)
    bits = torch.stack([factors[:, 0] > 1, factors[:, 0] == 1, factors[:, 1] == 1], 1)
    # 1 bit and H(1/4) = 2 - 3/4·log₂3 bits, of the factor's 2
    found = mutual_information_gap(bits, factors)
    torch.testing.assert_close(found.gap, exact([(1 - 2 + 0.75 * math.log2(3)) / 2, 1.0]))
    torch.testing.assert_close(found.ceiling, exact([0.5, 1.0]))


def test_gap_of_a_bit_that_mixes_two_factors():
    """b₁ = x AND y of two fair coins, b₂ a copy of y, b₃ their parity."""
    factors = every(2, 2, times=4)
    x, y = factors.T == 1
    bits = torch.stack([x & y, y, x ^ y], 1)
    mixed = (2 - 0.75 * math.log2(3)) - 0.5  # I(x AND y; x) = H(1/4) - ½·H(1/2)
    expected = exact([[mixed, mixed], [0, 1], [0, 0]])
    torch.testing.assert_close(mutual_information(bits, factors).measured, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(mutual_information_gap(bits, factors).gap, exact([mixed, 1 - mixed]))


def test_gap_against_brute_force():
    factors = torch.stack([torch.randint(v, (200,)) for v in (2, 3, 4)], 1)
    bits = random_bits(200, 8) ^ (factors[:, [0, 1, 2, 0, 1, 2, 0, 1]] == 1)
    bits[:, :3] |= factors > 0
    found = mutual_information_gap(bits, factors).gap
    for f in range(3):
        told = sorted(brute_force_information(bits[:, k], factors[:, f]) for k in range(8))
        shares = np.unique(factors[:, f], return_counts=True)[1] / 200
        assert found[f] == pytest.approx((told[-1] - told[-2]) / -(shares * np.log2(shares)).sum())


def test_the_ceiling_is_what_the_best_of_all_bits_reaches():
    for counts in ([10, 10, 10], [1, 2, 3, 4, 17], [40, 3, 3], [7, 7, 7, 7, 7, 7, 7, 7, 7]):
        factor = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
        cuts = list(itertools.product([False, True], repeat=len(counts)))
        bits = torch.tensor(cuts).T[factor[:, 0]]
        told = mutual_information(bits, factor).measured.max()
        found = mutual_information_gap(bits[:, :2], factor)
        assert found.ceiling.item() == pytest.approx(float(told / entropy(factor)[0]))
    thirds = torch.arange(3).repeat(30)[:, None]
    found = mutual_information_gap(torch.cat([thirds == 1, thirds == 7], 1), thirds)
    assert found.gap.item() == pytest.approx(found.ceiling.item())


# Recovery


def test_recovery_from_bits_and_from_features():
    factors = every(2, 4, times=40)
    other = every(2, 4, times=20)
    bits, asked = (
        torch.cat([some == 1, some[:, 1:] > 1, some[:, 1:] == 3, random_bits(len(some), 3)], 1)
        for some in (factors, other)
    )
    found = recover(bits, factors, asked, other)
    torch.testing.assert_close(found.chance, exact([0.5, 0.25]))
    assert found.accuracy.tolist() == [1, 1]
    signs = recover(2 * bits.float() - 1, factors, 2 * asked.float() - 1, other)
    torch.testing.assert_close(signs.accuracy, found.accuracy)


def test_recovery_is_from_the_queries():
    factors = every(2, 2, times=20)
    found = recover(factors == 1, factors, factors == 0, factors)
    assert found.accuracy.tolist() == [0, 0]


def test_recovery_from_what_carries_nothing_is_chance():
    factors, other = torch.randint(3, (600, 1)), torch.randint(3, (2000, 1))
    found = recover(random_bits(600, 4), factors, random_bits(2000, 4), other)
    assert abs(found.accuracy - 1 / 3) < 4 * math.sqrt(2 / 9 / 2000)
    assert abs(found.chance - 1 / 3) < 4 * math.sqrt(2 / 9 / 2000)


def test_chance_is_what_the_commonest_value_of_the_gallery_finds():
    factors, other = (
        torch.tensor([0] * 20 + [1] * 10 + [2] * 20 + [0])[:, None],
        torch.tensor([0, 1, 1, 2])[:, None],
    )
    found = recover(random_bits(51, 2), factors, random_bits(4, 2), other)
    assert found.chance.item() == 0.25


# DCI


def test_dci_of_copies_is_one():
    factors = every(2, 2, 2, times=20)
    found = dci(factors == 1, factors, factors == 0, 1 - factors, trees=20)
    assert found[:3] == pytest.approx((1, 1, 1), abs=1e-6)
    torch.testing.assert_close(found.importance, torch.eye(3).double(), atol=1e-6, rtol=0)


def test_dci_of_a_factor_in_two_bits():
    """Of four values in two bits, each bit is of one factor, but the factor is not in one bit."""
    factors = every(4, 2, times=20)
    bits = torch.stack([factors[:, 0] % 2 == 1, factors[:, 0] > 1, factors[:, 1] == 1], 1)
    found = dci(bits, factors, bits, factors, trees=20)
    assert found.disentanglement == pytest.approx(1, abs=1e-6)
    assert found.informativeness == 1
    # The importances of the two bits are equal by symmetry, up to the order in which trees take them.
    assert found.by_factor.tolist() == pytest.approx([1 - math.log(2) / math.log(3), 1], abs=0.01)


def test_dci_of_a_bit_that_mixes_two_factors():
    """b₁ is x or y, with even odds; b₂ and b₃ are copies of z: D and C follow from R by hand."""
    factors = every(2, 2, 2, 2, times=20)  # x, y, z and which of x and y is told
    x, y, z, which = factors.T
    bits = torch.stack([torch.where(which == 1, x, y) == 1, z == 1], 1)
    known = factors[:, :3]
    found = dci(bits, known, bits, known, trees=20)
    expected = exact([[1.0, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(found.importance, expected, atol=1e-6, rtol=0)
    assert found.by_bit.tolist() == pytest.approx([1 - math.log(2) / math.log(3), 1], abs=1e-6)
    assert found.disentanglement == pytest.approx(1 - 2 / 3 * math.log(2) / math.log(3), abs=1e-6)
    assert found.completeness == pytest.approx(1, abs=1e-6)
    assert found.accuracy.tolist() == [0.75, 0.75, 1]


def test_dci_reads_parity():
    factors = every(2, 2, 2, times=20)
    bits = torch.stack([factors[:, 0] == 1, (factors[:, 0] ^ factors[:, 1]) == 1, factors[:, 2] == 1], 1)
    found = dci(bits, factors, bits, factors, trees=50)
    assert found.informativeness == 1


def test_dci_of_random_bits_is_about_zero():
    factors, other = (torch.stack([torch.randint(3, (n,)) for _ in range(3)], 1) for n in (1500, 1500))
    found = dci(random_bits(1500, 8), factors, random_bits(1500, 8), other, trees=30)
    assert abs(found.disentanglement) < 0.05
    assert abs(found.completeness) < 0.05
    assert abs(found.informativeness - 1 / 3) < 4 * math.sqrt(2 / 9 / 1500 / 3)


def test_disentanglement_is_that_of_its_definition():
    from scipy.stats import entropy as entropy_of

    importance = torch.rand(7, 3, dtype=torch.float64) ** 4
    importance[2] = 0
    importance = importance / importance.sum(0)
    total, by_bit = disentanglement(importance)
    for k in set(range(7)) - {2}:
        assert by_bit[k] == pytest.approx(1 - entropy_of(importance[k], base=3))
    assert by_bit[2] == pytest.approx(0)
    weights = importance.sum(1) / importance.sum()
    assert total == pytest.approx(float((weights * by_bit).sum()))


def test_what_no_bit_tells_is_left_out_by_its_columns():
    """Three bits of a factor each, and three factors that are nowhere: their importance is spread evenly."""
    importance = torch.cat([torch.eye(3).repeat(3, 1) / 3, torch.full((9, 3), 1 / 9)], 1).double()
    assert disentanglement(importance)[0] < 0.4
    assert disentanglement(importance[:, :3])[0] == pytest.approx(1)


def test_dci_of_bits_that_say_nothing_is_zero():
    factors = every(2, 3, times=10)
    bits = torch.zeros(60, 3, dtype=torch.bool)
    found = dci(bits, factors, bits, factors, trees=3)
    assert (found.disentanglement, found.completeness) == pytest.approx((0, 0))
    assert found.by_bit.tolist() == pytest.approx([0, 0, 0])


# Meaning


def test_a_copy_keeps_its_meaning():
    factors = every(2, 3, times=10)
    bits = torch.stack([factors[:, 0] == 1, factors[:, 1] == 2], 1)
    found = keeps_meaning(bits, factors, bits[:30], factors[:30])
    diagonal = torch.eye(2).bool()
    torch.testing.assert_close(found.strength, torch.eye(2).double())
    assert (found.correlation[diagonal] - 1).abs().max() < 1e-12
    assert (found.agreement[diagonal] == 1).all()
    assert found.agreement_chance[0, 0] == 0.5
    assert found.agreement_chance[1, 1] == pytest.approx(2 / 3)
    for values, expected in zip(found.by_factor(), ([1, 1], [1, 1], [1 / 2, 2 / 3]), strict=True):
        assert values.tolist() == pytest.approx(expected)


def test_a_meaning_turned_round_and_one_lost():
    factors = every(2, times=50)
    bits = factors == 1
    turned = keeps_meaning(bits, factors, ~bits, factors)
    assert (turned.correlation.item(), turned.agreement.item()) == pytest.approx((-1, 0))
    for constant in (torch.zeros_like(bits), torch.ones_like(bits)):
        lost = keeps_meaning(bits, factors, constant, factors)
        assert (lost.correlation.item(), lost.agreement.item()) == (0, 0.5)
        mute = keeps_meaning(constant, factors, bits, factors)
        assert (mute.strength.item(), mute.strength_chance.item(), mute.correlation.item()) == (0, 0, 0)
        assert mute.by_factor()[0].isnan().all()


def test_meaning_computed_by_hand():
    """Seen: 1 in 3/4, 1/4 and 1/2 of the images of each value; unseen: in 1, 1/2 and 0."""
    factors = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])[:, None]
    seen = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0]).bool()[:, None]
    unseen = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]).bool()[:, None]
    found = keeps_meaning(seen, factors, unseen, factors)
    assert found.strength.item() == pytest.approx((1 / 16 + 1 / 16) / 3 / (1 / 4))
    assert found.strength_chance.item() == pytest.approx(2 / 11)
    # Centered (1/4, -1/4, 0) and (1/2, 0, -1/2): 1/8 over √(1/8 · 1/2)
    assert found.correlation.item() == pytest.approx(0.5)
    assert found.agreement.item() == pytest.approx((4 + 2 + 4) / 12)
    assert found.agreement_chance.item() == pytest.approx(6 / 12)


def test_values_count_alike_in_the_correlation_however_many_images_they_have():
    factors = torch.tensor([0] * 8 + [1] * 2 + [2] * 4)[:, None]
    seen = torch.tensor([1] * 8 + [0, 1] + [0] * 4).bool()[:, None]  # shares 1, 1/2, 0
    unseen = torch.tensor([1] * 8 + [0, 0] + [0] * 4).bool()[:, None]  # shares 1, 0, 0
    found = keeps_meaning(seen, factors, unseen, factors)
    assert found.correlation.item() == pytest.approx(np.corrcoef([1, 0.5, 0], [1, 0, 0])[0, 1])


def test_strength_is_chi_square_per_image():
    from scipy.stats import chi2_contingency

    factors = torch.randint(4, (300, 1))
    bits = random_bits(300, 3) | (factors == 2)
    found = keeps_meaning(bits, factors, bits, factors)
    for k in range(3):
        table = np.histogram2d(bits[:, k].numpy(), factors[:, 0].numpy(), bins=(2, 4))[0]
        chi_square = chi2_contingency(table, correction=False).statistic
        assert found.strength[k, 0] == pytest.approx(chi_square / 300)


def test_random_bits_keep_nothing():
    seen, unseen = torch.randint(5, (2000, 1)), torch.randint(5, (2000, 1))
    found = keeps_meaning(random_bits(2000, 400), seen, random_bits(2000, 400), unseen)
    # Deviation 1/√(V - 1) of one bit's correlation, and of 400 bits' mean 1/20 of it; 4 of these.
    assert abs(found.correlation.mean()) < 4 * 0.5 / 20
    assert found.strength.mean() == pytest.approx(4 / 1999, rel=4 * math.sqrt(2 / 4 / 400))
    assert abs((found.agreement - found.agreement_chance).mean()) < 4 * 0.5 / math.sqrt(2000 * 400)


def test_bits_count_by_how_far_their_strength_lies_above_chance():
    seen, unseen = torch.randint(4, (60, 1)), torch.randint(4, (60, 1))
    bits, other = random_bits(60, 25) | (seen == 1), random_bits(60, 25) | (unseen == 2)
    bits[:, 5:] = random_bits(60, 20)  # of which some tell less than by chance
    found = keeps_meaning(bits, seen, other, unseen)
    weights = (found.strength - found.strength_chance).clamp(min=0)
    assert 1 <= (weights == 0).sum() < 25
    for values, mean in zip(found[2:5], found.by_factor(), strict=True):
        assert mean.item() == pytest.approx(float((weights * values).sum() / weights.sum()))


def test_the_deviation_is_that_over_all_ways_to_deal_the_meanings_out():
    seen, unseen = torch.randint(5, (400, 1)), torch.randint(5, (300, 1))
    bits, other = random_bits(400, 12), random_bits(300, 12)
    bits[:, :6] |= seen > 2  # alike, and so no independent witnesses
    other[:, :6] |= unseen == 1
    found = keeps_meaning(bits, seen, other, unseen)
    dealt = [
        keeps_meaning(bits, seen, other, torch.tensor(order)[unseen]).by_factor()[0].item()
        for order in itertools.permutations(range(5))
    ]
    assert np.mean(dealt) == pytest.approx(0, abs=1e-12)
    assert found.deviation.item() == pytest.approx(np.std(dealt))
    single = keeps_meaning(bits[:, :1], seen, other[:, :1], unseen)
    assert single.deviation.item() == pytest.approx(1 / 2)
    assert keeps_meaning(~bits & False, seen, other, unseen).deviation.isnan().all()


def test_values_that_only_one_side_has_are_left_out():
    seen, unseen = (
        torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]),
        torch.tensor([[2, 0], [2, 1], [3, 0], [3, 1]]),
    )
    bits = seen[:, 1:] == 1
    found = keeps_meaning(bits, seen, bits, unseen)
    assert found.correlation[0].tolist() == pytest.approx([math.nan, 1], nan_ok=True)
    assert found.agreement[0].tolist() == pytest.approx([math.nan, 1], nan_ok=True)
    assert found.deviation.tolist() == pytest.approx([math.nan, 1], nan_ok=True)
    partly = keeps_meaning(bits, seen, bits, torch.tensor([[1, 0], [1, 1], [1, 0], [2, 1]]))
    assert partly.correlation[0].isnan().tolist() == [True, False]
    assert partly.agreement[0].isfinite().all()


# What is wrong is named


def test_what_is_wrong_is_named():
    bits, factors = random_bits(6, 3), every(2, 3)
    for wrong, error, message in (
        ((bits.float(), factors), TypeError, "bits: expected bool, got torch.float32"),
        ((bits[0], factors), ValueError, r"bits: expected shape .* got \(3,\)"),
        ((bits[:0], factors[:0]), ValueError, "bits: expected shape"),
        ((bits, factors.float()), TypeError, "factors: expected integers, got torch.float32"),
        ((bits, factors[:5]), ValueError, r"factors: expected shape \(6, F ≥ 1\), got \(5, 2\)"),
        ((bits, factors[:, 0]), ValueError, "factors: expected shape"),
    ):
        with pytest.raises(error, match=message):
            mutual_information(*wrong)
    with pytest.raises(ValueError, match="factors: .* column 1 does not"):
        mutual_information_gap(bits, factors * torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="bits: expected at least 2, got 1"):
        mutual_information_gap(bits[:, :1], factors)
    with pytest.raises(ValueError, match="gallery: expected at least 2 bits and 2 factors"):
        dci(bits, factors[:, :1], bits, factors[:, :1])
    with pytest.raises(ValueError, match="queries: expected 3 columns, got 2"):
        dci(bits, factors, bits[:, :2], factors)
    with pytest.raises(TypeError, match="unseen_bits: expected bool"):
        keeps_meaning(bits, factors, bits.int(), factors)
    with pytest.raises(ValueError, match="unseen_factors: expected 2 columns, got 1"):
        keeps_meaning(bits, factors, bits, factors[:, :1])
    with pytest.raises(TypeError, match=r"queries: expected torch.bool like gallery"):
        recover(bits, factors, bits.float(), factors)
    with pytest.raises(ValueError, match="query_factors: expected 2 columns, got 1"):
        recover(bits, factors, bits, factors[:, :1])
    with pytest.raises(ValueError, match="gallery_factors: expected shape"):
        recover(bits, factors[:3], bits, factors)
