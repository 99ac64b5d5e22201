"""A tiny untrained network and a few of the digits, for tests of codes."""

import torch

from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.data.sources import open_source
from bincomm.evaluation.features import forward_batches
from bincomm.evaluation.pretrained import Pretrained


def sample_digits(count=90):
    """Digits of all classes, evenly."""
    source = open_source("digits")
    return source.select(range(0, len(source.images), len(source.images) // count)[:count])


def logits_of(model, source):
    """(n, K), in the order of the images that can be used."""
    return torch.cat([batch.logits for batch in forward_batches(model, source)])


def create_model(bits=20, **options):
    """A network whose bits vary: as it is drawn, a bit is the same for nearly all images, so logits are
    centered."""
    config = PretrainConfig(
        output="tiny",
        backbone="test_vit",
        backbone_args={"patch_size": 4, "depth": 1},
        global_size=16,
        local_size=12,
        bits=bits,
        hidden=32,
        head_std=0.1,
        precision="fp32",
        threads=1,
        **options,
    )
    device = torch.device("cpu")
    model = Pretrained.of(create_networks(config, device)[1], config, device)
    model.head.layers[-1].bias -= logits_of(model, sample_digits()).mean(0)
    return model
