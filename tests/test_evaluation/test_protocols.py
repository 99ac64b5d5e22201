"""What was pretrained, loaded, looked at and measured: every figure against an independent computation."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

for package in ("timm", "nvidia.dali", "jsonargparse", "sklearn", "safetensors"):
    pytest.importorskip(package, reason="evaluation needs the packages of bincomm[eval]")
import safetensors.torch  # noqa: E402
from PIL import Image  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import average_precision_score  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402

from bincomm import cli  # noqa: E402
from bincomm.building import create_networks  # noqa: E402
from bincomm.config import parse  # noqa: E402
from bincomm.data.sources import digits, evaluation_sources, open_source  # noqa: E402
from bincomm.distributed.ranks import ALONE, Ranks  # noqa: E402
from bincomm.engine.checkpoints import save_checkpoint  # noqa: E402
from bincomm.evaluation import features as module  # noqa: E402
from bincomm.evaluation.augmented import augmented_probe  # noqa: E402
from bincomm.evaluation.features import extract, extract_cached, identity  # noqa: E402
from bincomm.evaluation.pretrained import Pretrained, load_pretrained  # noqa: E402
from bincomm.evaluation.protocols import PROTOCOLS, evaluate_images  # noqa: E402
from bincomm.pretraining import export_backbone, pretrain  # noqa: E402

CPU = torch.device("cpu")
OPTIONS = {
    "recipe": "digits",
    "backbone": "resnetv2_18",
    "backbone_args": '{"layers": [1, 1], "channels": [16, 32], "stem_chs": 16}',
    "global_size": 16,
    "local_size": 12,
    "bits": 20,
    "hidden": 32,
    "max_steps": 30,
    "log_every": 15,
    "save_every": 15,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    pretrain(parse([*(f"--{key}={value}" for key, value in OPTIONS.items()), f"--output={output}"])[0])
    return output


@pytest.fixture(scope="module")
def halves():
    return evaluation_sources("digits", open_source("digits"))[:2]


@pytest.fixture(scope="module")
def measured(run, halves):
    """The model, features and labels of gallery and queries, and every figure."""
    model = load_pretrained(str(run), CPU)
    seen = [extract(model, source) for source in halves]
    labels = [torch.from_numpy(source.labels) for source in halves]
    return model, seen, labels, evaluate_images(model, *halves)


def test_every_way_to_name_it_is_the_same_network(run, halves):
    files = [run, run / "checkpoints/step-000000030.ckpt", run / "backbone.safetensors"]
    models = [load_pretrained(str(file), CPU) for file in files]
    found = [extract(model, halves[1]) for model in models]
    for other in found[1:]:
        assert torch.equal(other["features"], found[0]["features"])
    assert torch.equal(found[0]["signs"], found[1]["signs"])
    assert "signs" not in found[2]
    other = load_pretrained(str(files[1].with_name("step-000000015.ckpt")), CPU)
    assert not torch.equal(extract(other, halves[1])["features"], found[0]["features"])


def test_a_run_whose_checkpoints_are_gone_has_a_backbone_alone(run, halves, tmp_path):
    for name in ("config.yaml", "backbone.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    model = load_pretrained(str(tmp_path), CPU)
    assert model.head is None
    with pytest.raises(ValueError, match="protocols: map_codes measures codes, and .* without a head"):
        evaluate_images(model, *halves, ["map_codes"])


@pytest.mark.parametrize(
    "weights, words",
    [
        ("nowhere", "weights: expected a run's directory, .* got 'nowhere'"),
        ("garbage.safetensors", "weights: .* cannot be read as safetensors"),
        ("unknown.safetensors", "does not say of which backbone it is; say --backbone"),
        ("garbage.ckpt", "cannot be read as a checkpoint"),
        ("empty", "weights: .* holds no run whose config.yaml can be read"),
        ("gone.ckpt", "weights: expected a checkpoint, got .*gone.ckpt, which does not exist"),
        ("list.ckpt", "weights: .*list.ckpt is no checkpoint of a run"),
        ("other.safetensors", "weights: .*other.safetensors holds weights of another backbone"),
        ("vit_tiny_patch16_224.none", "weights: Invalid pretrained tag"),
    ],
)
def test_weights_that_are_none_are_told(tmp_path, weights, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 9)
    (tmp_path / "garbage.ckpt").write_bytes(b"garbage" * 9)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "unknown.safetensors")
    created = {"create_model": '{"model_name": "resnet18"}'}
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", created)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=words):
        load_pretrained(weights if weights.startswith(("nowhere", "vit")) else str(tmp_path / weights), CPU)


@pytest.fixture
def transformer(tmp_path, halves):
    """A small ViT for 32 pixels as a checkpoint and as a backbone, and some images."""
    small = '{"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}'
    keys = OPTIONS | {"backbone": "vit_tiny_patch16_224", "backbone_args": small, "global_size": 32}
    config, _ = parse([f"--{key}={value}" for key, value in (keys | {"local_size": 16}).items()])
    _, teacher = create_networks(config, CPU)
    state = {"config": config.as_dict(), "teacher": teacher.state_dict()}
    export_backbone(teacher, config, tmp_path)
    return state, tmp_path / "backbone.safetensors", halves[1].select(range(20))


def test_position_embeddings_are_those_of_the_size_that_is_shown(transformer, tmp_path):
    state, file, source = transformer
    save_checkpoint(tmp_path / "some.ckpt", state)
    for shown in ({}, {"global_size": 48}):
        models = [
            load_pretrained(str(path), CPU, eval_crop=1, **shown) for path in (tmp_path / "some.ckpt", file)
        ]
        assert [model.config.global_size for model in models] == [shown.get("global_size", 32)] * 2
        found = [extract(model, source)["features"] for model in models]
        assert torch.equal(*found)


def test_what_does_not_fit_a_checkpoint_is_told(transformer, tmp_path):
    state, file, _ = transformer
    path = str(tmp_path / "some.ckpt")

    def load(changed, **shown):
        save_checkpoint(tmp_path / "some.ckpt", changed)
        return load_pretrained(path, CPU, **shown)

    accumulating = state | {"config": state["config"] | {"batch_size": 64, "accumulate": 4}}
    assert load(accumulating, batch_size=7).config.batch_size == 7
    for wanted in (path, str(file)):
        with pytest.raises(ValueError, match=r"cannot take crops of 30 pixels"):
            load_pretrained(wanted, CPU, global_size=30)
    with pytest.raises(ValueError, match="weights: .* of another version of bincomm: .*'unheard_of'"):
        load(state | {"config": state["config"] | {"unheard_of": 1}})
    with pytest.raises(ValueError, match="weights: .* does not fit the network of its config: .*[Mm]issing"):
        load(state | {"teacher": {}})
    with pytest.raises(ValueError, match="backbone: expected vit_tiny_patch16_224, .*, got resnet18"):
        load(state, backbone="resnet18")


def test_figures_are_those_of_independent_implementations(measured):
    _, seen, labels, found = measured
    (x, u), (y, v) = [side["features"].numpy() for side in seen], [side.numpy() for side in labels]
    assert (found["gallery_images"], found["query_images"], found["classes"]) == (1437, 360, 10)
    for k in (10, 20, 100, 200):
        votes = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        assert found["knn"][str(k)] == pytest.approx(votes.fit(x, y).score(u, v), abs=1e-9)
    # The best penalty by the queries themselves: an upper reference.
    centered = [(side - x.mean(0)) / x.std() for side in (x, u)]
    scores = [
        LogisticRegression(C=c, max_iter=3000).fit(centered[0], y).score(centered[1], v) for c in (0.1, 1, 10)
    ]
    assert found["linear"]["accuracy"] == pytest.approx(max(scores), abs=0.012)  # four of 360 images
    similarity = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x.astype(float), u.astype(float))]
    each = [
        average_precision_score(y == label, row)
        for label, row in zip(v, similarity[1] @ similarity[0].T, strict=True)
    ]
    assert found["map"] == pytest.approx(np.mean(each), abs=1e-5)  # theirs sees ties that rounding makes
    values = np.linalg.eigvalsh(np.cov(u.astype(float).T, bias=True)).clip(0)
    assert found["geometry"]["d_eff"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-6)


def test_figures_of_codes(measured):
    _, seen, labels, found = measured
    (a, b), (y, v) = [side["signs"] for side in seen], labels
    distances = (20 - b @ a.T) / 2
    relevant = v[:, None] == y
    near = distances <= 2
    precision = ((near & relevant).sum(1) / near.sum(1).clamp(min=1)).mean()
    assert found["lookup"]["precision"] == pytest.approx(precision.item())
    assert found["lookup"]["answered"] == pytest.approx(near.any(1).double().mean().item())
    assert found["lookup"]["answered"] > 0.1
    # Over random orders of what is equally near.
    generator = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(20):
        order = torch.randperm(1437, generator=generator)
        ranked = relevant[:, order].gather(1, distances[:, order].argsort(dim=1, stable=True)).double()
        precisions = ranked.cumsum(1) / torch.arange(1, 1438) * ranked
        orders.append((precisions.sum(1) / ranked.sum(1)).mean().item())
    assert found["map_codes"] == pytest.approx(np.mean(orders), abs=4 * np.std(orders) / 20**0.5)
    p = (b > 0).double().mean(0)
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / np.log(2)
    assert found["bits"]["bit_entropy"] == pytest.approx(entropy.mean().item())
    assert set(found["knn_codes"]) == {"10", "20", "100", "200"}


def test_the_order_of_the_database_makes_no_difference(measured, halves):
    model, _, _, found = measured
    order = np.random.default_rng(0).permutation(1437)
    again = evaluate_images(
        model, halves[0].select(order), halves[1], ["map", "map_codes", "knn_codes", "lookup"]
    )
    assert again["map_codes"] == pytest.approx(found["map_codes"], abs=1e-9)
    assert again["map"] == pytest.approx(found["map"], abs=1e-9)
    assert again["knn_codes"] == found["knn_codes"]
    assert again["lookup"]["precision"] == pytest.approx(found["lookup"]["precision"], abs=1e-9)


def test_the_augmented_probe_learns_from_crops(measured, halves):
    model, seen, labels, found = measured
    assert found["augmented"]["accuracy"] > 0.4  # digits are hard to tell by their parts
    parts = seen[0]["images"], seen[0]["features"], seen[1]["features"], labels[1]
    few = augmented_probe(model, halves[0], *parts, epochs=2)
    again = augmented_probe(model, halves[0], *parts, epochs=2)
    assert few == again  # crops, order and tenth are of the seed
    assert few.accuracy < found["augmented"]["accuracy"]
    wrong = replace(halves[0], labels=np.random.default_rng(0).integers(10, size=1437))
    assert augmented_probe(model, wrong, *parts, epochs=2).accuracy < 0.3
    with pytest.raises(ValueError, match="source: expected images with labels"):
        augmented_probe(model, replace(halves[0], labels=None), *parts)


def test_what_was_seen_is_kept_until_something_changes(run, halves, tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(folder / label / f"{i}.png")
    (folder / "a" / "7.png").write_bytes(b"none")
    model, source = load_pretrained(str(run), CPU), open_source(str(folder))
    told, calls, look = [], [], module.look
    monkeypatch.setattr(module, "look", lambda *args: calls.append(1) or look(*args))
    first = extract_cached(model, source, lambda image, why: told.append((image, why)))
    again = extract_cached(model, source, lambda image, why: told.append((image, why)))
    assert len(calls) == 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name: value.dtype for name, value in again.items()} == {
        "images": torch.int64,
        "features": torch.float32,
        "signs": torch.float32,
    }
    assert told[0] == told[1]  # what is left out is told every time
    assert first["images"].tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    names = {identity(model, source)}
    for changed in (
        load_pretrained(str(run / "checkpoints/step-000000015.ckpt"), CPU),
        load_pretrained(str(run), CPU, global_size=20),
        load_pretrained(str(run), CPU, eval_crop=0.5),
        load_pretrained(str(run), CPU, mean=(0.1, 0.2, 0.3)),
        load_pretrained(str(run), CPU, std=(0.1, 0.2, 0.3)),
        replace(model, head=None),
    ):
        names.add(identity(changed, source))
    changed, status = folder / "a" / "0.png", (folder / "a" / "0.png").stat()
    Image.new("RGB", (20, 20), (0, 9, 0)).save(changed)
    names.add(identity(model, source))
    os.truncate(changed, status.st_size)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))  # as large and as old as it was
    names.add(identity(model, source))
    monkeypatch.setattr(module, "VERSIONS", ("another",))
    names.add(identity(model, source))
    assert len(names) == 10
    monkeypatch.undo()
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "look", lambda *args: calls.append(1) or look(*args))
    Image.new("RGB", (20, 20), (0, 9, 0)).save(changed)
    (file,) = (tmp_path / "cache" / "features").iterdir()
    file.write_bytes(b"cut")
    extract_cached(model, source)  # is looked at anew
    assert len(calls) == 2
    monkeypatch.setenv("BINCOMM_CACHE", str(file))  # no folder: nothing can be kept
    assert torch.equal(extract_cached(model, source)["signs"][1:], first["signs"][1:])
    assert len(calls) == 3


def test_ranks_see_all_images_together(run, tmp_path):
    run_on_ranks(look_together, 2, tmp_path)


def look_together(rank, world, folder):
    import torch.distributed as dist

    os.environ["BINCOMM_CACHE"] = f"{folder}/cache{rank}"
    source = open_source("digits").select(range(101))
    config, _ = parse([f"--{key}={value}" for key, value in OPTIONS.items()])
    model = Pretrained.of(create_networks(config, CPU)[1], config, CPU)
    assert dist.get_world_size() == world
    ranks = Ranks(rank, world, rank, CPU)
    together = extract(model, source, ranks=ranks)
    alone = extract(model, source, ranks=ALONE)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)
    assert together["images"].tolist() == list(range(101))
    for _ in range(2):  # looked at, then from the cache
        kept = extract_cached(model, source, ranks=ranks)
        assert kept.keys() == ({} if rank else together).keys()
        assert all(torch.equal(value, together[name]) for name, value in kept.items())
    one = extract_cached(model, source.select([4]), ranks=ranks)  # nothing to look at for the other rank
    assert rank or one["images"].tolist() == [0]


def test_small_sets_are_no_special_case(run, tmp_path):
    """Fewer images than k; one class; a class without queries."""
    for place, count in (("train/a", 5), ("train/b", 5), ("val/a", 2)):
        (tmp_path / place).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (30 * i, 90 * (place[-1] == "b"), 0)).save(
                tmp_path / place / f"{i}.png"
            )
    (tmp_path / "val/b").mkdir()
    model = load_pretrained(str(run), CPU)
    source = open_source(str(tmp_path))
    gallery, queries, _ = evaluation_sources(str(tmp_path), source)
    found = evaluate_images(model, gallery, queries)
    assert found.keys() >= set(PROTOCOLS)
    one = evaluate_images(model, gallery.select(range(5)), queries)
    assert list(found["knn"]) == ["10"]
    assert one["knn"] == {"5": 1.0}
    assert one["map"] == one["linear"]["accuracy"] == 1.0


def test_the_command(run, tmp_path, capsys):
    output = tmp_path / "found.json"
    arguments = ["evaluate", str(run), "--data=digits", "--protocols=knn,map_codes", f"--output={output}"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert f"k=20 {found['knn']['20']:.2%}" in text
    assert f"{found['map_codes']:.2%}" in text
    assert "linear" not in found
    assert found["queries_held_out"]
    assert found["shown"] == {"global_size": 16, "eval_crop": 1.0}
    folder = tmp_path / "whole"
    folder.symlink_to(digits() / "train")
    again = ["evaluate", str(run), f"--data={folder}", "--protocols=knn", f"--output={output}"]
    assert cli.main([*again, "--global_size=12", "--eval_crop=0.5"]) == 0
    assert "one folder, split" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert not found["queries_held_out"]
    assert found["shown"] == {"global_size": 12, "eval_crop": 0.5}


def test_what_was_measured_is_told_though_what_follows_fails(run, tmp_path, capsys):
    output = tmp_path / "found.json"
    arguments = ["evaluate", str(run), '--data={"digits": 1}', "--protocols=knn", f"--output={output}"]
    assert cli.main([*arguments, f"--segmentation={tmp_path}"]) == 2
    told = capsys.readouterr()
    found = json.loads(output.read_text())
    assert f"k=20 {found['knn']['20']:.2%}" in told.out
    assert found["shown"] == {"global_size": 16, "eval_crop": 1.0}
    assert str(tmp_path) in told.err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--davis=unlabeled", "--protocols=knn"], "protocols: they measure on --data, got none"),
        (["--output=nowhere/found.json"], "output: expected a file in a folder that exists"),
        (["--output=unlabeled"], "output: expected a file in a folder that exists"),
        (["--protocols=knn, mpa"], "protocols: there is none named 'mpa'"),
        (["--davis=nowhere"], "davis: expected a folder, got nowhere"),
        (["--segmentation=nowhere"], "segmentation: expected a folder, got nowhere"),
        (["--davis=unlabeled"], "unlabeled/ImageSets/2017/val.txt: cannot be read"),
        (["--data=two"], "data: expected folders train and val, or five images of a class at least"),
        (["--backbone=resnet18"], "backbone: expected resnetv2_18, as "),
        (["--data=unlabeled"], "data: expected images with labels"),
        (["--data=nowhere"], "data: 'nowhere' does not exist"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(run, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unlabeled").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "unlabeled" / "1.png")
    for name in "ab":
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "two" / name / "1.png")
    data = [] if "--protocols=knn" in options else ["--data=digits"]
    assert cli.main(["evaluate", str(run), *data, *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
