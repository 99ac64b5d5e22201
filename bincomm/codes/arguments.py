"""Signs and labels, as the measures of a code take them: a row for each image, checked.

Signs are (n, K), bool or numbers of which those above 0 are ones; labels are (n,) integers.
"""

import torch
from torch import Tensor


def as_bits(signs: Tensor) -> Tensor:
    """Signs (n, K) as bool.

    Raises:
        ValueError: they have another shape, or n or K is 0.
    """
    if signs.dim() != 2 or signs.numel() == 0:
        raise ValueError(f"signs: expected shape (n ≥ 1, K ≥ 1), got {tuple(signs.shape)}")
    return signs if signs.dtype == torch.bool else signs > 0


def as_labels(labels: Tensor, n: int, *, unknown: bool = False) -> Tensor:
    """Labels (n,) as int64; those below 0 are allowed only if they may be `unknown`.

    Raises:
        ValueError: there is not one integer for each image, or one is below 0.
    """
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(
            f"labels: expected {n} integers, one per image, got {labels.dtype} {tuple(labels.shape)}"
        )
    if not unknown and int(labels.min()) < 0:
        raise ValueError(f"labels: expected class indices from 0 on, got {int(labels.min())}")
    return labels.long()
