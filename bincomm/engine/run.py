"""What a run's directory holds, and whether it is the run that is wanted."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from bincomm.config import PretrainConfig, read_config
from bincomm.engine.checkpoints import Checkpoints
from bincomm.files import write_text


def begin_run(run: Path, config: PretrainConfig) -> bool:
    """Note the configuration in a run's directory, and tell whether it holds a run that is finished.

    Raises:
        ValueError: it holds a run of another configuration, or `config.resume` does not allow what it holds.
    """
    finished = (run / "result.json").exists()
    if not finished and not Checkpoints(run / "checkpoints", config.keep).steps():
        if config.resume == "must":
            raise ValueError(f"resume: expected a run in {run} to resume, got none")
        write_text(run / "config.yaml", dump_config(config))
        return False
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun; the run is our own
    if config.resume == "never" and not restarted:
        raise ValueError(f"resume: expected no run in {run}, got one; choose another --output")
    refuse_differences(config, read_config(run, "output"), str(run))
    if not finished:
        write_text(run / "config.yaml", dump_config(config))
    return finished


def dump_config(config: PretrainConfig) -> str:
    """A configuration as a recipe."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False)


def refuse_differences(config: PretrainConfig, stored: dict[str, Any], where: str) -> None:
    """Raise ValueError naming the keys in which a stored configuration differs from this one."""
    different = config.differences(stored)
    if different:
        keys = "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in different.items())
        raise ValueError(
            f"output: {where} holds a run of another configuration ({keys}); choose another --output"
        )


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
