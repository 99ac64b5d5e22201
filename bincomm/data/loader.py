"""Batches of augmented crops for training, as torch tensors on a device."""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bincomm.data.crops import Crops
from bincomm.data.dali import Pipeline, device_number, find_undecodable, run_pipeline
from bincomm.data.images import UnusableImageError
from bincomm.data.multicrop import DRAWS, by_crop, draw_crops, training_pipeline
from bincomm.data.order import SUBSTITUTES, Order
from bincomm.data.remote import UnreachableError
from bincomm.data.sources import Mix, Source
from bincomm.data.values import load_input
from bincomm.logs import printable_name

NAMED = 5  # number of unusable images that an error names
READ_AHEAD = 2  # number of batches read and examined before DALI needs them


class TooManyUnusableError(RuntimeError):
    """More images cannot be used than the run allows; the message names a few and says what to do."""


class Batch(NamedTuple):
    """The input of DALI for a batch, its step, and the images it consists of."""

    step: int
    images: list[int]  # indices in the source
    inputs: list[np.ndarray]  # of `load_input`
    numbers: np.ndarray  # of `draw_crops`


class Loader:
    """Endless batches of augmented crops, each epoch in a new order.

    The images of an epoch are a function of (seed, epoch), the crops of an image one of (seed, epoch, its
    slot in the epoch). The state is the number of batches handed out, and a loader that loads it continues
    exactly as the first would have. Threads and ranks change nothing: with several ranks, batch b of all of
    them together is batch b of one process with a batch of that size.

    The slot of an image that cannot be read or decoded is given to another image of its source, which (seed,
    epoch, slot) determine. The image is not tried again, and `unusable` has its name and the reason.

    Args:
        source: images.
        crops: the recipe.
        batch_size: n, images per batch on this rank; images at an epoch's end that do not fill a batch on
            every rank are left out.
        seed: determines everything random.
        device: device of the batches; images are decoded and augmented there, too.
        threads: number of CPU threads of the pipeline, and of those that read files.
        max_unusable: share of the source's images that may be unusable; each rank counts those it knows of.
        dtype: dtype of the batches, float32, float16 or bfloat16.
        channels_last: store the crops in memory with the channels last.
        globals_only: make the global crops alone, which are those that they are beside the local ones.
        rank, world: this process among those that share the epochs.

    Raises:
        ValueError: fewer images than world · batch_size.
    """

    def __init__(
        self,
        source: Source,
        crops: Crops,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        threads: int = 4,
        max_unusable: float = 0.01,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        globals_only: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images = source.images
        self.crops = crops
        self.batch_size = batch_size
        self.device = device
        self.threads = threads
        self.max_unusable = max_unusable
        self.dtype = dtype
        self.channels_last = channels_last
        # Those that are made; all are drawn, because the numbers of one depend on how many there are.
        self.made = replace(crops, local_crops=0) if globals_only else crops
        self.rank, self.world = rank, world
        parts = source.images.parts if isinstance(source.images, Mix) else [source.images]
        self.order = Order([len(part) for part in parts], source.weights, seed)
        self.global_batch = batch_size * world
        if self.global_batch > len(self.images):
            ranks = f" on each of {world} ranks" if world > 1 else ""
            raise ValueError(
                f"batch_size: expected at most the number of images, {len(self.images)}, got {batch_size}"
                + ranks
            )
        self.steps_per_epoch = len(self.images) // self.global_batch
        self.step = 0  # batches handed out
        self.indices: list[int] = []  # in the source, of the images of the batch handed out last
        self.unusable: list[tuple[str, str]] = []  # (name, reason), of the batches handed out, in their order
        self.changed = ""  # how the images differ from those of the state that was loaded
        names = hashlib.sha256()
        for name in self.images.names():
            names.update(os.fsencode(os.path.basename(name)) + b"\0")
        self._names = names.hexdigest()
        self._rejected: dict[int, tuple[int, str]] = {}  # image: (first step that needed it, reason)
        self._readers = ThreadPoolExecutor(threads, "bincomm-read")
        self._read_ahead = ThreadPoolExecutor(1, "bincomm-read-ahead")
        self._pipeline: Pipeline | None = None
        self._prepared: deque[Future[Batch]] = deque()
        self._fed: deque[Batch] = deque()  # DALI reads their images where they lie

    def next(self) -> tuple[Tensor, Tensor | None]:
        """The next batch: globals (n, 2, C, S, S) and locals (n, L, C, s, s), or None without local crops.

        Normalized by the recipe's mean and deviation, in memory that DALI does not write to again.

        Raises:
            TooManyUnusableError: the share of unusable images is above `max_unusable`.
            UnreachableError: an image that is stored elsewhere cannot be read; another call tries again.
        """
        while True:
            if self._pipeline is None:
                self._pipeline = self._build()
            try:
                groups = run_pipeline(self._pipeline, self.device)
                break
            except (TooManyUnusableError, UnreachableError):
                self._reset()
                raise
            except RuntimeError as error:
                # DALI cannot continue after an error. The images that it was given are examined one by one.
                batches = list(self._fed)
                self._reset()
                if not (self.crops.rgb and self._reject_undecodable(batches)):
                    raise error
        self.indices = next(batch.images for batch in self._fed if batch.step == self.step)
        if len(self._rejected) > len(self.unusable):
            self.unusable += [
                (self.images.name(image), reason)
                for step, image, reason in self._sorted_rejections()
                if step == self.step
            ]
        self.step += 1
        while self._fed and self._fed[0].step < self.step:  # DALI has finished it
            self._fed.popleft()
        if self.dtype == torch.bfloat16:  # a dtype that DALI lacks
            groups = [group.to(torch.bfloat16) for group in groups]
        if self.channels_last:
            groups = [group.movedim(-1, 2) for group in groups]
        return groups[0], groups[1] if len(groups) > 1 else None

    def seek(self, step: int) -> None:
        """Let the next batch be that of a step, which counts from 0."""
        if step != self.step:
            self.step = step
            self._reset()

    def resize(self, global_size: int, local_size: int) -> bool:
        """Make crops of these sides, in pixels, from the next batch on: the same windows of the same images,
        with the same augmentations. Returns whether they are others than before."""
        if (global_size, local_size) == (self.crops.global_size, self.crops.local_size):
            return False
        self.crops = replace(self.crops, global_size=global_size, local_size=local_size)
        self.made = replace(self.made, global_size=global_size, local_size=local_size)
        self._reset()
        return True

    def all_unusable(self) -> list[tuple[str, str]]:
        """(name, reason) of all unusable images so far, including those of batches in preparation."""
        return [(self.images.name(image), reason) for _, image, reason in self._sorted_rejections()]

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, which can be written as JSON; `merge_states` merges those of all ranks."""
        return {
            "step": self.step,
            "global_batch": self.global_batch,
            "images": len(self.images),
            "names": self._names,
            "unusable": [
                [image, step, reason] for step, image, reason in self._sorted_rejections() if step < self.step
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from another loader's state; `changed` then says whether it had other images.

        Raises:
            ValueError: the batches of all ranks together had another size, and the state is not that of an
                epoch's end.
        """
        epoch, inside = divmod(state["step"], state["images"] // state["global_batch"])
        if state["global_batch"] == self.global_batch:
            self.step = state["step"]
        elif inside == 0:
            self.step = epoch * self.steps_per_epoch
        else:
            raise ValueError(
                f"batch_size: the state is from the middle of an epoch with {state['global_batch']} images a "
                f"step over all ranks, expected as many, got {self.global_batch}; another number is possible "
                "from an epoch's end"
            )
        unchanged = (state["images"], state["names"]) == (len(self.images), self._names)
        rejections = state["unusable"] if unchanged else []
        self._rejected = {image: (step, reason) for image, step, reason in rejections}
        self.unusable = [(self.images.name(image), reason) for image, _, reason in rejections]
        if not unchanged:
            self.changed = f"{state['images']} images then, {len(self.images)} now, not all of the same names"
        self._reset()

    def _reset(self) -> None:
        """Drop the pipeline and the batches prepared for it; the next batch is still that of `step`."""
        self._pipeline = None  # first, because it reads the images of the batches it was fed with
        self._prepared.clear()
        self._fed.clear()

    def _build(self) -> Pipeline:
        steps = itertools.count(self.step)

        def prepare_next() -> None:
            self._prepared.append(self._read_ahead.submit(self._prepare, next(steps)))

        def feed() -> tuple[list[np.ndarray], list[np.ndarray]]:
            prepare_next()
            batch = self._prepared.popleft().result()
            self._fed.append(batch)
            return batch.inputs, list(batch.numbers)

        for _ in range(READ_AHEAD):
            prepare_next()
        return training_pipeline(
            self.made,
            feed,
            batch_size=self.batch_size,
            threads=self.threads,
            device_id=device_number(self.device),
            dtype=self.dtype,
            channels_last=self.channels_last,
        )

    def _prepare(self, step: int) -> Batch:
        """Read and examine the images of a batch, and draw their crops."""
        self._check_limit()
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch + self.rank * self.batch_size
        slots = np.arange(first, first + self.batch_size)
        images = self.order.epoch(epoch)[slots].tolist()
        # In a few large portions, because handing over single images would take as long as examining them.
        size = -(-len(slots) // (2 * self.threads))
        portions = [range(start, min(start + size, len(slots))) for start in range(0, len(slots), size)]

        def load_portion(portion: range) -> list[tuple[int, np.ndarray, tuple[int, int]]]:
            return [self._load_or_substitute(step, epoch, int(slots[i]), images[i]) for i in portion]

        loaded = list(itertools.chain.from_iterable(self._readers.map(load_portion, portions)))
        uniforms = by_crop(self.order.uniforms(epoch, slots, self.crops.views * DRAWS), self.crops.views)
        sizes = np.array([size for _, _, size in loaded])
        return Batch(
            step,
            [image for image, _, _ in loaded],
            [data for _, data, _ in loaded],
            draw_crops(self.crops, sizes, uniforms)[:, : self.made.views],
        )

    def _load_or_substitute(
        self, step: int, epoch: int, slot: int, image: int
    ) -> tuple[int, np.ndarray, tuple[int, int]]:
        """The image of a slot, or the first of its substitutes that can be used, and what `load_input`
        returns."""

        def candidates() -> Iterator[int]:
            yield image
            yield from self.order.substitutes(image, epoch, slot).tolist()

        for candidate in candidates():
            if candidate not in self._rejected:
                try:
                    return candidate, *load_input(self.images, candidate, self.crops)
                except UnusableImageError as error:
                    self._reject(step, candidate, str(error))
        name = printable_name(self.images.name(image))
        raise TooManyUnusableError(
            f"data: none of {2 * SUBSTITUTES} images tried in place of {name} can be used "
            f"({printable_name(self._rejected[image][1])})"
        )

    def _reject(self, step: int, image: int, reason: str) -> None:
        self._rejected[image] = (step, reason)
        self._check_limit()

    def _reject_undecodable(self, batches: list[Batch]) -> bool:
        """Leave out the images of these batches that DALI cannot decode; returns whether there are any."""
        images, encoded, steps = [], [], []
        for batch in batches:
            images += batch.images
            encoded += batch.inputs
            steps += [batch.step] * len(batch.images)
        undecodable = find_undecodable(encoded, self.device, self._readers)
        for index, reason in undecodable.items():
            if images[index] not in self._rejected:
                self._reject(steps[index], images[index], reason)
        return bool(undecodable)

    def _check_limit(self) -> None:
        if len(self._rejected) > self.max_unusable * len(self.images):
            last = list(self._rejected.items())[-NAMED:]
            names = ((printable_name(self.images.name(image)), reason) for image, (_, reason) in last)
            lines = "".join(f"\n  {name}: {printable_name(reason)}" for name, reason in names)
            raise TooManyUnusableError(
                f"data: {len(self._rejected)} of {len(self.images)} images cannot be used, more than "
                f"max_unusable = {self.max_unusable:g} allows; repair or remove them, or raise max_unusable; "
                f"`bincomm data verify` lists all. The last of them:{lines}"
            )

    def _sorted_rejections(self) -> list[tuple[int, int, str]]:
        """(step, image, reason) of all unusable images so far, in this order."""
        # A list first, because the threads that read ahead may add to the dict meanwhile.
        return sorted((step, image, reason) for image, (step, reason) in list(self._rejected.items()))


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks' loaders as one, which each can load: it has the unusable images of all."""
    first: dict[int, list] = {}
    for image, step, reason in itertools.chain.from_iterable(state["unusable"] for state in states):
        if image not in first or step < first[image][1]:
            first[image] = [image, step, reason]
    return {**states[0], "unusable": sorted(first.values(), key=lambda row: (row[1], row[0]))}
