from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from bincomm import pack_signs
from bincomm.evaluation import retrieval
from bincomm.evaluation.retrieval import mean_average_precision, mean_average_precision_at


def average_precision(relevant):
    """Of one ranking, by its definition."""
    ranks = np.flatnonzero(relevant)
    return np.mean((np.arange(len(ranks)) + 1) / (ranks + 1))


def signs(*shape):
    return torch.where(torch.randn(*shape) > 0, 1.0, -1.0)


def test_agrees_with_scikit_learn_without_ties(monkeypatch):
    monkeypatch.setattr(retrieval, "PAIRS", 1000)  # several blocks of queries
    database, queries = torch.randn(301, 16), torch.randn(40, 16)
    labels, query_labels = torch.randint(5, (301,)), torch.randint(5, (40,))
    x, y = database.double().numpy(), queries.double().numpy()
    scores = y @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    cosines = scores / np.linalg.norm(y, axis=1, keepdims=True)
    assert np.diff(np.sort(cosines)).min() > 2**-28  # untied
    expected = [
        average_precision_score(labels.numpy() == label, score)
        for label, score in zip(query_labels.numpy(), scores, strict=True)
    ]
    result = mean_average_precision(database, labels, queries, query_labels)
    assert result == pytest.approx(np.mean(expected), abs=1e-9)


@pytest.mark.parametrize("kind", ["messages", "signs", "features"])
def test_is_the_mean_over_all_orders_of_ties(kind):
    if kind == "features":  # 3 directions; what differs in length alone is equally near
        directions = torch.randn(3, 5)
        database = directions[torch.tensor([0, 1, 1, 2, 0, 1, 1])] * torch.rand(7, 1).add(0.1)
        queries = torch.randn(6, 5)
    else:
        database, queries = signs(7, 3), signs(6, 3)
    labels, query_labels = torch.tensor([0, 1, 0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 1, 0, 1])
    distances = 1 - torch.cosine_similarity(queries[:, None].double(), database.double(), dim=-1).numpy()
    expected = []
    for row, label in zip(distances.round(9), query_labels, strict=True):
        relevant = (labels == label).numpy()
        orders = (np.array(order) for order in permutations(range(7)))
        ranked = (relevant[order[row[order].argsort(kind="stable")]] for order in orders)
        expected.append(np.mean([average_precision(ranking) for ranking in ranked]))
    if kind == "messages":
        database, queries = pack_signs(database), pack_signs(queries)
    result = mean_average_precision(database, labels, queries, query_labels)
    assert result == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("kind", ["messages", "signs", "features", "repeated features"])
def test_the_order_of_the_database_makes_no_difference(kind):
    database, queries = torch.randn(401, 24), torch.randn(37, 24)
    if kind == "repeated features":
        database = database[torch.randint(60, (401,))] * torch.rand(401, 1).add(0.1)
    elif kind != "features":
        database, queries = signs(401, 24), signs(37, 24)
    if kind == "messages":
        database, queries = pack_signs(database), pack_signs(queries)
    labels, query_labels = torch.randint(10, (401,)), torch.randint(10, (37,))
    expected = mean_average_precision(database, labels, queries, query_labels)
    for _ in range(5):
        order = torch.randperm(401)
        result = mean_average_precision(database[order], labels[order], queries, query_labels)
        assert result == pytest.approx(expected, abs=1e-9)
    by_class = labels.argsort()
    result = mean_average_precision(database[by_class], labels[by_class], queries, query_labels)
    assert result == pytest.approx(expected, abs=1e-9)


def test_messages_and_their_signs_give_one_figure():
    database, queries = signs(300, 70), signs(50, 70)
    labels, query_labels = torch.randint(4, (300,)), torch.randint(4, (50,))
    result = mean_average_precision(pack_signs(database), labels, pack_signs(queries), query_labels)
    expected = mean_average_precision(database, labels, queries, query_labels)
    assert result == pytest.approx(expected, abs=1e-12)


def test_what_is_known_beforehand():
    labels = torch.arange(3).repeat_interleave(2)
    apart = torch.eye(3).repeat_interleave(2, 0)
    assert mean_average_precision(apart, labels, apart, labels) == 1.0
    # Nothing to rank by: one item relevant among n, at any of their places alike.
    one = torch.tensor([1, 0, 0, 0, 0])
    result = mean_average_precision(torch.ones(5, 2), one, torch.ones(1, 2), torch.ones(1))
    assert result == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)
    # A query whose class is not in the database does not count.
    result = mean_average_precision(apart, labels, apart[:3], torch.tensor([0, 9, 1]))
    assert result == 1.0


@pytest.mark.parametrize("packed", [False, True])
def test_queries_left_out_of_their_own_ranking(packed, monkeypatch):
    monkeypatch.setattr(retrieval, "PAIRS", 150)
    x, labels = signs(50, 20), torch.randint(6, (50,))
    labels[0] = 6  # the only one of its class: no query once it is left out
    x = pack_signs(x) if packed else x
    expected = []
    for i in range(1, 50):
        others = torch.arange(50) != i
        expected.append(mean_average_precision(x[others], labels[others], x[i : i + 1], labels[i : i + 1]))
    result = mean_average_precision(x, labels, x, labels, same=True)
    assert result == pytest.approx(np.mean(expected), abs=1e-12)
    assert result < mean_average_precision(x, labels, x, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_are_read_as_features(dtype):
    database, queries = torch.randint(-9, 9, (60, 8)), torch.randint(-9, 9, (20, 8))
    labels, query_labels = torch.randint(4, (60,)), torch.randint(4, (20,))
    expected = mean_average_precision(database.double(), labels, queries.double(), query_labels)
    assert mean_average_precision(database.to(dtype), labels, queries.to(dtype), query_labels) == expected


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_length_of_features_makes_no_difference(factor):
    database, queries = torch.randn(60, 8), torch.randn(20, 8)
    labels, query_labels = torch.randint(4, (60,)), torch.randint(4, (20,))
    expected = mean_average_precision(database, labels, queries, query_labels)
    result = mean_average_precision(database * factor, labels, queries * factor, query_labels)
    assert result == pytest.approx(expected, abs=1e-6)


def test_many_ties_in_a_large_database():
    """Against the sum over places, of which the harmonic numbers are a short form."""
    relevant, n = 3000, 200_000
    labels = (torch.arange(n) < relevant).long()
    result = mean_average_precision(torch.ones(n, 1), labels, torch.ones(1, 1), torch.ones(1))
    places = np.arange(n)
    expected = np.mean((1 + places * (relevant - 1) / (n - 1)) / (places + 1))
    assert result == pytest.approx(expected, abs=1e-10)


def test_what_is_wrong_is_named():
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="queries: .*got 1 and 2"):
        mean_average_precision(x, y, x[:2], y[:1])
    with pytest.raises(ValueError, match="database: .*got 0"):
        mean_average_precision(x[:0], y[:0], x, y)
    with pytest.raises(ValueError, match="queries: .*NaN"):
        mean_average_precision(x, y, x / 0, y)
    with pytest.raises(ValueError, match="queries: expected 3 columns .*got 2"):
        mean_average_precision(x, y, x[:, :2], y)
    with pytest.raises(ValueError, match="same: .*3, got 2"):
        mean_average_precision(x, y, x[:2], y[:2], same=True)
    with pytest.raises(ValueError, match="query_labels: .*at least one"):
        mean_average_precision(x, y, x, y + 3)
    with pytest.raises(ValueError, match="query_labels: .*at least one"):
        mean_average_precision(x, y, x, y, same=True)
    with pytest.raises(TypeError, match="queries: expected torch.int32 .*got torch.float32"):
        mean_average_precision(x.int(), y, x, y)
    with pytest.raises(TypeError, match="queries: expected torch.float32 .*got torch.int32"):
        mean_average_precision(x, y, x.int(), y)


def average_precision_at(ranked, k):
    """Of one ranking, as HashNet's code has it."""
    places = np.flatnonzero(ranked[:k]) + 1
    return np.mean(np.arange(1, len(places) + 1) / places) if len(places) else 0.0


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 10])
@pytest.mark.parametrize("several", [False, True])
def test_the_nearest_alone_over_all_orders_of_ties(k, several, monkeypatch):
    monkeypatch.setattr(retrieval, "PAIRS", 20)
    database, queries = signs(7, 3), signs(6, 3)
    if several:
        labels, query_labels = torch.rand(7, 4) < 0.3, torch.rand(6, 4) < 0.3
        relevant = (query_labels[:, None] & labels).any(-1)
    else:
        labels, query_labels = torch.tensor([0, 1, 0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 1, 0, 9])
        relevant = query_labels[:, None] == labels
    expected = []
    for query, matches in zip(queries, relevant.numpy(), strict=True):
        distances = (query != database).sum(1).numpy()
        orders = (np.array(order) for order in permutations(range(7)))
        ranked = (matches[order[distances[order].argsort(kind="stable")]] for order in orders)
        expected.append(np.mean([average_precision_at(ranking, k) for ranking in ranked]))
    parts = database, labels, queries, query_labels
    assert mean_average_precision_at(*parts, k=k) == pytest.approx(np.mean(expected), abs=1e-12)
    matched = relevant.any(1).numpy()
    skipped = mean_average_precision_at(*parts, k=k, unmatched="skip")
    assert skipped == pytest.approx(np.mean(np.array(expected)[matched]), abs=1e-12)


def test_the_nearest_by_logits_of_the_queries():
    database, queries = signs(200, 32), torch.randn(20, 32)
    labels, query_labels = torch.randint(5, (200,)), torch.randint(5, (20,))
    expected = []
    for query, label in zip(queries, query_labels, strict=True):
        order = (query.double() @ database.double().T).argsort(descending=True)
        expected.append(average_precision_at((labels[order] == label).numpy(), 50))
    result = mean_average_precision_at(database, labels, queries, query_labels, k=50)
    assert result == pytest.approx(np.mean(expected), abs=1e-9)
    assert result != mean_average_precision_at(database, labels, queries.sign(), query_labels, k=50)


def test_what_is_wrong_with_the_nearest_is_named():
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        mean_average_precision_at(x, y, x, y, k=0)
    with pytest.raises(ValueError, match=r"query_labels: expected \(2,\) for each.*got \(\)"):
        mean_average_precision_at(x, torch.ones(3, 2, dtype=torch.bool), x, y, k=1)
    with pytest.raises(ValueError, match="query_labels: .*at least one"):
        mean_average_precision_at(x, y, x, y + 3, k=1, unmatched="skip")
    assert mean_average_precision_at(x, y, x, y + 3, k=1) == 0
