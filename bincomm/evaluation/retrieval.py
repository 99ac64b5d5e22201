"""Retrieval: mean average precision over the whole ranking (mAP@ALL), of features and of codes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bincomm.evaluation.labelled import RESOLUTION, check_alike, check_labelled
from bincomm.ops.hamming import hamming_distance

PAIRS = 1 << 20  # query and database item, ranked at once; takes about 100 bytes each


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
    check_labelled("database", database, database_labels)
    check_labelled("queries", queries, query_labels)
    check_alike(database, queries)
    messages = database.dtype == torch.int32
    if messages != (queries.dtype == torch.int32):
        raise TypeError(f"queries: expected {database.dtype} like database, got {queries.dtype}")
    if same and len(queries) != len(database):
        raise ValueError(f"same: expected as many queries as items, {len(database)}, got {len(queries)}")
    if not messages:
        database, queries = (F.normalize(x.double(), dim=-1) for x in (database, queries))
    total, counted = 0.0, 0
    rows = torch.arange(len(queries), device=queries.device)
    for some in rows.split(max(1, PAIRS // len(database))):
        if messages:
            distances = hamming_distance(queries[some], database)
        else:
            distances = (queries[some] @ database.T * -RESOLUTION).round().to(torch.int32)
        relevant = query_labels[some, None] == database_labels
        if same:
            # Last of all, where an irrelevant item counts for nothing.
            own = some - some[0], some
            distances[own], relevant[own] = torch.iinfo(torch.int32).max, False
        answered = relevant.any(1)
        total += float(_average_precision(distances[answered], relevant[answered]).sum())
        counted += int(answered.sum())
    if counted == 0:
        raise ValueError(
            "query_labels: expected at least one query with an item of its class in the database"
        )
    return total / counted


class Lookup(NamedTuple):
    """Precision of what lies within a Hamming radius, and the share of queries that find anything there."""

    precision: float
    answered: float


def precision_within(
    database: Tensor, database_labels: Tensor, queries: Tensor, query_labels: Tensor, radius: int = 2
) -> Lookup:
    """Precision of hash lookup: of the items within a Hamming radius of a query, the share that has its
    class, averaged over the queries; one that finds nothing counts as 0, as is usual (Norouzi and Fleet, ICML
    2011).

    Args:
        database: (N, ⌈K/32⌉) int32 messages, database_labels: (N,) class indices.
        queries: (M, ⌈K/32⌉) int32 messages, query_labels: (M,) class indices.
        radius: bits that may differ.

    Raises:
        ValueError: no database or queries, different numbers of items and labels or of columns.
        TypeError: not int32.
    """
    check_labelled("database", database, database_labels)
    check_labelled("queries", queries, query_labels)
    check_alike(database, queries)
    precision, answered = 0.0, 0
    block = max(1, PAIRS // len(database))
    for some, labels in zip(queries.split(block), query_labels.split(block), strict=True):
        near = hamming_distance(some, database) <= radius
        found = near.sum(1)
        right = (near & (labels[:, None] == database_labels)).sum(1)
        precision += float((right / found.clamp(min=1)).sum(dtype=torch.float64))
        answered += int((found > 0).sum())
    return Lookup(precision / len(queries), answered / len(queries))


def _average_precision(distances: Tensor, relevant: Tensor) -> Tensor:
    """Expected AP (M,) of rankings by distance (M, N), ties in random order; each has relevant items.

    Of a tie of n items, r of them relevant, that comes after N items, R of them relevant, the i-th place is
    taken by a relevant item with probability r/n, and then (i-1)(r-1)/(n-1) of the i-1 places before it are
    expected to be: it adds r/n · (R + 1 + (i-1)(r-1)/(n-1)) / (N + i) to the sum of precisions.
    """
    distances, order = distances.sort(-1)
    # found[j]: relevant items among the first j. Which of a tie they are makes no difference below.
    found = F.pad(relevant.gather(-1, order).cumsum(-1), (1, 0))
    first = torch.searchsorted(distances, distances)  # N, of every place's tie
    last = torch.searchsorted(distances, distances, right=True)  # N + n
    n, before = last - first, found.gather(-1, first)
    r = found.gather(-1, last) - before
    place = torch.arange(distances.shape[-1], dtype=torch.float64, device=distances.device)  # N + i - 1
    inside = (place - first) * (r - 1) / (n - 1).clamp(min=1)
    precisions = r / n.double() * (before + 1 + inside) / (place + 1)
    return precisions.sum(-1) / found[:, -1]
