"""Files that are written completely or not at all, and JSON in them."""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

LOCK = ".bincomm.lock"  # marks a directory as a run's, and is locked while a process trains in it
UNFINISHED = ".*.unfinished"  # the pattern of files that `write_file` has not renamed yet


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`; on a failure `path` stays as it was.

    Raises:
        OSError: it cannot be written, for example because the disk is full; the message names `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        # The rename must survive a power failure, too: the caller may remove an older file next.
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
    """Write a text file by `write_file`; names of files in it may be of any bytes."""
    write_file(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by `write_file`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; [] where there is none. A last line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
