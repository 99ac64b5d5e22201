import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import bincomm
from bincomm.ops import reference
from bincomm.ops.sign_bce import sign_bce_backward_pytorch, sign_bce_pytorch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # V, U, n, K, pairs
    (10, 2, 8, 256, "cross"),
    (4, 2, 3, 250, "cross"),
    (2, 1, 1, 1, "cross"),
    (3, 3, 5, 33, "cross"),
    (3, 2, 2, 1000, "all"),
    (1, 1, 4, 31, "all"),
    (2, 4, 3, 64, "all"),
    (3, 3, 5, 513, "matched"),
]


def eager_loop(student, teacher, pairs):
    """The usual loop: binary_cross_entropy_with_logits per pair, in the dtype of the logits."""
    m = (teacher > 0).to(student.dtype)
    pairs = reference.paired_views(len(student), len(teacher), pairs)
    return sum(F.binary_cross_entropy_with_logits(student[v], m[u]) for u, v in pairs) / len(pairs)


def value_and_gradient(function, student, *args, **kwargs):
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(student, *args, **kwargs)
    (3 * loss).backward()  # a grad_output other than 1
    return loss.detach().double(), student.grad.double()


def relative_error(value, truth):
    return ((value - truth).norm() / truth.norm().clamp_min(1e-300)).item()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 3, 1e2, 1e4])
@pytest.mark.parametrize(("views", "teachers", "n", "bits", "pairs"), SHAPES)
def test_error_is_at_most_that_of_eager(views, teachers, n, bits, pairs, scale, dtype):
    student = (scale * torch.randn(views, n, bits)).to(dtype)
    teacher = torch.randn(teachers, n, bits).to(dtype)
    truth = value_and_gradient(reference.sign_bce, student.double(), teacher.double(), pairs)
    results = value_and_gradient(bincomm.sign_bce, student, teacher, pairs=pairs)
    baselines = value_and_gradient(eager_loop, student, teacher, pairs)
    for result, baseline, exact in zip(results, baselines, truth, strict=True):
        assert relative_error(result, exact) <= relative_error(baseline, exact) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2, 1e4])
def test_accuracy_holds_at_every_magnitude(scale, dtype):
    # From 1e2 on the losses of agreeing elements are tiny: only a formula without cancellation keeps them.
    student = (scale * torch.randn(2, 16, 96)).to(dtype)
    agreeing = student.flip(0)  # each view predicts the other's message: all terms of the loss are small
    for teacher in (torch.randn(2, 16, 96), agreeing):
        truth = value_and_gradient(reference.sign_bce, student.double(), teacher.double())
        loss, gradient = value_and_gradient(bincomm.sign_bce, student, teacher)
        assert relative_error(loss, truth[0]) < 5e-7
        # Underflow in the dtype of the gradient is allowed.
        tiny = torch.finfo(dtype).smallest_normal
        close = (gradient - truth[1]).abs() <= truth[1].abs() * (torch.finfo(dtype).eps + 1e-6) + 2 * tiny
        assert close.all()


def test_exp_and_log1p_of_the_cpu_kernel():
    logits = torch.cat(
        [torch.linspace(0, 90, 3001), torch.logspace(-30, 2, 500), torch.tensor([88.0, 103.0])]
    )
    right = logits.view(1, 1, -1)
    ones = torch.ones_like(right)
    _, gradient = value_and_gradient(bincomm.sign_bce, right, ones, pairs="all")
    truth = -3 * torch.sigmoid(-right.double()) / right.numel()
    normal = truth.abs() > 1e-35
    assert ((gradient / truth - 1)[normal]).abs().max() < 5e-7
    assert (gradient - truth)[~normal].abs().max() < 1e-34
    for a in logits[::10].tolist():
        loss = bincomm.sign_bce(torch.tensor([[[a]]]), torch.ones(1, 1, 1), pairs="all").item()
        if a < 85:
            assert loss == pytest.approx(math.log1p(math.exp(-a)), rel=5e-7)


def test_infinite_logits():
    inf = math.inf
    student = torch.tensor([[[inf, -inf, inf, -inf, 1.0]]])
    right = torch.tensor([[[1.0, -1.0, 1.0, -1.0, 1.0]]])
    loss, gradient = value_and_gradient(bincomm.sign_bce, student, right, pairs="all")
    truth = value_and_gradient(reference.sign_bce, student.double(), right.double(), "all")
    assert loss == pytest.approx(math.log1p(math.exp(-1)) / 5, rel=1e-6)
    torch.testing.assert_close(gradient, truth[1], rtol=1e-6, atol=0)
    wrong, gradient = value_and_gradient(bincomm.sign_bce, student, -right, pairs="all")
    assert wrong == inf
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_on_either_side_shows(dtype):
    student, teacher = torch.randn(3, 4, 40, dtype=dtype), torch.randn(2, 4, 40, dtype=dtype)
    for x in (student, teacher):
        value = x[0, 2, 33].clone()
        x[0, 2, 33] = math.nan
        loss, gradient = value_and_gradient(bincomm.sign_bce, student, teacher)
        assert loss.isnan()
        if x is student:
            assert gradient[0, 2, 33].isnan()
        x[0, 2, 33] = value
    assert bincomm.sign_bce(student, teacher).isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_packed_messages_change_nothing(dtype):
    student, teacher = torch.randn(4, 6, 70, dtype=dtype), torch.randn(2, 6, 70, dtype=dtype)
    expected = value_and_gradient(bincomm.sign_bce, student, teacher)

    permuted = student.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.full((4, 12, 90), math.nan, dtype=dtype)
    wide[:, ::2, 10:80] = student
    sparse = torch.full((2, 6, 140), math.nan, dtype=dtype)
    sparse[..., ::2] = teacher
    words = torch.full((2, 9, 7), -1, dtype=torch.int32)
    words[:, 3:, 1:4] = bincomm.pack_signs(teacher)
    for same_student in (student, permuted, wide[:, ::2, 10:80]):
        for same_teacher in (
            teacher,
            sparse[..., ::2],
            words[:, 3:, 1:4],
            teacher.transpose(0, 1).clone().mT.mT.transpose(0, 1),
        ):
            results = value_and_gradient(bincomm.sign_bce, same_student, same_teacher)
            assert all(map(torch.equal, results, expected))


def test_the_same_for_any_number_of_threads_and_every_time():
    student, teacher = torch.randn(10, 32, 700), torch.randn(2, 32, 700)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3, 2):
        torch.set_num_threads(number)
        results.append(value_and_gradient(bincomm.sign_bce, student, teacher))
    torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_inputs_are_left_alone_and_backward_can_be_repeated():
    student, teacher = torch.randn(3, 4, 40, requires_grad=True), torch.randn(2, 4, 40, requires_grad=True)
    copies = student.detach().clone(), teacher.detach().clone()
    loss = bincomm.sign_bce(student, teacher)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, student)
    assert torch.equal(once, twice)
    assert torch.equal(student.detach(), copies[0])
    assert torch.equal(teacher.detach(), copies[1])
    bincomm.sign_bce(student, teacher).backward()
    assert teacher.grad is None  # no gradient reaches the teacher


def test_no_images_give_nan_like_the_mean_of_nothing():
    student = torch.randn(3, 0, 40, requires_grad=True)
    loss = bincomm.sign_bce(student, torch.randn(2, 0, 40))
    assert loss.isnan()
    loss.backward()
    assert student.grad.shape == (3, 0, 40)


def test_knowing_nothing_costs_ln_2():
    assert bincomm.sign_bce(torch.zeros(4, 3, 50), torch.randn(2, 3, 50)).item() == pytest.approx(math.log(2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", ["cross", "all", "matched"])
def test_opcheck(pairs, dtype):
    student = torch.randn(3, 4, 40, dtype=dtype, requires_grad=True)
    teacher = torch.randn(3, 4, 40, dtype=dtype)
    words = bincomm.pack_signs(teacher)
    opcheck(torch.ops.bincomm.sign_bce, (student, teacher, pairs))
    opcheck(torch.ops.bincomm.sign_bce, (student, words, pairs))
    opcheck(torch.ops.bincomm.sign_bce_backward, (torch.tensor(2.0), student.detach(), words, pairs))


def test_gradcheck_of_the_reference():
    student = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: bincomm.sign_bce(s, teacher), student)


def test_the_pytorch_implementation_agrees():
    """It runs on devices without a kernel."""
    student, teacher = torch.randn(4, 3, 50, dtype=torch.float64), torch.randn(2, 3, 50)
    loss, words = sign_bce_pytorch(student, teacher, "cross")
    gradient = sign_bce_backward_pytorch(torch.tensor(3.0, dtype=torch.float64), student, words, "cross")
    truth = value_and_gradient(reference.sign_bce, student, teacher)
    torch.testing.assert_close((loss, gradient), truth)
    assert torch.equal(words, bincomm.pack_signs(teacher))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("packed", [False, True])
def test_compile_fullgraph(backend, packed):
    student, teacher = torch.randn(4, 3, 50), torch.randn(2, 3, 50)
    teacher = bincomm.pack_signs(teacher) if packed else teacher

    def step(s, t):
        return bincomm.sign_bce(s * 2, t)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = value_and_gradient(compiled, student, teacher)
    assert all(map(torch.equal, results, value_and_gradient(step, student, teacher)))


def test_autocast_changes_nothing():
    student, teacher = torch.randn(4, 3, 50), torch.randn(2, 3, 50)
    expected = value_and_gradient(bincomm.sign_bce, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        results = value_and_gradient(bincomm.sign_bce, student, teacher)
    assert all(map(torch.equal, results, expected))


def test_functional_call_and_vmap():
    network, images, teacher = torch.nn.Linear(8, 40), torch.randn(3, 5, 8), torch.randn(2, 5, 40)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    loss = bincomm.sign_bce(torch.func.functional_call(network, parameters, images), teacher)
    results = torch.autograd.grad(loss, list(parameters.values()))
    expected = torch.autograd.grad(bincomm.sign_bce(network(images), teacher), list(network.parameters()))
    assert all(map(torch.equal, results, expected))
    students = torch.randn(4, 3, 5, 40)
    mapped = torch.func.vmap(lambda student: bincomm.sign_bce(student, teacher))(students)
    assert torch.equal(mapped, torch.stack([bincomm.sign_bce(student, teacher) for student in students]))


def test_second_derivative():
    student, teacher = torch.randn(3, 2, 40, requires_grad=True), torch.randn(2, 2, 40)
    truth = student.detach().double().requires_grad_()

    def curvature(s, t):
        (gradient,) = torch.autograd.grad(bincomm.sign_bce(s, t), s, create_graph=True)
        (second,) = torch.autograd.grad((gradient**2).sum(), s)
        return second

    torch.testing.assert_close(
        curvature(student, teacher).double(), curvature(truth, teacher), rtol=1e-4, atol=1e-12
    )


def test_forward_mode_is_refused_and_never_silently_zero():
    student, teacher = torch.randn(3, 2, 40), torch.randn(2, 2, 40)
    with pytest.raises(NotImplementedError, match="student: .*forward-mode"):
        torch.func.jvp(lambda s: bincomm.sign_bce(s, teacher), (student,), (student,))
    with pytest.raises(NotImplementedError, match="logits: .*forward-mode"):
        torch.func.jvp(bincomm.coding_rate, (student,), (student,))
    _, tangent = torch.func.jvp(
        lambda s: bincomm.sign_bce(s, teacher), (student.double(),), (student.double(),)
    )
    assert tangent != 0


@pytest.mark.parametrize(
    ("student", "teacher", "pairs", "error", "words"),
    [
        ("logits", torch.randn(2, 4, 8), "cross", TypeError, "student: expected a tensor"),
        (
            torch.ones(3, 4, 8, dtype=torch.int64),
            torch.randn(2, 4, 8),
            "cross",
            TypeError,
            "student: .*int64",
        ),
        (torch.randn(3, 4, 8), torch.ones(2, 4, 8, dtype=torch.bool), "cross", TypeError, "teacher: .*bool"),
        (torch.randn(4, 8), torch.randn(2, 4, 8), "cross", ValueError, r"student: .*\(V, n, K\).*\(4, 8\)"),
        (
            torch.randn(3, 4, 8),
            torch.randn(2, 5, 8),
            "cross",
            ValueError,
            r"teacher: .*\(U, 4, 8\).*\(2, 5, 8\)",
        ),
        (torch.randn(3, 4, 8), torch.randn(2, 4, 9), "cross", ValueError, "teacher: .*logits"),
        (
            torch.randn(3, 4, 8),
            torch.zeros(2, 4, 2, dtype=torch.int32),
            "all",
            ValueError,
            "teacher: .*messages of 8",
        ),
        (torch.randn(3, 4, 8), torch.randn(2, 4, 8), "some", ValueError, "pairs: .*'some'"),
        (torch.randn(3, 4, 8), torch.randn(2, 4, 8), "matched", ValueError, "teacher: .*U=2"),
        (torch.randn(3, 4, 8), torch.randn(4, 4, 8), "cross", ValueError, "student: .*V=3 and U=4"),
        (torch.randn(1, 4, 8), torch.randn(1, 4, 8), "cross", ValueError, "student: .*V=1"),
        (torch.randn(0, 4, 8), torch.randn(0, 4, 8), "all", ValueError, "V=0"),
        (torch.randn(3, 4, 8), torch.randn(2, 4, 8, device="meta"), "cross", ValueError, "teacher: .*meta"),
    ],
)
def test_wrong_arguments_are_named(student, teacher, pairs, error, words):
    with pytest.raises(error, match=words):
        bincomm.sign_bce(student, teacher, pairs=pairs)


def test_the_kernel_itself_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match="teacher"):
        torch.ops.bincomm.sign_bce(torch.randn(3, 4, 40), torch.randn(2, 5, 40), "cross")
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.bincomm.sign_bce(torch.randn(3, 4, 40).double(), torch.randn(2, 4, 40), "cross")
