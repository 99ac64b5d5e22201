import json

import pytest
import torch

pytest.importorskip("jsonargparse", reason="the command line needs jsonargparse")
import yaml
from PIL import Image

from bincomm.config import PretrainConfig, choose_recipe, parse, recipe_names


def test_recipe_and_options():
    config, name = parse(
        ["--recipe", "digits", "--epochs", "7", "--jitter", "[0.1, 0, 0, 0]", "--max_steps", "3"]
    )
    assert name == "digits"
    assert (config.data, config.epochs, config.max_steps) == ("digits", 7, 3)
    assert config.jitter == (0.1, 0, 0, 0)
    assert config.output == "runs/digits"
    assert isinstance(config.crops.global_scale, tuple)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_round_trips(name):
    config, _ = parse(["--recipe", name, "--data", "digits"])
    again = PretrainConfig(**config.as_dict())
    assert again.differences(config.as_dict()) == {}


def test_a_file_is_a_recipe_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\nbackbone: resnet18\n")
    config, name = parse(["--recipe", str(tmp_path / "mine.yaml"), "--bits", "32"])
    assert (name, config.epochs, config.backbone, config.bits) == ("mine", 3, "resnet18", 32)
    assert config.output == "runs/mine"


def test_without_a_recipe_the_images_decide(tmp_path):
    assert choose_recipe("digits") == "digits"
    full_size = "vit_small_in1k" if torch.cuda.is_available() else "resnet18_cpu"
    for size, expected in ((32, "small_images"), (300, full_size)):
        folder = tmp_path / str(size)
        folder.mkdir()
        Image.new("RGB", (size, size)).save(folder / "1.png")
        assert choose_recipe(str(folder)) == expected


def test_a_recipe_names_its_output(tmp_path):
    (tmp_path / "config.yaml").write_text("output: runs/x\n")
    recipe = ["--recipe", str(tmp_path / "config.yaml")]
    assert parse(recipe)[0].output == "runs/x"
    assert parse([*recipe, "--output", "runs/y"])[0].output == "runs/y"


@pytest.mark.parametrize(("text", "words"), [("epoch: 3\n", "epoch.*did you mean --epochs"), ("", "empty")])
def test_what_is_wrong_in_a_recipe_is_named(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        parse(["--recipe", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "digit"], "recipe: .*'digit'; did you mean digits"),
        (["--recipe", "none.yaml"], "recipe: there is no file none.yaml"),
        (["--epoch", "3"], "did you mean --epochs"),
        (["--batchsize=3"], "did you mean --batch_size"),
        (["--epochs", "many"], "epochs.*many"),
        (["--precision", "fp8"], "precision.*fp8"),
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--momentum", "1.5"], "momentum: .*1.5"),
        (["--global_scale", "[0, 1]"], "global_scale"),
        (["--eps_squared", "0"], "eps_squared"),
        (["--max_steps", "0"], "max_steps"),
        (["--seed", "-1"], "seed: expected from 0 .*-1"),
        (["--data", '{"digits": null}'], "data: expected one source or a mapping"),
        (["--data", "{'digits': 1}"], "data: expected one source or a mapping"),
        (["--output="], "output: expected a path, got an empty string"),
        (["--init_from="], "init_from: expected a path, got an empty string"),
        (["--beta", "1e400"], "beta: expected a finite number, got inf"),
        (["--std", "[0.2, 0, 0.2]"], "std: expected three numbers > 0"),
        (["--cuda_graph=true", "--checkpoint_activations=true"], "cuda_graph: expected false with"),
        (["--max_unusable", "1.5"], "max_unusable: expected a share from 0 to 1, got 1.5"),
    ],
)
def test_what_is_wrong_is_named(arguments, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        parse(["--data", "digits", *arguments])


def test_a_mix_of_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "1.png")
    data = {str(tmp_path / "a"): 3, str(tmp_path / "b"): 0.5}
    config, recipe = parse(["--data", json.dumps(data)])
    assert recipe == "small_images"
    assert config.data == data
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(config.as_dict()))
    again, _ = parse(["--recipe", str(recipe)])
    assert again.differences(config.as_dict()) == {}
    other, _ = parse(["--recipe", str(recipe), "--data", json.dumps({**data, str(tmp_path / "b"): 1})])
    assert set(other.differences(config.as_dict())) == {"data"}


def test_a_recipe_without_data(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: null\n")
    with pytest.raises(ValueError, match="data"):
        parse(["--recipe", str(recipe)])
    with pytest.raises(ValueError, match="data: expected a source of images, got {}"):
        PretrainConfig(data={})


def test_a_folder_of_any_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    for name in ("a: 3", "{0..1}", "~x", "[1]", "null", "7"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "1.png")
        for recipe in ([], ["--recipe", "small_images"]):
            assert parse(["--data", name, *recipe])[0].data == name


def test_differences_leave_out_what_changes_nothing():
    config = PretrainConfig()
    other = {**config.as_dict(), "threads": 99, "output": "elsewhere", "save_every": 7, "beta": 0.7}
    assert config.differences(other) == {"beta": (0.7, 0.1)}
    older = config.as_dict()
    del older["mean"]  # a key that came later had its default
    assert config.differences(older) == {}
    assert PretrainConfig(mean=(0, 0, 0)).differences(older).keys() == {"mean"}
    assert PretrainConfig(data="images/").differences(PretrainConfig(data="./images").as_dict()) == {}
