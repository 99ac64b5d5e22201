import numpy as np
import pytest
import torch

sklearn = pytest.importorskip("sklearn", reason="the independent check is scikit-learn")
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402

from bincomm.evaluation.knn import knn_accuracy  # noqa: E402


@pytest.mark.parametrize("codes", [False, True])
def test_agrees_with_scikit_learn(codes):
    images, labels = load_digits(return_X_y=True)
    if codes:
        images = np.where(images @ np.random.default_rng(0).normal(size=(64, 48)) > 0, 1.0, -1.0)
    gallery, queries, y, z = images[:1200], images[1200:], labels[:1200], labels[1200:]
    votes = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = (votes.fit(gallery, y).predict(queries) == z).mean()
    found = knn_accuracy(*(torch.tensor(x) for x in (gallery, y, queries, z)), block=100)
    # Among equally similar codes at the k-th place either may be taken; real features have no such ties.
    assert found == pytest.approx(expected, abs=0.02 if codes else 1e-9)
    assert expected > 0.8


def test_small_galleries_and_one_class():
    gallery = torch.eye(3)
    assert knn_accuracy(gallery, torch.tensor([0, 1, 2]), gallery, torch.tensor([0, 1, 2]), k=20) == 1.0
    assert knn_accuracy(gallery, torch.zeros(3).long(), gallery, torch.zeros(3).long()) == 1.0
    assert knn_accuracy(gallery, torch.zeros(3).long(), gallery, torch.full((3,), 4)) == 0.0


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="queries: .*got 1 and 2"):
        knn_accuracy(torch.eye(3), torch.zeros(3).long(), torch.randn(2, 3), torch.zeros(1).long())
    with pytest.raises(ValueError, match="gallery: .*got 0"):
        knn_accuracy(torch.eye(3)[:0], torch.zeros(0).long(), torch.randn(2, 3), torch.zeros(2).long())
    with pytest.raises(ValueError, match="queries: expected 3 columns each, got 2"):
        knn_accuracy(torch.eye(3), torch.zeros(3).long(), torch.randn(2, 2), torch.zeros(2).long())
    with pytest.raises(ValueError, match="gallery: .*NaN"):
        knn_accuracy(torch.eye(3) / 0, torch.zeros(3).long(), torch.randn(2, 3), torch.zeros(2).long())
