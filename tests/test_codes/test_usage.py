"""Against independent implementations, and cases whose answer is known."""

import math

import numpy as np
import pytest
import torch
from random_codes import random_code
from scipy.stats import entropy

from bincomm.codes.usage import (
    bit_correlations,
    bit_entropies,
    block_entropies,
    dead_bits,
    duplicate_bits,
    share_of_ones,
    summarize_correlations,
)


@pytest.mark.parametrize("form", ["bool", "signs", "logits"])
def test_entropies_are_scipys_whatever_the_signs_are_written_as(form):
    bits = random_code(300, 13)
    signs = {"bool": bits, "signs": 2 * bits.int() - 1, "logits": bits.double() - 0.25}[form]
    p = bits.numpy().mean(0)
    np.testing.assert_allclose(share_of_ones(signs), p)
    np.testing.assert_allclose(bit_entropies(signs), entropy([p, 1 - p], base=2), atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 500])
def test_block_entropies_are_scipys_with_the_correction(n):
    bits = random_code(n, 19)
    result = block_entropies(bits)
    assert result.bits.tolist() == [8, 8, 3]
    for number, block in enumerate(np.split(bits.numpy(), [8, 16], axis=1)):
        _, counts = np.unique(block, axis=0, return_counts=True)
        plug_in = entropy(counts, base=2)
        correction = (len(counts) - 1) / (2 * n * math.log(2))
        assert result.plug_in[number] == pytest.approx(plug_in, abs=1e-12)
        assert result.entropy[number] == pytest.approx(min(plug_in + correction, block.shape[1]), abs=1e-12)
        p = block.mean(0)
        varying = (p > 0) & (p < 1)
        single = entropy([p, 1 - p], base=2) + varying / (2 * n * math.log(2))
        assert result.marginals[number] == pytest.approx(np.minimum(single, 1).sum(), abs=1e-12)


def test_the_correction_makes_up_for_few_images():
    bits = torch.rand(1500, 256, generator=torch.Generator().manual_seed(0)) > 0.5
    result = block_entropies(bits)
    assert 0.10 < 8 - result.plug_in.mean() < 0.14  # 255/(2 · 1500 · ln 2) = 0.12
    assert 8 - result.entropy.mean() < 0.01
    with pytest.raises(ValueError, match="width"):
        block_entropies(bits, 17)


def test_correlations_are_numpys_and_0_with_constant_bits():
    bits = random_code(200, 12)
    np.testing.assert_allclose(bit_correlations(bits), np.corrcoef(bits.numpy().T), atol=1e-12)
    bits[:, 3], bits[:, 5] = True, False
    result = bit_correlations(bits)
    assert not result[[3, 5]].any()
    assert not result[:, [3, 5]].any()
    assert result.isfinite().all()
    rest = [0, 1, 2, 4, *range(6, 12)]
    np.testing.assert_allclose(result[rest][:, rest], np.corrcoef(bits.numpy()[:, rest].T), atol=1e-12)


def test_dead_and_repeated_bits():
    bits = torch.rand(400, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    bits[:, 2], bits[:, 6] = bits[:, 0], bits[:, 0]
    bits[:, 5] = ~bits[:, 1]
    bits[:, 3] = torch.arange(400) < 3  # 0.75 %, below a hundredth
    bits[:, 4] = True
    bits = torch.cat([bits, bits[:, [3]], bits[:, [4]]], 1)
    assert dead_bits(bits) == [3, 4, 8, 9]  # not counted as repeated
    result = duplicate_bits(bits)
    assert result.same == [(0, 2), (0, 6)]
    assert result.inverted == [(1, 5)]
    bits[:2, 6] ^= True
    assert duplicate_bits(bits).same == [(0, 2)]
    assert duplicate_bits(bits, tolerance=0.005).same == [(0, 2), (0, 6)]


def test_dead_bits_are_not_called_the_most_alike():
    signs = torch.rand(1000, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    signs[:, 4:] = False
    signs[7, 4:] = True
    result = summarize_correlations(signs)
    assert sum(result.absolute) == 6
    assert all(second < 4 and abs(value) < 0.2 for _, second, value in result.strongest)
    assert sum(summarize_correlations(signs[:, 4:]).absolute) == 0
