"""Gradient clipping, one tensor at a time."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from bincomm.ops.library import BACKEND, define

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_gradients_(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """Scale down, in place, every gradient whose Euclidean norm is above the limit: `g ← g·limit/‖g‖`.

    A gradient within the limit is left bit for bit as it was. Nothing is read on the host.

    Args:
        gradients: tensors of one device, fp32; for other dtypes, and DTensors, PyTorch's multi-tensor
            operations are used, which scale each by a launch of its own. The norm of a DTensor is that of
            the full tensor; all ranks must call.
        limit: largest norm of a tensor; 0 leaves all of them as they are.

    Returns:
        The norm of all gradients together before they were clipped, a scalar on their device. If a gradient
        is not finite, the norm is not finite either, and the new value of that gradient is undefined.
    """
    gradients = list(gradients)
    if not gradients:
        return torch.zeros(())
    if BACKEND != "reference" and all(type(g) is Tensor and g.dtype == torch.float32 for g in gradients):
        return torch.ops.bincomm.clip_gradients_(gradients, limit)
    return clip_gradients_pytorch_(gradients, limit)


def clip_gradients_pytorch_(gradients: list[Tensor], limit: float) -> Tensor:
    """The same in PyTorch's multi-tensor operations, for tensors of any dtype and DTensors."""
    norms = _norms_of_full_tensors(torch._foreach_norm(gradients))
    if limit > 0:
        # A norm within the limit, 0 too, gives exactly 1: such a gradient is left bit for bit as it was.
        divisors = torch._foreach_clamp_min(norms, limit)
        factors = torch._foreach_div(torch._foreach_clamp_max(divisors, limit), divisors)
        torch._foreach_mul_([g.to_local() if is_sharded(g) else g for g in gradients], list(factors))
    return torch.linalg.vector_norm(torch.stack(norms))


def _norms_of_full_tensors(norms: Sequence[Tensor]) -> list[Tensor]:
    """The norms as plain tensors: those of DTensors combined over the ranks, once for each placement."""
    combined, groups = list(norms), defaultdict[tuple, list[tuple[int, "DTensor"]]](list)
    for index, norm in enumerate(norms):
        if is_sharded(norm):
            groups[norm.device_mesh, norm.placements].append((index, norm))
    for (mesh, placements), sharded in groups.items():
        local = torch.stack([norm.to_local() for _, norm in sharded])
        full = type(sharded[0][1]).from_local(local, mesh, placements, run_check=False).full_tensor()
        for (index, _), norm in zip(sharded, full, strict=True):
            combined[index] = norm
    return combined


def is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether this is a DTensor; without importing its module, which takes long."""
    return hasattr(x, "to_local")


define(
    "clip_gradients_(Tensor(a!)[] gradients, float limit) -> Tensor",
    cpu="C++",
    cuda="CUDA",
    pytorch=clip_gradients_pytorch_,
    fake=lambda gradients, limit: gradients[0].new_empty(()),
)
