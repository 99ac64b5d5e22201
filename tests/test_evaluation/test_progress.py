import json

import numpy as np
import pytest
import torch

from bincomm.building import create_networks
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.distributed.ranks import ALONE
from bincomm.evaluation import progress
from bincomm.evaluation.progress import ProgressEvaluation, spread
from bincomm.pretraining import pretrain

EVERY_EPOCH = {"batch_size": 256, "evaluate_every": 1}  # of 5 steps


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, configuration):
    """A finished run with three evaluations on the way."""
    output = tmp_path_factory.mktemp("runs") / "evaluated"
    pretrain(configuration(output=output, **EVERY_EPOCH))
    return output


@pytest.mark.slow
def test_a_run_measures_knn_and_stays_as_it_is_without(evaluated, configuration, tmp_path):
    lines = [json.loads(line) for line in (evaluated / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15]
    assert all(0.1 < line[name] <= 1 for line in lines for name in ("knn", "knn_codes"))
    pretrain(configuration(output=tmp_path / "run", **EVERY_EPOCH | {"evaluate_every": 0}))
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (evaluated / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert not (tmp_path / "run" / "progress.jsonl").exists()


@pytest.mark.slow
def test_a_resumed_run_measures_the_same(evaluated, configuration):
    before = (evaluated / "progress.jsonl").read_bytes()
    (evaluated / "result.json").unlink()
    for path in (evaluated / "checkpoints").glob("*20*"):
        path.unlink()
    pretrain(configuration(output=evaluated, **EVERY_EPOCH))  # from step 10
    assert (evaluated / "progress.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_network_stays_as_it_is(configuration, tmp_path):
    config = configuration(output=tmp_path / "run")
    _, teacher = create_networks(config, torch.device("cpu"))
    teacher.train().to(memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    sources = evaluation_sources("digits", open_source("digits"))[:2]
    random = torch.get_rng_state()
    figures = ProgressEvaluation(*sources, config, ALONE)(teacher)
    assert figures.keys() == {"knn", "knn_codes"}
    assert torch.equal(random, torch.get_rng_state())
    assert teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.stride() == state[name].stride()


def test_of_many_images_some_from_everywhere():
    source = open_source("digits")
    part = spread(source, 100)
    assert len(part.images) == 100
    assert set(np.bincount(part.labels)) <= set(range(8, 13))
    assert part.images.name(0) == source.images.name(0)
    assert part.images.name(99) == source.images.name(len(source.images) - 1)
    assert spread(source, 5000) is source


@pytest.mark.slow
def test_without_usable_images_there_is_none(configuration, tmp_path, monkeypatch, messages):
    def fail(*args, **kwargs):
        raise progress.NoUsableImagesError("queries: none of the 3 images can be used")

    monkeypatch.setattr(progress, "evaluate", fail)
    config = configuration(output=tmp_path / "run")
    _, teacher = create_networks(config, torch.device("cpu"))
    sources = evaluation_sources("digits", open_source("digits"))[:2]
    assert ProgressEvaluation(*sources, config, ALONE)(teacher) == {}
    assert any("evaluate_every: no k-NN: queries: none" in message for message in messages())


def test_not_with_split_parameters(configuration):
    with pytest.raises(ValueError, match="evaluate_every: expected 0 with fsdp, got 2"):
        configuration(evaluate_every=2, fsdp=True)
