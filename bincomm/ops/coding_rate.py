"""Coding rate: how many nats a batch of messages can carry, and so how far the code is from collapse."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from bincomm.ops import reference
from bincomm.ops.library import (
    KERNELS,
    LIBRARY,
    define,
    has_cuda_code,
    refuse_tangent,
    uses_reference,
)
from bincomm.ops.messages import check_logits

# The trace of αG is K/ε², and every pivot, even one of 1, has a rounding error proportional to it: less than
# 0.01 in fp32 up to the first limit, in fp64 up to the second.
LARGEST_IN_FP32 = 2**16
LARGEST = 1e12

OPS = torch.ops.bincomm


class CodingRate(NamedTuple):
    """What `coding_rate(..., diagnostics=True)` returns, all on the logits' device.

    A collapse shows here before the rate reaches its minimum: the smallest pivot, of the direction that is
    used least given the others, falls to 1 first.
    """

    rate: Tensor  # (...,) nats
    ceiling: Tensor  # scalar: the rate of as many images and bits if all directions are used equally
    smallest_pivot: Tensor  # (...,) of the factorization of the smaller matrix; 1 means an unused direction
    clamped: Tensor  # (...,) int32: pivots that rounding made smaller than 1, the minimum, and that became 1


@overload
def coding_rate(
    logits: Tensor,
    *,
    eps_squared: float = ...,
    group: "torch.distributed.ProcessGroup | None" = ...,
    diagnostics: Literal[False] = ...,
) -> Tensor: ...


@overload
def coding_rate(
    logits: Tensor,
    *,
    eps_squared: float = ...,
    group: "torch.distributed.ProcessGroup | None" = ...,
    diagnostics: Literal[True],
) -> CodingRate: ...


def coding_rate(
    logits: Tensor,
    *,
    eps_squared: float = 0.05,
    group: "torch.distributed.ProcessGroup | None" = None,
    diagnostics: bool = False,
) -> Tensor | CodingRate:
    """Coding rate of logits with L2-normalized rows: `R = ½ logdet(I + α zᵀz)`, `z = a/‖a‖`, `α = K/(n·ε²)`.

    Uncentered, as in SimDINO (arXiv 2502.10385) and "Self-Supervised Learning as Discrete Communication"
    (arXiv 2602.09764). Its gradient is the closed form `∂R/∂z = α·z·(I + αzᵀz)⁻¹` followed by the row norm's,
    in fp32 for every dtype of the logits, outside autocast and with any precision set for matrix products; of
    the two equal determinants (K×K or n×n) that of the smaller matrix is used. For logits in fp64, and for
    K/ε² > 65536, where fp32 is not precise enough, the definition is computed in fp64. Finite logits give
    neither NaN nor infinity: pivots are clamped to 1, and a gradient too large for fp16 becomes its largest
    number, unless the incoming gradient is larger than 1, as from a GradScaler, which is to see the overflow.

    Args:
        logits: (..., n, K), n rows of K logits; fp32, fp16, bf16 or fp64, any strides. Leading dimensions,
            views for example, are a batch.
        eps_squared: ε², the squared distortion (SimDINO's argument `eps` is this square), > 0.
        group: sum `zᵀz` over the ranks of this process group, which may have different numbers of images: the
            rate is that of all N = Σn images together, and gradients averaged over the ranks, as
            DistributedDataParallel does, are those of one rank with all images. Every rank must call, forward
            and backward. None: this rank's images alone.
        diagnostics: return a `CodingRate`, which shows a coming collapse, at no further pass.

    Returns:
        (...,) in nats, fp32 (fp64 for fp64 logits): from ½·log(1 + K/ε²), all rows parallel, to
        `k/2·log(1 + αn/k)`, k = min(n, K), all directions used equally. NaN logits give NaN.

    Raises:
        TypeError: `logits` is not a tensor of the dtypes above.
        ValueError: its shape, or `eps_squared`, does not fit.
        NotImplementedError: a second or a forward-mode derivative is requested; fp64 logits have both, and
            work with torch.func.
    """
    check_logits("logits", logits)
    if logits.dim() < 2 or logits.shape[-2] == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., n, K) with n, K ≥ 1, got {tuple(logits.shape)}")
    bits = logits.shape[-1]
    if not bits / LARGEST <= eps_squared < math.inf:
        raise ValueError(
            f"eps_squared: expected a number > 0, of at least K/1e12 = {bits / LARGEST:g}, got {eps_squared}"
        )
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group: expected a process group that this rank belongs to, or None, got {group!r}")
    if group is not None and group.size() == 1:
        group = None
    if uses_reference(logits) or bits / eps_squared > LARGEST_IN_FP32:
        return _by_definition(logits, eps_squared, group, diagnostics)
    refuse_tangent("logits", logits)
    batch = logits.shape[:-2]
    flat = logits.unsqueeze(0) if logits.dim() == 2 else logits.flatten(0, -3)
    rate, _, _, images, smallest, clamped = OPS.coding_rate.default(
        flat, eps_squared, group.group_name if group is not None else ""
    )
    if not diagnostics:
        return rate.view(batch)
    images = images.squeeze() if group is not None else rate.new_full((), logits.shape[-2])
    return CodingRate(
        rate.view(batch), rate_ceiling(images, bits, eps_squared), smallest.view(batch), clamped.view(batch)
    )


def rate_ceiling(images: Tensor, bits: int, eps_squared: float) -> Tensor:
    """Largest coding rate of that many unit rows, in nats: `k/2·log(1 + αn/k)` with k = min(n, K)."""
    k = images.clamp(max=bits)
    return k / 2 * torch.log1p(bits / eps_squared / k)


def rate_bounds(images: int, bits: int, eps_squared: float) -> tuple[float, float]:
    """The coding rate of equal unit rows, `½·log(1 + K/ε²)`, and the largest of that many, in nats."""
    k = min(images, bits)
    return math.log1p(bits / eps_squared) / 2, k / 2 * math.log1p(bits / eps_squared / k)


class Widen(torch.autograd.Function):
    """To fp64; a gradient too large for the original dtype becomes the largest number of that dtype."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return x.double()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        largest = torch.finfo(ctx.dtype).max
        return grad.clamp(-largest, largest).to(ctx.dtype)


def _by_definition(
    logits: Tensor, eps_squared: float, group: "torch.distributed.ProcessGroup | None", diagnostics: bool
) -> Tensor | CodingRate:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wide = Widen.apply(logits) if logits.shape[-1] / eps_squared > LARGEST_IN_FP32 else logits
    matrix, images = reference.regularized_gram(wide, eps_squared, group)
    rate = reference.half_logdet(matrix).to(dtype)
    if not diagnostics:
        return rate
    of_images = group is None and logits.shape[-2] < logits.shape[-1]
    smaller, _ = reference.regularized_gram(wide.detach(), eps_squared, group, of_images)
    pivots = torch.linalg.cholesky_ex(smaller)[0].diagonal(dim1=-2, dim2=-1) ** 2
    return CodingRate(
        rate,
        rate_ceiling(images.to(dtype), logits.shape[-1], eps_squared),
        pivots.amin(-1).to(dtype),
        (pivots < 1).sum(-1, dtype=torch.int32),
    )


def _forward(
    factor_gram: Callable, logits: Tensor, eps_squared: float, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, bits = logits.shape[-2:]
    if not group:
        gram, reciprocal = OPS.coding_rate_gram.default(logits, bits / (n * eps_squared), n < bits)
        images = logits.new_empty(0, dtype=torch.float32)
    else:
        # Other ranks' rows are not here, which leaves only zᵀz, even if it is the larger matrix.
        gram, reciprocal = OPS.coding_rate_gram.default(logits, 1.0, False)
        sums = torch.cat([gram.flatten(), gram.new_full((1,), n)])
        sums = reference.SumOverRanks.apply(sums, group)
        images = sums[-1:].clone()
        gram = sums[:-1].view_as(gram) * (bits / eps_squared / images)
    rate, factor, smallest, clamped = factor_gram(gram)
    return rate, factor, reciprocal, images, smallest, clamped


def _fake(
    logits: Tensor, eps_squared: float, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    views, n, bits = logits.shape
    side = bits if group else torch.sym_min(n, bits)
    new = functools.partial(logits.new_empty, dtype=torch.float32)
    clamped = logits.new_empty((views,), dtype=torch.int32)
    return (
        new((views,)),
        new((views, side, side)),
        new((views, n)),
        new((int(bool(group)),)),
        new((views,)),
        clamped,
    )


def _setup_context(ctx, inputs, output) -> None:
    logits, ctx.eps_squared, ctx.group = inputs
    _, factor, reciprocal, images, smallest, clamped = output
    ctx.save_for_backward(logits, factor, reciprocal, images)
    ctx.mark_non_differentiable(factor, reciprocal, images, smallest, clamped)
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def _backward(ctx, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    logits, factor, reciprocal, images = ctx.saved_tensors
    gradient = rate_gradient(grad, logits, factor, reciprocal, images, ctx.eps_squared, ctx.group)
    return gradient, None, None


def rate_gradient(
    grad: Tensor,
    logits: Tensor,
    factor: Tensor,
    reciprocal: Tensor,
    images: Tensor,
    eps_squared: float,
    group: str,
) -> Tensor:
    """Gradient of the logits, from that of the rates and what the operation has returned."""
    grad, alpha, of_images = _scales(grad, logits, images, eps_squared, group)
    return OPS.coding_rate_backward.default(grad, logits, factor, reciprocal, alpha, of_images)


def add_rate_gradient(
    gradient: Tensor,
    grad: Tensor,
    factor_of_grad: Tensor,
    weight: float,
    logits: Tensor,
    factor: Tensor,
    reciprocal: Tensor,
    images: Tensor,
    eps_squared: float,
    group: str,
) -> None:
    """`gradient += rate_gradient(grad * factor_of_grad * weight, ...)`, with a scalar tensor as factor."""
    grad, alpha, of_images = _scales(grad, logits, images, eps_squared, group)
    OPS.coding_rate_add_gradient_.default(
        gradient, grad, factor_of_grad, weight, logits, factor, reciprocal, alpha, of_images
    )


def _scales(
    grad: Tensor, logits: Tensor, images: Tensor, eps_squared: float, group: str
) -> tuple[Tensor, float, bool]:
    n, bits = logits.shape[-2:]
    if group:
        # Every rank's loss depends on this rank's logits.
        return reference.SumOverRanks.apply(grad, group) * (bits / eps_squared / images), 1.0, False
    return grad, bits / (n * eps_squared), n < bits


def _refuse_second_derivative(ctx, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "logits: coding_rate has no second derivative; use its definition, by BINCOMM_BACKEND=reference or "
        "logits in fp64"
    )


# ---- The PyTorch implementations: for missing kernels, and, where "BLAS" is named below, the callers of BLAS


def _product(x: Tensor, y: Tensor) -> Tensor:
    """`x y` in full fp32, independent of autocast and of the precision set for matrix products."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]  # set at import
    reduced = x.device.type != "cpu" or precision in ("bf16", "tf32")
    if reduced:
        with torch.autocast(x.device.type, enabled=False):
            return torch.bmm(x.double(), y.double()).float()
    # Autocast does not change calls with out=.
    return torch.bmm(x, y, out=x.new_empty((x.shape[0], x.shape[1], y.shape[2])))


def _rows_pytorch(logits: Tensor) -> tuple[Tensor, Tensor]:
    a = logits.to(torch.float32)
    # In double precision no square of a float overflows or vanishes.
    norms = torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64).clamp_min(reference.NORM_EPS)
    reciprocal = (1 / norms).to(torch.float32)
    return (a * reciprocal.unsqueeze(-1)).contiguous(), reciprocal.contiguous()


def _gram_pytorch(logits: Tensor, alpha: float, of_images: bool) -> tuple[Tensor, Tensor]:
    z, reciprocal = OPS.coding_rate_rows.default(logits)
    gram = _product(z, z.mT) if of_images else _product(z.mT, z)
    return gram.mul_(alpha), reciprocal


def _factor_pytorch(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrix = gram.double()
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    # Every pivot of I + (positive semi-definite) is at least 1: smaller ones are rounding errors.
    rate = pivots.clamp_min(1).log().sum(-1) / 2
    clamped = (pivots < 1).sum(-1, dtype=torch.int32)
    return rate.float(), factor.float().contiguous(), pivots.amin(-1).float(), clamped


def _inverse_pytorch(factor: Tensor) -> Tensor:
    # Not by cholesky_inverse: it reads back whether the factor is singular, so it would wait for a GPU.
    lower = factor.double()
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return torch.bmm(inverse.mT, inverse).float()


def _gradient_pytorch(grad: Tensor, g: Tensor, logits: Tensor, reciprocal: Tensor, alpha: float) -> Tensor:
    z = logits.to(torch.float32) * reciprocal.unsqueeze(-1)
    # Through z = a/‖a‖ a gradient g becomes (g - (g·z)z)/‖a‖; a norm clamped to NORM_EPS is a constant.
    along = (g * z).sum(-1).masked_fill_(reciprocal >= 1 / reference.NORM_EPS, 0)
    scale = (grad[:, None] * alpha * reciprocal).unsqueeze(-1)
    # Numbers beyond the dtype's range become its largest number. But if the incoming gradient is large, as
    # that of a scaled loss, they become infinite, which shows that the scale is too large.
    limit = torch.full_like(grad, torch.finfo(logits.dtype).max)
    limit = limit.masked_fill_(~(grad.abs() <= 1), torch.inf)[:, None, None]
    return ((g - along.unsqueeze(-1) * z) * scale).clamp(-limit, limit).to(logits.dtype).contiguous()


def _backward_pytorch(
    grad: Tensor, logits: Tensor, factor: Tensor, reciprocal: Tensor, alpha: float, of_images: bool
) -> Tensor:
    inverse = OPS.coding_rate_inverse.default(factor)
    z, _ = OPS.coding_rate_rows.default(logits)
    g = _product(inverse, z) if of_images else _product(z, inverse)
    return OPS.coding_rate_gradient.default(grad, g, logits, reciprocal, alpha)


def _add_gradient_pytorch(
    gradient: Tensor,
    grad: Tensor,
    factor_of_grad: Tensor,
    weight: float,
    logits: Tensor,
    factor: Tensor,
    reciprocal: Tensor,
    alpha: float,
    of_images: bool,
) -> None:
    grad = grad * (factor_of_grad * weight)
    gradient += OPS.coding_rate_backward.default(grad, logits, factor, reciprocal, alpha, of_images)


# `factor` (V, m, m) has the CPU kernel's own layout, or is Cholesky's; for CUDA's kernels it is the inverse.
define("coding_rate_rows(Tensor logits) -> (Tensor, Tensor)", cpu="C++", cuda=None, pytorch=_rows_pytorch)
define(
    "coding_rate_gram(Tensor logits, float alpha, bool of_images) -> (Tensor, Tensor)",
    cpu="C++",
    cuda="CUDA",
    pytorch=_gram_pytorch,
)
define(
    "coding_rate_factor(Tensor gram) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu="C++",
    cuda=None,
    pytorch=_factor_pytorch,
)
define("coding_rate_inverse(Tensor factor) -> Tensor", cpu="C++", cuda=None, pytorch=_inverse_pytorch)
define(
    "coding_rate_gradient(Tensor grad, Tensor g, Tensor logits, Tensor reciprocal, float alpha) -> Tensor",
    cpu="C++",
    cuda=None,
    pytorch=_gradient_pytorch,
)
define(
    "coding_rate_backward(Tensor grad, Tensor logits, Tensor factor, Tensor reciprocal, float alpha,"
    " bool of_images) -> Tensor",
    cpu="C++, BLAS",
    cuda="CUDA",
    pytorch=_backward_pytorch,
    fake=lambda grad, logits, factor, reciprocal, alpha, of_images: logits.new_empty(logits.shape),
)
define(
    "coding_rate_add_gradient_(Tensor(a!) gradient, Tensor grad, Tensor factor_of_grad, float weight,"
    " Tensor logits, Tensor factor, Tensor reciprocal, float alpha, bool of_images) -> ()",
    cpu="C++, BLAS",
    cuda="CUDA",
    pytorch=_add_gradient_pytorch,
)
define(
    "coding_rate(Tensor logits, float eps_squared, str group)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu="C++, BLAS",
    pytorch=functools.partial(_forward, OPS.coding_rate_factor.default),
    fake=_fake,
)
if has_cuda_code():
    LIBRARY.define("coding_rate_sweep(Tensor gram) -> (Tensor, Tensor, Tensor, Tensor)")
    LIBRARY.impl("coding_rate", functools.partial(_forward, OPS.coding_rate_sweep.default), "CUDA")
    KERNELS["coding_rate"]["cuda"] = "CUDA"
torch.library.register_autograd("bincomm::coding_rate", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("bincomm::coding_rate_backward", _refuse_second_derivative, lib=LIBRARY)
