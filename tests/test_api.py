"""What the commands do, from Python."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image

import bincomm
from bincomm import api
from bincomm.data.digits import digits
from bincomm.data.sources import Files, Source
from bincomm.evaluation.features import extract_features

pytestmark = pytest.mark.slow

KEYS = {
    "recipe": "digits",
    "backbone": "test_vit",
    "backbone_args": {"patch_size": 4, "depth": 1},
    "global_size": 16,
    "local_size": 12,
    "bits": 16,
    "hidden": 32,
    "max_steps": 4,
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder of a few digits by class, a run on them, and what it returned."""
    folder = tmp_path_factory.mktemp("api")
    for part, step in (("train", 8), ("test", 4)):
        for path in sorted((digits() / part).glob("*/*.png"))[::step]:
            copy = folder / "images" / path.relative_to(digits())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    result = bincomm.pretrain(folder / "images", output=folder / "run", **KEYS)
    return folder / "images", folder / "run", result


def test_importing_bincomm_leaves_what_trains_for_later():
    code = """
        import sys
        import bincomm
        assert "bincomm.api" not in sys.modules
        assert {"pretrain", "adapt", "compare", "evaluate", "encode", "load_pretrained"} <= set(dir(bincomm))
        assert bincomm.evaluate is bincomm.api.evaluate
        assert "timm" not in sys.modules and "jsonargparse" not in sys.modules
        assert not hasattr(bincomm, "pretrian")
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_run_and_an_adaptation(pretrained, tmp_path):
    images, run, result = pretrained
    assert result == json.loads((run / "result.json").read_text())
    adapted = bincomm.adapt(run, images, output=tmp_path / "adapted", max_steps=2)
    assert adapted["from"] == str(run)
    assert adapted == json.loads((tmp_path / "adapted" / "adapt.json").read_text())
    config = (tmp_path / "adapted" / "config.yaml").read_text()
    assert "bits: 16" in config  # the source's
    assert "reset_every: 0" in config  # the recipe's


def test_a_comparison(pretrained, tmp_path):
    keys = {**KEYS, "max_steps": 1}
    table = bincomm.compare(pretrained[0], methods=["simdino"], output=tmp_path / "compared", **keys)
    assert table == json.loads((tmp_path / "compared" / "table.json").read_text())
    assert "SimDINO".lower() in [row["name"].lower() for row in table["rows"]]


def test_each_part_of_an_evaluation_is_there_at_once(pretrained, tmp_path):
    images, run, _ = pretrained
    parts, output = [], tmp_path / "results.json"
    for half in ("train", "val"):
        for name in ("images/a.png", "masks/a.png"):
            path = tmp_path / "damaged" / half / name
            path.parent.mkdir(parents=True)
            path.touch()
    with pytest.raises(ValueError, match="train/images/a.png: cannot be read"):
        bincomm.evaluate(
            run,
            images,
            protocols=["knn"],
            segmentation=tmp_path / "damaged",
            output=output,
            on_result=lambda part: parts.append((part, output.exists())),
        )
    ((part, _),) = parts
    written = json.loads(output.read_text())
    assert part["knn"] == written["knn"]
    assert written["weights"] == str(run)
    result = bincomm.evaluate(run, images, protocols=["knn"], global_size=12)
    assert result["preprocessing"]["global_size"] == 12
    assert result["queries_held_out"]


def test_dense_arguments_are_checked_before_the_work(pretrained, tmp_path):
    images, run, _ = pretrained
    (tmp_path / "full" / "x").mkdir(parents=True)
    for half in ("train", "val"):
        for name in ("images/a.png", "masks/a.png"):
            path = tmp_path / "set" / half / name
            path.parent.mkdir(parents=True)
            path.touch()
    dense = {"segmentation": tmp_path / "set"}
    for keys, words in (
        ({"segmentation": tmp_path}, "segmentation: expected a folder of train/images, .*set looks right"),
        ({"davis": tmp_path}, "davis: expected a folder of DAVIS with "),
        ({"davis": tmp_path / "set/val/masks/a.png"}, "davis: expected a folder, .*; unpack it if it is an "),
        ({"void": [3]}, "void: expected segmentation"),
        ({**dense, "void": [300]}, "void: expected classes from 0 to 254, got 300"),
        ({"masks": tmp_path / "new"}, "masks: expected davis, objects or segmentation"),
        ({"objects": tmp_path}, "objects: expected a folder of COCO "),
        ({**dense, "masks": tmp_path / "full"}, "masks: expected a new or an empty folder, got .*full"),
        ({**dense, "masks": "/dev/null/x"}, "masks: expected a folder that can be made and written"),
    ):
        with pytest.raises(ValueError, match=words):
            bincomm.evaluate(run, images, protocols=["knn"], on_result=pytest.fail, **keys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "set"]


def test_codes_are_written_found_and_reported(pretrained, tmp_path, monkeypatch):
    images, run, _ = pretrained
    monkeypatch.chdir(run.parent)
    encoded = bincomm.encode(run.name, images, tmp_path / "codes")
    assert (encoded.bits, encoded.unusable) == (16, [])
    monkeypatch.chdir(tmp_path)
    query = sorted(images.glob("train/7/*.png"))[0]
    neighbors = api.search(tmp_path / "codes", query, k=encoded.codes, sheet=tmp_path / "sheet.png")
    assert len(neighbors) == encoded.codes
    assert (0, str(query)) in [(neighbor.distance, neighbor.path) for neighbor in neighbors]
    assert (tmp_path / "sheet.png").exists()
    result = api.report(run, images, tmp_path / "page", bits=[2, 5])
    assert result == json.loads((tmp_path / "page" / "codes.json").read_text())
    assert [bit["bit"] for bit in result["shown"]["bits"]] == [2, 5]


def test_what_was_pretrained_is_loaded(pretrained):
    model = bincomm.load_pretrained(pretrained[1], "cpu", eval_crop=0.5)
    assert model.config.eval_crop == 0.5
    features = model.backbone(torch.zeros(2, 3, 16, 16))
    assert model.head(features).shape == (2, 16)


def test_one_image_is_encoded_as_many_are(pretrained, tmp_path):
    images, run, _ = pretrained
    file = sorted(images.glob("train/7/*.png"))[0]
    model = bincomm.load_pretrained(run, "cpu")
    features, bits = model.encode(file)
    assert (bits.shape, bits.dtype) == ((16,), torch.bool)
    expected = extract_features(model, Source(Files([str(file)])))
    assert torch.equal(features, expected["features"][0])
    assert torch.equal(bits, expected["signs"][0] > 0)
    with Image.open(file) as image:
        again = model.encode(image)
    assert torch.equal(again.features, features)
    assert torch.equal(again.bits, bits)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="image: .*bad.png cannot be used: not an image"):
        model.encode(tmp_path / "bad.png")
    with pytest.raises(ValueError, match="image: expected a path or an image of Pillow, got int"):
        model.encode(3)
    alone = bincomm.load_pretrained(run / "model.safetensors", "cpu").encode(file)
    assert alone.bits is None
    assert torch.equal(alone.features, features)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bincomm.pretrain("digits", epoch=3), "there is no key 'epoch'; did you mean epochs?"),
        (lambda: bincomm.compare("digits", method="dino"), "method: compare trains several methods"),
        (lambda: bincomm.adapt("nowhere", "digits"), "weights: expected a run's directory"),
        (lambda: bincomm.evaluate("nowhere"), "evaluate: expected at least one of data, davis, objects"),
        (lambda: bincomm.evaluate("nowhere", "digits"), "weights: expected a run's directory"),
        (lambda: api.search("nowhere", "x.png", sheet="no/x.png"), "sheet: expected a file in a folder"),
    ],
)
def test_what_is_wrong_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="device: cuda was asked for"):
        bincomm.load_pretrained(os.devnull, "cuda")
