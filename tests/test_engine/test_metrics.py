"""Metrics gathered on the device between two reports."""

import math

import pytest
import torch
import torch.nn.functional as F

from bincomm.bits import bit_statistics, transmitted_bits
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.step import StepOutput


def output(loss, gradient_norm, student, teacher, skipped=False):
    losses = {"loss": torch.tensor(loss), "agreement": torch.tensor(0.5), "rate": torch.tensor(7.0)}
    return StepOutput(losses, torch.tensor(gradient_norm), student, teacher, torch.tensor(int(skipped)))


def random_output(loss=1.0, gradient_norm=1.0, skipped=False):
    return output(loss, gradient_norm, torch.randn(5, 5, 6), torch.randn(2, 5, 6), skipped)


def new_window(length=4, **options):
    return MetricsWindow(length, ("loss", "agreement", "rate"), 6, torch.device("cpu"), **options)


def test_bit_statistics():
    statistics = bit_statistics(torch.tensor([0, 100, 50, 25, 1]), 100)
    entropies = [0, 0, 1, -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)), 0.0807931]
    assert statistics["bit_entropy"] == pytest.approx(sum(entropies) / 5, rel=1e-5)
    assert statistics["bit_entropy_min"] == 0
    assert statistics["dead_bits"] == pytest.approx(0.4)
    assert statistics["bit_majority"] == pytest.approx((1 + 1 + 0.5 + 0.75 + 0.99) / 5)


def test_transmitted_bits_by_hand():
    """100 messages; what a bit adds, by its ones and the bits that it costs to tell it to the student."""
    expected = {
        (50, 0.0): 1.0,  # predicted with certainty
        (25, 0.0): 0.8112781,  # the entropy of 1:3
        (25, 50.0): 0.3112781,
        (50, 100.0): 0.0,  # mute: the student says ½ of each
        (25, 81.12781): 0.0,  # mute: it knows the frequency alone
        (25, 300.0): 0.0,  # confident and wrong takes nothing from the others
        (0, 0.0): 0.0,  # dead
        (100, 0.0): 0.0,
    }
    for (ones, cost), bits in expected.items():
        transmitted = transmitted_bits(torch.tensor([ones]), torch.tensor([cost]), 100)
        assert transmitted == pytest.approx(bits, abs=1e-6)
    ones, costs = (torch.tensor(values) for values in zip(*expected, strict=True))
    assert transmitted_bits(ones, costs, 100) == pytest.approx(sum(expected.values()), abs=1e-6)


def test_what_is_transmitted_is_counted_over_all_steps_that_were_not_skipped():
    """Against fp64: a student that knows nothing, something or all of a bit, and one bit that is dead."""
    steps = []
    for _ in range(7):
        teacher = torch.randn(2, 5, 6)
        teacher[..., 5] = teacher[..., 5].abs()
        known = torch.tensor([0, 0.3, 3, -1, 30, 1]) * teacher.flip(0) + torch.randn(2, 5, 6) / 3
        steps.append(output(1.0, 1.0, torch.cat([known, torch.randn(3, 5, 6)]), teacher))
    spoiled = output(1.0, math.nan, torch.full((5, 5, 6), math.nan), torch.randn(2, 5, 6), skipped=True)
    elsewhere = random_output(skipped=True)  # finite here, but not on another rank
    window = new_window(9)
    for step in (*steps[:3], spoiled, elsewhere, *steps[3:]):
        window.add(step)
    metrics = window.report()

    bits = torch.cat([step.teacher.flatten(0, 1) > 0 for step in steps]).double()
    logits = torch.cat([step.student[[1, 0]].flatten(0, 1) for step in steps]).double()
    assert bits.shape == (70, 6)
    p, cost = bits.mean(0), (F.softplus(logits) - bits * logits).mean(0) / math.log(2)
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)
    expected = (entropy - cost).clamp(min=0)
    assert expected[4] > 0.5
    assert expected[[0, 3, 5]].tolist() == [0, 0, 0]
    assert metrics["transmitted_bits"] == pytest.approx(expected.sum().item(), rel=1e-5)
    assert metrics["agreement_global"] == pytest.approx(math.log(2) * cost.mean().item(), rel=1e-5)
    assert metrics["bit_accuracy"] == pytest.approx(((logits > 0) == bits.bool()).double().mean().item())
    assert metrics["bit_majority"] == pytest.approx(torch.maximum(p, 1 - p).mean().item())


def test_a_skipped_step_changes_nothing_of_the_bits():
    windows = new_window(), new_window()
    steps = [random_output() for _ in range(2)]
    nan = torch.full((5, 5, 6), math.nan)
    for step in (steps[0], output(math.nan, math.nan, nan, nan[:2], skipped=True), steps[1]):
        windows[0].add(step)
    for step in steps:
        windows[1].add(step)
    assert windows[0].report() == windows[1].report() | {"skipped": 1}
    windows[0].add(output(math.nan, math.nan, nan, nan[:2], skipped=True))
    assert windows[0].report() == {"skipped": 1}


def test_what_predicts_no_bits_transmits_none():
    window = new_window(predicts_bits=False)
    window.add(random_output())
    metrics = window.report()
    assert "bit_accuracy" in metrics
    assert not {"transmitted_bits", "agreement_global"} & metrics.keys()


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
        window.add(random_output(value, norm, skipped=not math.isfinite(value + norm)))
    metrics = window.report()
    assert (metrics["skipped"], metrics["loss"], metrics["gradient_norm"]) == (1, 1.5, 2.0)


def test_a_window_goes_on_from_its_state():
    first, second = (new_window() for _ in range(2))
    steps = [random_output(float(k)) for k in range(3)]
    for k, step in enumerate(steps):
        first.add(step)
        if k == 1:
            second.load_state_dict(first.state_dict())
    second.add(steps[2])
    assert first.report() == second.report()
