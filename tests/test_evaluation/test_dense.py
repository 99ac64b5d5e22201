import json
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from patch_colors import Colors, pretrained
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn

from bincomm import cli
from bincomm.building import create_networks
from bincomm.configuration import configure
from bincomm.evaluation import dense
from bincomm.evaluation.dense import confusion, evaluate_segmentation, mean_iou, patch_features
from bincomm.evaluation.layouts import open_masked_images
from bincomm.evaluation.pretrained import load_pretrained
from bincomm.pretraining import export_backbone

# Of classes 2, 9 and 254, and of what is not annotated.
COLORS = {2: (230, 20, 20), 9: (20, 230, 20), 254: (20, 20, 230), 255: (120, 120, 120)}


# Patch features


def vit(name="test_vit", **arguments):
    return timm.create_model(name, num_classes=0, dynamic_img_size=True, **arguments).eval()


@pytest.mark.parametrize("arguments", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": ""}])
def test_patch_features_of_a_vit_are_its_tokens(arguments):
    backbone, images = vit(**arguments), torch.randn(2, 3, 64, 96)
    features = patch_features(backbone, images)
    assert features.shape == (2, 4, 6, 64)
    assert not features.requires_grad
    tokens = backbone.forward_features(images)
    before = tokens.shape[1] - 24
    assert before == {"reg_tokens": 5, "class_token": 0}.get(next(iter(arguments), ""), 1)
    for row in range(4):
        for column in range(6):
            assert torch.equal(features[:, row, column], tokens[:, before + 6 * row + column])


def test_the_final_norm_is_applied_where_it_follows_the_pooling():
    backbone = vit(class_token=False, global_pool="avg")
    nn.init.normal_(backbone.fc_norm.bias)
    features = patch_features(backbone, torch.randn(1, 3, 32, 48)) - backbone.fc_norm.bias
    assert features.mean(-1).abs().max() < 1e-5
    assert (features.std(-1, unbiased=False) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name, width", [("test_convnext", 64), ("test_resnet", 96), ("test_mambaout", 64)])
def test_patch_features_of_a_conv_net_are_its_map(name, width):
    backbone, images = timm.create_model(name, num_classes=0).eval(), torch.randn(2, 3, 64, 96)
    features = patch_features(backbone, images)
    assert features.shape == (2, 2, 3, width)
    expected = backbone.forward_features(images)
    if expected.shape[1] == width:
        expected = expected.permute(0, 2, 3, 1)
    assert torch.equal(features, expected)
    if name == "test_resnet":
        assert torch.allclose(features.mean((1, 2)), backbone(images), atol=1e-5)


@pytest.mark.parametrize("name, grid", [("test_vit", (4, 6)), ("test_resnet", (2, 3))])
def test_images_are_continued_to_whole_patches(name, grid):
    backbone = vit() if name == "test_vit" else timm.create_model(name, num_classes=0).eval()
    images = torch.randn(1, 3, 50, 81)
    features = patch_features(backbone, images)
    assert features.shape[1:3] == grid
    rows, columns = (torch.arange(side).clamp(max=last) for side, last in ((64, 49), (96, 80)))
    assert torch.equal(features, patch_features(backbone, images[:, :, rows][..., columns]))


def test_backbones_without_patches_are_refused():
    images = torch.randn(1, 3, 64, 64)
    for module in (nn.Flatten(), timm.create_model("test_resnet", features_only=True)):
        with pytest.raises(ValueError, match="backbone: expected a timm model .*, got F"):
            patch_features(module, images)
    fixed = timm.create_model("test_vit_relpos", num_classes=0).eval()
    with pytest.raises(ValueError, match="backbone: .* cannot take images of 64×64 pixels: Input"):
        patch_features(fixed, images)
    pooled = Colors()
    for features, got in (
        (torch.zeros(1, 9), "\\(1, 9\\)"),
        (torch.zeros(1, 7, 9), "\\(1, 7, 9\\)"),
        ([0], "list"),
    ):
        pooled.forward_features = lambda images, features=features: features
        with pytest.raises(ValueError, match=f"backbone: .*Colors.* 8×8 patches, got {got}"):
            patch_features(pooled, images)
    with pytest.raises(ValueError, match="images: .*got \\(3, 64, 64\\)"):
        patch_features(vit(), images[0])


# Figures


def test_mean_iou_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    table, truth, predicted = 0, [], []
    for shape in ((30, 40), (17, 5), (8, 9)):
        truth.append(rng.choice([0, 3, 7, 254, 255], shape).astype(np.uint8))
        predicted.append(np.where(rng.random(shape) < 0.5, truth[-1], rng.choice([0, 3, 5, 254], shape)))
        predicted[-1][truth[-1] == 255] = 5
        table += confusion(*(torch.from_numpy(x[-1]) for x in (truth, predicted)))
    truth, predicted = (np.concatenate([x.flatten() for x in masks]) for masks in (truth, predicted))
    counted = truth != 255
    labels = [0, 3, 5, 7, 254]
    expected = confusion_matrix(truth[counted], predicted[counted], labels=labels)
    assert (table[labels][:, labels].numpy() == expected).all()
    assert table.sum() == counted.sum()
    expected = jaccard_score(truth[counted], predicted[counted], labels=[0, 3, 7, 254], average=None)
    mean, iou = mean_iou(table)
    assert list(iou) == [0, 3, 7, 254]  # 5 is predicted alone
    assert list(iou.values()) == pytest.approx(expected)
    assert mean == pytest.approx(expected.mean())
    assert 0.1 < mean < 0.9


def test_mean_iou_of_nothing_is_refused():
    with pytest.raises(ValueError, match="table: "):
        mean_iou(confusion(*torch.full((2, 3, 4), 255)))


# Segmentation


def stripes(seed, shape=(64, 96), kinds=(2, 9, 254)):
    """A mask of vertical stripes, a patch or more wide."""
    rng = np.random.default_rng(seed)
    return np.tile(rng.choice(kinds, shape[1] // 8).repeat(8), (shape[0], 1)).astype(np.uint8)


def write(folder, **halves):
    """A folder of masks by half, and of images whose colors tell the classes."""
    for half, masks in halves.items():
        for kind in ("images", "masks"):
            (folder / half / kind).mkdir(parents=True)
        for number, mask in enumerate(masks):
            image = np.zeros((*mask.shape, 3), np.uint8)
            for label, color in COLORS.items():
                image[mask == label] = color
            Image.fromarray(image).save(folder / half / "images" / f"{number}.png")
            Image.fromarray(mask).save(folder / half / "masks" / f"{number}.png")
    return folder


def fast(monkeypatch, steps=200):
    monkeypatch.setattr(dense, "STEPS", steps)


def test_ideal_features_are_segmented_exactly(tmp_path, monkeypatch):
    fast(monkeypatch)
    write(tmp_path, train=[stripes(i) for i in range(6)], val=[stripes(i) for i in range(6, 10)])
    result = evaluate_segmentation(pretrained(), tmp_path, size=64)
    assert result["knn"] == {"miou": 1.0, "iou": {2: 1.0, 9: 1.0, 254: 1.0}}
    assert result["linear"]["miou"] >= 0.99
    assert list(result["linear"]["iou"]) == [2, 9, 254]
    assert result["linear"]["learning_rate"] in dense.LEARNING_RATES
    sizes = {name: result[name] for name in ("train_images", "val_images", "patches", "classes")}
    assert sizes == {"train_images": 6, "val_images": 4, "patches": 6 * 8 * 12, "classes": 3}


def test_what_is_not_annotated_does_not_count(tmp_path, monkeypatch):
    fast(monkeypatch)
    train = [stripes(i, kinds=(2, 9, 254, 255)) for i in range(6)]
    val = [stripes(i) for i in range(6, 9)]
    assert any((mask == 255).any() for mask in train)
    write(tmp_path / "a", train=train, val=val)
    # A third of what is annotated is wrong, and then not annotated.
    expected = evaluate_segmentation(pretrained(), write(tmp_path / "b", train=train, val=val), size=64)
    for value, exact in ((2, False), (255, True)):
        for number, mask in enumerate(val):
            wrong = mask.copy()
            wrong[:, 64:] = value
            Image.fromarray(wrong).save(tmp_path / "a" / "val" / "masks" / f"{number}.png")
        result = evaluate_segmentation(pretrained(), tmp_path / "a", size=64)
        for protocol in ("knn", "linear"):
            assert (result[protocol]["miou"] == expected[protocol]["miou"] == 1.0) == exact
    assert expected["patches"] == sum((mask != 255).sum() for mask in train) // 64


# Folders of images and masks of either half, the classes of the stripes there, and the one that is void.
PUBLISHED = {
    "VOC": (["JPEGImages", "SegmentationClass"] * 2, (2, 9, 254), 255),
    "ADE20K": (
        ["images/training", "annotations/training", "images/validation", "annotations/validation"],
        (1, 2, 150),
        0,
    ),
    "CamVid": (["train", "trainannot", "val", "valannot"], (0, 3, 10), 11),
}
PALETTE = np.random.default_rng(0).integers(256, size=768).tolist()


def write_published(folder, layout, **halves):
    """Masks of a published set in its layout, VOC's with a palette, and images whose colors tell classes."""
    folders, kinds, void = PUBLISHED[layout]
    colors = dict(zip((*kinds, void), COLORS.values(), strict=True))
    for number, (half, masks) in enumerate(halves.items()):
        images, annotations = (folder / name for name in folders[2 * number : 2 * number + 2])
        for path in (images, annotations):
            path.mkdir(parents=True, exist_ok=True)
        for index, mask in enumerate(masks):
            pixels = np.zeros((*mask.shape, 3), np.uint8)
            for label, color in colors.items():
                pixels[mask == label] = color
            extension = "png" if layout == "CamVid" else "jpg"
            Image.fromarray(pixels).save(images / f"{half}_{index}.{extension}", quality=95, subsampling=0)
            picture = Image.fromarray(mask)
            if layout == "VOC":
                picture.putpalette(PALETTE)
            picture.save(annotations / f"{half}_{index}.png")
        if layout == "VOC":
            lists = folder / "ImageSets" / "Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{half}.txt").write_text("".join(f"{half}_{i}\n" for i in range(len(masks))))
    return folder


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_sets_are_measured_and_their_void_is_not(layout, tmp_path, monkeypatch):
    fast(monkeypatch)
    folders, kinds, void = PUBLISHED[layout]
    train = [stripes(i, kinds=(*kinds, void)) for i in range(6)]
    val = [stripes(i, kinds=kinds) for i in range(6, 9)]
    folder, masks = write_published(tmp_path / "set", layout, train=train, val=val), tmp_path / "predicted"
    for path in (folder / folders[3]).glob("val*"):  # a third is annotated as void, and is right nowhere
        mask = Image.open(path)
        mask.paste(void, (64, 0, 96, 64))
        mask.save(path)
    result = evaluate_segmentation(pretrained(), folder, size=64, masks=masks)
    for protocol in ("knn", "linear"):
        assert list(result[protocol]["iou"]) == list(kinds)
        assert result[protocol]["miou"] == 1.0
    assert (result["layout"], result["classes"], result["void"]) == (layout, 3, sorted({void, 255}))
    assert result["patches"] == sum((mask != void).sum() for mask in train) // 64
    # Predicted masks show what void hides, with the numbers and colors of the set.
    names = [f"{protocol}/val_{number}.png" for protocol in ("knn", "linear") for number in range(3)]
    assert sorted(str(path.relative_to(masks)) for path in masks.rglob("*.*")) == names
    for number, mask in enumerate(val):
        picture = Image.open(masks / "knn" / f"val_{number}.png")
        assert (np.array(picture) == mask).all()
        assert picture.getpalette() == (PALETTE if layout == "VOC" else None)


def test_predicted_masks_are_what_is_measured(tmp_path, monkeypatch):
    fast(monkeypatch, 5)
    val = [stripes(5, (50, 88)), np.random.default_rng(0).choice([9, 255], (33, 97)).astype(np.uint8)]
    folder = write(tmp_path / "set", train=[stripes(i) for i in range(3)], val=val)
    # Annotated with fewer colors than there are classes to predict.
    val[0] = np.where(val[0] == 2, np.uint8(2), np.uint8(1))
    few = Image.fromarray(val[0])
    few.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    few.save(folder / "val" / "masks" / "0.png")
    result = evaluate_segmentation(pretrained(), folder, size=64, masks=tmp_path / "out")
    assert result == evaluate_segmentation(pretrained(), folder, size=64)
    for protocol in ("knn", "linear"):
        paths = sorted((tmp_path / "out" / protocol).iterdir())
        predicted = [np.array(Image.open(path)) for path in paths]
        assert 254 in predicted[0]
        pairs = zip(val, predicted, strict=True)
        table = sum(confusion(*(torch.from_numpy(mask) for mask in pair)) for pair in pairs)
        assert mean_iou(table) == (result[protocol]["miou"], result[protocol]["iou"])


def test_classes_of_ones_own_can_be_void(tmp_path, monkeypatch):
    fast(monkeypatch)
    train, val = [stripes(i) for i in range(6)], [stripes(i) for i in range(6, 9)]
    folder = write(tmp_path, train=train, val=val)
    result = evaluate_segmentation(pretrained(), folder, size=64, void=[9])
    assert (result["layout"], result["void"], result["classes"]) == ("own", [9, 255], 2)
    assert list(result["knn"]["iou"]) == [2, 254]
    for half, masks in (("train", train), ("val", val)):
        for number, mask in enumerate(masks):
            hidden = np.where(mask == 9, np.uint8(255), mask)
            Image.fromarray(hidden).save(folder / half / "masks" / f"{number}.png")
    assert evaluate_segmentation(pretrained(), folder, size=64) == result | {"void": [255]}
    result = evaluate_segmentation(pretrained(), folder, size=64, void=(254, 9))
    assert list(result["linear"]["iou"]) == [2]


def test_masks_of_0_and_255_are_not_taken_for_a_single_class(tmp_path, monkeypatch):
    fast(monkeypatch, 5)
    masks = [stripes(i, kinds=(0, 255)) for i in range(2)]
    with pytest.raises(ValueError, match="train: expected two classes or more, got class 0 alone beside"):
        evaluate_segmentation(pretrained(), write(tmp_path, train=masks, val=masks), size=64)


def test_classes_that_training_lacks_are_missed(tmp_path, monkeypatch):
    fast(monkeypatch)
    train = [stripes(i, kinds=(2, 9)) for i in range(4)]
    write(tmp_path, train=train, val=[stripes(5)])
    result = evaluate_segmentation(pretrained(), tmp_path, size=64)
    assert result["classes"] == 2
    for protocol in ("knn", "linear"):
        assert result[protocol]["iou"][254] == 0.0
        assert 0 < result[protocol]["miou"] < 0.9


def test_memory_is_bounded_and_drawn_alike(tmp_path, monkeypatch):
    fast(monkeypatch, 5)
    write(tmp_path, train=[stripes(i) for i in range(7)], val=[stripes(8)])
    once, again = (evaluate_segmentation(pretrained(), tmp_path, size=64, memory=100) for _ in range(2))
    assert once == again
    assert once["patches"] == 100
    pairs = open_masked_images(tmp_path).train
    kept = dense.collect_patches(pretrained(), pairs, 64, 100)
    assert set(Counter(kept.images.tolist()).values()) == {14, 15}
    assert (kept.shares.sum(1) == 1).all()
    for memory in (1, 5):  # fewer than images
        kept = dense.collect_patches(pretrained(), pairs, 64, memory)
        assert len(kept.features) == len(kept.images.unique()) == memory


# Of 107 rows the middle one's center lies between two of 32 patches.
@pytest.mark.parametrize("height, width, grid", [(23, 31, (4, 5)), (107, 6, (32, 2))])
def test_every_patch_has_its_pixels(height, width, grid):
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(rng.choice([0, 1, 254, 255], (height, width)).astype(np.uint8))
    expected = torch.zeros(*grid, 256)
    for row in range(height):
        for column in range(width):
            patch = int((row + 0.5) * grid[0] / height), int((column + 0.5) * grid[1] / width)
            expected[(*patch, int(mask[row, column]))] += 1
    expected = (expected / expected.sum(-1, keepdim=True))[..., :255]
    assert torch.allclose(dense.class_shares(mask, grid).view(*grid, 255), expected)


def memory_of(features, shares, images=None):
    images = torch.arange(len(features)) if images is None else images
    return dense.PatchMemory(features, shares, images, torch.arange(shares.shape[1]))


def test_near_patches_vote_by_their_cosine(monkeypatch):
    angles = torch.tensor([0.0, 0.1, 0.3, 3.0])
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([1.0, 5.0, 2.0, 1.0])[:, None]
    shares = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.5, 0.25], [0.0, 1.0]])
    monkeypatch.setattr(dense, "NEIGHBORS", 3)
    result = dense.nearest_patches(memory_of(features, shares))(torch.tensor([[[3.0, 0.0]]]))
    weights = (torch.tensor([0.0, 0.1, 0.3]).cos() / 0.02).softmax(0)
    assert torch.allclose(result[0, 0], weights @ shares[:3], rtol=1e-4)


def test_thirty_patches_vote():
    angles = torch.linspace(0, 0.1, 40)
    memory = memory_of(torch.stack([angles.cos(), angles.sin()], 1), torch.eye(40))
    result = dense.nearest_patches(memory)(torch.tensor([[[1.0, 0.0]]]))
    assert result[0, 0].nonzero().flatten().tolist() == list(range(30))


def test_blocks_make_no_difference(monkeypatch):
    features, shares = torch.randn(50, 8), torch.rand(50, 11)
    queries = torch.randn(6, 7, 8)
    votes = dense.nearest_patches(memory_of(features, shares))(queries)
    pixels = dense.to_pixels(votes, (40, 50))
    monkeypatch.setattr(dense, "SIMILARITIES", 350)
    monkeypatch.setattr(dense, "SCORES", 40 * 50 * 3)
    again = dense.nearest_patches(memory_of(features, shares))(queries)
    assert votes.shape == (6, 7, 11)
    assert torch.allclose(votes, again, atol=1e-6)
    assert torch.equal(pixels, dense.to_pixels(votes, (40, 50)))
    big = F.interpolate(votes.permute(2, 0, 1)[None], (40, 50), mode="bilinear")[0]
    assert torch.equal(pixels, big.argmax(0))
    assert len(pixels.unique()) > 5
    assert not dense.to_pixels(torch.ones(6, 7, 11), (40, 50)).any()  # of equals the first


@pytest.mark.slow
def test_the_linear_probe_is_that_of_scikit_learn(monkeypatch):
    fast(monkeypatch, 400)
    means = torch.randn(4, 16)
    labels, queries = torch.randint(4, (3000,)), torch.randint(4, (1200,))
    x, y = (2 * (means[classes] + torch.randn(len(classes), 16)) + 7 for classes in (labels, queries))
    predict, _ = dense.linear_patches(memory_of(x, F.one_hot(labels).float(), torch.arange(3000) // 100))
    result = predict(y.view(30, 40, 16)).argmax(-1).flatten()
    expected = LogisticRegression(max_iter=1000).fit(x, labels).score(y, queries)
    assert 0.7 < expected < 0.99
    assert float((result == queries).float().mean()) == pytest.approx(expected, abs=0.01)


def test_the_learning_rate_is_chosen_by_images_not_trained_on(monkeypatch):
    fast(monkeypatch)
    # Noise is learned the better, and foretold the worse, the larger the rate.
    features, labels = torch.randn(400, 64), torch.randint(4, (400,))
    _, rate = dense.linear_patches(memory_of(features, F.one_hot(labels).float(), torch.arange(400) // 10))
    assert rate == dense.LEARNING_RATES[0]


def test_the_classifier_is_trained_on_all_images(monkeypatch):
    fast(monkeypatch)
    # Class 0, between the others, is that of the image alone which chooses the learning rate.
    labels = torch.arange(40) // 10
    features = torch.cat([torch.zeros(1, 4), 5 * torch.eye(4)[1:]])[labels] + 0.1 * torch.randn(40, 4)
    predict, _ = dense.linear_patches(memory_of(features, F.one_hot(labels).float(), labels))
    assert torch.equal(predict(features[None])[0].argmax(-1), labels)


def test_images_are_resized_to_whole_patches(tmp_path, monkeypatch):
    fast(monkeypatch, 5)
    seen = []

    class Watched(Colors):
        def forward_features(self, images):
            seen.append(images)
            return super().forward_features(images)

    masks = [stripes(0, (64, 96)), stripes(1, (104, 80))]
    write(tmp_path, train=masks, val=masks)
    for half in ("train", "val"):  # another ending, and a palette
        path = tmp_path / half / "images" / "0.png"
        Image.open(path).save(path.with_suffix(".jpg"), quality=95, subsampling=0)
        path.unlink()
        path = tmp_path / half / "masks" / "1.png"
        Image.open(path).convert("P").save(path)
        assert Image.open(path).mode == "P"
    result = evaluate_segmentation(pretrained(Watched()), str(tmp_path), size=128)
    assert [tuple(images.shape[1:]) for images in seen] == [(3, 128, 192), (3, 168, 128)] * 2
    assert result["knn"]["miou"] > 0.9
    first = torch.tensor(COLORS[int(masks[1][0, 0])]) / 255
    expected = (first - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen[1][0, :, 0, 0], expected, atol=1e-3)


def test_sixteen_bits_are_seen_as_eight(tmp_path):
    pixels = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(pixels).save(tmp_path / "8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert Image.open(tmp_path / "16.png").mode == "I;16"
    for bits in (8, 16):
        result = np.array(dense.open_image(tmp_path / f"{bits}.png"))
        assert (result == pixels[..., None]).all()
        assert result.shape == (16, 16, 3)
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "32.tif")
    with pytest.raises(ValueError, match="32.tif: its floating-point pixels have no known range"):
        dense.open_image(tmp_path / "32.tif")


def test_images_and_masks_take_a_bounded_time(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8))
    image.save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:2] + 2000 * b"\xff\xe5\x00\x02" + data[2:])
    with pytest.raises(ValueError, match="a.jpg: cannot be read: a JPEG of more than 1000 segments"):
        dense.open_image(tmp_path / "a.jpg")
    texts = PngInfo()
    texts.add_text("notes", "x" * 2_000_000, zip=True)  # Pillow's limit is no reason to refuse a mask
    image.convert("L").save(tmp_path / "a.png", pnginfo=texts)
    assert (dense.open_mask(tmp_path / "a.png") == np.array(image.convert("L"))).all()
    header = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(resized_header(header, 30_000, 30_000))
    with pytest.raises(ValueError, match="b.png: more than 178956970 pixels, the most that are decoded"):
        dense.open_mask(tmp_path / "b.png")


def resized_header(png, width, height):
    """A PNG that claims another size."""
    chunk = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


@pytest.mark.parametrize("broken", [(0, "train/images/1.png"), (1, "val/images/0.png")])
def test_features_that_are_not_finite_are_refused(broken, tmp_path, monkeypatch):
    fast(monkeypatch, 5)
    mask = stripes(0)
    write(tmp_path, train=[mask, mask], val=[mask])
    seen = []

    class Broken(Colors):
        def forward_features(self, images):
            seen.append(images)
            return super().forward_features(images) / (len(seen) != 2 + broken[0])

    with pytest.raises(ValueError, match=f"{broken[1]}: expected finite features, got NaN or infinity"):
        evaluate_segmentation(pretrained(Broken()), tmp_path, size=64)


def test_a_vit_of_timm_is_evaluated(tmp_path, monkeypatch):
    fast(monkeypatch, 50)
    write(tmp_path, train=[stripes(i) for i in range(3)], val=[stripes(4)])
    result = evaluate_segmentation(pretrained(vit()), tmp_path, size=128)
    for protocol in ("knn", "linear"):
        assert 0.4 < result[protocol]["miou"] <= 1.0  # untrained; the colors tell


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    fast(monkeypatch, 5)
    folder = write(tmp_path / "masks", train=[stripes(i) for i in range(3)], val=[stripes(4)])
    config = configure("digits", backbone="test_resnet", backbone_args={})
    export_backbone(create_networks(config, torch.device("cpu"))[1], config, tmp_path)
    weights, output = tmp_path / "model.safetensors", tmp_path / "result.json"
    command = ["evaluate", str(weights), f"--segmentation={folder}", f"--output={output}", "--void=9,254"]
    command.append(f"--masks={tmp_path / 'predicted'}")
    assert cli.main(command) == 0
    result = json.loads(output.read_text())["segmentation"]
    assert len(list((tmp_path / "predicted").glob("*/0.png"))) == 2
    assert cli.main(command) == 2
    expected_error = f"masks: expected a new or an empty folder, got {tmp_path / 'predicted'}"
    assert expected_error in (captured := capsys.readouterr()).err
    expected = evaluate_segmentation(load_pretrained(weights, "cpu"), folder, void=[9, 254])
    assert result == json.loads(json.dumps(expected))
    assert f"mIoU {result['knn']['miou']:.2%} by nearest patches" in captured.out


def test_what_is_wrong_with_a_folder_is_named(tmp_path, monkeypatch):
    fast(monkeypatch, 5)
    folder = write(tmp_path / "a", train=[stripes(0), stripes(1)], val=[stripes(2), stripes(3)])
    images, masks = folder / "val" / "images", folder / "val" / "masks"

    def expect(match, folder=folder, **arguments):
        with pytest.raises(ValueError, match=match):
            evaluate_segmentation(pretrained(), folder, size=64, **arguments)

    expect("memory and size: .*got 0 and 64", memory=0)
    mask = (masks / "1.png").read_bytes()
    (masks / "1.png").unlink()
    expect(f"masks: 1 are missing: {masks / '1.png'}")
    Image.fromarray(stripes(3)[:, :80]).save(masks / "1.png")
    expect("val/masks/1.png: expected 96×64 pixels .*got 80×64")
    Image.new("RGB", (96, 64)).save(masks / "1.png")
    expect("val/masks/1.png: .*one eight-bit channel, got pixels of kind RGB")
    Image.fromarray(np.zeros((64, 96), np.uint16)).save(masks / "1.png")
    expect("val/masks/1.png: .*one eight-bit channel, got pixels of kind I;16")
    (masks / "1.png").write_bytes(mask[:50])
    expect("val/masks/1.png: cannot be read")
    (masks / "1.png").write_bytes(mask)
    image = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(b"")
    expect("val/images/1.png: cannot be read")
    (images / "1.png").write_bytes(image)
    Image.new("L", (96, 64)).save(masks / "1.png", format="jpeg")
    expect("val/masks/1.png: expected a mask as PNG, which keeps its values, got JPEG")
    Image.new("L", (96, 64)).save(masks / "1.png", format="eps")
    expect("val/masks/1.png: cannot be read: a file of the format EPS")
    (masks / "1.png").write_bytes(mask)
    Image.new("RGB", (96, 2)).save(images / "1.png")
    expect("val/images/1.png: expected a longer side of at most 32 shorter ones, got 96×2 pixels")
    (images / "1.png").write_bytes(image)
    expect("void: expected classes from 0 to 254, got 256", void=[9, 256])
    expect("void: expected classes from 0 to 254, got -1", void=[-1])
    expect("segmentation: expected a folder of train/images, .*a looks right", folder=tmp_path)
    nothing = [np.full((64, 96), 255, np.uint8)] * 2
    expect("val: expected a class", folder=write(tmp_path / "b", train=[stripes(0), stripes(1)], val=nothing))
    expect("train: expected a class", folder=write(tmp_path / "c", train=nothing, val=[stripes(1)]))
    expect("train: expected at least 2 images", folder=write(tmp_path / "d", train=[stripes(0)], val=nothing))
    for path in images.iterdir():
        path.unlink()
    expect(f"{images}: expected images .*got none")
