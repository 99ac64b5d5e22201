"""What is said of a run follows from its figures."""

import pytest

from bincomm.config import PretrainConfig
from bincomm.evaluation.advice import judge

CONFIG = PretrainConfig(data="digits", bits=100, batch_size=10, epochs=4, warmup_epochs=1, precision="fp32")
IMAGES = 1000  # 100 steps an epoch
HEALTHY = {
    "transmitted_bits": 30.0,
    "bit_entropy": 0.9,
    "bit_entropy_min": 0.5,
    "dead_bits": 0.0,
    "rate": 50.0,
}
HEALTHY |= {"agreement": 0.4, "bit_accuracy": 0.8, "bit_majority": 0.6, "skipped": 0}
MUTE = HEALTHY | {"transmitted_bits": 0.5, "bit_accuracy": 0.6, "agreement": 0.69}


def records(values, count=40):
    return [{"step": 10 * (number + 1), **values} for number in range(count)]


def evaluation(teacher, before=0.5, pixels=0.5, queries=400):
    parts = {"teacher": teacher, "before_training": before, "pixels": pixels}
    return {name: {"knn": {"20": share}, "query_images": queries} for name, share in parts.items()}


def judged(lines, *parts):
    return [(finding.good, finding.fact) for finding in judge(CONFIG, lines, IMAGES, *parts)]


def test_a_good_run():
    findings = judge(CONFIG, records(HEALTHY), IMAGES, evaluation(0.7))
    assert [finding.good for finding in findings] == [True] * 3
    assert not any(finding.advice for finding in findings)
    assert findings[0].fact.startswith("30.0 of 100 bits of a message reach the student")
    assert findings[1].fact == "k-NN is 70.0%, and was 50.0% before training."
    assert "raw pixels give, 50.0%" in findings[2].fact


# Of two shares of 0.5 of 400 queries the difference has a standard error of 3.5 points.
@pytest.mark.parametrize(
    ("teacher", "words", "advice"),
    [
        (
            0.56,
            "no better than before training (50.0%; with 400 queries, 7.0 points can be chance)",
            "--epochs",
        ),
        (0.42, "worse than before training (50.0%)", "lower lr"),
    ],
)
def test_features_that_are_no_better(teacher, words, advice):
    bad = judge(CONFIG, records(HEALTHY), IMAGES, evaluation(teacher, pixels=0.1))
    assert [finding.good for finding in bad] == [True, False, True]
    assert words in bad[1].fact
    assert advice in bad[1].advice


@pytest.mark.parametrize(("pixels", "good"), [(0.7, None), (0.9, False), (0.3, True)])
def test_raw_pixels(pixels, good):
    assert judged(records(HEALTHY), evaluation(0.7, pixels=pixels))[-1][0] is good


def test_nothing_transmitted_is_said_with_the_warnings_of_the_run():
    findings = judge(CONFIG, records(MUTE), IMAGES, None)
    assert [finding.good for finding in findings] == [False, False]
    assert "0.5 of 100 bits" in findings[0].fact
    assert "milder crops" in findings[0].advice
    # The warm-up has 100 steps: five reports after it.
    assert findings[1].fact.startswith("At step 150 the run warned: next to nothing is transmitted")


def test_a_warning_of_the_warm_up_is_none():
    assert judged(
        records(MUTE, 10) + [{**line, "step": 100 + line["step"]} for line in records(HEALTHY, 30)], None
    ) == [(True, "30.0 of 100 bits of a message reach the student, which sees another crop.")]


def test_few_steps_and_skipped_ones():
    findings = judge(CONFIG, records(HEALTHY | {"skipped": 2}, 5), 500, None)
    assert [finding.good for finding in findings] == [True, None, None]
    assert findings[1].fact.endswith("not finite: 10.")
    assert "200 steps" in findings[2].fact


def test_other_methods_and_no_records():
    assert judged([{"step": 400, "loss": 1.0, "skipped": 0}], None) == []
    assert judged([], None) == []
