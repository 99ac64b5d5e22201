"""The crops and augmentations of a recipe, with torchvision's meaning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Crops:
    """Two global crops and `local_crops` local ones of every image, each augmented on its own.

    Strengths are torchvision's: jitter (b, c, s, h) draws factors from [1-b, 1+b], [1-c, 1+c], [1-s, 1+s] and
    a turn of the hue from [-h, h] of a circle. Blur has σ from [0.1, 2] pixels. Mean and deviation by which
    colors are normalized are those of values from 0 to 1. See `bincomm.config.PretrainConfig`.

    Raises:
        ValueError: a size, range, probability or strength that makes no sense; the message names the key.
    """

    global_size: int = 224
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_crops: int = 10
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.4)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    gray: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarize: float = 0.2
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for key, smallest in (("global_size", 1), ("local_crops", 0), ("local_size", 1)):
            if getattr(self, key) < smallest:
                raise ValueError(f"{key}: expected at least {smallest}, got {getattr(self, key)}")
        for key in ("global_scale", "local_scale"):
            low, high = getattr(self, key)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{key}: expected 0 < low ≤ high ≤ 1, got {getattr(self, key)}")
        for key in ("flip", "jitter_p", "gray", "blur", "solarize"):
            value = getattr(self, key)
            if not all(0 <= p <= 1 for p in (value if isinstance(value, tuple | list) else [value])):
                raise ValueError(f"{key}: expected probabilities from 0 to 1, got {value}")
        if not min(self.std) > 0:
            raise ValueError(f"std: expected three numbers > 0, got {self.std}")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter: expected strengths ≥ 0, the hue's at most 0.5, got {self.jitter}")

    @property
    def views(self) -> int:
        """V, the number of crops of an image."""
        return 2 + self.local_crops
