"""The benchmarks of learning: what is measured is stored and not measured again, and failures are told."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import curriculum, defaults, dense, domains, learning, messages, speed
from bincomm.data.sources import open_source
from bincomm.objectives import BetaControl, DiscreteCommunication
from bincomm.pretraining import Interrupted

pytestmark = pytest.mark.slow
KEYS = {
    "backbone": "test_vit",
    "backbone_args": "{patch_size: 4, depth: 1}",
    "global_size": 16,
    "local_size": 12,
    "bits": 16,
    "hidden": 32,
    "batch_size": 32,
    "max_steps": 4,
    "log_every": 3,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def images(every_nth_digit):
    """A tenth of the digits, 144 for training and 36 queries."""
    return every_nth_digit(10)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """Runs a benchmark, with short runs of a tiny network; returns its status, its records, its page and what
    it printed."""

    def run(benchmark, *arguments):
        given = [word for key, value in KEYS.items() for word in ("--set", f"{key}={value}")]
        monkeypatch.setattr(sys, "argv", ["benchmark", str(tmp_path / "figures"), *arguments, *given])
        status = benchmark.main()
        results = tmp_path / "figures.json"
        records = json.loads(results.read_text())["records"] if results.exists() else {}
        page = results.with_suffix(".md").read_text() if results.exists() else ""
        return status, records, page, capsys.readouterr().out

    return run


@pytest.fixture
def broken(monkeypatch):
    """The loss of the bits is not a number."""
    forward = DiscreteCommunication.forward

    def not_a_number(self, *outputs):
        return {name: value * torch.nan for name, value in forward(self, *outputs).items()}

    monkeypatch.setattr(DiscreteCommunication, "forward", not_a_number)


def stamps(records):
    return {name: record["seconds_in_all"] for name, record in records.items()}


def test_defaults_are_measured_once(bench, images, tmp_path):
    source = f"digits={images}"
    chosen = (source, "--only", "default|beta from 10|beta 0.3")
    status, records, page, printed = bench(defaults, *chosen)
    assert status == 0
    names = ["digits: default", "digits: beta from 10", "digits: beta 0.3"]
    assert list(records) == names
    assert [line.partition(": 4 steps")[0] for line in printed.splitlines()] == names
    figures = records["digits: default"]["figures"]
    assert figures["steps"] == 4
    assert figures["queries"] == 36
    assert figures["points"] == pytest.approx(100 * (figures["bit_accuracy"] - figures["bit_majority"]))
    assert figures["standard_error"] == pytest.approx(
        sum(p * (1 - p) / 36 for p in (figures["knn"], figures["untrained"])) ** 0.5
    )
    betas = [records[name]["figures"]["beta"] for name in names]
    assert betas[0] < 1 < 5 < betas[1]
    assert betas[2] == pytest.approx(0.3)
    assert BetaControl.START < 1  # as before
    assert "| digits | default | 4 | 32 |" in page
    assert "## Start value of β" in page
    assert "python -m benchmarks.defaults" in page
    assert not list((tmp_path / "build").glob("*/*"))

    _, again, same, printed = bench(defaults, *chosen)
    assert (stamps(again), same, printed) == (stamps(records), page, "")
    # Other cells come beside them, in their place; a cell of other keys is measured again.
    _, more, _, printed = bench(defaults, source, "--only", "default|K 32$")
    assert list(more) == [names[0], "digits: K 32", *names[1:]]
    assert more["digits: K 32"]["figures"]["bits"] == 32
    assert len(printed.splitlines()) == 1
    _, _, _, printed = bench(defaults, source, "--only", "default", "--set", "seed=1")
    assert printed.startswith("digits: default: 4 steps")


def test_a_list_of_the_cells(bench, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "one.png")
    status, records, _, printed = bench(defaults, "digits=digits", f"photographs={tmp_path}", "--list")
    names = printed.splitlines()
    assert (status, records) == (0, {})
    assert len(set(names)) == len(names) == 1 + 5 + 3 + 4 + 4 + 1
    assert [name for name in names if "photographs" in name] == ["photographs: default"]


def test_a_fixed_beta_has_the_steps_of_the_default_path(bench, images):
    source = f"digits={images}"
    status, records, _, printed = bench(defaults, source, "--only", "beta 0.3$")
    assert (status, records) == (0, {})
    assert printed == "digits: fixed β is left out, the default path has not been measured\n"
    bench(defaults, source, "--only", "default")
    _, records, _, _ = bench(defaults, source, "--only", "beta 0.3$")
    assert records["digits: beta 0.3"]["keys"]["run"]["max_steps"] == 4


def test_a_failed_cell_is_told(bench, broken, monkeypatch):
    chosen = ("digits=digits", "--only", "K 32$")
    monkeypatch.setitem(KEYS, "max_steps", 6)  # after four steps that are not finite a run ends
    status, records, page, printed = bench(defaults, *chosen)
    assert status == 1
    assert "TrainingError" in records["digits: K 32"]["error"]
    assert "## Failed" in page
    assert "failed: digits: K 32. --retry" in printed


@pytest.mark.long
def test_what_failed_is_measured_again_on_request(bench, monkeypatch):
    chosen = ("digits=digits", "--only", "K 32$")
    with monkeypatch.context() as patch:
        patch.setattr(defaults, "training_seconds", lambda config: 0)
        assert bench(defaults, *chosen)[0] == 1
    status, records, _, printed = bench(defaults, *chosen)
    assert status == 1
    assert "ZeroDivisionError" in records["digits: K 32"]["error"]
    assert printed.startswith("failed: digits: K 32")  # and nothing was measured
    status, records, page, _ = bench(defaults, *chosen, "--retry")
    assert status == 0
    assert "figures" in records["digits: K 32"]
    assert "Failed" not in page


def test_an_interrupted_run_is_kept_and_goes_on(bench, images, monkeypatch, tmp_path):
    chosen = (f"digits={images}", "--only", "K 32$")
    folders = []

    def interrupted(config):
        folders.append(config.output)
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(defaults, "pretrain", interrupted)
        with pytest.raises(SystemExit, match="K 32: interrupted; the same command goes on"):
            bench(defaults, *chosen)
        assert (tmp_path / folders[0]).is_dir()
        assert not (tmp_path / "figures.json").exists()
        with pytest.raises(SystemExit):
            bench(defaults, *chosen)
    assert folders[0] == folders[1]
    assert bench(defaults, *chosen)[0] == 0
    assert not (tmp_path / folders[0]).exists()


def test_resets_are_made_in_short_runs_too(images, tmp_path):
    methods = ("bits, reset", "bits, fixed head", "DINO")
    keys = {key: value for key, value in KEYS.items() if key != "max_steps"} | {"epochs": 15}
    made = [learning.configuration(method, str(images), keys, tmp_path) for method in methods]
    assert [config.reset_every for config in made] == [2, 0, 0]


@pytest.mark.long
def test_methods_are_tuned_and_compared_once(bench, images, tmp_path):
    few = (f"d={images}", "--seeds", "2", "--methods", "bits, reset", "DINO", "--rates", "0.001", "0.01")
    status, records, page, _ = bench(learning, *few)
    assert status == 0
    searched = [f"search: {method}, lr {lr}" for method in ("bits, reset", "DINO") for lr in (0.001, 0.01)]
    references = ["raw pixels", "before training, seed 0", "before training, seed 1"]
    finals = [f"{method}, seed {seed}" for method in ("bits, reset", "DINO") for seed in (0, 1)]
    assert list(records) == [*searched, *references, *finals]
    best = max(searched[2:], key=lambda name: records[name]["figures"]["knn"])
    assert records["DINO, seed 1"]["keys"]["run"]["lr"] == records[best]["figures"]["lr"]
    figures = records["bits, reset, seed 1"]["figures"]
    assert figures["query_images"] == 36
    assert [point["step"] for point in figures["curve"]] == [0, 1, 2, 3, 4]
    assert figures["curve"][-1]["seconds"] == pytest.approx(figures["training_seconds"])
    assert figures["curve"][-1]["knn"] == figures["knn"]["20"]  # of all images, as they are few
    start = records["before training, seed 1"]["figures"]["knn"]["20"]
    assert figures["curve"][0]["knn"] == start
    assert "| DINO " in page
    assert "**" in page
    Image.open(tmp_path / "figures.png").verify()
    assert stamps(bench(learning, *few)[1]) == stamps(records)


def test_a_method_waits_for_its_search(bench, images):
    status, records, _, printed = bench(
        learning, f"digits={images}", "--methods", "DINO", "--seeds", "1", "--only", "seed"
    )
    assert status == 0
    assert list(records) == ["before training, seed 0"]
    assert "DINO: left out, its learning rate has not been searched for" in printed


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes, a color each, in train and test."""
    folder = tmp_path_factory.mktemp("photographs")
    for half, count in (("train", 20), ("test", 6)):
        for kind, color in (("red", (220, 40, 40)), ("blue", (40, 40, 220))):
            (folder / half / kind).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 30), color).save(folder / half / kind / f"{number:02}.png")
    return folder


def test_scenes_show_parts_of_images_and_their_masks_say_of_which_class(photographs, tmp_path):
    source = open_source(str(photographs))
    for folder in ("one", "other"):
        dense.write_scenes(tmp_path / folder, {"train": source, "val": source}, (6, 3), 16)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 2 * (6 + 3)
    assert all(
        (tmp_path / "one" / path).read_bytes() == (tmp_path / "other" / path).read_bytes() for path in files
    )
    seen = np.zeros(3, int)
    for path in (tmp_path / "one" / "train" / "images").iterdir():
        picture = np.asarray(Image.open(path)).astype(int)
        mask = np.asarray(Image.open(path.parents[1] / "masks" / path.name))
        assert mask.shape == picture.shape[:2] == (32, 32)
        seen += np.bincount(mask.flatten(), minlength=3)
        is_red = picture[..., 0] > picture[..., 2]
        for number, kind in enumerate(source.classes, 1):
            assert (is_red[mask == number] == (kind == "red")).all()
    assert (seen > 0.05 * seen.sum()).all()


@pytest.mark.long
def test_dense_bits_are_compared_with_none(bench, photographs):
    arguments = (f"colors={photographs}", "--seeds", "2", "--scenes", "6", "3")
    status, records, page, _ = bench(dense, *arguments)
    assert status == 0, page
    ways = ("before training", "dense 0", "dense 1")
    assert list(records) == ["raw pixels", *(f"{way}, seed {seed}" for seed in (0, 1) for way in ways)]
    figures = records["dense 1, seed 1"]["figures"]
    assert figures["steps"] == records["dense 0, seed 1"]["figures"]["steps"] == 4
    assert "dense_transmitted_bits" in figures
    assert "dense_transmitted_bits" not in records["dense 0, seed 1"]["figures"]
    pixels = records["raw pixels"]["figures"]
    assert pixels["knn"]["20"] == 1  # colors alone tell these classes apart, but not from the ground
    assert 0 < pixels["segmentation"]["knn"] < 1
    assert "`dense 1` against `dense 0`, seed by seed: patches, k-NN mIoU" in page
    assert stamps(bench(dense, *arguments)[1]) == stamps(records)


def test_low_resolution_first_against_none_of_it(bench, images):
    arguments = (f"d={images}", "--seeds", "1", "--only", "conv", "--set", "low_resolution_sizes=[8, 8]")
    status, records, page, printed = bench(curriculum, *arguments)
    assert status == 0
    assert list(records) == ["conv net, none, seed 0", "conv net, the first 70%, seed 0"]
    full, low = (record["figures"] for record in records.values())
    assert (low["steps"], low["sizes"], low["queries"]) == (4, [[8, 8], [16, 12]], 36)
    assert (full["untrained"], full["pixels"]) == (low["untrained"], low["pixels"])
    assert "| conv net | the first 70% | 1 | 4 |" in page
    points = 100 * (low["knn"] - full["knn"])
    assert f"- conv net, the first 70%: k-NN {points:+.1f} points, seed by seed" in page
    assert len(printed.splitlines()) == 2
    assert stamps(bench(curriculum, *arguments)[1]) == stamps(records)


@pytest.mark.long
def test_a_domain_with_and_without_another_one(bench, images):
    arguments = (f"one={images}", f"two={images}", "--steps", "4", "--seeds", "2")
    status, records, page, _ = bench(domains, *arguments)
    assert status == 0
    ways = ("before training", "two alone", "one → two", "one → two, head first")
    assert list(records) == ["raw pixels", *(f"{way}, seed {seed}" for way in ways for seed in (0, 1))]
    figures = records["one → two, seed 0"]["figures"]
    assert figures["query_images"] == 36
    for way in ("one alone", *ways, "raw pixels"):
        assert f"| {way} " in page
    assert "against the target alone, seed by seed: k-NN" in page
    assert stamps(bench(domains, *arguments)[1]) == stamps(records)


def test_a_student_of_messages_is_compared_with_itself(bench, images, monkeypatch):
    source = f"digits={images}"
    status, _, _, printed = bench(messages, source, "--list", "--seeds", "2")
    assert status == 0
    names = ["raw pixels", "before training", "the larger network", "seconds of a step"]
    for seed in range(2):
        ways = ("from stored messages", "by itself", "by itself, local crops")
        names += [f"{way}, seed {seed}" for way in ways]
    assert printed.splitlines() == names

    measured = iter([0.1, 0.2, 0.4, 0.1, 0.2, 0.4, 9.0, 0.2, 0.4])  # of the ways by turns
    monkeypatch.setattr(speed, "ROUNDS", 3)
    monkeypatch.setattr(speed.budget, "measure", lambda *args: (next(measured), 4))
    arguments = (source, "--seeds", "1", "--teacher_epochs", "1", "--epochs", "1")
    larger = ("--larger", "backbone_args={patch_size: 4, depth: 2}")
    status, records, page, _ = bench(messages, *arguments, *larger)
    assert (status, list(records)) == (0, names[:7])
    student, alone, other = (records[name]["figures"] for name in names[4:7])
    # Half and a quarter as many in the same time, by the medians.
    assert [each["steps"] for each in (student, alone, other)] == [4, 2, 1]
    assert abs(student["bytes"] / student["computed_bytes"] - 1) < 0.1
    points = 100 * (student["knn"]["20"] - alone["knn"]["20"])
    assert f"k-NN from stored messages minus by itself: {points:+.1f} points" in page
    assert "images a second: 4.00 times as many from stored messages as by itself, local crops" in page
    assert stamps(bench(messages, *arguments, *larger)[1]) == stamps(records)
