"""Warnings when the channel collapses or is mute."""

import pytest

from bincomm.config import PretrainConfig
from bincomm.engine.collapse import CollapseMonitor, create_monitor

HEALTHY = {"dead_bits": 0.0, "agreement": 0.5, "bit_entropy": 0.9, "rate": 50.0}
HEALTHY |= {"bit_accuracy": 0.8, "bit_majority": 0.6, "transmitted_bits": 3.0}
DEAD = {"dead_bits": 0.8}
MUTE = {"transmitted_bits": 0.1, "bit_accuracy": 0.57, "bit_majority": 0.67}


def new_monitor(beta=0.1):
    return CollapseMonitor(beta=beta, floor=4.0, ceiling=100.0, bits=16)


def warnings_of(monitor, metrics, reports=20):
    return [warning for _ in range(reports) for warning in monitor.warnings(metrics)]


@pytest.mark.parametrize(
    ("symptoms", "words"),
    [
        (DEAD, "80% of the bits are dead"),
        ({"dead_bits": 0.41}, "41% of the bits are dead"),
        ({"bit_entropy": 0.1}, "a bit carries 0.10 of the 1 bit"),
        ({"rate": 5.0}, "rate, 5.0 nats, is near its least, 4.0 (its ceiling is 100.0)"),
        (
            MUTE,
            "next to nothing is transmitted: the student hears 0.1 of 16 bits; it gets 57.0% of them right, "
            "and would get 67.0% by always guessing the more frequent value; the rate is at 48% of its range",
        ),
    ],
)
def test_every_collapse_is_warned_of_once(symptoms, words):
    monitor, bad = new_monitor(), HEALTHY | symptoms
    assert [monitor.warnings(HEALTHY) for _ in range(9)] == [[]] * 9
    assert [monitor.warnings(bad) for _ in range(4)] == [[]] * 4
    assert monitor.warnings(HEALTHY) == []  # a streak that ends does not count
    warnings = warnings_of(monitor, bad)
    assert len(warnings) == 1
    assert words in warnings[0]
    resumed = new_monitor()
    resumed.load_state_dict(monitor.state_dict())
    assert warnings_of(resumed, bad) == []


@pytest.mark.parametrize(
    "harmless",
    [
        {"dead_bits": 0.39},
        {"agreement": 0.692},  # of local crops that say nothing; the global ones are heard
        MUTE | {"transmitted_bits": 0.4},
    ],
)
def test_what_is_no_collapse_is_not_warned_of(harmless):
    assert warnings_of(new_monitor(), HEALTHY | harmless) == []


@pytest.mark.parametrize(("beta", "warned"), [("auto", False), (None, False), (1.0, True)])
def test_too_little_confidence_is_mended_by_a_beta_that_is_found_alone(beta, warned):
    """More bits are predicted than by their frequencies, but hardly a bit is heard."""
    warnings = warnings_of(new_monitor(beta), HEALTHY | MUTE | {"bit_accuracy": 0.7})
    assert ["beta may be too large (now 1)" in warning for warning in warnings] == [True] * warned


@pytest.mark.parametrize(
    ("beta", "of_dead", "of_mute"),
    [
        ("auto", "beta is raised until they are used again", None),
        (0.3, "use beta auto, or raise beta (now 0.3)", "beta may be too large (now 0.3); auto finds it."),
        (0, "use beta auto, or raise beta (now 0)", "beta may be too large (now 0); auto finds it."),
        (None, "Lower lr,", None),
    ],
)
def test_advice_is_what_the_run_can_change(beta, of_dead, of_mute):
    """A number of the configuration can be replaced, a beta that is found cannot, and SimDINO has none."""
    (dead,) = warnings_of(new_monitor(beta), HEALTHY | DEAD)
    (mute,) = warnings_of(new_monitor(beta), HEALTHY | MUTE)
    assert of_dead in dead
    assert "the crops have too little in common or the teacher is too slow" in mute
    if of_mute is None:
        assert "beta" not in mute
    else:
        assert of_mute in mute
    if beta is None:
        assert "beta" not in dead
    for warning in (dead, mute):
        assert warning.endswith("another --output.")


def test_what_an_objective_does_not_have_is_not_judged():
    assert warnings_of(new_monitor(None), {"loss": 1.0}) == []
    # The cosine agreement is no probability of bits, so nothing is said about transmitted ones.
    cosine = HEALTHY | MUTE | {"agreement": 0.999}
    del cosine["transmitted_bits"]
    assert warnings_of(new_monitor(), cosine) == []


@pytest.mark.parametrize(("method", "beta"), [("bits", "auto"), ("bits", 0.2), ("simdino", None)])
def test_a_runs_monitor_knows_its_beta_and_the_range_of_the_rate(method, beta):
    keys = {} if beta is None else {"beta": beta}
    monitor = create_monitor(PretrainConfig(method=method, bits=64, batch_size=32, eps_squared=0.1, **keys))
    assert (monitor.beta, monitor.bits) == (beta, 64)
    assert monitor.floor == pytest.approx(3.2315, abs=1e-4)  # ½·ln(1 + 64/0.1)
    assert monitor.ceiling == pytest.approx(48.7124, abs=1e-4)  # 16·ln(1 + 64/(32·0.1))


@pytest.mark.parametrize("symptom", [DEAD, {"bit_entropy": 0.1}, {"rate": 3.0}, MUTE], ids=str)
@pytest.mark.parametrize("beta", ["auto", 0.1])
def test_advice_under_a_frozen_teacher_is_for_its_student(symptom, beta):
    """Neither a momentum nor a β that is found can help where there are none."""
    config = PretrainConfig(messages="messages", beta=beta, batch_size=64, bits=16)
    (warning,) = warnings_of(create_monitor(config), HEALTHY | symptom | {"rate": symptom.get("rate", 20.0)})
    for word in ("momentum", "beta", "too slow"):
        assert word not in warning
    assert any(word in warning for word in ("--teacher", "another lr", "what the teacher sees"))
