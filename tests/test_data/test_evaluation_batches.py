import resource

import numpy as np
import torch
from numbered_pictures import numbers, to_pixels
from PIL import Image

from bincomm.data.crops import Crops
from bincomm.data.evaluation_batches import eval_batches
from bincomm.data.loader import Loader
from bincomm.data.sources import Files, Source

CPU = torch.device("cpu")


def evaluated(files, size, **options):
    batches = list(eval_batches(Source(Files(files)), Crops(global_size=size), device=CPU, **options))
    return [i for indices, _ in batches for i in indices], torch.cat([images for _, images in batches])


def test_kinds_of_images(tmp_path):
    """Gray, RGBA, palette and EXIF-turned files come out as RGB, none of them turned."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    files = {}
    for name, image in {
        "gray.png": color.convert("L"),
        "rgba.png": color.convert("RGBA"),
        "palette.png": color.convert("P"),
        "gray.jpg": color.convert("L"),
    }.items():
        image.save(tmp_path / name)
        files[name] = str(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    color.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    files["turned.jpg"] = str(tmp_path / "turned.jpg")
    _, crops = evaluated(list(files.values()), size=20, crop_ratio=1.0, batch_size=2)
    for file, crop in zip(files.values(), crops, strict=True):
        with Image.open(file) as image:
            expected = np.asarray(image.convert("RGB"))[:, 5:25]
        assert np.abs(to_pixels(crop) - expected).mean() < 1


def test_eval_batches_keep_order_and_the_protocol(images):
    indices, crops = evaluated(images, size=16, crop_ratio=0.5, batch_size=10)
    assert indices == list(range(23)) == numbers(crops[:, None])
    with Image.open(images[7]) as image:
        width, height = image.size
        scale = 32 / min(width, height)
        resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 16) / 2, (resized.height - 16) / 2
    expected = np.asarray(resized.crop((round(left), round(top), round(left) + 16, round(top) + 16)))
    assert np.abs(to_pixels(crops[7]) - expected).mean() < 2


def test_long_thin_images_fit_into_memory(tmp_path):
    for number, size in enumerate([(1, 40_000), (40_000, 1), (30, 20)]):
        Image.new("RGB", size, (50, 100, 150)).save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    indices, crops = evaluated(files, size=224, batch_size=3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB; uncropped: 7.5 GB
    assert indices == [0, 1, 2]
    for crop in crops:
        assert np.abs(to_pixels(crop) - (50, 100, 150)).max() < 1
    training = Crops(global_size=24, local_crops=2, local_size=16)
    globals_, _ = Loader(Source(Files(files)), training, batch_size=3, seed=0, device=CPU).next()
    assert globals_.isfinite().all()
