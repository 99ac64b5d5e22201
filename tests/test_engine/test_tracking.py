"""Trackers get what the files get, go on with a resumed run, and never end one."""

import json
import math
from importlib.util import find_spec

import pytest
from tiny_run import OPTIONS

from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.engine import tracking
from bincomm.engine.tracking import Tracking, check_tracker
from bincomm.files import read_json_lines
from bincomm.pretraining import pretrain

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb: bincomm[trackers]")
needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow: bincomm[trackers]")


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def configuration(output, tracker, **options):
    return configure(**OPTIONS | {"output": output, "tracker": tracker, "batch_size": 256} | options)


def interrupt_and_resume(config, run):
    """A run of 20 steps, which goes on from step 10 as if it had been interrupted."""
    pretrain(config)
    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("*20*"):
        path.unlink()
    pretrain(config)


@pytest.mark.long
@needs_mlflow
def test_mlflow_has_the_metrics_and_the_configuration_of_one_run(tmp_path):
    from mlflow import MlflowClient

    config = configuration(tmp_path / "run", "mlflow", evaluate_every=1)  # of 5 steps
    interrupt_and_resume(config, tmp_path / "run")
    client = MlflowClient()
    (tracked,) = client.search_runs([client.get_experiment_by_name("bincomm").experiment_id])
    identifier = tracked.info.run_id
    assert json.loads((tmp_path / "run" / "tracker.json").read_text()) == {"mlflow": identifier}
    assert (tracked.info.run_name, tracked.info.status) == ("run", "FINISHED")
    assert tracked.data.params["bits"] == "20"
    for name in ("metrics", "progress"):
        lines = read_json_lines(tmp_path / "run" / f"{name}.jsonl")
        for key in lines[0].keys() - {"step"}:
            points = {(point.step, point.value) for point in client.get_metric_history(identifier, key)}
            assert points == {(line["step"], line[key]) for line in lines}, key
    assert client.get_metric_history(identifier, "images_per_second")


@pytest.mark.slow
@needs_wandb
def test_wandb_has_the_metrics_and_the_configuration_of_one_run(tmp_path):
    interrupt_and_resume(configuration(tmp_path / "run", "wandb"), tmp_path / "run")
    identifier = json.loads((tmp_path / "run" / "tracker.json").read_text())["wandb"]
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.name for file in files} == {f"run-{identifier}.wandb"}
    assert {file.parent.name.rpartition("-")[2] for file in files} == {identifier}
    content = b"".join(file.read_bytes() for file in files)
    metrics = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    for key in (*metrics[0], "images_per_second", "resnetv2_18"):
        if key != "step":
            assert key.encode() in content
    for line in metrics:
        assert json.dumps(line["loss"]).encode() in content


def test_a_missing_package_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        words = rf"tracker: {name} needs the package {name}, .*pip install 'bincomm\[trackers\]'"
        with pytest.raises(ValueError, match=words):
            pretrain(configuration(tmp_path / "run", name, data=tmp_path / "none"))
    assert not (tmp_path / "run").exists()
    check_tracker(PretrainConfig(precision="fp32"))  # needs none
    with pytest.raises(ValueError, match="tracker"):
        configuration(tmp_path / "run", "comet")


class Failing:
    """A tracker that fails with its second values."""

    def __init__(self, config, run):
        self.steps = []

    def log(self, step, values):
        self.steps.append(step)
        if len(self.steps) == 2:
            raise ConnectionError("no\nroute")

    def close(self, finished):
        raise AssertionError("it is not used any more")


def test_a_failure_is_told_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "WandbTracker", Failing)
    tracked = Tracking(PretrainConfig(tracker="wandb", precision="fp32"), tmp_path)
    failing = tracked.tracker
    for step in (10, 20, 30):
        tracked.log(step, {"loss": math.pi})
    tracked.close(finished=True)
    assert failing.steps == [10, 20]
    (record,) = caplog.records
    assert "tracker: wandb failed (no route); the run goes on without it" in record.getMessage()


def test_one_that_cannot_be_opened_ends_nothing(tmp_path, monkeypatch, caplog):
    def refuse(config, run):
        raise RuntimeError("no key")

    monkeypatch.setattr(tracking, "MlflowTracker", refuse)
    tracked = Tracking(PretrainConfig(tracker="mlflow", precision="fp32"), tmp_path)
    tracked.log(10, {"loss": 1.0})
    tracked.close(finished=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("content", ["", "[]", '{"wandb": "../x"}', '{"wandb": 3}', '{"mlflow": "a1"}'])
def test_an_identifier_that_is_none_is_not_taken(tmp_path, content):
    (tmp_path / "tracker.json").write_text(content)
    assert tracking.stored_identifier(tmp_path, "wandb") is None
    tracking.store_identifier(tmp_path, "wandb", "a1")
    assert tracking.stored_identifier(tmp_path, "wandb") == "a1"
