"""Nothing in a step waits for the device, seen without one: operations that read values back are refused.

The kernels' own tests on a GPU are in tests/test_gpu. Here the PyTorch implementations run, which take their
place where a kernel is missing, as where the extension was built without CUDA.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bincomm
from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.engine.export import export_backbone
from bincomm.engine.frozen_teacher import FrozenTeacher
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.optimizer import create_optimizer
from bincomm.engine.step import Step
from bincomm.networks import Head, Network, create_backbone, create_teacher, feature_width
from bincomm.objectives import DINO, DiscreteCommunication, SimDINO
from bincomm.ops import hamming, library, reference

# They return a number to Python, or a tensor whose shape depends on values, or check values on the host.
WAITING = (
    "_local_scalar_dense", "_linalg_check_errors", "cholesky", "cholesky_inverse", "equal", "is_nonzero",
    "item", "linalg_cholesky", "linalg_det", "linalg_inv", "linalg_slogdet", "logdet", "masked_select",
    "nonzero", "nonzero_numpy", "unique_consecutive", "unique_dim", "_unique2",
)  # fmt: skip


class RefuseToWait(TorchDispatchMode):
    """Raises where an operation would wait for a GPU; `calls` has the names of all others."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        if name in WAITING or by_mask:
            raise AssertionError(f"{function} would wait for the GPU")
        self.calls.append(name)
        return function(*args, **(kwargs or {}))


def run_in_pytorch(name, *arguments):
    """An operation's PyTorch implementation, whatever kernels there are."""
    operation = getattr(torch.ops.bincomm, name).default
    return operation._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)


def sides_of(shape):
    logits = torch.randn(shape)
    return logits, shape[-1] / (shape[-2] * 0.05), shape[-2] < shape[-1]


@pytest.mark.parametrize("shape", [(2, 9, 5), (2, 5, 9)], ids=str)
def test_coding_rate(shape):
    logits, alpha, of_images = sides_of(shape)
    with RefuseToWait():
        gram, reciprocal = run_in_pytorch("coding_rate_gram", logits, alpha, of_images)
        rate, factor, _, _ = run_in_pytorch("coding_rate_factor", gram)
        inverse = run_in_pytorch("coding_rate_inverse", factor)
        z, _ = run_in_pytorch("coding_rate_rows", logits)
        g = inverse @ z if of_images else z @ inverse
        gradient = run_in_pytorch("coding_rate_gradient", torch.ones(2), g, logits, reciprocal, alpha)
        whole = run_in_pytorch("coding_rate", logits, 0.05, "")
        run_in_pytorch("coding_rate_backward", torch.ones(2), logits, *whole[1:3], alpha, of_images)
        total = torch.ones_like(logits)
        arriving = torch.full((2,), -2.0), torch.tensor(0.5), -1.0
        run_in_pytorch("coding_rate_add_gradient_", total, *arriving, logits, *whole[1:3], alpha, of_images)
    exact = logits.double().requires_grad_()
    expected = reference.coding_rate(exact)
    expected.sum().backward()
    torch.testing.assert_close(whole[0], rate)
    torch.testing.assert_close(rate.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total.double(), 1 + exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("state", [torch.empty(0), torch.tensor([-2.0, 0.5, 0.8])], ids=["fixed", "auto"])
def test_the_papers_objective(state):
    student, teacher = torch.randn(3, 5, 40), torch.randn(2, 5, 40)
    with RefuseToWait():
        results = run_in_pytorch("discrete_communication", student, teacher, state, 0.1, 0.05, "", 1)
        gradient = run_in_pytorch(
            "discrete_communication_backward", torch.ones(()), results[1], student, *results[2:], 0.05, "", 1
        )
    exact = student.double().requires_grad_()
    agreement, rate, beta = results[1][:3]
    rates = reference.coding_rate(exact[:2])
    (reference.sign_bce(exact, teacher) - beta.double() * 45 / 200 * rates.mean()).backward()
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(agreement, bincomm.sign_bce(student, teacher))
    torch.testing.assert_close(results[0], agreement - beta * 45 / 200 * rate)


@pytest.mark.parametrize("pairs", ["cross", "all", "matched"])
def test_sign_bce(pairs):
    student, teacher = torch.randn(3, 5, 40), torch.randn(3 if pairs == "matched" else 2, 5, 40)
    with RefuseToWait():
        loss, messages = run_in_pytorch("sign_bce", student, teacher, pairs)
        gradient = run_in_pytorch("sign_bce_backward", torch.ones(()), student, messages, pairs)
    torch.testing.assert_close(loss, bincomm.sign_bce(student, teacher, pairs=pairs))
    assert gradient.isfinite().all()


def test_messages_and_clipping():
    logits, gradients = torch.randn(6, 40), [torch.full((3,), 2.0)]
    with RefuseToWait():
        words = run_in_pytorch("pack_signs", logits)
        signs = run_in_pytorch("unpack_signs", words, 40)
        norm = run_in_pytorch("clip_gradients_", gradients, 1.0)
    assert torch.equal(signs, logits > 0)
    assert norm.item() == pytest.approx(12**0.5)


def test_searches():
    a, b = (torch.randint(-(2**31), 2**31, (rows, 2), dtype=torch.int32) for rows in (7, 300))
    with RefuseToWait():
        run_in_pytorch("hamming_distance", a, b)
        distances, indices = hamming.topk_in_blocks(a, b, 5)
    for found, expected in zip((distances, indices), bincomm.hamming_topk(a, b, 5), strict=True):
        assert torch.equal(found, expected)


def test_every_operation_is_here():
    parts = ("", "_add_gradient_", "_backward", "_factor", "_gradient", "_gram", "_inverse", "_rows")
    rate = {f"coding_rate{part}" for part in parts}
    others = {"clip_gradients_", "hamming_distance", "hamming_topk", "pack_signs", "unpack_signs"}
    others |= {"sign_bce", "sign_bce_backward", "discrete_communication"}
    assert library.KERNELS.keys() == rate | others


OBJECTIVES = {
    "bits": DiscreteCommunication,
    "bits, β 0.1": lambda: DiscreteCommunication(0.1),
    "soft": lambda: DiscreteCommunication(agreement="soft"),
    "cosine": lambda: DiscreteCommunication(agreement="cosine"),
    "SimDINO": SimDINO,
    "SimDINO, expa 0": lambda: SimDINO(expa_type=0),
    "DINO": lambda: DINO(12),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_with_every_objective(name):
    arguments = {"patch_size": 4, "depth": 1}
    backbone, _ = create_backbone("test_vit", 16, **arguments)
    student = Network(backbone, Head(feature_width(backbone, [16]), 32, 12))
    teacher = create_teacher(student, create_backbone("test_vit", 16, **arguments)[0])
    step = Step(student, teacher, OBJECTIVES[name](), create_optimizer(student), clip=1.0, precision="bf16")
    views = torch.randn(6, 2, 3, 16, 16), torch.randn(6, 2, 3, 12, 12)
    with RefuseToWait() as mode:
        output = step(*views, lr=1e-3, weight_decay=0.1, momentum=0.9)
    assert output.losses["loss"].isfinite()
    assert len(mode.calls) > 100


@pytest.mark.parametrize("stored", [False, True])
def test_a_step_under_a_frozen_teacher(tmp_path, stored):
    arguments = {"patch_size": 4, "depth": 1}
    keys = {"backbone": "test_vit", "backbone_args": arguments, "global_size": 16, "bits": 12}
    config = PretrainConfig(**keys)
    export_backbone(create_networks(replace(config, hidden=32), torch.device("cpu"))[1], config, tmp_path)
    teacher = FrozenTeacher(replace(config, teacher=(str(tmp_path),), mean=(0.5,) * 3), torch.device("cpu"))
    teacher.take([(torch.randn(12, 64), torch.randn(12))])
    student = Network(create_backbone("test_vit", 16, **arguments)[0], Head(64, 32, 12))
    parts = None if stored else teacher, DiscreteCommunication(0.0), create_optimizer(student)
    step = Step(student, *parts, clip=1.0, precision="bf16")
    views = torch.randn(6, 2, 3, 16, 16), torch.randn(6, 2, 3, 12, 12)
    messages = torch.zeros(2, 6, 1, dtype=torch.int32) if stored else None
    window = MetricsWindow(1, DiscreteCommunication.scalars, 12, torch.device("cpu"))
    before = [p.clone() for p in student.parameters()]
    with RefuseToWait() as mode:
        output = step(*views, messages, lr=1e-3, weight_decay=0.1, momentum=1.0)
    assert output.losses["loss"].isfinite()
    assert output.teacher.dtype == torch.int32
    assert ("pack_signs" in mode.calls) != stored
    assert not all(map(torch.equal, before, student.parameters()))
    window.add(output)
    assert 0 < window.report()["bit_accuracy"] < 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.cholesky_inverse(x),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
    ],
)
def test_waiting_is_noticed(function):
    with RefuseToWait(), pytest.raises(AssertionError, match="would wait"):
        function(torch.eye(3))
