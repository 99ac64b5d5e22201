import gc
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import weakref
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bincomm import cli
from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.evaluation import video
from bincomm.evaluation.pretrained import Pretrained
from bincomm.evaluation.video import contour_accuracy, evaluate_davis, propagate, region_similarity
from bincomm.pretraining import export_backbone

STRIDE = 16
COLORS = np.array([[40, 40, 40], [230, 20, 20], [20, 20, 230], [20, 230, 20]], np.uint8)  # by object


class Colors(nn.Module):
    """The mean color of every patch, as a conv net's map."""

    feature_info = ({"reduction": STRIDE},)

    def forward_features(self, images):
        return F.avg_pool2d(images, STRIDE)


def pretrained(backbone=None):
    return Pretrained("test", backbone or Colors(), None, PretrainConfig(), torch.device("cpu"))


def square(shape, row, column, side, value=1):
    """A mask with a square, which may lie partly or wholly outside."""
    mask = np.zeros(shape, np.uint8)
    mask[max(row, 0) : max(row + side, 0), max(column, 0) : max(column + side, 0)] = value
    return mask


def codes(masks, stride=STRIDE):
    """Ideal features: a one-hot code of the object at the center of every patch."""
    for mask in masks:
        patches = torch.from_numpy(mask[stride // 2 :: stride, stride // 2 :: stride]).long()
        yield F.one_hot(patches, 4).float()


def similarities(predicted, masks, number=1):
    pairs = zip(predicted, masks, strict=True)
    return [region_similarity(mask.numpy() == number, truth == number) for mask, truth in pairs]


# Figures


def test_j_is_intersection_over_union():
    a = square((60, 80), 10, 10, 10)
    assert region_similarity(a, a) == 1.0
    assert region_similarity(a, square((60, 80), 10, 15, 10)) == 50 / 150
    assert region_similarity(a, square((60, 80), 12, 13, 10)) == 56 / 144
    assert region_similarity(a, square((60, 80), 40, 40, 10)) == 0.0
    assert region_similarity(a, 0 * a) == region_similarity(0 * a, a) == 0.0
    assert region_similarity(0 * a, 0 * a) == 1.0


def test_f_counts_contours_within_the_tolerance():
    # 60 × 80: a diagonal of 100, of which 0.008 is 0.8, so 1 pixel. The contour of a square of 10 pixels is a
    # ring of 11 × 11, 40 pixels.
    a = square((60, 80), 10, 10, 10)
    assert contour_accuracy(a, a) == 1.0
    assert contour_accuracy(a, square((60, 80), 10, 11, 10)) == 1.0
    # Moved by 3: 9 of 11 pixels of the upper and the lower side, 2 of the 9 between them on the right.
    assert contour_accuracy(a, square((60, 80), 10, 13, 10)) == 20 / 40
    assert contour_accuracy(a, square((60, 80), 40, 40, 10)) == 0.0
    both = a + square((60, 80), 40, 40, 10)
    # All of one ring is matched, half of the two.
    assert contour_accuracy(both, a) == contour_accuracy(a, both) == pytest.approx(2 * 0.5 / 1.5)


def test_f_without_contours():
    a = square((60, 80), 10, 10, 10)
    assert contour_accuracy(0 * a, 0 * a) == 1.0
    assert contour_accuracy(a, 0 * a) == contour_accuracy(0 * a, a) == 0.0
    # What fills the image has none either, and a pixel in the lower right corner has one of three.
    assert contour_accuracy(0 * a + 1, 0 * a) == 1.0
    corner = square((60, 80), 59, 79, 1)
    assert video.contour(corner.astype(bool)).tolist() == [[58, 78], [58, 79], [59, 78]]


@pytest.mark.parametrize("shape", [(480, 854), (90, 70)])
def test_f_is_that_of_contours_dilated_by_a_disk(shape):
    rng = np.random.default_rng(0)
    radius = math.ceil(0.008 * math.hypot(*shape))
    disk = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius
    for blur in (1, 3):
        a, b = (ndimage.gaussian_filter(rng.normal(size=shape), blur * s) > 0.02 for s in (1.0, 4.0))
        contours = []
        for mask in (a, b):
            # Where a pixel and those to its right and below are not all alike; at the border it is repeated.
            sizes = {"size": 2, "mode": "nearest", "origin": -1}
            contour = ndimage.maximum_filter(mask, **sizes) != ndimage.minimum_filter(mask, **sizes)
            contours.append(contour)
        shares = [
            (own & ndimage.binary_dilation(other, disk)).sum() / own.sum()
            for own, other in (contours, contours[::-1])
        ]
        expected = 2 * shares[0] * shares[1] / sum(shares)
        assert 0.05 < expected < 0.99
        assert contour_accuracy(a, b) == pytest.approx(expected, abs=1e-12)


# Propagation


def test_follows_an_object():
    masks = [square((320, 480), 32 + 16 * i, 48 + 32 * i, 96) for i in range(8)]
    predicted = list(propagate(codes(masks), masks[0]))
    assert min(similarities(predicted, masks[1:])) >= 0.95
    assert similarities(predicted, [masks[0]] * 7)[-1] == 0  # it was not left where it was
    assert predicted[0].dtype == torch.uint8
    assert predicted[0].shape == (320, 480)


def test_follows_an_object_whose_patches_all_differ():
    # Every patch of the object and of the ground has a code of its own; what the object uncovers is new.
    grid, frames = (20, 30), []
    masks = [square((320, 480), 64, 48 + 32 * i, 96) for i in range(8)]
    for i in range(8):
        frame = torch.arange(600).view(grid).clone()
        frame[4:10, 3 + 2 * i : 9 + 2 * i] = 600 + torch.arange(36).view(6, 6)
        frames.append(F.one_hot(frame, 636).float())
    assert min(similarities(propagate(frames, masks[0]), masks[1:])) >= 0.9


def test_follows_two_objects():
    def frame(i):
        return np.maximum(
            square((320, 480), 32, 48 + 32 * i, 96), square((320, 480), 176, 352 - 32 * i, 96, 2)
        )

    masks = [frame(i) for i in range(9)]
    predicted = list(propagate(codes(masks), masks[0]))
    for number in (1, 2):
        assert min(similarities(predicted, masks[1:], number)) >= 0.95


def test_an_object_that_disappears_is_gone():
    masks = [square((320, 480), 96, 336 + 48 * i, 96) for i in range(7)]  # leaves to the right
    assert [mask.any() for mask in masks] == [True] * 3 + [False] * 4
    predicted = list(propagate(codes(masks), masks[0]))
    assert min(similarities(predicted[:2], masks[1:3])) >= 0.9
    assert not any(mask.any() for mask in predicted[2:])


@pytest.mark.parametrize(
    "step, followed", [((0, 12), True), ((0, 13), False), ((12, 0), True), ((13, 0), False)]
)
def test_looks_twelve_patches_far(step, followed):
    masks = [square((480, 480), 16 * y, 16 * x, 16) for y, x in ((2, 2), (2 + step[0], 2 + step[1]))]
    (predicted,) = propagate(codes(masks), masks[0])
    center = predicted[16 * (2 + step[0]) + 8, 16 * (2 + step[1]) + 8]
    assert bool(center) == followed
    assert followed or not predicted.any()


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("width", [854, 910, 1152])  # DAVIS-2017's
def test_first_labels_are_those_of_the_nearest_pixels(width, stride):
    mask = np.random.default_rng(0).integers(0, 7, (480, width)).astype(np.uint8)
    grid = 480 // stride, width // 64 * 64 // stride
    expected = Image.fromarray(mask).resize(grid[::-1], Image.Resampling.NEAREST)
    labels = video.patch_labels(torch.from_numpy(mask).long(), grid)
    assert labels.shape == (*grid, 7)
    assert (labels.argmax(-1).numpy() == np.array(expected)).all()


def test_of_two_pixels_beside_a_center_the_later_gives_the_first_label():
    for width, patches in ((848, 52), (736, 44), (36, 3)):
        columns = [math.floor(Fraction((2 * patch + 1) * width, 2 * patches)) for patch in range(patches)]
        mask = torch.arange(width)[None]
        assert video.patch_labels(mask, (1, patches)).argmax(-1)[0].tolist() == columns


def reference(frames, first):
    """By the protocol's words, of all pairs of patches."""
    h, w, _ = frames[0].shape
    rows, columns = (x.flatten() for x in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    far = (rows[:, None] - rows).abs().maximum((columns[:, None] - columns).abs()) > video.RADIUS
    frames = [F.normalize(frame.double(), dim=-1).flatten(0, 1) for frame in frames]
    first = torch.from_numpy(first).long()
    step = first.shape[0] // h
    labels = [F.one_hot(first[step // 2 :: step, step // 2 :: step]).double().flatten(0, 1)]
    for number in range(1, len(frames)):
        context = [0, *range(max(1, number - 7), number)]
        affinity = torch.cat([frames[number] @ frames[other].T for other in context], 1)
        affinity[far.repeat(1, len(context))] = -torch.inf
        best = affinity.topk(5, dim=1)
        weights = torch.zeros_like(affinity).scatter_(1, best.indices, (best.values / 0.1).exp())
        values = torch.cat([labels[other] for other in context])
        labels.append(weights @ values / weights.sum(1, keepdim=True))
    for frame_labels in labels[1:]:
        big = F.interpolate(frame_labels.T.view(1, -1, h, w), first.shape, mode="bilinear")[0]
        low, high = big.amin((1, 2), keepdim=True), big.amax((1, 2), keepdim=True)
        yield ((big - low) / (high - low)).argmax(0)


@pytest.mark.parametrize("radius", [2, 5])
def test_agrees_with_the_definition(radius, monkeypatch):
    monkeypatch.setattr(video, "RADIUS", radius)
    monkeypatch.setattr(video, "TILE", 4)
    frames = [torch.randn(7, 11, 6) for _ in range(14)]
    first = np.random.default_rng(0).integers(0, 3, (7, 11)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    predicted = list(propagate(frames, first))
    expected = list(reference(frames, first))
    assert len(predicted) == len(expected) == 13
    for a, b in zip(predicted, expected, strict=True):
        assert (a == b).float().mean() > 0.995  # where two labels are all but equal, fp32 may take the other


@pytest.mark.slow
def test_the_size_of_tiles_makes_no_difference(monkeypatch):
    noisy = [torch.randn(15, 26, 8) + i for i in range(10)]
    first = square((120, 208), 20, 40, 90)
    # All equally near, but for rounding: which five were taken would depend on that.
    alike = [torch.randn(301).expand(15, 26, -1) * (torch.rand(15, 26, 1) + 0.1)] * 10
    for frames in (noisy, alike):
        masks = []
        for tile in (4, 11, 100):
            monkeypatch.setattr(video, "TILE", tile)
            masks.append(torch.stack(list(propagate(frames, first))))
        assert masks[0].flatten(1).any(1).all()
        assert (masks[0] != masks[2]).float().mean() < 1e-4
        assert (masks[1] != masks[2]).float().mean() < 1e-4


@pytest.mark.slow
def test_only_neighborhoods_are_compared(monkeypatch):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    monkeypatch.setattr(video, "TILE", 4)
    frames = (torch.rand(30, 32, 4) for _ in range(9))
    with Largest() as largest:
        masks = list(propagate(frames, square((60, 64), 10, 10, 30)))
    assert len(masks) == 8
    assert largest.numbers == 4**2 * 8 * (4 + 24) ** 2  # of all pairs there are 8 · 960²


def test_frames_are_read_as_they_are_needed_and_forgotten():
    alive = weakref.WeakSet()

    def frames():
        for _ in range(40):
            frame = F.normalize(torch.rand(6, 8, 4), dim=-1)
            alive.add(frame)
            yield frame
            del frame

    def held():
        gc.collect()
        return sum(type(x) is torch.Tensor and x.shape == (6, 8, 4) for x in gc.get_objects())

    counts = []
    gc.freeze()  # what was there before needs no search
    for number, _ in enumerate(propagate(frames(), square((48, 64), 8, 8, 16))):
        if number in (10, 38):
            counts.append((held(), len(alive)))
    gc.unfreeze()
    assert counts[0] == counts[1]
    assert counts[1][0] <= 10  # of the first frame, seven before, this one, and the one handed over


def test_gradients_are_not_kept_and_stay_on_outside():
    frames = (torch.rand(4, 4, 3, requires_grad=True) for _ in range(3))
    for mask in propagate(frames, square((8, 8), 0, 0, 4)):
        assert not mask.requires_grad
        assert torch.is_grad_enabled()


def test_what_cannot_be_propagated_is_named():
    first, frame = square((8, 8), 0, 0, 4), torch.rand(4, 4, 3)
    with pytest.raises(ValueError, match="first: .*shape \\(8, 8\\), values from 0 to 0"):
        list(propagate([frame], 0 * first))
    with pytest.raises(ValueError, match="first: .*values from 0 to 255"):
        list(propagate([frame], 255 * first))
    with pytest.raises(ValueError, match="first: .*shape \\(1, 8, 8\\)"):
        list(propagate([frame], first[None]))
    with pytest.raises(ValueError, match="first: .*shape \\(0, 8\\)"):
        list(propagate([frame], first[:0]))
    with pytest.raises(ValueError, match="features: expected at least one frame"):
        list(propagate([], first))
    with pytest.raises(ValueError, match="features: expected \\(h, w, D\\) .*got \\(4, 3\\)"):
        list(propagate([frame[0]], first))
    with pytest.raises(ValueError, match="features: expected \\(4, 4, 3\\) .*got \\(3, 4, 3\\)"):
        list(propagate([frame, frame[1:]], first))
    with pytest.raises(ValueError, match="features: .*NaN"):
        list(propagate([frame, frame / 0], first))


# DAVIS


def write_davis(folder, sequences):
    """DAVIS-2017's folder of sequences, lists of masks (H, W) of (what is visible, what is annotated)."""
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("".join(f"{name}\n" for name in sequences))
    for name, frames in sequences.items():
        images, annotations = (folder / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for number, (visible, annotated) in enumerate(frames):
            Image.fromarray(COLORS[visible]).save(images / f"{number:05}.jpg", quality=95, subsampling=0)
            mask = Image.fromarray(annotated)
            # Of 256 colors, as DAVIS has it: with fewer, Pillow would write fewer bits.
            mask.putpalette(np.random.default_rng(0).integers(256, size=768).tolist())
            assert mask.mode == "P"
            mask.save(annotations / f"{number:05}.png")
    return folder


def moving(frames=5, step=32):
    masks = [square((480, 640), 96, 64 + step * i, 128) for i in range(frames)]
    return list(zip(masks, masks, strict=True))


def two_objects(frames=4):
    masks = [
        np.maximum(square((480, 640), 32, 64 + 16 * i, 128), square((480, 640), 256, 400 - 16 * i, 128, 2))
        for i in range(frames)
    ]
    return list(zip(masks, masks, strict=True))


def test_figures_of_davis_are_means_over_objects(tmp_path):
    # The second object of "pair" is annotated where it is not, in all frames that count but for the first.
    wrong = [(visible, np.where(visible == 2, 0, visible)) for visible, _ in two_objects()]
    for _, mask in wrong[1:]:
        mask[400:464, 32:96] = 2
    wrong[0] = two_objects()[0]
    result = evaluate_davis(pretrained(), write_davis(tmp_path, {"one": moving(), "pair": wrong}))
    one, pair = result["sequences"]["one"], result["sequences"]["pair"]
    assert list(result["sequences"]) == ["one", "pair"]
    assert (one["objects"], pair["objects"], result["objects"]) == (1, 2, 3)
    for name in ("j", "f"):
        assert 0.95 < one[name] <= 1
        assert 0.475 < pair[name] <= 0.5
        assert result[name] == pytest.approx((one[name] + 2 * pair[name]) / 3)
    for figures in (result, one, pair):
        assert figures["jf"] == pytest.approx((figures["j"] + figures["f"]) / 2)


@pytest.mark.slow
def test_neither_the_first_nor_the_last_frame_counts(tmp_path):
    expected = evaluate_davis(pretrained(), write_davis(tmp_path / "right", {"a": moving()}))
    last = moving()
    last[-1] = (last[-1][0], square((480, 640), 300, 0, 100))
    result = evaluate_davis(pretrained(), write_davis(tmp_path / "last", {"a": last}))
    assert result == expected
    # If the first counted, there would be four figures in the mean and not three.
    second = moving()
    second[1] = (second[1][0], 0 * second[1][0])
    result = evaluate_davis(pretrained(), write_davis(tmp_path / "second", {"a": second}))
    assert result["j"] == pytest.approx(expected["j"] * 2 / 3, abs=0.01)


def test_pixels_that_are_not_annotated_are_background(tmp_path):
    # As objects they would make 255 of them; where they cover a predicted pixel, it is wrong.
    frames = [
        (visible, np.where(np.arange(640) < 160, np.uint8(255), mask)) for visible, mask in moving(4, 0)
    ]
    first = moving(1)[0][0]
    frames[0] = first, np.where(np.arange(480)[:, None] < 400, first, np.uint8(255))
    result = evaluate_davis(pretrained(), write_davis(tmp_path, {"a": frames}))
    assert result["objects"] == 1
    assert result["j"] == pytest.approx(32 / 128, abs=0.01)


@pytest.mark.parametrize("missing", [1, 2])
def test_objects_are_those_of_the_first_frame(missing, tmp_path):
    frames = two_objects()
    frames[0] = (frames[0][0], np.where(frames[0][1] == missing, 0, frames[0][1]))
    result = evaluate_davis(pretrained(), write_davis(tmp_path, {"a": frames}))
    assert result["objects"] == 1
    assert result["j"] > 0.95


def as_davis_2016(folder):
    """A folder of DAVIS-2017 as that of DAVIS-2016: one object, 255; a line for every frame; some masks with
    colors and transparency."""
    lines = []
    for frame in sorted(folder.glob("JPEGImages/480p/*/*.jpg")):
        path = folder / "Annotations" / "480p" / frame.parent.name / f"{frame.stem}.png"
        mask = Image.fromarray(np.where(np.array(Image.open(path)), np.uint8(255), np.uint8(0)))
        kinds = {"00001": "RGBA", "00002": "RGB", "00003": "1"}
        mask.convert(kinds.get(frame.stem, "L")).save(path)
        lines.append(f"/{frame.relative_to(folder)} /{path.relative_to(folder)} \n")
    (folder / "ImageSets" / "480p").mkdir()
    (folder / "ImageSets" / "480p" / "val.txt").write_text("".join(lines))
    (folder / "ImageSets" / "2017" / "val.txt").unlink()
    return folder


@pytest.mark.slow
def test_davis_2016_has_one_object_in_a_sequence(tmp_path):
    folder = write_davis(tmp_path / "davis", {"a": moving(5), "b": moving(5, 0)})
    expected = evaluate_davis(pretrained(), folder)
    assert expected["set"] == "DAVIS-2017"
    result = evaluate_davis(pretrained(), as_davis_2016(folder), masks=tmp_path / "masks")
    assert result == expected | {"set": "DAVIS-2016"}
    for sequence in "ab":
        paths = sorted((tmp_path / "masks" / sequence).iterdir())
        assert [path.name for path in paths] == [f"{number:05}.png" for number in range(5)]
        masks = [Image.open(path) for path in paths]
        assert {mask.mode for mask in masks} == {"L"}
        assert all(np.unique(mask).tolist() == [0, 255] for mask in masks)


def test_several_objects_are_one_in_davis_2016(tmp_path):
    folder = as_davis_2016(write_davis(tmp_path, {"a": two_objects()}))
    assert evaluate_davis(pretrained(), folder)["objects"] == 1


def test_masks_of_davis_2016_beside_the_list_of_2017_are_named(tmp_path):
    folder = as_davis_2016(write_davis(tmp_path, {"a": moving(3)}))
    (folder / "ImageSets" / "2017" / "val.txt").write_text("a\n")
    with pytest.raises(
        ValueError, match="a/00000.png: expected an object, .*; masks of 0 and 255 are DAVIS-2016"
    ):
        evaluate_davis(pretrained(), folder)


def test_predicted_masks_are_what_is_measured(tmp_path):
    frames = two_objects()
    folder, output = write_davis(tmp_path / "davis", {"a": frames}), tmp_path / "masks"
    result = evaluate_davis(pretrained(), folder, masks=output)
    assert result == evaluate_davis(pretrained(), folder)
    paths = sorted(output.rglob("*.*"))
    assert [str(path.relative_to(output)) for path in paths] == [f"a/{number:05}.png" for number in range(4)]
    pictures = [Image.open(path) for path in paths]
    palette = Image.open(folder / "Annotations" / "480p" / "a" / "00000.png").getpalette()
    assert all(picture.getpalette() == palette for picture in pictures)
    masks = [np.array(picture) for picture in pictures]
    assert (masks[0] == frames[0][1]).all()
    figures = [
        np.mean([region_similarity(masks[i] == number, frames[i][1] == number) for i in (1, 2)])
        for number in (1, 2)
    ]
    assert np.mean(figures) == result["j"]
    assert region_similarity(masks[3] == 2, frames[3][1] == 2) > 0.9  # the last frame is followed, too


@pytest.mark.parametrize(
    "shape, stride, expected",
    [
        ((480, 854), 16, (480, 832)),
        ((480, 854), 8, (480, 832)),
        ((480, 910), 32, (480, 896)),
        ((854, 480), 16, (832, 480)),
        ((1080, 1920), 16, (480, 832)),
        ((480, 854), 14, (476, 854)),
        ((480, 480), 16, (480, 480)),
    ],
)
def test_frames_are_resized_as_by_dino(shape, stride, expected):
    assert video.resized_shape(shape, stride) == expected


def test_colors_are_normalized_and_frames_resized(tmp_path):
    batches = []

    class Watched(Colors):
        def forward_features(self, images):
            batches.append(images)
            return super().forward_features(images)

    masks = [square((240, 427), 60, 60 + 8 * i, 60) for i in range(3)]
    write_davis(tmp_path, {"a": list(zip(masks, masks, strict=True))})
    evaluate_davis(pretrained(Watched()), tmp_path)
    assert [tuple(images.shape) for images in batches] == [(1, 3, 480, 832)] * 2
    expected = (40 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(batches[0][0, :, -1, -1], expected, atol=0.03)


def test_a_vit_of_timm_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "SIDE", 160)
    masks = [square((160, 200), 32, 32 + 8 * i, 64) for i in range(4)]
    write_davis(tmp_path, {"a": list(zip(masks, masks, strict=True))})
    backbone = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    result = evaluate_davis(pretrained(backbone), str(tmp_path))
    assert result["j"] > 0.5  # untrained; the colors tell
    assert 0 < result["f"] <= 1


@pytest.mark.long
def test_the_command_alone_and_on_two_ranks(tmp_path, capsys, monkeypatch):
    """Three sequences, of which one rank tracks two, and images, half of whose features a rank computes."""
    config = configure("digits", backbone="test_resnet", backbone_args={})
    export_backbone(create_networks(config, torch.device("cpu"))[1], config, tmp_path)
    sequences = {"c": moving(3), "a": two_objects(3), "b": moving(3, 48)}
    folder, output = write_davis(tmp_path / "davis", sequences), tmp_path / "result.json"
    for label, color in (("a", (200, 0, 0)), ("b", (0, 0, 200))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            path = tmp_path / "images" / label / f"{i}.png"
            Image.new("RGB", (20, 20), tuple(value + 9 * i for value in color)).save(path)
    command = [
        "evaluate",
        str(tmp_path / "model.safetensors"),
        f"--davis={folder}",
        f"--data={tmp_path / 'images'}",
        "--protocols=knn,map",
        f"--output={output}",
        f"--masks={tmp_path / 'masks'}",
    ]
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    assert cli.main(command) == 0
    alone = json.loads(output.read_text())
    assert list(alone["davis"]["sequences"]) == ["c", "a", "b"]
    assert alone["gallery_images"] == 10
    assert f"DAVIS-2017, 4 objects: J&F {alone['davis']['jf']:.2%}" in capsys.readouterr().out
    output.unlink()
    written = {path: path.read_bytes() for path in (tmp_path / "masks").rglob("*.png")}
    assert len(written) == 9
    shutil.rmtree(tmp_path / "masks")
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "another"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bincomm.cli", *command],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    texts = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    printed = "".join(output for output, _ in texts)
    assert printed.count("DAVIS-2017, 4 objects") == printed.count("10 images of 2 classes") == 1
    together = json.loads(output.read_text())
    assert together.pop("seconds").keys() == alone.pop("seconds").keys()
    assert together == alone
    assert written == {path: path.read_bytes() for path in (tmp_path / "masks").rglob("*.png")}


@pytest.mark.slow
def test_what_is_missing_of_davis_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "SIDE", 160)
    folder = write_davis(tmp_path, {"a": moving(4), "b": moving(4)})
    frames, masks = (folder / kind / "480p" / "b" for kind in ("JPEGImages", "Annotations"))

    def expect(match):
        with pytest.raises(ValueError, match=match):
            evaluate_davis(pretrained(), folder)

    def without(path):
        data = path.read_bytes()
        path.unlink()
        expect(f"{path}: expected a file")
        path.write_bytes(data)

    without(masks / "00000.png")
    without(masks / "00002.png")
    without(frames / "00002.jpg")
    whole = (masks / "00001.png").read_bytes()
    (masks / "00001.png").write_bytes(whole[:100])
    expect("b/00001.png: cannot be read")
    Image.fromarray(square((240, 320), 0, 0, 9)).save(masks / "00001.png")
    expect("b/00001.png: expected 640×480 pixels .*got 320×240")
    Image.new("RGB", (640, 480)).save(masks / "00001.png")
    expect("b/00001.png: expected a mask of one eight-bit channel, got pixels of kind RGB")
    (masks / "00001.png").write_bytes(whole)
    data = (frames / "00001.jpg").read_bytes()
    Image.new("RGB", (640, 240)).save(frames / "00001.jpg")
    expect("b/00001.jpg: expected 640×480 pixels .*got 640×240")
    (frames / "00001.jpg").write_bytes(b"no image")
    expect("b/00001.jpg: cannot be read")
    (frames / "00001.jpg").write_bytes(data)
    Image.fromarray(np.zeros((480, 640), np.uint8)).save(masks / "00000.png")
    expect("b/00000.png: expected an object")
    for path in [*frames.iterdir(), *masks.iterdir()]:
        if path.stem > "00001":
            path.unlink()
    expect("JPEGImages/480p/b: expected at least 3 frames, got 2")
    for path in [*frames.iterdir(), *masks.iterdir()]:
        path.unlink()
    expect("JPEGImages/480p/b: expected at least 3 frames, got 0")
    (folder / "ImageSets" / "2017" / "val.txt").write_text("\n")
    expect("val.txt: expected names of sequences, got none")
    (folder / "ImageSets" / "2017" / "val.txt").write_text("a\n", encoding="utf-16")
    expect("val.txt: expected names of sequences in UTF-8, got .*byte 0xff")
    with pytest.raises(
        ValueError, match="davis: expected .* got .*nowhere, which cannot be read: No such file"
    ):
        evaluate_davis(pretrained(), folder / "nowhere")
