"""The paper's objective in one node of autograd: the operations' values and gradients, in fewer passes."""

import math

import pytest
import torch
from torch.library import opcheck

import bincomm
from bincomm.ops.coding_rate import rate_bounds
from bincomm.ops.discrete_communication import control_beta, discrete_communication
from tests.calls import Calls

SHAPES = [(4, 2, 9, 40), (3, 3, 5, 33), (2, 1, 30, 20), (5, 2, 1, 8)]  # V, U, n, K
STATE = (-1.5, 0.5, 0.8)  # of a control


def outputs(shape, dtype=torch.float32):
    views, teachers, n, bits = shape
    student, teacher = (torch.randn(v, n, bits).to(dtype) for v in (views, teachers))
    return student.requires_grad_(), teacher


def together(student, teacher, beta=0.3):
    return discrete_communication(student, teacher, beta=beta, eps_squared=0.05)


def separately(student, teacher, beta=0.3):
    """By the two operations and the formulas; β of a control from the signs and the rate."""
    n, bits = student.shape[1:]
    agreement, rate = bincomm.sign_bce(student, teacher), bincomm.coding_rate(student[: len(teacher)]).mean()
    state = torch.empty(0)
    if isinstance(beta, torch.Tensor):
        p = (student[: len(teacher)] > 0).double().mean((0, 1))
        entropy = torch.distributions.Bernoulli(p).entropy().mean() / math.log(2) + 1 / (2 * n * math.log(2))
        least, largest = rate_bounds(n, bits, 0.05)
        share = (rate.detach() - least) / (largest - least)
        beta, state = control_beta(beta, share, entropy.clamp(max=1).to(share))
    loss = agreement - beta * (bits + n) / (bits * n) * rate
    first = torch.stack([agreement.detach(), rate.detach(), torch.as_tensor(beta).to(rate.dtype)])
    return loss, torch.cat([first, state.to(first)])


def gradient(function, student, teacher, beta):
    loss, scalars = function(student, teacher, beta)
    (grad,) = torch.autograd.grad(3 * loss, student)
    return loss.detach(), scalars, grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("beta", [0.3, torch.tensor(STATE)], ids=["fixed", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_made_of_the_two_operations(shape, dtype, beta):
    student, teacher = outputs(shape, dtype)
    expected = gradient(separately, student, teacher, beta)
    for target in (teacher, bincomm.pack_signs(teacher)):
        result = gradient(together, student, target, beta)
        assert not result[1].requires_grad
        for value, of_two in zip(result, expected, strict=True):
            assert value.dtype == of_two.dtype
            rtol = 1e-5 if value.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(value, of_two, rtol=rtol, atol=1e-7)


def test_of_any_strides():
    student, teacher = outputs(SHAPES[0])
    permuted = student.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    expected = gradient(together, student, teacher, 0.3)
    for result, value in zip(gradient(together, permuted, teacher, 0.3), expected, strict=True):
        torch.testing.assert_close(result, value)


def test_what_is_refused():
    student, teacher = outputs(SHAPES[0])
    with pytest.raises(ValueError, match="teacher: expected"):
        together(student, teacher[:, :3])
    with pytest.raises(ValueError, match="eps_squared: expected a number > 0"):
        discrete_communication(student, teacher, beta=0.1, eps_squared=0.0)
    with pytest.raises(ValueError, match="logits: expected shape"):
        together(student[:, :0], teacher[:, :0])
    with pytest.raises(ValueError, match="beta: its control is on meta and student on cpu"):
        together(student, teacher, torch.empty(3, device="meta"))
    (grad,) = torch.autograd.grad(together(student, teacher)[0], student, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_an_eps_squared_that_fp32_is_not_precise_enough_for():
    student, teacher = outputs((3, 2, 6, 40))
    _, scalars = discrete_communication(student, teacher, beta=0.1, eps_squared=1e-5)
    torch.testing.assert_close(scalars[1], bincomm.coding_rate(student[:2], eps_squared=1e-5).mean().detach())


@pytest.mark.parametrize("state", [(), STATE], ids=["fixed", "auto"])
def test_the_operator_is_well_formed(state):
    student, teacher = outputs(SHAPES[0])
    arguments = (student, teacher, torch.tensor(state), 0.3, 0.05, "", 1)
    opcheck(torch.ops.bincomm.discrete_communication.default, arguments)


# How many kernels the operation launches on a GPU, as tests/test_kernels counts them: with a control, one
# more, and the next state is copied.
LAUNCHES = {"discrete_communication": 5, "discrete_communication_backward": 3}


@pytest.mark.parametrize(("beta", "more"), [(0.1, 0), ("auto", 2)])
def test_the_objective_is_eight_launches(beta, more):
    student, teacher = outputs((4, 2, 16, 32))
    objective = bincomm.DiscreteCommunication(beta)
    grad = torch.ones(())
    with Calls() as calls:
        objective(student, teacher)["loss"].backward(grad)
    count = sum(LAUNCHES.get(name, 1) for name in calls.names) + (beta == "auto")
    assert count == 8 + more, calls.names
