"""A run's directory: who may write in it, and files that are written whole or not at all."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bincomm.distributed.ranks import Ranks
from bincomm.files import LOCK, UNFINISHED

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems without


@contextmanager
def open_run(output: str, ranks: Ranks) -> Iterator[Path]:
    """Make a run's directory and hold it for these ranks.

    Raises:
        ValueError: the directory cannot be made or written in, or another process trains in it.
    """
    path = Path(output)
    with ExitStack() as held:

        def take() -> None:
            try:
                path.mkdir(parents=True, exist_ok=True)
                # The file is opened for writing, so this finds out about an unwritable directory too.
                lock = held.enter_context(open(path / LOCK, "a"))
            except OSError as error:
                raise ValueError(f"output: cannot write in {output}: {error.strerror}") from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"output: {output} is in use by another process") from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(f"warning: {output} cannot be locked ({error.strerror}): see that nobody else uses it")
            for folder in (path, path / "checkpoints"):  # of a process that was killed while it wrote
                for unfinished in folder.glob(UNFINISHED):
                    unfinished.unlink()

        ranks.first(take)
        yield path
