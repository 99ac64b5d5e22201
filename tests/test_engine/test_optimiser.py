import copy

import pytest
import torch
from torch import nn

from bincomm.engine.optimiser import clear_state, clip_gradients, create_optimiser, set_rates


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))


def test_no_decay_on_biases_and_norms():
    model = network()
    optimiser = create_optimiser(model)
    set_rates(optimiser, lr=0.5, weight_decay=0.1)
    for group in optimiser.param_groups:
        dimensions = {p.ndim for p in group["params"]}
        assert group["lr"] == 0.5
        assert (dimensions, group["weight_decay"]) in (({2}, 0.1), ({1}, 0.0))


def test_clipping_is_per_tensor_and_like_pytorchs():
    model = network()
    model(torch.randn(3, 6)).mul(30).sum().backward()
    model[2].bias.grad.mul_(1e-3)  # one that is within the limit
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.grad = mine.grad.clone()
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert clip_gradients(model, 1.0).item() == pytest.approx(total.item(), rel=1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=0)
        assert mine.grad.norm() <= 1.00001
    assert model[2].bias.grad.norm() < 0.9


def test_no_limit_and_zero_gradients_leave_everything():
    model = network()
    model(torch.zeros(3, 6)).mul(0).sum().backward()
    clip_gradients(model, 1.0)
    assert all((p.grad == 0).all() for p in model.parameters())
    model(torch.randn(3, 6)).mul(30).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    clip_gradients(model, 0)
    assert all(torch.equal(p.grad, was) for p, was in zip(model.parameters(), before, strict=True))


def test_clearing_makes_a_module_new_to_the_optimiser():
    model = network()
    optimiser = create_optimiser(model)
    set_rates(optimiser, 0.1, 0.0)
    for _ in range(3):
        model(torch.randn(3, 6)).square().sum().backward()
        optimiser.step()
    clear_state(optimiser, model[2])
    assert all(p not in optimiser.state for p in model[2].parameters())
    assert all(optimiser.state[p]["step"] == 3 for p in model[0].parameters())
    optimiser.step()
    assert all(optimiser.state[p]["step"] == 1 for p in model[2].parameters())
