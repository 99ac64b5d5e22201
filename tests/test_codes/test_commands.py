"""Encode, search and codes as commands, on a network that has hardly been trained."""

import json

import pytest

for package in ("timm", "nvidia.dali", "jsonargparse", "sklearn", "safetensors", "pyarrow", "faiss"):
    pytest.importorskip(package, reason="codes need the packages of bincomm[eval]")
from PIL import Image  # noqa: E402

from bincomm import cli  # noqa: E402
from bincomm.config import parse  # noqa: E402
from bincomm.data.sources import digits  # noqa: E402
from bincomm.pretrain import pretrain  # noqa: E402

OPTIONS = {
    "recipe": "digits",
    "backbone": "test_vit",
    "backbone_args": '{"patch_size": 4, "depth": 1}',
    "global_size": 16,
    "local_size": 12,
    "bits": 16,
    "hidden": 32,
    "max_steps": 4,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    pretrain(parse([*(f"--{key}={value}" for key, value in OPTIONS.items()), f"--output={output}"])[0])
    return output


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Some of the digits, in folders by class."""
    folder = tmp_path_factory.mktemp("images")
    for path in sorted((digits() / "train").glob("*/*.png"))[::12]:
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def encoded(run, images, tmp_path_factory):
    output = tmp_path_factory.mktemp("encoded") / "codes"
    assert cli.main(["encode", str(run), f"--data={images}", f"--output={output}", "--index"]) == 0
    return output


def test_an_image_of_the_folder_is_found(encoded, images, tmp_path, capsys):
    query = sorted(images.glob("7/*.png"))[0]
    sheet = tmp_path / "sheet.png"
    assert cli.main(["search", str(encoded), f"--query={query}", "--k=120", f"--sheet={sheet}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split() for line in lines[1:121]]
    distances = [int(distance) for distance, _, _ in found]
    assert distances == sorted(distances)
    assert ["0", str(query), "(7)"] in found  # among those that have its code, too
    Image.open(sheet).verify()
    assert (encoded / "index.faiss").exists()


def test_encoding_again_does_nothing_and_other_weights_are_refused(run, encoded, images, capsys):
    before = {path: path.stat().st_mtime_ns for path in encoded.glob("*.parquet")}
    assert cli.main(["encode", str(run), f"--data={images}", f"--output={encoded}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in encoded.glob("*.parquet")} == before
    assert "codes of 16 bits in 1 files" in capsys.readouterr().out
    assert cli.main(["encode", str(run), f"--data={images}", f"--output={encoded}", "--features"]) == 2
    assert "features" in capsys.readouterr().err


def test_a_page_about_the_code(run, images, tmp_path, capsys):
    output = tmp_path / "page"
    options = [f"--data={images}", f"--output={output}", "--classes=3,8", "--bits=2,5"]
    assert cli.main(["codes", str(run), *options, f"--other={run}"]) == 0
    assert "codes.html" in capsys.readouterr().out
    assert json.loads((output / "codes.json").read_text())
    assert "<html" in (output / "codes.html").read_text()


@pytest.mark.parametrize(
    "command, options, words",
    [
        ("encode", ["--data=digits", "--output=out"], "head"),
        ("codes", ["--data=digits", "--output=out"], "head"),
        ("codes", ["--data=nowhere", "--output=out"], "data: 'nowhere' does not exist"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(run, tmp_path, monkeypatch, capsys, command, options, words):
    monkeypatch.chdir(tmp_path)
    weights = run if "nowhere" in str(options) else run / "backbone.safetensors"
    assert cli.main([command, str(weights), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, words", [(["--classes=3"], "two names"), (["--bits=a"], "whole numbers")])
def test_options_that_cannot_be_read_are_told(run, capsys, options, words):
    with pytest.raises(SystemExit):
        cli.main(["codes", str(run), "--data=digits", "--output=out", *options])
    assert words in capsys.readouterr().err


def test_a_folder_without_codes_is_told(tmp_path, capsys):
    assert cli.main(["search", str(tmp_path), "--query=none.png"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
