"""Gradient clipping, one tensor at a time."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from bincomm.ops.library import BACKEND, define


@torch.no_grad()
def clip_gradients_(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """Scale down, in place, every gradient whose Euclidean norm is above the limit: `g ← g·limit/‖g‖`.

    A gradient within the limit is left bit for bit as it was. Nothing is read on the host.

    Args:
        gradients: tensors of one device, fp32; others, and DTensors, take PyTorch's multi-tensor operations
            on a CPU too. Of DTensors the norm of the full tensor counts, and all ranks call.
        limit: largest norm of a tensor; 0 leaves all of them as they are.

    Returns:
        The norm of all gradients together before they were clipped, a scalar on their device. Where a
        gradient is not finite it is not finite either, and what becomes of that gradient is left open.
    """
    gradients = list(gradients)
    if not gradients:
        return torch.zeros(())
    if BACKEND != "reference" and all(type(g) is Tensor and g.dtype == torch.float32 for g in gradients):
        return torch.ops.bincomm.clip_gradients_(gradients, limit)
    return _pytorch_form(gradients, limit)


def _pytorch_form(gradients: list[Tensor], limit: float) -> Tensor:
    norms = _of_full_tensors(torch._foreach_norm(gradients))
    if limit > 0:
        # A norm within the limit gives exactly 1, so such a gradient is left bit for bit as it was.
        factors = torch._foreach_div(
            torch._foreach_clamp_max(norms, limit), torch._foreach_clamp_min(norms, 1e-12)
        )
        torch._foreach_mul_([g.to_local() if is_sharded(g) else g for g in gradients], factors)
    return torch.linalg.vector_norm(torch.stack(norms))


def _of_full_tensors(norms: Sequence[Tensor]) -> list[Tensor]:
    """The norms as plain tensors: those of DTensors joined over the ranks, all that lie alike at once."""
    joined, alike = list(norms), defaultdict(list)
    for place, norm in enumerate(norms):
        if is_sharded(norm):
            alike[norm.device_mesh, norm.placements].append(place)
    for (mesh, placements), places in alike.items():
        ours = torch.stack([norms[place].to_local() for place in places])
        full = type(norms[places[0]]).from_local(ours, mesh, placements, run_check=False).full_tensor()
        for place, norm in zip(places, full, strict=True):
            joined[place] = norm
    return joined


def is_sharded(x: Tensor) -> bool:
    """Whether this is a DTensor, whose module takes long to import."""
    return hasattr(x, "to_local")


define(
    "clip_gradients_(Tensor(a!)[] gradients, float limit) -> Tensor",
    cpu="C++",
    cuda="foreach",
    pytorch_form=_pytorch_form,
    fake=lambda gradients, limit: gradients[0].new_empty(()),
)
