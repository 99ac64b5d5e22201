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
        ("agreement (ln 2: nothing transmitted)", ["agreement", "agreement_global"], "nats per bit"),
        ("transmitted bits of a message", ["transmitted_bits"], "bits"),
        ("coding rate", ["rate"], "nats"),
        ("weight of the coding rate", ["beta"], ""),
        ("use of the bits", ["bit_entropy", "bit_entropy_min", "dead_bits"], "bits; share"),
        ("bits predicted right", ["bit_accuracy", "bit_majority"], "share of bits"),
        ("learning rate", ["lr"], ""),
    ]
    figure = Figure(figsize=(15, 6))
    for axes, (title, keys, unit) in zip(figure.subplots(2, 4).flat, panels, strict=True):
        for key in keys:
            axes.plot(steps, [record.get(key, math.nan) for record in records], label=key)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize="small")
    figure.subplots_adjust(0.05, 0.08, 0.99, 0.95, wspace=0.25, hspace=0.4)
    write_file(run / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))
