"""What each step of a run is given."""

import pytest

from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.engine.schedules import Schedule, cosine, warmup_cosine


def test_cosine_meets_its_ends_and_its_middle():
    values = [cosine(step, 101, 0.996, 1.0) for step in range(101)]
    assert values[0] == 0.996
    assert values[50] == pytest.approx(0.998)
    assert values[100] == 1.0
    assert values == sorted(values)


def test_warm_up_is_linear_and_joins_the_cosine():
    values = [warmup_cosine(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert values[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert values[10] == 1.0
    assert values[99] == pytest.approx(0.1)
    assert values[10:] == sorted(values[10:], reverse=True)


@pytest.mark.parametrize(
    ("epochs", "epoch_steps", "batch_size", "features", "resolved"),
    [
        (10, 30, 64, 768, (30, 14 / 15, 2e-3, 0)),  # 8·√(64/256): short
        (50, 100, 256, 768, (500, 0.996, 1e-3, 0)),  # √(20 000/5 000)
        (50, 100, 256, 384, (500, 0.996, 2e-3, 0)),  # (768/384)²
        (200, 100, 256, 64, (2000, 0.996, 4e-3, 20)),  # at most 8 times; resets every 2000 steps
        (30, 1000, 1024, 1024, (3000, 0.996, 1e-3, 3)),  # no smaller steps for wide backbones
        (1, 40, 256, 768, (4, 0.9, 4e-3, 0)),  # a momentum of at least 0.9
        (100, 5004, 256, 768, (50_040, 0.996, 5e-4, 10)),  # the paper's
    ],
)
def test_what_is_auto_fits_the_run(epochs, epoch_steps, batch_size, features, resolved):
    config = PretrainConfig(epochs=epochs, batch_size=batch_size)
    schedule = Schedule(config, epoch_steps, features)
    warmup, momentum, peak, reset_every = resolved
    assert (schedule.steps, schedule.warmup) == (epochs * epoch_steps, warmup)
    assert schedule.momentum == pytest.approx(momentum)
    assert schedule.peak == pytest.approx(peak)
    assert schedule.reset_every == reset_every
    assert schedule(warmup)["lr"] == schedule.peak  # these are what the steps are given
    assert schedule(0)["lr"] == pytest.approx(peak / warmup)
    assert schedule(0)["momentum"] == schedule.momentum
    resets = [step for step in range(schedule.steps) if schedule.resets_head(step)]
    period = reset_every * epoch_steps
    assert resets == (list(range(period, schedule.steps, period)) if period else [])


def test_the_end_of_a_run_counts_and_not_its_epochs():
    schedule = Schedule(PretrainConfig(max_steps=300), 100, 768)
    assert (schedule.steps, schedule.warmup, schedule.reset_every) == (300, 30, 0)
    assert schedule.momentum == pytest.approx(1 - 20 / 300)


def test_what_is_given_stays():
    config = PretrainConfig(
        epochs=10, batch_size=512, lr=1e-3, momentum=0.7, warmup_epochs=2, reset_every=3, min_lr=0
    )
    for features in (64, 768):
        schedule = Schedule(config, 50, features)
        assert (schedule.warmup, schedule.momentum, schedule.peak) == (100, 0.7, 2e-3)
        assert [step for step in range(500) if schedule.resets_head(step)] == [150, 300, 450]
    assert Schedule(PretrainConfig(reset_every=0), 5004, 768).reset_every == 0
    assert Schedule(PretrainConfig(warmup_epochs=0), 5004, 768).warmup == 0
    assert Schedule(PretrainConfig(warmup_epochs=90), 5004, 768).warmup == 125_100  # a quarter


def test_the_head_has_settled_after_the_warm_up_and_an_epoch_after_each_reset():
    schedule = Schedule(PretrainConfig(epochs=10, warmup_epochs=1, reset_every=4), 50, 768)
    settled = [steps for steps in range(1, 501) if schedule.head_has_settled(steps)]
    assert settled == [*range(51, 201), *range(251, 401), *range(451, 501)]


def test_a_schedule_says_what_it_chose():
    assert Schedule(PretrainConfig(), 5004, 768).describe() == (
        "learning rate 0.0005 after 50040 steps of warm-up, 5e-05 at the end, gradients clipped at 1, "
        "teacher's momentum 0.996, head reset every 10 epochs"
    )
    short = Schedule(PretrainConfig(epochs=3), 100, 256).describe()
    assert short.startswith("learning rate 0.004 after 30 steps of warm-up, 5e-05 at the end")
    assert "teacher's momentum 0.933" in short
    assert short.endswith("head never reset")
    assert (
        Schedule(configure("digits", method="dino"), 22, 128)
        .describe()
        .endswith(
            "1e-06 at the end, gradients clipped at 3, teacher's momentum 0.955, head never reset, "
            "last layer frozen for 1 epochs"
        )
    )


def test_short_runs():
    assert warmup_cosine(0, 1, 0, 1.0, 0.1) == 1.0
    assert cosine(0, 1, 0.5, 1.0) == 0.5
