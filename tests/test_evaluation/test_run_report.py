"""The page about a run: what it says, that it stands alone, and that a browser shows it well."""

import json
import re

import numpy as np
import pytest
import torch
from browser import Page, look_at, needs_browser
from PIL import Image
from quick_runs import pages

from bincomm.building import create_networks
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.evaluation.neighbors import find_neighbors
from bincomm.evaluation.pretrained import Pretrained
from bincomm.evaluation.progress import spread
from bincomm.evaluation.report import write_report
from bincomm.evaluation.report_curves import thin
from bincomm.evaluation.run import evaluate_run
from bincomm.files import read_json_lines
from bincomm.pretraining import pretrain

CPU = torch.device("cpu")
LARGEST = 2_000_000  # bytes
HOSTILE = ["<script>alert(1)<b>", '"><img src=x onerror=alert(2)>', "&lt;b&gt; \u202edrow"]


def untrained(config):
    return Pretrained.of(create_networks(config, CPU)[1], config, CPU)


def stored(run):
    return json.loads((run / "result.json").read_text())


def write_pictures(folder, classes, count, side=24, seed=0):
    """Noise, the worst case of a JPEG's size; those of a class have a color of their own."""
    random = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            pixels = random.integers(0, 256, (side, side, 3)).astype(np.uint8)
            pixels[..., number % 3] //= 4
            Image.fromarray(pixels).save(folder / name / f"{image:02}<b>.png")
    return str(folder)


@pytest.mark.slow
def test_a_run_leaves_a_page_with_its_figures(run):
    page, result = Page(run / "report.html"), stored(run)
    source = (run / "report.html").read_text()
    assert len(source) < LARGEST
    assert not re.search(r"https?://", source)
    assert "script" not in page.tags
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.images)
    assert page.text.count("Good:") >= 9
    assert page.text.count("Bad:") >= 9
    for part in ("teacher", "before_training", "pixels"):
        assert f"{result['evaluation'][part]['knn']['20']:.1%}" in page.text
    heard = result["last_metrics"]["transmitted_bits"]
    assert f"Of each message {heard:.1f} bits reach it" in page.text
    assert "The run has 20 steps, which is few." in page.text
    # Six images with four crops each, eight curves and the bars of k-NN, six queries with twelve neighbors.
    assert len(page.images) == 6 * 4 + 9 + 6 * 13
    assert str(run.parent) not in source


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, False), (390, True)])
def test_in_a_browser_nothing_overflows_and_all_can_be_read(run, tmp_path, width, dark):
    seen = look_at(run / "report.html", tmp_path, width, dark)
    assert seen.width == width
    assert seen.scrolled <= width
    assert (seen.images, seen.broken) == (111, 0)
    assert seen.height > 3000
    assert seen.texts > 100
    assert seen.contrast >= 4.5, seen.faintest
    assert seen.console == []
    assert (seen.background == "rgb(255, 255, 255)") == (not dark)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, configuration):
    """The page of images in folders named to do harm."""
    folder = tmp_path_factory.mktemp("hostile")
    data = write_pictures(folder / HOSTILE[0], HOSTILE, 12)
    config, source = configuration(data=data, output=folder / "<u>run", bits=32), open_source(data)
    labeled = evaluation_sources(data, source)
    result = evaluate_run(create_networks(config, CPU)[1], labeled, config, folder, CPU)
    write_report(folder, config, source, result, untrained(config), labeled)
    return folder / "report.html"


@pytest.mark.slow
def test_names_from_files_are_shown_and_do_nothing(hostile):
    page = Page(hostile)
    assert not page.tags & {"script", "u"}
    assert all(image["src"].startswith("data:image/") for image in page.images)
    assert {key for image in page.images for key in image} == {"src", "alt", "title"}
    for name in HOSTILE:
        assert name in page.text
    assert "Run <u>run" in page.text
    assert any("<b>.png" in image["alt"] for image in page.images)
    assert "<b>.png" not in hostile.read_text()


@pytest.mark.slow
@needs_browser
def test_a_browser_finds_nothing_wrong_with_such_names(hostile, tmp_path):
    seen = look_at(hostile, tmp_path, 390)
    assert seen.scrolled <= 390
    assert (seen.broken, seen.console) == (0, [])


@pytest.mark.slow
def test_without_labels_neighbors_are_of_the_images_themselves(configuration, tmp_path):
    data = write_pictures(tmp_path / "images", ["all"], 30)
    config, source = configuration(data=data, output=tmp_path / "run"), open_source(data)
    result = {"evaluation": None, "no_evaluation": "no <i>labels</i>", "versions": {"torch": "2"}}
    write_report(tmp_path, config, source, result, untrained(config))
    page = Page(tmp_path / "report.html")
    assert "Not measured, because there are no labels: no <i>labels</i>." in page.text
    assert "i" not in page.tags
    assert "nearest among the images trained on" in page.text
    assert "of its class" not in page.text
    assert "There are no figures yet" not in page.text  # it has few steps


def test_of_an_interrupted_run_there_are_the_curves(configuration, tmp_path):
    config, source = configuration(output=tmp_path / "run", max_steps=400), open_source("digits")
    write_report(tmp_path, config, source)
    assert "There are no figures yet that could tell." in Page(tmp_path / "report.html").text
    line = {"step": 10, "loss": 1.0, "lr": 0.1, "momentum": 0.9, "skipped": 0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_report(tmp_path, config, source)
    page = Page(tmp_path / "report.html")
    assert "The run was interrupted." in page.text
    assert len(page.images) == 2  # loss and learning rate; nothing of bits, as of the method dino
    assert "transmitted" not in page.text.split("With which settings?")[0]


@pytest.mark.slow
def test_it_is_small_however_long_the_run_and_whatever_the_images(run, configuration, tmp_path):
    data = write_pictures(tmp_path / "images", ["a", "b"], 30, side=120)
    keys = {"global_size": 96, "local_size": 80, "local_crops": 10, "batch_size": 16}
    config, source = configuration(data=data, output=tmp_path / "run", **keys), open_source(data)
    (first, *_), random = read_json_lines(run / "metrics.jsonl"), np.random.default_rng(0)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(5000):
            file.write(json.dumps({key: random.random() for key in first} | {"step": step + 1}) + "\n")
    labeled = evaluation_sources(data, source)
    write_report(tmp_path, config, source, stored(run), untrained(config), labeled)
    size = (tmp_path / "report.html").stat().st_size
    assert 500_000 < size < LARGEST


def test_curves_of_long_runs_are_means():
    lines = [
        {"step": step, "loss": float(step), **({"rate": 1.0} if step % 2 else {})} for step in range(1, 1001)
    ]
    points = thin(lines)
    assert len(points) == 250
    assert points[0] == {"step": 2.5, "loss": 2.5}
    assert thin(lines[:300]) == lines[:300]


@pytest.mark.slow
def test_neighbors_are_the_nearest(configuration, sources):
    gallery, queries = (source.select(range(0, len(source.images), 60)) for source in sources)
    model = untrained(configuration())
    found = find_neighbors(model, gallery, queries)
    assert [query.image.name for query in found] == [spread(queries, 6).images.name(row) for row in range(6)]
    names = list(gallery.images.names())
    for query in found:
        own = model.encode(query.image.name)
        others = [model.encode(name) for name in names]
        cosine = [
            torch.cosine_similarity(own.features.double(), other.features.double(), 0) for other in others
        ]
        equal = [int((own.bits == other.bits).sum()) for other in others]
        for shown, similarity in ((query.by_features, cosine), (query.by_codes, equal)):
            values = [float(similarity[names.index(one.name)]) for one in shown]
            assert values == pytest.approx(sorted(map(float, similarity), reverse=True)[:6])
        assert query.image.label == query.image.name.split("/")[-2]


@pytest.mark.slow
def test_no_image_is_its_own_neighbor_and_a_mix_is_searched(configuration, tmp_path):
    first, second = (write_pictures(tmp_path / name, ["x"], 10, seed=seed) for seed, name in enumerate("ab"))
    mix = open_source({first: 1, second: 2})
    assert len(spread(mix, 8).images) == 8
    for query in find_neighbors(untrained(configuration()), mix):
        assert len(query.by_features) == 6
        assert query.image.name not in {one.name for one in query.by_features + query.by_codes}
        assert query.by_features[0].label is None


@pytest.mark.slow
def test_a_run_ends_well_even_if_the_page_cannot_be_written(configuration, tmp_path, messages):
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    with pages():
        result = pretrain(configuration(output=tmp_path / "run", max_steps=2))
    assert stored(tmp_path / "run") == result
    assert any(message.startswith("no report.html in") for message in messages())
