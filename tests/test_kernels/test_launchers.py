"""The launchers under Triton's interpreter; on a GPU, tests/test_gpu runs the same through the operations."""

import math

import pytest
import torch
import torch.nn.functional as F
from triton.runtime.interpreter import InterpretedFunction

from bincomm.kernels import discrete_communication, messages, sign_bce
from bincomm.ops import discrete_communication as of_pytorch
from bincomm.ops import reference
from tests.calls import Calls

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        not sign_bce.INTERPRETED.value, reason="needs Triton's interpreter (TRITON_INTERPRET=1)"
    ),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # V, U, n, K, pairs
    (4, 2, 3, 64, "cross"),
    (5, 2, 2, 250, "cross"),
    (3, 3, 2, 33, "cross"),
    (2, 1, 1, 1, "cross"),
    (3, 2, 40, 31, "all"),
    (2, 3, 2, 40, "all"),
    (3, 3, 2, 1000, "matched"),
]


def forward_and_backward(student, teacher, pairs, scale=3.0):
    loss, words = sign_bce.launch_sign_bce_forward(student, teacher, pairs)
    words = teacher if teacher.dtype == torch.int32 else words
    return loss, sign_bce.launch_sign_bce_backward(torch.tensor(scale), student, words, pairs)


def truth(student, teacher, pairs, scale=3.0):
    exact = student.double().requires_grad_()
    loss = reference.sign_bce(exact, teacher.double(), pairs)
    (scale * loss).backward()
    return loss.detach(), exact.grad


def eager(student, teacher, pairs, scale=3.0):
    student = student.detach().clone().requires_grad_()
    m = (teacher > 0).to(student.dtype)
    pairs = reference.paired_views(len(student), len(teacher), pairs)
    loss = sum(F.binary_cross_entropy_with_logits(student[v], m[u]) for u, v in pairs) / len(pairs)
    (scale * loss).backward()
    return loss.detach(), student.grad


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("views", "teachers", "n", "bits", "pairs"), SHAPES)
def test_error_is_at_most_that_of_eager(views, teachers, n, bits, pairs, dtype):
    student = (3 * torch.randn(views, n, bits)).to(dtype)
    teacher = torch.randn(teachers, n, bits).to(dtype)
    exact = truth(student, teacher, pairs)
    result, baseline = forward_and_backward(student, teacher, pairs), eager(student, teacher, pairs)
    assert relative_error(result[0], exact[0]) <= relative_error(baseline[0], exact[0]) + 1e-7
    # The interpreter cuts fp32 off to bf16 where a GPU rounds, an error twice as large.
    slack = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 1e-7
    assert relative_error(result[1], exact[1]) <= relative_error(baseline[1], exact[1]) + slack
    assert result[1].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_message_packed_teacher_and_repetition(dtype):
    student, teacher = torch.randn(4, 3, 70).to(dtype), torch.randn(2, 3, 70).to(dtype)
    loss, words = sign_bce.launch_sign_bce_forward(student, teacher, "cross")
    assert torch.equal(words, reference.pack_signs(teacher))
    from_words, empty = sign_bce.launch_sign_bce_forward(student, words, "cross")
    assert torch.equal(from_words, loss)
    assert empty.numel() == 0
    assert torch.equal(sign_bce.launch_sign_bce_forward(student, teacher, "cross")[0], loss)


@pytest.mark.parametrize("pairs", ["cross", "matched"])
def test_strides(pairs):
    student, teacher = torch.randn(2, 5, 70), torch.randn(2, 5, 70)
    expected = forward_and_backward(student, teacher, pairs)
    wide = torch.full((2, 10, 90), math.nan)
    wide[:, ::2, 10:80] = student
    sparse = torch.full((2, 5, 140), math.nan)
    sparse[..., ::2] = teacher
    for s in (student.permute(2, 0, 1).contiguous().permute(1, 2, 0), wide[:, ::2, 10:80]):
        for t in (sparse[..., ::2], reference.pack_signs(teacher).mT.contiguous().mT):
            loss, gradient = forward_and_backward(s, t, pairs)
            assert torch.equal(loss, expected[0])
            assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0, 1e4])
def test_magnitudes(scale):
    student = scale * torch.randn(2, 4, 96)
    for teacher in (
        torch.randn(2, 4, 96),
        student.flip(0),
    ):  # the second: each view predicts the other's bits
        exact = truth(student, teacher, "cross")
        loss, gradient = forward_and_backward(student, teacher, "cross")
        assert relative_error(loss, exact[0]) < 1e-6
        assert ((gradient - exact[1]).abs() <= 1e-5 * exact[1].abs() + 1e-38).all()


def test_infinite_and_nan_logits():
    inf, nan = math.inf, math.nan
    student = torch.tensor([[[inf, -inf, inf, -inf, 1.0]]])
    right = torch.tensor([[[1.0, -1.0, 1.0, -1.0, 1.0]]])
    loss, gradient = forward_and_backward(student, right, "all")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)) / 5)
    assert torch.allclose(gradient.double(), truth(student, right, "all")[1])
    loss, gradient = forward_and_backward(student, -right, "all")
    assert loss == inf
    assert gradient.isfinite().all()
    student, teacher = torch.randn(3, 2, 40), torch.randn(2, 2, 40)
    for x in (student, teacher):
        value = x[1, 1, 33].clone()
        x[1, 1, 33] = nan
        loss, gradient = forward_and_backward(student, teacher, "cross")
        assert loss.isnan()
        assert x is teacher or gradient[1, 1, 33].isnan()
        x[1, 1, 33] = value


@pytest.mark.parametrize("views", range(1, 21))
def test_numbers_of_views_and_teachers(views):
    """The loop takes views three at a time and a log for twelve: every remainder of both.

    The same for the teachers' own views, whose code is unrolled and therefore slow to interpret.
    """
    several = (2, 3, 5)[views % 3]
    cases = [(1, "all"), (several, "all"), (views, "matched")]
    teachers = {1, several, views}
    if views <= 6 or views % sign_bce.VIEWS_PER_LOG.value == 1:
        teachers |= {2, 3, 5, views - 1}
    cases += [(u, "cross") for u in teachers if 0 < u <= views and views > 1]
    for teachers, pairs in cases:
        student, teacher = 3 * torch.randn(views, 2, 33), torch.randn(teachers, 2, 33)
        exact = truth(student, teacher, pairs)
        loss, gradient = forward_and_backward(student, teacher, pairs)
        assert relative_error(loss, exact[0]) < 5e-7, (teachers, pairs)
        slack = 1e-6 * exact[1].abs().max()  # where teachers differ, a gradient is a difference
        assert ((gradient - exact[1]).abs() <= 1e-5 * exact[1].abs() + slack).all(), (teachers, pairs)


def test_the_product_of_a_block_of_views_stays_finite():
    """All factors 1 + exp(-|a|) are 2: the largest product there is."""
    for views, teachers, pairs in [(31, 2, "cross"), (28, 2, "cross"), (29, 29, "matched"), (29, 3, "all")]:
        student, teacher = torch.zeros(views, 1, 40), torch.randn(teachers, 1, 40)
        student[..., ::2] = -0.0
        loss, _ = forward_and_backward(student, teacher, pairs)
        assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("teachers", "scale"),
    [
        *((1, scale) for scale in (1e-2, 1e4)),
        *((2, scale) for scale in (1e-4, 1e-2, 1.0, 30.0, 1e4)),
        *((3, scale) for scale in (1e-4, 1.0, 30.0)),
        *((5, scale) for scale in (1e-4, 1e4)),
    ],
)
def test_small_losses_where_all_agree(teachers, scale):
    signs = torch.randn(2, 96).sign()
    student = scale * torch.randn(17, 2, 96).abs() * signs
    teacher = torch.rand(teachers, 2, 96) * signs
    for weak in (None, 0, 16):  # a view, a teacher's own or not, in which all logits are slightly wrong
        if weak is not None:
            student = student.clone()
            student[weak] = -1e-3 * signs
        exact = truth(student, teacher, "cross")
        loss, gradient = forward_and_backward(student, teacher, "cross")
        assert relative_error(loss, exact[0]) < 1e-6
        assert ((gradient - exact[1]).abs() <= 1e-5 * exact[1].abs() + 1e-38).all()


@pytest.mark.parametrize(("views", "pairs"), [(4, "cross"), (3, "all"), (2, "matched")])
def test_infinite_and_nan_logits_in_every_kind_of_view(views, pairs):
    """A teacher's own views, and those that the loop takes as the first, the second or alone."""
    teachers = 2
    clean = torch.randn(views, 1, 8)
    for view in range(views):
        for bits in ([0, 0], [1, 1], [0, 1]):  # the teachers' bits at the position of the logit
            teacher = torch.randn(teachers, 1, 8)
            teacher[:, 0, 3] = 2.0 * torch.tensor(bits) - 1
            student = clean.clone()
            for value in (math.inf, -math.inf):
                student[view, 0, 3] = value
                exact = truth(student, teacher, pairs)
                loss, gradient = forward_and_backward(student, teacher, pairs)
                torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0)
                torch.testing.assert_close(gradient.double(), exact[1], rtol=1e-5, atol=1e-7)
            student[view, 0, 3] = math.nan
            loss, gradient = forward_and_backward(student, teacher, pairs)
            assert loss.isnan()
            assert torch.equal(gradient.isnan(), student.isnan())
    for u in range(teachers):
        teacher = torch.randn(teachers, 1, 8)
        teacher[u, 0, 3] = math.nan
        loss, words = sign_bce.launch_sign_bce_forward(clean, teacher, pairs)
        assert loss.isnan()
        assert torch.equal(words, reference.pack_signs(teacher))


def test_nothing_is_written_outside():
    """The interpreter does not trap accesses out of bounds: guards around the outputs show them."""
    views, teachers, n, bits = 3, 2, 3, 33
    student, teacher = torch.randn(views, n, bits), torch.randn(teachers, n, bits)
    guard, buffers = 64, []

    def guarded(*shape, **kwargs):
        shape = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
        size, dtype = math.prod(shape), kwargs.get("dtype", torch.float32)
        buffer = torch.full((size + 2 * guard,), 77, dtype=dtype)
        buffers.append(buffer)
        return buffer[guard : guard + size].view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        patch.setattr(
            torch.Tensor,
            "new_empty",
            lambda self, *shape, dtype=None, **_: guarded(*shape, dtype=dtype or self.dtype),
        )
        forward_and_backward(student, teacher, "cross")
        messages.launch_unpack_signs(messages.launch_pack_signs(teacher), bits)
    assert len(buffers) >= 6  # the launchers' six outputs, and those of the interpreter itself
    for buffer in buffers:
        untouched = torch.full((guard,), 77, dtype=buffer.dtype)
        assert torch.equal(buffer[:guard], untouched)
        assert torch.equal(buffer[-guard:], untouched)


def test_no_images():
    student, teacher = torch.randn(3, 0, 40), torch.randn(2, 0, 40)
    loss, gradient = forward_and_backward(student, teacher, "cross")
    assert loss.isnan()
    assert gradient.shape == (3, 0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 33), (1,), (70, 31), (0, 40), (3, 0)])
def test_packing(shape, dtype):
    logits = torch.randn(shape).to(dtype)
    words = messages.launch_pack_signs(logits)
    assert torch.equal(words, reference.pack_signs(logits))
    assert torch.equal(messages.launch_unpack_signs(words, shape[-1]), logits > 0)


def test_packing_strided():
    logits = torch.randn(4, 70, 6)
    assert torch.equal(messages.launch_pack_signs(logits.mT), reference.pack_signs(logits.mT))
    words = messages.launch_pack_signs(torch.randn(6, 70))
    assert torch.equal(messages.launch_unpack_signs(words[::2], 70), reference.unpack_signs(words[::2], 70))


# The paper's objective ------------------------------------------------------------------------------------


def of_kernels(student, teacher, state, beta=0.3):
    """What runs for CUDA tensors, where the coding rate is not one of Triton's kernels."""
    arguments = (student, teacher, state, beta, 0.05, "", 1)
    return of_pytorch._forward(of_pytorch._agree_on_cuda, of_pytorch._weigh_on_cuda, *arguments)


@pytest.mark.parametrize(
    ("views", "teachers", "n", "bits", "dtype"),
    [(3, 2, 9, 40, torch.float32), (3, 3, 1, 600, torch.float16), (2, 1, 9, 1, torch.bfloat16)],
)
def test_the_objective_is_that_of_pytorch(views, teachers, n, bits, dtype):
    student, teacher = torch.randn(views, n, bits).to(dtype), torch.randn(teachers, n, bits).to(dtype)
    student[0, 0, 0] = 0
    student = student.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for state in (torch.empty(0), torch.tensor([-1.5, 0.5, 0.8]), torch.tensor([6.9, 0.1, 0.2])):
        results = of_kernels(student, teacher, state)
        expected = torch.ops.bincomm.discrete_communication(student, teacher, state, 0.3, 0.05, "", 1)
        for result, value in zip(results, expected, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-6)


def test_more_images_than_are_counted_at_once():
    student, rates = torch.randn(3, 1100, 3), torch.tensor([2.0, 3.0])
    ones = discrete_communication.launch_count_ones(student[:2])
    assert len(ones) == 18 > discrete_communication.PARTS_AT_ONCE
    assert torch.equal(ones.sum(0), (student[:2] > 0).float().sum((0, 1)))
    arguments = (rates, student, torch.tensor([-1.5, 0.5, 0.8]), 0.0, 0.05, "", 1)
    terms = 2 * 2 * student[0].numel()
    found = of_pytorch._weigh_on_cuda(torch.tensor([0.3 * terms, 0.2 * terms]), *arguments)
    expected = of_pytorch._weigh_pytorch(torch.tensor(0.5), *arguments)
    for result, value in zip(found, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-6)


def test_the_objective_of_several_ranks(monkeypatch):
    """Two ranks with the same images: what is summed over them is twice as much."""

    class Twice:
        @staticmethod
        def apply(x, group):
            return 2 * x

    monkeypatch.setattr(reference, "SumOverRanks", Twice)
    student, teacher, state = torch.randn(3, 7, 40), torch.randn(2, 7, 40), torch.tensor([-1.5, 0.5, 0.8])
    arguments = (state, 0.3, 0.05)
    two = of_pytorch._forward(
        *(of_pytorch._agree_on_cuda, of_pytorch._weigh_on_cuda, student, teacher, *arguments, "pair", 2)
    )
    whole = (torch.cat([x, x], 1) for x in (student, teacher))
    one = torch.ops.bincomm.discrete_communication(*whole, *arguments, "", 1)
    for result, expected in zip(two[:2], one[:2], strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_the_control_passes_over_what_is_not_finite():
    student, teacher = torch.randn(3, 4, 40), torch.randn(2, 4, 40)
    student[0, 1, 2] = math.nan
    state = torch.tensor([-1.5, 0.5, 0.8])
    loss, scalars, *_ = of_kernels(student, teacher, state)
    expected = torch.ops.bincomm.discrete_communication(student, teacher, state, 0.3, 0.05, "", 1)[1]
    assert loss.isnan()
    assert scalars[4] == 0.5  # the rate is NaN, and the entropy is that of a bit that is 0
    torch.testing.assert_close(scalars[2:], expected[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("state", "kernels"),
    [
        (torch.empty(0), ["sign_bce_forward_kernel", "weigh_rate_kernel"]),
        (torch.zeros(3), ["sign_bce_forward_kernel", "count_ones_kernel", "weigh_rate_kernel"]),
    ],
    ids=["fixed", "auto"],
)
def test_launches_of_the_objective(state, kernels, monkeypatch):
    """And three of the coding rate: norms, Gram matrix and its inversion."""
    student, teacher = torch.randn(4, 3, 40), torch.randn(2, 3, 40)
    launched, run = [], InterpretedFunction.run

    def recorded(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    with Calls() as calls:
        of_kernels(student, teacher, state)
    assert launched == kernels
    assert calls.names == ["coding_rate"]


def test_launches_of_the_objectives_gradient():
    """One of sign_bce, and two of the coding rate: the product with the inverse, and the sum."""
    student, teacher = torch.randn(4, 3, 40), torch.randn(2, 3, 40)
    results = torch.ops.bincomm.discrete_communication(student, teacher, torch.empty(0), 0.3, 0.05, "", 1)
    grad = torch.ones(())
    with Calls() as calls:
        of_pytorch._gradient(grad, results[1], student, *results[2:], 0.05, "", 1)
    assert calls.names == ["sign_bce_backward", "coding_rate_add_gradient_"]
