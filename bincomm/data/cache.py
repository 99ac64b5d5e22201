"""bincomm's cache, what is made or fetched only once: digits, listings, indices, data sets, blocks of them.

What lies there decides which files are read as images, so only what this user, or root, wrote is taken.
"""

import grp
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from bincomm.files import write_file

NOT_FOR_OTHERS = ~(stat.S_IWGRP | stat.S_IWOTH)  # what the cache's files and folders are made with


def cache_folder(*parts: str) -> Path:
    """A folder of the cache: $BINCOMM_CACHE, or bincomm below $XDG_CACHE_HOME or ~/.cache; not created here.

    Args:
        parts: names of the folder and those that it lies in, below the cache.

    Raises:
        ValueError: there is no home directory, or others can write in one of these folders.
    """
    folder = _base()
    for part in ("", *parts):
        folder /= part
        try:
            others = who_else_writes(os.stat(folder))
        except OSError:  # missing, or what follows says why it cannot be read
            continue
        if others:
            raise ValueError(
                f"cache: expected that nobody else can write in {folder}, got {others}; "
                f"chmod go-w {folder} if it is yours, or set BINCOMM_CACHE to a folder of your own"
            )
    return folder


def who_else_writes(status: os.stat_result) -> str:
    """Who besides this user and root can write a file or in a folder, in words; "" if nobody can.

    The owner's group counts, unless it is the group that many systems give each user alone.
    """
    if status.st_uid not in (os.geteuid(), 0):
        return f"one of user {status.st_uid}"
    if status.st_mode & stat.S_IWOTH:
        return "one that everybody can write in"
    if status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid):
        return f"one that group {status.st_gid} can write in"
    return ""


def read_cached(path: Path) -> bytes:
    """The content of a file of the cache.

    Raises:
        OSError: it cannot be read, or others can write it; then it is to be made again.
    """
    with open(path, "rb") as file:
        if who_else_writes(os.fstat(file.fileno())):
            raise PermissionError(f"{path} can be written by others")
        return file.read()


def write_cached(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write a file of the cache, and make its folder; names of files in a text may be of any bytes.

    Args:
        durable: as in `bincomm.files.write_file`.

    Raises:
        OSError: it cannot be written.
    """

    def write(file: BinaryIO) -> None:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & ~NOT_FOR_OTHERS:
            with suppress(OSError):  # of a file system without permissions
                os.fchmod(file.fileno(), mode & NOT_FOR_OTHERS)
        file.write(content if isinstance(content, bytes) else content.encode(errors="surrogateescape"))

    make_folder(path.parent)
    write_file(path, write, durable)


def make_folder(path: Path) -> None:
    """Make a folder of the cache and those that it lies in, in which others cannot write whatever the umask.

    Raises:
        OSError: it cannot be made.
    """
    for folder in reversed((path, *path.parents)):
        if not folder.is_dir():
            folder.mkdir(mode=0o777 & NOT_FOR_OTHERS, exist_ok=True)


def leads_out(path: str) -> bool:
    """Whether a path that is stored below a folder would lead out of it."""
    return path.startswith("/") or "/../" in f"/{path}/"


def unwritable(error: OSError) -> ValueError:
    """The error for a cache that cannot be written."""
    return ValueError(
        f"cache: cannot write in {_base()}: {error.strerror or error}; "
        "set BINCOMM_CACHE to a folder that can be written"
    )


def _base() -> Path:
    try:
        folder = os.environ.get("BINCOMM_CACHE")
        if folder:
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bincomm"
    except RuntimeError as error:
        raise ValueError(
            "there is no home directory for the cache; set BINCOMM_CACHE to a folder that can be written"
        ) from error


def _is_private(group: int) -> bool:
    """Whether a group is this user's alone: of the user's name, and without other members."""
    try:
        user, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == user and set(entry.gr_mem) <= {user}
