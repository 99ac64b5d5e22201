"""Figures of codes against independent implementations, brute force, and cases whose answer is known."""

import itertools
import math
import time

import numpy as np
import pytest
import torch

for package in ("scipy", "sklearn", "tensorboard"):
    pytest.importorskip(package, reason="measuring codes needs the packages of bincomm[eval]")
from scipy.stats import binomtest, entropy  # noqa: E402
from sklearn.metrics import (  # noqa: E402
    adjusted_mutual_info_score,
    cohen_kappa_score,
    mutual_info_score,
    roc_auc_score,
)

from bincomm.codes.statistics import (  # noqa: E402
    bit_correlations,
    bit_entropies,
    block_entropies,
    class_shares,
    dead_bits,
    distance_histograms,
    duplicate_bits,
    mutual_information,
    neighbor_overlap,
    precision_by_bits,
    predicted_from,
    separation,
    share_of_ones,
    sharing,
    stability,
    surest,
    telling_apart,
)
from bincomm.evaluation.retrieval import mean_average_precision  # noqa: E402
from bincomm.ops.messages import pack_signs  # noqa: E402


def code(n, size, seed=0):
    """Bits of different shares, some of which go together."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, size, generator=generator) + torch.linspace(-1, 1, size)
    logits[:, 1::2] += logits[:, ::2][:, : size // 2]
    return logits > 0


def classes(n, count, seed=1):
    return torch.randint(0, count, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", ["bool", "signs", "logits"])
def test_entropies_are_scipys_whatever_the_signs_are_written_as(form):
    bits = code(300, 13)
    signs = {"bool": bits, "signs": 2 * bits.int() - 1, "logits": bits.double() - 0.25}[form]
    p = bits.numpy().mean(0)
    np.testing.assert_allclose(share_of_ones(signs), p)
    np.testing.assert_allclose(bit_entropies(signs), entropy([p, 1 - p], base=2), atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 500])
def test_block_entropies_are_scipys_with_the_correction(n):
    bits = code(n, 19)
    found = block_entropies(bits)
    assert found.bits.tolist() == [8, 8, 3]
    for number, block in enumerate(np.split(bits.numpy(), [8, 16], axis=1)):
        _, counts = np.unique(block, axis=0, return_counts=True)
        plug_in = entropy(counts, base=2)
        correction = (len(counts) - 1) / (2 * n * math.log(2))
        assert found.plug_in[number] == pytest.approx(plug_in, abs=1e-12)
        assert found.entropy[number] == pytest.approx(min(plug_in + correction, block.shape[1]), abs=1e-12)
        p = block.mean(0)
        varying = (p > 0) & (p < 1)
        single = entropy([p, 1 - p], base=2) + varying / (2 * n * math.log(2))
        assert found.marginals[number] == pytest.approx(np.minimum(single, 1).sum(), abs=1e-12)


def test_the_correction_makes_up_for_few_images():
    bits = torch.rand(1500, 256, generator=torch.Generator().manual_seed(0)) > 0.5
    found = block_entropies(bits)
    assert 0.10 < 8 - found.plug_in.mean() < 0.14  # 255/(2 · 1500 · ln 2) = 0.12
    assert 8 - found.entropy.mean() < 0.01
    with pytest.raises(ValueError, match="width"):
        block_entropies(bits, 17)


def test_correlations_are_numpys_and_0_with_constant_bits():
    bits = code(200, 12)
    np.testing.assert_allclose(bit_correlations(bits), np.corrcoef(bits.numpy().T), atol=1e-12)
    bits[:, 3], bits[:, 5] = True, False
    found = bit_correlations(bits)
    assert not found[[3, 5]].any()
    assert not found[:, [3, 5]].any()
    assert found.isfinite().all()
    rest = [0, 1, 2, 4, *range(6, 12)]
    np.testing.assert_allclose(found[rest][:, rest], np.corrcoef(bits.numpy()[:, rest].T), atol=1e-12)


def test_dead_and_repeated_bits():
    bits = torch.rand(400, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    bits[:, 2], bits[:, 6] = bits[:, 0], bits[:, 0]
    bits[:, 5] = ~bits[:, 1]
    bits[:, 3] = torch.arange(400) < 3  # 0.75 %, below a hundredth
    bits[:, 4] = True
    bits = torch.cat([bits, bits[:, [3]], bits[:, [4]]], 1)
    assert dead_bits(bits) == [3, 4, 8, 9]  # not counted as repeated
    found = duplicate_bits(bits)
    assert found.same == [(0, 2), (0, 6)]
    assert found.inverted == [(1, 5)]
    bits[:2, 6] ^= True
    assert duplicate_bits(bits).same == [(0, 2)]
    assert duplicate_bits(bits, tolerance=0.005).same == [(0, 2), (0, 6)]


@pytest.mark.parametrize("size", [1, 40])
def test_distances_are_counted_as_by_brute_force(size, monkeypatch):
    monkeypatch.setattr("bincomm.codes.statistics.BLOCK", 100)  # several blocks
    bits, labels = code(37, size), classes(37, 3)
    expected = np.zeros((2, size + 1), int)
    for a, b in itertools.combinations(range(37), 2):
        expected[int(labels[a] != labels[b]), int((bits[a] != bits[b]).sum())] += 1
    found = distance_histograms(bits, labels)
    assert not found.sampled
    assert not distance_histograms(bits, pairs=37 * 36 // 2).sampled
    assert distance_histograms(bits, pairs=37 * 36 // 2 - 1).sampled
    np.testing.assert_array_equal(found.within, expected[0])
    np.testing.assert_array_equal(found.between, expected[1])
    np.testing.assert_array_equal(found.every, expected.sum(0))
    without = distance_histograms(bits)
    np.testing.assert_array_equal(without.every, expected.sum(0))
    assert without.within is None


def test_sampled_distances_have_the_same_shares():
    bits, labels = code(400, 24), classes(400, 4)
    exact, sampled = (distance_histograms(bits, labels, pairs=pairs) for pairs in (1 << 20, 40_000))
    assert sampled.sampled
    assert int(sampled.every.sum()) == 100 * 399
    for name in ("within", "between"):
        a, b = (getattr(found, name).double() for found in (exact, sampled))
        torch.testing.assert_close(a / a.sum(), b / b.sum(), atol=0.01, rtol=0)
    bits[:100] = bits[0].clone()  # the first images are not like the others
    found = distance_histograms(bits, pairs=40_000).every
    assert 0.03 < found[0] / found.sum() < 0.11  # 1/16; of the first alone it is 1/4


def test_separation_is_the_area_under_the_roc_curve():
    bits, labels = code(60, 10), classes(60, 3)
    bits[:, :4] ^= labels[:, None] == 1
    found = distance_histograms(bits, labels)
    pairs = list(itertools.combinations(range(60), 2))
    same = [bool(labels[a] == labels[b]) for a, b in pairs]
    near = [-int((bits[a] != bits[b]).sum()) for a, b in pairs]
    assert separation(found.within, found.between) == pytest.approx(roc_auc_score(same, near))
    assert math.isnan(separation(found.within, 0 * found.between))


def test_all_bits_retrieve_as_the_whole_code_does():
    bits, labels = code(150, 40), classes(150, 3)
    bits[:, :20] ^= labels[:, None] == 1
    whole, half, one = precision_by_bits(bits, labels, [40, 20, 1], draws=4)
    asking, answering = torch.randperm(150, generator=torch.Generator().manual_seed(0)).split([30, 120])
    messages = pack_signs(bits.float())
    expected = mean_average_precision(
        messages[answering], labels[answering], messages[asking], labels[asking]
    )
    assert whole.precision == expected
    assert (whole.draws, whole.deviation) == (1, 0)
    assert half.draws == 4
    assert half.least < half.precision < half.largest
    (two,) = precision_by_bits(bits, labels, [20], draws=2)
    assert two.deviation == pytest.approx((two.largest - two.least) / math.sqrt(2))
    assert one.precision < half.precision < whole.precision
    assert precision_by_bits(bits, labels, [20]) == precision_by_bits(bits, labels, [20])
    with pytest.raises(ValueError, match="kept"):
        precision_by_bits(bits, labels, [41])
    with pytest.raises(ValueError, match="at least one query"):
        precision_by_bits(bits[:5], torch.arange(5), [40])


def test_information_is_sklearns():
    bits, labels = code(300, 9), classes(300, 5)
    bits[:, 2] ^= labels > 2
    found = mutual_information(bits, labels)
    for bit in range(9):
        expected = mutual_info_score(labels, bits[:, bit]) / math.log(2)
        assert found.plug_in[bit] == pytest.approx(expected, abs=1e-12)
        p = bits[:, bit].double().mean().item()
        least = min(entropy([p, 1 - p], base=2), found.entropy)
        adjusted = adjusted_mutual_info_score(labels, bits[:, bit], average_method="min")
        assert found.corrected[bit] == pytest.approx(adjusted * least, abs=1e-10)
    assert found.entropy == pytest.approx(entropy(np.bincount(labels), base=2))
    assert found.significant.tolist() == [bit == 2 for bit in range(9)]


def test_bits_that_have_nothing_to_do_with_the_classes_tell_nothing():
    bits = torch.rand(400, 200, generator=torch.Generator().manual_seed(5)) > 0.5
    wrong = 0
    for seed in range(10):
        found = mutual_information(bits, classes(400, 10, seed=seed + 2), draws=60)
        wrong += bool(found.significant.any())
        assert found.significant.equal(found.plug_in > found.threshold)
        assert found.plug_in.mean() > 0.01  # 9/(2 · 400 · ln 2) = 0.016
        assert abs(found.corrected.mean()) < 0.002
    assert wrong <= 2


def test_a_copied_label_tells_its_entropy():
    labels = (torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    bits = torch.stack([labels == 1, labels == 0, torch.ones(300, dtype=torch.bool)], 1)
    found = mutual_information(bits, labels)
    assert 0.8 < found.entropy < 0.95
    for bit in range(2):
        assert found.corrected[bit] == pytest.approx(found.entropy, abs=1e-12)
    assert found.corrected[2] == 0
    assert found.significant.tolist() == [True, True, False]


def test_unknown_values_are_left_out():
    bits, values = code(200, 6), classes(200, 3)
    unknown = values.clone()
    unknown[::3] = -1
    known = unknown >= 0
    found, expected = mutual_information(bits, unknown), mutual_information(bits[known], values[known])
    assert found.plug_in.equal(expected.plug_in)
    assert found.corrected.equal(expected.corrected)
    # A name for every image tells all there is, and tells it by chance as well.
    assert not mutual_information(bits, torch.arange(200)).corrected.any()
    with pytest.raises(ValueError, match="values"):
        mutual_information(bits, torch.full((200,), -1))
    with pytest.raises(ValueError, match="draws: expected at least 19, got 18"):
        mutual_information(bits, values, draws=18)


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
    found = sharing(bits, labels, 4)
    assert found.ones.T.tolist() == [[True, False, False, False], [True, True, True, False], [False] * 4]
    assert found.zeros.T.tolist() == [[False, False, True, False], [False] * 4, [True, True, True, False]]
    assert sharing(bits, labels, 4, level=0.02).ones[1, 0]
    assert binomtest(27, 40, alternative="greater").pvalue == pytest.approx(0.019, abs=1e-3)
    with pytest.raises(ValueError, match="labels"):
        class_shares(bits, labels, 2)


def test_the_bits_that_tell_two_classes_apart():
    labels = torch.tensor([0] * 60 + [1] * 45 + [2] * 20)
    bits = code(125, 8)
    bits[:60, 5], bits[60:105, 5] = True, torch.arange(45) < 4
    found = telling_apart(bits, labels, 0, 1)
    assert found.order[0] == 5
    for bit in range(8):
        # Squares of scipy's exact intervals added up, at the level of one of eight.
        a, b = int(bits[:60, bit].sum()), int(bits[60:105, bit].sum())
        first, second = (
            binomtest(ones, n).proportion_ci(1 - 0.05 / 8, method="exact") for ones, n in ((a, 60), (b, 45))
        )
        p, q = a / 60, b / 45
        assert found.difference[bit] == pytest.approx(p - q)
        assert found.low[bit] == pytest.approx(p - q - math.hypot(p - first.low, second.high - q))
        assert found.high[bit] == pytest.approx(p - q + math.hypot(first.high - p, q - second.low))
    assert telling_apart(bits, labels, 1, 0).low[5] == pytest.approx(-found.high[5].item())
    with pytest.raises(ValueError, match="second: expected a class with images"):
        telling_apart(bits, labels, 0, 3)


@pytest.mark.parametrize("few", [1, 2, 5])
def test_a_class_of_few_images_does_not_differ_in_every_rare_bit_it_has(few):
    generator = torch.Generator().manual_seed(0)
    bits = torch.rand(1000 + few, 256, generator=generator) < 0.03
    labels = (torch.arange(1000 + few) >= 1000).long()
    found = telling_apart(bits, labels, 0, 1)
    assert found.difference.min() < -0.15  # some have it by chance
    assert not ((found.low > 0) | (found.high < 0)).any()
    bits[1000:, 7], bits[:1000, 7] = True, False  # what no chance does, five images can show
    found = telling_apart(bits, labels, 0, 1)
    assert found.order[0] == 7
    assert few < 5 or found.high[7] < 0


def test_the_surest_images():
    logits = torch.tensor([[0.5, 0.0], [-2.0, -1.0], [3.0, -1.0], [0.5, -5.0], [-0.1, -0.5]])
    assert surest(logits, 0, 2) == ([2, 0], [1, 4])
    assert surest(logits, 0, 9) == ([2, 0, 3], [1, 4])
    assert surest(logits, 1, 3) == ([], [3, 1, 2])
    with pytest.raises(ValueError, match="bit"):
        surest(logits, 2)


def test_stability_is_cohens_kappa():
    bits = code(300, 7)
    noise = torch.rand(300, 7, generator=torch.Generator().manual_seed(3))
    other = bits ^ (noise < torch.linspace(0, 0.6, 7))
    bits[:, 3], other[:, 3] = True, True
    found = stability(bits, other)
    for bit in set(range(7)) - {3}:
        assert found.kappa[bit] == pytest.approx(cohen_kappa_score(bits[:, bit], other[:, bit]))
        assert found.agreement[bit] == (bits[:, bit] == other[:, bit]).double().mean()
    assert found.kappa[3] == 0
    assert found.agreement[[0, 3]].tolist() == [1, 1]
    with pytest.raises(ValueError, match="others"):
        stability(bits, other[:, :6])


def test_the_same_code_in_another_order_and_inverted_is_the_same():
    bits = code(500, 32)
    other = bits[:, torch.randperm(32)] ^ (torch.arange(32) % 2 == 0)
    found = predicted_from(bits, other)
    assert found.correlation.tolist() == [1] * 32
    assert found.probe.min() > 0.999
    assert found.chance < 0.2
    assert neighbor_overlap(bits, other).overlap == pytest.approx(1)


def test_independent_codes_are_at_chance():
    a, b = code(800, 24), code(800, 40, seed=9)
    found = predicted_from(a, b)
    assert abs(found.correlation.mean() - found.chance) < 0.01
    assert abs(found.probe.mean()) < 0.02
    near = neighbor_overlap(a, b)
    assert abs(near.overlap - near.chance) < 0.004
    assert 0.005 < near.chance < 0.02


def test_a_bit_spread_over_the_other_code_is_found_by_the_probe_alone():
    other = torch.rand(1000, 15, generator=torch.Generator().manual_seed(0)) > 0.5
    majority = other.sum(1, keepdim=True) > 7
    found = predicted_from(majority, other)
    assert found.correlation[0] < 0.4
    assert found.probe[0] > 0.9


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
    found = neighbor_overlap(bits, other, 2)
    assert found.overlap == pytest.approx(expected)
    assert found.chance == pytest.approx(4 / 6 / 2)
    for k in (0, 7):
        with pytest.raises(ValueError, match="k:"):
            neighbor_overlap(bits, other, k)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_neighbors_in_common_with_ties_and_repeated_images(k):
    a, b = code(25, 4), code(25, 5, seed=4)
    a[5:10], b[7:9] = a[0], b[0]

    def belongings(bits, image):
        distances = (bits != bits[image]).sum(1).tolist()
        others = sorted(distances[:image] + distances[image + 1 :])
        last = others[k - 1]
        share = (k - sum(d < last for d in others)) / others.count(last)
        of_each = [1.0 if d < last else share if d == last else 0.0 for d in distances]
        return np.array(of_each) * (np.arange(25) != image)

    overlaps, chances = [], []
    for image in range(25):
        mine, theirs = belongings(a, image), belongings(b, image)
        assert mine.sum() == pytest.approx(k)
        norms = np.linalg.norm(mine) * np.linalg.norm(theirs)
        overlaps.append(mine @ theirs / norms)
        chances.append(k * k / 24 / norms)
    found = neighbor_overlap(a, b, k)
    assert found == pytest.approx((np.mean(overlaps), np.mean(chances)))


@pytest.mark.parametrize("n", [1, 2, 3, 19])
@pytest.mark.parametrize("size", [1, 9])
def test_small_sets_give_finite_figures(n, size):
    bits, labels = code(n, size), torch.zeros(n, dtype=torch.int64)
    every = [
        share_of_ones(bits),
        bit_entropies(bits),
        *block_entropies(bits),
        bit_correlations(bits),
        distance_histograms(bits, labels).every,
        *mutual_information(bits, labels)[:2],
        *stability(bits, bits),
        *telling_apart(bits, labels, 0, 0)[:3],
    ]
    assert all(value.isfinite().all() for value in every)
    assert int(distance_histograms(bits, labels).between.sum()) == 0
    duplicate_bits(bits)
    sharing(bits, labels, 1)
    if n >= 4:
        assert predicted_from(bits, bits).probe.isfinite().all()
    else:
        with pytest.raises(ValueError, match="at least 4"):
            predicted_from(bits, bits)


@pytest.mark.parametrize("signs", [torch.ones(0, 4), torch.ones(4, 0), torch.ones(4)])
def test_no_signs_are_an_error(signs):
    for measure in (share_of_ones, block_entropies, bit_correlations, distance_histograms, duplicate_bits):
        with pytest.raises(ValueError, match="signs: expected shape"):
            measure(signs)


@pytest.mark.parametrize("labels", [torch.zeros(3).long(), torch.zeros(4), torch.tensor([0, 1, -1, 0])])
def test_labels_that_do_not_fit_are_an_error(labels):
    for measure in (distance_histograms, lambda s, y: class_shares(s, y, 2)):
        with pytest.raises(ValueError, match="labels"):
            measure(torch.ones(4, 3), labels)


def test_large_codes_do_not_take_long():
    bits, labels = code(4000, 256), classes(4000, 10)
    begun = time.perf_counter()
    block_entropies(bits)
    bit_correlations(bits)
    duplicate_bits(bits)
    distance_histograms(bits, labels)
    mutual_information(bits, labels)
    predicted_from(bits, bits.flip(1))
    neighbor_overlap(bits, bits.flip(1))
    assert time.perf_counter() - begun < 30  # 2 s on an idle core
