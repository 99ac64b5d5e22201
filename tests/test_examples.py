"""examples/minimal.py: its runs are the engine's, and it stays short."""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bincomm
from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.engine.schedules import Schedule
from bincomm.files import read_json_lines
from bincomm.pretraining import pretrain

FILE = Path(bincomm.__file__).parents[1] / "examples" / "minimal.py"

# Small networks, without and with batch norm: their arguments in the engine's configuration, and those that
# the example needs beside them because it does not find them out.
NETWORKS = {
    "test_vit": ({"patch_size": 4, "depth": 2}, {"img_size": 16, "dynamic_img_size": True}),
    "resnetv2_18": ({"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8}, {}),
}


@pytest.fixture
def minimal():
    """The example as a module of its own, so that a test may change what it likes."""
    spec = importlib.util.spec_from_file_location("minimal", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_networks(minimal):
    config = argparse.Namespace(**vars(minimal.DIGITS) | {"hidden": 8, "bits": 4})
    return minimal.create_networks(config)


def test_it_fits_on_a_few_screens():
    assert len(FILE.read_text().splitlines()) <= 170


@pytest.mark.parametrize("recipe", ["PHOTOS", "DIGITS"])
def test_its_recipes_are_those_of_pretrain(minimal, recipe):
    """Of the paper's run and of the digits, with numbers where those say auto."""
    if recipe == "PHOTOS":
        config = resolved(PretrainConfig(), epoch_steps=5004, features=768)
    else:
        config = resolved(configure("digits"), epoch_steps=22, features=128)
    values = vars(getattr(minimal, recipe))
    arguments = dict(values["backbone_args"])
    if recipe == "PHOTOS":
        assert arguments.pop("img_size") == config.global_size
        assert arguments.pop("dynamic_img_size")
    assert arguments.pop("drop_path_rate", 0) == config.drop_path
    assert arguments == config.backbone_args
    assert {key: getattr(config, key) for key in values if key != "backbone_args"} == {
        key: value for key, value in values.items() if key != "backbone_args"
    }
    # What the example does not name in its recipes, as it is alike in both.
    assert (config.beta, config.eps_squared, config.clip, config.seed) == ("auto", 0.05, 1.0, 0)
    assert (config.weight_decay, config.weight_decay_end, config.method) == (0.04, 0.4, "bits")


def resolved(config, epoch_steps, features):
    """With what "auto" stands for, but for beta."""
    schedule = Schedule(config, epoch_steps, features)
    return dataclasses.replace(
        config,
        lr=schedule.peak * 256 / config.batch_size,
        momentum=schedule.momentum,
        warmup_epochs=schedule.warmup / epoch_steps,
        reset_every=schedule.reset_every,
        epochs=schedule.steps // epoch_steps,
    )


def test_a_reset_draws_one_head_for_both_and_clears_its_state_alone(minimal):
    student, teacher = small_networks(minimal)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.randn(2, 1, 3, 16, 16)).sum().backward()
    optimizer.step()
    backbone = [parameter.clone() for parameter in student.backbone.parameters()]

    heads = []
    for seed in (1, 1, 2):
        minimal.reset_head(student, teacher, optimizer, seed)
        heads.append([parameter.clone() for parameter in student.head.parameters()])
        for ours, theirs in zip(student.head.parameters(), teacher.head.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert all(torch.equal(one, other) for one, other in zip(heads[0], heads[1], strict=True))
    assert not torch.equal(heads[1][0], heads[2][0])
    assert all(torch.equal(*pair) for pair in zip(backbone, student.backbone.parameters(), strict=True))
    assert set(optimizer.state) == set(student.backbone.parameters())
    # 0.03·√(2048/8)
    assert heads[0][2].std().item() == pytest.approx(0.48, rel=0.2)


def test_every_gradient_is_clipped_by_itself(minimal):
    gradients, limit = [], math.inf
    for _ in range(2):
        torch.manual_seed(0)
        student, teacher = small_networks(minimal)
        groups = [{"params": student.backbone.parameters()}, {"params": student.head.parameters()}]
        crops = torch.randn(8, 2, 3, 24, 24), torch.randn(8, 2, 3, 16, 16)
        objective, optimizer = bincomm.DiscreteCommunication(), torch.optim.AdamW(groups)
        minimal.train_step(student, teacher, objective, optimizer, crops, 1e-3, 0.04, 0.9, limit)
        gradients.append([parameter.grad for parameter in student.parameters()])
        limit = statistics.median(gradient.norm().item() for gradient in gradients[0])
    for gradient, clipped in zip(*gradients, strict=True):
        torch.testing.assert_close(clipped, gradient * min(1, limit / gradient.norm().item()))
    assert 0 < sum(map(torch.equal, *gradients)) < len(gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "clip", "held"),
    [
        pytest.param("test_vit", 1e9, 15, marks=pytest.mark.long),
        pytest.param("resnetv2_18", 1e9, 15, marks=pytest.mark.long),
        ("resnetv2_18", 1, 5),
    ],
)
def test_its_run_is_the_engines(minimal, tmp_path, monkeypatch, capsys, backbone, clip, held):
    """From equal weights: the losses of all 15 steps, over two resets of the head, the last weights, k-NN.

    Only clipping is computed otherwise: the engine multiplies by a factor in fp64, the example in fp32. So
    the first two runs, in which no gradient is above the limit, are equal bit for bit. In the third, the last
    digit of a clipped gradient differs; AdamW divides gradients by their size, so such differences grow where
    gradients are near 0, and only the first losses can be held to 1e-5.
    """
    arguments, further = NETWORKS[backbone]
    options = {
        "recipe": "digits", "output": tmp_path / "run", "device": "cpu", "log_every": 1, "clip": clip,
        "lr": 8e-3, "momentum": 0.98, "warmup_epochs": 1, "channels_last": False,
        "backbone": backbone, "backbone_args": json.dumps(arguments), "bits": 16, "hidden": 32,
        "global_size": 16, "local_size": 12, "batch_size": 256, "epochs": 3, "reset_every": 1,
    }  # fmt: skip
    config = configure(**options)
    result = pretrain(config)
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*.ckpt")
    end = torch.load(checkpoint, weights_only=True)

    values = {key: getattr(config, key) for key in vars(minimal.DIGITS)}
    values["backbone_args"] = arguments | further
    create, step = minimal.create_networks, minimal.train_step
    networks, steps = [], []

    def create_equal_networks(config_of_the_example):
        networks.extend(create(config_of_the_example))
        for network, initial in zip(networks, create_networks(config, torch.device("cpu")), strict=True):
            load(network, initial.state_dict())
        return networks

    def record(*arguments):
        steps.append({"lr": arguments[-3], "momentum": arguments[-1], **step(*arguments, clip=clip)})
        return steps[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimal.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(minimal, "DIGITS", argparse.Namespace(**values))
    monkeypatch.setattr(minimal, "create_networks", create_equal_networks)
    monkeypatch.setattr(minimal, "train_step", record)
    capsys.readouterr()
    minimal.main()

    assert len(steps) == len(records) == 15
    for step, expected in zip(steps[:held], records, strict=False):
        assert {key: float(value) for key, value in step.items()} == pytest.approx(
            {key: expected[key] for key in step}, rel=1e-5
        )
    if held == len(steps):
        for network, name in zip(networks, ("student", "teacher"), strict=True):
            for value, expected in zip(network.state_dict().values(), end[name].values(), strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-8)
        backbone_state = torch.load("backbone.pt", weights_only=True)
        assert all(map(torch.equal, backbone_state.values(), networks[1].backbone.state_dict().values()))
        printed = dict(re.findall(r"k-NN of ([a-z ]+): (.+)%", capsys.readouterr().out))
        evaluation = result["evaluation"]
        shares = {
            "teacher": evaluation["teacher"]["knn"], "its codes": evaluation["teacher"]["knn_codes"],
            "untrained": evaluation["before_training"]["knn"], "raw pixels": evaluation["pixels"]["knn"],
        }  # fmt: skip
        assert printed == {name: f"{100 * share['20']:.2f}" for name, share in shares.items()}


def load(network, state):
    """Weights by their order, whatever their names."""
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))


def save_images(folder, classes):
    """Twelve images of noise, in a folder a class."""
    for number in range(12):
        path = folder / classes[number % len(classes)] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return [f"--data={folder}", "--backbone=test_vit", "--epochs=1", "--batch_size=6"]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", pytest.param("folder", marks=pytest.mark.long)])
def test_it_runs_as_a_script(tmp_path, data):
    arguments = ["--epochs=1", "--batch_size=512"]
    if data == "folder":
        arguments = save_images(tmp_path / "images", ["even", "odd"])
    environment = {**os.environ, "PYTHONPATH": str(FILE.parents[1]), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(FILE), *arguments]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    number = r"\d+\.\d{4}"
    metrics = rf"loss -?{number}  agreement {number}  rate {number}  beta {number}  bit_entropy [01]\.\d{{4}}"
    for line, step in zip(lines[:2], (1, 2), strict=True):
        assert re.fullmatch(rf"step {step}/2  {metrics}", line), line
    accuracies = dict(re.fullmatch(r"k-NN of ([a-z ]+): (\d+\.\d\d)%", line).groups() for line in lines[2:])
    assert list(accuracies) == ["teacher", "its codes", "untrained", "raw pixels"]
    if data == "digits":
        assert float(accuracies["raw pixels"]) > 95
    assert (tmp_path / "backbone.pt").stat().st_size > 10_000


@pytest.mark.slow
def test_images_without_labels_are_trained_on(minimal, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimal.py", *save_images(tmp_path / "images", ["all"])])
    minimal.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/2", "step 2/2"]
