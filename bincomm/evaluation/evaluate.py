"""What a run's backbone and codes are worth at its end."""

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from bincomm import __version__
from bincomm.bits import bit_statistics
from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.data.sources import Source
from bincomm.logs import printable
from bincomm.evaluation.features import extract
from bincomm.evaluation.knn import knn_accuracy
from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import read_json_lines
from bincomm.networks import Network
from bincomm.ops.coding_rate import rate_ceiling


def evaluate(
    teacher: Network,
    sources: tuple[Source, Source, bool] | None,
    config: PretrainConfig,
    run: Path,
    device: torch.device,
) -> dict[str, Any]:
    """k-NN of the teacher, of the same network before training, of pixels and codes; use of the bits."""
    metrics = read_json_lines(run / "metrics.jsonl")
    result: dict[str, Any] = {
        "last_metrics": metrics[-1] if metrics else {},
        "rate_ceiling": rate_ceiling(
            torch.tensor(config.batch_size, dtype=torch.float64), config.bits, config.eps_squared
        ).item(),
        "versions": {"bincomm": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "machine": {"device": device.type, "python": platform.python_version()},
    }
    if sources is None:
        return {**result, "knn": None}
    gallery, queries, held_out = sources

    def tell(image: int, why: str) -> None:
        print(printable(f"left out of the queries: {queries.images.name(image)}: {why}"))

    # What cannot be used of the pretraining images was told when they were trained on.
    model = Pretrained.of(teacher, config, device)
    trained = [
        extract(model, gallery, pixels=True),
        extract(model, queries, pixels=True, **({"report": tell} if held_out else {})),
    ]
    if not all(len(found["images"]) for found in trained):
        return {**result, "knn": None}
    untrained = Pretrained.of(create_networks(replace(config, fsdp=False), device)[1], config, device)
    before = [extract(untrained, source) for source in (gallery, queries)]
    labels = [
        torch.from_numpy(source.labels)[found["images"]]
        for source, found in zip((gallery, queries), trained, strict=True)
    ]

    def knn(gallery_features: torch.Tensor, query_features: torch.Tensor) -> float:
        return knn_accuracy(*(x.to(device) for x in (gallery_features, labels[0], query_features, labels[1])))

    signs = trained[1]["signs"]
    return {
        **result,
        "knn": {
            "teacher": knn(trained[0]["features"], trained[1]["features"]),
            "codes": knn(trained[0]["signs"], trained[1]["signs"]),
            "before_training": knn(before[0]["features"], before[1]["features"]),
            "pixels": knn(trained[0]["pixels"], trained[1]["pixels"]),
            "k": 20,
            "gallery_images": len(labels[0]),
            "query_images": len(labels[1]),
            "queries_held_out": held_out,
        },
        "codes": bit_statistics((signs > 0).sum(0), len(signs)),
    }
