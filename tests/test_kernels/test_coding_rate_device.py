"""The CUDA source of the coding rate, run on the CPU under sanitizers, and faults planted in it."""

import math
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from on_fibers import NEEDS_COMPILER, build

from bincomm.ops import reference

CSRC = Path(__file__).parents[2] / "csrc"
DEVICE_CODE = "coding_rate_device.cuh"
PROGRAM = Path(__file__).with_name("coding_rate_program.cpp").read_text()
SIDES = (1, 2, 31, 32, 33, 64, 100, 192, 256)

pytestmark = NEEDS_COMPILER


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(PROGRAM, tmp_path_factory.mktemp("fibers"), CSRC)


def execute(program, logits, side, seed, permuted=False):
    """Rates, smallest pivots, clamped counts, inverses and gradients, where rate v arrives with v + 1."""
    views, n, bits = logits.shape
    of_images = n < bits
    arguments = (side, int(of_images), seed, views, n, bits, bits / (n * 0.05), int(permuted))
    stored = logits.permute(1, 2, 0) if permuted else logits
    arriving = torch.arange(1.0, views + 1)
    done = subprocess.run(
        [program, *map(str, arguments)],
        input=stored.contiguous().numpy().tobytes() + arriving.numpy().tobytes(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    results = torch.from_numpy(numpy.frombuffer(done.stdout, numpy.float32).copy()).double()
    m = n if of_images else bits
    sizes = [views * m * m, views * m * m, views, views, logits.numel(), views]
    _, inverse, rate, smallest, gradient, clamped = results.split(sizes)
    return rate, smallest, clamped, inverse.view(views, m, m), gradient.view(logits.shape)


def truth(logits):
    logits = logits.double().requires_grad_()
    rate = reference.coding_rate(logits)
    (rate * torch.arange(1, len(rate) + 1)).sum().backward()
    return rate.detach(), logits.grad


def check(found, logits):
    rate, gradient = truth(logits)
    torch.testing.assert_close(found[0], rate, rtol=1e-5, atol=0)
    assert (found[4] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5
    matrix, _ = reference.regularized_gram(logits.double(), of_images=logits.shape[1] < logits.shape[2])
    factor = torch.linalg.cholesky(matrix)
    exact = torch.cholesky_inverse(factor)
    assert (found[3] - exact).norm() <= 1e-5 * exact.norm()
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    torch.testing.assert_close(found[1], pivots.amin(-1), rtol=1e-4, atol=0)
    assert (found[2] == 0).all()


@pytest.mark.parametrize("m", SIDES)
def test_one_block_a_matrix(program, m):
    for seed in range(3 if m > 100 else 8):
        for n, bits in ((m + 7, m), (m, m + 40)):
            logits = torch.randn(2, n, bits)
            check(execute(program, logits, 1, seed, permuted=seed % 2 == 1), logits)


@pytest.mark.parametrize(("side", "m"), [(2, 33), (2, 130), (2, 256), (4, 160), (4, 300)])
def test_a_cluster_a_matrix(program, side, m):
    for seed in range(3):
        n, bits = (m + 7, m) if seed % 2 else (m, m + 40)
        logits = torch.randn(1, n, bits)
        check(execute(program, logits, side, seed), logits)


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("zero", torch.zeros(1, 40, 70)),
        ("equal rows", torch.ones(1, 70, 40)),
        ("rank one", torch.randn(1, 70, 1) * torch.randn(1, 1, 70)),
        ("tiny", 1e-20 * torch.randn(1, 20, 40)),
        ("huge", 3e38 * torch.rand(1, 60, 40)),
        ("one", torch.randn(1, 1, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_finite_logits_stay_finite(program, name, logits):
    for side in (1, 2):
        rate, smallest, clamped, inverse, gradient = execute(program, logits, side, seed=side)
        for result in (rate, smallest, inverse, gradient):
            assert result.isfinite().all()
        assert ((clamped > 0) == (smallest < 1)).all()
        exact, _ = truth(logits)
        torch.testing.assert_close(rate, exact, rtol=1e-3, atol=1e-6)


def test_nan_shows_in_its_view_alone(program):
    logits = torch.randn(2, 70, 40)
    logits[1, 50, 3] = math.nan
    for side in (1, 2):
        rate, smallest, _, _, gradient = execute(program, logits, side, seed=0)
        assert rate[0].isfinite()
        assert gradient[0].isfinite().all()
        assert rate[1].isnan()
        assert smallest[1].isnan()
        assert gradient[1].isnan().any()


def test_threads_in_any_order_leave_the_same_bits(program):
    logits = torch.randn(2, 50, 70)
    first = execute(program, logits, 1, seed=0)
    for seed in (1, 2):
        for mine, other in zip(execute(program, logits, 1, seed), first, strict=True):
            assert torch.equal(mine, other)


FAULTS = {  # what is planted: the text it replaces, the n-th time it occurs, and what stands there then
    "no barrier before the panels are read": ("__syncthreads();", 4, ";"),
    "no barrier of the cluster": ("cluster_barrier();", 2, ";"),
    "no barrier of a warp": ("__syncwarp();  // one block alone overwrites R_i", 1, "; //"),
    "a write past shared memory": ("pivots[lane] = own;", 1, "pivots[lane + 1] = own;"),
    "a write past the inverse": ("if (row < p.n && column < p.n) {", 1, "if (row <= p.n && column < p.n) {"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path):
    text, occurrence, planted = FAULTS[fault]
    parts = (CSRC / DEVICE_CODE).read_text().split(text)
    assert len(parts) > occurrence, "the text to be replaced is not there"
    wrong = text.join(parts[:occurrence]) + planted + text.join(parts[occurrence:])
    (tmp_path / DEVICE_CODE).write_text(wrong)
    program = build(PROGRAM, tmp_path, tmp_path)
    caught = []
    for seed in range(5):
        for side in (1, 2):
            logits = torch.randn(1, 150, 130)
            try:
                check(execute(program, logits, side, seed), logits)
            except AssertionError as error:
                caught.append(str(error))
    # Some faults are of one block alone, some of clusters.
    assert len(caught) >= 4
    if "a write past" in fault:
        assert all("heap-buffer-overflow" in message for message in caught)
