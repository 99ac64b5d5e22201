"""What a run tells while it trains: metrics of the channel, files of them, a bar, warnings."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from bincomm.engine.run import write_text, write_whole

DEAD_SHARE = 0.01  # a bit is dead when it takes its rarer value in less than this share of the messages


def bit_statistics(ones: Tensor, messages: int) -> dict[str, float]:
    """Use of the bits, from how often each of the K bits was 1 in so many messages; entropies in bits."""
    p = ones.double() / messages
    entropy = (0 - torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)) / math.log(2)
    return {
        "bit_entropy": entropy.mean().item(),
        "bit_entropy_min": entropy.min().item(),
        "dead_bits": (torch.minimum(p, 1 - p) < DEAD_SHARE).double().mean().item(),
        "bit_majority": torch.maximum(p, 1 - p).mean().item(),
    }


class Window:
    """Metrics of the steps since the last report, gathered on the device; only reading them syncs."""

    SCALARS = ("loss", "agreement", "rate", "gradient_norm")

    def __init__(self, length: int, bits: int, device: torch.device):
        self.scalars = torch.zeros(length, len(self.SCALARS), device=device)
        self.ones = torch.zeros(bits, dtype=torch.int64, device=device)
        self.equal = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(3, dtype=torch.int64)  # steps, messages, compared bits; on the host

    @torch.no_grad()
    def add(self, losses: dict[str, Tensor], gradient_norm: Tensor, student: Tensor, teacher: Tensor) -> None:
        """One step: its losses, and the logits (V, n, K) of the student and (U, n, K) of the teacher."""
        scalars = [*(losses[name].detach() for name in self.SCALARS[:3]), gradient_norm]
        self.scalars[self.counts[0]] = torch.stack(scalars)
        sent = teacher > 0
        # A view against the other view's message: what the training asks for.
        received = student[: len(teacher)].roll(1, 0) > 0
        self.ones += sent.sum((0, 1))
        self.equal += (sent == received).sum()
        self.counts += torch.tensor([1, sent.shape[0] * sent.shape[1], sent.numel()])

    def first_not_finite(self) -> int | None:
        """How many steps ago the loss or the gradient stopped being finite; None while both are."""
        steps = int(self.counts[0])
        bad = (~torch.isfinite(self.scalars[:steps])).any(1).nonzero()
        return steps - int(bad[0]) - 1 if len(bad) else None

    def report(self) -> dict[str, float]:
        """The window's metrics, and an empty window."""
        steps, messages, compared = self.counts.tolist()
        means = self.scalars[:steps].double().mean(0).tolist()
        metrics = dict(zip(self.SCALARS, means, strict=True))
        metrics |= bit_statistics(self.ones, messages)
        metrics["bit_agreement"] = self.equal.item() / compared
        for value in (self.scalars, self.ones, self.equal, self.counts):
            value.zero_()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("scalars", "ones", "equal", "counts")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)


class Log:
    """The metrics of a run in its files, and the bar on the terminal.

    `metrics.jsonl` holds what the configuration and the seed determine, so that two runs can be compared bit
    for bit; what the machine determines, images a second and the share of time spent waiting for data, is in
    `speed.jsonl`. Both, from `step` on, are written anew: what a killed run wrote after its last checkpoint
    is dropped.
    """

    def __init__(self, run: Path, step: int, steps: int):
        self.files = {name: run / f"{name}.jsonl" for name in ("metrics", "speed")}
        for path in self.files.values():
            kept = [line for line in read_lines(path) if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=None)
        self.since, self.waited, self.images = time.perf_counter(), 0.0, 0

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
        for name, values in (("metrics", metrics), ("speed", speed)):
            with open(self.files[name], "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
        shown = (
            f"loss {metrics['loss']:.4f}  agreement {metrics['agreement']:.4f}  rate {metrics['rate']:.1f}  "
            f"entropy {metrics['bit_entropy']:.2f}  dead {metrics['dead_bits']:.0%}  "
            f"{speed['images_per_second']:.0f} img/s  data {speed['data_wait']:.0%}"
        )
        if self.bar.disable:
            self.say(f"step {step}/{self.bar.total}  {shown}")
        else:
            self.bar.set_postfix_str(shown)

    def say(self, text: str) -> None:
        """A line above the bar."""
        tqdm.write(printable(text))

    def close(self) -> None:
        self.bar.close()
        self.board.close()


def printable(text: str) -> str:
    """Text that the terminal takes, for names of files may be of any bytes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Watch:
    """Warns, once each, when the channel collapses: bits that never change, or bits that carry nothing.

    To be asked while the head has had time to learn: both signs are common in warm-up and after a reset.
    """

    PATIENCE = 5  # reports in a row

    def __init__(self, beta: float):
        self.beta = beta
        self.spells = {"dead": 0, "mute": 0}  # reports in a row so far; below 0: warned of

    def look(self, metrics: dict[str, float]) -> list[str]:
        """The warnings these metrics give rise to."""
        signs = {"dead": metrics["dead_bits"] > 0.5, "mute": metrics["agreement"] > 0.98 * math.log(2)}
        advice = {
            "dead": f"warning: {metrics['dead_bits']:.0%} of the bits are dead (nearly always the same)."
            f" The coding rate is too weak: raise beta (now {self.beta:g}), say to {2 * self.beta:g}, and "
            "begin again with another --output.",
            "mute": f"warning: agreement stays at {metrics['agreement']:.3f}, and ln 2 = 0.693 says that "
            "nothing is transmitted. The coding rate is too strong or the learning rate wrong: lower beta "
            f"(now {self.beta:g}), say to {self.beta / 2:g}, and begin again with another --output.",
        }
        warnings = []
        for name, seen in signs.items():
            if self.spells[name] >= 0:
                self.spells[name] = self.spells[name] + 1 if seen else 0
            if self.spells[name] == self.PATIENCE:
                warnings.append(advice[name])
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
            axes.plot(steps, [record[key] for record in records], label=key)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize="small")
    write_whole(run / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))
