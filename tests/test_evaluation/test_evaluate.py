"""Networks loaded, their features computed and evaluated: every figure against an independent computation."""

import json
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from bincomm import cli
from bincomm.building import create_networks
from bincomm.data.digits import digits
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.distributed.ranks import Ranks
from bincomm.engine.checkpoints import save_checkpoint
from bincomm.evaluation import features as module
from bincomm.evaluation.augmented import augmented_probe
from bincomm.evaluation.evaluate import PROTOCOLS, NoUsableImagesError, describe, evaluate, figure
from bincomm.evaluation.features import extract_features, extract_features_cached, identity
from bincomm.evaluation.pretrained import Pretrained, load_pretrained
from bincomm.pretraining import export_backbone

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluated(run, sources):
    """The model, features and labels of gallery and queries, and the result of all protocols."""
    model = load_pretrained(str(run), CPU)
    values = [extract_features(model, source) for source in sources]
    labels = [torch.from_numpy(source.labels) for source in sources]
    return model, values, labels, evaluate(model, *sources)


def test_every_way_to_name_it_is_the_same_network(run, sources):
    files = [run, run / "checkpoints/step-000000020.ckpt", run / "model.safetensors"]
    models = [load_pretrained(str(file), CPU) for file in files]
    results = [extract_features(model, sources[1]) for model in models]
    for other in results[1:]:
        assert torch.equal(other["features"], results[0]["features"])
    assert torch.equal(results[0]["signs"], results[1]["signs"])
    assert "signs" not in results[2]
    other = load_pretrained(str(files[1].with_name("step-000000010.ckpt")), CPU)
    assert not torch.equal(extract_features(other, sources[1])["features"], results[0]["features"])


def test_a_checkpoint_that_is_not_the_end_is_told(run, tmp_path, messages, caplog):
    caplog.set_level("INFO", "bincomm")
    load_pretrained(str(run), CPU)
    assert not [text for text in messages() if "step" in text]
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints/step-000000020.ckpt").unlink()  # as after a full disk
    load_pretrained(str(copy), CPU)
    assert f"{copy} ended at step 20, but its newest checkpoint is of step 10" in messages()[-1]
    (copy / "result.json").unlink()
    load_pretrained(str(copy), CPU)
    assert "is not finished; its network after step 10 is taken" in messages()[-1]


@pytest.mark.parametrize("part", ["head", "backbone"])
def test_weights_that_give_nan_are_refused(run, sources, part):
    model = load_pretrained(str(run), CPU)
    weights = model.head.layers[-1].bias if part == "head" else next(model.backbone.parameters())
    weights.data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"weights: {run} gives logits that are NaN for .*png"):
        evaluate(model, *sources, ["bits"])


def test_queries_that_map_leaves_out_are_counted(run, sources):
    """A gallery without one of the classes."""
    gallery, queries = sources
    others = gallery.select([i for i, label in enumerate(gallery.labels) if label != 3][::5])
    result = evaluate(load_pretrained(str(run), CPU), others, queries, ["map", "map_codes", "knn"])
    missing = int((queries.labels == 3).sum())
    assert result["unmatched_queries"] == missing > 0
    shown = describe(result).splitlines()
    assert [f"({missing} queries left out, whose class no image has)" in line for line in shown] == [
        False, False, True, True
    ]  # fmt: skip
    complete = evaluate(load_pretrained(str(run), CPU), *sources, ["map"])
    assert complete["unmatched_queries"] == 0
    assert "left out" not in describe(complete)


def test_a_run_whose_checkpoints_are_gone_has_a_backbone_alone(run, sources, tmp_path):
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    model = load_pretrained(str(tmp_path), CPU)
    assert model.head is None
    with pytest.raises(ValueError, match="protocols: map_codes measures codes, and .* without a head"):
        evaluate(model, *sources, ["map_codes"])


@pytest.mark.parametrize(
    "weights, words",
    [
        ("nowhere", "weights: expected a run's directory, .* got 'nowhere'"),
        ("garbage.safetensors", "weights: .* cannot be read as safetensors"),
        ("unknown.safetensors", "does not name its backbone; give its timm name as backbone"),
        ("garbage.ckpt", "cannot be read as a checkpoint"),
        ("empty", r"weights: .* holds no finished run \(there is no model.safetensors\)"),
        ("gone.ckpt", "weights: expected a checkpoint, got .*gone.ckpt, which does not exist"),
        ("list.ckpt", "weights: .*list.ckpt is no checkpoint of a run"),
        ("other.safetensors", "weights: .*other.safetensors holds weights of another backbone"),
        ("vit_tiny_patch16_224.none", "weights: Invalid pretrained tag"),
    ],
)
def test_wrong_weights_are_named(tmp_path, weights, words):
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
def transformer(tmp_path, sources, configuration):
    """A small ViT for 32 pixels as a checkpoint and as a backbone, and some images."""
    small = '{"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}'
    config = configuration(
        backbone="vit_tiny_patch16_224", backbone_args=small, global_size=32, local_size=16
    )
    _, teacher = create_networks(config, CPU)
    state = {"config": config.as_dict(), "teacher": teacher.state_dict()}
    export_backbone(teacher, config, tmp_path)
    return state, tmp_path / "model.safetensors", sources[1].select(range(20))


def test_position_embeddings_are_those_of_the_size_of_the_crops(transformer, tmp_path):
    state, file, source = transformer
    save_checkpoint(tmp_path / "some.ckpt", state)
    for size in ({}, {"global_size": 48}):
        models = [
            load_pretrained(str(path), CPU, eval_crop=1, **size) for path in (tmp_path / "some.ckpt", file)
        ]
        assert [model.config.global_size for model in models] == [size.get("global_size", 32)] * 2
        assert torch.equal(*(extract_features(model, source)["features"] for model in models))


def test_what_does_not_fit_a_checkpoint_is_named(transformer, tmp_path):
    state, file, _ = transformer
    path = str(tmp_path / "some.ckpt")

    def load(changed, **preprocessing):
        save_checkpoint(tmp_path / "some.ckpt", changed)
        return load_pretrained(path, CPU, **preprocessing)

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


def test_figures_are_those_of_independent_implementations(evaluated):
    _, values, labels, result = evaluated
    (x, u), (y, v) = [side["features"].numpy() for side in values], [side.numpy() for side in labels]
    assert (result["gallery_images"], result["query_images"], result["classes"]) == (1437, 360, 10)
    for k in (10, 20, 100, 200):
        votes = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        assert result["knn"][str(k)] == pytest.approx(votes.fit(x, y).score(u, v), abs=1e-9)
    # The best penalty by the queries themselves: an upper reference.
    centered = [(side - x.mean(0)) / x.std() for side in (x, u)]
    scores = [
        LogisticRegression(C=c, max_iter=3000).fit(centered[0], y).score(centered[1], v) for c in (0.1, 1, 10)
    ]
    assert result["linear"]["accuracy"] == pytest.approx(max(scores), abs=0.012)  # four of 360 images
    similarity = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x.astype(float), u.astype(float))]
    each = [
        average_precision_score(y == label, row)
        for label, row in zip(v, similarity[1] @ similarity[0].T, strict=True)
    ]
    assert result["map"] == pytest.approx(np.mean(each), abs=1e-5)  # theirs sees ties that rounding makes
    spectrum = np.linalg.eigvalsh(np.cov(u.astype(float).T, bias=True)).clip(0)
    assert result["geometry"]["d_eff"] == pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum(), rel=1e-6)


def test_figures_of_codes(evaluated):
    _, values, labels, result = evaluated
    (a, b), (y, v) = [side["signs"] for side in values], labels
    distances = (20 - b @ a.T) / 2
    relevant = v[:, None] == y
    near = distances <= 2
    precision = ((near & relevant).sum(1) / near.sum(1).clamp(min=1)).mean()
    assert result["lookup"]["precision"] == pytest.approx(precision.item())
    assert result["lookup"]["answered"] == pytest.approx(near.any(1).double().mean().item())
    assert result["lookup"]["answered"] > 0.1
    # Over random orders of what is equally near.
    generator = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(20):
        order = torch.randperm(1437, generator=generator)
        ranked = relevant[:, order].gather(1, distances[:, order].argsort(dim=1, stable=True)).double()
        precisions = ranked.cumsum(1) / torch.arange(1, 1438) * ranked
        orders.append((precisions.sum(1) / ranked.sum(1)).mean().item())
    assert result["map_codes"] == pytest.approx(np.mean(orders), abs=4 * np.std(orders) / 20**0.5)
    p = (b > 0).double().mean(0)
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / np.log(2)
    assert result["bits"]["bit_entropy"] == pytest.approx(entropy.mean().item())
    assert set(result["knn_codes"]) == {"10", "20", "100", "200"}


def test_the_order_of_the_database_makes_no_difference(evaluated, sources):
    model, _, _, result = evaluated
    order = np.random.default_rng(0).permutation(1437)
    again = evaluate(model, sources[0].select(order), sources[1], ["map", "map_codes", "knn_codes", "lookup"])
    assert again["map_codes"] == pytest.approx(result["map_codes"], abs=1e-9)
    assert again["map"] == pytest.approx(result["map"], abs=1e-9)
    assert again["knn_codes"] == result["knn_codes"]
    assert again["lookup"]["precision"] == pytest.approx(result["lookup"]["precision"], abs=1e-9)


def test_the_augmented_probe_learns_from_crops(evaluated, sources):
    model, values, labels, result = evaluated
    assert result["augmented"]["accuracy"] > 0.4  # digits are hard to tell by their parts
    parts = values[0]["indices"], values[0]["features"], values[1]["features"], labels[1]
    few = augmented_probe(model, sources[0], *parts, epochs=2)
    again = augmented_probe(model, sources[0], *parts, epochs=2)
    assert few == again  # crops, order and tenth are of the seed
    assert few.accuracy < result["augmented"]["accuracy"]
    wrong = replace(sources[0], labels=np.random.default_rng(0).integers(10, size=1437))
    assert augmented_probe(model, wrong, *parts, epochs=2).accuracy < 0.3
    with pytest.raises(ValueError, match="source: expected images with labels"):
        augmented_probe(model, replace(sources[0], labels=None), *parts)


def test_features_are_cached_until_something_changes(run, sources, tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(folder / label / f"{i}.png")
    (folder / "a" / "7.png").write_bytes(b"none")
    model, source = load_pretrained(str(run), CPU), open_source(str(folder))
    unusable, calls, forward = [], [], module.forward_batches
    monkeypatch.setattr(module, "forward_batches", lambda *args: calls.append(1) or forward(*args))
    first = extract_features_cached(model, source, lambda index, reason: unusable.append((index, reason)))
    again = extract_features_cached(model, source, lambda index, reason: unusable.append((index, reason)))
    assert len(calls) == 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name: value.dtype for name, value in again.items()} == {
        "indices": torch.int64,
        "features": torch.float32,
        "signs": torch.float32,
    }
    assert unusable[0] == unusable[1]  # what is left out is reported every time
    assert first["indices"].tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    names = {identity(model, source)}
    for changed in (
        load_pretrained(str(run / "checkpoints/step-000000010.ckpt"), CPU),
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
    monkeypatch.setattr(module, "forward_batches", lambda *args: calls.append(1) or forward(*args))
    Image.new("RGB", (20, 20), (0, 9, 0)).save(changed)
    (file,) = (tmp_path / "cache" / "features").iterdir()
    file.write_bytes(b"cut")
    extract_features_cached(model, source)  # is looked at anew
    assert len(calls) == 2
    monkeypatch.setenv("BINCOMM_CACHE", str(file))  # no folder: nothing can be kept
    assert torch.equal(extract_features_cached(model, source)["signs"][1:], first["signs"][1:])
    assert len(calls) == 3


def test_ranks_compute_the_features_of_all_images_together(tmp_path, monkeypatch, configuration):
    """Two ranks, here threads with a cache each, of which the first one's alone counts."""
    local = threading.local()
    monkeypatch.setattr(
        module, "cache_folder", lambda *parts: tmp_path.joinpath(f"cache{local.rank}", *parts)
    )
    source = open_source("digits").select(range(101))
    model = Pretrained.of(create_networks(configuration(), CPU)[1], configuration(), CPU)
    barrier, values, results = threading.Barrier(2, timeout=60), [None, None], [None, None]

    class Thread(Ranks):
        def gather(self, value):
            values[self.rank] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

        def first(self, function):
            return self.gather(function() if self.rank == 0 else None)[0]

    def work(rank):
        local.rank, ranks = rank, Thread(rank, 2, rank, CPU)
        together = extract_features(model, source, ranks=ranks)
        cached = [extract_features_cached(model, source, ranks=ranks) for _ in range(2)]
        # There is no image for the second rank.
        one = extract_features_cached(model, source.select([4]), ranks=ranks)
        results[rank] = together, cached, one

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = extract_features(model, source)
    for rank, (together, cached, one) in enumerate(results):
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)
        assert together["indices"].tolist() == list(range(101))
        for again in cached:  # computed, then from the cache
            assert again.keys() == ({} if rank else together).keys()
            assert all(torch.equal(value, together[name]) for name, value in again.items())
        assert rank or one["indices"].tolist() == [0]
    assert not (tmp_path / "cache1").exists()


def test_unusable_images_are_left_out_and_logged(run, tmp_path, messages):
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 20), (80 * i, 0, 0)).save(tmp_path / part / label / f"{i}.png")
        (tmp_path / part / "a" / "1.png").write_bytes(b"none")
    model = load_pretrained(str(run), CPU)
    gallery, queries, _ = evaluation_sources(str(tmp_path), open_source(str(tmp_path)))
    result = evaluate(model, gallery, queries, ["knn"], cache=False)
    assert (result["gallery_images"], result["query_images"]) == (5, 5)
    logged = messages()
    assert len(logged) == 2
    assert logged[0].startswith(f"left out of the gallery: {tmp_path}/train/a/1.png: ")
    assert logged[1].startswith(f"left out of the queries: {tmp_path}/val/a/1.png: ")
    evaluate(model, gallery, queries, ["knn"], cache=False, report_unusable=("queries",))
    assert messages() == [*logged, logged[1]]
    with pytest.raises(NoUsableImagesError, match="queries: none of the 1 images can be used"):
        evaluate(model, gallery, queries.select([1]), ["knn"], cache=False)
    with pytest.raises(ValueError, match="queries: expected images with labels"):
        evaluate(model, gallery, replace(queries, labels=None), ["knn"], cache=False)


def test_without_the_cache_nothing_is_kept(evaluated, sources, tmp_path, monkeypatch):
    model, _, _, result = evaluated
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    uncached = evaluate(model, *sources, ["knn", "bits"], cache=False)
    assert not (tmp_path / "cache").exists()
    assert {name: uncached[name] for name in ("knn", "bits")} == {
        name: result[name] for name in ("knn", "bits")
    }
    assert uncached["seconds"].keys() == {"features", "knn", "bits"}


def test_small_sets_are_no_special_case(run, tmp_path):
    """Fewer images than k; one class; a class without queries."""
    for name, count in (("train/a", 5), ("train/b", 5), ("val/a", 2)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (30 * i, 90 * (name[-1] == "b"), 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "val/b").mkdir()
    model = load_pretrained(str(run), CPU)
    source = open_source(str(tmp_path))
    gallery, queries, _ = evaluation_sources(str(tmp_path), source)
    result = evaluate(model, gallery, queries)
    assert result.keys() >= set(PROTOCOLS)
    one = evaluate(model, gallery.select(range(5)), queries)
    assert list(result["knn"]) == ["10"]
    assert one["knn"] == {"5": 1.0}
    assert one["map"] == one["linear"]["accuracy"] == 1.0
    assert figure(result, "knn", "20") == result["knn"]["10"]
    assert figure(one, "knn", "20") == figure(one, "knn", "10") == 1.0
    assert "k=5 100.00%" in describe(one)


def test_the_command(run, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["evaluate", str(run), "--data=digits", "--protocols=knn,map_codes", f"--output={output}"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert f"k=20 {result['knn']['20']:.2%}" in text
    assert f"{result['map_codes']:.2%}" in text
    assert "linear" not in result
    assert result["queries_held_out"]
    assert result["preprocessing"] == {"global_size": 16, "eval_crop": 1.0}
    folder = tmp_path / "whole"
    folder.symlink_to(digits() / "train")
    again = ["evaluate", str(run), f"--data={folder}", "--protocols=knn", f"--output={output}"]
    assert cli.main([*again, "--global_size=12", "--eval_crop=0.5"]) == 0
    assert "one folder, split" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert not result["queries_held_out"]
    assert result["preprocessing"] == {"global_size": 12, "eval_crop": 0.5}


def test_a_result_is_shown_though_what_follows_fails(run, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["evaluate", str(run), '--data={"digits": 1}', "--protocols=knn", f"--output={output}"]
    for name in ("train/images", "train/masks", "val/images", "val/masks"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (20, 20)).save(tmp_path / name / "1.png")
    (tmp_path / "train/masks/1.png").write_bytes(b"")
    assert cli.main([*arguments, f"--segmentation={tmp_path}"]) == 2
    printed = capsys.readouterr()
    result = json.loads(output.read_text())
    assert f"k=20 {result['knn']['20']:.2%}" in printed.out
    assert result["preprocessing"] == {"global_size": 16, "eval_crop": 1.0}
    assert "train/masks/1.png: cannot be read" in printed.err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--davis=unlabeled", "--protocols=knn"], "protocols: expected data to evaluate them on, got none"),
        (["--output=nowhere/result.json"], "output: expected a file in a folder that can be written"),
        (["--output=unlabeled"], "output: expected a file in a folder that can be written"),
        (["--protocols=knn, mpa"], "protocols: there is none named 'mpa'"),
        (["--davis=nowhere"], "davis: expected a folder, got nowhere"),
        (["--segmentation=nowhere"], "segmentation: expected a folder, got nowhere"),
        (["--davis=unlabeled"], "davis: expected a folder of DAVIS with JPEGImages/480p"),
        (["--data=two"], "no class has 5 images, of which one could be held out"),
        (["--backbone=resnet18"], "backbone: expected resnetv2_18, as "),
        (["--data=unlabeled"], "data: expected images with labels"),
        (["--data=nowhere"], "data: 'nowhere' does not exist"),
    ],
)
def test_errors_take_one_line(run, tmp_path, capsys, monkeypatch, options, words):
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
