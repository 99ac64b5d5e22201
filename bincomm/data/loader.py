"""Batches of crops for training and of centre crops for evaluation, as torch tensors on a device."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bincomm.data.crops import Crops
from bincomm.data.multicrop import Pipeline, draw, evaluation_pipeline, training_pipeline

PREFETCHED = 4  # batches DALI may be ahead of the one handed out


class CorruptImageError(RuntimeError):
    """An image cannot be read or decoded; the message names the file."""


class Loader:
    """Endless batches of augmented crops, each epoch in a new order.

    The order of an epoch is a function of (seed, epoch), the crops of a batch of (seed, its number): the
    state is that number alone, and a loader that takes it up goes on exactly as the first would have.

    Args:
        files: image files.
        crops: the recipe.
        batch_size: n, images a batch; an epoch's last, incomplete batch is left out.
        seed: determines everything random.
        device: where the batches lie; images are decoded and augmented there as well.
        threads: CPU threads of the pipeline; they change nothing in the batches.

    Raises:
        ValueError: fewer files than batch_size.
    """

    def __init__(
        self,
        files: Sequence[str],
        crops: Crops,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        threads: int = 4,
    ):
        if batch_size > len(files):
            raise ValueError(
                f"batch_size: expected at most the number of images, {len(files)}, got {batch_size}"
            )
        self.files = files
        self.crops = crops
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.threads = threads
        self.steps_per_epoch = len(files) // batch_size
        self.step = 0  # batches handed out
        self.changed = ""  # how the files differ from those of the state that was taken up
        names = "\0".join(map(os.path.basename, files)).encode(errors="surrogateescape")
        self._names = hashlib.sha256(names).hexdigest()
        self._pipeline: Pipeline | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def next(self) -> tuple[Tensor, Tensor | None]:
        """The next batch: globals (2, n, 3, S, S) and locals (L, n, 3, s, s), or None without local crops.

        RGB normalised with ImageNet's mean and deviation, fp32, in memory of their own.

        Raises:
            CorruptImageError: an image of this batch or of the next few cannot be decoded.
        """
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            views = _run(self._pipeline, self.device)
        except RuntimeError as error:
            self._pipeline = None  # DALI cannot go on after an error
            ahead = range(self.step, self.step + PREFETCHED)
            raise _explain(error, [file for step in ahead for file in self._batch_files(step)]) from error
        self.step += 1
        return torch.stack(views[:2]), torch.stack(views[2:]) if len(views) > 2 else None

    def state_dict(self) -> dict[str, int | str]:
        return {"step": self.step, "images": len(self.files), "names": self._names}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on from another loader's state; `changed` then tells whether it had other files."""
        self.step = state["step"]
        self._pipeline = None
        if {**state, "step": 0} != {**self.state_dict(), "step": 0}:
            self.changed = f"{state['images']} images then, {len(self.files)} now, not all of the same names"

    def _build(self) -> Pipeline:
        step = self.step - 1

        def source() -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
            nonlocal step
            step += 1
            windows, numbers = draw(self.crops, self.batch_size, np.random.default_rng([self.seed, 1, step]))
            paths = [_encode(file) for file in self._batch_files(step)]
            return paths, list(windows), list(numbers)

        return training_pipeline(
            self.crops,
            source,
            batch_size=self.batch_size,
            threads=self.threads,
            device_id=_device_id(self.device),
        )

    def _batch_files(self, step: int) -> list[str]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, 0, epoch])
            self._order = (epoch, generator.permutation(len(self.files)))
        chosen = self._order[1][position * self.batch_size : (position + 1) * self.batch_size]
        return [self.files[index] for index in chosen]


def eval_batches(
    files: Sequence[str],
    *,
    size: int,
    crop_ratio: float = 0.875,
    batch_size: int,
    device: torch.device,
    threads: int = 4,
) -> Iterator[Tensor]:
    """Centre crops (n, 3, size, size) in the order of the files, normalised as in training; the last n may be
    smaller.

    The shorter side is resized to size/crop_ratio (bicubic, antialiased), of which the centre is taken.

    Raises:
        CorruptImageError: an image cannot be decoded.
    """
    batches = [files[first : first + batch_size] for first in range(0, len(files), batch_size)]
    waiting = iter(batches)

    def source() -> list[np.ndarray]:
        return [_encode(file) for file in next(waiting)]

    pipeline = evaluation_pipeline(
        source,
        size=size,
        resize=round(size / crop_ratio),
        batch_size=batch_size,
        threads=threads,
        device_id=_device_id(device),
    )
    for batch in batches:
        try:
            (images,) = _run(pipeline, device)
        except RuntimeError as error:
            raise _explain(error, list(batch)) from error
        yield images.clone()


def _run(pipeline: Pipeline, device: torch.device) -> list[Tensor]:
    """DALI's next outputs as tensors; their memory is DALI's, to be copied before the next call."""
    if device.type == "cuda":  # the outputs are then ordered with the work on this stream
        outputs = pipeline.run(torch.cuda.current_stream(device).cuda_stream)
    else:
        outputs = pipeline.run()
    return [torch.from_dlpack(output.as_tensor()) for output in outputs]


def _encode(path: str) -> np.ndarray:
    return np.frombuffer(os.fsencode(path), np.uint8)


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _explain(error: RuntimeError, files: list[str]) -> RuntimeError:
    """A CorruptImageError naming those of the files that cannot be decoded; the error itself if all can."""
    bad = [(file, reason) for file in dict.fromkeys(files) if (reason := _why_unreadable(file))]
    if not bad:
        return error
    names = "\n".join(f"  {file}: {reason}" for file, reason in bad)
    return CorruptImageError(f"data: {len(bad)} of the next images cannot be read; mend or remove:\n{names}")


def _why_unreadable(file: str) -> str:
    """Why an image cannot be decoded on its own; "" when it can."""
    try:
        with open(file, "rb") as content:
            if not content.read(1):
                return "the file is empty"
    except OSError as error:
        return str(error.strerror)
    source: Callable[[], list[np.ndarray]] = lambda: [_encode(file)]  # noqa: E731
    pipeline = evaluation_pipeline(source, size=8, resize=8, batch_size=1, threads=1, device_id=None)
    try:
        pipeline.run()
    except RuntimeError as error:
        # DALI says no more than the number of an error. Pillow has words for most of them.
        try:
            with Image.open(file) as image:
                image.load()
        except UnidentifiedImageError:
            return "not an image, or one of an unknown format"
        except (OSError, SyntaxError, ValueError) as reason:
            return str(reason)
        said = str(error).partition("encountered:")[2].split("\n")
        return next((line for line in said if line), "DALI cannot decode it")
    return ""
