"""Values and gradients compared with fp64, times and memory of a step, on a CPU and on a GPU."""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

GPU = torch.cuda.is_available()
CORES = len(os.sched_getaffinity(0))
SECONDS = 2.0  # approximate time of all rounds for one figure
FEWEST_ROUNDS = 10


def value_and_gradient(function: Callable, logits: Tensor) -> tuple[Tensor, Tensor]:
    """A scalar function's value and its gradient at given logits."""
    logits = logits.detach().requires_grad_()
    value = function(logits)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def directions(function: Callable, logits: Tensor) -> dict[str, tuple[Callable, Callable[[], tuple]]]:
    """For "forward", "backward" and "both" what is timed, and what prepares its arguments; `logits` require a
    gradient."""

    def without_gradient() -> tuple:
        logits.grad = None
        return ()

    return {
        "forward": (lambda: function(logits), without_gradient),
        # A captured backward pass is replayed, and reads the same saved tensors each time.
        "backward": (
            functools.partial(Tensor.backward, retain_graph=GPU),
            lambda: (*without_gradient(), function(logits)),
        ),
        "both": (lambda: function(logits).backward(), without_gradient),
    }


def check(result: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], is_bincomm: bool) -> float:
    """Relative error of the gradient against fp64; fails if it or the value is wrong.

    bincomm's error may be one rounding to the logits' dtype; a peer, which sums half types in half precision,
    may have a larger one, as long as its time means something.
    """
    half = result[1].dtype != torch.float32
    value, exact = result[0].double().cpu(), truth[0].cpu()
    torch.testing.assert_close(value, exact, rtol=2e-2 if half and not is_bincomm else 1e-4, atol=1e-6)
    gradient = truth[1].to(result[1].device)
    error = ((result[1].double() - gradient).norm() / gradient.norm()).item()
    limit = max(1e-4, torch.finfo(result[1].dtype).eps) if is_bincomm else 3e-2
    assert error < limit, f"the gradient is off by {error:.1e}"
    return error


def time_it(
    benchmark: Any,
    step: Callable,
    prepare: Callable[[], tuple],
    rounds: int,
    labels: dict[str, Any],
    moved: int | None,
) -> None:
    """Run the rounds and write the figures into the benchmark's `extra_info`.

    `prepare` returns the step's arguments; preparing is not timed.
    """
    for _ in range(3):
        arguments = prepare()
        started = time.perf_counter()
        step(*arguments)
        if GPU:
            torch.cuda.synchronize()
        took = time.perf_counter() - started
    rounds = max(FEWEST_ROUNDS, min(rounds, int(SECONDS / took)))
    benchmark.extra_info |= labels | {"peak_memory": peak_memory(step, prepare())}
    if GPU:
        benchmark.extra_info |= {"eager": events(step, prepare, rounds), "moved": moved}
        benchmark.extra_info["graph"] = replay(step, prepare, rounds)
    benchmark.pedantic(step, setup=lambda: (prepare(), {}), rounds=rounds, warmup_rounds=2)


def peak_memory(step: Callable, arguments: tuple) -> int:
    """Most bytes of tensors that a step held at once beyond those there before it."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(*arguments)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(*arguments)
    held = least = peak = 0
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        least = min(least, held)  # what was there before may be freed first
        peak = max(peak, held - least)
    return peak


def quantiles(milliseconds: list[float]) -> dict[str, float]:
    """20, 50 and 80 % of the rounds took at most so long."""
    p20, _, _, p80 = statistics.quantiles(milliseconds, n=5)
    return {"p20": p20, "p50": statistics.median(milliseconds), "p80": p80}


def events(step: Callable, prepare: Callable[[], tuple], rounds: int) -> dict[str, float]:
    """Milliseconds on the GPU from an idle start, its second-level cache flushed before every round."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(rounds):
        arguments = prepare()
        flush.zero_()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(*arguments)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return quantiles(times)


def replay(step: Callable, prepare: Callable[[], tuple], rounds: int) -> dict[str, float] | str:
    """The same for the replay of a CUDA graph of the step; why not, where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(*prepare())
            arguments = prepare()
        # On the stream of the forward pass, where autograd runs the backward pass too.
        with torch.cuda.graph(graph, stream=side):
            step(*arguments)
        torch.cuda.current_stream().wait_stream(side)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return events(graph.replay, tuple, rounds)


def copy_bandwidth() -> float:
    """Bytes a second that a device-to-device copy reads and writes together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    took = events(lambda: target.copy_(source), tuple, 20)["p50"]
    return 2 * source.numel() / (took / 1e3)


def product_tflops() -> float:
    """Throughput of a large bf16 product."""
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * side**3 / (events(lambda: a @ b, tuple, 20)["p50"] / 1e3) / 1e12


def machine(*packages: str) -> dict[str, str]:
    """For a page of figures: device, CPU, and versions of Python and of those packages."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    facts = {
        "device": torch.cuda.get_device_name() if GPU else "CPU",
        "cpu": f"{cpu.partition(':')[2].strip()}, {CORES} cores",
        "python": platform.python_version(),
    }
    for package in packages:
        if (number := installed_version(package)) is not None:
            facts[package] = number
    return facts


def installed_version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def in_words(machine: dict[str, str]) -> str:
    """The facts of `machine` as text for a page."""
    versions = dict(machine)
    device, cpu = versions.pop("device"), versions.pop("cpu")
    return f"{device}, {cpu}; {', '.join(f'{package} {number}' for package, number in versions.items())}"
