"""The operations on a real GPU: values, gradients, no host sync, CUDA graphs."""

import pytest
import torch

import bincomm
from bincomm.ops import reference
from bincomm.ops.clip import clip_gradients_, clip_gradients_pytorch_
from bincomm.ops.library import KERNELS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def no_sync():
    """Any operation that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def value_and_gradient(function, student, *args, **kwargs):
    student = student.detach().clone().requires_grad_()
    value = function(student, *args, **kwargs).sum()
    (3 * value).backward()
    return value.detach(), student.grad


def is_near(gradient, exact, dtype, tolerance):
    """Within rounding; of fp16 also that of the smallest numbers, half of one for each element."""
    least = 2.0**-25 * exact.numel() ** 0.5 if dtype == torch.float16 else 0
    error = (gradient.double() - exact).norm()
    return error < max(tolerance, torch.finfo(dtype).eps) * exact.norm() + least


def test_triton_is_used():
    for name in ("sign_bce", "discrete_communication"):
        assert KERNELS[name]["cuda"] == "Triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("views", "teachers", "n", "bits", "pairs"),
    [
        (12, 2, 64, 256, "cross"),
        (4, 2, 3, 250, "cross"),
        (2, 1, 1, 1, "cross"),
        (3, 2, 9, 33, "all"),
        (3, 3, 5, 1000, "matched"),
    ],
)
def test_sign_bce(views, teachers, n, bits, pairs, dtype):
    student = (3 * torch.randn(views, n, bits, device="cuda")).to(dtype)
    teacher = torch.randn(teachers, n, bits, device="cuda").to(dtype)
    exact = value_and_gradient(reference.sign_bce, student.double(), teacher.double(), pairs)
    for targets in (teacher, bincomm.pack_signs(teacher)):
        loss, gradient = value_and_gradient(bincomm.sign_bce, student, targets, pairs=pairs)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0)
        assert is_near(gradient, exact[1], dtype, 1e-6)
        again = value_and_gradient(bincomm.sign_bce, student, targets, pairs=pairs)
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], gradient)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 33), (1,), (70, 31), (0, 40), (300, 256)])
def test_messages(shape):
    logits = torch.randn(shape, device="cuda")
    words = bincomm.pack_signs(logits)
    assert torch.equal(words, reference.pack_signs(logits))
    assert torch.equal(bincomm.unpack_signs(words, shape[-1]), logits > 0)


@pytest.mark.parametrize("values", [2**31, 2])  # with two values of a word most distances are ties
@pytest.mark.parametrize(
    ("queries", "size", "words", "k"),
    [(300, 5000, 8, 20), (1, 300_000, 8, 20), (3, 50, 1, 50), (70, 3000, 63, 1), (5, 3000, 64, 30)],
)
def test_hamming(queries, size, words, k, values, no_sync):
    a, b = (torch.randint(-values, values, (rows, words), dtype=torch.int32) for rows in (queries, size))
    torch.cuda.set_sync_debug_mode("default")
    on_gpu = a.cuda(), b.cuda()
    torch.cuda.set_sync_debug_mode("error")
    distances, results = bincomm.hamming_distance(*on_gpu), bincomm.hamming_topk(*on_gpu, k)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(distances.cpu(), bincomm.hamming_distance(a, b))
    for result, expected in zip(results, bincomm.hamming_topk(a, b, k), strict=True):
        assert torch.equal(result.cpu(), expected)


def test_sign_bce_beyond_2_31_elements():
    views, n, bits = 3, 750_000, 1024
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    student = torch.randn(n, bits, device="cuda", dtype=torch.bfloat16).repeat(views, 1, 1)
    teacher = torch.randn(1, n, bits, device="cuda", dtype=torch.bfloat16)
    loss, gradient = value_and_gradient(bincomm.sign_bce, student, teacher)
    last = slice(n - 8, n)
    exact = value_and_gradient(reference.sign_bce, student[:, last].double(), teacher[:, last].double())
    torch.testing.assert_close(gradient[:, last].double() * n / 8, exact[1], rtol=1e-2, atol=1e-9)
    assert 0.5 < loss < 1


CODING_RATES = [  # one block a matrix, clusters of 4, and part by part
    (2, 1, 1),
    (2, 9, 1),
    (3, 33, 100),
    (2, 128, 256),
    (12, 256, 256),
    (2, 300, 500),
    (12, 600, 512),
    (2, 1100, 1000),
    (2, 1024, 2000),
    (1, 1300, 1200),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CODING_RATES, ids=str)
def test_coding_rate(shape, dtype, no_sync):
    logits = torch.randn(shape, device="cuda").to(dtype)
    torch.cuda.set_sync_debug_mode("default")
    exact = value_and_gradient(reference.coding_rate, logits.double())
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cuda", torch.bfloat16):
            torch.cuda.set_sync_debug_mode("error")
            rate, gradient = value_and_gradient(bincomm.coding_rate, logits)
            again = value_and_gradient(bincomm.coding_rate, logits)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.testing.assert_close(rate.double(), exact[0], rtol=1e-5, atol=1e-6)
    error = (gradient.double() - exact[1]).norm()
    assert error < max(1e-4, torch.finfo(dtype).eps) * exact[1].norm() + 1e-5
    assert torch.equal(again[0], rate)
    assert torch.equal(again[1], gradient)


def test_coding_rate_takes_its_kernel():
    assert KERNELS["coding_rate"]["cuda"] == "CUDA"


@pytest.mark.parametrize("shape", [(2, 64, 100), (2, 300, 256), (2, 600, 512)], ids=str)
def test_coding_rate_of_any_strides_and_its_diagnostics(shape):
    logits = torch.randn(shape)
    expected = bincomm.coding_rate(logits, diagnostics=True)
    exact = value_and_gradient(reference.coding_rate, logits.double())
    permuted = logits.permute(2, 0, 1).contiguous().cuda().permute(1, 2, 0).requires_grad_()
    result = bincomm.coding_rate(permuted, diagnostics=True)
    for value, other in zip(result, expected, strict=True):
        assert value.is_cuda
        torch.testing.assert_close(value.detach().cpu(), other, rtol=1e-5, atol=0)
    (3 * result.rate.sum()).backward()
    assert (permuted.grad.cpu() - exact[1]).norm() < 1e-4 * exact[1].norm()


@pytest.mark.parametrize("bits", [100, 256, 512])
def test_coding_rate_near_a_collapse(bits):
    one, rest = torch.randn(1, bits), torch.randn(2, bits + 50, bits)
    logits = one + 1e-2 * rest
    exact = value_and_gradient(reference.coding_rate, logits.double())
    rate, gradient = value_and_gradient(bincomm.coding_rate, logits.cuda())
    torch.testing.assert_close(rate.double().cpu(), exact[0], rtol=1e-3, atol=0)
    assert (gradient.cpu() - exact[1]).norm() < 1e-2 * exact[1].norm()


def test_coding_rate_for_which_fp32_is_not_precise_enough(no_sync):
    logits = torch.randn(2, 60, 40, device="cuda")
    rate, gradient = value_and_gradient(bincomm.coding_rate, logits, eps_squared=1e-5)
    torch.cuda.set_sync_debug_mode("default")
    exact = value_and_gradient(reference.coding_rate, logits.double(), 1e-5)
    torch.testing.assert_close(rate.double(), exact[0], rtol=1e-6, atol=0)
    assert (gradient - exact[1]).norm() < 1e-5 * exact[1].norm()


@pytest.mark.parametrize("bits", [16, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_coding_rate_of_finite_logits_is_finite(bits, dtype):
    one = torch.randn(1, bits, device="cuda")
    largest = torch.finfo(dtype).max
    for logits in (
        torch.zeros(300, bits, device="cuda"),
        one.expand(300, bits),
        one.expand(9, bits),
        1e-20 * torch.randn(300, bits, device="cuda"),
        (1e18 * torch.randn(300, bits, device="cuda")).clamp(-largest, largest),
        torch.full((300, bits), largest, device="cuda"),
    ):
        rate, gradient = value_and_gradient(bincomm.coding_rate, logits.to(dtype))
        assert rate.isfinite()
        assert gradient.isfinite().all()
    logits = torch.randn(2, 300, bits, device="cuda").to(dtype)
    logits[1, 3, 5] = torch.nan
    result = bincomm.coding_rate(logits, diagnostics=True)
    assert result.rate.isnan().tolist() == [False, True]
    assert result.smallest_pivot.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    "shape", [(12, 256, 256), (2, 128, 1024), (2, 600, 512), (2, 700, 700), (1, 1200, 1200)], ids=str
)
def test_coding_rate_in_a_cuda_graph(shape):
    logits = torch.randn(shape, device="cuda", requires_grad=True)
    expected = value_and_gradient(bincomm.coding_rate, logits)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            logits.grad = None
            (3 * bincomm.coding_rate(logits).sum()).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    logits.grad = None
    with torch.cuda.graph(graph, stream=stream):
        rate = bincomm.coding_rate(logits).sum()
        (3 * rate).backward()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(rate.detach(), expected[0])
    assert torch.equal(logits.grad, expected[1])


@pytest.fixture
def objective():
    return bincomm.DiscreteCommunication().cuda()


def test_the_objective_never_waits_for_the_gpu(objective, no_sync):
    student = torch.randn(12, 64, 256, device="cuda", requires_grad=True)
    teacher = torch.randn(2, 64, 256, device="cuda")
    objective(student, teacher)["loss"].backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", ["auto", 0.1])
@pytest.mark.parametrize(("n", "bits"), [(64, 256), (100, 33)])
def test_the_objective_in_one_node(n, bits, beta, dtype):
    """As the two operations and the control say, which run in fp64."""
    objective, exact = (bincomm.DiscreteCommunication(beta).cuda() for _ in range(2))
    for _ in range(3):
        student = torch.randn(12, n, bits, device="cuda").to(dtype)
        teacher = torch.randn(2, n, bits, device="cuda").to(dtype)
        results = []
        for function, logits in ((objective, student), (exact, student.double())):
            logits.requires_grad_()
            losses = function(logits, teacher.to(logits.dtype))
            (gradient,) = torch.autograd.grad(losses["loss"], logits)
            results.append((losses, gradient.double()))
        for name in objective.scalars:
            value, expected = (losses[name].detach().double() for losses, _ in results)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        assert is_near(results[0][1], results[1][1], dtype, 1e-4)
    if beta == "auto":
        torch.testing.assert_close(objective.control.state, exact.control.state, rtol=1e-4, atol=1e-5)


def test_sign_bce_in_a_cuda_graph():
    student = torch.randn(12, 64, 256, device="cuda", requires_grad=True)
    teacher = torch.randn(2, 64, 256, device="cuda")
    expected = value_and_gradient(bincomm.sign_bce, student, teacher)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            student.grad = None
            (3 * bincomm.sign_bce(student, teacher)).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    student.grad = None
    with torch.cuda.graph(graph):
        loss = bincomm.sign_bce(student, teacher)
        (3 * loss).backward()
    graph.replay()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(student.grad, expected[1])


def gradients_to_clip():
    """More than one launch takes; every second within a norm of 1."""
    sizes = [(300, 1000), (16385,), (), (0, 5), (3, 5, 7)] * 50
    directions = [torch.randn(size, device="cuda") for size in sizes]
    return [(0.9 if index % 2 else 3.0) * g / g.norm().clamp_min(1e-9) for index, g in enumerate(directions)]


def test_clipping(no_sync):
    gradients = gradients_to_clip()
    gradients.append(torch.randn(4, 6, 8, 20, device="cuda")[..., ::2])  # not dense
    copies = [g.clone() for g in gradients]
    norm = clip_gradients_(gradients, 1.0)
    expected = clip_gradients_pytorch_(copies, 1.0)
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, copies, rtol=1e-5, atol=1e-8)
    assert not clip_gradients_([*gradients, torch.full((3,), torch.nan, device="cuda")], 1.0).isfinite()


def test_clipping_in_a_cuda_graph():
    gradients, others = gradients_to_clip(), gradients_to_clip()
    copies = [g.clone() for g in others]
    expected = clip_gradients_(copies, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = clip_gradients_(gradients, 1.0)
    for gradient, other in zip(gradients, others, strict=True):
        gradient.copy_(other)
    graph.replay()
    assert torch.equal(norm, expected)
    assert all(map(torch.equal, gradients, copies))


def test_the_extension_holds_code_for_this_gpu():
    from bincomm import _C  # without a GPU there may be none

    major, minor, _ = _C.device_code(0)
    assert (major, minor) <= torch.cuda.get_device_capability(0)
