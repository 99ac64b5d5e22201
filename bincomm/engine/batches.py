"""The batches of a run: how long the loop waited for them, and the last ones, should they be looked into."""

import time
from collections import deque

from torch import Tensor

from bincomm.data.loader import Loader, TooManyUnusableError
from bincomm.engine.unusable import UnusableImages

Views = tuple[Tensor, Tensor | None]  # (n, 2, 3, S, S) and (n, L, 3, s, s)


class Batches:
    """Hands out a loader's batches one by one.

    Args:
        loader: of this rank.
        unusable: names the images that are left out.
        keep: how many of the newest batches `recent` holds.
    """

    def __init__(self, loader: Loader, unusable: UnusableImages, keep: int):
        self.loader, self.unusable = loader, unusable
        self.waited = 0.0  # seconds, for the last batch
        self.recent: deque[tuple[Views, list[int]]] = deque(maxlen=keep)
        self._peeked: Views | None = None

    def next(self, peek: bool = False) -> Views:
        """The next batch; after a `peek` the following call returns it again.

        Raises:
            TooManyUnusableError: too many images cannot be used; they are listed then.
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
            views = self.loader.next()
        except TooManyUnusableError:
            self.unusable.write_all()
            raise
        self.unusable.update()
        return views
