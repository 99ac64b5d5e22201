"""Every number of a configuration, at both ends: it is refused by its name, or a run computes with it."""

import math
import re
import typing
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from bincomm import cli
from bincomm.building import create_networks, create_objective
from bincomm.config import LIMITS, PretrainConfig
from bincomm.data.crops import LIMITS as CROP_LIMITS
from bincomm.data.multicrop import DRAWS, draw_crops
from bincomm.engine.job import create_step
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.optimizer import create_optimizer
from bincomm.engine.schedules import Schedule

HINTS = typing.get_type_hints(PretrainConfig)
ALL = {**LIMITS, **CROP_LIMITS}
# Of what is computed here all but one are small.
SMALL = {
    "backbone": "test_convnext", "batch_size": 4, "bits": 8, "hidden": 8, "global_size": 32, "local_size": 32,
    "local_crops": 1, "precision": "fp32", "prototypes": 16, "drop_path": 0.0,
}  # fmt: skip
# Their largest value is more than a test can compute, and memory decides whether a run can.
LARGE = {"prototypes", "batch_size", "bits", "hidden", "accumulate"}
LARGE |= {"global_size", "local_size", "local_crops"}


def kinds(hint):
    """The types of the numbers that a key holds; empty if it holds none."""
    if hint in (int, float):
        return {hint}
    if typing.get_origin(hint) in (tuple, typing.Union, type(int | str)):
        return set().union(*map(kinds, typing.get_args(hint)))
    return set()


NUMBERS = [field.name for field in fields(PretrainConfig) if kinds(HINTS[field.name])]


def filled(key, number):
    """A value of a key with this number in it, in every place of a tuple."""
    # Of any length, or of a key that may be None.
    counts = {"mean": 3, "std": 3, "pixel_range": 2, "low_resolution_sizes": 2}
    hint = HINTS[key]
    is_tuple = key in counts or typing.get_origin(hint) is tuple
    return (number,) * counts.get(key, len(typing.get_args(hint))) if is_tuple else number


def compute(config):
    """Two steps of a configuration on crops of noise, and what is done with its other numbers."""
    schedule = Schedule(config, 3, 64)
    schedule.describe()
    schedule.resets_head(1)
    uniforms = np.random.default_rng(0).random((2, config.crops.views, DRAWS))
    crops = draw_crops(config.crops, np.array([[50, 40]] * 2), uniforms)
    assert np.isfinite(crops).all()
    device = torch.device("cpu")
    student, teacher = create_networks(config, device)
    objective = create_objective(config)
    step = create_step(config, student, teacher, objective, create_optimizer(student))
    window = MetricsWindow(config.log_every, objective.scalars, config.bits, device)
    count = config.batch_size
    views = [torch.randn(count, 2, config.channels, config.global_size, config.global_size)]
    views.append(
        torch.randn(count, config.local_crops, config.channels, config.local_size, config.local_size)
        if config.local_crops
        else None
    )
    for number in range(2):
        output = step(*views, **schedule(number))
        window.add(output)
        if config.log_every == 1:
            assert window.report()["skipped"] == 0
        assert all(value.isfinite() for value in output.losses.values())
    assert window.report()["skipped"] == 0
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_every_number_has_limits():
    assert set(NUMBERS) == set(ALL)


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_beyond_their_limits_are_refused_by_name(key):
    low, high = ALL[key]
    step = 1 if kinds(HINTS[key]) == {int} else 0
    beyond = [low - (step or max(1e-9, -low * 1e-6)), high + (step or high * 1e-6), -(10**31), 10**31]
    if not step:
        beyond += [math.nan, math.inf, -math.inf]
    for number in beyond:
        with pytest.raises(ValueError, match="^" + re.escape(f"{key}: expected from {low} to ")) as error:
            PretrainConfig(**{key: filled(key, number)})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", ["low", "high"])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_run_computes_with_numbers_at_their_limits(key, end):
    number = ALL[key][end == "high"]
    keys = {**SMALL, key: filled(key, number)}
    if key == "jitter" and end == "high":
        keys[key] = (number, number, number, 0.5)
    if key == "dense" and end == "high":
        keys["global_size"] = 64  # of several cells
    if key in ("global_scale", "local_scale") and end == "high":
        keys[key] = (0.5, number)
    if key == "pixel_range":
        keys[key] = (number, 0.0) if end == "low" else (0.0, number)
    if key == "channels":
        keys |= {"mean": (0.5,) * number, "std": (0.25,) * number}
    if key == "accumulate":
        keys["batch_size"] = number
    if key == "tau":
        keys["agreement"] = "soft"
    if key == "prototypes":
        keys["method"] = "dino"
    if key in ("global_size", "local_size", "low_resolution"):
        keys["backbone"] = "test_resnet"  # takes an image of one pixel
    if key in ("batch_size", "bits") and end == "low":
        keys[key] = 2  # a run refuses one, whose rate is constant; what is trained may be evaluated
    config = PretrainConfig(**keys)
    if not (key in LARGE and end == "high"):
        compute(config)


@pytest.mark.parametrize("weight", [0, -1, 1e-7, 2e6, math.nan, math.inf])
def test_weights_of_sources_have_limits(weight):
    with pytest.raises(ValueError, match="data: expected a weight from 1e-6 to 1e6 for b, got"):
        PretrainConfig(data={"a": 1, "b": weight})


COMMANDS = {
    "k": "search x --query=y",
    "images": "data look",
    "size": "data shard --data=x --output=y",
    "steps": "profile",
    "threads": "data verify --data=x",
    "batch_size": "encode x --data=y --output=z",
    "global_size": "encode x --data=y --output=z",
}


@pytest.mark.parametrize("value", ["0", "-1", "1e3", "2147483648", "9" * 5000, "nan", "", "٣"])
@pytest.mark.parametrize("option", COMMANDS)
def test_numbers_of_commands_beyond_their_limits_are_refused_by_name(option, value, capsys):
    try:
        status = cli.main([*COMMANDS[option].split(), f"--{option}={value}"])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2
    assert re.match(rf"bincomm: error: {option}: expected an integer (of at least|from) 1", error)
    assert len(error) < 200


@pytest.mark.slow
@pytest.mark.parametrize("end", ["low", "high"])
def test_a_whole_run_at_many_limits(end, tmp_path):
    from bincomm.api import pretrain

    keys = ["seed", "save_every", "keep", "log_every", "max_unusable", "reset_every", "warmup_epochs", "clip"]
    keys += ["epochs", "momentum", "drop_path"] if end == "high" else ["threads", "min_lr", "local_scale"]
    at_limits = {key: filled(key, ALL[key][end == "high"]) for key in keys}
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (50 * number, 0, 0)).save(tmp_path / f"images/{number}.png")
    run = tmp_path / "run"
    pretrain(tmp_path / "images", recipe="digits", output=run, max_steps=2, **{**SMALL, **at_limits})
    assert (run / "model.safetensors").exists()
