"""Messages at rest: what a frozen teacher says of every global crop of so many epochs, before the run.

A folder holds `messages.json`, the manifest, and for every epoch files `epoch-00000-00000.safetensors`, whose
second number counts the parts of the epoch. A part has the messages of its crops, "messages"
(images, 2, ⌈K/32⌉) int32, in the order in which a run draws the images, and which images these are, "images"
(images,) int32. Its metadata name the manifest, the part itself and the CRC-32 of both tensors.

A folder may be someone else's: every field of the manifest is checked, and then compared with what the run
itself is; nothing in it is a path, and files are read only by the names and in the shapes that the run says.
"""

import hashlib
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bincomm.config import PretrainConfig
from bincomm.data.crops import Crops
from bincomm.data.sources import Source
from bincomm.files import write_file, write_json
from bincomm.logs import printable_name

MANIFEST = "messages.json"
LARGEST_MANIFEST = 1 << 20  # bytes
FORMAT = 1
PART = 1 << 24  # bytes of a file, at most, unless a single batch has more
HEADER = 272  # bytes of a file beside its tensors, about
SAMPLE = 64  # images whose bytes are part of the fingerprint of the data
LOCAL_KEYS = ("local_size", "local_scale")  # of the crops: those of the global ones do not depend on them
COUNTS = {"bits": 2**16, "epochs": 10**9, "batch_size": 2**24, "images": 2**31 - 1, "images_a_pass": 2**24}


class Layout(NamedTuple):
    """How messages are divided into files; the same for everybody who knows these numbers."""

    bits: int  # K
    batch_size: int  # of all ranks
    epoch_steps: int  # batches of an epoch

    @property
    def words(self) -> int:
        """⌈K/32⌉."""
        return -(-self.bits // 32)

    @property
    def image_bytes(self) -> int:
        """Of the messages of an image's two crops, and of its number."""
        return 2 * 4 * self.words + 4

    @property
    def part_steps(self) -> int:
        """Batches of a part; the last one of an epoch may have fewer."""
        return max(1, PART // (self.batch_size * self.image_bytes))

    @property
    def epoch_parts(self) -> int:
        """Parts of an epoch."""
        return -(-self.epoch_steps // self.part_steps)

    def epoch_bytes(self) -> int:
        """Of an epoch's files, about."""
        return self.epoch_steps * self.batch_size * self.image_bytes + self.epoch_parts * HEADER

    def part_images(self, part: int) -> tuple[int, int]:
        """The slots of an epoch that a part has: the first one, and their number."""
        first = part * self.part_steps
        steps = min(self.part_steps, self.epoch_steps - first)
        return first * self.batch_size, steps * self.batch_size

    def name(self, epoch: int, part: int) -> str:
        """The file of a part."""
        return f"epoch-{epoch:05}-{part:05}.safetensors"


def layout_of(config: PretrainConfig, source: Source) -> Layout:
    """The files of a run's messages."""
    return Layout(config.bits, config.batch_size, len(source.images) // config.batch_size)


def describe(config: PretrainConfig, source: Source) -> dict[str, Any]:
    """What the messages of a run depend on, beside the teacher: as the manifest has it."""
    crops = {key: value for key, value in vars(config.crops).items() if key not in LOCAL_KEYS}
    return {
        "format": FORMAT,
        "bits": config.bits,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "images": len(source.images),
        "data": data_fingerprint(source),
        "crops": {key: list(value) if isinstance(value, tuple) else value for key, value in crops.items()},
    }


def data_fingerprint(source: Source) -> str:
    """A name for images and their shares, which copies of them have, too: of their names without folders, of
    the bytes of a sample, and of the weights of several sources."""
    digest, count = hashlib.sha256(repr(source.weights).encode()), len(source.images)
    for name in source.images.names():
        digest.update(name.rpartition("/")[2].encode(errors="surrogateescape") + b"\0")
    for index in np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).astype(int)).tolist():
        try:
            digest.update(hashlib.sha256(source.images.read(index).data).digest())
        except (OSError, ValueError):  # which the loader leaves out
            digest.update(b"unreadable")
    return digest.hexdigest()[:32]


def identity(manifest: dict[str, Any]) -> str:
    """A name for a manifest, which its files have."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:32]


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a folder's manifest."""
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, every field of which has been checked.

    Raises:
        ValueError: there is none, or a field is missing, unknown, or has another type or range.
    """
    try:
        with open(folder / MANIFEST, "rb") as file:
            data = file.read(LARGEST_MANIFEST + 1)
        if len(data) > LARGEST_MANIFEST:
            raise ValueError("it is larger than a megabyte")
        manifest = json.loads(data.decode())
    except FileNotFoundError as error:
        raise ValueError(
            f"messages: expected a folder of `bincomm messages`, got {folder}, without {MANIFEST}"
        ) from error
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"messages: {folder / MANIFEST} cannot be read: {error}") from error
    for key, problem in problems(manifest):
        raise ValueError(f"messages: {folder / MANIFEST}: {key}: {printable_name(problem)[:300]}")
    return manifest


def problems(manifest: Any) -> list[tuple[str, str]]:
    """The first field of a manifest that is not as it must be, and what was expected."""
    fields = {*COUNTS, "format", "seed", "data", "crops", "teacher", "precision"}
    if not isinstance(manifest, dict) or manifest.keys() != fields:
        got = sorted(map(str, manifest)) if isinstance(manifest, dict) else type(manifest).__name__
        return [("its fields", f"expected {', '.join(sorted(fields))}, got {got}")]
    for key, value in manifest.items():
        if key in ("data", "teacher"):
            valid, expected = is_text(value, r"[0-9a-f]{32}"), "32 hexadecimal digits"
        elif key == "precision":
            valid, expected = value in ("bf16", "fp32"), "bf16 or fp32"
        elif key == "crops":
            names = set(Crops.__dataclass_fields__) - set(LOCAL_KEYS)
            valid = isinstance(value, dict) and value.keys() == names and all(map(is_plain, value.values()))
            expected = f"numbers for {', '.join(sorted(names))}"
        else:
            least, most = {"format": (FORMAT, FORMAT), "seed": (0, 2**63 - 1)}.get(
                key, (1, COUNTS.get(key, 1))
            )
            valid = type(value) is int and least <= value <= most
            expected = f"an integer from {least} to {most}"
        if not valid:
            return [(key, f"expected {expected}, got {value!r}")]
    return []


def is_text(value: Any, pattern: str) -> bool:
    """Whether a value is a text of a pattern."""
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_plain(value: Any) -> bool:
    """Whether a value of the crops is a finite number, none, or a list of numbers."""
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(
        type(number) is int or (type(number) is float and math.isfinite(number)) for number in numbers
    )


def refuse_other_messages(manifest: dict[str, Any], own: dict[str, Any], folder: Path) -> None:
    """Raise ValueError, naming the key, where the messages of a folder are not those of a run.

    Args:
        own: what the run's depend on, of `describe`, and more fields of a manifest.
    """
    pairs = {key: (manifest[key], own[key]) for key in own if key not in ("crops", "data", "images")}
    pairs |= {key: (manifest["crops"][key], value) for key, value in own["crops"].items()}
    for key, (there, here) in pairs.items():
        if there != here:
            raise ValueError(f"{key}: expected {there}, which the messages in {folder} are of, got {here}")
    there, here = ((each["images"], each["data"]) for each in (manifest, own))
    if there != here:
        raise ValueError(
            f"data: expected the {there[0]} images that the messages in {folder} are of (fingerprint "
            f"{there[1]}), got {here[0]} ({here[1]})"
        )


def write_part(
    folder: Path, layout: Layout, epoch: int, part: int, messages: Tensor, images: Tensor, manifest: str
) -> None:
    """Write a part, completely or not at all: messages (n, 2, ⌈K/32⌉) and images (n,), int32.

    Args:
        manifest: its `identity`.
    """
    name = layout.name(epoch, part)
    metadata = {"manifest": manifest, "part": name, "crc32": str(checksum(messages, images))}
    # The metadata of a file are in no order that lasts, but here nothing compares files.
    data = safetensors.torch.save({"messages": messages, "images": images}, metadata=metadata)
    write_file(folder / name, lambda file: file.write(data))


def checksum(messages: Tensor, images: Tensor) -> int:
    """The CRC-32 of a part's tensors."""
    return zlib.crc32(images.numpy().data, zlib.crc32(messages.numpy().data))


def read_part(folder: Path, layout: Layout, epoch: int, part: int, manifest: str) -> tuple[Tensor, Tensor]:
    """Messages (n, 2, ⌈K/32⌉) and images (n,) of a part, int32.

    Raises:
        ValueError: it cannot be read, is of other messages, or damaged.
    """
    name, count = layout.name(epoch, part), layout.part_images(part)[1]
    path, shapes = folder / name, {"messages": [count, 2, layout.words], "images": [count]}
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("manifest") != manifest or metadata.get("part") != name:
                raise ValueError(f"it is not of the {MANIFEST} beside it")
            found = {}
            for key in file.keys():  # noqa: SIM118  (it is no dict)
                tensor = file.get_slice(key)
                found[key] = tensor.get_shape() if tensor.get_dtype() == "I32" else tensor.get_dtype()
            if found != shapes:
                raise ValueError(
                    f"expected int32 tensors of shapes {shapes}, got {printable_name(str(found))}"
                )
            messages, images = file.get_tensor("messages"), file.get_tensor("images")
        if metadata.get("crc32") != str(checksum(messages, images)):
            raise ValueError("its checksum is wrong")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"messages: {path} cannot be used: {error}; once it is removed, the same `bincomm messages` "
            "makes it again"
        ) from error
    return messages, images


class StoredMessages:
    """The messages of a run's batches, from a folder.

    Args:
        config: of the run, whose key `messages` names the folder.
        source: its images.
        manifest: that of the folder, which has been compared with the run's own.
        device: of the messages.
        rank, batch_size: of this rank, and the images that it has of a batch.
    """

    def __init__(
        self,
        config: PretrainConfig,
        source: Source,
        manifest: dict[str, Any],
        device: torch.device,
        rank: int,
        batch_size: int,
    ):
        assert config.messages is not None
        self.folder, self.device = Path(config.messages), device
        self.layout, self.images = layout_of(config, source), source.images
        self.manifest = identity(manifest)
        self.steps = manifest["epochs"] * self.layout.epoch_steps  # that there are messages for
        self.first, self.batch_size = rank * batch_size, batch_size
        self._place: tuple[int, int] | None = None  # the epoch and part that are in memory
        self._part = torch.empty(0), torch.empty(0)

    def of(self, step: int, images: list[int]) -> Tensor:
        """The messages (2, n, ⌈K/32⌉) int32 of this rank's part of a batch, on the device.

        Args:
            step: of the batch, which counts from 0.
            images: the numbers of its images.

        Raises:
            ValueError: they are of other images, because one could not be read at that time or now, or the
                file cannot be read.
        """
        epoch, position = divmod(step, self.layout.epoch_steps)
        part, inside = divmod(position, self.layout.part_steps)
        if (epoch, part) != self._place:
            self._part = read_part(self.folder, self.layout, epoch, part, self.manifest)
            self._place = epoch, part
        first = inside * self.layout.batch_size + self.first
        messages, encoded = (tensor[first : first + self.batch_size] for tensor in self._part)
        for there, here in zip(encoded.tolist(), images, strict=True):
            if there != here:
                name = printable_name(self.images.name(here))
                raise ValueError(
                    f"messages: expected image {there} of the data at step {step}, which was encoded, got "
                    f"{here}, {name}: one of them could not be read then or now (`bincomm data verify`)"
                )
        pinned = torch.empty(
            (2, self.batch_size, self.layout.words),
            dtype=torch.int32,
            pin_memory=self.device.type == "cuda",
        )
        return pinned.copy_(messages.transpose(0, 1)).to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint holds: which messages the run is trained with."""
        return {"messages": self.manifest}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Go on with the messages of a checkpoint.

        Raises:
            ValueError: these are others.
        """
        if state["messages"] != self.manifest:
            raise ValueError(
                f"messages: expected those that the run began with, of manifest {state['messages']}, got "
                f"{self.manifest}: {self.folder} was changed; choose another --output"
            )


def check_messages(config: PretrainConfig, source: Source) -> dict[str, Any]:
    """The manifest of the messages that a configuration names, where they are the run's own and complete.

    Raises:
        ValueError: they are of other data, crops, sizes or another seed, of too few epochs, or lack files.
    """
    assert config.messages is not None
    folder, layout = Path(config.messages), layout_of(config, source)
    manifest = read_manifest(folder)
    refuse_other_messages(manifest, describe(config, source), folder)
    needed = -(-config.steps(layout.epoch_steps) // layout.epoch_steps)
    if needed > manifest["epochs"]:
        raise ValueError(
            f"epochs: expected at most {manifest['epochs']}, of which {folder} holds the messages, got "
            f"{needed}"
        )
    for epoch in range(needed):
        for part in range(layout.epoch_parts):
            if not (folder / layout.name(epoch, part)).is_file():
                raise ValueError(
                    f"messages: {folder / layout.name(epoch, part)} is missing; the same `bincomm messages` "
                    "writes what is missing"
                )
    return manifest
