"""Runs of rising resolution: smaller crops in the first steps, and what is told, saved and resumed."""

import logging
from dataclasses import replace

import pytest
import torch
import yaml
from test_budget import TINY, Clock, stored
from test_distributed import train_on_two
from test_pretraining import same_end

from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.dry_run import Forecast, describe
from bincomm.engine.records import Records
from bincomm.engine.resolution import Resolution
from bincomm.engine.step import Step
from bincomm.files import read_json_lines
from bincomm.pretraining import pretrain

# Globals of 16 and locals of 12 pixels, in patches of 4; paths are dropped at random. The size changes behind
# step 10 of 20.
RISING = {**TINY, "low_resolution": 0.5, "low_resolution_sizes": (8, 8), "max_steps": 20, "epochs": 9}
RISING |= {"log_every": 2, "save_every": 3}


@pytest.fixture
def sizes(monkeypatch):
    """The sides of the crops of every step."""
    call, seen = Step.__call__, []

    def step(self, global_views, local_views, *messages, **options):
        seen.append((global_views.shape[-1], local_views.shape[-1]))
        return call(self, global_views, local_views, *messages, **options)

    monkeypatch.setattr(Step, "__call__", step)
    return seen


class Ended(Exception):
    """Of a run, in place of the power of its machine."""


def end_at(patch, step):
    """Let a run end behind a step, without a word."""
    add = Records.add

    def end(self, steps_done, *args):
        add(self, steps_done, *args)
        if steps_done == step:
            raise Ended

    patch.setattr(Records, "add", end)


def test_the_first_share_of_the_steps_is_of_half_the_size():
    resolution = Resolution(PretrainConfig(low_resolution=0.7), 1001)
    assert [resolution(step) for step in (0, 699, 700, 1000)] == [(112, 48)] * 2 + [(224, 96)] * 2
    assert Resolution(PretrainConfig(), 1001)(0) == (224, 96)
    assert Resolution(PretrainConfig(low_resolution=0.99), 1)(0) == (224, 96)  # the last step never is


@pytest.mark.parametrize(
    ("keys", "pixels", "saved"),
    [
        # 4·2·224² + 3·10·96² = 677 888 pixels pass the networks, of which a quarter are left: 0.8 · 3/4.
        ({}, "48,128, then 192,512 pixels", "60%"),
        # 401 408 are those of the globals: 0.8 · 3/4 · 401 408 / 677 888.
        ({"low_resolution_sizes": (112, 96)}, "117,248, then 192,512 pixels", "36%"),
        # One more forward pass of the student: 0.8 · 3/4 · 501 760 / 870 400.
        ({"low_resolution_sizes": (112, 96), "accumulate": 2}, "117,248, then 192,512 pixels", "35%"),
        ({"local_crops": 0}, "25,088, then 100,352 pixels", "60%"),
    ],
)
def test_what_it_saves_is_told(keys, pixels, saved):
    config = PretrainConfig(low_resolution=0.8, **keys)
    resolution = Resolution(config, 50)
    assert resolution.work(0) == sum(map(resolution.cost, range(50)))
    assert resolution.work(45) == 5 * resolution.cost(45)
    text = resolution.describe()
    assert "in the first 40 of 50 steps" in text
    assert f"{pixels} an image; of what passes through the networks, forward and backward, {saved} is" in text
    forecast = Forecast(config, 9, "", "is new", 50, 1.0, 1, "CPU", 1, 1)
    assert text in describe(forecast)
    assert yaml.safe_load(describe(forecast)) == config.as_dict()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"low_resolution_sizes": (224, 96)}, "less than global_size = 224 and at most local_size = 96, got"),
        ({"low_resolution_sizes": (112, 128)}, r"at most local_size = 96, got \[112, 128\]"),
        ({"global_size": 1}, r"less than global_size = 1 .* got \[0, 48\]"),
    ],
)
def test_sizes_that_are_not_smaller_are_refused(keys, words):
    PretrainConfig(**keys)  # of no matter without low_resolution
    with pytest.raises(ValueError, match=f"^low_resolution_sizes: expected .*{words}"):
        PretrainConfig(**keys, low_resolution=0.5)


def test_sizes_that_the_backbone_cannot_take_are_refused_by_the_name_of_their_key():
    keys = {"backbone": "test_vit", "global_size": 64, "local_size": 32, "low_resolution": 0.5}
    create_networks(PretrainConfig(**keys), torch.device("cpu"))
    for low, pixels in (((40, 32), 40), ((32, 24), 24)):
        config = PretrainConfig(**keys, low_resolution_sizes=low)
        with pytest.raises(ValueError, match=f"low_resolution_sizes: Vision.* crops of {pixels} pixels"):
            create_networks(config, torch.device("cpu"))


@pytest.mark.slow
def test_ended_before_at_and_after_the_change_a_run_goes_on_as_if_it_had_not(
    few_digits, tmp_path, monkeypatch, sizes
):
    keys = {**RISING, "data": few_digits, "accumulate": 2}
    pretrain(configure(**keys, output=tmp_path / "whole"))
    assert sizes == [(8, 8)] * 10 + [(16, 12)] * 10
    sizes.clear()
    config = configure(**keys, output=tmp_path / "run")
    for end, save_every in ((11, 3), (11, 10), (14, 3)):  # what is left is from steps 9, 10 and 12
        with monkeypatch.context() as patch:
            end_at(patch, end)
            with pytest.raises(Ended):
                pretrain(replace(config, save_every=save_every))
    pretrain(config)
    passed = [*range(11), 9, 10, *range(10, 14), *range(12, 20)]
    assert sizes == [(8, 8) if step < 10 else (16, 12) for step in passed]
    same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_the_networks_are_compiled_for_both_sizes(few_digits, tmp_path, monkeypatch, caplog, sizes):
    caplog.set_level(logging.INFO)
    clock, passes = Clock(monkeypatch, seconds=1.0), []

    def compiled(forward, **options):  # in place of what is tested elsewhere
        clock.now += 100

        def passed(*groups):
            passes.append(groups[0].shape[-1])
            return forward(*groups)

        return passed

    monkeypatch.setattr(torch, "compile", compiled)
    end_at(monkeypatch, 4)
    with pytest.raises(Ended):
        pretrain(configure(**RISING | {"max_steps": 4}, data=few_digits, output=tmp_path, compile="on"))
    assert caplog.text.count("torch.compile: both networks") == 2
    assert sizes == [(8, 8)] * 2 + [(16, 12)] * 2
    # Of teacher and student, tried once and then in each of two steps.
    assert passes == [8] * 2 * 3 + [16] * 2 * 3
    # The time that compiling takes is none of the steps'.
    assert [line["images_per_second"] for line in read_json_lines(tmp_path / "speed.jsonl")] == [16, 16]


@pytest.mark.slow
def test_minutes_are_those_of_steps_of_both_sizes(few_digits, tmp_path, monkeypatch, caplog):
    """Of 0.2 and 0.8 s: 0.4 s on average where two thirds are small."""
    caplog.set_level(logging.INFO)
    clock = Clock(monkeypatch, seconds=0.0)
    call = Step.__call__

    def step(self, global_views, *args, **options):
        clock.seconds = 0.2 if global_views.shape[-1] == 8 else 0.8
        return call(self, global_views, *args, **options)

    monkeypatch.setattr(Step, "__call__", step)
    monkeypatch.setattr("bincomm.pretraining.train", lambda *_: None)  # what was chosen is enough
    keys = {key: value for key, value in RISING.items() if key not in ("max_steps", "epochs")}
    keys |= {"low_resolution": 2 / 3, "data": few_digits, "minutes": 0.2}
    pretrain(configure(**keys, output=tmp_path / "run"))
    assert stored(tmp_path / "run") == [0.2, 2, 30]
    assert "80 images/s of low resolution, 20 of full" in caplog.text
    assert "0.2 minutes at 40 images/s: 30 steps of 16" in caplog.text


@pytest.mark.slow
def test_the_time_that_remains_counts_that_later_steps_take_longer(few_digits, tmp_path, monkeypatch, caplog):
    """Of 15 steps of 1 s, then 6 more, then 21 of 2 048 · 4 / (512 · 4) = 4 times as many pixels."""
    caplog.set_level(logging.INFO)
    Clock(monkeypatch, seconds=1.0)
    keys = {**RISING, "data": few_digits, "max_steps": 42, "low_resolution_sizes": None, "global_size": 32}
    keys |= {"local_crops": 0, "log_every": 50}
    end_at(monkeypatch, 16)
    with pytest.raises(Ended):
        pretrain(configure(**keys, output=tmp_path / "run"))
    assert "low resolution: crops of 16 pixels in the first 21 of 42 steps, then of 32: 512" in caplog.text
    assert "about 2 minutes for the 27 steps that remain" in caplog.text  # 90 s, not 27


# Ranks end behind a step, without a word.
DIES = """
import os
from pathlib import Path
from bincomm.engine.records import Records
add = Records.add

def die(self, steps_done, *args):
    add(self, steps_done, *args)
    if steps_done == {step}:
        os._exit(1)

Records.add = die
"""


@pytest.mark.long
def test_two_ranks_that_die_around_the_change_go_on_as_if_they_had_not(tmp_path, few_digits):
    keys = {"low_resolution": 0.5, "low_resolution_sizes": "[8, 8]", "save_every": 3, "accumulate": 2}
    keys |= {"data": few_digits, "drop_path": 0.2, "checkpoint_activations": True}
    statuses, text = train_on_two(tmp_path / "whole", **keys)
    assert statuses == [0, 0], text
    for step in (11, 14):
        statuses, text = train_on_two(tmp_path / "run", DIES.format(step=step), **keys)
        assert all(statuses), text
    statuses, text = train_on_two(tmp_path / "run", **keys)
    assert statuses == [0, 0], text
    assert "resuming at step 12" in text
    same_end(tmp_path / "whole", tmp_path / "run")
