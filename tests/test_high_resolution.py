"""The recipe high_resolution: a ViT goes on with larger crops, in parts, by the rate of all images."""

import pytest
import safetensors.torch
import torch
import yaml

import bincomm
from bincomm.adaptation import configure as configure_adaptation
from bincomm.building import create_networks, create_objective
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.engine.job import create_step
from bincomm.engine.optimizer import create_optimizer
from bincomm.recipes import read_recipe

CPU = torch.device("cpu")
RECIPE = read_recipe("high_resolution")
# Positions in a grid of 4 by 4.
SMALL = {
    "backbone": "test_vit", "backbone_args": {"patch_size": 4, "depth": 2, "qkv_bias": False},
    "global_size": 16, "local_size": 8, "bits": 48, "hidden": 64, "precision": "fp32", "low_resolution": 0.5,
    "channels_last": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished run of a ViT, as far as it matters, and its backbone."""
    folder, config = tmp_path_factory.mktemp("runs"), configure("digits", **SMALL)
    backbone = create_networks(config, CPU)[1].backbone.eval()
    with torch.no_grad():  # as trained ones do, they change slowly from place to place
        backbone.pos_embed[:, 1:] = torch.linspace(-1, 1, 16)[:, None] * torch.randn(backbone.embed_dim)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    safetensors.torch.save_file(backbone.state_dict(), folder / "model.safetensors")
    return folder, backbone


def configuration(folder, **keys):
    """The recipe's, on crops scaled down as those of the run are."""
    return configure_adaptation(
        folder, "high_resolution", data="digits", global_size=32, local_size=16, **keys
    )


def step_of(config):
    networks = create_networks(config, CPU)
    return create_step(config, *networks, create_objective(config), create_optimizer(networks[0]))


def test_what_the_recipe_says_and_what_the_run(run):
    config = configuration(run[0])
    assert config.as_dict().items() >= {**RECIPE, "global_size": 32, "local_size": 16}.items()
    assert (config.bits, config.backbone_args) == (SMALL["bits"], SMALL["backbone_args"])
    assert config.init_from == str(run[0])
    twice = [RECIPE[key] / getattr(PretrainConfig, key) for key in ("global_size", "local_size")]
    assert twice == [2, 2]


def test_a_vit_of_another_size_is_what_it_was(run):
    folder, before = run
    after = create_networks(configuration(folder), CPU)[1].backbone.eval()
    grid = before.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(after.pos_embed[:, 1:], larger.flatten(2).transpose(1, 2))
    assert torch.equal(after.pos_embed[:, 0], before.pos_embed[:, 0])
    assert torch.equal(after.blocks[1].mlp.fc1.weight, before.blocks[1].mlp.fc1.weight)
    images = torch.rand(6, 3, 16, 16)
    with torch.no_grad():  # up and down again, positions are nearly the same
        similarity = torch.cosine_similarity(before(images), after(images))
    assert similarity.min() > 0.99


def test_the_rate_of_parts_is_that_of_all_images(run):
    """As many parts as in the recipe, of few images, and the bits are more than those of a part."""
    parts = RECIPE["accumulate"]
    keys = {"batch_size": 8 * parts, "beta": 0.1, "drop_path": 0}
    whole, cut = (step_of(configuration(run[0], **keys, **more)) for more in ({"accumulate": 1}, {}))
    views = torch.randn(8 * parts, 2, 3, 32, 32), torch.randn(8 * parts, 2, 3, 16, 16)
    rates = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.9}
    one, other = whole(*views, **rates), cut(*views, **rates)
    torch.testing.assert_close(other.losses, one.losses)
    torch.testing.assert_close(other.gradient_norm, one.gradient_norm, rtol=1e-4, atol=1e-6)
    globals_ = other.student[:2]
    torch.testing.assert_close(other.losses["rate"], bincomm.coding_rate(globals_).mean())
    of_parts = torch.stack([bincomm.coding_rate(part) for part in globals_.chunk(parts, 1)]).mean()
    assert of_parts < 0.9 * other.losses["rate"]
