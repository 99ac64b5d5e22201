"""Presets of crops and augmentations by the domain of the images; the reasons are in docs/data.md."""

from typing import Any

UPRIGHT = {"flip_vertical": 0.0, "right_angles": 0.0}
# Each of the eight orientations of a square as often as the others.
NO_UP = {"flip": 0.5, "flip_vertical": 0.5, "right_angles": 0.75}
EXACT_COLORS = {"gray": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0}

# Keys of `bincomm.config.PretrainConfig` by preset. Those about orientation, and posterize, are in all but
# photos, because they follow from the domain; of the others there is what the domain needs, and the rest
# remains the recipe's.
PRESETS: dict[str, dict[str, Any]] = {
    "photos": {},
    "overhead": {**NO_UP, "rotate": 0.0, "shear": 0.0, "posterize": 0.0},
    # Right angles and up to 45 degrees more: any angle as often.
    "microscopy": {
        **NO_UP, "rotate": 45.0, "shear": 0.0, "posterize": 0.0, "jitter": (0.2, 0.2, 0.1, 0.02),
        "solarize": 0.0,
    },
    "documents": {
        **UPRIGHT, "flip": 0.0, "rotate": 5.0, "shear": 0.0, "posterize": 0.0, "global_scale": (0.5, 1.0),
        "local_scale": (0.2, 0.5), "gray": 0.5, "blur": (0.0, 0.0, 0.0), "solarize": 0.0,
    },
    "plants": {**UPRIGHT, "flip": 0.5, "rotate": 15.0, "shear": 10.0, "posterize": 0.2, **EXACT_COLORS},
    "digits": {
        **UPRIGHT, "flip": 0.0, "rotate": 10.0, "shear": 10.0, "posterize": 0.0, "global_scale": (0.7, 1.0),
        "local_scale": (0.6, 0.9), "jitter": (0.0, 0.0, 0.0, 0.0), **EXACT_COLORS,
    },
}  # fmt: skip
