"""sign_bce beside the usual ways to write it."""

import functools

import pytest
import torch
import torch.nn.functional as F

import bincomm
from benchmarks.measuring import value_and_gradient
from bincomm.ops import reference

SHAPES = [(10, 2, 64, 1024), (12, 2, 64, 256), (12, 2, 256, 256), (12, 2, 512, 2048), (12, 2, 512, 8192)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Sizes that grow, from the shape (8, 2, 16, 256): each over three decades.
SCALING = dict.fromkeys(
    [
        *((views, 2, 16, 256) for views in (8, 32, 128, 512, 2048, 8192)),
        *((8, 2, n, 256) for n in (16, 64, 256, 1024, 4096, 16384)),
        *((8, 2, 16, bits) for bits in (256, 1024, 4096, 16384, 65536, 262144)),
    ]
)


def loop_over_pairs(student, teacher):
    # By unbind: the gradient of an index into all views has the size of all views, for every pair.
    views, targets = student.unbind(), (teacher > 0).to(student.dtype).unbind()
    pairs = reference.paired_views(len(views), len(targets), "cross")
    return sum(F.binary_cross_entropy_with_logits(views[v], targets[u]) for u, v in pairs) / len(pairs)


def vectorized(student, teacher):
    """One expression over all views: c·softplus(a) - S·a."""
    targets = (teacher > 0).to(student.dtype)
    views, teachers = len(student), len(teacher)
    counts = torch.full((views, 1, 1), float(teachers), device=student.device, dtype=student.dtype)
    counts[:teachers] -= 1
    sums = targets.sum(0).expand_as(student).clone()
    sums[:teachers] -= targets
    # The mean of half types is computed in fp32, because their sum would lose digits or overflow.
    mean = (counts * F.softplus(student) - sums * student).mean(dtype=torch.float32)
    return mean * views / (teachers * views - teachers)


CONTENDERS = {
    "bincomm": bincomm.sign_bce,
    "loop over pairs": loop_over_pairs,
    "vectorized": vectorized,
    "loop over pairs, torch.compile": torch.compile(loop_over_pairs, dynamic=False),
    "vectorized, torch.compile": torch.compile(vectorized, dynamic=False),
}


def logits_of(shape, dtype, device):
    views, teachers, n, bits = shape
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(views, n, bits, generator=generator)
    teacher = torch.randn(teachers, n, bits, generator=generator)
    return student.to(device, DTYPES[dtype]), teacher.to(device, DTYPES[dtype])


@functools.cache
def truth(shape, dtype, pairs="cross"):
    """Value and gradient in fp64."""
    student, teacher = (x.double() for x in logits_of(shape, dtype, "cpu"))
    return value_and_gradient(lambda logits: reference.sign_bce(logits, teacher, pairs), student)


def bytes_moved(direction, student, teacher):
    """Bytes to be read and written: logits, the teacher's once, the message, the gradient."""
    message = teacher.numel() // 8
    forward = student.nbytes + teacher.nbytes + message
    backward = 2 * student.nbytes + message
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sign_bce(measure, device, shape, dtype, direction, contender):
    student, teacher = logits_of(shape, dtype, device)
    measure(
        lambda logits: CONTENDERS[contender](logits, teacher),
        student,
        truth(shape, dtype),
        direction,
        {"table": "sign_bce", "shape": shape, "dtype": dtype, "contender": contender},
        bytes_moved(direction, student, teacher),
    )


@pytest.mark.parametrize("shape", SCALING, ids=str)
def test_scaling(measure, device, shape):
    student, teacher = logits_of(shape, "fp32", device)
    measure(
        lambda logits: bincomm.sign_bce(logits, teacher),
        student,
        truth(shape, "fp32"),
        "both",
        {"table": "sign_bce, scaling", "shape": shape, "dtype": "fp32", "contender": "bincomm"},
        bytes_moved("both", student, teacher),
    )


@pytest.mark.parametrize("contender", ["bincomm", "binary_cross_entropy_with_logits"])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_entry(measure, device, direction, contender):
    """One logit: the overhead of a call."""
    shape = (1, 1, 1, 1)
    logit, teacher = logits_of(shape, "fp32", device)
    target = (teacher > 0).float()
    functions = {
        "bincomm": lambda logits: bincomm.sign_bce(logits, teacher, pairs="all"),
        "binary_cross_entropy_with_logits": lambda a: F.binary_cross_entropy_with_logits(a, target),
    }
    measure(
        functions[contender],
        logit,
        truth(shape, "fp32", "all"),
        direction,
        {"table": "sign_bce, one logit", "shape": shape, "dtype": "fp32", "contender": contender},
    )
