import io
import json
from collections import Counter
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_colors import Colors, pretrained
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.linalg import eigh
from scipy.ndimage import binary_fill_holes, gaussian_filter

import bincomm
from bincomm import cli
from bincomm.building import create_networks
from bincomm.configuration import configure
from bincomm.distributed.ranks import Ranks
from bincomm.evaluation.coco import open_objects
from bincomm.evaluation.evaluate import describe
from bincomm.evaluation.objects import average_precision, cut_objects, evaluate_objects, foreground
from bincomm.pretraining import export_backbone

COLORS = [(20, 20, 230), (230, 20, 20), (20, 230, 20), (235, 235, 20)]  # background, objects


# Cuts


def scene(shape, *boxes):
    """Numbers (h, w) of what patches show: 0, and 1, 2, ... in boxes of (top, left, bottom, right)."""
    numbers = np.zeros(shape, int)
    for number, (top, left, bottom, right) in enumerate(boxes, 1):
        numbers[top:bottom, left:right] = number
    return numbers


def features_of(numbers, width=8):
    """Features of another direction for each number, of random lengths."""
    rng = np.random.default_rng(0)
    features = np.eye(width)[numbers] * rng.uniform(0.5, 2, (*numbers.shape, 1))
    return torch.from_numpy(features + rng.normal(0, 0.02, features.shape)).float()


def found_numbers(numbers, masks):
    """Which number each mask shows, exactly."""
    for mask in masks:
        (number,) = np.unique(numbers[mask])
        assert (mask == (numbers == number)).all()
    return [int(numbers[mask][0]) for mask in masks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_objects_are_found_one_by_one(dtype):
    numbers = scene((10, 12), (1, 1, 4, 4), (5, 6, 9, 11))
    masks = cut_objects(features_of(numbers).to(dtype))
    # λ is about εn / patches, so that the larger is cut off first. The third cut finds nothing new.
    assert found_numbers(numbers, masks) == [2, 1]


def test_three_objects_are_found_and_no_more():
    numbers = scene((12, 12), (1, 1, 4, 4), (6, 6, 10, 11), (1, 7, 4, 11), (8, 1, 11, 4))
    masks = cut_objects(features_of(numbers))
    assert len(masks) == 3
    assert len(set(found_numbers(numbers, masks))) == 3
    assert 0 not in found_numbers(numbers, masks)


def test_parts_that_do_not_touch_are_two_objects():
    numbers = scene((10, 10), (1, 1, 4, 4)) + scene((10, 10), (6, 5, 9, 9))
    masks = cut_objects(features_of(numbers))
    assert sorted(int(mask.sum()) for mask in masks) == [9, 12]
    assert (sum(masks) == (numbers == 1)).all()
    # Corners do not join patches.
    numbers = scene((10, 10), (1, 1, 4, 4)) + scene((10, 10), (4, 4, 8, 8))
    assert sorted(int(mask.sum()) for mask in cut_objects(features_of(numbers))) == [9, 16]


def test_a_hole_belongs_to_its_object():
    numbers = scene((9, 9), (1, 1, 8, 8))
    numbers[3:5, 4:6] = 0
    (mask,) = cut_objects(features_of(numbers))
    assert (mask == scene((9, 9), (1, 1, 8, 8)).astype(bool)).all()


def test_what_has_three_corners_is_background_however_small():
    numbers = np.ones((10, 10), int)
    numbers[1:9, 1:9] = 0
    (mask,) = cut_objects(features_of(numbers))[:1]
    assert (mask == (numbers == 0)).all()
    numbers = scene((10, 10), (0, 0, 2, 10))  # two corners
    assert found_numbers(numbers, cut_objects(features_of(numbers))) == [1]


def test_patches_that_are_all_alike_hold_no_object():
    assert cut_objects(torch.ones(6, 6, 4)) == []
    assert cut_objects(torch.ones(1, 1, 4)) == []
    with pytest.raises(ValueError, match=r"features: expected shape \(h, w, D\), got \(2, 6, 6, 4\)"):
        cut_objects(torch.ones(2, 6, 6, 4))


def test_later_cuts_of_a_hundredth_are_no_object():
    numbers = scene((10, 10), (1, 1, 4, 4))
    numbers[7, 7] = 2
    assert found_numbers(numbers, cut_objects(features_of(numbers))) == [1]
    numbers[7, 6] = 2
    assert found_numbers(numbers, cut_objects(features_of(numbers))) == [1, 2]
    alone = scene((10, 10), (7, 7, 8, 8))
    assert found_numbers(alone, cut_objects(features_of(alone))) == [1]


@pytest.mark.parametrize("seed", range(4))
def test_the_first_cut_is_by_the_eigenvector_of_the_paper(seed):
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(6, 7, 5)))
    features[2:5, 2:6, 0] += 1.5
    unit = F.normalize(features.flatten(0, 1), dim=-1).numpy()
    weights = np.where(unit @ unit.T > 0.15, 1, 1e-5)
    degrees = np.diag(weights.sum(1))
    vector = eigh(degrees - weights, degrees)[1][:, 1].reshape(6, 7)
    for each in (vector, -vector):
        assert (binary_fill_holes(foreground(each)) == cut_objects(features)[0]).all()


def reference(features):
    """MaskCut, step by step: the masks, and why it ended."""
    rows, columns, width = features.shape
    vectors = features.reshape(-1, width).copy()
    masks, cuts = [], []
    while len(cuts) < 3:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.where(lengths > 0, lengths, 1)
        weights = np.where(unit @ unit.T > 0.15, 1, 1e-5)
        degrees = np.diag(weights.sum(1))
        y = eigh(degrees - weights, degrees)[1][:, 1].reshape(rows, columns)
        seed = np.unravel_index(np.abs(y).argmax(), y.shape)
        y *= 1 if y[seed] > y.mean() else -1
        side = y > y.mean()
        if sum(side[corner] for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1))) > 2:
            side, seed = ~side, np.unravel_index(y.argmin(), y.shape)
        cut, reached = np.zeros_like(side), [seed]
        while reached:
            row, column = reached.pop()
            if 0 <= row < rows and 0 <= column < columns and side[row, column] and not cut[row, column]:
                cut[row, column] = True
                reached += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        new = cut & ~np.any([np.zeros_like(cut), *cuts], axis=0)
        if cuts and (cut & cuts[-1]).sum() > 0.5 * (cut | cuts[-1]).sum():
            return masks, "the one before" if new.any() else "the same"
        if cuts and cut.sum() <= 0.01 * cut.size:
            return masks, "small"
        if not new.any():
            return masks, "nothing new"
        masks.append(binary_fill_holes(new))
        cuts.append(cut)
        vectors[cut.flatten()] = 0
    return masks, "three"


def test_all_of_it_is_as_step_by_step():
    reasons = Counter()
    for seed in range(130, 190):  # in 159 and 185 a cut overlaps those before, but not the last
        rng = np.random.default_rng(seed)
        features = gaussian_filter(rng.normal(size=(11, 12, 6)), (1.2, 1.2, 0)) + rng.uniform(0, 0.2)
        masks, reason = reference(features)
        found = cut_objects(torch.from_numpy(features))
        assert len(found) == len(masks)
        assert all((a == b).all() for a, b in zip(found, masks, strict=True))
        reasons[reason] += 1
    assert set(reasons) == {"three", "the same", "the one before", "nothing new", "small"}


def test_the_foreground_by_hand():
    vector = np.zeros((4, 5))
    vector[1, 1:3] = [0.5, 0.9]
    vector[3, 3] = 0.8  # not connected
    for each in (vector, -vector):
        assert np.argwhere(foreground(each)).tolist() == [[1, 1], [1, 2]]
    # Two corners are those of an object, three are not.
    vector = np.zeros((4, 5))
    vector[:2] = 1.0
    for each in (vector, -vector):
        assert (foreground(each) == (vector == 1)).all()
    vector[:, 0] = 1.0
    for each in (vector, -vector):
        assert (foreground(each) == (vector == 0)).all()
    # The largest |y| has four corners: the other side, where it is most different.
    vector = np.full((4, 5), 0.3)
    vector[0, 0] = 1.0
    vector[2, 1:4] = [-0.2, -0.5, -0.2]
    vector[1, 1] = -0.4
    for each in (vector, -vector):
        assert np.argwhere(foreground(each)).tolist() == [[1, 1], [2, 1], [2, 2], [2, 3]]


# Average precision


def rectangle(left, top, width, height):
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def write_annotations(folder, images, annotations):
    """annotations.json of boxes or segmentations, [image, box, ...], and empty images of a size."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in images:
        (folder / "images" / f"{number}.png").touch()
    content = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
            for number, (height, width) in images.items()
        ],
        "categories": [{"id": 1}, {"id": 7}],
        "annotations": [
            {"id": number, "image_id": image, "category_id": 1 + 6 * (number % 2), "iscrowd": 0, "bbox": box}
            | {"segmentation": [rectangle(*box)], "area": box[2] * box[3], **others}
            for number, (image, box, others) in enumerate(annotations, 1)
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return content


def result(image, box, size=(40, 50), score=1.0):
    left, top, width, height = box
    mask = np.zeros(size, np.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    runs = coco_mask.encode(mask)
    segmentation = {"size": list(size), "counts": runs["counts"].decode()}
    return {"image_id": image, "category_id": 1, "segmentation": segmentation, "bbox": box, "score": score}


@pytest.fixture
def precision(tmp_path):
    """A function of annotations and results; masks and boxes are the same, and so are their figures."""

    def measure(annotations, results, images=None):
        images = images or dict.fromkeys([4, 5, 9], (40, 50))
        write_annotations(tmp_path, images, [(image, box, {}) for image, box in annotations])
        figures = average_precision(open_objects(tmp_path), results)
        assert figures["bbox"] == pytest.approx(figures["segm"])
        return figures["segm"]

    return measure


BOXES = [[2, 3, 10, 20], [20, 10, 8, 10]]


def test_precision_of_one_right_box_of_two(precision):
    figures = precision([(4, box) for box in BOXES], [result(4, BOXES[0])])
    # Precision is 1 at the recalls 0, 0.01 to 0.5.
    expected = {"ap": 51 / 101, "ap50": 51 / 101, "ap75": 51 / 101, "ar100": 0.5}
    assert figures == pytest.approx(expected)


def test_precision_of_boxes_of_any_category(precision):
    figures = precision([(4, BOXES[0]), (5, BOXES[1])], [result(4, BOXES[0]), result(5, BOXES[1])])
    assert figures == pytest.approx(dict.fromkeys(["ap", "ap50", "ap75", "ar100"], 1.0))


def test_precision_of_a_wrong_box_before_the_right_one(precision):
    wrong = result(4, [30, 0, 5, 5])
    figures = precision([(4, box) for box in BOXES], [wrong, result(4, BOXES[0])])
    assert figures == pytest.approx({"ap": 51 / 202, "ap50": 51 / 202, "ap75": 51 / 202, "ar100": 0.5})
    assert precision([(4, box) for box in BOXES], [result(4, BOXES[0]), wrong])["ap"] == pytest.approx(
        51 / 101
    )


def test_precision_by_the_overlap(precision):
    # An IoU of 0.65: right at 0.5, 0.55, 0.6, and, as fractions are rounded alike, at 0.65.
    figures = precision([(5, [0, 0, 20, 20])], [result(5, [0, 0, 20, 13])])
    assert figures == pytest.approx({"ap": 0.4, "ap50": 1.0, "ap75": 0.0, "ar100": 0.4})


def test_precision_of_nothing(precision):
    assert precision([(4, BOXES[0])], []) == dict.fromkeys(["ap", "ap50", "ap75", "ar100"], 0.0)


def test_images_without_objects_count(precision):
    figures = precision([(5, BOXES[0])], [result(4, BOXES[1]), result(5, BOXES[0]), result(9, BOXES[0])])
    assert figures["ap"] == pytest.approx(0.5)
    assert figures["ar100"] == 1


def test_crowds_are_neither_to_be_found_nor_wrong(tmp_path):
    runs = {"counts": [0, 40 * 20, 40 * 30], "size": [40, 50]}
    crowd = {"segmentation": runs, "iscrowd": 1}
    write_annotations(tmp_path, {4: (40, 50)}, [(4, [0, 0, 20, 40], crowd), (4, [30, 5, 10, 10], {})])
    found = [result(4, [2, 3, 5, 6]), result(4, [9, 9, 6, 6]), result(4, [30, 5, 10, 10])]
    assert average_precision(open_objects(tmp_path), found)["segm"]["ap"] == pytest.approx(1.0)
    del crowd["iscrowd"]
    write_annotations(tmp_path, {4: (40, 50)}, [(4, [0, 0, 20, 40], crowd), (4, [30, 5, 10, 10], {})])
    assert average_precision(open_objects(tmp_path), found)["segm"]["ap"] == pytest.approx(51 / 303)


def test_an_object_of_the_number_zero_is_found(tmp_path):
    content = write_annotations(tmp_path, {0: (40, 50)}, [(0, BOXES[0], {})])
    content["annotations"][0]["id"] = 0
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    assert average_precision(open_objects(tmp_path), [result(0, BOXES[0])])["bbox"]["ap"] == pytest.approx(1)


# Images


def write_scenes(folder, scenes, scale=8):
    """Images of scenes (h, w), a patch of `scale` pixels, and what is in them as polygons; numbers of images
    are not in their order."""
    images, annotations = {}, []
    for index, numbers in enumerate(scenes):
        image = 100 - 7 * index
        images[image] = tuple(scale * side for side in numbers.shape)
        for number in range(1, numbers.max() + 1):
            rows, columns = np.nonzero(numbers == number)
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
            annotations.append((image, [scale * side for side in box], {}))
    content = write_annotations(folder, images, annotations)
    for image, numbers in zip(images, scenes, strict=True):
        pixels = np.array(COLORS, np.uint8)[numbers].repeat(scale, 0).repeat(scale, 1)
        Image.fromarray(pixels).save(folder / "images" / f"{image}.png")
    return content


SCENES = [
    scene((12, 12), (1, 1, 4, 4), (6, 6, 11, 11)),
    scene((12, 12), (2, 3, 9, 8)),
    scene((12, 24), (1, 2, 5, 10), (6, 14, 11, 22), (7, 2, 11, 6)),
]


def test_objects_of_one_color_each_are_found(tmp_path):
    write_scenes(tmp_path / "set", SCENES)
    figures = evaluate_objects(pretrained(), tmp_path / "set", size=96, masks=tmp_path / "predicted")
    perfect = dict.fromkeys(["ap", "ap50", "ap75", "ar100"], pytest.approx(1.0))
    assert figures == {"bbox": perfect, "segm": perfect, "images": 3, "objects": 6, "found": 6}
    found = json.loads((tmp_path / "predicted" / "objects.json").read_text())
    assert [each["image_id"] for each in found] == [86, 86, 86, 93, 100, 100]
    assert found[0]["segmentation"]["size"] == [96, 192]  # its own, not the square's
    assert sorted(each["bbox"] for each in found[4:]) == [[8, 8, 24, 24], [48, 48, 40, 40]]


def test_what_is_written_has_the_same_figures_by_pycocotools(tmp_path):
    # Objects beside the grid of patches, larger than they can be found.
    write_scenes(
        tmp_path, [scene((40, 60), (4, 5, 13, 17), (20, 31, 37, 50)), scene((50, 40), (9, 8, 31, 29))], 3
    )
    figures = evaluate_objects(pretrained(), tmp_path, size=96, masks=tmp_path)
    with redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "annotations.json")
        found = truth.loadRes(str(tmp_path / "objects.json"))
        for kind in ("bbox", "segm"):
            evaluation = COCOeval(truth, found, kind)
            evaluation.params.useCats = 0
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            expected = dict(zip(["ap", "ap50", "ap75", "ar100"], evaluation.stats[[0, 1, 2, 8]], strict=True))
            assert figures[kind] == pytest.approx(expected)
            assert 0.1 < figures[kind]["ap"] < 0.99


def test_the_order_in_the_file_makes_no_difference(tmp_path):
    scenes = [*SCENES, scene((12, 12), (0, 0, 3, 12), (4, 4, 6, 8)), np.kron(SCENES[0], np.eye(2, dtype=int))]
    content = write_scenes(tmp_path, scenes)
    figures = evaluate_objects(pretrained(), tmp_path, size=96)
    assert 0 < figures["segm"]["ap"] < 1
    rng = np.random.default_rng(0)
    for records in (content["images"], content["annotations"], content["categories"]):
        rng.shuffle(records)
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    assert evaluate_objects(pretrained(), tmp_path, size=96) == figures


def test_ranks_share_the_images(tmp_path):
    write_scenes(tmp_path, SCENES)
    shares = []

    class Recorded(Ranks):
        """All ranks in turn, in one process."""

        def gather(self, value):
            shares.append(value)
            return shares

    cpu = torch.device("cpu")
    results = [
        evaluate_objects(pretrained(), tmp_path, size=96, ranks=Recorded(rank, 2, 0, cpu)) for rank in (1, 0)
    ]
    assert [list(share) for share in shares] == [[93], [86, 100]]
    assert results == [{}, evaluate_objects(pretrained(), tmp_path, size=96)]


def test_images_are_seen_as_squares_of_whole_patches(tmp_path):
    write_scenes(tmp_path, SCENES)
    seen = []

    class Watched(Colors):
        def forward_features(self, images):
            seen.append(tuple(images.shape))
            return super().forward_features(images)

    evaluate_objects(pretrained(Watched()), tmp_path, size=90)
    assert seen == 3 * [(1, 3, 88, 88)]


def test_what_no_pixel_shows_is_not_found(tmp_path):
    class Given(Colors):
        def forward_features(self, images):
            return features_of(numbers).permute(2, 0, 1)[None]

    write_scenes(
        tmp_path, [scene((4, 4), (0, 0, 1, 1))], 1
    )  # its pixels show every third patch, from the second
    for box, count in (((2, 2, 4, 4), 0), ((2, 2, 5, 5), 1)):
        numbers = scene((12, 12), box)
        assert evaluate_objects(pretrained(Given()), tmp_path, size=96)["found"] == count


def test_what_is_wrong_with_images_is_named(tmp_path):
    write_scenes(tmp_path, SCENES[:1])
    path = tmp_path / "images" / "100.png"

    class Broken(Colors):
        def forward_features(self, images):
            return super().forward_features(images) / 0

    def expect(match, backbone=None, **options):
        with pytest.raises(ValueError, match=match):
            evaluate_objects(pretrained(backbone), tmp_path, **options)

    expect("100.png: expected finite features, got NaN or infinity", Broken())
    expect("size: expected at least 1, got 0", size=0)
    Image.new("RGB", (90, 96)).save(path)
    expect("100.png: expected 96×96 pixels as in the file of annotations, got 90×96 pixels")
    path.write_bytes(b"no image")
    expect("100.png: cannot be read")
    path.unlink()
    expect("images: 1 are missing: .*100.png")


@pytest.mark.slow
def test_the_command_discovers_objects(tmp_path, capsys, monkeypatch):
    write_scenes(tmp_path / "set", SCENES[:2])
    config = configure("digits", backbone="test_resnet", backbone_args={})
    export_backbone(create_networks(config, torch.device("cpu"))[1], config, tmp_path)
    weights, output = tmp_path / "model.safetensors", tmp_path / "result.json"
    command = ["evaluate", str(weights), f"--objects={tmp_path / 'set'}", f"--output={output}"]
    assert cli.main([*command, f"--masks={tmp_path / 'predicted'}", "--device=cpu"]) == 0
    figures = json.loads(output.read_text())["objects"]
    assert (figures["images"], figures["objects"]) == (2, 3)
    assert len(json.loads((tmp_path / "predicted" / "objects.json").read_text())) == figures["found"]
    printed = capsys.readouterr().out
    assert printed == describe({"objects": figures}) + "\n"
    assert f"objects, {figures['found']} found, 3 annotated in 2 images" in printed
    assert f"masks                  AP {figures['segm']['ap']:.2%}  AP50 " in printed
    monkeypatch.setattr("bincomm.api.find_spec", lambda name: None if name == "pycocotools" else 1)
    with pytest.raises(ImportError, match="no module named 'pycocotools'"):
        bincomm.evaluate(weights, objects=tmp_path / "set")
    assert cli.main(command) == 1
    assert "pip install 'bincomm[eval]'" in capsys.readouterr().err
