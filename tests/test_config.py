import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from bincomm.config import PretrainConfig, located
from bincomm.configuration import configure, configure_comparison
from bincomm.data.crops import Crops
from bincomm.engine.run import note_config, precision_of
from bincomm.parsing import add_keys, add_recipe, key_parser, parse_options
from bincomm.recipes import choose_recipe, recipe_names


def parse(arguments):
    """The configuration of a command line of `bincomm pretrain`, and the name of its recipe."""
    parser = key_parser()
    add_recipe(parser)
    add_keys(parser)
    options = parse_options(parser, arguments)
    return configure(options.recipe, **options.keys), Path(options.recipe).stem


def test_a_method_brings_its_own_keys(tmp_path):
    """Before those of a recipe for another method, behind those given and those of a recipe for it."""
    keys = ("clip", "min_lr", "reset_every", "freeze_last_layer")

    def of(recipe, **options):
        config = configure(str(recipe), **options)
        return tuple(getattr(config, key) for key in keys)

    assert of("vit_base_in1k") == (1.0, 5e-5, 10, 0)
    assert of("vit_base_in1k", method="bits") == (1.0, 5e-5, 10, 0)
    assert of("vit_base_in1k", method="simdino") == (3.0, 1e-6, 0, 0)
    assert of("digits", method="dino") == (3.0, 1e-6, 0, 1)
    assert of("digits", method="dino", clip=0.5, reset_every=3) == (0.5, 1e-6, 3, 1)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: dino\nclip: 2.0\n")
    assert of(recipe) == (2.0, 1e-6, 0, 1)
    assert of(recipe, method="bits") == (1.0, 5e-5, "auto", 0)


@pytest.mark.parametrize(
    ("features", "gpu", "device", "precision"),
    [
        ({"avx512_bf16": True}, False, "auto", "bf16"),
        ({"amx_bf16": True, "avx512_bf16": False}, True, "cpu", "bf16"),
        ({"avx2": True, "avx512_bf16": False}, False, "auto", "fp32"),
        ({}, True, "cpu", "fp32"),
        ({}, True, "auto", "bf16"),
        ({}, True, "cuda", "bf16"),
    ],
)
def test_the_precision_is_that_of_the_device_and_is_kept(
    monkeypatch, tmp_path, features, gpu, device, precision
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = configure("small_images_cpu", device=device)
    assert config.precision == precision
    assert configure("digits", device=device).precision == "fp32"  # its figures are those of every machine
    # On another machine.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": precision == "fp32"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert PretrainConfig(**config.as_dict()).precision == precision
    other, given = (
        configure("small_images_cpu", device="cpu", **keys) for keys in ({}, {"precision": "bf16"})
    )
    assert other.precision != precision
    assert precision_of(tmp_path, other) == other.precision
    (tmp_path / "result.json").write_text("{}")
    note_config(tmp_path, config)
    assert precision_of(tmp_path, other) == precision
    assert precision_of(tmp_path, given) == "bf16"


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
    gpu = torch.cuda.is_available()
    recipes = ("small_images", "vit_small_in1k") if gpu else ("small_images_cpu", "photos_cpu")
    for size, expected in zip((32, 300), recipes, strict=True):
        folder = tmp_path / str(size)
        folder.mkdir()
        Image.new("RGB", (size, size)).save(folder / "1.png")
        assert choose_recipe(str(folder)) == expected


@pytest.mark.parametrize(
    ("keys", "output"),
    [
        ({}, "runs/digits"),
        ({"data": "digits"}, "runs/digits"),
        ({"data": "cifar10"}, "runs/cifar10-digits"),
        ({"data": "~/my pictures/"}, "runs/my_pictures-digits"),
        ({"data": "/x/train-{000..127}.tar"}, "runs/train-digits"),
        ({"data": "/x/train-*.parquet"}, "runs/train-digits"),
        ({"data": "list.txt"}, "runs/list-digits"),
        ({"data": {"a/photos": 3, "cifar10": 1}}, "runs/photos-cifar10-digits"),
    ],
)
def test_a_run_is_named_after_its_data_and_recipe(keys, output):
    assert configure("digits", **keys).output == output
    assert configure_comparison("digits", **keys).output == output.replace("runs/", "runs/compare-")


def test_a_recipe_names_its_output(tmp_path):
    (tmp_path / "config.yaml").write_text("output: runs/x\n")
    recipe = ["--recipe", str(tmp_path / "config.yaml")]
    assert parse(recipe)[0].output == "runs/x"
    assert parse([*recipe, "--output", "runs/y"])[0].output == "runs/y"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3\n", "mine.yaml: there is no key 'epoch'; did you mean epochs"),
        ("epochs: many\n", "mine.yaml: epochs: expected an integer, got many"),
        ("", "empty"),
        ("[epochs, 3]", "expected keys and values"),
        ("epochs: [3\n", "is no YAML file"),
        ("- \x80", "is no YAML file"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"(?s){words}"):
        parse(["--recipe", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "digit"], "recipe: .*'digit'; did you mean digits"),
        (["--recipe", "none.yaml"], "recipe: there is no file none.yaml"),
        (["--epoch", "3"], "did you mean --epochs"),
        (["--batchsize=3"], "did you mean --batch_size"),
        (["--epochs", "many"], "epochs: expected an integer, got many; for example --epochs=100"),
        (
            ["--max_steps", "many"],
            "max_steps: expected an integer or null, got many; .* --max_steps=1000",
        ),
        (["--beta", "much"], "beta: expected a number or auto, got much; for example --beta=auto"),
        (["--warmup_epochs", "[1]"], "warmup_epochs: expected an integer or auto, got .1.; .*=auto"),
        (
            ["--local_scale", "0.05", "0.4"],
            r"local_scale: expected 2 numbers, got 0.05; .* --local_scale='\[0",
        ),
        (["--precision", "fp8"], "precision: expected one of auto, bf16, fp32, got fp8"),
        (
            ["--jitter", "[0.1, 0]"],
            r"jitter: expected 4 numbers, got \[0.1, 0\]; .* --jitter='\[0.4, 0.4, 0.2",
        ),
        (["--cuda_graph", "maybe"], "cuda_graph: expected true or false, got maybe"),
        (["--backbone_args", "3"], 'backbone_args: expected a mapping, got 3; .*{"layers"'),
        (["--backbone_args.layers=[1]"], "backbone_args: expected all of it, got a part"),
        (["stray"], "unexpected 'stray'; lists are written as in"),
        (["--epochs", "0"], "epochs: expected from 1 to 1000000000, got 0"),
        (["--momentum", "1.5"], "momentum: .*1.5"),
        (["--global_scale", "[0, 1]"], "global_scale"),
        (["--eps_squared", "0"], "eps_squared"),
        (["--max_steps", "0"], "max_steps"),
        (["--seed", "-1"], "seed: expected from 0 .*-1"),
        (["--data", '{"digits": null}'], "data: expected one source or a mapping"),
        (["--data", "{'digits': 1}"], "data: expected one source or a mapping"),
        (["--output="], "output: expected a path, got an empty string"),
        (["--init_from="], "init_from: expected a path, got an empty string"),
        (["--beta", "1e400"], "beta: expected from 0 to 1000000, got inf"),
        (["--std", "[0.2, 0, 0.2]"], "std: expected from 1e-06 to 1000, got"),
        (["--cuda_graph=true", "--checkpoint_activations=true"], "cuda_graph: expected false with"),
        (["--max_unusable", "1.5"], "max_unusable: expected from 0 to 1, got 1.5"),
    ],
)
def test_what_is_wrong_is_named(arguments, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        parse(["--data", "digits", *arguments])


def test_python_says_keys_as_the_command_line_does(tmp_path):
    config = configure("digits", epochs=7, jitter=[0.1, 0, 0, 0], lr=1, output=tmp_path / "run")
    options = [
        "--recipe=digits",
        "--epochs=7",
        "--jitter=[0.1, 0, 0, 0]",
        "--lr=1",
        f"--output={tmp_path}/run",
    ]
    assert config == parse(options)[0]
    assert config.jitter == (0.1, 0, 0, 0)
    assert configure().output == "runs/digits"
    assert configure(data=Path("digits")) == configure("digits")
    assert configure("small_images", data={"digits": 1}).data == {"digits": 1}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"epoch": 3}, "there is no key 'epoch'; did you mean epochs?"),
        ({"epochs": "many"}, "epochs: expected an integer, got many; for example epochs: 100"),
        ({"jitter": (1, 2)}, "jitter: expected 4 numbers, got [1, 2]"),
        ({"epochs": 0}, "epochs: expected from 1 to 1000000000, got 0"),
        ({"recipe": "digit"}, "did you mean digits?"),
    ],
)
def test_what_is_wrong_from_python_is_named(keys, words):
    with pytest.raises(ValueError) as error:
        configure(**keys)
    assert words in str(error.value)


def test_a_comparison_has_an_output_of_its_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("output: runs/x\nmethod: bits\n")
    assert configure_comparison(str(tmp_path / "mine.yaml")).output == "runs/compare-mine"
    assert configure_comparison("digits", output="runs/y").output == "runs/y"
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    config = configure_comparison(data=tmp_path)  # a path from Python, for which the images choose
    name = f"{tmp_path.name}-{choose_recipe(str(tmp_path))}"
    assert (config.data, config.output) == (str(tmp_path), f"runs/compare-{name}")
    with pytest.raises(ValueError, match="method: compare trains several methods"):
        configure_comparison("digits", method="dino")


def test_another_backbone_does_not_get_the_arguments_of_the_recipes():
    own = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "stem_chs": 32}
    assert configure("photos_cpu").backbone_args == own
    assert configure("photos_cpu", backbone="resnetv2_18").backbone_args == own
    assert configure("photos_cpu", backbone="resnet18").backbone_args == {}
    assert configure("photos_cpu", backbone="resnet18", backbone_args={"base_width": 32}).backbone_args


@pytest.mark.slow
def test_a_configuration_needs_no_parser():
    code = """
        import sys
        sys.modules.update(dict.fromkeys(("jsonargparse", "yaml", "numpy", "timm")))  # importing them fails
        from bincomm.config import PretrainConfig
        print(PretrainConfig(bits=32).crops.global_size)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.stdout == f"{Crops.global_size}\n", result.stderr


def test_defaults_of_the_crops_are_those_of_crops():
    assert PretrainConfig().crops == Crops()


def test_a_mix_of_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "1.png")
    data = {str(tmp_path / "a"): 3, str(tmp_path / "b"): 0.5}
    config, recipe = parse(["--data", json.dumps(data)])
    assert recipe == choose_recipe(data)
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
    assert config.differences(other) == {"beta": (0.7, "auto")}
    older = config.as_dict()
    del older["mean"]  # a key that came later had its default
    assert config.differences(older) == {}
    assert PretrainConfig(mean=(0, 0, 0)).differences(older).keys() == {"mean"}
    carried_out = {"log_every": 7, "device": "cpu", "channels_last": True}
    assert PretrainConfig(**carried_out).differences(config.as_dict()) == {}
    assert PretrainConfig(data="images/").differences(PretrainConfig(data="./images").as_dict()) == {}


def test_sources_mean_the_same_from_any_directory(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    images = str(tmp_path / "a/images")
    assert located("images") == located("~/a/images") == located(images) == images
    assert located("x-{00..07}.tar") == f"{tmp_path}/a/x-{{00..07}}.tar"
    assert located("x-{0..7}.parquet") == f"{tmp_path}/a/x-{{0..7}}.parquet"
    assert located({"images": 1, "cifar10": 2}) == {images: 1, "cifar10": 2}
    for name in ("digits", "cifar10", "resnet18.a1_in1k", None):
        assert located(name) == name
    stored = replace(configure("digits", data="images"), data=located("images")).as_dict()
    assert configure("digits", data="images").differences(stored) == {}
    assert configure("digits", data="../a/images").differences(stored) == {}
    monkeypatch.chdir(tmp_path / "b")
    assert configure("digits", data="images").differences(stored) == {"data": (images, "images")}
    assert configure("digits", data=images).differences(stored) == {}


def test_a_frozen_teacher_replaces_what_a_recipe_says_of_a_moving_one(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("beta: 0.1\nreset_every: 10\nmomentum: 0.9\nfewest_steps: 100\nminutes: 5\n")
    for given in ({"teacher": "runs/a"}, {"teacher": [Path("runs/a")]}):
        config = configure(str(recipe), **given)
        assert (config.teacher, config.beta, config.reset_every) == (("runs/a",), "auto", "auto")
        assert (config.momentum, config.fewest_steps, config.minutes) == ("auto", 100, 5)
    assert configure(str(recipe), messages="m", epochs=3).fewest_steps == 0
    with pytest.raises(ValueError, match="^minutes: expected none with messages, .* give --epochs"):
        configure(str(recipe), messages="m")
    with pytest.raises(ValueError, match="^low_resolution: expected 0 with messages, .*, got 0.5"):
        configure(str(recipe), messages="m", epochs=3, low_resolution=0.5)
    with pytest.raises(ValueError, match="^dense: expected 0 with teacher, which sends no bits of patches"):
        configure(str(recipe), teacher="a", dense=1)
    assert parse(["--recipe", "digits", "--teacher", "a", "~/b"])[0].teacher == ("a", str(Path.home() / "b"))
    # What is typed holds, and is refused where it means nothing.
    assert configure(str(recipe), teacher="a", beta=0.05).beta == 0.05
    for key, value, expected in (
        ("momentum", 0.99, "auto with teacher, which has no moving average"),
        ("reset_every", 5, "0 with teacher, whose code"),
        ("method", "dino", "bits with teacher"),
        ("agreement", "soft", "hard with teacher"),
        ("messages", "m", "none beside a teacher"),
    ):
        with pytest.raises(ValueError, match=f"^{key}: expected {expected}.*got {value}"):
            configure(str(recipe), teacher="a", **{key: value})
    with pytest.raises(ValueError, match="^teacher: expected a list of texts, got"):
        configure(str(recipe), teacher=[3])


def test_teachers_and_messages_mean_the_same_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, value in (("teacher", ("./a", "resnet18")), ("messages", "./a")):
        config = PretrainConfig(**{key: value})
        absolute = PretrainConfig(**{key: located(value)})
        assert config.differences(absolute.as_dict()) == {}
        assert str(tmp_path) in str(getattr(absolute, key))
        assert PretrainConfig().differences(config.as_dict()).keys() == {key}
