"""What the end of a run says of it: the figures of result.json are those of direct calls."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bincomm.bits import bit_statistics
from bincomm.building import create_networks
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.evaluation.features import extract_features, forward_batches
from bincomm.evaluation.knn import knn_accuracy
from bincomm.evaluation.pretrained import Pretrained, load_pretrained
from bincomm.evaluation.run import evaluate_run, summary

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


def test_figures_are_those_of_direct_calls(run, sources, configuration):
    evaluation = json.loads((run / "result.json").read_text())["evaluation"]
    labels = [torch.from_numpy(source.labels) for source in sources]

    def knn(gallery, queries):
        return knn_accuracy(gallery, labels[0], queries, labels[1], k=20)

    trained = load_pretrained(str(run), CPU)
    gallery, queries = (extract_features(trained, source) for source in sources)
    teacher = evaluation["teacher"]
    assert teacher["knn"]["20"] == knn(gallery["features"], queries["features"])
    assert teacher["knn_codes"]["20"] == knn(gallery["signs"], queries["signs"])
    assert teacher["bits"] == bit_statistics((queries["signs"] > 0).sum(0), 360)
    assert (teacher["gallery_images"], teacher["query_images"], teacher["classes"]) == (1437, 360, 10)
    untrained = Pretrained.of(create_networks(configuration(), CPU)[1], configuration(), CPU)
    before = [extract_features(untrained, source)["features"] for source in sources]
    assert evaluation["before_training"]["knn"]["20"] == knn(*before)
    crops = [torch.cat([batch.crops for batch in forward_batches(trained, source)]) for source in sources]
    assert evaluation["pixels"]["knn"]["20"] == knn(*(each.flatten(1) for each in crops)) > 0.95
    assert evaluation["queries_held_out"] is True
    # Equal runs leave equal files.
    assert not any("seconds" in evaluation[part] for part in ("teacher", "before_training", "pixels"))


def test_large_crops_are_averaged_to_pixels(configuration):
    pixels = Pretrained.of_pixels(configuration(), CPU)
    assert pixels.head is None
    crops = torch.randn(3, 3, 48, 48)
    expected = crops.unflatten(2, (16, 3)).unflatten(4, (16, 3)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(pixels.backbone(crops), expected)
    assert torch.equal(pixels.backbone(crops[..., :12, :12]), crops[..., :12, :12].flatten(1))
    assert F.adaptive_avg_pool2d(crops, 16).flatten(1).equal(pixels.backbone(crops))


def test_what_a_finished_run_prints(run):
    result = json.loads((run / "result.json").read_text())
    text = summary(result, "runs/a")
    evaluation, metrics = result["evaluation"], result["last_metrics"]
    assert "k-NN accuracy, k=20, 360 queries in 1437 images" in text
    for line in (
        f"  teacher's backbone   {evaluation['teacher']['knn']['20']:7.2%}",
        f"  its codes, Hamming   {evaluation['teacher']['knn_codes']['20']:7.2%}",
        f"  before training      {evaluation['before_training']['knn']['20']:7.2%}",
        f"  raw pixels           {evaluation['pixels']['knn']['20']:7.2%}",
    ):
        assert line in text.splitlines()
    assert f"channel: bit entropy {metrics['bit_entropy']:.3f}" in text
    assert f"  {metrics['transmitted_bits']:.1f} bits of a message transmitted,\n" in text
    assert text.endswith("config.yaml, checkpoints")
    assert "in runs/a: model.safetensors" in text
    assert summary(result, str(run)).splitlines()[-1].endswith(f": {run / 'report.html'}")
    split = {**result, "evaluation": {**evaluation, "queries_held_out": False}}
    assert "(the queries' images, not their labels, were used in training)" in summary(split, "runs/a")
    nothing = summary({**result, "evaluation": None, "last_metrics": {}}, "runs/a")
    assert "no k-NN: no image with a label can be used" in nothing
    unlabeled = {**result, "evaluation": None, "no_evaluation": "the data is a mix of sources"}
    assert "no k-NN: the data is a mix of sources" in summary(unlabeled, "runs/a")
    assert "channel" not in nothing


@pytest.fixture
def images(tmp_path):
    """Two classes of twelve images, of which the tenth of either cannot be used."""
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20, 20), (20 * i, 90 * (label == "b"), 0)).save(
                tmp_path / "images" / label / f"{i:02}.png"
            )
        (tmp_path / "images" / label / "09.png").write_bytes(b"none")
    return tmp_path / "images"


@pytest.mark.parametrize("held_out", [False, True])
def test_unusable_queries_are_reported_once_unless_they_were_trained_on(
    run, images, tmp_path, configuration, messages, held_out
):
    config = configuration(data=images)
    gallery, queries, split = evaluation_sources(str(images), open_source(str(images)))
    assert not split
    _, teacher = create_networks(config, CPU)
    result = evaluate_run(teacher, (gallery, queries, held_out), config, tmp_path, CPU)
    evaluation = result["evaluation"]
    assert (evaluation["teacher"]["gallery_images"], evaluation["pixels"]["query_images"]) == (20, 2)
    assert evaluation["queries_held_out"] == held_out
    assert [message.split(": ")[:2] for message in messages()] == [
        ["left out of the queries", f"{images}/{label}/09.png"] for label in "ab" if held_out
    ]
    # Of these nothing can be used, or there are none.
    for sources in ((gallery, queries.select([1, 3]), False), None):
        nothing = evaluate_run(teacher, sources, config, tmp_path, CPU)
        assert nothing == {**result, "evaluation": None}
        assert nothing["last_metrics"] == {}
