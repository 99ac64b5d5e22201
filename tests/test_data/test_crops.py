import pytest

from bincomm.data.crops import Crops


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_size", 0),
        ("local_crops", -1),
        ("global_scale", (0.0, 1.0)),
        ("local_scale", (0.5, 0.4)),
        ("flip", 1.5),
        ("flip_vertical", -0.1),
        ("right_angles", 2),
        ("rotate", 181),
        ("shear", -1),
        ("shear", 50),
        ("posterize", 1.1),
        ("blur", (0.0, -0.1, 0.0)),
        ("jitter", (0.4, 0.4, 0.2, 0.6)),
        ("jitter", (-0.4, 0.4, 0.2, 0.1)),
    ],
)
def test_values_that_make_no_sense_are_named(key, value):
    with pytest.raises(ValueError, match=f"{key}: expected"):
        Crops(**{key: value})
