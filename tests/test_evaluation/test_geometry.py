import math

import pytest
import torch

from bincomm.evaluation import geometry
from bincomm.evaluation.geometry import effective_dimensions


def features_of(spectrum, images=40):
    """Features whose covariance has this spectrum exactly, in random directions, about a mean far from 0."""
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    centered = torch.randn(images, len(spectrum), dtype=torch.float64)
    axes = torch.linalg.qr(centered - centered.mean(0)).Q  # orthonormal columns of mean 0
    rotation = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64)).Q
    return axes * spectrum.sqrt() @ rotation + 10 * torch.randn(len(spectrum))


@pytest.mark.parametrize(
    "spectrum, d_eff, r_eff",
    [
        ([1.0] * 7, 7, 7),
        ([1.0, 1.0, 1.0, 0.0, 0.0], 3, 3),
        ([5.0, 0.0], 1, 1),
        ([2.0, 1.0, 1.0, 0.0], 8 / 3, 2**1.5),
        ([9.0, 1.0], 100 / 82, math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))),
    ],
)
def test_known_spectra(spectrum, d_eff, r_eff, monkeypatch):
    features = features_of(spectrum)
    for factor in (1.0, 1e-3, 1e3):
        assert effective_dimensions(features * factor) == pytest.approx((d_eff, r_eff), abs=1e-9)
    assert effective_dimensions(features.float()) == pytest.approx((d_eff, r_eff), abs=1e-4)
    monkeypatch.setattr(geometry, "BLOCK", 70)  # blocks of several images, the last one smaller
    assert effective_dimensions(features) == pytest.approx((d_eff, r_eff), abs=1e-9)


def test_fewer_images_than_features():
    result = effective_dimensions(torch.randn(5, 300))
    assert 3.5 < result.d_eff <= result.r_eff <= 4 + 1e-9
    assert effective_dimensions(torch.randn(2, 300)) == pytest.approx((1, 1))


def test_features_that_do_not_vary_use_no_dimension():
    assert effective_dimensions(torch.randn(1, 4)) == (0.0, 0.0)
    for images in (2, 7, 1000):  # whose sum, divided again by their number, need not be what it was
        features = torch.randn(4, dtype=torch.float64).expand(images, 4)
        assert effective_dimensions(features) == (0.0, 0.0)
        assert effective_dimensions(features.float()) == (0.0, 0.0)


def test_what_is_wrong_is_named():
    for shape in ((0, 4), (4, 0), (4,)):
        with pytest.raises(ValueError, match=r"features: expected shape"):
            effective_dimensions(torch.zeros(shape))
    with pytest.raises(ValueError, match="features: .*NaN"):
        effective_dimensions(torch.full((2, 2), math.nan))
