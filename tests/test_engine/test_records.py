"""The files that a run's metrics are written to."""

import io
import json
import re
import shutil
import sys
import time

import pytest
import torch

from bincomm.config import PretrainConfig
from bincomm.distributed.ranks import ALONE
from bincomm.engine.collapse import create_monitor
from bincomm.engine.curves import plot_curves
from bincomm.engine.guard import TrainingError
from bincomm.engine.lock import is_held
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.records import Records
from bincomm.engine.run import note_config
from bincomm.engine.schedules import Schedule
from bincomm.engine.step import StepOutput
from bincomm.files import read_json_lines

METRICS = {"loss": 1.0, "agreement": 0.5, "rate": 7.0, "bit_entropy": 1.0, "bit_entropy_min": 0.5}
METRICS |= {"dead_bits": 0.0, "bit_accuracy": 0.9, "bit_majority": 0.5, "lr": 0.1, "beta": 0.1}
METRICS |= {"transmitted_bits": 3.25, "agreement_global": 0.4}


def start_records(run, step=0):
    config = PretrainConfig(max_steps=30)
    is_held(run)
    note_config(run, config)
    window = MetricsWindow(config.log_every, ("loss",), None, torch.device("cpu"))
    records = Records(config, run, Schedule(config, 10, 768), window, create_monitor(config), ALONE)
    records.start(step)
    return records


def test_metrics_are_written_when_there_is_room_again_and_at_the_end_or_an_error_tells(tmp_path):
    records = start_records(tmp_path)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "away")
    (tmp_path / "metrics.jsonl").mkdir()  # no file to write to
    records.report(10, {"loss": 1.0})
    with pytest.raises(OSError, match="directory"):
        records.flush()
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "away").rename(tmp_path / "metrics.jsonl")
    records.flush()
    records.flush()
    records.close()
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == [10]


@pytest.mark.parametrize("removed", ["metrics.jsonl", "."])
def test_files_that_were_removed_are_made_again(tmp_path, removed, caplog):
    run = tmp_path / "run"
    run.mkdir()
    records = start_records(run)
    records.report(10, METRICS)
    if removed == ".":
        shutil.rmtree(run)
    else:
        (run / removed).unlink()
    records.report(20, METRICS)
    records.close()
    assert "was removed" in caplog.text
    assert [line["step"] for line in read_json_lines(run / "metrics.jsonl")] == [20]
    assert any((run / "tensorboard").iterdir())
    assert (run / "config.yaml").exists()


def test_a_directory_that_another_process_has_taken_is_left_alone(tmp_path):
    records = start_records(tmp_path)
    (tmp_path / ".bincomm.lock").write_text("elsewhere 77\n")
    with pytest.raises(TrainingError, match="process elsewhere 77 has begun another run there"):
        records.report(10, METRICS)
    records.close()
    assert read_json_lines(tmp_path / "metrics.jsonl") == []


def test_what_came_after_the_checkpoint_is_dropped(tmp_path):
    records = start_records(tmp_path)
    for step in (10, 20, 30):
        records.report(step, {**METRICS, "loss": float(step)})
    records.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # cut off by a kill
    records = start_records(tmp_path, 20)
    records.report(30, {**METRICS, "loss": 31.0})
    records.close()
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 10), (20, 20), (30, 31)]
    assert [line["step"] for line in read_json_lines(tmp_path / "speed.jsonl")] == [10, 20, 30]
    first = json.loads((tmp_path / "speed.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"step", "images_per_second", "data_wait"}
    assert any((tmp_path / "tensorboard").iterdir())
    plots = []
    for accuracies in ([], [("teacher's backbone", 0.9), ("before training", 0.4)]):
        plot_curves(tmp_path, accuracies)
        plots.append((tmp_path / "curves.png").read_bytes())
        assert plots[-1].startswith(b"\x89PNG")
    assert plots[0] != plots[1]


def show_terminal(monkeypatch):
    """A terminal of 120 columns; returns a function that returns the last line on it."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    return lambda: terminal.getvalue().replace("\r", "\n").strip().splitlines()[-1]


def test_a_bar_fits_on_a_terminal_of_120_columns(tmp_path, monkeypatch):
    terminal = show_terminal(monkeypatch)
    records = start_records(tmp_path)
    records.bar.total = 1_000_000
    records.report(10, METRICS | {"rate": 1234.5})
    records.close()
    line = terminal()
    assert len(line) < 120
    assert "loss 1.0000  hears 3.2 of 256 bits  rate 1234.5" in line
    assert line.endswith("%]")


@pytest.mark.parametrize("step", [0, 100_000])
def test_a_bar_shows_what_remains_after_the_first_step(tmp_path, monkeypatch, step):
    terminal = show_terminal(monkeypatch)
    records = start_records(tmp_path)
    records.close()
    records.schedule.steps = 200_000
    records.start(step)
    assert "<?" in terminal()
    time.sleep(0.15)  # tqdm draws no sooner
    one = torch.ones(())
    output = StepOutput({"loss": one}, one, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(()))
    records.add(step + 1, output, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}, 0.0)
    line = terminal()
    records.close()
    hours = int(re.search(r"\[00:00<(\d+):\d\d:\d\d", line)[1])
    seconds = (200_000 - step) * 0.15
    assert seconds <= 3600 * (hours + 1) < 20 * seconds, line


def test_a_report_is_shown_on_one_line(tmp_path, caplog):
    records = start_records(tmp_path)
    with caplog.at_level("INFO", logger="bincomm"):
        records.report(10, METRICS)
    records.close()
    assert (
        "step 10/30  loss 1.0000  agreement 0.5000  rate 7.0  beta 0.1  hears 3.2 of 256 bits" in caplog.text
    )


def test_metrics_that_a_full_disk_did_not_take_are_written_later(tmp_path, monkeypatch, caplog):
    records = start_records(tmp_path)
    records.report(10, METRICS | {"loss": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()

    class Full(io.StringIO):
        def writelines(self, lines):
            with real(tmp_path / "metrics.jsonl", "a") as file:
                file.write('{"step": 2')  # as much as there was room for
            raise OSError(28, "No space left on device")

    real = open
    monkeypatch.setattr("builtins.open", lambda *args, **options: Full())
    records.report(20, METRICS | {"loss": 2.0})
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text() == text
    assert "metrics could not be written" in caplog.text
    records.report(30, METRICS | {"loss": 3.0})
    records.close()
    assert [line["loss"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]
    assert [line["step"] for line in read_json_lines(tmp_path / "speed.jsonl")] == [10, 20, 30]
