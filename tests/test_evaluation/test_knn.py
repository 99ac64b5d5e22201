from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from bincomm.evaluation import knn
from bincomm.evaluation.knn import knn_accuracies, knn_accuracy
from bincomm.evaluation.tie_breaks import chance_to_win, powers_on_circle


def parts(images, labels, gallery=1200):
    return [
        torch.as_tensor(x) for x in (images[:gallery], labels[:gallery], images[gallery:], labels[gallery:])
    ]


def codes_of(images, bits=24):
    return np.where(images @ np.random.default_rng(0).normal(size=(64, bits)) > 0, 1.0, -1.0)


def test_agrees_with_scikit_learn(monkeypatch):
    monkeypatch.setattr(knn, "SIMILARITIES", 1200 * 100)  # several blocks
    images, labels = load_digits(return_X_y=True)
    gallery, y, queries, z = parts(images, labels)
    votes = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    votes.fit(gallery, y)
    expected = [votes.set_params(n_neighbors=k).score(queries, z) for k in (20, 1, 200, 1200)]
    assert len(set(expected)) == 4
    assert expected[0] > 0.8
    accuracies = knn_accuracies(gallery, y, queries, z, neighbors=(20, 1, 200, 5000))  # of 1200 there are
    assert accuracies == pytest.approx(expected, abs=1e-9)
    assert knn_accuracy(gallery, y, queries, z) == accuracies[0]
    assert knn_accuracy(gallery * 1e-30, y, queries * 1e-25, z) == accuracies[0]


def test_each_of_several_k_has_its_own_ties():
    images, labels = load_digits(return_X_y=True)
    parts_of_codes = parts(codes_of(images, 12), labels)
    accuracies = knn_accuracies(*parts_of_codes, neighbors=(5, 50, 500))
    assert accuracies == [knn_accuracy(*parts_of_codes, k=k) for k in (5, 50, 500)]
    assert len(set(accuracies)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("k", [10, 50])
def test_codes_are_classified_as_on_average_over_tie_breaks(k):
    """Against the mean accuracy over many random choices among those that tie."""
    images, labels = load_digits(return_X_y=True)
    gallery, y, queries, z = parts(codes_of(images, 16), labels)
    queries, z = queries[:150], z[:150]
    rng, repeats = np.random.default_rng(0), 400
    hits = np.zeros((len(z), repeats))
    distances = ((16 - queries @ gallery.T) / 2).numpy()
    for row, actual, hit in zip(distances, z.tolist(), hits, strict=True):
        for number in range(repeats):
            # Distances are whole numbers: of those that tie, any may come first.
            nearest = (row + 0.5 * rng.random(len(row))).argpartition(k - 1)[:k]
            votes = np.bincount(y.numpy()[nearest], np.exp((1 - row[nearest] / 8) / 0.07), 10)
            hit[number] = votes.round(3).argmax() == actual
    error = np.sqrt(hits.var(1).sum() / repeats) / len(z)
    assert error < 0.002
    accuracy = knn_accuracy(gallery, y, queries, z, k=k)
    assert accuracy == pytest.approx(hits.mean(), abs=4 * error)


def test_chances_against_all_draws():
    rng = np.random.default_rng(0)
    for _ in range(300):
        classes = int(rng.integers(1, 5))
        tied = rng.integers(0, 4, classes)
        if tied.sum() < 2:
            continue
        left, own = int(rng.integers(1, tied.sum())), int(rng.integers(classes))
        votes, weight = rng.integers(0, 4, classes) * rng.choice([1, 1.7, 0.5]), rng.choice([1, 0.5, 0.37])
        images = np.repeat(np.arange(classes), tied)
        draws = [
            votes + weight * np.bincount(drawn, minlength=classes) for drawn in combinations(images, left)
        ]
        expected = np.mean([draw.round(9).argmax() == own for draw in draws])
        chance = chance_to_win(votes, tied, weight, left, own, powers_on_circle(left))
        assert chance == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_the_gallery_makes_no_difference(dtype):
    images, labels = load_digits(return_X_y=True)
    for values in (images, codes_of(images)):
        gallery, y, queries, z = parts(values, labels)
        gallery, queries = gallery.to(dtype), queries.to(dtype)
        expected = knn_accuracy(gallery, y, queries, z)
        for seed in range(5):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
            assert knn_accuracy(gallery[order], y[order], queries, z) == expected


def test_small_galleries_and_one_class():
    gallery = torch.eye(3)
    assert knn_accuracy(gallery, torch.tensor([0, 1, 2]), gallery, torch.tensor([0, 1, 2]), k=20) == 1.0
    assert knn_accuracy(gallery, torch.zeros(3).long(), gallery, torch.zeros(3).long()) == 1.0
    assert knn_accuracy(gallery, torch.zeros(3).long(), gallery, torch.full((3,), 4)) == 0.0


def test_any_numbers_are_classes():
    gallery, labels = torch.eye(3), torch.tensor([7, -1, 10**9])
    assert knn_accuracy(gallery, labels, gallery, labels) == 1.0
    assert knn_accuracy(gallery, labels, gallery, torch.tensor([7, 3, -2])) == pytest.approx(1 / 3)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="queries: .*got 1 and 2"):
        knn_accuracy(torch.eye(3), torch.zeros(3).long(), torch.randn(2, 3), torch.zeros(1).long())
    with pytest.raises(ValueError, match="gallery: .*got 0"):
        knn_accuracy(torch.eye(3)[:0], torch.zeros(0).long(), torch.randn(2, 3), torch.zeros(2).long())
    with pytest.raises(ValueError, match="queries: expected 3 columns each, got 2"):
        knn_accuracy(torch.eye(3), torch.zeros(3).long(), torch.randn(2, 2), torch.zeros(2).long())
    with pytest.raises(ValueError, match="gallery: .*NaN"):
        knn_accuracy(torch.eye(3) / 0, torch.zeros(3).long(), torch.randn(2, 3), torch.zeros(2).long())
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), k=0)
