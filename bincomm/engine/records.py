"""Metrics and warnings of a run, in files and on the terminal."""

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from bincomm.config import PretrainConfig
from bincomm.distributed.ranks import Ranks
from bincomm.engine.collapse import CollapseMonitor
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.run import keep_run
from bincomm.engine.schedules import Hyperparameters, Schedule
from bincomm.engine.step import StepOutput
from bincomm.engine.tracking import Tracking
from bincomm.files import read_json_lines, tell_once, write_text
from bincomm.logs import progress_bar

logger = logging.getLogger(__name__)

LINE = {  # formats of the progress line
    "loss": "loss {:.4f}",
    "agreement": "agreement {:.4f}",
    "rate": "rate {:.1f}",
    "beta": "beta {:.2g}",
    "transmitted_bits": "hears {:.1f} of {bits} bits",
    "dense_transmitted_bits": "patches {:.1f}",
    "bit_entropy": "entropy {:.2f}",
    "dead_bits": "dead {:.0%}",
    "images_per_second": "{:.0f} img/s",
    "data_wait": "data {:.0%}",
}

# What a bar shows: with its own text this fits into 120 columns.
SHORT_LINE = ("loss", "transmitted_bits", "rate", "images_per_second", "data_wait")
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

# Steps of this process after which the time that remains is told, and the first of them, which are not
# measured: they are slow, but have batches that were made in advance, so that slow data does not show. Where
# steps are so slow that nothing would be seen for long, it is told sooner, from all but the first.
FORECAST_AFTER, NOT_MEASURED = 15, 5
LONG = 10.0  # seconds without a word
SHORT = 60.0  # seconds; of a run that ends sooner it is not told


class Records:
    """The metrics of a run: gathered step by step, reported every `log_every` steps and at the end.

    Only rank 0 writes and shows them. `metrics.jsonl` holds what the configuration and the seed determine, so
    that two runs can be compared bit for bit, and so does `progress.jsonl`, with k-NN on the way; what the
    machine determines, images a second and the share of time spent waiting for data, is in `speed.jsonl`.
    Lines that a killed run wrote after its last checkpoint are removed when it is resumed. If the disk is
    full, lines are kept in memory and written later.

    Args:
        run: the run's directory.
        window, monitor: gather the metrics and judge them.
    """

    def __init__(
        self,
        config: PretrainConfig,
        run: Path,
        schedule: Schedule,
        window: MetricsWindow,
        monitor: CollapseMonitor,
        ranks: Ranks,
    ):
        self.config, self.run, self.schedule, self.ranks = config, run, schedule, ranks
        self.window, self.monitor = window, monitor
        self.pending: dict[str, list[str]] = {"metrics": [], "speed": []}
        if config.evaluate_every:
            self.pending["progress"] = []
        self.has_warned = False  # whether the warning about a full disk was shown
        self.board: SummaryWriter | None = None
        self.tracking: Tracking | None = None
        self.steps_done = 0
        self.bar = progress_bar(total=schedule.steps, unit="step", disable=True)
        self.started_at, self.waited, self.images = 0.0, 0.0, 0
        # Of this process, to forecast the time.
        self.steps_here, self.has_forecast = 0, False
        self.measured_from = 0, 0.0  # a step, and when it ended

    def start(self, steps_done: int) -> None:
        """Open the files and the bar, and begin to measure the time."""
        if self.ranks.rank == 0:
            for name in self.pending:
                lines = [
                    line for line in read_json_lines(self.run / f"{name}.jsonl") if line["step"] <= steps_done
                ]
                write_text(self.run / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            self.board = open_board(self.run, purge_step=steps_done + 1)
            self.tracking = Tracking(self.config, self.run)
        self.steps_done = steps_done
        self.bar = progress_bar(
            total=self.schedule.steps,
            initial=steps_done,
            unit="step",
            disable=self.ranks.rank > 0,
            bar_format=BAR,
        )
        self.started_at = time.perf_counter()

    def add(
        self, steps_done: int, output: StepOutput, hyperparameters: Hyperparameters, waited: float
    ) -> None:
        """Record one step, which `steps_done` includes, and the seconds it waited for data; report the
        metrics if it is time.

        Raises:
            OSError: after the last step, when metrics are left that cannot be written.
        """
        self.steps_done = steps_done
        self.window.add(output)
        self.images += self.config.batch_size
        self.waited += waited
        self.bar.update()
        self.forecast(steps_done)
        last = steps_done == self.schedule.steps
        if last or steps_done % self.config.log_every == 0:
            epoch = self.schedule.epoch(steps_done - 1)
            metrics = self.window.report()
            extra = {"lr": hyperparameters["lr"], "momentum": hyperparameters["momentum"], "epoch": epoch}
            self.report(steps_done, {**metrics, **extra})
            if self.schedule.head_has_settled(steps_done):
                for warning in self.monitor.warnings(metrics):
                    logger.warning("%s", warning)
        if last:
            self.flush()  # if it raises, the same command does those steps again

    def add_evaluation(self, steps_done: int, measure: Callable[[], dict[str, float]]) -> None:
        """Measure k-NN, on all ranks, and record it; the time that it takes is none of the steps'."""
        with self.paused():
            values = measure()
            if self.ranks.rank == 0 and values:
                self.pending["progress"].append(json.dumps({"step": steps_done, **values}) + "\n")
                with self.kept_for_later():
                    self.flush()
                    self._add_to_board(steps_done, values)
                if self.tracking is not None:
                    self.tracking.log(steps_done, values)
                logger.info(
                    "step %d/%d  k-NN %.1f %%, of codes %.1f %%",
                    steps_done,
                    self.schedule.steps,
                    100 * values["knn"],
                    100 * values["knn_codes"],
                )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count the time that something takes as none of the steps'."""
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        self.started_at += took
        step, since = self.measured_from
        self.measured_from = step, since + took

    def forecast(self, steps_done: int) -> None:
        """Tell once, after the first steps of this process, how long the others will take."""
        self.steps_here += 1
        now = time.perf_counter()
        if self.steps_here in (1, NOT_MEASURED):
            self.measured_from = self.steps_here, now
        first, since = self.measured_from
        is_slow = self.steps_here > first and now - since > LONG
        if not self.has_forecast and (is_slow or self.steps_here == FORECAST_AFTER) and self.ranks.rank == 0:
            self.has_forecast = True
            seconds = (now - since) / (self.steps_here - first)
            remaining = self.schedule.steps - steps_done
            resolution = self.schedule.resolution
            # Steps of full resolution, which are still to come, take longer than those measured.
            seconds_left = seconds * resolution.work(steps_done) / resolution.cost(steps_done - 1)
            if seconds_left > SHORT:
                logger.info(
                    "about %s for the %d steps that remain, at %s images/s",
                    duration(seconds_left),
                    remaining,
                    in_short(self.config.batch_size / seconds),
                )

    def report(self, steps_done: int, metrics: dict[str, float]) -> None:
        """Write and show the metrics of the steps since the last report."""
        elapsed = time.perf_counter() - self.started_at
        speed = {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}
        self.started_at, self.waited, self.images = time.perf_counter(), 0.0, 0
        if self.ranks.rank:
            return
        for name, values in (("metrics", metrics), ("speed", speed)):
            self.pending[name].append(json.dumps({"step": steps_done, **values}) + "\n")
        with self.kept_for_later():
            self.flush()
            self._add_to_board(steps_done, metrics | speed)
        if self.tracking is not None:
            self.tracking.log(steps_done, metrics | speed)
        values = metrics | speed
        texts = {
            key: words.format(values[key], bits=self.config.bits)
            for key, words in LINE.items()
            if key in values
        }
        if self.bar.disable:
            logger.info("step %d/%d  %s", steps_done, self.schedule.steps, "  ".join(texts.values()))
        else:
            self.bar.set_postfix_str("  ".join(texts[key] for key in SHORT_LINE if key in texts))

    @contextlib.contextmanager
    def kept_for_later(self) -> Iterator[None]:
        """Warn, once, where what is to be written cannot be: it stays in memory until there is room."""
        try:
            yield
            self.has_warned = False
        except OSError as error:
            if not self.has_warned:
                logger.warning("metrics could not be written (%s); they are kept until there is room", error)
            self.has_warned = True

    def flush(self) -> None:
        """Write the lines that are not yet in their files.

        Raises:
            OSError: there is no room.
            TrainingError: the run's directory was removed, and another process has begun a run there.
        """
        if self.ranks.rank:
            return
        keep_run(self.run, self.config)
        for name, lines in self.pending.items():
            if not lines:
                continue
            path = self.run / f"{name}.jsonl"
            size = path.stat().st_size if path.exists() else 0
            if not path.exists():
                logger.warning("%s was removed; it goes on with the steps to come", path)
            try:
                with open(path, "a") as file:
                    file.writelines(lines)
            except OSError:
                if path.exists():
                    os.truncate(path, size)  # a line may have been written in part
                raise
            lines.clear()

    def close(self) -> None:
        """Close the bar, the files of TensorBoard and the tracker."""
        self.bar.close()
        if self.tracking is not None:
            self.tracking.close(finished=self.steps_done == self.schedule.steps)
        if self.board is not None:
            with contextlib.suppress(OSError):
                self.board.close()

    def _add_to_board(self, steps_done: int, values: dict[str, float]) -> None:
        # TensorBoard writes in a thread of its own, which dies of a full disk with a traceback.
        if shutil.disk_usage(self.run).free < 1 << 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.run / "tensorboard"))
        try:
            if self.board is None or not (self.run / "tensorboard").exists():
                self.board = open_board(self.run)
            if self.board is None:
                return
            for key, value in values.items():
                self.board.add_scalar(key, value, steps_done)
            self.board.flush()
        except OSError:
            self.board = None  # its thread has ended; another one is tried with the next metrics
            raise


def open_board(run: Path, purge_step: int | None = None) -> SummaryWriter | None:
    """The files of TensorBoard in a run's directory; None where its name is not UTF-8, which they need."""
    try:
        str(run).encode()
    except UnicodeEncodeError:
        tell_once(f"no files for TensorBoard, because the name of {run} is not UTF-8")
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=purge_step)


def duration(seconds: float) -> str:
    """A time in words: minutes, or from 90 minutes on hours, or from 48 hours on days."""
    minutes = seconds / 60
    if minutes >= 48 * 60:
        return f"{minutes / 60 / 24:.1f} days"
    if minutes >= 90:
        return f"{minutes / 60:.1f} hours"
    return f"{minutes:.0f} minute{'s' if round(minutes) != 1 else ''}"


def in_short(number: float) -> str:
    """A positive number with three digits, or more where they stand before the point."""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
