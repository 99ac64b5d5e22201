"""Images of 13 channels of 16 bits from the first command to the last: statistics, pretraining, resuming,
evaluation, codes, search and export; and what is said where channels do not fit."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import bincomm
from bincomm import api, cli
from bincomm.adaptation import configure as configure_adaptation
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.data.evaluation_batches import eval_batches
from bincomm.data.sources import open_source
from bincomm.dry_run import dry_run
from bincomm.evaluation.dense import evaluate_segmentation
from bincomm.evaluation.features import extract_features
from bincomm.evaluation.video import evaluate_davis
from bincomm.networks import create_backbone
from bincomm.weights import load_weights

tifffile = pytest.importorskip("tifffile", reason="TIFFs of 13 bands are read and written by tifffile")

CHANNELS = 13
KEYS = {
    "backbone": "test_vit",
    "backbone_args": {},
    "batch_size": 8,
    "max_steps": 4,
    "save_every": 2,
    "log_every": 2,
    "bits": 16,
    "hidden": 32,
    "global_size": 32,
    "local_size": 16,
    "threads": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 TIFFs in two classes, whose bands rise or fall."""
    folder, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for name, order in (("rising", 1), ("falling", -1)):
        (folder / name).mkdir()
        for number in range(20):
            bands = 500 + 150 * np.arange(CHANNELS)[::order] + rng.integers(0, 300, (32, 32, CHANNELS))
            path = folder / name / f"{number:02}.tif"
            tifffile.imwrite(path, bands.astype(np.uint16), photometric="minisblack", planarconfig="contig")
    return folder


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    """The recipe that `bincomm data stats` writes."""
    path = tmp_path_factory.mktemp("recipe") / "bands.yaml"
    arguments = ["--channels", str(CHANNELS), "--recipe", "digits", "--output", str(path)]
    assert cli.main(["data", "stats", "--data", str(data), *arguments]) == 0
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A finished run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    bincomm.pretrain(**arguments(recipe, output))
    return output


def arguments(recipe, output, **keys):
    read = yaml.safe_load(recipe.read_text())
    return {"recipe": str(recipe), "data": read["data"], "output": str(output), **KEYS, **keys}


def pixels(data):
    """All images as they are, (40, 32, 32, 13) from 0 to 1."""
    return np.stack([tifffile.imread(path) / 65535 for path in sorted(data.glob("*/*.tif"))])


def test_the_recipe_has_what_was_measured(data, recipe, capsys):
    measured, keys = pixels(data), yaml.safe_load(recipe.read_text())
    np.testing.assert_allclose(keys["mean"], measured.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(keys["std"], measured.std((0, 1, 2)), rtol=1e-4)
    assert (keys["channels"], keys["data"]) == (CHANNELS, str(data))
    assert "on 40 of 40 images, 40960 pixels" in recipe.read_text()
    assert cli.main(["data", "stats", "--data", str(data), "--recipe", "digits"]) == 2  # of three channels
    captured = capsys.readouterr()
    assert "none of 40 images can be used" in captured.err


@pytest.mark.slow
def test_a_run_tells_what_is_off_and_keeps_it_off(run, recipe, tmp_path, caplog):
    keys = yaml.safe_load((run / "config.yaml").read_text())
    assert keys["channels"] == CHANNELS
    card = (run / "README.md").read_text()
    assert "model(images)  # (n, 13, 32, 32)" in card
    assert "RGB" not in card
    colored = arguments(recipe, tmp_path / "run", gray=0.5, solarize=0.2, jitter=[0.4, 0.4, 0.2, 0.1])
    with caplog.at_level("INFO", logger="bincomm"):
        bincomm.pretrain(**{**colored, "max_steps": 1})
    assert "channels: 13, which are no colors: saturation, hue, gray, solarize" in caplog.text
    keys = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (keys["gray"], keys["solarize"], keys["jitter"]) == (0, 0, [0.4, 0.4, 0, 0])


@pytest.mark.slow
def test_resumed_bit_for_bit_and_not_with_other_channels(run, recipe, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    for name in ("result.json", "model.safetensors", "config.json", "README.md"):
        (other / name).unlink()
    *_, last = sorted((other / "checkpoints").glob("*.ckpt"))
    last.unlink()
    with pytest.raises(ValueError, match="channels was 13, now 12"):
        bincomm.pretrain(**arguments(recipe, other, channels=12, mean=[0.1] * 12, std=[0.1] * 12))
    with pytest.raises(ValueError, match="pixel_range was None, now"):
        bincomm.pretrain(**arguments(recipe, other, pixel_range=[0, 4095]))
    bincomm.pretrain(**arguments(recipe, other))
    for name in ("model.safetensors", "result.json", "config.json", "README.md", "metrics.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_a_dry_run_writes_nothing(recipe, tmp_path):
    forecast = dry_run(configure(**arguments(recipe, tmp_path / "run")))
    assert (forecast.images, forecast.steps, forecast.config.channels) == (40, 4, CHANNELS)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluation_codes_and_search_agree(run, data, tmp_path, capsys):
    at_end = json.loads((run / "result.json").read_text())["evaluation"]
    assert at_end["pixels"]["knn"]["20"] == 1  # raw pixels tell the two classes apart
    result = bincomm.evaluate(run, data, protocols=["knn", "augmented"])
    assert result["knn"] == at_end["teacher"]["knn"]
    assert 0 <= result["augmented"]["accuracy"] <= 1
    encoded = bincomm.encode(run, data, tmp_path / "codes", features=True)
    assert (encoded.codes, encoded.unusable) == (40, [])
    query = data / "rising/03.tif"
    first, *_ = api.search(tmp_path / "codes", query, sheet=tmp_path / "sheet.png", root=data)
    assert first.distance == 0
    gray = np.array(Image.open(tmp_path / "sheet.png"))[4:132, 4:132]
    assert len(np.unique(gray.reshape(-1, 3), axis=0)) > 100  # the query is shown, no empty tile
    model = bincomm.load_pretrained(run, "cpu")
    features = model.encode(query).features
    assert torch.equal(model.encode(tifffile.imread(query)).features, features)
    with pytest.raises(ValueError, match="it has 3 channels; expected 13"):
        model.encode(Image.new("RGB", (32, 32)))
    assert api.report(run, data, tmp_path / "page")
    with pytest.raises(ValueError, match="segmentation: expected a backbone for RGB of 8 bits, got"):
        evaluate_segmentation(model, data)
    with pytest.raises(ValueError, match="davis: expected a backbone for RGB of 8 bits, got"):
        evaluate_davis(model, data)
    assert (
        cli.main(["data", "look", "--recipe", str(run / "config.yaml"), "--sheet", f"{tmp_path}/l.png"]) == 0
    )
    assert "channels 1 to 3 as red, green and blue" in capsys.readouterr().out


@pytest.mark.slow
def test_timm_loads_the_backbone_and_computes_the_same(run, data):
    model, source = bincomm.load_pretrained(run, "cpu"), open_source(str(data))
    config = model.config
    batches = eval_batches(
        source, config.crops, crop_ratio=config.eval_crop, batch_size=40, device=torch.device("cpu")
    )
    ((_, crops),) = batches
    # At this size the crop is the whole image, so that it can be made without bincomm.
    values = torch.from_numpy(pixels(data))
    by_hand = (values - torch.tensor(config.mean)) / torch.tensor(config.std)
    torch.testing.assert_close(crops, by_hand.movedim(-1, 1).float(), rtol=0, atol=1e-4)

    loaded = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    assert loaded.pretrained_cfg["input_size"] == (CHANNELS, 32, 32)
    assert tuple(loaded.pretrained_cfg["mean"]) == config.mean
    expected = extract_features(model, source)["features"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(crops), expected, rtol=0, atol=1e-5)
    alone = bincomm.load_pretrained(run / "model.safetensors", "cpu")
    assert (alone.config.channels, alone.config.mean) == (CHANNELS, config.mean)
    assert torch.equal(extract_features(alone, source)["features"], expected)


@pytest.mark.slow
def test_onnx_takes_as_many_channels(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    api.export(run, onnx=tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    shape = [each.dim_value for each in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape[1:] == [CHANNELS, 32, 32]
    metadata = {
        each.key: json.loads(each.value) for each in model.metadata_props if each.key != "interpolation"
    }
    assert metadata["input_size"] == [CHANNELS, 32, 32]
    assert len(metadata["mean"]) == CHANNELS


@pytest.mark.slow
def test_the_range_of_pixels_stays_with_the_weights(tmp_path):
    """Floating-point arrays with a stated range, one channel; the weights alone still know it."""
    rng = np.random.default_rng(0)
    for name, level in (("low", -1), ("high", 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(8):
            array = (level + rng.normal(0, 1, (32, 32))).astype(np.float32)
            np.save(tmp_path / "data" / name / f"{number}.npy", array)
    keys = {"channels": 1, "pixel_range": [-5, 5], "mean": [0.5], "std": [0.2], "max_steps": 2}
    bincomm.pretrain(
        tmp_path / "data", recipe="digits", output=str(tmp_path / "run"), **{**KEYS, "save_every": 9, **keys}
    )
    model = bincomm.load_pretrained(tmp_path / "run/model.safetensors", "cpu")
    assert (model.config.channels, model.config.pixel_range) == (1, (-5, 5))
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["pixel_range"] == [-5, 5]
    timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    source = open_source(str(tmp_path / "data"))
    of_run = extract_features(bincomm.load_pretrained(tmp_path / "run", "cpu"), source)["features"]
    assert torch.equal(extract_features(model, source)["features"], of_run)
    inherited = configure_adaptation(tmp_path / "run", data=str(tmp_path / "data"))
    assert (inherited.channels, inherited.pixel_range, inherited.mean) == (1, (-5, 5), (0.5,))


def test_weights_for_rgb_are_adapted_by_timms_rule(tmp_path):
    backbone, _ = create_backbone("test_resnet", 32)
    save_file(backbone.state_dict(), tmp_path / "rgb.safetensors")
    adapted, _ = create_backbone("test_resnet", 32, in_chans=6)
    load_weights(adapted, str(tmp_path / "rgb.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    backbone.eval(), adapted.eval()
    torch.testing.assert_close(adapted(images.repeat(1, 2, 1, 1)), backbone(images))
    save_file(adapted.state_dict(), tmp_path / "six.safetensors")
    assert len(load_file(tmp_path / "six.safetensors"))
    other, _ = create_backbone("test_resnet", 32, in_chans=5)
    with pytest.raises(ValueError, match="holds weights for 6 channels, expected 5 or 3"):
        load_weights(other, str(tmp_path / "six.safetensors"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"channels": 13},
            "mean: expected 13 numbers, one for each .* got 3; `bincomm data stats --channels 13",
        ),
        ({"channels": 1, "mean": [0.5]}, "std: expected 1 numbers"),
        ({"mean": [0.5]}, "mean: expected 3 numbers, .* got 1"),
        ({"channels": 0}, "channels: expected from 1 to 1024, got 0"),
        ({"pixel_range": [5, 5]}, "pixel_range: expected the smaller number first"),
        ({"pixel_range": [5]}, "pixel_range: expected 2 numbers or null"),
        ({"backbone_args": {"in_chans": 4}}, "backbone_args: .* got 'in_chans'"),
    ],
)
def test_what_does_not_fit_is_named(keys, words):
    with pytest.raises(ValueError, match=words):
        configure("digits", **keys)


def test_three_channels_without_a_range_are_rgb_as_before():
    config = PretrainConfig()
    assert config.crops.rgb
    assert (config.gray, config.solarize, config.jitter) == (0.2, 0.2, (0.4, 0.4, 0.2, 0.1))
    deep = PretrainConfig(pixel_range=(0, 65535), posterize=0.2)
    assert not deep.crops.rgb
    assert (deep.gray, deep.solarize, deep.posterize) == (0.2, 0.2, 0)
