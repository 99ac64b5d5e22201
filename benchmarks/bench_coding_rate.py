"""coding_rate beside the usual ways to write it, differentiated by autograd."""

import functools

import pytest
import torch
import torch.nn.functional as F

import bincomm
from benchmarks.measuring import value_and_gradient
from bincomm.ops import reference

SHAPES = [
    *((2, n, bits) for n, bits in [(64, 64), (128, 256), (256, 256), (2048, 256), (512, 512)]),
    *((2, n, 1024) for n in (64, 128, 1024, 2048)),
    *(
        (12, n, bits)
        for n, bits in [(64, 64), (256, 256), (2048, 256), (512, 512), (256, 1024), (1024, 1024)]
    ),
]


def regularized_gram(logits, smaller_side=False):
    n, bits = logits.shape[-2:]
    z = F.normalize(logits, dim=-1)
    gram = z @ z.mT if smaller_side and n < bits else z.mT @ z
    return torch.eye(gram.shape[-1], device=z.device) + bits / (n * 0.05) * gram


def loop_over_views(logits):
    return sum(reference.half_logdet(regularized_gram(view)) for view in logits)


def batched(logits, smaller_side=False):
    return reference.half_logdet(regularized_gram(logits, smaller_side)).sum()


CONTENDERS = {
    "bincomm": lambda logits: bincomm.coding_rate(logits).sum(),
    "cholesky_ex, loop over views": loop_over_views,
    "cholesky_ex, batched": batched,
    "cholesky_ex, batched, torch.compile": torch.compile(batched, dynamic=False),
    "cholesky_ex, batched, smaller side": lambda logits: batched(logits, smaller_side=True),
    "logdet": lambda logits: torch.logdet(regularized_gram(logits)).sum() / 2,
    "slogdet": lambda logits: torch.linalg.slogdet(regularized_gram(logits))[1].sum() / 2,
}


def logits_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@functools.cache
def truth(shape):
    """Value and gradient in fp64."""
    torch.compiler.reset()  # for each shape: the number of compiled variants is limited
    return value_and_gradient(lambda a: reference.coding_rate(a).sum(), logits_of(shape).double())


def bytes_moved(direction, logits):
    """Bytes to be read and written: logits, the inverse or factor, the gradient."""
    views, n, bits = logits.shape
    inverse = 4 * views * min(n, bits) ** 2
    forward, backward = logits.nbytes + inverse, 2 * logits.nbytes + inverse
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coding_rate(measure, device, shape, direction, contender):
    logits = logits_of(shape).to(device)
    measure(
        CONTENDERS[contender],
        logits,
        truth(shape),
        direction,
        {"table": "coding_rate", "shape": shape, "dtype": "fp32", "contender": contender},
        bytes_moved(direction, logits),
    )
