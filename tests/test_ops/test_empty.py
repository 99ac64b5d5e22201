"""Private operations, which check little, with empty dimensions: they return or raise, and never end the
process, as an integer division by zero in C++ would."""

import importlib
import itertools
import pkgutil

import pytest
import torch

import bincomm.ops

for _module in pkgutil.iter_modules(bincomm.ops.__path__, "bincomm.ops."):
    importlib.import_module(_module.name)  # where its operations are registered

EMPTY = list(itertools.product((0, 3), (0, 2), (0, 5)))  # (V, n, K)
OPS = torch.ops.bincomm


def numbers(*shape):
    return torch.zeros(shape)


def words(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def calls(views, n, bits):
    """Every registered operation with inputs of this size: name, arguments."""
    logits, width = numbers(views, n, bits), (bits + 31) // 32
    for teachers, pairs in itertools.product((0, 2, views), ("cross", "all", "matched")):
        message = words(teachers, n, width)
        yield "sign_bce", (logits, numbers(teachers, n, bits), pairs)
        yield "sign_bce", (logits, message, pairs)
        yield "sign_bce_backward", (numbers(), logits, message, pairs)
    yield "coding_rate", (logits, 0.05, "")
    for teachers in (0, 2):
        message, rows = words(teachers, n, width), numbers(teachers, n)
        forward = (logits, message, numbers(teachers, bits, bits), rows, numbers())
        for state in (numbers(0), numbers(3)):
            yield "discrete_communication", (logits, numbers(teachers, n, bits), state, 0.1, 0.05, "", 1)
            yield "discrete_communication_backward", (numbers(), numbers(6), *forward, 0.05, "", 1)
    yield "coding_rate_rows", (logits,)
    yield "coding_rate_factor", (numbers(views, bits, bits),)
    yield "coding_rate_inverse", (numbers(views, bits, bits),)
    yield "coding_rate_gradient", (numbers(views), logits, logits, numbers(views, n), 1.0)
    for side, of_images in ((n, True), (bits, False)):
        yield "coding_rate_gram", (logits, 1.0, of_images)
        factor = numbers(views, side, side)
        rest = (logits, factor, numbers(views, n), 1.0, of_images)
        yield "coding_rate_backward", (numbers(views), *rest)
        yield "coding_rate_add_gradient_", (numbers(views, n, bits), numbers(views), numbers(), 1.0, *rest)
    yield "pack_signs", (logits,)
    yield "unpack_signs", (words(views, n, width), bits)
    yield "hamming_distance", (words(views, bits), words(n, bits))
    for k in (-1, 0, 1):
        yield "hamming_topk", (words(views, bits), words(n, bits), k)
    yield "clip_gradients_", ([logits], 1.0)
    yield "clip_gradients_", ([], 1.0)


@pytest.mark.parametrize("shape", EMPTY)
def test_every_operation_returns_or_raises(shape):
    for name, arguments in calls(*shape):
        try:
            results = getattr(OPS, name)(*arguments)
        except (RuntimeError, ValueError, ZeroDivisionError):
            continue
        if results is None:  # it changes an argument
            continue
        for result in [results] if isinstance(results, torch.Tensor) else results:
            assert isinstance(result, torch.Tensor)


def test_no_operation_is_missing():
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("bincomm::")}  # fmt: skip
    tried = {name for name, _ in calls(3, 2, 5)} | {"coding_rate_sweep"}  # on GPUs alone
    assert {name.partition(".")[0] for name in registered} <= tried


def test_nothing_has_a_gram_matrix_of_zeros():
    gram, reciprocal = OPS.coding_rate_gram(torch.empty(2, 0, 5), 1.0, False)
    assert torch.equal(gram, torch.zeros(2, 5, 5))
    assert reciprocal.shape == (2, 0)
    assert torch.equal(OPS.coding_rate_gram(torch.empty(2, 3, 0), 1.0, True)[0], torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="logits: expected shape .* got \\(2, 3, 0\\)"):
        bincomm.coding_rate(torch.empty(2, 3, 0))
