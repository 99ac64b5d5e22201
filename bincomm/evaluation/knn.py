"""Weighted k-nearest-neighbour classification, the protocol of DINO (arXiv 2104.14294)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bincomm.evaluation.labelled import check_alike, check_labelled


def knn_accuracy(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    block: int = 1024,
) -> float:
    """Share of queries whose class the nearest gallery images name.

    Similarity s is the cosine; each of the k nearest votes for its class with weight exp(s/temperature).
    Given codes as ±1 vectors the cosine is 1 - 2d/K with d the Hamming distance, so this is then the Hamming
    k-NN.

    Args:
        gallery: (N, D) features, gallery_labels: (N,) class indices.
        queries: (M, D) features, query_labels: (M,) class indices.
        k: neighbours; at most N are used.
        block: queries compared at once, (block, N) similarities in memory.

    Raises:
        ValueError: no gallery or query images, different numbers of features and labels or of features per
            image, or values that are not finite.
    """
    check_labelled("gallery", gallery, gallery_labels)
    check_labelled("queries", queries, query_labels)
    check_alike(gallery, queries)
    gallery = F.normalize(gallery.float(), dim=-1)
    classes = int(max(gallery_labels.max(), query_labels.max())) + 1
    correct = 0
    for some, labels in zip(queries.split(block), query_labels.split(block), strict=True):
        similarities, nearest = (F.normalize(some.float(), dim=-1) @ gallery.T).topk(
            min(k, len(gallery)), dim=-1
        )
        votes = torch.zeros(len(some), classes, device=some.device)
        votes.scatter_add_(1, gallery_labels[nearest], (similarities / temperature).exp())
        correct += int((votes.argmax(-1) == labels).sum())
    return correct / len(queries)
