"""Metrics of a run in Weights & Biases or MLflow, beside the files in its directory."""

import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from bincomm.config import PretrainConfig
from bincomm.files import write_json

logger = logging.getLogger(__name__)

PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy")}
PROJECT = "bincomm"  # where the tracker's own environment variables name no other
LONGEST_FINISH = 60.0  # seconds that W&B may take at the end to send what is left
ID_FILE = "tracker.json"


class Tracker(Protocol):
    """Takes the metrics of one run."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, finished: bool) -> None: ...


def check_tracker(config: PretrainConfig) -> None:
    """Raise ValueError where the package of the configuration's tracker is missing."""
    for package in PACKAGES.get(config.tracker or "", ()):
        if find_spec(package) is None:
            raise ValueError(
                f"tracker: {config.tracker} needs the package {package}, which is not installed; "
                "install it with: pip install 'bincomm[trackers]'"
            )


class Tracking:
    """Gives metrics to a run's tracker, if its configuration has one. A failure is told once, and then no
    more is given: it never ends a run.

    The identifier of the tracked run is kept in tracker.json, so that a resumed run goes on in the same one.
    """

    def __init__(self, config: PretrainConfig, run: Path):
        self.config, self.run = config, run
        self.tracker: Tracker | None = None
        if config.tracker is not None:
            self._try(self._open)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Give the values of a step."""
        if self.tracker is not None:
            tracker = self.tracker
            self._try(lambda: tracker.log(step, values))

    def close(self, finished: bool) -> None:
        """Close the tracked run, which may go on later if it is not finished."""
        if self.tracker is not None:
            tracker = self.tracker
            self._try(lambda: tracker.close(finished))
            self.tracker = None

    def _open(self) -> None:
        if self.config.tracker == "wandb":
            self.tracker = WandbTracker(self.config, self.run)
        else:
            self.tracker = MlflowTracker(self.config, self.run)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self.tracker = None
            logger.warning(
                "tracker: %s failed (%s); the run goes on without it, and its metrics are in %s",
                self.config.tracker,
                " ".join(str(error).split()),
                self.run,
            )


class WandbTracker:
    """A run of Weights & Biases, with its files in the run's directory; the variables of W&B choose project
    (WANDB_PROJECT), server and whether it sends anything (WANDB_MODE)."""

    def __init__(self, config: PretrainConfig, run: Path):
        import wandb

        identifier = stored_identifier(run, "wandb") or secrets.token_hex(8)
        store_identifier(run, "wandb", identifier)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name_of(run),
            id=identifier,
            resume="allow",
            dir=str(run),
            config=config.as_dict(),
            # Its capture of the terminal would mix with the bar.
            settings=wandb.Settings(console="off", finish_timeout=LONGEST_FINISH),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Give values; those of steps that it has already, before a run was resumed, it leaves out."""
        self.run.log(values, step=step)

    def close(self, finished: bool) -> None:
        """Send what is left."""
        self.run.finish(exit_code=0 if finished else 1)


class MlflowTracker:
    """A run of MLflow, where MLFLOW_TRACKING_URI says, else in mlflow.db in the working directory, and in the
    experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, config: PretrainConfig, run: Path):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        self.identifier = stored_identifier(run, "mlflow") or ""
        if self.identifier:
            self.client.update_run(self.identifier, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.identifier = self.client.create_run(number, run_name=name_of(run)).info.run_id
        store_identifier(run, "mlflow", self.identifier)
        params = [Param(key, str(value)[:500]) for key, value in config.as_dict().items()]  # its limit
        self.client.log_batch(self.identifier, params=params)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Give values; where a run was resumed a step may have the same ones twice."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
        self.client.log_batch(self.identifier, metrics=metrics)

    def close(self, finished: bool) -> None:
        """Say how it ended."""
        self.client.set_terminated(self.identifier, "FINISHED" if finished else "KILLED")


def name_of(run: Path) -> str:
    """The name that a tracker shows."""
    return os.path.basename(os.path.abspath(run)).encode(errors="backslashreplace").decode()


def stored_identifier(run: Path, tracker: str) -> str | None:
    """The identifier of the tracked run, which is of letters and digits; None where there is none yet."""
    try:
        identifier: Any = json.loads((run / ID_FILE).read_text()).get(tracker)
    except (OSError, ValueError, AttributeError):
        return None
    return identifier if isinstance(identifier, str) and identifier.isalnum() else None


def store_identifier(run: Path, tracker: str, identifier: str) -> None:
    """Keep the identifier of the tracked run."""
    write_json(run / ID_FILE, {tracker: identifier})
