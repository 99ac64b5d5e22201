import numpy as np
import pytest

from bincomm.data.order import SUBSTITUTES, Order


def test_every_image_once_an_epoch():
    order = Order([50, 30], None, seed=3)
    epochs = [order.epoch(epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(80))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], Order([50, 30], None, seed=4).epoch(0))
    assert np.array_equal(
        epochs[1], Order([50, 30], None, seed=3).epoch(1)
    )  # no other epoch is needed for it


def test_an_epoch_is_mixed_through_and_through():
    """Neighbors in the source are no nearer in the epoch than any others."""
    slots = np.argsort(Order([10_000], None, seed=0).epoch(0))
    gaps = np.abs(np.diff(slots))
    assert gaps.mean() == pytest.approx(10_000 / 3, rel=0.03)


@pytest.mark.parametrize(("weights", "counts"), [((1, 1), (50, 50)), ((3, 1), (75, 25)), ((2, 1), (67, 33))])
def test_weights_are_shares_of_an_epoch(weights, counts):
    order = Order([90, 10], weights, seed=0)
    uses = np.zeros(100, int)
    for epoch in range(30):
        images = order.epoch(epoch)
        assert ((images < 90).sum(), (images >= 90).sum()) == counts
        uses += np.bincount(images, minlength=100)
        for part in (uses[:90], uses[90:]):  # no image comes twice more than another of its source
            assert part.max() - part.min() <= 1


def test_weights_of_any_size():
    for weights in ((0.1, 0.7), (1e308, 1e308), (1e-300, 2e-300)):
        assert len(Order([7, 3], weights, seed=0).epoch(5)) == 10
    with pytest.raises(ValueError, match="data: the weights .* leave a source without one of the 10 images"):
        Order([7, 3], (1, 1e-9), seed=0)


def test_substitutes_are_of_the_same_source_if_they_can_be():
    order = Order([5, 7], None, seed=0)
    for image, first, end in ((0, 0, 5), (4, 0, 5), (5, 5, 12), (11, 5, 12)):
        substitutes = order.substitutes(image, epoch=2, slot=9)
        assert set(substitutes[:SUBSTITUTES]) == set(range(first, end))
        assert set(substitutes[SUBSTITUTES:]) == set(range(12))  # where a source cannot be used at all
        assert np.array_equal(substitutes, order.substitutes(image, epoch=2, slot=9))
        assert not np.array_equal(substitutes, order.substitutes(image, epoch=2, slot=8))


def test_random_numbers_belong_to_slots():
    order = Order([1000], None, seed=0)
    numbers = order.uniforms(4, np.arange(1000), 50)
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.005)
    correlations = np.corrcoef(numbers)[np.triu_indices(1000, 1)]  # of streams of 50 numbers each
    assert np.abs(correlations).max() < 0.75
    assert np.array_equal(order.uniforms(4, np.array([7]), 50)[0], numbers[7])
    assert not np.array_equal(order.uniforms(5, np.array([7]), 50)[0], numbers[7])
    assert not np.array_equal(Order([1000], None, seed=1).uniforms(4, np.array([7]), 50)[0], numbers[7])
