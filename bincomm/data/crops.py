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
    "jitter": (0, 100), "mean": (-1000, 1000), "std": (1e-6, 1000),
    "channels": (1, 1024), "pixel_range": (-1e30, 1e30),
}  # fmt: skip


@dataclass(frozen=True)
class Crops:
    """Two global crops and `local_crops` local ones of every image, each augmented on its own.

    Strengths are torchvision's: jitter (b, c, s, h) draws factors from [1-b, 1+b], [1-c, 1+c], [1-s, 1+s] and
    a turn of the hue from [-h, h] of a circle. Blur has σ from [0.1, 2] pixels. A crop is sheared by an
    angle from [-shear, shear] degrees, then rotated by one from [-rotate, rotate]; posterizing keeps 4 to 7
    bits. Mean and deviation by which colors are normalized are those of values from 0 to 1. Images of other
    than three channels have no colors: saturation, hue, gray and solarize must be 0. See
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
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: int = 3
    pixel_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_limits(vars(self), LIMITS)
        for key in ("global_scale", "local_scale"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key}: expected the smaller number first, got {getattr(self, key)}")
        if self.jitter[3] > 0.5:
            raise ValueError(f"jitter: expected at most 0.5 for the hue, got {self.jitter}")
        for key in ("mean", "std"):
            if len(numbers := getattr(self, key)) != self.channels:
                raise ValueError(
                    f"{key}: expected {self.channels} numbers, one for each of the channels, got "
                    f"{len(numbers)}; `bincomm data stats --channels {self.channels} --data DATA` measures it"
                )
        if self.pixel_range is not None and not self.pixel_range[0] < self.pixel_range[1]:
            raise ValueError(f"pixel_range: expected the smaller number first, got {self.pixel_range}")
        for key, value in without_colors(self).items():
            if getattr(self, key) != value:
                raise ValueError(f"{key}: expected {value} for these channels, got {getattr(self, key)}")

    @property
    def rgb(self) -> bool:
        """Whether images are read as RGB of 8 bits, as pictures are; else their values as they are."""
        return self.channels == 3 and self.pixel_range is None

    @property
    def warps(self) -> bool:
        """Whether crops are rotated by other than right angles, or sheared."""
        return bool(self.rotate or self.shear)

    @property
    def views(self) -> int:
        """V, the number of crops of an image."""
        return 2 + self.local_crops


def reading(channels: int, pixel_range: tuple[float, float] | None) -> Crops:
    """Crops that matter only in how images are read.

    Raises:
        ValueError: as `Crops`.
    """
    check_limits({"channels": channels}, {"channels": LIMITS["channels"]})
    return Crops(
        channels=channels,
        pixel_range=pixel_range,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        jitter=(0.0, 0.0, 0.0, 0.0),
        gray=0.0,
        solarize=0.0,
    )


def without_colors(crops: Any) -> dict[str, Any]:
    """The keys of crops, or of a configuration that has the same, that must be 0 because there are no colors,
    or none of 8 bits, and their values."""
    keys: dict[str, Any] = {}
    if crops.channels != 3:
        keys = {"jitter": (*crops.jitter[:2], 0.0, 0.0), "gray": 0.0, "solarize": 0.0}
    if crops.channels != 3 or crops.pixel_range is not None:
        keys["posterize"] = 0.0
    return keys


def check_limits(values: Mapping[str, Any], limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError, naming the key, unless every number of `values` that has limits is within them. None
    and "auto" stand for no number."""
    for key, (low, high) in limits.items():
        value = values[key]
        numbers = value if isinstance(value, tuple | list) else [value]
        if not all(number in (None, "auto") or low <= number <= high for number in numbers):
            raise ValueError(f"{key}: expected from {low} to {high}, got {value}")
