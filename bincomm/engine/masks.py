"""Which patches of the student's global crops are masked, drawn on the device."""

import torch
from torch import Tensor, nn

# Of the patches of one of an image's two global crops: the mean of iBOT, which masks from 10 to 50 % of the
# patches in half of the crops. As many in every image, because shapes are not to change from step to step.
SHARE = 0.3
BLOCKS = 2  # rectangles in a crop
LEAST_ASPECT = 0.3  # of a rectangle; the largest is 1/0.3

# Of SplitMix64 ("Fast splittable pseudorandom number generators", OOPSLA 2014), as signed numbers.
GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


class Masks(nn.Module):
    """Draws the masked patches of one step after another: functions of the seed, the number of the step and
    the image's place in the batch of all ranks, and so the same for any number of ranks.

    Of every image one of the two global crops is masked, either with the same probability, by two rectangles
    of random places and aspects, grown together until they cover SHARE of the patches.

    Everything happens on the device, without a sync. The buffer `step` counts the steps, without those that
    are skipped; it is part of the state of training, and only ever changed in place.

    Args:
        seed: of the run.
        rows, columns: the patches of a crop, at least 2.
        rank: of this process.
    """

    step: Tensor

    def __init__(self, seed: int, rows: int, columns: int, rank: int = 0):
        super().__init__()
        self.seed, self.rows, self.columns, self.rank = seed, rows, columns, rank
        self.count = max(1, round(SHARE * rows * columns))  # M
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, images: int) -> Tensor:
        """The next step's masked places of so many images on this rank: (n, M) int64, in random order, which
        index the 2·h·w patches of an image's global crops, row by row."""
        draws = self._draw(images, 1 + 3 * BLOCKS + self.count)
        self.step += 1
        view, blocks, order = draws.split([1, 3 * BLOCKS, self.count], 1)
        row, column, aspect = (part.unsqueeze(-1) for part in blocks.chunk(3, 1))  # (n, BLOCKS, 1) each
        stretch = LEAST_ASPECT ** (aspect - 0.5)  # height of a rectangle by its side, if it were a square
        place = torch.arange(self.rows * self.columns, device=draws.device)
        below = (place // self.columns + 0.5 - row * self.rows).abs() / stretch
        beside = (place % self.columns + 0.5 - column * self.columns).abs() * stretch
        distances = torch.maximum(below, beside).amin(1)  # of a patch to the nearer rectangle's center
        places = distances.argsort(dim=1, stable=True)[:, : self.count].gather(
            1, order.argsort(dim=1, stable=True)
        )
        return places + (view < 0.5) * (self.rows * self.columns)

    def _draw(self, images: int, count: int) -> Tensor:
        """(n, count) numbers from [0, 1), fp32."""
        first = self.rank * images * count + 1
        numbers = torch.arange(first, first + images * count, device=self.step.device)
        key = mix(mix(self.step + 1) ^ self.seed)
        return ((mix(key + numbers * GOLDEN) >> 40 & (1 << 24) - 1).float() / (1 << 24)).view(images, count)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, a one-to-one map of int64, whose products wrap around."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)
