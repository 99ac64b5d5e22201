"""Measure a step of training against a plain PyTorch loop: python -m benchmarks.step RESULTS

Writes RESULTS.json and RESULTS.md. Every case runs in a process of its own, so that the memory it takes is
its own; its contenders begin with the same weights and crops, have to arrive at the same loss, and take
turns.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain_loop
from benchmarks.measuring import GPU, in_words, machine, product_tflops
from bincomm.building import create_networks, create_objective
from bincomm.config import PretrainConfig
from bincomm.engine.compiling import compile_networks
from bincomm.engine.job import create_step
from bincomm.engine.optimizer import create_optimizer
from bincomm.files import write_json, write_text

DEVICE = torch.device("cuda" if GPU else "cpu")
ROUNDS = 5
STEPS = 8 if GPU else 1  # per turn of a contender
PARTS = ("teacher", "student", "loss", "backward", "clip", "optimizer", "average")
AROUND = ("loss", "clip", "average")  # all but the networks
RATES: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.04, "momentum": 0.996}
PEAK = 989.4  # dense bf16 TFLOP/s of H100 and H200 (SXM), by their data sheets
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """What is trained: crops are 2 of `global_size` and 10 of `local_size`."""

    backbone: str
    precision: Literal["bf16", "fp32"]
    images: int
    global_size: int = 224
    local_size: int = 96
    arguments: dict[str, Any] = {}  # noqa: RUF012  (of the backbone; never changed)

    def config(self) -> PretrainConfig:
        """As a run has it, with the paper's β; no path is dropped, as the draws would differ."""
        return PretrainConfig(
            backbone=self.backbone,
            backbone_args=self.arguments,
            batch_size=self.images,
            global_size=self.global_size,
            local_size=self.local_size,
            precision=self.precision,
            drop_path=0.0,
            beta=0.1,  # a number, as the plain loop has
        )

    def title(self) -> str:
        patch = self.arguments.get("patch_size", 16)
        crops = f"2 × {self.global_size} + 10 × {self.local_size}"
        return f"{self.backbone}, patches of {patch}, {crops}, {self.images} images, {self.precision}"


SMALL: dict[str, Any] = {"global_size": 64, "local_size": 32, "arguments": {"patch_size": 8}}
CASES = (
    {
        "vit_small": Case("vit_small_patch16_224", "bf16", 256),
        "vit_base": Case("vit_base_patch16_224", "bf16", 256),
    }
    if GPU
    else {
        "vit_tiny_fp32": Case("vit_tiny_patch16_224", "fp32", 16),
        "vit_tiny_bf16": Case("vit_tiny_patch16_224", "bf16", 16),
        "small_images_fp32": Case("vit_tiny_patch16_224", "fp32", 64, **SMALL),
        "small_images_bf16": Case("vit_tiny_patch16_224", "bf16", 64, **SMALL),
        "batch_256_bf16": Case("vit_tiny_patch16_224", "bf16", 256, **SMALL),  # the paper's batch
    }
)


def main() -> None:
    """Measure all cases and write the results, or one case and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results are written to this name .json and .md")
    parser.add_argument("--case", action="append", choices=[*CASES], help="one of the cases; default: all")
    parser.add_argument("--part", choices=[*CASES], help="measure this case here and print the result")
    parser.add_argument("--images", type=int, help="images a step, for --part")
    options = parser.parse_args()
    if options.part:
        case = CASES[options.part]
        print(json.dumps(measure(case._replace(images=options.images or case.images))))
        return
    results: dict[str, Any] = {
        "machine": machine("torch", "timm", "bincomm"),
        "threads": torch.get_num_threads(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "date": date.today().isoformat(),
        "rounds": ROUNDS,
        "cases": {},
    }
    if GPU:
        results["matmul_tflops"] = product_tflops()
    for part in options.case or CASES:
        case = CASES[part]
        images = case.images
        while True:
            print(f"{part}, {images} images ...", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "benchmarks.step", "--part", part, "--images", str(images), "-"]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(process.stdout.splitlines()[-1])
            if result is not None:
                results["cases"][part] = {"images_wanted": case.images, **result}
                break
            images //= 2  # it did not fit
            if not images:
                raise SystemExit(f"{part}: not even one image fits")
    options.results.parent.mkdir(exist_ok=True)
    write_json(options.results.with_suffix(".json"), results)
    write_text(options.results.with_suffix(".md"), page(results))
    print(page(results))


def measure(case: Case) -> dict[str, Any] | None:
    """Times, losses and memory of all contenders; None if they do not fit the GPU."""
    try:
        return race(case)
    except torch.cuda.OutOfMemoryError:
        return None


class Marks:
    """The moments at which the parts of a step end, while it is to be measured."""

    def __init__(self) -> None:
        self.moments: list[tuple[str, Any]] = []
        self.recording = False

    def __call__(self, part: str) -> None:
        """Note the end of a part."""
        if self.recording:
            self.moments.append((part, now()))


class Contender(NamedTuple):
    """One step, which returns its loss, and the marks of its parts."""

    step: Callable[[], Tensor | float]
    marks: Marks
    notes: str = ""


def race(case: Case, without: Sequence[str] = ()) -> dict[str, Any]:
    """All contenders in turns, without those that have one of these words in their name."""
    views = draw_views(case)
    crops = [crop.contiguous() for group in views for crop in group.unbind(1)]
    makers = {"bincomm": lambda: bincomm_step(case, views)}
    if GPU:
        makers["bincomm, torch.compile"] = lambda: bincomm_step(case, views, compiled=True)
        makers["plain loop, torch.compile"] = lambda: plain(case, crops, fused=True, compiled=True)
    makers["plain loop"] = lambda: plain(case, crops, fused=True)
    makers["plain loop, attention written out"] = lambda: plain(case, crops, fused=False)

    contenders, owned, losses = {}, {}, {}
    for name, make in makers.items():
        if any(word in name for word in without):
            continue
        before = allocated()
        contenders[name] = make()
        losses[name] = [float(contenders[name].step()) for _ in range(2)]  # the second after an update
        owned[name] = allocated() - before
    check(losses, case.precision)

    totals, parts, peaks = (defaultdict(list) for _ in range(3))
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            if GPU:
                contender.step()  # to replace the others' data in caches
                torch.cuda.reset_peak_memory_stats()
                others = allocated() - owned[name]
            took, split = clocked(contender)
            totals[name].append(took)
            parts[name].append(split)
            if GPU:
                peaks[name].append(torch.cuda.max_memory_allocated() - others)
    return {
        "title": case.title(),
        "images": case.images,
        "losses": losses,
        "step_ms": totals,
        "parts_ms": parts,
        "peak_bytes": {name: max(values) for name, values in peaks.items()},
        "notes": [contender.notes for contender in contenders.values() if contender.notes],
        "flops": flops(case, crops) if GPU else None,
    }


def draw_views(case: Case) -> tuple[Tensor, Tensor]:
    """Crops of noise, the same ones for the same case."""
    torch.manual_seed(1)
    dtype = PRECISIONS[case.precision]
    size, small = case.global_size, case.local_size
    return (
        torch.randn(case.images, 2, 3, size, size, device=DEVICE, dtype=dtype),
        torch.randn(case.images, 10, 3, small, small, device=DEVICE, dtype=dtype),
    )


def bincomm_step(
    case: Case,
    views: tuple[Tensor, Tensor],
    compiled: bool = False,
    stored: bool = False,
    **keys: Any,
) -> Contender:
    """The step of a run with further keys; with `stored` from messages that are there, without a teacher."""
    config = replace(case.config(), **keys)
    student, teacher = create_networks(config, DEVICE)
    objective = create_objective(config).to(DEVICE)
    marks = Marks()
    messages = None
    if stored:
        words = torch.randint(-(2**31), 2**31, (2, case.images, config.bits // 32), dtype=torch.int32)
        messages = words.to(DEVICE)
    sender = None if stored else teacher
    step = create_step(config, student, sender, objective, create_optimizer(student), mark=marks)
    notes = compile_networks(step, *views)[1] if compiled else ""

    def run() -> Tensor:
        output = step(*views, messages, **RATES)
        step.guard.read()
        return output.losses["loss"]

    return Contender(run, marks, notes)


def beyond_the_paper(case: Case) -> dict[str, Callable[[], Contender]]:
    """Makers of steps of other kinds, whose losses are others than the plain loop's."""
    views = draw_views(case)
    return {
        "from stored messages": lambda: bincomm_step(case, views, stored=True, beta=0.0),
        "dense bits": lambda: bincomm_step(case, views, dense=1.0),
    }


def plain(case: Case, crops: list[Tensor], fused: bool, compiled: bool = False) -> Contender:
    """The plain loop, with the same weights and timm's fused attention or the written-out one."""
    config = case.config()
    network, _ = create_networks(config, torch.device("cpu"))
    set_fused_attn(fused)
    backbone = timm.create_model(
        case.backbone, num_classes=0, img_size=case.global_size, dynamic_img_size=True, **case.arguments
    )
    set_fused_attn(True)
    student = plain_loop.MultiCrop(backbone, config.hidden, config.bits)
    student.backbone.load_state_dict(network.backbone.state_dict())
    student.head.load_state_dict(network.head.get_submodule("layers").state_dict())
    teacher = copy.deepcopy(student).requires_grad_(False).to(DEVICE)
    if compiled:
        student.compile(dynamic=False)
        teacher.compile(dynamic=False)
    marks = Marks()
    loop = plain_loop.PlainLoop(
        student.to(DEVICE),
        teacher,
        plain_loop.create_optimizer(student),
        clip=config.clip,
        precision=config.precision,
        beta=float(config.beta),
        eps_squared=config.eps_squared,
        mark=marks,
    )
    return Contender(lambda: loop(crops, **RATES), marks)


def check(losses: dict[str, list[float]], precision: str) -> None:
    """Raise if contenders do not compute the same losses."""
    tolerance = {"fp32": 1e-4, "bf16": 1e-2}[precision]
    for name, values in losses.items():
        for expected, value in zip(losses["bincomm"], values, strict=True):
            assert abs(expected - value) <= tolerance * abs(expected), (
                f"{name}: losses {values}, not {losses}"
            )


def clocked(contender: Contender) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step, all in all and by its parts, as the mean over a turn."""
    marks = contender.marks
    marks.moments, marks.recording = [], True
    if GPU:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        marks("")
        contender.step()
    if GPU:
        torch.cuda.synchronize()
    took = 1e3 * (time.perf_counter() - started) / STEPS
    marks.recording = False
    parts = dict.fromkeys(PARTS, 0.0)
    for (_, begin), (part, end) in pairwise(marks.moments):
        if part:
            parts[part] += (begin.elapsed_time(end) if GPU else 1e3 * (end - begin)) / STEPS
    return took, parts


def now() -> Any:
    """A point in time: an event of the GPU, without waiting, or the clock."""
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def allocated() -> int:
    """Bytes of tensors on the GPU."""
    return torch.cuda.memory_allocated() if GPU else 0


def flops(case: Case, crops: list[Tensor], images: int = 2) -> int:
    """Floating-point operations of a step, counted on few images and scaled; those of the loss are left out
    where they are none of PyTorch's products."""
    contender = plain(case, [crop[:images] for crop in crops], fused=True)
    with FlopCounterMode(display=False) as counter:
        contender.step()
    return counter.get_total_flops() * case.images // images


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    malloc = ", ".join(f"{name}={value}" for name, value in results["malloc"].items())
    lines = [
        "# A training step, measured",
        "",
        f"`make {'gpu-tables' if GPU else 'bench-step'}` on {results['date']}: "
        f"{in_words(results['machine'])}; "
        f"{results['threads']} threads{'; ' + malloc if malloc else ''}. Head 2048 wide, 256 bits, synthetic "
        f"crops. Medians of {results['rounds']} rounds of {STEPS} steps, least and most in brackets; "
        "contenders take turns, and their losses agreed over two steps before they were timed. An image with "
        "all its crops is one. The plain loop is `benchmarks/plain_loop.py`.",
    ]
    if GPU:
        lines += [
            "",
            f"A bf16 product of 8192 × 8192 matrices reached {results['matmul_tflops']:.0f} TFLOP/s; the "
            f"data sheet's {PEAK} is of H100 and H200.",
        ]
    for case in results["cases"].values():
        lines += ["", f"## {case['title']}", ""]
        if case["images"] != case["images_wanted"]:
            lines += [f"{case['images_wanted']} images did not fit the memory.", ""]
        lines += [*case["notes"], ""] if case["notes"] else []
        lines += [*totals_table(case, results.get("matmul_tflops")), "", *parts_table(case)]
    return "\n".join(lines) + "\n"


def totals_table(case: dict[str, Any], matmul: float | None) -> list[str]:
    """Times of complete steps."""
    header = ["", "ms a step", "images/s", "bincomm is"]
    if GPU:
        header += ["of the product", "of the data sheet", "peak memory, GiB"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    bincomm = statistics.median(case["step_ms"]["bincomm"])
    for name, values in case["step_ms"].items():
        took = statistics.median(values)
        cells = [
            name,
            f"{took:.1f} ({min(values):.1f} – {max(values):.1f})",
            f"{1e3 * case['images'] / took:.1f}",
            f"{took / bincomm:.2f}×" if name != "bincomm" else "",
        ]
        if GPU:
            reached = case["flops"] / (took / 1e3) / 1e12
            cells += [f"{reached / matmul:.1%}", f"{reached / PEAK:.1%}"]
            cells += [f"{case['peak_bytes'][name] / 2**30:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parts_table(case: dict[str, Any]) -> list[str]:
    """Times of the parts of a step, and the sum of those outside the networks."""
    lines = [f"| ms | {' | '.join(PARTS)} | {' + '.join(AROUND)} | bincomm is |"]
    lines += ["|---" * (len(PARTS) + 3) + "|"]
    around = {
        name: statistics.median(sum(split[part] for part in AROUND) for split in splits)
        for name, splits in case["parts_ms"].items()
    }
    for name, splits in case["parts_ms"].items():
        medians = [statistics.median(split[part] for split in splits) for part in PARTS]
        ratio = f"{around[name] / around['bincomm']:.1f}×" if name != "bincomm" else ""
        cells = [name, *(f"{m:.1f}" for m in medians), f"{around[name]:.1f}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
