"""The training step: its parts, its memory-saving forms, and what it does where something is not finite."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bincomm.engine.accumulation import AccumulatedStep
from bincomm.engine.compiling import compile_networks
from bincomm.engine.cuda_graph import CapturedStep
from bincomm.engine.guard import Guard
from bincomm.engine.optimizer import create_optimizer
from bincomm.engine.step import Step
from bincomm.networks import (
    Head,
    Network,
    create_backbone,
    create_teacher,
    feature_width,
    update_teacher,
)
from bincomm.objectives import DINO, DiscreteCommunication, SimDINO
from tests.calls import Calls

RATES = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
# Without biases of keys: they have no effect, so their gradient is rounding, which AdamW makes large.
VIT = ("test_vit", {"patch_size": 4, "depth": 2, "qkv_bias": False})
RESNET = ("resnetv2_18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8})


def create(
    model=VIT,
    objective=None,
    drop_path=0.0,
    precision="fp32",
    clip=0.5,
    accumulate=1,
    dtype=torch.float32,
    **options,
):
    torch.manual_seed(0)
    name, arguments = model
    backbone, _ = create_backbone(
        name, 16, **arguments, **({"drop_path_rate": drop_path} if drop_path else {})
    )
    student = Network(backbone, Head(feature_width(backbone, [16]), 32, 12)).to(dtype)
    teacher = create_teacher(student, create_backbone(name, 16, **arguments)[0].to(dtype))
    optimizer = create_optimizer(student)
    networks = (student, teacher, (objective or DiscreteCommunication()).to(dtype), optimizer)
    if accumulate > 1:
        return AccumulatedStep(*networks, microbatches=accumulate, clip=clip, precision=precision, **options)
    return Step(*networks, clip=clip, precision=precision, **options)


def batches(count, n=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield (
            torch.randn(n, 2, 3, 16, 16, generator=generator).to(dtype),
            torch.randn(n, 3, 3, 12, 12, generator=generator).to(dtype),
        )


def states(step):
    networks = (step.student, step.teacher)
    return [{name: value.clone() for name, value in net.state_dict().items()} for net in networks]


def assert_same(one, other, **tolerance):
    for mine, theirs in zip(states(one), states(other), strict=True):
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], **tolerance)


# The weights are compared in fp64: AdamW divides a gradient by its size, so that in fp32 the rounding of a
# gradient near 0 moves its weight as far as a large gradient does.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_what_its_parts_are(dtype):
    """Against the step written out with PyTorch's own functions."""
    step, plain = create(dtype=dtype), create(dtype=dtype)
    student, teacher = plain.student, plain.teacher
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    adam = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.01, weight_decay=0.1
    )
    objective = DiscreteCommunication().to(dtype)
    for views in batches(3, dtype=dtype):
        output = step(*views, **RATES)
        with torch.no_grad():
            message = teacher(views[0])
        losses = objective(student(*views), message)
        losses["loss"].backward()
        norms = [torch.nn.utils.clip_grad_norm_(p, 0.5) for p in student.parameters()]
        adam.step()
        adam.zero_grad()
        update_teacher(list(teacher.parameters()), list(student.parameters()), 0.9)
        torch.testing.assert_close(output.losses["loss"], losses["loss"].detach())
        torch.testing.assert_close(output.gradient_norm, torch.stack(norms).norm(), rtol=1e-4, atol=1e-6)
    if dtype == torch.float64:  # PyTorch's clipping adds 1e-6 to the norm
        assert_same(step, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulation_takes_the_loss_of_the_whole_batch(dtype):
    """The coding rate of all images, and the same gradient, whatever the number of parts."""
    whole, parts = create(dtype=dtype), create(accumulate=3, dtype=dtype)
    for views in batches(3, dtype=dtype):
        first, second = whole(*views, **RATES), parts(*views, **RATES)
        torch.testing.assert_close(first.losses, second.losses)
        torch.testing.assert_close(first.gradient_norm, second.gradient_norm, rtol=1e-4, atol=1e-6)
    if dtype == torch.float64:
        assert_same(whole, parts, rtol=1e-6, atol=1e-8)


def test_accumulation_drops_the_same_paths_in_both_passes():
    step, logits = create(drop_path=0.4, accumulate=3), []
    step.student.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    step(*next(batches(1)), **RATES)
    first, second = torch.cat(logits[:3], 1), torch.cat(logits[3:], 1)
    assert torch.equal(first, second)
    assert not torch.equal(first, create(accumulate=3).student(*next(batches(1))))


def test_parts_that_are_not_equal_are_refused():
    with pytest.raises(ValueError, match="global_views: expected a multiple of accumulate = 4 .*got 6"):
        create(accumulate=4)(*next(batches(1)), **RATES)


def test_accumulation_with_batch_norm_is_refused():
    with pytest.raises(ValueError, match="accumulate: expected 1 for a backbone with batch norm, got 2"):
        create(RESNET, accumulate=2)


@pytest.mark.parametrize("model", [VIT, RESNET])
@pytest.mark.parametrize("make", [DiscreteCommunication, lambda: DINO(12)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_teacher(model, make):
    step = create(model, make())
    good = list(batches(2))
    step(*good[0], **RATES)
    assert step.guard.read()[:2] == (0, 0)

    def standing():
        buffers = [*step.objective.buffers(), *step.teacher.buffers()]
        moments = [m for value in step.optimizer.state.values() for m in value.values()]  # and steps
        return [x.clone() for x in (*step.student.state_dict().values(), *buffers, *moments)]

    before = standing()
    step(good[1][0], torch.full_like(good[1][1], torch.nan), **RATES)
    assert all(map(torch.equal, before, standing()))
    assert step.guard.read()[:2] == (1, 1)
    step(*good[1], **RATES)
    assert step.guard.read()[:2] == (1, 0)
    assert not any(map(torch.equal, list(step.student.parameters()), before))


def test_however_many_buffers_there_are_they_are_copied_at_once():
    """Beside the networks' passes, a step is as many operations with three batch norms as with none."""
    counts = []
    for model in (VIT, RESNET):
        step = create(model)
        step(*next(batches(1)), **RATES)
        forward = step.forward
        outputs = forward.student_logits(*next(batches(1))).detach().requires_grad_()
        message = forward.teacher_output(next(batches(1))[0])
        step.forward.student_logits = lambda *views, outputs=outputs: outputs * 1
        step.forward.teacher_output = lambda *views, message=message: message
        with Calls() as calls:
            output = step.gradient(None, None)
        counts.append(len(calls.names))
        assert output.skipped == 0
    assert len(list(step.student.buffers())) > 20
    assert counts[1] == counts[0] + 4  # of another dtype: the numbers of batches


def test_after_too_many_in_a_row_the_student_moves_no_more():
    step, in_row = create(), []
    for (global_views, _), good in zip(batches(6), (0, 0, 0, 0, 1, 1), strict=True):
        local_views = None if good else torch.full((6, 1, 3, 12, 12), torch.nan)
        before = states(step)[0]
        step(global_views, local_views, **RATES)
        in_row.append(step.guard.read()[1])
        assert all(torch.equal(value, before[name]) for name, value in step.student.state_dict().items())
    assert in_row == [1, 2, 3, 4, 5, 6]
    assert Guard.LIMIT == 3


@pytest.mark.long
@pytest.mark.parametrize("crops", ["global", "global and local"])
def test_compiled_or_not_it_is_the_same_step(crops):
    """A second size of crops compiles everything once more, which takes a minute."""
    plain, compiled = create(), create()
    drawn = [
        (global_views, local_views if "local" in crops else None) for global_views, local_views in batches(3)
    ]
    first, random = drawn.pop(), torch.get_rng_state()
    worked, text = compile_networks(compiled, *first)
    assert worked, text
    assert text.startswith("torch.compile: both networks, in ")
    assert torch.equal(random, torch.get_rng_state())
    assert_same(plain, compiled, rtol=0, atol=0)  # trying it out left no trace
    for views in drawn:
        one, other = plain(*views, **RATES), compiled(*views, **RATES)
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiler_that_fails_is_told_and_output_without(monkeypatch):
    plain, step = create(RESNET), create(RESNET)

    def fail(graph, inputs):
        raise RuntimeError("no such compiler\n" + 50 * "more about it\n" + "a.cpp:1: fatal error: too long")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, backend=fail, **options))
    worked, text = compile_networks(step, *next(batches(1)))
    assert not worked
    assert text.startswith("torch.compile failed, so the networks run without it")
    assert "no such compiler" in text
    assert text.endswith("| a.cpp:1: fatal error: too long")
    assert "\n" not in text
    for views in batches(2):
        plain(*views, **RATES)
        step(*views, **RATES)
    assert_same(plain, step, rtol=0, atol=0)


class NothingIsRead(TorchDispatchMode):
    """Raises where a tensor's value is asked for, or a shape that depends on one."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        reading = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert operation not in reading, operation
        return operation(*arguments, **options or {})


@pytest.mark.parametrize("make", [DiscreteCommunication, SimDINO, lambda: DINO(12)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_on_the_way_is_read_on_the_host(make, accumulate):
    """A host that waits for the device once a step leaves the device idle; test_gpu looks for it there."""
    step = create(objective=make(), accumulate=accumulate)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingIsRead():
        torch.ones(1).item()
    with NothingIsRead():
        step(*next(batches(1)), **RATES)


@pytest.mark.slow
def test_all_passes_of_an_accumulating_step_are_compiled_and_tried(monkeypatch):
    step, graphs = create(accumulate=2), []
    views = next(batches(1))

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, backend=count, **options))
    compile_networks(step, *views)
    tried = len(graphs)
    assert tried > 0
    step(*views, **RATES)
    assert len(graphs) == tried


def test_capture_needs_a_gpu():
    with pytest.raises(ValueError, match="cuda_graph: expected one GPU .*got 1 × cpu"):
        CapturedStep(create(), *next(batches(1)))


def test_the_parts_of_a_step_are_marked():
    marks = []
    step = create(mark=marks.append)
    step(*next(batches(1)), **RATES)
    assert marks == ["teacher", "student", "loss", "backward", "clip", "optimizer", "average"]
