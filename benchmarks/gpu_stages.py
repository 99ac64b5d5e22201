"""The stages of `benchmarks.gpu`, each in a process of its own: python -m benchmarks.gpu_stages STAGE LINES

They append what they measure to the file LINES, figure by figure.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import MagicMock

import torch
from torch import Tensor

from benchmarks.gpu import SECONDS, Lines
from benchmarks.measuring import (
    GPU,
    check,
    copy_bandwidth,
    directions,
    events,
    in_words,
    machine,
    product_tflops,
    quantiles,
    replay,
    value_and_gradient,
)

Shape = tuple[int, ...]

ROUNDS = 20
LAUNCHES = 200  # of an empty kernel, for the time of one
TEST_PROCESSES = 8
SANITIZED = Path("tests", "test_gpu", "coding_rate_program.cu")
TOOLS = ("memcheck", "racecheck")
STEPS = 30  # of the loop with ready batches
DEVICE = torch.device("cuda" if GPU else "cpu")
# The key figures: (V, U, n, K) of sign_bce and of the objective, (V, n, K) of coding_rate, (Q, D, K) of
# searches.
SIGN_BCE: tuple[Shape, ...] = ((12, 2, 256, 256), (12, 2, 4096, 1024))
CODING_RATE: tuple[Shape, ...] = ((2, 256, 256), (12, 256, 256), (2, 64, 1024), (12, 1024, 1024))
SEARCHES = ((10_000, 100_000, 256), (1, 1_000_000, 256))
NEIGHBORS = 20
CLIPPED = "vit_small_patch16_224"
# Of a rehearsal, on a CPU.
SMALL_SIGN_BCE: tuple[Shape, ...] = ((4, 2, 8, 64),)
SMALL_CODING_RATE: tuple[Shape, ...] = ((2, 16, 24),)
SMALL_SEARCHES = ((30, 100, 64),)
SMALL_CLIPPED = "resnet10t"
SMALL_CASE: dict[str, Any] = {"images": 2, "global_size": 32, "local_size": 32}


def main() -> int:
    """Run one stage; its status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=SECONDS)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if not (GPU or options.dry):
        raise SystemExit("torch finds no GPU; --dry rehearses without one")
    add = functools.partial(Lines(options.lines).add, options.stage)
    facts = machine("bincomm", "torch", "triton", "timm")
    add(what="machine", words=in_words(facts), **facts)
    return STAGES[options.stage](add, options.dry)


def ceilings(add: Callable, dry: bool) -> int:
    """What the machine can do at best."""
    if dry:  # nothing of it is the same on a CPU
        return 0
    copied = copy_bandwidth()
    add(what="copy", words=f"{copied / 1e12:.2f} TB/s, read and write together", bytes_per_second=copied)
    tflops = product_tflops()
    add(what="product", words=f"{tflops:.0f} TFLOP/s, bf16, 8192 × 8192", tflops=tflops)
    one = torch.zeros(1, device="cuda")

    def launch() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    eager = events(launch, tuple, ROUNDS)
    graph = replay(launch, tuple, ROUNDS)
    add(
        what="launch",
        words=f"{1e3 * eager['p50'] / LAUNCHES:.2f} µs in eager mode, "
        + (graph if isinstance(graph, str) else f"{1e3 * graph['p50'] / LAUNCHES:.2f} µs in a CUDA graph"),
        launches=LAUNCHES,
        eager_ms=eager,
        graph_ms=graph,
    )
    return 0


def build(add: Callable, dry: bool) -> int:
    """The extension, for this GPU, and what of it is found."""
    environment = dict(os.environ)
    if GPU:
        major, minor = torch.cuda.get_device_capability()
        environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    started = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = subprocess.run(command, env=environment).returncode
    add(what="build", words=f"status {status}, {time.perf_counter() - started:.0f} s", status=status)
    # In a process of its own, because this one may have loaded what was there before.
    script = "import json; from bincomm.diagnosis import doctor; print(json.dumps(doctor()))"
    report = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(report.stdout.splitlines()[-1])
    for what in ("devices", "notes"):
        for words in found[what]:
            add(what=what.removesuffix("s"), words=words)
    for operation, kernels in found["kernels"].items():
        add(what=operation, words=", ".join(f"{device}: {kernel}" for device, kernel in kernels.items()))
    return status


class Outcomes:
    """Of pytest, as they come."""

    def __init__(self, add: Callable):
        self.add = add

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for every test, in the process that controls the others."""
        if report.when == "call" or report.outcome != "passed":
            reason = ""
            if report.outcome == "failed":
                reason = str(report.longrepr).strip().splitlines()[-1][:300]
            elif report.outcome == "skipped":
                reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
            self.add(
                what=report.nodeid, outcome=report.outcome, reason=reason, seconds=round(report.duration, 2)
            )


def tests(add: Callable, dry: bool) -> int:
    """Correctness, on the GPU."""
    import pytest

    options = ["tests/test_gpu", "-q", "-p", "no:cacheprovider", "--durations=10"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(TEST_PROCESSES if GPU else 1)]
    return int(pytest.main(options, plugins=[Outcomes(add)]))


class Operation(NamedTuple):
    """What is timed: contenders are functions of logits, of which the first is checked more strictly."""

    what: str
    logits: Tensor
    contenders: dict[str, Callable[[Tensor], Tensor]]
    exact: Callable[[Tensor], Tensor]  # in fp64
    moved: Callable[[str], int]  # bytes, by direction


def operations(add: Callable, dry: bool) -> int:
    """The key figures."""
    failed = compile_everything(add) if dry else 0
    for operation in key_operations(dry):
        logits = operation.logits.requires_grad_()
        truth = value_and_gradient(operation.exact, operation.logits.double())
        for contender, function in operation.contenders.items():
            error = ""
            try:
                difference = check(value_and_gradient(function, logits), truth, contender == "bincomm")
            except (AssertionError, RuntimeError) as caught:
                error = f"{type(caught).__name__}: {str(caught).strip().splitlines()[0]}"
                failed += contender == "bincomm"
            for direction, (step, prepare) in directions(function, logits).items():
                labels = {"what": operation.what, "direction": direction, "contender": contender}
                if error:
                    add(**labels, error=error)
                else:
                    moved = operation.moved(direction)
                    add(**labels, graph_us=timed(step, prepare), moved=moved, difference=difference)
    failed += clipping(add, SMALL_CLIPPED if dry else CLIPPED)
    failed += search(add, SMALL_SEARCHES if dry else SEARCHES)
    return int(failed > 0)


def key_operations(dry: bool) -> Iterator[Operation]:
    """The cases, the smallest first."""
    import bincomm
    from benchmarks import bench_coding_rate, bench_sign_bce
    from benchmarks.plain_loop import loss_of
    from bincomm.ops import reference

    def sign_bce(shape: Shape, dtype: str) -> Operation:
        student, teacher = bench_sign_bce.logits_of(shape, dtype, DEVICE)
        functions = {
            "bincomm": bincomm.sign_bce,
            "loop over pairs": bench_sign_bce.loop_over_pairs,
            "one expression": bench_sign_bce.vectorized,
        }
        return Operation(
            f"sign_bce {' × '.join(map(str, shape))}, {dtype}",
            student,
            {name: functools.partial(call_with, function, teacher) for name, function in functions.items()},
            lambda logits: reference.sign_bce(logits, teacher.double(), "cross"),
            lambda direction: bench_sign_bce.bytes_moved(direction, student, teacher),
        )

    def coding_rate(shape: Shape, dtype: str = "fp32") -> Operation:
        logits = bench_coding_rate.logits_of(shape).to(DEVICE, bench_sign_bce.DTYPES[dtype])
        names = ("bincomm", "cholesky_ex, batched", "cholesky_ex, batched, smaller side")
        contenders: dict[str, Callable] = {name: bench_coding_rate.CONTENDERS[name] for name in names}
        if dtype != "fp32":  # the peers' factorizations take fp32 alone
            contenders = {"bincomm": contenders["bincomm"]} | {
                name: lambda a, peer=peer: peer(a.float()) for name, peer in list(contenders.items())[1:]
            }
        return Operation(
            f"coding_rate {' × '.join(map(str, shape))}, {dtype}",
            logits,
            contenders,
            lambda a: reference.coding_rate(a).sum(),
            lambda direction: bench_coding_rate.bytes_moved(direction, logits),
        )

    def objective(shape: Shape, dtype: str, beta: float | Literal["auto"]) -> Operation:
        student, teacher = bench_sign_bce.logits_of(shape, dtype, DEVICE)
        # In evaluation mode, so that β by control stays what it is.
        ours, exact = (bincomm.DiscreteCommunication(beta=beta).to(DEVICE).eval() for _ in range(2))
        contenders: dict[str, Callable] = {"bincomm": lambda logits: ours(logits, teacher)["loss"]}
        if beta != "auto":
            contenders["pairs in a loop"] = lambda logits: loss_of(
                logits.flatten(0, 1), teacher.flatten(0, 1), len(logits), beta, ours.eps_squared
            )
        return Operation(
            f"objective {' × '.join(map(str, shape))}, {dtype}, β {beta}",
            student,
            contenders,
            lambda logits: exact(logits, teacher.double())["loss"],
            lambda direction: 0,
        )

    shapes = SMALL_SIGN_BCE if dry else SIGN_BCE
    for shape, dtype in itertools.product(shapes, ("bf16", "fp32")):
        yield sign_bce(shape, dtype)
    for shape in SMALL_CODING_RATE if dry else CODING_RATE:
        yield coding_rate(shape)
    yield coding_rate(shapes[0][:1] + shapes[0][2:], "bf16")
    for shape in shapes:
        yield objective(shape, "bf16", 0.1)
        yield objective(shape, "bf16", "auto")


def call_with(function: Callable, teacher: Tensor, student: Tensor) -> Tensor:
    """A function of the student alone."""
    return function(student, teacher)


def clipping(add: Callable, backbone: str) -> int:
    """All gradients of a network, beside PyTorch's multi-tensor operations; the number of wrong results."""
    from bincomm.building import create_networks
    from bincomm.config import PretrainConfig
    from bincomm.ops.clip import clip_gradients_, clip_gradients_pytorch_

    student, _ = create_networks(PretrainConfig(backbone=backbone), torch.device("meta"))
    gradients = [torch.randn(p.shape, device=DEVICE) for p in student.parameters()]
    norms = [g.double().norm().item() for g in gradients]
    size = 4 * sum(g.numel() for g in gradients)
    contenders = {"bincomm": clip_gradients_, "multi-tensor operations": clip_gradients_pytorch_}
    failed = 0
    # Clipped gradients are not clipped again: each time they are copied before.
    for direction, limit, moved in (
        ("within the limit", 2 * max(norms), size),
        ("copied, and all clipped", min(norms) / 2, 5 * size),
    ):
        labels: dict[str, Any] = {
            "what": f"clip_gradients_ {len(gradients)} of {backbone}",
            "direction": direction,
        }
        results = {}
        for contender, function in contenders.items():
            copies = [g.clone() for g in gradients]

            def step(function: Callable = function, copies: list[Tensor] = copies, limit: float = limit):
                if limit < min(norms):
                    torch._foreach_copy_(copies, gradients)
                return function(copies, limit)

            results[contender] = [step(), *copies]
            add(**labels, contender=contender, graph_us=timed(step, tuple), moved=moved)
        try:
            torch.testing.assert_close(*results.values(), rtol=1e-4, atol=0)
        except AssertionError as error:
            add(**labels, contender="bincomm", error=str(error).strip().splitlines()[0])
            failed += 1
    return failed


def search(add: Callable, cases: Sequence[tuple[int, int, int]]) -> int:
    """hamming_topk, beside an exact product of ±1 in bf16 and torch.topk; the number of wrong results."""
    import bincomm
    from bincomm.ops import reference

    failed = 0
    for queries, database, bits in cases:
        generator = torch.Generator().manual_seed(0)
        asked, held = (
            torch.randint(-(2**31), 2**31, (count, bits // 32), generator=generator, dtype=torch.int32)
            for count in (queries, database)
        )
        some = asked[:20]
        expected = bincomm.hamming_distance(some, held).sort(stable=True)
        asked, held, some = asked.to(DEVICE), held.to(DEVICE), some.to(DEVICE)
        found = bincomm.hamming_topk(some, held, NEIGHBORS)
        labels: dict[str, Any] = {
            "what": f"hamming_topk {queries} × {database} × {bits}, k = {NEIGHBORS}",
            "direction": "search",
        }
        if not all(
            torch.equal(ours.cpu().long(), exact[:, :NEIGHBORS].long())
            for ours, exact in zip(found, expected, strict=True)
        ):
            add(**labels, contender="bincomm", error="wrong neighbors")
            failed += 1
            continue
        signs = [2 * reference.unpack_signs(words, bits).to(torch.bfloat16) - 1 for words in (asked, held)]
        contenders: dict[str, Callable] = {
            "bincomm": functools.partial(bincomm.hamming_topk, asked, held, NEIGHBORS),
            "product of ±1, topk": functools.partial(nearest_by_product, *signs),
        }
        for contender, function in contenders.items():
            add(**labels, contender=contender, graph_us=timed(function, tuple))
    return failed


def nearest_by_product(queries: Tensor, database: Tensor) -> Tensor:
    """The largest products of rows of ±1, in parts whose products fit the memory."""
    parts = [(part @ database.mT).topk(NEIGHBORS).values for part in queries.split(2000)]
    return torch.cat(parts)


def timed(step: Callable, prepare: Callable[[], tuple]) -> dict[str, float] | str:
    """Microseconds of the replay of a step's CUDA graph, or why there is none; without a GPU by the clock."""
    if GPU:
        took = replay(step, prepare, ROUNDS)
        return took if isinstance(took, str) else {name: 1e3 * value for name, value in took.items()}
    times = []
    for _ in range(3):
        arguments = prepare()
        started = time.perf_counter()
        step(*arguments)
        times.append(1e6 * (time.perf_counter() - started))
    return quantiles(times)


def compile_everything(add: Callable) -> int:
    """What the launchers ask Triton for, compiled for GPUs that are not there."""
    for capability in (80, 90, 100):
        command = [sys.executable, "-m", "benchmarks.mock_driver", str(capability)]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        print(done.stdout)
        count = len(done.stdout.splitlines())
        add(what=f"Triton for sm_{capability}", words=f"{count} kernels compiled, status {done.returncode}")
        if done.returncode:
            return done.returncode
    return 0


def sanitizer(add: Callable, dry: bool) -> int:
    """A program with the CUDA kernels and without torch, under NVIDIA's tools."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    major, minor = torch.cuda.get_device_capability() if GPU else (9, 0)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        command = [nvcc, "-std=c++20", "-O3", "-lineinfo", f"-arch=sm_{major}{minor}", "-Icsrc"]
        subprocess.run([*command, str(SANITIZED), "-o", str(program)], check=True)
        add(what="program", words="compiled")
        if not GPU:
            return 0
        status = subprocess.run([program]).returncode
        add(what="without a tool", words=f"status {status}", status=status)
        for tool in TOOLS:
            found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
            one = subprocess.run([found, "--tool", tool, "--error-exitcode", "9", program]).returncode
            add(what=tool, words="no finding" if one == 0 else f"status {one}", status=one)
            status = status or one
        return status


def step(add: Callable, dry: bool) -> int:
    """Steps of training, beside a plain loop's, and the loop of a run with ready batches."""
    stand_in_for_dali()
    from benchmarks import step as steps

    name = "vit_small" if GPU else "vit_tiny_fp32"
    case = steps.CASES[name]
    if dry:
        case = case._replace(**SMALL_CASE)
    result = steps.race(case, without=("torch.compile", "written out"))
    for contender, values in result["step_ms"].items():
        took = statistics.median(values)
        add(
            what=f"{result['title']}: {contender}",
            words=f"{took:.1f} ms a step, {1e3 * case.images / took:.1f} images/s",
            step_ms=values,
            parts_ms=result["parts_ms"][contender],
            peak_bytes=result["peak_bytes"].get(contender),
        )
    for kind, make in steps.beyond_the_paper(case).items():
        contender = make()
        contender.step()
        values = [steps.clocked(contender)[0] for _ in range(1 if dry else steps.ROUNDS)]
        del contender
        took = statistics.median(values)
        add(
            what=f"{result['title']}: bincomm, {kind}",
            words=f"{took:.1f} ms a step, {1e3 * case.images / took:.1f} images/s",
            step_ms=values,
        )
    speed = loop_with_ready_batches(case, 2 if dry else STEPS)
    add(what=f"{result['title']}: the loop of a run", words=f"{speed:.1f} images/s, ready batches")
    return 0


def loop_with_ready_batches(case: Any, steps: int) -> float:
    """Images a second of `bincomm.pretraining.train` with metrics and checkpoints, its batches ready."""
    from bincomm import pretraining
    from bincomm.data.loader import Loader
    from bincomm.data.sources import open_source
    from bincomm.distributed.ranks import join_ranks
    from bincomm.engine import job
    from bincomm.engine.lock import open_run
    from bincomm.engine.run import begin_run
    from bincomm.engine.signals import Signals
    from bincomm.files import read_json_lines

    class ReadyLoader(Loader):
        """Gives the same crops again and again."""

        def next(self) -> tuple[Tensor, Tensor | None]:
            self.step += 1
            return self.views

        @functools.cached_property
        def views(self) -> tuple[Tensor, Tensor]:
            sizes = ((2, self.crops.global_size), (self.crops.local_crops, self.crops.local_size))
            global_views, local_views = (
                torch.randn(self.batch_size, views, 3, size, size, dtype=self.dtype, device=self.device)
                for views, size in sizes
            )
            return global_views, local_views

    job.Loader = ReadyLoader  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            case.config(),
            data="digits",
            output=folder,
            max_steps=steps,
            epochs=steps,
            log_every=max(1, steps // 5),
            compile="off",
        )
        with join_ranks(config.device) as ranks, open_run(folder, ranks) as run, Signals(run) as signals:
            begin_run(run, config)
            pretraining.train(config, open_source("digits"), run, ranks, signals)
        return read_json_lines(Path(folder, "speed.jsonl"))[-1]["images_per_second"]


def stand_in_for_dali() -> None:
    """Let the loop be imported where DALI is missing; nothing here decodes an image."""
    parent = importlib.import_module("nvidia")  # of torch's own libraries
    if importlib.util.find_spec("nvidia.dali"):
        return
    stand_in = MagicMock(__version__="none")
    for name in ("nvidia.dali", "nvidia.dali.pipeline", "nvidia.dali.types"):
        sys.modules[name] = stand_in
    parent.dali = stand_in  # type: ignore[attr-defined]


STAGES: dict[str, Callable[[Callable, bool], int]] = {
    "ceilings": ceilings,
    "build": build,
    "tests": tests,
    "operations": operations,
    "sanitizer": sanitizer,
    "step": step,
}


if __name__ == "__main__":
    raise SystemExit(main())
