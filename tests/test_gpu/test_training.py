"""The data pipeline and a whole short run on a real GPU."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
for package in ("timm", "nvidia.dali", "jsonargparse", "sklearn", "safetensors"):
    pytest.importorskip(package, reason="training needs the packages of bincomm[train]")

from bincomm.config import parse  # noqa: E402
from bincomm.data.crops import Crops  # noqa: E402
from bincomm.data.loader import Loader  # noqa: E402
from bincomm.data.sources import open_source  # noqa: E402
from bincomm.pretrain import pretrain  # noqa: E402


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))


def test_batches_are_those_of_the_cpu():
    """The same images in the same crops; decoding and resizing round differently on the two."""
    crops = Crops(global_size=32, local_crops=2, local_size=16)
    source = open_source("digits")
    batches = [
        Loader(source, crops, batch_size=16, seed=0, device=torch.device(device))
        for device in ("cuda", "cpu")
    ]
    for _ in range(6):
        for mine, other in zip(*(loader.next() for loader in batches), strict=True):
            assert mine.is_cuda
            assert (mine.cpu() - other).abs().mean() < 0.05  # in deviations of ImageNet's colours


def test_a_short_run(tmp_path):
    options = ["--recipe", "digits", "--precision", "bf16", "--log_every", "10", "--save_every", "10"]
    run = ["--output", str(tmp_path / "run"), "--max_steps", "60"]
    result = pretrain(parse([*options, *run])[0])
    assert result["machine"]["device"] == "cuda"
    assert result["last_metrics"]["loss"] < 0.6
    assert result["knn"]["pixels"] > 0.95
