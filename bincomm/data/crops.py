"""The crops and augmentations of a recipe, with torchvision's meaning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The smallest and largest value of every number, also of those in a tuple.
LIMITS: dict[str, tuple[float, float]] = {
    "global_size": (1, 4096), "local_size": (1, 4096), "local_crops": (0, 1000),
    "global_scale": (1e-6, 1), "local_scale": (1e-6, 1),
    "flip": (0, 1), "jitter_p": (0, 1), "gray": (0, 1), "blur": (0, 1), "solarize": (0, 1),
    "flip_vertical": (0, 1), "right_angles": (0, 1), "rotate": (0, 180), "shear": (0, 45),
    "posterize": (0, 1),
    "jitter": (0, 100), "mean": (-1000, 1000), "std": (1e-3, 1000),
}  # fmt: skip


@dataclass(frozen=True)
class Crops:
    """Two global crops and `local_crops` local ones of every image, each augmented on its own.

    Strengths are torchvision's: jitter (b, c, s, h) draws factors from [1-b, 1+b], [1-c, 1+c], [1-s, 1+s] and
    a turn of the hue from [-h, h] of a circle. Blur has σ from [0.1, 2] pixels. A crop is sheared by an
    angle from [-shear, shear] degrees, then rotated by one from [-rotate, rotate]; posterizing keeps 4 to 7
    bits. Mean and deviation by which colors are normalized are those of values from 0 to 1. See
    `bincomm.config.PretrainConfig`.

    Raises:
        ValueError: a size, range, probability or strength that makes no sense; the message names the key.
    """

    global_size: int = 224
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_crops: int = 10
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.4)
    flip: float = 0.5
    flip_vertical: float = 0.0
    right_angles: float = 0.0
    rotate: float = 0.0
    shear: float = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    gray: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarize: float = 0.2
    posterize: float = 0.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        check_limits(vars(self), LIMITS)
        for key in ("global_scale", "local_scale"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key}: expected the smaller number first, got {getattr(self, key)}")
        if self.jitter[3] > 0.5:
            raise ValueError(f"jitter: expected at most 0.5 for the hue, got {self.jitter}")

    @property
    def warps(self) -> bool:
        """Whether crops are rotated by other than right angles, or sheared."""
        return bool(self.rotate or self.shear)

    @property
    def views(self) -> int:
        """V, the number of crops of an image."""
        return 2 + self.local_crops


def check_limits(values: Mapping[str, Any], limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError, naming the key, unless every number of `values` that has limits is within them. None
    and "auto" stand for no number."""
    for key, (low, high) in limits.items():
        value = values[key]
        numbers = value if isinstance(value, tuple | list) else [value]
        if not all(number in (None, "auto") or low <= number <= high for number in numbers):
            raise ValueError(f"{key}: expected from {low} to {high}, got {value}")
