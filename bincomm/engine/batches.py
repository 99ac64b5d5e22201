"""The batches of a run: how long the loop waited for them, and the last ones, should they be looked into."""

import time
from collections import deque
from typing import NamedTuple

from torch import Tensor

from bincomm.data.loader import Loader, TooManyUnusableError
from bincomm.engine.stored_messages import StoredMessages
from bincomm.engine.unusable import UnusableImages


class Views(NamedTuple):
    """What a step is given: a batch of crops, and the messages of the global ones where they are stored."""

    global_views: Tensor  # (n, 2, 3, S, S)
    local_views: Tensor | None = None  # (n, L, 3, s, s)
    messages: Tensor | None = None  # (2, n, ⌈K/32⌉) int32


def load_views(loader: Loader, stored: StoredMessages | None) -> Views:
    """The next batch of a loader, and the messages that are stored of its crops. Measurements, which may go
    on beyond the last of these, begin again there."""
    if stored is not None and loader.step == stored.steps:
        loader.seek(0)
    crops = loader.next()
    return Views(*crops, None if stored is None else stored.of(loader.step - 1, loader.indices))


class Batches:
    """Hands out a loader's batches one by one.

    Args:
        loader: of this rank.
        unusable: names the images that are left out.
        keep: how many of the newest batches `recent` holds.
        stored: the messages of the batches, if they were encoded before the run.
    """

    def __init__(
        self, loader: Loader, unusable: UnusableImages, keep: int, stored: StoredMessages | None = None
    ):
        self.loader, self.unusable, self.stored = loader, unusable, stored
        self.waited = 0.0  # seconds, for the last batch
        self.recent: deque[tuple[Views, list[int]]] = deque(maxlen=keep)
        self._peeked: Views | None = None

    def next(self, peek: bool = False) -> Views:
        """The next batch; after a `peek` the following call returns it again.

        Raises:
            TooManyUnusableError: too many images cannot be used; they are listed then.
            ValueError: the stored messages are of other images, or cannot be read.
        """
        start = time.perf_counter()
        views = self._peeked or self._load()
        self.waited = time.perf_counter() - start
        self._peeked = views if peek else None
        if not peek:
            self.recent.append((views, self.loader.indices))
        return views

    def _load(self) -> Views:
        try:
            views = load_views(self.loader, self.stored)
        except TooManyUnusableError:
            self.unusable.write_all()
            raise
        self.unusable.update()
        return views
