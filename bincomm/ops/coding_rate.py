"""Coding rate: how many nats a batch of messages can carry, so how far from collapse the code is."""

import torch
from torch import Tensor

from bincomm.ops import reference
from bincomm.ops.library import LIBRARY, define, refuse_tangent, takes_reference
from bincomm.ops.messages import check_logits


def coding_rate(logits: Tensor, *, eps_squared: float = 0.05) -> Tensor:
    """Coding rate of logits with L2-normalised rows: `R = ½ logdet(I + α zᵀz)`, `z = a/‖a‖`, `α = K/(n·ε²)`.

    Uncentred, as in SimDINO (arXiv 2502.10385) and "Self-Supervised Learning as Discrete Communication"
    (arXiv 2602.09764). Its gradient is the closed form `∂R/∂z = α·z·(I + αzᵀz)⁻¹` followed by the row norm's,
    in fp32 whatever the dtype of the logits and outside autocast; of the two equal determinants (K×K or n×n)
    the smaller is factored.

    Args:
        logits: (..., n, K), n rows of K logits; fp32, fp16, bf16 or fp64, any strides. Leading dimensions,
            views for example, are a batch.
        eps_squared: ε², the squared distortion (SimDINO's argument `eps` is this square), > 0.

    Returns:
        (...,) in nats, fp32 (fp64 for fp64 logits): from ½·log(1 + K/ε²), all rows parallel, to
        `k/2·log(1 + αn/k)`, k = min(n, K), all directions used alike.

    Raises:
        TypeError: `logits` is no tensor of the dtypes above.
        ValueError: its shape or `eps_squared` does not fit.
    """
    check_logits("logits", logits)
    if logits.dim() < 2 or logits.shape[-2] == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., n, K) with n, K ≥ 1, got {tuple(logits.shape)}")
    if not eps_squared > 0:
        raise ValueError(f"eps_squared: expected a number > 0, got {eps_squared}")
    if takes_reference(logits):
        return reference.coding_rate(logits, eps_squared)
    refuse_tangent("logits", logits)
    return torch.ops.bincomm.coding_rate(logits, eps_squared)[0]


def _normalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    a = logits.to(torch.float32)
    norms = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    return a, norms.clamp_min_(reference.NORM_EPS)


def _pytorch_form(logits: Tensor, eps_squared: float) -> tuple[Tensor, Tensor, Tensor]:
    n, bits = logits.shape[-2:]
    alpha = bits / (n * eps_squared)
    with torch.autocast(logits.device.type, enabled=False):
        a, norms = _normalised(logits)
        z = a / norms
        # det(I + αzᵀz) = det(I + αzzᵀ), and the inverse of either gives the gradient: take the smaller.
        gram = z @ z.mT if n < bits else z.mT @ z
        gram.mul_(alpha).diagonal(dim1=-2, dim2=-1).add_(1)
        factor, _ = torch.linalg.cholesky_ex(gram)
        # Every pivot of I + (positive semi-definite) is at least 1: what is below 1 is rounding.
        rate = factor.diagonal(dim1=-2, dim2=-1).clamp_min(1).log().sum(-1)
        # LAPACK returns the symmetric inverse column by column: its transpose is the contiguous one.
        return rate, torch.cholesky_inverse(factor).mT.contiguous(), norms.squeeze(-1)


def _pytorch_form_backward(
    grad: Tensor, logits: Tensor, inverse: Tensor, norms: Tensor, eps_squared: float
) -> Tensor:
    n, bits = logits.shape[-2:]
    alpha = bits / (n * eps_squared)
    with torch.autocast(logits.device.type, enabled=False):
        norms = norms.unsqueeze(-1)
        z = logits.to(torch.float32) / norms
        g = inverse @ z if n < bits else z @ inverse
        # Through z = a/‖a‖ a gradient g becomes (g - (g·z)z)/‖a‖; a norm held at its floor is a constant.
        radial = torch.linalg.vecdot(g, z).unsqueeze(-1)
        radial.masked_fill_(norms <= reference.NORM_EPS, 0)
        scale = grad[..., None, None] * alpha / norms
        return g.addcmul_(radial, z, value=-1).mul_(scale).to(logits.dtype)


def _fake(logits: Tensor, eps_squared: float) -> tuple[Tensor, Tensor, Tensor]:
    *batch, n, bits = logits.shape
    side = torch.sym_min(n, bits)
    new = lambda *shape: logits.new_empty(shape, dtype=torch.float32)  # noqa: E731
    return new(*batch), new(*batch, side, side), new(*batch, n)


def _setup_context(ctx, inputs, output) -> None:
    logits, ctx.eps_squared = inputs
    _, inverse, norms = output
    ctx.save_for_backward(logits, inverse, norms)
    ctx.mark_non_differentiable(inverse, norms)


def _backward(ctx, grad_rate: Tensor, *_: Tensor | None) -> tuple[Tensor, None]:
    logits, inverse, norms = ctx.saved_tensors
    return torch.ops.bincomm.coding_rate_backward(grad_rate, logits, inverse, norms, ctx.eps_squared), None


# Results: the rates, and what backward needs: the inverse of I + αzᵀz or I + αzzᵀ, and the row norms.
define(
    "coding_rate(Tensor logits, float eps_squared) -> (Tensor, Tensor, Tensor)",
    cpu="LAPACK",
    pytorch_form=_pytorch_form,
    fake=_fake,
)
define(
    "coding_rate_backward(Tensor grad, Tensor logits, Tensor inverse, Tensor norms, float eps_squared)"
    " -> Tensor",
    cpu="LAPACK",
    pytorch_form=_pytorch_form_backward,
    fake=lambda grad, logits, inverse, norms, eps_squared: torch.empty_like(logits),
)
torch.library.register_autograd("bincomm::coding_rate", _backward, setup_context=_setup_context, lib=LIBRARY)
