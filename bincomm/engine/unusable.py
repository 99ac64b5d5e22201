"""Images that cannot be used: named once, and listed in the run's unusable.txt."""

import contextlib
import logging
from pathlib import Path

from bincomm.data.export import write_unusable
from bincomm.data.loader import Loader
from bincomm.distributed.ranks import Ranks
from bincomm.logs import printable_name

logger = logging.getLogger(__name__)


class UnusableImages:
    """Names the images that a loader leaves out when it meets them.

    Args:
        loader: of this rank.
        run: the run's directory, in which rank 0 keeps the list of all that it knows: those of all ranks as
            of the checkpoint that was resumed, and its own since.
    """

    def __init__(self, loader: Loader, run: Path, ranks: Ranks):
        self.loader, self.path, self.ranks = loader, run / "unusable.txt", ranks
        self.named = 0

    def resume(self) -> None:
        """Do not name again the images that the loader knows from a checkpoint."""
        self.named = len(self.loader.unusable)

    def update(self) -> None:
        """Name those of the last batch."""
        unusable = self.loader.unusable
        for count, (name, reason) in enumerate(unusable[self.named :], self.named + 1):
            told = f"{printable_name(name)}: {printable_name(reason)}"
            text = f"left out: {told} ({count} of {len(self.loader.images)} images so far)"
            logger.info("%s", text, extra={"every_rank": True})
        if len(unusable) > self.named and self.ranks.rank == 0:
            try:
                write_unusable(self.path, unusable)
            except OSError as error:
                logger.warning("%s", error)
        self.named = len(unusable)

    def write_all(self) -> None:
        """List all that have been met, also in batches that are being made, because there are too many."""
        with contextlib.suppress(OSError):  # the error that is to be reported is the other one
            write_unusable(self.path, self.loader.all_unusable())
