"""sign_bce, forward and backward, beside the ways it is written without it."""

import pytest
import torch
import torch.nn.functional as F

import bincomm
from bincomm.ops import reference


def loop_over_pairs(student, teacher):
    targets = (teacher > 0).to(student.dtype)
    pairs = reference.paired_views(len(student), len(teacher), "cross")
    return sum(F.binary_cross_entropy_with_logits(student[v], targets[u]) for u, v in pairs) / len(pairs)


def vectorised(student, teacher):
    """One expression over all views: c·softplus(a) - S·a."""
    targets = (teacher > 0).to(student.dtype)
    views, teachers = len(student), len(teacher)
    counts = torch.full((views, 1, 1), float(teachers), device=student.device, dtype=student.dtype)
    counts[:teachers] -= 1
    sums = targets.sum(0).expand_as(student).clone()
    sums[:teachers] -= targets
    total = (counts * F.softplus(student) - sums * student).sum()
    return total / ((teachers * views - teachers) * student[0].numel())


CONTENDERS = {
    "bincomm": bincomm.sign_bce,
    "loop over pairs": loop_over_pairs,
    "vectorised": vectorised,
    "loop over pairs, torch.compile": torch.compile(loop_over_pairs),
    "vectorised, torch.compile": torch.compile(vectorised),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", [(10, 2, 64, 1024), (12, 2, 256, 256)], ids=str)
def test_sign_bce(measure, device, shape, contender):
    views, teachers, n, bits = shape
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(views, n, bits, generator=generator).to(device)
    teacher = torch.randn(teachers, n, bits, generator=generator).to(device)
    measure(
        lambda logits: CONTENDERS[contender](logits, teacher),
        student,
        lambda logits: reference.sign_bce(logits, teacher.double()),
        f"sign_bce, fp32, V={views} U={teachers} n={n} K={bits}, forward + backward",
        contender,
    )
