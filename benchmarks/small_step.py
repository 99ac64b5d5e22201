"""Measure what PyTorch offers for a small network's step on a CPU: python -m benchmarks.small_step RESULTS

Writes RESULTS.json and RESULTS.md: images a second of the training step of the recipe small_images_cpu, by
the layout of images and convolutions, the precision and torch.compile. All settings take turns.
"""

import argparse
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import in_words, machine
from bincomm.building import create_networks, create_objective
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.engine.batches import Views
from bincomm.engine.job import create_step, prepare
from bincomm.engine.optimizer import create_optimizer
from bincomm.files import write_json, write_text

ROUNDS = 7
STEPS = 4  # of each setting in a round
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, channels last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
    "fp32, compiled": {"compile": "on"},
    "fp32, channels last, compiled": {"compile": "on", "channels_last": True},
    "bf16, channels last, compiled": {"compile": "on", "precision": "bf16", "channels_last": True},
}
RATES: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.04, "momentum": 0.95}


class Contender:
    """A step with crops of its own."""

    def __init__(self, settings: dict[str, Any]):
        defaults: dict[str, Any] = {"channels_last": False, "precision": "fp32", "compile": "off"}
        self.config = configure("small_images_cpu", **(defaults | settings), device="cpu")
        student, teacher = create_networks(self.config, torch.device("cpu"))
        objective, optimizer = create_objective(self.config), create_optimizer(student)
        step = create_step(self.config, student, teacher, objective, optimizer)
        config, locals_ = self.config, self.config.local_crops
        self.crops = Views(crops(config, 2, config.global_size), crops(config, locals_, config.local_size))
        started = time.perf_counter()
        self.step = prepare(step, self.config, self.crops)
        self.run(3)
        self.preparation = time.perf_counter() - started

    def run(self, steps: int) -> float:
        """Seconds that so many steps take."""
        started = time.perf_counter()
        for _ in range(steps):
            self.step(*self.crops, **RATES)
        return time.perf_counter() - started


def crops(config: PretrainConfig, views: int, size: int) -> Tensor:
    """Random crops as the loader makes them."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    images = torch.randn(config.batch_size * views, 3, size, size, dtype=dtype)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images.unflatten(0, (config.batch_size, views))


def main() -> None:
    """Measure all settings in turns, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results are written to this name .json and .md")
    options = parser.parse_args()
    contenders = {name: Contender(settings) for name, settings in SETTINGS.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            times[name].append(contender.run(STEPS) / STEPS)
    config = contenders["fp32"].config
    results = {
        "command": "python -m benchmarks.small_step",
        "date": date.today().isoformat(),
        "machine": machine("torch", "timm", "bincomm"),
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
        "batch_size": config.batch_size,
        "settings": {
            name: {
                "milliseconds": 1e3 * statistics.median(seconds),
                "fastest": 1e3 * min(seconds),
                "slowest": 1e3 * max(seconds),
                "images_per_second": config.batch_size / statistics.median(seconds),
                "preparation_seconds": contenders[name].preparation,
            }
            for name, seconds in times.items()
        },
    }
    options.results.parent.mkdir(exist_ok=True)
    write_json(options.results.with_suffix(".json"), results)
    text = as_markdown(results, config)
    write_text(options.results.with_suffix(".md"), text)
    print(text)


def as_markdown(results: dict[str, Any], config: PretrainConfig) -> str:
    """The table, and how it was measured."""
    first = results["settings"]["fp32"]["images_per_second"]
    lines = [
        "| setting | ms a step (fastest to slowest) | images/s | against fp32 | seconds to prepare |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["settings"].items():
        lines.append(
            f"| {name} | {row['milliseconds']:.0f} ({row['fastest']:.0f} to {row['slowest']:.0f}) "
            f"| {row['images_per_second']:.0f} | {row['images_per_second'] / first:.2f} "
            f"| {row['preparation_seconds']:.0f} |"
        )
    where = in_words(results["machine"])
    notes = (
        f"Recipe small_images_cpu: {config.backbone}, batches of {config.batch_size}, 2 crops of "
        f"{config.global_size} and {config.local_crops} of {config.local_size} pixels, random pixels. "
        f"Medians of {results['rounds']} rounds in turns, {results['threads']} threads. {results['date']}; "
        f"{where}."
    )
    return "\n".join(["# Step of a small network on a CPU", "", *lines, "", notes, ""])


if __name__ == "__main__":
    main()
