"""coding_rate beside a Cholesky factorisation differentiated by autograd."""

import pytest
import torch
import torch.nn.functional as F

import bincomm
from benchmarks.measuring import value_and_gradient
from bincomm.ops import reference


def cholesky_of_every_view(logits):
    n, bits = logits.shape[-2:]
    total = 0
    for view in logits:
        z = F.normalize(view, dim=-1)
        gram = torch.eye(bits, device=z.device) + bits / (n * 0.05) * (z.T @ z)
        factor, _ = torch.linalg.cholesky_ex(gram)
        total = total + factor.diagonal().log().sum()
    return total


CONTENDERS = {
    "bincomm": lambda logits: bincomm.coding_rate(logits).sum(),
    "cholesky_ex through autograd": cholesky_of_every_view,
    "logdet through autograd": lambda logits: reference.coding_rate(logits).sum(),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", [(2, 128, 256), (2, 256, 256), (2, 128, 1024)], ids=str)
def test_coding_rate(measure, device, shape, contender):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    measure(
        CONTENDERS[contender],
        logits,
        value_and_gradient(lambda x: reference.coding_rate(x).sum(), logits.double()),
        "both",
        {"table": "coding_rate", "shape": shape, "dtype": "fp32", "contender": contender},
    )
