"""Weighted k-nearest-neighbor classification, the protocol of DINO (arXiv 2104.14294)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bincomm.evaluation.labeled import RESOLUTION, check_alike, check_labeled, unit
from bincomm.evaluation.tie_breaks import chance_to_win, powers_on_circle

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
    k-NN. Of images equally near at the k-th place, any may be among the k: the share is then its expectation
    over all choices, so that the order of the gallery makes no difference. Of codes, whose distances are few,
    there are often many. Of classes with equal votes the first wins.

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
    correct, block = [0.0] * len(sizes), max(1, SIMILARITIES // len(gallery))
    for part, labels in zip(queries.split(block), query_labels.split(block), strict=True):
        similarity = (part @ gallery.T).mul_(RESOLUTION).round_()
        nearest = similarity.topk(max(sizes), dim=-1).values
        query, image = (similarity >= nearest[:, -1:]).nonzero(as_tuple=True)
        near = similarity[query, image]
        ballot, weights = query * len(classes) + targets[image], (near / RESOLUTION / temperature).exp()
        own = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
        is_class = classes[own] == labels  # others are always wrong
        for number, k in enumerate(sizes):
            last = nearest[:, k - 1]
            nearer, tied = near > last[query], near == last[query]
            votes, counts = torch.zeros(2, len(part), len(classes), dtype=torch.float64, device=part.device)
            votes.view(-1).index_add_(0, ballot[nearer], weights[nearer])
            counts.view(-1).index_add_(0, ballot[tied], torch.ones_like(weights[tied]))
            weight = (last / RESOLUTION / temperature).exp()
            total = votes + counts * weight[:, None]
            # Rounded, because the order of adding changes the last digits of equal votes.
            total = (total / total.amax(-1, keepdim=True) * RESOLUTION).round()
            right = ((total.argmax(-1) == own) & is_class).double().cpu()
            left = k - (nearest > last[:, None]).sum(-1)
            (undecided,) = ((left < counts.sum(-1)) & is_class).nonzero(as_tuple=True)
            if len(undecided):
                powers = powers_on_circle(k)
                columns = [x[undecided].cpu().numpy() for x in (votes, counts.long(), weight, left, own)]
                chances = [
                    chance_to_win(votes_of, tied_of, float(w), int(r), int(c), powers)
                    for votes_of, tied_of, w, r, c in zip(*columns, strict=True)
                ]
                right[undecided.cpu()] = torch.tensor(chances, dtype=torch.float64)
            correct[number] += float(right.sum())
    return [hits / len(queries) for hits in correct]
