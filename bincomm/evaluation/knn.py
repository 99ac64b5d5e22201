"""Weighted k-nearest-neighbor classification, the protocol of DINO (arXiv 2104.14294)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bincomm.evaluation.labeled import RESOLUTION, check_alike, check_labeled, unit

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
    """Share of queries whose class the nearest gallery images vote for.

    Similarity s is the cosine; each of the k nearest votes for its class with weight exp(s/temperature).
    Given codes as ±1 vectors the cosine is 1 - 2d/K with d the Hamming distance, so this is then the Hamming
    k-NN. Images equally near at the k-th place share the votes that are left, so that the order of the
    gallery makes no difference: of codes, whose distances are few, there are often many.

    Args:
        gallery: (N, D) features, gallery_labels: (N,) class indices.
        queries: (M, D) features, query_labels: (M,) class indices.
        k: neighbors; at most N are used.

    Raises:
        ValueError: no gallery or query images, different numbers of features and labels or of features per
            image, values that are not finite, or k < 1.
    """
    parts = gallery, gallery_labels, queries, query_labels
    return knn_accuracies(*parts, neighbors=[k], temperature=temperature)[0]


def knn_accuracies(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    neighbors: Sequence[int],
    temperature: float = 0.07,
) -> list[float]:
    """`knn_accuracy` for several k, whose similarities are computed once."""
    check_labeled("gallery", gallery, gallery_labels)
    check_labeled("queries", queries, query_labels)
    check_alike(gallery, queries)
    if min(neighbors) < 1:
        raise ValueError(f"k: expected at least 1, got {min(neighbors)}")
    classes, targets = gallery_labels.unique(return_inverse=True)
    gallery, queries = unit(gallery), unit(queries)
    sizes = [min(k, len(gallery)) for k in neighbors]
    correct, block = [0] * len(sizes), max(1, SIMILARITIES // len(gallery))
    for part, labels in zip(queries.split(block), query_labels.split(block), strict=True):
        similarity = (part @ gallery.T).mul_(RESOLUTION).round_()
        nearest = similarity.topk(max(sizes), dim=-1).values
        query, image = (similarity >= nearest[:, -1:]).nonzero(as_tuple=True)
        near = similarity[query, image]
        ballot, weights = query * len(classes) + targets[image], (near / RESOLUTION / temperature).exp()
        for number, k in enumerate(sizes):
            last = nearest[:, k - 1]
            above = (nearest > last[:, None]).sum(-1)
            tied = query[near == last[query]].bincount(minlength=len(part))
            share = torch.where(
                near == last[query], ((k - above) / tied)[query], (near > last[query]).double()
            )
            votes = torch.zeros(len(part), len(classes), dtype=torch.float64, device=part.device)
            votes.view(-1).index_add_(0, ballot, share * weights)
            # Rounded, because the order of adding changes the last digits of equal votes.
            votes = (votes / votes.amax(-1, keepdim=True) * RESOLUTION).round()
            correct[number] += int((classes[votes.argmax(-1)] == labels).sum())
    return [hits / len(queries) for hits in correct]
