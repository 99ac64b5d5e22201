"""Retrieval: mean average precision over the complete ranking (mAP@ALL), of features and of codes, and over
the nearest items (mAP@k), as hashing is measured."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bincomm.evaluation.labeled import RESOLUTION, check_alike, check_labeled, unit
from bincomm.ops.hamming import hamming_distance

PAIRS = 1 << 22  # query and database item, ranked at once; takes up to 100 bytes each
LAST = torch.iinfo(torch.int32).max  # farther than anything


def mean_average_precision(
    database: Tensor,
    database_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    same: bool = False,
) -> float:
    """Mean over queries of the average precision (AP) of the database ranked by its nearness to the query.

    An item is relevant when its class is the query's; AP is the mean, over the relevant items, of the share
    of relevant ones among those ranked up to and including it. All of the database is ranked. Items equally
    near are in no order: the AP is then its expectation over all orders within the ties (McSherry and Najork,
    ECIR 2008), so neither the order of the database nor a hash of few bits can flatter the figure.

    Args:
        database: (N, D) features, compared by cosine, or (N, ⌈K/32⌉) int32 messages as from `pack_signs`,
            compared by Hamming distance. Codes as ±1 vectors count as features: their cosine 1 - 2d/K gives
            the same figure.
        database_labels: (N,) class indices.
        queries: (M, D) or (M, ⌈K/32⌉), of the same kind; query_labels: (M,) class indices.
        same: the queries are the database, in the same order; each is left out of its own ranking.

    Returns:
        From 0 to 1. Queries to which nothing is relevant have no AP and are left out of the mean.

    Raises:
        ValueError: no database or queries, different numbers of items and labels or of columns, values that
            are not finite, `same` with different numbers of queries and items, or no query with a relevant
            item.
        TypeError: messages compared with features.
    """
    check_labeled("database", database, database_labels)
    check_labeled("queries", queries, query_labels)
    check_alike(database, queries)
    messages = database.dtype == torch.int32
    if messages != (queries.dtype == torch.int32):
        raise TypeError(f"queries: expected {database.dtype} like database, got {queries.dtype}")
    if same and len(queries) != len(database):
        raise ValueError(f"same: expected as many queries as items, {len(database)}, got {len(queries)}")
    if not messages:
        database, queries = unit(database), unit(queries)
    total, counted = 0.0, 0
    for label in query_labels.unique():
        (relevant,) = (database_labels == label).nonzero(as_tuple=True)
        # If the query is the only item of its class, no other item is relevant.
        if len(relevant) <= same:
            continue
        (class_queries,) = (query_labels == label).nonzero(as_tuple=True)
        for block in class_queries.split(max(1, PAIRS // len(database))):
            if messages:
                distances = hamming_distance(queries[block], database)
            else:
                distances = (queries[block] @ database.T).mul_(-RESOLUTION).round_().to(torch.int32)
            if same:
                # Ranked last, where it does not count.
                distances[torch.arange(len(block), device=block.device), block] = LAST
            total += float(_average_precision(distances, relevant, len(relevant) - same).sum())
        counted += len(class_queries)
    if counted == 0:
        raise ValueError(
            "query_labels: expected at least one query with an item of its class in the database"
        )
    return total / counted


def mean_average_precision_at(
    database: Tensor,
    database_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int,
    unmatched: Literal["zero", "skip"] = "zero",
) -> float:
    """Mean over queries of the average precision of the k nearest items: mAP@k as of HashNet (ICCV 2017),
    whose code later papers of hashing take over.

    AP is the mean, over the relevant items among the k, of the share of relevant ones among those ranked up
    to and including it; it is 0 where none of the k is relevant. So it is divided by the number that was
    found, not by that which could have been. Items equally near are in no order: the AP is its expectation
    over all orders within the ties, also at the k-th place.

    Args:
        database: (N, K) codes as ±1.
        database_labels: (N,) class indices, or (N, C) bool, the labels of each, of which two items must share
            one to be relevant to each other.
        queries: (M, K) codes as ±1, compared by Hamming distance; or logits, compared by their product with
            the codes (asymmetric distance).
        query_labels: (M,) or (M, C), as of the database.
        k: items of a ranking that count.
        unmatched: queries to which no item of the database is relevant count as 0, as in that code, or are
            left out.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: no database or queries, different numbers of items and labels, of columns or of kinds of
            labels, values that are not finite, k < 1, or with "skip" no query with a relevant item.
    """
    check_labeled("database", database, database_labels)
    check_labeled("queries", queries, query_labels)
    check_alike(database, queries)
    if database_labels.shape[1:] != query_labels.shape[1:]:
        raise ValueError(
            f"query_labels: expected {tuple(database_labels.shape[1:])} for each, as of the database, got "
            f"{tuple(query_labels.shape[1:])}"
        )
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    codes, precisions = unit(database), []
    harmonic = np.concatenate([[0], (1 / np.arange(1, len(database) + 1)).cumsum()])
    of_labels = database_labels.float()
    block = max(1, PAIRS // len(database))
    for part, labels in zip(queries.split(block), query_labels.split(block), strict=True):
        distances = (unit(part) @ codes.T).mul_(-RESOLUTION).round_().to(torch.int32).cpu().numpy()
        if labels.ndim == 1:
            relevant = labels[:, None] == database_labels
        else:
            relevant = (labels.float() @ of_labels.T) > 0
        for row, is_relevant in zip(distances, relevant.cpu().numpy(), strict=True):
            if unmatched == "zero" or is_relevant.any():
                precisions.append(_average_precision_at(row, is_relevant, k, harmonic))
    if not precisions:
        raise ValueError(
            "query_labels: expected at least one query with a relevant item in the database, got none"
        )
    return float(np.mean(precisions))


class Lookup(NamedTuple):
    """Precision of the items within a Hamming radius, and the share of queries with any item there."""

    precision: float
    answered: float


def precision_within(
    database: Tensor, database_labels: Tensor, queries: Tensor, query_labels: Tensor, radius: int = 2
) -> Lookup:
    """Precision of hash lookup: of the items within a Hamming radius of a query, the share that has its
    class, averaged over the queries; a query without any counts as 0, as is usual (Norouzi and Fleet, ICML
    2011).

    Args:
        database: (N, ⌈K/32⌉) int32 messages, database_labels: (N,) class indices.
        queries: (M, ⌈K/32⌉) int32 messages, query_labels: (M,) class indices.
        radius: bits that may differ.

    Raises:
        ValueError: no database or queries, different numbers of items and labels or of columns.
        TypeError: not int32.
    """
    check_labeled("database", database, database_labels)
    check_labeled("queries", queries, query_labels)
    check_alike(database, queries)
    precision, answered = 0.0, 0
    block = max(1, PAIRS // len(database))
    for part, labels in zip(queries.split(block), query_labels.split(block), strict=True):
        near = hamming_distance(part, database) <= radius
        neighbors = near.sum(1)
        right = (near & (labels[:, None] == database_labels)).sum(1)
        precision += float((right / neighbors.clamp(min=1)).sum(dtype=torch.float64))
        answered += int((neighbors > 0).sum())
    return Lookup(precision / len(queries), answered / len(queries))


def _average_precision(distances: Tensor, relevant: Tensor, count: int) -> Tensor:
    """Expected AP (M,) of rankings by distance (M, N) int32, ties in random order; relevant are the same
    items of each, a `count` of them but those at distance `LAST`.

    Of a tie of n items, r of them relevant, that comes after N items, R of them relevant, the i-th place is
    taken by a relevant item with probability r/n, and then (i-1)(r-1)/(n-1) of the i-1 places before it are
    expected to be: it adds r/n · (R + 1 + (i-1)(r-1)/(n-1)) / (N + i) to the sum of precisions. With h the
    sum of 1/(N + i) over the tie, all its places add r/n · ((R + 1)·h + (n - (N + 1)·h)·(r-1)/(n-1)), of
    which each of its relevant items is given an equal part.
    """
    near = _sorted(distances[:, relevant])
    first, last = _places(_sorted(distances), near)  # N, N + n
    before, until = _places(near, near)  # R, R + r
    n, r = last - first, until - before
    places = torch.arange(1, distances.shape[1] + 1, dtype=torch.float64, device=distances.device)
    harmonic = F.pad(places.reciprocal().cumsum(0), (1, 0))
    h = harmonic[last] - harmonic[first]
    inside = (n - (first + 1) * h) * (r - 1) / (n - 1).clamp(min=1)
    return torch.where(near < LAST, ((before + 1) * h + inside) / n, 0).sum(-1) / count


def _average_precision_at(distances: np.ndarray, relevant: np.ndarray, k: int, harmonic: np.ndarray) -> float:
    """Expected AP of the k nearest of a ranking by distance (N,), ties in random order.

    How many relevant items of the tie at the k-th place are among the k has the hypergeometric distribution;
    given their number, their places there are as in a tie of no others.
    """
    from scipy.stats import hypergeom  # importing it takes a second, and every run imports this file

    if k < len(distances):
        near = distances <= np.partition(distances, k - 1)[k - 1]
        distances, relevant = distances[near], relevant[near]
    _, ties = np.unique(distances, return_inverse=True)
    n = np.bincount(ties)
    r = np.bincount(ties[relevant], minlength=len(n))
    first, before = n.cumsum() - n, r.cumsum() - r

    def sums(first: Any, before: Any, n: Any, r: Any) -> Any:  # see `_average_precision`
        h = harmonic[first + n] - harmonic[first]
        inside = (n - (first + 1) * h) * (r - 1) / np.maximum(n - 1, 1)
        return np.where(r > 0, r / n * ((before + 1) * h + inside), 0)

    last = n[-1] - (n.sum() - min(k, n.sum()))  # places of the last tie that are among the k
    sure = sums(first[:-1], before[:-1], n[:-1], r[:-1]).sum()
    found = np.arange(max(0, last - (n[-1] - r[-1])), min(last, r[-1]) + 1)
    chance = hypergeom(n[-1], r[-1], last).pmf(found)
    total = before[-1] + found
    precision = (sure + sums(first[-1], before[-1], last, found)) / np.maximum(total, 1)
    return float((chance * np.where(total > 0, precision, 0)).sum())


def _sorted(values: Tensor) -> Tensor:
    if values.is_cuda:
        return values.sort(-1).values
    return torch.from_numpy(np.sort(values.numpy(), -1))  # torch's takes twenty times as long on a CPU


def _places(ranking: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """How many of a sorted row are less than a value of the same row, and how many at most as large."""
    return torch.searchsorted(ranking, values), torch.searchsorted(ranking, values, right=True)
