import json
import math

import pytest
import torch

from bincomm.engine.logs import Log, Watch, Window, bit_statistics, plot_curves, read_lines


def losses(value):
    return {"loss": torch.tensor(value), "agreement": torch.tensor(0.5), "rate": torch.tensor(7.0)}


def test_bit_statistics():
    statistics = bit_statistics(torch.tensor([0, 100, 50, 25, 1]), 100)
    entropies = [0, 0, 1, -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)), 0.0807931]
    assert statistics["bit_entropy"] == pytest.approx(sum(entropies) / 5, rel=1e-5)
    assert statistics["bit_entropy_min"] == 0
    assert statistics["dead_bits"] == pytest.approx(0.4)
    assert statistics["bit_majority"] == pytest.approx((1 + 1 + 0.5 + 0.75 + 0.99) / 5)


def test_window_averages_over_steps_and_compares_views_crosswise():
    window = Window(4, 6, torch.device("cpu"))
    teacher = torch.randn(2, 5, 6)
    student = torch.cat(
        [teacher[1:], teacher[:1], torch.randn(3, 5, 6)]
    )  # each view says the other's message
    window.add(losses(1.0), torch.tensor(2.0), student, teacher)
    window.add(losses(3.0), torch.tensor(4.0), student, teacher)
    metrics = window.report()
    assert metrics["loss"] == 2.0
    assert metrics["gradient_norm"] == 3.0
    assert metrics["bit_agreement"] == 1.0
    expected = bit_statistics((teacher > 0).sum((0, 1)), 10)
    assert metrics["bit_entropy"] == pytest.approx(expected["bit_entropy"])
    window.add(losses(5.0), torch.tensor(0.0), -student, teacher)
    assert window.report()["bit_agreement"] == 0.0


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.inf)])
def test_window_finds_the_step_that_spoiled_the_loss_or_the_gradient(loss, gradient):
    window = Window(4, 6, torch.device("cpu"))
    for value, norm in ((1.0, 1.0), (loss, gradient), (2.0, 1.0)):
        assert window.first_not_finite() in (None, 0)
        window.add(losses(value), torch.tensor(norm), torch.randn(2, 5, 6), torch.randn(2, 5, 6))
    assert window.first_not_finite() == 1


def test_window_goes_on_from_its_state():
    first, second = (Window(4, 6, torch.device("cpu")) for _ in range(2))
    steps = [
        (losses(float(k)), torch.tensor(1.0), torch.randn(2, 5, 6), torch.randn(2, 5, 6)) for k in range(3)
    ]
    for k, step in enumerate(steps):
        first.add(*step)
        if k == 1:
            second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    second.add(*steps[2])
    assert first.report() == second.report()


def test_log_drops_what_came_after_the_checkpoint(tmp_path):
    metrics = {"loss": 1.0, "agreement": 0.5, "rate": 7.0, "bit_entropy": 1.0, "bit_entropy_min": 0.5}
    metrics |= {"dead_bits": 0.0, "bit_agreement": 0.9, "bit_majority": 0.5, "lr": 0.1}
    log = Log(tmp_path, 0, 30)
    for step in (10, 20, 30):
        log.write(step, {**metrics, "loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # cut off by a kill
    log = Log(tmp_path, 20, 30)
    log.write(30, {**metrics, "loss": 31.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in read_lines(tmp_path / "metrics.jsonl")] == [
        (10, 10),
        (20, 20),
        (30, 31),
    ]
    assert [r["step"] for r in read_lines(tmp_path / "speed.jsonl")] == [10, 20, 30]
    assert json.loads((tmp_path / "speed.jsonl").read_text().splitlines()[0]).keys() == {
        "step", "images_per_second", "data_wait",
    }  # fmt: skip
    assert any((tmp_path / "tensorboard").iterdir())
    plot_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_watch_warns_once_of_either_collapse():
    healthy = {"dead_bits": 0.0, "agreement": 0.5}
    dead, mute = {"dead_bits": 0.8, "agreement": 0.1}, {"dead_bits": 0.0, "agreement": 0.692}
    watch = Watch(beta=0.1)
    assert [watch.look(healthy) for _ in range(9)] == [[]] * 9
    assert [watch.look(dead) for _ in range(4)] == [[]] * 4
    assert watch.look(healthy) == []  # a spell that ends is none
    warnings = [warning for _ in range(20) for warning in watch.look(dead)]
    assert len(warnings) == 1
    assert "80% of the bits are dead" in warnings[0]
    assert "raise beta (now 0.1), say to 0.2" in warnings[0]
    resumed = Watch(beta=0.1)
    resumed.load_state_dict(watch.state_dict())
    assert [resumed.look(dead) for _ in range(9)] == [[]] * 9
    warnings = [warning for _ in range(20) for warning in watch.look(mute)]
    assert len(warnings) == 1
    assert "lower beta (now 0.1), say to 0.05" in warnings[0]
