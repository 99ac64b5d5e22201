"""Batches of crops for training and of center crops for evaluation, as torch tensors on a device."""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bincomm.data.crops import Crops
from bincomm.data.images import UnusableImageError, load, why_not_whole
from bincomm.data.multicrop import (
    DRAWS,
    Pipeline,
    decoding_pipeline,
    draw,
    evaluation_pipeline,
    middles,
    training_pipeline,
    views,
)
from bincomm.data.order import SUBSTITUTES, Order
from bincomm.data.sources import Source

SHOWN = 5  # unusable images that an error names
READ_AHEAD = 2  # batches read and examined before DALI asks for them


class TooManyUnusableError(RuntimeError):
    """More images cannot be used than the run allows; the message names some and tells what to do."""


class Batch(NamedTuple):
    """What DALI is given for a batch, its number, and the images it consists of."""

    step: int
    images: list[int]
    encoded: list[np.ndarray]
    numbers: np.ndarray


class Loader:
    """Endless batches of augmented crops, each epoch in a new order.

    The images of an epoch are a function of (seed, epoch), the crops of an image one of (seed, epoch, its
    slot in the epoch): the state is the number of batches handed out, and a loader that takes it up goes on
    exactly as the first would have. Neither threads nor ranks play a part: with several ranks, batch b of all
    of them together is batch b of one process with as large a batch.

    An image that cannot be read or decoded costs no batch: another image of its source, which (seed, epoch,
    slot) determine, takes its slot. It is then left out for good, and `unusable` has its name and the reason.

    Args:
        source: images.
        crops: the recipe.
        batch_size: n, images a batch on this rank; what is left at an epoch's end that does not fill a batch
            on every rank is left out.
        seed: determines everything random.
        device: where the batches lie; images are decoded and augmented there as well.
        threads: CPU threads of the pipeline, and as many that read files.
        max_unusable: share of the source's images that may be unusable, as far as this rank met them.
        dtype: of the batches, float32, float16 or bfloat16.
        channels_last: lay the crops out in memory with the channels last.
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
        rank: int = 0,
        world: int = 1,
    ):
        self.images = source.images
        self.crops = crops
        self.batch_size = batch_size
        self.device = device
        self.threads = threads
        self.max_unusable = max_unusable
        self.dtype = dtype
        self.channels_last = channels_last
        self.rank, self.world = rank, world
        sizes = [len(source.images)] if source.weights is None else [len(p) for p in source.images.parts]
        self.order = Order(sizes, source.weights, seed)
        self.global_batch = batch_size * world
        if self.global_batch > len(self.images):
            ranks = f" on each of {world} ranks" if world > 1 else ""
            raise ValueError(
                f"batch_size: expected at most the number of images, {len(self.images)}, got {batch_size}"
                + ranks
            )
        self.steps_per_epoch = len(self.images) // self.global_batch
        self.step = 0  # batches handed out
        self.indices: list[int] = []  # of the batch handed out last: the images' numbers in the source
        self.unusable: list[tuple[str, str]] = []  # of the batches handed out, in their order
        self.changed = ""  # how the images differ from those of the state that was taken up
        names = hashlib.sha256()
        for name in self.images.names():
            names.update(os.fsencode(os.path.basename(name)) + b"\0")
        self._names = names.hexdigest()
        self._bad: dict[int, tuple[int, str]] = {}  # image: the first step that met it, why it is unusable
        self._readers = ThreadPoolExecutor(threads, "bincomm-read")
        self._ahead = ThreadPoolExecutor(1, "bincomm-read-ahead")
        self._start_anew()

    def next(self) -> tuple[Tensor, Tensor | None]:
        """The next batch: globals (n, 2, 3, S, S) and locals (n, L, 3, s, s), or None without local crops.

        RGB normalized with ImageNet's mean and deviation, in memory that DALI does not write to again.

        Raises:
            TooManyUnusableError: the share of unusable images is above `max_unusable`.
        """
        while True:
            if self._pipeline is None:
                self._pipeline = self._build()
            try:
                groups = _run(self._pipeline, self.device)
                break
            except TooManyUnusableError:
                self._start_anew()
                raise
            except RuntimeError as error:
                # DALI cannot go on after an error. What it has in hand is looked through, image by image.
                batches = list(self._given)
                self._start_anew()
                if not self._reject_undecodable(batches):
                    raise error
        self.indices = next(batch.images for batch in self._given if batch.step == self.step)
        if len(self._bad) > len(self.unusable):
            met = sorted(image for image, (step, _) in list(self._bad.items()) if step == self.step)
            self.unusable += [(self.images.name(image), self._bad[image][1]) for image in met]
        self.step += 1
        while self._given and self._given[0].step < self.step:  # used: DALI has made all of it
            self._given.popleft()
        if self.dtype == torch.bfloat16:  # which DALI does not have
            groups = [group.to(torch.bfloat16) for group in groups]
        if self.channels_last:
            groups = [group.movedim(-1, 2) for group in groups]
        return groups[0], groups[1] if len(groups) > 1 else None

    def found_unusable(self) -> list[tuple[str, str]]:
        """All unusable images found so far, also those of batches that are being made."""
        found = sorted((step, image, why) for image, (step, why) in list(self._bad.items()))
        return [(self.images.name(image), why) for _, image, why in found]

    def state_dict(self) -> dict[str, Any]:
        bad = sorted((step, image, why) for image, (step, why) in list(self._bad.items()) if step < self.step)
        return {
            "step": self.step,
            "global_batch": self.global_batch,
            "images": len(self.images),
            "names": self._names,
            "unusable": [[image, step, why] for step, image, why in bad],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another loader's state; `changed` then tells whether it had other images.

        Raises:
            ValueError: the batches of all ranks together were of another size, and the state is not that of
                an epoch's end.
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
        same = (state["images"], state["names"]) == (len(self.images), self._names)
        self._bad = {image: (step, why) for image, step, why in state["unusable"]} if same else {}
        self.unusable = [(self.images.name(image), why) for image, (_, why) in self._bad.items()]
        if not same:
            self.changed = f"{state['images']} images then, {len(self.images)} now, not all of the same names"
        self._start_anew()

    def _start_anew(self) -> None:
        self._pipeline: Pipeline | None = None
        self._prepared: deque[Future] = deque()
        self._given: deque[Batch] = deque()  # DALI reads their images where they lie

    def _build(self) -> Pipeline:
        step = self.step

        def prepare() -> None:
            nonlocal step
            self._prepared.append(self._ahead.submit(self._prepare, step))
            step += 1

        def source() -> tuple[list, list]:
            prepare()
            batch = self._prepared.popleft().result()
            self._given.append(batch)
            return batch.encoded, list(batch.numbers)

        for _ in range(READ_AHEAD):
            prepare()
        return training_pipeline(
            self.crops,
            source,
            batch_size=self.batch_size,
            threads=self.threads,
            device_id=_device_id(self.device),
            dtype=self.dtype,
            channels_last=self.channels_last,
        )

    def _prepare(self, step: int) -> Batch:
        """Read and examine a batch, and draw what becomes of it."""
        self._check_limit()
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch + self.rank * self.batch_size
        slots = np.arange(first, first + self.batch_size)
        images = self.order.epoch(epoch)[slots].tolist()
        # In a few large portions: handing single images to threads would cost as much as examining them.
        share = -(-len(slots) // (2 * self.threads))
        portions = [range(first, min(first + share, len(slots))) for first in range(0, len(slots), share)]

        def fill(portion: range) -> list[tuple[int, np.ndarray, tuple[int, int]]]:
            return [self._fill(step, epoch, int(slots[place]), images[place]) for place in portion]

        found = list(itertools.chain.from_iterable(self._readers.map(fill, portions)))
        shape = (len(slots), views(self.crops), DRAWS)
        uniforms = self.order.uniforms(epoch, slots, shape[1] * shape[2]).reshape(shape)
        sizes = np.array([size for _, _, size in found])
        return Batch(
            step,
            [image for image, _, _ in found],
            [data for _, data, _ in found],
            draw(self.crops, sizes, uniforms),
        )

    def _fill(self, step: int, epoch: int, slot: int, image: int) -> tuple[int, np.ndarray, tuple[int, int]]:
        """The image of a slot, or the first of its substitutes that can be used."""
        for candidate in itertools.chain([image], self.order.substitutes(image, epoch, slot)):
            candidate = int(candidate)
            if candidate not in self._bad:
                try:
                    return candidate, *load(self.images, candidate)
                except UnusableImageError as error:
                    self._reject(step, candidate, str(error))
        raise TooManyUnusableError(
            f"data: none of {2 * SUBSTITUTES} images tried in place of {self.images.name(image)} can be used "
            f"({self._bad[image][1]})"
        )

    def _reject(self, step: int, image: int, why: str) -> None:
        self._bad[image] = (step, why)
        self._check_limit()

    def _check_limit(self) -> None:
        allowed = self.max_unusable * len(self.images)
        if len(self._bad) > allowed:
            some = list(self._bad.items())[-SHOWN:]
            lines = "".join(f"\n  {self.images.name(bad)}: {reason}" for bad, (_, reason) in some)
            raise TooManyUnusableError(
                f"data: {len(self._bad)} of {len(self.images)} images cannot be used, more than "
                f"max_unusable = {self.max_unusable:g} allows; mend or remove them, or raise max_unusable; "
                f"`bincomm data verify` lists all. The last of them:{lines}"
            )

    def _reject_undecodable(self, batches: list[Batch]) -> bool:
        """Leave out the images of some batches that DALI cannot decode; returns whether there are any."""
        images, encoded, steps = [], [], []
        for batch in batches:
            images += batch.images
            encoded += batch.encoded
            steps += [batch.step] * len(batch.images)
        found = undecodable(encoded, self.device, self._readers)
        for place, why in found.items():
            if images[place] not in self._bad:
                self._reject(steps[place], images[place], why)
        return bool(found)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks' loaders as one, for any of them: it knows the unusable images of all."""
    met: dict[int, list] = {}
    for image, step, why in itertools.chain.from_iterable(state["unusable"] for state in states):
        if image not in met or step < met[image][1]:
            met[image] = [image, step, why]
    return {**states[0], "unusable": sorted(met.values(), key=lambda found: (found[1], found[0]))}


def eval_batches(
    source: Source,
    crops: Crops,
    *,
    crop_ratio: float = 0.875,
    batch_size: int,
    device: torch.device,
    threads: int = 4,
    report: Callable[[int, str], None] = lambda image, why: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Center crops (m, 3, S, S) of the global crops' size in the order of the images, normalized as in
    training, and the numbers of these m images in the source; those that cannot be used are left out and
    reported.

    The shorter side is resized to S/crop_ratio (bicubic, antialiased), of which the center is taken.
    """

    def build(given: Callable[[], tuple[list, list]]) -> Pipeline:
        return evaluation_pipeline(
            crops,
            given,
            resize=round(crops.global_size / crop_ratio),
            batch_size=batch_size,
            threads=threads,
            device_id=_device_id(device),
        )

    for indices, (images,) in usable_batches(source, build, batch_size, device, threads, report):
        yield indices, images


def usable_batches(
    source: Source,
    build: Callable[[Callable[[], tuple[list, list]]], Pipeline],
    batch_size: int,
    device: torch.device,
    threads: int,
    report: Callable[[int, str], None],
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """All images of a source, in order, through a pipeline: the numbers of a batch's images, and its outputs.

    `build` makes the pipeline from a function that returns encoded images and their `middles`. Images that
    cannot be used are left out, and `report` is called with the number of each and the reason.
    """
    given: list[list[np.ndarray]] = []
    pipeline = None

    def read(image: int) -> tuple[np.ndarray, tuple[int, int]] | str:
        try:
            return load(source.images, image)
        except UnusableImageError as error:
            return str(error)

    with ThreadPoolExecutor(threads, "bincomm-read") as readers:
        for first in range(0, len(source.images), batch_size):
            loaded = {}
            numbers = range(first, min(first + batch_size, len(source.images)))
            for image, found in zip(numbers, readers.map(read, numbers), strict=True):
                if isinstance(found, str):
                    report(image, found)
                else:
                    loaded[image] = found
            while loaded:
                encoded, sizes = zip(*loaded.values(), strict=True)
                given[:] = list(encoded), list(middles(np.array(sizes)))
                pipeline = pipeline or build(lambda: tuple(given))
                try:
                    outputs = _run(pipeline, device)
                except RuntimeError as error:
                    pipeline = None  # DALI cannot go on after an error
                    bad = undecodable(encoded, device, readers)
                    if not bad:
                        raise error
                    images = list(loaded)
                    for place, why in bad.items():
                        report(images[place], why)
                        del loaded[images[place]]
                else:
                    yield list(loaded), outputs
                    break


def undecodable(
    encoded: Sequence[np.ndarray], device: torch.device, readers: ThreadPoolExecutor
) -> dict[int, str]:
    """Places of those encoded images that DALI cannot decode on a device, and why."""
    # Pillow is asked first: it is quick to ask and has words for what is wrong. DALI's word is what counts.
    reasons = dict(enumerate(readers.map(why_not_whole, encoded)))
    suspected = [place for place, why in reasons.items() if why]
    refused = _refused(suspected, encoded, device) or _refused(reasons, encoded, device)
    return {place: reasons[place] or "DALI cannot decode it" for place in refused}


def _refused(places: Iterable[int], encoded: Sequence[np.ndarray], device: torch.device) -> list[int]:
    """Those of some places whose image DALI refuses when it is given that image alone."""
    given: list[np.ndarray] = []
    refused, pipeline = [], None
    for place in places:
        given[:] = [encoded[place]]
        pipeline = pipeline or decoding_pipeline(
            lambda: given, batch_size=1, threads=1, device_id=_device_id(device)
        )
        try:
            pipeline.run()
        except RuntimeError:
            refused.append(place)
            pipeline = None  # DALI cannot go on after an error
    return refused


def _run(pipeline: Pipeline, device: torch.device) -> list[Tensor]:
    """DALI's next outputs as tensors, without a copy: their memory is theirs as long as they live."""
    if device.type == "cuda":  # the outputs are then ordered with the work on this stream
        outputs = pipeline.run(torch.cuda.current_stream(device).cuda_stream)
    else:
        outputs = pipeline.run()
    return [torch.from_dlpack(output.as_tensor()) for output in outputs]


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
