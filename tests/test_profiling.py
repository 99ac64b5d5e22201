"""Where the time of a step goes: that the figures are those of the step."""

import pytest
import torch
from torch import nn

from bincomm import cli
from bincomm.configuration import configure
from bincomm.networks import Head, Network, create_teacher
from bincomm.profiling import PARTS, count_flops, measure_peak, profile

pytestmark = pytest.mark.slow
OPTIONS = {
    "recipe": "digits", "backbone": "test_vit", "backbone_args": '{"patch_size": 4, "depth": 2}',
    "global_size": 16, "local_size": 12, "bits": 16, "hidden": 32, "batch_size": 16,
}  # fmt: skip


def test_a_profile_adds_up():
    result = profile(configure(**OPTIONS), steps=6)
    assert tuple(result["parts"]) == PARTS
    assert all(ms > 0 for ms in result["parts"].values())
    assert sum(result["parts"].values()) == pytest.approx(result["step_ms"], rel=0.5)  # medians
    assert result["images_per_second"] == pytest.approx(16 / (result["step_ms"] / 1e3))
    expected = result["images_per_second"] * result["flops_per_image"] / result["peak"]
    assert result["mfu"] == pytest.approx(expected)
    assert 0 < result["mfu"] < 1


def test_operations_are_counted_as_by_hand():
    def layer():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 8))

    student = Network(layer(), Head(8, 16, 4))
    teacher = create_teacher(student, layer())
    first, rest = 48 * 8, 8 * 16 + 16 * 16 + 16 * 4  # multiplications a view
    views = 3 * 2
    # Forward twice; backward the gradients of all weights, and of all inputs but the images.
    expected = 2 * views * (2 * (first + rest) + first + 2 * rest) / 3
    assert count_flops(student, teacher, torch.randn(3, 2, 3, 4, 4), None) == expected
    assert count_flops(student, teacher, torch.randn(1, 2, 3, 4, 4), None) == expected


@pytest.mark.parametrize(
    "options",
    [{"checkpoint_activations": True}, pytest.param({"precision": "fp32"}, marks=pytest.mark.long)],
)
def test_operations_do_not_depend_on_how_they_are_carried_out(options):
    counts = [profile(configure(**OPTIONS, **more), steps=1)["flops_per_image"] for more in ({}, options)]
    assert counts[0] == counts[1]


def test_operations_of_dense_bits_are_counted():
    """Those of the patch head: forward in both networks, and backward, by weights and by inputs."""
    without, config = (configure(**OPTIONS, dense=dense) for dense in (0, 1))
    counts = [profile(each, steps=1)["flops_per_image"] for each in (without, config)]
    features, masked = 64, round(0.3 * 4 * 4)
    products = features * config.hidden + config.hidden**2 + config.hidden * config.bits
    assert counts[1] - counts[0] == 4 * 2 * masked * products


def test_a_peak_is_not_beyond_any_machine():
    assert 1e9 < measure_peak(torch.device("cpu"), torch.float32) < 1e14


def test_the_command(capsys):
    assert cli.main(["profile", "--steps=2", *(f"--{key}={value}" for key, value in OPTIONS.items())]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {part} " in text for part in PARTS)
    assert "images/s" in text
    assert cli.main(["profile", "--data=/nonexistent"]) == 2
    assert "data: '/nonexistent' does not exist" in capsys.readouterr().err
