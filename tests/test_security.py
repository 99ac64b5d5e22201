"""Files from someone else name no code that runs, no address that is fetched, no path that is written."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from bincomm.adaptation import configure as configure_adaptation
from bincomm.backbone_arguments import ARCHITECTURE
from bincomm.cli import main
from bincomm.configuration import configure
from bincomm.data.images import UnusableImageError, open_encoded, read_file
from bincomm.data.shards import existing_shards
from bincomm.data.sources import open_source
from bincomm.engine.checkpoints import load_checkpoint, save_checkpoint
from bincomm.evaluation.pretrained import load_pretrained
from bincomm.files import read_yaml
from bincomm.networks import create_backbone
from bincomm.weights import load_weights, read_metadata

ROOT = Path(__file__).parent.parent


def call(marker):
    """A mapping that a configuration library may take for a call, which would leave a file."""
    return {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}}


# What timm.create_model would fetch, read or write, and what it would be given of other kinds.
ACTING = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1:9/x.safetensors"},
    "pretrained_cfg_overlay": {"file": "/etc/passwd"},
    "checkpoint_path": "weights.pth",
    "cache_dir": "elsewhere",
    "pretrained_strict": False,
    "pretrained_model_args": {},
    "features_only": True,
    "feature_cls": "fx",
    "kwargs_filter": ["x"],
    "cfg": "x",
    "device": "cuda",
    "depth": {"a": 1},
    "layers": [[[[[[1]]]]]],
    "act_layer": "a/../b",
    "norm_layer": "hf-hub:someone/model",
    "embed_dim": 10**9,
    "mlp_ratio": float("inf"),
}


@pytest.fixture
def no_network(monkeypatch):
    connected = []

    def refuse(socket, address):
        connected.append(address)
        raise AssertionError("something connects to an address")

    monkeypatch.setattr("socket.socket.connect", refuse)
    yield
    assert not connected  # by what takes the error for that of a network, either


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ACTING)
def test_arguments_of_a_backbone_describe_it_and_nothing_else(name):
    with pytest.raises(ValueError, match=f"backbone_args: .*{name}"):
        create_backbone("test_resnet", 32, **{name: ACTING[name]})
    with pytest.raises(ValueError, match=f"backbone_args: .*{name}"):
        configure("digits", backbone_args={name: ACTING[name]})


def test_no_argument_that_is_taken_belongs_to_fetching():
    for name in ARCHITECTURE:
        assert not any(word in name for word in ("pretrained", "path", "file", "url", "cache", "cfg")) or (
            name.startswith("drop_path") or name == "transformer_drop_path"
        )


@pytest.mark.parametrize(
    "name",
    ["hf-hub:a/b", "hf_hub:a/b", "local-dir:/tmp/x", "resnet18.hf-hub:a/b", "resnet18.a:b", "../x", ""],
)
def test_names_of_models_are_no_addresses(name):
    with pytest.raises(ValueError, match="backbone: expected the name of a timm model"):
        create_backbone(name, 32)
    with pytest.raises(ValueError, match="init_from: expected a run's directory"):
        load_weights(torch.nn.Linear(1, 1), name or "none", "init_from")


@pytest.mark.parametrize("place", ["recipe", "option", "python"])
def test_a_mapping_is_no_call(place, tmp_path):
    marker = tmp_path / "it-ran"
    values = {"backbone_args": {"x": call(marker)}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    if place == "python":
        with pytest.raises(ValueError, match="backbone_args: .*'x'"):
            configure("digits", **values)
        for key in ("data", "backbone", "jitter", "beta", "epochs", "init_from"):
            with pytest.raises(ValueError, match=key):
                configure("digits", **{key: call(marker)})
    else:
        option = f"--backbone_args={json.dumps(values['backbone_args'])}"
        arguments = ["--recipe", str(tmp_path / "mine.yaml")] if place == "recipe" else [option]
        assert main(["pretrain", "--output", str(tmp_path / "run"), *arguments]) == 2
        assert not (tmp_path / "run").exists()
    assert not marker.exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file as bincomm writes it, and its metadata."""
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    network, arguments = create_backbone("test_resnet", 32)
    safetensors.torch.save_file(network.state_dict(), path, metadata={"create_model": json.dumps(arguments)})
    return path, arguments


def with_metadata(exported, path, text):
    safetensors.torch.save_file(safetensors.torch.load_file(exported), path, metadata={"create_model": text})
    return path


@pytest.mark.parametrize("name", ["pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir", "depth"])
def test_metadata_of_weights_does_not_choose_what_timm_does(name, exported, tmp_path):
    file, arguments = exported
    text = json.dumps({**arguments, name: ACTING[name]})
    path = with_metadata(file, tmp_path / "x.safetensors", text)
    before = sorted(tmp_path.iterdir())
    for load in (lambda: load_pretrained(path, "cpu"), lambda: read_metadata(str(path))):
        with pytest.raises(ValueError, match=f"{path}.*{name}"):
            load()
    assert main(["evaluate", str(path), "--data", "digits"]) == 2
    assert main(["adapt", "--from", str(path), "--data", "digits", "--output", "adapted"]) == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", "{}", '{"model_name": 3}', '{"model_name": "hf-hub:a/b"}', "[" * 100000,
        '{"model_name": "test_resnet", "pretrained_cfg_overlay": 3}',
        '{"model_name": "test_resnet", "pretrained_cfg_overlay": {"mean": [1]}}',
        '{"model_name": "test_resnet", "pretrained_cfg_overlay": {"mean": "abc", "std": 1}}',
        '{"model_name": "test_resnet", "pretrained_cfg_overlay": {"input_size": [], "crop_pct": 1}}',
        '{"model_name": "test_resnet", "pretrained_cfg_overlay": {"input_size": [3, 32, 32]}}',
    ],
)  # fmt: skip
def test_damaged_metadata_is_told(text, exported, tmp_path):
    path = with_metadata(exported[0], tmp_path / "x.safetensors", text)
    with pytest.raises(ValueError, match=f"weights: the metadata of {path} is not what bincomm writes"):
        load_pretrained(path, "cpu")


def test_good_metadata_is_taken(exported):
    file, arguments = exported
    overlay = {"mean": [0, 0.5, 1], "std": [1, 1, 1], "input_size": [3, 48, 48], "crop_pct": 0.9}
    path = with_metadata(
        file, "x.safetensors", json.dumps({**arguments, "layers": [1, 1], "pretrained_cfg_overlay": overlay})
    )
    assert read_metadata(path) == {
        "backbone": "test_resnet", "backbone_args": {"layers": [1, 1]}, "mean": [0, 0.5, 1],
        "std": [1, 1, 1], "global_size": 48, "eval_crop": 0.9, "channels": 3,
    }  # fmt: skip


def test_a_checkpoint_does_not_choose_what_timm_does(tmp_path):
    marker = tmp_path / "it-ran"
    for arguments in ({"checkpoint_path": "x.pth"}, {"depth": call(marker)}):
        config = configure("digits", backbone="test_resnet", backbone_args={}).as_dict()
        config["backbone_args"] = arguments
        save_checkpoint(tmp_path / "x.ckpt", {"config": config, "teacher": {}})
        assert load_checkpoint(tmp_path / "x.ckpt")["config"]["backbone_args"] == arguments
        with pytest.raises(ValueError, match="backbone_args"):
            load_pretrained(tmp_path / "x.ckpt", "cpu")
    assert not marker.exists()


# Nine lists, each of nine times the one before.
PAIRS = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a [x]\n" + "".join(f"{new}: &{new} [{9 * f'*{old}, '}]\n" for old, new in PAIRS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [1, 1]\nb: *a\n", "aliases"),
        (BOMB, "aliases"),
        ("a: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
        ("a: !!python/object/apply:os.system ['touch it-ran']", "could not determine a constructor"),
        ("# " + "x" * 2**20, "larger than a megabyte"),
    ],
)  # fmt: skip
def test_recipes_are_plain_and_small(text, words, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_yaml(tmp_path / "x.yaml")
    assert main(["pretrain", "--recipe", "x.yaml"]) == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "x.yaml").rename(tmp_path / "run/config.yaml")
    assert main(["evaluate", "run", "--data", "digits"]) == 2
    assert not (tmp_path / "it-ran").exists()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def picture(format):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("format", ["EPS", "PCX", "ICO", "PDF", "SGI"])
def test_other_formats_are_not_opened_and_are_named(format, monkeypatch):
    data = EPS if format == "EPS" else picture(format)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # would be an error of another kind
    with pytest.raises(UnusableImageError, match=rf"format {format}; those decoded|not an image"):
        open_encoded(data)


@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000"])
def test_the_formats_of_the_documentation_are_opened(format):
    assert open_encoded(picture(format)).size == (8, 8)


def test_every_image_is_opened_in_one_place():
    places = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "bincomm").rglob("*.py")
        if "Image.open(" in path.read_text()
    ]
    assert places == ["bincomm/data/images.py"]


def test_children_do_not_import_from_the_working_directory(tmp_path):
    """A data set brings modules of the names that reading a shard imports, and is the working directory."""
    for module in ("tarfile", "numpy", "hashlib", "bincomm", "sitecustomize", "usercustomize"):
        (tmp_path / f"{module}.py").write_text("open('it-ran', 'w')\nraise SystemExit(3)\n")
    for number in range(5):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            data = picture("PNG")
            member = tarfile.TarInfo("a.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "from bincomm.data.shards import open_shards\n"
        "sys.path.insert(0, '')\n"
        "def fail(*arguments): raise AssertionError('no index was built by a child')\n"
        "import bincomm.data.shards as shards; shards._read_tar = fail\n"
        "print(len(open_shards([f'{number}.tar' for number in range(5)])[0]))\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert result.stdout == "5\n", result.stderr
    assert not (tmp_path / "it-ran").exists()


# Addresses in files of others


ADDRESSES = ("https://127.0.0.1:9/x-{0..3}.tar", "s3://bucket/x.tar", "hf://datasets/user/name")


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_address_in_a_configuration_is_fetched(address, exported, tmp_path, capsys):
    config = configure("digits", backbone="test_resnet", backbone_args={}).as_dict()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({**config, "data": address}))
    (tmp_path / "run/model.safetensors").write_bytes(exported[0].read_bytes())
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({**config, "data": {address: 1, "digits": 1}}))
    for recipe in ("run/config.yaml", "mix.yaml"):
        for command in ("pretrain", "data look", "compare"):
            output = [] if command == "data look" else ["--output", "new"]
            assert main([*command.split(), "--recipe", recipe, *output]) == 2
            error = capsys.readouterr().err
            assert f"names an address, {address}, and what a file names is not fetched" in error
        with pytest.raises(ValueError, match="what a file names is not fetched"):
            configure_adaptation("run", recipe)
        assert not (tmp_path / "new").exists()
    # What reads a run does not take the data from there.
    assert configure_adaptation("run").data == "digits"
    assert main(["evaluate", "run"]) == 2
    assert "expected at least one of data" in capsys.readouterr().err


def test_no_weights_that_a_configuration_names_are_fetched(tmp_path, capsys):
    """As a teacher; with the name typed as well, they would be."""
    config = configure("digits", backbone="test_resnet", backbone_args={}).as_dict()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({**config, "teacher": ["resnet18.a1_in1k"]}))
    for command in (["pretrain"], ["messages", "run", "--output", "new"], ["adapt", "--from", "resnet18"]):
        assert main([*command, "--recipe", "run/config.yaml", "--data", "digits"]) == 2
        error = capsys.readouterr().err
        if command[0] != "messages":  # which replaces it by the weights that are typed
            assert "teacher: recipe run/config.yaml names resnet18.a1_in1k, which is no file" in error
    typed = configure("run/config.yaml", teacher="resnet18.a1_in1k")
    assert typed.teacher == ("resnet18.a1_in1k",)
    assert configure("run/config.yaml", messages="run").teacher == ()


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_address_in_a_list_or_in_codes_is_fetched(address, tmp_path):
    (tmp_path / "list.txt").write_text(f"{address}/a.png\n")
    with pytest.raises(ValueError, match="lists files that do not exist"):
        open_source("list.txt")
    with pytest.raises(ValueError, match="lists files that do not exist|do not lie in"):
        open_source("list.txt@/")
    with pytest.raises(ValueError, match="there is no shard"):
        existing_shards([address])
    with pytest.raises(OSError):
        read_file(f"{address}/a.png")


def test_shards_name_nothing_that_is_fetched(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("https://127.0.0.1:9/a.png")
        member.type, member.linkname = tarfile.SYMTYPE, "https://127.0.0.1:9/b.png"
        tar.addfile(member)
    assert len(open_source("x.tar").images.read(0)) == 0


TITLE = "\x1b]0;title\x07"  # sets the title of a terminal's window


def test_names_are_shown_and_do_not_act(tmp_path, capfd):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture("PNG"))
    (folder / f"{TITLE}x\nforged line.png").write_bytes(b"no image")
    assert main(["data", "shard", "--data", str(folder), "--output", "shards"]) == 0
    assert main(["data", "look", "--data", str(folder), "--images", "4", "--max_unusable", "1"]) == 0
    assert main(["pretrain", "--data", f"{TITLE}"]) == 2
    output, errors = capfd.readouterr()
    shown = output + errors
    assert "\\x1b]0;title\\x07x\\nforged line.png" in output
    assert "\x1b]0" not in shown
    assert "\x07" not in shown
    assert not any(line.startswith("forged") for line in shown.splitlines())


def test_errors_are_one_line_whatever_names_they_have(capsys):
    for arguments in (
        ["data", "verify", "--data=none\nforged: all is well"],
        ["search", "none\nforged: all is well", "--query=x"],
        ["evaluate", "none\nforged: all is well", "--data=digits"],
    ):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
