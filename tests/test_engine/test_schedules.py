import pytest

from bincomm.engine.schedules import cosine, warmup_cosine


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


def test_short_runs():
    assert warmup_cosine(0, 1, 0, 1.0, 0.1) == 1.0
    assert cosine(0, 1, 0.5, 1.0) == 0.5
