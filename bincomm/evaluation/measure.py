"""What a network's features and codes are worth on labeled images, one center crop of each."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bincomm.bits import bit_statistics
from bincomm.config import PretrainConfig
from bincomm.data.sources import Source
from bincomm.evaluation.features import extract
from bincomm.evaluation.geometry import effective_dimensions
from bincomm.evaluation.knn import knn_accuracy
from bincomm.evaluation.linear import linear_probe
from bincomm.evaluation.pretrained import Pretrained
from bincomm.evaluation.retrieval import mean_average_precision
from bincomm.ops.messages import pack_signs


@dataclass(frozen=True)
class Labeled:
    """Features (n, D) of a backbone, codes (n, K) of its head as ±1, pixels (n, P) and labels (n,) of images;
    see `bincomm.evaluation.features.extract`."""

    features: Tensor
    signs: Tensor
    pixels: Tensor
    labels: Tensor


def look_at(model: Pretrained, sources: tuple[Source, Source]) -> tuple[Labeled, Labeled]:
    """Gallery and queries as a network with a head sees them, on its device; images that cannot be used are
    left out.

    Raises:
        ValueError: none of the gallery's or of the queries' images can be used.
    """
    seen = []
    for name, source in zip(("gallery", "queries"), sources, strict=True):
        found = extract(model, source, pixels=True)
        if not len(found["images"]):
            raise ValueError(f"data: none of the {len(source.images)} images of the {name} can be used")
        labels = torch.from_numpy(source.labels)[found["images"]]
        values = (found["features"], found["signs"], found["pixels"], labels)
        seen.append(Labeled(*(x.to(model.device) for x in values)))
    return seen[0], seen[1]


def classify(gallery: Labeled, queries: Labeled) -> dict[str, float]:
    """Shares of queries whose class k-NN (k = 20) and a linear probe of the features find."""
    features = gallery.features, gallery.labels, queries.features, queries.labels
    return {"knn": knn_accuracy(*features), "linear": linear_probe(*features).accuracy}


def measure(gallery: Labeled, queries: Labeled) -> dict[str, float]:
    """Every figure of features and codes: `of_features`, mAP@ALL of the queries' codes in the gallery's by
    Hamming distance, and use of the bits in the queries' codes, entropies in bits."""
    messages, asked = pack_signs(gallery.signs), pack_signs(queries.signs)
    bits = bit_statistics((queries.signs > 0).sum(0), len(queries.signs))
    return {
        **of_features(gallery.features, gallery.labels, queries.features, queries.labels),
        "map_codes": mean_average_precision(messages, gallery.labels, asked, queries.labels),
        "bit_entropy": bits["bit_entropy"],
        "dead_bits": bits["dead_bits"],
    }


def of_features(
    gallery: Tensor, gallery_labels: Tensor, queries: Tensor, query_labels: Tensor
) -> dict[str, float]:
    """Shares of queries whose class k-NN (k = 20) and a linear probe find, mAP@ALL by cosine, and effective
    dimensions of the queries."""
    labeled = gallery, gallery_labels, queries, query_labels
    dimensions = effective_dimensions(queries)
    return {
        "knn": knn_accuracy(*labeled),
        "linear": linear_probe(*labeled).accuracy,
        "map": mean_average_precision(*labeled),
        "d_eff": dimensions.d_eff,
        "r_eff": dimensions.r_eff,
    }


def device_of(config: PretrainConfig) -> torch.device:
    """Where to measure: the device that the configuration's run was trained on, on this machine."""
    gpu = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")
