"""Metrics gathered on the device between two reports."""

import math

import pytest
import torch

from bincomm.bits import bit_statistics
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.step import StepOutput


def output(loss, gradient_norm, student, teacher):
    losses = {"loss": torch.tensor(loss), "agreement": torch.tensor(0.5), "rate": torch.tensor(7.0)}
    return StepOutput(losses, torch.tensor(gradient_norm), student, teacher)


def new_window():
    return MetricsWindow(4, ("loss", "agreement", "rate"), 6, torch.device("cpu"))


def test_bit_statistics():
    statistics = bit_statistics(torch.tensor([0, 100, 50, 25, 1]), 100)
    entropies = [0, 0, 1, -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)), 0.0807931]
    assert statistics["bit_entropy"] == pytest.approx(sum(entropies) / 5, rel=1e-5)
    assert statistics["bit_entropy_min"] == 0
    assert statistics["dead_bits"] == pytest.approx(0.4)
    assert statistics["bit_majority"] == pytest.approx((1 + 1 + 0.5 + 0.75 + 0.99) / 5)


def test_means_over_steps_and_views_compared_crosswise():
    window = new_window()
    teacher = torch.randn(2, 5, 6)
    # Each view predicts the other's message.
    student = torch.cat([teacher[1:], teacher[:1], torch.randn(3, 5, 6)])
    window.add(output(1.0, 2.0, student, teacher))
    window.add(output(3.0, 4.0, student, teacher))
    metrics = window.report()
    assert metrics["loss"] == 2.0
    assert metrics["gradient_norm"] == 3.0
    assert metrics["bit_accuracy"] == 1.0
    expected = bit_statistics((teacher > 0).sum((0, 1)), 10)
    assert metrics["bit_entropy"] == pytest.approx(expected["bit_entropy"])
    window.add(output(5.0, 0.0, -student, teacher))
    assert window.report()["bit_accuracy"] == 0.0


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.inf)])
def test_steps_that_were_skipped_are_counted_and_the_others_averaged(loss, gradient):
    window = new_window()
    for value, norm in ((1.0, 1.0), (loss, gradient), (2.0, 3.0)):
        window.add(output(value, norm, torch.randn(2, 5, 6), torch.randn(2, 5, 6)))
    metrics = window.report()
    assert (metrics["skipped"], metrics["loss"], metrics["gradient_norm"]) == (1, 1.5, 2.0)


def test_a_window_goes_on_from_its_state():
    first, second = (new_window() for _ in range(2))
    steps = [output(float(k), 1.0, torch.randn(2, 5, 6), torch.randn(2, 5, 6)) for k in range(3)]
    for k, step in enumerate(steps):
        first.add(step)
        if k == 1:
            second.load_state_dict(first.state_dict())
    second.add(steps[2])
    assert first.report() == second.report()
