import torch
from torch import nn

from bincomm.engine.optimiser import clear_state, create_optimiser, set_rates


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
