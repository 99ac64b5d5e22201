"""Measure the data path on a folder of images: python benchmarks/loader.py FOLDER RESULTS

Writes RESULTS.json, RESULTS.md and RESULTS.png. Every part runs in a process of its own, so that its memory
is that part's alone; the contenders of a table take turns in one process.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.measuring import CORES, GPU, in_words, machine
from benchmarks.torchvision_loader import Images, batches, view_transforms
from bincomm.configuration import configure
from bincomm.data.crops import Crops
from bincomm.data.dali import decode, fn, pipeline_def
from bincomm.data.loader import Loader
from bincomm.data.sources import Files, Source, open_source
from bincomm.distributed.ranks import join_ranks
from bincomm.engine.lock import open_run
from bincomm.engine.run import begin_run
from bincomm.files import write_file, write_json, write_text
from bincomm.pretraining import Signals, train

PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "bincomm")
DEVICE = torch.device("cuda" if GPU else "cpu")
BATCH = 256 if GPU else 64
ROUNDS = 5
CROPS = Crops()  # the paper's: 2 × 224 + 10 × 96
MEMORY_BATCHES, MEMORY_BATCH = 2000, 16
LISTED = 1000  # folders, and files in each


def main() -> None:
    """Measure all parts and write the results, or one part and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="a folder of images")
    parser.add_argument("results", type=Path, help="results are written to this name .json, .md and .png")
    parser.add_argument("--part", choices=[*PARTS, "start"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps((PARTS | {"start": start})[options.part](options.folder)))
        return
    results: dict[str, Any] = {"machine": machine(*PACKAGES), "date": date.today().isoformat()}
    for part in PARTS:
        print(f"{part} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.loader", "--part", part, options.folder, "-"]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[part] = json.loads(process.stdout.splitlines()[-1])
    options.results.parent.mkdir(exist_ok=True)
    write_json(options.results.with_suffix(".json"), results)
    write_text(options.results.with_suffix(".md"), page(results, options.results.name))
    figure = plot(results["memory"])
    write_file(options.results.with_suffix(".png"), lambda file: figure.savefig(file, format="png", dpi=110))
    print(page(results, options.results.name))


def crops(folder: str) -> dict[str, Any]:
    """All crops of a batch, augmented and normalized, in the training process: images a second."""
    source = repeated(folder)
    loader = Loader(source, CROPS, batch_size=BATCH, seed=0, device=DEVICE, threads=CORES)
    contenders: dict[str, Callable[[], Any]] = {"bincomm": loader.next}
    files = list(source.images.names())
    for kind, name in (
        ("v1", "torchvision"),
        ("v2", "torchvision v2"),
        ("tensors", "torchvision v2, tensors"),
    ):
        images = Images(files, view_transforms(CROPS, kind), tensors=kind == "tensors")
        contenders[f"{name}, {CORES} workers"] = endless(images)
    return {"images": len(open_source(folder).images), **measure(contenders)}


def decoding(folder: str) -> dict[str, Any]:
    """Files to RGB images of their own sizes, in the training process: images a second."""
    source = repeated(folder)

    def read() -> list[np.ndarray]:
        return [source.images.read(next(indices)) for _ in range(BATCH)]

    @pipeline_def
    def graph() -> Any:
        return decode(fn.external_source(source=read, batch=True), GPU)

    indices = itertools.cycle(range(len(source.images)))
    device_id = 0 if GPU else None
    pipeline = graph(batch_size=BATCH, num_threads=CORES, prefetch_queue_depth=2, device_id=device_id)
    files = list(source.images.names())
    contenders = {
        "bincomm": pipeline.run,
        f"Pillow, {CORES} workers": endless(Images(files)),
        f"torchvision.io, {CORES} workers": endless(Images(files, tensors=True)),
        f"Pillow, {CORES} workers, images thrown away there": endless(Images(files, discard=True)),
    }
    return measure(contenders, batches=30)


def memory(folder: str) -> dict[str, Any]:
    """Memory of this process over many batches, MiB."""
    loader = Loader(repeated(folder), CROPS, batch_size=MEMORY_BATCH, seed=0, device=DEVICE, threads=CORES)
    resident = []
    for batch in range(MEMORY_BATCHES):
        loader.next()
        if batch % 10 == 9:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * resource.getpagesize() / 2**20)
    return {"batch_size": MEMORY_BATCH, "every": 10, "resident_mib": resident}


def training(folder: str) -> dict[str, Any]:
    """Real steps of training: images a second, and the share of the time that they waited for data."""
    recipe = "vit_small_in1k" if GPU else "resnet18_cpu"
    steps = 120 if GPU else 40
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        options: dict[str, Any] = {
            "recipe": recipe,
            "data": folder,
            "threads": CORES,
            "max_steps": steps,
            "log_every": steps // 4,
        }
        config = configure(**options, output=output)
        with join_ranks(DEVICE.type) as ranks, open_run(output, ranks) as run, Signals(run) as signals:
            begin_run(run, config)
            train(config, open_source(folder), run, ranks, signals)
        lines = [json.loads(line) for line in (Path(output) / "speed.jsonl").read_text().splitlines()]
    later = lines[1:]  # the first steps wait for the pipeline to be built
    return {
        "recipe": recipe,
        "batch_size": config.batch_size,
        "steps": len(later) * config.log_every,
        "images_per_second": statistics.mean(line["images_per_second"] for line in later),
        "data_wait": statistics.mean(line["data_wait"] for line in later),
    }


def listing(folder: str) -> dict[str, Any]:
    """Starting on a million files, empty ones made for it: seconds and memory of the process that does so."""
    results = {"files": LISTED**2}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary, "images")
        for number in range(LISTED):
            (root / f"class{number:04}").mkdir(parents=True)
            for image in range(LISTED):
                (root / f"class{number:04}" / f"image_{number:04}_{image:04}.jpg").touch()
        time.sleep(3)  # a folder that has just changed is not taken from the cache
        environment = os.environ | {"BINCOMM_CACHE": str(Path(temporary, "cache"))}
        for name in ("first start", "second start", "start after a new file in one folder"):
            if name.startswith("start after"):
                (root / "class0007" / "new.jpg").touch()
            command = [sys.executable, "-m", "benchmarks.loader", "--part", "start", str(root), "-"]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            results[name] = json.loads(process.stdout.splitlines()[-1])
    return results


def start(folder: str) -> dict[str, Any]:
    """What happens before the first image is read."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    started = time.perf_counter()
    source = open_source(folder)
    loader = Loader(source, CROPS, batch_size=256, seed=0, device=torch.device("cpu"), threads=CORES)
    loader.order.epoch(0)
    return {
        "images": len(source.images),
        "seconds": time.perf_counter() - started,
        "libraries_mib": before,
        "peak_mib": peak(),
    }


PARTS = {"crops": crops, "decoding": decoding, "training": training, "memory": memory, "listing": listing}


def repeated(folder: str) -> Source:
    """The images of a folder, repeated so that an epoch does not end while it is measured."""
    files = list(open_source(folder).images.names())
    return Source(Files(files * (1 + 50_000 // len(files))))


def endless(images: Images) -> Callable[[], Any]:
    """A function that returns the next batch, without end."""
    return iter(batches(images, BATCH, CORES)).__next__


def measure(contenders: dict[str, Callable[[], Any]], batches: int = 8) -> dict[str, Any]:
    """Images a second of each contender, in turns, so that what slows the machine slows all of them."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, step in contenders.items():
            for _ in range(2 * CORES + 1):  # the batches that its workers made while others were measured
                step()
            if GPU:
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(batches):
                step()
            if GPU:
                torch.cuda.synchronize()
            rate = batches * BATCH / (time.perf_counter() - started)
            rates[name].append(rate)
            time.sleep(2 * CORES * BATCH / rate)  # until its workers are idle: they read as far ahead again
    return {"batch_size": BATCH, "images_per_second": rates}


def page(results: dict[str, Any], name: str) -> str:
    """The Markdown page."""
    lines = [
        "# The data path, measured",
        "",
        f"`make {'gpu-' if GPU else ''}bench-data DATA=FOLDER` on {results['date']}: "
        f"{in_words(results['machine'])}. FOLDER held {results['crops']['images']} images. An image with all "
        f"its crops is one. Medians of {ROUNDS} rounds, least and most in brackets; contenders take turns, "
        "and each was warm.",
    ]
    titles = {
        "crops": f"2 × {CROPS.global_size} and {CROPS.local_crops} × {CROPS.local_size} crops",
        "decoding": "Decoding alone, to RGB in the training process",
    }
    for part, title in titles.items():
        rates = results[part]["images_per_second"]
        reference = statistics.median(rates["bincomm"])
        lines += ["", f"## {title}, batches of {results[part]['batch_size']}", ""]
        lines += ["| | images/s | bincomm is |", "|---|---|---|"]
        for contender, values in rates.items():
            median = statistics.median(values)
            faster = "" if contender == "bincomm" else f"{reference / median:.2f}×"
            lines.append(f"| {contender} | {median:.1f} ({min(values):.1f} – {max(values):.1f}) | {faster} |")
    t, resident = results["training"], results["memory"]["resident_mib"]
    tenth = len(resident) // 10
    early, late = (statistics.mean(part) for part in (resident[tenth : 2 * tenth], resident[-tenth:]))
    lines += [
        "",
        "## Training",
        "",
        f"Recipe `{t['recipe']}`, batches of {t['batch_size']}, {t['steps']} steps: "
        f"{t['images_per_second']:.1f} images/s, {t['data_wait']:.1%} of the time spent waiting for data.",
        "",
        "## Memory",
        "",
        f"Resident memory of the process over {MEMORY_BATCHES} batches of {MEMORY_BATCH}: {early:.0f} MiB in "
        f"the second tenth, {late:.0f} MiB in the last.",
        "",
        f"![Resident memory over batches]({name}.png)",
        "",
        "## Start on a million files",
        "",
        f"{LISTED} folders of {LISTED} empty files on a local disk, from opening the source to the order of "
        "the first epoch; memory is the peak of the whole process, its libraries included.",
        "",
        "| | images | seconds | MiB | of these libraries |",
        "|---|---|---|---|---|",
    ]
    for when, start in results["listing"].items():
        if when != "files":
            lines.append(
                f"| {when} | {start['images']} | {start['seconds']:.1f} | {start['peak_mib']:.0f} | "
                f"{start['libraries_mib']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def plot(memory: dict[str, Any]) -> Figure:
    """Memory over batches."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    resident = memory["resident_mib"]
    axes.plot([memory["every"] * (1 + index) for index in range(len(resident))], resident)
    axes.set(xlabel="batches", ylabel="resident memory, MiB", ylim=(0, None))
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
