"""The key minutes: how many steps it gives a run, and that the run is from then on an ordinary one."""

import logging
import os
import signal
from types import SimpleNamespace

import pytest
import safetensors.torch
import yaml
from forked import COMMAND
from test_comparison import OPTIONS as COMPARED
from test_distributed import arguments, kill, start_ranks
from test_pretraining import OPTIONS, same_end

from bincomm.adaptation import configure as configure_adaptation
from bincomm.comparison import as_markdown, compare
from bincomm.config import PretrainConfig
from bincomm.configuration import configure, configure_comparison
from bincomm.engine import budget, records
from bincomm.engine.records import Records, duration, in_short
from bincomm.engine.step import Step
from bincomm.files import read_json_lines
from bincomm.pretraining import Interrupted, pretrain

TINY = {key: value for key, value in OPTIONS.items() if key not in ("epochs", "max_steps")}
TINY |= {"recipe": "digits", "log_every": 10, "save_every": 10, "reset_every": "auto"}


def stored(run):
    values = yaml.safe_load((run / "config.yaml").read_text())
    return [values[key] for key in ("minutes", "epochs", "max_steps")]


class Clock:
    """Time in which nothing takes any but the steps, each `seconds`; counts those that were measured."""

    def __init__(self, monkeypatch, seconds):
        self.seconds, self.now, self.steps = seconds, 0.0, 0
        call = Step.__call__

        def step(*args, **options):
            self.now += self.seconds
            self.steps += options["momentum"] == 1.0 and options["lr"] == 0.0
            return call(*args, **options)

        monkeypatch.setattr(Step, "__call__", step)
        fake = SimpleNamespace(perf_counter=lambda: self.now)
        for module in (budget, records):
            monkeypatch.setattr(module, "time", fake)


# Configurations


def test_minutes_and_other_lengths_are_refused_together():
    with pytest.raises(ValueError, match="minutes: expected without epochs and max_steps, got also epochs$"):
        configure("digits", minutes=10, epochs=3)
    with pytest.raises(ValueError, match="got also epochs and max_steps$"):
        configure_comparison("digits", minutes=10, epochs=3, max_steps=4)
    with pytest.raises(ValueError, match="minutes: expected from 0.001 to 10000000, got 0"):
        configure("digits", minutes=0)
    with pytest.raises(ValueError, match="minutes: expected a number or null, got x; .* minutes: 10"):
        configure("digits", minutes="x")


def test_epochs_that_are_given_replace_the_steps_of_the_recipe():
    assert configure("digits").max_steps == 440
    assert (configure("digits", epochs=7).epochs, configure("digits", epochs=7).max_steps) == (7, None)
    assert configure("digits", epochs=7, max_steps=9).max_steps == 9
    assert configure("digits", batch_size=256).steps(epoch_steps=5) == 440


def test_a_length_that_is_given_replaces_that_of_the_recipe(tmp_path):
    recipe, run = str(tmp_path / "mine.yaml"), str(tmp_path / "config.yaml")
    (tmp_path / "mine.yaml").write_text("minutes: 5\nepochs: 7\n")
    (tmp_path / "config.yaml").write_text("minutes: 5\nepochs: 77\nmax_steps: 6000\n")

    def length(config):
        return config.minutes, config.epochs, config.max_steps

    assert length(configure(recipe, data="digits")) == (5, 7, None)
    for configured in (configure, configure_comparison):
        assert length(configured(recipe, data="digits", epochs=3)) == (None, 3, None)
        assert length(configured(recipe, data="digits", max_steps=3)) == (None, 7, 3)
        assert length(configured(recipe, data="digits", minutes=3)) == (3, 7, None)
        # A run's own configuration repeats it, unless another length is given.
        assert length(configured(run, data="digits")) == (5, 77, 6000)
        assert length(configured(run, data="digits", minutes=3)) == (3, 77, None)
        assert length(configured(run, data="digits", epochs=3)) == (None, 3, None)


def test_an_adaptation_does_not_inherit_minutes(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = PretrainConfig(minutes=5, epochs=77, max_steps=6000, backbone="test_vit", bits=8)
    (run / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    safetensors.torch.save_file({}, run / "model.safetensors")
    adapted = configure_adaptation(run, data="digits")
    assert (adapted.minutes, adapted.epochs, adapted.max_steps, adapted.bits) == (None, 10, None, 8)
    adapted = configure_adaptation(run, data="digits", minutes=3)
    assert (adapted.minutes, adapted.max_steps) == (3, None)
    (tmp_path / "mine.yaml").write_text("bits: 16\n")
    adapted = configure_adaptation(run, str(tmp_path / "mine.yaml"), data="digits")
    assert (adapted.minutes, adapted.epochs, adapted.max_steps, adapted.bits) == (None, 77, None, 16)
    adapted = configure_adaptation(run, str(tmp_path / "mine.yaml"), data="digits", minutes=3)
    assert (adapted.minutes, adapted.max_steps) == (3, None)


def test_the_number_of_steps_is_no_difference_until_it_is_chosen():
    chosen = PretrainConfig(minutes=10, epochs=77, max_steps=6000).as_dict()
    assert PretrainConfig(minutes=10).differences(chosen) == {}
    assert PretrainConfig(minutes=20).differences(chosen) == {"minutes": (10, 20)}
    assert PretrainConfig(epochs=77, max_steps=6000).differences(chosen) == {"minutes": (10, None)}
    assert PretrainConfig(minutes=10, epochs=77, max_steps=7000).differences(chosen).keys() == {"max_steps"}


# Runs


@pytest.mark.slow
def test_a_run_of_minutes_is_the_run_of_as_many_steps(few_digits, tmp_path, monkeypatch, caplog):
    """Interrupted, refused with other minutes, and resumed on a machine that is ten times as fast."""
    caplog.set_level(logging.INFO)
    tiny = {**TINY, "data": few_digits}
    clock = Clock(monkeypatch, seconds=0.5)
    add, steps = Records.add, []

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(self, *args)

    config = configure(**tiny, output=tmp_path / "run", minutes=0.25)
    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", interrupted)
        with pytest.raises(Interrupted):
            pretrain(config)
    assert "0.25 minutes at 32 images/s: 30 steps of 16, 1.36 epochs" in caplog.text
    assert stored(tmp_path / "run") == [0.25, 2, 30]
    with pytest.raises(ValueError, match=r"configuration \(minutes was 0.25, now 2\); choose"):
        pretrain(configure(**tiny, output=tmp_path / "run", minutes=2))
    measured, clock.seconds = clock.steps, 0.05
    result = pretrain(config)
    assert result["last_metrics"]["step"] == 30
    assert clock.steps == measured > 0
    assert stored(tmp_path / "run") == [0.25, 2, 30]
    assert pretrain(config) == result  # finished
    assert "too few" not in caplog.text

    pretrain(configure(**tiny, output=tmp_path / "plain", epochs=2, max_steps=30))
    same_end(tmp_path / "run", tmp_path / "plain")
    # And so does the run's configuration, as a recipe.
    again = configure(str(tmp_path / "run" / "config.yaml"), output=tmp_path / "plain")
    assert again.differences(config.as_dict() | {"max_steps": 30, "epochs": 2, "output": again.output}) == {}
    assert clock.steps == measured


@pytest.mark.slow
def test_too_few_minutes_give_the_fewest_steps_and_say_so(few_digits, tmp_path, monkeypatch, caplog):
    Clock(monkeypatch, seconds=60.0)
    pretrain(configure(**TINY, data=few_digits, output=tmp_path / "run", minutes=3))
    assert stored(tmp_path / "run") == [3, 1, 20]
    assert "minutes: 3 are too few, because 3 steps fit" in caplog.text
    assert "the fewest that are of use, 20, and takes about 20 minutes" in caplog.text


def test_a_batch_that_is_given_is_not_made_smaller():
    assert configure("small_images_cpu").fewest_steps == 300
    assert configure("small_images_cpu", batch_size=256).fewest_steps == 0
    assert configure("small_images_cpu", batch_size=256, fewest_steps=50).fewest_steps == 50


@pytest.mark.parametrize(
    ("batch", "fitting", "world", "expected"),
    [
        (64, 300, 1, 64),
        (64, 299, 1, 32),
        (64, 76, 1, 16),
        (64, 20, 1, 16),  # no less
        (24, 20, 1, 24),
        (96, 100, 1, 24),
        (64, 100, 4, 16),
        (72, 20, 4, 36),  # an odd number a rank
        (12, 1, 1, 12),
    ],
)
def test_a_batch_of_which_as_many_fit_as_a_run_needs(batch, fitting, world, expected):
    config = PretrainConfig(batch_size=batch, fewest_steps=300)
    assert budget.smaller_batch(config, fitting, world) == expected
    assert budget.smaller_batch(PretrainConfig(batch_size=batch), fitting, world) == batch


def test_more_steps_of_smaller_batches_where_few_would_fit(few_digits, tmp_path, monkeypatch, caplog):
    """And the run is resumed with that batch, whatever the speed is then."""
    Clock(monkeypatch, seconds=1.0)
    caplog.set_level(logging.INFO)
    keys = TINY | {"data": few_digits, "output": str(tmp_path / "run"), "minutes": 0.5, "fewest_steps": 35}
    keys |= {"batch_size": 32, "max_unusable": 0.0}
    result = pretrain(configure(**keys))
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (values["batch_size"], values["max_steps"], values["minutes"]) == (16, 30, 0.5)
    assert "batches of 16 in place of 32, of which only 30 fit (fewest_steps 35)" in caplog.text
    assert result["last_metrics"]["step"] == 30
    assert pretrain(configure(**keys)) == result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "steps", "told"),
    [
        (9.0, 25, "about 3 minutes for the 22 steps that remain, at 1.78 images/s"),  # after a few slow steps
        (0.9, 90, "about 1 minute for the 75 steps that remain, at 17.8 images/s"),
        (0.1, 25, ""),
    ],
)
def test_a_run_tells_once_how_long_it_will_take(
    few_digits, tmp_path, monkeypatch, caplog, seconds, steps, told
):
    caplog.set_level(logging.INFO)
    Clock(monkeypatch, seconds)
    pretrain(configure(**TINY, data=few_digits, output=tmp_path / "run", max_steps=steps, epochs=100))
    assert caplog.text.count("that remain") == bool(told)
    assert told in caplog.text
    assert all("second" not in key for key in read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(61, "1 minute"), (840, "14 minutes"), (5500, "1.5 hours"), (10 * 86400, "10.0 days")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_numbers_in_short():
    assert [in_short(number) for number in (0.01234, 7.111, 76.8, 640.04, 12345.6)] == [
        "0.0123", "7.11", "76.8", "640", "12346",
    ]  # fmt: skip


RANKS = f"""
import os, time
from bincomm.engine import budget

class Time:  # rank 1 is ten times as slow
    now = 0.0

    def perf_counter(self):
        self.now += 6.0 if os.environ["RANK"] == "0" else 60.0
        return self.now

budget.time = Time()
{COMMAND}
"""


@pytest.mark.long
def test_ranks_take_the_steps_of_rank_0(tmp_path):
    """By its clock the three steps that are measured, the fewest, take six seconds."""
    words = [word for word in arguments(tmp_path / "run", log_every=10) if "max_steps" not in word]
    processes = start_ranks(2, RANKS, ["pretrain", *words, "--minutes=1"])
    try:
        text = "".join(process.communicate(timeout=240)[0] for process in processes)
    finally:
        kill(processes)
    assert [process.returncode for process in processes] == [0, 0], text
    assert text.count("1 minute at 16 images/s: 30 steps of 32") == 1
    assert stored(tmp_path / "run")[2] == 30
    assert "step 30/30" in text


@pytest.mark.long
def test_methods_that_are_compared_get_the_same_steps(few_digits, tmp_path, monkeypatch):
    clock = Clock(monkeypatch, seconds=0.5)
    keys = {key: value for key, value in COMPARED.items() if key != "max_steps"}
    config = configure_comparison(**keys, data=few_digits, output=tmp_path, minutes=0.2)
    table = compare(config, ["bits-reset", "simdino"])
    for method in ("bits-reset", "simdino"):
        assert stored(tmp_path / method) == [0.2, 5, 24]
        assert read_json_lines(tmp_path / method / "metrics.jsonl")[-1]["step"] == 24
    assert "5 epochs, at most 24 steps, chosen for 0.2 minutes" in " ".join(as_markdown(table).split())
    measured, clock.seconds = clock.steps, 0.05
    compare(config, ["dino"])  # with what the others had
    assert stored(tmp_path / "dino") == [0.2, 5, 24]
    assert clock.steps == measured
