"""The file of the trained backbone, for backbones of every kind."""

import json

import pytest
import safetensors
import safetensors.torch
import timm
import torch

from bincomm.configuration import configure
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
    file = tmp_path / "backbone.safetensors"
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
