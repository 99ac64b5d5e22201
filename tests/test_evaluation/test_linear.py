import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from bincomm.evaluation import linear
from bincomm.evaluation.linear import linear_probe


def gaussians(images, classes=10, dimensions=32):
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=images)
    means = 0.5 * rng.normal(size=(classes, dimensions))
    return means[labels] + rng.normal(size=(images, dimensions)) + 1, labels


def split(images, labels, gallery):
    parts = images[:gallery], labels[:gallery], images[gallery:], labels[gallery:]
    return [torch.as_tensor(x) for x in parts]


@pytest.mark.slow
def test_agrees_with_logistic_regression_on_the_digits():
    images, labels = load_digits(return_X_y=True)
    expected, actual = [], []
    # It overfits pixels without a penalty; the probe does not, as it ends after 100 epochs. Each penalty is
    # the best of 0.001, 0.01, 0.1 and 1 by threefold cross-validation (GridSearchCV) on its gallery.
    for seed, penalty in enumerate((0.01, 0.01, 0.1)):  # 360 queries each: one image is 0.28 points
        parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
        gallery, queries, gallery_labels, query_labels = parts
        model = LogisticRegression(C=penalty, max_iter=1000)
        expected.append(model.fit(gallery, gallery_labels).score(queries, query_labels))
        parts = (torch.as_tensor(x) for x in (gallery, gallery_labels, queries, query_labels))
        actual.append(linear_probe(*parts).accuracy)
    assert np.mean(actual) == pytest.approx(np.mean(expected), abs=0.005)
    assert np.mean(expected) > 0.96


@pytest.mark.parametrize(("scale", "offset"), [(1e-30, 0), (1.0, 0), (1e30, 0), (1.0, 30.0)])
def test_agrees_with_logistic_regression_at_any_scale_and_offset(scale, offset):
    images, labels = gaussians(8000, dimensions=16)
    model = LogisticRegression(max_iter=1000).fit(images[:4000], labels[:4000])
    expected = model.score(images[4000:], labels[4000:])
    assert 0.5 < expected < 0.9
    probe = linear_probe(*split((images * scale + offset).astype(np.float32), labels, 4000), epochs=40)
    assert probe.accuracy == pytest.approx(expected, abs=0.005)


def test_steps_are_those_of_torch():
    images, labels = gaussians(100)
    x, y = torch.tensor(images).float(), torch.tensor(labels)
    rates, epochs = [0.01, 0.3], 20
    # Fewer images than a batch.
    classifiers = linear.train_classifiers(x, y, 10, rates, epochs, 256, torch.Generator())
    for rate, weights in zip(rates, classifiers, strict=True):
        model = torch.nn.Linear(32, 10, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weights, model.weight.detach(), rtol=1e-4, atol=1e-5)


def test_the_learning_rate_is_not_chosen_by_the_queries():
    gallery, y, queries, z = split(*gaussians(1500), 1000)
    rates = (1e-4, 1e-2, 1.0, 10.0, 1000.0)
    own = {
        rate: linear_probe(gallery, y, queries, z, learning_rates=[rate], epochs=40).accuracy
        for rate in rates
    }
    taken = linear_probe(gallery, y, queries, z, learning_rates=rates, epochs=40)
    assert taken.accuracy >= max(own.values()) - 0.03 > own[1e-4]
    # As good as told in advance, and the same whatever the queries are.
    for labels in (z.roll(1), torch.zeros_like(z)):
        assert (
            linear_probe(gallery, y, queries, labels, learning_rates=rates, epochs=40).learning_rate
            == taken.learning_rate
        )


def test_a_tenth_of_every_class_is_held_out(monkeypatch):
    trained_on, train = [], linear.train_classifiers
    monkeypatch.setattr(
        linear, "train_classifiers", lambda x, y, *rest: trained_on.append(y) or train(x, y, *rest)
    )
    y = torch.arange(4).repeat_interleave(torch.tensor([200, 30, 45, 1]))
    linear_probe(torch.randn(276, 3), y, torch.randn(2, 3), torch.zeros(2), epochs=1)
    held_out = [y.bincount() - rest.bincount(minlength=4) for rest in trained_on[:-1]]
    assert len(held_out) == 4  # in turn, until 100 images have chosen
    for counts in held_out:
        assert ((counts - y.bincount() / 10).abs() < 1).all()
    assert (sum(held_out) <= y.bincount()).all()
    assert len(trained_on[-1]) == 276


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    parts = split(*gaussians(600, dimensions=4), 400)
    state = torch.get_rng_state()
    first = linear_probe(*parts, epochs=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert linear_probe(*parts, epochs=5) == first
    others = [linear_probe(*parts, epochs=5, seed=seed) for seed in range(1, 6)]
    assert any(other != first for other in others)


def test_small_galleries_and_odd_classes():
    three, labels = torch.eye(3), torch.tensor([7, 1000, -2])
    assert linear_probe(three, labels, three, labels).accuracy == 1.0
    assert linear_probe(three, labels, three, torch.tensor([7, 3, 2000])).accuracy == 1 / 3  # two never seen
    assert linear_probe(three, torch.full((3,), 4), torch.randn(5, 3), torch.full((5,), 4)).accuracy == 1.0
    assert linear_probe(three[:1], labels[:1], three, torch.full((3,), 7)).accuracy == 1.0
    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 50, 1]))  # the last class has one image
    gallery = 5 * three[labels] + torch.rand(101, 3)
    assert linear_probe(gallery, labels, gallery[:100], labels[:100]).accuracy == 1.0
    nothing, labels = torch.zeros(4, 2), torch.tensor([0, 1, 1, 1])  # the bias alone
    assert linear_probe(nothing, labels, nothing, labels).accuracy == 0.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision(dtype):
    gallery, y, queries, z = split(*gaussians(1500), 1000)
    expected = linear_probe(gallery.float(), y, queries.float(), z, learning_rates=[1.0]).accuracy
    actual = linear_probe(gallery.to(dtype), y, queries.to(dtype), z, learning_rates=[1.0]).accuracy
    assert actual == pytest.approx(expected, abs=0.01)


def test_what_is_wrong_is_named():
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="queries: .*got 1 and 2"):
        linear_probe(x, y, x[:2], y[:1])
    with pytest.raises(ValueError, match="gallery: .*got 0"):
        linear_probe(x[:0], y[:0], x, y)
    with pytest.raises(ValueError, match="queries: expected 3 columns each, got 2"):
        linear_probe(x, y, x[:, :2], y)
    with pytest.raises(ValueError, match="gallery: .*NaN"):
        linear_probe(x / 0, y, x, y)
    with pytest.raises(ValueError, match="learning_rates: .*none"):
        linear_probe(x, y, x, y, learning_rates=[])
