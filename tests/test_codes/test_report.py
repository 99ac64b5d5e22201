"""A code laid open: what the report says is what the functions say, and the page shows it anywhere."""

import errno
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

for package in ("timm", "nvidia.dali", "jsonargparse", "sklearn", "safetensors", "tensorboard"):
    pytest.importorskip(package, reason="reports need the packages of bincomm[eval]")
from PIL import Image  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from bincomm.codes import statistics  # noqa: E402
from bincomm.codes.report import _attribute, _correlations, _look, report  # noqa: E402
from bincomm.config import PretrainConfig  # noqa: E402
from bincomm.data.sources import open_source  # noqa: E402
from bincomm.evaluation.features import look  # noqa: E402
from bincomm.evaluation.pretrained import Pretrained  # noqa: E402
from bincomm.networks import Head  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img"}


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


def network(source, bits, seed=0):
    """A network whose bits are 1 in half of the images: nothing learned, but pixels tell digits apart."""
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
    logits = torch.cat([seen.logits for seen in look(model, source)])
    with torch.no_grad():
        model.head.layers[-1].bias -= logits.quantile(0.5, 0)
    return model


@pytest.fixture(scope="module")
def seen(photos, tmp_path_factory):
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
    begun = time.perf_counter()
    result = report(
        model,
        source,
        output,
        attributes=attributes,
        classes=("two", "one"),
        bits=[4, 3],
        other=network(source, 24, seed=1),
    )
    assert time.perf_counter() - begun < 60  # 4 s on an idle core
    logits = torch.cat([seen.logits for seen in look(model, source)])
    return source, logits, output, result


def test_dead_bits_are_not_called_the_most_alike():
    signs = torch.rand(1000, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    signs[:, 4:] = False
    signs[7, 4:] = True
    found = _correlations(signs)
    assert sum(found["absolute"]) == 6
    assert all(second < 4 and abs(value) < 0.2 for _, second, value in found["strongest"])
    assert sum(_correlations(signs[:, 4:])["absolute"]) == 0


def test_the_file_holds_what_is_returned_and_what_the_functions_say(seen):
    source, logits, output, result = seen
    assert json.loads((output / "codes.json").read_text(), parse_constant=pytest.fail) == result
    signs, labels = logits > 0, torch.from_numpy(source.labels)
    assert (result["images"], result["bits"], result["weights"]) == (120, 20, "network 0")
    use = result["use"]
    assert use["ones"] == statistics.share_of_ones(signs).tolist()
    assert use["entropy"] == statistics.bit_entropies(signs).tolist()
    assert (use["dead"], use["same"], use["inverted"]) == ([3], [[4, 5]], [[4, 6]])
    for name, value in statistics.block_entropies(signs)._asdict().items():
        assert result["blocks"][name] == value.tolist()
    distances = statistics.distance_histograms(signs, labels)
    assert result["distances"]["within"] == distances.within.tolist()
    assert result["distances"]["separation"] == statistics.separation(distances.within, distances.between)
    correlations = statistics.bit_correlations(signs)
    assert [pair[:2] for pair in result["correlations"]["strongest"][:2]] == [[4, 5], [4, 6]]
    for first, second, value in result["correlations"]["strongest"]:
        assert value == correlations[first, second]
    # Bit 3 is always the same, so it has no correlations: zeros would make the others look small.
    varying = [bit for bit in range(20) if bit != 3]
    first, second = torch.triu_indices(19, 19, 1)
    pairs = correlations[varying][:, varying][first, second]
    assert sum(result["correlations"]["absolute"]) == len(pairs)
    assert result["correlations"]["rms"] == pytest.approx(pairs.square().mean().sqrt().item())
    for name, value in statistics.mutual_information(signs, labels)._asdict().items():
        assert result["information"][name] == (value.tolist() if torch.is_tensor(value) else value)
    kept = statistics.precision_by_bits(signs, labels, [20, 16, 8])
    assert result["retrieval"]["kept"] == [one._asdict() for one in kept]
    # 24 ask, 96 answer, of which 39 · 96/119 are relevant on average. Of R relevant among N in random order
    # the precision is (H_N + (N - H_N)(R - 1)/(N - 1))/N, which is more than R/N.
    harmonic = sum(1 / place for place in range(1, 97))
    by_chance = (harmonic + (96 - harmonic) * (39 * 96 / 119 - 1) / 95) / 96
    assert result["retrieval"]["by_chance"] == pytest.approx(by_chance, abs=2e-3)
    assert result["data"] == os.path.dirname(os.path.dirname(source.images.name(0)))
    found = statistics.sharing(signs, labels, 3)
    assert result["sharing"] == {"ones": found.ones.sum(0).tolist(), "zeros": found.zeros.sum(0).tolist()}
    assert result["class_images"] == [40, 40, 40]
    assert result["class_shares"] == statistics.class_shares(signs, labels, 3)[1].tolist()
    apart = statistics.telling_apart(signs, labels, 2, 1)
    assert result["telling_apart"]["classes"] == ["two", "one"]
    assert result["telling_apart"]["low"] == apart.low.tolist()
    assert result["telling_apart"]["order"] == apart.order


def test_bits_asked_for_are_shown_with_their_surest_images(seen):
    source, logits, _, result = seen
    assert result["shown"]["chosen_by"] == "named"
    four, three = result["shown"]["bits"]
    assert (four["bit"], three["bit"]) == (4, 3)
    for side, rows in statistics.surest(logits, 4, 8)._asdict().items():
        assert [one["image"] for one in four[side]] == [source.images.name(row) for row in rows]
        assert [one["logit"] for one in four[side]] == pytest.approx(logits[rows, 4].tolist(), abs=1e-5)
    assert len(three["ones"]) == 8
    assert three["zeros"] == []


def test_pictures_are_of_the_surest_images(photos):
    source = open_source(str(photos))
    model = network(source, 3)
    looked = _look(model, source, None)
    crops = torch.cat([seen.crops for seen in look(model, source)]).permute(0, 2, 3, 1).numpy()
    for bit in range(3):
        sides = statistics.surest(looked.logits, bit, 8)
        for row in sides.ones + sides.zeros:
            expected = 255 * (crops[row] * model.config.std + model.config.mean)
            assert np.abs(np.asarray(looked.pictures[row]) - expected).max() <= 1
    assert len(looked.pictures) < 120


def test_attributes_find_their_images(seen):
    source, logits, _, result = seen
    found = result["attributes"]
    assert list(found) == ["digit", "number", "noise"]
    known = torch.arange(120) < 119
    assert found["digit"]["values"] == ["0", "1", "2"]
    assert found["digit"]["known"] == 119
    told = statistics.mutual_information(logits[known] > 0, torch.from_numpy(source.labels)[known])
    assert found["digit"]["corrected"] == told.corrected.tolist()
    assert found["number"]["values"] == ["≤ 5.9", "> 5.9"]
    halves = torch.where(known, (torch.arange(120) > 59).long(), -1)
    assert found["number"]["plug_in"] == statistics.mutual_information(logits > 0, halves).plug_in.tolist()
    assert found["noise"]["known"] == 119 - 30
    assert sum(found["noise"]["significant"]) <= 1
    assert any(note.startswith("Attribute name is left out: 119 values") for note in result["notes"])
    assert any(note.startswith("Attribute same is left out: fewer than two") for note in result["notes"])
    assert "The attributes' file names 119 of 120 images, and 1 that are not among them." in result["notes"]


def test_another_checkpoint_is_compared(seen):
    source, logits, _, result = seen
    other = network(source, 24, seed=1)
    theirs = torch.cat([one.logits for one in look(other, source)]) > 0
    found = result["other"]
    assert (found["weights"], found["images"], found["bits"]) == ("network 1", 120, 24)
    predicted = statistics.predicted_from(logits > 0, theirs)
    assert found["from_other"]["probe"] == pytest.approx(predicted.probe.tolist())
    assert found["from_other"]["correlation"] == predicted.correlation.tolist()
    assert len(found["from_this"]["probe"]) == 24
    overlap, chance = statistics.neighbor_overlap(logits > 0, theirs)
    assert found["neighbors"] == {"k": 10, "overlap": overlap, "chance": chance}
    assert overlap > 2 * chance  # both see the pixels


def test_crops_and_map(seen):
    _, _, _, result = seen
    stable = result["stability"]
    assert stable["images"] == 120  # all, although two batches of 64 are not full
    assert stable["agreement"][3] == 1
    assert stable["kappa"][3] == 0
    assert stable["agreement"][4] == stable["agreement"][5] == stable["agreement"][6]
    assert np.mean(np.delete(stable["kappa"], 3)) > 0.2
    assert result["map"]["images"] == list(range(120))
    assert np.isfinite([result["map"]["x"], result["map"]["y"]]).all()


class Page(HTMLParser):
    """A page's tags, which have to be closed, its images and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.tags, self.text = [], [], set(), ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_explains_itself(seen):
    _, _, output, result = seen
    page = Page(output / "codes.html")
    source = (output / "codes.html").read_text()
    assert not re.search(r"https?://", source)
    assert "script" not in page.tags
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.images)
    assert len(page.images) > 10 + 2 * 8
    assert page.text.count("Good:") >= 10
    assert page.text.count("Bad:") >= 9
    for words in ("120 images are few", "Bit 4", "What tells two from one", "no image", "about 7.1 of 8"):
        assert words in page.text
    assert "Dead (nearly always the same): 3." in page.text
    shares = [(row[4], name) for row, name in zip(result["class_shares"], result["classes"], strict=True)]
    (most, often), (least, seldom) = max(shares), min(shares)
    told = f"most often 1 in {often} ({most:.0%}); least often in {seldom} ({least:.0%})."
    assert told in page.text
    assert "5 says what 4 says; 6 says the opposite of 4" in page.text


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
    for name in ("information", "retrieval", "sharing", "telling_apart", "attributes", "other"):
        assert name not in result
    assert result["distances"]["within"] is None
    assert result["shown"]["chosen_by"] == "stability"
    assert [one["bit"] for one in result["shown"]["bits"]]
    assert json.loads((tmp_path / "codes.json").read_text()) == result
    page = Page(tmp_path / "codes.html")
    assert "no labels" in page.text
    assert "of the class" not in page.text
    assert "b" in page.tags  # of the page's own
    assert "<b>&quot;.png" not in (tmp_path / "codes.html").read_text()
    with pytest.raises(ValueError, match="classes: expected images with labels"):
        report(network(source, 12), source, tmp_path, classes=("a", "b"))


def test_a_class_whose_images_cannot_be_used(photos, tmp_path):
    folder = tmp_path / "some"
    for name in ("nought", "one"):
        shutil.copytree(photos / name, folder / name)
    (folder / "empty").mkdir()
    (folder / "empty" / "broken.png").write_bytes(b"not a picture")
    source = open_source(str(folder))
    result = report(network(source, 9), source, tmp_path, classes=("one", "empty"))
    assert result["class_images"] == [0, 40, 40]
    assert result["class_shares"][0] is None
    assert "telling_apart" not in result
    assert [os.path.basename(name) for name, _ in result["left_out"]] == ["broken.png"]
    text = Page(tmp_path / "codes.html").text
    assert "1 image could not be used" in text
    assert "broken.png" in text
    # Without names, it is the two that there are.
    result = report(network(source, 1), source, tmp_path)
    assert sorted(result["telling_apart"]["classes"]) == ["nought", "one"]
    assert result["bits"] == 1
    assert result["map"] is None


def test_names_that_are_long_or_no_html(photos, tmp_path):
    long = "w" * 200
    for name, digit in (("<i>&amp;", "nought"), (long, "one")):
        shutil.copytree(photos / digit, tmp_path / "data" / name)
    shutil.copytree(photos / "two", tmp_path / "data" / "few")
    for file in sorted((tmp_path / "data" / "few").iterdir())[9:]:
        file.unlink()
    source = open_source(str(tmp_path / "data"))
    result = report(network(source, 9), source, tmp_path / "output")
    assert sorted(result["telling_apart"]["classes"]) == ["<i>&amp;", long]  # of those of 10 images
    page = Page(tmp_path / "output" / "codes.html")
    assert page.text.count("<i>&amp;") > 3
    assert long not in page.text
    assert "w" * 30 + "…" + "w" * 30 in page.text
    assert "of those of 10 images or more" in page.text
    assert not re.search(r"(often 1|least often) in few", page.text)  # nine images tell little of a share


def test_when_a_disk_is_full_what_there_was_stays(photos, tmp_path, monkeypatch):
    source = open_source(str(photos))
    report(network(source, 8), source, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*codes"):
        report(network(source, 9), source, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kept", [["nought/000.png", "nought/001.png"], ["nought/000.png", "one/100.png"]])
def test_two_images(photos, tmp_path, kept):
    source = open_source(str(photos))
    names = list(source.images.names())
    source = source.select([names.index(str(photos / name)) for name in kept])
    result = report(network(open_source(str(photos)), 16), source, tmp_path, other=network(source, 16))
    assert result["images"] == 2
    assert ("information" in result) == (kept[1] == "one/100.png")
    assert "retrieval" not in result
    assert result["other"] is None
    assert result["map"] is None
    assert json.loads((tmp_path / "codes.json").read_text(), parse_constant=pytest.fail) == result
    Page(tmp_path / "codes.html")


def test_what_cannot_be_measured_is_told_before_anything_is_written(photos, tmp_path):
    source = open_source(str(photos))
    model = network(source, 8)
    output = tmp_path / "output"

    def told(match, **changes):
        arguments = {"model": model, "source": source, **changes}
        with pytest.raises(ValueError, match=match):
            report(arguments.pop("model"), arguments.pop("source"), output, **arguments)

    headless = Pretrained("resnet18", model.backbone, None, model.config, model.device)
    told("model: resnet18 has no head", model=headless)
    told("other: resnet18 has no head", other=headless)
    told("there is no class 'three' among nought, one, two", classes=("one", "three"))
    told("expected two different ones", classes=("one", "one"))
    told("bits: expected from 0 to 7", bits=[3, 8])
    told("at least 2 images that can be used, got 1", source=source.select([0]))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output: .*file is a file"):
        report(model, source, tmp_path / "file" / "below")
    broken = network(source, 8, seed=1)
    with torch.no_grad():
        broken.head.layers[-1].bias[2] = float("nan")
    told("other: network 1 gives codes that are not finite", other=broken)
    with torch.no_grad():
        model.head.layers[-1].bias[2] = float("nan")
    told("not finite")
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.png\n", "at least one more"),
        ("", "at least one more"),
        ("file,a,a\n000.png,1,2\n", "two columns of the same name"),
        ("file,a\n000.png,1,2\n", "line 2 .* has 3 fields"),
        ('file,a\n100.png,"1\n2"\n\n000.png,1\n./000.png,1\n', "line 6 .* second of its image"),
        ("000.png,1\n100.png,2\n", "begins with an image, '000.png'"),
        ('file,a\n"' + "a" * 200_000, "cannot be read as CSV"),
        (None, "cannot be read as CSV: No such file"),
        ("file,a\nother.png,1\n", "names none of the images"),
        ("file,a\nsame.png,1\n", "names 2 images"),
    ],
)
def test_attributes_that_do_not_fit(photos, tmp_path, text, message):
    for name in ("x", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(photos / "one" / "100.png", tmp_path / "data" / name / "same.png")
    shutil.copy(photos / "one" / "101.png", tmp_path / "data" / "x" / "000.png")
    source = open_source(str(tmp_path / "data"))
    if text is not None:
        (tmp_path / "attributes.csv").write_text(text)
    with pytest.raises(ValueError, match=f"attributes: .*{message}"):
        report(network(source, 8), source, tmp_path / "output", attributes=tmp_path / "attributes.csv")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_nothing_overflows_and_nothing_is_wrong(seen, tmp_path, width):
    _, _, output, _ = seen
    source = (output / "codes.html").read_text()
    # The page has no script of its own; this copy reports on itself, all of it unfolded. A frame is as narrow
    # as a phone even where the browser's window cannot be.
    script = """<script>addEventListener("load", () => {
      document.querySelectorAll("details").forEach(one => one.open = true);
      const page = document.documentElement;
      const broken = [...document.images].filter(one => !one.naturalWidth).length;
      parent.postMessage([innerWidth, page.scrollWidth, broken, page.scrollHeight].join(" "), "*");
    })</script>"""
    (tmp_path / "copy.html").write_text(source.replace("</body>", script + "</body>"))
    (tmp_path / "frame.html").write_text(
        f'<!doctype html><link rel="icon" href="data:,"><iframe width="{width}" height="800" '
        'style="border: 0" src="copy.html"></iframe><p id="said"></p>'
        '<script>addEventListener("message", e => document.getElementById("said").textContent = e.data)'
        "</script>"
    )
    found = subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=10000", "--dump-dom", str(tmp_path / "frame.html")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = re.search(r'<p id="said">(\d+) (\d+) (\d+) (\d+)</p>', found.stdout)
    assert said, found.stdout[-300:] + found.stderr[-2000:]
    inner, scrolled, broken, height = map(int, said.groups())
    assert inner == width
    assert scrolled <= width
    assert broken == 0
    assert height > 3000
    assert "CONSOLE" not in found.stderr


@pytest.mark.parametrize("most", [0, 100])
def test_numbers_of_which_most_are_the_least_or_the_largest_are_cut_beside_these(most):
    numbers = [str(number) for number in range(1, 41)]
    found = _attribute([str(most)] * 60 + numbers + ["", "nan"])
    assert np.bincount(found.values + 1).tolist() == ([2, 60, 40] if most == 0 else [2, 40, 60])
    assert found.names == (["≤ 0", "> 0"] if most == 0 else ["< 100", "≥ 100"])
