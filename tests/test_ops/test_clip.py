import math

import pytest
import torch
from torch import nn
from torch.library import opcheck

from bincomm.ops.clip import clip_gradients_, clip_gradients_pytorch_

# Around the vectors', the parts' and the threads' sizes.
SIZES = [(1,), (63,), (64, 3), (0, 5), (), (16384,), (16385,), (3, 5, 7, 11), (300, 1000)]


def gradients(dtype=torch.float32, scale=1.0):
    """Of many sizes, every second within a norm of 1."""
    directions = [torch.randn(size, dtype=torch.float64) for size in SIZES]
    norms = [0.9 if index % 2 else 30 + index for index in range(len(SIZES))]
    return [
        (scale * norm * g / g.norm().clamp_min(1e-9)).to(dtype)
        for g, norm in zip(directions, norms, strict=True)
    ]


def clipped(tensors, limit):
    """By torch.nn.utils.clip_grad_norm_, in fp64, one at a time; and the norm of all before."""
    parameters = [nn.Parameter(g.double()) for g in tensors]
    for p in parameters:
        p.grad = p.detach().clone()
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    for p in parameters:
        torch.nn.utils.clip_grad_norm_([p], limit)
    return [p.grad for p in parameters], total


def check(tensors, limit, tolerance=3e-7):
    expected, total = clipped(tensors, limit)
    results = [g.clone() for g in tensors]
    norm = clip_gradients_(results, limit)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(total.item(), rel=tolerance)
    for result, before, exact in zip(results, tensors, expected, strict=True):
        # PyTorch divides by norm + 1e-6.
        assert (result - exact).norm() <= max(tolerance, 2e-6) * exact.norm()
        if before.double().norm() <= limit:
            assert torch.equal(result, before)
        else:
            assert result.double().norm().item() == pytest.approx(limit, rel=tolerance)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("limit", [1.0, 1e-3, 1e3])
def test_against_pytorchs_one_at_a_time(limit):
    check(gradients(), limit)


@pytest.mark.parametrize("scale", [1e-18, 1e-10, 1e10, 1e30])
def test_squares_that_fp32_does_not_hold(scale):
    tensors = gradients(scale=scale)
    expected = [g.double() / g.double().norm() * scale if g.double().norm() > scale else g for g in tensors]
    total = torch.stack([g.double().norm() for g in tensors]).norm()
    assert clip_gradients_(tensors, scale).item() == pytest.approx(total.item(), rel=3e-7)
    for result, exact in zip(tensors, expected, strict=True):
        assert (result.double() - exact).norm() <= 3e-7 * exact.norm()


def test_the_largest_numbers_are_clipped():
    largest = torch.finfo(torch.float32).max
    tensors = [torch.full((20_000,), largest)]
    assert clip_gradients_(tensors, 1.0).item() == largest  # the norm is larger, but finite
    torch.testing.assert_close(tensors[0], torch.full((20_000,), 20_000**-0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    check(gradients(dtype), 1.0, 1e-6 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps)


def test_the_pytorch_implementation_agrees():
    tensors = gradients()
    copies = [g.clone() for g in tensors]
    torch.testing.assert_close(clip_gradients_(tensors, 1.0), clip_gradients_pytorch_(copies, 1.0))
    torch.testing.assert_close(tensors, copies)


def test_within_the_limit_nothing_is_written():
    tensors = gradients()
    copies = [g.clone() for g in tensors]
    for limit in (1e3, 0.0, math.inf):
        norm = clip_gradients_(tensors, limit)
        assert norm.item() == pytest.approx(clipped(tensors, 1.0)[1].item(), rel=1e-6)
        assert all(map(torch.equal, tensors, copies))
    read_only = torch.zeros(1000).expand(7, 1000)  # writing would be refused
    clip_gradients_([read_only], 1.0)


@pytest.mark.parametrize("limit", [1.0, 1e9])
def test_strides(limit):
    plain = 3 * torch.randn(4, 6, 8, 10)
    channels_last = plain.clone(memory_format=torch.channels_last)
    transposed = plain.transpose(0, 3).contiguous().transpose(0, 3)
    apart = torch.zeros(4, 6, 8, 20)[..., ::2].copy_(plain)
    reversed_order = plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    tensors = [plain, channels_last, transposed, apart, reversed_order]
    layouts = [(g.data_ptr(), g.stride()) for g in tensors]
    clip_gradients_(tensors, limit)
    assert layouts == [(g.data_ptr(), g.stride()) for g in tensors]
    for g in tensors[1:]:
        torch.testing.assert_close(g, plain, rtol=1e-6, atol=0)
    assert (apart.norm() < 1.00001) == (limit == 1.0)


def test_the_number_of_threads_does_not_show():
    tensors = gradients()
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 3, 5, 2):
        torch.set_num_threads(number)
        copies = [g.clone() for g in tensors]
        results.append([clip_gradients_(copies, 1.0), *copies])
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_what_is_not_finite_shows(value, dtype, limit):
    tensors = gradients(dtype)
    tensors[-1][2, 3] = value
    others = [g.clone() for g in tensors[:-1]]
    assert not clip_gradients_(tensors, limit).isfinite()
    clip_gradients_(others, limit)
    assert all(map(torch.equal, tensors[:-1], others))


def test_no_gradients_at_all():
    assert clip_gradients_([], 1.0).item() == 0
    assert clip_gradients_([torch.empty(0)], 1.0).item() == 0


@pytest.mark.slow
def test_opcheck():
    opcheck(torch.ops.bincomm.clip_gradients_, ([torch.randn(40), torch.randn(3, 5)], 1.0))


def test_it_compiles():
    tensors = gradients()
    copies = [g.clone() for g in tensors]
    compiled = torch.compile(clip_gradients_, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(copies, 1.0), clip_gradients_(tensors, 1.0))
    assert all(map(torch.equal, tensors, copies))


@pytest.mark.parametrize("clip", [clip_gradients_, clip_gradients_pytorch_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_within_the_limit_are_left_however_small(clip, dtype):
    sizes = (0.0, 1e-40, 1e-30, 1e-14, 1e-11, 0.5)
    gradients = [torch.full((3,), size, dtype=dtype) for size in sizes]
    before = [g.clone() for g in gradients]
    clip(gradients, 1.0)
    assert all(map(torch.equal, gradients, before))
