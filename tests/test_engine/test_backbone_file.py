"""The files of the trained backbone, for backbones of every kind."""

import json
import shutil

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image

import bincomm
from bincomm.adaptation import inherited_keys
from bincomm.building import create_networks
from bincomm.configuration import configure
from bincomm.engine.checkpoints import save_checkpoint
from bincomm.engine.export import export_backbone
from bincomm.networks import Head, Network, create_backbone
from bincomm.weights import load_weights, read_metadata


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "coat_tiny"])
def test_a_backbone_comes_back_as_it_was(name, tmp_path):
    """CoaT uses some weights twice, under two names."""
    config = configure("digits", backbone=name, backbone_args={}, global_size=32, eval_crop=0.75)
    backbone, _ = create_backbone(name, 32)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    export_backbone(Network(backbone, Head(backbone.num_features, 4, 2)), config, tmp_path)
    file = tmp_path / "model.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        again = timm.create_model(**json.loads(opened.metadata()["create_model"]))
    again.load_state_dict(safetensors.torch.load_file(file))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), backbone.eval()(images))
    keys = read_metadata(str(file))
    assert (keys["backbone"], keys["global_size"], keys["eval_crop"]) == (name, 32, 0.75)
    loaded, _ = create_backbone(keys["backbone"], keys["global_size"], **keys["backbone_args"])
    load_weights(loaded, str(file))
    assert torch.equal(loaded.eval()(images), backbone(images))


MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function of a backbone and its arguments that returns a folder with its weights and config.json,
    copied from where they were written, and there is a checkpoint of the same network."""

    def export(name, **arguments):
        folder = tmp_path_factory.mktemp("run")
        keys = {"backbone": name, "backbone_args": arguments, "global_size": 64, "local_size": 32}
        keys |= {"mean": MEAN, "std": STD, "eval_crop": 0.9, "drop_path": 0.0, "precision": "bf16"}
        config = configure("digits", **keys)
        _, teacher = create_networks(config, torch.device("cpu"))
        for parameter in teacher.backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        export_backbone(teacher, config, folder)
        copied = folder / "copied"
        copied.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(folder / file, copied)
        state = {"config": config.as_dict(), "teacher": teacher.state_dict()}
        save_checkpoint(folder / "whole.ckpt", state)
        return copied

    return export


KINDS = [("test_resnet", {}), ("test_vit", {"patch_size": 8}), ("test_convnext", {})]
PUBLISHED = [("resnet18", {}), ("vit_tiny_patch16_224", {"patch_size": 8}), ("convnext_atto", {})]
PUBLISHED = [pytest.param(*each, marks=pytest.mark.slow) for each in PUBLISHED]


@pytest.mark.parametrize("name, arguments", [*KINDS, *PUBLISHED])
def test_a_folder_is_a_model_of_timm(name, arguments, exported):
    """Features are those of `load_pretrained` to the bit, also for other sizes than that of training."""
    folder = exported(name, **arguments)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    ours = bincomm.load_pretrained(folder, "cpu").backbone
    of_checkpoint = bincomm.load_pretrained(folder.parent / "whole.ckpt", "cpu").backbone
    larger = bincomm.load_pretrained(folder, "cpu", global_size=96).backbone
    with torch.no_grad():
        for size, others in ((64, [ours, of_checkpoint]), (96, [ours, larger])):
            images = torch.randn(2, 3, size, size)
            features = model(images)
            assert all(torch.equal(features, other(images)) for other in others)
            assert features.isfinite().all()
            assert (features[0] != features[1]).any()
    assert timm.data.resolve_model_data_config(model) == {
        "input_size": [3, 64, 64], "interpolation": "bicubic", "mean": list(MEAN), "std": list(STD),
        "crop_pct": 0.9, "crop_mode": "center",
    }  # fmt: skip


def test_timm_adds_a_classifier_to_a_folder(exported):
    folder = exported("test_vit", patch_size=8)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 10)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(features, bincomm.load_pretrained(folder, "cpu").backbone(images))


@pytest.mark.slow
@pytest.mark.parametrize("name, arguments", [*KINDS, *PUBLISHED])
def test_a_folder_is_a_model_of_transformers(name, arguments, exported):
    transformers = pytest.importorskip("transformers")
    folder = exported(name, **arguments)
    model = transformers.AutoModel.from_pretrained(folder)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model(images).pooler_output
        expected = bincomm.load_pretrained(folder, "cpu").backbone(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    image = Image.effect_noise((100, 80), 60).convert("RGB")
    shown = transformers.AutoImageProcessor.from_pretrained(folder)(image)["pixel_values"]
    by_timm = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}"))
    assert torch.equal(shown[0], timm.data.create_transform(**by_timm)(image))


def test_a_tag_of_other_weights_is_no_part_of_the_architecture(tmp_path):
    config = configure("digits", backbone="test_vit.r160_in1k", backbone_args={}, global_size=32)
    backbone, _ = create_backbone(config.backbone, 32)
    export_backbone(Network(backbone, Head(backbone.num_features, 4, 2)), config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["architecture"] == "test_vit"
    assert not stored["pretrained_cfg"].keys() & {"url", "hf_hub_id", "license", "tag"}
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), backbone.eval()(images))


def test_equal_backbones_leave_equal_files(tmp_path):
    """Also where safetensors would write the metadata in another order."""
    config = configure("digits", backbone="test_vit", backbone_args={}, global_size=32)
    backbone, _ = create_backbone("test_vit", 32)
    network, contents = Network(backbone, Head(backbone.num_features, 4, 2)), set()
    for _ in range(8):
        export_backbone(network, config, tmp_path)
        contents.add(tuple((tmp_path / name).read_bytes() for name in ("model.safetensors", "config.json")))
    assert len(contents) == 1
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata().keys() == {"create_model", "format"}
        assert file.metadata()["format"] == "pt"  # which transformers below 5 looks for


def test_runs_of_earlier_versions_are_read(exported, tmp_path):
    """Their weights are backbone.safetensors, beside a config.yaml and without a config.json."""
    folder = exported("test_resnet")
    shutil.copy(folder / "model.safetensors", tmp_path / "backbone.safetensors")
    (tmp_path / "config.yaml").write_text("backbone: test_resnet\nglobal_size: 48\n")
    model = bincomm.load_pretrained(tmp_path, "cpu")
    assert model.config.global_size == 48
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.backbone(images), bincomm.load_pretrained(folder, "cpu").backbone(images))
    # A folder without config.yaml is adapted as its weights alone are.
    assert inherited_keys(str(folder)) == inherited_keys(str(folder / "model.safetensors"))
