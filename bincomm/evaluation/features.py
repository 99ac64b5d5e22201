"""Features and codes of images, in their order."""

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
from safetensors import SafetensorError
from torch import Tensor

import bincomm
from bincomm.data.cache import cache_folder, make_folder
from bincomm.data.evaluation_batches import eval_batches
from bincomm.data.sources import Source
from bincomm.distributed.ranks import ALONE, Ranks
from bincomm.evaluation.identity import images_identity, weights_identity
from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import write_file
from bincomm.logs import printable_name, progress_bar

Report = Callable[[int, str], None]  # of the index of an image that cannot be used, and the reason
Unusable = list[tuple[int, str]]
Features = dict[str, Tensor]  # see `extract_features`
LAYOUT = 3  # of a cached file, and of the crops
VERSIONS = tuple(package.__version__ for package in (bincomm, torch, timm, nvidia.dali, PIL))


class FeatureBatch(NamedTuple):
    """A batch of images, one center crop each, on the device."""

    indices: list[int]  # of the m images in the source
    crops: Tensor  # (m, C, S, S), normalized
    features: Tensor  # (m, D) of the backbone
    logits: Tensor | None  # (m, K) of the head, whose signs are the code; None where there is no head


@torch.no_grad()
def forward_batches(
    model: Pretrained, source: Source, report: Report = lambda index, reason: None
) -> Iterator[FeatureBatch]:
    """Pass all images through a network, in batches, in their order; unusable ones are left out and
    reported.

    Raises:
        ValueError: the logits of an image are NaN, which are no code.
    """
    config = model.config
    with progress_bar(total=len(source.images), desc="computing features", unit="img", leave=False) as bar:
        for indices, crops in eval_batches(
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
            wrong = [] if logits is None else logits.isnan().any(-1).nonzero().flatten().tolist()
            if wrong:
                name = printable_name(source.images.name(indices[wrong[0]]))
                raise ValueError(
                    f"weights: {model.name} gives logits that are NaN for {name}; expected numbers"
                )
            yield FeatureBatch(indices, crops, features, logits)
            bar.update(len(indices))


def extract_features(
    model: Pretrained,
    source: Source,
    report: Report = lambda index, reason: None,
    *,
    ranks: Ranks = ALONE,
) -> Features:
    """Features and codes of images, one center crop each; unusable ones are left out and reported at the end.

    Returns:
        "indices" (n,) int64 of the images in the source; "features" (n, D) of the backbone; where there is a
        head "signs" (n, K) of its code as ±1; fp32, CPU. Of several ranks each computes a share and gets
        everything; rank 0 reports.
    """
    share = list(range(ranks.rank, len(source.images), ranks.world))
    part = source if ranks.world == 1 else source.select(share)
    names = ["indices", "features"] + ["signs"] * (model.head is not None)
    batches: dict[str, list[Tensor]] = {name: [] for name in names}
    unusable: Unusable = []
    for batch in forward_batches(model, part, lambda index, reason: unusable.append((share[index], reason))):
        batches["indices"].append(torch.tensor([share[index] for index in batch.indices]))
        batches["features"].append(batch.features.float().cpu())
        if batch.logits is not None:
            batches["signs"].append(torch.where(batch.logits > 0, 1.0, -1.0).cpu())
    own = {name: torch.cat(each) if each else torch.empty(0) for name, each in batches.items()}
    parts = ranks.gather((own, unusable))
    if ranks.rank == 0:
        for index, reason in sorted(one for _, others in parts for one in others):
            report(index, reason)
    if ranks.world == 1:
        return own
    nonempty = [values for values, _ in parts if len(values["indices"])] or [own]
    joined = {name: torch.cat([values[name] for values in nonempty]) for name in names}
    order = joined["indices"].argsort()
    return {name: values[order] for name, values in joined.items()}


def extract_features_cached(
    model: Pretrained,
    source: Source,
    report: Report = lambda index, reason: None,
    *,
    ranks: Ranks = ALONE,
) -> Features:
    """`extract_features`, from bincomm's cache if it has them for the same weights, files and preprocessing.
    Rank 0 gets them, and the others {}."""
    path, cached = Path(), None  # set on rank 0 only

    def look_up() -> bool:
        nonlocal path, cached
        path = cache_folder("features") / f"{identity(model, source)}.safetensors"
        cached = _read(path)
        return cached is not None

    if not ranks.first(look_up):
        unusable: Unusable = []
        values = extract_features(
            model, source, lambda index, reason: unusable.append((index, reason)), ranks=ranks
        )
        cached = values, unusable
        if ranks.rank == 0:
            _write(path, *cached)
    if cached is None or ranks.rank:
        return {}
    values, unusable = cached
    for index, reason in unusable:
        report(index, reason)
    return values


def identity(model: Pretrained, source: Source) -> str:
    """A key for the features of images, from the network's weights, the preprocessing, the files, and the
    versions of the software."""
    config = model.config
    preprocessing = [config.global_size, config.eval_crop, config.mean, config.std, model.device.type]
    if not config.crops.rgb:
        preprocessing.append(config.pixel_range)
    images = images_identity(source, closely=True)
    parts = (LAYOUT, weights_identity(model), images, tuple(preprocessing), VERSIONS)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> tuple[Features, Unusable] | None:
    """The content of a cached file; None if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            unusable = json.loads(file.metadata()["unusable"])
            names = file.keys()
            values = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    if "signs" in values:
        values["signs"] = values["signs"].float()
    return values, [(index, reason) for index, reason in unusable]


def _write(path: Path, values: Features, unusable: Unusable) -> None:
    """Write features into the cache; if that fails they are computed again the next time."""
    stored = {
        name: (value.char() if name == "signs" else value).contiguous() for name, value in values.items()
    }
    try:
        make_folder(path.parent)
        data = safetensors.torch.save(stored, metadata={"unusable": json.dumps(unusable)})
        write_file(path, lambda file: file.write(data))
    except OSError:
        pass
