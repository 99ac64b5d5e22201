"""How β is found while training: the control by itself, and in the loop with a small network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bincomm.bits import bit_statistics, transmitted_bits
from bincomm.objectives import BetaControl, DiscreteCommunication
from bincomm.ops.discrete_communication import LARGEST, LEAST


def call(control, share, entropy):
    return control(torch.tensor(share), torch.tensor(entropy)).item()


def log_of(control):
    return control.state[0].item()


def test_beta_rises_where_the_channel_is_not_in_use_and_falls_where_it_is():
    for share, entropy, direction in ((0.2, 1.0, 1), (1.0, 0.5, 1), (0.8, 0.95, -1), (0.6, 0.9, 0)):
        control = BetaControl()
        betas = [call(control, share, entropy) for _ in range(20)]
        change = log_of(control) - math.log(BetaControl.START)
        assert change == pytest.approx(0, abs=1e-5) if direction == 0 else change * direction > 0.1
        assert betas == sorted(betas, reverse=direction < 0) or direction == 0


def test_beta_by_hand():
    """By the formulas of the class: a channel that collapses and comes back."""
    control, log_beta, x = BetaControl(), math.log(0.1), [0.6, 0.9]
    measured = [(0.5, 0.8)] * 5 + [(0.0, 0.1)] * 40 + [(0.9, 1.0)] * 40
    for values in measured:
        x = [0.9 * average + 0.1 * value for average, value in zip(x, values, strict=True)]
        short = [(0.6 - x[0]) / (0.6 if x[0] < 0.6 else 0.4), (0.9 - x[1]) / (0.9 if x[1] < 0.9 else 0.1)]
        e = max(short)
        log_beta = min(log_beta + (0.15 if e > 0 else 0.03) * e, math.log(1000))
        assert call(control, *values) == pytest.approx(math.exp(log_beta + e), rel=1e-3)


@pytest.mark.slow
def test_a_target_out_of_reach_leaves_beta_within_its_limits_and_soon_back():
    control = BetaControl()
    for _ in range(10_000):
        beta = call(control, 0.0, 0.0)
    assert log_of(control) == pytest.approx(math.log(LARGEST))
    assert math.isfinite(beta)
    betas = [call(control, 1.0, 1.0) for _ in range(300)]
    assert betas[-1] < 1  # a thousandth
    for _ in range(1000):
        call(control, 1.0, 1.0)
    assert log_of(control) == pytest.approx(math.log(LEAST))
    assert [call(control, 0.0, 0.0) for _ in range(100)][-1] > 1


@pytest.mark.parametrize("inputs", [(math.nan, 0.4), (0.3, math.nan), (math.nan, math.nan), (math.inf, 0.4)])
def test_what_is_not_finite_is_passed_over(inputs):
    control, other = BetaControl(), BetaControl()
    for module in (control, other):
        for _ in range(5):
            call(module, 0.3, 0.4)
    before = control.state.clone()
    assert math.isfinite(call(control, *inputs))
    assert all(buffer.isfinite().all() for buffer in control.buffers())
    for average, old, value in zip(control.state[1:], before[1:], inputs, strict=True):
        assert torch.equal(average, old) != math.isfinite(value)
    assert call(control, 0.3, 0.4) == pytest.approx(call(other, 0.3, 0.4), rel=0.5)


def test_in_evaluation_the_state_stands_still():
    control = BetaControl()
    call(control, 0.3, 0.4)
    trained = copy.deepcopy(control)
    before = [buffer.clone() for buffer in control.buffers()]
    control.eval()
    betas = [call(control, 0.1, 0.2) for _ in range(3)]
    assert betas[0] == betas[1] == betas[2] == call(trained, 0.1, 0.2)
    assert all(map(torch.equal, control.buffers(), before))


def test_a_control_goes_on_from_its_state():
    generator = torch.Generator().manual_seed(0)
    first, second = DiscreteCommunication(), DiscreteCommunication()
    steps = [torch.randn(4, 12, 10, generator=generator) - 0.5 for _ in range(8)]
    for logits in steps[:4]:
        first(logits, logits[:2])
    second.load_state_dict(first.state_dict())
    betas = [[objective(x, x[:2])["beta"].item() for x in steps[4:]] for objective in (first, second)]
    assert betas[0] == betas[1]
    assert betas[0] != [DiscreteCommunication()(x, x[:2])["beta"].item() for x in steps[4:]]


def test_the_state_is_changed_in_place():
    """What a step or a captured graph holds of it stays what it is."""
    control = BetaControl()
    before = dict(control.named_buffers())
    places, values = [b.data_ptr() for b in before.values()], [b.clone() for b in before.values()]
    call(control, 0.1, 0.2)
    after = dict(control.named_buffers())
    assert list(after) == list(before) == ["state"]
    for name, buffer in after.items():
        assert buffer is before[name]
    assert [b.data_ptr() for b in after.values()] == places
    assert not any(map(torch.equal, after.values(), values))


# In the loop -----------------------------------------------------------------------------------------------

DIMENSIONS, LATENT, MOMENTUM, MEASURED = 32, 8, 0.95, 20


def small_network(bits):
    return nn.Sequential(nn.Linear(DIMENSIONS, 64), nn.GELU(), nn.Linear(64, bits))


def train(objective, network, images, steps, lr=3e-3, noise=0.5):
    """Train on views of a few hidden numbers, mixed and under noise, against a moving average; how the bits
    were used in the last steps, with the share of them that was transmitted, and the last β."""
    mix = torch.randn(LATENT, DIMENSIONS)
    teacher = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    ones, costs = torch.zeros(2, network[-1].out_features)
    for step in range(steps):
        x = torch.randn(images, LATENT) @ mix
        views = x + noise * torch.randn(3, images, DIMENSIONS)
        message, logits = teacher(views[:2]), network(views)
        losses = objective(logits, message)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        for average, parameter in zip(teacher.parameters(), network.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - MOMENTUM)
        if step >= steps - MEASURED:
            bits = (message > 0).float()
            predicted = logits[:2].detach().roll(1, 0)
            nats = F.binary_cross_entropy_with_logits(predicted, bits, reduction="none")
            ones += bits.sum((0, 1))
            costs += nats.sum((0, 1)) / math.log(2)
    number = 2 * images * MEASURED
    share = transmitted_bits(ones, costs, number) / len(ones)
    return {**bit_statistics(ones, number), "transmitted": share, "beta": losses["beta"].item()}


SIZES = [(16, 64), (64, 64), (256, 32), (64, 512), (4096, 16)]  # images, bits


@pytest.mark.slow
@pytest.mark.parametrize(("images", "bits"), SIZES)
def test_the_channel_is_used_and_understood_whatever_the_sizes(images, bits):
    torch.manual_seed(0)
    found = train(DiscreteCommunication(), small_network(bits), images, 300)
    assert found["bit_entropy"] >= 0.8
    assert found["dead_bits"] <= 0.05
    assert found["transmitted"] >= 0.3


@pytest.mark.slow
@pytest.mark.parametrize("start", [1e-3, 10])
@pytest.mark.parametrize(("images", "bits"), SIZES[:-1])  # a batch of 4 096 would take as long as all others
def test_a_beta_that_is_far_off_at_first_is_found(images, bits, start, monkeypatch):
    """Held at 0.001, a third of the bits would die, and held at 10, little of a message would arrive. After
    the second, bits are understood only slowly, but β is no longer in the way."""
    monkeypatch.setattr(BetaControl, "START", start)
    torch.manual_seed(0)
    found = train(DiscreteCommunication(), small_network(bits), images, 500)
    assert found["bit_entropy"] >= 0.7
    assert 0.01 <= found["beta"] <= 1
    assert found["transmitted"] >= (0.3 if start < 1 else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "bits"), [(64, 64), (256, 32), (64, 512)])
def test_a_collapsed_channel_is_revived(images, bits):
    """All images have nearly the same logits, and every bit is constant: a fixed β leaves it so."""
    alive = {}
    for beta in ("auto", 0.1):
        torch.manual_seed(0)
        network = small_network(bits)
        with torch.no_grad():
            network[-1].weight.mul_(3e-4)
            network[-1].bias.normal_()
            logits = network(torch.randn(images, LATENT) @ torch.randn(LATENT, DIMENSIONS))
        rows = F.normalize(logits.double(), dim=-1)
        assert (rows @ rows.T).min() >= 1 - 1e-6
        assert bit_statistics((logits > 0).sum(0), images)["bit_entropy"] < 0.02
        alive[beta] = 1 - train(DiscreteCommunication(beta), network, images, 150)["dead_bits"]
    assert alive["auto"] >= 0.95
    assert alive[0.1] <= 0.05
