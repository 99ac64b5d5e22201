"""Operations and objectives on random input, against their definitions in fp64: values and gradients.

    python tests/fuzz_operations.py --minutes 1 --seed 0

Shapes (empty ones too), strides, dtypes and magnitudes, from denormal to the largest number, are drawn, and
NaN and infinity are put in. Every trial has a seed of its own; that of a trial which differs is printed,
and `--seed N --trials 1` repeats it. The exit status is then 1.

An error counts where it is larger than the tolerances below, which are relative to the exact result.
"""

import argparse
import contextlib
import math
import random
import sys
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

import bincomm
from bincomm.objectives import DINO, DiscreteCommunication, SimDINO
from bincomm.ops import reference
from bincomm.ops.clip import clip_gradients_

VALUE = 2e-5  # of a loss in fp32
RATE = 1e-4  # of a coding rate in fp32, whose matrix may have a condition number of K/ε²
RATE_GRADIENT = 2e-3  # of the largest in a view
# As `bincomm.objectives` says: losses up to which every sum in fp32 is finite, and scores of DINO.
SUMS_FIT, LARGEST_SCORE = 1e33, 1e30
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def main(arguments: list[str] | None = None) -> int:
    """Run trials until the time is over; 1 if one of them differs from its definition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, unless --trials ends it before")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the others follow")
    parser.add_argument("--trials", type=int, default=None, help="how many at most")
    options = parser.parse_args(arguments)
    end, seed, findings = time.monotonic() + 60 * options.minutes, options.seed, 0
    while time.monotonic() < end and seed - options.seed != options.trials:
        name, error = trial(seed)
        if error is not None:
            findings += 1
            print(f"{name}, seed {seed}: {error}", flush=True)
            print(f"    repeat: python tests/fuzz_operations.py --seed {seed} --trials 1", flush=True)
        seed += 1
    print(f"{seed - options.seed} trials from seed {options.seed}: {findings or 'no'} findings")
    return int(findings > 0)


def trial(seed: int) -> tuple[str, str | None]:
    """What a seed tries, and in what it differs; None: in nothing."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    name = draw.choice(list(CASES))
    try:
        CASES[name](draw)
    except AssertionError as error:
        return name, str(error) or traceback.format_exc()
    except Exception:  # anything else that is raised is a finding too
        return name, traceback.format_exc()
    return name, None


# ---- Input


def draw_shape(draw: random.Random) -> tuple[int, int, int]:
    """(V, n, K), small, seldom empty."""
    sizes = ((2, 2, 3, 4, 7), (1, 2, 5, 17, 33, 40), (1, 5, 31, 32, 33, 64, 100, 140, 515))
    views, n, bits = (draw.choice(each) for each in sizes)
    if draw.random() < 0.05:
        views, n, bits = (size * (draw.random() < 0.6) for size in (views, n, bits))
    return views, n, bits


def draw_numbers(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype, largest: float) -> Tensor:
    """Numbers of any magnitude up to `largest`, of any strides."""
    limit = min(largest, torch.finfo(dtype).max)
    exponents = {torch.float16: (-8, 5), torch.float64: (-60, 60)}.get(dtype, (-46, 39))
    kind = draw.choice(("ordinary", "ordinary", "any", "rows", "largest", "few"))
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "any":
        x = x * 10 ** draw.uniform(*exponents)
    elif kind == "rows":
        x = x * 10 ** torch.empty(*shape[:-1], 1, dtype=torch.float64).uniform_(*exponents)
    elif kind == "largest":
        x = x * limit
    elif kind == "few":  # equal rows, zeros, ties
        x = (x * 0.6).round() * (torch.rand(*shape[:-1], 1, dtype=torch.float64) > 0.2)
    return with_strides(draw, x.clamp(-limit, limit).to(dtype))


def with_strides(draw: random.Random, x: Tensor) -> Tensor:
    """The same values at other places in memory."""
    kind = draw.choice(("contiguous", "contiguous", "permuted", "sliced", "within"))
    if kind == "permuted":
        order = draw.sample(range(x.dim()), x.dim())
        inverse = [order.index(d) for d in range(x.dim())]
        return x.permute(order).contiguous().permute(inverse)
    if kind == "sliced":
        return torch.stack([x, torch.full_like(x, 3)], -1)[..., 0]
    if kind == "within":
        return torch.nn.functional.pad(x, (1, 2))[..., 1 : x.shape[-1] + 1]
    return x


def put_in(draw: random.Random, x: Tensor) -> bool:
    """Put NaN or infinity into a few of the tensors; whether it was done."""
    if not x.numel() or draw.random() > 0.12:
        return False
    place = tuple(draw.randrange(size) for size in x.shape)
    x[place] = draw.choice((torch.nan, torch.inf, -torch.inf))
    return True


# ---- Comparison


def check_value(
    what: str, value: Tensor, exact: Tensor, tolerance: float, largest: float = torch.inf
) -> None:
    """Raise AssertionError unless equal within the tolerance; beyond `largest`, infinity and the largest
    number are right too."""
    for one, right in zip(value.double().flatten().tolist(), exact.double().flatten().tolist(), strict=True):
        if math.isnan(right):
            assert math.isnan(one), f"{what} is {one}, expected NaN"
        elif abs(right) <= largest or one not in (math.inf, torch.finfo(value.dtype).max):
            near = one == right or abs(one - right) <= tolerance * (abs(right) + 0.05)
            assert near, f"{what} is {one}, expected {right}"


def check_gradient(what: str, gradient: Tensor, exact: Tensor, terms: Tensor | float = 0.0) -> None:
    """Raise AssertionError unless the gradient is the exact one, computed in fp32 and then rounded.

    Args:
        terms: the size of what cancels in the sum that an element is, where it does.
    """
    info = torch.finfo(gradient.dtype)
    exact = exact.double().clamp(-info.max, info.max)
    assert gradient.isfinite().all(), f"{what} is not finite"
    smallest = 2 * info.smallest_normal * info.eps + 1e-37
    allowed = info.eps * exact.abs() + 1e-6 * (exact.abs().max() + terms) + smallest
    worst = float(((gradient.double() - exact).abs() / allowed).max())
    assert worst <= 1, f"{what} is off by {worst:.3g} times the tolerance"


def leaf(x: Tensor) -> Tensor:
    """A leaf that wants a gradient, with the same strides."""
    return x.detach().requires_grad_()


def refused(function: Callable[[], object], *shapes: tuple[int, ...]) -> bool:
    """Whether there is an empty dimension; then the call must return or raise ValueError."""
    if all(0 not in shape for shape in shapes):
        return False
    with contextlib.suppress(ValueError):
        function()
    return True


# ---- Operations


def try_sign_bce(draw: random.Random) -> None:
    views, n, bits = draw_shape(draw)
    pairs = draw.choice(("cross", "all", "matched"))
    teachers = views if pairs == "matched" else draw.randint(min(1, views), views)
    dtype = draw.choice(DTYPES)
    student = draw_numbers(draw, (views, n, bits), dtype, torch.inf)
    teacher = draw_numbers(draw, (teachers, n, bits), draw.choice(DTYPES), torch.inf)
    packed = draw.random() < 0.3
    special = put_in(draw, student) | (not packed and put_in(draw, teacher))
    target = bincomm.pack_signs(teacher) if packed else teacher
    if refused(lambda: bincomm.sign_bce(student, target, pairs=pairs), student.shape, teacher.shape):
        return
    x, exact = leaf(student), leaf(student.double())
    loss = bincomm.sign_bce(x, target, pairs=pairs)
    expected = reference.sign_bce(exact, target if packed else teacher.double(), pairs)
    check_value("the loss", loss, expected, VALUE, largest=SUMS_FIT)
    scale = 10 ** draw.uniform(-3, 3)
    (loss * scale).backward()
    (expected * scale).backward()
    if not special:
        ones = (teacher > 0).double().mean(0)  # σ(a) - 1 and σ(a) cancel where messages differ
        terms = scale / x.numel() * ((ones > 0) & (ones < 1))
        check_gradient("the gradient", x.grad, exact.grad, terms if pairs != "matched" else 0.0)


def try_coding_rate(draw: random.Random) -> None:
    shape, dtype = draw_shape(draw), draw.choice(DTYPES)
    eps_squared = draw.choice((0.05, 0.05, 0.5, 3.0, 1e-3))
    logits = draw_numbers(
        draw, shape, dtype, 1e150
    )  # whose squares are numbers of fp64, for the lengths below
    special = put_in(draw, logits)
    if refused(lambda: bincomm.coding_rate(logits, eps_squared=eps_squared), shape):
        return
    x, exact = leaf(logits), leaf(logits.double())
    rate = bincomm.coding_rate(x, eps_squared=eps_squared)
    if special:
        assert not rate.isfinite().all(), f"the rate of logits that are not finite is {rate.tolist()}"
        return
    expected = reference.coding_rate(exact, eps_squared)
    check_value("the rate", rate, expected, RATE)
    rate.sum().backward()
    expected.sum().backward()
    # Times the row's length, because the gradient goes with its inverse, and next to the largest of its view,
    # because small ones are differences of numbers near 1, which are as exact as the condition allows.
    lengths = logits.double().norm(dim=-1, keepdim=True).clamp(min=reference.NORM_EPS)
    info = torch.finfo(dtype)
    error = (x.grad.double() - exact.grad.clamp(-info.max, info.max)).abs() * lengths
    assert x.grad.isfinite().all(), "the gradient is not finite"
    largest = (exact.grad * lengths).abs().amax((-2, -1), keepdim=True)
    smallest = (2 * info.smallest_normal * info.eps + 1e-37) * lengths
    rounding = 1e-5 + 1e-8 * shape[-1] / eps_squared
    worst = float((error / ((RATE_GRADIENT + info.eps) * largest + smallest + rounding)).max())
    assert worst <= 1, f"the gradient is off by {worst:.3g} times the tolerance"


def try_messages(draw: random.Random) -> None:
    shape = draw_shape(draw)[draw.randrange(3) :]
    logits = draw_numbers(draw, shape, draw.choice(DTYPES), torch.inf)
    put_in(draw, logits)
    messages = bincomm.pack_signs(logits)
    assert torch.equal(messages, reference.pack_signs(logits)), "the messages differ"
    spread = with_strides(draw, messages)
    bits = bincomm.unpack_signs(spread, shape[-1])
    assert torch.equal(bits, logits > 0), "the bits differ"


def try_hamming(draw: random.Random) -> None:
    words, values = draw.choice((1, 2, 3, 8, 9, 33)), draw.choice((2, 2**8, 2**31))
    sizes = [draw.choice((0, 1, 3, 40, 300, 700)) for _ in range(2)]
    queries, database = (
        with_strides(draw, torch.randint(-values, values, (size, words), dtype=torch.int32)) for size in sizes
    )
    assert torch.equal(
        bincomm.hamming_distance(queries, database), reference.hamming_distance(queries, database)
    ), "the distances differ"
    k = draw.choice((0, min(1, len(database)), draw.randint(0, len(database)), len(database)))
    found = bincomm.hamming_topk(queries, database, k)
    expected = reference.hamming_topk(queries, database, k)
    assert all(map(torch.equal, found, expected)), f"the nearest {k} differ"


def try_clip(draw: random.Random) -> None:
    dtype = draw.choice((torch.float32, torch.float32, torch.float64))
    shapes = [draw_shape(draw)[draw.randrange(3) :] for _ in range(draw.randint(0, 4))]
    gradients = [draw_numbers(draw, shape, dtype, 1e150) for shape in shapes]
    special = sum(put_in(draw, x) for x in gradients) > 0  # all of them
    before = [x.double().clone() for x in gradients]
    limit = draw.choice((0, 1.0, 10 ** draw.uniform(-6, 6)))
    norm = clip_gradients_(gradients, limit)
    lengths = [x.norm() for x in before]
    total = torch.stack(lengths).norm() if lengths else torch.zeros(())
    if special:
        assert not norm.isfinite(), f"the norm of what is not finite is {norm.item()}"
        return
    check_value("the norm", norm, total, 1e-6, largest=torch.finfo(dtype).max)
    for x, old, length in zip(gradients, before, lengths, strict=True):
        if not limit or length <= limit * (1 - 1e-6):
            assert torch.equal(x.double(), old), "a gradient within the limit was changed"
        elif length > limit * (1 + 1e-6):
            check_gradient("a clipped gradient", x, old * (limit / length))


# ---- Objectives


def try_objective(
    create: Callable[[int], torch.nn.Module], largest: float = torch.inf, *, cosine: bool = False
) -> Callable[[random.Random], None]:
    """A case for an objective of K outputs, up to a size. `cosine`: in fp16 its gradient may overflow."""

    def run(draw: random.Random) -> None:
        views, n, outputs = draw_shape(draw)
        teachers = draw.randint(min(1, views), views)
        dtype = draw.choice(DTYPES)
        student = draw_numbers(draw, (views, n, outputs), dtype, largest)
        teacher = draw_numbers(draw, (teachers, n, outputs), draw.choice((dtype, torch.float64)), largest)
        special = put_in(draw, student) | put_in(draw, teacher)
        if refused(lambda: create(max(1, outputs))(student, teacher), student.shape, teacher.shape):
            return
        x, exact = leaf(student), leaf(student.double())
        values = create(outputs)(x, teacher)
        if special:
            if student.isnan().any() or teacher.isnan().any():
                assert values["loss"].isnan(), f"the loss of NaN is {values['loss'].item()}"
            return
        expected = create(outputs).double()(exact, teacher.double())
        check_value("the loss", values["loss"], expected["loss"], RATE, largest=SUMS_FIT)
        values["loss"].backward()
        fits = x.grad.isfinite().all() or (cosine and dtype == torch.float16)
        assert fits, "the gradient is not finite"

    return run


CASES: dict[str, Callable[[random.Random], None]] = {
    "sign_bce": try_sign_bce,
    "coding_rate": try_coding_rate,
    "messages": try_messages,
    "hamming": try_hamming,
    "clip": try_clip,
    "bits, hard": try_objective(lambda k: DiscreteCommunication(0.1)),
    "bits, β by control": try_objective(lambda k: DiscreteCommunication()),
    "bits, soft": try_objective(lambda k: DiscreteCommunication(0.1, agreement="soft")),
    "bits, cosine": try_objective(lambda k: DiscreteCommunication(0.1, agreement="cosine"), cosine=True),
    "SimDINO": try_objective(lambda k: SimDINO(), cosine=True),
    "SimDINO, student's rate": try_objective(lambda k: SimDINO(expa_type=0), cosine=True),
    "DINO": try_objective(lambda k: DINO(k), LARGEST_SCORE),
}

if __name__ == "__main__":
    sys.exit(main())
