"""Checkpoints of a run: written whole, in the background, the last few kept, a failing disk survived."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bincomm.engine.run import write_whole

PATTERN = "step-*.ckpt"


class Checkpoints:
    """The checkpoints in a folder, one a file, by step.

    A checkpoint that cannot be written, on a full disk for example, is told and not there; the run and the
    checkpoints before it are as they were.

    Args:
        folder: is made when the first one is written.
        keep: how many of the newest stay.
        say: told of every failure, in words, by the thread that called `save`, `poll` or `finish`.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]):
        self.folder, self.keep, self.say = folder, keep, say
        self.newest = max((_step(path) for path in folder.glob(PATTERN)), default=None)
        for unfinished in folder.glob(f".{PATTERN}.*"):  # of a process that was killed while it wrote
            unfinished.unlink()
        self._writer: threading.Thread | None = None
        self._failure = ""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a state that nothing else changes, of tensors on the CPU and plain values, in the background,
        once the one before it is written."""
        self.finish()
        self._writer = threading.Thread(target=self._write, args=(step, state), name="bincomm-checkpoint")
        self._writer.start()

    def poll(self) -> None:
        """Tell of a failure, if there was one."""
        if self._failure:
            failure, self._failure = self._failure, ""
            self.say(failure)

    def finish(self) -> None:
        """Wait until what was saved is written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.poll()

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, on the CPU; None where there is none at all.

        Raises:
            ValueError: there are some, and none can be read.
        """
        paths = sorted(self.folder.glob(PATTERN), key=_step, reverse=True)
        for path in paths:
            try:
                state = load_checkpoint(path)
            except ValueError as error:
                self.say(f"warning: {error}; going back to the one before it")
                continue
            self.newest = _step(path)
            return state
        if paths:
            raise ValueError(f"output: none of the checkpoints in {self.folder} can be read; move them away")
        return None

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            save_checkpoint(self.folder / f"step-{step:09}.ckpt", state)
            self.newest = step
            for path in sorted(self.folder.glob(PATTERN), key=_step)[: -self.keep]:
                path.unlink()
        except Exception as error:  # whatever it is, it must not end the training
            good = "none was written before" if self.newest is None else f"the last good one: {self.newest}"
            self._failure = f"warning: the checkpoint of step {step} could not be written ({error}); {good}"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole: tensors and plain values only, so that it loads with `weights_only`."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError:
            # torch.save hides why writing failed; where the disk is full, writing more raises the reason.
            file.write(bytes(1 << 20))
            file.flush()
            raise

    write_whole(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU.

    Raises:
        ValueError: the file is no checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error


def _step(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1
