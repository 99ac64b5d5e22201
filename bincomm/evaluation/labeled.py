"""Features and the classes that belong to them."""

import torch.nn.functional as F
from torch import Tensor

# Cosines are rounded to 2⁻³⁰, which is coarser than the rounding of fp64: that depends on the position of an
# item among the others, and must not order items that are equally near.
RESOLUTION = 1 << 30


def check_labeled(name: str, features: Tensor, labels: Tensor) -> None:
    """Raise ValueError, naming the argument, unless there are features, all finite, and a label for each."""
    if len(features) == 0 or len(features) != len(labels):
        raise ValueError(
            f"{name}: expected as many labels as features, at least 1; got {len(labels)} and {len(features)}"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def check_alike(gallery: Tensor, queries: Tensor) -> None:
    """Raise ValueError unless queries have as many columns as the gallery."""
    if queries.shape[1:] != gallery.shape[1:]:
        raise ValueError(f"queries: expected {gallery.shape[1]} columns each, got {queries.shape[1]}")


def unit(features: Tensor) -> Tensor:
    """Features (n, D), however small, at length 1, in fp64; one of zeros stays as it is."""
    return F.normalize(features.double(), dim=-1, eps=1e-150)
