"""Seconds of a training step of several ways, measured by turns: what equal time is compared by.

A comparison for as many minutes is one of the machine's other load, too. Here the ways are timed close to
each other, several times, and each then takes as many steps as fit the time by its median, whenever it runs.
"""

from pathlib import Path
from statistics import median

from bincomm.config import PretrainConfig
from bincomm.data.sources import open_source
from bincomm.distributed.ranks import join_ranks
from bincomm.engine import budget

ROUNDS = 5


def seconds_by_turns(configs: dict[str, PretrainConfig]) -> dict[str, list[float]]:
    """Seconds of a step of each, of every round."""
    seconds: dict[str, list[float]] = {way: [] for way in configs}
    for _ in range(ROUNDS):
        for way, config in configs.items():
            output = Path(config.output)
            output.mkdir(parents=True, exist_ok=True)
            with join_ranks(config.device) as ranks:
                measured, _ = budget.measure(config, open_source(config.data), output, ranks)
            seconds[way].append(measured)
    return seconds


def in_words(seconds: dict[str, list[float]]) -> str:
    """The medians, for a line."""
    return ", ".join(f"{way} {median(values):.3f}" for way, values in seconds.items())
