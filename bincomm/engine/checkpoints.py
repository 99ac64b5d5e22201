"""Checkpoints of a run: written in the background, completely or not at all; the last few are kept."""

import contextlib
import errno
import logging
import os
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from bincomm.files import write_file
from bincomm.memory import is_out_of_memory

logger = logging.getLogger(__name__)

# A checkpoint is the zip archive that torch.save writes, and then this mark and the archive's CRC-32, four
# bytes, the low one first. Readers of zip archives look past them.
MARK = b"bincomm.crc32"
NO_COMMENT = b"PK\x05\x06"  # begins the last 22 bytes of an archive of an earlier version, without a checksum


class Checkpoints:
    """The checkpoints in a folder, one a file, by step.

    Where a checkpoint cannot be written, on a full disk for example, a warning is logged; the run and the
    checkpoints before it stay as they were.

    Args:
        folder: is made when the first one is written.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.newest = max(self.steps(), default=None)
        self._writer: threading.Thread | None = None

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, in order; other files in the folder are none of ours."""
        numbers = [path.stem.removeprefix("step-") for path in self.folder.glob("step-*.ckpt")]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def path(self, step: int) -> Path:
        """The file of a step's checkpoint."""
        return self.folder / f"step-{step:09}.ckpt"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a state that nothing else changes, of tensors on the CPU and plain values, in the background,
        once the previous one is written."""
        self.wait()
        self._writer = threading.Thread(target=self._write, args=(step, state), name="bincomm-checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def load(self) -> dict[str, Any] | None:
        """The newest undamaged checkpoint, on the CPU; None if there is none at all.

        A damaged one is renamed to .ckpt.damaged, so that it does not count as one of those to keep.

        Raises:
            ValueError: there are some, and all are damaged.
            OSError: one cannot be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                state = load_checkpoint(self.path(step))
            except ValueError as error:
                logger.warning("%s; going back to the one before it", error)
                with contextlib.suppress(OSError):
                    self.path(step).rename(f"{self.path(step)}.damaged")
                continue
            self.newest = step
            return state
        if steps:
            raise ValueError(
                f"output: all checkpoints in {self.folder} are damaged; choose another --output to begin"
            )
        return None

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self.path(step), state)
            self.newest = step
            for old in self.steps()[: -self.keep]:
                self.path(old).unlink()
        except Exception as error:  # whatever it is, it must not end the training
            newest = max(self.steps(), default=None)  # of those that nobody has removed
            good = "there is none before" if newest is None else f"the last good one: {newest}"
            logger.warning("the checkpoint of step %d could not be written (%s); %s", step, error, good)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, completely or not at all: tensors and plain values only, so that it loads with
    `weights_only`."""

    def write(file: BinaryIO) -> None:
        summing = _Summing(file)
        try:
            torch.save(state, cast(BinaryIO, summing))  # it needs these two methods
        except RuntimeError:
            # torch.save hides why writing failed; where the disk is full, writing more raises the reason.
            file.write(bytes(1 << 20))
            file.flush()
            raise
        file.write(MARK + summing.checksum.to_bytes(4, "little"))

    write_file(path, write)


class _Summing:
    """A file to write to, and the CRC-32 of what was written."""

    def __init__(self, file: BinaryIO):
        self.file, self.checksum = file, 0

    def write(self, data: bytes) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU, its checksum compared.

    Raises:
        ValueError: the file is no checkpoint, or damaged.
        OSError: it cannot be read.
        MemoryError: it does not fit into memory.
    """
    damaged = f"{path} cannot be read as a checkpoint: "
    try:
        has_checksum = _compare_checksum(path)
    except OSError as error:
        if error.errno == errno.EIO:  # of a worn disk, whose file is as good as damaged
            raise ValueError(f"{damaged}{error.strerror}") from error
        raise
    # Every byte could be read. From here on an error of the system comes from following a damaged directory.
    try:
        if not has_checksum:  # of an earlier version: then there are those of the parts
            with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at them
                part = archive.testzip()
            if part is not None:
                raise ValueError(f"the checksum of {part} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise ValueError(f"{damaged}{error or type(error).__name__}") from error


def _compare_checksum(path: Path) -> bool:
    """Read a checkpoint to its end and compare its checksum; whether it has one.

    Raises:
        ValueError: the checksum is wrong, or the file ends in neither a checksum nor an archive's end.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        left = max(0, os.fstat(file.fileno()).st_size - len(MARK) - 4)
        checksum, last = 0, b""
        while left and (data := file.read(min(left, 1 << 20))):
            checksum, last, left = zlib.crc32(data, checksum), (last + data)[-22:], left - len(data)
        end = file.read()
    if end[:-4] == MARK:
        if int.from_bytes(end[-4:], "little") != checksum:
            raise ValueError(f"{path} cannot be read as a checkpoint: its checksum is wrong")
        return True
    if not (last + end)[-22:].startswith(NO_COMMENT):
        raise ValueError(f"{path} cannot be read as a checkpoint: its end is missing or damaged")
    return False
