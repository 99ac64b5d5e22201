"""Whole runs on two processes joined by gloo, started by torchrun or without a launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import COMMAND, ForkedProcess

from bincomm import cli
from bincomm.configuration import configure
from bincomm.engine.checkpoints import load_checkpoint
from bincomm.files import read_json_lines
from bincomm.pretraining import pretrain
from bincomm.recipes import read_recipe

pytestmark = pytest.mark.slow

# Ranks give each other up sooner than they do otherwise, so that the tests need not wait as long.
IMPATIENT = """
import bincomm.distributed.heartbeat, bincomm.distributed.ranks
bincomm.distributed.heartbeat.BEAT_SECONDS = bincomm.distributed.ranks.BEAT_SECONDS = 0.5
bincomm.distributed.heartbeat.SILENCE_SECONDS = 5.0
"""
# torch.compile up to the code that it generates, which takes two ranks minutes.
WITHOUT_INDUCTOR = (
    "import functools, torch; torch.compile = functools.partial(torch.compile, backend='aot_eager')\n"
)
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
OPTIONS = {
    "recipe": "digits",
    "backbone": "test_vit",
    "backbone_args": '{"patch_size": 4, "depth": 2}',
    "drop_path": 0,
    "global_size": 16,
    "local_size": 12,
    "bits": 16,
    "hidden": 32,
    "beta": "auto",
    "lr": 0.002,
    "momentum": 0.98,
    "warmup_epochs": 2,
    "batch_size": 32,
    "max_steps": 20,
    "reset_every": 0,
    "freeze_backbone": 1,
    "log_every": 1,
    "save_every": 5,
    "threads": 1,
}


# As few images at a time as where crops are large: here two on each rank.
IN_PARTS = read_recipe("high_resolution")["accumulate"]


def arguments(output, **options):
    return [f"--{key}={value}" for key, value in {**OPTIONS, "output": output, **options}.items()]


def launch(output, *launcher, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *launcher]
    command += ["-m", "bincomm.cli", "pretrain", *arguments(output, **options)]
    return subprocess.Popen(command, env=environment(), start_new_session=True, **PIPES)


def start_ranks(number, program, words=()):
    """Processes that have the variables of a launcher, which looks after them no more."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(number)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting} for rank in range(number)]
    return [ForkedProcess(program, words, environment(place)) for place in places]


def environment(more=()):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **dict(more)}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def kill(processes):
    for process in processes:
        process.kill()
        process.communicate()


def train_on_two(output, before="", **options):
    """Exit statuses of two ranks, which do something else before, and all that they print."""
    processes = start_ranks(2, before + COMMAND, ["pretrain", *arguments(output, **options)])
    try:
        text = "".join(process.communicate(timeout=240)[0] for process in processes)
    finally:
        kill(processes)
    return [process.returncode for process in processes], text


def curve(run):
    return [
        [line[key] for key in ("loss", "agreement", "rate", "beta")]
        for line in read_json_lines(run / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Twenty steps of 32 images in one process."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    pretrain(configure(**OPTIONS, output=output))
    return output


@pytest.mark.parametrize(
    ("options", "before"),
    [
        ({}, ""),
        ({"fsdp": True}, ""),
        pytest.param({"fsdp": True, "compile": "on"}, WITHOUT_INDUCTOR, marks=pytest.mark.long),
        pytest.param({"fsdp": True, "compile": "on"}, "", marks=pytest.mark.long),
        ({"accumulate": IN_PARTS, "checkpoint_activations": True}, ""),
    ],
    ids=["", "split", "split and compiled in part", "split and compiled", "accumulated"],
)
def test_a_batch_shared_by_two_ranks_is_the_same_batch(alone, tmp_path, options, before):
    """1 × 32 and 2 × 16 images: the same curve, also with parameters split and activations computed anew."""
    statuses, text = train_on_two(tmp_path / "run", before, **options)
    assert statuses == [0, 0], text
    assert "on 2 ranks (cpu)" in text
    assert ("torch.compile: both networks" in text) == ("compile" in options)
    assert text.count("step 20/20") == 1  # one rank logs
    expected, found = curve(alone), curve(tmp_path / "run")
    assert len(expected) == len(found) == 20
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
        assert mine[1:] == pytest.approx(theirs[1:], rel=1e-4)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_checkpoint_of_two_ranks_with_split_parameters_goes_on_on_one(alone, tmp_path):
    """And the other way round: what is saved does not tell how it was computed."""
    processes = start_ranks(2, COMMAND, ["pretrain", *arguments(tmp_path / "run", fsdp=True, save_every=8)])
    try:
        for line in processes[0].stdout:
            if line.startswith("step 10/"):
                break
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.communicate(timeout=120)
    finally:
        kill(processes)
    assert [process.returncode for process in processes] == [cli.SAVED] * 2
    state = load_checkpoint(max((tmp_path / "run" / "checkpoints").glob("*.ckpt")))
    assert 10 <= state["step"] < 20
    assert len(state["window"]) == len(state["random"]) == 2
    assert cli.main(["pretrain", *arguments(tmp_path / "run")]) == 0
    assert curve(tmp_path / "run") == [pytest.approx(values, rel=1e-4) for values in curve(alone)]


@pytest.mark.long
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


@pytest.mark.parametrize(
    ("frozen", "reason"),
    [
        (1, "rank 0 ends, because rank 1 is gone: no sign of life"),
        (0, "the meeting point of the ranks answers no"),
    ],
)
def test_without_torchrun_the_ranks_watch_each_other(tmp_path, frozen, reason):
    """As under a launcher that starts processes and does not look after them; rank 0 holds the store."""
    processes = start_ranks(
        2, f"{IMPATIENT}\n{COMMAND}", ["pretrain", *arguments(tmp_path / "run", max_steps=4000)]
    )
    try:
        for line in processes[0].stdout:
            if line.startswith("step 10/"):
                break
        # Stopped, not killed: no connection is closed, and the other waits in a collective operation.
        processes[frozen].send_signal(signal.SIGSTOP)
        text = processes[1 - frozen].communicate(timeout=60)[0]
        assert processes[1 - frozen].returncode == 1
        assert reason in text
    finally:
        kill(processes)


JOINED = f"""
import os, sys, time, torch, torch.distributed as dist
from bincomm.distributed.ranks import join_ranks
{IMPATIENT}
device = "cpu"

def together(ranks, steps=1000):
    print("joined", flush=True)
    for _ in range(steps):
        dist.all_reduce(torch.zeros(1))
        time.sleep(0.1)
"""


def run_ranks(number, body, before=""):
    """Statuses and texts of processes without torchrun that share a body of `with join_ranks(...)`."""
    processes = start_ranks(number, with_ranks(body, before))
    try:
        texts = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        kill(processes)
    return [process.returncode for process in processes], texts


def with_ranks(body, before=""):
    """A program that leaves the interpreter as bincomm.cli does."""
    return f"""{JOINED}
{before}
try:
    with join_ranks(device) as ranks:
        {body}
except Exception as error:
    print(type(error).__name__, error, flush=True)
    os._exit(1)
os._exit(0)
"""


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_leaves_in_order_harms_none(late):
    """Rank 0 waits for those that have not left, with the store that they watch each other through."""
    body = f"together(ranks, 5); time.sleep(2 * (ranks.rank == {late})); ranks.leave()"
    statuses, texts = run_ranks(2, body)
    assert statuses == [0, 0], texts


def test_what_follows_leaving_is_the_business_of_one_rank(tmp_path):
    """Ranks after the first end at once, and rank 0 goes on for longer than it would be given up."""
    body = "together(ranks, 5); ranks.leave(); time.sleep(8 * (ranks.rank == 0)); print('ended', flush=True)"
    processes = start_ranks(2, with_ranks(body))
    try:
        assert processes[1].wait(timeout=60) == 0
        assert processes[0].poll() is None
        assert "ended" in processes[0].communicate(timeout=60)[0]
        assert processes[0].returncode == 0
    finally:
        kill(processes)


def test_all_ranks_tell_why_one_failed():
    """Not that its connections broke, nor that the store went with rank 0."""
    body = "together(ranks, 5 if ranks.rank == 1 else 1000); raise ValueError('the true reason')"
    statuses, texts = run_ranks(3, body)
    assert statuses == [1, 1, 1]
    assert "ValueError the true reason" in texts[1]
    for rank in (0, 2):
        assert f"rank {rank} ends, because rank 1 ended: the true reason" in texts[rank]
        # torch logs a broken connection by itself where a rank closes it before another has read.
        assert not [line for line in texts[rank].splitlines() if "peer" in line and not line.startswith("[")]


def test_a_rank_that_finds_no_device_tells_the_others():
    before = """
if os.environ["RANK"] == "1":
    torch.cuda.is_available = lambda: False
    device = "cuda"
else:
    device = "cpu"
"""
    statuses, texts = run_ranks(2, "together(ranks)", before)
    assert statuses == [1, 1]
    reason = "device: cuda was asked for, but this torch finds no GPU"
    assert f"ValueError {reason}" in texts[1]
    assert f"rank 0 ends, because rank 1 ended: {reason}" in texts[0]


@pytest.mark.parametrize(
    ("absent", "reason"), [(0, "ranks: rank 0 was not at 127.0.0.1"), (1, "ranks: rank 1 of 2 did not start")]
)
def test_a_rank_does_not_wait_for_one_that_never_starts(absent, reason):
    before = f"""
import bincomm.distributed.ranks
bincomm.distributed.rendezvous.RENDEZVOUS_SECONDS = 3
if os.environ["RANK"] == "{absent}":
    os._exit(9)
"""
    statuses, texts = run_ranks(2, "together(ranks)", before)
    assert statuses[absent] == 9
    assert statuses[1 - absent] == 1
    assert f"TimeoutError {reason}" in texts[1 - absent]


def test_a_job_that_is_suspended_goes_on():
    """Stopped for longer than a rank may be silent, and continued one after the other."""
    processes = start_ranks(2, with_ranks("together(ranks, 100)"))
    try:
        for process in processes:
            assert any(line == "joined\n" for line in process.stdout)
        time.sleep(1.5)  # of signs of life
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(8)
        for process in processes:
            process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
        texts = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], texts
    finally:
        kill(processes)


def test_an_error_without_a_text_is_one_on_all_ranks():
    body = "ranks.first(lambda: exec('raise ValueError'))"
    statuses, texts = run_ranks(2, body)
    assert statuses == [1, 1]
    assert texts[0].endswith("ValueError \n")
    assert texts[1].endswith("FirstRankError \n")


def test_whole_values_are_kept_where_they_are_wanted():
    before = (
        "from bincomm.distributed.sharding import gather_tensors, shard; from types import SimpleNamespace"
    )
    body = """
        layer = torch.nn.Linear(4, 3)
        layer.backbone = torch.nn.Identity()
        with torch.no_grad():
            layer.weight.fill_(2)
        shard(layer, ranks)
        found = gather_tensors({"step": 1, "own": torch.ones(2), **layer.state_dict()}, keep=ranks.rank == 0)
        assert found["step"] == 1
        if ranks.rank:
            assert found["own"] is None and found["weight"] is None
        else:
            assert found["own"].tolist() == [1, 1] and found["weight"].tolist() == [[2] * 4] * 3
"""
    statuses, texts = run_ranks(2, body.strip(), before)
    assert statuses == [0, 0], texts


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_two_machines_begin_again_at_once(tmp_path, killed):
    """Whichever lost a rank: only one of the launchers counts a restart, and their store keeps what the ranks
    of the last time wrote."""
    program = tmp_path / "program.py"
    program.write_text(with_ranks("together(ranks, 40)"))
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=3", str(program)]
    launchers = []
    try:
        for number in range(2):
            with open(tmp_path / f"log{number}", "w") as log:
                launchers.append(
                    subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
                )

        def joined():
            return [(tmp_path / f"log{number}").read_text().count("joined") for number in range(2)]

        deadline = time.monotonic() + 60
        while joined() != [1, 1] and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(children(launchers[killed].pid)[0], signal.SIGKILL)
        assert [launcher.wait(timeout=60) for launcher in launchers] == [0, 0]
        assert joined() == [2, 2]
    finally:
        for launcher in launchers:
            launcher.terminate()  # it ends its ranks
            launcher.wait(timeout=60)


def test_an_error_of_the_first_rank_is_told_once(tmp_path):
    statuses, text = train_on_two(tmp_path / "run", resume="must")
    assert statuses == [2, 1]  # rank 1 ends because rank 0 did
    assert text.count("resume: expected a run in") == 1


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    statuses, text = train_on_two(tmp_path / "run", batch_size=33)
    assert statuses == [2, 1]
    assert "batch_size: expected a multiple of 2 (2 ranks × accumulate 1), got 33" in text


def children(pid):
    """Processes that a process started, by age."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return sorted(int(number) for number in file.read().split())
