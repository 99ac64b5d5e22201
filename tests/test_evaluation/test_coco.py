import json
import os

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from bincomm.evaluation import coco
from bincomm.evaluation.coco import decode_runs, open_objects
from bincomm.evaluation.objects import average_precision

SQUARE = [2, 3, 12, 3, 12, 13.5, 2, 13.5]
LAYOUTS = {
    "annotations/instances_val2017.json": "val2017",
    "annotations/instances_val2014.json": "val2014",
    "annotations.json": "images",
}


def content(**changes):
    """A valid file: two images, a polygon and a crowd; `changes` replace values by their path, such as
    images_0_id."""
    value = {
        "images": [
            {"id": 7, "file_name": "b.jpg", "height": 20, "width": 30, "license": 1},
            {"id": 3, "file_name": "inner/a.jpg", "height": 4, "width": 5},
        ],
        "annotations": [
            {"id": 11, "image_id": 7, "iscrowd": 0, "bbox": [2, 3, 10, 10.5], "segmentation": [SQUARE]},
            {"id": 5, "image_id": 3, "iscrowd": 1, "bbox": [0, 0, 5, 4]}
            | {"segmentation": {"size": [4, 5], "counts": [4, 10, 6]}},
        ],
    }
    for path, change in changes.items():
        *outer, last = (
            int(word) if word.isdigit() else word for word in path.replace("image_id", "image-id").split("_")
        )
        last = "image_id" if last == "image-id" else {"name": "file_name"}.get(last, last)
        record = value
        for key in outer:
            record = record[key]
        if change is ...:
            del record[last]
        else:
            record[last] = change
    return value


def write(folder, value, file="annotations.json"):
    """A folder of such a file and of empty images, in a layout."""
    images = folder / LAYOUTS[file]
    for name in ("b.jpg", "inner/a.jpg"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).touch()
    (folder / file).parent.mkdir(exist_ok=True)
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    (folder / file).write_bytes(data)
    return folder


@pytest.mark.parametrize("file", LAYOUTS)
def test_layouts_are_recognized(file, tmp_path):
    first, second = open_objects(write(tmp_path, content(), file))
    images = tmp_path / LAYOUTS[file]
    assert first[:3] == (3, images / "inner/a.jpg", (4, 5))
    assert second[:3] == (7, images / "b.jpg", (20, 30))
    assert first.objects == [([0, 0, 5, 4], [], [4, 10, 6], True)]
    assert second.objects == [([2, 3, 10, 10.5], [SQUARE], [], False)]


def test_a_file_and_a_folder_of_images_elsewhere(tmp_path, monkeypatch):
    write(tmp_path, content())
    (tmp_path / "annotations.json").rename(tmp_path / "part.json")
    (tmp_path / "images").rename(tmp_path / "pictures")
    for given in (f"{tmp_path}/part.json@pictures", f"{tmp_path}/part.json@{tmp_path}/pictures"):
        assert open_objects(given)[1].path == tmp_path / "pictures" / "b.jpg"
    with pytest.raises(ValueError, match="/images: expected a folder, of the images of .*part.json"):
        open_objects(f"{tmp_path}/part.json@images")


def test_another_folder_is_told_with_what_it_holds(tmp_path):
    inner = write(tmp_path / "coco", content(), "annotations/instances_val2017.json")
    with pytest.raises(ValueError) as error:
        open_objects(tmp_path)
    assert str(error.value).startswith(
        "objects: expected a folder of COCO (annotations/instances_val2017.json"
    )
    assert str(error.value).endswith(f"which holds coco/annotations, coco/val2017; {inner} looks right")
    with pytest.raises(
        ValueError, match="objects: expected .* or FILE@IMAGES, got .*which cannot be read: Not"
    ):
        open_objects(inner / "annotations/instances_val2017.json")
    (inner / "val2017").rename(inner / "val2017.zip")
    with pytest.raises(ValueError, match="/val2017: expected a folder, of the images of .*val2017.json"):
        open_objects(inner)


def test_missing_images_are_named(tmp_path):
    (write(tmp_path, content()) / "images" / "inner/a.jpg").unlink()
    with pytest.raises(ValueError, match=r"images: 1 are missing: .*inner/a\.jpg"):
        open_objects(tmp_path)


def test_images_may_be_links(tmp_path):
    path = write(tmp_path / "set", content()) / "images" / "b.jpg"
    path.rename(tmp_path / "elsewhere.jpg")
    path.symlink_to(tmp_path / "elsewhere.jpg")
    assert open_objects(tmp_path / "set")[1].path == path


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "expected JSON in COCO's format, got Expecting value"),
        (b"{", "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
        (b"[" * 200_000, "expected JSON"),
        (b'{"images": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b"[1]", 'content: expected an object with "images" and "annotations", got [1]'),
        (b"{}", "images: expected a list that is not empty, got None"),
        (content(images=[]), "images: expected a list that is not empty, got []"),
        (content(images={}), "images: expected a list that is not empty, got {}"),
        (content(annotations=...), "annotations: expected a list that is not empty, got None"),
        (content(annotations_1=[1]), "annotations[1]: expected an object, got [1]"),
        (content(annotations_0_iscrowd=1), "annotations: expected an object that is no crowd, got none"),
        (content(images_0_id=3), "images[1].id: expected an integer that no other has, got 3"),
        (content(images_1_id="3"), "images[1].id: expected an integer that no other has, got '3'"),
        (content(images_1_id=True), "images[1].id: expected an integer that no other has, got True"),
        (content(images_1_name=...), "images[1].file_name: expected the name of an image, got None"),
        (content(images_1_name=""), "images[1].file_name: expected the name of an image, got ''"),
        (content(images_1_name="a\0.jpg"), "images[1].file_name: expected the name of an image, got "),
        (content(images_1_name="/etc/passwd"), "images[1].file_name: expected a path below "),
        (content(images_1_name="../b.jpg"), "images[1].file_name: expected a path below "),
        (content(images_1_name="inner/../../b.jpg"), "images[1].file_name: expected a path below "),
        (content(images_1_name="\ud800.jpg"), "images: 1 are missing: "),
        (content(images_1_name="x\n" * 200), "images: 1 are missing: "),
        (content(images_0_height=0), "images[0].height and width: expected positive integers whose product"),
        (
            content(images_0_width=30.0),
            "images[0].height and width: expected positive integers whose product",
        ),
        (
            content(images_0_width=10**8),
            "images[0].height and width: expected positive integers whose product",
        ),
        (content(annotations_1_id=11), "annotations[1].id: expected an integer that no other has, got 11"),
        (content(annotations_0_image_id=4), "annotations[0].image_id: expected the id of an image, got 4"),
        (content(annotations_0_image_id=[]), "annotations[0].image_id: expected the id of an image, got []"),
        (content(annotations_0_iscrowd=2), "annotations[0].iscrowd: expected 0 or 1, got 2"),
        (content(annotations_0_iscrowd=False), "annotations[0].iscrowd: expected 0 or 1, got False"),
        (content(annotations_0_bbox=[1, 2, 3]), "annotations[0].bbox: expected left, top, width and height,"),
        (content(annotations_0_bbox=[1, 2, -3, 4]), "annotations[0].bbox: expected left, top, width and"),
        (content(annotations_0_bbox=[1, 2, 3, float("nan")]), "annotations[0].bbox: expected left, top,"),
        (content(annotations_0_bbox=[1, 2, 3, 10**400]), "annotations[0].bbox: expected left, top, width"),
        (content(annotations_0_bbox=[1, 2, 3, "4"]), "annotations[0].bbox: expected left, top, width"),
        (content(annotations_0_segmentation=[]), "annotations[0].segmentation: expected polygons, or runs"),
        (content(annotations_0_segmentation=...), "annotations[0].segmentation: expected polygons, or runs"),
        (
            content(annotations_0_segmentation=[SQUARE, [1, 2, 3, 4]]),
            "annotations[0].segmentation[1]: expected x",
        ),
        (
            content(annotations_0_segmentation=[SQUARE[:7]]),
            "annotations[0].segmentation[0]: expected x and y of",
        ),
        (
            content(annotations_0_segmentation=[[1, 2, 3, 4, 5, None]]),
            "annotations[0].segmentation[0]: expected x",
        ),
        (
            content(annotations_0_segmentation=[[1, 2, 3, 4, 5, float("inf")]]),
            "segmentation[0]: expected x and y",
        ),
        (
            content(annotations_0_segmentation=[[1, 2, 3, 4, 5, 1e9]]),
            "segmentation[0]: expected corners within a",
        ),
        (
            content(annotations_0_segmentation=[[-31, 2, 3, 4, 5, 6]]),
            "segmentation[0]: expected corners within a",
        ),
        (
            content(annotations_0_segmentation=[[0, 0, 30, 20] * 20_000]),
            "annotations[0].segmentation: expected contours of",
        ),
        (
            content(annotations_1_segmentation_size=[5, 4]),
            "annotations[1].segmentation.size: expected [4, 5]",
        ),
        (
            content(annotations_1_segmentation_counts=[4, 10, 5]),
            "segmentation.counts: expected integers of at",
        ),
        (
            content(annotations_1_segmentation_counts=[30, -10]),
            "segmentation.counts: expected integers of at",
        ),
        (
            content(annotations_1_segmentation_counts=[4, 10.0, 6]),
            "segmentation.counts: expected integers of at",
        ),
        (
            content(annotations_1_segmentation_counts=[2**64, 20 - 2**64]),
            "segmentation.counts: expected integers",
        ),
        (
            content(annotations_1_segmentation_counts=[]),
            "segmentation.counts: expected integers of at least 0",
        ),
        (
            content(annotations_1_segmentation_counts=""),
            "segmentation.counts: expected integers of at least 0",
        ),
        (
            content(annotations_1_segmentation_counts="4:"),
            "segmentation.counts: expected integers of at least",
        ),
        (
            content(annotations_1_segmentation_counts="P"),
            "segmentation.counts: expected integers of at least 0",
        ),
        (
            content(annotations_1_segmentation_counts="P" * 99 + "0"),
            "segmentation.counts: expected integers of",
        ),
        (
            content(annotations_1_segmentation_counts="\x00é"),
            "segmentation.counts: expected integers of at least",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(data, words, tmp_path):
    write(tmp_path, data)
    with pytest.raises(ValueError) as error:
        open_objects(tmp_path)
    message = str(error.value)
    assert words in message
    assert message.startswith(("images: 1 are missing: ", f"{tmp_path}/annotations.json: "))
    assert "\n" not in message
    assert len(message) < 1000


def test_no_category_is_needed_and_no_flag_of_crowds(tmp_path):
    images = open_objects(write(tmp_path, content(annotations_0_iscrowd=...)))
    assert not images[1].objects[0].crowd


def test_contours_of_a_file_are_bounded(tmp_path, monkeypatch):
    folder = write(tmp_path, content(annotations_0_segmentation=[SQUARE, SQUARE]))
    # Sides of 10, 10.5, 10 and 10.5 pixels, and 4 corners.
    monkeypatch.setattr(coco, "LONGEST_CONTOUR", 90)
    open_objects(folder)
    monkeypatch.setattr(coco, "LONGEST_CONTOUR", 89)
    with pytest.raises(
        ValueError, match=r"annotations\[0\].segmentation: expected contours .* 89 pixels, got 90"
    ):
        open_objects(folder)
    value = content(annotations_0_segmentation=[SQUARE])
    value["annotations"].append({**value["annotations"][0], "id": 12})
    write(tmp_path, value)
    monkeypatch.setattr(coco, "ALL_CONTOURS", 90)
    open_objects(folder)
    monkeypatch.setattr(coco, "ALL_CONTOURS", 89)
    with pytest.raises(ValueError, match="annotations: expected contours of at most 89 pixels, got more"):
        open_objects(folder)


@pytest.mark.parametrize(
    "counts, runs",
    [
        ([0, 20], [0, 20]),
        ([4, 0, 6, 10], [10, 10]),
        ([0, 0, 0, 5, 0, 5, 10, 0, 0], [0, 10, 10]),
        ([20, 0], [20]),
    ],
)
def test_runs_of_no_pixel_are_taken_out(counts, runs, tmp_path):
    folder = write(tmp_path, content(annotations_1_segmentation_counts=counts))
    assert open_objects(folder)[0].objects[0].runs == runs


def test_the_order_in_the_file_makes_no_difference(tmp_path):
    value = content()
    for number in (2, 30, 12):
        value["annotations"].append({**value["annotations"][0], "id": number, "bbox": [number, 1, 2, 3]})
    expected = open_objects(write(tmp_path, value))
    assert [annotated.box[0] for annotated in expected[1].objects] == [2, 2, 12, 30]
    value["annotations"].reverse()
    value["images"].reverse()
    assert open_objects(write(tmp_path, value)) == expected


def test_a_file_that_is_no_file_is_not_waited_for(tmp_path):
    (write(tmp_path, content()) / "annotations.json").unlink()
    os.mkfifo(tmp_path / "annotations.json")
    with pytest.raises(ValueError, match="objects: expected a folder of COCO"):
        open_objects(tmp_path)


def test_compressed_runs_have_a_largest_number():
    assert decode_runs("PPPP0") == [0]
    for text in ("P" * 7 + "0", "P"):
        with pytest.raises(ValueError, match="compressed runs"):
            decode_runs(text)


def test_compressed_runs_are_those_of_pycocotools(tmp_path):
    rng = np.random.default_rng(0)
    for height, width in ((4, 5), (1, 1), (300, 200)):
        for share in (0, 0.02, 0.5, 1):
            mask = np.asfortranarray(rng.random((height, width)) < share, np.uint8)
            counts = coco_mask.encode(mask)["counts"].decode()
            runs = decode_runs(counts)
            assert sum(runs) == mask.size
            inside = (np.arange(len(runs)) % 2).repeat(runs)
            assert (inside.reshape((height, width), order="F") == mask).all()
            if mask.shape == (4, 5):
                images = open_objects(write(tmp_path, content(annotations_1_segmentation_counts=counts)))
                assert images[0].objects[0].runs == runs


ODD = [None, True, 0, 1, -1, 4, 2**31, 2**32, 2**63, 10**400, 0.5, 1e308, float("inf"), float("nan")]
ODD += ["", "3", "PPPP", "\ud800", [], {}, [[]], [0] * 6, [1, 2, 3, 4, 5, 6], [20], ["a"] * 6]


def places(value, path=()):
    """The paths of all values in a value."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def everything(image):
    """A result that is the whole image."""
    height, width = image.shape
    runs = coco_mask.encode(np.ones(image.shape, np.uint8, order="F"))
    segmentation = {"size": [height, width], "counts": runs["counts"].decode()}
    return {"image_id": image.id, "segmentation": segmentation, "bbox": [0, 0, width, height], "score": 1.0}


@pytest.mark.slow
def test_any_value_in_any_place_is_refused_or_measured(tmp_path):
    write(tmp_path, content())
    measured = refused = 0
    for path in places(content()):
        for odd in ODD:
            value = record = content(annotations_0_segmentation=[[*SQUARE]])
            for key in path[:-1]:
                record = record[key]
            record[path[-1]] = odd
            (tmp_path / "annotations.json").write_text(json.dumps(value))
            try:
                images = open_objects(tmp_path)
            except ValueError as error:
                reason = str(error)
                assert reason.startswith((f"{tmp_path}/annotations.json: ", "images: 1 are missing: "))
                refused += 1
                continue
            figures = average_precision(images, [everything(image) for image in images])
            assert all(0 <= figure <= 1 for kind in figures.values() for figure in kind.values())
            measured += 1
    assert min(measured, refused) > 20
