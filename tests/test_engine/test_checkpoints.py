"""Checkpoints that are written whole, in the background, and survive what happens to disks."""

import os
import resource
import threading

import pytest
import torch

from bincomm.engine import checkpoints as module
from bincomm.engine.checkpoints import Checkpoints, load_checkpoint, save_checkpoint


def test_checkpoints(tmp_path):
    path = tmp_path / "one.ckpt"
    save_checkpoint(path, {"step": 3, "weights": {"a": torch.arange(4)}})
    state = load_checkpoint(path)
    assert state["step"] == 3
    assert torch.equal(state["weights"]["a"], torch.arange(4))
    whole = path.read_bytes()
    for damaged in (whole[:100], b"", whole.replace(torch.arange(4).numpy().tobytes(), bytes(32))):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"one\.ckpt cannot be read as a checkpoint: \w"):
            load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.ckpt")


def test_a_checkpoint_that_does_not_fit_is_named_and_the_old_one_kept(tmp_path):
    path = tmp_path / "one.ckpt"
    save_checkpoint(path, {"step": 3})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*/one\.ckpt"):
            save_checkpoint(path, {"step": 4, "weights": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(path)["step"] == 3
    assert os.listdir(tmp_path) == ["one.ckpt"]


def damages(whole):
    """What disks and copies make of a file: bits flipped, bytes lost, zeroed, repeated or swapped."""
    size = len(whole)
    for byte in [*range(0, size, 3), *range(size - 700, size)]:
        yield whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :]
    for start in range(0, size, 97):
        for count in (1, 64, 1000):
            part = whole[start : start + count]
            yield whole[:start] + whole[start + count :]
            yield whole[:start] + part + whole[start:]
            if any(part):
                yield whole[:start] + bytes(count) + whole[start + count :]
        yield whole[:start]
    yield whole[size // 2 :] + whole[: size // 2]


@pytest.mark.slow
def test_every_damage_is_noticed(tmp_path):
    """Also in the archive's directory, whose entries have no checksums of their own."""
    torch.manual_seed(0)
    networks = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(networks.parameters())
    networks(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    state = {"step": 7, "student": networks.state_dict(), "optimizer": optimizer.state_dict()}
    path = tmp_path / "one.ckpt"
    save_checkpoint(path, state)
    whole = path.read_bytes()
    for data in damages(whole):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint: "):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path)["step"] == 7


def test_a_checkpoint_without_a_checksum_can_be_read(tmp_path):
    """Those of earlier versions; the checksums of their parts are compared."""
    path = tmp_path / "step-000000002.ckpt"
    torch.save({"step": 2, "weights": torch.arange(4)}, path)
    assert load_checkpoint(path)["step"] == 2
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 1)
    far = whole[: entry + 42] + b"\xff\xff\xff\x7f" + whole[entry + 46 :]  # where the entry's data begin
    for data in (whole.replace(torch.arange(4).numpy().tobytes(), bytes(32)), whole[:200] + whole[300:], far):
        path.write_bytes(data)
        save_checkpoint(tmp_path / "step-000000001.ckpt", {"step": 1})
        assert Checkpoints(tmp_path, 3).load()["step"] == 1
        assert (tmp_path / "step-000000002.ckpt.damaged").read_bytes() == data


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(5, "Input/output error"), ValueError), (OSError(13, "Permission denied"), PermissionError)],
)
def test_a_worn_disk_is_a_damage_and_a_lock_is_none(tmp_path, monkeypatch, error, raised):
    save_checkpoint(tmp_path / "one.ckpt", {"step": 3})

    def refuse(*arguments):
        raise error

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(raised, match=error.strerror):
        load_checkpoint(tmp_path / "one.ckpt")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_no_damage(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path / "step-000000001.ckpt", {"step": 1})

    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(MemoryError):
        Checkpoints(tmp_path, 3).load()
    assert os.listdir(tmp_path) == ["step-000000001.ckpt"]


def steps(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_the_newest_that_can_be_read_is_taken(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.load() is None
    for step in (8, 9, 10):
        checkpoints.save(step, {"step": step})
    checkpoints.wait()
    names = ["step-000000009.ckpt", "step-000000010.ckpt"]
    assert steps(tmp_path / "checkpoints") == names
    (tmp_path / "checkpoints" / "step-best.ckpt").write_bytes(b"a copy of somebody's own")
    (tmp_path / "checkpoints" / names[1]).write_bytes(b"rotten")
    again = Checkpoints(tmp_path / "checkpoints", 1)
    assert again.load() == {"step": 9}
    assert len(caplog.messages) == 1
    assert "step-000000010.ckpt cannot be read" in caplog.text
    again.save(8, {"step": 8})  # gone back further by hand
    again.wait()
    assert steps(tmp_path / "checkpoints") == [names[0], f"{names[1]}.damaged", "step-best.ckpt"]
    (tmp_path / "checkpoints" / names[0]).write_bytes(b"")
    with pytest.raises(ValueError, match="all checkpoints in .* are damaged"):
        again.load()


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = module.save_checkpoint

    def slow(path, state):
        assert may_write.wait(60)
        write(path, state)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    checkpoints.save(1, {"step": 1})
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))
    may_write.set()
    checkpoints.wait()
    assert steps(tmp_path / "checkpoints") == ["step-000000001.ckpt"]


def test_a_full_disk_is_told_and_costs_no_checkpoint(small_disk, caplog):
    checkpoints = Checkpoints(small_disk / "checkpoints", 3)
    checkpoints.save(1, {"step": 1, "weights": torch.zeros(200_000)})
    checkpoints.wait()
    checkpoints.save(2, {"step": 2, "weights": torch.zeros(400_000)})
    checkpoints.wait()
    assert len(caplog.messages) == 1
    assert "checkpoint of step 2 could not be written" in caplog.text
    assert "No space left on device" in caplog.text
    assert "the last good one: 1" in caplog.text
    assert steps(small_disk / "checkpoints") == ["step-000000001.ckpt"]
    checkpoints.save(3, {"step": 3, "weights": torch.zeros(100_000)})  # there is room again
    checkpoints.wait()
    assert len(caplog.messages) == 1
    assert Checkpoints(small_disk / "checkpoints", 3).load()["step"] == 3
