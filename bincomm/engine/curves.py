"""The plot of a run's metrics, and of what came of it."""

import math
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bincomm.files import read_json_lines, write_file


class Panel(NamedTuple):
    """A plot of metrics over the steps."""

    title: str
    keys: tuple[str, ...]  # of a record of metrics.jsonl; those of patches are drawn where there are any
    unit: str


PANELS = (
    Panel("loss", ("loss",), "nats"),
    Panel(
        "agreement (ln 2: nothing transmitted)",
        ("agreement", "agreement_global", "dense_agreement"),
        "nats per bit",
    ),
    Panel("transmitted bits of a message", ("transmitted_bits", "dense_transmitted_bits"), "bits"),
    Panel("coding rate", ("rate", "dense_rate"), "nats"),
    Panel("weight of the coding rate", ("beta", "dense_beta"), ""),
    Panel("use of the bits", ("bit_entropy", "bit_entropy_min", "dead_bits"), "bits; share"),
    Panel("bits predicted right", ("bit_accuracy", "bit_majority"), "share of bits"),
    Panel("learning rate", ("lr",), ""),
)


def plot_curves(run: Path, accuracies: list[tuple[str, float]]) -> None:
    """Draw the run's metrics over its steps into curves.png, and its k-NN accuracies: names and shares."""
    records = read_json_lines(run / "metrics.jsonl")
    figure = Figure(figsize=(13, 8))
    *plots, last = figure.subplots(3, 3).flat
    for axes, panel in zip(plots, PANELS, strict=True):
        draw_metrics(axes, panel, records)
        axes.set(title=panel.title)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    progress = read_json_lines(run / "progress.jsonl")
    if progress:
        draw_progress(last, progress, accuracies)
    else:
        draw_accuracies(last, accuracies)
    figure.subplots_adjust(0.06, 0.06, 0.98, 0.96, wspace=0.3, hspace=0.4)
    write_file(run / "curves.png", lambda file: figure.savefig(file, format="png", dpi=100))


def draw_metrics(axes: Axes, panel: Panel, records: list[dict[str, float]]) -> None:
    """Draw the metrics of a panel, from records of metrics.jsonl."""
    steps = [record["step"] for record in records]
    for key in panel.keys:
        if key.startswith("dense_") and not any(key in record for record in records):
            continue
        axes.plot(steps, [record.get(key, math.nan) for record in records], label=key)
    axes.set(xlabel="step", ylabel=panel.unit)
    axes.grid(alpha=0.3)


def draw_accuracies(axes: Axes, accuracies: list[tuple[str, float]]) -> None:
    """Draw k-NN accuracies, names and shares, as bars."""
    axes.barh(range(len(accuracies)), [100 * share for _, share in accuracies], color="lightsteelblue")
    for place, (name, share) in enumerate(accuracies):
        axes.text(1, place, f"{name}  {share:.1%}", va="center")
    axes.invert_yaxis()
    title = "k-NN accuracy" if accuracies else "no k-NN"
    axes.set(title=title, xlabel="%", yticks=[], xlim=(0, 100))


def draw_progress(axes: Axes, progress: list[dict[str, float]], accuracies: list[tuple[str, float]]) -> None:
    """k-NN on a part of the images while training, and at the end, on all of them, as lines across."""
    steps = [record["step"] for record in progress]
    for key, name in (("knn", "features"), ("knn_codes", "codes")):
        axes.plot(steps, [100 * record[key] for record in progress], marker=".", label=name)
    for number, (name, share) in enumerate(accuracies):
        axes.axhline(100 * share, color=f"C{number}", linestyle=":", label=f"{name} {share:.1%}")
    axes.set(title="k-NN accuracy", xlabel="step", ylabel="%")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
