"""Weighted k-nearest-neighbour classification, the protocol of DINO (arXiv 2104.14294)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bincomm.evaluation.labelled import RESOLUTION, check_alike, check_labelled

SIMILARITIES = 1 << 24  # held at once, in fp64


def knn_accuracy(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose class the nearest gallery images name.

    Similarity s is the cosine; each of the k nearest votes for its class with weight exp(s/temperature).
    Given codes as ±1 vectors the cosine is 1 - 2d/K with d the Hamming distance, so this is then the Hamming
    k-NN. Images equally near at the k-th place share the votes that are left, so that the order of the
    gallery makes no difference: of codes, whose distances are few, there are often many.

    Args:
        gallery: (N, D) features, gallery_labels: (N,) class indices.
        queries: (M, D) features, query_labels: (M,) class indices.
        k: neighbours; at most N are used.

    Raises:
        ValueError: no gallery or query images, different numbers of features and labels or of features per
            image, values that are not finite, or k < 1.
    """
    check_labelled("gallery", gallery, gallery_labels)
    check_labelled("queries", queries, query_labels)
    check_alike(gallery, queries)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    classes, targets = gallery_labels.unique(return_inverse=True)
    gallery, queries = (F.normalize(x.double(), dim=-1) for x in (gallery, queries))
    correct, block = 0, max(1, SIMILARITIES // len(gallery))
    for some, labels in zip(queries.split(block), query_labels.split(block), strict=True):
        similarity = (some @ gallery.T * RESOLUTION).round()
        last = similarity.topk(min(k, len(gallery)), dim=-1).values[:, -1:]
        above, tied = (similarity > last).sum(-1), (similarity == last).sum(-1)
        query, image = (similarity >= last).nonzero(as_tuple=True)
        near = similarity[query, image]
        share = torch.where(near > last[query, 0], 1.0, ((min(k, len(gallery)) - above) / tied)[query])
        votes = torch.zeros(len(some), len(classes), dtype=torch.float64, device=some.device)
        weights = share * (near / RESOLUTION / temperature).exp()
        votes.view(-1).index_add_(0, query * len(classes) + targets[image], weights)
        # Equal votes are told from what the order of adding does to their last digits.
        votes = (votes / votes.amax(-1, keepdim=True) * RESOLUTION).round()
        correct += int((classes[votes.argmax(-1)] == labels).sum())
    return correct / len(queries)
