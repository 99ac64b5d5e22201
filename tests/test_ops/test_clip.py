import math

import pytest
import torch
from torch import nn
from torch.library import opcheck

from bincomm.ops.clip import _pytorch_form, clip_gradients_
from tests.ranks import run_on_ranks

# Around the vectors', the parts' and the threads' sizes.
SIZES = [(1,), (63,), (64, 3), (0, 5), (), (16384,), (16385,), (3, 5, 7, 11), (300, 1000)]


def gradients(dtype=torch.float32, scale=1.0):
    """Of many sizes, every other within a norm of 1."""
    made = [torch.randn(size, dtype=torch.float64) for size in SIZES]
    made = [g / g.norm().clamp_min(1e-9) * (0.9 if place % 2 else 30 + place) for place, g in enumerate(made)]
    return [(scale * g).to(dtype) for g in made]


def clipped(made, limit):
    """By torch.nn.utils.clip_grad_norm_, in fp64, one at a time; and the norm of all before."""
    parameters = [nn.Parameter(g.double()) for g in made]
    for p in parameters:
        p.grad = p.detach().clone()
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    for p in parameters:
        torch.nn.utils.clip_grad_norm_([p], limit)
    return [p.grad for p in parameters], total


def check(made, limit, tolerance=3e-7):
    expected, total = clipped(made, limit)
    found = [g.clone() for g in made]
    norm = clip_gradients_(found, limit)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(total.item(), rel=tolerance)
    for mine, before, exact in zip(found, made, expected, strict=True):
        assert (mine - exact).norm() <= max(tolerance, 2e-6) * exact.norm()  # theirs divides by norm + 1e-6
        if before.double().norm() <= limit:
            assert torch.equal(mine, before)
        else:
            assert mine.double().norm().item() == pytest.approx(limit, rel=tolerance)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("limit", [1.0, 1e-3, 1e3])
def test_against_pytorchs_one_at_a_time(limit):
    check(gradients(), limit)


@pytest.mark.parametrize("scale", [1e-18, 1e-10, 1e10, 1e30])
def test_squares_that_fp32_does_not_hold(scale):
    made = gradients(scale=scale)
    exact = [g.double() / g.double().norm() * scale if g.double().norm() > scale else g for g in made]
    total = torch.stack([g.double().norm() for g in made]).norm()
    assert clip_gradients_(made, scale).item() == pytest.approx(total.item(), rel=3e-7)
    for mine, theirs in zip(made, exact, strict=True):
        assert (mine.double() - theirs).norm() <= 3e-7 * theirs.norm()


def test_the_largest_numbers_are_clipped():
    largest = torch.finfo(torch.float32).max
    made = [torch.full((20_000,), largest)]
    assert clip_gradients_(made, 1.0).item() == largest  # a norm beyond it, but finite
    torch.testing.assert_close(made[0], torch.full((20_000,), 20_000**-0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    check(gradients(dtype), 1.0, 1e-6 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps)


def test_the_form_in_pytorch():
    mine = gradients()
    theirs = [g.clone() for g in mine]
    torch.testing.assert_close(clip_gradients_(mine, 1.0), _pytorch_form(theirs, 1.0))
    torch.testing.assert_close(mine, theirs)


def test_within_the_limit_nothing_is_written():
    made = gradients()
    versions = [g.clone() for g in made]
    for limit in (1e3, 0.0, math.inf):
        norm = clip_gradients_(made, limit)
        assert norm.item() == pytest.approx(clipped(made, 1.0)[1].item(), rel=1e-6)
        assert all(map(torch.equal, made, versions))
    read_only = torch.zeros(1000).expand(7, 1000)  # writing would be refused
    clip_gradients_([read_only], 1.0)


@pytest.mark.parametrize("limit", [1.0, 1e9])
def test_strides(limit):
    plain = 3 * torch.randn(4, 6, 8, 10)
    channels_last = plain.clone(memory_format=torch.channels_last)
    transposed = plain.transpose(0, 3).contiguous().transpose(0, 3)
    apart = torch.zeros(4, 6, 8, 20)[..., ::2].copy_(plain)
    reversed_order = plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    made = [plain, channels_last, transposed, apart, reversed_order]
    places = [(g.data_ptr(), g.stride()) for g in made]
    clip_gradients_(made, limit)
    assert places == [(g.data_ptr(), g.stride()) for g in made]
    for g in made[1:]:
        torch.testing.assert_close(g, plain, rtol=1e-6, atol=0)
    assert (apart.norm() < 1.00001) == (limit == 1.0)


def test_the_number_of_threads_does_not_show():
    made = gradients()
    threads, found = torch.get_num_threads(), []
    for number in (1, 2, 3, 5, 2):
        torch.set_num_threads(number)
        copies = [g.clone() for g in made]
        found.append([clip_gradients_(copies, 1.0), *copies])
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_what_is_not_finite_shows(value, dtype, limit):
    made = gradients(dtype)
    made[-1][2, 3] = value
    others = [g.clone() for g in made[:-1]]
    assert not clip_gradients_(made, limit).isfinite()
    clip_gradients_(others, limit)
    assert all(map(torch.equal, made[:-1], others))


def test_no_gradients_at_all():
    assert clip_gradients_([], 1.0).item() == 0
    assert clip_gradients_([torch.empty(0)], 1.0).item() == 0


def test_opcheck():
    opcheck(torch.ops.bincomm.clip_gradients_, ([torch.randn(40), torch.randn(3, 5)], 1.0))


def test_it_compiles():
    made = gradients()
    copies = [g.clone() for g in made]
    compiled = torch.compile(clip_gradients_, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(copies, 1.0), clip_gradients_(made, 1.0))
    assert all(map(torch.equal, made, copies))


def test_split_gradients(tmp_path):
    run_on_ranks(clip_split, 2, tmp_path)


def network():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))  # whose bias lies on one rank alone
    made(torch.randn(4, 5)).mul(100).sum().backward()
    return made


def clip_split(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    whole = [p.grad for p in network().parameters()]
    mesh = init_device_mesh("cpu", (world,))
    split = [distribute_tensor(g.clone(), mesh, [Shard(0)]) for g in whole[:2]]
    split += [distribute_tensor(whole[2].clone(), mesh, [Replicate()]), whole[3].clone()]
    assert [isinstance(g, DTensor) for g in split] == [True, True, True, False]
    torch.testing.assert_close(clip_gradients_(split, 1.0), clip_gradients_(whole, 1.0))
    for mine, theirs in zip(split, whole, strict=True):
        torch.testing.assert_close(mine.full_tensor() if isinstance(mine, DTensor) else mine, theirs)
