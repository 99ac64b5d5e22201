"""The plot of a run's metrics."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from bincomm.files import read_json_lines, write_file


def plot_curves(run: Path) -> None:
    """Draw the run's metrics over its steps into curves.png."""
    records = read_json_lines(run / "metrics.jsonl")
    steps = [record["step"] for record in records]
    panels = [
        ("loss", ["loss"], "nats"),
        ("agreement (ln 2: nothing transmitted)", ["agreement"], "nats per bit"),
        ("coding rate", ["rate"], "nats"),
        ("use of the bits", ["bit_entropy", "bit_entropy_min", "dead_bits"], "bits; share"),
        ("bits predicted right", ["bit_accuracy", "bit_majority"], "share of bits"),
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
    write_file(run / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))
