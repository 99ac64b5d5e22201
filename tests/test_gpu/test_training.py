"""The data pipeline and a whole short run on a real GPU."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bincomm.configuration import configure
from bincomm.data.crops import Crops
from bincomm.data.sources import open_source

Loader = pytest.importorskip("bincomm.data.loader", reason="needs DALI", exc_type=ImportError).Loader
pretrain = pytest.importorskip("bincomm.pretraining", reason="needs DALI", exc_type=ImportError).pretrain
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "further",
    [{}, {"flip_vertical": 0.5, "right_angles": 0.75, "rotate": 30, "shear": 10, "posterize": 0.5}],
)
def test_batches_are_those_of_the_cpu(further):
    """The same images in the same crops; decoding and resizing round differently on the two."""
    crops = Crops(global_size=32, local_crops=2, local_size=16, **further)
    source = open_source("digits")
    batches = [
        Loader(source, crops, batch_size=16, seed=0, device=torch.device(device))
        for device in ("cuda", "cpu")
    ]
    for _ in range(6):
        for crops_on_gpu, crops_on_cpu in zip(*(loader.next() for loader in batches), strict=True):
            assert crops_on_gpu.is_cuda
            assert (
                crops_on_gpu.cpu() - crops_on_cpu
            ).abs().mean() < 0.05  # in deviations of ImageNet's colors


@pytest.mark.parametrize("resolution", [{}, {"low_resolution": 0.5}], ids=["full", "rising"])
@pytest.mark.parametrize("form", [{"compile": "off"}, {"compile": "on"}, {"cuda_graph": True}])
def test_a_short_run(tmp_path, form, resolution):
    pytest.importorskip("jsonargparse", reason="reading a configuration needs jsonargparse")
    keys = {"precision": "bf16", "log_every": 10, "save_every": 10, "max_steps": 60, **form, **resolution}
    result = pretrain(configure("digits", output=tmp_path / "run", **keys))
    assert result["machine"]["device"] == "cuda"
    assert result["last_metrics"]["rate"] > 50  # 41 where nothing is learned


def photographs(folder, count=40):
    """JPEGs of several sizes and kinds, one too large to be decoded as it is, and a PNG damaged inside."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
        image = small.resize((80 + 5 * number, 60 + 3 * number), Image.Resampling.BICUBIC)
        mode = ("RGB", "L", "CMYK")[number % 3]
        image.convert(mode).save(folder / f"{number:02}.jpg", progressive=number % 2 == 0)
    image.resize((4000, 3000)).save(folder / "large.jpg")
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    (folder / "damaged.png").write_bytes(data[:900] + bytes(200) + data[1100:])  # its end is intact
    return str(folder)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_photographs_of_all_kinds(tmp_path, dtype, channels_last):
    """Decoded and cropped as on the CPU; batches keep their memory while further ones are loaded."""
    source = open_source(photographs(tmp_path / "photographs"))
    crops = Crops(global_size=64, local_crops=3, local_size=32)
    options = {
        "batch_size": 8,
        "seed": 0,
        "max_unusable": 0.1,
        "dtype": dtype,
        "channels_last": channels_last,
    }
    on_gpu, on_cpu = (
        Loader(source, crops, device=torch.device(device), **options) for device in ("cuda", "cpu")
    )
    earlier = []
    for _ in range(15):  # three epochs
        batch, expected = on_gpu.next(), on_cpu.next()
        for x, y in zip(batch, expected, strict=True):
            assert x.dtype == dtype
            assert x.flatten(0, 1).data_ptr() == x.data_ptr()
            assert (x.cpu().float() - y.float()).abs().mean() < 0.1  # in deviations of ImageNet's colors
        earlier.append((batch, [x.clone() for x in batch]))
    for batch, copies in earlier:
        assert all(torch.equal(x, y) for x, y in zip(batch, copies, strict=True))
    assert on_gpu.unusable == on_cpu.unusable
    assert len(on_gpu.unusable) == 1
