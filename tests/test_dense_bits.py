"""Dense bits: masked patches of the student predict the bits of the teacher's patches at the same places."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from quick_runs import pages
from ranks import run_on_ranks
from tiny_run import OPTIONS

from bincomm.building import create_networks, create_objective
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.distributed.ranks import Ranks
from bincomm.distributed.sharding import gather_tensors, shard
from bincomm.engine.compiling import compile_networks
from bincomm.engine.job import create_step
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.optimizer import create_optimizer
from bincomm.engine.records import Records
from bincomm.engine.reset import reset_head
from bincomm.files import read_json_lines
from bincomm.networks import Network
from bincomm.objectives import DenseCommunication, DiscreteCommunication
from bincomm.patches import patch_map
from bincomm.pretraining import Interrupted, pretrain
from tests.calls import Calls
from tests.test_no_wait import RefuseToWait

CPU = torch.device("cpu")
RATES = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
VIT = {"backbone": "test_vit", "backbone_args": {"patch_size": 4, "depth": 2, "qkv_bias": False}}
CONV = {
    "backbone": "convnext_atto",
    "backbone_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "output_stride": 8},
}
MODELS = {"vit": VIT, "conv": CONV}


def configuration(model="vit", **options):
    keys = {"global_size": 32, "local_size": 16, "local_crops": 2, "batch_size": 6, "bits": 12, "hidden": 16}
    keys |= {"precision": "fp32", "drop_path": 0.0, "dense": 0.5, **MODELS[model]}
    return PretrainConfig(**{**keys, **options})


def create(dtype=torch.float32, sharded=None, rank=0, **options):
    config = configuration(**options)
    student, teacher = (network.to(dtype) for network in create_networks(config, CPU))
    if sharded is not None:
        shard(student, sharded)
        shard(teacher, sharded)
    objective = create_objective(config).to(dtype)
    return create_step(config, student, teacher, objective, create_optimizer(student), rank=rank)


def batches(count, n=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield tuple(torch.randn(n, 2, 3, side, side, generator=generator).to(dtype) for side in (32, 16))


def plain_loss(student, teacher, beta, weight):
    """Of V + M and 2 + M logits, written out: the definition."""
    patches = len(teacher) - 2
    views, teachers = student[:-patches], teacher[:2]

    def bce(logits, messages):
        return F.binary_cross_entropy_with_logits(logits, (messages > 0).to(logits))

    def rate(logits):
        z = F.normalize(logits, dim=-1)
        n, bits = z.shape
        return torch.logdet(torch.eye(bits, dtype=z.dtype) + bits / (n * 0.05) * z.T @ z) / 2

    pairs = [bce(views[v], teachers[u]) for u in range(2) for v in range(len(views)) if u != v]
    n, bits = student.shape[1:]
    gamma = (bits + n) / (bits * n)
    images = sum(pairs) / len(pairs) - beta * gamma * (rate(views[0]) + rate(views[1])) / 2
    agreement = bce(student[-patches:], teacher[2:])
    sample = student[len(views) :][:2]
    return images + weight * (agreement - beta * gamma * sum(map(rate, sample)) / len(sample)), agreement


@pytest.mark.parametrize("patches", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_its_gradient_are_those_of_the_definition(patches, dtype):
    student = torch.randn(3 + patches, 7, 10, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2 + patches, 7, 10, dtype=dtype)
    losses = DenseCommunication(DiscreteCommunication(0.3), 0.7)(student, teacher)
    losses["loss"].backward()
    assert tuple(losses) == DenseCommunication.scalars
    exact = student.detach().double().requires_grad_()
    expected, agreement = plain_loss(exact, teacher.double(), 0.3, 0.7)
    expected.backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(losses["loss"].double(), expected, **tolerance)
    torch.testing.assert_close(losses["dense_agreement"].double(), agreement, **tolerance)
    torch.testing.assert_close(student.grad.double(), exact.grad, **tolerance)
    assert losses["dense_beta"].item() == pytest.approx(0.3)


def test_beta_of_the_patches_is_found_by_a_control_of_its_own():
    """Patches whose bits are dead raise theirs; the images' is as without patches."""
    objective, alone = DenseCommunication(DiscreteCommunication("auto"), 1.0), DiscreteCommunication("auto")
    for _ in range(20):
        student, teacher = torch.randn(7, 32, 8), torch.randn(5, 32, 8)
        student[4:] = 1 + 0.01 * student[4:]
        losses = objective(student, teacher)
        expected = alone(student[:4], teacher[:2])
    for name in ("agreement", "rate", "beta"):
        assert torch.equal(losses[name], expected[name])
    assert losses["dense_beta"] > 10 * losses["beta"]
    assert {"control.state", "images.control.state"} == objective.state_dict().keys()


@pytest.mark.parametrize("model", MODELS)
def test_the_student_does_not_see_what_is_masked_and_the_teacher_does(model):
    student, teacher = (network.eval() for network in create_networks(configuration(model), CPU))
    grid = student.patches
    assert (grid.rows, grid.columns) == ((8, 8) if model == "vit" else (4, 4))
    count = grid.rows * grid.columns
    views, local_views = next(batches(1, n=2))
    places = torch.tensor(
        [[1, 0], [count + 1, count + 2]]
    )  # of image 0 the first crop is masked, of 1 the second
    side = 32 // grid.rows

    def at(image, crop, place):
        row, column = divmod(place, grid.columns)
        return (
            image,
            crop,
            slice(None),
            slice(side * row, side * (row + 1)),
            slice(side * column, side * (column + 1)),
        )

    changed = views.clone()
    for image, crop, patches in ((0, 0, (0, 1)), (1, 1, (1, 2))):
        for place in patches:
            changed[at(image, crop, place)] = 7
    elsewhere = views.clone()
    elsewhere[at(0, 0, count - 1)] = 7
    with torch.no_grad():
        logits = student(views, local_views, places=places)
        assert logits.shape == (2 + 2 + 2, 2, 12)
        assert torch.equal(student(changed, local_views, places=places), logits)
        assert not torch.equal(student(elsewhere, local_views, places=places)[:, 0], logits[:, 0])
        of_teacher = teacher(views, places=places)
        assert not torch.equal(teacher(changed, places=places)[2:], of_teacher[2:])
        assert torch.equal(of_teacher[:2], Network.forward(teacher, views))
        # What the teacher tells of a patch is its head's word on that patch of its map.
        maps = patch_map(
            teacher.backbone, teacher.backbone.forward_features(views.flatten(0, 1)), grid[:2]
        ).unflatten(0, (2, 2))
        for image, crop, patches in ((0, 0, (1, 0)), (1, 1, (1, 2))):
            for number, place in enumerate(patches):
                of_patch = maps[image, crop].flatten(0, 1)[place]
                torch.testing.assert_close(of_teacher[2 + number, image], teacher.patch_head(of_patch))
        # Without places both are networks like any other: as they are evaluated.
        assert torch.equal(student(views), Network.forward(student, views))
    assert torch.equal(teacher.backbone(views[0]), student.backbone(views[0]))


@pytest.mark.parametrize("model", MODELS)
def test_all_that_is_trained_gets_a_gradient_and_the_teacher_no_mask_token(model):
    step = create(model=model)
    output = step.gradient(*next(batches(1)))
    missing = [name for name, p in step.student.named_parameters() if p.grad is None]
    assert not missing
    assert any(p.grad.abs().sum() > 0 for p in step.student.patch_head.parameters())
    names = step.student.state_dict().keys() - step.teacher.state_dict().keys()
    assert names == ({"mask_token"} if model == "vit" else set())
    if model == "vit":
        assert step.student.mask_token.grad.abs().sum() > 0
    # What is exported is the backbone, whose weights have their usual names.
    plain, _ = create_networks(configuration(model, dense=0.0), CPU)
    assert plain.backbone.state_dict().keys() == step.student.backbone.state_dict().keys()
    count = step.masks.count
    assert [len(x) for x in (output.student, output.teacher, *output.patches)] == [4, 2, count, count]


def test_the_teacher_is_the_average_of_the_student_parameter_by_parameter():
    step = create()
    before = {name: p.clone() for name, p in step.teacher.named_parameters()}
    step(*next(batches(1)), **RATES)
    student = dict(step.student.named_parameters())
    for name, p in step.teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * student[name])
    assert not torch.equal(before["patch_head.layers.0.weight"], step.teacher.patch_head.layers[0].weight)


def test_without_dense_bits_nothing_is_there():
    config = configuration(dense=0.0)
    student, teacher = create_networks(config, CPU)
    assert type(student) is type(teacher) is Network
    assert type(create_objective(config)) is DiscreteCommunication
    assert create(dense=0.0).masks is None


def weights(step):
    return {
        f"{kind}.{name}": value.clone()
        for kind, module in (
            ("student", step.student),
            ("teacher", step.teacher),
            ("objective", step.objective),
        )
        for name, value in module.state_dict().items()
    }


def test_accumulation_takes_the_patches_of_the_whole_batch():
    whole, parts = (create(torch.float64, accumulate=count) for count in (1, 3))
    for views in batches(2, dtype=torch.float64):
        first, second = whole(*views, **RATES), parts(*views, **RATES)
        torch.testing.assert_close(first.losses, second.losses)
        torch.testing.assert_close(first.patches, second.patches)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-6, atol=1e-8)


def train_on_rank(rank, world, folder):
    own = slice(3 * rank, 3 * rank + 3)
    for sharded in (None, Ranks(rank, world, rank, CPU)):
        step = create(torch.float64, sharded=sharded, rank=rank)
        losses = [
            step(*(views[own] for views in batch), **RATES).losses
            for batch in batches(2, dtype=torch.float64)
        ]
        state = [gather_tensors(network.state_dict()) for network in (step.student, step.teacher)]
        torch.save((losses, *state), f"{folder}/{rank}-{sharded is not None}.pt")


@pytest.mark.slow
def test_two_ranks_mask_and_learn_as_one_with_all_images(tmp_path):
    """With DistributedDataParallel and with parameters split."""
    run_on_ranks(train_on_rank, 2, tmp_path)
    step = create(torch.float64)
    expected = [step(*batch, **RATES).losses for batch in batches(2, dtype=torch.float64)]
    for sharded in (False, True):
        results = [torch.load(tmp_path / f"{rank}-{sharded}.pt") for rank in range(2)]
        for number, losses in enumerate(expected):
            for name, value in losses.items():
                mean = sum(result[0][number][name] for result in results) / 2
                torch.testing.assert_close(mean, value, rtol=1e-6, atol=1e-9)
        for student, teacher in (result[1:] for result in results):
            torch.testing.assert_close(student, step.student.state_dict(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(teacher, step.teacher.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_nothing_in_a_step_waits_for_the_device(model, accumulate):
    step = create(model=model, accumulate=accumulate, precision="bf16", channels_last=model == "conv")
    with RefuseToWait():
        output = step(*next(batches(1)), **RATES)
    assert output.losses["loss"].isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", pytest.param("conv", marks=pytest.mark.long)])
def test_torch_compile_traces_both_networks_without_a_break(model, monkeypatch):
    """Up to the graphs: what a compiler makes of them is its own business, and takes it a minute."""
    plain, compiled = create(model=model), create(model=model)
    real = torch.compile
    options = {"backend": "eager", "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda *args, **given: real(*args, **given, **options))
    views = [(global_views, None) for global_views, _ in batches(2)]
    worked, text = compile_networks(compiled, *views[0])
    assert worked, text
    assert torch.equal(plain.masks.step, compiled.masks.step)  # trying it out left no trace
    for batch in views:
        one, other = plain(*batch, **RATES), compiled(*batch, **RATES)
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-5)


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been():
    step, other = create(), create()
    views, bad = list(batches(2))
    step(bad[0] * torch.nan, bad[1], **RATES)
    assert step.guard.read()[:2] == (1, 1)
    for each in (step, other):
        output = each(*views, **RATES)
    assert torch.equal(step.masks.step, other.masks.step)
    assert output.skipped == 0


def test_a_reset_draws_both_heads_anew():
    step = create()
    step(*next(batches(1)), **RATES)
    before = weights(step)
    reset_head(step.student, step.teacher, step.optimizer, (0, 1))
    after = weights(step)
    for name, value in after.items():
        drawn = ".head." in name or ".patch_head." in name
        assert torch.equal(value, before[name]) is (not drawn), name
    heads = [list(network.parameters()) for network in (step.student.patch_head, step.teacher.patch_head)]
    assert all(map(torch.equal, *heads))
    assert not torch.equal(step.student.head.layers[2].weight, step.student.patch_head.layers[2].weight)
    assert not any(p in step.optimizer.state for p in heads[0])
    assert step.student.mask_token in step.optimizer.state


def test_dense_metrics_are_of_the_patches():
    step, window = create(), MetricsWindow(4, DenseCommunication.scalars, 12, CPU, patches=True)
    outputs = [step(*views, **RATES) for views in batches(3)]
    other = MetricsWindow(4, DenseCommunication.scalars, 12, CPU, patches=True)
    for number, output in enumerate(outputs):
        window.add(output)
        if number == 1:
            other.load_state_dict(window.state_dict())
    other.add(outputs[2])
    metrics = window.report()
    bits = torch.cat([output.patches[1][:2].flatten(0, 1) > 0 for output in outputs]).double()
    logits = torch.cat([output.patches[0][:2].flatten(0, 1) for output in outputs]).double()
    p, ln2 = bits.mean(0), torch.log(torch.tensor(2.0)).double()
    entropy = (torch.special.entr(p) + torch.special.entr(1 - p)) / ln2
    cost = F.binary_cross_entropy_with_logits(logits, bits, reduction="none").mean(0) / ln2
    expected = (entropy - cost).clamp(min=0).sum().item()
    assert metrics["dense_transmitted_bits"] == pytest.approx(expected, abs=1e-5)
    assert metrics["dense_bit_entropy"] == pytest.approx(entropy.mean().item())
    assert other.report() == metrics


def test_patches_cost_no_further_pass():
    """One pass of each network: the patches are those of the same crops."""
    counts = []
    for dense in (0.0, 1.0):
        step = create(dense=dense)
        with Calls() as calls:
            step(*next(batches(1)), **RATES)
        counts.append(sum("scaled_dot_product" in name and "backward" not in name for name in calls.names))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": -1}, "dense: expected from 0 to 1000, got -1"),
        ({"dense": 1.0, "method": "dino"}, "dense: expected 0 with method dino, got 1"),
        ({"dense": 1.0, "method": "simdino"}, "dense: expected 0 with method simdino, got 1"),
    ],
)
def test_keys_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        configuration(**options)


def test_networks_without_patches_are_refused():
    with pytest.raises(
        ValueError,
        match="dense: expected 0, because test_vit has no patches .*got 2: expected several .* got 1",
    ):
        create_networks(
            configuration(backbone_args={"patch_size": 32, "depth": 1}, local_crops=0, dense=2), CPU
        )
    crossvit = {"backbone": "crossvit_tiny_240", "backbone_args": {}, "global_size": 240, "local_crops": 0}
    with pytest.raises(
        ValueError, match="dense: expected 0, because crossvit_tiny_240 has no patches .*got 0.5"
    ):
        create_networks(configuration(**crossvit), CPU)


RUN = {**OPTIONS, "backbone": "test_vit", "backbone_args": '{"patch_size": 4, "depth": 1}', "dense": 1.0}
RUN |= {"drop_path": 0.1, "log_every": 4, "save_every": 6, "max_steps": 14}


@pytest.mark.slow
def test_a_run_with_dense_bits_is_resumed_exactly(few_digits, tmp_path, monkeypatch):
    """And leaves their metrics and curves, and a backbone as any other run."""
    keys = {**RUN, "data": str(few_digits)}
    with monkeypatch.context() as patch:  # which take longer than such a run
        for name in ("plot_curves", "report_run"):
            patch.setattr(f"bincomm.pretraining.{name}", lambda *_: None)
        pretrain(configure(**keys, output=tmp_path / "whole"))
    add = Records.add

    def interrupted(self, step, *args):
        add(self, step, *args)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", interrupted)
        with pytest.raises(Interrupted):
            pretrain(configure(**keys, output=tmp_path / "run"))
    with pages():
        pretrain(configure(**keys, output=tmp_path / "run"))
    for name in ("metrics.jsonl", "model.safetensors", "result.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    dense = {"dense_agreement", "dense_rate", "dense_beta", "dense_transmitted_bits", "dense_bit_entropy"}
    assert all(dense <= record.keys() for record in records)
    assert len({record["dense_beta"] for record in records}) == len(records)
    assert "dense_agreement" in (tmp_path / "run" / "report.html").read_text()
