"""Warnings when the channel collapses or is mute."""

import pytest

from bincomm.engine.collapse import CollapseMonitor

HEALTHY = {"dead_bits": 0.0, "agreement": 0.5, "bit_entropy": 0.9, "rate": 50.0}
HEALTHY |= {"bit_accuracy": 0.8, "bit_majority": 0.6}


@pytest.mark.parametrize(
    ("symptoms", "words", "advice"),
    [
        ({"dead_bits": 0.8}, "80% of the bits are dead", "raise beta (now 0.1), say to 0.2"),
        ({"bit_entropy": 0.1}, "a bit carries 0.10 of the 1 bit", "raise beta (now 0.1), say to 0.2"),
        ({"rate": 5.0}, "rate, 5.0 nats, is near its least, 4.0 (its ceiling is 100.0)", "raise beta"),
        ({"agreement": 0.692}, "nothing is transmitted", "lower beta (now 0.1), say to 0.05"),
        (
            {"agreement": 0.62, "bit_accuracy": 0.57, "bit_majority": 0.67},
            "gets 57.0% of the bits right, always guessing the more frequent value 67.0%",
            "lower beta (now 0.1), say to 0.05",
        ),
    ],
)
def test_every_collapse_is_warned_of_once(symptoms, words, advice):
    def new_monitor():
        return CollapseMonitor(beta=0.1, floor=4.0, ceiling=100.0, hard_bits=True)

    monitor, bad = new_monitor(), HEALTHY | symptoms
    assert [monitor.warnings(HEALTHY) for _ in range(9)] == [[]] * 9
    assert [monitor.warnings(bad) for _ in range(4)] == [[]] * 4
    assert monitor.warnings(HEALTHY) == []  # a streak that ends does not count
    warnings = [warning for _ in range(20) for warning in monitor.warnings(bad)]
    assert len(warnings) == 1
    assert words in warnings[0]
    assert advice in warnings[0]
    resumed = new_monitor()
    resumed.load_state_dict(monitor.state_dict())
    assert [resumed.warnings(bad) for _ in range(9)] == [[]] * 9


def test_what_an_objective_does_not_have_is_not_judged():
    monitor = CollapseMonitor(beta=None, floor=4.0, ceiling=100.0, hard_bits=False)
    assert [monitor.warnings({"loss": 1.0}) for _ in range(9)] == [[]] * 9
    cosine = HEALTHY | {"agreement": 0.999}
    assert [monitor.warnings(cosine) for _ in range(9)] == [[]] * 9
    warnings = [warning for _ in range(9) for warning in monitor.warnings(HEALTHY | {"dead_bits": 0.9})]
    assert len(warnings) == 1
    assert "beta" not in warnings[0]
