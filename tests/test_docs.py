"""The documentation holds: links lead somewhere, and every command and every block of Python runs.

A command is run by the rule of its first words in `RULES`, which says how it is made cheap; one without a
rule fails. Commands of bincomm run in this process, as the console script runs them, in a folder that holds
what the pages mention: `~/pictures`, `runs/digits`, `codes`, `cat.jpg` ...
"""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image
from torch.distributed.run import get_args_parser

import bincomm
from bincomm.data.addresses import check_address, is_address
from bincomm.evaluation.objects import evaluate_objects
from tests.pages import LANGUAGES, PAGES, ROOT, anchors, blocks, commands, inline_code, links
from tests.scenes import write_scenes
from tests.test_architecture import LAYERS

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS: dict[str, tuple[str, list[str]]] = {}  # each once: how it reads -> where, and its words
for _block in BLOCKS:
    if _block.language == "sh":
        for _words in commands(_block):
            COMMANDS.setdefault(" ".join(_words), (_block.where, _words))

WITH_PYTHON = [page for page in PAGES if any(b.page == page and b.language == "python" for b in BLOCKS)]

FOLDERS = ("pictures", "imagenet", "pacs128/photo", "pacs128/sketch", "cifar10-10000", "drawn")
RUNS = ("runs/digits", "runs/pictures", "runs/photo", "runs/cifar")

# Options that make a run short, whatever the command has, and small where the command does not have them.
SHORT = {"max_steps": 2, "batch_size": 8, "threads": 1, "hidden": 16}
SMALL = {
    "device": "cpu",
    "precision": "fp32",
    "bits": 16,
    "backbone": "test_vit",
    "backbone_args": '{"patch_size": 8, "depth": 1}',
    "global_size": 32,
    "local_size": 16,
    "local_crops": 1,
}
NAMED_BACKBONE = SMALL | {"local_size": 32}  # which stems and strides of large networks need
del NAMED_BACKBONE["backbone"], NAMED_BACKBONE["backbone_args"]

# Replacements in blocks of Python; each pattern must occur.
IN_PYTHON = {
    "HfApi().upload_folder(": "uploaded(",
    "epochs=3)": "epochs=3, **small)",
    'evaluate("runs/digits", data="digits")': 'evaluate("runs/digits", data="drawn")',
    'encode("photo.jpg")': 'encode(__import__("PIL.Image").Image.new("RGB", (40, 30)))',
}


# Links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading for #{anchor}"


def test_links_lead_from_the_first_page_to_every_other():
    targets = {(ROOT / link.partition("#")[0]).resolve() for link in links(PAGES[0])}
    assert targets >= set(PAGES[1:])


# The changelog also names what was removed.
@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "CHANGELOG"], ids=lambda page: page.name)
def test_files_and_targets_that_are_named_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for code in inline_code(page):
        if re.fullmatch(r"(bincomm|kernels|csrc|tests|benchmarks|docs|examples)/[\w./-]*", code):
            assert (ROOT / code).exists() or "NAME" in code, f"{page.name}: there is no {code}"
        if code.startswith("make "):
            assert code.split()[1] in targets, f"{page.name}: there is no target of {code}"
        if code.startswith("bincomm "):
            assert code.split()[1] in (*SUBCOMMANDS, "COMMAND"), f"{page.name}: there is no {code}"


def test_the_readme_is_one_page():
    assert len(PAGES[0].read_text().splitlines()) <= 200


def test_the_diagram_of_layers_is_the_one_that_imports_are_held_to():
    text = (ROOT / "docs/architecture.md").read_text()
    (diagram,) = re.findall(r"^## Layers\n.+?^```text\n(.+?)^```", text, flags=re.DOTALL | re.MULTILINE)
    # `LAYERS` lists the functions of `bincomm`, too; the diagram names modules.
    layers = [names - set(bincomm.__all__) for names in LAYERS.values()]
    assert [set(line.split(", ")) for line in diagram.splitlines()] == layers


def test_the_table_of_the_engine_names_each_of_its_files():
    text = (ROOT / "docs/architecture.md").read_text()
    (table,) = re.findall(r"^## The engine\n(.+?)^## ", text, flags=re.DOTALL | re.MULTILINE)
    files = [path.name for path in ROOT.glob("bincomm/engine/*.py") if path.name != "__init__.py"]
    assert sorted(re.findall(r"`(\w+\.py)`", table)) == sorted(files)


def test_every_block_has_a_language():
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block.where}: {block.language!r}"


def test_the_citation_is_complete():
    """The keys that version 1.2.0 of the format asks for."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"] == "https://arxiv.org/abs/2602.09764"
    for author in citation["authors"] + paper["authors"]:
        assert author.keys() in ({"name"}, {"family-names", "given-names"})
    assert str(citation["version"]) == importlib.metadata.version("bincomm")


# Commands


def test_every_command_has_a_rule():
    without = [f"{where}: {text}" for text, (where, words) in COMMANDS.items() if find_rule(words) is None]
    assert not without, "tests/test_docs.py has no rule for\n" + "\n".join(without)


@pytest.mark.slow
@pytest.mark.parametrize("text", COMMANDS, ids=[where for where, _ in COMMANDS.values()])
def test_commands_run(text, workspace):
    rule = find_rule(COMMANDS[text][1])
    assert rule is not None, f"{COMMANDS[text][0]}: tests/test_docs.py has no rule for {text}"
    rule(with_data_here([os.path.expanduser(word) for word in COMMANDS[text][1]]))


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_runs(page, workspace):
    """All blocks of a page one after another, as a reader would type them."""
    namespace: dict = {"__name__": "__page__", "small": python_options(), "uploaded": uploaded}
    for block in blocks(page):
        if block.language == "python":
            remove_output("pictures" if "bincomm.pretrain(" in block.text else None)
            if "bincomm.encode(" in block.text:
                shutil.rmtree("codes", ignore_errors=True)
            exec(compile("\n" * block.line + cheap_python(block.text), str(page), "exec"), namespace)


def test_patterns_to_replace_in_python_occur():
    text = "".join(block.text for block in BLOCKS if block.language == "python")
    assert all(pattern in text for pattern in IN_PYTHON)


def uploaded(repo_id: str, folder_path: str, allow_patterns: list[str]) -> None:
    """In place of an upload, a copy of the files, which must be a complete model."""
    import timm

    shutil.rmtree("uploaded", ignore_errors=True)
    Path("uploaded").mkdir()
    for name in allow_patterns:
        shutil.copy(Path(folder_path, name), "uploaded")
    timm.create_model("local-dir:uploaded", pretrained=True)
    bincomm.load_pretrained("uploaded", "cpu")


def cheap_python(text: str) -> str:
    for pattern, replacement in IN_PYTHON.items():
        text = text.replace(pattern, replacement)
    return text


def python_options() -> dict:
    """`SHORT` and `SMALL` as keyword arguments."""
    return {**SHORT, **SMALL, "backbone_args": json.loads(str(SMALL["backbone_args"]))}


def remove_output(name: str | None) -> None:
    if name is not None:
        shutil.rmtree(Path("runs", name), ignore_errors=True)


# How commands are run


def main(arguments: list[str]) -> None:
    """A command of bincomm, in this process; it must succeed."""
    from bincomm import cli

    try:
        status = cli.main(arguments)
    except SystemExit as end:  # of --help
        status = end.code
    assert status in (0, None), f"bincomm {' '.join(arguments)} ended with {status}"


def value_of(option: str, words: list[str]) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def replace(words: list[str], **values: str) -> list[str]:
    """Give options these values, those of the command left out."""
    words = list(words)
    for option, value in values.items():
        if f"--{option}" in words:
            at = words.index(f"--{option}")
            del words[at : at + 2]
        words += [f"--{option}", value]
    return words


def with_data_here(words: list[str]) -> list[str]:
    """A command with shards here in place of those of an address, which must be one that is taken."""
    data = value_of("--data", words)
    if data is None or not is_address(data):
        return words
    check_address(data)
    return replace(words, data="photos" if data.startswith("hf://") else "shards")


def small(words: list[str]) -> list[str]:
    """A command that trains, short and small, on drawn images in place of the 1 797 digits."""
    sizes = NAMED_BACKBONE if "--backbone" in words else SMALL
    words = replace(words, data="drawn") if value_of("--data", words) in (None, "digits") else words
    options = SHORT | {key: value for key, value in sizes.items() if f"--{key}" not in words}
    if "--minutes" in words:  # in place of max_steps; of so few, the fewest steps come, 20
        words = replace(words, minutes="0.001")
        del options["max_steps"]
    return [*words, *(f"--{key}={value}" for key, value in options.items())]


def remove_earlier(words: list[str]) -> list[str]:
    """Remove what an earlier command left in this command's output folder."""
    output = value_of("--output", words) or "runs/digits"
    if Path(output).is_dir():
        shutil.rmtree(output)
    return words


def train(words: list[str]) -> None:
    """`bincomm pretrain`, `adapt`: two steps of a tiny network on a few drawn images."""
    if tracker := value_of("--tracker", words):
        pytest.importorskip(tracker, reason=f"needs {tracker}: bincomm[trackers]")
    main(words if "--help" in words else small(remove_earlier(words)))


def compare(words: list[str]) -> None:
    """`bincomm compare`: three steps of each method, two an epoch, with a reset; one method in place of the
    four that are the default."""
    output = value_of("--output", words) or f"runs/compare-{value_of('--recipe', words) or 'digits'}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = [] if "--recipe" in words else ["--recipe=digits"]
    words = words if "--methods" in words else [*words, "--methods", "bits-reset"]
    words = replace(words, data="drawn", reset_every="1", prototypes="8", output=output)
    main([*small(words), *recipe, "--batch_size=16", "--max_steps=3"])


def on_drawn_images(words: list[str]) -> None:
    """`bincomm evaluate`, `codes`: drawn images in place of the 1 797 digits; objects by 64 patches an image
    in place of 3600."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluate_objects.__kwdefaults__, "size", 64)
        main(replace(words, data="drawn") if value_of("--data", words) == "digits" else words)


def encode(words: list[str]) -> None:
    main(remove_earlier(words))


def look(words: list[str]) -> None:
    main(words)
    Image.open(value_of("--sheet", words) or "look.png").verify()


def profile(words: list[str]) -> None:
    """`bincomm profile`: one step of a tiny network."""
    main([*small(words), "--steps=1"])


SUBCOMMANDS: dict[str, Callable[[list[str]], None]] = {
    "pretrain": train,
    "adapt": train,
    "messages": train,
    "compare": compare,
    "evaluate": on_drawn_images,
    "encode": encode,
    "search": main,
    "codes": on_drawn_images,
    "export": main,
    "profile": profile,
    "data": lambda words: {"look": look, "shard": encode}.get(words[1], main)(words),
    "doctor": main,
}


def torchrun(words: list[str]) -> None:
    """Two processes of this machine in place of more; two steps of a tiny network. Where several machines are
    meant, torchrun only reads its options, and the command runs in this process."""
    start = words.index("--no-python")
    options, command = words[:start], words[start + 1 :]
    assert command[0] == "bincomm"
    if "--nnodes" in options:
        get_args_parser().parse_args([*options[1:], "script"])
        train(command[1:])
        return
    options[options.index("--nproc-per-node") + 1] = "2"
    command = small(remove_earlier(command[1:]))
    run(
        [sys.executable, "-m", "torch.distributed.run", *options[1:], "-m", "bincomm.cli", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def make(words: list[str]) -> None:
    """Whether make has the target and its rules; nothing is run: it takes minutes, needs a GPU, or is what
    runs this test."""
    steps = run(["make", "--dry-run", *words[1:]], cwd=ROOT)
    assert steps.strip(), f"{' '.join(words)} does nothing"


def pip(words: list[str]) -> None:
    """Requirements are valid and extras exist; nothing is installed."""
    assert words[1] == "install"
    extras = set(importlib.metadata.metadata("bincomm").get_all("Provides-Extra"))
    for word in words[2:]:
        if word.startswith("-"):
            assert word == "--no-build-isolation"
        elif word.startswith("."):
            assert Requirement(f"bincomm{word[1:]}").extras <= extras
        else:
            Requirement(word)


def pytest_of_venv(words: list[str]) -> None:
    """The tests and markers that it names exist; the tests are not run again."""
    words = words[3:]
    if "-m" in words:
        at = words.index("-m")
        markers = re.findall(r"^    \"(\w+):", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
        assert set(re.findall(r"\w+", words[at + 1])) - {"not", "and", "or"} <= set(markers)
        del words[at : at + 2]
    assert words
    for path in words:
        assert (ROOT / path).exists()


def example(words: list[str]) -> None:
    """`examples/minimal.py`: one epoch of three steps on the digits, in this process."""
    script, *options = words[1:]
    arguments = [script, *options, "--epochs", "1", "--batch_size", "479"]
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert output.getvalue()


def completion(words: list[str]) -> None:
    """It makes bash complete a command, here that of this checkout."""
    pytest.importorskip("argcomplete")
    script = f"""
        eval "{words[1]}"
        bincomm() {{ "{sys.executable}" -m bincomm.cli; }}
        COMP_LINE="bincomm pre" COMP_POINT=11 COMP_TYPE=9
        _python_argcomplete bincomm
        echo "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    assert run(["bash", "-c", script], env=environment).split() == ["pretrain"]


def sbatch(words: list[str]) -> None:
    """The script is there (tests/test_launching.py runs it), and the run that it starts."""
    assert (ROOT / words[1]).exists()
    train(["pretrain", *words[2:]])


def kubectl(words: list[str]) -> None:
    """The manifest is there; tests/test_launching.py looks into it."""
    assert (ROOT / words[-1]).exists()


def docker(words: list[str]) -> None:
    """What the image is built from is there; a run in it is one here, with the folder that is mounted."""
    assert (ROOT / "Dockerfile").exists()
    if words[1] == "run":
        command = words[words.index("bincomm") + 1 :]
        train(replace(command, data=os.path.expanduser("~/pictures")))


RULES: dict[tuple[str, ...], Callable[[list[str]], None]] = {
    **{("bincomm", name): lambda words, rule=rule: rule(words[1:]) for name, rule in SUBCOMMANDS.items()},
    ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "torchrun"): lambda words: torchrun(words[1:]),
    ("torchrun",): torchrun,
    ("sbatch",): sbatch,
    ("kubectl", "apply", "-f"): kubectl,
    ("docker",): docker,
    ("make",): make,
    ("pip",): pip,
    (".venv/bin/python", "-m", "pytest"): pytest_of_venv,
    ("eval", "$(register-python-argcomplete bincomm)"): completion,
    ("python", "examples/minimal.py"): example,
}


def find_rule(words: list[str]) -> Callable[[list[str]], None] | None:
    return next((rule for start, rule in RULES.items() if tuple(words[: len(start)]) == start), None)


def run(command: list[str], **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


# What the pages mention


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A home folder with images, runs, codes and shards."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # else fonts are listed again, for a minute
        patch.chdir(home)
        patch.setenv("HOME", str(home))
        patch.setenv("BINCOMM_CACHE", str(home / "cache"))
        for folder in FOLDERS:
            Path(folder).parent.mkdir(exist_ok=True)
            write_scenes(folder, 40, seed=0, test_count=20, size=24)
        shutil.copy(next(Path("drawn").glob("train/*/*.png")), "cat.png")
        Image.open("cat.png").save("cat.jpg")
        write_cifar10(Path("cache/sets/cifar10/files"))
        write_davis(Path("DAVIS"))
        write_masks(Path("masks"))
        write_coco(Path("COCO"))
        write_hashing_lists(Path("lists"))
        write_bands(Path("bands"))
        main(["data", "stats", "--data", "bands", "--channels", "13", "--output", "bands.yaml"])
        shutil.copy(ROOT / "bincomm/recipes/digits.yaml", "mine.yaml")
        main(small(["pretrain", "--recipe", "digits", "--data", "drawn", "--output", RUNS[0]]))
        for run_folder in RUNS[1:]:
            shutil.copytree(RUNS[0], run_folder)
        write_parquet(Path("photos"))
        main(["encode", RUNS[0], "--data", "pictures", "--output", "codes"])
        main(["data", "shard", "--data", "pictures", "--output", "shards"])
        main(
            small(["messages", RUNS[0], "--data", "pictures", "--epochs=10", "--output", "messages/pictures"])
        )
        yield home


@pytest.fixture
def workspace(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("HOME", str(prepared))
    monkeypatch.setenv("BINCOMM_CACHE", str(prepared / "cache"))


def write_parquet(folder: Path) -> None:
    """Drawn images in the layout of Hugging Face datasets."""
    folder.mkdir()
    for part in ("train", "test"):
        files = sorted(Path("drawn").glob(f"{part}/*/*.png"))
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
        table = pa.table({"image": images, "label": [path.parent.name for path in files]})
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet", row_group_size=100)


def write_cifar10(folder: Path) -> None:
    """Drawn images where bincomm keeps the standard set, as if it had been fetched."""
    write_scenes(folder, 40, seed=1, test_count=20, size=32)
    classes = sorted(path.name for path in (folder / "train").iterdir())
    splits = {
        split: [
            [str(path.relative_to(folder)), classes.index(path.parent.name)]
            for path in sorted(folder.glob(f"{split}/*/*.png"))
            if path.parent.name in classes
        ]
        for split in ("train", "test")
    }
    (folder / "index.json").write_text(json.dumps({"classes": classes, "splits": splits}))


def write_hashing_lists(folder: Path) -> None:
    """Twelve images and two labels of each."""
    folder.mkdir()
    for number in range(12):
        shutil.copy("cat.png", folder / f"{number}.png")
        with (folder / ("database.txt" if number < 10 else "test.txt")).open("a") as file:
            file.write(f"{number}.png {number % 2} 1\n")


def write_bands(folder: Path) -> None:
    """Arrays of 13 bands of 16 bits, in two classes; as .npy files, which need no tifffile."""
    rng = np.random.default_rng(0)
    for name in ("field", "forest"):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            np.save(folder / name / f"{number}.npy", rng.integers(0, 4000, (32, 32, 13), dtype=np.uint16))


def write_davis(folder: Path) -> None:
    """Four frames in which a square moves, in the layout of DAVIS-2017."""
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("square\n")
    for kind, extension in (("JPEGImages", "jpg"), ("Annotations", "png")):
        (folder / kind / "480p" / "square").mkdir(parents=True)
        for frame in range(4):
            mask = np.zeros((64, 96), np.uint8)
            mask[16:48, 16 + 8 * frame : 48 + 8 * frame] = 1
            picture = Image.fromarray(200 * mask).convert("RGB")
            if kind == "Annotations":
                picture = Image.fromarray(mask, "P")
                picture.putpalette([0, 0, 0, 255, 0, 0])
            picture.save(folder / kind / "480p" / "square" / f"{frame:05}.{extension}")


def write_coco(folder: Path) -> None:
    """An image of a square, in the layout of COCO."""
    for name in ("annotations", "val2017"):
        (folder / name).mkdir(parents=True)
    image = np.full((48, 64, 3), 40, np.uint8)
    image[8:32, 16:40] = (220, 60, 30)
    Image.fromarray(image).save(folder / "val2017" / "1.jpg")
    polygon = [16, 8, 40, 8, 40, 32, 16, 32]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 576}
    annotation |= {"bbox": [16, 8, 24, 24], "segmentation": [polygon]}
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 48, "width": 64}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "square"}],
    }
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def write_masks(folder: Path) -> None:
    """Images of two halves, and masks that name them."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 1
    for half in ("train", "val"):
        for kind, pixels in (("images", 200 * mask), ("masks", mask)):
            (folder / half / kind).mkdir(parents=True)
            for number in range(2):
                Image.fromarray(pixels).save(folder / half / kind / f"{number}.png")
