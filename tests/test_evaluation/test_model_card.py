"""The model card: what it says, and what it keeps to itself."""

import html
import json

import pytest
import yaml

import bincomm
from bincomm.config import PretrainConfig
from bincomm.evaluation.model_card import model_card, write_model_card

RESULT = {
    "last_metrics": {"step": 30, "transmitted_bits": 12.34},
    "versions": {"bincomm": "0.1.0", "torch": "2.14", "timm": "1.0.31"},
    "evaluation": {
        "teacher": {
            "knn": {"20": 0.9889}, "knn_codes": {"20": 0.9706}, "query_images": 360, "gallery_images": 1437
        },
        "before_training": {"knn": {"20": 0.9278}},
        "pixels": {"knn": {"20": 0.975}},
        "queries_held_out": False,
    },
}  # fmt: skip
CONFIG = PretrainConfig(data="digits", precision="fp32")


def card(result=RESULT, images=1437, **keys):
    return model_card(PretrainConfig(**{"data": "digits", "precision": "fp32", **keys}), images, result)


def test_it_says_what_the_network_is_and_its_figures():
    text = card(eval_crop=0.9, global_size=64, batch_size=8, backbone_args={"patch_size": 8})
    for words in (
        "# vit_base_patch16_224, pretrained without labels",
        "| images | 1437, of digits |",
        "| steps | 30 of 8 images |",
        "| bits transmitted | 12.3 |",
        '| arguments of the backbone | `{"patch_size": 8}` |',
        "| center crop | 64 pixels, of images resized to 71, bicubic |",
        "| versions | bincomm 0.1.0, torch 2.14, timm 1.0.31 |",
        "360 queries in 1437 images, at the end of the run; the queries' images, not their labels, were",
        "| teacher's backbone | 98.89% |",
        "| its codes, Hamming | 97.06% |",
        "| before training | 92.78% |",
        "| raw pixels | 97.50% |",
        'timm.create_model("local-dir:MODEL", pretrained=True, num_classes=0)',
    ):
        assert words in text
    unlabeled = card({**RESULT, "evaluation": None, "last_metrics": {}})
    assert "None: the images had no labels" in unlabeled
    assert "98.89" not in unlabeled


def test_its_front_matter_is_that_of_hubs_without_a_license():
    _, front, text = card().split("---\n", 2)
    keys = yaml.safe_load(front)
    assert keys.keys() == {"library_name", "pipeline_tag", "tags"}
    assert (keys["library_name"], keys["pipeline_tag"]) == ("timm", "image-feature-extraction")
    assert "These weights belong to whoever trained them" in text


@pytest.mark.parametrize(
    "data, shown",
    [
        ("/home/me/secret/photos/", "photos"),
        ("/home/me/secret/list.txt@/home/me/other", r"list\.txt"),
        ("/home/me/secret/a-{000..127}.tar", r"a\-\{000\.\.127\}\.tar"),
        ({"/home/me/secret/photos": 3, "cifar10": 0.5}, "photos (weight 3), cifar10 (weight 0.5)"),
    ],
)
def test_it_keeps_the_paths_of_the_machine_to_itself(data, shown):
    text = card(data=data, output="/home/me/secret/run", init_from="/home/me/secret/first")
    assert f"| images | 1437, of {shown} |" in text
    assert "| initial weights | first |" in text
    assert not [
        word for word in ("home", "secret", "run/", "other") if word in text.replace("at the end", "")
    ]


NAMES = [
    "<img src=x onerror=alert(1)>", "a | b", "[x](javascript:alert(1))", "*a* _b_ `c` ~~d~~", "&lt;b&gt;",
    "x\n\n# heading\n<script>alert(1)<b>", "back\\slash \\", "http:\\\\a.example", "www.a.example",
    "\x1b[2J\x07", "\udcff", "\u202eright to left", "![x](y)", "<!--", "{{ x }}", "$x$",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_are_shown_as_they_are(name):
    """By a renderer of CommonMark with tables and links, as hubs have them: no tag but those of the card."""
    markdown = pytest.importorskip("markdown_it")
    page = markdown.MarkdownIt("commonmark").enable("table").render
    plain = page(card(data="PLAIN", init_from="PLAIN").split("---\n", 2)[2])
    shown = "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in name)
    assert page(card(data=name, init_from=name).split("---\n", 2)[2]) == plain.replace(
        "PLAIN", html.escape(shown, quote=False).replace('"', "&quot;")
    )


def test_a_file_of_the_user_stays(tmp_path):
    (tmp_path / "README.md").write_text("# My notes\n")
    write_model_card(tmp_path, CONFIG, 5, RESULT)
    assert (tmp_path / "README.md").read_text() == "# My notes\n"
    (tmp_path / "README.md").unlink()
    for images in (5, 6):  # its own is replaced
        write_model_card(tmp_path, CONFIG, images, RESULT)
        assert (tmp_path / "README.md").read_text() == model_card(CONFIG, images, RESULT)


def test_a_run_leaves_one(run):
    """Of the figures in its result.json."""
    result = json.loads((run / "result.json").read_text())
    text = (run / "README.md").read_text()
    assert f"| teacher's backbone | {result['evaluation']['teacher']['knn']['20']:.2%} |" in text
    assert f"bincomm {bincomm.__version__}" in text
    assert str(run) not in text
