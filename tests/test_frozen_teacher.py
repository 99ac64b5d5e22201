"""Runs under a teacher that does not move, in memory or by messages that were stored before."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from ranks import run_on_ranks

from bincomm import api, cli
from bincomm.building import create_networks
from bincomm.configuration import configure
from bincomm.data.sources import open_source
from bincomm.distributed.ranks import ALONE, join_ranks
from bincomm.dry_run import dry_run
from bincomm.engine import frozen_teacher
from bincomm.engine.checkpoints import Checkpoints
from bincomm.engine.export import export_backbone
from bincomm.engine.frozen_teacher import FrozenTeacher, canonical_projection, choose_codes, sample_crops
from bincomm.engine.lock import open_run
from bincomm.engine.signals import Signals
from bincomm.engine.stored_messages import MANIFEST, check_messages, layout_of, read_manifest
from bincomm.evaluation.pretrained import load_pretrained
from bincomm.files import read_json_lines
from bincomm.messages import configure as configure_messages
from bincomm.messages import write_messages
from bincomm.ops.messages import unpack_signs
from bincomm.pretraining import train
from bincomm.profiling import profile

CPU = torch.device("cpu")
# Eleven steps an epoch; drop path draws random numbers in the student, and some crops are turned by numbers
# that are drawn behind those of all crops.
OPTIONS = {
    "recipe": "digits",
    "backbone": "test_vit",
    "backbone_args": {"patch_size": 4, "depth": 1},
    "drop_path": 0.2,
    "global_size": 16,
    "local_size": 12,
    "right_angles": 0.5,
    "bits": 20,
    "hidden": 16,
    "batch_size": 32,
    "epochs": 2,
    "log_every": 2,
    "save_every": 7,
    "threads": 1,
}
TEACHER = {"backbone": "resnetv2_18", "backbone_args": {"layers": [1, 1], "channels": [8, 16], "stem_chs": 8}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(few_digits):
    """The training images of a quarter of the digits."""
    return str(few_digits / "train")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Weights of a network that was not trained, for other crops and another normalization."""
    return export_weights(tmp_path_factory.mktemp("weights") / "large", 1)


@pytest.fixture(scope="module")
def messages(tmp_path_factory, data, large):
    """The messages of two epochs, and what was written."""
    folder = tmp_path_factory.mktemp("messages") / "of_large"
    return folder, write_messages(of_messages(large, folder, data))


@pytest.fixture(scope="module")
def loop(tmp_path_factory, data, large):
    """A run with the teacher in memory."""
    return trained(tmp_path_factory.mktemp("runs") / "loop", data=data, teacher=large)


def export_weights(folder, seed):
    config = configure(**{**OPTIONS, **TEACHER, "global_size": 24, "seed": seed, "drop_path": 0})
    config = configure(**{**config.as_dict(), "recipe": "digits", "mean": (0.5,) * 3, "std": (0.25,) * 3})
    folder.mkdir()
    export_backbone(create_networks(config, CPU)[1], config, folder)
    return str(folder)


def of_messages(weights, folder, data, **options):
    return configure_messages(weights, **{**OPTIONS, "data": data, "output": str(folder), **options})


def trained(output, ranks=ALONE, **options):
    """A run's folder after its training, without an evaluation."""
    config = configure(**{**OPTIONS, "output": str(output), **options})
    source = open_source(config.data)
    with open_run(config.output, ranks) as run:
        network = train(config, source, run, ranks, Signals(run))
        if ranks.rank == 0:
            export_backbone(network, config, run)
    return Path(output)


def same_end(run, other):
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def resumed(run, output, **options):
    """A run that goes on from the first checkpoint of another one."""
    (output / "checkpoints").mkdir(parents=True)
    shutil.copy(min((run / "checkpoints").glob("*.ckpt")), output / "checkpoints")
    shutil.copy(run / "metrics.jsonl", output)
    return trained(output, **options)


def test_stored_messages_train_as_the_teacher_does(loop, messages, data, tmp_path, caplog):
    caplog.set_level("INFO", "bincomm")
    stored = trained(tmp_path / "stored", data=data, messages=str(messages[0]))
    same_end(loop, stored)
    records = read_json_lines(stored / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(2, 23, 2))
    assert {(record["beta"], record["momentum"]) for record in records} == {(0.0, 1.0)}
    assert records[-1]["loss"] == records[-1]["agreement"] < records[0]["loss"]
    assert "teacher frozen, head never reset" in caplog.text
    # Both go on from their checkpoints as if they had not ended.
    same_end(loop, resumed(stored, tmp_path / "again", data=data, messages=str(messages[0])))


def test_a_run_goes_on_under_its_teacher(loop, data, large, tmp_path):
    same_end(loop, resumed(loop, tmp_path / "again", data=data, teacher=large))
    state = Checkpoints(loop / "checkpoints", 1).load()
    assert state["teacher"].keys() == {"fingerprint", "codes"}  # and nothing of its backbone
    ((projection, offset),) = state["teacher"]["codes"]
    assert projection.shape == (20, 16)
    assert offset.shape == (20,)


def test_weights_that_were_changed_are_refused(data, tmp_path):
    options = {"data": data, "teacher": export_weights(tmp_path / "weights", 1), "max_steps": 1}
    trained(tmp_path / "run", **options)
    shutil.rmtree(tmp_path / "weights")
    export_weights(tmp_path / "weights", 2)
    with pytest.raises(
        ValueError, match="^teacher: expected the weights that the run began with, of fingerp"
    ):
        trained(tmp_path / "run", **options)


def test_messages_that_were_changed_are_refused(messages, data, tmp_path):
    options = {"data": data, "messages": str(tmp_path / "messages"), "max_steps": 1}
    shutil.copytree(messages[0], tmp_path / "messages")
    trained(tmp_path / "run", **options)
    manifest = json.loads((messages[0] / MANIFEST).read_text())
    (tmp_path / "messages" / MANIFEST).write_text(json.dumps({**manifest, "teacher": "0" * 32}))
    with pytest.raises(ValueError, match="^messages: expected those that the run began with, of manifest"):
        trained(tmp_path / "run", **options)


def test_what_is_trained_is_the_student(loop, data, large):
    config = configure(**{**OPTIONS, "data": data, "teacher": large})
    _, network = create_networks(config, CPU)
    initial = network.backbone.state_dict()
    state = Checkpoints(loop / "checkpoints", 1).load()["student"]
    exported = safetensors.torch.load_file(loop / "model.safetensors")
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in exported.items())
    assert any(not torch.equal(initial[name], value) for name, value in exported.items())
    loaded = load_pretrained(loop, "cpu")
    assert all(torch.equal(loaded.backbone.state_dict()[name], value) for name, value in exported.items())
    assert torch.equal(loaded.head.state_dict()["layers.4.bias"], state["head.layers.4.bias"])


def test_parts_of_a_batch(data, large, tmp_path):
    """The teacher is shown a part at a time in both cases."""
    options = {"accumulate": 2, "max_steps": 4}
    write_messages(of_messages(large, tmp_path / "messages", data, **options))
    loop = trained(tmp_path / "loop", data=data, teacher=large, **options)
    same_end(loop, trained(tmp_path / "stored", data=data, messages=str(tmp_path / "messages"), **options))


def on_two_ranks(rank, world, folder):
    folder = Path(folder)
    data, large, options = json.loads((folder / "arguments.json").read_text())
    written = write_messages(of_messages(large, folder / "messages", data, **options))
    assert (written is None) == (rank > 0)
    with join_ranks("cpu") as ranks:
        trained(folder / "loop", ranks, data=data, teacher=large, **options)
        trained(folder / "stored", ranks, data=data, messages=str(folder / "messages"), **options)


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_ranks(data, large, tmp_path, fsdp):
    options = {"max_steps": 4, "save_every": 3, "fsdp": fsdp}
    (tmp_path / "arguments.json").write_text(json.dumps([data, large, options]))
    run_on_ranks(on_two_ranks, 2, tmp_path)
    same_end(tmp_path / "loop", tmp_path / "stored")
    manifest = read_manifest(tmp_path / "messages")
    assert (manifest["epochs"], manifest["images_a_pass"]) == (1, 16)
    # And one rank continues from the messages of two.
    if not fsdp:
        stored = {"data": data, "messages": str(tmp_path / "messages"), "max_steps": 4, "save_every": 3}
        end = resumed(tmp_path / "stored", tmp_path / "one", **stored)
        losses = [
            [line["loss"] for line in read_json_lines(run / "metrics.jsonl")]
            for run in (end, tmp_path / "stored")
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-2)


def test_what_is_missing_is_written_again(messages, data, large, tmp_path, capsys):
    folder, written = messages
    assert (written.epochs, written.crops, written.bits) == (2, 2 * 2 * 352, 20)
    assert (written.parts, written.written) == (2, 2)
    layout = layout_of(of_messages(large, folder, data), open_source(data))
    assert written.size == pytest.approx(2 * layout.epoch_bytes(), rel=0.02)
    copy = tmp_path / "messages"
    shutil.copytree(folder, copy)
    lost = copy / layout.name(1, 0)
    before = safetensors.torch.load_file(lost)
    lost.unlink()
    options = {**OPTIONS, "backbone_args": json.dumps(OPTIONS["backbone_args"]), "data": data, "output": copy}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    assert cli.main(["messages", large, *arguments]) == 0
    output = capsys.readouterr()
    assert "1408 crops of 20 bits, 8.99 kB in 2 files" in output.out
    assert "352 images × 2 crops × 20 bits each: 8.99 kB" in output.err
    after = safetensors.torch.load_file(lost)
    assert all(torch.equal(before[name], after[name]) for name in ("messages", "images"))
    keys = {key: value for key, value in OPTIONS.items() if key != "recipe"}
    assert api.messages(large, data, copy, recipe="digits", **keys) == written._replace(written=0)
    with pytest.raises(ValueError, match="^seed: expected 0, which the messages in .* are of, got 1"):
        write_messages(of_messages(large, copy, data, seed=1))


def run_of(folder, data, **options):
    return configure(**{**OPTIONS, "data": data, "messages": str(folder), **options})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seed": 3}, "seed: expected 0, which the messages in .* are of, got 3"),
        ({"bits": 16}, "bits: expected 20, .*, got 16"),
        ({"batch_size": 16}, "batch_size: expected 32, .*, got 16"),
        ({"global_size": 24}, "global_size: expected 16, .*, got 24"),
        ({"global_scale": (0.1, 1.0)}, r"global_scale: expected \[0.7, 1.0\], .*, got \[0.1, 1.0\]"),
        ({"flip": 0.5}, "flip: expected 0.0, .*, got 0.5"),
        ({"epochs": 3}, "epochs: expected at most 2, of which .* holds the messages, got 3"),
        ({"epochs": 9, "max_steps": 23}, "epochs: expected at most 2, .*, got 3"),
    ],
    ids=str,
)
def test_messages_of_another_run_are_refused(messages, data, options, error):
    with pytest.raises(ValueError, match=f"^{error}"):
        check_messages(run_of(messages[0], data, **options), open_source(data))


def test_what_does_not_concern_global_crops_may_differ(messages, data):
    options = {"local_size": 16, "local_scale": (0.1, 0.2), "backbone": "resnet18", "epochs": 1}
    assert check_messages(run_of(messages[0], data, **options), open_source(data))["bits"] == 20


def test_what_such_a_run_would_take_is_measured(messages, data, tmp_path, monkeypatch):
    """In more steps than there are messages for."""
    monkeypatch.setattr("bincomm.engine.budget.AT_MOST", 20)
    config = run_of(messages[0], data, epochs=1, output=str(tmp_path / "run"))
    forecast = dry_run(config)
    student = sum(p.numel() for p in create_networks(config, CPU)[0].parameters())
    assert (forecast.steps, forecast.checkpoint_bytes) == (11, 12 * student)


def test_the_teacher_takes_no_time_where_its_messages_are_stored(messages, data, large, monkeypatch):
    monkeypatch.setattr("bincomm.profiling.PRODUCT", {"cpu": 64})
    shares = []
    for keys in ({"messages": str(messages[0])}, {"teacher": large}):
        result = profile(configure(**{**OPTIONS, "data": data, **keys}), 3)
        shares.append(result["parts"]["teacher"] / result["parts"]["student"])
    assert shares[0] < min(0.1, shares[1])


def test_other_images_are_refused(messages, data, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(data, copy)
    check_messages(run_of(messages[0], str(copy)), open_source(str(copy)))  # a copy is the same data
    changed = min(copy.glob("*/*.png"))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(changed)
    with pytest.raises(ValueError, match=r"^data: expected the 360 images .*, got 360 \("):
        check_messages(run_of(messages[0], str(copy)), open_source(str(copy)))
    changed.unlink()
    with pytest.raises(ValueError, match=r"^data: expected the 360 images .*, got 359 \("):
        check_messages(run_of(messages[0], str(copy)), open_source(str(copy)))


def test_an_image_that_could_not_be_read_is_noticed_once_it_can(data, large, tmp_path):
    images, folder = tmp_path / "images", tmp_path / "messages"
    shutil.copytree(data, images)
    broken = sorted(images.glob("*/*.png"))[201]  # none of the sample
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    options = {"data": str(images), "epochs": 1}
    write_messages(of_messages(large, folder, **options))
    trained(tmp_path / "run", messages=str(folder), **options)  # the same image is in its place
    broken.write_bytes(whole)
    with pytest.raises(ValueError, match="^messages: expected image .* which was encoded, got 201, "):
        trained(tmp_path / "other", messages=str(folder), **options)


FIELDS = {
    "format": [2, None],
    "bits": [0, 10**9, 20.0, True],
    "seed": [-1, "0"],
    "epochs": [0, 10**400],
    "batch_size": ["32"],
    "images": [2**40],
    "images_a_pass": [[16]],
    "data": ["../../x", "0" * 31, 5],
    "teacher": ["/etc/passwd"],
    "precision": ["fp16"],
    "crops": [{}, None, [1], "nested", "unknown", "infinite"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in FIELDS for value in FIELDS[key]])
def test_every_field_of_a_manifest_is_checked(messages, tmp_path, key, value):
    manifest = json.loads((messages[0] / MANIFEST).read_text())
    crops = {
        "nested": {**manifest["crops"], "jitter": [[0.0], {}]},
        "unknown": {**manifest["crops"], "path": 1},
        "infinite": {**manifest["crops"], "flip": float("inf")},
    }
    manifest[key] = crops.get(value, value) if key == "crops" and isinstance(value, str) else value
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"^messages: .*{MANIFEST}: {key}: expected "):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", "[" * 10**5, '{"format": 1, "path": "/x"}', " " * 2**21, "9" * 5000]
)
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="^messages: "):
        read_manifest(tmp_path)


def change(tensors, metadata, how):
    if how == "damaged":
        tensors["messages"][3, 1, 0] ^= 1
    elif how == "fewer":
        tensors["messages"] = tensors["messages"][:-1].clone()
    elif how == "floats":
        tensors["messages"] = tensors["messages"].float()
    elif how == "more":
        tensors["another"] = torch.zeros(1)
    elif how == "of another folder":
        metadata["manifest"] = "0" * 32
    elif how == "of another epoch":
        metadata["part"] = metadata["part"].replace("00000-", "00001-")


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("damaged", "its checksum is wrong"),
        ("fewer", "expected int32 tensors of shapes"),
        ("floats", "expected int32 tensors of shapes"),
        ("more", "expected int32 tensors of shapes"),
        ("of another folder", "it is not of the messages.json beside it"),
        ("of another epoch", "it is not of the messages.json beside it"),
        ("cut off", "cannot be used"),
        ("missing", r"epoch-00000-00000.safetensors is missing; the same `bincomm messages` writes"),
    ],
)
def test_files_of_others_are_checked_before_they_are_used(messages, data, tmp_path, how, error):
    folder = tmp_path / "messages"
    shutil.copytree(messages[0], folder)
    path = folder / "epoch-00000-00000.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata, how)
    safetensors.torch.save_file(tensors, path, metadata)
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    if how == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=f"^messages: .*{error}"):
        trained(tmp_path / "run", data=data, messages=str(folder), max_steps=2)
    assert not (tmp_path / "run").exists()


def test_several_teachers_share_the_bits(data, large, tmp_path):
    """Of five bits three and two, each balanced, and those of one teacher independent of each other."""
    weights = [large, export_weights(tmp_path / "other", 2)]
    config = configure(**{**OPTIONS, "data": data, "teacher": weights, "bits": 5})
    source, teacher = open_source(data), FrozenTeacher(config, CPU)
    choose_codes(teacher, config, source, ALONE)
    views = torch.cat(list(sample_crops(source, config, CPU)))
    with torch.inference_mode():
        logits = [member(views).flatten(0, 1) for member in teacher.members]
        bits = unpack_signs(teacher(views), 5)
    assert [part.shape[1] for part in logits] == [3, 2]
    assert torch.equal(bits.flatten(0, 1), torch.cat(logits, 1) > 0)
    assert logits[0].mean(0).abs().max() < 1e-3 * logits[0].std()
    assert 0.3 < bits.float().mean((0, 1)).min() <= bits.float().mean((0, 1)).max() < 0.7
    again = FrozenTeacher(config, CPU)
    choose_codes(again, config, source, ALONE)
    with torch.inference_mode():
        assert torch.equal(again(views), teacher(views))
    with pytest.raises(ValueError, match="^teacher: expected at most as many as bits, 1, got 2"):
        configure(**{**OPTIONS, "teacher": weights, "bits": 1})


def features_of_crops(shared, images=4000):
    """Features (2, n, D) of two crops, turned from coordinates of which so large a share of the variance is
    the image's; the more there is of the image's, the less they vary."""
    shares = torch.tensor(shared, dtype=torch.float64)
    of_image, of_crops = torch.randn(images, len(shared)), torch.randn(2, images, len(shared))
    coordinates = shares.sqrt() * of_image + (1 - shares).sqrt() * of_crops
    turn, _ = torch.linalg.qr(torch.randn(len(shared), len(shared), dtype=torch.float64))
    return coordinates / (1 + shares) @ turn + 3


def test_bits_of_a_teacher_are_what_two_crops_have_in_common(monkeypatch):
    shared = [1.0, 1.0, 0.6, 0.2, 0.0, 0.0, 0.0]
    features = features_of_crops(shared)
    monkeypatch.setattr(frozen_teacher, "RIDGE", 1e-9)
    projection, offset = canonical_projection(features, len(shared), seed=0)
    logits = features.float() @ projection.T + offset
    # As many bits as features only turn them: every direction varies as much as it is the image's.
    spectrum = torch.linalg.eigvalsh(torch.cov(logits.flatten(0, 1).T)).flip(0)
    torch.testing.assert_close(spectrum, torch.tensor(shared), atol=0.06, rtol=0)
    assert logits.mean((0, 1)).abs().max() < 1e-4
    fewer = canonical_projection(features, 4, seed=0).projection
    assert torch.linalg.matrix_rank(fewer, rtol=1e-3) == 4
    assert not torch.equal(canonical_projection(features, 4, seed=1).projection, fewer)


def test_a_teacher_spends_no_bits_on_noise():
    features = features_of_crops([0.9] * 4 + [0.0] * 12)
    projection, offset = canonical_projection(features, 16, seed=0)
    bits = features.float() @ projection.T + offset > 0
    same = (bits[0] == bits[1]).float().mean(0)
    assert same.mean() > 0.72  # 0.86 without any noise, 0.5 from noise alone
    assert (bits.float().mean((0, 1)) - 0.5).abs().max() < 0.05


def test_features_that_no_code_can_be_of():
    same, infinite = torch.ones(2, 9, 3), torch.full((2, 9, 3), torch.inf)
    for features, what in ((same, "the same for all"), (infinite, "not finite")):
        with pytest.raises(ValueError, match=f"^teacher: expected features that tell .* that are {what}"):
            canonical_projection(features.double(), 4, seed=0)


@pytest.mark.parametrize("seed", range(4))
def test_crops_with_nothing_in_common(seed):
    """On opposite sides of the mean; in five of eight dimensions there is rounding alone, on either side."""
    torch.manual_seed(seed)
    features = torch.randn(20, 3) @ torch.randn(3, 8)
    with pytest.raises(ValueError, match="^teacher: .* more alike in two crops .* in a sample of 20;"):
        canonical_projection((torch.stack([features, -features]) + 3).double(), 4, seed=0)


def test_a_teacher_sees_its_own_pixels(large, data):
    """Crops normalized by its own numbers, at its own size, whatever those of the run are."""
    config = configure(**{**OPTIONS, "data": data, "teacher": large})
    (member,) = FrozenTeacher(config, CPU).members
    pixels = torch.rand(3, 2, 3, 24, 24)

    def normalized(mean, std):
        return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    with torch.inference_mode():
        expected = member.backbone(normalized((0.5,) * 3, (0.25,) * 3).flatten(0, 1)).unflatten(0, (3, 2))
        shown = member.features(normalized(config.mean, config.std))
        torch.testing.assert_close(shown.transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
        assert member.features(torch.randn(3, 2, 3, 16, 16)).shape == (2, 3, 16)
    assert not member.training


def test_weights_that_are_no_teacher_are_refused(tmp_path, data):
    foreign = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, foreign)
    config = configure(**{**OPTIONS, "data": data, "teacher": str(foreign)})
    with pytest.raises(ValueError, match="^teacher: expected a finished run, .* does not name its backbone"):
        FrozenTeacher(config, CPU)
    with pytest.raises(ValueError, match="^teacher: .* holds no finished run"):
        FrozenTeacher(configure(**{**OPTIONS, "data": data, "teacher": str(tmp_path)}), CPU)
    with pytest.raises(ValueError, match="^teacher: expected a run's directory, .*, got 'resnt18'"):
        FrozenTeacher(configure(**{**OPTIONS, "data": data, "teacher": "resnt18"}), CPU)
