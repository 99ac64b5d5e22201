import math

import pytest
import torch

import bincomm
from bincomm.objectives import rate_ceiling
from bincomm.ops import reference


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


def test_a_negative_beta_is_refused():
    with pytest.raises(ValueError, match="beta: .*-1"):
        bincomm.DiscreteCommunication(beta=-1)


def test_ceiling_is_never_exceeded():
    for n, bits in ((4, 50), (50, 4), (16, 16)):
        rates = bincomm.coding_rate(torch.randn(20, n, bits))
        assert rates.max().item() < rate_ceiling(n, bits)
        assert rate_ceiling(n, bits) < min(n, bits) * math.log(1e6)
