"""The lock of a run's directory: one job at a time writes in it."""

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bincomm.distributed.ranks import Ranks
from bincomm.files import LOCK, UNFINISHED

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems without


@contextmanager
def open_run(output: str, ranks: Ranks) -> Iterator[Path]:
    """Make a run's directory and hold it for these ranks.

    Raises:
        ValueError: the directory cannot be made or written in, or another process trains in it.
    """
    path = Path(output)
    with ExitStack() as stack:

        def lock_directory() -> None:
            try:
                path.mkdir(parents=True, exist_ok=True)
                # The file is opened for writing, so this finds out about an unwritable directory too.
                lock = stack.enter_context(open(path / LOCK, "a"))
            except OSError as error:
                raise ValueError(f"output: cannot write in {output}: {error.strerror}") from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"output: {output} is in use by another process") from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                logger.warning(
                    "%s cannot be locked (%s): see that nobody else uses it", output, error.strerror
                )
            for folder in (path, path / "checkpoints"):  # of a process that was killed while it wrote
                for unfinished in folder.glob(UNFINISHED):
                    unfinished.unlink()

        ranks.first(lock_directory)
        yield path
