"""Which patches are masked: functions of seed, step and an image's place in the batch of all ranks."""

import pytest
import torch

from bincomm.engine.masks import SHARE, Masks


def grids(places, rows, columns):
    """(n, 2, rows, columns) bool, true where a patch is masked."""
    masked = torch.zeros(len(places), 2 * rows * columns, dtype=torch.bool)
    return masked.scatter(1, places, True).view(-1, 2, rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (4, 4), (1, 2), (3, 5)])
def test_one_crop_of_every_image_is_masked_in_a_fixed_share_of_its_patches(rows, columns):
    masks = Masks(0, rows, columns)
    places = masks(200)
    assert places.shape == (200, masks.count)
    assert masks.count == max(1, round(SHARE * rows * columns))
    in_crops = grids(places, rows, columns).flatten(2).sum(2)
    assert in_crops.sum(1).tolist() == [masks.count] * 200  # no place twice
    assert (in_crops > 0).sum(1).tolist() == [1] * 200
    assert 60 < (in_crops[:, 0] > 0).sum() < 140


def test_masked_patches_lie_in_blocks_anywhere():
    masked = grids(Masks(0, 14, 14)(400), 14, 14).any(1)
    neighbors = (masked[:, 1:] & masked[:, :-1]).sum((1, 2)) + (masked[..., 1:] & masked[..., :-1]).sum(
        (1, 2)
    )
    scattered = masked.flatten(1)[:, torch.randperm(196)].view_as(masked)
    of_scattered = (scattered[:, 1:] & scattered[:, :-1]).sum() + (
        scattered[..., 1:] & scattered[..., :-1]
    ).sum()
    assert neighbors.sum() > 2 * of_scattered
    often = masked.float().mean(0)
    assert often.min() > 0.05
    assert often.max() < 0.6
    # In random order: the first ones, which are a sample, are masked anywhere, not at the blocks' centers.
    sides = [(half.sum() / masked[:, :, :7].sum()).item() for half in (masked[:, :, 7:], masked[:, :7])]
    assert sides == pytest.approx([1, 1], abs=0.2)


def test_the_order_of_an_images_places_is_random():
    """So that the first few are a sample of them, and not those that are nearest to the blocks' centers."""
    places = Masks(0, 14, 14)(500) % 196
    steps = (places[:, :1] - places[:, 1:2]).abs()
    near = ((steps == 1) | (steps == 14)).float().mean()
    assert near < 0.15  # of those nearest to a center nearly all


def test_masks_depend_on_seed_step_and_image_alone():
    first, again, other = Masks(3, 4, 4), Masks(3, 4, 4), Masks(4, 4, 4)
    steps = [first(12) for _ in range(3)]
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], other(12))
    assert not torch.equal(steps[0][0], steps[0][1])
    again.load_state_dict({"step": torch.tensor(2)})
    assert torch.equal(again(12), steps[2])
    ranks = [Masks(3, 4, 4, rank) for rank in range(3)]
    for step in steps:
        assert torch.equal(torch.cat([rank(4) for rank in ranks]), step)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_draws_are_uniform_for_any_seed(seed):
    places = torch.cat([Masks(seed, 14, 14)(1000), Masks(seed, 14, 14)(1000)]) % 196
    assert places.double().mean().item() == pytest.approx(97.5, abs=3)
