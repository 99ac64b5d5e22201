"""Images to codes at rest (see `bincomm.codes.storage`): a job that can be interrupted and continued, on any
number of ranks."""

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bincomm.codes.storage import (
    Part,
    describe_difference,
    open_part,
    open_parts,
    to_codes,
    verify_part,
    write_part,
)
from bincomm.data.export import write_unusable
from bincomm.data.images import UnusableImageError, read
from bincomm.data.sources import Source
from bincomm.distributed.ranks import ALONE, Ranks
from bincomm.engine.lock import open_run
from bincomm.evaluation.features import forward_batches
from bincomm.evaluation.identity import images_identity, weights_identity
from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import write_json
from bincomm.logs import progress_bar
from bincomm.ops.messages import pack_signs

FORMAT = 2  # of the files, and of the crops that they are codes of
METADATA = "encode.json"  # the weights and images of the codes, and the preprocessing of the images
POLL_SECONDS = 0.2  # between two checks for the parts of other ranks
READ_ERRORS = set(map(os.strerror, errno.errorcode))  # reasons for which an image may be readable later


class Encoded(NamedTuple):
    """What a folder of codes holds."""

    codes: int
    bits: int
    unusable: list[tuple[str, str]]  # names of the images without a code, in their order, and why
    parts: int
    written: int  # of the parts, by this call


def encode(
    model: Pretrained,
    source: Source,
    output: str | Path,
    *,
    features: bool = False,
    ranks: Ranks = ALONE,
    rows: int | None = None,
) -> Encoded:
    """Write the codes of all images, or of those that an earlier call with the same arguments left.

    File `part-00000.parquet` and its successors have `rows` images each, in the source's order, and appear
    when they are complete. The missing ones are divided among the ranks, however many there are now; on one
    kind of device and with one batch size a part is always the same, byte for byte. Images that cannot be
    used are left out and listed in `unusable.txt` once all parts exist. A later call writes a part again
    that lacks images which could not be read, because a disk was missing for example, and now can be.

    Args:
        model: with a head, as from `load_pretrained`.
        output: the folder, visible to all ranks.
        features: write the backbone's features, too.
        rows: images of a part; None: a 64th of all, so that ranks share them and an interruption loses
            little, but at least 4 096, because starting a part takes a moment, and at most 65 536.

    Raises:
        ValueError: the weights have no head, or give NaN; the folder is of other weights, images or options,
            holds a damaged file, or another process writes in it; no image can be used.
        OSError: it cannot be written, for want of space for example.
    """
    if model.head is None:
        raise ValueError(
            f"weights: expected a head, the signs of whose logits are the code, got {model.name} without; "
            "a run's directory and a checkpoint have one"
        )
    if rows is None:
        rows = min(1 << 16, max(1 << 12, -(-len(source.images) // 64)))
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    if not len(source.images):
        raise ValueError("data: expected at least one image, got none")
    starts = range(0, len(source.images), rows)
    with open_run(str(output), ranks) as folder:
        paths = [folder / f"part-{number:05}.parquet" for number in range(len(starts))]

        def begin() -> tuple[dict[str, Any], list[int]]:
            metadata = _write_or_compare_metadata(folder, _metadata(model, source, features, rows))
            for start, path in zip(starts, paths, strict=True):
                if path.exists():
                    verify_part(part := open_part(path))
                    if _can_be_completed(part, ImageRange(source, start, rows)):
                        path.unlink()
            return metadata, [number for number, path in enumerate(paths) if not path.exists()]

        metadata, missing = ranks.first(begin)
        own = [ImageRange(source, starts[number], rows) for number in missing[ranks.rank :: ranks.world]]
        with progress_bar(
            total=sum(map(len, own)), desc="encoding", unit="img", disable=bool(ranks.rank)
        ) as bar:
            for images in own:
                _encode_part(model, images, metadata, paths[images.first // rows])
                bar.update(len(images))
        # Not in a collective operation, whose patience has a limit: a part may take another rank longer.
        while not all(paths[number].exists() for number in missing):
            time.sleep(POLL_SECONDS)

        def end() -> Encoded:
            parts = open_parts(folder)
            unusable = [image for part in parts for image in part.unusable]
            write_unusable(folder / "unusable.txt", unusable)
            codes = sum(part.rows for part in parts)
            if not codes:
                raise ValueError(f"data: none of {len(source.images)} images can be used")
            return Encoded(codes, metadata["bits"], unusable, len(parts), len(missing))

        return ranks.first(end)


class ImageRange:
    """A contiguous range of the images of a source, mixes included: `Images` themselves."""

    def __init__(self, source: Source, first: int, count: int):
        self.source, self.first = source, first
        self.count = min(count, len(source.images) - first)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.source.images.name(self.first + index)

    def names(self) -> Iterator[str]:
        return map(self.name, range(self.count))

    def read(self, index: int) -> np.ndarray:
        return self.source.images.read(self.first + index)

    def label(self, index: int) -> str | None:
        labels = self.source.labels
        return None if labels is None else self.source.classes[labels[self.first + index]]


@torch.no_grad()
def _metadata(model: Pretrained, source: Source, features: bool, rows: int) -> dict[str, Any]:
    """Everything that the codes depend on."""
    config, width = model.config, None
    if features:
        side = config.global_size
        width = model.backbone(torch.zeros(1, config.channels, side, side, device=model.device)).shape[-1]
    return {
        "format": FORMAT,
        "weights": model.name,
        "identity": weights_identity(model),
        "bits": config.bits,
        "features": width,
        "global_size": config.global_size,
        "eval_crop": config.eval_crop,
        "mean": list(config.mean),
        "std": list(config.std),
        **({} if config.pixel_range is None else {"pixel_range": list(config.pixel_range)}),
        "images": len(source.images),
        "images_identity": images_identity(source),
        "rows": rows,
    }


def _write_or_compare_metadata(folder: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Write the metadata into a new folder, or check that those in it are the same; returns what is there."""
    path = folder / METADATA
    part = next(folder.glob("part-*.parquet"), None)
    if not path.exists():
        if part is not None:
            raise ValueError(f"output: expected a new folder, or {METADATA} beside {part}, got none")
        write_json(path, metadata)
        return metadata
    try:
        there = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"output: {path} cannot be read: {error}; expected as it was written") from error
    difference = describe_difference(there, metadata)
    if difference:
        raise ValueError(
            f"output: {folder} is of other codes: {difference}; expected the same, or a new folder"
        )
    if part is not None:
        difference = describe_difference(there, open_parts(folder)[0].metadata)
        if difference:
            raise ValueError(f"output: the files in {folder} are not of its {METADATA}: {difference}")
    return there


def _can_be_completed(part: Part, images: ImageRange) -> bool:
    """Whether a file lacks an image that could not be read at that time and can be read now."""
    unread = {name for name, why in part.unusable if why in READ_ERRORS}
    for number in range(len(images)) if unread else ():
        if images.name(number) in unread:
            try:
                read(images, number)
                return True
            except UnusableImageError:
                pass
    return False


def _encode_part(model: Pretrained, images: ImageRange, metadata: dict[str, Any], path: Path) -> None:
    unusable: list[tuple[int, str]] = []
    numbers: list[int] = []
    messages, features = [torch.empty(0, -(-metadata["bits"] // 32), dtype=torch.int32)], []
    if metadata["features"] is not None:
        features.append(torch.empty(0, metadata["features"]))
    source = Source(images)
    for batch in forward_batches(model, source, lambda image, why: unusable.append((image, why))):
        assert batch.logits is not None  # the model has a head
        numbers += batch.indices
        messages.append(pack_signs(batch.logits).cpu())
        if features:
            features.append(batch.features.float().cpu())
    write_part(
        path,
        [images.name(number) for number in numbers],
        [images.label(number) for number in numbers],
        to_codes(torch.cat(messages), metadata["bits"]),
        metadata,
        features=torch.cat(features).numpy() if features else None,
        unusable=[(images.name(number), why) for number, why in sorted(unusable)],
    )
