"""The lock of a run's directory: one job at a time writes in it."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bincomm.distributed.ranks import Ranks
from bincomm.engine.guard import TrainingError
from bincomm.files import LOCK, UNFINISHED, lock

logger = logging.getLogger(__name__)


def owner() -> str:
    """What the lock of this process holds."""
    return f"{socket.gethostname()} {os.getpid()}\n"


def is_held(run: Path) -> bool:
    """Whether a directory that this process opened is still there; a lock that was removed is made again.

    Raises:
        TrainingError: it was removed, and another process has begun in it.
    """
    try:
        there = (run / LOCK).read_text()
    except FileNotFoundError:
        run.mkdir(parents=True, exist_ok=True)
        (run / LOCK).write_text(owner())
        return False
    if there not in ("", owner()):
        raise TrainingError(
            f"{run} was removed while this process wrote in it, and process {there.strip()} has "
            "begun another run there; this one ends"
        )
    return True


@contextmanager
def open_run(output: str, ranks: Ranks) -> Iterator[Path]:
    """Make a run's directory and hold it for these ranks. It goes again if a ValueError, such as of a wrong
    argument, ends the run before anything but its configuration was written.

    Raises:
        ValueError: the directory cannot be made or written in, or another process trains in it.
    """
    path = Path(output)
    made: list[Path] = []  # the directory and those it lies in, as far as they are new
    with ExitStack() as stack:

        def lock_directory() -> None:
            try:
                made.extend(folder for folder in (path, *path.parents) if not folder.exists())
                path.mkdir(parents=True, exist_ok=True)
                # The file is opened for writing, so this finds out about an unwritable directory too.
                file = stack.enter_context(open(path / LOCK, "a"))
            except OSError as error:
                raise ValueError(f"output: cannot write in {output}: {error.strerror}") from error
            try:
                refusal = lock(file, wait=False)
            except BlockingIOError as error:
                raise ValueError(f"output: {output} is in use by another process") from error
            if refusal:
                logger.warning("%s cannot be locked (%s): see that nobody else uses it", output, refusal)
            with suppress(OSError):  # the disk is full: it stays empty
                (path / LOCK).write_text(owner())
            for folder in (path, path / "checkpoints"):  # of a process that was killed while it wrote
                for unfinished in folder.glob(UNFINISHED):
                    unfinished.unlink()

        ranks.first(lock_directory)
        try:
            yield path
        except ValueError:
            if path in made and set(os.listdir(path)) <= {LOCK, "config.yaml"}:
                for name in os.listdir(path):
                    (path / name).unlink()
                with suppress(OSError):  # others use one of those it lies in
                    for folder in made:
                        folder.rmdir()
            raise
