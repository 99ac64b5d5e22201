"""A run's directory: who may write in it, and files that are written whole or not at all."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bincomm.engine.ranks import Ranks

LOCK = ".bincomm.lock"  # marks a directory as a run's, and is locked while a process trains in it


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

        ranks.first(take)
        yield path


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in place; on a failure `path` stays as it was.

    Raises:
        OSError: it cannot be written, for want of space for example; the message names `path`.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets the owner alone read
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole; names of files in it may be of any bytes."""
    write_whole(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
