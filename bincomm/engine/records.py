"""What a run tells while it trains: metrics of the channel, files of them, a bar, warnings."""

import contextlib
import errno
import json
import os
import shutil
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from bincomm.distributed.ranks import Ranks
from bincomm.files import read_json_lines, write_text


class Records:
    """The metrics of a run in its files, and the bar on the terminal; nothing on ranks other than the first.

    `metrics.jsonl` holds what the configuration and the seed determine, so that two runs can be compared bit
    for bit; what the machine determines, images a second and the share of time spent waiting for data, is in
    `speed.jsonl`. Both, from `step` on, are written anew: what a killed run wrote after its last checkpoint
    is dropped. What a full disk does not take is kept, and written when there is room.
    """

    def __init__(self, run: Path, step: int, steps: int, ranks: Ranks):
        self.run, self.rank, self.world = run, ranks.rank, ranks.world
        self.bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True, disable=True if self.rank else None
        )
        self.since, self.waited, self.images = time.perf_counter(), 0.0, 0
        self.pending: dict[str, list[str]] = {"metrics": [], "speed": []}
        self.complained = False
        self.board: SummaryWriter | None = None
        if self.rank == 0:
            for name in self.pending:
                kept = [line for line in read_json_lines(run / f"{name}.jsonl") if line["step"] <= step]
                write_text(run / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def step(self, images: int, waited: float) -> None:
        """Count one step of so many images, of which the loop waited `waited` seconds for data."""
        self.images += images
        self.waited += waited
        self.bar.update()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of the steps up to `step`."""
        elapsed = time.perf_counter() - self.since
        speed = {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}
        self.since, self.waited, self.images = time.perf_counter(), 0.0, 0
        if self.rank:
            return
        for name, values in (("metrics", metrics), ("speed", speed)):
            self.pending[name].append(json.dumps({"step": step, **values}) + "\n")
        try:
            self.flush()
            self._show(step, metrics | speed)
            self.complained = False
        except OSError as error:
            if not self.complained:
                self.say(
                    f"warning: metrics could not be written ({error}); they are kept until there is room"
                )
            self.complained = True
        keys = {"loss": "loss {:.4f}", "agreement": "agreement {:.4f}", "rate": "rate {:.1f}"}
        keys |= {"bit_entropy": "entropy {:.2f}", "dead_bits": "dead {:.0%}"}
        parts = [words.format(metrics[key]) for key, words in keys.items() if key in metrics]
        parts += [f"{speed['images_per_second']:.0f} img/s", f"data {speed['data_wait']:.0%}"]
        if self.bar.disable:
            self.say(f"step {step}/{self.bar.total}  {'  '.join(parts)}")
        else:
            self.bar.set_postfix_str("  ".join(parts))

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

    def _show(self, step: int, values: dict[str, float]) -> None:
        # TensorBoard writes in a thread of its own, which dies of a full disk with a traceback.
        if shutil.disk_usage(self.run).free < 1 << 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.run / "tensorboard"))
        try:
            self.board = self.board or SummaryWriter(str(self.run / "tensorboard"))
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
            self.board.flush()
        except OSError:
            self.board = None  # its thread has ended; another is tried with the next metrics
            raise

    def say(self, text: str, everywhere: bool = False) -> None:
        """A line above the bar, of the first rank, or with its number of every rank that has something of its
        own to say."""
        if self.rank and not everywhere:
            return
        tqdm.write(printable(f"rank {self.rank}: {text}" if self.rank else text))

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            with contextlib.suppress(OSError):
                self.board.close()


def printable(text: str) -> str:
    """Text that the terminal takes, for names of files may be of any bytes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
