"""What a run tells while it trains: metrics in files and on the terminal, and warnings."""

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from bincomm.config import PretrainConfig
from bincomm.distributed.ranks import Ranks
from bincomm.engine.collapse import CollapseMonitor
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.schedules import Rates, Schedule
from bincomm.engine.step import StepOutput
from bincomm.files import read_json_lines, write_text
from bincomm.logs import progress_bar

logger = logging.getLogger(__name__)

LINE = {  # of the terminal
    "loss": "loss {:.4f}",
    "agreement": "agreement {:.4f}",
    "rate": "rate {:.1f}",
    "bit_entropy": "entropy {:.2f}",
    "dead_bits": "dead {:.0%}",
    "images_per_second": "{:.0f} img/s",
    "data_wait": "data {:.0%}",
}


class Records:
    """The metrics of a run: gathered step by step, reported every `log_every` steps and at the end.

    Only rank 0 writes and shows them. `metrics.jsonl` holds what the configuration and the seed determine, so
    that two runs can be compared bit for bit; what the machine determines, images a second and the share of
    time spent waiting for data, is in `speed.jsonl`. From `step` on both are written anew: what a killed run
    wrote after its last checkpoint is dropped. What a full disk does not take is kept until there is room.

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
        self.has_warned = False  # that files cannot be written
        self.board: SummaryWriter | None = None
        self.bar = progress_bar(total=schedule.steps, unit="step", disable=True)
        self.started_at, self.waited, self.images = 0.0, 0.0, 0

    def start(self, step: int) -> None:
        """Open the files and the bar, and begin to measure the time, after so many steps."""
        if self.ranks.rank == 0:
            for name in self.pending:
                lines = [line for line in read_json_lines(self.run / f"{name}.jsonl") if line["step"] <= step]
                write_text(self.run / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1)
        self.bar = progress_bar(
            total=self.schedule.steps, initial=step, unit="step", disable=self.ranks.rank > 0
        )
        self.started_at = time.perf_counter()

    def add(self, step: int, output: StepOutput, rates: Rates, waited: float) -> None:
        """Add the step that makes `step` steps, its rates, and the seconds it waited for data; report where
        it is time.

        Raises:
            OSError: after the last step, when metrics are left that cannot be written.
        """
        self.window.add(output)
        self.images += self.config.batch_size
        self.waited += waited
        self.bar.update()
        last = step == self.schedule.steps
        if last or step % self.config.log_every == 0:
            epoch = self.schedule.epoch(step - 1)
            metrics = self.window.report()
            extra = {"lr": rates["lr"], "momentum": rates["momentum"], "epoch": epoch}
            self.report(step, {**metrics, **extra})
            if self.schedule.has_learned(step):
                for warning in self.monitor.warnings(metrics):
                    logger.warning("%s", warning)
        if last:
            self.flush()  # if it raises, the same command does those steps again

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of the steps up to `step`, and show them."""
        elapsed = time.perf_counter() - self.started_at
        speed = {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}
        self.started_at, self.waited, self.images = time.perf_counter(), 0.0, 0
        if self.ranks.rank:
            return
        for name, values in (("metrics", metrics), ("speed", speed)):
            self.pending[name].append(json.dumps({"step": step, **values}) + "\n")
        try:
            self.flush()
            self._add_to_board(step, metrics | speed)
            self.has_warned = False
        except OSError as error:
            if not self.has_warned:
                logger.warning("metrics could not be written (%s); they are kept until there is room", error)
            self.has_warned = True
        values = metrics | speed
        text = "  ".join(words.format(values[key]) for key, words in LINE.items() if key in values)
        if self.bar.disable:
            logger.info("step %d/%d  %s", step, self.schedule.steps, text)
        else:
            self.bar.set_postfix_str(text)

    def flush(self) -> None:
        """Write the lines that are not yet in their files.

        Raises:
            OSError: there is no room.
        """
        for name, lines in self.pending.items():
            if not lines:
                continue
            path = self.run / f"{name}.jsonl"
            size = path.stat().st_size
            try:
                with open(path, "a") as file:
                    file.writelines(lines)
            except OSError:
                os.truncate(path, size)  # a line may have been written in part
                raise
            lines.clear()

    def close(self) -> None:
        """Close the bar and the files of TensorBoard."""
        self.bar.close()
        if self.board is not None:
            with contextlib.suppress(OSError):
                self.board.close()

    def _add_to_board(self, step: int, values: dict[str, float]) -> None:
        # TensorBoard writes in a thread of its own, which dies of a full disk with a traceback.
        if shutil.disk_usage(self.run).free < 1 << 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.run / "tensorboard"))
        try:
            self.board = self.board or SummaryWriter(str(self.run / "tensorboard"))
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
            self.board.flush()
        except OSError:
            self.board = None  # its thread has ended; another one is tried with the next metrics
            raise
