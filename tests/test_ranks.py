"""Whole runs on two processes joined by gloo, as torchrun starts them."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

for package in ("timm", "nvidia.dali", "jsonargparse", "sklearn", "safetensors"):
    pytest.importorskip(package, reason="training needs the packages of bincomm[train]")

from bincomm import cli  # noqa: E402
from bincomm.config import parse  # noqa: E402
from bincomm.engine.checkpoints import load_checkpoint  # noqa: E402
from bincomm.engine.logs import read_lines  # noqa: E402
from bincomm.pretrain import pretrain  # noqa: E402

OPTIONS = {
    "recipe": "digits",
    "backbone": "test_vit",
    "backbone_args": '{"patch_size": 4, "depth": 2}',
    "drop_path": 0,
    "global_size": 16,
    "local_size": 12,
    "bits": 16,
    "hidden": 32,
    "head_std": 0.1,
    "batch_size": 32,
    "max_steps": 20,
    "reset_every": 0,
    "log_every": 1,
    "save_every": 5,
    "threads": 1,
}


def arguments(output, **options):
    return [f"--{key}={value}" for key, value in {**OPTIONS, "output": output, **options}.items()]


def launch(output, *launcher, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *launcher]
    command += ["-m", "bincomm.cli", "pretrain", *arguments(output, **options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def finish(process):
    text = process.communicate(timeout=240)[0]
    assert process.returncode == 0, text
    return text


def curve(run):
    return [
        [line[key] for key in ("loss", "agreement", "rate")] for line in read_lines(run / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Twenty steps of 32 images in one process."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    pretrain(parse(arguments(output))[0])
    return output


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fsdp": True},
        {"fsdp": True, "compile": "on"},
        {"accumulate": 2, "checkpoint_activations": True},
    ],
)
def test_a_batch_shared_by_two_ranks_is_the_same_batch(alone, tmp_path, options):
    """1 × 32 and 2 × 16 images: the same curve, also with parameters split and activations computed anew."""
    text = finish(launch(tmp_path / "run", **options))
    assert "on 2 ranks (cpu)" in text
    assert ("torch.compile: both networks" in text) == ("compile" in options)
    assert text.count("step 20/20") == 1  # one rank logs
    expected, found = curve(alone), curve(tmp_path / "run")
    assert len(expected) == len(found) == 20
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
        assert mine[1:] == pytest.approx(theirs[1:], rel=1e-4)
    assert (tmp_path / "run" / "backbone.safetensors").exists()


def test_a_checkpoint_of_two_ranks_with_split_parameters_goes_on_on_one(alone, tmp_path):
    """And the other way round: what is saved does not tell how it was computed."""
    process = launch(tmp_path / "run", fsdp=True, save_every=8)
    for line in process.stdout:
        if line.startswith("step 10/"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    state = load_checkpoint(max((tmp_path / "run" / "checkpoints").glob("*.ckpt")))
    assert 10 <= state["step"] < 20
    assert len(state["ranks"]) == 2
    assert cli.main(["pretrain", *arguments(tmp_path / "run")]) == 0
    assert curve(tmp_path / "run") == [pytest.approx(values, rel=1e-4) for values in curve(alone)]


def test_a_rank_that_is_killed_ends_the_job_which_goes_on_later(alone, tmp_path):
    process = launch(tmp_path / "run", max_steps=2000, save_every=50, log_every=50)
    for line in process.stdout:
        if line.startswith("step 100/"):
            break
    ranks = children(process.pid)
    assert len(ranks) == 2
    started = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    text = process.communicate(timeout=60)[0]
    assert time.monotonic() - started < 60
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in text  # the reason, of torchrun
    saved = load_checkpoint(max((tmp_path / "run" / "checkpoints").glob("*.ckpt")))["step"]
    again = launch(tmp_path / "run", max_steps=2000, save_every=50, log_every=50)
    for line in again.stdout:
        if line.startswith("resuming at step"):
            assert int(line.split()[3].rstrip(":")) >= saved
            break
    else:
        pytest.fail("the run did not go on")
    os.killpg(again.pid, signal.SIGKILL)
    again.wait()


def test_without_torchrun_the_ranks_watch_each_other(tmp_path):
    """As under a launcher that starts processes and does not look after them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-m", "bincomm.cli", "pretrain", *arguments(tmp_path / "run", max_steps=4000)]
    processes = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env={**os.environ, **meeting, **place}, **pipes))
    for line in processes[0].stdout:
        if line.startswith("step 10/"):
            break
    started = time.monotonic()
    # Stopped, not killed: no connection is closed, and rank 0 waits in a collective operation.
    processes[1].send_signal(signal.SIGSTOP)
    text = processes[0].communicate(timeout=60)[0]
    assert time.monotonic() - started < 60
    assert processes[0].returncode == 1
    assert "rank 0 ends, for rank 1 is gone: no sign of life" in text
    processes[1].kill()
    processes[1].wait()


def test_an_error_of_the_first_rank_is_told_once(tmp_path):
    process = launch(tmp_path / "run", resume="must")
    text = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert text.count("resume: expected a run in") == 1


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    process = launch(tmp_path / "run", batch_size=33)
    text = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "batch_size: expected a multiple of 2 (2 ranks × accumulate 1), got 33" in text


def children(pid):
    """Processes that a process started, by age."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return sorted(int(number) for number in file.read().split())
