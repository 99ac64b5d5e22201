"""The training step on a real GPU: it does not wait for the device; its faster forms are the same step."""

from dataclasses import replace

import pytest
import torch

from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.dense import DenseNetwork, find_patches
from bincomm.engine.accumulation import AccumulatedStep
from bincomm.engine.compiling import compile_networks
from bincomm.engine.cuda_graph import CapturedStep
from bincomm.engine.export import export_backbone
from bincomm.engine.frozen_teacher import FrozenTeacher
from bincomm.engine.masks import Masks
from bincomm.engine.optimizer import create_optimizer
from bincomm.engine.step import Step
from bincomm.networks import Head, Network, create_backbone, create_teacher, feature_width
from bincomm.objectives import DINO, DenseCommunication, DiscreteCommunication, SimDINO

RATES = {"lr": 0.001, "weight_decay": 0.1, "momentum": 0.9}
ARGUMENTS = {"patch_size": 4, "depth": 2, "qkv_bias": False}


def create(objective=None, precision="fp32", accumulate=1):
    torch.manual_seed(0)
    backbone, _ = create_backbone("test_vit", 16, **ARGUMENTS)
    width, masks = feature_width(backbone, [16]), None
    student = Network(backbone, Head(width, 64, 32))
    if isinstance(objective, DenseCommunication):
        patches = find_patches(backbone, 16, 3)
        student = DenseNetwork(backbone, student.head, Head(width, 64, 32), patches, masks=True)
        masks = Masks(0, patches.rows, patches.columns).cuda()
    teacher = create_teacher(student, create_backbone("test_vit", 16, **ARGUMENTS)[0]).cuda()
    student = student.cuda()
    objective = (objective or DiscreteCommunication()).cuda()
    networks = (student, teacher, objective, create_optimizer(student))
    options = {"clip": 1.0, "precision": precision, "masks": masks}
    if accumulate > 1:
        return AccumulatedStep(*networks, microbatches=accumulate, **options)
    return Step(*networks, **options)


def dense():
    """The objective of images and of masked patches."""
    return DenseCommunication(DiscreteCommunication(), 1.0)


def batches(count, n=16):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield tuple(
            torch.randn(n, views, 3, size, size, generator=generator).cuda()
            for views, size in ((2, 16), (3, 12))
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", [DiscreteCommunication, dense, SimDINO, lambda: DINO(32)])
def test_a_step_does_not_wait_for_the_device(objective, precision):
    step = create(objective(), precision)
    first, *rest = batches(4)
    step(*first, **RATES)  # only the set-up may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for views in rest:
            step(*views, **RATES)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.guard.read() == (0, 0, False)


@pytest.mark.parametrize("objective", [DiscreteCommunication, dense])
@pytest.mark.parametrize("form", ["compile", "capture", "accumulate"])
def test_faster_and_smaller_forms_are_the_same_step(form, objective):
    plain, other = create(objective()), create(objective(), accumulate=2 if form == "accumulate" else 1)
    first = next(batches(1))
    if form == "compile":
        assert compile_networks(other, *first)[0]
    run = CapturedStep(other, *first) if form == "capture" else other
    for views in batches(5):
        expected, result = plain(*views, **RATES), run(*views, **RATES)
        torch.testing.assert_close(result.losses, expected.losses, rtol=1e-3, atol=1e-4)
    for expected, result in zip(plain.student.parameters(), other.student.parameters(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("captured", [False, True])
def test_a_frozen_teacher_and_its_stored_messages(tmp_path, captured):
    """Neither waits for the device; training from the messages is training with the teacher in memory."""
    keys = {"backbone": "test_vit", "backbone_args": ARGUMENTS, "global_size": 16, "bits": 32, "hidden": 64}
    config = PretrainConfig(**keys, precision="fp32", drop_path=0.0)
    export_backbone(create_networks(config, torch.device("cpu"))[1], config, tmp_path)
    students = []
    for stored in (False, True):
        teacher = FrozenTeacher(replace(config, teacher=(str(tmp_path),)), torch.device("cuda"))
        generator = torch.Generator().manual_seed(0)
        width = teacher.members[0].projection.shape[1]
        teacher.take([(torch.randn(32, width, generator=generator), torch.randn(32, generator=generator))])
        student, _ = create_networks(config, torch.device("cuda"))
        objective = DiscreteCommunication(0.0).cuda()
        sender = None if stored else teacher
        step = Step(student, sender, objective, create_optimizer(student), clip=1.0, precision="fp32")
        given = [(*views, teacher(views[0]).clone() if stored else None) for views in batches(5)]
        run = CapturedStep(step, *given[0]) if captured else step
        run(*given[0], **RATES)  # only the set-up may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = [run(*batch, **RATES).losses["agreement"].clone() for batch in given[1:]]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        students.append((losses, list(student.parameters())))
    for in_memory, from_messages in zip(*students, strict=True):
        torch.testing.assert_close(in_memory, from_messages, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("captured", [False, True])
def test_what_is_not_finite_is_skipped(captured):
    step = create()
    good = next(batches(1))
    run = CapturedStep(step, *good) if captured else step
    counts = []

    def take(global_views, local_views):
        run(global_views, local_views, **RATES)
        counts.append(step.guard.read()[:2])

    take(*good)
    before = [p.detach().clone() for p in step.student.parameters()]
    take(good[0], torch.full_like(good[1], torch.nan))
    assert all(torch.equal(p, old) for p, old in zip(step.student.parameters(), before, strict=True))
    take(*good)
    assert counts == [(0, 0), (0, 0), (1, 1)]
    assert step.guard.read(last=True)[:2] == (1, 0)
    assert not torch.equal(next(step.student.head.parameters()), before[-6])
