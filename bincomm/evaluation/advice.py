"""What the figures of a run say about it, and what to try next."""

import math
from typing import Any, NamedTuple

from bincomm.building import trained_part
from bincomm.config import PretrainConfig
from bincomm.engine.collapse import create_monitor
from bincomm.engine.schedules import Schedule
from bincomm.evaluation.evaluate import figure
from bincomm.evaluation.run import trained_figures

FEW_STEPS = 300  # the recipes for CPUs make a run of minutes no shorter, see `fewest_steps`
LITTLE = 0.02  # of the bits: below, next to nothing is transmitted, as in `CollapseMonitor`
MILDER = (
    "milder crops (a larger global_scale, less of jitter, gray, blur and solarize; `bincomm data look` shows "
    "them), --augment for images that are no photographs, and"
)
# What a run is to leave open besides, by the network that it is for; see `bincomm.building.trained_part`.
AUTO = {"teacher": "lr and momentum auto", "student": "lr auto"}


class Finding(NamedTuple):
    """A fact about a run in plain text."""

    good: bool | None  # None: neither, but worth knowing
    fact: str
    advice: str = ""  # what to try next


def judge(
    config: PretrainConfig,
    records: list[dict[str, float]],
    images: int,
    evaluation: dict[str, Any] | None,
) -> list[Finding]:
    """Whether a run works.

    Args:
        records: of its metrics.jsonl.
        images: number of those that it is trained on.
        evaluation: of its result.json; None where there is none (yet).
    """
    findings = _of_channel(config, records)
    if evaluation is not None:
        findings += _of_knn(evaluation)
    # The width of the features determines the learning rate alone, on which no warning depends.
    schedule = Schedule(config, max(1, images // config.batch_size), features=1)
    monitor = create_monitor(config)
    for record in records:
        if schedule.head_has_settled(int(record["step"])):
            for warning in monitor.warnings(record):
                findings.append(Finding(False, f"At step {record['step']} the run warned: {warning}"))
    if skipped := sum(record["skipped"] for record in records):
        findings.append(
            Finding(None, f"Steps that were skipped, as their loss or gradient was not finite: {skipped:g}.")
        )
    if schedule.steps < FEW_STEPS:
        findings.append(
            Finding(
                None,
                f"The run has {schedule.steps} steps, which is few.",
                "More epochs, or a smaller batch_size, so that it has 300 or more.",
            )
        )
    return findings


def _of_channel(config: PretrainConfig, records: list[dict[str, float]]) -> list[Finding]:
    if not records or "transmitted_bits" not in records[-1]:
        return []
    heard = records[-1]["transmitted_bits"]
    if heard < LITTLE * config.bits:
        return [
            Finding(
                False,
                f"Next to nothing is transmitted: {heard:.1f} of {config.bits} bits of a message reach the "
                "student.",
                "What helps where two crops have too little in common: "
                f"{MILDER} {AUTO[trained_part(config)]}.",
            )
        ]
    text = f"{heard:.1f} of {config.bits} bits of a message reach the student, which sees another crop."
    return [Finding(True, text)]


def _of_knn(evaluation: dict[str, Any]) -> list[Finding]:
    name, figures = trained_figures(evaluation)
    queries, trained = figures["query_images"], figure(figures, "knn", "20")
    before = figure(evaluation["before_training"], "knn", "20")
    pixels = figure(evaluation["pixels"], "knn", "20")
    noise = chance_difference(trained, before, queries)
    by_chance = f"with {queries} queries, {100 * noise:.1f} points can be chance"
    if trained > before + noise:
        findings = [Finding(True, f"k-NN is {trained:.1%}, and was {before:.1%} before training.")]
    elif trained < before - noise:
        findings = [
            Finding(
                False,
                f"k-NN is {trained:.1%}, worse than before training ({before:.1%}).",
                "A lower lr, or auto: too high a learning rate has this symptom.",
            )
        ]
    else:
        findings = [
            Finding(
                False,
                f"k-NN is {trained:.1%}, no better than before training ({before:.1%}; {by_chance}).",
                f"A longer run (--epochs); and {MILDER} {AUTO[name]}.",
            )
        ]
    noise = chance_difference(trained, pixels, queries)
    if trained > pixels + noise:
        findings.append(Finding(True, f"That is more than raw pixels give, {pixels:.1%}."))
    else:
        findings.append(
            Finding(
                False if trained < pixels - noise else None,
                f"That is not clearly more than raw pixels give, {pixels:.1%}. Small aligned images, such as "
                "digits, are easy for them.",
                "A longer run: on CIFAR-10 short ones ended near raw pixels (42.6 and 40.0 %), one of 50 "
                "minutes far above them (60.5 and 45.8 %).",
            )
        )
    return findings


def chance_difference(first: float, second: float, queries: int) -> float:
    """The difference between two accuracies, shares of as many queries, that two standard errors make."""
    return 2 * math.sqrt((first * (1 - first) + second * (1 - second)) / queries)
