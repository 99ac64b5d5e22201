"""Every protocol that looks at images as a whole, on what was pretrained, and labeled images."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bincomm.bits import bit_statistics
from bincomm.data.sources import Source
from bincomm.distributed.ranks import ALONE, Ranks
from bincomm.evaluation.augmented import augmented_probe
from bincomm.evaluation.features import extract_cached
from bincomm.evaluation.geometry import effective_dimensions
from bincomm.evaluation.knn import knn_accuracies
from bincomm.evaluation.linear import linear_probe
from bincomm.evaluation.pretrained import Pretrained
from bincomm.evaluation.retrieval import mean_average_precision, precision_within
from bincomm.ops.messages import pack_signs

NEIGHBORS = (10, 20, 100, 200)
# Those after the first four look at codes, and need a head.
PROTOCOLS = ("knn", "linear", "augmented", "map", "geometry", "knn_codes", "map_codes", "lookup", "bits")
OF_CODES = PROTOCOLS[5:]


def evaluate_images(
    model: Pretrained,
    gallery: Source,
    queries: Source,
    protocols: Sequence[str] | None = None,
    *,
    ranks: Ranks = ALONE,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure on labeled images; features come from bincomm's cache where they are there.

    Args:
        model: what was pretrained.
        gallery, queries: labeled sources, one center crop of each image.
        protocols: of `PROTOCOLS`; None: all that the model can be asked, without those of codes where it has
            no head. "knn" by cosine and "knn_codes" by Hamming distance for k in `NEIGHBORS`, as far as the
            gallery goes; "linear", the probe on features, and "augmented" on random crops; "map" and
            "map_codes", mAP@ALL; "lookup", the precision within Hamming radius 2; "geometry", effective
            dimensions; "bits", use of the bits of the queries' codes.
        ranks: look at a share of the images each; all call, rank 0 measures, and the others get {}.
        report: told which images are left out, and why.

    Returns:
        A figure or a dict of them by protocol, shares from 0 to 1 and entropies in bits, with the numbers of
        images, how they were shown, and the seconds each took.

    Raises:
        ValueError: an unknown protocol, no labels, a protocol of codes without a head, no usable images.
    """
    chosen = check_protocols(model, protocols)
    found: dict[str, Any] = {"seconds": {}}
    started = time.perf_counter()
    seen, labels = [], []
    for name, source in (("gallery", gallery), ("queries", queries)):
        if source.labels is None:
            raise ValueError(f"{name}: expected images with labels (folders named after classes), got none")

        def tell(image: int, why: str, name: str = name, source: Source = source) -> None:
            report(f"left out of the {name}: {source.images.name(image)}: {why}")

        seen.append(extract_cached(model, source, tell, ranks=ranks))
    if ranks.rank:
        return {}
    for name, source, values in zip(("gallery", "queries"), (gallery, queries), seen, strict=True):
        if len(values["images"]) == 0:
            raise ValueError(f"{name}: none of the {len(source.images)} images can be used")
        labels.append(torch.from_numpy(source.labels)[values["images"]])
    found["gallery_images"], found["query_images"] = map(len, labels)
    found["classes"] = len(torch.cat(labels).unique())
    found["shown"] = {"global_size": model.config.global_size, "eval_crop": model.config.eval_crop}
    found["seconds"]["looking"] = time.perf_counter() - started

    device = model.device
    features = [side["features"].to(device) for side in seen]
    labeled = features[0], labels[0].to(device), features[1], labels[1].to(device)
    if model.head is not None:
        signs = [side["signs"].to(device) for side in seen]
        messages = [pack_signs(side) for side in signs]
        as_vectors = signs[0], labeled[1], signs[1], labeled[3]
        as_messages = messages[0], labeled[1], messages[1], labeled[3]

    def augmented() -> dict[str, Any]:
        images, held = seen[0]["images"], (seen[0]["features"], seen[1]["features"])
        return augmented_probe(model, gallery, images, *held, labels[1])._asdict()

    def of_neighbors(values: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
        neighbors = sorted({min(k, len(values[0])) for k in NEIGHBORS})
        shares = knn_accuracies(*values, neighbors=neighbors)
        return {str(k): share for k, share in zip(neighbors, shares, strict=True)}

    measures: dict[str, Callable[[], Any]] = {
        "knn": lambda: of_neighbors(labeled),
        "linear": lambda: linear_probe(*labeled)._asdict(),
        "augmented": augmented,
        "map": lambda: mean_average_precision(*labeled),
        "geometry": lambda: effective_dimensions(features[1])._asdict(),
        "knn_codes": lambda: of_neighbors(as_vectors),
        "map_codes": lambda: mean_average_precision(*as_messages),
        "lookup": lambda: precision_within(*as_messages)._asdict(),
        "bits": lambda: bit_statistics((signs[1] > 0).sum(0), len(signs[1])),
    }
    for name in chosen:
        started = time.perf_counter()
        found[name] = measures[name]()
        found["seconds"][name] = time.perf_counter() - started
    return found


def check_protocols(model: Pretrained, protocols: Sequence[str] | None) -> list[str]:
    """The protocols asked for, all that the model can be asked where that is None.

    Raises:
        ValueError: there is none of a name, or it needs a head.
    """
    if protocols is None:
        return [name for name in PROTOCOLS if model.head is not None or name not in OF_CODES]
    for name in protocols:
        if name not in PROTOCOLS:
            raise ValueError(f"protocols: there is none named {name!r}; protocols: {', '.join(PROTOCOLS)}")
        if name in OF_CODES and model.head is None:
            raise ValueError(
                f"protocols: {name} measures codes, and {model.name} holds a backbone without a head; take a "
                "run's directory with its checkpoints, or a checkpoint"
            )
    return list(protocols)


def describe(found: dict[str, Any]) -> str:
    """What was measured, a line each, for a terminal."""
    lines = []
    if "classes" in found:
        sizes = f"{found['query_images']} queries in {found['gallery_images']} images"
        lines.append(f"{sizes} of {found['classes']} classes")
        if not found.get("queries_held_out", True):
            lines.append("  (one folder, split: where it was pretrained on, the queries' images were, too)")
    for name, title in (("knn", "k-NN"), ("knn_codes", "k-NN of codes")):
        if name in found:
            each = "  ".join(f"k={k} {share:.2%}" for k, share in found[name].items())
            lines.append(f"  {title:22} {each}")
    for name, title in (("linear", "linear probe"), ("augmented", "  on random crops")):
        if name in found:
            lines.append(
                f"  {title:22} {found[name]['accuracy']:.2%}  "
                f"(learning rate {found[name]['learning_rate']:g})"
            )
    for name, title in (("map", "mAP of features"), ("map_codes", "mAP of codes")):
        if name in found:
            lines.append(f"  {title:22} {found[name]:.2%}")
    if "lookup" in found:
        lookup = found["lookup"]
        lines.append(
            f"  {'within 2 bits':22} {lookup['precision']:.2%} right, a query without any counting as wrong: "
            f"{lookup['answered']:.1%} have some"
        )
    if "geometry" in found:
        geometry = found["geometry"]
        lines.append(
            f"  {'dimensions in use':22} d_eff {geometry['d_eff']:.1f}  r_eff {geometry['r_eff']:.1f}"
        )
    if "bits" in found:
        bits = found["bits"]
        lines.append(
            f"  {'use of the bits':22} entropy {bits['bit_entropy']:.3f} (least "
            f"{bits['bit_entropy_min']:.3f}), {bits['dead_bits']:.1%} dead"
        )
    if "davis" in found:
        davis = found["davis"]
        lines.append(
            f"DAVIS, {davis['objects']} objects: J&F {davis['jf']:.2%}, J {davis['j']:.2%}, "
            f"F {davis['f']:.2%}"
        )
    if "segmentation" in found:
        patches = found["segmentation"]
        lines.append(
            f"segmentation, {patches['val_images']} images of {patches['classes']} classes: mIoU "
            f"{patches['knn']['miou']:.2%} by nearest patches, {patches['linear']['miou']:.2%} linear"
        )
    return "\n".join(lines)
