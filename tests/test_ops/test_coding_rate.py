import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import bincomm
from bincomm.ops import reference
from bincomm.ops.coding_rate import rate_ceiling


def value_and_gradient(function, logits, **kwargs):
    logits = logits.detach().requires_grad_()
    rate = function(logits, **kwargs)
    (rate * torch.arange(1, 1 + rate.numel()).view(rate.shape)).sum().backward()  # other grad_outputs than 1
    return rate.detach().double(), logits.grad.double()


def ceiling(n, bits):
    return rate_ceiling(torch.tensor(float(n)), bits, 0.05).item()


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "shape",
    [
        (2, 128, 256),
        (2, 256, 64),
        (3, 33, 33),
        (1, 1),
        (7, 1),
        (1, 9),
        (2, 3, 40, 31),
        (12, 70, 65),
        (300, 290),
    ],
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definition_is_outside_autocast_too(dtype):
    logits = torch.randn(2, 40, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        rate = reference.coding_rate(logits)
    assert torch.equal(rate, reference.coding_rate(logits))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_set_for_matrix_products_changes_nothing(precision):
    logits = torch.randn(2, 128, 128)
    truth = value_and_gradient(reference.coding_rate, logits.double())
    torch.set_float32_matmul_precision(precision)
    try:
        rate, gradient = value_and_gradient(bincomm.coding_rate, logits)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(rate, truth[0], rtol=1e-6, atol=0)
    assert (gradient - truth[1]).norm() <= 1e-5 * truth[1].norm()


def test_collapse_and_ceiling():
    n, bits = 50, 64
    collapsed = bincomm.coding_rate(torch.ones(n, 1) * torch.randn(1, bits))
    # All but one pivot are 1 only after cancellation: fp32 leaves an error of a few 1e-5 here.
    assert collapsed.item() == pytest.approx(math.log(1 + bits / 0.05) / 2, rel=1e-4)
    orthogonal = torch.linalg.qr(torch.randn(bits, bits))[0]
    assert bincomm.coding_rate(orthogonal).item() == pytest.approx(ceiling(bits, bits), rel=1e-5)
    assert bincomm.coding_rate(orthogonal[:n]).item() == pytest.approx(ceiling(n, bits), rel=1e-5)
    assert ceiling(256, 256) == pytest.approx(389.7, abs=0.05)


FINITE = {
    "zero": torch.zeros(8, 16),
    "equal rows, n < K": torch.ones(8, 16),
    "equal rows, n > K": torch.ones(40, 16),
    "rank one": randn(8, 1) * randn(1, 16),
    "some rows zero": torch.cat([torch.zeros(2, 16), randn(6, 16)]),
    "1e-20": 1e-20 * randn(8, 16),
    "1e18": 1e18 * randn(8, 16),
    "the largest numbers": torch.finfo(torch.float32).max * (2 * torch.rand(8, 16).round() - 1),
    "n = K = 1": randn(1, 1),
    "n = 1": randn(1, 256),
    "K = 1": randn(256, 1),
    "equal rows, K = 1024": torch.ones(1100, 1024),
}


@pytest.mark.parametrize("case", FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_never_nan_from_finite_logits(case, dtype):
    largest = torch.finfo(dtype).max
    logits = FINITE[case].clamp(-largest, largest).to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rate, gradient = value_and_gradient(bincomm.coding_rate, logits)
        assert rate.isfinite()
        assert gradient.isfinite().all()
    truth = value_and_gradient(reference.coding_rate, logits.double())
    # Parallel rows leave an error that grows with K.
    torch.testing.assert_close(rate, truth[0], rtol=1e-4 if logits.shape[-1] <= 256 else 0.1, atol=1e-6)
    if dtype == torch.float32 and logits.shape[-1] <= 256:
        largest = truth[1].abs().max().item()
        torch.testing.assert_close(gradient, truth[1], rtol=1e-3, atol=1e-5 * (1 + largest))


def test_a_gradient_too_large_for_fp16_is_its_largest_number():
    logits = (1e-6 * torch.randn(4, 8)).half()
    _, gradient = value_and_gradient(bincomm.coding_rate, logits)
    assert gradient.isfinite().all()
    assert gradient.abs().max() == torch.finfo(torch.float16).max
    truth = value_and_gradient(reference.coding_rate, logits.double())[1]
    clear = truth.abs() > 1
    assert torch.equal(gradient.sign()[clear], truth.sign()[clear])


def test_what_overflows_by_the_scale_of_the_loss_is_infinite():
    """A GradScaler is to see it and lower the scale."""
    logits = torch.randn(2, 4, 8, dtype=torch.float16, requires_grad=True)
    bincomm.coding_rate(logits).backward(torch.tensor([1.0, 1e7]))
    assert logits.grad[0].isfinite().all()
    assert logits.grad[1].isinf().any()
    assert not logits.grad[1].isnan().any()


def test_nan_and_infinity_show_in_their_view_alone():
    for wrong in (math.nan, math.inf):
        for shape in ((2, 8, 16), (2, 40, 16)):
            logits = torch.randn(shape)
            logits[1, 3, 5] = wrong
            rate, gradient = value_and_gradient(bincomm.coding_rate, logits)
            diagnostics = bincomm.coding_rate(logits, diagnostics=True)
            assert rate[0].isfinite()
            assert gradient[0].isfinite().all()
            assert rate[1].isnan()
            assert diagnostics.smallest_pivot[1].isnan()


def test_strides_scale_and_repetition_change_nothing():
    logits = torch.randn(2, 24, 40)
    expected = value_and_gradient(bincomm.coding_rate, logits)
    permuted = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    sliced = torch.randn(2, 48, 80)[:, ::2, ::2].copy_(logits)
    assert sliced.stride() == (3840, 160, 2)
    for same in (logits, permuted, sliced):
        rate, gradient = value_and_gradient(bincomm.coding_rate, same)
        torch.testing.assert_close(rate, expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)
    again = value_and_gradient(bincomm.coding_rate, logits)
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])
    torch.testing.assert_close(
        bincomm.coding_rate(5 * logits), bincomm.coding_rate(logits), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("shape", [(1, 256, 256), (3, 300, 200), (5, 64, 64)])
def test_the_number_of_threads_changes_nothing_but_rounding_of_products(shape):
    """Our kernels give the same bits for the same Gram matrix; BLAS may divide its sums differently."""
    z, _ = torch.ops.bincomm.coding_rate_rows(torch.randn(shape))
    gram = 20 * z.mT @ z
    results = []
    threads = torch.get_num_threads()
    for number in (1, threads):
        torch.set_num_threads(number)
        rate, factor, smallest, clamped = torch.ops.bincomm.coding_rate_factor(gram)
        results.append((rate, smallest, clamped, torch.ops.bincomm.coding_rate_inverse(factor)))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_both_sides_agree():
    """n rows in K dimensions or K rows in n: the determinant, with the same scale, is the same."""
    z = F.normalize(torch.randn(30, 50, dtype=torch.float64), dim=-1)
    alpha = 50 / (30 * 0.05)
    for gram in (z @ z.T, z.T @ z):
        matrix = torch.eye(len(gram), dtype=torch.float64) + alpha * gram
        exact = reference.half_logdet(matrix).item()
        assert bincomm.coding_rate(z.float()).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 20, 30), (30, 20), (2, 16, 16)])
def test_diagnostics(shape):
    logits = torch.randn(shape)
    result = bincomm.coding_rate(logits, diagnostics=True)
    exact = bincomm.coding_rate(logits.double(), diagnostics=True)
    assert torch.equal(result.rate, bincomm.coding_rate(logits))
    for value, expected in zip(result, exact, strict=True):
        assert value.shape == expected.shape
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=0)
    assert result.ceiling.item() == pytest.approx(ceiling(*shape[-2:]), rel=1e-6)
    assert (result.rate <= result.ceiling).all()
    assert result.clamped.dtype == torch.int32
    assert (result.clamped == 0).all()
    assert (result.smallest_pivot > 1).all()


def test_diagnostics_show_a_collapse():
    healthy = bincomm.coding_rate(torch.randn(128, 64), diagnostics=True)
    # Enough equal rows for rounding errors of both signs.
    collapsed = bincomm.coding_rate(torch.ones(300, 1) * torch.randn(1, 256), diagnostics=True)
    assert healthy.rate > 0.8 * healthy.ceiling
    assert collapsed.rate < 0.05 * collapsed.ceiling
    assert collapsed.smallest_pivot < 1.01 < healthy.smallest_pivot
    assert (collapsed.clamped > 0) == (collapsed.smallest_pivot < 1)


def test_small_eps_squared_is_computed_in_fp64():
    """Equal rows leave pivots of 1 after a cancellation from K/ε², for which fp32 is not precise enough."""
    for eps_squared in (1e-4, 1e-6, 1e-9):
        rate, gradient = value_and_gradient(bincomm.coding_rate, torch.ones(40, 16), eps_squared=eps_squared)
        assert rate.item() == pytest.approx(math.log(1 + 16 / eps_squared) / 2, rel=1e-4)
        assert gradient.isfinite().all()
        half = (1e-6 * torch.randn(4, 16)).half()
        rate, gradient = value_and_gradient(bincomm.coding_rate, half, eps_squared=eps_squared)
        assert rate.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 6, 10), (2, 10, 6), (1, 5, 5)])
def test_opcheck(shape):
    logits = torch.randn(shape, requires_grad=True)
    opcheck(torch.ops.bincomm.coding_rate, (logits, 0.05, ""))
    logits, alpha, of_images = logits.detach(), shape[2] / (shape[1] * 0.05), shape[1] < shape[2]
    rate, factor, reciprocal, *_ = torch.ops.bincomm.coding_rate(logits, 0.05, "")
    opcheck(torch.ops.bincomm.coding_rate_backward, (rate, logits, factor, reciprocal, alpha, of_images))


def test_the_reference_is_the_log_determinant():
    matrix, images = reference.regularized_gram(torch.randn(7, 5, dtype=torch.float64))
    assert images == 7
    assert reference.half_logdet(matrix).item() == pytest.approx(
        math.log(numpy.linalg.det(matrix.numpy())) / 2
    )


def test_gradcheck_of_the_reference():
    logits = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bincomm.coding_rate, logits)
    assert torch.autograd.gradgradcheck(bincomm.coding_rate, logits)


def test_a_second_derivative_is_refused():
    logits = torch.randn(2, 4, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(bincomm.coding_rate(logits).sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="coding_rate has no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    logits = torch.randn(2, 8, 16)

    def rates(a):
        result = bincomm.coding_rate(a * 2, diagnostics=True)
        return result.rate / result.ceiling

    results = value_and_gradient(torch.compile(rates, fullgraph=True, backend=backend), logits)
    expected = value_and_gradient(rates, logits)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-6, atol=1e-8)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="logits"):
        bincomm.coding_rate([1.0])
    with pytest.raises(ValueError, match=r"logits: .*\(5,\)"):
        bincomm.coding_rate(torch.randn(5))
    with pytest.raises(ValueError, match=r"logits: .*\(0, 4\)"):
        bincomm.coding_rate(torch.randn(0, 4))
    with pytest.raises(TypeError, match="group: .*'all'"):
        bincomm.coding_rate(torch.randn(3, 4), group="all")
    for wrong in (0, -1, 1e-14, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"eps_squared: .*{wrong}"):
            bincomm.coding_rate(torch.randn(3, 4), eps_squared=wrong)
