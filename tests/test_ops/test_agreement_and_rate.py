"""Both operations in one node of autograd: the same values and gradients, in fewer passes over the logits."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import bincomm
from bincomm.ops.agreement_and_rate import agreement_and_rate

SHAPES = [(4, 2, 9, 40), (3, 3, 5, 33), (2, 1, 30, 20), (5, 2, 1, 8)]  # V, U, n, K


def outputs(shape, dtype=torch.float32):
    views, teachers, n, bits = shape
    student, teacher = (torch.randn(v, n, bits).to(dtype) for v in (views, teachers))
    return student.requires_grad_(), teacher


def separately(student, teacher):
    return bincomm.sign_bce(student, teacher), bincomm.coding_rate(student[: len(teacher)])


def gradient(function, student, teacher, weight=-0.3):
    agreement, rates = function(student, teacher)
    (grad,) = torch.autograd.grad(agreement + weight * rates.mean(), student)
    return agreement.detach(), rates.detach(), grad


def together(student, teacher):
    return agreement_and_rate(student, teacher, eps_squared=0.05)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_the_two_operations(shape, dtype):
    student, teacher = outputs(shape, dtype)
    for target in (teacher, bincomm.pack_signs(teacher)):
        for result, expected in zip(
            gradient(together, student, target), gradient(separately, student, target), strict=True
        ):
            assert torch.equal(result, expected)


def test_of_any_strides_and_with_one_of_the_two_unused():
    student, teacher = outputs(SHAPES[0])
    permuted = student.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    expected = gradient(separately, student, teacher)
    for result, value in zip(gradient(together, permuted, teacher), expected, strict=True):
        torch.testing.assert_close(result, value)
    for used in (0, 1):
        (one,) = torch.autograd.grad(together(student, teacher)[used].sum(), student)
        (other,) = torch.autograd.grad(separately(student, teacher)[used].sum(), student)
        assert torch.equal(one, other)


def test_what_the_operations_refuse():
    student, teacher = outputs(SHAPES[0])
    with pytest.raises(ValueError, match="teacher: expected"):
        together(student, teacher[:, :3])
    with pytest.raises(ValueError, match="eps_squared: expected a number > 0"):
        agreement_and_rate(student, teacher, eps_squared=0.0)
    with pytest.raises(ValueError, match="logits: expected shape"):
        together(student[:, :0], teacher[:, :0])
    (grad,) = torch.autograd.grad(together(student, teacher)[0], student, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_an_eps_squared_that_fp32_is_not_precise_enough_for():
    student, teacher = outputs((3, 2, 6, 40))
    _, rates = agreement_and_rate(student, teacher, eps_squared=1e-5)
    torch.testing.assert_close(rates, bincomm.coding_rate(student[:2], eps_squared=1e-5))


def test_the_operator_is_well_formed():
    student, teacher = outputs(SHAPES[0])
    opcheck(torch.ops.bincomm.agreement_and_rate.default, (student, teacher, 0.05, ""))


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# What launches nothing on a GPU, and how many kernels the operations launch there.
FREE = {
    "alias",
    "detach",
    "empty",
    "empty_like",
    "expand",
    "new_empty",
    "select",
    "slice",
    "t",
    "transpose",
    "view",
}
LAUNCHES = {"agreement_and_rate": 5, "agreement_and_rate_backward": 4}  # sign_bce 2 + 1, rate 3 + 2, added 1


def test_the_objective_fills_and_copies_nothing_of_the_logits_size():
    student, teacher = outputs((4, 2, 16, 32))
    objective = bincomm.DiscreteCommunication(0.1)
    with Calls() as calls:
        objective(student, teacher)["loss"].backward()
    for name in ("slice_backward", "zeros", "zeros_like", "new_zeros", "copy_", "clone", "zero_"):
        assert name not in calls.names, calls.names
    launches = sum(LAUNCHES.get(name, 1) for name in calls.names if name not in FREE)
    print(f"{launches} launches: {calls.names}")
    assert launches <= 18
