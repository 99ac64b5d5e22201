"""Evaluation of a pretrained network on labeled images: all protocols, and one schema for their results."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bincomm.bits import bit_statistics
from bincomm.data.sources import Source
from bincomm.distributed.ranks import ALONE, Ranks
from bincomm.evaluation.augmented import augmented_probe
from bincomm.evaluation.features import Report, extract_features, extract_features_cached
from bincomm.evaluation.geometry import effective_dimensions
from bincomm.evaluation.knn import knn_accuracies
from bincomm.evaluation.linear import linear_probe
from bincomm.evaluation.pretrained import Pretrained
from bincomm.evaluation.retrieval import (
    mean_average_precision,
    mean_average_precision_at,
    precision_within,
)
from bincomm.ops.messages import pack_signs

logger = logging.getLogger(__name__)

NEIGHBORS = (10, 20, 100, 200)
CODE_PROTOCOLS = ("knn_codes", "map_codes", "map_at", "lookup", "bits")  # need a head
PROTOCOLS = ("knn", "linear", "augmented", "map", "geometry", *CODE_PROTOCOLS)


class NoUsableImagesError(ValueError):
    """None of the gallery's or of the queries' images can be used."""


def evaluate(
    model: Pretrained,
    gallery: Source,
    queries: Source,
    protocols: Sequence[str] | None = None,
    *,
    ranks: Ranks = ALONE,
    cache: bool = True,
    report_unusable: Sequence[str] = ("gallery", "queries"),
    at: int = 1000,
    unmatched: Literal["zero", "skip"] = "zero",
) -> dict[str, Any]:
    """Evaluate a network on labeled images, one center crop each.

    Args:
        model: a pretrained network.
        gallery, queries: labeled sources.
        protocols: names in `PROTOCOLS`; None: all, or without a head all but those of codes.
        ranks: all call, and each computes the features of a share of the images; rank 0 evaluates, and the
            others get {}.
        cache: read features from bincomm's cache, and write new ones there.
        report_unusable: "gallery", "queries" or both: those whose unusable images are logged.
        at, unmatched: of "map_at", see `mean_average_precision_at`.

    Returns:
        "gallery_images", "query_images" (those that can be used), "unmatched_queries" (those whose class no
        image of the gallery has: mAP@ALL leaves them out, others count them as wrong) and "classes": numbers;
        "preprocessing": {"global_size", "eval_crop"}; "seconds": of "features" and of each protocol; and by
        protocol, shares from 0 to 1 and entropies in bits:

        - "knn" by cosine and "knn_codes" by Hamming distance: accuracy by k, {"10", "20", "100", "200"}; the
          number of the gallery's images stands for every k above it, see `figure`;
        - "linear", the probe on features, and "augmented" on random crops: {"accuracy", "learning_rate"};
        - "map" and "map_codes": mAP@ALL;
        - "map_at": mAP@k, {"k", "codes", "asymmetric"}, by Hamming distance and by the queries' logits;
        - "lookup": {"precision", "answered"} within Hamming radius 2;
        - "geometry": {"d_eff", "r_eff"} of the queries' features;
        - "bits": `bincomm.bits.bit_statistics` of the queries' codes.

    Raises:
        NoUsableImagesError: none of the gallery's or of the queries' images can be used.
        ValueError: an unknown protocol, no labels, or a protocol of codes without a head.
    """
    chosen = check_protocols(model, protocols)
    result: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    extract = extract_features_cached if cache else extract_features
    sources = {"gallery": gallery, "queries": queries}
    for name, source in sources.items():
        if source.labels is None:
            raise ValueError(f"{name}: expected images with labels (folders named after classes), got none")
    values = {}
    for name, source in sources.items():
        report = log_unusable(name, source) if name in report_unusable else lambda index, reason: None
        values[name] = extract(model, source, report, ranks=ranks)
    if ranks.rank:
        return {}
    for name, source in sources.items():
        if len(values[name]["indices"]) == 0:
            raise NoUsableImagesError(f"{name}: none of the {len(source.images)} images can be used")
    # In the order of the sources; features and codes are on the CPU.
    labels = [torch.from_numpy(source.labels)[values[name]["indices"]] for name, source in sources.items()]
    result["gallery_images"], result["query_images"] = map(len, labels)
    result["unmatched_queries"] = int((~torch.isin(labels[1], labels[0])).sum())
    result["classes"] = len(torch.cat(labels).unique())
    result["preprocessing"] = {"global_size": model.config.global_size, "eval_crop": model.config.eval_crop}
    seconds["features"] = time.perf_counter() - started

    device = model.device
    features = [values[name]["features"].to(device) for name in sources]
    on_device = [each.to(device) for each in labels]
    labeled = features[0], on_device[0], features[1], on_device[1]
    if model.head is not None:
        signs = [values[name]["signs"].to(device) for name in sources]
        messages = [pack_signs(each) for each in signs]
        labeled_signs = signs[0], on_device[0], signs[1], on_device[1]
        labeled_messages = messages[0], on_device[0], messages[1], on_device[1]

    def augmented() -> dict[str, Any]:
        on_cpu = values["gallery"]["features"], values["queries"]["features"]
        return augmented_probe(model, gallery, values["gallery"]["indices"], *on_cpu, labels[1])._asdict()

    def knn(parts: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
        neighbors = sorted({min(k, len(parts[0])) for k in NEIGHBORS})
        accuracies = knn_accuracies(*parts, neighbors=neighbors)
        return {str(k): accuracy for k, accuracy in zip(neighbors, accuracies, strict=True)}

    def nearest(database: Tensor, classes: Tensor, queries: Tensor, query_classes: Tensor) -> dict[str, Any]:
        return precision_at(
            model, database, classes, features[1], queries, query_classes, k=at, unmatched=unmatched
        )

    measures: dict[str, Callable[[], Any]] = {
        "knn": lambda: knn(labeled),
        "linear": lambda: linear_probe(*labeled)._asdict(),
        "augmented": augmented,
        "map": lambda: mean_average_precision(*labeled),
        "geometry": lambda: effective_dimensions(features[1])._asdict(),
        "knn_codes": lambda: knn(labeled_signs),
        "map_codes": lambda: mean_average_precision(*labeled_messages),
        "map_at": lambda: nearest(*labeled_signs),
        "lookup": lambda: precision_within(*labeled_messages)._asdict(),
        "bits": lambda: bit_statistics((signs[1] > 0).sum(0), len(signs[1])),
    }
    for name in chosen:
        started = time.perf_counter()
        result[name] = measures[name]()
        seconds[name] = time.perf_counter() - started
    return {**result, "seconds": seconds}


def log_unusable(name: str, source: Source) -> Report:
    """What logs the images of a source that are left out; `name` is that of the source."""

    def report(index: int, reason: str) -> None:
        logger.warning("left out of the %s: %s: %s", name, source.images.name(index), reason)

    return report


def precision_at(
    model: Pretrained,
    database: Tensor,
    database_labels: Tensor,
    query_features: Tensor,
    query_signs: Tensor,
    query_labels: Tensor,
    *,
    k: int,
    unmatched: Literal["zero", "skip"],
) -> dict[str, Any]:
    """mAP@k of codes, {"k", "codes", "asymmetric"}; see `mean_average_precision_at`."""
    assert model.head is not None  # or there would be no codes
    with torch.no_grad():
        logits = torch.cat([model.head.code(part) for part in query_features.split(1024)])
    figures = {"codes": query_signs, "asymmetric": logits}
    return {"k": k} | {
        name: mean_average_precision_at(
            database, database_labels, queries, query_labels, k=k, unmatched=unmatched
        )
        for name, queries in figures.items()
    }


def check_protocols(model: Pretrained, protocols: Sequence[str] | None) -> list[str]:
    """The given protocols; None: all that the model allows.

    Raises:
        ValueError: an unknown protocol, or one that needs a head.
    """
    if protocols is None:
        return [name for name in PROTOCOLS if model.head is not None or name not in CODE_PROTOCOLS]
    for name in protocols:
        if name not in PROTOCOLS:
            raise ValueError(f"protocols: there is none named {name!r}; protocols: {', '.join(PROTOCOLS)}")
        if name in CODE_PROTOCOLS and model.head is None:
            raise ValueError(
                f"protocols: {name} measures codes, and {model.name} holds a backbone without a head; take a "
                "run's directory with its checkpoints, or a checkpoint"
            )
    return list(protocols)


def figure(result: dict[str, Any], *path: str) -> float:
    """A figure of a result of `evaluate` by its keys, as in `figure(result, "knn", "20")`.

    A gallery of fewer than k images has no k-NN of that k: `evaluate` uses all of its images instead, and
    notes their number as k. The figure of k is then that of the largest k in the result that is at most k.
    """
    *outer, last = path
    for key in outer:
        result = result[key]
    if outer in (["knn"], ["knn_codes"]):
        last = max((k for k in result if int(k) <= int(last)), key=int)
    return result[last]


def describe(result: dict[str, Any]) -> str:
    """Results in words, for a terminal: those of `evaluate`, and under "davis", "objects", "segmentation" and
    "hashing" those of `evaluate_davis`, `evaluate_objects`, `evaluate_segmentation` and `evaluate_hashing`.
    """
    lines = []
    if "classes" in result:
        sizes = f"{result['query_images']} queries in {result['gallery_images']} images"
        lines.append(f"{sizes} of {result['classes']} classes")
        if not result.get("queries_held_out", True):
            lines.append("  (one folder, split: where it was pretrained on, the queries' images were, too)")
    for name, title in (("knn", "k-NN"), ("knn_codes", "k-NN of codes")):
        if name in result:
            accuracies = "  ".join(f"k={k} {accuracy:.2%}" for k, accuracy in result[name].items())
            lines.append(f"  {title:22} {accuracies}")
    for name, title in (("linear", "linear probe"), ("augmented", "  on random crops")):
        if name in result:
            lines.append(
                f"  {title:22} {result[name]['accuracy']:.2%}  "
                f"(learning rate {result[name]['learning_rate']:g})"
            )
    for name, title in (("map", "mAP of features"), ("map_codes", "mAP of codes")):
        if name in result:
            unmatched = result.get("unmatched_queries", 0)
            left_out = f"  ({unmatched} queries left out, whose class no image has)" if unmatched else ""
            lines.append(f"  {title:22} {result[name]:.2%}{left_out}")
    if "map_at" in result:
        nearest = result["map_at"]
        title = f"mAP@{nearest['k']} of codes"
        lines.append(
            f"  {title:22} {nearest['codes']:.2%}  (by the queries' logits {nearest['asymmetric']:.2%})"
        )
    if "lookup" in result:
        lookup = result["lookup"]
        lines.append(
            f"  {'within 2 bits':22} {lookup['precision']:.2%} right, a query without any counting as wrong: "
            f"{lookup['answered']:.1%} have some"
        )
    if "geometry" in result:
        geometry = result["geometry"]
        lines.append(
            f"  {'dimensions in use':22} d_eff {geometry['d_eff']:.1f}  r_eff {geometry['r_eff']:.1f}"
        )
    if "bits" in result:
        bits = result["bits"]
        lines.append(
            f"  {'use of the bits':22} entropy {bits['bit_entropy']:.3f} (least "
            f"{bits['bit_entropy_min']:.3f}), {bits['dead_bits']:.1%} dead"
        )
    if "hashing" in result:
        hashing = result["hashing"]
        lines.append(
            f"hashing, {hashing['query_images']} queries in {hashing['gallery_images']} images, "
            f"{hashing['labels']} labels: mAP@{hashing['k']} {hashing['codes']:.2%}, by the queries' logits "
            f"{hashing['asymmetric']:.2%}"
        )
    if "davis" in result:
        davis = result["davis"]
        lines.append(
            f"{davis['set']}, {davis['objects']} objects: J&F {davis['jf']:.2%}, J {davis['j']:.2%}, "
            f"F {davis['f']:.2%}"
        )
    if "objects" in result:
        objects = result["objects"]
        annotated = f"{objects['objects']} annotated in {objects['images']} images"
        lines.append(f"objects, {objects['found']} found, {annotated}")
        for kind, title in (("bbox", "boxes"), ("segm", "masks")):
            figures = objects[kind]
            lines.append(
                f"  {title:22} AP {figures['ap']:.2%}  AP50 {figures['ap50']:.2%}  AP75 "
                f"{figures['ap75']:.2%}  AR@100 {figures['ar100']:.2%}"
            )
    if "segmentation" in result:
        patches = result["segmentation"]
        lines.append(
            f"segmentation, {patches['val_images']} images of {patches['classes']} classes: mIoU "
            f"{patches['knn']['miou']:.2%} by nearest patches, {patches['linear']['miou']:.2%} linear"
        )
    return "\n".join(lines)
