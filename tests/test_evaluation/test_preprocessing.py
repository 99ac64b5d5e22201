"""The center crop of evaluation and of codes is the one that timm makes for the exported backbone."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors
import timm
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Resize

import bincomm
from bincomm.codes.encode import encode
from bincomm.config import PretrainConfig
from bincomm.data.evaluation_batches import center_windows
from bincomm.data.sources import Files, Source
from bincomm.engine.export import export_backbone
from bincomm.evaluation.features import extract_features
from bincomm.evaluation.pretrained import Pretrained
from bincomm.networks import Head, Network, create_backbone

SIZES = [(40, 57), (75, 50), (300, 401), (333, 500), (100, 33), (96, 96)]  # heights and widths


def picture(height, width, rng):
    """A smooth picture with some noise."""
    colors = rng.integers(30, 225, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8))


def test_windows_are_torchvisions():
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 120, (300, 2)), [(1, 900), (900, 1), (7, 7)]])
    for side, shorter in [(32, 36), (64, 73), (24, 24), (9, 10)]:
        windows = center_windows(sizes, side, shorter)
        for (height, width), window in zip(sizes.tolist(), windows, strict=True):
            resized = Resize(shorter)(Image.new("L", (width, height)))
            pixels = torch.arange(resized.height * resized.width).view(1, resized.height, resized.width)
            top, left = divmod(int(CenterCrop(side)(pixels)[0, 0, 0]), resized.width)
            shares = np.array([top, left, top + side, left + side])
            shares = shares / [resized.height, resized.width, resized.height, resized.width]
            np.testing.assert_allclose(window, shares, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "tolerance"), [(32, 0.02), (64, 0.02), (224, 0.008)])
def test_evaluate_encode_and_timm_agree(side, tolerance, tmp_path):
    """Two resamplings round one value in five to the other gray level, so features differ by about a
    hundredth of how much they vary between images. Where crops of 32 pixels are off by half a pixel, it is
    more than a half."""
    rng = np.random.default_rng(side)
    files = []
    for number, size in enumerate(SIZES):
        files.append(str(tmp_path / f"{number}.{('png', 'jpg')[number % 2]}"))
        picture(*size, rng).save(files[-1])
    source = Source(Files(files))
    config = PretrainConfig(
        output="tiny", backbone="test_vit", global_size=side, bits=32, hidden=32, precision="fp32", threads=1
    )
    torch.manual_seed(0)
    backbone, _ = create_backbone(config.backbone, side)
    network = Network(backbone, Head(backbone.num_features, config.hidden, config.bits))
    model = Pretrained.of(network, config, torch.device("cpu"))
    export_backbone(network, config, tmp_path)

    by_evaluate = extract_features(model, source)["features"]
    encode(model, source, tmp_path / "codes", features=True)
    table = pq.read_table(tmp_path / "codes" / "part-00000.parquet")
    by_encode = torch.tensor(table["features"].to_pylist())
    exported = tmp_path / "model.safetensors"
    of_file = extract_features(bincomm.load_pretrained(exported, "cpu"), source)["features"]

    with safetensors.safe_open(exported, "pt") as file:
        loaded = timm.create_model(**json.loads(file.metadata()["create_model"])).eval()
    loaded.load_state_dict(safetensors.torch.load_file(exported))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))
    crops = []
    for file in files:
        with Image.open(file) as image:
            crops.append(transform(image.convert("RGB")))
    with torch.no_grad():
        by_timm = loaded(torch.stack(crops))

    assert torch.equal(by_evaluate, by_encode)
    assert torch.equal(by_evaluate, of_file)
    spread = (by_timm - by_timm.mean(0)).norm()
    assert (by_evaluate - by_timm).norm() < tolerance * spread
