import io
import json
import math

import pytest
import torch

from bincomm.bits import bit_statistics
from bincomm.distributed.ranks import ALONE
from bincomm.engine.collapse import CollapseMonitor
from bincomm.engine.curves import plot_curves
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.records import Records
from bincomm.engine.step import StepOutput
from bincomm.files import read_json_lines


def done(loss, gradient_norm, student, teacher):
    losses = {"loss": torch.tensor(loss), "agreement": torch.tensor(0.5), "rate": torch.tensor(7.0)}
    return StepOutput(losses, torch.tensor(gradient_norm), student, teacher)


def new_window():
    return MetricsWindow(4, ("loss", "agreement", "rate"), 6, torch.device("cpu"))


def test_bit_statistics():
    statistics = bit_statistics(torch.tensor([0, 100, 50, 25, 1]), 100)
    entropies = [0, 0, 1, -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)), 0.0807931]
    assert statistics["bit_entropy"] == pytest.approx(sum(entropies) / 5, rel=1e-5)
    assert statistics["bit_entropy_min"] == 0
    assert statistics["dead_bits"] == pytest.approx(0.4)
    assert statistics["bit_majority"] == pytest.approx((1 + 1 + 0.5 + 0.75 + 0.99) / 5)


def test_window_averages_over_steps_and_compares_views_crosswise():
    window = new_window()
    teacher = torch.randn(2, 5, 6)
    student = torch.cat(
        [teacher[1:], teacher[:1], torch.randn(3, 5, 6)]
    )  # each view says the other's message
    window.add(done(1.0, 2.0, student, teacher))
    window.add(done(3.0, 4.0, student, teacher))
    metrics = window.report()
    assert metrics["loss"] == 2.0
    assert metrics["gradient_norm"] == 3.0
    assert metrics["bit_accuracy"] == 1.0
    expected = bit_statistics((teacher > 0).sum((0, 1)), 10)
    assert metrics["bit_entropy"] == pytest.approx(expected["bit_entropy"])
    window.add(done(5.0, 0.0, -student, teacher))
    assert window.report()["bit_accuracy"] == 0.0


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.inf)])
def test_window_counts_the_steps_that_were_skipped_and_averages_the_others(loss, gradient):
    window = new_window()
    for value, norm in ((1.0, 1.0), (loss, gradient), (2.0, 3.0)):
        window.add(done(value, norm, torch.randn(2, 5, 6), torch.randn(2, 5, 6)))
    metrics = window.report()
    assert (metrics["skipped"], metrics["loss"], metrics["gradient_norm"]) == (1, 1.5, 2.0)


def test_window_goes_on_from_its_state():
    first, second = (new_window() for _ in range(2))
    steps = [done(float(k), 1.0, torch.randn(2, 5, 6), torch.randn(2, 5, 6)) for k in range(3)]
    for k, step in enumerate(steps):
        first.add(step)
        if k == 1:
            second.load_state_dicts([first.state_dict()], 0, 1)
    second.add(steps[2])
    assert first.report() == second.report()


@pytest.mark.parametrize("later", [1, 2, 4])
def test_window_of_two_ranks_goes_on_on_any_number(monkeypatch, later):
    """The same metrics, whoever holds what of them."""
    steps = [done(float(k), 1.0, torch.randn(2, 4, 6), torch.randn(2, 4, 6)) for k in range(4)]
    windows = [new_window() for _ in range(2)]
    for number, step in enumerate(steps):
        windows[number % 2].add(step)
    states = [window.state_dict() for window in windows]
    again = [new_window() for _ in range(later)]
    for rank, window in enumerate(again):
        window.load_state_dicts(states, rank, later)

    def report(windows):
        """As of all ranks, of which only the first asks."""
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(windows))
        first, names = windows[0], iter(("scalars", "ones", "equal"))

        def all_reduce(value):
            name = next(names)
            for other in windows[1:]:
                theirs = getattr(other, name)
                value += theirs[: len(value)] if name == "scalars" else theirs

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        return first.report()

    assert report(again) == pytest.approx(report(windows))


def test_log_writes_when_there_is_room_again_and_at_the_end_or_tells(tmp_path, monkeypatch):
    log = Records(tmp_path, 0, 30, ALONE)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "away")
    (tmp_path / "metrics.jsonl").mkdir()  # no file to write to
    log.write(10, {"loss": 1.0})
    with pytest.raises(OSError, match="directory"):
        log.flush()
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "away").rename(tmp_path / "metrics.jsonl")
    log.flush()
    log.flush()
    log.close()
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == [10]


def test_log_drops_what_came_after_the_checkpoint(tmp_path):
    metrics = {"loss": 1.0, "agreement": 0.5, "rate": 7.0, "bit_entropy": 1.0, "bit_entropy_min": 0.5}
    metrics |= {"dead_bits": 0.0, "bit_accuracy": 0.9, "bit_majority": 0.5, "lr": 0.1}
    log = Records(tmp_path, 0, 30, ALONE)
    for step in (10, 20, 30):
        log.write(step, {**metrics, "loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # cut off by a kill
    log = Records(tmp_path, 20, 30, ALONE)
    log.write(30, {**metrics, "loss": 31.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in read_json_lines(tmp_path / "metrics.jsonl")] == [
        (10, 10),
        (20, 20),
        (30, 31),
    ]
    assert [r["step"] for r in read_json_lines(tmp_path / "speed.jsonl")] == [10, 20, 30]
    assert json.loads((tmp_path / "speed.jsonl").read_text().splitlines()[0]).keys() == {
        "step", "images_per_second", "data_wait",
    }  # fmt: skip
    assert any((tmp_path / "tensorboard").iterdir())
    plot_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


HEALTHY = {"dead_bits": 0.0, "agreement": 0.5, "bit_entropy": 0.9, "rate": 50.0}
HEALTHY |= {"bit_accuracy": 0.8, "bit_majority": 0.6}


@pytest.mark.parametrize(
    ("signs", "words", "advice"),
    [
        ({"dead_bits": 0.8}, "80% of the bits are dead", "raise beta (now 0.1), say to 0.2"),
        ({"bit_entropy": 0.1}, "a bit carries 0.10 of the 1 bit", "raise beta (now 0.1), say to 0.2"),
        ({"rate": 5.0}, "rate, 5.0 nats, is near its least, 4.0 (its ceiling is 100.0)", "raise beta"),
        ({"agreement": 0.692}, "nothing is transmitted", "lower beta (now 0.1), say to 0.05"),
        (
            {"agreement": 0.62, "bit_accuracy": 0.57, "bit_majority": 0.67},
            "57.0% of the bits agree, 67.0% would by always sending the commoner value",
            "lower beta (now 0.1), say to 0.05",
        ),
    ],
)
def test_watch_warns_once_of_every_collapse(signs, words, advice):
    def new_watch():
        return CollapseMonitor(beta=0.1, floor=4.0, ceiling=100.0, hard_bits=True)

    watch, bad = new_watch(), HEALTHY | signs
    assert [watch.look(HEALTHY) for _ in range(9)] == [[]] * 9
    assert [watch.look(bad) for _ in range(4)] == [[]] * 4
    assert watch.look(HEALTHY) == []  # a spell that ends is none
    warnings = [warning for _ in range(20) for warning in watch.look(bad)]
    assert len(warnings) == 1
    assert words in warnings[0]
    assert advice in warnings[0]
    resumed = new_watch()
    resumed.load_state_dict(watch.state_dict())
    assert [resumed.look(bad) for _ in range(9)] == [[]] * 9


def test_watch_knows_what_an_objective_has_no_part_in():
    watch = CollapseMonitor(beta=None, floor=4.0, ceiling=100.0, hard_bits=False)
    assert [watch.look({"loss": 1.0}) for _ in range(9)] == [[]] * 9
    assert [watch.look(HEALTHY | {"agreement": 0.999}) for _ in range(9)] == [[]] * 9  # a cosine
    warnings = [warning for _ in range(9) for warning in watch.look(HEALTHY | {"dead_bits": 0.9})]
    assert len(warnings) == 1
    assert "beta" not in warnings[0]


def test_metrics_that_a_full_disk_did_not_take_are_written_later(tmp_path, monkeypatch, capsys):
    log = Records(tmp_path, 0, 30, ALONE)
    log.write(10, HEALTHY | {"loss": 1.0})
    whole = (tmp_path / "metrics.jsonl").read_text()

    class Full(io.StringIO):
        def writelines(self, lines):
            with real(tmp_path / "metrics.jsonl", "a") as file:
                file.write('{"step": 2')  # as much as there was room for
            raise OSError(28, "No space left on device")

    real = open
    monkeypatch.setattr("builtins.open", lambda *args, **options: Full())
    log.write(20, HEALTHY | {"loss": 2.0})
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    assert "metrics could not be written" in capsys.readouterr().out
    log.write(30, HEALTHY | {"loss": 3.0})
    log.close()
    assert [line["loss"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]
    assert [line["step"] for line in read_json_lines(tmp_path / "speed.jsonl")] == [10, 20, 30]
