import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the data pipeline needs DALI")
from PIL import Image

import bincomm.data.loader
from bincomm.data.crops import Crops
from bincomm.data.loader import CorruptImageError, Loader, eval_batches
from bincomm.data.multicrop import MEAN, STD, draw

CPU = torch.device("cpu")
CROPS = Crops(global_size=24, local_crops=2, local_size=16)
STILL = Crops(
    global_size=8, global_scale=(1, 1), local_crops=0, flip=0, jitter_p=0, grey=0, blur=(0, 0, 0), solarise=0
)


@pytest.fixture
def images(tmp_path):
    """23 pictures; the mean of number i is about 10·i."""
    files = []
    for i in range(23):
        path = tmp_path / f"{i:02}.png"
        noise = np.random.default_rng(i).integers(0, 9, (30 + i, 40, 3))
        Image.fromarray((10 * i + noise).astype(np.uint8)).save(path)
        files.append(str(path))
    return files


def loader(files, crops=CROPS, batch_size=4, seed=0, threads=2):
    return Loader(files, crops, batch_size=batch_size, seed=seed, device=CPU, threads=threads)


def take(batches, count):
    return [batches.next() for _ in range(count)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_shapes_and_memory_of_their_own(images):
    batches = loader(images)
    first = batches.next()
    assert first[0].shape == (2, 4, 3, 24, 24)
    assert first[1].shape == (2, 4, 3, 16, 16)
    assert first[0].dtype == torch.float32
    kept = [x.clone() for x in first]
    for _ in range(8):
        batches.next()
    assert equal(first, kept)
    assert loader(images, STILL).next()[1] is None


def test_every_image_once_an_epoch_in_changing_order(images):
    batches = loader(images, STILL)
    assert batches.steps_per_epoch == 5
    epochs = []
    for _ in range(3):
        views = [batches.next()[0][0] for _ in range(5)]
        means = torch.cat(views)[:, 0].mean((1, 2)) * STD[0] + MEAN[0]
        epochs.append(((means - 4) / 10).round().int().tolist())
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("done", [1, 3, 5, 7])
def test_goes_on_exactly_from_its_state(images, done):
    first = loader(images)
    for _ in range(done):
        first.next()
    second = loader(images, threads=1)
    second.load_state_dict(first.state_dict())
    for _ in range(8):
        assert equal(first.next(), second.next())


def test_the_seed_determines_everything(images):
    assert equal(loader(images).next(), loader(images, threads=1).next())
    assert not torch.equal(loader(images).next()[0], loader(images, seed=1).next()[0])


def test_a_batch_larger_than_the_data_is_refused(images):
    with pytest.raises(ValueError, match="batch_size: .*23, got 24"):
        loader(images, batch_size=24)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"no image, but some text"), "not an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "truncated"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_a_spoilt_image_is_named(images, tmp_path, spoil, reason):
    batches = loader(images, batch_size=8)
    spoil(tmp_path / "07.png")
    with pytest.raises(CorruptImageError, match=rf"1 of the next images .*\n  .*07\.png: .*({reason})"):
        take(batches, 20)  # more than two epochs: every epoch leaves other images out
    with pytest.raises(CorruptImageError, match=r"07\.png"):
        list(eval_batches(images, size=8, batch_size=8, device=CPU))


def test_names_of_any_bytes(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Image.new("RGB", (8, 8)).save(path)
    assert loader([path], STILL, batch_size=1).next()[0].shape == (2, 1, 3, 8, 8)


def test_other_files_than_those_of_the_state_are_noticed(images):
    state = loader(images).state_dict()
    same, fewer = loader(images), loader(images[1:])
    for batches in (same, fewer):
        batches.load_state_dict(state)
    assert same.changed == ""
    assert fewer.changed.startswith("23 images then, 22 now")


def test_a_window_at_the_far_corner_is_inside(images, monkeypatch):
    """The largest place that can be drawn: just below 1."""

    def far(*args):
        windows, numbers = draw(*args)
        windows[:, :, -1] = np.nextafter(np.float32(1), np.float32(0))
        return windows, numbers

    monkeypatch.setattr(bincomm.data.loader, "draw", far)
    assert loader(images).next()[0].isfinite().all()


def test_on_a_gpu_the_outputs_come_on_the_current_stream(monkeypatch):
    """DALI takes the stream by position; by name it would be one of the pipeline's inputs."""
    given = []

    class Stub:
        def run(self, cuda_stream=None, /, **inputs):
            given.append((cuda_stream, inputs))
            return []

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    assert bincomm.data.loader._run(Stub(), torch.device("cuda")) == []
    assert given == [(7, {})]


def test_kinds_of_images(tmp_path):
    """Grey, RGBA, palette and EXIF-turned files come out as RGB, none of them turned."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    files = {}
    for name, image in {
        "grey.png": colour.convert("L"),
        "rgba.png": colour.convert("RGBA"),
        "palette.png": colour.convert("P"),
        "grey.jpg": colour.convert("L"),
    }.items():
        image.save(tmp_path / name)
        files[name] = str(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    colour.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    files["turned.jpg"] = str(tmp_path / "turned.jpg")
    batches = eval_batches(list(files.values()), size=20, crop_ratio=1.0, batch_size=2, device=CPU)
    found = dict(zip(files, torch.cat(list(batches)), strict=True))
    for name, file in files.items():
        with Image.open(file) as image:
            expected = np.asarray(image.convert("RGB"))[:, 5:25]
        pixels = found[name].permute(1, 2, 0).numpy() * STD + MEAN
        assert np.abs(pixels - expected).mean() < 1


def test_eval_batches_keep_order_and_the_protocol(images):
    batches = list(eval_batches(images, size=16, crop_ratio=0.5, batch_size=10, device=CPU))
    assert [len(batch) for batch in batches] == [10, 10, 3]
    means = torch.cat(batches)[:, 0].mean((1, 2)) * STD[0] + MEAN[0]
    assert ((means - 4) / 10).round().int().tolist() == list(range(23))
    with Image.open(images[7]) as image:
        width, height = image.size
        scale = 32 / min(width, height)
        resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 16) / 2, (resized.height - 16) / 2
    expected = np.asarray(resized.crop((round(left), round(top), round(left) + 16, round(top) + 16)))
    pixels = batches[0][7].permute(1, 2, 0).numpy() * STD + MEAN
    assert np.abs(pixels - expected).mean() < 2


def test_real_photographs():
    from sklearn.datasets import load_sample_images

    files = load_sample_images().filenames
    crops = Crops(global_size=96, local_size=48, local_crops=3)
    globals_, locals_ = loader(files, crops, batch_size=2).next()
    assert globals_.shape == (2, 2, 3, 96, 96)
    assert locals_.shape == (3, 2, 3, 48, 48)
    assert globals_.isfinite().all()
    assert 0.3 < globals_.std() < 3
    # Every view is another one, and none is blank.
    views = torch.cat([globals_.flatten(2).std(2), locals_.flatten(2).std(2)])
    assert views.min() > 0.05
    assert len(views.unique()) == views.numel()
