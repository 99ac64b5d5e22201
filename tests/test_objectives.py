import math

import pytest
import torch
from ranks import run_on_ranks

import bincomm
from bincomm.ops import reference
from bincomm.ops.coding_rate import rate_ceiling


def test_loss_is_agreement_minus_weighted_rate():
    student, teacher = torch.randn(6, 12, 40), torch.randn(2, 12, 40)
    losses = bincomm.DiscreteCommunication(beta=0.3, eps_squared=0.1)(student, teacher)
    agreement = reference.sign_bce(student.double(), teacher.double())
    rate = reference.coding_rate(student[:2].double(), 0.1).mean()
    gamma = (40 + 12) / (40 * 12)
    assert losses["agreement"].item() == pytest.approx(agreement.item(), rel=1e-6)
    assert losses["rate"].item() == pytest.approx(rate.item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx((agreement - 0.3 * gamma * rate).item(), rel=1e-5)


def test_gradient_reaches_every_view_and_not_the_teacher():
    student = torch.randn(4, 8, 20, requires_grad=True)
    teacher = torch.randn(2, 8, 20, requires_grad=True)
    bincomm.DiscreteCommunication()(student, teacher)["loss"].backward()
    assert (student.grad.abs().sum((1, 2)) > 0).all()
    assert teacher.grad is None


def test_ranks_are_the_whole_batch(tmp_path):
    """Two processes of 6 images each, averaged by DistributedDataParallel, against one of 12."""
    run_on_ranks(train_in_parallel, 2, tmp_path)
    network, images, teacher = parts()
    losses = bincomm.DiscreteCommunication()(network(images), teacher)
    losses["loss"].backward()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert (found[0]["loss"] + found[1]["loss"]).item() / 2 == pytest.approx(losses["loss"].item(), rel=1e-5)
    for rank in range(2):
        assert found[rank]["rate"].item() == pytest.approx(losses["rate"].item(), rel=1e-5)
        for mine, parameter in zip(found[rank]["gradients"], network.parameters(), strict=True):
            assert (mine - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


def parts():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 40), torch.randn(4, 12, 8), torch.randn(2, 12, 40)


def train_in_parallel(rank, world, folder):
    network, images, teacher = parts()
    parallel = torch.nn.parallel.DistributedDataParallel(network)
    mine = slice(6 * rank, 6 * rank + 6)
    losses = bincomm.DiscreteCommunication()(parallel(images[:, mine]), teacher[:, mine])
    losses["loss"].backward()
    found = {"loss": losses["loss"].detach(), "rate": losses["rate"]}
    torch.save(found | {"gradients": [p.grad for p in network.parameters()]}, f"{folder}/{rank}.pt")


def test_a_negative_beta_is_refused():
    with pytest.raises(ValueError, match="beta: .*-1"):
        bincomm.DiscreteCommunication(beta=-1)


def test_ceiling_is_never_exceeded():
    for n, bits in ((4, 50), (50, 4), (16, 16)):
        rates = bincomm.coding_rate(torch.randn(20, n, bits))
        ceiling = rate_ceiling(torch.tensor(float(n)), bits, 0.05).item()
        assert rates.max().item() < ceiling < min(n, bits) * math.log(1e6)
