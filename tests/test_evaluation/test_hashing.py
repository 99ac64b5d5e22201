import numpy as np
import pytest
import torch

import bincomm
from bincomm.data.sources import open_source
from bincomm.evaluation import hashing
from bincomm.evaluation.evaluate import describe
from bincomm.evaluation.hashing import evaluate_hashing, open_lists
from bincomm.evaluation.pretrained import load_pretrained
from bincomm.evaluation.retrieval import mean_average_precision_at

LABELS = {"gallery": (np.arange(60)[:, None] % np.array([2, 3, 5])) == 0, "queries": np.eye(3, dtype=bool)}


@pytest.fixture
def lists(tmp_path):
    """60 images and 3 queries, in two folders below that of the lists."""
    source = open_source("digits")
    for number in range(63):
        folder = tmp_path / "a picture 1" / ("gallery" if number < 60 else "queries")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number} 0.png").write_bytes(bytes(source.images.read(number)))
    for name, labels in LABELS.items():
        start = 0 if name == "gallery" else 60
        lines = [
            f"a picture 1/{name}/{start + row} 0.png {' '.join(map(str, each.astype(int)))}"
            for row, each in enumerate(labels)
        ]
        (tmp_path / hashing.LISTS[name]).write_text("\n".join(lines) + "\n\n")
    return tmp_path


def test_lists_have_images_and_labels(lists):
    sources, labels = open_lists(lists)
    for name in LABELS:
        assert (labels[name] == LABELS[name]).all()
        assert all(f"{name}/" in path for path in sources[name].images.names())
    assert sources["queries"].images.name(0) == str(lists / "a picture 1/queries/60 0.png")


@pytest.mark.slow
def test_images_that_share_a_label_are_relevant(run, lists):
    model = load_pretrained(run, "cpu")
    result = evaluate_hashing(model, lists, at=10)
    sizes = {"gallery_images": 60, "query_images": 3, "labels": 3, "unmatched_queries": 0, "k": 10}
    assert sizes.items() <= result.items()
    logits = [
        torch.stack([torch.as_tensor(model.encode(path)[1]) for path in source.images.names()])
        for source in open_lists(lists).sources.values()
    ]
    database, queries = (2.0 * bits.float() - 1 for bits in logits)
    expected = hashing_figure(database, queries)
    assert result["codes"] == pytest.approx(expected, abs=1e-9)
    assert 0 < result["asymmetric"] <= 1
    assert "mAP@10" in describe({"hashing": result})
    figures = bincomm.evaluate(run, hashing=lists, at=10, device="cpu")
    assert figures["hashing"] == result


@pytest.mark.slow
def test_queries_that_nothing_is_relevant_to(run, lists):
    path = lists / "test.txt"
    path.write_text(path.read_text().replace("60 0.png 1 0 0", "60 0.png 0 0 0"))
    model = load_pretrained(run, "cpu")
    zero, skip = (evaluate_hashing(model, lists, at=10, unmatched=name) for name in ("zero", "skip"))
    assert zero["unmatched_queries"] == skip["unmatched_queries"] == 1
    for name in ("codes", "asymmetric"):
        assert zero[name] == pytest.approx(skip[name] * 2 / 3)


def hashing_figure(database, queries):
    return mean_average_precision_at(
        database,
        torch.from_numpy(LABELS["gallery"]),
        queries,
        torch.from_numpy(LABELS["queries"]),
        k=10,
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("x.png 1 0", "expected a path and 3 labels, each 0 or 1, got x.png 1 0"),
        ("x.png 1 0 2", "expected a path and 3 labels"),
        (" 1 0 1", "expected a path and 3 labels"),
        ("x.png", "expected a path and 3 labels"),
    ],
)
def test_a_wrong_line_is_named(lists, line, what):
    path = lists / "test.txt"
    path.write_text(path.read_text().replace("\n\n", f"\n{line}\n"))
    with pytest.raises(ValueError, match=f"hashing: .*test.txt, line 4: {what}"):
        open_lists(lists)


def test_what_is_no_list_is_named(lists, tmp_path):
    with pytest.raises(ValueError, match=r"hashing: expected a folder with database.txt and test.txt, got"):
        open_lists(tmp_path / "nowhere")
    (lists / "test.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"hashing: .*test.txt lists no images"):
        open_lists(lists)
    (lists / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"hashing: .*test.txt cannot be read: No such file"):
        open_lists(lists)


def test_images_must_lie_below_a_folder(lists, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (lists / "a picture 1").rename(elsewhere / "a picture 1")
    for name in hashing.LISTS.values():
        path = lists / name
        path.write_text(path.read_text().replace("a picture", f"{elsewhere}/a picture"))
    with pytest.raises(ValueError, match=f"hashing: .*do not lie in {lists}/.*name a folder .*{lists}@/"):
        open_lists(lists)
    sources, _ = open_lists(f"{lists}@{elsewhere}")
    assert len(sources["gallery"].images) == 60


def test_codes_need_a_head(run, lists):
    model = load_pretrained(run / "model.safetensors", "cpu")
    with pytest.raises(ValueError, match="hashing: .*without a head"):
        evaluate_hashing(model, lists)


def test_wrong_numbers_are_named(run):
    with pytest.raises(ValueError, match="at: expected at least 1, got 0"):
        bincomm.evaluate(run, "digits", at=0)
    with pytest.raises(ValueError, match="unmatched: expected zero or skip, got all"):
        bincomm.evaluate(run, "digits", unmatched="all")
