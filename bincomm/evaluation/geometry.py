"""How many dimensions features use, from the spectrum of their covariance."""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 24  # fp64 entries in memory at a time, so that the features are never copied all at once


class Dimensions(NamedTuple):
    """Effective numbers of dimensions, each from 1 (one direction has all the variance) to D (all equal)."""

    d_eff: float
    r_eff: float


def effective_dimensions(features: Tensor) -> Dimensions:
    """Two effective numbers of dimensions of features, from the eigenvalues λ of their covariance.

    The participation ratio `d_eff = (Σλ)²/Σλ²` (Gao et al. 2017, doi 10.1101/214262) and the effective rank
    `r_eff = exp(-Σ p·ln p)`, `p = λ/Σλ` (Roy and Vetterli, EUSIPCO 2007), here of the centered covariance.
    Neither changes with the features' scale, offset or rotation; `d_eff ≤ r_eff`. In fp64.

    Args:
        features: (N, D), any floating-point dtype, any device that has fp64.

    Returns:
        `d_eff` and `r_eff`. Features that do not vary, those of a single image among them, use no dimension:
        both are 0. N images give at most N - 1.

    Raises:
        ValueError: not (N, D) with both at least 1, or values that are not finite.
    """
    if features.dim() != 2 or features.numel() == 0:
        raise ValueError(f"features: expected shape (N ≥ 1, D ≥ 1), got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features: expected finite values, got NaN or infinity")
    _, covariance = moments(features)
    spectrum = torch.linalg.eigvalsh(covariance).clamp(min=0)  # below 0 by rounding alone
    if spectrum.sum() == 0:
        return Dimensions(0.0, 0.0)
    shares = spectrum / spectrum.sum()
    return Dimensions(float(1 / shares.square().sum()), float(torch.special.entr(shares).sum().exp()))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D), in fp64."""
    blocks = features.split(max(1, BLOCK // features.shape[1]))
    # Minus the first image, so that features that do not vary are exactly 0, whatever their mean.
    first = features[0].double()
    mean = sum((block.double() - first).sum(0) for block in blocks) / len(features)
    covariance = torch.zeros(len(first), len(first), dtype=torch.float64, device=features.device)
    for block in blocks:
        centered = block.double() - first - mean
        covariance += centered.T @ centered / len(features)
    return first + mean, covariance
