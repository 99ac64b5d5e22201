import json
import os
import random
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the data pipeline needs DALI")
from PIL import Image
from ranks import run_on_ranks

import bincomm.data.loader
from bincomm.data.crops import Crops
from bincomm.data.export import write_shards
from bincomm.data.images import examine
from bincomm.data.loader import Loader, TooManyUnusableError, eval_batches
from bincomm.data.sources import Files, Mix, Source, open_source

CPU = torch.device("cpu")
MEAN, STD = (255 * np.array(values, np.float32) for values in (Crops.mean, Crops.std))
CROPS = Crops(global_size=24, local_crops=2, local_size=16)
STILL = Crops(
    global_size=8, global_scale=(1, 1), local_crops=0, flip=0, jitter_p=0, gray=0, blur=(0, 0, 0), solarize=0
)


@pytest.fixture
def images(tmp_path):
    """23 pictures; the mean of number i is about 10·i."""
    return pictures(tmp_path, 23)


def pictures(folder, count):
    files = []
    for i in range(count):
        path = folder / f"{i:02}.png"
        noise = np.random.default_rng(i).integers(0, 9, (30 + i, 40, 3))
        Image.fromarray((10 * i + noise).clip(0, 255).astype(np.uint8)).save(path)
        files.append(str(path))
    return files


def loader(files, crops=CROPS, batch_size=4, seed=0, threads=2, **options):
    source = files if isinstance(files, Source) else Source(Files(files))
    return Loader(source, crops, batch_size=batch_size, seed=seed, device=CPU, threads=threads, **options)


def take(batches, count):
    return [batches.next() for _ in range(count)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def numbers(globals_):
    """Which pictures these crops are of."""
    means = globals_[:, 0, 0].float().mean((1, 2)) * STD[0] + MEAN[0]
    return ((means - 4) / 10).round().int().tolist()


def evaluated(files, size, **options):
    batches = list(eval_batches(Source(Files(files)), Crops(global_size=size), device=CPU, **options))
    return [i for indices, _ in batches for i in indices], torch.cat([images for _, images in batches])


def test_shapes_and_memory_of_their_own(images):
    batches = loader(images)
    first = batches.next()
    assert first[0].shape == (4, 2, 3, 24, 24)
    assert first[1].shape == (4, 2, 3, 16, 16)
    assert first[0].dtype == torch.float32
    kept = [x.clone() for x in first]
    for _ in range(8):
        batches.next()
    assert equal(first, kept)
    assert loader(images, STILL).next()[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_types_and_layouts(images, dtype, channels_last):
    plain = loader(images).next()
    for found, expected in zip(
        loader(images, dtype=dtype, channels_last=channels_last).next(), plain, strict=True
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(
            found, expected.to(dtype), rtol=0, atol=0 if dtype != torch.float16 else 2e-3
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        # What the network is given is a view: nothing is copied on the way.
        assert found.flatten(0, 1).is_contiguous(memory_format=layout)
        assert found.flatten(0, 1).data_ptr() == found.data_ptr()


def test_every_image_once_an_epoch_in_changing_order(images):
    batches = loader(images, STILL)
    assert batches.steps_per_epoch == 5
    epochs = [[i for globals_, _ in take(batches, 5) for i in numbers(globals_)] for _ in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("done", [1, 3, 5, 7])
def test_goes_on_exactly_from_its_state(images, done):
    first = loader(images)
    take(first, done)
    second = loader(images, threads=1)
    second.load_state_dict(first.state_dict())
    for _ in range(8):
        assert equal(first.next(), second.next())


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_fifty_batches_after_a_resume_are_the_same(images, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    if kind == "shards":
        write_shards(Source(Files(images)), tmp_path / "shards", shard_bytes=20_000)
        assert len(os.listdir(tmp_path / "shards")) > 2
    source = open_source(str(tmp_path / "shards") if kind == "shards" else str(tmp_path))
    step = random.randrange(1, 40)
    first = loader(source)
    take(first, step)
    second = loader(source, threads=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for number in range(50):
        assert equal(first.next(), second.next()), f"resumed at {step}, batch {number}"


def test_the_seed_determines_everything(images):
    assert equal(loader(images).next(), loader(images, threads=1).next())
    assert not torch.equal(loader(images).next()[0], loader(images, seed=1).next()[0])


def test_ranks_share_the_batches_of_one_process(images):
    whole = loader(images, batch_size=6)
    shares = [loader(images, batch_size=2, rank=rank, world=3) for rank in range(3)]
    assert [share.steps_per_epoch for share in shares] == [3, 3, 3]
    for _ in range(7):  # into the third epoch
        parts = zip(*(share.next() for share in shares), strict=True)
        assert equal([torch.cat(part) for part in parts], whole.next())


def test_another_number_of_ranks_from_an_epochs_end(images):
    first = [loader(images, batch_size=4, rank=rank, world=2) for rank in range(2)]  # 2 steps an epoch
    for share in first:
        take(share, 4)
    second = loader(images, batch_size=4)  # 5 steps an epoch
    second.load_state_dict(first[1].state_dict())
    expected = loader(images, batch_size=4)
    take(expected, 10)
    assert equal(second.next(), expected.next())
    assert second.step == 11

    same = loader(images, batch_size=8)  # the same images a step: at any step
    take(first[0], 1)
    same.load_state_dict(first[0].state_dict())
    assert torch.equal(same.next()[0][:4], first[0].next()[0])

    with pytest.raises(
        ValueError, match="batch_size: .*8 images a step over all ranks.* got 4; .*epoch's end"
    ):
        loader(images, batch_size=4).load_state_dict({**first[0].state_dict(), "step": 5})


def test_on_two_processes_every_image_once_and_none_waits(tmp_path):
    pictures(tmp_path, 23)
    run_on_ranks(_two_epochs, 2, tmp_path)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for epoch in range(2):
        seen = shares[0][epoch] + shares[1][epoch]
        assert len(seen) == len(set(seen)) == 18  # 23 do not divide by 2 · 3: five are left out


def _two_epochs(rank, world, folder):
    files = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".png"))
    batches = loader(files, STILL, batch_size=3, rank=rank, world=world)
    epochs = []
    for _ in range(2):
        seen = []
        for _ in range(batches.steps_per_epoch):
            images, _ = batches.next()
            torch.distributed.all_reduce(images.sum())  # every step waits for the other rank
            seen += numbers(images)
        epochs.append(seen)
    torch.save(epochs, f"{folder}/{rank}.pt")


def test_a_batch_larger_than_the_data_is_refused(images):
    with pytest.raises(ValueError, match="batch_size: .*23, got 24"):
        loader(images, batch_size=24)
    with pytest.raises(ValueError, match="batch_size: .*23, got 12 on each of 2 ranks"):
        loader(images, batch_size=12, world=2)


def test_a_mix_takes_its_shares(tmp_path):
    many, few = tmp_path / "many", tmp_path / "few"
    many.mkdir()
    few.mkdir()
    parts = [Files(pictures(many, 12)), Files(pictures(few, 20)[16:])]
    source = Source(Mix(parts), weights=(1.0, 3.0))  # of 16 slots 4 are for the first, 12 for the second
    batches = loader(source, STILL, batch_size=16)
    epochs = [numbers(batches.next()[0]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(i for i in epoch if i >= 16) == [16] * 3 + [17] * 3 + [18] * 3 + [19] * 3
        assert sum(i < 12 for i in epoch) == 4
    # Over the epochs every image of the first comes before any comes again.
    assert sorted(i for epoch in epochs for i in epoch if i < 12) == list(range(12))


SPOILED = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_bytes(b"no image, but some text"), "not an image"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:60]), "truncated"),
    "gone": (lambda path: path.unlink(), "No such file"),
    "inside": (
        lambda path: path.write_bytes(path.read_bytes()[:400] + bytes(200) + path.read_bytes()[600:]),
        "",
    ),
}  # the last one looks whole from outside: DALI alone finds out, and its pipeline dies of it


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_image_is_left_out_and_named(images, tmp_path, kind):
    spoil, reason = SPOILED[kind]
    expected = [numbers(globals_) for globals_, _ in take(loader(images, STILL), 20)]  # four epochs
    spoil(tmp_path / "07.png")
    batches = loader(images, STILL, max_unusable=0.05)
    for whole in expected:
        found = numbers(batches.next()[0])
        assert 7 not in found
        assert [i for i in whole if i != 7] == [j for i, j in zip(whole, found, strict=True) if i != 7]
    if kind == "inside":
        examine(np.fromfile(images[7], np.uint8))
    assert [name for name, _ in batches.unusable] == [images[7]]
    assert reason in batches.unusable[0][1]
    assert evaluated(images, size=8, batch_size=8)[0] == [i for i in range(23) if i != 7]


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_images_above_the_limit_end_the_run(images, tmp_path, kind):
    SPOILED[kind][0](tmp_path / "07.png")
    with pytest.raises(
        TooManyUnusableError, match=r"1 of 23 images .*max_unusable = 0\.01 .*\n  .*07\.png: "
    ):
        take(loader(images), 20)
    batches = loader(images, max_unusable=0.0)
    for _ in range(2):  # asking again does not help
        with pytest.raises(TooManyUnusableError):
            take(batches, 20)
    state = batches.state_dict()  # the run can go on from here once the limit is raised
    second, whole = loader(images, max_unusable=1.0), loader(images, max_unusable=1.0)
    second.load_state_dict(state)
    take(whole, state["step"])
    for _ in range(6):
        assert equal(second.next(), whole.next())


def test_resumed_among_spoiled_images(images, tmp_path):
    """What was found is in the state, what was not yet found is found again."""
    for number, (spoil, _) in enumerate(SPOILED.values()):
        spoil(tmp_path / f"{4 * number:02}.png")
    whole = loader(images, max_unusable=1.0)
    for done in range(12):
        second = loader(images, max_unusable=1.0)
        second.load_state_dict(whole.state_dict())
        assert second.unusable == whole.unusable
        third = loader(images, max_unusable=1.0)
        third.load_state_dict(second.state_dict())
        batch = whole.next()
        assert equal(second.next(), batch), done
        assert equal(third.next(), batch), done
    assert len(whole.unusable) == len(SPOILED)


def test_a_file_deleted_meanwhile(images, tmp_path):
    batches = loader(images, STILL, max_unusable=0.05)
    take(batches, 2)
    (tmp_path / "07.png").unlink()
    take(batches, 20)
    assert batches.unusable == [(images[7], "No such file or directory")]


def test_all_files_gone(images, tmp_path):
    for file in images:
        os.unlink(file)
    with pytest.raises(TooManyUnusableError, match="none of 200 images tried"):
        loader(images, max_unusable=1.0).next()


def test_an_error_that_is_not_an_images_is_told(images, monkeypatch):
    """DALI fails, but not because of an image: that is no reason to leave one out."""

    class Broken:
        def run(self):
            raise RuntimeError("no memory")

    batches = loader(images)
    monkeypatch.setattr(bincomm.data.loader, "training_pipeline", lambda *args, **options: Broken())
    with pytest.raises(RuntimeError, match="no memory"):
        batches.next()
    assert batches.unusable == []


def test_names_of_any_bytes(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Image.new("RGB", (8, 8)).save(path)
    assert loader([path], STILL, batch_size=1).next()[0].shape == (1, 2, 3, 8, 8)


def test_other_files_than_those_of_the_state_are_noticed(images):
    state = loader(images).state_dict()
    same, fewer = loader(images), loader(images[1:])
    for batches in (same, fewer):
        batches.load_state_dict(state)
    assert same.changed == ""
    assert fewer.changed.startswith("23 images then, 22 now")


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
    found = dict(zip(files, crops, strict=True))
    for name, file in files.items():
        with Image.open(file) as image:
            expected = np.asarray(image.convert("RGB"))[:, 5:25]
        pixels = found[name].permute(1, 2, 0).numpy() * STD + MEAN
        assert np.abs(pixels - expected).mean() < 1


def test_eval_batches_keep_order_and_the_protocol(images):
    indices, crops = evaluated(images, size=16, crop_ratio=0.5, batch_size=10)
    assert indices == list(range(23)) == numbers(crops[:, None])
    with Image.open(images[7]) as image:
        width, height = image.size
        scale = 32 / min(width, height)
        resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 16) / 2, (resized.height - 16) / 2
    expected = np.asarray(resized.crop((round(left), round(top), round(left) + 16, round(top) + 16)))
    pixels = crops[7].permute(1, 2, 0).numpy() * STD + MEAN
    assert np.abs(pixels - expected).mean() < 2


def test_long_thin_images_fit_into_memory(tmp_path):
    for number, size in enumerate([(1, 40_000), (40_000, 1), (30, 20)]):
        Image.new("RGB", size, (50, 100, 150)).save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    indices, crops = evaluated(files, size=224, batch_size=3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB; resized whole: 7.5 GB
    assert indices == [0, 1, 2]
    pixels = crops.permute(0, 2, 3, 1).numpy() * STD + MEAN
    assert np.abs(pixels - (50, 100, 150)).max() < 1
    globals_, _ = loader(files, batch_size=3).next()
    assert globals_.isfinite().all()


def test_a_source_that_cannot_be_used_at_all(images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    source = Source(Mix([Files(images), Files([str(broken)])]), weights=(23, 1))
    batches = loader(source, STILL, max_unusable=0.1)
    take(batches, 12)
    assert [name for name, _ in batches.unusable] == [str(broken)]


def test_real_photographs():
    from sklearn.datasets import load_sample_images

    files = load_sample_images().filenames
    crops = Crops(global_size=96, local_size=48, local_crops=3)
    globals_, locals_ = loader(files, crops, batch_size=2).next()
    assert globals_.shape == (2, 2, 3, 96, 96)
    assert locals_.shape == (2, 3, 3, 48, 48)
    assert globals_.isfinite().all()
    assert 0.3 < globals_.std() < 3
    # Every view is another one, and none is blank.
    views = torch.cat([globals_.flatten(2).std(2), locals_.flatten(2).std(2)], 1)
    assert views.min() > 0.05
    assert len(views.unique()) == views.numel()
