"""Whole runs, on a few real digits: what they leave, and that nothing stops them for good."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from forked import COMMAND, ForkedProcess
from PIL import Image
from quick_runs import pages

from bincomm import cli
from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.data.loader import TooManyUnusableError
from bincomm.engine.checkpoints import load_checkpoint
from bincomm.engine.records import Records
from bincomm.engine.run import dump_config
from bincomm.engine.schedules import Schedule
from bincomm.engine.state import RunState
from bincomm.evaluation.run import summary
from bincomm.files import read_json_lines
from bincomm.networks import Head, Network
from bincomm.pretraining import Interrupted, TrainingError, pretrain

# A small network on small crops; the head is reset twice, and drop path draws random numbers in the network.
OPTIONS = {
    "backbone": "test_vit",
    "backbone_args": '{"patch_size": 4, "depth": 2}',
    "drop_path": 0.2,
    "global_size": 16,
    "local_size": 12,
    "bits": 16,
    "hidden": 32,
    "beta": "auto",
    "batch_size": 16,  # of few digits, 22 steps an epoch
    "epochs": 3,
    "max_steps": 50,
    "reset_every": 1,
    "log_every": 4,
    "save_every": 6,
}


BATCH_NORM = {
    "backbone": "resnetv2_18",
    "backbone_args": '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8}',
    "drop_path": 0,
}


# What schedulers and closed terminals send, beside SIGTERM.
SIGNALS = ("HUP", "USR1", "USR2", "XCPU")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _few_digits(few_digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIONS, "data", str(few_digits))
        yield


def arguments(output, **options):
    values = {"recipe": "digits", "output": output, **OPTIONS, **options}
    return [f"--{key}={value}" for key, value in values.items()]


def configuration(output, **options):
    return configure(**{"recipe": "digits", "output": output, **OPTIONS, **options})


def start(output, **options):
    return ForkedProcess(COMMAND, ["pretrain", *arguments(output, **options)], os.environ)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run, its directory and its result."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    with pages():
        return output, pretrain(configuration(output))


def newest(run):
    """A run's newest checkpoint."""
    return load_checkpoint(max((run / "checkpoints").glob("*.ckpt")))


def same_end(run, other):
    """Whether two runs ended alike, bit for bit."""
    for name in ("metrics.jsonl", "model.safetensors", "config.json", "README.md", "result.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def test_what_a_run_leaves(finished):
    output, result = finished
    left = {
        "config.yaml",
        "metrics.jsonl",
        "speed.jsonl",
        "checkpoints",
        "model.safetensors",
        "config.json",
        "README.md",
        "curves.png",
        "report.html",
        "result.json",
    }
    assert left <= set(os.listdir(output))
    assert json.loads((output / "result.json").read_text()) == result
    records = read_json_lines(output / "metrics.jsonl")
    assert [record["step"] for record in records] == [*range(4, 50, 4), 50]
    keys = "loss agreement rate gradient_norm lr momentum "
    keys += "bit_entropy bit_entropy_min dead_bits bit_accuracy bit_majority "
    keys += "beta agreement_global transmitted_bits"
    for record in records:
        assert set(keys.split()) <= record.keys()
        assert all(torch.tensor(float(value)).isfinite() for value in record.values())
    assert records[-1]["momentum"] == 1.0
    assert len({record["beta"] for record in records}) == len(records)  # it is found while training
    evaluation = result["evaluation"]
    assert evaluation.keys() == {"teacher", "before_training", "pixels", "queries_held_out"}
    assert evaluation["teacher"].keys() >= {"knn", "knn_codes", "bits"}
    assert evaluation["pixels"]["knn"]["20"] > 0.9
    assert evaluation["teacher"]["query_images"] == 90


def test_the_backbone_loads_in_timm(finished):
    output, _ = finished
    with safetensors.safe_open(output / "model.safetensors", "pt") as file:
        create = json.loads(file.metadata()["create_model"])
    backbone = timm.create_model(**create)
    shown = timm.data.resolve_model_data_config(backbone)
    assert (shown["input_size"], shown["crop_pct"]) == ([3, 16, 16], 1.0)
    assert timm.data.resolve_model_data_config(backbone, use_test_size=True) == shown
    for key in ("url", "hf_hub_id", "tag", "license", "test_input_size", "origin_url", "paper_ids"):
        assert not backbone.pretrained_cfg.get(key)
    backbone.load_state_dict(safetensors.torch.load_file(output / "model.safetensors"), strict=True)
    state = newest(output)["teacher"]
    _, teacher = create_networks(configuration(output), torch.device("cpu"))
    teacher.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(backbone.eval()(images), teacher.backbone.eval()(images))


def test_the_same_again(finished, tmp_path):
    pretrain(configuration(tmp_path / "again"))
    same_end(finished[0], tmp_path / "again")


def test_another_seed_is_another_run(finished, tmp_path):
    pretrain(configuration(tmp_path / "other", seed=1, max_steps=4))
    first, other = (
        read_json_lines(run / "metrics.jsonl")[0]["loss"] for run in (finished[0], tmp_path / "other")
    )
    assert first != other


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_and_resumed(tmp_path, times):
    """SIGKILL; every time the same command goes on, and the end is the uninterrupted run's."""
    output, kills, seen = tmp_path / "killed", 0, []
    steps = 25 * times
    options = {"epochs": 30, "max_steps": steps, "reset_every": 5 if times > 3 else 2}
    pretrain(configuration(tmp_path / "whole", **options))
    for _ in range(3 * times):
        process = start(output, **options)
        # Past the set-up, so that the kill falls into training or into a checkpoint's writing; the first one
        # past the first checkpoint, without which there is nothing to resume.
        for line in process.stdout:
            seen.append(line)
            if line.startswith("step ") and (kills or list((output / "checkpoints").glob("*.ckpt"))):
                break
        time.sleep(random.uniform(0, 0.3))
        if kills < times:
            process.kill()
        rest = process.communicate(timeout=120)[0]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, "".join(seen) + rest
        kills += 1
    assert process.returncode == 0
    assert kills == times
    assert any("resuming at step" in line for line in seen)
    same_end(tmp_path / "whole", output)


def test_ctrl_c_saves_and_resumes(finished, tmp_path):
    program = "import quick_runs; quick_runs.put_back_pages()\n" + COMMAND
    words = ["pretrain", *arguments(tmp_path / "run", save_every=1000)]
    process = ForkedProcess(program, words, os.environ)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == cli.SAVED, text
    assert "SIGINT: saved in" in text
    assert newest(tmp_path / "run")["step"] > 0
    assert "The run was interrupted." in (tmp_path / "run" / "report.html").read_text()
    with pages():
        pretrain(configuration(tmp_path / "run", save_every=1000))
    same_end(finished[0], tmp_path / "run")
    assert "The run was interrupted." not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("moment", "number"), [("add", "TERM"), ("report", "TERM"), *(("add", s) for s in SIGNALS)]
)
def test_a_signal_at_any_moment_is_saved_before_it_ends_the_run(tmp_path, monkeypatch, moment, number):
    method = getattr(Records, moment)

    def interrupted(self, *args):
        os.kill(os.getpid(), getattr(signal, f"SIG{number}"))
        return method(self, *args)

    monkeypatch.setattr(Records, moment, interrupted)
    with pytest.raises(Interrupted):
        pretrain(configuration(tmp_path / "run", log_every=2, save_every=1000))
    assert newest(tmp_path / "run")["step"] == (1 if moment == "add" else 2)


def test_what_ignores_signals_goes_on_ignoring_them(tmp_path, monkeypatch):
    """As `nohup` and what a shell's script starts in the background do."""
    add = Records.add

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGINT)
        return add(self, *args)

    monkeypatch.setattr(Records, "add", interrupted)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        assert cli.main(["pretrain", *arguments(tmp_path / "run", max_steps=2)]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_run_begins_ends_it_in_order(tmp_path, monkeypatch, capsys, number):
    """Nothing can be saved yet; a file that is being written is not left unfinished."""
    fsync = os.fsync

    def interrupted(descriptor):
        if (tmp_path / "run").exists():  # not where the first run of all writes the digits into the cache
            os.kill(os.getpid(), number)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    assert cli.main(["pretrain", *arguments(tmp_path / "run")]) == 128 + number
    assert "interrupted; nothing was saved" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == [".bincomm.lock"]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_log_on_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    """Neither the run, nor that a signal saves it."""
    add = Records.add

    def interrupted(self, step, *args):
        add(self, step, *args)
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    streams = [open("/dev/full", "w", buffering=1) for _ in range(2)]  # noqa: SIM115
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "add", interrupted)
        status = cli.main(["pretrain", *arguments(tmp_path / "run", max_steps=4, log_every=1)])
    assert status == cli.SAVED
    assert newest(tmp_path / "run")["step"] == 3
    assert cli.main(["pretrain", *arguments(tmp_path / "run", max_steps=4, log_every=1)]) == 1  # no summary
    assert (tmp_path / "run" / "result.json").exists()
    for stream in streams:
        stream.close()  # what it could not take went elsewhere


@pytest.mark.parametrize("removed", ["run", "run/metrics.jsonl", "run/checkpoints"])
def test_what_is_removed_while_a_run_trains_is_made_again(tmp_path, monkeypatch, caplog, removed):
    add = Records.add

    def remove(self, step, *args):
        if step == 9:
            path = tmp_path / removed
            path.unlink() if path.is_file() else shutil.rmtree(path)
        add(self, step, *args)

    monkeypatch.setattr(Records, "add", remove)
    pretrain(configuration(tmp_path / "run", max_steps=14))
    assert newest(tmp_path / "run")["step"] == 14
    left = {"config.yaml", "metrics.jsonl", "model.safetensors", "result.json", ".bincomm.lock"}
    assert left <= set(os.listdir(tmp_path / "run"))
    assert read_json_lines(tmp_path / "run/metrics.jsonl")[-1]["step"] == 14
    assert ("was removed" in caplog.text) == (removed != "run/checkpoints")


def test_a_finished_run_is_not_trained_again(finished, capsys):
    output, result = finished
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["pretrain", *arguments(output)]) == 0
    assert f"{result['evaluation']['teacher']['knn']['20']:.2%}" in capsys.readouterr().out
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_of_another_configuration_is_refused(finished, capsys):
    assert cli.main(["pretrain", *arguments(finished[0], beta=0.7)]) == 2
    assert "beta was auto, now 0.7" in capsys.readouterr().err


def test_a_finished_run_is_not_lengthened_but_followed_by_another(finished, capsys):
    assert cli.main(["pretrain", *arguments(finished[0], epochs=30, max_steps=90)]) == 2
    error = capsys.readouterr().err
    assert "epochs was 3, now 30; max_steps was 50, now 90" in error
    assert f"choose another --output; to train its network further, add --init_from {finished[0]}" in error
    assert cli.main(["pretrain", *arguments(finished[0], log_every=7, device="cpu")]) == 0


def test_metrics_may_be_reported_at_other_steps_after_a_resume(finished, tmp_path, monkeypatch):
    add = Records.add

    def interrupted(self, step, *args):
        add(self, step, *args)
        if step == 7:  # three steps after a report
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "add", interrupted)
        with pytest.raises(Interrupted):
            pretrain(configuration(tmp_path / "run"))
    pretrain(configuration(tmp_path / "run", log_every=2))
    assert [line["step"] for line in read_json_lines(tmp_path / "run/metrics.jsonl")] == [4, *range(8, 51, 2)]
    weights = [(run / "model.safetensors").read_bytes() for run in (finished[0], tmp_path / "run")]
    assert weights[0] == weights[1]


def test_a_run_goes_on_from_another_directory(tmp_path, monkeypatch):
    images = tmp_path / "a" / "images"
    images.mkdir(parents=True)
    for i in range(70):
        Image.new("RGB", (20, 20), (3 * i, 0, 0)).save(images / f"{i:02}.png")
    monkeypatch.chdir(tmp_path / "a")
    config = configuration(tmp_path / "run", data="images", max_steps=3)
    add = Records.add

    def interrupted(self, *args):
        add(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "add", interrupted)
        with pytest.raises(Interrupted):
            pretrain(config)
    monkeypatch.chdir(tmp_path)
    pretrain(replace(config, data=str(images)))
    assert newest(tmp_path / "run")["step"] == 3


def test_a_run_that_failed_before_it_began_is_not_in_the_way(tmp_path):
    assert cli.main(["pretrain", *arguments(tmp_path / "run", backbone="resnet81")]) == 2
    assert cli.main(["pretrain", *arguments(tmp_path / "run", max_steps=2)]) == 0


def test_images_without_labels(tmp_path):
    for i in range(80):
        Image.new("RGB", (20, 20), (3 * i, 0, 0)).save(tmp_path / f"{i}.png")
    result = pretrain(configuration(tmp_path / "run", data=tmp_path, max_steps=2))
    assert result["evaluation"] is None
    assert "no k-NN" in summary(result, "run")


def test_a_run_among_its_own_images_is_refused(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="output: expected another folder than that of the images"):
        pretrain(configuration(tmp_path, data=tmp_path))
    assert os.listdir(tmp_path) == ["1.png"]


def spoil_steps(monkeypatch, spoiled):
    """Make the student's logits NaN in the steps of these numbers, which count from 1."""
    forward, calls = Network.forward, []

    def run(self, *groups):
        logits = forward(self, *groups)
        if len(groups) == 2:
            calls.append(1)
        return logits * float("nan") if len(groups) == 2 and len(calls) in spoiled else logits

    monkeypatch.setattr(Network, "forward", run)


@pytest.mark.parametrize("backbone", ["test_vit", "resnetv2_18"])
def test_a_step_that_is_not_finite_is_skipped(tmp_path, monkeypatch, caplog, backbone):
    options = BATCH_NORM if backbone == "resnetv2_18" else {}
    spoil_steps(monkeypatch, {3, 5, 6, 7})
    result = pretrain(configuration(tmp_path / "run", max_steps=12, **options))
    text = caplog.text
    assert "a step was skipped, its loss or gradient was not finite (1 so far)" in text
    assert "(4 so far)" in text
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [1, 3, 0]
    assert all(math.isfinite(record["loss"]) for record in records)
    assert result["evaluation"]["teacher"]["knn"]["20"] > 0.1
    state = newest(tmp_path / "run")
    for name in ("student", "teacher"):
        assert all(value.isfinite().all() for value in state[name].values())
    # The optimizer did not move in those steps.
    assert {int(values["step"]) for values in state["optimizer"]["state"].values()} == {8}


def test_more_than_three_in_a_row_stop_with_state_and_batch(tmp_path, monkeypatch):
    spoil_steps(monkeypatch, {4, *range(8, 50)})
    with pytest.raises(TrainingError, match=r"not finite in more than 3 steps in a row, up to step 11; .*lr"):
        pretrain(configuration(tmp_path / "run"))
    assert newest(tmp_path / "run")["step"] == 6  # an error saves nothing but what is for inspection
    state = load_checkpoint(tmp_path / "run" / "not_finite.ckpt")
    assert state["step"] == 11
    assert all(value.isfinite().all() for value in state["student"].values())
    batch = load_checkpoint(tmp_path / "run" / "not_finite_batch_0.ckpt")
    assert batch["global_views"].shape == (16, 2, 3, 16, 16)
    assert batch["local_views"].shape == (16, 2, 3, 12, 12)
    assert len(batch["images"]) == 16
    assert all(os.path.exists(image) for image in batch["images"])


def test_what_resume_says_is_heeded(finished, tmp_path, capsys):
    assert cli.main(["pretrain", *arguments(finished[0], resume="never")]) == 2
    assert "resume: expected no run" in capsys.readouterr().err
    assert cli.main(["pretrain", *arguments(tmp_path / "none", resume="must")]) == 2
    assert "resume: expected a run" in capsys.readouterr().err


def test_beginning_from_a_run_is_not_going_on_with_it(finished, tmp_path):
    config = configuration(tmp_path / "run", init_from=finished[0], max_steps=2)
    before, _ = create_networks(config, torch.device("cpu"))
    theirs = safetensors.torch.load_file(finished[0] / "model.safetensors")
    for name, value in before.backbone.state_dict().items():
        assert torch.equal(value, theirs[name])
    assert read_json_lines(tmp_path / "run" / "metrics.jsonl") == []
    result = pretrain(config)
    assert result["last_metrics"]["step"] == 2
    deeper = configuration(tmp_path, init_from=finished[0], backbone_args='{"patch_size": 4, "depth": 3}')
    with pytest.raises(ValueError, match=r"init_from: .* of another backbone: .* is missing there"):
        create_networks(deeper, torch.device("cpu"))


def test_a_checkpoint_of_another_configuration_is_refused(finished, tmp_path):
    """Even where the run's own record of it is lost."""
    config = configuration(tmp_path / "run", max_steps=8, log_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bincomm.pretraining.export_backbone", stop_here)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    other = configuration(tmp_path / "run", max_steps=8, log_every=2, lr=0.5)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(other))
    with pytest.raises(
        ValueError, match=r"checkpoints holds a run of another configuration \(lr was auto, now 0.5"
    ):
        pretrain(other)


def stop_here(*args):
    raise KeyboardInterrupt


def test_training_goes_on_where_the_disk_is_full(finished, small_disk, monkeypatch, caplog):
    add, taken = Records.add, []

    def fill(self, *args):
        add(self, *args)
        taken.append(1)
        if len(taken) == 8:  # after the first checkpoint
            (small_disk / "filler").write_bytes(b"0")
            with contextlib.suppress(OSError), open(small_disk / "filler", "ab", 0) as file:
                while True:
                    file.write(bytes(4096))
        if len(taken) == 40:
            assert [path.name for path in (small_disk / "run" / "checkpoints").iterdir()] == [
                "step-000000006.ckpt"
            ]
            assert newest(small_disk / "run")["step"] == 6
            (small_disk / "filler").unlink()

    monkeypatch.setattr(Records, "add", fill)
    pretrain(configuration(small_disk / "run", keep=1))
    text = caplog.text
    assert "the checkpoint of step 12 could not be written" in text
    assert "No space left on device" in text
    assert "metrics could not be written" in text
    same_end(finished[0], small_disk / "run")


@pytest.mark.parametrize("stop", [21, 22, 23])
def test_resumed_around_a_reset_with_batch_norm(tmp_path, stop):
    """Stopped just before, at and after the end of an epoch, where the head is drawn anew."""
    options = {**BATCH_NORM, "max_steps": 26, "save_every": stop}
    pretrain(configuration(tmp_path / "whole", **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "save", save_and_end)
        with pytest.raises(KeyboardInterrupt):
            pretrain(configuration(tmp_path / "run", **options))
    assert newest(tmp_path / "run")["step"] == stop
    pretrain(configuration(tmp_path / "run", **options))
    same_end(tmp_path / "whole", tmp_path / "run")


def save_and_end(state, step):
    state.checkpoints.save(step, state.collect(step))
    raise KeyboardInterrupt


def test_an_interruption_in_the_last_step_is_heeded(finished, tmp_path, monkeypatch):
    steps, method = [], Records.add

    def interrupted(self, *args):
        steps.append(method(self, *args))
        if len(steps) == 50:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Records, "add", interrupted)
    with pytest.raises(Interrupted):
        pretrain(configuration(tmp_path / "run"))
    assert not (tmp_path / "run" / "result.json").exists()
    pretrain(configuration(tmp_path / "run"))
    same_end(finished[0], tmp_path / "run")


@pytest.mark.parametrize("saved", [False, True])
def test_what_an_interruption_promises_is_there(tmp_path, capsys, monkeypatch, saved):
    def interrupted(config):
        os.makedirs(os.path.join(config.output, "checkpoints"))
        if saved:
            (tmp_path / "run" / "checkpoints" / "step-000000001.ckpt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("bincomm.pretraining.pretrain", interrupted)
    assert cli.main(["pretrain", *arguments(tmp_path / "run")]) == 130
    words = "resume from the last checkpoint" if saved else "nothing was saved"
    assert words in capsys.readouterr().err


def test_a_corrupt_image_is_named_and_the_run_can_go_on(tmp_path):
    for i in range(70):
        Image.new("RGB", (20, 20), (3 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    good = (tmp_path / "03.png").read_bytes()
    (tmp_path / "03.png").write_bytes(good[:40])
    options = {"data": tmp_path, "max_steps": 4, "batch_size": 35}
    process = start(tmp_path / "run", **options)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 1, text
    assert "1 of 70 images cannot be used, more than max_unusable = 0.01 allows" in text
    assert "03.png" in text
    assert "Traceback" not in text
    process = start(tmp_path / "run", **options, max_unusable=0.02)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    assert text.count("03.png") == 1
    assert (tmp_path / "run" / "unusable.txt").read_text().startswith(f"{tmp_path / '03.png'}\t")


def spoil(folder):
    """Eight unusable files of as many kinds among 160: five in a hundred."""
    rng = np.random.default_rng(0)
    for number in range(152):
        kind = ("png", "jpg", "webp")[number % 3]
        pixels = rng.integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.{kind}")
    png, jpeg, webp = (
        (folder / f"{number:03}.{kind}").read_bytes() for number, kind in enumerate(("png", "jpg", "webp"))
    )
    spoiled = {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "truncated.webp": webp[: len(webp) // 2],
        "empty.jpg": b"",
        "text.png": b"<html>404 Not Found</html>",
        "no_size.png": png[:16] + bytes(8) + png[24:],
        "damaged.png": png[:600] + bytes(100) + png[700:],  # its end is whole: only decoding finds out
    }
    for name, data in spoiled.items():
        (folder / name).write_bytes(data)
    (folder / "vanished.jpg").symlink_to(folder / "elsewhere")
    return {*spoiled, "vanished.jpg"}


def test_unusable_files_of_eight_kinds(tmp_path):
    (tmp_path / "images").mkdir()
    spoiled = spoil(tmp_path / "images")
    options = {"data": tmp_path / "images", "batch_size": 32, "epochs": 2, "max_steps": 10}

    process = start(tmp_path / "run", **options)
    before = process.communicate(timeout=120)[0]
    assert process.returncode == 1, before
    error = next(line for line in before.splitlines() if line.startswith("bincomm: error: "))
    assert "of 160 images cannot be used, more than max_unusable = 0.01 allows" in error
    assert "raise max_unusable" in error
    assert "Traceback" not in before
    assert len((tmp_path / "run" / "unusable.txt").read_text().splitlines()) >= 2  # 1.6 are allowed

    process = start(tmp_path / "run", **options, max_unusable=0.06)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    lines = (tmp_path / "run" / "unusable.txt").read_text().splitlines()
    assert sorted(os.path.basename(line.split("\t")[0]) for line in lines) == sorted(spoiled)
    assert all(line.split("\t")[1] for line in lines)
    named = [line for line in (before + text).splitlines() if line.startswith("left out: ")]
    for name in spoiled:  # those that were named before the run was stopped are not named again
        assert len([line for line in named if f"{os.sep}{name}: " in line]) == 1
    assert "(8 of 160 images so far)" in text


def test_a_file_deleted_while_training(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for number in range(96):
        Image.new("RGB", (20, 20), (2 * number, 0, 0)).save(tmp_path / "images" / f"{number:02}.png")
    options = {"data": tmp_path / "images", "batch_size": 8, "max_steps": 36}
    add = Records.add

    def delete(self, *args):
        (tmp_path / "images" / "07.png").unlink(missing_ok=True)
        add(self, *args)

    monkeypatch.setattr(Records, "add", delete)
    with pytest.raises(TooManyUnusableError, match=r"1 of 96 images .*\n  .*07\.png: No such file"):
        pretrain(configuration(tmp_path / "strict", **options))
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "07.png")
    pretrain(configuration(tmp_path / "run", **options, max_unusable=0.02))
    lines = (tmp_path / "run" / "unusable.txt").read_text().splitlines()
    assert lines == [f"{tmp_path / 'images' / '07.png'}\tNo such file or directory"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "/nonexistent"}, "data: '/nonexistent' does not exist"),
        ({"backbone": "resnet17"}, "did you mean resnet"),
        ({"batch_size": 1}, "batch_size: expected at least 2"),
        ({"bits": 1}, "bits: expected at least 2"),
        ({"batch_size": 2000}, "batch_size: expected at most the number of images, 360, got 2000"),
        ({"device": "cuda"}, "device: cuda was asked for"),
        ({"backbone_args": '{"nonsense": 1}'}, "nonsense"),
        ({"local_size": 13}, "cannot take crops of 13 pixels"),
    ],
)
def test_what_is_wrong_is_told_without_a_traceback(tmp_path, capsys, options, words):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert cli.main(["pretrain", "--quiet", *arguments(tmp_path / "run", **options)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bincomm: error: ")
    assert len(error.strip().splitlines()) == 1
    assert words in error


def test_the_smallest_message_and_the_smallest_batch(tmp_path):
    smallest = {"bits": 2, "batch_size": 2, "hidden": 1, "max_steps": 12, "log_every": 1}
    result = pretrain(configuration(tmp_path, **smallest))
    assert result["last_metrics"]["step"] == 12


def test_defaults_are_the_papers():
    """As they are, or by what auto stands for: ImageNet-1K has 1 281 167 images, 5 004 batches of 256."""
    config = PretrainConfig()
    assert (config.backbone, config.bits, config.epochs) == ("vit_base_patch16_224", 256, 100)
    assert (config.local_crops, config.batch_size, config.beta) == (10, 256, "auto")
    schedule = Schedule(config, epoch_steps=5004, features=768)
    assert (schedule.warmup, schedule.reset_every) == (10 * 5004, 10)
    assert (schedule.momentum, schedule.peak) == (0.996, 5e-4)
    head = Head(768, config.hidden, config.bits, config.head_std)
    assert all(p.std().item() == pytest.approx(0.02, rel=0.02) for p in head.parameters() if p.ndim > 1)
