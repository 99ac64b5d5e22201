"""Messages of a frozen teacher, written before a run: a job that can be interrupted and continued, on any
number of ranks."""

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bincomm.config import PretrainConfig
from bincomm.configuration import configure as configure_run
from bincomm.data.loader import Loader
from bincomm.data.sources import Source, open_source
from bincomm.distributed.ranks import Ranks, join_ranks
from bincomm.engine.frozen_teacher import FrozenTeacher, choose_codes, create_global_loader
from bincomm.engine.job import check_shares
from bincomm.engine.lock import open_run
from bincomm.engine.stored_messages import (
    MANIFEST,
    Layout,
    describe,
    identity,
    layout_of,
    read_manifest,
    refuse_other_messages,
    write_manifest,
    write_part,
)
from bincomm.files import check_folder
from bincomm.logs import progress_bar

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between two checks for the parts of other ranks


class Written(NamedTuple):
    """What a folder of messages holds."""

    epochs: int
    crops: int  # of all epochs
    bits: int
    size: int  # bytes
    parts: int
    written: int  # of the parts, by this call


def configure(weights: str | Sequence[str], recipe: str | None = None, **keys: Any) -> PretrainConfig:
    """The configuration of the runs that the messages are for: that of `bincomm pretrain` with these keys.

    Args:
        weights: of the teacher, or of several, as the key teacher.
        recipe, keys: as of `bincomm.configuration.configure`; the output is the folder of the messages.

    Raises:
        ValueError: there is no output, or the number of epochs is open; or as `configure` there.
    """
    for key in ("teacher", "messages"):
        if keys.get(key):
            raise ValueError(f"{key}: expected the teacher's weights alone, got {keys[key]}; leave it out")
    if keys.get("output") is None:
        raise ValueError("output: expected a folder for the messages, got none")
    config = configure_run(recipe, **{**keys, "teacher": weights})
    if config.steps_are_open:
        raise ValueError(
            f"minutes: expected a number of epochs in their place, got {config.minutes:g}; give --epochs"
        )
    return config


def write_messages(config: PretrainConfig) -> Written | None:
    """Write the messages of every global crop of a run of this configuration, or those that an earlier call
    left; all ranks call it, and those after the first return None.

    The parts that are missing are divided among the ranks, however many there are now. The teacher is shown
    as many images at a time as one of these ranks would have in a run, which is noted when a folder is begun
    and kept: other numbers round otherwise.

    Raises:
        ValueError: the weights or the data do not allow it; the folder is of other messages, or in use.
        TooManyUnusableError: more images than `config.max_unusable` allows cannot be used.
        OSError: it cannot be written, for want of space for example.
    """
    with join_ranks(config.device) as ranks:
        ranks.first(lambda: check_folder("output", config.output))
        source = ranks.leaders_first(lambda: open_source(config.data))
        layout = layout_of(config, source)
        ranks.first(lambda: check_sizes(config, layout, source, ranks))
        teacher = ranks.leaders_first(lambda: FrozenTeacher(config, ranks.device))
        with open_run(config.output, ranks) as folder:
            manifest = ranks.first(lambda: begin(folder, config, source, layout, teacher, ranks))
            choose_codes(teacher, config, source, ranks)
            places = [
                (epoch, part) for epoch in range(manifest["epochs"]) for part in range(layout.epoch_parts)
            ]
            paths = {place: folder / layout.name(*place) for place in places}
            missing = ranks.first(lambda: [place for place in places if not paths[place].exists()])
            own = missing[ranks.rank :: ranks.world]
            write_parts(own, folder, manifest, config, source, layout, teacher, ranks)
            # Not in a collective operation, whose patience has a limit: a part may take another rank longer.
            while not all(paths[place].exists() for place in missing):
                time.sleep(POLL_SECONDS)
            if ranks.rank:
                return None
            return Written(
                manifest["epochs"],
                2 * manifest["epochs"] * layout.epoch_steps * layout.batch_size,
                config.bits,
                sum(path.stat().st_size for path in paths.values()),
                len(places),
                len(missing),
            )


def check_sizes(config: PretrainConfig, layout: Layout, source: Source, ranks: Ranks) -> None:
    """Raise ValueError for a batch that the data or the ranks do not allow."""
    if not layout.epoch_steps:
        raise ValueError(
            f"batch_size: expected at most the number of images, {len(source.images)}, got "
            f"{layout.batch_size}"
        )
    check_shares(config, ranks)


def begin(
    folder: Path,
    config: PretrainConfig,
    source: Source,
    layout: Layout,
    teacher: FrozenTeacher,
    ranks: Ranks,
) -> dict[str, Any]:
    """Write the manifest of a new folder, or compare that of one that was begun; says what will be written.

    Raises:
        ValueError: the folder is of other messages.
    """
    own = {
        **describe(config, source),
        "teacher": teacher.fingerprint,
        "precision": config.precision,
        "epochs": -(-config.steps(layout.epoch_steps) // layout.epoch_steps),
    }
    size = own["epochs"] * layout.epoch_bytes()
    logger.info(
        f"messages of {own['epochs']} epochs, {layout.epoch_steps * layout.batch_size} images × 2 crops × "
        f"{config.bits} bits each: {in_bytes(size)} in {config.output}, of "
        f"{in_bytes(shutil.disk_usage(folder).free)} that are free"
    )
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        refuse_other_messages(manifest, own, folder)
        return manifest
    manifest = {**own, "images_a_pass": config.batch_size // (ranks.world * config.accumulate)}
    write_manifest(folder, manifest)
    return manifest


def in_bytes(count: int) -> str:
    """A number of bytes in words."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1000:.3g} kB"


def write_parts(
    places: Sequence[tuple[int, int]],
    folder: Path,
    manifest: dict[str, Any],
    config: PretrainConfig,
    source: Source,
    layout: Layout,
    teacher: FrozenTeacher,
    ranks: Ranks,
) -> None:
    """Write parts, by epoch and number, on this rank alone."""
    if ranks.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes never change
    of = identity(manifest)
    loader = create_global_loader(config, source, ranks.device, manifest["images_a_pass"])
    sizes = [layout.part_images(part)[1] for _, part in places]
    with progress_bar(total=sum(sizes), desc="encoding", unit="img", disable=bool(ranks.rank)) as bar:
        for (epoch, part), size in zip(places, sizes, strict=True):
            messages, images = encode_part(loader, layout, epoch, part, teacher, config.precision == "bf16")
            write_part(folder, layout, epoch, part, messages, images, of)
            bar.update(size)
    if loader.unusable:
        logger.warning(
            "%d images cannot be used, and others were taken in their place (`bincomm data verify` names "
            "them); a run must meet the same ones",
            len(loader.unusable),
        )


@torch.inference_mode()
def encode_part(
    loader: Loader, layout: Layout, epoch: int, part: int, teacher: FrozenTeacher, autocast: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Messages (n, 2, ⌈K/32⌉) and images (n,) of a part, int32, on the CPU."""
    first, count = layout.part_images(part)
    # The loader's batches are parts of the run's, and its epochs have more of them where images are left.
    loader.seek(epoch * loader.steps_per_epoch + first // loader.batch_size)
    messages, images = [], []
    for _ in range(count // loader.batch_size):
        views, _ = loader.next()
        with torch.autocast(loader.device.type, torch.bfloat16, enabled=autocast):
            messages.append(teacher(views))  # read once for all, so that nothing waits for a GPU
        images += loader.indices
    return torch.cat(messages, 1).transpose(0, 1).contiguous().cpu(), torch.tensor(images, dtype=torch.int32)


def summary(written: Written, output: str) -> str:
    """What the command prints."""
    return (
        f"messages of {written.epochs} epochs, {written.crops} crops of {written.bits} bits, "
        f"{in_bytes(written.size)} in {written.parts} files in {output}"
    )
