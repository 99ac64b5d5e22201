"""Checkpoints of a run: written in the background, completely or not at all; the last few are kept."""

import contextlib
import logging
import threading
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bincomm.files import write_file

logger = logging.getLogger(__name__)


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
            self.folder.mkdir(exist_ok=True)
            save_checkpoint(self.path(step), state)
            self.newest = step
            for old in self.steps()[: -self.keep]:
                self.path(old).unlink()
        except Exception as error:  # whatever it is, it must not end the training
            good = "none was written before" if self.newest is None else f"the last good one: {self.newest}"
            logger.warning("the checkpoint of step %d could not be written (%s); %s", step, error, good)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, completely or not at all: tensors and plain values only, so that it loads with
    `weights_only`."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError:
            # torch.save hides why writing failed; where the disk is full, writing more raises the reason.
            file.write(bytes(1 << 20))
            file.flush()
            raise

    write_file(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU, its checksums compared.

    Raises:
        ValueError: the file is no checkpoint, or damaged.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: {why}") from error
