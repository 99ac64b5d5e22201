"""Several methods in one table: its figures are those of the evaluation functions, and it can go on."""

import json
import os
import re
import signal
import statistics
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bincomm import cli
from bincomm.bits import bit_statistics
from bincomm.building import create_networks
from bincomm.comparison import BEFORE, FIGURES, METHODS, PIXELS, epochs_of, method_configs, prototypes_for
from bincomm.config import KEYS_OF_METHODS, PretrainConfig
from bincomm.configuration import configure
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.engine.records import Records
from bincomm.evaluation.features import extract_features, forward_batches
from bincomm.evaluation.geometry import effective_dimensions
from bincomm.evaluation.knn import knn_accuracy
from bincomm.evaluation.linear import linear_probe
from bincomm.evaluation.pretrained import Pretrained
from bincomm.evaluation.retrieval import mean_average_precision
from bincomm.files import read_json_lines
from bincomm.objectives import DINO

pytestmark = pytest.mark.slow
OPTIONS = {
    "recipe": "digits",
    "backbone": "test_vit",
    "backbone_args": '{"patch_size": 4, "depth": 1}',
    "global_size": 16,
    "local_size": 12,
    "bits": 16,
    "hidden": 32,
    "batch_size": 64,  # 5 steps an epoch
    "max_steps": 6,
    "reset_every": 1,
    "log_every": 4,
    "save_every": 3,
}


@pytest.fixture(scope="module", autouse=True)
def data(few_digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIONS, "data", few_digits)
        yield


def arguments(output, **options):
    values = {**OPTIONS, **options, "output": output}
    return ["compare", *(f"--{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of all methods that need code of their own, over two seeds where it is cheap."""
    output = tmp_path_factory.mktemp("compare") / "all"
    assert cli.main(arguments(output, methods="bits-reset,simdino,dino", seeds="0,1")) == 0
    return output, json.loads((output / "table.json").read_text())


def rows(table):
    return {row["name"]: row for row in table["rows"]}


def evaluated(teacher, config):
    """The figures of a network by direct calls, codes compared as ±1 vectors."""
    sources = evaluation_sources(config.data, open_source(config.data))[:2]
    model = Pretrained.of(teacher, config, torch.device("cpu"))
    gallery, queries = (extract_features(model, source) for source in sources)
    labels = [torch.from_numpy(source.labels) for source in sources]
    features = (gallery["features"], labels[0], queries["features"], labels[1])
    bits = bit_statistics((queries["signs"] == 1).sum(0), len(labels[1]))
    return {
        ("knn", "20"): knn_accuracy(*features, k=20),
        ("linear", "accuracy"): linear_probe(*features).accuracy,
        ("map",): mean_average_precision(*features),
        ("map_codes",): mean_average_precision(gallery["signs"], labels[0], queries["signs"], labels[1]),
        ("geometry", "d_eff"): effective_dimensions(queries["features"]).d_eff,
        ("geometry", "r_eff"): effective_dimensions(queries["features"]).r_eff,
        ("bits", "bit_entropy"): bits["bit_entropy"],
        ("bits", "dead_bits"): bits["dead_bits"],
    }


def figures(result):
    """The same figures of a result in the table."""
    values = {path: result[path[0]] if len(path) == 1 else result[path[0]][path[1]] for path in FIGURES}
    assert values.keys() == FIGURES.keys()
    return values


@pytest.mark.parametrize("method", ["bits-reset", "simdino", "dino"])
def test_figures_are_those_of_the_evaluation_functions(compared, method):
    output, table = compared
    config = configure(str(output / f"{method}-seed1" / "config.yaml"))
    assert config.seed == 1
    state = torch.load(output / f"{method}-seed1/checkpoints/step-000000006.ckpt", weights_only=True)
    _, teacher = create_networks(config, torch.device("cpu"))
    before = rows(table)[BEFORE]["runs"][1]
    assert before["knn"]["20"] == evaluated(teacher, config)["knn", "20"]
    teacher.load_state_dict(state["teacher"])
    after = rows(table)[method]["runs"][1]
    assert after["training_seconds"] > 0
    assert figures(after) == pytest.approx(evaluated(teacher, config), rel=1e-9)
    assert (after["gallery_images"], after["query_images"]) == (360, 90)
    result = json.loads((output / f"{method}-seed1" / "result.json").read_text())
    assert after["knn"] == result["evaluation"]["teacher"]["knn"]
    assert after["bits"] == result["evaluation"]["teacher"]["bits"]


def test_raw_pixels_are_measured_as_features(compared):
    output, table = compared
    config = configure(str(output / "dino-seed0" / "config.yaml"))
    _, teacher = create_networks(config, torch.device("cpu"))
    sources = evaluation_sources(config.data, open_source(config.data))[:2]
    model = Pretrained.of(teacher, config, torch.device("cpu"))
    crops = [torch.cat([batch.crops for batch in forward_batches(model, source)]) for source in sources]
    gallery, queries = (F.adaptive_avg_pool2d(each, 16).flatten(1) for each in crops)
    labels = [torch.from_numpy(source.labels) for source in sources]
    pixels = rows(table)[PIXELS]["mean"]
    assert pixels["knn"]["20"] == knn_accuracy(gallery, labels[0], queries, labels[1])
    assert pixels["geometry"]["d_eff"] == pytest.approx(effective_dimensions(queries).d_eff)
    assert "map_codes" not in pixels


@pytest.mark.long
def test_a_method_that_fails_costs_the_others_nothing(compared, tmp_path, monkeypatch, capsys):
    """The table names it, and also has what an earlier comparison finished."""
    assert cli.main(arguments(tmp_path / "run", methods="bits-fixed")) == 0
    forward = DINO.forward
    monkeypatch.setattr(
        DINO,
        "forward",
        lambda self, *outputs: {k: v * torch.nan for k, v in forward(self, *outputs).items()},
    )
    assert cli.main(arguments(tmp_path / "run", methods="dino,simdino")) == 1
    assert f"{tmp_path}/run/dino: could not be trained to the end" in capsys.readouterr().err
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert [row["name"] for row in table["rows"][2:]] == ["dino", "simdino", "bits-fixed"]
    assert rows(table)["dino"]["mean"] == {}
    assert rows(table)["simdino"]["mean"].keys() >= {"knn", "map_codes"}
    assert "not finite in more than 3 steps" in table["failed"][f"{tmp_path}/run/dino"]
    assert "| dino            | -      |" in (tmp_path / "run" / "table.md").read_text()


def test_before_training_is_the_network_of_the_bits(compared):
    output, table = compared
    config = configure(str(output / "bits-reset-seed0" / "config.yaml"))
    _, teacher = create_networks(config, torch.device("cpu"))
    assert figures(rows(table)[BEFORE]["runs"][0]) == pytest.approx(evaluated(teacher, config), rel=1e-9)


def test_mean_and_standard_deviation_over_the_seeds(compared):
    output, table = compared
    row = rows(table)["dino"]
    each = [run["map"] for run in row["runs"]]
    assert each[0] != each[1]
    assert row["mean"]["map"] == pytest.approx(statistics.mean(each))
    assert row["std"]["map"] == pytest.approx(statistics.stdev(each))
    each = [run["knn"]["20"] for run in row["runs"]]
    assert row["mean"]["knn"] == {"20": pytest.approx(statistics.mean(each))}
    line = next(x for x in (output / "table.md").read_text().splitlines() if x.startswith("| dino "))
    assert f"{100 * row['mean']['map']:.1f} ± {100 * row['std']['map']:.1f}" in line


def test_what_is_transmitted_is_that_of_the_last_steps(compared):
    """Of the method that predicts bits; the others have none."""
    output, table = compared
    row = rows(table)["bits-reset"]
    for seed, run in enumerate(row["runs"]):
        last = read_json_lines(output / f"bits-reset-seed{seed}" / "metrics.jsonl")[-1]
        assert last["step"] == 6
        assert run["transmitted_bits"] == last["transmitted_bits"]
    mean = row["mean"]["transmitted_bits"]
    assert mean == pytest.approx(statistics.mean(run["transmitted_bits"] for run in row["runs"]))
    header, _, *lines = (x for x in (output / "table.md").read_text().splitlines() if x.startswith("|"))
    column = [name.strip() for name in header.split("|")].index("transmitted bits")
    cells = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in lines}
    assert cells.pop("bits-reset").startswith(f"{mean:.1f} ± ")
    assert set(cells.values()) == {"-"}
    for method in (BEFORE, PIXELS, "simdino", "dino"):
        assert "transmitted_bits" not in rows(table)[method]["mean"]


def test_what_runs_share_and_where_they_differ(compared):
    output, table = compared
    assert table["seeds"] == [0, 1]
    assert table["differences"] == {
        "bits-reset": {
            "method": "bits",
            "freeze_last_layer": 0,
            "reset_every": 1,
            "min_lr": 1e-5,
            "clip": 1.0,
        },
        "simdino": {"method": "simdino", **KEYS_OF_METHODS["simdino"]},
        "dino": {"method": "dino", **KEYS_OF_METHODS["dino"]},
    }
    assert table["config"]["prototypes"] == 32
    assert table["config"]["max_steps"] == 6
    assert not {"method", "reset_every", "output", "seed"} & table["config"].keys()
    assert table["machine"]["device"]
    assert table["versions"]["torch"] == torch.__version__
    text = " ".join((output / "table.md").read_text().split())
    assert "simdino freeze_last_layer=0, reset_every=0, min_lr=1e-06, clip=3.0; dino" in text
    first, last = (
        torch.load(output / f"dino-seed0/checkpoints/step-00000000{step}.ckpt", weights_only=True)
        for step in (3, 6)
    )
    assert last["teacher"]["head.prototypes"].shape == (32, 16)
    initial = first["teacher"]["head.prototypes"]  # frozen in the first epoch, of five steps
    assert torch.equal(first["student"]["head.prototypes"], initial)
    assert not torch.equal(last["student"]["head.prototypes"], initial)
    Image.open(output / "plot.png").verify()


def test_the_same_command_trains_nothing_again(compared, capsys):
    output, table = compared
    checkpoints = {path: path.stat().st_mtime_ns for path in output.glob("*/checkpoints/*.ckpt")}
    assert len(checkpoints) == 12
    text = (output / "table.md").read_text()
    assert cli.main(arguments(output, methods="bits-reset,simdino,dino", seeds="0,1")) == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/checkpoints/*.ckpt")} == checkpoints
    assert json.loads((output / "table.json").read_text()) == table
    assert (output / "table.md").read_text() == text
    assert text in capsys.readouterr().out


def test_an_interrupted_comparison_goes_on(compared, tmp_path, monkeypatch, capsys):
    """A signal in the second run: the first is not trained again, the second ends as if nothing had been."""
    output, steps = tmp_path / "run", []
    step = Records.add

    def interrupted(self, *args):
        steps.append(step(self, *args))
        if len(steps) == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"methods": "bits-reset,simdino", "seeds": "1"}
    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", interrupted)
        assert cli.main(arguments(output, **options)) == cli.SAVED
    assert "SIGTERM: saved" in capsys.readouterr().err
    assert not (output / "table.json").exists()
    first = (output / "bits-reset-seed1/checkpoints/step-000000006.ckpt").stat().st_mtime_ns
    assert cli.main(arguments(output, **options)) == 0
    assert "resuming at step 4" in capsys.readouterr().err
    assert (output / "bits-reset-seed1/checkpoints/step-000000006.ckpt").stat().st_mtime_ns == first
    resumed, uninterrupted = rows(json.loads((output / "table.json").read_text())), rows(compared[1])
    for method in ("bits-reset", "simdino"):
        for run in (resumed[method]["runs"][0], uninterrupted[method]["runs"][1]):
            run.pop("training_seconds", None)
        assert resumed[method]["runs"][0] == uninterrupted[method]["runs"][1]


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"methods": "bits-reset,simdinno"},
            "methods: there is no method 'simdinno'; did you mean simdino?",
        ),
        ({"methods": "dino,dino"}, "methods: expected at least one, and each only once"),
        ({"seeds": "1,1"}, "seeds: expected at least one, and each only once"),
        ({"method": "dino"}, "method: compare trains several methods"),
        ({"agreement": "soft"}, "agreement: compare takes it from the method's name: bits-reset, bits-fixed"),
        ({"expa_type": 0}, "expa_type: compare takes it from the method's name"),
        ({"reset_every": 2}, "reset_every: expected fewer epochs than a run of bits-reset has, 1.2, got 2"),
        ({"epoch": 3}, "did you mean --epochs?"),
        ({"data": "nowhere"}, "data: 'nowhere' does not exist"),
    ],
)
def test_errors_take_one_line_and_come_before_training(tmp_path, capsys, options, words):
    assert cli.main([*arguments(tmp_path / "run", **options), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert words in error
    assert not (tmp_path / "run").exists()


def test_images_without_labels_are_refused_before_training(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(70):
        Image.new("RGB", (20, 20), (3 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    assert cli.main(arguments(tmp_path / "run", data=tmp_path / "images")) == 2
    assert re.search(r"error: data: expected images with labels .* got none in", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_job_of_several_ranks_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", lambda status: None)
    assert cli.main(arguments(tmp_path / "run")) == 2
    assert "without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_run_whose_last_checkpoint_is_gone_is_named(compared, tmp_path, capsys):
    output = tmp_path / "run"
    options = {"methods": "bits-fixed", "log_every": 6, "save_every": 6}
    assert cli.main(arguments(output, **options)) == 0
    (output / "bits-fixed/checkpoints/step-000000006.ckpt").unlink()
    capsys.readouterr()
    assert cli.main(arguments(output, **options)) == 2
    assert "holds no checkpoint of its last step, 6" in capsys.readouterr().err


def test_what_sets_the_methods_apart():
    config = PretrainConfig(agreement="soft", expa_type=0, reset_every=0, method="dino", output="out")
    configs = {method: method_configs(config, method, None)[0] for method in METHODS}
    keys = ("method", "agreement", "expa_type", "reset_every")
    assert {name: tuple(getattr(c, key) for key in keys) for name, c in configs.items()} == {
        "bits-reset": ("bits", "hard", 0, 10),
        "bits-fixed": ("bits", "hard", 0, 0),
        "bits-soft": ("bits", "soft", 0, 0),
        "bits-cosine": ("bits", "cosine", 0, 0),
        "simdino": ("simdino", "soft", 1, 0),
        "simdino-expa0": ("simdino", "soft", 0, 0),
        "dino": ("dino", "soft", 0, 0),
    }
    assert configs["dino"].output == "out/dino"
    assert [(c.output, c.seed) for c in method_configs(config, "dino", [3, 5])] == [
        ("out/dino-seed3", 3),
        ("out/dino-seed5", 5),
    ]
    assert method_configs(PretrainConfig(reset_every=7), "bits-reset", None)[0].reset_every == 7
    assert (configs["simdino"].clip, configs["simdino"].min_lr) == (3.0, 1e-6)
    assert [configs[name].freeze_last_layer for name in ("bits-fixed", "simdino", "dino")] == [0, 0, 1]
    clipped = method_configs(replace(config, clip=2.0), "dino", None, given=["clip"])[0]
    assert (clipped.clip, clipped.min_lr) == (2.0, 1e-6)


def test_max_steps_cut_the_epochs_short():
    config = PretrainConfig(epochs=40, batch_size=64, max_steps=55)
    assert epochs_of(config, 1437) == 2.5  # of 22 steps
    assert epochs_of(replace(config, max_steps=None), 1437) == 40


@pytest.mark.parametrize(
    "images, prototypes", [(5, 1), (40, 2), (1437, 128), (50_000, 4096), (1_281_167, 65536), (10**8, 65536)]
)
def test_prototypes_for_a_number_of_images(images, prototypes):
    assert prototypes_for(images) == prototypes


@pytest.mark.long
def test_prototypes_that_are_given_are_taken(tmp_path):
    assert cli.main(arguments(tmp_path / "run", methods="dino", prototypes=65536, max_steps=1)) == 0
    assert json.loads((tmp_path / "run" / "table.json").read_text())["config"]["prototypes"] == 65536
