"""Features, codes and pixels of images, in their order."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import nvidia.dali
import PIL
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import bincomm
from bincomm.data.cache import cache_folder
from bincomm.data.evaluation_batches import eval_batches
from bincomm.data.sources import Source
from bincomm.distributed.ranks import ALONE, Ranks
from bincomm.evaluation.identity import images_identity, weights_identity
from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import write_file

PIXELS = 16  # a million images of more would not fit in memory, and k-NN on pixels gains nothing from it
Report = Callable[[int, str], None]
Kept = tuple[dict[str, Tensor], list[tuple[int, str]]]  # of images, and those left out with the reason
VERSIONS = tuple(package.__version__ for package in (bincomm, torch, timm, nvidia.dali, PIL))


class FeatureBatch(NamedTuple):
    """A batch of images, one center crop each, on the device."""

    indices: list[int]  # their numbers in the source
    crops: Tensor  # (m, 3, S, S), normalized
    features: Tensor  # (m, D) of the backbone
    logits: Tensor | None  # (m, K) of the head, whose signs are the code; None where there is no head


@torch.no_grad()
def forward_batches(
    model: Pretrained, source: Source, report: Report = lambda image, why: None
) -> Iterator[FeatureBatch]:
    """A network's view of all images, in batches, in their order; unusable ones are left out and reported."""
    config = model.config
    with tqdm(total=len(source.images), desc="looking", unit="img", leave=False, disable=None) as bar:
        for numbers, crops in eval_batches(
            source,
            config.crops,
            crop_ratio=config.eval_crop,
            batch_size=min(256, config.batch_size),
            device=model.device,
            threads=config.threads,
            report=report,
        ):
            features = model.backbone(crops)
            logits = None if model.head is None else model.head.code(features)
            yield FeatureBatch(numbers, crops, features, logits)
            bar.update(len(numbers))


def extract(
    model: Pretrained,
    source: Source,
    report: Report = lambda image, why: None,
    *,
    pixels: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """What a network makes of images, one center crop each; unusable ones are left out and reported.

    Returns:
        "images" (n,) int64, the numbers of the images in the source; "features" (n, D) of the backbone;
        where there is a head "signs" (n, K) of its code as ±1; if asked for "pixels" (n, 3·s·s), the image
        itself averaged down to s = PIXELS a side where it is larger; fp32, CPU. Of several ranks each looks
        at a share, and all get everything.
    """
    share = list(range(ranks.rank, len(source.images), ranks.world))
    part = source if ranks.world == 1 else source.select(share)
    found: dict[str, list[Tensor]] = {"images": [], "features": [], "signs": [], "pixels": []}
    for seen in forward_batches(model, part, lambda image, why: report(share[image], why)):
        found["images"].append(torch.tensor(seen.indices))
        found["features"].append(seen.features.float().cpu())
        if seen.logits is not None:
            found["signs"].append(torch.where(seen.logits > 0, 1.0, -1.0).cpu())
        if pixels:
            side = min(PIXELS, seen.crops.shape[-1])
            found["pixels"].append(F.adaptive_avg_pool2d(seen.crops, side).flatten(1).float().cpu())
    kept = ["images", "features"] + ["signs"] * (model.head is not None) + ["pixels"] * pixels
    own = {name: torch.cat(found[name]) if found[name] else torch.empty(0) for name in kept}
    if ranks.world == 1:
        return own
    own["images"] = torch.tensor(share, dtype=torch.int64)[own["images"].long()]
    every = [one for one in ranks.gather(own) if len(one["images"])] or [own]
    joined = {name: torch.cat([one[name] for one in every]) for name in kept}
    order = joined["images"].argsort()
    return {name: value[order] for name, value in joined.items()}


def extract_cached(
    model: Pretrained, source: Source, report: Report = lambda image, why: None, *, ranks: Ranks = ALONE
) -> dict[str, Tensor]:
    """`extract`, from bincomm's cache where the same weights saw the same files in the same way before; rank
    0 alone gets what it found, and the others {}."""
    path, kept = Path(), None  # which rank 0 alone comes to know

    def look_up() -> bool:
        nonlocal path, kept
        path = cache_folder() / "features" / f"{identity(model, source)}.safetensors"
        kept = _read(path)
        return kept is not None

    if not ranks.first(look_up):
        left_out: list[tuple[int, str]] = []
        values = extract(model, source, lambda image, why: left_out.append((image, why)), ranks=ranks)
        kept = values, sorted(one for some in ranks.gather(left_out) for one in some)
        if ranks.rank == 0:
            _write(path, *kept)
    if ranks.rank:
        return {}
    values, every = kept
    for image, why in every:
        report(image, why)
    return values


def identity(model: Pretrained, source: Source) -> str:
    """A name for what a network sees of images: of its weights, of how they are shown, of the files, and of
    the software that all of this goes through."""
    config = model.config
    shown = (config.global_size, config.eval_crop, config.mean, config.std, model.device.type)
    seen = (weights_identity(model), images_identity(source, closely=True), shown, VERSIONS)
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:32]


def _read(path: Path) -> Kept | None:
    """What is kept in a file, or None where it is not whole."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            left_out = json.loads(file.metadata()["left_out"])
            names = file.keys()
            values = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    if "signs" in values:
        values["signs"] = values["signs"].float()
    return values, [tuple(one) for one in left_out]


def _write(path: Path, values: dict[str, Tensor], left_out: list[tuple[int, str]]) -> None:
    """Keep what was seen; where that is not possible the images are looked at again the next time."""
    kept = {name: (value.char() if name == "signs" else value).contiguous() for name, value in values.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = safetensors.torch.save(kept, metadata={"left_out": json.dumps(left_out)})
        write_file(path, lambda file: file.write(data))
    except OSError:
        pass
