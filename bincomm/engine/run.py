"""What a run's directory holds, and whether it is the run that is wanted."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from bincomm.config import PretrainConfig, located, read_config
from bincomm.engine.checkpoints import Checkpoints
from bincomm.engine.lock import is_held
from bincomm.files import write_text

logger = logging.getLogger(__name__)


def begin_run(run: Path, config: PretrainConfig) -> bool:
    """Note the configuration in a run's directory, and tell whether it holds a run that is finished.

    Raises:
        ValueError: it holds a run of another configuration, or `config.resume` does not allow what it holds.
    """
    if not has_begun(run):
        if config.resume == "must":
            raise ValueError(f"resume: expected a run in {run} to resume, got none")
        note_config(run, config)
        return False
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun; the run is our own
    if config.resume == "never" and not restarted:
        raise ValueError(f"resume: expected no run in {run}, got one; choose another --output")
    stored = read_config(run, "output")
    refuse_differences(config, stored, str(run))
    finished = is_finished(run)
    if not finished:
        note_config(run, take_steps(config, stored))
    return finished


def precision_of(run: Path, config: PretrainConfig) -> Literal["auto", "bf16", "fp32"]:
    """The precision of a run: that which it began with, where the configuration leaves it to the device."""
    if config.precision_is_open and has_begun(run):
        stored = read_config(run, "output").get("precision")
        if stored in ("bf16", "fp32"):
            return stored
    return config.precision


def has_begun(run: Path) -> bool:
    """Whether a directory holds a run that is finished or can be resumed."""
    return is_finished(run) or bool(Checkpoints(run / "checkpoints", keep=1).steps())


def is_finished(run: Path) -> bool:
    """Whether a directory holds a finished run."""
    return (run / "result.json").exists()


def keeps_initial_weights(run: Path) -> bool:
    """Whether a directory holds an adaptation that made its backbone worse, so that its weights are those
    that it began with."""
    try:
        adaptation = json.loads((run / "adapt.json").read_text())
    except (OSError, RecursionError, ValueError):
        return False
    return isinstance(adaptation, dict) and adaptation.get("kept") == "before"


def take_steps(config: PretrainConfig, stored: dict[str, Any]) -> PretrainConfig:
    """The configuration with what a stored one has come to for the same minutes, if any."""
    if config.steps_are_open and stored.get("minutes") == config.minutes:
        return replace(config, **{key: stored[key] for key in config.open_keys})
    return config


def note_config(run: Path, config: PretrainConfig) -> None:
    """Write a run's config.yaml, which is a recipe that repeats the run from any directory."""
    write_text(run / "config.yaml", dump_config(from_anywhere(config)))


def from_anywhere(config: PretrainConfig) -> PretrainConfig:
    """A configuration whose data, weights and messages mean the same from any directory."""
    keys = ("data", "init_from", "teacher", "messages")
    return replace(config, **{key: located(getattr(config, key)) for key in keys})


def keep_run(run: Path, config: PretrainConfig) -> None:
    """Make a run's directory again, and what `begin_run` wrote in it, where somebody removed it while the run
    goes on: its state is in memory.

    Raises:
        TrainingError: another process has begun a run there.
        OSError: it cannot be made.
    """
    if not (is_held(run) and (run / "config.yaml").exists()):
        logger.warning("%s was removed while the run goes on; it is made again, without what was in it", run)
        note_config(run, config)


def dump_config(config: PretrainConfig) -> str:
    """A configuration as a recipe."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False)


def refuse_differences(config: PretrainConfig, stored: dict[str, Any], where: str) -> None:
    """Raise ValueError naming the keys in which a stored configuration differs from this one."""
    different = config.differences(stored)
    if different:
        # The schedules span the steps, so a run cannot be lengthened, only followed by another one.
        onward = ""
        if different.keys() <= {"epochs", "max_steps", "minutes"} and is_finished(Path(where)):
            onward = f"; to train its network further, add --init_from {where}"
        keys = "; ".join(
            f"{key} was {in_words(was)}, now {in_words(now)}" for key, (was, now) in different.items()
        )
        raise ValueError(
            f"output: {where} holds a run of another configuration ({keys}); choose another --output{onward}"
        )


def in_words(value: Any) -> str:
    """A key's value as a user types it: 10, not 10.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def read_result(run: Path) -> dict[str, Any]:
    """What a finished run's result.json holds.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return json.loads((run / "result.json").read_text())
    except ValueError as error:
        raise ValueError(
            f"output: {run / 'result.json'} is damaged ({error}); remove it to evaluate again"
        ) from error
