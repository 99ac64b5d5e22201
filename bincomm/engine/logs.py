"""What a run tells while it trains: metrics of the channel, files of them, a bar, warnings."""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from bincomm.engine.ranks import Ranks
from bincomm.engine.run import write_text, write_whole
from bincomm.engine.step import Done

DEAD_SHARE = 0.01  # a bit is dead when it takes its rarer value in less than this share of the messages


def binary_entropy(p: Tensor) -> Tensor:
    """`-p log₂ p - (1-p) log₂(1-p)` of shares p, in bits."""
    return (0 - torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)) / math.log(2)


def bit_statistics(ones: Tensor, messages: int) -> dict[str, float]:
    """Use of the bits, from how often each of the K bits was 1 in so many messages; entropies in bits."""
    p = ones.double() / messages
    entropy = binary_entropy(p)
    return {
        "bit_entropy": entropy.mean().item(),
        "bit_entropy_min": entropy.min().item(),
        "dead_bits": (torch.minimum(p, 1 - p) < DEAD_SHARE).double().mean().item(),
        "bit_majority": torch.maximum(p, 1 - p).mean().item(),
    }


class Window:
    """Metrics of the steps since the last report, gathered on the device; only reading them syncs.

    Args:
        length: most steps between two reports.
        scalars: the objective's; the gradient's norm comes to them.
        bits: K where the outputs are bits, whose use is then reported too; else None.
        device: of the steps.
    """

    def __init__(self, length: int, scalars: Sequence[str], bits: int | None, device: torch.device):
        self.names = (*scalars, "gradient_norm")
        self.scalars = torch.zeros(length, len(self.names), device=device)
        self.ones = torch.zeros(bits or 0, dtype=torch.int64, device=device)
        self.equal = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(3, dtype=torch.int64)  # steps, messages, compared bits; on the host

    @torch.no_grad()
    def add(self, done: Done) -> None:
        """One step, and where the outputs are bits what was sent and received."""
        scalars = [*(done.losses[name] for name in self.names[:-1]), done.gradient_norm]
        self.scalars[self.counts[0]] = torch.stack(scalars)
        self.counts[0] += 1
        if len(self.ones):
            sent = done.teacher > 0
            # A view against the other view's message: what the training asks for.
            received = done.student[: len(sent)].roll(1, 0) > 0
            self.ones += sent.sum((0, 1))
            self.equal += (sent == received).sum()
            self.counts += torch.tensor([0, sent.shape[0] * sent.shape[1], sent.numel()])

    def report(self) -> dict[str, float]:
        """The window's metrics, and an empty window. All ranks call it, and get the metrics of all images.

        Scalars are means over the steps in which all of them were finite; "skipped" counts the others.
        """
        steps, messages, compared = self.counts.tolist()
        values = self.scalars[:steps].double()
        scalars, ones, equal = values.clone(), self.ones.clone(), self.equal.clone()
        if dist.is_initialized():
            for value in (scalars, ones, equal):
                dist.all_reduce(value)
            scalars /= dist.get_world_size()
            messages, compared = messages * dist.get_world_size(), compared * dist.get_world_size()
        finite = scalars.isfinite().all(1)
        means = scalars[finite].mean(0).tolist()
        metrics = dict(zip(self.names, means, strict=True))
        metrics["skipped"] = steps - int(finite.sum())
        if len(ones):
            metrics |= bit_statistics(ones, messages)
            metrics["bit_agreement"] = equal.item() / compared
        for value in (self.scalars, self.ones, self.equal, self.counts):
            value.zero_()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank has gathered."""
        return {
            name: getattr(self, name).to("cpu", copy=True) for name in ("scalars", "ones", "equal", "counts")
        }

    def load_state_dicts(self, states: Sequence[dict[str, Tensor]], rank: int, world: int) -> None:
        """Go on from what all ranks had gathered, of which there may have been another number than now."""
        if len(states) == world:
            state = states[rank]
        else:
            state = {name: sum(state[name] for state in states) for name in states[0]}
            state["scalars"] = state["scalars"] / len(states)  # means over the ranks, wherever they lie
            # Sums over the ranks: all of it on one, and of what is counted alike on all a share on each.
            state["ones"], state["equal"] = (state[name] * (rank == 0) for name in ("ones", "equal"))
            state["counts"] = state["counts"] // torch.tensor([len(states), world, world])
        for name, value in state.items():
            getattr(self, name).copy_(value)


class Log:
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
                kept = [line for line in read_lines(run / f"{name}.jsonl") if line["step"] <= step]
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


class Watch:
    """Warns, once each, when the channel collapses, and says what helps.

    To be asked while the head has had time to learn: its signs are common in warm-up and after a reset.

    Args:
        beta: weight of the coding rate where the configuration sets it, as for the method bits; else None.
        floor, ceiling: the least and the largest coding rate there can be, nats.
        hard_bits: whether the agreement is the binary cross-entropy of bits, whose ln 2 means silence.
    """

    PATIENCE = 5  # reports in a row

    def __init__(self, beta: float | None, floor: float, ceiling: float, hard_bits: bool):
        self.beta, self.floor, self.ceiling, self.hard_bits = beta, floor, ceiling, hard_bits
        self.spells = {"dead": 0, "narrow": 0, "flat": 0, "mute": 0}  # reports in a row; below 0: warned of

    def look(self, metrics: dict[str, float]) -> list[str]:
        """The warnings these metrics give rise to."""
        if "bit_entropy" not in metrics:
            return []
        share = (metrics["rate"] - self.floor) / (self.ceiling - self.floor)
        signs = {
            "dead": metrics["dead_bits"] > 0.5,
            "narrow": metrics["bit_entropy"] < 0.2,
            "flat": share < 0.02,
            # No better than by chance, or than always sending the commoner value, where bits do vary.
            "mute": self.hard_bits
            and metrics["bit_entropy"] >= 0.2
            and (
                metrics["bit_agreement"] < metrics["bit_majority"] - 0.01
                or metrics["agreement"] > 0.98 * math.log(2)
            ),
        }
        stronger = "The coding rate is too weak: "
        weaker = "The coding rate is too strong or the learning rate wrong: "
        if self.beta is None:
            stronger += "lower lr"
            weaker += "lower lr"
        else:
            stronger += f"raise beta (now {self.beta:g}), say to {2 * self.beta:g}"
            weaker += f"lower beta (now {self.beta:g}), say to {self.beta / 2:g}"
        words = {
            "dead": f"{metrics['dead_bits']:.0%} of the bits are dead (nearly always the same). {stronger}",
            "narrow": f"a bit carries {metrics['bit_entropy']:.2f} of the 1 bit it could. {stronger}",
            "flat": f"the coding rate, {metrics['rate']:.1f} nats, is near its least, {self.floor:.1f} (its "
            f"ceiling is {self.ceiling:.1f}): all images give the same output. {stronger}",
            "mute": f"nothing is transmitted: {metrics['bit_agreement']:.1%} of the bits agree, "
            f"{metrics['bit_majority']:.1%} would by always sending the commoner value, agreement is "
            f"{metrics['agreement']:.3f} (ln 2 = 0.693: chance), rate at {share:.0%} of its range. {weaker}",
        }
        warnings = []
        for name, seen in signs.items():
            if self.spells[name] >= 0:
                self.spells[name] = self.spells[name] + 1 if seen else 0
            if self.spells[name] == self.PATIENCE:
                warnings.append(f"warning: {words[name]}, and begin again with another --output.")
                self.spells[name] = -1
        return warnings

    def state_dict(self) -> dict[str, int]:
        return dict(self.spells)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.spells = dict(state)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; [] where there is none. A last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def plot_curves(run: Path) -> None:
    """Draw the run's metrics over its steps into curves.png."""
    records = read_lines(run / "metrics.jsonl")
    steps = [record["step"] for record in records]
    panels = [
        ("loss", ["loss"], "nats"),
        ("agreement (ln 2: nothing transmitted)", ["agreement"], "nats per bit"),
        ("coding rate", ["rate"], "nats"),
        ("use of the bits", ["bit_entropy", "bit_entropy_min", "dead_bits"], "bits; share"),
        ("student hears teacher", ["bit_agreement", "bit_majority"], "share of bits"),
        ("learning rate", ["lr"], ""),
    ]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (title, keys, unit) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for key in keys:
            axes.plot(steps, [record.get(key, math.nan) for record in records], label=key)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize="small")
    write_whole(run / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))
