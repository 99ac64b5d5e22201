"""The CUDA source of the clipping of gradients, run on the CPU under sanitizers."""

import math
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from on_fibers import NEEDS_COMPILER, build

from bincomm.ops.clip import clip_gradients_

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAM = Path(__file__).with_name("clip_program.cpp").read_text()
SIZES = (1, 3, 63, 255, 1024, 16383, 16384, 16385, 50_001)  # around those of warps, blocks and parts

pytestmark = [NEEDS_COMPILER, pytest.mark.kernels, pytest.mark.slow]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(PROGRAM, tmp_path_factory.mktemp("fibers"), CSRC)


def execute(program, gradients, limit, seed=0, offset=0):
    """The norm of all gradients, and what becomes of them."""
    sizes = [g.numel() for g in gradients]
    process = subprocess.run(
        [program, *map(str, (limit, seed, offset, *sizes))],
        input=torch.cat(gradients).numpy().tobytes(),
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr.decode()
    results = torch.from_numpy(numpy.frombuffer(process.stdout, numpy.float32).copy())
    norm, *clipped = results.split([1, *sizes])
    return norm, clipped


def gradients(norms, sizes=SIZES):
    directions = [torch.randn(size, dtype=torch.float64) for size in sizes]
    return [(norm * g / g.norm()).float() for norm, g in zip(norms, directions, strict=True)]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_it_does_what_the_cpu_does(program, scale, offset):
    norms = [scale * (0.9 if index % 2 else 3 + index) for index in range(len(SIZES))]
    before = gradients(norms)
    expected = [g.clone() for g in before]
    exact = clip_gradients_(expected, scale)
    for seed in range(3):
        norm, clipped = execute(program, before, scale, seed, offset)
        torch.testing.assert_close(norm[0], exact, rtol=1e-6, atol=0)
        for index, (result, other) in enumerate(zip(clipped, expected, strict=True)):
            torch.testing.assert_close(result, other, rtol=1e-6, atol=0)
            assert torch.equal(result, before[index]) == (index % 2 == 1)


def test_more_gradients_than_a_launch_takes(program):
    before = gradients([0.5, 2.0] * 200, [5] * 400)
    expected = [g.clone() for g in before]
    exact = clip_gradients_(expected, 1.0)
    norm, clipped = execute(program, before, 1.0)
    torch.testing.assert_close(norm[0], exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(clipped, expected, rtol=1e-6, atol=0)


def test_without_a_limit_only_the_norm(program):
    before = gradients([1.0, 30.0, 1e30], [5, 20_000, 7])
    norm, clipped = execute(program, before, math.inf)
    assert norm.item() == pytest.approx(1e30, rel=1e-6)
    assert all(map(torch.equal, clipped, before))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_and_stays(program, value):
    before = gradients([3.0, 3.0], [20_000, 7])
    before[0][17_000] = value
    norm, clipped = execute(program, before, 1.0)
    assert not norm.isfinite()
    torch.testing.assert_close(clipped[0], before[0], rtol=0, atol=0, equal_nan=True)
    assert clipped[1].norm().item() == pytest.approx(1.0)


def test_the_largest_numbers_have_a_finite_norm(program):
    largest = torch.finfo(torch.float32).max
    norm, clipped = execute(program, [torch.full((20_000,), largest)], 1.0)
    assert norm.item() == largest
    torch.testing.assert_close(clipped[0], torch.full((20_000,), 20_000**-0.5), rtol=1e-6, atol=0)
