"""All measures of a code: on few images, on many, and on arguments that do not fit."""

import time

import pytest
import torch
from random_codes import random_code, random_labels

from bincomm.codes.classes import (
    class_difference,
    class_shares,
    majority_classes,
    significant_information,
)
from bincomm.codes.distances import distance_histograms, neighbor_overlap
from bincomm.codes.stability import predicted_from, stability
from bincomm.codes.usage import (
    bit_correlations,
    bit_entropies,
    block_entropies,
    duplicate_bits,
    share_of_ones,
)


@pytest.mark.parametrize("n", [1, 2, 3, 19])
@pytest.mark.parametrize("size", [1, 9])
def test_small_sets_give_finite_figures(n, size):
    bits, labels = random_code(n, size), torch.zeros(n, dtype=torch.int64)
    figures = [
        share_of_ones(bits),
        bit_entropies(bits),
        *block_entropies(bits),
        bit_correlations(bits),
        distance_histograms(bits, labels).all,
        *significant_information(bits, labels)[:2],
        *stability(bits, bits),
        *class_difference(bits, labels, 0, 0)[:3],
    ]
    assert all(value.isfinite().all() for value in figures)
    assert int(distance_histograms(bits, labels).between.sum()) == 0
    duplicate_bits(bits)
    majority_classes(bits, labels, 1)
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


@pytest.mark.slow
def test_large_codes_do_not_take_long():
    bits, labels = random_code(4000, 256), random_labels(4000, 10)
    begun = time.process_time()
    block_entropies(bits)
    bit_correlations(bits)
    duplicate_bits(bits)
    distance_histograms(bits, labels)
    significant_information(bits, labels)
    predicted_from(bits, bits.flip(1))
    neighbor_overlap(bits, bits.flip(1))
    assert time.process_time() - begun < 30  # of the processor; 2 s on an idle core
