"""Files that are written completely or not at all, and JSON in them."""

import errno
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, BinaryIO

logger = logging.getLogger(__name__)

LOCK = ".bincomm.lock"  # marks a directory as a run's, and is locked while a process trains in it
LARGEST_YAML = 2**20  # bytes
UNFINISHED = ".*.unfinished"  # the pattern of files that `write_file` has not renamed yet


def write_file(path: Path, write: Callable[[BinaryIO], Any], durable: bool = True) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`; on a failure `path` stays as it was.

    Args:
        durable: wait until it survives a power failure.

    Raises:
        OSError: it cannot be written, for example because the disk is full; the message names `path`.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.unfinished")  # short, whatever path's length
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def expand_home(path: str | os.PathLike[str]) -> Path:
    """A path with the home directory in place of a ~ at its start; where there is none, it stays."""
    return Path(os.path.expanduser(path))


def check_file(argument: str, path: str | os.PathLike[str]) -> Path:
    """Try, before any work is done for it, whether `write_file` can write a file; returns its expanded path.

    Raises:
        ValueError: it cannot; the message names the argument.
    """
    file = expand_home(path)
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _try_to_write(file)
    except (OSError, ValueError) as error:  # the latter for a name that has no bytes in this locale
        raise _refused(argument, "file in a folder that can be written", path, error) from error
    return file


def check_folder(argument: str, path: str | os.PathLike[str]) -> Path:
    """Try, before any work is done for it, whether files can be written in a folder, which is not left behind
    if it does not exist; returns its expanded path.

    Raises:
        ValueError: it cannot be made or written; the message names the argument.
    """
    folder = expand_home(path)
    made: list[Path] = []
    try:
        for parent in reversed((folder, *folder.parents)):
            if not parent.is_dir():
                if parent.exists():
                    raise NotADirectoryError(errno.ENOTDIR, f"{parent} is a file")
                parent.mkdir(exist_ok=True)
                made.append(parent)
        _try_to_write(folder / "x")
    except (OSError, ValueError) as error:
        raise _refused(argument, "folder that can be made and written", path, error) from error
    finally:
        for parent in reversed(made):
            with suppress(OSError):  # another process has begun to use it
                parent.rmdir()
    return folder


def check_empty_folder(argument: str, path: str | os.PathLike[str]) -> Path:
    """As `check_folder`, of a folder that does not exist or is empty.

    Raises:
        ValueError: it holds something, or cannot be made or written; the message names the argument.
    """
    folder = check_folder(argument, path)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{argument}: expected a new or an empty folder, got {os.fspath(path)}")
    return folder


def _try_to_write(file: Path) -> None:
    with suppress(FileNotFoundError):
        os.lstat(file)  # refuses a name that is too long
    probe = file.with_name(f".{secrets.token_hex(8)}.unfinished")
    with open(probe, "xb"):
        probe.unlink()


def _refused(argument: str, expected: str, path: str | os.PathLike[str], error: Exception) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return ValueError(f"{argument}: expected a {expected}, got {os.fspath(path)}: {reason}")


def sync_folder(path: Path) -> None:
    """Let a rename in a folder survive a power failure, too: the caller may remove an older file next. File
    systems of networks and other machines may refuse it, which is no failure: the rename has been done."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        tell_once(f"folders of this file system cannot be synchronized with the disk: {error.strerror}")


@cache
def tell_once(text: str) -> None:
    """Log a property of the machine, the first time."""
    logger.info("note: %s", text)


def lock(file: IO[Any], wait: bool) -> str:
    """Lock a file for this process until it is closed; returns why it cannot be locked, "" if it is.

    File systems of networks and other machines may have no locks, and say so in many ways.

    Raises:
        BlockingIOError: another process has locked it, and this one is not to wait.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        return error.strerror or str(error)
    return ""


def write_text(path: Path, text: str) -> None:
    """Write a text file by `write_file`; names of files in it may be of any bytes."""
    write_file(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by `write_file`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, which may be someone else's: plain values only, and no aliases, a few of
    which can stand for more than fits into memory.

    Raises:
        ValueError: it is no YAML, or has aliases; the message has one line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event: Any = self.peek_event()
                raise yaml.composer.ComposerError(None, None, "aliases are not taken", event.start_mark)
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; see `parse_yaml`.

    Raises:
        ValueError: it is no YAML, or larger than a megabyte.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(LARGEST_YAML + 1)
    if len(data) > LARGEST_YAML:
        raise ValueError("it is larger than a megabyte")
    return parse_yaml(data.decode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; [] where there is none. A last line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
