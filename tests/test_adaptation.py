"""Adapting a backbone to a target: it begins with the source's, under a new head, and ends as a run does."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image

from bincomm import adaptation, cli
from bincomm.adaptation import configure
from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.configuration import configure as configure_run
from bincomm.data.digits import digits
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.engine import job
from bincomm.engine.records import Records
from bincomm.evaluation.features import extract_features
from bincomm.evaluation.knn import knn_accuracy
from bincomm.evaluation.linear import linear_probe
from bincomm.evaluation.pretrained import Pretrained, load_pretrained
from bincomm.pretraining import pretrain
from bincomm.weights import read_weights

OPTIONS = {
    "recipe": "digits",
    "backbone": "resnetv2_18",
    "backbone_args": '{"layers": [1, 1], "channels": [8, 16], "stem_chs": 8}',
    "global_size": 16,
    "local_size": 12,
    "bits": 16,
    "hidden": 32,
    "max_steps": 30,
    "log_every": 4,
    "save_every": 5,
}
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run, whose running statistics and weights are no longer those it began with."""
    output = tmp_path_factory.mktemp("source") / "run"
    pretrain(configure_run(**OPTIONS, output=output))
    return output


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Digits, white on black turned to black on white: train/ and test/ with labels, fewer of them."""
    folder = tmp_path_factory.mktemp("target")
    for path in sorted(digits().glob("*/*/*.png"))[::8]:
        copy = folder / path.relative_to(digits())
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).point(lambda value: 255 - value).save(copy)
    return folder


@pytest.fixture(scope="module")
def adapted(source, target, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapted") / "run"
    assert cli.main(arguments(source, target, output)) == 0
    return output


def arguments(source, target, output, **options):
    values = {"from": source, "data": target, "output": output, "max_steps": 12, "freeze_backbone": 1}
    return ["adapt", *(f"--{key}={value}" for key, value in (values | options).items())]


def configuration(run):
    return PretrainConfig(**yaml.safe_load((run / "config.yaml").read_text()))


def evaluated(weights, config):
    """k-NN and linear probe of the backbone in a file, by direct calls."""
    _, teacher = create_networks(configure_run(str(config)), CPU)
    teacher.backbone.load_state_dict(safetensors.torch.load_file(weights))
    chosen = configuration(config.parent)
    features, model = [], Pretrained.of(teacher, chosen, CPU)
    for part in evaluation_sources(chosen.data, open_source(chosen.data))[:2]:
        features += [extract_features(model, part)["features"], torch.from_numpy(part.labels)]
    return knn_accuracy(*features, k=20), linear_probe(*features)._asdict()


def test_before_is_the_source_and_after_the_run(source, target, adapted):
    result = json.loads((adapted / "adapt.json").read_text())
    config = adapted / "config.yaml"
    files = [adapted / "adapted.safetensors", adapted / "model.safetensors"]  # which, after 12 steps is luck
    for when, file in (("before", source / "model.safetensors"), ("after", next(filter(Path.exists, files)))):
        expected = evaluated(file, config)
        assert (result[when]["knn"]["20"], result[when]["linear"]) == expected
        assert result[when]["query_images"] == len(list(target.glob("test/*/*")))
    assert result["before"] != result["after"]
    assert result["queries_held_out"]
    end = json.loads((adapted / "result.json").read_text())["evaluation"]
    assert result["after"]["knn"] == end["teacher"]["knn"]


def test_a_run_gives_its_keys_but_those_of_the_recipe_and_the_command_line(source, target):
    inherited = configuration(source)
    config = configure(str(source), data=str(target), lr=0.5, output="out")
    expected = {
        "data": str(target), "output": "out", "init_from": str(source), "lr": 0.5,
        "epochs": 10, "max_steps": None, "reset_every": 0, "warmup_epochs": 1,
    }  # fmt: skip
    assert config.as_dict() == {**inherited.as_dict(), **expected}
    assert inherited.max_steps == 30
    assert inherited.reset_every == "auto"
    other = configure(str(source), data=str(target), method="dino", output="out")
    assert (other.clip, other.min_lr, other.freeze_last_layer) == (3.0, 1e-6, 1)


def test_the_head_alone_is_trained_at_first(source, target, tmp_path):
    options = {"max_steps": 8, "save_every": 1, "keep": 9}
    assert cli.main(arguments(source, target, tmp_path / "run", **options)) == 0
    trained = torch.load(source / "checkpoints/step-000000030.ckpt", weights_only=True)["teacher"]
    parameters = dict(create_networks(configuration(source), CPU)[0].backbone.named_parameters())
    students = [
        torch.load(tmp_path / f"run/checkpoints/step-{step:09}.ckpt", weights_only=True)["student"]
        for step in (1, 2, 3)
    ]
    for name in parameters:
        same = [torch.equal(each[f"backbone.{name}"], trained[f"backbone.{name}"]) for each in students]
        assert same == [True, True, False], name  # a quarter of the steps
    heads = [each["head.layers.0.weight"] for each in students]
    assert not torch.equal(heads[0], heads[1])


def test_a_backbone_that_adapting_made_worse_is_kept_as_it_came(source, target, tmp_path, capsys):
    run = tmp_path / "run"
    command = arguments(source, target, run, lr=10, clip=0, freeze_backbone=0)
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "adapting made it worse: k-NN changed by -" in printed
    result = json.loads((run / "adapt.json").read_text())
    assert result["kept"] == "before"
    assert result["after"]["knn"]["20"] < result["before"]["knn"]["20"]
    came, kept, adapted = (
        safetensors.torch.load_file(path)
        for path in (source / "model.safetensors", run / "model.safetensors", run / "adapted.safetensors")
    )
    assert all(torch.equal(came[name], kept[name]) for name in came)
    assert not any(torch.equal(came[name], adapted[name]) for name in came if name.endswith("conv.weight"))
    assert evaluated(run / "adapted.safetensors", run / "config.yaml")[0] == result["after"]["knn"]["20"]
    assert "made k-NN worse, so its result is not taken" in (run / "README.md").read_text()
    # The directory stands for the weights that were kept, a checkpoint for those that were adapted.
    model = load_pretrained(run, CPU)
    assert model.head is None
    assert all(torch.equal(came[name], value) for name, value in model.backbone.state_dict().items())
    checkpoint = load_pretrained(run / "checkpoints/step-000000012.ckpt", CPU)
    weights = checkpoint.backbone.state_dict()
    assert checkpoint.head is not None
    assert all(torch.equal(adapted[name], value) for name, value in weights.items())

    # As after a kill between the weights and adapt.json.
    files = [run / name for name in ("model.safetensors", "adapted.safetensors", "adapt.json")]
    written = [file.read_bytes() for file in files]
    files[-1].unlink()
    assert cli.main(command) == 0
    assert [file.read_bytes() for file in files] == written


def test_a_backbone_that_is_no_worse_is_kept_as_it_is_adapted(source, target, tmp_path, monkeypatch, capsys):
    shares = iter([0.5, 0.5])
    evaluated = adaptation.evaluate_reproducibly

    def equally_good(*arguments):
        return {**evaluated(*arguments), "knn": {"20": next(shares)}}

    monkeypatch.setattr(adaptation, "evaluate_reproducibly", equally_good)
    assert cli.main(arguments(source, target, tmp_path / "run", max_steps=1, freeze_backbone=0)) == 0
    assert "k-NN changed by +0.00 points, with a standard error of at most" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "adapt.json").read_text())["kept"] == "after"
    assert not (tmp_path / "run" / "adapted.safetensors").exists()
    files = [folder / "model.safetensors" for folder in (source, tmp_path / "run")]
    came, kept = map(safetensors.torch.load_file, files)
    assert not torch.equal(came["stem.conv.weight"], kept["stem.conv.weight"])
    assert load_pretrained(tmp_path / "run", CPU).head is not None


def test_another_recipe_says_all_but_the_backbone(source, target):
    config = configure(str(source), "small_images", data=str(target))
    assert (config.epochs, config.reset_every, config.global_size) == (200, 20, 64)
    assert config.backbone == "resnetv2_18"
    assert config.backbone_args == configuration(source).backbone_args
    assert config.bits == 256
    assert config.hidden == configuration(source).hidden


def test_it_begins_with_the_backbone_under_a_new_head_and_never_resets(source, target, tmp_path, monkeypatch):
    began, resets = [], []
    create, reset = create_networks, job.reset_head

    def watched(config, device):
        networks = create(config, device)
        began.append([{name: x.clone() for name, x in n.state_dict().items()} for n in networks])
        return networks

    monkeypatch.setattr("bincomm.engine.job.create_networks", watched)
    monkeypatch.setattr(
        "bincomm.engine.job.reset_head", lambda *args, **named: resets.append(reset(*args, **named))
    )
    # Images for two steps an epoch: there are ends of epochs at which a reset could come.
    assert cli.main(arguments(source, target, tmp_path / "run", reset_every=1, max_steps=5)) == 0
    assert len(resets) == 2
    began.clear()
    resets.clear()
    assert cli.main(arguments(source, target, tmp_path / "other", max_steps=5)) == 0
    assert resets == []
    trained = torch.load(source / "checkpoints/step-000000030.ckpt", weights_only=True)["teacher"]
    heads = [name for name in trained if name.startswith("head.")]
    assert heads
    for state in began[0]:
        for name, value in trained.items():
            if name in heads and "weight" in name:
                assert not torch.equal(state[name], value)
                widths = state[name].shape[1], 768 if name == heads[0] else 2048
                std = configuration(source).head_std * math.sqrt(widths[1] / widths[0])
                assert state[name].std() == pytest.approx(std, rel=0.2)
            elif name in heads:
                assert not state[name].any()
            else:
                assert torch.equal(state[name], value), name


def test_the_same_command_goes_on_and_is_done_once(source, target, adapted, tmp_path, monkeypatch, capsys):
    steps, step = [], Records.add

    def interrupted(self, *args):
        steps.append(step(self, *args))
        if len(steps) == 1:  # while the head alone is trained
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", interrupted)
        assert cli.main(arguments(source, target, tmp_path / "run")) == cli.SAVED
    assert cli.main(arguments(source, target, tmp_path / "run")) == 0
    assert "resuming at step 1" in capsys.readouterr().err
    for name in ("adapt.json", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (adapted / name).read_bytes()
    last = (adapted / "checkpoints/step-000000012.ckpt").stat().st_mtime_ns
    assert cli.main(arguments(source, target, adapted)) == 0
    assert (adapted / "checkpoints/step-000000012.ckpt").stat().st_mtime_ns == last
    result = json.loads((adapted / "adapt.json").read_text())
    before, after = (result[when]["linear"]["accuracy"] for when in ("before", "after"))
    line = f"linear probe         {before:7.2%} {after:7.2%}"
    assert line in capsys.readouterr().out


def test_from_a_file_the_backbone_is_known(source, target, adapted, tmp_path):
    keys = ("global_size", "local_crops", "local_size", "bits", "hidden", "batch_size", "precision")
    options = {key: getattr(configuration(source), key) for key in keys}
    file = source / "model.safetensors"
    options |= {"eval_crop": 1, "drop_path": 0, "max_steps": 1}
    assert cli.main(arguments(file, target, tmp_path / "run", **options)) == 0
    before = [json.loads((run / "adapt.json").read_text())["before"] for run in (tmp_path / "run", adapted)]
    assert before[0] == before[1]
    config = configuration(tmp_path / "run")
    assert (config.backbone, config.backbone_args["layers"]) == ("resnetv2_18", [1, 1])
    assert config.lr == PretrainConfig.lr


def test_a_timm_name_is_the_backbone(target):
    config = configure("resnet18.a1_in1k", data=str(target))
    assert (config.backbone, config.init_from, config.epochs) == ("resnet18.a1_in1k",) * 2 + (10,)
    assert (config.mean, config.std) == (PretrainConfig.mean, PretrainConfig.std)
    config = configure("vit_tiny_patch16_224", data=str(target))  # whose default weights want others
    assert (config.mean, config.std) == ((0.5,) * 3, (0.5,) * 3)


def test_a_timm_model_is_adapted_from_weights_that_are_here(target, tmp_path, monkeypatch, capsys):
    """As timm leaves them in the cache of the Hugging Face Hub; here the test has made them."""
    name, revision = "test_vit.r160_in1k", "0" * 40
    torch.manual_seed(1)
    published = timm.create_model(name).state_dict()  # with a classifier
    cached = tmp_path / "hub" / f"models--timm--{name}"
    for folder in ("refs", f"snapshots/{revision}"):
        (cached / folder).mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    safetensors.torch.save_file(published, cached / "snapshots" / revision / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sizes = {"global_size": 32, "local_size": 16, "bits": 16, "hidden": 32, "batch_size": 64}
    options = {**sizes, "max_steps": 4, "save_every": 1, "keep": 9, "drop_path": 0}
    assert cli.main(arguments(name, target, tmp_path / "run", **options)) == 0
    result = json.loads((tmp_path / "run" / "adapt.json").read_text())
    assert result["from"] == name
    assert "k-NN changed by " in capsys.readouterr().out
    first, last = (
        torch.load(tmp_path / f"run/checkpoints/step-{step:09}.ckpt", weights_only=True)["student"]
        for step in (1, 4)
    )
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(first[f"backbone.{name}"], published[name])  # frozen for a quarter of the steps
    assert not torch.equal(last[f"backbone.{name}"], published[name])


def test_colors_stay_normalized_as_the_weights_want(source, target, tmp_path):
    """From run to file to run, and for timm; another mean with these weights is refused."""
    options = {**OPTIONS, "mean": "[0.5, 0.4, 0.3]", "max_steps": 2, "output": tmp_path / "run"}
    pretrain(configure_run(**options))
    file = tmp_path / "run" / "model.safetensors"
    for weights in (file, tmp_path / "run"):
        assert configure(str(weights), data=str(target)).mean == (0.5, 0.4, 0.3)
    with safetensors.safe_open(file, "pt") as opened:
        model = timm.create_model(**json.loads(opened.metadata()["create_model"]))
    assert timm.data.resolve_model_data_config(model)["mean"] == [0.5, 0.4, 0.3]
    other = configure(str(file), data=str(target), mean=[0.5, 0.5, 0.5], global_size=16)
    with pytest.raises(ValueError, match=r"mean: expected \[0.5, 0.4, 0.3\], with which .* was trained"):
        create_networks(other, CPU)


def test_images_without_labels_are_trained_on(source, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(70):
        Image.new("RGB", (20, 20), (3 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    assert cli.main(arguments(source, tmp_path / "images", tmp_path / "run", max_steps=2)) == 0
    assert "nothing could be measured" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "adapt.json").read_text())["after"] is None
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_directory_of_an_adaptation_from_elsewhere_is_refused(source, target, adapted, capsys):
    file = source / "model.safetensors"
    options = {"backbone_args": OPTIONS["backbone_args"]}
    assert cli.main(["adapt", "--quiet", *arguments(file, target, adapted, **options)[1:]]) == 2
    error = capsys.readouterr().err
    assert f"holds a run of another configuration (init_from was {source}, now {file}; " in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "kind, words",
    [
        (
            "nowhere/at-all",
            "weights: expected a run's directory, a .safetensors file or a timm model, got",
        ),
        ("resnet81", "did you mean resnet"),
        ("empty folder", "holds no finished run (there is no model.safetensors)"),
        ("unfinished run", "holds no finished run (there is no model.safetensors)"),
        ("garbage file", "cannot be read as safetensors"),
        ("unknown file", "does not name its backbone; give its timm name as backbone"),
    ],
)
def test_a_wrong_source_takes_one_line(source, target, tmp_path, capsys, kind, words):
    given = kind
    if " " in kind:
        given = tmp_path / "given"
        given.mkdir()
        if kind == "unfinished run":
            (given / "config.yaml").write_bytes((source / "config.yaml").read_bytes())
        elif kind.endswith("file"):
            given /= "a.safetensors"
            given.write_bytes(b"garbage" * 9)
        if kind == "unknown file":
            safetensors.torch.save_file({"weight": torch.zeros(2)}, given)
    assert cli.main(arguments(given, target, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith("bincomm: error: ")
    assert len(error.strip().splitlines()) == 1
    assert words in error
    assert not (tmp_path / "run").exists()


def test_weights_of_another_backbone_are_refused(source, target, tmp_path, capsys):
    assert cli.main(arguments(source, target, tmp_path / "run", backbone="resnet18", backbone_args="{}")) == 2
    assert f"backbone: expected resnetv2_18, as {source} says, got resnet18" in capsys.readouterr().err
    options = {"backbone_args": '{"layers": [2, 1]}'}
    assert cli.main(arguments(source, target, tmp_path / "run", **options)) == 2
    assert "holds weights of another backbone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    config = configure("resnet18.a1_in1k", data=str(target), backbone="resnet18")  # the same one
    assert config.backbone == "resnet18"


def test_what_torch_saved_is_named_with_the_way_out(target, tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "dino.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.ckpt")
    for name, words in (
        ("dino.pth", "written by torch.save"),
        ("old.pth", "to .safetensors"),
        ("x.ckpt", "run's"),
    ):
        assert cli.main(["adapt", f"--from={tmp_path / name}", f"--data={target}"]) == 2
        assert words in capsys.readouterr().err


def test_without_a_network_the_weights_of_timm_are_missed_at_once(tmp_path, monkeypatch, capfd):
    """After one attempt, and nothing is printed: huggingface_hub would make several, and report each."""
    attempts = []

    def refuse(*arguments, **options):
        attempts.append(arguments)
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("bincomm.weights.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="init_from: timm has no weights of test_vit here: they are not on"
    ) as e:
        read_weights("test_vit", "init_from")
    assert len(attempts) == 1
    assert "huggingface.co cannot be reached: Network is unreachable" in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_init_from_is_not_an_option(source, target, tmp_path, capsys):
    assert cli.main(arguments(source, target, tmp_path / "run", init_from="resnet18")) == 2
    assert "init_from: adapt sets it to its weights" in capsys.readouterr().err
