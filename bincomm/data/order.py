"""Which image comes when, and with which random numbers: functions of the seed and of positions alone."""

from collections.abc import Sequence

import numpy as np

SUBSTITUTES = 100  # images tried in the slot of an unusable one, of its source and then of all


class Order:
    """Epochs of N slots over the images of one or several sources.

    Without weights every image has one slot an epoch, which (seed, epoch) determine. With weights
    a source of n images gets its share of the N = Σn slots; it goes through all its images in random order,
    then through all in another, on from where the last epoch stopped.

    Args:
        sizes: images of each source.
        weights: share of an epoch from each source; None: each image once.
        seed: determines everything.

    Raises:
        ValueError: a weight so small that its source has no slot.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes = list(sizes)
        self.slots = sum(sizes)
        self.seed = seed
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        shares = np.array(sizes if weights is None else weights, np.float64)
        shares /= shares.max()
        # Rounded so that the counts sum to N: what rounding down leaves goes to the largest remainders.
        exact = self.slots * shares / shares.sum()
        counts = np.floor(exact + 1e-9).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: self.slots - counts.sum()]] += 1
        self.counts = counts.tolist()
        if weights is not None and 0 in self.counts:
            raise ValueError(
                f"data: the weights {list(weights)} leave a source without one of the {self.slots} images of "
                "an epoch; expected larger shares"
            )
        self._epoch: tuple[int, np.ndarray] | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """The image in each of the N slots of an epoch, int64."""
        if self._epoch is None or self._epoch[0] != epoch:
            parts = [self._part(part, epoch * count, count) for part, count in enumerate(self.counts)]
            images = np.concatenate(parts)
            np.random.default_rng([self.seed, 0, epoch]).shuffle(images)
            self._epoch = epoch, images
        return self._epoch[1]

    def substitutes(self, image: int, epoch: int, slot: int) -> np.ndarray:
        """Images to try, in order, in the slot of an unusable one: of its source, then of all."""
        part = int(np.searchsorted(self.starts, image, side="right")) - 1
        generator = np.random.default_rng([self.seed, 2, epoch, slot])
        near = self.starts[part] + generator.integers(self.sizes[part], size=SUBSTITUTES)
        return np.concatenate([near, generator.integers(self.slots, size=SUBSTITUTES)])

    def uniforms(self, epoch: int, slots: np.ndarray, count: int) -> np.ndarray:
        """`count` random numbers from [0, 1) for each of these slots of an epoch: (slots, count) fp32."""
        numbers = np.empty((len(slots), count), np.float32)
        for row, slot in zip(numbers, slots.tolist(), strict=True):
            # A counter-based generator: every slot has a stream of its own, whatever batch it falls into.
            bits = np.random.Philox(key=[self.seed, 1], counter=[0, slot, epoch, 0])
            np.random.Generator(bits).random(dtype=np.float32, out=row)
        return numbers

    def _part(self, part: int, first: int, count: int) -> np.ndarray:
        """`count` images of a source, from position `first` of its endless sequence of shuffled passes on."""
        size, chunks = self.sizes[part], []
        while count:
            number, inside = divmod(first, size)
            length = min(count, size - inside)
            shuffled = np.random.default_rng([self.seed, 3, part, number]).permutation(size)
            chunks.append(self.starts[part] + shuffled[inside : inside + length])
            first, count = first + length, count - length
        return np.concatenate(chunks) if chunks else np.empty(0, np.int64)
