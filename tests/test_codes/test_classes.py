"""Against independent implementations, and cases whose answer is known."""

import math

import numpy as np
import pytest
import torch
from random_codes import random_code, random_labels
from scipy.stats import binomtest, entropy
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

from bincomm.codes.classes import (
    class_difference,
    class_shares,
    majority_classes,
    significant_information,
)


def test_information_is_sklearns():
    bits, labels = random_code(300, 9), random_labels(300, 5)
    bits[:, 2] ^= labels > 2
    result = significant_information(bits, labels)
    for bit in range(9):
        expected = mutual_info_score(labels, bits[:, bit]) / math.log(2)
        assert result.plug_in[bit] == pytest.approx(expected, abs=1e-12)
        p = bits[:, bit].double().mean().item()
        least = min(entropy([p, 1 - p], base=2), result.entropy)
        adjusted = adjusted_mutual_info_score(labels, bits[:, bit], average_method="min")
        assert result.corrected[bit] == pytest.approx(adjusted * least, abs=1e-10)
    assert result.entropy == pytest.approx(entropy(np.bincount(labels), base=2))
    assert result.significant.tolist() == [bit == 2 for bit in range(9)]


def test_bits_independent_of_the_classes_say_nothing():
    bits = torch.rand(400, 200, generator=torch.Generator().manual_seed(5)) > 0.5
    wrong = 0
    for seed in range(10):
        result = significant_information(bits, random_labels(400, 10, seed=seed + 2), draws=60)
        wrong += bool(result.significant.any())
        assert result.significant.equal(result.plug_in > result.threshold)
        assert result.plug_in.mean() > 0.01  # 9/(2 · 400 · ln 2) = 0.016
        assert abs(result.corrected.mean()) < 0.002
    assert wrong <= 2


def test_a_copied_label_says_its_entropy():
    labels = (torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    bits = torch.stack([labels == 1, labels == 0, torch.ones(300, dtype=torch.bool)], 1)
    result = significant_information(bits, labels)
    assert 0.8 < result.entropy < 0.95
    for bit in range(2):
        assert result.corrected[bit] == pytest.approx(result.entropy, abs=1e-12)
    assert result.corrected[2] == 0
    assert result.significant.tolist() == [True, True, False]


def test_unknown_values_are_left_out():
    bits, values = random_code(200, 6), random_labels(200, 3)
    unknown = values.clone()
    unknown[::3] = -1
    known = unknown >= 0
    result, expected = (
        significant_information(bits, unknown),
        significant_information(bits[known], values[known]),
    )
    assert result.plug_in.equal(expected.plug_in)
    assert result.corrected.equal(expected.corrected)
    # A name for every image says all there is, and does so by chance as well.
    assert not significant_information(bits, torch.arange(200)).corrected.any()
    with pytest.raises(ValueError, match="values"):
        significant_information(bits, torch.full((200,), -1))
    with pytest.raises(ValueError, match="draws: expected at least 19, got 18"):
        significant_information(bits, values, draws=18)


def test_classes_that_share_a_bit():
    labels = torch.arange(3).repeat_interleave(40)  # and a fourth without images
    bits = torch.zeros(120, 3, dtype=torch.bool)
    bits[:36, 0] = True  # 36 of 40, and none
    bits[40:67, 0] = True  # 27 of 40: p = 0.019
    bits[:, 1] = True
    counts, shares = class_shares(bits, labels, 4)
    assert counts.tolist() == [40, 40, 40, 0]
    assert shares[:3, 0].tolist() == [0.9, 0.675, 0]
    assert shares[3].isnan().all()
    result = majority_classes(bits, labels, 4)
    assert result.ones.T.tolist() == [[True, False, False, False], [True, True, True, False], [False] * 4]
    assert result.zeros.T.tolist() == [[False, False, True, False], [False] * 4, [True, True, True, False]]
    assert majority_classes(bits, labels, 4, level=0.02).ones[1, 0]
    assert binomtest(27, 40, alternative="greater").pvalue == pytest.approx(0.019, abs=1e-3)
    with pytest.raises(ValueError, match="labels"):
        class_shares(bits, labels, 2)


def test_the_bits_in_which_two_classes_differ():
    labels = torch.tensor([0] * 60 + [1] * 45 + [2] * 20)
    bits = random_code(125, 8)
    bits[:60, 5], bits[60:105, 5] = True, torch.arange(45) < 4
    result = class_difference(bits, labels, 0, 1)
    assert result.order[0] == 5
    for bit in range(8):
        # Squares of scipy's exact intervals added up, at the level of one of eight.
        a, b = int(bits[:60, bit].sum()), int(bits[60:105, bit].sum())
        first, second = (
            binomtest(ones, n).proportion_ci(1 - 0.05 / 8, method="exact") for ones, n in ((a, 60), (b, 45))
        )
        p, q = a / 60, b / 45
        assert result.difference[bit] == pytest.approx(p - q)
        assert result.low[bit] == pytest.approx(p - q - math.hypot(p - first.low, second.high - q))
        assert result.high[bit] == pytest.approx(p - q + math.hypot(first.high - p, q - second.low))
    assert class_difference(bits, labels, 1, 0).low[5] == pytest.approx(-result.high[5].item())
    with pytest.raises(ValueError, match="second: expected a class with images"):
        class_difference(bits, labels, 0, 3)


@pytest.mark.parametrize("few", [1, 2, 5])
def test_a_class_of_few_images_does_not_differ_in_every_rare_bit_it_has(few):
    generator = torch.Generator().manual_seed(0)
    bits = torch.rand(1000 + few, 256, generator=generator) < 0.03
    labels = (torch.arange(1000 + few) >= 1000).long()
    result = class_difference(bits, labels, 0, 1)
    assert result.difference.min() < -0.15  # some have it by chance
    assert not ((result.low > 0) | (result.high < 0)).any()
    bits[1000:, 7], bits[:1000, 7] = True, False  # what no chance does, five images can show
    result = class_difference(bits, labels, 0, 1)
    assert result.order[0] == 7
    assert few < 5 or result.high[7] < 0
