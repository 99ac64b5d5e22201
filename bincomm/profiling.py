"""Where the time of a training step goes, and how much of what the machine can do is used."""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bincomm.building import create_networks, create_objective, write_attention_out
from bincomm.config import PretrainConfig
from bincomm.data.sources import open_source
from bincomm.distributed.ranks import join_ranks
from bincomm.engine.batches import load_views
from bincomm.engine.frozen_teacher import FrozenTeacher
from bincomm.engine.job import create_loader, create_sender, create_step, prepare
from bincomm.engine.optimizer import create_optimizer
from bincomm.engine.stored_messages import StoredMessages
from bincomm.networks import Network

WARM_UP = 3  # steps
PARTS = ("data", "teacher", "student", "loss", "backward", "clip", "optimizer", "average")
PRODUCT = {"cpu": 2048, "cuda": 8192}  # side of the square matrices that the machine's best is measured with


class Clock:
    """Milliseconds between marks: of the device where it is a GPU, else of this process."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """The end of a part."""
        if self.gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Milliseconds of each part since the mark before it, from the first mark on; then it is empty."""
        if self.gpu:
            torch.cuda.synchronize()
        milliseconds = {}
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            milliseconds[name] = start.elapsed_time(end) if self.gpu else 1e3 * (end - start)
        self.marks.clear()
        return milliseconds


def profile(config: PretrainConfig, steps: int) -> dict[str, Any]:
    """Train for a few steps as `pretrain` would on one process, and measure; nothing is written.

    Returns:
        "parts": milliseconds of each of `PARTS`, medians over the steps ("data" is the time waited for it;
        of a CUDA graph "clip" is all up to there); "step_ms", "images_per_second"; "flops_per_image", of the
        matrix products and convolutions of both networks, forward and backward, without what is computed
        twice to need less memory; "mfu", the share of "peak",
        operations a second of one large matrix product in the same precision, measured here; "memory_bytes",
        of the GPU at its most, None on a CPU; "compiled", whether the networks went
        through torch.compile.

    Raises:
        ValueError: the configuration or the data does not allow it; the message names the key.
    """
    with join_ranks(config.device) as ranks:
        device = ranks.device
        if ranks.world > 1:
            raise ValueError(
                f"profile: expected one process, got {ranks.world} ranks; start without torchrun"
            )
    if config.fsdp:
        raise ValueError("fsdp: expected false, for one process has nothing to split, got true")
    source = open_source(config.data)
    loader = create_loader(config, source, ranks)
    student, follower = create_networks(config, device)
    sender = create_sender(config, source, follower, ranks)
    stored, teacher = (sender, None) if isinstance(sender, StoredMessages) else (None, sender)
    views = load_views(loader, stored)
    objective = create_objective(config).to(device)
    clock = Clock(device)
    step = create_step(config, student, teacher, objective, create_optimizer(student), mark=clock.mark)
    # A network of its own, for what is computed twice to need less memory is not to be counted.
    counted, other = create_networks(replace(config, checkpoint_activations=False), device)
    flops = count_flops(
        counted, other if teacher is follower else teacher, *views[:2], step.draw_masks(views[0])
    )
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    peak = measure_peak(device, dtype)
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = on_gpu
    prepared = prepare(step, config, views)
    samples: list[dict[str, float]] = []
    for number in range(WARM_UP + steps):
        if on_gpu and number == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        clock.mark("begin")
        views = load_views(loader, stored)
        clock.mark("data")
        prepared(*views, lr=0.0, weight_decay=0.0, momentum=1.0)
        step.guard.read()
        samples.append(clock.read())
    peak = max(peak, measure_peak(device, dtype))  # should the machine have been busy before
    measured = samples[WARM_UP:]
    total = statistics.median(sum(one.values()) for one in measured)
    rate = 1e3 * config.batch_size / total
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "parts": {
            part: statistics.median(one[part] for one in measured) for part in PARTS if part in measured[0]
        },
        "step_ms": total,
        "images_per_second": rate,
        "flops_per_image": flops,
        "peak": peak,
        "mfu": rate * flops / peak,
        "memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "compiled": step.forward.compiled,
    }


def count_flops(
    student: Network,
    teacher: Network | FrozenTeacher | None,
    global_views: Tensor,
    local_views: Tensor | None,
    places: Tensor | None = None,
) -> float:
    """Floating-point operations of matrix products and convolutions that an image takes, with those of its
    masked patches at places (n, M)."""
    networks = [student] if teacher is None else [student, teacher]
    write_attention_out(*networks)  # a fused one is not counted everywhere
    groups = [views[:2].float() for views in (global_views, local_views) if views is not None]
    patches = {} if places is None else {"places": places[:2]}
    with FlopCounterMode(display=False) as counter:
        if teacher is not None:
            with torch.no_grad():
                teacher(groups[0], **patches)
        student(*groups, **patches).sum().backward()
    return counter.get_total_flops() / len(groups[0])


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of a few."""
    side = PRODUCT[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    clock, best = Clock(device), float("inf")
    for _ in range(8):
        clock.mark("begin")
        torch.mm(a, b)
        clock.mark("product")
        best = min(best, clock.read()["product"])
    return 2 * side**3 / (best / 1e3)


def describe(result: dict[str, Any]) -> str:
    """A profile as a table."""
    total = result["step_ms"]
    compiled = "with" if result["compiled"] else "without"
    lines = [f"{result['device']}, {compiled} torch.compile", ""]
    lines += [f"  {part:10} {ms:9.2f} ms  {ms / total:6.1%}" for part, ms in result["parts"].items()]
    memory = result["memory_bytes"]
    lines += [
        f"  {'a step':10} {total:9.2f} ms",
        "",
        f"{result['images_per_second']:.1f} images/s; {result['flops_per_image'] / 1e9:.2f} GFLOP an image, "
        f"MFU {result['mfu']:.1%} of {result['peak'] / 1e12:.3g} TFLOP/s, a large matrix product's"
        + ("" if memory is None else f"; {memory / 2**30:.1f} GiB at most"),
    ]
    return "\n".join(lines)
