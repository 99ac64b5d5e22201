"""Buffers that are kept and restored together."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Buffers:
    """What a step changes beside the parameters: statistics of batch norm, the objective's state.

    A convolutional network has hundreds of them, of a few numbers each. They are copied all at once, because
    otherwise every step would be that many launches longer.
    """

    def __init__(self, buffers: Iterable[Tensor]):
        groups = defaultdict(list)
        for buffer in buffers:
            groups[buffer.dtype].append(buffer)
        self.groups: list[list[Tensor]] = list(groups.values())

    def copy(self) -> list[Tensor]:
        """Their values as they are now: one tensor for each dtype."""
        return [torch.cat([buffer.flatten() for buffer in group]) for group in self.groups]

    @torch.no_grad()
    def restore(self, before: list[Tensor], where: Tensor | None = None) -> None:
        """Give them the values that `copy` returned; with `where`, 0 or 1 on the device, only if it is 1."""
        chosen = None if where is None else where > 0
        for group, values in zip(self.groups, before, strict=True):
            if chosen is not None:
                values = torch.where(chosen, values, torch.cat([buffer.flatten() for buffer in group]))
            parts = values.split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [x.view(b.shape) for x, b in zip(parts, group, strict=True)])
