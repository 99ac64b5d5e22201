"""What the report says is what the functions say, and the page shows it anywhere."""

import errno
import json
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
from browser import Page, look_at, needs_browser
from PIL import Image
from sklearn.datasets import load_digits
from tiny_model import logits_of
from torch import nn

from bincomm.codes.classes import (
    class_difference,
    class_shares,
    majority_classes,
    significant_information,
)
from bincomm.codes.distances import distance_histograms, neighbor_overlap, precision_by_bits, separation
from bincomm.codes.observations import most_certain, observe
from bincomm.codes.report import report
from bincomm.codes.stability import predicted_from
from bincomm.codes.usage import bit_correlations, bit_entropies, block_entropies, share_of_ones
from bincomm.config import PretrainConfig
from bincomm.data.sources import open_source
from bincomm.evaluation.features import forward_batches
from bincomm.evaluation.pretrained import Pretrained
from bincomm.networks import Head

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch):
    """But those of `example`, which is made before."""
    monkeypatch.setattr("bincomm.page.elements.DPI", 40)


def write(path, scan):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((scan.reshape(8, 8) * (255 / 16)).round().astype("uint8")).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty of each of three digits."""
    folder = tmp_path_factory.mktemp("photos")
    scans, labels = load_digits(return_X_y=True)
    for label, name in enumerate(("nought", "one", "two")):
        for index, scan in enumerate(scans[labels == label][:40]):
            write(folder / name / f"{label}{index:02}.png", scan)
    return folder


def copy_photos(source, target, count):
    target.mkdir(parents=True)
    for file in sorted(source.iterdir())[:count]:
        shutil.copy(file, target)


def network(source, bits, seed=0):
    """A network whose bits are 1 in half of the images: untrained, but pixels distinguish digits."""
    torch.manual_seed(seed)
    config = PretrainConfig(
        data="photos",
        global_size=16,
        global_scale=(0.7, 1.0),
        eval_crop=1.0,
        flip=0.0,
        blur=(0.0, 0.0, 0.0),
        solarize=0.0,
        batch_size=64,
        bits=bits,
        threads=1,
    )
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten()).eval()
    model = Pretrained(
        f"network {seed}", backbone, Head(192, 32, bits, 0.1).eval(), config, torch.device("cpu")
    )
    logits = logits_of(model, source)
    with torch.no_grad():
        model.head.layers[-1].bias -= logits.quantile(0.5, 0)
    return model


@pytest.fixture(scope="module")
def example(photos, tmp_path_factory):
    """A report on all of it, of a code with a dead bit and two that repeat another, and its logits."""
    source = open_source(str(photos))
    model = network(source, 20)
    with torch.no_grad():
        last = model.head.layers[-1]
        last.weight[3], last.bias[3] = 0, 1
        last.weight[5], last.bias[5] = last.weight[4], last.bias[4]
        last.weight[6], last.bias[6] = -last.weight[4], -last.bias[4]
    attributes = tmp_path_factory.mktemp("attributes") / "attributes.csv"
    lines = ["file, digit,number ,noise,name,same", "elsewhere.png,7,7,7,7,7"]
    for index, name in enumerate(source.images.names()):
        file = os.path.basename(name)
        noise = ("", "NaN")[index % 8 == 0] if index % 4 == 0 else "even" if index % 3 else "odd"
        lines.append(f'{file}, {file[0]}, "{index / 10}",{noise},{file}!,yes')
    attributes.write_text("\n".join(lines[:-1]))  # the last image has no row
    output = tmp_path_factory.mktemp("output") / "made" / "here"
    begun = time.process_time()
    result = report(
        model,
        source,
        output,
        attributes=attributes,
        classes=("two", "one"),
        bits=[4, 3],
        other=network(source, 24, seed=1),
    )
    assert time.process_time() - begun < 60  # of the processor; 4 s on an idle core
    logits = logits_of(model, source)
    return source, logits, output, result


def test_the_file_holds_what_is_returned_and_what_the_functions_say(example):
    source, logits, output, result = example
    assert json.loads((output / "codes.json").read_text(), parse_constant=pytest.fail) == result
    signs, labels = logits > 0, torch.from_numpy(source.labels)
    assert (result["images"], result["bits"], result["weights"]) == (120, 20, "network 0")
    use = result["use"]
    assert use["ones"] == share_of_ones(signs).tolist()
    assert use["entropy"] == bit_entropies(signs).tolist()
    assert (use["dead"], use["same"], use["inverted"]) == ([3], [[4, 5]], [[4, 6]])
    for name, value in block_entropies(signs)._asdict().items():
        assert result["blocks"][name] == value.tolist()
    distances = distance_histograms(signs, labels)
    assert result["distances"]["within"] == distances.within.tolist()
    assert result["distances"]["separation"] == separation(distances.within, distances.between)
    correlations = bit_correlations(signs)
    assert [pair[:2] for pair in result["correlations"]["strongest"][:2]] == [[4, 5], [4, 6]]
    for first, second, value in result["correlations"]["strongest"]:
        assert value == correlations[first, second]
    # Bit 3 is always the same, so it has no correlations: zeros would make the others look small.
    varying = [bit for bit in range(20) if bit != 3]
    first, second = torch.triu_indices(19, 19, 1)
    pairs = correlations[varying][:, varying][first, second]
    assert sum(result["correlations"]["absolute"]) == len(pairs)
    assert result["correlations"]["rms"] == pytest.approx(pairs.square().mean().sqrt().item())
    for name, value in significant_information(signs, labels)._asdict().items():
        assert result["information"][name] == (value.tolist() if torch.is_tensor(value) else value)
    subsets = precision_by_bits(signs, labels, [20, 16, 8])
    assert result["retrieval"]["by_bits"] == [subset._asdict() for subset in subsets]
    # 24 queries, a gallery of 96, of which 39 · 96/119 are relevant on average. Of R relevant among N in
    # random order the precision is (H_N + (N - H_N)(R - 1)/(N - 1))/N, which is more than R/N.
    harmonic = sum(1 / rank for rank in range(1, 97))
    by_chance = (harmonic + (96 - harmonic) * (39 * 96 / 119 - 1) / 95) / 96
    assert result["retrieval"]["by_chance"] == pytest.approx(by_chance, abs=2e-3)
    assert result["data"] == os.path.dirname(os.path.dirname(source.images.name(0)))
    majority = {
        name: value.sum(0).tolist() for name, value in majority_classes(signs, labels, 3)._asdict().items()
    }
    assert result["majority_classes"] == majority
    assert result["class_images"] == [40, 40, 40]
    assert result["class_shares"] == class_shares(signs, labels, 3)[1].tolist()
    difference = class_difference(signs, labels, 2, 1)
    assert result["class_difference"]["classes"] == ["two", "one"]
    assert result["class_difference"]["low"] == difference.low.tolist()
    assert result["class_difference"]["order"] == difference.order


def test_bits_asked_for_are_shown_with_their_surest_images(example):
    source, logits, _, result = example
    assert result["shown"]["chosen_by"] == "named"
    four, three = result["shown"]["bits"]
    assert (four["bit"], three["bit"]) == (4, 3)
    for side, rows in most_certain(logits, 4, 8)._asdict().items():
        assert [image["image"] for image in four[side]] == [source.images.name(row) for row in rows]
        assert [image["logit"] for image in four[side]] == pytest.approx(logits[rows, 4].tolist(), abs=1e-5)
    assert len(three["ones"]) == 8
    assert three["zeros"] == []


def test_pictures_are_of_the_most_certain_images(photos):
    source = open_source(str(photos))
    model = network(source, 3)
    observed = observe(model, source)
    crops = torch.cat([batch.crops for batch in forward_batches(model, source)]).permute(0, 2, 3, 1).numpy()
    for bit in range(3):
        sides = most_certain(observed.logits, bit, 8)
        for row in sides.ones + sides.zeros:
            expected = 255 * (crops[row] * model.config.std + model.config.mean)
            assert np.abs(np.asarray(observed.pictures[row]) - expected).max() <= 1
    assert len(observed.pictures) < 120


def test_attributes_find_their_images(example):
    source, logits, _, result = example
    attributes = result["attributes"]
    assert list(attributes) == ["digit", "number", "noise"]
    known = torch.arange(120) < 119
    assert attributes["digit"]["values"] == ["0", "1", "2"]
    assert attributes["digit"]["known"] == 119
    expected = significant_information(logits[known] > 0, torch.from_numpy(source.labels)[known])
    assert attributes["digit"]["corrected"] == expected.corrected.tolist()
    assert attributes["number"]["values"] == ["≤ 5.9", "> 5.9"]
    halves = torch.where(known, (torch.arange(120) > 59).long(), -1)
    assert attributes["number"]["plug_in"] == significant_information(logits > 0, halves).plug_in.tolist()
    assert attributes["noise"]["known"] == 119 - 30
    assert sum(attributes["noise"]["significant"]) <= 1
    assert any(note.startswith("Attribute name is left out: 119 values") for note in result["notes"])
    assert any(note.startswith("Attribute same is left out: fewer than two") for note in result["notes"])
    assert "The attributes' file names 119 of 120 images, and 1 that are not among them." in result["notes"]


def test_another_checkpoint_is_compared(example):
    source, logits, _, result = example
    other = network(source, 24, seed=1)
    other_signs = logits_of(other, source) > 0
    comparison = result["other"]
    assert (comparison["weights"], comparison["images"], comparison["bits"]) == ("network 1", 120, 24)
    predicted = predicted_from(logits > 0, other_signs)
    assert comparison["from_other"]["probe"] == pytest.approx(predicted.probe.tolist())
    assert comparison["from_other"]["correlation"] == predicted.correlation.tolist()
    assert len(comparison["from_this"]["probe"]) == 24
    overlap, chance = neighbor_overlap(logits > 0, other_signs)
    assert comparison["neighbors"] == {"k": 10, "overlap": overlap, "chance": chance}
    assert overlap > 2 * chance  # both see the pixels


def test_crops_and_map(example):
    _, _, _, result = example
    stable = result["stability"]
    assert stable["images"] == 120  # all, although two batches of 64 are not full
    assert stable["equal"][3] == 1
    assert stable["kappa"][3] == 0
    assert stable["equal"][4] == stable["equal"][5] == stable["equal"][6]
    assert np.mean(np.delete(stable["kappa"], 3)) > 0.2
    assert result["map"]["images"] == list(range(120))
    assert np.isfinite([result["map"]["x"], result["map"]["y"]]).all()


def test_the_page_stands_alone_and_explains_itself(example):
    _, _, output, result = example
    page = Page(output / "codes.html")
    source = (output / "codes.html").read_text()
    assert not re.search(r"https?://", source)
    assert "script" not in page.tags
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.images)
    assert len(page.images) > 10 + 2 * 8
    assert page.text.count("Good:") >= 10
    assert page.text.count("Bad:") >= 9
    for words in (
        "120 images are few",
        "Bit 4",
        "What distinguishes two from one",
        "no image",
        "about 7.1 of 8",
    ):
        assert words in page.text
    assert "Dead (nearly always the same): 3." in page.text
    shares = [(row[4], name) for row, name in zip(result["class_shares"], result["classes"], strict=True)]
    (most, often), (least, seldom) = max(shares), min(shares)
    sentence = f"most often 1 in {often} ({most:.0%}); least often in {seldom} ({least:.0%})."
    assert sentence in page.text
    assert "5 is the same as 4; 6 is the inverse of 4" in page.text


def test_without_labels_what_needs_them_is_left_out(photos, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted(photos.glob("*/*1.png")):
        shutil.copy(file, flat)
    shutil.copy(file, flat / "<b>&quot;.png")
    with open(file, "rb") as picture, open(os.fsencode(flat) + b"/\xff.png", "wb") as copy:
        copy.write(picture.read())
    source = open_source(str(flat))
    result = report(network(source, 12), source, tmp_path)
    assert result["images"] == 14
    for name in ("information", "retrieval", "majority_classes", "class_difference", "attributes", "other"):
        assert name not in result
    assert result["distances"]["within"] is None
    assert result["shown"]["chosen_by"] == "stability"
    assert [shown["bit"] for shown in result["shown"]["bits"]]
    assert json.loads((tmp_path / "codes.json").read_text()) == result
    page = Page(tmp_path / "codes.html")
    assert "no labels" in page.text
    assert "of the class" not in page.text
    assert "b" in page.tags  # of the page's own
    assert "<b>&quot;.png" not in (tmp_path / "codes.html").read_text()
    with pytest.raises(ValueError, match="classes: expected images with labels"):
        report(network(source, 12), source, tmp_path, classes=("a", "b"))


def test_a_class_whose_images_cannot_be_used(photos, tmp_path):
    folder = tmp_path / "data"
    for name in ("nought", "one"):
        copy_photos(photos / name, folder / name, 12)
    (folder / "empty").mkdir()
    (folder / "empty" / "broken.png").write_bytes(b"not a picture")
    source = open_source(str(folder))
    result = report(network(source, 9), source, tmp_path, classes=("one", "empty"))
    assert result["class_images"] == [0, 12, 12]
    assert result["class_shares"][0] is None
    assert "class_difference" not in result
    assert [os.path.basename(name) for name, _ in result["left_out"]] == ["broken.png"]
    text = Page(tmp_path / "codes.html").text
    assert "1 image could not be used" in text
    assert "broken.png" in text
    # Without names, it is the two that there are.
    result = report(network(source, 1), source, tmp_path)
    assert sorted(result["class_difference"]["classes"]) == ["nought", "one"]
    assert result["bits"] == 1
    assert result["map"] is None


def test_names_that_are_long_or_no_html(photos, tmp_path):
    long = "w" * 200
    for name, digit in (("<i>&amp;", "nought"), (long, "one")):
        copy_photos(photos / digit, tmp_path / "data" / name, 12)
    copy_photos(photos / "two", tmp_path / "data" / "few", 9)
    source = open_source(str(tmp_path / "data"))
    result = report(network(source, 9), source, tmp_path / "output")
    assert sorted(result["class_difference"]["classes"]) == ["<i>&amp;", long]  # of those of 10 images
    page = Page(tmp_path / "output" / "codes.html")
    assert page.text.count("<i>&amp;") > 3
    assert long not in page.text
    assert "w" * 30 + "…" + "w" * 30 in page.text
    assert "of those of 10 images or more" in page.text
    assert not re.search(r"(often 1|least often) in few", page.text)  # nine images say little about a share


def test_when_a_disk_is_full_older_files_stay(photos, tmp_path, monkeypatch):
    source = open_source(str(photos)).select(range(0, 120, 10))
    before = {"codes.html": b"older", "codes.json": b"older"}
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*codes"):
        report(network(source, 9), source, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("names", [["nought/000.png", "nought/001.png"], ["nought/000.png", "one/100.png"]])
def test_two_images(photos, tmp_path, names):
    source = open_source(str(photos))
    images = list(source.images.names())
    source = source.select([images.index(str(photos / name)) for name in names])
    result = report(network(open_source(str(photos)), 16), source, tmp_path, other=network(source, 16))
    assert result["images"] == 2
    assert ("information" in result) == (names[1] == "one/100.png")
    assert "retrieval" not in result
    assert result["other"] is None
    assert result["map"] is None
    assert json.loads((tmp_path / "codes.json").read_text(), parse_constant=pytest.fail) == result
    Page(tmp_path / "codes.html")


def test_errors_are_raised_before_anything_is_written(photos, tmp_path):
    source = open_source(str(photos))
    model = network(source, 8)
    output = tmp_path / "output"

    def refuses(match, **changes):
        arguments = {"model": model, "source": source, **changes}
        with pytest.raises(ValueError, match=match):
            report(arguments.pop("model"), arguments.pop("source"), output, **arguments)

    headless = Pretrained("resnet18", model.backbone, None, model.config, model.device)
    refuses("model: resnet18 has no head", model=headless)
    refuses("other: resnet18 has no head", other=headless)
    refuses("there is no class 'three' among nought, one, two", classes=("one", "three"))
    refuses("expected two different ones", classes=("one", "one"))
    refuses("bits: expected from 0 to 7", bits=[3, 8])
    (tmp_path / "table.csv").write_text("file,a\nother.png,1\n")
    refuses("attributes: .*names none of the images", attributes=tmp_path / "table.csv")
    refuses("at least 2 images that can be used, got 1", source=source.select([0]))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output: .*file is a file"):
        report(model, source, tmp_path / "file" / "below")
    broken = network(source, 8, seed=1)
    with torch.no_grad():
        broken.head.layers[-1].bias[2] = float("nan")
    refuses("weights: network 1 gives logits that are NaN", other=broken)
    with torch.no_grad():
        broken.head.layers[-1].bias[2] = float("inf")
    refuses("other: network 1 gives codes that are not finite", other=broken)
    with torch.no_grad():
        model.head.layers[-1].bias[2] = float("inf")
    refuses("not finite")
    assert not output.exists()


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_nothing_overflows_and_nothing_is_wrong(example, tmp_path, width):
    _, _, output, _ = example
    seen = look_at(output / "codes.html", tmp_path, width)
    assert seen.width == width
    assert seen.scrolled <= width
    assert seen.broken == 0
    assert seen.height > 3000
    assert seen.contrast >= 4.5, seen.faintest
    assert seen.console == []
