"""The CUDA source of the coding rate, run on the CPU under sanitizers, and faults planted in it."""

import itertools
import math
import os
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

pytestmark = [NEEDS_COMPILER, pytest.mark.kernels, pytest.mark.slow]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(PROGRAM, tmp_path_factory.mktemp("fibers"), CSRC)


def execute(program, logits, side, seed, permuted=False, fault=0, part=256, wide=False):
    """Rates, smallest pivots, clamped counts, inverses, gradients and the logits with gradients added; the
    gradient of rate v is v + 1, and where they are added 2."""
    views, n, bits = logits.shape
    of_images = n < bits
    arguments = (
        side,
        int(of_images),
        seed,
        views,
        n,
        bits,
        bits / (n * 0.05),
        int(permuted),
        part,
        int(wide),
    )
    stored = logits.permute(1, 2, 0) if permuted else logits
    arriving = torch.arange(1.0, views + 1)
    process = subprocess.run(
        [program, *map(str, arguments)],
        input=stored.contiguous().numpy().tobytes() + arriving.numpy().tobytes(),
        capture_output=True,
        env={**os.environ, "PLANTED_FAULT": str(fault)},
    )
    assert process.returncode == 0, process.stderr.decode()
    results = torch.from_numpy(numpy.frombuffer(process.stdout, numpy.float32).copy()).double()
    m = n if of_images else bits
    sizes = [views * m * m, views * m * m, views, views, logits.numel(), logits.numel(), views]
    _, inverse, rate, smallest, gradient, added, clamped = results.split(sizes)
    inverse = inverse.view(views, m, m)
    return rate, smallest, clamped, inverse, gradient.view(logits.shape), added.view(logits.shape)


def truth(logits):
    logits = logits.double().requires_grad_()
    rate = reference.coding_rate(logits)
    (rate * torch.arange(1, len(rate) + 1)).sum().backward()
    return rate.detach(), logits.grad


def check(results, logits):
    rate, smallest, clamped, inverse, gradient, added = results
    exact_rate, exact_gradient = truth(logits)
    torch.testing.assert_close(rate, exact_rate, rtol=1e-5, atol=0)
    assert (gradient - exact_gradient).norm() <= 1e-4 * exact_gradient.norm() + 1e-5
    exact_sum = logits.double() + 2 * exact_gradient / torch.arange(1, len(rate) + 1).view(-1, 1, 1)
    assert (added - exact_sum).norm() <= 1e-4 * exact_gradient.norm() + 1e-6 * logits.double().norm() + 1e-5
    matrix, _ = reference.regularized_gram(logits.double(), of_images=logits.shape[1] < logits.shape[2])
    factor = torch.linalg.cholesky(matrix)
    exact_inverse = torch.cholesky_inverse(factor)
    assert (inverse - exact_inverse).norm() <= 1e-5 * exact_inverse.norm()
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    torch.testing.assert_close(smallest, pivots.amin(-1), rtol=1e-4, atol=0)
    assert (clamped == 0).all()


@pytest.mark.parametrize("m", SIDES)
def test_one_block_a_matrix(program, m):
    shapes = (m + 7, m), (m, m + 40)
    for seed in range(8 if m <= 64 else 4 if m <= 100 else 3 if m < 256 else 2):
        for n, bits in shapes if m <= 64 else [shapes[seed % 2]]:
            logits = torch.randn(2, n, bits)
            check(execute(program, logits, 1, seed, permuted=seed % 2 == 1), logits)


@pytest.mark.parametrize(("side", "m"), [(2, 33), (2, 130), (2, 256)])
def test_a_cluster_a_matrix(program, side, m):
    for seed in range(3 if m < 256 else 2):
        n, bits = (m + 7, m) if seed % 2 else (m, m + 40)
        logits = torch.randn(1, n, bits)
        check(execute(program, logits, side, seed), logits)


@pytest.mark.parametrize(("side", "part", "m"), [(1, 64, 65), (2, 64, 200), (1, 128, 256), (2, 128, 300)])
def test_a_matrix_part_by_part(program, side, part, m):
    """And products in blocks of 2 × 2 tiles."""
    for seed in range(2):
        n, bits = (m + 7, m) if seed % 2 else (m, m + 40)
        logits = torch.randn(1 + seed, n, bits)
        check(execute(program, logits, side, seed, permuted=side > 1, part=part, wide=True), logits)


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("zero", torch.zeros(1, 40, 70)),
        ("equal rows", torch.ones(1, 140, 100)),
        ("rank one", torch.randn(1, 70, 1) * torch.randn(1, 1, 70)),
        ("tiny", 1e-20 * torch.randn(1, 20, 40)),
        ("huge", 3e38 * torch.rand(1, 60, 40)),
        ("one", torch.randn(1, 1, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_finite_logits_stay_finite(program, name, logits):
    for side, part in ((1, 256), (2, 256), (1, 64)):
        rate, smallest, clamped, inverse, gradient, added = execute(
            program, logits, side, seed=side, part=part, wide=part < 256
        )
        for result in (rate, smallest, inverse, gradient, added):
            assert result.isfinite().all()
        assert ((clamped > 0) == (smallest < 1)).all()
        exact, _ = truth(logits)
        torch.testing.assert_close(rate, exact, rtol=1e-3, atol=1e-6)


def test_nan_shows_in_its_view_alone(program):
    logits = torch.randn(2, 90, 80)
    logits[1, 50, 3] = math.nan
    for side, part in ((1, 256), (2, 256), (1, 64)):
        rate, smallest, _, _, gradient, _ = execute(program, logits, side, seed=0, part=part, wide=part < 256)
        assert rate[0].isfinite()
        assert gradient[0].isfinite().all()
        assert rate[1].isnan()
        assert smallest[1].isnan()
        assert gradient[1].isnan().any()


def test_threads_in_any_order_leave_the_same_bits(program):
    logits = torch.randn(2, 50, 70)
    first = execute(program, logits, 1, seed=0)
    for seed in (1, 2):
        for result, expected in zip(execute(program, logits, 1, seed), first, strict=True):
            assert torch.equal(result, expected)


KINDS = (
    (1, 256),
    (2, 256),
    (1, 64),
)  # side and part: some faults are of one block alone, of clusters, of parts
FAULTS = {  # what is planted: the text it replaces, the n-th time it occurs, and the faulty code
    "no barrier before the panels are read": ("__syncthreads();", 4, ";"),
    "no barrier of the cluster": ("cluster_barrier();", 2, ";"),
    "no barrier of a warp": ("__syncwarp();  // one block alone overwrites R_i", 1, ";"),
    "no barrier before a block's tiles are multiplied": ("__syncthreads();  // all four are filled", 1, ";"),
    "a write past shared memory": ("pivots[lane] = own;", 1, "pivots[lane + 1] = own;"),
    "a write past the inverse": ("if (row < p.n && column < p.n) {", 1, "if (row <= p.n && column < p.n) {"),
}


@pytest.fixture(scope="module")
def faulty_program(tmp_path_factory):
    """The program with all faults, one of which the variable PLANTED_FAULT turns on: 1 is the first."""
    folder = tmp_path_factory.mktemp("faults")
    code = (CSRC / DEVICE_CODE).read_text()
    for number, (text, occurrence, faulty) in enumerate(FAULTS.values(), 1):
        parts = code.split(text)
        assert len(parts) > occurrence, "the text to be replaced is not there"
        if text.startswith("if "):
            condition, wrong = text[3:-2], faulty[3:-2]
            faulty = f"if (planted_fault == {number} ? {wrong} : {condition}) {{"
        else:
            faulty = f"if (planted_fault == {number}) {{ {faulty} }} else {text}"
        code = text.join(parts[:occurrence]) + faulty + text.join(parts[occurrence:])
    fault = 'inline const int planted_fault = std::atoi(std::getenv("PLANTED_FAULT"));'
    (folder / DEVICE_CODE).write_text(f"#include <cstdlib>\n{fault}\n{code}")
    return build(PROGRAM, folder, folder, CSRC)


def test_the_program_is_right_unless_a_fault_is_chosen(faulty_program):
    logits = torch.randn(1, 150, 130)
    for side, part in KINDS:
        check(execute(faulty_program, logits, side, 0, part=part, wide=part < 256), logits)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(faulty_program, fault):
    caught = []
    for seed, (side, part) in itertools.product(range(5), KINDS):
        logits = torch.randn(1, 150, 130)
        try:
            number = 1 + list(FAULTS).index(fault)
            check(
                execute(faulty_program, logits, side, seed, fault=number, part=part, wide=part < 256), logits
            )
        except AssertionError as error:
            caught.append(str(error))
        if len(caught) == 4:
            break
    assert len(caught) == 4
    if "a write past" in fault:
        assert all("heap-buffer-overflow" in message for message in caught)
