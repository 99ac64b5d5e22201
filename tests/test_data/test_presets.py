import re
import typing

import pytest
import safetensors.torch
import torch
import yaml

from bincomm.adaptation import configure as configure_adaptation
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.data.crops import Crops
from bincomm.data.presets import PRESETS
from bincomm.engine.run import dump_config

NO_BLUR = (0, 0, 0)
UP = {"flip_vertical": 0, "right_angles": 0}
NO_UP = {"flip": 0.5, "flip_vertical": 0.5, "right_angles": 0.75}
STILL = {"rotate": 0, "shear": 0, "posterize": 0}


def of(config, keys):
    return {key: getattr(config, key) for key in keys}


def test_the_names_are_those_of_the_key():
    assert typing.get_args(typing.get_type_hints(PretrainConfig)["augment"]) == tuple(PRESETS)
    assert PretrainConfig.augment == "photos"
    assert PRESETS["photos"] == {}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("photos", {"flip": 0.5, **UP, **STILL}),
        ("overhead", {**NO_UP, **STILL}),
        ("microscopy", {**NO_UP, **STILL, "rotate": 45, "jitter": (0.2, 0.2, 0.1, 0.02), "solarize": 0}),
        (
            "documents",
            {**UP, **STILL, "flip": 0, "rotate": 5, "gray": 0.5, "blur": NO_BLUR, "solarize": 0}
            | {"global_scale": (0.5, 1), "local_scale": (0.2, 0.5)},
        ),
        (
            "plants",
            {**UP, "flip": 0.5, "rotate": 15, "shear": 10, "posterize": 0.2}
            | {"blur": NO_BLUR, "gray": 0, "solarize": 0},
        ),
        (
            "digits",
            {
                **UP,
                "flip": 0,
                "rotate": 10,
                "shear": 10,
                "posterize": 0,
                "blur": NO_BLUR,
                "gray": 0,
                "solarize": 0,
            }
            | {"jitter": (0, 0, 0, 0), "global_scale": (0.7, 1), "local_scale": (0.6, 0.9)},
        ),
    ],
)
def test_a_preset_sets_its_keys_and_no_others(preset, expected):
    config, plain = configure("vit_small_in1k", augment=preset), configure("vit_small_in1k")
    assert of(config, expected) == expected
    assert set(PRESETS[preset]) == (set(expected) if preset != "photos" else set())
    differences = config.differences(plain.as_dict()).keys()
    assert differences <= set(PRESETS[preset])
    assert bool(differences) == (preset != "photos")


def test_keys_given_come_first_and_the_recipes_last(tmp_path):
    assert configure("digits").flip == 0
    assert configure("digits", augment="overhead").flip == 0.5
    assert configure("digits", augment="overhead", flip=0.1).flip == 0.1
    assert configure("digits", augment="photos") == configure("digits")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("augment: plants\nshear: 3\nblur: [1, 0, 0]\nlocal_crops: 1\n")
    keys = ("rotate", "shear", "blur", "local_crops")
    assert tuple(of(configure(str(recipe)), keys).values()) == (15, 3, (1, 0, 0), 1)
    assert configure(str(recipe), augment="plants") == configure(str(recipe))
    # Another preset, or none, leaves nothing of the recipe's own.
    assert tuple(of(configure(str(recipe), augment="digits"), keys).values()) == (10, 10, NO_BLUR, 1)
    assert tuple(of(configure(str(recipe), augment="photos"), keys).values()) == (0, 0, Crops.blur, 1)


def test_a_run_notes_what_its_preset_has_come_to(tmp_path):
    config = configure("photos_cpu", data="digits", augment="microscopy", rotate=20, output="x")
    recipe = tmp_path / "config.yaml"
    recipe.write_text(dump_config(config))
    noted = yaml.safe_load(recipe.read_text())
    assert (noted["rotate"], noted["flip_vertical"], noted["jitter"]) == (20, 0.5, [0.2, 0.2, 0.1, 0.02])
    assert configure(str(recipe)) == config
    # The same keys by other means are the same run; a run of an earlier version had none of them.
    by_hand = configure("photos_cpu", data="digits", **{**PRESETS["microscopy"], "rotate": 20})
    assert by_hand.differences(noted) == {}
    plain = configure("photos_cpu", data="digits")
    new = ("augment", "flip_vertical", "right_angles", "rotate", "shear", "posterize")
    older = {key: value for key, value in plain.as_dict().items() if key not in new}
    assert plain.differences(older) == {}
    assert configure("photos_cpu", data="digits", augment="overhead").differences(older).keys() == {
        "flip_vertical", "right_angles",
    }  # fmt: skip


def test_an_adaptation_takes_the_preset_of_its_domain(tmp_path):
    """The run's augmentations, but for the keys of another preset."""
    keys = ("flip_vertical", "right_angles", "rotate", "blur", "gray", "jitter")
    safetensors.torch.save_file({"weights": torch.zeros(1)}, tmp_path / "backbone.safetensors")

    def write(**options):
        config = configure("photos_cpu", data="digits", **options)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        return of(config, keys)

    def adapted(**options):
        options = {"data": "digits", **options}
        return of(configure_adaptation(tmp_path, **options), keys)

    plain = write(gray=0.3)
    assert adapted() == plain
    assert adapted(augment="overhead") == {**plain, "flip_vertical": 0.5, "right_angles": 0.75}
    assert adapted(augment="overhead", right_angles=0.1)["right_angles"] == 0.1
    plants = write(augment="plants", rotate=3)
    assert adapted() == plants
    assert adapted(augment="overhead") == {
        **plain, "flip_vertical": 0.5, "right_angles": 0.75, "blur": Crops.blur, "gray": Crops.gray,
    }  # fmt: skip
    with pytest.raises(ValueError, match="augment: expected one of photos, .*, got overhaed"):
        adapted(augment="overhaed")


@pytest.mark.parametrize("name", ["overhaed", ["plants"], None])
def test_an_unknown_preset_is_named(tmp_path, name):
    words = re.escape(
        "augment: expected one of photos, overhead, microscopy, documents, plants, digits, got "
    )
    with pytest.raises(ValueError, match=words):
        configure("digits", augment=name)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"augment": name}))
    with pytest.raises(ValueError, match=words):
        configure(str(tmp_path / "mine.yaml"))
