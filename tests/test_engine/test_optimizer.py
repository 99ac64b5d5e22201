import torch
from torch import nn

from bincomm.engine.optimizer import (
    clear_state,
    create_optimizer,
    freeze_backbone,
    freeze_last_layer,
    set_hyperparameters,
)
from bincomm.networks import Network, PrototypeHead


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))


def test_no_decay_on_biases_and_norms():
    model = network()
    optimizer = create_optimizer(model)
    set_hyperparameters(optimizer, lr=0.5, weight_decay=0.1)
    for group in optimizer.param_groups:
        dimensions = {p.ndim for p in group["params"]}
        assert group["lr"] == 0.5
        assert (dimensions, group["weight_decay"]) in (({2}, 0.1), ({1}, 0.0))


def test_clearing_makes_a_module_new_to_the_optimizer():
    model = network()
    optimizer = create_optimizer(model)
    set_hyperparameters(optimizer, 0.1, 0.0)
    for _ in range(3):
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
    clear_state(optimizer, model[2])
    assert all(p not in optimizer.state for p in model[2].parameters())
    assert all(optimizer.state[p]["step"] == 3 for p in model[0].parameters())
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in model[2].parameters())


def test_prototypes_are_frozen_on_request():
    model = Network(torch.nn.Linear(4, 8), PrototypeHead(8, 16, 4, 6))
    before = model.head.prototypes.detach().clone()
    optimizer = create_optimizer(model)
    for frozen in (True, False):
        freeze_last_layer(optimizer, frozen)
        set_hyperparameters(optimizer, 0.1, 0.4)
        model(torch.randn(5, 2, 4)).square().sum().backward()
        bias = model.backbone.bias.detach().clone()
        optimizer.step()
        assert torch.equal(model.head.prototypes, before) == frozen
        assert not torch.equal(model.backbone.bias, bias)


def test_a_backbone_apart_is_frozen_on_request():
    model = Network(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
    optimizer = create_optimizer(model, backbone_apart=True)
    for frozen in (True, False):
        freeze_backbone(optimizer, frozen)
        set_hyperparameters(optimizer, 0.1, 0.4)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        model(torch.randn(5, 2, 4)).square().sum().backward()
        optimizer.step()
        for name, value in model.named_parameters():
            assert torch.equal(value, before[name]) == (frozen and name.startswith("backbone."))
