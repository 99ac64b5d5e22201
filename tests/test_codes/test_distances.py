"""Against independent implementations, brute force, and cases whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from random_codes import random_code, random_labels
from sklearn.metrics import roc_auc_score

from bincomm.codes.distances import distance_histograms, neighbor_overlap, precision_by_bits, separation
from bincomm.evaluation.retrieval import mean_average_precision
from bincomm.ops.messages import pack_signs


@pytest.mark.parametrize("size", [1, 40])
def test_distances_are_counted_as_by_brute_force(size, monkeypatch):
    monkeypatch.setattr("bincomm.codes.distances.BLOCK", 100)  # several blocks
    bits, labels = random_code(37, size), random_labels(37, 3)
    expected = np.zeros((2, size + 1), int)
    for a, b in itertools.combinations(range(37), 2):
        expected[int(labels[a] != labels[b]), int((bits[a] != bits[b]).sum())] += 1
    result = distance_histograms(bits, labels)
    assert not result.sampled
    assert not distance_histograms(bits, pairs=37 * 36 // 2).sampled
    assert distance_histograms(bits, pairs=37 * 36 // 2 - 1).sampled
    np.testing.assert_array_equal(result.within, expected[0])
    np.testing.assert_array_equal(result.between, expected[1])
    np.testing.assert_array_equal(result.all, expected.sum(0))
    without = distance_histograms(bits)
    np.testing.assert_array_equal(without.all, expected.sum(0))
    assert without.within is None


def test_sampled_distances_have_the_same_shares():
    bits, labels = random_code(400, 24), random_labels(400, 4)
    exact, sampled = (distance_histograms(bits, labels, pairs=pairs) for pairs in (1 << 20, 40_000))
    assert sampled.sampled
    assert int(sampled.all.sum()) == 100 * 399
    for name in ("within", "between"):
        a, b = (getattr(result, name).double() for result in (exact, sampled))
        torch.testing.assert_close(a / a.sum(), b / b.sum(), atol=0.01, rtol=0)
    bits[:100] = bits[0].clone()  # the first images are not like the others
    result = distance_histograms(bits, pairs=40_000).all
    assert 0.03 < result[0] / result.sum() < 0.11  # 1/16; of the first alone it is 1/4


def test_separation_is_the_area_under_the_roc_curve():
    bits, labels = random_code(60, 10), random_labels(60, 3)
    bits[:, :4] ^= labels[:, None] == 1
    result = distance_histograms(bits, labels)
    pairs = list(itertools.combinations(range(60), 2))
    same = [bool(labels[a] == labels[b]) for a, b in pairs]
    near = [-int((bits[a] != bits[b]).sum()) for a, b in pairs]
    assert separation(result.within, result.between) == pytest.approx(roc_auc_score(same, near))
    assert math.isnan(separation(result.within, 0 * result.between))


def test_all_bits_retrieve_as_the_full_code_does():
    bits, labels = random_code(150, 40), random_labels(150, 3)
    bits[:, :20] ^= labels[:, None] == 1
    full, half, one = precision_by_bits(bits, labels, [40, 20, 1], draws=4)
    query, gallery = torch.randperm(150, generator=torch.Generator().manual_seed(0)).split([30, 120])
    messages = pack_signs(bits.float())
    expected = mean_average_precision(messages[gallery], labels[gallery], messages[query], labels[query])
    assert full.precision == expected
    assert (full.draws, full.deviation) == (1, 0)
    assert half.draws == 4
    assert half.least < half.precision < half.largest
    (two,) = precision_by_bits(bits, labels, [20], draws=2)
    assert two.deviation == pytest.approx((two.largest - two.least) / math.sqrt(2))
    assert one.precision < half.precision < full.precision
    assert precision_by_bits(bits, labels, [20]) == precision_by_bits(bits, labels, [20])
    assert (full.unmatched, half.unmatched) == (0, 0)
    labels[query[:7]] = torch.arange(100, 107)  # each the only one of its class
    (full,) = precision_by_bits(bits, labels, [40])
    rest = query[7:]
    expected = mean_average_precision(messages[gallery], labels[gallery], messages[rest], labels[rest])
    assert (full.precision, full.unmatched) == (pytest.approx(expected), 7)
    with pytest.raises(ValueError, match="counts: expected from 1 to 40 bits"):
        precision_by_bits(bits, labels, [41])
    with pytest.raises(ValueError, match="at least one query"):
        precision_by_bits(bits[:5], torch.arange(5), [40])


def test_neighbors_in_common_without_ties():
    # Prefixes of ones: the distance between two images is that between their numbers, scaled to have no ties.
    places = torch.tensor([0, 1, 3, 7, 15, 31, 63])
    bits = torch.arange(63) < places[:, None]
    other = bits[torch.tensor([0, 1, 2, 3, 4, 6, 5])]

    def nearest(code, k):
        distances = (code[:, None] != code).sum(-1).fill_diagonal_(1000)
        return [set(row.argsort()[:k].tolist()) for row in distances]

    pairs = zip(nearest(bits, 2), nearest(other, 2), strict=True)
    expected = np.mean([len(a & b) / 2 for a, b in pairs])
    result = neighbor_overlap(bits, other, 2)
    assert result.overlap == pytest.approx(expected)
    assert result.chance == pytest.approx(4 / 6 / 2)
    for k in (0, 7):
        with pytest.raises(ValueError, match="k:"):
            neighbor_overlap(bits, other, k)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_neighbors_in_common_with_ties_and_repeated_images(k):
    a, b = random_code(25, 4), random_code(25, 5, seed=4)
    a[5:10], b[7:9] = a[0], b[0]

    def memberships(bits, image):
        distances = (bits != bits[image]).sum(1).tolist()
        others = sorted(distances[:image] + distances[image + 1 :])
        last = others[k - 1]
        share = (k - sum(d < last for d in others)) / others.count(last)
        of_each = [1.0 if d < last else share if d == last else 0.0 for d in distances]
        return np.array(of_each) * (np.arange(25) != image)

    overlaps, chances = [], []
    for image in range(25):
        one, other = memberships(a, image), memberships(b, image)
        assert one.sum() == pytest.approx(k)
        norms = np.linalg.norm(one) * np.linalg.norm(other)
        overlaps.append(one @ other / norms)
        chances.append(k * k / 24 / norms)
    result = neighbor_overlap(a, b, k)
    assert result == pytest.approx((np.mean(overlaps), np.mean(chances)))
