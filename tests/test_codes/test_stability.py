"""Against independent implementations, and cases whose answer is known."""

import math

import pytest
import torch
from random_codes import random_code
from sklearn.metrics import cohen_kappa_score, mutual_info_score

from bincomm.bits import binary_entropy
from bincomm.codes.distances import neighbor_overlap
from bincomm.codes.stability import predicted_from, stability


def test_stability_is_cohens_kappa():
    bits = random_code(300, 7)
    noise = torch.rand(300, 7, generator=torch.Generator().manual_seed(3))
    other = bits ^ (noise < torch.linspace(0, 0.6, 7))
    bits[:, 3], other[:, 3] = True, True
    result = stability(bits, other)
    for bit in set(range(7)) - {3}:
        assert result.kappa[bit] == pytest.approx(cohen_kappa_score(bits[:, bit], other[:, bit]))
        assert result.equal[bit] == (bits[:, bit] == other[:, bit]).double().mean()
        nats = mutual_info_score(bits[:, bit], other[:, bit]) - 1 / 600
        assert result.information[bit].item() == pytest.approx(max(0, nats / math.log(2)), abs=1e-12)
    p = bits[:, 0].double().mean()  # of a bit that is the same in both: all of its entropy is shared
    shared = binary_entropy(p) - 1 / (600 * math.log(2))
    assert result.information[0].item() == pytest.approx(shared.item())
    assert result.information[3] == 0  # constant
    assert result.kappa[3] == 0
    assert result.equal[[0, 3]].tolist() == [1, 1]
    with pytest.raises(ValueError, match="others"):
        stability(bits, other[:, :6])


def test_the_same_code_in_another_order_and_inverted_is_the_same():
    bits = random_code(500, 32)
    other = bits[:, torch.randperm(32)] ^ (torch.arange(32) % 2 == 0)
    result = predicted_from(bits, other)
    assert result.correlation.tolist() == [1] * 32
    assert result.probe.min() > 0.999
    assert result.chance < 0.2
    assert neighbor_overlap(bits, other).overlap == pytest.approx(1)


def test_independent_codes_are_at_chance():
    a, b = random_code(800, 24), random_code(800, 40, seed=9)
    result = predicted_from(a, b)
    assert abs(result.correlation.mean() - result.chance) < 0.01
    assert abs(result.probe.mean()) < 0.02
    near = neighbor_overlap(a, b)
    assert abs(near.overlap - near.chance) < 0.004
    assert 0.005 < near.chance < 0.02


def test_a_bit_spread_over_the_other_code_is_predicted_by_the_probe_alone():
    other = torch.rand(1000, 15, generator=torch.Generator().manual_seed(0)) > 0.5
    majority = other.sum(1, keepdim=True) > 7
    result = predicted_from(majority, other)
    assert result.correlation[0] < 0.4
    assert result.probe[0] > 0.9
