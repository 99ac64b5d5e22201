import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numbered_pictures import numbers, write_pictures
from PIL import Image

import bincomm.data.loader
import bincomm.data.parquet
from bincomm.data.crops import Crops
from bincomm.data.evaluation_batches import eval_batches
from bincomm.data.export import write_shards
from bincomm.data.images import examine, read_file
from bincomm.data.loader import Loader, TooManyUnusableError
from bincomm.data.sources import Files, Mix, Source, open_source

CPU = torch.device("cpu")
CROPS = Crops(  # all that is random
    global_size=24, local_crops=2, local_size=16, flip_vertical=0.5, right_angles=0.5, rotate=30, shear=10,
    posterize=0.5,
)  # fmt: skip
WINDOWS = Crops(global_size=24, local_crops=1, local_size=16, blur=(0, 0, 0), solarize=0)  # less to build
STILL = Crops(
    global_size=8, global_scale=(1, 1), local_crops=0, flip=0, jitter_p=0, gray=0, blur=(0, 0, 0), solarize=0
)


def loader(files, crops=WINDOWS, batch_size=4, seed=0, threads=2, **options):
    source = files if isinstance(files, Source) else Source(Files(files))
    return Loader(source, crops, batch_size=batch_size, seed=seed, device=CPU, threads=threads, **options)


def take(batches, count):
    return [batches.next() for _ in range(count)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_smaller_crops_of_the_same_windows_and_back(images):
    """As in the first part of a run of rising resolution: each batch is that of a loader of its size."""
    small, changing = loader(images, replace(WINDOWS, global_size=12, local_size=8)), loader(images)
    assert not changing.resize(24, 16)
    assert changing.resize(12, 8)
    batches = take(changing, 3)
    assert all(map(equal, batches, take(small, 3)))
    assert changing.resize(24, 16)
    full = loader(images)
    for low in batches:
        for mine, large in zip(low, full.next(), strict=True):
            halved = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 2).reshape(mine.shape)
            assert (mine - halved).abs().mean() < 0.1  # in deviations of ImageNet's colors
    assert equal(changing.next(), full.next())  # the fourth
    assert changing.indices == full.indices


def test_shapes_and_memory_of_their_own(images):
    batches = loader(images, CROPS)
    first = batches.next()
    assert first[0].shape == (4, 2, 3, 24, 24)
    assert first[1].shape == (4, 2, 3, 16, 16)
    assert first[0].dtype == torch.float32
    copy = [x.clone() for x in first]
    for _ in range(8):
        batches.next()
    assert equal(first, copy)
    assert loader(images, STILL).next()[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_types_and_layouts(images, dtype, channels_last):
    plain = loader(images).next()
    for result, expected in zip(
        loader(images, dtype=dtype, channels_last=channels_last).next(), plain, strict=True
    ):
        assert result.dtype == dtype
        torch.testing.assert_close(
            result, expected.to(dtype), rtol=0, atol=0 if dtype != torch.float16 else 2e-3
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        # What the network is given is a view: nothing is copied on the way.
        assert result.flatten(0, 1).is_contiguous(memory_format=layout)
        assert result.flatten(0, 1).data_ptr() == result.data_ptr()


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
    first = loader(images, CROPS)
    take(first, done)
    second = loader(images, CROPS, threads=1)
    second.load_state_dict(first.state_dict())
    for _ in range(8):
        assert equal(first.next(), second.next())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "shards", "parquet"])
def test_fifty_batches_after_a_resume_are_the_same(images, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    if kind == "shards":
        write_shards(Source(Files(images)), tmp_path / "shards", shard_bytes=35_000)
        assert len(os.listdir(tmp_path / "shards")) == 3
    if kind == "parquet":
        monkeypatch.setattr(bincomm.data.parquet, "KEPT", 10_000)  # some are read again
        table = pa.table(
            {"image": [{"bytes": read_file(image).tobytes(), "path": image} for image in images]}
        )
        (tmp_path / "parquet").mkdir()
        for first in (0, 9):
            part = table.slice(first, 9 if first == 0 else None)
            pq.write_table(part, tmp_path / "parquet" / f"{first}.parquet", row_group_size=2)
    source = open_source(str(tmp_path) if kind == "folder" else str(tmp_path / kind))
    assert len(source.images) == len(images)
    step = random.randrange(1, 40)
    first = loader(source, CROPS)
    take(first, step)
    second = loader(source, CROPS, threads=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for number in range(50):
        assert equal(first.next(), second.next()), f"resumed at {step}, batch {number}"


def test_the_seed_determines_everything(images):
    batch = loader(images, CROPS).next()
    assert equal(batch, loader(images, CROPS, threads=1).next())
    assert not torch.equal(batch[0], loader(images, CROPS, seed=1).next()[0])


def test_global_crops_are_the_same_without_the_local_ones(images):
    batches, alone = loader(images, CROPS), loader(images, CROPS, globals_only=True)
    for _ in range(3):
        (global_views, _), (on_their_own, none) = batches.next(), alone.next()
        assert torch.equal(global_views, on_their_own)
        assert none is None


def test_any_batch_can_be_the_next(images):
    whole = take(loader(images), 9)
    batches = loader(images)
    for step in (7, 8, 2, 3, 0):
        batches.seek(step)
        assert equal(batches.next(), whole[step])


def test_ranks_share_the_batches_of_one_process(images):
    alone = loader(images, CROPS, batch_size=6)
    shares = [loader(images, CROPS, batch_size=2, rank=rank, world=3) for rank in range(3)]
    assert [share.steps_per_epoch for share in shares] == [3, 3, 3]
    for _ in range(7):  # into the third epoch
        parts = zip(*(share.next() for share in shares), strict=True)
        assert equal([torch.cat(part) for part in parts], alone.next())


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


def test_on_two_ranks_every_image_once_and_none_waits(images):
    """The ranks meet after every batch, as in training: with unequal numbers one would wait in vain."""
    meeting = threading.Barrier(2, timeout=60)

    def two_epochs(rank):
        batches = loader(images, STILL, batch_size=3, rank=rank, world=2)
        epochs = []
        for _ in range(2):
            epoch = []
            for _ in range(batches.steps_per_epoch):
                epoch += numbers(batches.next()[0])
                meeting.wait()
            epochs.append(epoch)
        return epochs

    with ThreadPoolExecutor(2) as ranks:
        shares = list(ranks.map(two_epochs, range(2)))
    for epochs in zip(*shares, strict=True):
        both = epochs[0] + epochs[1]
        assert len(both) == len(set(both)) == 18  # 23 do not divide by 2 · 3: five are left out


def test_a_batch_larger_than_the_data_is_refused(images):
    with pytest.raises(ValueError, match="batch_size: .*23, got 24"):
        loader(images, batch_size=24)
    with pytest.raises(ValueError, match="batch_size: .*23, got 12 on each of 2 ranks"):
        loader(images, batch_size=12, world=2)


def test_a_mix_takes_its_shares(tmp_path):
    many, few = tmp_path / "many", tmp_path / "few"
    many.mkdir()
    few.mkdir()
    parts = [Files(write_pictures(many, 12)), Files(write_pictures(few, 20)[16:])]
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
}  # the last one looks complete: only DALI notices, and its pipeline ends with an error


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_image_is_left_out_and_named(images, tmp_path, kind):
    spoil, reason = SPOILED[kind]
    expected = [numbers(globals_) for globals_, _ in take(loader(images, STILL), 20)]  # four epochs
    spoil(tmp_path / "07.png")
    batches = loader(images, STILL, max_unusable=0.05)
    for batch in expected:
        result = numbers(batches.next()[0])
        assert 7 not in result
        assert [i for i in batch if i != 7] == [j for i, j in zip(batch, result, strict=True) if i != 7]
    if kind == "inside":
        examine(np.fromfile(images[7], np.uint8))
    assert [name for name, _ in batches.unusable] == [images[7]]
    assert reason in batches.unusable[0][1]
    indices = [
        i for batch, _ in eval_batches(Source(Files(images)), STILL, device=CPU, batch_size=8) for i in batch
    ]
    assert indices == [i for i in range(23) if i != 7]


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
    assert [name for name, _ in batches.all_unusable()] == [images[7]]
    state = batches.state_dict()  # the run can go on from here once the limit is raised
    second, straight = loader(images, max_unusable=1.0), loader(images, max_unusable=1.0)
    second.load_state_dict(state)
    take(straight, state["step"])
    for _ in range(6):
        assert equal(second.next(), straight.next())


@pytest.mark.slow
def test_resumed_among_spoiled_images(images, tmp_path):
    """The unusable images of batches handed out are in the state, those of later batches are found again."""
    for number, (spoil, _) in enumerate(SPOILED.values()):
        spoil(tmp_path / f"{4 * number:02}.png")
    straight = loader(images, max_unusable=1.0)
    for done in range(12):
        second = loader(images, max_unusable=1.0)
        second.load_state_dict(straight.state_dict())
        assert second.unusable == straight.unusable
        third = loader(images, max_unusable=1.0)
        third.load_state_dict(second.state_dict())
        batch = straight.next()
        assert equal(second.next(), batch), done
        assert equal(third.next(), batch), done
    assert len(straight.unusable) == len(SPOILED)


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


def test_an_error_that_no_image_causes_is_raised(images, monkeypatch):
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
