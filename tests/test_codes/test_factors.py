"""Against brute force, scipy, and cases computed by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from factor_tables import all_combinations, exact, random_bits
from scipy.stats import chi2_contingency
from scipy.stats import entropy as entropy_of

from bincomm.codes.factors import dci, disentanglement, keeps_meaning, recover
from bincomm.codes.information import mutual_information, mutual_information_gap

# Recovery


def test_recovery_from_bits_and_from_features():
    factors = all_combinations(2, 4, times=40)
    other = all_combinations(2, 4, times=20)
    bits, queries = (
        torch.cat([table == 1, table[:, 1:] > 1, table[:, 1:] == 3, random_bits(len(table), 3)], 1)
        for table in (factors, other)
    )
    result = recover(bits, factors, queries, other)
    torch.testing.assert_close(result.chance, exact([0.5, 0.25]))
    assert result.accuracy.tolist() == [1, 1]
    signs = recover(2 * bits.float() - 1, factors, 2 * queries.float() - 1, other)
    torch.testing.assert_close(signs.accuracy, result.accuracy)


def test_recovery_is_from_the_queries():
    factors = all_combinations(2, 2, times=20)
    result = recover(factors == 1, factors, factors == 0, factors)
    assert result.accuracy.tolist() == [0, 0]


def test_recovery_from_what_carries_nothing_is_chance():
    factors, other = torch.randint(3, (600, 1)), torch.randint(3, (2000, 1))
    result = recover(random_bits(600, 4), factors, random_bits(2000, 4), other)
    assert abs(result.accuracy - 1 / 3) < 4 * math.sqrt(2 / 9 / 2000)
    assert abs(result.chance - 1 / 3) < 4 * math.sqrt(2 / 9 / 2000)


def test_chance_is_always_predicting_the_most_frequent_value_of_the_gallery():
    factors, other = (
        torch.tensor([0] * 20 + [1] * 10 + [2] * 20 + [0])[:, None],
        torch.tensor([0, 1, 1, 2])[:, None],
    )
    result = recover(random_bits(51, 2), factors, random_bits(4, 2), other)
    assert result.chance.item() == 0.25


# DCI


def test_dci_of_copies_is_one():
    factors = all_combinations(2, 2, 2, times=20)
    result = dci(factors == 1, factors, factors == 0, 1 - factors, trees=20)
    assert result[:3] == pytest.approx((1, 1, 1), abs=1e-6)
    torch.testing.assert_close(result.importance, torch.eye(3).double(), atol=1e-6, rtol=0)


def test_dci_of_a_factor_in_two_bits():
    """Of four values in two bits, each bit is of one factor, but the factor is not in one bit."""
    factors = all_combinations(4, 2, times=20)
    bits = torch.stack([factors[:, 0] % 2 == 1, factors[:, 0] > 1, factors[:, 1] == 1], 1)
    result = dci(bits, factors, bits, factors, trees=20)
    assert result.disentanglement == pytest.approx(1, abs=1e-6)
    assert result.informativeness == 1
    # The importances of the two bits are equal by symmetry, up to the order in which trees take them.
    assert result.by_factor.tolist() == pytest.approx([1 - math.log(2) / math.log(3), 1], abs=0.01)


def test_dci_of_a_bit_that_mixes_two_factors():
    """b₁ is x or y, with even odds; b₂ and b₃ are copies of z: D and C follow from R by hand."""
    factors = all_combinations(2, 2, 2, 2, times=20)  # x, y, z and which of x and y the bit shows
    x, y, z, which = factors.T
    bits = torch.stack([torch.where(which == 1, x, y) == 1, z == 1], 1)
    known = factors[:, :3]
    result = dci(bits, known, bits, known, trees=20)
    expected = exact([[1.0, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(result.importance, expected, atol=1e-6, rtol=0)
    assert result.by_bit.tolist() == pytest.approx([1 - math.log(2) / math.log(3), 1], abs=1e-6)
    assert result.disentanglement == pytest.approx(1 - 2 / 3 * math.log(2) / math.log(3), abs=1e-6)
    assert result.completeness == pytest.approx(1, abs=1e-6)
    assert result.accuracy.tolist() == [0.75, 0.75, 1]


def test_dci_reads_parity():
    factors = all_combinations(2, 2, 2, times=20)
    bits = torch.stack([factors[:, 0] == 1, (factors[:, 0] ^ factors[:, 1]) == 1, factors[:, 2] == 1], 1)
    result = dci(bits, factors, bits, factors, trees=50)
    assert result.informativeness == 1


def test_dci_of_random_bits_is_about_zero():
    factors, other = (torch.stack([torch.randint(3, (n,)) for _ in range(3)], 1) for n in (1500, 1500))
    result = dci(random_bits(1500, 8), factors, random_bits(1500, 8), other, trees=30)
    assert abs(result.disentanglement) < 0.05
    assert abs(result.completeness) < 0.05
    assert abs(result.informativeness - 1 / 3) < 4 * math.sqrt(2 / 9 / 1500 / 3)


def test_disentanglement_is_that_of_its_definition():
    importance = torch.rand(7, 3, dtype=torch.float64) ** 4
    importance[2] = 0
    importance = importance / importance.sum(0)
    total, by_bit = disentanglement(importance)
    for k in set(range(7)) - {2}:
        assert by_bit[k] == pytest.approx(1 - entropy_of(importance[k], base=3))
    assert by_bit[2] == pytest.approx(0)
    weights = importance.sum(1) / importance.sum()
    assert total == pytest.approx(float((weights * by_bit).sum()))


def test_factors_that_no_bit_carries_are_left_out_by_their_columns():
    """Three bits of a factor each, and three factors that no bit carries, whose importance is spread."""
    importance = torch.cat([torch.eye(3).repeat(3, 1) / 3, torch.full((9, 3), 1 / 9)], 1).double()
    assert disentanglement(importance)[0] < 0.4
    assert disentanglement(importance[:, :3])[0] == pytest.approx(1)


def test_dci_of_bits_that_say_nothing_is_zero():
    factors = all_combinations(2, 3, times=10)
    bits = torch.zeros(60, 3, dtype=torch.bool)
    result = dci(bits, factors, bits, factors, trees=3)
    assert (result.disentanglement, result.completeness) == pytest.approx((0, 0))
    assert result.by_bit.tolist() == pytest.approx([0, 0, 0])


# Meaning


def test_a_copy_keeps_its_meaning():
    factors = all_combinations(2, 3, times=10)
    bits = torch.stack([factors[:, 0] == 1, factors[:, 1] == 2], 1)
    result = keeps_meaning(bits, factors, bits[:30], factors[:30])
    diagonal = torch.eye(2).bool()
    torch.testing.assert_close(result.strength, torch.eye(2).double())
    assert (result.correlation[diagonal] - 1).abs().max() < 1e-12
    assert (result.accuracy[diagonal] == 1).all()
    assert result.accuracy_chance[0, 0] == 0.5
    assert result.accuracy_chance[1, 1] == pytest.approx(2 / 3)
    for values, expected in zip(result.by_factor(), ([1, 1], [1, 1], [1 / 2, 2 / 3]), strict=True):
        assert values.tolist() == pytest.approx(expected)


def test_a_meaning_reversed_and_one_lost():
    factors = all_combinations(2, times=50)
    bits = factors == 1
    reversed_bits = keeps_meaning(bits, factors, ~bits, factors)
    assert (reversed_bits.correlation.item(), reversed_bits.accuracy.item()) == pytest.approx((-1, 0))
    for constant in (torch.zeros_like(bits), torch.ones_like(bits)):
        lost = keeps_meaning(bits, factors, constant, factors)
        assert (lost.correlation.item(), lost.accuracy.item()) == (0, 0.5)
        mute = keeps_meaning(constant, factors, bits, factors)
        assert (mute.strength.item(), mute.strength_chance.item(), mute.correlation.item()) == (0, 0, 0)
        assert mute.by_factor()[0].isnan().all()


def test_meaning_computed_by_hand():
    """Seen: ones in 3/4, 1/4 and 1/2 of the images of each value; unseen: in 1, 1/2 and 0."""
    factors = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])[:, None]
    seen = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0]).bool()[:, None]
    unseen = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]).bool()[:, None]
    result = keeps_meaning(seen, factors, unseen, factors)
    assert result.strength.item() == pytest.approx((1 / 16 + 1 / 16) / 3 / (1 / 4))
    assert result.strength_chance.item() == pytest.approx(2 / 11)
    # Centered (1/4, -1/4, 0) and (1/2, 0, -1/2): 1/8 over √(1/8 · 1/2)
    assert result.correlation.item() == pytest.approx(0.5)
    assert result.accuracy.item() == pytest.approx((4 + 2 + 4) / 12)
    assert result.accuracy_chance.item() == pytest.approx(6 / 12)


def test_values_count_alike_in_the_correlation_however_many_images_they_have():
    factors = torch.tensor([0] * 8 + [1] * 2 + [2] * 4)[:, None]
    seen = torch.tensor([1] * 8 + [0, 1] + [0] * 4).bool()[:, None]  # shares 1, 1/2, 0
    unseen = torch.tensor([1] * 8 + [0, 0] + [0] * 4).bool()[:, None]  # shares 1, 0, 0
    result = keeps_meaning(seen, factors, unseen, factors)
    assert result.correlation.item() == pytest.approx(np.corrcoef([1, 0.5, 0], [1, 0, 0])[0, 1])


def test_strength_is_chi_square_per_image():
    factors = torch.randint(4, (300, 1))
    bits = random_bits(300, 3) | (factors == 2)
    result = keeps_meaning(bits, factors, bits, factors)
    for k in range(3):
        table = np.histogram2d(bits[:, k].numpy(), factors[:, 0].numpy(), bins=(2, 4))[0]
        chi_square = chi2_contingency(table, correction=False).statistic
        assert result.strength[k, 0] == pytest.approx(chi_square / 300)


def test_random_bits_keep_nothing():
    seen, unseen = torch.randint(5, (2000, 1)), torch.randint(5, (2000, 1))
    result = keeps_meaning(random_bits(2000, 400), seen, random_bits(2000, 400), unseen)
    # Deviation 1/√(V - 1) of one bit's correlation, and of 400 bits' mean 1/20 of it; 4 of these.
    assert abs(result.correlation.mean()) < 4 * 0.5 / 20
    assert result.strength.mean() == pytest.approx(4 / 1999, rel=4 * math.sqrt(2 / 4 / 400))
    assert abs((result.accuracy - result.accuracy_chance).mean()) < 4 * 0.5 / math.sqrt(2000 * 400)


def test_bits_count_by_how_far_their_strength_lies_above_chance():
    seen, unseen = torch.randint(4, (60, 1)), torch.randint(4, (60, 1))
    bits, other = random_bits(60, 25) | (seen == 1), random_bits(60, 25) | (unseen == 2)
    bits[:, 5:] = random_bits(60, 20)  # some of which say less than by chance
    result = keeps_meaning(bits, seen, other, unseen)
    weights = (result.strength - result.strength_chance).clamp(min=0)
    assert 1 <= (weights == 0).sum() < 25
    for values, mean in zip(result[2:5], result.by_factor(), strict=True):
        assert mean.item() == pytest.approx(float((weights * values).sum() / weights.sum()))


def test_the_deviation_is_that_over_all_permutations_of_the_meanings():
    seen, unseen = torch.randint(5, (400, 1)), torch.randint(5, (300, 1))
    bits, other = random_bits(400, 12), random_bits(300, 12)
    bits[:, :6] |= seen > 2  # alike, so they are not independent witnesses
    other[:, :6] |= unseen == 1
    result = keeps_meaning(bits, seen, other, unseen)
    permuted = [
        keeps_meaning(bits, seen, other, torch.tensor(order)[unseen]).by_factor()[0].item()
        for order in itertools.permutations(range(5))
    ]
    assert np.mean(permuted) == pytest.approx(0, abs=1e-12)
    assert result.deviation.item() == pytest.approx(np.std(permuted))
    single = keeps_meaning(bits[:, :1], seen, other[:, :1], unseen)
    assert single.deviation.item() == pytest.approx(1 / 2)
    assert keeps_meaning(~bits & False, seen, other, unseen).deviation.isnan().all()


def test_values_that_only_one_side_has_are_left_out():
    seen, unseen = (
        torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]),
        torch.tensor([[2, 0], [2, 1], [3, 0], [3, 1]]),
    )
    bits = seen[:, 1:] == 1
    result = keeps_meaning(bits, seen, bits, unseen)
    assert result.correlation[0].tolist() == pytest.approx([math.nan, 1], nan_ok=True)
    assert result.accuracy[0].tolist() == pytest.approx([math.nan, 1], nan_ok=True)
    assert result.deviation.tolist() == pytest.approx([math.nan, 1], nan_ok=True)
    partly = keeps_meaning(bits, seen, bits, torch.tensor([[1, 0], [1, 1], [1, 0], [2, 1]]))
    assert partly.correlation[0].isnan().tolist() == [True, False]
    assert partly.accuracy[0].isfinite().all()


# What is wrong is named


def test_what_is_wrong_is_named():
    bits, factors = random_bits(6, 3), all_combinations(2, 3)
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
