import math

import pytest
import torch
from ranks import run_on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import bincomm
from bincomm.objectives import DINO, DiscreteCommunication, SimDINO
from bincomm.ops.coding_rate import rate_ceiling

# Each objective by its formula, in loops over pairs, images and bits, in fp64 ------------------------------


def pairs(student, teacher):
    return [(u, v) for u in range(len(teacher)) for v in range(len(student)) if u != v]


def mean_of(terms):
    terms = list(terms)
    return sum(terms) / len(terms)


def cross_entropy(target, logits):
    """(K,) and (K,) -> mean over bits of -t·log σ(a) - (1-t)·log(1 - σ(a))."""
    p = 1 / (1 + torch.exp(-logits))
    return (-target * torch.log(p) - (1 - target) * torch.log(1 - p)).mean()


def cosine(x, y):
    return (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt())


def agreement_by_hand(term, student, teacher):
    """Mean over pairs and images of a term of teacher and student rows (K,)."""
    return mean_of(
        mean_of(term(teacher[u, i], student[v, i]) for i in range(student.shape[1]))
        for u, v in pairs(student, teacher)
    )


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def rate_by_hand(views, eps_squared):
    def rate(z):
        n, bits = z.shape
        matrix = torch.eye(bits, dtype=z.dtype) + bits / (n * eps_squared) * z.T @ z
        return torch.linalg.eigvalsh(matrix).log().sum() / 2

    return mean_of(rate(z) for z in views)


def gamma(student):
    _, n, bits = student.shape
    return (bits + n) / (bits * n)


def communication_by_hand(objective, student, teacher):
    term = {
        "hard": lambda t, a: cross_entropy((t > 0).double(), a),
        "soft": lambda t, a: cross_entropy(1 / (1 + torch.exp(-t / objective.tau)), a),
        "cosine": lambda t, a: cosine(2 * (t > 0).double() - 1, a),
    }[objective.agreement]
    agreement = agreement_by_hand(term, student, teacher)
    rate = rate_by_hand(unit(student[: len(teacher)]), objective.eps_squared)
    beta = objective.beta
    if beta == "auto":
        beta = first_beta_by_hand(student[: len(teacher)], rate.item(), objective.eps_squared)
    sign = -1 if objective.agreement == "cosine" else 1
    loss = sign * agreement - beta * gamma(student) * rate
    return {"loss": loss, "agreement": agreement, "rate": rate, "beta": torch.tensor(beta)}


def first_beta_by_hand(views, rate, eps_squared):
    """Of a new `BetaControl`, whose averages begin at their targets."""
    count, n, bits = views.shape
    k = min(n, bits)
    floor, ceiling = math.log(1 + bits / eps_squared) / 2, k / 2 * math.log(1 + bits / (eps_squared * k))
    entropies = []
    for bit in range(bits):
        p = sum(int(views[v, i, bit] > 0) for v in range(count) for i in range(n)) / (count * n)
        entropies.append(0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p))
    entropy = min(1, sum(entropies) / bits + 1 / (2 * n * math.log(2)))
    errors = []
    for value, target in (((rate - floor) / (ceiling - floor), 0.6), (entropy, 0.9)):
        short = target - (0.9 * target + 0.1 * value)
        errors.append(short / target if short > 0 else short / (1 - target))
    error = max(errors)
    return math.exp(math.log(0.1) + (0.15 if error > 0 else 0.03) * error + error)


def simdino_by_hand(objective, student, teacher):
    agreement = agreement_by_hand(cosine, student, teacher)
    views = unit(student[: len(teacher)])
    if objective.expa_type == 1:
        views = (views + unit(teacher)) / 2
    rate = rate_by_hand(views, objective.eps_squared)
    return {"loss": -agreement - gamma(student) * rate, "agreement": agreement, "rate": rate}


def dino_by_hand(objective, student, teacher):
    def softmax(x):
        e = torch.exp(x - x.max())
        return e / e.sum()

    center = objective.center.double()

    def term(t, s):
        p = softmax((t - center) / objective.teacher_temperature)
        return -(p * torch.log(softmax(s / objective.student_temperature))).sum()

    return {"loss": agreement_by_hand(term, student, teacher)}


BY_HAND = {
    DiscreteCommunication: communication_by_hand,
    SimDINO: simdino_by_hand,
    DINO: dino_by_hand,
}


def dino(outputs, **arguments):
    objective = DINO(outputs, **arguments)
    objective.center.copy_(torch.linspace(-0.2, 0.3, outputs))
    return objective


# Weights, temperatures and ε² that are no defaults, so that the tests notice an ignored one; K -> objective.
OBJECTIVES = {
    "auto": lambda k: DiscreteCommunication(eps_squared=0.1),
    "hard": lambda k: DiscreteCommunication(0.3, 0.1),
    "soft": lambda k: DiscreteCommunication(0.3, 0.1, agreement="soft", tau=0.5),
    "cosine": lambda k: DiscreteCommunication(0.3, 0.1, agreement="cosine"),
    "simdino 0": lambda k: SimDINO(0.1, expa_type=0),
    "simdino 1": lambda k: SimDINO(0.1),
    "dino": lambda k: dino(k, student_temperature=0.2, teacher_temperature=0.3, center_momentum=0.7),
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)
# (V, U, n, K): with and without local views, more and fewer images than bits, other numbers of teachers.
SHAPES = [(2, 2, 7, 10), (6, 2, 12, 5), (3, 1, 4, 9), (5, 3, 6, 6), (3, 3, 5, 8)]


def make(name, bits, dtype=torch.float32):
    objective = OBJECTIVES[name](bits)
    return objective.double() if dtype == torch.float64 else objective


def outputs(views, teachers, n, bits, dtype=torch.float32):
    student, teacher = torch.randn(views, n, bits), torch.randn(teachers, n, bits)
    teacher[:, 0, ::2] = 0  # the bit of a logit of 0 is 0
    return student.to(dtype), teacher.to(dtype)


def values_and_gradient(function, student, *arguments):
    student = student.detach().clone().requires_grad_()
    losses = function(student, *arguments)
    losses["loss"].backward()
    return {key: value.item() for key, value in losses.items()}, student.grad


def check_against_hand(name, student, teacher, tolerance, gradient_tolerance):
    objective = make(name, student.shape[-1], student.dtype)
    values, gradient = values_and_gradient(objective, student, teacher)
    objective = make(name, student.shape[-1])  # with its center unchanged
    expected, exact = values_and_gradient(
        lambda a, b: BY_HAND[type(objective)](objective, a, b), student.double(), teacher.double()
    )
    assert tuple(values) == objective.scalars
    assert values == pytest.approx(expected, rel=tolerance, abs=tolerance)  # a mean cosine is small
    assert gradient.dtype == student.dtype
    for view, expected in zip(gradient, exact, strict=True):  # view by view, so that small ones count too
        assert (view - expected).norm() <= gradient_tolerance * expected.norm() + 1e-15


@each_objective
@pytest.mark.parametrize("shape", SHAPES)
def test_every_objective_is_its_formula(name, shape):
    check_against_hand(name, *outputs(*shape), tolerance=2e-6, gradient_tolerance=2e-5)


@each_objective
def test_fp64_outputs_are_computed_in_fp64(name):
    student, teacher = outputs(4, 2, 6, 9, torch.float64)
    check_against_hand(name, student, teacher, tolerance=1e-7, gradient_tolerance=1e-6)


@each_objective
def test_half_types_and_autocast_cost_no_precision(name):
    """bf16 outputs inside autocast: the values are exact to fp32, only the gradient is rounded to bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        student, teacher = outputs(4, 2, 6, 9, torch.bfloat16)
        check_against_hand(name, student, teacher, tolerance=2e-6, gradient_tolerance=2**-7)


@each_objective
def test_outputs_that_do_not_lie_in_order(name):
    """As from a network: the crops of an image are adjacent."""
    student, teacher = outputs(5, 2, 6, 9)
    values = make(name, 9)(student, teacher)
    crossed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (student, teacher)]
    torch.testing.assert_close(make(name, 9)(*crossed), values)


@each_objective
def test_loss_alone_has_a_gradient_and_none_reaches_the_teacher(name):
    student, teacher = (x.requires_grad_() for x in outputs(4, 2, 8, 20))
    losses = make(name, 20)(student, teacher)
    assert [key for key, value in losses.items() if value.requires_grad] == ["loss"]
    losses["loss"].backward()
    assert (student.grad.abs().sum((1, 2)) > 0).all()
    assert teacher.grad is None


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was created."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@each_objective
def test_nothing_larger_than_the_students_outputs_is_created(name):
    student, teacher = outputs(6, 2, 16, 24)
    student.requires_grad_()
    objective = make(name, 24)
    with Largest() as largest:
        objective(student, teacher)["loss"].backward()
    assert largest.elements == student.numel()


@each_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["zeros", "equal rows", "zero row", "large", "certain"])
def test_degenerate_outputs_stay_finite(name, dtype, kind):
    student, teacher = outputs(4, 2, 6, 9)
    if kind == "zeros":
        student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    elif kind == "equal rows":
        student[:], teacher[:] = student[0, 0].clone(), teacher[0, 0].clone()
    elif kind == "zero row":
        student[:, 0], teacher[:, 1] = 0, 0
    elif kind == "large":
        student, teacher = 1e4 * student, 1e4 * teacher
    else:
        student = teacher = 100 * torch.eye(9)[:6].expand(4, 6, 9)
        teacher = teacher[:2]
    values, gradient = values_and_gradient(make(name, 9), student.to(dtype), teacher.to(dtype))
    assert all(map(math.isfinite, values.values()))
    assert gradient.isfinite().all()


@each_objective
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)])
def test_a_number_that_is_none_shows_in_the_loss(name, side, dtypes):
    both = [x.to(dtype) for x, dtype in zip(outputs(4, 2, 6, 9), dtypes, strict=True)]
    both[side][1, 2, 3] = torch.nan
    assert make(name, 9)(*both)["loss"].isnan()


@each_objective
@pytest.mark.parametrize("size", [1e15, 1e20, 1e30, 3e38])
def test_finite_outputs_of_any_size(name, size):
    """The squares of such outputs, and sums of the largest, are no numbers of fp32."""
    size = min(size, 1e30) if name == "dino" else size
    student, teacher = (x.clamp(-1, 1) * size for x in outputs(5, 2, 6, 9))
    student[0, 0], teacher[0, 0] = student[0, 0] / size, teacher[0, 0] / size  # beside ordinary ones
    if name == "dino":  # no ties, which the center would break in fp64 alone
        teacher[:, :, 0] = size * 2
    values, gradient = values_and_gradient(make(name, 9), student, teacher)
    exact = make(name, 9, torch.float64)
    expected, exact_gradient = values_and_gradient(exact, student.double(), teacher.double())
    if name in ("auto", "hard") and size > 1e34:
        assert not math.isnan(values["loss"])
    else:
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (gradient - exact_gradient).norm() <= 1e-3 * exact_gradient.norm()


def test_bits_of_an_fp64_teacher_are_its_own():
    """What would vanish in fp32 is no 0."""
    student, teacher = outputs(4, 2, 6, 9)
    tiny = teacher.double() * 1e-200
    assert torch.equal(bincomm.sign_bce(student, tiny), bincomm.sign_bce(student, teacher))


def test_an_objective_shows_its_values():
    shown = [repr(make(name, 9)) for name in ("hard", "soft", "cosine", "simdino 0", "dino")]
    assert shown == [
        "DiscreteCommunication(beta=0.3, eps_squared=0.1, agreement='hard')",
        "DiscreteCommunication(beta=0.3, eps_squared=0.1, agreement='soft', tau=0.5)",
        "DiscreteCommunication(beta=0.3, eps_squared=0.1, agreement='cosine')",
        "SimDINO(eps_squared=0.1, expa_type=0)",
        "DINO(prototypes=9, student_temperature=0.2, teacher_temperature=0.3, center_momentum=0.7)",
    ]
    assert "beta='auto', eps_squared=0.1" in repr(make("auto", 9))


@each_objective
@pytest.mark.parametrize(
    ("student", "teacher", "named"),
    [
        ((4, 6, 9), (5, 6, 9), "student|teacher"),  # more teachers than views
        ((4, 6, 9), (0, 6, 9), "student and teacher|teacher"),
        ((4, 6, 9), (2, 5, 9), "teacher"),
        ((4, 6, 9), (2, 6, 8), "teacher"),
        ((4, 6, 9), (6, 9), "teacher"),
        ((1, 6, 9), (1, 6, 9), "student"),  # no pair
        ((6, 9), (2, 6, 9), "student"),
    ],
)
def test_views_that_do_not_fit_are_refused(name, student, teacher, named):
    with pytest.raises(ValueError, match=f"^({named}): .*got"):
        make(name, 9)(torch.randn(student), torch.randn(teacher))


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        (DiscreteCommunication, {"beta": -1}, "beta: expected .* got -1"),
        (DiscreteCommunication, {"eps_squared": 0}, "eps_squared: expected .* got 0"),
        (
            DiscreteCommunication,
            {"agreement": "firm"},
            "agreement: expected .*hard, soft, cosine.* got 'firm'",
        ),
        (DiscreteCommunication, {"tau": 0.0}, "tau: expected .* got 0.0"),
        (SimDINO, {"eps_squared": math.nan}, "eps_squared: expected .* got nan"),
        (SimDINO, {"expa_type": 2}, "expa_type: expected 0 or 1, got 2"),
        (DINO, {"prototypes": 0}, "prototypes: expected .* got 0"),
        (DINO, {"prototypes": 3, "student_temperature": 0}, "student_temperature: expected .* got 0"),
        (DINO, {"prototypes": 3, "teacher_temperature": -1}, "teacher_temperature: expected .* got -1"),
        (DINO, {"prototypes": 3, "center_momentum": 1.5}, "center_momentum: expected .* got 1.5"),
    ],
)
def test_bad_arguments_are_refused(objective, arguments, message):
    with pytest.raises(ValueError, match=message):
        objective(**arguments)


def test_outputs_are_bits_but_for_dinos_scores():
    assert [name for name in OBJECTIVES if not make(name, 5).outputs_are_bits] == ["dino"]


def test_messages_are_no_soft_targets():
    student, teacher = outputs(4, 2, 6, 32)
    for name in ("soft", "cosine"):
        with pytest.raises(TypeError, match="teacher: .*int32"):
            make(name, 32)(student, bincomm.pack_signs(teacher))


def test_the_default_is_the_papers_objective():
    """Bit for bit the fused operations, also for a teacher's packed messages."""
    student, teacher = outputs(6, 2, 12, 40)
    losses = bincomm.DiscreteCommunication(0.1)(student, teacher)
    rate = bincomm.coding_rate(student[:2]).mean()
    assert torch.equal(losses["agreement"], bincomm.sign_bce(student, teacher))
    assert torch.equal(losses["rate"], rate)
    assert torch.equal(losses["loss"], losses["agreement"] - 0.1 * ((40 + 12) / (40 * 12)) * rate)
    packed = bincomm.DiscreteCommunication(0.1)(student, bincomm.pack_signs(teacher))
    assert torch.equal(losses["loss"], packed["loss"])


def test_soft_targets_become_the_bits_as_they_are_sharpened():
    student, teacher = torch.randn(4, 8, 20), torch.randn(2, 8, 20)
    hard = DiscreteCommunication()(student, teacher)
    soft = DiscreteCommunication(agreement="soft", tau=1e-9)(student, teacher)
    assert soft["loss"].item() == pytest.approx(hard["loss"].item(), rel=1e-6)


def test_averaged_rows_are_used_as_long_as_they_are():
    """Opposite outputs of student and teacher average to nothing: no rate is left."""
    student, _ = outputs(2, 2, 6, 9)
    assert SimDINO()(student, -3 * student)["rate"].item() == pytest.approx(0, abs=1e-6)
    same = SimDINO()(student, 3 * student)["rate"]
    assert same.item() == pytest.approx(bincomm.coding_rate(student).mean().item(), rel=1e-5)


def test_the_center_follows_the_teacher_after_the_loss():
    student, teacher = outputs(4, 2, 8, 20)
    objective = DINO(20, center_momentum=0.9)
    pointer, loss = objective.center.data_ptr(), objective(student, teacher)["loss"]
    torch.testing.assert_close(objective.center, 0.1 * teacher.mean((0, 1)))
    assert torch.equal(loss, DINO(20, center_momentum=0.0)(student, teacher)["loss"])
    second = objective(student, teacher)["loss"]
    assert second != loss
    torch.testing.assert_close(objective.center, 0.19 * teacher.mean((0, 1)))
    assert objective.center.data_ptr() == pointer
    assert list(objective.state_dict()) == ["center"]
    before = objective.center.clone()
    objective.eval()(student, teacher)
    assert torch.equal(objective.center, before)


def test_shifting_all_scores_of_the_teacher_changes_nothing_once_they_are_centered():
    student, teacher = outputs(4, 2, 8, 20)
    shift = torch.randn(20)
    plain, shifted = DINO(20), DINO(20)
    shifted.center.copy_(shift)
    loss = plain(student, teacher)["loss"].item()
    assert shifted(student, teacher + shift)["loss"].item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_ranks_together_are_one_rank_with_all_images(tmp_path):
    """Two processes of 6 images each, averaged by DistributedDataParallel, against one of 12."""
    run_on_ranks(train_in_parallel, 2, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    network, images, teacher = parts()
    for name in OBJECTIVES:
        for step, expected in enumerate(two_steps(name, network, network, images, teacher)):
            ranks = [result[name][step] for result in results]
            for key, value in expected["values"].items():
                values = [rank["values"][key] for rank in ranks]
                assert sum(values) / 2 == pytest.approx(value, rel=1e-5)
                if key == "rate":
                    assert values == pytest.approx([value, value], rel=1e-5)
            for rank in ranks:
                torch.testing.assert_close(rank["buffers"], expected["buffers"])
                for gradient, exact in zip(rank["gradients"], expected["gradients"], strict=True):
                    assert (gradient - exact).norm() <= 1e-4 * exact.norm()


def parts():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 40), torch.randn(4, 12, 8), torch.randn(2, 12, 40)


def two_steps(name, network, parallel, images, teacher):
    """Values, gradients and buffers after each of two steps; the network is left as it is."""
    objective, steps = make(name, 40), []
    for _ in range(2):
        network.zero_grad()
        losses = objective(parallel(images), teacher)
        losses["loss"].backward()
        steps.append(
            {
                "values": {key: value.item() for key, value in losses.items()},
                "gradients": [p.grad.clone() for p in network.parameters()],
                "buffers": [b.clone() for b in objective.buffers()],
            }
        )
    return steps


def train_in_parallel(rank, world, folder):
    network, images, teacher = parts()
    parallel = torch.nn.parallel.DistributedDataParallel(network)
    own = slice(6 * rank, 6 * rank + 6)
    results = {
        name: two_steps(name, network, parallel, images[:, own], teacher[:, own]) for name in OBJECTIVES
    }
    torch.save(results, f"{folder}/{rank}.pt")


def test_ceiling_is_never_exceeded():
    for n, bits in ((4, 50), (50, 4), (16, 16)):
        rates = bincomm.coding_rate(torch.randn(20, n, bits))
        ceiling = rate_ceiling(torch.tensor(float(n)), bits, 0.05).item()
        assert rates.max().item() < ceiling < min(n, bits) * math.log(1e6)
