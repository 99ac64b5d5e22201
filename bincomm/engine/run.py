"""A run's directory: who may write in it, and files that are written whole or not at all."""

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bincomm.engine.ranks import Ranks

LOCK = ".bincomm.lock"  # marks a directory as a run's, and is locked while a process trains in it
UNFINISHED = ".*.unfinished"  # what `write_whole` has not put in place yet
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


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in place; on a failure `path` stays as it was.

    Raises:
        OSError: it cannot be written, for want of space for example; the message names `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        # That it is in place is to outlast a power failure, too: an older file may be removed after it.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole; names of files in it may be of any bytes."""
    write_whole(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")
