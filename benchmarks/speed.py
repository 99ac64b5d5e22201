"""Equal time for several ways of training, by their speeds, which are measured by turns.

Equal minutes of runs that follow one another compare the machine's other load, too. Here the ways are timed
close to each other, several times, and each then takes as many steps as fit the time by the median of its
speeds, whenever it runs.
"""

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.resumable import Cell, Session
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.data.sources import open_source
from bincomm.distributed.ranks import join_ranks
from bincomm.engine import budget

ROUNDS = 5
LENGTHS = {"minutes", "max_steps", "epochs"}
SPEED = "seconds of a step"


def keys_in_equal_time(
    session: Session, name: str, record: dict[str, Any], ways: dict[str, dict[str, Any]], minutes: float
) -> dict[str, dict[str, Any]]:
    """For each way the keys that give it as many steps as fit, for which a cell measures the speeds; {} where
    its keys say how long it is. Ways whose speed is not known are left out.

    Args:
        name: of what is compared, which the cell's name begins with; "" if nothing else is.
        record: of the cell, beside its own.
        ways: by name, the keys of a run, with data and without an output.
    """
    if any(keys.keys() & LENGTHS for keys in ways.values()):
        return {way: {} for way in ways}
    cell = Cell(
        f"{name}: {SPEED}" if name else SPEED,
        {**record, "way": SPEED},
        partial(_seconds_of, ways),
        in_words,
    )
    session.run([cell])
    seconds = session.figures(cell)
    if session.options.list:
        return {way: {} for way in ways}
    if seconds is None:
        print(f"{', '.join(ways)}: left out, how long a step takes has not been measured")
        return {}
    return {way: length(max(1, int(60 * minutes / median(values)))) for way, values in seconds.items()}


def length(steps: int) -> dict[str, int]:
    """Keys of a run of so many steps, however many epochs they are."""
    return {"epochs": steps, "max_steps": steps}


def _seconds_of(ways: dict[str, dict[str, Any]], folder: Path) -> dict[str, list[float]]:
    configs = {
        way: configure(**{**keys, **length(1000), "output": str(folder / str(number))})
        for number, (way, keys) in enumerate(ways.items())
    }
    return seconds_by_turns(configs)


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
