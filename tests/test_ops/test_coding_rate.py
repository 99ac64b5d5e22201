import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import bincomm
from bincomm.objectives import rate_ceiling
from bincomm.ops import reference


def value_and_gradient(function, logits, **kwargs):
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    rate = function(logits, **kwargs)
    (rate * torch.arange(1, 1 + rate.numel()).view(rate.shape)).sum().backward()  # other grad_outputs than 1
    return rate.detach().double(), logits.grad.double()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "shape", [(2, 128, 256), (2, 256, 64), (3, 33, 33), (1, 1), (7, 1), (1, 9), (2, 3, 40, 31)]
)
def test_against_the_definition_in_fp64(shape):
    logits = torch.randn(shape)
    truth = value_and_gradient(reference.coding_rate, logits.double())
    rate, gradient = value_and_gradient(bincomm.coding_rate, logits)
    assert rate.shape == shape[:-2]
    torch.testing.assert_close(rate, truth[0], rtol=1e-5, atol=1e-6)
    assert (gradient - truth[1]).norm() <= 1e-4 * truth[1].norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_compute_in_fp32_under_autocast(dtype):
    logits = torch.randn(2, 40, 64).to(dtype)
    truth = value_and_gradient(reference.coding_rate, logits.double())
    with torch.autocast("cpu", torch.bfloat16):
        rate, gradient = value_and_gradient(bincomm.coding_rate, logits)
    torch.testing.assert_close(rate, truth[0], rtol=1e-5, atol=0)
    # The gradient is rounded once, to the dtype of the logits.
    torch.testing.assert_close(gradient, truth[1], rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_collapse_and_ceiling():
    n, bits = 50, 64
    collapsed = bincomm.coding_rate(torch.ones(n, 1) * torch.randn(1, bits))
    # All but one pivot are 1 only after cancellation: fp32 leaves an error of a few 1e-5 here.
    assert collapsed.item() == pytest.approx(math.log(1 + bits / 0.05) / 2, rel=1e-4)
    orthogonal = torch.linalg.qr(torch.randn(bits, bits))[0]
    assert bincomm.coding_rate(orthogonal).item() == pytest.approx(rate_ceiling(bits, bits), rel=1e-5)
    assert bincomm.coding_rate(orthogonal[:n]).item() == pytest.approx(rate_ceiling(n, bits), rel=1e-5)
    assert rate_ceiling(256, 256) == pytest.approx(389.7, abs=0.05)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(8, 16),
        torch.ones(8, 16),
        torch.ones(40, 16),
        randn(8, 1) * randn(1, 16),
        torch.cat([torch.zeros(2, 16), randn(6, 16)]),
        1e-20 * randn(8, 16),
        1e17 * randn(8, 16),
        randn(1, 1),
    ],
)
def test_never_nan_from_finite_logits(logits):
    rate, gradient = value_and_gradient(bincomm.coding_rate, logits)
    assert rate.isfinite()
    assert gradient.isfinite().all()
    truth = value_and_gradient(reference.coding_rate, logits.double())
    # Parallel rows leave an error of a few 1e-5, as above.
    torch.testing.assert_close(rate, truth[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, truth[1], rtol=1e-3, atol=1e-5 * (1 + truth[1].abs().max().item()))


def test_nan_shows():
    logits = torch.randn(2, 8, 16)
    logits[1, 3, 5] = math.nan
    rate, _ = value_and_gradient(bincomm.coding_rate, logits)
    assert rate[0].isfinite()
    assert rate[1].isnan()


def test_strides_scale_and_repetition_change_nothing():
    logits = torch.randn(2, 24, 40)
    expected = value_and_gradient(bincomm.coding_rate, logits)
    permuted = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for some in (logits, permuted):
        found = value_and_gradient(bincomm.coding_rate, some)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    again = value_and_gradient(bincomm.coding_rate, logits)
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])
    torch.testing.assert_close(
        bincomm.coding_rate(5 * logits), bincomm.coding_rate(logits), rtol=1e-6, atol=0
    )


def test_both_sides_agree():
    """n rows in K dimensions or K rows in n: the determinant, its scale set alike, is the same."""
    z = F.normalize(torch.randn(30, 50, dtype=torch.float64), dim=-1)
    alpha = 50 / (30 * 0.05)
    tall = torch.logdet(torch.eye(30) + alpha * z @ z.T) / 2
    assert bincomm.coding_rate(z.float()).item() == pytest.approx(tall.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 10), (2, 10, 6), (5, 5)])
def test_opcheck(shape):
    logits = torch.randn(shape, requires_grad=True)
    opcheck(torch.ops.bincomm.coding_rate, (logits, 0.05))
    rate, inverse, norms = torch.ops.bincomm.coding_rate(logits.detach(), 0.05)
    opcheck(torch.ops.bincomm.coding_rate_backward, (rate, logits.detach(), inverse, norms, 0.05))


def test_gradcheck_of_the_reference():
    logits = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bincomm.coding_rate, logits)


def test_compile_fullgraph():
    logits = torch.randn(2, 8, 16)
    compiled = torch.compile(lambda a: bincomm.coding_rate(a * 2), fullgraph=True, backend="aot_eager")
    found = value_and_gradient(compiled, logits)
    expected = value_and_gradient(lambda a: bincomm.coding_rate(a * 2), logits)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="logits"):
        bincomm.coding_rate([1.0])
    with pytest.raises(ValueError, match=r"logits: .*\(5,\)"):
        bincomm.coding_rate(torch.randn(5))
    with pytest.raises(ValueError, match=r"logits: .*\(0, 4\)"):
        bincomm.coding_rate(torch.randn(0, 4))
    with pytest.raises(ValueError, match="eps_squared: .*0"):
        bincomm.coding_rate(torch.randn(3, 4), eps_squared=0)
