"""Encode, search and codes as commands, on a network that has hardly been trained."""

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from bincomm import cli
from bincomm.codes import encode as encode_module
from bincomm.codes.storage import open_parts, read_codes, write_part
from bincomm.configuration import configure
from bincomm.data.digits import digits
from bincomm.pretraining import pretrain

pytestmark = pytest.mark.slow

OPTIONS = {
    "recipe": "digits",
    "backbone": "test_vit",
    "backbone_args": '{"patch_size": 4, "depth": 1}',
    "global_size": 16,
    "local_size": 12,
    "bits": 16,
    "hidden": 32,
    "batch_size": 20,
    "max_steps": 2,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A few of the digits, in folders by class."""
    folder = tmp_path_factory.mktemp("images")
    for path in sorted((digits() / "train").glob("*/*.png"))[::18]:
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    options = {**OPTIONS, "data": images, "output": output}
    pretrain(configure(**options))
    return output


@pytest.fixture(scope="module")
def encoded(run, images, tmp_path_factory):
    output = tmp_path_factory.mktemp("encoded") / "codes"
    assert cli.main(["encode", str(run), f"--data={images}", f"--output={output}", "--index"]) == 0
    return output


def test_an_image_of_the_folder_is_found(encoded, images, tmp_path, capsys):
    query = sorted(images.glob("7/*.png"))[0]
    sheet = tmp_path / "sheet.png"
    assert cli.main(["search", str(encoded), f"--query={query}", "--k=80", f"--sheet={sheet}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    neighbors = [line.split() for line in lines[1:81]]
    distances = [int(distance) for distance, _, _ in neighbors]
    assert distances == sorted(distances)
    assert ["0", str(query), "(7)"] in neighbors  # among others with the same code
    Image.open(sheet).verify()
    assert (encoded / "index.faiss").exists()
    assert json.loads((encoded / "encode.json").read_text())["rows"] == 4096


def test_encoding_again_does_nothing_and_other_weights_are_refused(run, encoded, images, capsys):
    before = {path: path.stat().st_mtime_ns for path in encoded.glob("*.parquet")}
    assert cli.main(["encode", str(run), f"--data={images}", f"--output={encoded}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in encoded.glob("*.parquet")} == before
    assert "codes of 16 bits in 1 files" in capsys.readouterr().out
    assert cli.main(["encode", str(run), f"--data={images}", f"--output={encoded}", "--features"]) == 2
    assert "features" in capsys.readouterr().err


def test_searching_a_folder_that_is_not_finished_says_so(run, encoded, images, tmp_path, capsys):
    part, (codes, _) = open_parts(encoded)[0], read_codes(encoded)
    options = [f"--query={next(images.glob('7/*.png'))}", f"--sheet={tmp_path / 'sheet.png'}"]
    rows = [f"{number}.png" for number in range(len(codes))], [None] * len(codes), codes
    write_part(tmp_path / part.path.name, *rows, {**part.metadata, "rows": 30})
    assert cli.main(["search", str(tmp_path), *options]) == 0
    assert "note: 1 of 3 files exist" in "".join(capsys.readouterr())
    assert cli.main(["search", str(encoded), *options]) == 0
    assert "note" not in "".join(capsys.readouterr())
    other = tmp_path / "moved"
    other.mkdir()
    write_part(other / part.path.name, *rows, {**part.metadata, "weights": "runs/x"})
    assert cli.main(["search", str(other), *options]) == 2
    assert "were runs/x, which does not exist; give their present path" in capsys.readouterr().err
    assert cli.main(["search", str(other), *options, f"--weights={run}"]) == 0
    for sheet in (tmp_path / "none" / "sheet.png", tmp_path):
        assert cli.main(["search", str(encoded), options[0], f"--sheet={sheet}"]) == 2
        expected = f"sheet: expected a file in a folder that can be written, got {sheet}: "
        assert expected in capsys.readouterr().err


def test_searching_from_elsewhere_than_encoding(run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    assert cli.main(["encode", run.name, f"--data={images}", f"--output={tmp_path / 'codes'}"]) == 0
    monkeypatch.chdir(tmp_path)
    options = ["search", "codes", f"--query={next(images.glob('7/*.png'))}"]
    capsys.readouterr()
    assert cli.main(options) == 0
    outside = (tmp_path / "nearest.png").read_bytes()
    error = capsys.readouterr().err
    assert f"images lie outside {tmp_path}, so the picture has their paths only" in error
    assert f"--root {images}\n" in error
    assert cli.main([*options, f"--root={images}"]) == 0
    assert "outside" not in capsys.readouterr().err
    assert (tmp_path / "nearest.png").read_bytes() != outside
    assert cli.main([*options, "--root=none"]) == 2
    assert "root: expected a folder, got none" in capsys.readouterr().err


def test_incomplete_data_and_an_interruption_are_reported(run, images, tmp_path, monkeypatch, capsys):
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        tar.add(images, "images")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:30000])
    options = [f"--data={tmp_path}/cut.tar", f"--output={tmp_path}/codes"]
    assert cli.main(["encode", str(run), *options]) == 0
    assert "cut.tar is " in "".join(capsys.readouterr())

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_module, "write_part", interrupted)
    assert cli.main(["encode", str(run), f"--data={images}", f"--output={tmp_path}/other"]) == 130
    assert "run the same command again to write the files that are missing" in capsys.readouterr().err


def test_a_page_about_the_code(run, images, tmp_path, capsys):
    output, table = tmp_path / "page", tmp_path / "attributes.csv"
    paths = sorted(map(str, images.glob("*/*.png")))
    table.write_text("path,parity\n" + "".join(f"{path},{int(Path(path).parts[-2]) % 2}\n" for path in paths))
    options = [f"--data={images}", f"--output={output}", "--classes=3, 8", "--bits=2,5"]
    assert cli.main(["codes", str(run), *options, f"--other={run}", f"--attributes={table}"]) == 0
    assert "codes.html" in capsys.readouterr().out
    result = json.loads((output / "codes.json").read_text())
    assert result["class_difference"]["classes"] == ["3", "8"]
    assert [shown["bit"] for shown in result["shown"]["bits"]] == [2, 5]
    assert "parity" in result["attributes"]
    assert result["other"]["weights"] == str(run)
    assert "parity" in (output / "codes.html").read_text()


@pytest.mark.parametrize(
    "command, options, words",
    [
        ("encode", ["--data=digits", "--output=out"], "head"),
        ("codes", ["--data=digits", "--output=out"], "head"),
        ("codes", ["--data=nowhere", "--output=out"], "data: 'nowhere' does not exist"),
    ],
)
def test_an_error_is_one_line(run, tmp_path, monkeypatch, capsys, command, options, words):
    monkeypatch.chdir(tmp_path)
    weights = run if "nowhere" in str(options) else run / "model.safetensors"
    assert cli.main([command, str(weights), *options]) == 2
    *before, error = capsys.readouterr().err.strip().splitlines()
    assert words in error
    assert all(line.startswith("the images are those of all parts") for line in before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, words", [(["--classes=3"], "two names"), (["--bits=a"], "integers")])
def test_options_that_cannot_be_read(run, capsys, options, words):
    with pytest.raises(SystemExit):
        cli.main(["codes", str(run), "--data=digits", "--output=out", *options])
    assert words in capsys.readouterr().err


def test_a_folder_without_codes(tmp_path, capsys):
    assert cli.main(["search", str(tmp_path), "--query=none.png"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


DAMAGES = [{"rows": 0}, {"rows": "x"}, {"images": -1}, {"bits": True}, {"features": [1]}, {"weights": 3}]


@pytest.mark.parametrize("damage", [*DAMAGES, {"weights": ["a"]}])
def test_metadata_of_codes_that_make_no_sense_are_told(damage, encoded, images, tmp_path, capsys):
    part, (codes, _) = open_parts(encoded)[0], read_codes(encoded)
    names = [f"{number}.png" for number in range(len(codes))]
    metadata = {**part.metadata, "features": None, **damage}
    write_part(tmp_path / part.path.name, names, [None] * len(codes), codes, metadata)
    query = next(images.glob("7/*.png"))
    assert cli.main(["search", str(tmp_path), f"--query={query}", f"--sheet={tmp_path}/sheet.png"]) == 2
    error = capsys.readouterr().err
    assert "expected a file of codes" in error or "weights: those of the codes" in error
    assert len(error.splitlines()) == 1


def test_a_search_prints_no_more_than_it_shows(encoded, images, tmp_path, capsys):
    part, (codes, _) = open_parts(encoded)[0], read_codes(encoded)
    codes = codes[[0] * 300]
    names = [f"{number}\n.png" for number in range(300)]
    metadata = {**part.metadata, "images": 300}
    write_part(tmp_path / part.path.name, names, [None] * 300, codes, metadata)
    query = next(images.glob("7/*.png"))
    options = [f"--query={query}", "--k=300", f"--sheet={tmp_path}/sheet.png", "--quiet"]
    assert cli.main(["search", str(tmp_path), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 139 + 2
    assert lines[-2] == "and 161 more, which bincomm.api.search returns"
